"""Promises of the batch sampler: properties on random towns, a slow literal reading of METHOD §4 and §5, other processes, bad input."""
import hashlib, os, subprocess, sys
from itertools import islice

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import chi2_contingency

from sage.batches import STRATEGIES, CliqueBatches, Features, _products, draw_places, product_type
from sage.clique import greedy_clique
from sage.core import UserError
from sage.graph import TAU2, GeoSide, affinity, cut_edges
from sage.places import make_table, place_rows


def town(seed, places=(30, 20), images=(4, 13), step=18., wide=6., dim=8):
    "Streets of places, `step` metres apart, in one city for each entry of `places`, rows shuffled; descriptors by street."
    r = np.random.default_rng(seed)
    city, place, xy, F = [], [], [], []
    for c, n in enumerate(places):
        for p in range(n):
            m = int(r.integers(*images)); street, at = divmod(p, 10)
            city += [f'c{c}']*m; place += [p]*m
            xy.append(np.array([at*step, street*150.]) + r.uniform(-wide, wide, (m, 2)))
            F.append(np.random.default_rng([seed, c, street]).normal(size=dim) + .7*r.normal(size=dim))
    xy, order = np.concatenate(xy), r.permutation(len(city))
    F = np.array(F, np.float32); F /= np.linalg.norm(F, axis=1, keepdims=True)
    df = make_table(image=[f'{i}.jpg' for i in order], city=np.array(city)[order], place=np.array(place)[order], easting=5e5 + xy[order, 0], northing=4e6 + xy[order, 1], zone='33N')
    codes = {cp: i for i, cp in enumerate(sorted(set(zip(city, place))))}
    given = list(dict.fromkeys(zip(city, place)))
    return df, F[np.argsort([codes[g] for g in given])]

def check(df, batch, shape, radius=25.):
    xy, city = df[['easting', 'northing']].to_numpy(), df.city.to_numpy()
    assert batch.shape == shape and batch.dtype.kind == 'i' and batch.min() >= 0 and batch.max() < len(df)
    rows, slot = batch.ravel(), np.repeat(np.arange(shape[0]), shape[1])
    assert len(set(rows.tolist())) == rows.size
    same_city = city[rows][:, None] == city[rows]
    far = np.hypot(*(xy[rows][:, None] - xy[rows][None]).transpose(2, 0, 1))
    same = slot[:, None] == slot
    assert (same_city & (far < radius))[same].all() and (far >= radius)[~same & same_city].all()

def take(sampler, n): return list(islice(sampler, n))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), strategy=st.sampled_from(sorted(STRATEGIES)), places=st.lists(st.integers(1, 25), min_size=1, max_size=4), step=st.sampled_from([5., 12., 18., 26., 60.]),
       wide=st.sampled_from([0., 3., 6., 15., 40.]), P=st.integers(1, 6), k=st.integers(1, 5), min_size=st.integers(1, 12), own=st.booleans())
def test_promises(seed, strategy, places, step, wide, P, k, min_size, own):
    df, F = town(seed, places, (1, 13), step, wide)
    images = None
    if own: images = np.random.default_rng(seed).normal(size=(len(df), 8)).astype(np.float32); images[::3] = np.nan
    try: got = take(s := CliqueBatches(df, F, strategy, P, k, seed % 97, image_descriptors=images, min_size=min_size), 5)
    except UserError as e:
        assert any(w in str(e) for w in ('could be filled', 'images are within', 'no place of', 'the largest of')), e
        return
    for b in got: check(df, b, (P, k))
    if strategy == 'random':
        codes = place_rows(df)[1]
        for b in got: assert all(len(set(codes[slot])) == 1 for slot in b) and len({codes[slot[0]] for slot in b}) == P
    record, table = s.record(), s.cliques_table()
    assert record['batches'] == 5 and record['cliques'] >= 5*P
    assert (table.row.to_numpy().reshape(5, P, k) == np.array(got)).all()

@pytest.mark.parametrize('strategy', sorted(STRATEGIES))
def test_every_place_is_reachable(strategy):
    df, F = town(1, (40, 25, 18), step=40.)
    places, codes = place_rows(df); seen = np.zeros(len(places), int)
    for b in islice(CliqueBatches(df, F, strategy, 10, min_size=10), 400): seen[np.unique(codes[b])] += 1
    assert (seen[np.bincount(codes) >= 4] > 0).all()

