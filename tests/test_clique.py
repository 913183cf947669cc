"""The greedy pick against an independent reading of METHOD §5, and the cliques of a draw against networkx, step by step."""
from fractions import Fraction

import networkx as nx
import numpy as np
import pytest

import sage.clique, sage.graph
from sage.clique import COUNTS, greedy_clique, ground, seed_scores, take_cliques
from sage.core import UserError
from sage.graph import GeoSide
from sage.places import make_table


def literal(W, k):
    "METHOD §5 with exact fractions; a cut edge is minus infinity."
    N = len(W)
    value = lambda i, j: None if np.isnan(W[i][j]) or np.isneginf(W[i][j]) else Fraction(float(W[i][j]))
    def mean(i, others):
        values = [value(i, j) for j in others]
        return (0, 0) if None in values else (1, sum(values)/len(values) if values else 0)   # (0, 0) is minus infinity
    S = [mean(i, [j for j in range(N) if j != i]) for i in range(N)]
    order = [max(range(N), key=lambda i: (S[i], -i))]
    while len(order) < k: order.append(max((i for i in range(N) if i not in order), key=lambda i: (mean(i, order), -i)))
    return order

def random_weights(r):
    "Integers with many ties, or exact binary fractions; symmetric; some edges cut by -inf or NaN; the diagonal anything."
    N = int(r.integers(1, 15))
    W = -r.integers(0, (2, 4, 50)[r.integers(3)], (N, N)).astype(float) if r.random() < .6 else -r.integers(0, 2**20, (N, N))/2.**15
    if r.random() < .2: W = -W
    cut = r.random((N, N)) < r.choice([0, 0, .05, .3, .9, 1])
    W[cut] = r.choice([-np.inf, np.nan])
    if r.random() < .8: W = np.triu(W, 1); W = np.where(np.triu(np.ones_like(W), 1) > 0, W, W.T)
    W[np.diag_indices(N)] = r.choice([0, 5, -np.inf, np.nan])
    return W

@pytest.mark.parametrize('block', range(4))
def test_greedy_is_literal(block):
    for number in range(1000):
        r = np.random.default_rng([block, number])
        W = random_weights(r); k = int(r.integers(1, len(W) + 1)); kept = W.copy()
        assert greedy_clique(W, k).tolist() == literal(W, k), (block, number)
        assert np.array_equal(W, kept, equal_nan=True)                               # the caller's array is left alone

def test_greedy_on_floats():
    for number in range(300):
        r = np.random.default_rng(number); N = int(r.integers(4, 20))
        xy, F = r.uniform(0, 20, (N, 2)), r.normal(size=(N, 6))
        assert greedy_clique(sage.graph.affinity(xy, F)).tolist() == literal(sage.graph.affinity(xy, F), 4)

def test_seed_scores():
    for number in range(200):
        W = random_weights(np.random.default_rng(number)); N = len(W); S = seed_scores(W)
        for i in range(N):
            row = [-np.inf if np.isnan(W[i, j]) else W[i, j] for j in range(N) if j != i]
            assert S[i] == pytest.approx(np.sum(row)/(N - 1)) if N > 1 else S[i] == 0

@pytest.mark.parametrize('W,k', [(np.zeros((3, 3)), 4), (np.zeros((3, 3)), 0), (np.zeros((3, 3)), -1), (np.zeros((0, 0)), 1), (np.zeros((3, 2)), 1), (np.zeros(3), 1), (np.full((3, 3), np.inf), 2), (np.zeros((9, 9)), 2.5)])
def test_bad_weights(W, k):
    with pytest.raises(UserError): greedy_clique(W, k)

def test_greedy_does_not_depend_on_the_unit():
    "Metres or kilometres: the same order, however small the numbers."
    for number in range(300):
        r = np.random.default_rng(number); W = random_weights(r); k = int(r.integers(1, len(W) + 1))
        for unit in (2.**-60, 2.**60): assert greedy_clique(W*unit, k).tolist() == greedy_clique(W, k).tolist(), number

