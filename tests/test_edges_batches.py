"""Exact borders of the batch sampler's parts, each worked by hand or in plain Python: what a small change of one number or one comparison would break and no broader test would notice (see tools/mutate.py)."""
import numpy as np, pytest, torch

import sage.batches as b
from sage.clique import random_float
from sage.core import UserError
from sage.graph import TAU2, GeoSide, affinity, as_bits, distance
from sage.places import make_table


def test_the_bounds_of_a_square_are_as_wide_as_the_slack():
    "Product 2 of lengths 3 and 5, off by at most .1 · 15 + .01 · 2."
    for product, off in ((2., 1.52), (-2., 1.52), (0., 1.5)):
        low, high = b._bounds(product, 3., 5., (.1, .01))
        assert low == pytest.approx(34 - 2*(product + off), rel=1e-9) and high == pytest.approx(34 - 2*(product - off), rel=1e-9)
    low, high = b._bounds(np.float32(15), 3., 5., (0., 0.))
    assert 4 - 5e-11 < low < 4 < high < 4 + 5e-11 and low == pytest.approx(4 - 34e-12, abs=2e-14) and high == pytest.approx(4 + 34e-12, abs=2e-14)

@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_what_rounding_to_bfloat16_loses(dtype):
    F = np.random.default_rng(0).normal(size=(9, 40)).astype(dtype); F[3] = 0; F[4] *= 10; F[5, 1:] = 0
    squares = np.square(F, dtype=float).sum(1)
    share = np.linalg.norm(F.astype(float) - torch.from_numpy(F.astype(np.float32)).bfloat16().double().numpy(), axis=1)/np.sqrt(squares.clip(1e-30))
    for rows in (slice(None), [3], [3, 6], [7]): assert b._lost(as_bits(F[rows]), squares[rows]) == pytest.approx(share[rows].max(), rel=1e-9)
    halves = np.float32([[1 + 2.**-8, 1 + 3*2.**-8, -1 - 2.**-8]])                     # in the middle between two: to the even one
    assert b._lost(halves, np.ones(1)) == pytest.approx(3**.5*2.**-8, rel=1e-9)

def test_what_products_are_computed_in(monkeypatch):
    "Slack as small as can be: sums in float32 are off by D · 2⁻²³, a bfloat16 by a relative 2⁻⁸ of its own."
    F = np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32); squares = np.square(F, dtype=float).sum(1)
    for there, slack in ((False, (40*2.**-23, 2.**-23)), (True, None)):
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: there, raising=False)
        lost = b._lost(F, squares); dtype, got = b.product_type(F, squares); sums = 40*2.**-23
        assert dtype == (torch.bfloat16 if there else torch.float32) and got == pytest.approx((2*lost + lost**2 + 1.02*sums, 1.01*2.**-8) if there else (sums, 2.**-23), rel=1e-5)
        assert got[0] > (2*lost + lost**2 if there else 0) + sums
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported'); assert b.product_type(F, squares)[0] == torch.float32    # a torch that cannot tell

@pytest.mark.parametrize('cut', [1, 255, 256, 257])
def test_products_of_some_rows(cut):
    "In pieces of 256 rows and more, from rows a to b."
    r = np.random.default_rng(0); F = r.normal(size=(600, 1500)).astype(np.float32); F.setflags(write=False)
    a, end = 7, 7 + 256 + cut; seeds = np.array([3, 599, 3])
    got = b._products(F, a, end, seeds, torch.float64)
    assert got.dtype == np.float32 and np.allclose(got, F[seeds].astype(float) @ F[a:end].T.astype(float), atol=1e-3)
    assert np.allclose(b._products(F[:, :1], a, end, seeds, torch.float32), F[seeds, :1] @ F[a:end, :1].T)