@pytest.mark.parametrize('strategy', ['static', 'ogc'])
def test_every_image_of_a_crowded_street_is_reachable(strategy):
    df, F = town(2, (40,), step=9.)
    seen = np.zeros(len(df), int)
    for b in islice(CliqueBatches(df, F, strategy, 6), 1500): seen[b.ravel()] += 1
    assert (seen > 0).mean() > .99

def test_cities_by_their_places():
    df, F = town(3, (40, 30, 20, 10), step=60.)
    places, codes = place_rows(df)
    draws = draw_places(GeoSide(df), F, (F.astype(float)**2).sum(1), np.random.default_rng(0), count=20_000)
    share = np.bincount(GeoSide(df).place_city[draws[:, 0]])/20_000
    assert np.allclose(share, [.4, .3, .2, .1], atol=.015)
    assert all(len({places.city[p] for p in d if p >= 0}) == 1 for d in draws[:200])
    assert ((draws[places.city[draws[:, 0]].to_numpy() == 'c3'] >= 0).sum(1) == 9).all()   # ten places: the seed and all others but the furthest


def test_similar_places_against_numpy():
    "Inclusion of places and pairs of places for one seed, against Generator.choice with p ∝ d_max − d."
    df, F = town(4, (30,), step=60.); geo = GeoSide(df)
    draws = draw_places(geo, F, (F.astype(float)**2).sum(1), np.random.default_rng(1), similar=6, count=90_000)
    mine = draws[draws[:, 0] == 7][:, 1:]
    d = np.linalg.norm(F - F[7], axis=1); p = d.max() - d; p[7] = 0; p /= p.sum()
    r = np.random.default_rng(2)
    theirs = np.array([r.choice(30, 6, replace=False, p=p) for _ in range(len(mine))])
    assert len(mine) > 2500 and all(len(set(x)) == 6 for x in mine.tolist())
    count = lambda x: np.bincount(x.ravel(), minlength=30)
    pairs = lambda x: np.bincount((np.sort(x)[:, :1]*30 + np.sort(x)[:, 1:2]).ravel(), minlength=900)
    for f in (count, lambda x: count(x[:, 0]), lambda x: count(x[:, -1]), pairs):
        a, b = f(mine), f(theirs); keep = a + b > 20
        assert chi2_contingency([a[keep], b[keep]]).pvalue > 1e-3

def test_similar_places_when_all_are_equal():
    df, _ = town(4, (30,), step=60.)
    draws = draw_places(GeoSide(df), np.ones((30, 5), np.float32), np.full(30, 5.), np.random.default_rng(0), count=3000)
    assert (np.sort(draws)[:, 1:] > np.sort(draws)[:, :-1]).all()
    assert abs(np.bincount(draws[:, 1:].ravel(), minlength=30)/3000 - 15/30).max() < .06

@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_rough_products_change_nothing(dtype):
    "Draws from bfloat16, float32 and float64 products are the same, and agree with exact distances."
    df, _ = town(4, (200, 30), images=(4, 6)); geo = GeoSide(df)
    F = np.random.default_rng(0).normal(size=(230, 40)).astype(dtype); F[5] = F[3]; F[7] = 0
    squares = (F.astype(float)**2).sum(1)
    draw = lambda *product: draw_places(geo, F, squares, np.random.default_rng(1), *product, count=600)
    got = draw()
    for product in ((torch.bfloat16, (.02, 0.)), (torch.float32, (1e-4, 0.)), (torch.float64, (1e-12, 0.))): assert np.array_equal(got, draw(product)), product

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 90), st.sampled_from([1, 2, 7, 64, 300, 2000]), st.booleans())
def test_products_are_within_their_slack(seed, m, n, dim, spiky):
    r = np.random.default_rng(seed); F = r.normal(size=(n, dim)).astype(np.float32)
    if spiky: F *= np.exp(3*r.normal(size=F.shape)).astype(np.float32)
    dtype, slack = product_type(F, np.square(F, dtype=float).sum(1)); seeds = r.integers(0, n, m)
    got, exact = _products(F, 0, n, seeds, dtype).astype(float), F[seeds].astype(float) @ F.T.astype(float)
    norm = np.linalg.norm(F.astype(float), axis=1)
    assert (abs(got - exact) <= slack[0]*norm[seeds][:, None]*norm + slack[1]*abs(got)).all()

