"geo: brute force for the neighbours, geodesics for the metres, the published exceptions for the zones."
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from pyproj import Geod
from pyproj.aoi import AreaOfInterest
from pyproj.database import query_utm_crs_info

from sage.core import UserError, stream
from sage.geo import band_zone, check_latlon, radius_neighbors, to_latlon, to_utm, utm_zone

def brute_force(xy, radius, queries=None, inclusive=False):
    "All pairs, in plain Python."
    rows = []
    for i, q in enumerate(xy if queries is None else queries):
        d = [((q[0] - p[0])**2 + (q[1] - p[1])**2)**.5 for p in xy]
        rows.append([j for j, v in enumerate(d) if (v <= radius if inclusive else v < radius) and not (queries is None and i == j)])
    return rows

def rows_of(near): return [near.row(i).tolist() for i in range(len(near.indptr) - 1)]

# whole metres on a small field: many coincide, many lie at exactly the radius (7-24-25, 15-20-25, 3-4-5)
def field(least=0): return arrays(float, st.tuples(st.integers(least, 25), st.just(2)), elements=st.integers(-30, 30).map(float))

@settings(max_examples=200, deadline=None)
@given(field(), st.sampled_from([1, 5, 25, 25.5, 1000]), st.booleans())
@example(np.array([[0., 0], [7, 24], [0, 0]]), 25, False)
def test_neighbors_equal_brute_force(xy, radius, inclusive):
    near = radius_neighbors(xy, radius, inclusive=inclusive)
    assert rows_of(near) == brute_force(xy, radius, inclusive=inclusive)
    assert near.indptr.dtype == near.indices.dtype == np.int64 and near.distances.dtype == np.float64
    for i in range(len(xy)):
        np.testing.assert_array_equal(near.distances[near.indptr[i]:near.indptr[i+1]], np.hypot(*(xy[near.row(i)] - xy[i]).T))

@settings(max_examples=200, deadline=None)
@given(field(), field(), st.sampled_from([5, 25]), st.booleans())
def test_queries_equal_brute_force(xy, queries, radius, inclusive):
    assert rows_of(radius_neighbors(xy, radius, queries, inclusive)) == brute_force(xy, radius, queries, inclusive)

def test_neighbors_far_from_the_origin():
    "UTM northings are millions of metres: the boundary still decides by the metre."
    xy = np.array([[387_000., 6_174_000.], [387_025, 6_174_000], [387_000, 6_174_024.999]])
    assert rows_of(radius_neighbors(xy, 25)) == [[2], [], [0]]
    assert rows_of(radius_neighbors(xy, 25, inclusive=True)) == [[1, 2], [0], [0]]

def test_neighbors_are_mutual_and_fast():
    "Half a million images at a city's density: seconds, not N² (which would take an hour)."
    import time
    n = 500_000
    xy = stream(0, 'fast').uniform(0, 5*n**.5, (n, 2)); start = time.process_time()
    near = radius_neighbors(xy, 10)
    assert time.process_time() - start < 30
    rows = np.repeat(np.arange(n), near.counts)
    assert (np.bincount(near.indices, minlength=n) == near.counts).all() and not (rows == near.indices).any()
    for i in (0, 123_456, n - 1):
        d = np.hypot(*(xy - xy[i]).T); d[i] = np.inf
        np.testing.assert_array_equal(near.row(i), np.flatnonzero(d < 10))

@pytest.mark.parametrize('xy, radius, text', [
    ([[0, 0], [np.inf, 1]], 25, 'xy row 1'), ([[0, np.nan]], 25, 'xy row 0'), ([1, 2, 3], 25, 'shape'), (np.zeros((4, 3)), 25, 'shape'),
    ([[0, 0]], 0, 'radius'), ([[0, 0]], -3, 'radius'), ([[0, 0]], np.nan, 'radius'), ([[0, 0]], np.inf, 'radius')])
def test_neighbors_bad_input(xy, radius, text):
    with pytest.raises(UserError, match=text): radius_neighbors(xy, radius)

def test_bad_queries_are_named():
    with pytest.raises(UserError, match='queries row 0'): radius_neighbors([[0, 0]], 5, queries=[[np.nan, 0]])

# --- metres ---

cities = dict(Lund=(55.7, 13.2), Bergen=(60.39, 5.32), Longyearbyen=(78.22, 15.63), Sydney=(-33.87, 151.21), Nairobi=(-1.29, 36.82), Suva=(-18.14, 178.44), Ushuaia=(-54.8, -68.3), Quito=(0., -78.5), Tromso=(69.65, 18.96))

@pytest.mark.parametrize('city', cities)
def test_distances_equal_geodesics(city):
    "Within a zone the flat distance differs from the ellipsoid's by at most 0.1 %, the scale of UTM."
    lat, lon = cities[city]
    rng = stream(0, 'geodesic', city)
    lats, lons = lat + rng.uniform(-.02, .02, 200), lon + rng.uniform(-.02, .02, 200)
    e, n, zone = to_utm(lats, lons)
    true = Geod(ellps='WGS84').inv(lons[:-1], lats[:-1], lons[1:], lats[1:])[2]
    np.testing.assert_allclose(np.hypot(np.diff(e), np.diff(n)), true, rtol=1.1e-3)
    assert zone == utm_zone(lat, lon)

