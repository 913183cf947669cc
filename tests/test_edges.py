"""Exact borders of geo, graph, clique and retrieval, each worked by hand: what a small change of one number or one comparison would break and no broader test would notice (see tools/mutate.py)."""
import numpy as np, pandas as pd, pytest

import sage.retrieval as r
from sage.core import UserError
from sage.clique import ground, random_float, take_cliques
from sage.geo import radius_neighbors, to_utm
import sage.graph
from sage.graph import TAU2, GeoSide, alike_pairs, city_neighbors, cut_edges, distance, epoch_graph, geo_cliques, number, squared_distance, squared_lengths, typical_norm
from sage.places import make_table
from sage.retrieval import Recall, apply_pca, check_descriptors, check_finite, chunks, fit_pca, in_threads, move, pca_solver, positives_within, search, zones_touch


# ---- geo

def test_a_zone_is_chosen_by_most_and_a_tie_goes_low():
    lat = np.full(4, 47.)
    assert to_utm(lat, [11., 11, 13, 13])[2] == '32N' and to_utm(lat, [11., 13, 13, 13])[2] == '33N'
    assert to_utm([1., -1], [10., 10])[2] == '32N' and to_utm([-1., -1, 1], [10.]*3)[2] == '32S' and to_utm([0.], [10.])[2] == '32N'
    with pytest.raises(UserError, match='no positions'): to_utm([], [])

def test_positions_at_the_limits():
    for lat, lon in ((90, 180), (-90, -180)):
        with pytest.raises(UserError, match='1 longitudes|2 longitudes'): to_utm([lat], [lon, lon])
    to_utm([84.], [180.]); to_utm([-80.], [-180.])
    with pytest.raises(UserError, match='swapped'): to_utm([180.], [90.])
    with pytest.raises(UserError, match='swapped'): to_utm([-180.], [-90.])
    with pytest.raises(UserError, match='within ±90'): to_utm([180.5], [90.])
    with pytest.raises(UserError, match='within ±90'): to_utm([180.], [90.5])

def test_neighbours_come_with_their_distances_and_counts():
    near = radius_neighbors([[0, 0], [3, 4], [6, 8]], 5, inclusive=True)
    assert near.counts.tolist() == [1, 2, 1] and near.indptr.tolist() == [0, 1, 3, 4] and near.indices.tolist() == [1, 0, 2, 1] and near.distances.tolist() == [5., 5., 5., 5.]
    assert radius_neighbors([[0, 0], [3, 4], [6, 8]], 5).counts.tolist() == [0, 0, 0]
    far = radius_neighbors([[0, 0], [3, 4], [6, 8]], 5, [[3, 4]], inclusive=True)
    assert far.indices.tolist() == [0, 1, 2] and far.distances.tolist() == [5., 0., 5.] and far.counts.tolist() == [3]
    assert radius_neighbors([[0, 0]], 1e-3, [[0, 0]]).indices.tolist() == [0]


# ---- graph

