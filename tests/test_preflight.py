"""`sage_data check`: what is there, what is missing by name, what it serves, and every oddity with a count and an example."""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sage.cli_data import sage_data
from sage.formats import write_gsv, write_msls, write_utm
from sage.geo import to_latlon, to_utm
from sage.places import make_table
from sage.preflight import check, doubles, overlaps, swapped, wide_places


def cards(folder, city='aldwick', places=5, views=5, seed=0, east=0., **more):
    rng, n = np.random.default_rng(seed), places * views
    folder.mkdir(parents=True, exist_ok=True)
    image = [str(folder/f'{city}_{i}.jpg') for i in range(n)]
    for p in image: Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(p)
    place = np.arange(n) // views
    return make_table(**dict(image=image, city=city, place=place, easting=5e5 + east + 60. * place + rng.uniform(0, 6, n), northing=5.3e6 + rng.uniform(0, 6, n), zone='32N', heading=90.,
                             role=np.where(np.arange(n) % views, 'database', 'query'), time='2026-03') | more)


def text(*argv, capsys):
    code = 0
    try: sage_data(['check', *map(str, argv)])
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == (code != 0), err
    return code, out + err


def test_msls_by_name(tmp_path, capsys):
    write_msls(pd.concat([cards(tmp_path/'a', 'zurich'), cards(tmp_path/'b', 'cph', seed=1, east=9000)], ignore_index=True), tmp_path/'msls')
    os.remove(tmp_path/'msls'/'train_val'/'cph'/'query'/'subtask_index.csv')
    code, out = text(tmp_path/'msls', capsys=capsys)
    assert code == 0 and 'MSLS' in out and '50 images' in out and '2 cities' in out
    for part in ('train_val/cph/query/subtask_index.csv', '21 of 22 train cities', '1 of 2 val cities of MSLS: sf', 'training: sage_train', 'www.mapillary.com/dataset/places'): assert part in out, part
    assert 'zurich' not in out.split('missing:')[1].split('\n')[1]


@pytest.mark.parametrize('album', ['corridor', 'Nordland', 'pitts30k'])
def test_an_album_called_as_a_benchmark(tmp_path, capsys, album):
    "Photographs of a holiday in a folder of that name are photographs, whether one asks for it or for the folder above."
    folder = tmp_path/'photos'/album/'2019'
    folder.mkdir(parents=True)
    for i in range(6):
        exif = Image.Exif(); exif[0x8825] = {1: 'N', 2: (63., 25., i*10.), 3: 'E', 4: (10., 23., 0.)}
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(folder/f'{i}.jpg', exif=exif)
    for where in (tmp_path/'photos', tmp_path/'photos'/album):
        code, out = text(where, capsys=capsys)
        assert code == 0 and 'a map: sage_where' in out and 'was not found' not in out, out
    (tmp_path/'photos'/album/'2019').rename(tmp_path/'photos'/album/'images')                     # where a benchmark would have them
    assert 'was not found' in text(tmp_path/'photos', capsys=capsys)[1]


def test_a_benchmark_root(tmp_path, capsys):
    write_utm(cards(tmp_path/'a', 'x', split='test'), tmp_path/'data'/'tokyo247')
    code, out = text(tmp_path/'data', capsys=capsys)
    assert code == 0 and 'benchmark tokyo247' in out and 'here are 20 / 5' in out
    assert text(tmp_path/'data', '--benchmark', 'tokyo247', capsys=capsys)[0] == 0
    code, out = text(tmp_path/'data', '--benchmark', 'sped', capsys=capsys)
    assert code == 2 and 'SPED was not found' in out and 'VPR-Bench' in out
    assert text(tmp_path/'data'/'tokyo247', capsys=capsys)[0] == 0


def test_a_set_of_another_name_is_recognised_by_its_counts(tmp_path, capsys):
    for part in ('ref', 'query'):
        (tmp_path/'mine'/part).mkdir(parents=True)
        for i in range(607): (tmp_path/'mine'/part/f'{i}.jpg').touch()
    code, out = text(tmp_path/'mine', capsys=capsys)
    assert code == 0 and 'benchmark sped' in out


@pytest.mark.parametrize('argv', [[], ['--benchmark', 'pitts30k']])
def test_nothing_served_is_2(argv, tmp_path, capsys):
    (tmp_path/'empty').mkdir(); assert text(tmp_path/'empty', *argv, capsys=capsys)[0] == 2
    assert text(tmp_path/'nowhere', *argv, capsys=capsys)[0] == 2