def literal_batch(df, xy, graph, F, codes, city, P, k, min_size, r):
    "METHOD §4 and §5, read slowly: the cliques of one batch as (clique, relaxed)."
    slots, blocked, draws = [], set(), 0
    names, counts = np.unique(city, return_counts=True)
    while len(slots) < P:
        draws += 1
        mine = np.flatnonzero(city == r.choice(names, p=counts/counts.sum()))
        seed = r.choice(mine)
        d = np.linalg.norm(F[mine].astype(float) - F[seed], axis=1); p = d.max() - d; p[mine == seed] = 0
        chosen = [seed, *r.choice(mine, min(15, (p > 0).sum()), replace=False, p=p/p.sum())]
        left = set(np.flatnonzero(np.isin(codes, chosen)).tolist()) - blocked
        g = graph.subgraph(left).copy()
        while len(slots) < P:
            cliques = sorted(sorted(c) for c in nx.find_cliques(g) if len(c) >= k)
            large = [c for c in cliques if len(c) >= min_size]
            if not cliques: break
            pool = large or cliques
            taken = pool[r.integers(len(pool))]
            slots.append((taken, not large))
            gone = set(taken) | {u for v in taken for u in graph[v]}
            g.remove_nodes_from(gone); blocked |= gone
    return slots, draws

@pytest.mark.parametrize('min_size', [4, 10])
def test_same_distribution_as_the_literal_reading(min_size):
    df, F = town(6, (34, 22, 9), images=(3, 12), step=15.)
    places, codes = place_rows(df); city = places.city.to_numpy(); xy = df[['easting', 'northing']].to_numpy()
    geo = GeoSide(df); graph = nx.Graph(); graph.add_nodes_from(range(len(df)))
    graph.add_edges_from((i, j) for i in range(len(df)) for j in range(i) if df.city[i] == df.city[j] and np.hypot(*(xy[i] - xy[j])) < 25)
    r, P = np.random.default_rng(0), 6
    slow = [literal_batch(df, xy, graph, F, codes, city, P, 4, min_size, r) for _ in range(300)]
    sampler = CliqueBatches(df, F, 'static', P, min_size=min_size, geo=geo, keep=3000)
    take(sampler, 3000)
    fast = [[rows[a:b] for a, b in zip(ptr[:-1], ptr[1:])] for _, rows, ptr in sampler._pass.kept]
    for s in (0, 2, P - 1):                                                          # slot by slot: one observation of each batch
        for what in (len, lambda c: codes[c[0]], lambda c: codes[c[-1]], lambda c: len(set(codes[c])), lambda c: int(np.flatnonzero(geo.cities == city[codes[c[0]]])[0])):
            a, b = (np.bincount([what(c) for c in cliques], minlength=99) for cliques in ([x[0][s][0] for x in slow], [x[s] for x in fast]))
            keep = a + b > 60
            table = np.array([[*a[keep], a[~keep].sum()], [*b[keep], b[~keep].sum()]]); table = table[:, table.sum(0) > 0]
            if table.shape[1] > 1: assert chi2_contingency(table).pvalue > 1e-4
    record = sampler.record()
    assert np.mean([x[1] for x in slow]) == pytest.approx(record['draws']/3000, rel=.1)
    assert np.mean([sum(relaxed for _, relaxed in x[0]) for x in slow]) == pytest.approx(record['relaxed']/3000, rel=.1, abs=.05)

def literal_members(clique, xy, F, codes, k, strategy, r):
    "METHOD §5 in loops; for 'static' any k."
    if strategy == 'static': return r.choice(clique, k, replace=False).tolist()
    norm = np.sqrt(np.mean([sum(float(v)**2 for v in f) for f in F]))
    def W(i, j):
        w = -np.sqrt(sum((xy[i] - xy[j])**2))*np.sqrt(sum((F[codes[i]].astype(float) - F[codes[j]])**2))
        return w if w > -2.88e3/8448**.5*norm else -np.inf
    members = [max(clique, key=lambda i: (np.mean([W(i, j) for j in clique if j != i]), -i))]
    while len(members) < k: members.append(max((i for i in clique if i not in members), key=lambda i: (np.mean([W(i, j) for j in members]), -i)))
    return members