def chances(F, seed, state, count, got=()):
    "The slow drawing in plain Python: running sums of d_max − d."
    d = np.linalg.norm(F.astype(float) - F[seed], axis=1); w, out = d.max() - d, [*got]; w[seed] = 0
    if not w.any(): w[:] = 1; w[seed] = 0
    w[out] = 0
    while len(out) < count and w.any(): out.append(int(np.searchsorted(np.cumsum(w), random_float(state)*w.sum(), side='right'))); w[out[-1]] = 0
    return out

@pytest.mark.parametrize('unit', [0, 2.**-9, 1])
def test_the_rest_of_a_draw(unit):
    "However far apart the places are, and where all are equal."
    F = unit*np.random.default_rng(0).integers(0, 9, (12, 3)).astype(np.float32)
    furthest = np.linalg.norm(F - F[4], axis=1).max()
    for s in range(60):
        for count, got in ((5, ()), (5, (0, 2)), (11, ()), (14, (3,)), (2, (1, 3))):
            out, states = np.full(14, -1, np.int32), [np.array([s], np.uint64) for _ in 'ab']; out[:len(got)] = got
            want = chances(F, 4, states[1], count, got)
            n = b._draw_rest(F, 4, furthest, count, len(got), states[0], out)
            assert out[:n].tolist() == want and n == len(want) and (out[n:] == -1).all() and states[0] == states[1]

def test_the_furthest_is_exact():
    r = np.random.default_rng(0); F = r.normal(size=(50, 6)).astype(np.float32); lengths = np.linalg.norm(F.astype(float), axis=1)
    for seed in range(50):
        for slack in (1e-6, .01, 1.):
            rough = (F @ F[seed] + slack*lengths[seed]*lengths*r.uniform(-1, 1, 50)).astype(np.float32); highs, off = np.empty(50), (slack + 1e-6, 0.)
            assert b._furthest(rough, F, lengths, seed, off, highs) == max(distance(F[seed], f) for f in F)
            top = b._highs(rough, lengths, seed, off, highs)
            assert top == max(0, highs.max()) and highs == pytest.approx([b._bounds(p, lengths[seed], l, off)[1] for p, l in zip(rough, lengths)])

def test_a_round_of_draws():
    geo = GeoSide(make_table(image='a', city=np.repeat(['x', 'y'], 20), place=np.arange(40), easting=100.*np.arange(40), northing=0.))
    F = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32); squares = np.square(F, dtype=float).sum(1)
    draws = b.draw_places(geo, F, squares, np.random.default_rng(0))
    assert draws.shape == (b.ROUND, 16) and draws.dtype == np.int32 and (draws >= 0).all() and ((draws >= 20) == (draws[:, :1] >= 20)).all() and all(len({*d}) == 16 for d in draws.tolist())
    assert b.draw_places(geo, F, squares, np.random.default_rng(0), similar=0, count=3).shape == (3, 1)

def test_arrays_of_a_city_are_as_long_as_the_city(monkeypatch):
    "Compiled code does not look whether it reads beyond them."
    geo = GeoSide(make_table(image='a', city=np.repeat(['x', 'y'], [3, 7]), place=np.arange(10), easting=100.*np.arange(10), northing=0.))
    seen, real = set(), b._draw_similar
    def watched(products, F, lengths, seed, slack, count, state, out, scratch):
        seen.add((len(products), len(F), len(lengths), len(scratch), len(state), len(out))); assert 0 <= seed < len(F) and lengths[seed] == pytest.approx(np.linalg.norm(F[seed]))
        return real(products, F, lengths, seed, slack, count, state, out, scratch)
    monkeypatch.setattr(b, '_draw_similar', watched)
    F = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    b.draw_places(geo, F, np.square(F, dtype=float).sum(1), np.random.default_rng(0), similar=5, count=40)
    assert seen == {(3, 3, 3, 3, 1, 5), (7, 7, 7, 7, 1, 5)}