def test_warnings_with_counts_and_examples(tmp_path, capsys):
    t = pd.concat([cards(tmp_path/'a', 'east'), cards(tmp_path/'b', 'west', seed=1, east=240.)], ignore_index=True)
    t.loc[7, 'northing'] += 70
    Path(t.image[24]).write_bytes(Path(t.image[0]).read_bytes())
    write_gsv(t, tmp_path/'gsv')
    report = check(tmp_path/'gsv'); said = '\n'.join(report.warnings)
    assert '1 of 10 places are wider than 50 m (2 τ₁), e.g. place 1 of east: 7' in said
    assert '1 images occur under several places, e.g. ' in said
    assert 'images of east lie within 25 m of west' in said
    assert text(tmp_path/'gsv', capsys=capsys)[0] == 0                                     # warnings, but it serves


def test_own_photographs_serve_a_map(tmp_path, capsys):
    cards(tmp_path/'walk', 'p'); (tmp_path/'walk'/'where.csv').write_text('path,lat,lon\n' + ''.join(f'p_{i}.jpg,47.{i + 10},9\n' for i in range(24)) + 'p_24.jpg,,\n')
    code, out = text(tmp_path/'walk', capsys=capsys)
    assert code == 0 and 'a map: sage_where PHOTO --map …, 24 photographs with a position' in out and '1 photographs have no position and are left out' in out
    (tmp_path/'walk'/'where.csv').write_text('Path;Latitude;Longitude\np_1.jpg;47,1;9\n')
    code, out = text(tmp_path/'walk', capsys=capsys)
    assert code == 2 and 'can be placed' in out


def test_nothing_served_says_why(tmp_path, capsys):
    (tmp_path/'empty').mkdir(); (tmp_path/'empty'/'places.csv').write_text('1,2,3\n')
    code, out = text(tmp_path/'empty', capsys=capsys)
    assert code == 2 and out.splitlines()[-1].startswith('sage_data: ') and 'holds neither Dataframes/' in out.splitlines()[-1]


def test_swapped_and_mixed_zones_in_names(tmp_path):
    t = cards(tmp_path/'a', 'x', split='test')
    write_utm(t, tmp_path/'x'); side = tmp_path/'x'/'images'/'test'/'database'
    one, two = sorted(side.iterdir())[:2]
    f = one.name.split('@'); f[5], f[6] = f[6], f[5]; one.rename(side/'@'.join(f))
    f = two.name.split('@'); f[3] = '33'; two.rename(side/'@'.join(f))
    said = '\n'.join(check(tmp_path/'x').warnings)
    assert 'latitude and longitude seem swapped in 1 of 25 names' in said and f'zones are mixed: 24 names say 32N, 1 names say 33N, e.g. {"@".join(f)}' in said and 'more than 100 m' in said


def msls(tmp_path, **more):
    write_msls(cards(tmp_path/'a', 'lund', **more), tmp_path/'msls')
    return tmp_path/'msls', sorted((tmp_path/'msls').rglob('raw.csv'))


def spoil(path, change):
    df = pd.read_csv(path, dtype=str, index_col=0); change(df); df.to_csv(path)


def swap(df, rows=slice(None)): df.iloc[rows, [df.columns.get_loc('lat'), df.columns.get_loc('lon')]] = df[['lon', 'lat']].iloc[rows].to_numpy()


@pytest.mark.parametrize('zone, easting', [('32N', 5e5), ('54N', 3.9e5), ('1S', 2e5)])
def test_a_city_of_msls_that_is_swapped_as_a_whole(tmp_path, zone, easting):
    "Its rows are neighbours of one another; its metres tell. In zone 54 the swapped latitude is no latitude."
    root, raws = msls(tmp_path, zone=zone, easting=easting + np.arange(25.))
    assert check(root).warnings == []
    for path in raws: spoil(path, swap)
    said = [w for w in check(root).warnings if 'seem swapped' in w]
    if zone != '54N': assert len(said) == 2 and all('the other way round they agree with easting and northing' in w for w in said) and 'in 20 of 20 rows, e.g. row 0: ' in said[0] and 'in 5 of 5 rows' in said[1], check(root).warnings
    else: assert len(said) == 2, check(root).warnings


def test_some_rows_of_msls_swapped_or_elsewhere(tmp_path):
    root, raws = msls(tmp_path)
    spoil(raws[0], lambda df: (swap(df, slice(3, 6)), df.__setitem__('lat', df.lat.where(np.arange(len(df)) != 9, '47.9'))))
    said = '\n'.join(check(root).warnings)
    assert 'seem swapped in 3 of 20 rows, e.g. row 3: ' in said and 'easting and northing are more than 100 m from latitude and longitude in 1 of 20 rows, e.g. row 9: 47.9' in said
    spoil(raws[1], lambda df: df.__setitem__('lat', '12'))
    assert 'easting and northing are more than 100 m from latitude and longitude in 5 of 5 rows, e.g. row 0: 12' in '\n'.join(check(root).warnings)


