"""Readers and writers: there and back, the held-out cities, and every bad input in one sentence."""
import os, re, struct, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, TiffImagePlugin

from sage.core import MissingPath, UserError
from sage.formats import (IMAGE_SUFFIXES, MSLS_CITIES, detect_format, gsv_names, msls_split, read_gsv, read_msls, read_photos, read_places, read_utm, utm_fields, utm_name,
                          write_gsv, write_msls, write_utm)
from sage.geo import to_latlon, to_utm
from sage.photos import list_images, photo_label
from sage.places import make_table

HYPOTHESIS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ORIGIN = {'32N': (5e5, 5.3e6), '56S': (3.3e5, 6.25e6), '31N': (4.5e5, 5.41e6)}


def files(folder, n):
    "n files with different bytes; readers look at names only."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): (folder/f'{i}.jpg').write_bytes(struct.pack('<i', i))
    return [f'{folder}/{i}.jpg' for i in range(n)]


def town(folder, n=12, city='aldwick', zone='32N', seed=0, **more):
    rng = np.random.default_rng(seed); e, m = ORIGIN.get(zone, (0., 0.))
    return make_table(**{**dict(image=files(folder, n), city=city, place=np.arange(n) // 3, easting=e + rng.uniform(0, 900, n), northing=m + rng.uniform(0, 900, n), zone=zone, heading=rng.uniform(0, 360, n),
                        role=np.where(np.arange(n) % 3, 'database', 'query'), split='train', condition=np.where(np.arange(n) % 2, 'night', 'day'), sequence=np.where(np.arange(n) < 5, 's0', 's1'), time='2026-03-01'), **more})


def in_order(df, table):
    "Rows of `df` in the order of `table`, by the files' bytes."
    rows = {Path(p).read_bytes(): i for i, p in enumerate(df.image)}
    return df.iloc[[rows[Path(p).read_bytes()] for p in table.image]].reset_index(drop=True)


def says(what, do, *args, **kwargs):
    with pytest.raises(UserError) as e: do(*args, **kwargs)
    assert what in str(e.value) and '\n' not in str(e.value), str(e.value)
    return e.value


# ---- there and back

WAYS = {'gsv': (write_gsv, read_gsv), 'msls': (write_msls, read_msls), 'utm': (write_utm, read_utm)}


@pytest.mark.parametrize('way', WAYS)
def test_there_and_back(way, tmp_path):
    table = pd.concat([town(tmp_path/'a', zone='32N'), town(tmp_path/'b', 11, 'brennau', '56S', 1)], ignore_index=True)
    for i, path in enumerate(table.image): Path(path).write_bytes(struct.pack('<i', i))
    write, read = WAYS[way]
    assert write(table, tmp_path/'out') == tmp_path/'out' and detect_format(tmp_path/'out') == way
    df = in_order(read(tmp_path/'out'), table)
    for column in ('city', 'place', 'zone'): assert (df[column] == table[column]).all(), column
    assert np.hypot(df.easting - table.easting, df.northing - table.northing).max() < .01
    turn = (df.heading - table.heading + 180) % 360 - 180
    assert turn.abs().max() <= {'gsv': .5, 'msls': 0., 'utm': .005}[way] + 1e-9
    for column in {'gsv': (), 'msls': ('role', 'condition', 'time', 'sequence'), 'utm': ('role', 'condition', 'time', 'split')}[way]: assert (df[column] == table[column]).all(), column
    if way == 'gsv': assert set(df.time) == {'2026-03'} and set(df.condition) == {''}
    assert not [p for p in (tmp_path/'out').rglob('.*')], 'nothing temporary is left'


def test_files_are_linked_not_doubled(tmp_path):
    table = town(tmp_path/'a')
    df = read_utm(write_utm(table, tmp_path/'out'))
    assert {os.stat(p).st_ino for p in df.image} == {os.stat(p).st_ino for p in table.image}


def test_copied_where_links_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*a, **k): raise OSError('another disk')
    monkeypatch.setattr(os, 'link', refuse)
    table = town(tmp_path/'a')
    df = in_order(read_msls(write_msls(table, tmp_path/'out')), table)
    assert (df.place == table.place).all() and not {os.stat(p).st_ino for p in df.image} & {os.stat(p).st_ino for p in table.image}


text = st.text(st.characters(codec='utf-8', exclude_characters='@/\\:*?"<>|', exclude_categories=['C', 'Z']), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e6, 2e7), st.floats(-1e6, 2e7), st.sampled_from(['', '1N', '60S', '32N', '7S']), st.floats(-80, 84), st.one_of(st.just(float('nan')), st.floats(0, 359.99)), text, text)
def test_utm_names_round_trip(easting, northing, zone, lat, heading, note, pano):
    name = utm_name(easting, northing, zone, lat, 0., heading, note=note, pano_id=pano) + '.jpg'
    f = utm_fields('/some@where/' + name)
    assert name.count('@') == 15 and abs(f['easting'] - easting) <= .00501 and abs(f['northing'] - northing) <= .00501
    assert f['zone'] == zone and f['note'] == note and f['pano_id'] == pano
    assert np.isnan(heading) == np.isnan(f['heading']) and (np.isnan(heading) or abs((f['heading'] - heading + 180) % 360 - 180) <= .00501)