def test_all_numbers_of_sixteen_bits():
    "NaN counts as infinite: both are no number."
    bits = np.arange(2**16, dtype=np.uint16)
    want = np.nan_to_num(bits.view(np.float16).astype(np.float32), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    got = np.array([number(b, 2) for b in bits], np.float32)
    finite = np.isfinite(bits.view(np.float16))
    assert (got[finite] == want[finite]).all() and np.isinf(got[~finite]).all() and (np.signbit(got) == (bits > 0x7fff)).all()
    assert number(np.float32(-1.5), 4) == -1.5

def test_lengths_and_distances_of_sixteen_bits():
    x = np.array([[3, 4], [-1, 2]], np.float16)
    for F in (x.view(np.uint16), x.astype(np.float32)): assert squared_lengths(F).tolist() == [25, 5] and squared_distance(F[0], F[1]) == 20 and distance(F[0], F[1]) == 20**.5
    assert typical_norm(x) == 15**.5

def test_the_cut_is_not_above():
    W = np.array([[0., -3], [-2, np.nan]])
    assert cut_edges(W, tau2=-3.).tolist() == [[0, -np.inf], [-2, -np.inf]] and cut_edges(W, 2., -1.5).tolist() == [[0, -np.inf], [-2, -np.inf]] and cut_edges(W, 2., -1.6).tolist() == [[0, -3], [-2, -np.inf]]
    assert TAU2 == -2880/8448**.5 and cut_edges([[TAU2, TAU2*.999]]).tolist() == [[-np.inf, TAU2*.999]]

def test_neighbours_in_a_city_across_squares():
    "On a grid of 25 m everything lies on the borders of squares; 24.999 m is near, 25 m is not."
    xy = np.array([[0, 0], [25, 0], [0, 25], [24.999, 0], [0, -24.999], [-17, -17], [25, 25], [0, 0]])
    near = city_neighbors(xy, np.array([0, 0, 0, 0, 0, 0, 0, 1]), 25.)
    d = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    for i in range(8): assert sorted(near.row(i)) == [j for j in range(8) if j != i and (i == 7) == (j == 7) and d[i, j] < 25]
    for radius in (0, -1, np.nan, np.inf):
        with pytest.raises(UserError, match='radius'): city_neighbors(xy, np.zeros(8, int), radius)


@pytest.mark.parametrize('n', [1, 2, 64, 65, 66, 200])
def test_everybody_at_one_spot(n):
    "More of them than there is room for at first; city 0 stands together, city 1 does not."
    for city in (np.repeat([0, 1], n), np.tile([0, 1], n), np.r_[np.ones(n, int), np.zeros(n, int)]):
        near = city_neighbors(np.random.default_rng(n).uniform(0, 17, (2*n, 2)), city, 25.)
        for i in range(2*n): assert sorted(near.row(i)) == [j for j in range(2*n) if j != i and city[j] == city[i]]

def test_nobody_has_no_neighbours():
    near = city_neighbors(np.zeros((0, 2)), np.zeros(0, int), 25.)
    assert near.span.shape == (0, 2) and near.indices.tolist() == []

def test_neighbours_in_squares_that_hardly_touch():
    "Less than 25 m apart, and if squares were a thousand millionth narrower, one would stand between them."
    x = 25*(1 - 1.1e-9)
    for far, near in ((25*(1 - 1e-10), [1]), (25, [])): assert city_neighbors(np.array([[x, 0], [x + far, 0]]), np.zeros(2, int), 25.).row(0).tolist() == near

@pytest.mark.parametrize('radius', [25., 1e-3, 1e6])
def test_neighbours_where_squares_of_lengths_round_otherwise(radius):
    "At the radius to the last bit, where a sum of squares is less than its square and the root no less than itself, or the other way round: the length decides."
    turn = np.random.default_rng(0).uniform(0, 2*np.pi, 20_000)
    x, y = radius*np.cos(turn), radius*np.sin(turn)
    length, odd = np.hypot(x, y), (x*x + y*y < radius*radius) != (np.hypot(x, y) < radius)
    assert odd.sum() > 100
    city, zero = np.repeat(np.arange(odd.sum()), 2), np.zeros(odd.sum())
    near = city_neighbors(np.stack([zero, zero, x[odd], y[odd]], 1).reshape(-1, 2), city, radius)
    assert (near.counts.reshape(-1, 2) == (length[odd] < radius)[:, None]).all()

def test_neighbours_whose_squares_leave_no_room_for_a_second_number():
    "A square's number and an image's do not fit into one together; the third and the fourth image are 6 m apart, in squares one above the other."
    side, x, y = 25*(1 + 1e-9), 2**29 - 1, 2**31 - 2**29
    near = city_neighbors(np.array([[0, 0], [(x + .5)*side, (y + 1)*side - 3], [(x + .5)*side, (y + 1)*side + 3], [(x + .5)*side, (2**31 - .5)*side]]), np.zeros(4, int), 25.)
    assert [near.row(i).tolist() for i in range(4)] == [[], [2], [1], []]

def test_neighbours_in_cities_of_any_number():
    for city in ([-1, -1, -1], [5, 5, 5]): assert [sorted(city_neighbors(np.array([[0, 0], [3, 0], [0, 4.]]), city, 25.).row(i)) for i in range(3)] == [[1, 2], [0, 2], [0, 1]]
    assert [city_neighbors(np.array([[0, 0], [3, 0], [0, 4.]]), [-1, 0, -1], 25.).row(i).tolist() for i in range(3)] == [[2], [], [0]]

def test_neighbours_in_cities_whose_squares_have_no_room_for_numbers():
    "Nine cities among one another, each as wide as 2³¹ squares and 2³⁰ high: without care, the ninth would have the numbers of the first."
    spots = np.array([[0, 0], [25*(1 + 1e-9)*(2**31 - 1.5), 25*(1 + 1e-9)*(2**30 - 1.5)], [4., 0]])
    near = city_neighbors(np.repeat(spots, 9, 0), np.tile(np.arange(9), 3), 25.)
    assert [near.row(i).tolist() for i in range(27)] == [[18 + i] for i in range(9)] + [[]]*9 + [[i] for i in range(9)]


def test_a_clique_has_ten_images_unless_said_otherwise():
    assert [c.tolist() for c in geo_cliques(np.zeros((10, 2)))] == [[*range(10)]] and geo_cliques(np.zeros((9, 2))) == [] and len(geo_cliques(np.zeros((9, 2)), min_size=9)) == 1
    assert geo_cliques([[0., 0], [25, 0]], min_size=2) == [] and len(geo_cliques([[0., 0], [24.999, 0]], min_size=2)) == 1

@pytest.fixture
def corner():
    "Cities of one, two and three places, an image each; the places of the second lie 5 m apart."
    return GeoSide(make_table(image=list('abcdef'), city=list('xyyzzz'), place=[0, 0, 1, 0, 1, 2], easting=[0, 0, 3, 0, 50, 90.], northing=[0, 0, 4, 0, 0, 0.]))

def test_cities_begin_and_end(corner):
    assert corner.city_start.tolist() == [0, 1, 3, 6] and corner.place_rows.span.tolist() == [[i, i + 1] for i in range(6)]

def test_the_most_alike_of_a_city(corner):
    F = np.array([[0], [0], [9], [0], [1], [3]], np.float32)
    assert alike_pairs(corner, F, 1).tolist() == [[1, 2], [3, 4], [4, 5]] and alike_pairs(corner, F).tolist() == [[1, 2], [3, 4], [3, 5], [4, 5]] and alike_pairs(corner, F, 0).tolist() == []
    wide = GeoSide(make_table(image='a', city='x', place=np.arange(40), easting=100.*np.arange(40), northing=0.))
    line = np.arange(40, dtype=np.float32)[:, None]**2                                # each place is most like those before it
    for degree in (15, 16): assert np.bincount(alike_pairs(wide, line, degree).ravel())[-1] == degree
    assert (alike_pairs(wide, line) == alike_pairs(wide, line, 15)).all()
    assert np.bincount(epoch_graph(wide, line).edges[['src', 'dst']].to_numpy().ravel())[-1] == 15

def test_the_nearest_of_descriptors_of_any_length():
    "As a GPU looks for them: the shorter ones must not come first."
    import torch
    from scipy.spatial.distance import cdist
    F = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)*np.random.default_rng(1).uniform(.2, 5, (300, 1)).astype(np.float32)
    assert np.array_equal(sage.graph._nearest(torch.from_numpy(F), 9), np.argsort(cdist(F, F), kind='stable')[:, :9])

