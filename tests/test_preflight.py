"""`sage_data check`: what is there, what is missing by name, what it serves, and every oddity with a count and an example."""
import os, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sage.cli_data import sage_data
from sage.formats import write_gsv, write_msls, write_utm
from sage.geo import to_latlon, to_utm
from sage.photos import read_photos
from sage.places import make_table
from sage.coordinates import far_zone, mirrored, position_warnings, swapped
from sage.preflight import check, doubles, overlaps, wide_places


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


def test_damaged_photographs_are_not_those_without_a_position(tmp_path):
    "Each kind with its own count and example."
    walk = album(tmp_path/'walk', town(LUND, 3))
    for i in range(2): (walk/f'broken{i}.jpg').write_bytes(b'x')
    Image.new('RGB', (8, 8)).save(walk/'nowhere.jpg')
    said = [w for w in check(walk).warnings if 'left out' in w]
    assert [w.split(', e.g. ')[0] for w in said] == ['2 photographs cannot be read and are left out', '1 photographs have no position and are left out'], said
    assert 'broken0.jpg: not an image' in said[0] and 'nowhere.jpg: no GPS position' in said[1], said


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
    "Each image measured in the zone it fell into, as London's are: the two positions agree, but that the zones are mixed is said."
    lat, lon = np.full(25, 51.5), np.linspace(-.002, .002, 25)
    root, raws = msls(tmp_path, zone='30N', easting=to_utm(lat, lon, '30N')[0], northing=to_utm(lat, lon, '30N')[1])
    for path in raws:
        raw, post = pd.read_csv(path, index_col=0), pd.read_csv(path.with_name('postprocessed.csv'), index_col=0)
        east = raw.lon > 0
        post.loc[east, 'easting'], post.loc[east, 'northing'], _ = to_utm(raw.lat[east].to_numpy(), raw.lon[east].to_numpy(), '31N')
        assert east.any(); post.to_csv(path.with_name('postprocessed.csv'))
    said = check(root).warnings
    assert len(said) == 1 and 'zones are mixed: ' in said[0] and 'rows are measured in 30N, ' in said[0] and 'rows are measured in 31N, e.g. ' in said[0] and 'postprocessed.csv row ' in said[0] and 'more than 100 m' not in said[0], said


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
        assert ('easting and northing are more than 100 m from latitude and longitude in 6 of 6 rows' if zones == zone else 'easting and northing agree with latitude and longitude in no UTM zone in 6 of 6 rows') in said(1, zones, 9e4)
    (folder/'where.csv').write_text('path,lat,lon,easting,northing,zone\n' + ''.join(f'p_{i}.jpg,55.7,{13.2 + 1e-4*i},{e[i]},{n[i]},{z}\n' for i, z in enumerate(['33N', '', '99Z', '33n', '', '33N'])))
    assert check(folder).warnings == [], 'a row without a zone contradicts nothing'


def test_metres_of_a_national_grid_beside_degrees(tmp_path):
    "Honest, and no zone is theirs: the degrees are read, one sentence says so, and swapped rows are seen as if there were no metres."
    grid = lambda rows: [(*p, 4.9e5 + i, 6.4e6) for i, p in enumerate(rows)]
    walk = album(tmp_path/'walk', grid(town(LUND, 6)), 'lat,lon,easting,northing')
    said = of(walk); assert len(said) == 1 and said[0].endswith('easting and northing agree with latitude and longitude in no UTM zone in 6 of 6 rows, e.g. row 0: 55.7, 13.2; latitude and longitude are read, so nothing is to be done where those are right'), said
    np.testing.assert_allclose(read_photos(walk)[['easting', 'northing']].to_numpy().T, to_utm(*np.array(town(LUND, 6)).T)[:2])
    said = of(album(tmp_path/'few', grid(town(LUND, 5) + turn(town(LUND, 1))), 'lat,lon,easting,northing'))
    assert len(said) == 2 and 'seem swapped in 1 of 6 rows, e.g. row 5' in said[0] and 'no UTM zone in 5 of 6 rows' in said[1], said
    said = of(album(tmp_path/'half', grid(town(LUND, 3) + turn(town(LUND, 3))), 'lat,lon,easting,northing'))
    assert len(said) == 2 and 'no UTM zone in 6 of 6 rows' in said[0] and 'about 3 and 3 rows mirror one another' in said[1], said
    said = of(album(tmp_path/'named', [(*p, '33N') for p in grid(town(LUND, 6))], 'lat,lon,easting,northing,zone'))
    assert len(said) == 1 and 'more than 100 m from latitude and longitude in 6 of 6 rows' in said[0], said