def test_descriptors_of_images_and_places():
    "Every image has its own row or its place's, the first and the last too, whatever is asked for in whatever order."
    geo = GeoSide(make_table(image='a', city='x', place=np.repeat(np.arange(4), 3), easting=100.*np.repeat(np.arange(4), 3), northing=0.))
    r = np.random.default_rng(0); F, own = r.normal(size=(4, 2)).astype(np.float32), r.normal(size=(12, 2)).astype(np.float32)
    for missing in ([], [0], [11], [0, 5, 11], [*range(1, 12)], [*range(12)]):
        some = own.copy(); some[missing] = np.nan
        want = np.where(np.isnan(some), F[geo.codes], some)
        for rows in (np.arange(12), np.arange(12)[::-1], np.array([5, 5, 0, 11]), np.array([11]), np.array([0])):
            G, which = b.Features(geo, F, some)[rows]
            assert (G[which] == want[rows]).all() and len(G) == len(np.unique(which))
    f = b.Features(geo, F)
    assert f.norm == pytest.approx(np.sqrt(np.square(F).sum(1).mean())) and (f[np.array([4])][0] == F).all() and f[np.array([0, 4, 11])][1].tolist() == [0, 1, 3]
    with pytest.raises(UserError, match='expected \\[12, 2\\]'): b.Features(geo, F, own[:, :1])
    with pytest.raises(UserError, match='expected \\[12, 2\\]'): b.Features(geo, F, own[:11])
    for row in (0, 11):
        bad = own.copy(); bad[3] = np.nan; bad[row, 1] = np.nan
        with pytest.raises(UserError, match=f'image {row} is partly'): b.Features(geo, F, bad)

def test_no_image_is_left_out_of_the_look_for_broken_ones():
    "They are looked through in pieces of 4,096."
    n = 8200
    geo = GeoSide(make_table(image=[f'{i}.jpg' for i in range(n)], city='a', place=np.arange(n), easting=5e5 + 100.*np.arange(n), northing=4e6, zone='33N'))
    own = np.ones((n, 2), np.float32)
    for row in (4095, 4096, 4097, 8192, 8199):
        bad = own.copy(); bad[row, 1] = np.nan
        with pytest.raises(UserError, match=f'image {row} is partly'): b.Features(geo, own, bad)

def test_affinities_within_a_clique():
    "Two images at one descriptor, one edge exactly at the cut."
    xy, F = np.array([[9., 9], [0, 0], [3, 4], [0, 12], [0, 0]]), np.array([[0, 0], [0, 1], [9, 9], [0, 3]], np.float32)
    rows, which = np.array([1, 2, 3, 4], np.int32), np.array([1, 3, 1, 3])
    W = b._affinities(rows, xy, F, which, -1e9)
    assert W == pytest.approx(affinity(xy[rows], F[which])) and W[0, 1] == -10 and W[0, 2] == 0
    assert (b._affinities(rows, xy, F, which, -10.) == np.where(W > -10, W, -np.inf)).all() and np.isinf(b._affinities(rows, xy, F, which, -10.)).sum() == 6

def test_members_at_random():
    "Each of the 12 · 2 ordered choices of 2 of 4 and of 2 of 2 as often as the others; nobody twice."
    rows, ptr, state = np.array([2, 4, 6, 8, 1, 3], np.int32), np.array([0, 4, 6]), np.array([1], np.uint64)
    seen = [b.pick_members(rows, ptr, 2, np.zeros((9, 2)), np.zeros((0, 1), np.float32), rows, 2, 0, 0., state) for _ in range(2400)]
    count = {}
    for x in seen: count[tuple(x.ravel().tolist())] = count.get(tuple(x.ravel().tolist()), 0) + 1
    assert len(count) == 24 and all(abs(n - 100) < 45 for n in count.values()) and all({*x[0]} <= {2, 4, 6, 8} and {*x[1]} == {1, 3} for x in seen)

