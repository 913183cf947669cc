"""The geographic side and the epoch's graph, against brute force and networkx."""
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from sage.bits import list_cliques, unpack
from sage.core import UserError
from sage.graph import TAU2, GeoSide, affinity, city_neighbors, cut_edges, epoch_graph, geo_cliques
from sage.places import make_table


def near_graph(xy, radius=25.):
    "d < radius, read literally."
    g = nx.Graph()
    g.add_nodes_from(range(len(xy)))
    g.add_edges_from((i, j) for i in range(len(xy)) for j in range(i) if np.hypot(*(xy[i] - xy[j])) < radius)
    return g

def town(seed, n=120, side=150., cities=2, per=6, grid=False):
    r = np.random.default_rng(seed)
    xy = r.uniform(0, side, (n, 2))
    if grid: xy = np.round(xy/5)*5
    return make_table(image=[f'{i}.jpg' for i in range(n)], city=[f'c{c}' for c in r.integers(0, cities, n)], place=np.arange(n)//per, easting=5e5 + xy[:, 0], northing=4e6 + xy[:, 1], zone='33N')

def unit(n, dim=8, seed=0):
    F = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return F/np.linalg.norm(F, axis=1, keepdims=True)


@pytest.mark.parametrize('n,side,grid', [(1, 10, 0), (2, 10, 0), (40, 1000, 0), (60, 12, 0), (80, 60, 0), (150, 120, 0), (200, 200, 0), (70, 40, 1), (120, 90, 1)])
@pytest.mark.parametrize('min_size', [1, 2, 4, 10])
def test_cliques_are_networkx(n, side, grid, min_size):
    for seed in range(4):
        xy = np.random.default_rng([n, seed]).uniform(0, side, (n, 2))
        if grid: xy = np.round(xy/5)*5                                   # many pairs at exactly 25 m, many at the same spot
        ours = geo_cliques(xy, min_size=min_size)
        assert all((np.diff(c) > 0).all() for c in ours)
        assert len({tuple(c) for c in ours}) == len(ours)
        assert {frozenset(c.tolist()) for c in ours} == {frozenset(c) for c in nx.find_cliques(near_graph(xy)) if len(c) >= min_size}

def test_cliques_other_radius_and_lists():
    xy = [[0, 0], [0, 6], [0, 12], [100, 0]]
    assert [c.tolist() for c in geo_cliques(xy, radius=7, min_size=2)] == [[0, 1], [1, 2]]
    assert [c.tolist() for c in geo_cliques(xy, radius=13, min_size=1)] == [[0, 1, 2], [3]]
    assert geo_cliques(np.zeros((0, 2)), min_size=1) == []

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 30), st.integers(1, 5))
def test_cliques_of_any_graph(seed, p, n, min_size):
    g = nx.gnp_random_graph(n, p, seed=seed)
    span, indices, order = np.zeros((n, 2), np.int64), [], np.random.default_rng(seed)
    for v in order.permutation(n):                                                  # lists anywhere, and in any order
        span[v] = len(indices), len(indices) + len(g[v])
        indices += order.permutation(list(g[v])).tolist()
    flat, given_up = list_cliques(span, np.array(indices, np.int32), min_size, 0, False, 0)
    span, members = unpack(flat)
    ours = [frozenset(members[a:b].tolist()) for a, b in span]
    assert not given_up.any() and len(set(ours)) == len(ours)
    assert set(ours) == {frozenset(c) for c in nx.find_cliques(g) if len(c) >= min_size}

@pytest.mark.parametrize('bad', [[[0, 0, 0]], [0, 1], [[np.nan, 0]], [[np.inf, 0]]])
def test_bad_positions(bad):
    with pytest.raises(UserError): geo_cliques(bad)


def test_affinity_by_loops():
    r = np.random.default_rng(0)
    xy, F = r.uniform(0, 25, (7, 2)) + 4e6, r.normal(size=(7, 5)).astype(np.float32)
    W = affinity(xy, F)
    for i in range(7):
        for j in range(7):
            assert W[i, j] == pytest.approx(-np.sqrt(((xy[i] - xy[j])**2).sum())*np.sqrt(((F[i].astype(float) - F[j])**2).sum()), abs=1e-9)
    assert (np.diag(W) == 0).all() and (W == W.T).all()

