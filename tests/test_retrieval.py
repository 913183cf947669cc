"Search and recall against a plain reading, and their properties."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sage.core import UserError
from sage.places import make_table
from sage.retrieval import apply_pca, fit_pca, positives_within, recall_at_k, recall_from_ranks, search

def plain_search(q, x, k):
    d = np.square(x.astype(np.float64)[None] - q.astype(np.float64)[:, None]).sum(2)
    i = np.argsort(d, axis=1, kind='stable')[:, :k]
    return np.sqrt(np.take_along_axis(d, i, 1)), i

def plain_recall(q, x, positives, ks):
    _, order = plain_search(q, x, len(x))
    asked = [i for i in range(len(q)) if len(positives[i])]
    return {k: 100 * sum(bool(set(order[i, :k]) & set(positives[i])) for i in asked) / len(asked) if asked else float('nan') for k in ks}

def table(xy, zone='33N', city='a'):
    xy = np.asarray(xy, float).reshape(-1, 2)
    return pd.DataFrame(dict(easting=xy[:, 0], northing=xy[:, 1], zone=zone, city=city))

grids = st.integers(0, 2**32 - 1).map(np.random.default_rng)

@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 12), st.integers(1, 60), st.integers(1, 5), st.integers(1, 70))
def test_search_is_the_plain_one_with_many_ties(g, nq, n, dim, k):
    "Small whole numbers: distances are exact, so ties are real and their order must be the table's."
    q, x = (g.integers(-1, 2, (m, dim)).astype(np.float32) for m in (nq, n))
    d, i = search(q, x, k)
    pd_, pi = plain_search(q, x, k)
    assert (i == pi).all() and np.allclose(d, pd_)

@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
@pytest.mark.parametrize('dim', [3, 64, 700])
def test_search_on_real_numbers(dtype, dim):
    g = np.random.default_rng(dim)
    x, q = g.normal(size=(3000, dim)).astype(dtype), g.normal(size=(40, dim)).astype(dtype)
    q[:5] = x[100:105]
    d, i = search(q, x, 10)
    pd_, pi = plain_search(q.astype(np.float32), x.astype(np.float32), 10)
    assert (i == pi).all() and np.allclose(d, pd_, rtol=1e-6)
    assert d.dtype == np.float32 and (d[:5, 0] == 0).all()

def test_far_from_the_origin():
    "|q|²+|x|²-2qx loses everything here; the plain difference does not."
    g = np.random.default_rng(0)
    x = (1000 + g.normal(size=(500, 32)) * .01).astype(np.float32)
    assert (search(x[:30], x, 5)[1] == plain_search(x[:30], x, 5)[1]).all()

def test_memory_map_in_pieces(tmp_path, monkeypatch):
    import sage.retrieval as r
    g = np.random.default_rng(0)
    x, q = g.normal(size=(1001, 16)).astype(np.float16), g.normal(size=(7, 16)).astype(np.float32)
    np.save(tmp_path/'x.npy', x)
    want = search(q, x, 9)
    real = r.chunks
    monkeypatch.setattr(r, 'chunks', lambda x, name, size=0, check=True: real(x, name, 2000, check))
    got = search(q, np.load(tmp_path/'x.npy', mmap_mode='r'), 9)
    assert (got[1] == want[1]).all() and (got[0] == want[0]).all()

@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 15), st.integers(1, 40))
def test_recall(g, nq, n):
    q, x = g.integers(-2, 3, (nq, 3)).astype(np.float32), g.integers(-2, 3, (n, 3)).astype(np.float32)
    positives = [np.flatnonzero(g.random(n) < g.choice([0, .1])) for _ in range(nq)]
    ks = (1, 2, 5, 10, 50)
    r = recall_at_k(q, x, positives, ks)
    np.testing.assert_allclose(list(r.values()), list(plain_recall(q, x, positives, ks).values()))
    assert r.queries == nq and r.without_positive == sum(not len(p) for p in positives) and list(r) == list(ks)
    values = np.array(list(r.values()))
    assert np.isnan(values).all() or (np.diff(values) >= 0).all()

@settings(max_examples=30, deadline=None)
@given(grids)
def test_recall_does_not_depend_on_order(g):
    "Distinct distances: permuting database or queries changes nothing."
    q, x = g.normal(size=(20, 8)), g.normal(size=(50, 8))
    positives = [np.flatnonzero(g.random(50) < .06) for _ in range(20)]
    a, b = g.permutation(20), g.permutation(50)
    where = np.argsort(b)
    moved = [where[positives[i]] for i in a]
    assert recall_at_k(q, x, positives, (1, 3, 9)) == recall_at_k(q[a], x[b], moved, (1, 3, 9))