def test_what_a_pass_counts():
    "Three places of four images, 100 m apart."
    xs = np.repeat([0., 100, 200], 4)
    sampler = b.CliqueBatches(make_table(image='a', city='x', place=np.repeat(np.arange(3), 4), easting=xs, northing=0.), np.eye(3), 'ogc', 2, min_size=4)
    keys = ['batches', 'draws', 'cliques', 'relaxed', 'crowded', 'skipped_near', 'skipped_few', 'skipped_full', 'restarts']
    assert sampler.record() == dict.fromkeys(keys, 0)
    running = iter(sampler); next(running); next(running)
    record = sampler.record()
    assert [*record] == keys and (record['batches'], record['cliques'], record['restarts'], record['relaxed'], record['crowded']) == (2, 4, 0, 0, 0)
    greedy = b.CliqueBatches(sampler.geo.table, np.eye(3), 'ogc', 4, min_size=5)
    with pytest.raises(UserError, match=f'only 3 of the 4 places of a batch could be filled in {b.ATTEMPTS} attempts: these 12 images do not hold 4 groups of 4'): next(iter(greedy))
    record = greedy.record()
    assert record['restarts'] == b.ATTEMPTS == 50 and record['cliques'] == record['relaxed'] == 150 and record['draws'] >= 50*b.PATIENCE and b.PATIENCE == 1000 and record['batches'] == 0

def test_patience_counts_from_the_first_draw():
    "Two places too wide to give anything: twice as many draws as places, fifty times over."
    table = make_table(image='a', city='x', place=np.repeat([0, 1], 4), easting=[0, 10, 20, 30, 5, 100, 200, 300.], northing=0.)
    sampler = b.CliqueBatches(table, strategy='random', places_per_batch=1)
    with pytest.raises(UserError, match='no place of 4 images'): next(iter(sampler))
    record = sampler.record()
    assert (record['draws'], record['cliques'], record['restarts'], record['skipped_few']) == (200, 0, 50, 800)

def test_arguments_at_their_limits():
    table = make_table(image='a', city='x', place=np.repeat(np.arange(2), 4), easting=np.repeat([0., 100], 4), northing=0.)
    assert next(iter(b.CliqueBatches(table, np.eye(2), places_per_batch=1, images_per_place=1, similar=0, min_size=1))).shape == (1, 1)
    for name, value in (*dict(places_per_batch=0, images_per_place=0, similar=-1, min_size=0).items(), *(('places_per_batch', v) for v in (2.5, float('nan'), float('inf'), None, '3'))):
        with pytest.raises(UserError, match=f'{name}={value} is not possible'): b.CliqueBatches(table, np.eye(2), **{name: value})
    for name in ('places_per_batch', 'images_per_place', 'similar', 'min_size'):
        with pytest.raises(UserError, match=f'{name}=1.5'): b.CliqueBatches(table, np.eye(2), **{name: 1.5})
    s = b.CliqueBatches(table, np.eye(2))
    assert (s.shape, s.seed, s.similar, s.min_size, s.tau2, s.keep, s.epoch, s.geo.radius, s.strategy) == ((30, 4), 0, 15, 10, TAU2, 200, 0, 25., 'sage')
    for other in (table[:7], table[:8].assign(place=0)[:4]):
        with pytest.raises(UserError, match='the geography is of 8 images and 25 m'): b.CliqueBatches(other, np.eye(2), geo=s.geo)
    with pytest.raises(UserError, match='need 8 images and 24 m'): b.CliqueBatches(table, np.eye(2), geo=s.geo, radius=24.)