GSV_NAME = re.compile(r'(.+)_(\d{7,})_(\d{4})_(\d\d)_(\d{3})_(-?[\d.]+)_(-?[\d.]+)_([^_]*)')


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(categories=['L', 'Nd']), min_size=1, max_size=8), st.integers(0, 10**8), st.integers(0, 9999), st.integers(1, 12), st.integers(0, 720),
       st.decimals(-90, 90, places=6), st.decimals(-180, 180, places=6), st.text(st.characters(categories=['L', 'Nd']), max_size=8))
def test_gsv_names_round_trip(city, place, year, month, bearing, lat, lon, pano):
    df = pd.DataFrame(dict(place_id=[place], year=[year], month=[month], northdeg=[bearing], city_id=[city], lat=[format(lat, 'f')], lon=[format(lon, 'f')], panoid=[pano]))
    c, *numbers, a, o, p = GSV_NAME.fullmatch(gsv_names(df)[0]).groups()
    assert (c, a, o, p) == (city, format(lat, 'f'), format(lon, 'f'), pano) and [*map(int, numbers)] == [place, year, month, bearing]


@pytest.mark.parametrize('way', WAYS)
@HYPOTHESIS
@given(data=st.data())
def test_any_table_comes_back(way, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('t'); n = data.draw(st.integers(1, 6))
    zone = data.draw(st.sampled_from([*ORIGIN])); e, m = ORIGIN[zone]
    metres = lambda: st.lists(st.floats(-2000, 2000), min_size=n, max_size=n)
    table = town(folder/'a', n, zone=zone, easting=e + np.array(data.draw(metres())), northing=m + np.array(data.draw(metres())),
                 place=data.draw(st.lists(st.integers(0, 2**40), min_size=n, max_size=n)), heading=data.draw(st.lists(st.floats(0, 360, exclude_max=True), min_size=n, max_size=n)))
    write, read = WAYS[way]
    df = in_order(read(write(table, folder/'aldwick')), table)
    assert (df.place == table.place).all() and (df.city == 'aldwick').all() and (df.zone == zone).all()
    assert np.hypot(df.easting - table.easting, df.northing - table.northing).max() < .01


def test_names_that_clash_or_are_odd(tmp_path):
    table = town(tmp_path/'a', 4)
    odd = []
    for i, name in enumerate(('x/sun & rain@7.JPG', 'y/sun & rain@7.JPG', 'z/é_1.jpeg', 'z/' + 'l' * 150 + '.jpg')):
        p = tmp_path/name; p.parent.mkdir(exist_ok=True); p.write_bytes(bytes([i])); odd.append(str(p))
    table['image'] = odd
    for way, (write, read) in WAYS.items():
        df = in_order(read(write(table, tmp_path/way)), table)
        assert (df.place == table.place).all() and df.image.is_unique


def test_a_zone_kept_across_its_edge(tmp_path):
    "A town measured in the neighbouring zone keeps it in MSLS and @utm@."
    e, n, _ = to_utm(np.full(12, 55.6), np.linspace(11.97, 12.1, 12), '32N')
    table = town(tmp_path/'a', easting=e, northing=n, zone='32N')
    for way in ('msls', 'utm'):
        df = in_order(WAYS[way][1](WAYS[way][0](table, tmp_path/way)), table)
        assert (df.zone == '32N').all() and np.abs(df.easting - e).max() < .01


def test_the_equator_and_a_table_without_a_zone(tmp_path):
    table = town(tmp_path/'a', easting=np.linspace(1, 50, 12), northing=np.linspace(-20, 20, 12), zone='')
    for way in ('msls', 'utm'): assert (WAYS[way][1](WAYS[way][0](table, tmp_path/way)).zone == '').all()
    says('GSV-Cities needs latitude and longitude', write_gsv, table, tmp_path/'gsv')
    table = town(tmp_path/'a', easting=5e5 + np.linspace(1, 50, 12), northing=np.linspace(-20, 20, 12), zone='32N')
    for way in ('msls', 'utm'):
        df = in_order(WAYS[way][1](WAYS[way][0](table, tmp_path/f'{way}2')), table)
        assert (df.zone == '32N').all() and np.abs(df.northing - table.northing).max() < .01


# ---- writers refuse, and never write halves

@pytest.mark.parametrize('way', WAYS)
def test_writers_refuse(way, tmp_path):
    write, table = WAYS[way][0], town(tmp_path/'a')
    (tmp_path/'used').mkdir(); (tmp_path/'used'/'notes.txt').touch(); (tmp_path/'file').touch()
    for name in ('used', 'file'): says('is not an empty folder', write, table, tmp_path/name)
    for city in ('', '..', 'a/b', '.hidden', 'a\\b'): says('cannot be the name of a city', write, table.assign(city=city), tmp_path/'out')
    says('no such file', write, table.assign(image='/nowhere/x.jpg'), tmp_path/'out')
    says('has easting nan', write, table.assign(easting=np.nan), tmp_path/'out')
    (tmp_path/'x.txt').touch(); says('cannot be laid out', write, table.assign(image=str(tmp_path/'x.txt')), tmp_path/'out')
    assert not (tmp_path/'out').exists()
    (tmp_path/'empty').mkdir(); write(table, tmp_path/'empty')


def test_gsv_cannot_hold_everything(tmp_path):
    table = town(tmp_path/'a')
    says("has place '-1', but GSV-Cities needs place numbers from 0", write_gsv, table.assign(place=-1), tmp_path/'o')
    says('needs a bearing', write_gsv, table.assign(heading=np.nan), tmp_path/'o')
    assert set(read_gsv(write_gsv(table.assign(time=''), tmp_path/'o')).time) == {''}


@pytest.mark.parametrize('way', WAYS)
def test_a_city_is_whole_or_absent(way, tmp_path, monkeypatch):
    import sage.formats as formats
    table = pd.concat([town(tmp_path/'a'), town(tmp_path/'b', 9, 'brennau')], ignore_index=True)
    lay, calls = formats._lay, []
    def fails(sources, targets):
        calls.append(1)
        if 'brennau' in str(targets[0] if len(targets) else ''): lay(list(sources)[:1], targets[:1]); raise OSError('disk full')
        lay(sources, targets)
    monkeypatch.setattr(formats, '_lay', fails)
    with pytest.raises(OSError, match='disk full'): WAYS[way][0](table, tmp_path/'out')
    assert calls and not [p for p in (tmp_path/'out').rglob('*') if 'brennau' in str(p) and p.is_file()]
    assert set(WAYS[way][1](tmp_path/'out').city) == {'aldwick'}


# ---- GSV-Cities

GSV_HEADER = 'place_id,year,month,northdeg,city_id,lat,lon,panoid\n'


def gsv(root, rows, name='Paris', touch=True):
    (root/'Dataframes').mkdir(parents=True, exist_ok=True)
    (root/'Dataframes'/f'{name}.csv').write_text(GSV_HEADER + ''.join(','.join(map(str, r)) + '\n' for r in rows))
    for p, y, m, b, c, lat, lon, pano in rows if touch else ():
        (root/'Images'/c).mkdir(parents=True, exist_ok=True); (root/'Images'/c/f'{c}_{int(p):07d}_{int(y):04d}_{int(m):02d}_{int(b):03d}_{lat}_{lon}_{pano}.jpg').touch()


ROW = (7, 2014, 5, 90, 'Paris', '48.8500', '2.350', '0007')


def test_gsv_text_suffix_bearing_and_repeated_places(tmp_path):
    gsv(tmp_path, [ROW, (7, 2015, 11, 365, 'Paris', '48.8501', '2.3500', 'NA')])
    gsv(tmp_path, [(7, 2015, 1, 0, 'Oslo', '59.9', '10.75', 'x')], 'Oslo')
    name = next((tmp_path/'Images'/'Paris').glob('*_0007.jpg')); name.rename(name.with_suffix('.JPG'))
    (tmp_path/'Dataframes'/'.Rome-12ab.csv').touch(); (tmp_path/'Dataframes'/'Paris.csv~').touch()
    df = read_gsv(tmp_path)
    assert df.city.tolist() == ['Oslo', 'Paris', 'Paris'] and df.place.tolist() == [7, 7, 7] and df.heading.tolist() == [0., 90., 5.] and df.zone.tolist() == ['32N', '31N', '31N']
    assert all(os.path.isfile(p) for p in df.image) and df.image[1].endswith('.JPG') and df.time.tolist() == ['2015-01', '2014-05', '2015-11']
    assert len(read_gsv(tmp_path, 'Oslo')) == 1 and len(read_gsv(tmp_path, ['Paris'])) == 2 and len(read_places(tmp_path, split='val').query('split == "val"')) == 3
    lat, lon = to_latlon(df.easting[1:], df.northing[1:], '31N'); np.testing.assert_allclose(np.c_[lat, lon], [[48.85, 2.35], [48.8501, 2.35]], atol=1e-9)


@pytest.mark.parametrize('field, value, what', [
    (0, '', "row 1 has place_id ''"), (0, '7.5', "row 1 has place_id '7.5'"), (1, 'MMXIV', "row 1 has year 'MMXIV'"), (3, 'north', "row 1 has northdeg 'north'"), (0, 'inf', "row 1 has place_id 'inf'"),
    (5, '', "row 1 has lat ''"), (5, 'nan', "row 1 has lat 'nan'"), (5, '148.85', 'latitude and longitude may be swapped'), (6, '1e9', 'expected latitude within'),
    (4, '../Paris', 'cannot be the name of a city'), (4, '', 'cannot be the name of a city'), (7, '0008', '1 of the 2 images')])
def test_bad_gsv_rows(field, value, what, tmp_path):
    bad = list(ROW); bad[1] = 2015; bad[field] = value
    gsv(tmp_path, [ROW]); gsv(tmp_path, [ROW, bad], touch=False)
    assert 'Paris.csv' in str(says(what, read_gsv, tmp_path))


def test_bad_gsv_trees(tmp_path):
    assert isinstance(says('no such folder', read_gsv, tmp_path/'nowhere'), FileNotFoundError)
    says('GSV-Cities holds Dataframes/', read_gsv, tmp_path)
    (tmp_path/'Dataframes').mkdir(); says('holds no csv', read_gsv, tmp_path)
    csv = tmp_path/'Dataframes'/'Paris.csv'
    csv.write_text(''); says('cannot be read as a csv', read_gsv, tmp_path)
    csv.write_text(GSV_HEADER); says('no images', read_gsv, tmp_path)
    csv.write_text('place_id,year,month,northdeg,city_id,lat,panoid\n'); assert 'expected are place_id' in str(says("no column 'lon'", read_gsv, tmp_path))
    csv.write_bytes(GSV_HEADER.encode() + 'é'.encode('latin-1') + b',1,1,1,a,1,1,a\n'); says('is not UTF-8', read_gsv, tmp_path)
    csv.write_text(GSV_HEADER + '1,2,3\n4,5,6,7,8,9,10,11,12\n'); says('cannot be read as a csv', read_gsv, tmp_path)
    gsv(tmp_path, [ROW, ROW]); says('occurs twice, the second time in row 1', read_gsv, tmp_path)
    gsv(tmp_path, [ROW]); says("has no city 'Rome'; there are: Paris", read_gsv, tmp_path, ['Rome'])
    for p in (tmp_path/'Images'/'Paris').iterdir(): p.unlink()
    assert isinstance(says('1 of the 1 images', read_gsv, tmp_path), MissingPath)
    (tmp_path/'Images'/'Paris').rmdir(); says('no such folder', read_gsv, tmp_path)
    csv.unlink(); csv.mkdir(); says('is not a file', read_gsv, tmp_path)


def test_gsv_is_quick(tmp_path):
    n = 20_000
    df = pd.DataFrame(dict(place_id=np.arange(n) // 8, year=2015, month=7, northdeg=np.arange(n) % 400, city_id='Paris', lat=[f'{48.8 + i*1e-6:.6f}' for i in range(n)], lon='2.35', panoid=[f'p{i}' for i in range(n)]))
    (tmp_path/'Images'/'Paris').mkdir(parents=True); (tmp_path/'Dataframes').mkdir(); df.to_csv(tmp_path/'Dataframes'/'Paris.csv', index=False)
    for name in gsv_names(df): os.close(os.open(tmp_path/'Images'/'Paris'/f'{name}.jpg', os.O_CREAT))
    start = time.process_time(); out = read_gsv(tmp_path); spent = time.process_time() - start      # of this process: others may keep the machine busy
    assert len(out) == n and spent < 20, spent


# ---- MSLS

def msls(root, city, n=6, split='train_val', panos=(), **changes):
    "A city in MSLS's shape; `changes`: file name → function of its table."
    for role in ('database', 'query'):
        folder = root/split/city/role; keys = [f'{city}-{role}-{i}' for i in range(n)]
        files(folder/'images', 0)
        for key in keys: (folder/'images'/f'{key}.jpg').touch()
        pano = np.isin(np.arange(n), panos)
        e, m, _ = to_utm(47.85 + np.arange(n) * 1e-4, np.full(n, 9.))
        tables = dict(raw=pd.DataFrame(dict(key=keys, lon=9., lat=47.85 + np.arange(n) * 1e-4, ca=np.arange(n) * 100., captured_at='2018-07-01', pano=pano)),
                      seq_info=pd.DataFrame(dict(key=keys, sequence_key='s', frame_number=np.arange(n))),
                      postprocessed=pd.DataFrame(dict(key=keys, easting=e, northing=m, night=np.arange(n) % 2 == 1, control_panel=False, view_direction='Forward', unique_cluster=np.arange(n) // 2)),
                      subtask_index=pd.DataFrame(dict(all=np.arange(n) < n - 1, s2w=False)))
        for name, table in tables.items():
            if split == 'test' and name in ('raw', 'postprocessed'): continue
            table = changes.get(name, lambda t: t)(table)
            if table is not None: table.to_csv(folder/f'{name}.csv')
    return root


def test_msls_columns(tmp_path):
    df = read_msls(msls(tmp_path, 'zurich', panos=[2]))
    assert len(df) == 10 and not df.image.str.contains('-2.jpg').any() and df.attrs['queries'] == 'all'
    db = df[df.role == 'database']
    assert db.heading.tolist() == [0., 100., 300., 40., 140.] and db.condition.tolist() == ['day', 'night', 'night', 'day', 'night'] and db.place.tolist() == [0, 0, 1, 2, 2]
    assert set(df.zone) == {'32N'} and set(df.sequence) == {'s'} and set(df.time) == {'2018-07-01'} and set(df.split) == {'train'} and set(df.city) == {'zurich'}


def test_msls_other_spellings(tmp_path):
    root = msls(tmp_path, 'zurich', seq_info=lambda t: t.rename(columns={'sequence_key': 'sequence_id'})[::-1], raw=lambda t: t.assign(pano=t.pano.astype(int)).sample(frac=1, random_state=1), postprocessed=lambda t: t.assign(night='FALSE'))
    df = read_msls(root)
    assert len(df) == 12 and set(df.sequence) == {'s'} and set(df.condition) == {'day'}
    number = df.image.str.extract(r'-(\d+)\.jpg')[0].astype(int)
    assert (df.place == number // 2).all() and (df.heading == number * 100. % 360).all(), 'rows are joined by key, not by position'


def test_msls_conventions(tmp_path):
    root = msls(msls(tmp_path, 'cph', panos=[0]), 'sf')
    part, whole = read_msls(root, 'val'), read_msls(root, 'val', queries='all')
    assert (part.role == 'query').sum() == 4 + 5 and (whole.role == 'query').sum() == 5 + 6 and (part.role == 'database').sum() == (whole.role == 'database').sum() == 11
    assert part.attrs['queries'] == 'subtask' and whole.attrs['queries'] == 'all' and set(part.split) == {'val'}


def test_msls_747_queries_and_18871_images(tmp_path):
    for city, n, nq in (('cph', 12_556, 505), ('sf', 6_315, 242)):
        for role, good in (('database', n), ('query', nq)):
            rest = 3000 if role == 'query' else 0; total = good + rest + 7
            folder = tmp_path/'train_val'/city/role; (folder/'images').mkdir(parents=True)
            key = [f'{city}{role}{i}' for i in range(total)]; i = np.arange(total)
            pd.DataFrame(dict(key=key, lon=9., lat=47., ca=0., captured_at='', pano=i >= total - 7)).to_csv(folder/'raw.csv')
            pd.DataFrame(dict(key=key, sequence_key='s', frame_number=i)).to_csv(folder/'seq_info.csv')
            pd.DataFrame(dict(key=key, easting=1. * i, northing=0., night=False, control_panel=False, view_direction='Forward', unique_cluster=i)).to_csv(folder/'postprocessed.csv')
            pd.DataFrame(dict(all=(i < good) | (i >= total - 7))).to_csv(folder/'subtask_index.csv')
            for k in key: os.close(os.open(folder/'images'/f'{k}.jpg', os.O_CREAT))
    df = read_msls(tmp_path, 'val')
    assert df.groupby(['city', 'role']).size().to_dict() == {('cph', 'database'): 12_556, ('cph', 'query'): 505, ('sf', 'database'): 6_315, ('sf', 'query'): 242}
    assert (read_msls(tmp_path, 'val', queries='all').role == 'query').sum() == 747 + 6000


def test_msls_test_folder_has_no_coordinates(tmp_path):
    root = msls(tmp_path, 'miami', split='test')
    with pytest.warns(UserWarning, match='without coordinates'): df = read_msls(root, 'test')
    assert len(df) == 6 + 5 and df.easting.isna().all() and df.attrs['coordinates'] == 'absent' and set(df.split) == {'test'}
    assert detect_format(root) == 'msls'
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); assert len(read_msls(root, 'test', queries='all')) == 12


@pytest.mark.parametrize('name', ['cph', 'CPH', 'Cph', 'sf', 'SF', 'ｃｐｈ', 'copenhagen', 'København', 'San Francisco', 'san_francisco', 'sf_copy', 'old-cph', 'miami', 'Buenos_Aires', 'STOCKHOLM'])
def test_held_out_cities_never_train(name, tmp_path):
    root = msls(msls(tmp_path, name), 'zurich')
    assert set(read_msls(root).city) == {'zurich'} and set(read_msls(root, 'train', ['zurich']).city) == {'zurich'}
    for cities in ([name], name, ['zurich', name]): says("never read as 'train'", read_msls, root, 'train', cities)
    for city in (f'./{name}', f'../train_val/{name}', f'{name}/', str(root/'train_val'/name)): says('has no city', read_msls, root, 'train', [city])
    assert set(read_places(root).city) == {'zurich'}


def test_held_out_cities_behind_links_never_train(tmp_path):
    root = msls(msls(tmp_path/'data', 'cph'), 'zurich'); away = tmp_path/'elsewhere'; (away/'train_val').mkdir(parents=True)
    (away/'train_val'/'mycity').symlink_to(root/'train_val'/'cph')                                    # the city
    (away/'train_val'/'second').mkdir()
    for side in ('database', 'query'): (away/'train_val'/'second'/side).symlink_to(root/'train_val'/'cph'/side)   # its sides
    (away/'train_val'/'third'/'database').mkdir(parents=True); (away/'train_val'/'third'/'query').mkdir()
    for side in ('database', 'query'):
        here, there = (r/side for r in (away/'train_val'/'third', root/'train_val'/'cph'))
        (here/'images').symlink_to(there/'images')                                                 # its images
        for csv in there.glob('*.csv'): (here/csv.name).write_bytes(csv.read_bytes())
    says("holds no city for the split 'train'", read_msls, away)
    for city in ('mycity', 'second', 'third'): says("never read as 'train'", read_msls, away, 'train', [city])
    (tmp_path/'linked').symlink_to(root); assert set(read_msls(tmp_path/'linked').city) == {'zurich'}


def test_only_held_out_cities(tmp_path):
    root = msls(msls(tmp_path, 'cph'), 'sf')
    says("holds no city for the split 'train'", read_msls, root)
    assert set(read_msls(root, 'val').city) == {'cph', 'sf'}
    says("never read as 'val'", read_msls, msls(root, 'zurich'), 'val', ['zurich'])
    assert set(read_msls(msls(root, 'aldwick'), 'val', ['aldwick']).city) == {'aldwick'}   # a town of one's own validates where asked to
    says('is a train city', read_msls, root, 'val', ['zurich'])
    assert not set(MSLS_CITIES['train']) & {*MSLS_CITIES['val'], *MSLS_CITIES['test']} and len(MSLS_CITIES['train']) == 22
    assert all(msls_split(c) == s for s, cities in MSLS_CITIES.items() for c in cities)


@pytest.mark.parametrize('file, change, what', [
    ('raw', lambda t: t.drop(columns='pano'), "no column 'pano'"), ('postprocessed', lambda t: t.drop(columns='unique_cluster'), "no column 'unique_cluster'"),
    ('seq_info', lambda t: t.drop(columns='sequence_key'), "no column 'sequence_key' or 'sequence_id'"), ('seq_info', lambda t: t.drop(columns='key'), "no column 'key'"),
    ('raw', lambda t: None, 'no such file'), ('postprocessed', lambda t: None, 'no such file'), ('seq_info', lambda t: None, 'no such file'),
    ('raw', lambda t: t.iloc[:4], 'has no row for the key'), ('postprocessed', lambda t: t.assign(key=t.key + 'x'), 'and 5 others'),
    ('postprocessed', lambda t: t.assign(easting=[1, 2, np.nan, 4, 5, 6]), "row 2 has easting ''"), ('postprocessed', lambda t: t.assign(northing='up'), "row 0 has northing 'up'"),
    ('postprocessed', lambda t: t.assign(unique_cluster=.5), 'expected a whole number'), ('postprocessed', lambda t: t.assign(night='maybe'), "night 'maybe'"), ('raw', lambda t: t.assign(pano='?'), "pano '?'"),
    ('raw', lambda t: t.assign(lat=-122.4, lon=37.8), 'may be swapped'), ('seq_info', lambda t: pd.concat([t, t[:1]]), 'occurs twice, the second time in row 6'),
    ('postprocessed', lambda t: t.assign(easting=np.inf), 'has easting inf')])
def test_bad_msls_files(file, change, what, tmp_path):
    says(what, read_msls, msls(tmp_path, 'zurich', **{file: change}))


def test_bad_msls_trees(tmp_path):
    says('no such folder', read_msls, tmp_path/'nowhere'); says('MSLS holds train_val/', read_msls, tmp_path)
    (tmp_path/'train_val').mkdir(); says("holds no city for the split 'train'", read_msls, tmp_path)
    root = msls(tmp_path, 'zurich')
    says("knows no 'dev'", read_msls, root, 'dev'); says("knows no '740'", read_msls, root, 'val', queries='740'); says("holds no city for the split 'val'", read_msls, root, 'val')
    says('no such folder; MSLS holds', read_msls, root, 'test')
    for i in (1, 2): (root/'train_val'/'zurich'/'query'/'images'/f'zurich-query-{i}.jpg').unlink()
    says('2 of the 6 images it names are not in', read_msls, root)
    root = msls(tmp_path/'b', 'cph', subtask_index=lambda t: t[:3]); says('has 3 rows where seq_info.csv has 6', read_msls, root, 'val')
    root = msls(tmp_path/'c', 'cph', subtask_index=lambda t: t.drop(columns='all')); says("no column 'all'", read_msls, root, 'val')
    (tmp_path/'d'/'train_val'/'bern'/'database').mkdir(parents=True); says('no such file', read_msls, tmp_path/'d')


# ---- @utm@

def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: (folder/name).touch()


def test_utm_layouts(tmp_path):
    name = '@0500000.00@4180000.00@10@S@37.7@-122.4@p@@361@@@@201407@night@.jpg'
    touch(tmp_path/'plaza'/'images'/'test'/'database', name, '@500001@4180001@.png', '.@1@2@.jpg', 'notes.txt'); touch(tmp_path/'plaza'/'images'/'test'/'queries'/'deeper', '@500900.5@4180000@@@@@@@@@@@@@.JPG')
    touch(tmp_path/'plaza'/'images'/'val'/'database', '@-5@0@.jpg')
    df = read_utm(tmp_path/'plaza')
    assert df.split.tolist() == ['val', 'test', 'test', 'test'] and df.role.tolist() == ['database', 'database', 'database', 'query'] and set(df.city) == {'plaza'}
    row = df[df.image.str.contains('night')].iloc[0]
    assert (row.zone, row.heading, row.time, row.condition) == ('10N', 1., '201407', 'night')
    assert len(read_utm(tmp_path/'plaza', 'test')) == 3 and len(read_utm(tmp_path/'plaza'/'images')) == 4 and len(read_utm(tmp_path/'plaza'/'images'/'test')) == 3
    assert set(read_utm(tmp_path/'plaza'/'images').city) == {'plaza'} and set(read_utm(tmp_path/'plaza'/'images'/'val').split) == {'val'}
    says("no split 'train'; it has test, val", read_utm, tmp_path/'plaza', 'train')
    touch(tmp_path/'bare'/'database', '@1@2@.jpg'); assert read_utm(tmp_path/'bare').split.tolist() == ['test']
    assert set(read_utm(tmp_path).city) == {'plaza', 'bare'} and detect_format(tmp_path) == 'utm'


def test_utm_places_are_made_where_none_are_written(tmp_path):
    touch(tmp_path/'database', '@1@1@.jpg', '@2@2@@@@@@place9@@@@@@@.jpg', '@30@1@@@@@@place9@@@@@@@.jpg')
    assert sorted(read_utm(tmp_path).place) == [0, 0, 1]


@pytest.mark.parametrize('name', ['a.jpg', '@x@y@.jpg', '@1@.jpg', '@@@.jpg', '@inf@1@.jpg', '@1@nan@.jpg'])
def test_bad_utm_names(name, tmp_path):
    touch(tmp_path/'images'/'test'/'database', name)
    assert name in str(says('expected @easting@northing@', read_utm, tmp_path))


def test_bad_utm_trees(tmp_path):
    says('no such folder', read_utm, tmp_path/'nowhere'); says('holds no images/', read_utm, tmp_path)
    (tmp_path/'images'/'test'/'database').mkdir(parents=True); says('no images in it', read_utm, tmp_path)


# ---- photographs

def photo(path, gps=None, exif=None, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Image.Exif()
    if gps is not None: data[0x8825] = gps
    if exif: data[0x8769] = exif
    Image.new('RGB', (16, 12), 'teal').save(path, exif=data, **({'format': kind} if kind else {}))
    return path


GPS = {1: 'N', 2: (55., 41., 53.4), 3: 'E', 4: (13., 11., 43.4)}


def test_lund(shared):
    folder = shared/'data'/'lund'
    if not folder.exists(): pytest.skip('no Lund photographs')
    df = read_photos(folder)
    assert len(df) == 29 and df.attrs['left_out'] == [] and set(df.zone) == {'33N'} and df.place.nunique() > 1
    assert np.ptp(df.easting) < 2000 and np.ptp(df.northing) < 2000
    lat, lon = to_latlon(df.easting, df.northing, '33N')
    np.testing.assert_allclose([lat[0], lon[0]], [55 + 41/60 + 53.4/3600, 13 + 11/60 + 43.4/3600], atol=1e-9)
    assert len(read_photos(folder, method='dbscan').place.unique()) <= df.place.nunique() and len(read_places(folder)) == 29


@pytest.mark.parametrize('gps, want', [
    (GPS, (55.698167, 13.195389)), ({**GPS, 1: 'S', 3: 'W'}, (-55.698167, -13.195389)), ({**GPS, 5: b'\x00', 6: 37.}, (55.698167, 13.195389)),
    ({**GPS, 2: (55.698167, 0., 0.), 4: (13.195389, 0., 0.)}, (55.698167, 13.195389)), ({**GPS, 2: (0., 0., 200512.4)}, (55.697889, 13.195389))])
def test_exif_positions(gps, want, tmp_path):
    got = photo_label(photo(tmp_path/'a.jpg', gps))
    np.testing.assert_allclose([got['lat'], got['lon']], want, atol=1e-6)


@pytest.mark.parametrize('gps, what', [
    (None, 'no GPS'), ({}, 'no GPS'), ({1: 'N', 2: (55., 0., 0.)}, 'no GPS'), ({2: GPS[2], 4: GPS[4]}, 'no position'), ({**GPS, 2: (155., 0., 0.)}, 'no position'), ({**GPS, 1: 'X'}, 'no position'),
    ({1: 'N', 2: (0., 0., 0.), 3: 'E', 4: (0., 0., 0.)}, 'no position'), ({**GPS, 2: (TiffImagePlugin.IFDRational(0, 0),) * 3}, 'no position')])
def test_photos_without_a_position_are_listed(gps, what, tmp_path):
    bad, good = photo(tmp_path/'trip'/'a.jpg', gps), photo(tmp_path/'trip'/'b.jpg', GPS, {0x9003: '2014:06:07 10:24:05'})
    df = read_photos(tmp_path/'trip')
    assert df.image.tolist() == [str(good)] and df.time.tolist() == ['2014-06-07T10:24:05'] and [p for p, _ in df.attrs['left_out']] == [str(bad)] and what in df.attrs['left_out'][0][1]
    good.unlink(); says('none of the 1 images can be placed', read_photos, tmp_path/'trip')


def test_damaged_exif_is_listed_never_fatal(tmp_path):
    "Every byte of the header, set to other values in turn."
    good = photo(tmp_path/'good.jpg', GPS).read_bytes(); end = good.index(b'\xff\xdb'); folder = tmp_path/'trip'; folder.mkdir()
    (folder/'keep.jpg').write_bytes(good)
    for i in range(2, end):
        for value in (0, 255, good[i] ^ 1): (folder/f'{i}-{value}.jpg').write_bytes(good[:i] + bytes([value]) + good[i+1:])
    df = read_photos(folder)
    assert len(df) + len(df.attrs['left_out']) == len(list_images(folder)) and len(df) >= 1 and all('\n' not in r for _, r in df.attrs['left_out'])


def test_photos_of_many_kinds(tmp_path):
    for kind in ('jpg', 'png', 'webp', 'jpeg'): photo(tmp_path/'trip'/kind/f'a.{kind}', GPS)
    photo(tmp_path/'trip'/'.thumbnails'/'a.jpg', GPS); (tmp_path/'trip'/'empty.jpg').touch(); (tmp_path/'trip'/'text.jpg').write_text('hello')
    df = read_photos(tmp_path/'trip')
    assert len(df) == 4 and df.place.nunique() == 1 and sorted(r.split(': ')[1] for _, r in df.attrs['left_out']) == ['not an image', 'the file is empty']


def test_heic(tmp_path):
    heif = pytest.importorskip('pillow_heif', reason='pillow-heif is not installed')
    heif.register_heif_opener()
    df = read_photos(photo(tmp_path/'trip'/'a.heic', GPS, kind='HEIF').parent)
    assert len(df) == 1 and set(df.zone) == {'33N'}


def test_heic_without_its_package_is_listed(tmp_path, monkeypatch):
    import sage.photos as photos
    monkeypatch.setattr(photos, '_heif', lambda: False)
    photo(tmp_path/'trip'/'a.jpg', GPS); (tmp_path/'trip'/'b.HEIC').write_bytes(b'x')
    assert 'pillow-heif' in read_photos(tmp_path/'trip').attrs['left_out'][0][1]


@pytest.fixture
def walk(tmp_path):
    "A folder of three photographs and a function that writes its csv."
    for i in range(3): photo(tmp_path/'walk'/'day one'/f'{i}.jpg')
    def write(body, name='where.csv', **kwargs): (tmp_path/'walk'/name).write_text(body, **kwargs); return tmp_path/'walk'
    return write


def test_photo_csv(walk):
    df = read_photos(walk('\ufeffpath, lat ,lon,heading,time,place\nday one/0.jpg,55.7,13.2,370,2020-01-01,7\nday one/./1.jpg,55.7,13.2,,,8\n', encoding='utf-8'))
    assert df.place.tolist() == [7, 8] and df.heading[0] == 10. and np.isnan(df.heading[1]) and df.time.tolist() == ['2020-01-01', ''] and set(df.zone) == {'33N'} and all(map(os.path.isfile, df.image))
    df = read_photos(walk('path,easting,northing,zone\nday one/0.jpg,1,2,33N\nday one/1.jpg,3,2,33N\nday one/2.jpg,90,2,33N\n'))
    assert df.place.tolist() == [0, 0, 1] and df.easting.tolist() == [1., 3., 90.] and set(df.zone) == {'33N'} and set(df.city) == {'walk'}
    root = walk('path,lat,lon\n'); (root/'where.csv').rename(root.parent/'other.csv')
    says('no rows', read_photos, root, root.parent/'other.csv'); says('none of the 3', read_photos, root)


@pytest.mark.parametrize('body, what', [
    ('path,lat\nday one/0.jpg,1\n', "neither the columns 'lat' and 'lon' nor 'easting' and 'northing'"), ('path,lat,lon\nday one/0.jpg,55.7,\n', "row 0 has lon ''"),
    ('path,lat,lon\nday one/0.jpg,NaN,1\n', "row 0 has lat 'NaN'"), ('path,lat,lon\nday one/0.jpg,113.2,55.7\n', 'may be swapped'), ('path,lat,lon\nday one/0.jpg,,\nday one/1.jpg,99,13\n', 'row 1: latitude 99'), ('path,easting,northing\nday one/0.jpg,,\nday one/1.jpg,1e308,13\n', "row 1 has easting '1e308'"), ('path,lat,lon\nday one/0.jpg,55.7,13.2\nday one/0.jpg,55.7,13.2\n', 'occurs twice'),
    ('path,lat,lon\nday one/9.jpg,55.7,13.2\nday one/8.jpg,55.7,13.2\n', '2 of the 2 images'), ('path,lat,lon\n', 'no rows'), ('path,lat,lon,place\nday one/0.jpg,1,1,\n', 'row 0 has no place'),
    ('path,easting,northing\nday one/0.jpg,inf,1\n', "has easting 'inf'"), ('path,lat,lon,heading\nday one/0.jpg,1,1,north\n', "heading 'north'"),
    ('path,lat,lon\n../x.jpg,1,1\n', 'leads out of'), ('path,lat,lon\nday one/../../x.jpg,1,1\n', 'leads out of'), ('path,lat,lon\n/etc/passwd,1,1\n', 'leads out of'), ('path,lat,lon\nlink.jpg,1,1\n', 'leads out of'),
    ('path,lat,lon\nlinked/x.jpg,1,1\n', 'leads out of'), ('path,lat,lon\n,1,1\n', 'leads out of'), ('path,lat,lon\nday one/..,1,1\n', 'leads out of'), ('path,lat,lon\nday one,1,1\n', '1 of the 1 images')])
def test_bad_photo_csv(body, what, walk):
    root = walk(body)
    (root.parent/'x.jpg').touch(); (root/'link.jpg').symlink_to(root.parent/'x.jpg'); (root/'linked').symlink_to(root.parent)
    says(what, read_photos, root)


def test_which_csv(walk):
    walk('a,b\n1,2\n', 'other.csv'); walk('path,lat,lon\nday one/0.jpg,1,1\n')
    assert len(read_photos(walk('x', '.hidden.csv'))) == 1
    says('several csv files', read_photos, walk('lat,lon,path\n', 'again.csv'))
    says('no such file', read_photos, walk('', 'nothing.csv'), '/nowhere.csv')


def test_photos_of_the_whole_world_do_not_collide(walk):
    df = read_photos(walk('path,lat,lon\nday one/0.jpg,55.7,13.2\nday one/1.jpg,55.7,19.2\nday one/2.jpg,-33.9,151.2\n'))   # the first two have the same metres, six degrees apart
    assert df.city.nunique() == 3 and abs(df.easting[0] - df.easting[1]) < 1e-3 and df.zone.tolist() == ['33N', '34N', '56S']
    df = read_photos(walk('path,lat,lon\nday one/0.jpg,55.7,11.99\nday one/1.jpg,55.7,12.0101\nday one/2.jpg,55.7,12.0102\n'))      # one town on a zone's edge stays one
    assert df.city.nunique() == 1 and abs(df.easting[1] - df.easting[0] - 1263) < 5
    df = read_photos(walk('path,lat,lon\nday one/0.jpg,-17,179.9999\nday one/1.jpg,-17,-179.9999\nday one/2.jpg,-17,-179.9998\n'))  # and so does one on the date line
    assert df.city.nunique() == 1 and np.ptp(df.easting) < 50


def test_bad_folders(tmp_path):
    for read in (read_photos, read_places, detect_format): says('no such folder', read, tmp_path/'nowhere')
    says('holds no images', read_photos, tmp_path); says('is no data set', read_places, tmp_path)
    (tmp_path/'a.txt').touch(); says('is not a folder', read_photos, tmp_path/'a.txt')
    says("format 'tar' is unknown", read_places, tmp_path, 'tar'); says("split 'dev' is unknown", read_places, tmp_path, 'auto', 'dev')
    assert '.heic' in IMAGE_SUFFIXES


def test_the_sample_in_data_is_read(root):
    "One hamlet in three layouts: the training ones hold the same photographs."
    tables = {name: read_places(root/'data'/name) for name in ('msls', 'gsv', 'utm')}
    assert {n: len(t) for n, t in tables.items()} == dict(msls=252, gsv=252, utm=112)
    assert all(Path(p).is_file() for t in tables.values() for p in t.image)
    near = lambda t: np.sort(t[['easting', 'northing']].round(0).to_numpy(), 0)
    assert np.abs(near(tables['msls']) - near(tables['gsv'])).max() <= 2
    assert set(tables['utm'].role) == {'database', 'query'} and (tables['msls'].groupby('place').size() >= 8).all()
    assert sum(f.stat().st_size for f in (root/'data').rglob('*') if f.is_file()) < 12e6