def test_spellings_of_one_zone(tmp_path):
    "01n is 1N: nothing is mixed, and nothing is measured anew."
    walk = album(tmp_path/'walk', [(5e5 + i, 6e6, z) for i, z in enumerate(['1N', '01N', '01n', '1n'])], 'easting,northing,zone')
    assert of(walk) == [] and set((df := read_photos(walk)).zone) == {'1N'} and df.easting.tolist() == [5e5, 5e5 + 1, 5e5 + 2, 5e5 + 3]


def test_a_latitude_band_for_a_zone(tmp_path):
    "San Francisco is in band S and on the northern half."
    rows = [(37.77, -122.42, '10S')]*4; hint = ' (write N or S for the half of the Earth, not a latitude band)'
    said = of(album(tmp_path/'band', rows, 'lat,lon,zone')); assert len(said) == 1 and said[0].endswith('in 4 of 4 rows, e.g. row 0: 37.77, -122.42 (zone 10S)' + hint), said
    for wrong in ('33S', '33N'): said = of(album(tmp_path/wrong, [(*r[:2], wrong) for r in rows], 'lat,lon,zone')); assert len(said) == 1 and 'contradicts' in said[0] and hint not in said[0], said


def test_two_sides_of_msls_in_neighbouring_zones(tmp_path):
    "Each csv by itself is of one zone."
    lat, lon = np.full(25, 51.5), np.linspace(-.002, .002, 25)
    root, raws = msls(tmp_path, zone='30N', easting=to_utm(lat, lon, '30N')[0], northing=to_utm(lat, lon, '30N')[1])
    path = next(p for p in raws if p.parent.name == 'query')
    raw, post = pd.read_csv(path, index_col=0), pd.read_csv(path.with_name('postprocessed.csv'), index_col=0)
    post['easting'], post['northing'], _ = to_utm(raw.lat.to_numpy(), raw.lon.to_numpy(), '31N'); post.to_csv(path.with_name('postprocessed.csv'))
    said = check(root).warnings
    assert len(said) == 1 and 'lund: zones are mixed: 20 rows are measured in 30N, 5 rows are measured in 31N, e.g. query/postprocessed.csv row 0: 31N; all are read in one' in said[0], said


def album(folder, positions, columns=''):
    "Photographs with EXIF, or with a csv of the given columns."
    folder.mkdir(parents=True)
    for i, p in enumerate(positions):
        exif = Image.Exif()
        if not columns: exif[0x8825] = {1: 'NS'[p[0] < 0], 2: (abs(p[0]), 0., 0.), 3: 'EW'[p[1] < 0], 4: (abs(p[1]), 0., 0.)}
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(folder/f'{i}.jpg', exif=exif)
    if columns: (folder/'where.csv').write_text(f'path,{columns}\n' + ''.join(f'{i}.jpg,{",".join(map(str, p))}\n' for i, p in enumerate(positions)))
    return folder


def of(folder): return [w for w in check(folder).warnings if 'are left out, e.g.' not in w or 'swapped' in w]


LUND, SEVILLE, SYDNEY = (55.7, 13.2), (37.4, -6.), (-33.9, 151.2)
town = lambda city, n: [(round(city[0] + 1e-3*i, 6), round(city[1] + 2e-3*(i % 3), 6)) for i in range(n)]
turn = lambda rows: [p[::-1] for p in rows]