def test_a_table_of_the_members():
    "Four images on a line, 1, 2 and 4 m apart, in two cliques of one batch; affinities by hand."
    xs = np.concatenate([[0., 1, 3, 7, 8], [100., 101, 103, 107]]); F = np.arange(1., 10)[:, None]
    table = make_table(image=[f'{i}.jpg' for i in range(9)], city='x', place=np.repeat([0, 1], [5, 4]), easting=xs, northing=0.)
    s = b.CliqueBatches(table, np.array([[1.], [6]]), 'sage', 2, min_size=4, image_descriptors=F, tau2=-1e9, keep=1)
    batch = next(running := iter(s)); next(running); t = s.cliques_table()
    assert len(t) == 8 and t.batch.tolist() == [0]*8 and t.slot.tolist() == [0]*4 + [1]*4 and t['rank'].tolist() == [0, 1, 2, 3]*2 and t.row.tolist() == batch.ravel().tolist() and t.node.tolist() == (batch.ravel() > 4).astype(int).tolist()
    assert t.clique_size.tolist() == [5 if r < 5 else 4 for r in batch[:, 0] for _ in range(4)] and t.image.tolist() == [f'{r}.jpg' for r in batch.ravel()] and set(t.city) == {'x'} and t.place.tolist() == t.node.tolist()
    assert [c.tolist() for c in t.candidates] == [(list(range(5)) if r < 5 else list(range(5, 9))) if i == 0 else [] for m in batch for i, r in enumerate(m)]
    for slot, mine in enumerate(batch):
        W, whole = affinity(np.c_[xs, 0*xs][mine], F[mine]), np.arange(5) if mine[0] < 5 else np.arange(5, 9)
        assert np.allclose(np.stack(t.affinities[t.slot == slot]), W) and t.mean_affinity[t.slot == slot].tolist() == pytest.approx([affinity(np.c_[xs, 0*xs][whole], F[whole])[mine[0] - whole[0]].sum()/(len(whole) - 1)] + [W[r, :r].mean() for r in (1, 2, 3)])
    assert [*s.cliques_table().columns] == [*b.CliqueBatches(table, np.eye(2), 'ogc', 2, min_size=4).cliques_table().columns]

def test_six_strategies():
    "With the graph or without, with the epoch's descriptors or the first, and how members are taken."
    assert {k: tuple(v) for k, v in b.STRATEGIES.items()} == dict(random=(False, False, 0), static=(True, False, 0), ogc=(True, True, 0), gws=(True, False, 1), sage=(True, True, 1), diverse=(True, True, -1))

def test_products_are_made_in_pieces_that_fit(monkeypatch):
    "Never more than MOST of them at once, and the same draws in however many pieces."
    n = 40
    table = make_table(image='a', city='x', place=np.arange(n), easting=np.arange(n)*100., northing=0.)
    geo, F, products, sizes = b.GeoSide(table), np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32), b._products, []
    draw = lambda: b.draw_places(geo, F, (F.astype(float)**2).sum(1), np.random.default_rng(1), similar=5, count=64)
    whole = draw()
    monkeypatch.setattr(b, '_products', lambda F, first, last, seeds, dtype: (sizes.append(len(seeds)*(last - first)), products(F, first, last, seeds, dtype))[1])
    for most, pieces in ((64*n, 1), (32*n, 2), (10*n, 7), (n, 64)):
        monkeypatch.setattr(b, 'MOST', most); sizes.clear()
        assert (draw() == whole).all() and len(sizes) == pieces and max(sizes) <= most

def test_a_hopeless_batch_is_given_up_after_five_beginnings():
    table = make_table(image='a', city='x', place=np.repeat([0, 1], 4), easting=np.repeat([0., 200], 4), northing=0.)
    with pytest.raises(UserError, match='only 2 of the 30 places of a batch could be filled in 5 attempts'): next(iter(b.CliqueBatches(table, strategy='random')))

def test_a_place_that_is_drawn_gives_one_group():
    "Whatever else of it lies elsewhere: the next group is of another place."
    table = make_table(image='a', city='x', place=np.repeat([0, 1], 8), easting=np.repeat([0., 100, 300, 400], 4), northing=0.)
    batches = iter(b.CliqueBatches(table, strategy='random', places_per_batch=2, min_size=4))
    for _ in range(40): assert sorted(table.place[next(batches)[:, 0]]) == [0, 1]