@pytest.mark.parametrize('strategy', ['static', 'sage'])
def test_pairs_cities_sizes_and_ranks(strategy):
    "Batches of three places of a small town: every pair of places, cities of a batch, sizes of cliques, images, and each member's rank within its clique."
    df, F = town(20, (9, 6), images=(4, 8), step=17., wide=9.); F = 20*F
    codes = place_rows(df)[1]; city = place_rows(df)[0].city.to_numpy(); xy = df[['easting', 'northing']].to_numpy(); r = np.random.default_rng(5)
    graph = nx.Graph(); graph.add_nodes_from(range(len(df)))
    graph.add_edges_from((i, j) for i in range(len(df)) for j in range(i) if df.city[i] == df.city[j] and np.hypot(*(xy[i] - xy[j])) < 25)
    def literal():
        cliques = [c for c, _ in literal_batch(df, xy, graph, F, codes, city, 3, 4, 4, r)[0]]
        return cliques, [literal_members(c, xy, F, codes, 4, strategy, r) for c in cliques]
    sampler = CliqueBatches(df, F, strategy, 3, min_size=4, keep=20_000); take(sampler, 20_000)
    slow, fast = [literal() for _ in range(700)], [([rows[a:b].tolist() for a, b in zip(ptr[:-1], ptr[1:])], batch.tolist()) for batch, rows, ptr in sampler._pass.kept]
    place = lambda x, s: int(codes[min(x[0][s])])
    pair = lambda a, b: lambda x: place(x, a)*len(city) + place(x, b)
    statistics = dict(first_two=pair(0, 1), last_two=pair(1, 2), unordered=lambda x: min(place(x, 0), place(x, 2))*len(city) + max(place(x, 0), place(x, 2)),
                      cities=lambda x: len({city[place(x, s)] for s in range(3)}), size=lambda x: len(x[0][1]), sizes=lambda x: sum(map(len, x[0])), anchor=lambda x: x[1][0][0], last=lambda x: x[1][2][3],
                      rank=lambda x: sorted(x[0][0]).index(x[1][0][0]), rank_of_the_last=lambda x: sorted(x[0][1]).index(x[1][1][3]))
    for name, what in statistics.items():
        a, b = (np.bincount([what(x) for x in side], minlength=len(df) + len(city)**2) for side in (slow, fast))
        keep = b > len(fast)/len(slow)*6                                              # at least six expected among the slow ones
        table = np.array([[*a[keep], a[~keep].sum()], [*b[keep], b[~keep].sum()]]); table = table[:, table.sum(0) > 0]
        assert table.shape[1] > 1 and chi2_contingency(table).pvalue > 1e-4, (name, chi2_contingency(table).pvalue)

def published_batch(images, F, xy, P, k, r, shuffled):
    "The published clique miner on one city (places' images, their descriptors), as `Published` in bench/mining.py: cliques of one batch and their members, and the draws. Its one change, if `shuffled`: of the cliques that networkx finds it takes any, not the first."
    cliques, members, draws = [], [], 0
    while len(members) < P:
        draws += 1; seed = r.integers(len(F))
        d = cdist(F[seed:seed+1], F)[0]; p = d.max() - d; p[seed] = 0
        rows = np.concatenate([images[i] for i in (seed, *r.choice(len(F), 15, replace=False, p=p/p.sum()))])
        near = cdist(xy[rows], xy[rows]) < 25
        while len(members) < P:
            found = [c for c in nx.find_cliques(nx.from_numpy_array(near)) if len(c) >= k]
            if not found: break
            clique = found[r.integers(len(found)) if shuffled else 0]
            cliques.append(sorted(rows[clique].tolist())); members.append(rows[r.choice(clique, k, replace=False)].tolist())
            gone = near[clique].any(0); near[gone] = False; near[:, gone] = False
    return cliques, members, draws

