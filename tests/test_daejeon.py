"""Positives on real coordinates: 32,380 street views of Daejeon by geodesic distance, pair by pair; and towns that straddle two UTM zones."""
import time

import numpy as np
import pandas as pd
import pytest
from pyproj import Geod

from sage.formats import read_utm, utm_name, write_msls, read_msls
from sage.geo import radius_neighbors, to_utm, utm_zone
from sage.graph import GeoSide
from sage.places import make_table
from sage.protocols import folder_table
from sage.retrieval import positives_within

GEOD = Geod(ellps='WGS84')
EDGE = .05 # metres: the scale of UTM, at most 1.001 inside a zone, moves a distance of 50 m by at most 5 cm


def geodesic(a, b): return GEOD.inv(a[:, 1], a[:, 0], b[:, 1], b[:, 0])[2]


def all_pairs(q, d, reach):
    "Every (query, database) pair that could lie within `reach` metres, by latitude and longitude alone: no projection is involved."
    lat = reach / 110_000; found = []
    order = np.argsort(d[:, 0]); sorted_lat = d[order, 0]
    low, high = np.searchsorted(sorted_lat, q[:, 0] - lat), np.searchsorted(sorted_lat, q[:, 0] + lat)
    for i, (a, b) in enumerate(zip(low, high)):
        j = order[a:b]; j = j[np.abs(d[j, 1] - q[i, 1]) <= reach / (110_000 * np.cos(np.radians(q[i, 0])))]
        found.append(np.stack((np.full(len(j), i), j), 1))
    return np.concatenate(found)


def table(latlon, zone=None, role='database', city='daejeon'):
    e, n, zone = to_utm(*latlon.T, zone)
    return make_table(image=[f'/{role}{i}.jpg' for i in range(len(latlon))], city=city, place=np.arange(len(latlon)), easting=e, northing=n, zone=zone, role=role)


@pytest.fixture(scope='module')
def daejeon(shared):
    folder = shared/'data'/'daejeon520'
    if not folder.exists(): pytest.skip('no daejeon520 data')
    read = lambda name: pd.read_csv(folder/f'{name}.csv', header=None, usecols=[1, 2]).to_numpy(float)
    return read('query'), read('database')


@pytest.mark.parametrize('radius', [10., 25., 50.])
def test_every_pair_by_geodesic(daejeon, radius):
    q, d = daejeon
    assert len(d) == 32_380 and len(q) == 500
    pairs = all_pairs(q, d, radius + 5)
    metres = geodesic(q[pairs[:, 0]], d[pairs[:, 1]])
    start = time.process_time()                                   # of this process: others may keep the machine busy
    got = positives_within(table(q, role='query'), table(d), radius)
    seconds = time.process_time() - start
    ours = {(i, int(j)) for i, p in enumerate(got) for j in p}
    inside, clear = metres <= radius, np.abs(metres - radius) > EDGE
    want = {tuple(map(int, p)) for p in pairs[inside]}
    differ = ours ^ want
    near = {tuple(map(int, p)) for p in pairs[~clear]}
    assert differ <= near, f'{len(differ - near)} pairs differ and are not within 5 cm of {radius} m'
    assert len(want) > 500 and seconds < 5
    print(f'{radius:g} m: {len(want):,} pairs, {len(near)} within 5 cm of the radius, {len(differ)} of them differ; {seconds:.2f} s')


def test_the_scale_of_utm_explains_the_edge(daejeon):
    "Daejeon lies 1.6° from the middle of zone 52: every distance is stretched by the same tiny factor, so only pairs at the very edge can differ."
    q, d = daejeon
    e, n, _ = to_utm(*d.T)
    near = radius_neighbors(np.stack((e, n), 1), 50., np.stack(to_utm(*q.T)[:2], 1), inclusive=True)
    rows = np.repeat(np.arange(len(q)), near.counts)
    metres = geodesic(q[rows], d[near.indices]); far = metres > 5
    scale = near.distances[far] / metres[far]
    assert .9996 <= scale.min() and scale.max() < 1.0004 and np.ptp(scale) < 1e-4
    assert 50 * abs(scale - 1).max() < EDGE


def test_all_images_under_five_seconds(daejeon):
    "The whole database against itself."
    _, d = daejeon
    start = time.process_time()
    t = table(d)
    found = positives_within(t, t, 25.)
    assert time.process_time() - start < 5 and all(i in p for i, p in enumerate(found[:100]))


# ---- two zones -------------------------------------------------------------------------------------------------

def border(lon, lat=36., n=120, seed=0):
    "Points along a meridian, within 25 m of it."
    g = np.random.default_rng(seed)
    return np.stack((lat + g.uniform(-150, 150, n) / 111_000, lon + g.uniform(-25, 25, n) / (111_320 * np.cos(np.radians(lat)))), 1)