def test_who_looks_for_the_most_alike(monkeypatch):
    "FAISS on a CPU, products of tensors elsewhere; these in pieces of 2²⁶ numbers."
    import torch
    monkeypatch.setattr(sage.graph, '_nearest', lambda X, k: X.device.type)
    F = np.arange(5, dtype=np.float32)[:, None]
    assert sage.graph.nearest(F, 1).tolist() == [[0], [1], [2], [3], [4]] and sage.graph.nearest(F, 1, 'meta') == 'meta'
    monkeypatch.undo()
    pieces = []
    def products(squares, a, b, alpha): pieces.append(len(a)); return torch.zeros(len(a), 3)
    monkeypatch.setattr(torch, 'addmm', products)
    sage.graph._nearest(torch.zeros(20_000, 1), 3)
    assert pieces == [3355]*5 + [3225]

def test_an_edge_at_the_cut_is_none(corner):
    F = np.array([[1], [1], [-1], [1], [1], [1]], np.float32)                        # 5 m · 2 = 10, for descriptors of length 1
    kinds = lambda tau2, F=F, similar=0: epoch_graph(corner, F, similar=similar, tau2=tau2).edges[['src', 'dst', 'kind']].values.tolist()
    assert kinds(-10.) == [] and kinds(-10.001) == [[1, 2, 'near']] and kinds(-10., similar=1)[0] == [1, 2, 'alike'] and kinds(-10., 4*F) == [] and kinds(-10.001, 4*F) == [[1, 2, 'near']]
    edge = epoch_graph(corner, F, tau2=-11., similar=0).edges.iloc[0]
    assert (edge.d_geo, edge.d_vis, edge.affinity, edge.state) == (5, 2, -10, 'new')