@pytest.mark.parametrize('xy,F', [([[0, 0]], [[1], [2]]), ([0, 0], [[1], [2]]), ([[0, 0, 0]], [[1]]), ([[0, 0]], [1])])
def test_affinity_shapes(xy, F):
    with pytest.raises(UserError): affinity(xy, F)

def test_cut():
    W = np.array([[0, -30, -31.4], [-30, 0, np.nan], [-31.4, np.nan, 0]])
    assert np.isneginf(cut_edges(W)).tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    assert np.isneginf(cut_edges(W, features_norm=2)).sum() == 2                     # NaN only
    assert np.isneginf(cut_edges(W*8448**.5, features_norm=8448**.5))[0, 2]
    assert cut_edges(np.array([[TAU2]]))[0, 0] == -np.inf                            # not above is cut


@pytest.mark.parametrize('grid', [False, True])
def test_neighbors_within_a_city(grid):
    df = town(3, grid=grid)
    g = GeoSide(df)
    for i in range(len(df)):
        d = np.hypot(g.xy[:, 0] - g.xy[i, 0], g.xy[:, 1] - g.xy[i, 1])
        expected = np.flatnonzero((d < 25) & (df.city == df.city[i]).to_numpy() & (np.arange(len(df)) != i))
        assert sorted(g.neighbors.row(i)) == expected.tolist()

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.sampled_from([1., 7., 25., 1e-3, 1e6]), st.sampled_from([0., 1., 30., 4e6, 1e15]), st.booleans())
def test_neighbors_at_any_scale(seed, n, radius, offset, grid):
    "Positions of any size and sign, many at the same spot or at exactly the radius."
    r = np.random.default_rng(seed)
    xy = (r.integers(-6, 7, (n, 2))*radius/5 if grid else r.normal(0, 2*radius, (n, 2))) + offset*r.choice([-1, 0, 1], (n, 2))
    city = r.integers(0, 3, n)
    near = city_neighbors(xy, city, radius)
    for i in range(n):
        d = np.hypot(*(xy - xy[i]).T)
        assert sorted(near.row(i)) == np.flatnonzero((d < radius) & (city == city[i]) & (np.arange(n) != i)).tolist()

@pytest.mark.parametrize('radius', [0., -1., np.nan, np.inf])
def test_bad_radius(radius):
    with pytest.raises(UserError, match='radius'): city_neighbors(np.zeros((2, 2)), np.zeros(2, int), radius)

def test_geo_side():
    df = town(5, n=300, side=250, cities=3)
    g = GeoSide(df)
    for p in range(len(g.places)):
        rows = g.place_rows.row(p)
        assert set(zip(df.city[rows], df.place[rows])) == {tuple(g.places.iloc[p])}
        assert g.centers[p] == pytest.approx(g.xy[rows].mean(0))
    for c, name in enumerate(g.cities): assert set(g.places.city[g.city_start[c]:g.city_start[c+1]]) == {name}
    assert g.city_start[-1] == len(g.places)

def test_bad_table():
    with pytest.raises(UserError, match='no column'): GeoSide(town(0).drop(columns='easting'))
    df = town(0); df.loc[3, 'easting'] = np.nan
    with pytest.raises(UserError, match='row 3'): GeoSide(df)