def own_zone(latlon, role='database'):
    "Each point in the zone it lies in, as files are named one by one."
    zones = np.array([utm_zone(*p) for p in latlon])
    df = table(latlon, role=role).assign(zone=zones)
    for z in set(zones): df.loc[zones == z, 'easting'], df.loc[zones == z, 'northing'] = to_utm(*latlon[zones == z].T, z)[:2]
    return df


@pytest.mark.parametrize('lon, lat', [(126., 36.), (132., 33.5), (0., 51.5), (36., 31.9), (-78., 43.7), (12., -33.)])
@pytest.mark.parametrize('radius', [10., 25., 50.])
def test_positives_across_a_zone_border(lon, lat, radius):
    q, d = border(lon, lat, 60, 1), border(lon, lat, 120, 2)
    tq, td = own_zone(q, 'query'), own_zone(d)
    assert td.zone.nunique() == tq.zone.nunique() == 2
    pairs = np.array([(i, j) for i in range(len(q)) for j in range(len(d))])
    metres = geodesic(q[pairs[:, 0]], d[pairs[:, 1]])
    got = positives_within(tq, td, radius)
    crossing = 0
    for (i, j), m in zip(pairs, metres):
        if abs(m - radius) > EDGE: assert (j in got[i]) == (m <= radius), (i, j, m)
        crossing += m <= radius and tq.zone[i] != td.zone[j]
    assert crossing > 0                                                                        # or nothing was tested


def write_names(folder, latlon, zone=None):
    folder.mkdir(parents=True)
    for i, (a, o) in enumerate(latlon):
        e, n, z = to_utm([a], [o], zone); (folder/f'{utm_name(e[0], n[0], z, a, o, pano_id=f"{i:03d}")}.jpg').touch()


def in_order(df): return df.iloc[np.argsort([p.split('@')[7] for p in df.image])].reset_index(drop=True)


@pytest.mark.parametrize('lon', [126., 132.])
def test_a_set_named_by_two_zones_is_read_in_one(lon, tmp_path):
    "Training: the geographic graph sees neighbours on both sides, and nobody who only has the same metres."
    points = border(lon, seed=3)
    write_names(tmp_path/'town'/'images'/'train'/'database', points)
    df = in_order(read_utm(tmp_path/'town'))
    assert df.zone.nunique() == 1 and df.city.nunique() == 1
    near = GeoSide(df, radius=25.).neighbors
    pairs = np.array([(i, j) for i in range(len(points)) for j in range(len(points)) if i != j])
    metres = geodesic(points[pairs[:, 0]], points[pairs[:, 1]])
    for (i, j), m in zip(pairs, metres):
        if abs(m - 25) > EDGE: assert (j in near.row(i)) == (m < 25), (i, j, m)


@pytest.mark.parametrize('lon', [126., 132.])
def test_an_evaluation_set_named_by_two_zones(lon, tmp_path):
    "Evaluation keeps the zone of each name, and compares through latitude and longitude."
    q, d = border(lon, n=30, seed=4), border(lon, n=60, seed=5)
    write_names(tmp_path/'q', q); write_names(tmp_path/'d', d)
    tq, td = in_order(folder_table(tmp_path/'q', 'query')), in_order(folder_table(tmp_path/'d', 'database'))
    got = positives_within(tq, td)
    for i in range(len(q)):
        m = geodesic(np.repeat(q[i:i + 1], len(d), 0), d)
        for j in np.flatnonzero(np.abs(m - 25) > EDGE): assert (j in got[i]) == (m[j] <= 25)


def test_sets_of_far_zones_do_not_fall_together(tmp_path):
    "Seoul's zone and San Francisco's in one folder: the same metres, other spots; they become cities of their own."
    base = tmp_path/'mix'/'images'/'train'/'database'; base.mkdir(parents=True)
    for i, zone in enumerate(['52N'] * 3 + ['10N'] * 2): (base/f'{utm_name(5e5 + i, 4e6, zone, 36.1, 129. if zone == "52N" else -123.)}.jpg').touch()
    df = read_utm(tmp_path/'mix')
    assert df.groupby('zone').city.unique().map(list).to_dict() == {'52N': ['mix'], '10N': ['mix 10N']}


def test_msls_measured_image_by_image(tmp_path):
    "A town like London: metres of two zones in one csv, no zone written."
    points = border(0., 51.5, 60, 6)
    mixed = own_zone(points)
    images = tmp_path/'photos'; images.mkdir()
    for i in range(60): (images/f'{i:03d}.jpg').touch()
    t = make_table(image=[f'{images}/{i:03d}.jpg' for i in range(60)], city='london', place=np.arange(60), easting=mixed.easting, northing=mixed.northing, zone=mixed.zone, role=np.where(np.arange(60) % 4, 'database', 'query'))
    df = read_msls(write_msls(t, tmp_path/'msls'))
    df = df.iloc[np.argsort(df.image.map(lambda p: p.split('/')[-1]))].reset_index(drop=True)
    assert df.zone.nunique() == 1
    e, n, _ = to_utm(*points.T, df.zone[0])
    assert np.hypot(df.easting - e, df.northing - n).max() < .01