def test_a_graph_of_other_places_is_no_previous_one(corner):
    before = epoch_graph(corner, np.eye(6)).edges
    assert before.dst.max() == 5 and (epoch_graph(corner, np.eye(6), before).edges.state == 'kept').all()
    for dst in (6, 7):
        with pytest.raises(UserError, match=f'has a node {dst}, but there are 6 places'): epoch_graph(corner, np.eye(6), before.assign(dst=[*before.dst[:-1], dst]))
    now = epoch_graph(corner, np.eye(6), before, similar=0).edges                     # all but the near edge have broken, and have numbers
    assert now.state.tolist() == ['kept'] + ['broken']*3 and now.kind.tolist() == ['near'] + ['alike']*3 and np.allclose(now.d_vis, 2**.5) and now.d_geo.tolist() == [5, 50, 90, 40]
    assert epoch_graph(corner, np.eye(6), now, similar=0).edges.state.tolist() == ['kept']


# ---- clique

def test_splitmix64():
    "The first numbers of the published generator for seed 0."
    state = np.zeros(1, np.uint64)
    assert [random_float(state)*2**53 for _ in range(3)] == [n >> 11 for n in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)]

def drawn(draws, patience, places=9, min_size=4):
    "Five places of four images each, 100 m apart, and five of one image; what was drawn until patience ended."
    at = np.repeat(100.*np.arange(10), [4]*5 + [1]*5)
    geo = GeoSide(make_table(image='a', city='x', place=np.repeat(np.arange(10), [4]*5 + [1]*5), easting=at, northing=0.))
    counts, N = np.zeros(8, np.int64), len(at)
    cursor, rows, slots = take_cliques(ground(geo), np.full(N, -1, np.int32), np.zeros(N, np.int32), 1, np.array(draws, np.int32), 0, np.zeros(places + 1, np.int64), np.zeros(2, np.int32), 0, places, 99, 4, min_size, 50, patience, np.array([7], np.uint64), counts)
    return cursor, slots, counts.tolist()

def test_patience_ends_a_row_of_draws_that_gave_nothing():
    single, whole = [5, -1], [0, -1]
    assert drawn([single]*6, 3)[:2] == (3, 0) and drawn([single]*6, 3)[2] == [3, 0, 0, 0, 0, 3, 0, 3]
    assert drawn([single, single, whole, single, single, [1, -1], single], 3) == (7, 2, [7, 2, 0, 0, 0, 5, 0, 1])
    assert drawn([whole, [0, 6], single, single], 3) == (4, 1, [4, 1, 0, 0, 4, 3, 0, 3])                    # its images are taken: counted as near
    assert drawn([[0, 1], [2, 3]], 3, places=3) == (2, 3, [2, 3, 0, 0, 0, 0, 4, 0])                        # the batch is full; four images were left
    assert drawn([[0, 1], [2, 3]], 3, min_size=5) == (2, 4, [2, 4, 4, 0, 0, 0, 0, 0])                      # all of them smaller than wished


# ---- retrieval

def test_what_descriptors_may_be():
    assert check_descriptors(np.zeros((1, 1), np.float16), 'x').dtype == np.float16
    for bad, said in ((np.zeros(3), 'shape \\[3\\]'), (np.zeros((2, 2, 2)), 'shape'), (np.zeros((0, 2)), 'shape'), (np.zeros((2, 0)), 'shape'), (np.zeros((2, 2), int), 'int64')):
        with pytest.raises(UserError, match=said): check_descriptors(bad, 'x')
    check_finite(np.array([1., 0, 2]), 'x')
    with pytest.raises(UserError, match='x row 11:'): check_finite(np.array([1., np.inf, np.nan]), 'x', 10)
    with pytest.raises(UserError, match='x row 1:'): check_finite(np.array([1., np.inf, np.nan]), 'x')