def test_swapped_positions_in_exif(tmp_path):
    "A photograph amid the others the other way round; one whose latitude is none; and two halves, of which nobody can say which is right."
    assert of(album(tmp_path/'honest', town(LUND, 5) + town(SEVILLE, 2) + town(SYDNEY, 1))) == []
    said = of(album(tmp_path/'one', town(LUND, 5) + turn(town(LUND, 1)) + town(SEVILLE, 2)))
    assert len(said) == 1 and 'latitude and longitude seem swapped in 1 of 8 photographs, e.g. ' in said[0] and '5.jpg: 13.2, 55.7' in said[0], said
    said = '\n'.join(of(album(tmp_path/'sure', town(SYDNEY, 4) + turn(town(SYDNEY, 2)))))
    assert 'latitude and longitude seem swapped in 2 photographs that are left out, e.g. ' in said and '4.jpg: the GPS position in EXIF is no position (151.2, -33.9); latitude and longitude may be swapped' in said
    df = read_photos(tmp_path/'sure'); assert [Path(p).name for p in df.attrs['swapped']] == ['4.jpg', '5.jpg'] and df.attrs['swapped'] == df.attrs['unplaced']
    df.attrs['left_out'] = [('4.jpg', 'latitude and longitude may be swapped'), *((p, 'in other words') for p in df.attrs['swapped'])]
    assert position_warnings(df) == ['latitude and longitude seem swapped in 2 photographs that are left out, e.g. in other words'], 'not read from words'
    said = of(album(tmp_path/'half', town(LUND, 4) + turn(town(LUND, 4))))
    assert len(said) == 1 and 'about 4 and 4 photographs mirror one another' in said[0] and '0.jpg: 55.7, 13.2' in said[0] and '4.jpg: 13.2, 55.7' in said[0], said


@pytest.mark.parametrize('cities', [(LUND,), (LUND, SEVILLE), (LUND, SEVILLE, SYDNEY)])
def test_some_or_half_of_the_rows_of_several_cities_are_swapped(tmp_path, cities):
    rows = sum((town(c, 6) for c in cities), [])
    assert of(album(tmp_path/'honest', rows, 'lat,lon')) == []
    few = [p[::-1] if i % 6 == 2 else p for i, p in enumerate(rows)]
    said = [w for w in of(album(tmp_path/'few', few, 'lat,lon')) if 'seem swapped' in w]
    assert len(said) == 1 and f'seem swapped in {len(cities)} of {len(rows)} rows, e.g. row 2: {few[2][0]:g}, {few[2][1]:g}' in said[0], said
    half = [p[::-1] if i % 2 else p for i, p in enumerate(rows)]
    said = [w for w in of(album(tmp_path/'half', half, 'lat,lon')) if 'seem swapped' in w]; n = 3*min(len(cities), 2)
    assert f'about {n} and {n} rows mirror one another' in said[-1] and len(said) == 1 + (SYDNEY in cities), said          # Sydney's latitude would be none


def test_honest_cities_seem_not_swapped():
    "Two hundred cities at random; near the diagonal; Alexandria and Cairo, which are mirror images; two countries that are so in part."
    g = np.random.default_rng(0)
    none = lambda lat, lon: len(swapped(lat, lon)) == 0 and len(mirrored(lat, lon)[0]) == 0
    for seed in range(5):
        lat, lon = (np.repeat(np.stack((g.uniform(-40, 65, 60), g.uniform(-180, 180, 60)), 1), 20, axis=0) + g.normal(0, .02, (1200, 2))).T
        assert none(lat, lon)
    assert none([10.]*5, [10.2]*5) and none(*np.array([(10., 10.2), (10.2, 10.), (10.3, 10.1)]).T) and none(*np.array([(31.2, 29.92)] + [(30.04, 31.24)]*9).T)
    italy, ethiopia = g.uniform((37, 7), (46, 18), (20_000, 2)), g.uniform((4, 33), (15, 47), (4000, 2))
    assert none(*np.concatenate([italy[(italy[:, 0] > 43.5) | (italy[:, 1] > 14)], ethiopia[::4]]).T)