def test_same_distribution_as_the_published_procedure_with_its_cliques_shuffled():
    "Two places from one draw each, of a street that cliques overlap on. (From a second draw on the published one takes images that are near earlier ones, or come twice; ours never.) The first clique that networkx finds is another choice, which the same test sees."
    df, F = town(21, (24,), images=(4, 8), step=17., wide=9.); F = 20*F
    codes = place_rows(df)[1]; xy = df[['easting', 'northing']].to_numpy(); images = [np.flatnonzero(codes == p) for p in range(24)]
    sampler = CliqueBatches(df, F, 'static', 2, min_size=4, keep=20_000); take(sampler, 20_000)
    fast = [([rows[a:b].tolist() for a, b in zip(ptr[:-1], ptr[1:])], batch.tolist()) for batch, rows, ptr in sampler._pass.kept]
    pair = lambda x: [int(codes[c[0]]) for c in x[0]]
    statistics = dict(pair=lambda x: pair(x)[0]*24 + pair(x)[1], unordered=lambda x: min(pair(x))*24 + max(pair(x)), first_size=lambda x: len(x[0][0]), second_size=lambda x: len(x[0][1]), labels=lambda x: len(set(codes[x[0][0]])),
                      member=lambda x: x[1][0][0], last=lambda x: x[1][1][3], rank=lambda x: x[0][1].index(x[1][1][0]))
    r, chances = np.random.default_rng(6), {}
    for shuffled in (True, False):
        slow = [published_batch(images, F, xy, 2, 4, r, shuffled) for _ in range(700)]
        assert all(x[2] == 1 for x in slow) and sampler.record()['draws'] == 20_000
        for name, what in statistics.items():
            a, b = (np.bincount([what(x) for x in side], minlength=len(df) + 24**2) for side in (slow, fast))
            keep = b > len(fast)/len(slow)*6
            table = np.array([[*a[keep], a[~keep].sum()], [*b[keep], b[~keep].sum()]]); table = table[:, table.sum(0) > 0]
            assert table.shape[1] > 1, name
            chances[shuffled, name] = chi2_contingency(table).pvalue
    assert min(p for (shuffled, _), p in chances.items() if shuffled) > 1e-4, chances
    assert chances[False, 'unordered'] < 1e-6, chances

@pytest.mark.parametrize('norm', [1., 91.9])
@pytest.mark.parametrize('own', [False, True])
def test_members_are_the_greedy_clique(norm, own):
    df, F = town(7); F = F*np.float32(norm); codes = place_rows(df)[1]
    images = None
    if own: images = norm*np.random.default_rng(0).normal(size=(len(df), 8)).astype(np.float32)*.4; images[::2] = np.nan
    each = F[codes] if images is None else np.where(np.isnan(images), F[codes], images)
    for strategy, sign in (('sage', 1), ('gws', 1), ('diverse', -1)):
        sampler = CliqueBatches(df, F, strategy, 5, image_descriptors=images)
        take(sampler, 40)
        for batch, rows, ptr in sampler._pass.kept:
            for s in range(5):
                clique = rows[ptr[s]:ptr[s+1]]
                W = cut_edges(affinity(df[['easting', 'northing']].to_numpy()[clique], each[clique]), np.sqrt((F.astype(float)**2).sum(1).mean()), TAU2)
                assert batch[s].tolist() == clique[greedy_clique(W if sign > 0 else np.where(np.isneginf(W), W, -W))].tolist()

def test_random_members_are_uniform():
    df, F = town(8, (3,), images=(9, 10), step=100.)
    count = np.zeros(len(df)); first = np.zeros(len(df))
    for b in islice(CliqueBatches(df, F, 'ogc', 3), 3000): count[b.ravel()] += 1; first[b[:, 0]] += 1
    assert abs(count/3000 - 4/9).max() < .04 and abs(first/3000 - 1/9).max() < .03


def digest(df, F, strategy): return hashlib.sha256(np.array(take(CliqueBatches(df, F, strategy, 5, seed=11).rebuild(F, 2), 20)).tobytes()).hexdigest()