def test_pieces():
    x = np.arange(21., dtype=np.float32).reshape(7, 3)
    assert [(s, p.tolist()) for s, p in chunks(x, 'x', 24)] == [(0, x[:2].tolist()), (2, x[2:4].tolist()), (4, x[4:6].tolist()), (6, x[6:].tolist())]
    assert [len(p) for _, p in chunks(x, 'x', 35)] == [2, 2, 2, 1] and [len(p) for _, p in chunks(x, 'x', 36)] == [3, 3, 1]
    assert [len(p) for _, p in chunks(x, 'x', 1)] == [1]*7 and [len(p) for _, p in chunks(x, 'x')] == [7]
    assert all(p.dtype == np.float32 and p.flags.c_contiguous for _, p in chunks(np.asfortranarray(x.astype(np.float64)), 'x'))
    x[5, 1] = np.nan
    with pytest.raises(UserError, match='x row 5'): list(chunks(x, 'x', 24))
    assert len(list(chunks(x, 'x', 24, check=False))) == 4

def test_one_piece_is_asked_for_at_most_what_it_has():
    x = np.eye(5, dtype=np.float32)
    d, i = r.candidates(x[:1], x, 5)
    assert sorted(i[0].tolist()) == [0, 1, 2, 3, 4] and d[0, 0] == 0 and d.shape == (1, 5)

@pytest.mark.parametrize('k', [1, 3, 9])
def test_pieces_of_a_database_are_merged(k, monkeypatch):
    real, x = r.chunks, np.random.default_rng(1).integers(-3, 4, (23, 2)).astype(np.float16)
    monkeypatch.setattr(r, 'chunks', lambda x, name, size=0, check=True: real(x, name, 32, check))       # four rows a piece
    d, i = search(x[:5].astype(np.float32), x, k)
    exact = np.square(x[:5].astype(float)[:, None] - x.astype(float)[None]).sum(2)
    assert i.tolist() == np.argsort(exact, axis=1, kind='stable')[:, :k].tolist() and np.allclose(d, np.sqrt(np.sort(exact, axis=1)[:, :k]))

@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_ties_go_to_the_lower_row_and_distances_are_exact(dtype):
    x = np.array([[3, 4], [0, 0], [3, 4], [-3, 4]], dtype)
    d, i = search(np.zeros((1, 2), np.float32), x, 9)
    assert i.tolist() == [[1, 0, 2, 3]] and d.tolist() == [[0, 5, 5, 5]]

def test_more_candidates_until_it_is_certain():
    "Two hundred rows closer together than FAISS's arithmetic can tell: only the exact differences put them in order."
    g = np.random.default_rng(3)
    x = (3e3 + 1e-3*g.integers(0, 9, (200, 8))).astype(np.float32)
    q = np.full((3, 8), 3e3, np.float32)
    exact = np.square(x.astype(float) - 3e3).sum(1)
    for k in (1, 2, 12, 60, 200):
        d, i = search(q, x, k)
        assert (i == np.lexsort((np.arange(200), exact))[:k]).all() and np.allclose(d, np.sqrt(np.sort(exact)[:k]))

def test_the_first_candidates_are_enough_where_all_is_clear(monkeypatch):
    asked, real = [], r.candidates
    monkeypatch.setattr(r, 'candidates', lambda q, x, k: (asked.append((len(q), k)), real(q, x, k))[1])
    x = (10.*np.arange(500)[:, None]*np.ones((1, 2))).astype(np.float32)
    search(x[:7], x, 3)
    assert len(asked) == 1 and asked[0][0] == 7 and 3 < asked[0][1] < 31
    asked.clear()
    search(x[:1], np.concatenate([x[:1]]*30 + [x[1:300]]), 3)                     # thirty equal rows: the first candidates do not decide, more do
    assert len(asked) == 2 and asked[0][1] < 31 <= asked[1][1] < 329