def test_an_excursion_that_is_swapped():
    "Half a degree from the town it belongs to; from one of several towns it might be a village of its own."
    paris = np.array([(48.8, 2.3)]*9 + [(2.9, 49.4)])
    assert swapped(*paris.T).tolist() == [9] and swapped(*np.concatenate([paris, [(-12., 77.)]*9]).T).tolist() == [] == swapped(*(paris + (0, 120)).T).tolist()


def test_a_million_and_a_half_rows_take_seconds():
    g = np.random.default_rng(0)
    lat, lon = g.uniform(-60, 70, 1_500_000), g.uniform(-180, 180, 1_500_000)
    start = time.perf_counter(); swapped(lat, lon); mirrored(lat, lon)
    assert time.perf_counter() - start < 20


def test_swapped_rows_off_the_grid():
    "A latitude that is none gives the swap away, whatever the other rows say; what is no number says nothing."
    assert swapped([95., 55.7, 55.7, np.nan, np.inf, 181., 95.], [20., 13.2, 13.2, 13., 13., 20., 120.]).tolist() == [0]


def test_no_fix_in_a_csv(tmp_path):
    "0, 0 is what a GPS writes that has no fix: such photographs are left out as in EXIF; the large data sets' readers believe it."
    walk = album(tmp_path/'walk', [(0, 0.), *town(LUND, 5), ('0.0', '-0')], 'lat,lon')
    said = '\n'.join(check(walk).warnings)
    assert '2 photographs have no position and are left out, e.g. ' in said and '0.jpg: 0, 0 in where.csv is no position' in said and 'latitude and longitude are 0, 0, which is no position in 2 of 7 rows, e.g. row 0' in said
    df = read_photos(walk); assert len(df) == 5 and [Path(p).name for p, _ in df.attrs['left_out']] == ['0.jpg', '6.jpg'] and set(df.zone) == {'33N'}
    root, raws = msls(tmp_path); path = next(p for p in raws if p.parent.name == 'database')
    spoil(path, lambda df: df.iloc.__setitem__((slice(3, 5), [df.columns.get_loc(c) for c in ('lat', 'lon')]), '0'))
    said = check(root).warnings
    assert len(said) == 1 and '0, 0, which is no position in 2 of 20 rows, e.g. row 3: 0, 0' in said[0], said


def test_a_zone_that_contradicts_the_degrees(tmp_path):
    rows = lambda zones: [(*p, z) for p, z in zip(town(LUND, 6), zones)]
    assert of(album(tmp_path/'near', rows(['33N', '32N', '34n', '', '99Z', '33N']), 'lat,lon,zone')) == []
    said = of(album(tmp_path/'far', rows(['33N', '33N', '33N', '36N', '33S', '33N']), 'lat,lon,zone'))
    assert len(said) == 1 and 'the zone contradicts latitude and longitude in 2 of 6 rows, e.g. row 3: 55.703, 13.2 (zone 36N)' in said[0], said
    said = of(album(tmp_path/'turned', [(*p[::-1], '33N') for p in town(LUND, 6)], 'lat,lon,zone'))
    assert len(said) == 1 and 'in 6 of 6 rows, e.g. row 0: 13.2, 55.7 (zone 33N), the other way round they agree with the zone' in said[0], said
    e, n, _ = to_utm(*np.array(town(LUND, 6)).T)
    said = of(album(tmp_path/'metres', [(*p, a, b, '56S') for p, a, b in zip(town(LUND, 6), e, n)], 'lat,lon,easting,northing,zone'))
    assert len(said) == 1 and 'the zone contradicts latitude and longitude in 6 of 6 rows' in said[0], said