def test_a_city_on_the_edge_of_a_zone_contradicts_nothing(tmp_path):
    "Each image measured in the zone it fell into, as London's are."
    lat, lon = np.full(25, 51.5), np.linspace(-.002, .002, 25)
    root, raws = msls(tmp_path, zone='30N', easting=to_utm(lat, lon, '30N')[0], northing=to_utm(lat, lon, '30N')[1])
    for path in raws:
        raw, post = pd.read_csv(path, index_col=0), pd.read_csv(path.with_name('postprocessed.csv'), index_col=0)
        east = raw.lon > 0
        post.loc[east, 'easting'], post.loc[east, 'northing'], _ = to_utm(raw.lat[east].to_numpy(), raw.lon[east].to_numpy(), '31N')
        assert east.any(); post.to_csv(path.with_name('postprocessed.csv'))
    assert check(root).warnings == []


def test_zones_of_a_csv_and_an_image_far_from_itself(tmp_path):
    folder = tmp_path/'walk'
    cards(folder, 'p', places=2, views=3)
    table = lambda zone, east: (folder/'where.csv').write_text('path,easting,northing,zone\n' + ''.join(f'p_{i}.jpg,{e},5300000,{z}\n' for i, (e, z) in enumerate(zip(east, zone))))
    near = 5e5 + np.arange(6)
    table(['32N']*6, near); assert check(folder).warnings == []
    table(['32N']*3 + ['33N']*2 + ['32S'], near)
    assert [w for w in check(folder).warnings if 'zones are mixed: 3 rows say 32N, 1 rows say 32S, 2 rows say 33N, e.g. row 5: 32S' in w]
    (folder/'p_5.jpg').write_bytes((folder/'p_0.jpg').read_bytes())
    table(['32N']*6, near); assert check(folder).warnings == [], 'a copy that lies 5 m away'
    table(['32N']*6, near + 5000*(np.arange(6) == 5))
    said = '\n'.join(check(folder).warnings)
    assert '1 images occur at positions more than 50 m apart, e.g. ' in said and 'p_0.jpg and ' in said and 'p_5.jpg' in said
    (folder/'where.csv').write_text('path,lat,lon\n' + ''.join(f'p_{i}.jpg,55.7,{x}\n' for i, x in enumerate([11.9999, 11.99, 11.98, 4, -60, 12.0001])))     # of two cities made from zones, 12 m apart
    assert not [w for w in check(folder).warnings if 'images occur' in w]


def test_degrees_and_metres_of_a_csv(tmp_path):
    "A csv of photographs may give both; degrees are read."
    folder = tmp_path/'walk'
    cards(folder, 'p', places=2, views=3)
    e, n, zone = to_utm(np.full(6, 55.7), 13.2 + 1e-4*np.arange(6))
    def said(turn, zones, shift=0):
        (folder/'where.csv').write_text('path,lat,lon,easting,northing,zone\n' + ''.join(f'p_{i}.jpg,{",".join(["55.7", str(13.2 + 1e-4*i)][::turn])},{e[i] + shift},{n[i]},{zones}\n' for i in range(6)))
        return '\n'.join(check(folder).warnings)
    for zones in ('', zone, '99Z'):
        assert said(1, zones) == '' and 'swapped in 6 of 6 rows, e.g. row 0: 13.2, 55.7, the other way round' in said(-1, zones)
        assert 'easting and northing are more than 100 m from latitude and longitude in 6 of 6 rows' in said(1, zones, 9e4)


def test_swapped_against_a_plain_reading():
    g = np.random.default_rng(0)
    for _ in range(50):
        lat, lon = 36 + g.normal(0, .1, 40), 127 + g.normal(0, .1, 40)
        turned = g.random(40) < .2
        lat[turned], lon[turned] = lon[turned].copy(), lat[turned].copy()
        assert swapped(lat, lon).tolist() == np.flatnonzero(turned).tolist()


def test_wide_places_by_all_pairs():
    g = np.random.default_rng(1)
    t = make_table(image=[f'{i}' for i in range(300)], city='x', place=g.integers(0, 60, 300), easting=g.uniform(0, 60, 300), northing=g.uniform(0, 60, 300))
    want = {p: max(np.hypot(a.easting - b.easting, a.northing - b.northing) for a in d.itertuples() for b in d.itertuples()) for p, d in t.groupby('place')}
    got = wide_places(t)
    assert set(got.place) == {p for p, m in want.items() if m > 50}
    for p, m in zip(got.place, got.metres): assert abs(m - want[p]) < 1e-9


def test_the_check_writes_nothing(tmp_path):
    write_utm(cards(tmp_path/'a', 'x', split='test'), tmp_path/'x')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    check(tmp_path/'x')
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


def test_world_samples(root):
    "The samples of the world in the repository: each layout is found and serves something."
    for name, layout in (('gsv', 'gsv'), ('msls', 'msls'), ('utm', 'utm')):
        report = check(root/'data'/name)
        assert report.layout == layout and report.serves and not report.warnings, report


def test_the_command_in_a_process(root, tmp_path):
    done = subprocess.run([sys.executable, '-m', 'sage.cli_data', 'check', str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root), PYTHONWARNINGS='ignore'))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