@settings(max_examples=30, deadline=None)
@given(grids)
def test_positives_by_brute_force(g):
    q, d = table(g.integers(0, 40, (12, 2)) * 5), table(g.integers(0, 40, (60, 2)) * 5)
    q['zone'], d['zone'] = g.choice(['33N', '', '40N'], 12), g.choice(['33N', '', '40N'], 60)
    q['city'], d['city'] = g.choice(['a', 'b'], 12), g.choice(['a', 'b'], 60)
    for i, p in enumerate(positives_within(q, d)):
        same = (d.zone == q.zone[i]) & ((d.zone != '') | (d.city == q.city[i]))
        near = np.hypot(d.easting - q.easting[i], d.northing - q.northing[i]) <= 25
        assert p.tolist() == np.flatnonzero(same & near).tolist()

@pytest.mark.parametrize('lat,lon,zones', [(52., 12., ('32N', '33N')), (-33., 150., ('55S', '56S')), (.00001, 10., ('32S', '32N')), (10., 180., ('60N', '1N'))])
def test_positives_across_zones(lat, lon, zones):
    from sage.geo import to_utm
    lons = [lon - 5e-5, (lon + 5e-5 + 180) % 360 - 180]
    q, d = (table(np.stack(to_utm(np.array([lat]), np.array([l]), zone=z)[:2], 1), z) for l, z in zip(lons, zones))
    assert positives_within(q, d)[0].tolist() == [0]
    assert positives_within(q, d, radius=5)[0].tolist() == []

def test_table_index_does_not_matter():
    d = table([[0, 0], [100, 0], [3, 0]])
    shuffled = d.loc[[2, 0, 1]]
    assert positives_within(table([[0, 0]]), shuffled)[0].tolist() == [0, 1]

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    x = np.zeros((5, 3), np.float32)
    x[4, 2] = bad
    with pytest.raises(UserError, match='database row 4'): search(np.zeros((1, 3)), x, 1)
    with pytest.raises(UserError, match='queries row 4'): search(x, np.zeros((1, 3)), 1)

def test_bad_shapes():
    ok = np.zeros((2, 3))
    for q, x in ((np.zeros((0, 3)), ok), (ok, np.zeros((0, 3))), (ok[0], ok), (ok, np.zeros((2, 4))), (ok.astype(int), ok)):
        with pytest.raises(UserError): search(q, x, 1)
    with pytest.raises(UserError): search(ok, ok, 0)
    with pytest.raises(UserError): recall_from_ranks(np.zeros((2, 3)), [[]], (1,))
    with pytest.raises(UserError): recall_at_k(ok, ok, [[0], [1]], (0, 1))

def test_pca_against_sklearn():
    from sklearn.decomposition import PCA
    x = np.random.default_rng(0).normal(size=(60, 12)) @ np.diag(np.arange(1, 13))
    ours, theirs = fit_pca(x, 4), PCA(4, svd_solver='full').fit(x.astype(np.float32))
    np.testing.assert_allclose(ours['variance'], theirs.explained_variance_, rtol=1e-4)
    np.testing.assert_allclose(np.abs(apply_pca(ours, x)), np.abs(theirs.transform(x.astype(np.float32))), rtol=1e-3, atol=1e-3)


def test_as_many_components_as_there_can_be():
    x = np.random.default_rng(0).normal(size=(6, 4))
    assert fit_pca(x, 4)['components'].shape == (4, 4) and fit_pca(x[:3], 3)['components'].shape == (3, 4)


def test_row_numbers_are_whole():
    "A mask is no list of rows, and 0.9 is no row."
    d = np.eye(4, dtype=np.float32)
    for bad in ([np.array([True, False, False, False]), [0]], [[0.9], [1]], [['0'], [1]]):
        with pytest.raises(UserError, match='give row numbers'): recall_at_k(d[:2], d, bad)
    assert recall_at_k(d[:2], d, [{0}, np.zeros(0)], (1,)) == {1: 100.}
    for k in (2.5, '3', None):
        with pytest.raises(UserError, match='whole number of neighbours'): search(d, d, k)

def test_a_zone_that_is_none_is_unknown():
    a, b = (make_table(image=[x], easting=0., northing=0., city='x') for x in 'ab')
    for q, d in ((a.assign(zone=None), b), (a, b.assign(zone=None)), (a.assign(zone=np.nan), b.assign(zone=None))): assert positives_within(q, d)[0].tolist() == [0]

def test_tensors_are_descriptors():
    "Also those that NumPy cannot take as they are."
    import torch
    d = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    want = search(d.numpy(), d.numpy(), 3)[1]
    for t in (d, d.clone().requires_grad_(), d.double()): assert (search(t, t, 3)[1] == want).all()
    low = d.bfloat16(); assert (search(low, low, 3)[1] == search(low.float().numpy(), low.float().numpy(), 3)[1]).all()