@pytest.mark.parametrize('columns', ['lat,lon', 'lat,lon,zone', 'easting,northing,zone'])
def test_a_csv_without_rows(tmp_path, columns):
    (tmp_path/'where.csv').write_text(f'path,{columns}\n')
    assert len(check(tmp_path).warnings) == 1 and 'where.csv has no rows' in check(tmp_path).warnings[0]


@pytest.mark.parametrize('zone, lat, lon, far', [('32N', 60.4, 5.3, False), ('31N', 60.4, 5.3, False), ('33N', 78.2, 9.5, False), ('37N', 78., 41.9, False), ('1S', -18., 179.9, False), ('60S', -18., -179.9, False), ('2S', -18., -179.9, False), ('2S', -18., 179.9, True),
                                                 ('17N', -.2, -78.5, False), ('17N', -2.2, -79.9, True), ('35S', 55.7, 25., True), ('33N', np.nan, 13., False), ('33N', np.inf, 13., False), ('33N', 13.2, np.inf, False), ('', 13., 13., False)])
def test_far_zones(zone, lat, lon, far): assert far_zone(np.array([zone]), np.array([lat]), np.array([lon])).tolist() == [far]


@pytest.mark.parametrize('columns', ['lat,lon', 'easting,northing', 'lat,lon,easting,northing,zone', 'lat,lon,heading'])
@pytest.mark.filterwarnings('error')
def test_infinite_numbers_are_told_and_nothing_else(tmp_path, capsys, columns):
    "No warning of numpy's; which row it is, and what the reader makes of it."
    e, n, _ = to_utm(*np.array(town(LUND, 6)).T); wide = columns.count(',') + 1
    rows = [[*((p[0], p[1], a, b, '33N') if 'lat' in columns and wide != 3 else (*p, 90) if wide == 3 else (a, b))][:wide] for p, a, b in zip(town(LUND, 6), e, n)]
    rows[2][-1 if wide == 3 else 0] = 'inf'
    if wide != 3: rows[4][1] = '-inf'
    folder = album(tmp_path/'walk', rows, columns); code, out = text(folder, capsys=capsys)
    if wide == 3: assert code == 0 and np.isnan(read_photos(folder).heading[2]) and read_photos(folder).heading[1] == 90; return
    assert code == 2 and 'row 2' in out and 'inf' in out and 'a map' not in out, out
    if 'lat' in columns: assert 'latitude and longitude are no position on the Earth in 2 of 6 rows, e.g. row 2: inf, 13.2' in out and 'the csv is not read before that is mended' in out, out
    else: assert "row 2 has easting 'inf'; expected metres on the Earth" in out


@pytest.mark.filterwarnings('error')
def test_infinite_numbers_in_msls_and_gsv(tmp_path):
    root, raws = msls(tmp_path); path = next(p for p in raws if p.parent.name == 'database')
    spoil(path, lambda df: df.__setitem__('lat', df.lat.where(np.arange(len(df)) != 3, 'inf'))); said = '\n'.join(check(root).warnings)
    assert 'no position on the Earth in 1 of 20 rows, e.g. row 3: inf, ' in said and 'row 3: latitude inf' in said, said
    root, raws = msls(tmp_path/'post'); post = next(p for p in raws if p.parent.name == 'database').with_name('postprocessed.csv')
    spoil(post, lambda df: df.__setitem__('easting', df.easting.where(np.arange(len(df)) != 3, 'inf'))); assert 'has easting inf; expected metres on the Earth' in '\n'.join(check(root).warnings)
    write_gsv(cards(tmp_path/'g', 'lund'), tmp_path/'gsv'); path = tmp_path/'gsv'/'Dataframes'/'lund.csv'
    df = pd.read_csv(path, dtype=str); df.loc[3, 'lon'] = '-inf'; df.to_csv(path, index=False); said = '\n'.join(check(tmp_path/'gsv').warnings)
    assert 'no position on the Earth in 1 of 25 rows, e.g. row 3: ' in said and 'row 3: ' in said.split('\n')[0], said


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