@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
@pytest.mark.parametrize('k', [1, 2, 7, 20])
def test_candidates_in_a_wrong_order_are_put_right(dtype, k):
    "Approximate distances off by up to the slack, many exact ones equal: nearest first, then by row; certain once a candidate is too far off, even so."
    certain = 0
    for seed in range(30):
        g = np.random.default_rng(seed); x, q = (g.integers(-4, 5, (n, 2)).astype(dtype) for n in (60, 3))
        exact = np.square(q[:, None].astype(float) - x).sum(2); slack = g.choice([0., .5, 4., 60.], 3)
        rough = exact + slack[:, None]*g.uniform(-1, 1, exact.shape); i = np.argsort(rough, axis=1, kind='stable')[:, :20]; rough = np.take_along_axis(rough, i, 1)
        d, found, sure = r.settle(q.astype(np.float32), x, rough, i, slack, k)
        for row in range(3):
            mine = exact[row, i[row]]; order = np.lexsort((i[row], mine))
            stop = [c for c in range(k, 20) if rough[row, c] - slack[row] > np.sort(mine[:c])[k-1]]
            assert found[row].tolist() == i[row, order[:k]].tolist() and d[row].tolist() == mine[order[:k]].tolist() and sure[row] == bool(stop)
            if sure[row]: assert d[row].tolist() == np.sort(exact[row])[:k].tolist(); certain += 1      # nothing else can be nearer
    assert (k < 20) == (certain > 0)

@pytest.mark.parametrize('dim', [1, 9, 256])
def test_how_far_candidates_may_be_off(dim, monkeypatch):
    "8e-7 · √D · (the query's squared length + the greatest of the database), which FAISS keeps to."
    seen, real = [], r.settle
    monkeypatch.setattr(r, 'settle', lambda q, x, rough, i, slack, k: (seen.append((q, rough, i, slack)), real(q, x, rough, i, slack, k))[1])
    g = np.random.default_rng(0); x, q = (100 + 9*g.normal(size=(n, dim)).astype(np.float32) for n in (300, 5))
    search(q, x, 3)
    for q, rough, i, slack in seen:
        assert slack == pytest.approx(8e-7*dim**.5*(np.square(q, dtype=float).sum(1) + np.square(x, dtype=float).sum(1).max()), rel=1e-6)
        assert (abs(rough - np.square(q[:, None].astype(float) - x[i]).sum(2)) <= slack[:, None]).all()

def test_zones_that_touch():
    touch = [(a, b) for a in ('1N', '2N', '31N', '32S', '33N', '59N', '60S', '') for b in ('1N', '33N', '60N', '') if zones_touch(a, b)]
    assert touch == [('1N', '1N'), ('1N', '60N'), ('2N', '1N'), ('32S', '33N'), ('33N', '33N'), ('59N', '60N'), ('60S', '1N'), ('60S', '60N'), ('', '')]

def test_positives_across_a_border_both_ways_and_only_near_ones():
    lon = np.array([12 - 5e-5, 12 + 5e-5, 12 + 2e-3])
    west, east = (np.stack(to_utm(np.full(3, 52.), lon, zone=z)[:2], 1) for z in ('32N', '33N'))
    table = lambda xy, zone: pd.DataFrame(dict(easting=xy[:, 0], northing=xy[:, 1], zone=zone, city='a'))
    assert [p.tolist() for p in positives_within(table(west[:1], '32N'), table(east[1:], '33N'))] == [[0]]
    assert [p.tolist() for p in positives_within(table(east, '33N'), table(west[:1], '32N'))] == [[0], [0], []]
    assert move(west, '32N', '32N') is west and np.allclose(move(west, '32N', '33N'), east, atol=1e-3)

def test_positives_include_the_border_of_25_metres_and_keep_cities_without_a_zone_apart():
    table = lambda x, city: pd.DataFrame(dict(easting=np.array(x, float), northing=0., zone='', city=city))
    assert [p.tolist() for p in positives_within(table([0], 'a'), table([25, 25.001, -25, 0], ['a', 'a', 'a', 'b']))] == [[0, 2]]

def test_recall_says_how_many():
    assert repr(Recall({1: 50., 5: 100.}, 7, 2)) == 'R@1 50.0  R@5 100.0  (5 queries, 2 without a positive left out)'
    ranks = np.array([[4, 7, 9], [1, 2, 3]])
    assert r.first_hits(ranks, [np.array([9, 7]), np.array([8])]).tolist() == [1, 3]
    assert dict(r.recall_from_ranks(ranks, [[4], [3]], (1, 2, 3))) == {1: 50., 2: 50., 3: 100.} and list(r.recall_from_ranks(ranks, [[4], [3]])) == [1, 5, 10, 20]
    assert list(r.recall_at_k(np.eye(2), np.eye(2), [[0], [0]])) == [1, 5, 10, 20] and dict(r.recall_at_k(np.eye(2), np.eye(2), [[0], [0]], 1)) == {1: 50.}
    for ks in ((), (0,), (2, 0)):
        with pytest.raises(UserError, match='K of 1 or more'): r.recall_from_ranks(ranks, [[4], [3]], ks)
    for ranks, positives in ((np.zeros((2, 3)), [[1]]), (np.zeros(2), [[1], [1]])):
        with pytest.raises(UserError, match='one list for each query'): r.recall_from_ranks(ranks, positives)
    with pytest.raises(UserError, match='2 lists of positives for 1 queries'): r.recall_at_k(np.eye(2)[:1], np.eye(2), [[0], [1]])