@pytest.mark.parametrize('seed', range(3))
def test_epoch_graph_by_brute_force(seed):
    df = town(seed, n=400, side=200, cities=3, per=4)
    g = GeoSide(df); n = len(g.places); F = unit(n, seed=seed)*1.7
    nodes, edges = epoch_graph(g, F, similar=4)
    city = g.places.city.to_numpy()
    near, alike = {}, set()
    for i in range(n):
        d = np.where(city == city[i], np.linalg.norm(F - F[i], axis=1), np.inf); d[i] = np.inf
        alike |= {(min(i, j), max(i, j)) for j in np.argsort(d)[:4].tolist() if np.isfinite(d[j])}
        for j in range(i + 1, n):
            geo = np.hypot(*(g.centers[i] - g.centers[j]))
            if city[i] == city[j] and geo < 25 and -geo*np.linalg.norm(F[i] - F[j]) > TAU2*1.7: near[i, j] = geo
    kinds = dict(zip(zip(edges.src, edges.dst), edges.kind))
    assert len(kinds) == len(edges) and (edges.src < edges.dst).all()
    assert {e for e, k in kinds.items() if k == 'near'} == set(near)
    assert set(kinds) == set(near) | alike
    assert np.allclose(edges.d_vis, np.linalg.norm(F[edges.src].astype(float) - F[edges.dst], axis=1), atol=1e-6)
    assert np.allclose(edges.affinity, -edges.d_geo*edges.d_vis) and set(edges.state) == {'new'}
    assert nodes.columns.tolist() == ['node', 'city', 'place', 'easting', 'northing', 'lat', 'lon', 'image', 'seed_score']
    assert (nodes[['easting', 'northing']].to_numpy() == g.centers).all() and nodes[['city', 'place']].equals(g.places[['city', 'place']]) and nodes.image.tolist() == [df.image[g.codes == i].iloc[0] for i in range(n)]
    assert (nodes.node == np.arange(n)).all() and nodes.lat.between(36, 37).all() and nodes.lon.between(14.9, 15.1).all()
    for i in range(n):
        mine = [a for (s, d), a in zip(zip(edges.src, edges.dst), edges.affinity) if i in (s, d) and kinds[s, d] == 'near']
        assert nodes.seed_score[i] == pytest.approx(np.mean(mine)) if mine else np.isnan(nodes.seed_score[i])

def test_states():
    g = GeoSide(town(1, n=300, side=200)); n = len(g.places)
    graphs, previous = [], None
    for e in range(4):
        previous = epoch_graph(g, unit(n, seed=e//2), previous, similar=3)
        graphs.append(previous.edges)
    assert all(e.index.equals(pd.RangeIndex(len(e))) for e in graphs)
    present = [set(zip(e.src[e.state != 'broken'], e.dst[e.state != 'broken'])) for e in graphs]
    for before, now, e in zip(present, present[1:], graphs[1:]):
        by = {s: set(zip(e.src[e.state == s], e.dst[e.state == s])) for s in ('kept', 'new', 'broken')}
        assert by['kept'] == now & before and by['new'] == now - before and by['broken'] == before - now
        assert len(e) == len(now | before) and np.allclose(e.affinity, -e.d_geo*e.d_vis)
    assert present[0] == present[1] and (graphs[1].state == 'kept').all()
    assert epoch_graph(g, unit(n, seed=1), graphs[0], similar=3).edges.equals(epoch_graph(g, unit(n, seed=1), epoch_graph(g, unit(n), similar=3), similar=3).edges)   # edges alone will do
    with pytest.raises(UserError, match='same places'): epoch_graph(g, unit(n), graphs[0].assign(dst=n + 5))

def test_epoch_graph_corners():
    df = make_table(image=list('abcd'), city=['x', 'y', 'y', 'y'], place=[0, 0, 1, 2], easting=[0, 0, 10, 900.], northing=0.)
    g = GeoSide(df)
    nodes, edges = epoch_graph(g, np.ones((4, 3)), images=[0, 1, 2, 3])
    assert nodes.image.tolist() == list('abcd') and nodes.lat.isna().all()
    assert set(zip(edges.src, edges.dst, edges.kind)) == {(1, 2, 'near'), (1, 3, 'alike'), (2, 3, 'alike')}
    assert len(epoch_graph(GeoSide(df[:1]), np.ones((1, 3))).edges) == 0
    half = epoch_graph(g, np.eye(4, 3).astype(np.float16)).edges
    assert np.allclose(half.d_vis, epoch_graph(g, np.eye(4, 3)).edges.d_vis)
    for bad in (np.ones((3, 3)), np.ones(4), np.full((4, 3), np.nan)):
        with pytest.raises(UserError): epoch_graph(g, bad)

def test_duplicate_descriptors():
    g = GeoSide(town(2, n=240, side=400, cities=1, per=4))
    edges = epoch_graph(g, np.ones((len(g.places), 4)), similar=5).edges
    assert (edges.src != edges.dst).all() and (edges.d_vis == 0).all() and (edges.affinity == 0).all()
    degree = np.bincount(np.r_[edges.src, edges.dst], minlength=len(g.places))
    assert (degree >= 5).all()

def test_descriptors_of_no_numbers():
    geo = GeoSide(make_table(image=list('ab'), easting=[0., 50], northing=0., city='x', place=[0, 1]))
    with pytest.raises(UserError, match=r'shape \[2, 0\]'): epoch_graph(geo, np.zeros((2, 0), np.float32))