def test_rounding_is_no_reason_to_prefer_one():
    "Equal but for the last bits: the lower index; a millionth better: the better."
    for better, first in ((1e-14, 0), (1e-6, 1)):
        W = -np.array([[0, 1, 1 + 2*better], [1, 0, 1], [1 + 2*better, 1, 0.]])
        assert greedy_clique(W, 1).tolist() == [first] and greedy_clique(W*1e6, 1).tolist() == [first]

def test_names():
    assert sage.clique.geo_cliques is sage.graph.geo_cliques
    assert greedy_clique([[0, -1], [-1, 0]], 2).tolist() == [0, 1]                  # lists will do
    assert greedy_clique(np.zeros((6, 6), np.float32)).tolist() == [0, 1, 2, 3]     # k is 4


def town(seed, n=160, side=160., clumps=True):
    r = np.random.default_rng(seed)
    xy = r.uniform(0, side, (n, 2)) if not clumps else r.uniform(0, side, (n//8, 2)).repeat(8, 0) + r.normal(0, 6, (n, 2))
    return make_table(image='a', city=r.choice(['x', 'y'], n), place=np.arange(n)//8, easting=xy[:, 0], northing=xy[:, 1])

def take(geo, places, end=99, k=4, min_size=10, seed=0, each=99, taken=None, limit=50):
    N, counts, ptr = len(geo.codes), np.zeros(8, np.int64), np.zeros(end + 1, np.int64)
    taken = np.zeros(N, np.int32) if taken is None else taken
    local = np.full(N, -1, np.int32)
    _, rows, slots = take_cliques(ground(geo), local, taken, 1, np.array([places], np.int32), 0, ptr, np.zeros(4, np.int32), 0, end, each, k, min_size, limit, 9, np.array([seed], np.uint64), counts)
    assert (local == -1).all()                                                      # scratch is left as it was
    return [rows[a:b].tolist() for a, b in zip(ptr[:slots], ptr[1:slots+1])], dict(zip(COUNTS, counts.tolist())), taken == 1

def graph_of(geo):
    g = nx.Graph(); g.add_nodes_from(range(len(geo.codes)))
    g.add_edges_from((i, int(j)) for i in range(len(geo.codes)) for j in geo.neighbors.row(i))
    return g

@pytest.mark.parametrize('clumps', [True, False])
@pytest.mark.parametrize('min_size', [4, 8, 10])
def test_a_draw_step_by_step(clumps, min_size):
    for seed in range(12):
        geo = GeoSide(town(seed, clumps=clumps)); whole = graph_of(geo)
        places = np.random.default_rng(seed).choice(len(geo.places), 12, replace=False)
        slots, counts, taken = take(geo, places, min_size=min_size, seed=seed)
        left, relaxed = set(np.flatnonzero(np.isin(geo.codes, places)).tolist()), 0
        start = len(left)
        for slot in slots:
            cliques = {frozenset(c) for c in nx.find_cliques(whole.subgraph(left)) if len(c) >= 4}
            assert frozenset(slot) in cliques and slot == sorted(slot)
            if len(slot) < min_size: assert max(map(len, cliques)) < min_size; relaxed += 1
            left -= set(slot) | {u for v in slot for u in whole[v]}
        assert not [c for c in nx.find_cliques(whole.subgraph(left)) if len(c) >= 4]
        assert counts['relaxed'] == relaxed and counts['cliques'] == len(slots) and counts['few'] == len(left)
        assert counts['near'] == start - len(left) - sum(map(len, slots)) and counts['full'] == 0
        assert set(np.flatnonzero(taken).tolist()) == {v for s in slots for v in s} | {u for s in slots for v in s for u in whole[v]}

def test_the_choice_is_uniform():
    geo = GeoSide(make_table(image='a', city='x', place=np.arange(40)//10, easting=np.repeat([0, 100, 200, 300.], 10) + np.tile(np.arange(10.), 4), northing=0.))
    first = [take(geo, [0, 1, 2, 3], end=1, seed=s)[0][0][0] // 10 for s in range(4000)]
    assert (abs(np.bincount(first) - 1000) < 120).all()                              # four standard deviations
    both = [tuple(s[0] // 10 for s in take(geo, [0, 1, 2, 3], end=2, seed=s)[0]) for s in range(2400)]
    assert len(set(both)) == 12 and all(a != b for a, b in both)

def spots(*of):
    "The geography of [number of images, easting, northing] at each spot, a place each."
    return GeoSide(make_table(image='a', city='x', place=np.repeat(np.arange(len(of)), [n for n, *_ in of]), easting=np.repeat([float(x) for _, x, _ in of], [n for n, *_ in of]), northing=np.repeat([float(y) for *_, y in of], [n for n, *_ in of])))

def test_two_cliques_that_became_one_count_once():
    "Place 0 with 1 and with 2 are two cliques, until the large one (3 and 4) takes these away."
    geo = spots((4, 0, -12), (1, 20, 0), (1, -20, 0), (1, 0, 14), (10, 0, 30), (4, 900, 0))
    found = [take(geo, np.arange(6), end=2, seed=s)[0] for s in range(800)]
    assert all(large == list(range(6, 17)) for large, _ in found)
    assert abs(sum(second == [0, 1, 2, 3] for _, second in found) - 400) < 57        # four standard deviations

def test_near_an_image_that_was_not_drawn():
    "The first neighbour of everybody drawn is image 0."
    assert take(spots((1, 0, 0), (4, 5, 0)), [1])[0] == [[1, 2, 3, 4]]

def test_limits_of_a_draw():
    geo = GeoSide(town(3))
    slots, counts, _ = take(geo, np.arange(len(geo.places)), end=2)
    assert len(slots) == 2 and counts['full'] > 0 and counts['few'] == 0
    assert len(take(geo, np.arange(len(geo.places)), each=1)[0]) == 1
    assert take(geo, [0, -1, -1])[0] == take(geo, [0])[0]                            # -1 is no place
    blocked = np.ones(len(geo.codes), np.int32)
    slots, counts, _ = take(geo, np.arange(len(geo.places)), taken=blocked)
    assert slots == [] and counts['near'] == len(geo.codes)

def test_crowded_draws():
    angle = np.arange(60)*2*np.pi/60
    xy = np.concatenate([12.52*np.stack([np.cos(angle), np.sin(angle)], 1), np.random.default_rng(0).uniform(100, 200, (80, 2))])
    geo = GeoSide(make_table(image='a', city='x', place=np.arange(140)//10, easting=xy[:, 0], northing=xy[:, 1])); whole = graph_of(geo)
    slots, counts, _ = take(geo, np.arange(14))
    assert counts['crowded'] == 1
    left = set(range(140))
    for slot in slots:
        assert all(whole.has_edge(a, b) for a in slot for b in slot if a < b) and set(slot) <= left
        left -= set(slot) | {u for v in slot for u in whole[v]}
    assert not [c for c in nx.find_cliques(whole.subgraph(left)) if len(c) >= 4]     # in the end nothing is left over

@pytest.mark.parametrize('n, side, k, seeds', [(120, 70., 4, 25), (24, 45., 2, 40)])
@pytest.mark.parametrize('limit', [1, 2, 5])
def test_a_short_list_leaves_nothing_over(limit, n, side, k, seeds):
    "Of a crowded draw only some cliques are listed; it is listed again until there is no clique any more, or the batch is full."
    crowded = 0
    for seed in range(seeds):
        geo = GeoSide(town(seed, n, side, clumps=n > 24)); whole = graph_of(geo)
        for end in (99, 1):
            slots, counts, _ = take(geo, np.arange(len(geo.places)), end=end, seed=seed, limit=limit, k=k, min_size=k); left = set(range(n))
            crowded += counts['crowded']
            for slot in slots:
                assert len(slot) >= k and whole.subgraph(slot).size() == len(slot)*(len(slot) - 1)/2 and set(slot) <= left
                assert not set.intersection(*({*whole[v]} for v in slot)) & left      # maximal
                left -= set(slot) | {u for v in slot for u in whole[v]}
            assert counts['crowded'] in (0, 1) and len(slots) <= end and counts['cliques'] == len(slots)
            assert counts['near'] == n - len(left) - sum(map(len, slots)) and counts['full' if len(slots) == end else 'few'] == len(left)
            assert len(slots) == end or not [c for c in nx.find_cliques(whole.subgraph(left)) if len(c) >= k]
    assert crowded > 0

def adjacency(g):
    "Rows of bits."
    out = np.zeros((len(g), -(-len(g)//64)), np.uint64)
    for a, b in g.edges:
        for u, v in ((a, b), (b, a)): out[u, v >> 6] |= np.uint64(1) << np.uint64(v & 63)
    return out

@pytest.mark.parametrize('n', [1, 5, 63, 64, 65, 128, 130])
def test_who_is_joined_as_bits(n):
    "A word for every 64 nodes; the graph has more nodes than are asked about."
    g = nx.gnp_random_graph(n + 7, .3, seed=n)
    rows, local = [sorted(g[v]) for v in g], np.full(n + 7, -1, np.int32)
    local[7:], end = np.arange(n), np.cumsum([*map(len, rows)])
    bits = sage.clique._adjacency(np.arange(7, n + 7), local, np.stack([end - [*map(len, rows)], end], 1), np.concatenate(rows).astype(np.int32))
    assert (bits == adjacency(nx.convert_node_labels_to_integers(g.subgraph(range(7, n + 7)), ordering='sorted'))).all() and bits.shape == (n, -(-n//64))

def test_more_that_are_alone_than_there_is_room_for_at_first():
    flat, whole = sage.clique._search(np.zeros((700, 11), np.uint64), 1, 10**6, False)
    assert whole and flat.reshape(-1, 2).tolist() == [[1, v] for v in range(700)]

@pytest.mark.parametrize('n', [1, 5, 63, 64, 65, 128, 130])
def test_listed_cliques(n):
    "All of them where they are few; else about `limit`, each a maximal one, none twice, and some for every lowest member that has any."
    for seed, p in enumerate((0, .1, .25, .5 if n < 128 else .35)):
        g = nx.gnp_random_graph(n, p, seed=seed); want = {frozenset(c) for c in nx.find_cliques(g)}
        for k in (1, 2, 4):
            for limit in (10**6, 100, 10):
                sets, crowded = sage.clique._listed(adjacency(g), k, limit)
                got = [frozenset(64*w + i for w, word in enumerate(s) for i in range(64) if int(word) >> i & 1) for s in sets]
                mine = {c for c in want if len(c) >= k}
                assert len({*got}) == len(got) and {*got} <= mine and (crowded or {*got} == mine)
                lowest = np.bincount([min(c) for c in mine], minlength=n)
                if limit == 10**6 or lowest.max() < limit and sum(len(c) + 1 for c in mine) <= 100*limit: assert not crowded
                if lowest.max() > limit: assert crowded
                if crowded: assert len(got) <= limit + n and {min(c) for c in got} == {min(c) for c in mine} and np.bincount([min(c) for c in got]).max() <= 1 + limit//n

def test_how_many_numbers_a_list_may_have():
    "With limit 1 at most a hundred: 32 pairs and a triangle are 32 · 3 + 4."
    for pairs, triangles, crowded in ((32, 1, False), (31, 2, True), (33, 0, False), (34, 0, True)):
        g = nx.disjoint_union_all([nx.complete_graph(2)]*pairs + [nx.complete_graph(3)]*triangles)
        sets, cut = sage.clique._listed(adjacency(g), 2, 1)
        assert cut == crowded and len(sets) == pairs + triangles                      # one of each lowest member is listed in any case

@pytest.mark.parametrize('k', [float('nan'), float('inf'), 2.5, None, '2', 0, 4])
def test_a_number_of_nodes_that_is_none(k):
    with pytest.raises(UserError, match=f'cannot take {k} of 3 nodes'): greedy_clique(-np.ones((3, 3)), k)