def test_another_process_draws_the_same():
    df, F = town(9, dim=64)
    code = 'import sys; sys.path.insert(0, sys.argv[1]); from test_batches import *; print(*(digest(*town(9, dim=64), s) for s in sorted(STRATEGIES)))'
    env = {**os.environ, 'PYTHONHASHSEED': '123', 'OMP_NUM_THREADS': '2', 'OPENBLAS_NUM_THREADS': '2'}
    out = subprocess.run([sys.executable, '-c', code, os.path.dirname(__file__)], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert out == [digest(df, F, s) for s in sorted(STRATEGIES)] and len(set(out)) > 3

def test_seed_discipline():
    df, F = town(10)
    a = take(CliqueBatches(df, F, 'sage', 5), 4)
    s = CliqueBatches(df, F, 'sage', 5)
    np.random.seed(0); np.random.random(99)                                          # global state plays no part
    state = np.random.get_state()[1].copy()
    assert np.array_equal(a, take(s, 4)) and np.array_equal(a, take(s, 4))           # each iter() begins anew
    assert (np.random.get_state()[1] == state).all()
    one = iter(s); two = iter(s)
    assert np.array_equal(a, [next(one) for _ in range(4)]) and np.array_equal(a, [next(two) for _ in range(4)])
    assert np.array_equal(a, take(CliqueBatches(df, F, 'sage', 5, geo=GeoSide(df)), 4))
    for other in (take(CliqueBatches(df, F, 'sage', 5, seed=1), 4), take(CliqueBatches(df, F, 'sage', 5).rebuild(F, 1), 4)): assert not np.array_equal(a, other)

def test_rebuild():
    df, F = town(11); G = town(12)[1][:len(F)]
    for name, how in STRATEGIES.items():
        s = CliqueBatches(df, F, name, 5)
        plain, moved = take(s.rebuild(F, 1), 4), take(s.rebuild(G, 1), 4)
        assert np.array_equal(plain, moved) == (not how.online), name
        late = CliqueBatches(df, None, name, 5).rebuild(F, 1)                        # the first descriptors may come with rebuild
        assert np.array_equal(take(late, 4), plain)
        assert np.array_equal(take(late.rebuild(None, 1), 4), plain)
    s = CliqueBatches(df, F, 'sage', 5); running = iter(s); before = take(CliqueBatches(df, F, 'sage', 5), 4)
    got = [next(running), next(running)]; s.rebuild(G, 1); got += [next(running), next(running)]
    assert np.array_equal(got, before)                                               # a pass under way stays in its epoch

def test_half_precision_is_accepted():
    df, F = town(13); H = F.astype(np.float16)
    assert np.array_equal(take(CliqueBatches(df, H, 'sage', 5), 9), take(CliqueBatches(df, H.astype(np.float32), 'sage', 5), 9))

def test_own_descriptors_only_where_given():
    df, F = town(14); codes = place_rows(df)[1]
    blank = np.full((len(df), 8), np.nan, np.float32); full = F[codes]
    a, b, c = (take(CliqueBatches(df, F, 'sage', 5, image_descriptors=x), 9) for x in (None, blank, full))
    assert np.array_equal(a, b) and np.array_equal(a, c)

def test_record_and_table():
    df, F = town(15)
    s = CliqueBatches(df, F, 'ogc', 5, keep=3)
    assert s.record()['batches'] == 0 and len(s.cliques_table()) == 0
    got = take(s, 6); table = s.cliques_table()
    assert table.columns.tolist()[:6] == ['batch', 'slot', 'place', 'image', 'rank', 'mean_affinity'] and len(table) == 3*20
    assert (table.row.to_numpy().reshape(3, 5, 4) == np.array(got[:3])).all()
    assert (df.image[table.row].to_numpy() == table.image).all() and (df.place[table.row].to_numpy() == table.place).all() and table['rank'].max() == 3
    xy = df[['easting', 'northing']].to_numpy(); codes = place_rows(df)[1]
    slot = table[(table.batch == 1) & (table.slot == 2)]; W = affinity(xy[slot.row], F[codes[slot.row]])
    assert slot.mean_affinity.tolist()[1:] == pytest.approx([W[t, :t].mean() for t in (1, 2, 3)])
    record = s.record()
    assert record['batches'] == 6 and record['cliques'] == 30 and record['draws'] >= 6
    r = CliqueBatches(df, None, 'random', 5); take(r, 2)
    assert r.cliques_table().mean_affinity.isna().all() and len(r.cliques_table()) == 40
    s.rebuild(F, 1); assert s.record()['batches'] == 0


def test_too_small():
    df, F = town(16, (12,), step=30., wide=2.)
    with pytest.raises(UserError, match='only 12 of the 30 places.*places_per_batch=12'): next(iter(CliqueBatches(df, F)))
    for b in take(CliqueBatches(df, F, places_per_batch=12), 3): check(df, b, (12, 4))
    for b in take(CliqueBatches(df, F, 'random', places_per_batch=12), 3): check(df, b, (12, 4))
    with pytest.raises(UserError, match='only 12 of the 13'): next(iter(CliqueBatches(df, F, 'random', places_per_batch=13)))

def test_no_place_at_all():
    one = make_table(image='a', city='x', place=np.arange(20), easting=100.*np.arange(20), northing=0.)
    for strategy in STRATEGIES:
        with pytest.raises(UserError, match='no 4 images are within 25 m'): CliqueBatches(one, np.ones((20, 3)), strategy)
    split = make_table(image='a', city='x', place=np.arange(20), easting=np.arange(20.), northing=0.)      # near enough, but each has a label of its own
    assert next(iter(CliqueBatches(split, np.eye(20), places_per_batch=1))).shape == (1, 4)
    with pytest.raises(UserError, match='the largest of 20 places has 1'): CliqueBatches(split, strategy='random')
    wide = make_table(image='a', city='x', place=np.repeat([0, 1], 4), easting=[0, 10, 20, 30, 5, 100, 200, 300.], northing=0.)     # one clique, over two labels
    with pytest.raises(UserError, match='no place of 4 images'): next(iter(CliqueBatches(wide, strategy='random', places_per_batch=1)))

@pytest.mark.parametrize('change,words', [
    (dict(strategy='best'), "'best' is unknown"), (dict(places_per_batch=0), 'places_per_batch=0'), (dict(images_per_place=-1), 'images_per_place=-1'), (dict(places_per_batch=2.5), '2.5'),
    (dict(descriptors=np.ones((3, 8))), 'one row for each of the'), (dict(descriptors=np.full((50, 8), np.nan)), 'place 0 is not finite'), (dict(descriptors=np.ones(50)), 'shape'),
    (dict(image_descriptors=np.ones((3, 8))), 'image_descriptors have shape'), (dict(seed=-1), 'seed -1'), (dict(radius=0.), 'radius'), (dict(geo=GeoSide(town(0, (5,))[0])), 'the geography is of')])
def test_bad_arguments(change, words):
    df, F = town(17)
    with pytest.raises(UserError, match=words): next(iter(CliqueBatches(df, **{'descriptors': F, 'places_per_batch': 5, **change})))

def test_partly_missing_image_descriptor():
    df, F = town(18); own = np.full((len(df), 8), np.nan); own[4] = 1; own[4, 3] = np.inf
    with pytest.raises(UserError, match='image 4 is partly'): CliqueBatches(df, F, image_descriptors=own)
    assert Features(GeoSide(df), F, None).images is None

def test_descriptors_are_needed():
    df, _ = town(19)
    with pytest.raises(UserError, match='needs descriptors'): iter(CliqueBatches(df))
    assert next(iter(CliqueBatches(df, strategy='random', places_per_batch=5))).shape == (5, 4)

def test_crowded_squares():
    r = np.random.default_rng(0)
    angle = np.arange(60)*2*np.pi/60
    xy = np.concatenate([12.52*np.stack([np.cos(angle), np.sin(angle)], 1), r.normal((300, 0), 9, (300, 2)), r.uniform((600, 0), (900, 100), (200, 2))])
    df = make_table(image='a', city='x', place=np.arange(560)//20, easting=xy[:, 0], northing=xy[:, 1])
    for strategy in STRATEGIES:
        for b in take(sampler := CliqueBatches(df, np.eye(28), strategy, 2), 20): check(df, b, (2, 4))
        if STRATEGIES[strategy].graph: assert sampler.record()['crowded'] > 0