@settings(max_examples=300, deadline=None)
@given(st.floats(-80, 84), st.floats(-180, 180))
def test_there_and_back(lat, lon):
    e, n, zone = to_utm([lat], [lon])
    assert 0 < e[0] < 1_000_000 and 0 <= n[0] <= 10_000_000 and zone == utm_zone(lat, lon)
    again = to_latlon(e, n, zone)
    assert abs(again[0][0] - lat) < 1e-8 and abs((again[1][0] - lon + 180) % 360 - 180) < 1e-7

def test_northing_jumps_ten_thousand_kilometres_at_the_equator():
    north, south = to_utm([1e-9], [36.8], '37N')[1][0], to_utm([-1e-9], [36.8], '37S')[1][0]
    assert abs(south - north - 10_000_000) < .01
    assert to_utm([-1.29], [36.82])[2] == '37S' and to_utm([-1.29], [36.82])[1][0] > 9_000_000

def test_one_zone_for_a_city_on_a_border():
    lon = np.linspace(11.98, 12.01, 50)
    e, n, zone = to_utm(np.full(50, 47.), lon)
    assert zone == '32N' and (np.diff(e) > 40).all()
    assert to_utm(np.full(50, 47.), lon, zone='33N')[2] == '33N'

# --- zones ---

def registry(lat, lon):
    "The zone by the EPSG registry (which knows no exceptions)."
    found = query_utm_crs_info('WGS 84', AreaOfInterest(lon, lat, lon, lat))
    return [f'{c.code[-2:].lstrip("0")}{"N" if c.code.startswith("326") else "S"}' for c in found]

@settings(max_examples=40, deadline=None)
@given(st.integers(-79, 83), st.integers(-180, 179))
def test_zones_equal_the_registry(lat, lon):
    lat, lon = lat + .5, lon + .5
    if 56 <= lat < 64 and 0 <= lon < 12 or lat >= 72 and 0 <= lon < 42: return
    assert registry(lat, lon) == [utm_zone(lat, lon)]

@pytest.mark.parametrize('lat, lon, zone', [
    (56, 3, '32N'), (55.999, 3, '31N'), (63.999, 5.9, '32N'), (64, 5.9, '31N'), (60, 2.999, '31N'), (60, 11.999, '32N'), (60, 12, '33N'),
    (72, 0, '31N'), (71.999, 8.9, '32N'), (78, 8.999, '31N'), (78, 9, '33N'), (78, 20.999, '33N'), (78, 21, '35N'), (78, 32.999, '35N'), (78, 33, '37N'),
    (78, 41.999, '37N'), (78, 42, '38N'), (84, 15, '33N'), (84.001, 8.9, '32N'), (72, 8.9, '31N'), (78, -.001, '30N'), (0, 0, '31N'), (-1e-9, 0, '31S'), (10, 180, '1N'), (10, -180, '1N'), (10, 179.999, '60N')])
def test_zone_edges(lat, lon, zone): assert utm_zone(lat, lon) == zone

@pytest.mark.parametrize('zone', ['0N', '61S', 'N', '33', '33U', '', 'abc', None, 33, '3.5N', '-3N'])
def test_bad_zone(zone):
    with pytest.raises(UserError, match='zone'): to_latlon([500_000], [0], zone)

def test_bands():
    assert [band_zone(33, c) for c in 'CMNX'] == ['33S', '33S', '33N', '33N'] and band_zone('07', 't') == '7N'
    for letter in ('A', 'B', 'I', 'O', 'Y', 'Z', '', 'NN', '7', None):
        with pytest.raises(UserError, match='band'): band_zone(33, letter)
    with pytest.raises(UserError, match='zone'): band_zone('x', 'N')

@pytest.mark.parametrize('lat, lon, text', [
    ([np.nan], [1], 'missing'), ([1], [np.nan], 'missing'), ([120], [45], 'swapped'), ([np.inf], [0], 'within'), ([0], [181], 'within'), ([91], [179], 'within'),
    ([0, 0, 100.25], [0, 0, 50], 'row 2: latitude 100.25')])
def test_bad_positions(lat, lon, text):
    with pytest.raises(UserError, match=text): check_latlon(lat, lon, 'photos.csv')
    with pytest.raises(UserError, match=text): to_utm(lat, lon)
    with pytest.raises(UserError, match='^photos.csv: '): check_latlon(lat, lon, 'photos.csv')


def test_nothing_has_no_neighbours():
    for queries in (None, np.zeros((3, 2))):
        n = radius_neighbors(np.zeros((0, 2)), 25., queries)
        assert len(n.indices) == 0 and len(n.distances) == 0 and n.indptr.tolist() == [0] * (1 if queries is None else 4)

def test_unequal_lengths():
    with pytest.raises(UserError, match='2 eastings but 3 northings'): to_latlon([5e5, 5e5], [0., 1., 2.], '33N')
