"""Recall@K recomputed from its definition with plain numpy, sharing no code with the package: share of the answerable queries for which one of the K nearest database images is a positive."""
import numpy as np
from hypothesis import given, settings, strategies as st

from sage.benchmark import score
from sage.core import UserError
from sage.protocols import frame_positives
from sage.retrieval import positives_within, recall_at_k, recall_from_ranks
from sage.stream import stream_search

KS = (1, 2, 5, 10, 20)
seeds = st.integers(0, 2**32 - 1)


def reference(queries, database, positives, k):
    "The definition, word by word."
    right = asked = 0
    for q, p in zip(queries, positives):
        if len(p) == 0: continue                                        # nobody could answer it
        asked += 1
        squared = [float(np.sum((x.astype(np.float64) - q.astype(np.float64)) ** 2)) for x in database]
        nearest = sorted(range(len(database)), key=lambda j: (squared[j], j))[:k]
        right += any(j in p for j in nearest)
    return 100 * right / asked if asked else float('nan')


def draw(seed, whole):
    "Descriptors (whole numbers: many ties) and positives, for some queries none, for some all."
    g = np.random.default_rng(seed)
    nq, n, dim = int(g.integers(1, 14)), int(g.integers(1, 40)), int(g.integers(1, 9))
    make = lambda m: (g.integers(-2, 3, (m, dim)) if whole else g.normal(size=(m, dim))).astype(np.float32)
    share = g.choice([0, 0, .05, .3, 1], nq)
    return make(nq), make(n), [np.flatnonzero(g.random(n) < s) for s in share]


@settings(max_examples=120, deadline=None)
@given(seeds, st.booleans())
def test_recall_is_the_definition(seed, whole):
    q, d, positives = draw(seed, whole)
    got = recall_at_k(q, d, positives, KS)
    for k in KS: np.testing.assert_allclose(got[k], reference(q, d, positives, k))
    assert got.without_positive == sum(len(p) == 0 for p in positives) and got.queries == len(q)


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans())
def test_the_score_of_a_result_is_the_definition(seed, whole):
    "What `sage_eval` prints, with and without bounded memory."
    q, d, positives = draw(seed, whole)
    if not any(len(p) for p in positives):
        for memory in (None, 1.):
            try: score(q, d, positives, memory=memory)
            except UserError as e: assert 'no query has a positive' in str(e)
            else: raise AssertionError('a recall of nothing')
        return
    for memory in (None, 1.):
        recalls, without = score(q, d, positives, KS, memory)
        assert list(recalls) == [k for k in KS if k <= len(d)] or len(d) < 1
        for k, v in recalls.items(): np.testing.assert_allclose(v, reference(q, d, positives, k))
        assert without == sum(len(p) == 0 for p in positives)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_recall_with_positives_by_radius(seed):
    "From positions to percent: who is within 25 m, by the plain formula, the border included."
    import pandas as pd
    g = np.random.default_rng(seed); nq, n = int(g.integers(1, 12)), int(g.integers(1, 40))
    table = lambda m: pd.DataFrame(dict(easting=g.integers(0, 30, m) * 5., northing=g.integers(0, 30, m) * 5., zone='33N', city='a'))
    q, d = table(nq), table(n)
    near = [[j for j in range(n) if (q.easting[i] - d.easting[j])**2 + (q.northing[i] - d.northing[j])**2 <= 625] for i in range(nq)]
    got = positives_within(q, d)
    assert [p.tolist() for p in got] == near
    qx, dx = g.normal(size=(nq, 4)).astype(np.float32), g.normal(size=(n, 4)).astype(np.float32)
    for k, v in recall_at_k(qx, dx, got, KS).items(): np.testing.assert_allclose(v, reference(qx, dx, near, k))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 10), st.sampled_from([1, 10]))
def test_recall_with_positives_by_frame(seed, within, step):
    g = np.random.default_rng(seed); n = int(g.integers(1, 60)); nq = (n - 1) // step + 1
    near = [[j for j in range(n) if abs(j - step * i) <= within] for i in range(nq)]
    got = frame_positives(np.arange(nq) * step, np.arange(n), within)
    assert [p.tolist() for p in got] == near
    qx, dx = g.normal(size=(nq, 4)).astype(np.float32), g.normal(size=(n, 4)).astype(np.float32)
    found = stream_search(qx, dx, min(20, n), memory=1)[1]
    for k, v in recall_from_ranks(found, got, KS).items(): np.testing.assert_allclose(v, reference(qx, dx, near, k))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 6))
def test_a_short_list_of_answers_is_never_counted_as_a_hit(seed, columns):
    "Fewer answers than K: what was not retrieved was not found."
    q, d, positives = draw(seed, False)
    found = recall_from_ranks(stream_search(q, d, min(columns, len(d)))[1], positives, KS)
    for k in KS: np.testing.assert_allclose(found[k], reference(q, d, positives, min(k, columns)))


def test_positives_of_any_kind_and_none_beyond_the_database():
    q = np.eye(3, dtype=np.float32)
    for kind in (list, set, tuple, np.array, lambda p: np.array(p, np.uint8)):
        assert recall_at_k(q, q, [kind([0, 2]), kind([2]), kind([])], (1, 3)) == {1: 50., 3: 100.}
    for bad in (3, -1):
        try: recall_at_k(q, q, [[bad], [0], [0]])
        except UserError as e: assert f'row {bad} of a database of 3 rows' in str(e)
        else: raise AssertionError('a positive that is nobody')