@pytest.mark.parametrize('threads', [1, 2, 3])
def test_as_many_parts_as_threads(threads):
    "Parts are worked on at the same time, and together they are everything."
    import faiss, threading
    before, meet = faiss.omp_get_max_threads(), threading.Barrier(threads)
    def part(s): meet.wait(10); return list(range(100))[s]
    try:
        faiss.omp_set_num_threads(threads)
        parts = in_threads(part, 100)
        assert len(parts) == threads and sum(parts, []) == list(range(100))
        assert in_threads(lambda s: s, 1) == [slice(0, 1)] and in_threads(lambda s: s, 0) == []
    finally: faiss.omp_set_num_threads(before)

def test_all_equal_is_a_tie():
    assert search(np.zeros((3, 4), np.float32), np.zeros((200, 4), np.float32), 5)[1].tolist() == [[0, 1, 2, 3, 4]]*3

def test_how_components_are_found():
    assert pca_solver(501, 600, 125) == pca_solver(504, 600, 126) == 'randomized' and pca_solver(501, 600, 126) == 'full' and pca_solver(500, 600, 2) == 'full'
    assert pca_solver(600, 501, 125) == 'randomized' and pca_solver(600, 500, 2) == 'covariance_eigh' and pca_solver(5, 5, 1) == 'full' and pca_solver(6, 5, 1) == 'covariance_eigh'

def test_components_by_hand():
    "Four points on a cross: variances 2 · 9 / 3 and 2 · 1 / 3."
    x = np.array([[3., 0], [-3, 0], [0, 1], [0, -1]]) + 5
    pca = fit_pca(x, 2)
    assert pca['mean'].tolist() == [5, 5] and np.allclose(pca['variance'], [6, 2/3]) and pca['samples'] == 4 and pca['explained'] == pytest.approx(1) and pca['solver'] == 'covariance_eigh'
    assert fit_pca(x, 1)['explained'] == pytest.approx(.9)
    assert np.allclose(np.abs(apply_pca(pca, x)), [[3, 0], [3, 0], [0, 1], [0, 1]], atol=1e-6)
    assert np.allclose(np.abs(apply_pca(pca, x, whiten=True)), [[3/6**.5, 0]]*2 + [[0, 1.5**.5]]*2, atol=1e-6)
    assert np.allclose(np.abs(apply_pca(pca, x, normalize=True)), [[1, 0], [1, 0], [0, 1], [0, 1]], atol=1e-6)
    assert np.allclose(np.linalg.norm(apply_pca(pca, 5 + (x - 5)*1e-3, normalize=True), axis=1), 1, atol=1e-3) and (apply_pca(pca, [[5., 5]], normalize=True) == 0).all()
    with pytest.raises(UserError, match='PCA learned on 2 numbers'): apply_pca(pca, np.zeros((1, 3)))
    with pytest.raises(UserError, match='all 4 descriptors are equal'): fit_pca(np.ones((4, 2)), 1)
    for n, d, dim in ((1, 3, 1), (4, 3, 4), (3, 4, 4), (4, 3, 0)):
        with pytest.raises(UserError, match='needs at least'): fit_pca(np.random.default_rng(0).normal(size=(n, d)), dim)
    assert fit_pca(x[[0, 2]], 1)['samples'] == 2

def test_the_seed_of_the_components():
    x = np.random.default_rng(0).normal(size=(600, 520)).astype(np.float32)
    one, two, other = fit_pca(x, 3), fit_pca(x, 3, seed=0), fit_pca(x, 3, seed=1)
    assert one['solver'] == 'randomized' and (one['components'] == two['components']).all() and (one['components'] != other['components']).any()
