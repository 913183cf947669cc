"""Benchmark: recall against a plain reading of its definition, the head against images in batches, results that carry their protocol."""
import numpy as np
import pytest
import torch
from PIL import Image

from sage.benchmark import Result, apply_head, audit, audit_descriptors, audit_table, describe_raw, describe_table, evaluate, plot_audit, raw_baselines, score
from sage.core import UserError
from sage.images import eval_transform, load_image
from sage.model import create_sage
from sage.places import make_table
from sage.retrieval import positives_within


@pytest.fixture(scope='module')
def model(): return create_sage('sage_nano', pretrained=False, interact=True, probes=8, probe_dim=80, token_dim=128).eval()   # 768 numbers: one segment of the head


@pytest.fixture(scope='module')
def town(tmp_path_factory):
    folder, rng, tables = tmp_path_factory.mktemp('town'), np.random.default_rng(0), []
    patterns = rng.integers(0, 255, (9, 4, 4, 3)).astype(np.uint8)
    for role, n in (('database', 9), ('query', 7)):
        paths = [str(folder/f'{role}{i}.png') for i in range(n)]
        for i, p in enumerate(paths): Image.fromarray(np.kron(patterns[i], np.ones((14, 14, 1), np.uint8)) // (1 + (role == 'query'))).save(p)
        tables.append(make_table(image=paths, city='t', place=np.arange(n), easting=100. * np.arange(n), northing=0., role=role))
    return tables


def plain_recall(q, d, positives, k):
    "The definition, one query at a time, in float64."
    hits = [bool(set(np.argsort(((d.astype(float) - x.astype(float)) ** 2).sum(1), kind='stable')[:k]) & set(p)) for x, p in zip(q, positives) if len(p)]
    return 100 * np.mean(hits)


def test_score_against_the_definition():
    rng = np.random.default_rng(0)
    for trial in range(40):
        q, d = (rng.normal(size=(n, 6)).astype(np.float32) for n in rng.integers(1, 40, 2))
        positives = [np.flatnonzero(rng.random(len(d)) < .1) for _ in q]
        if not any(map(len, positives)): continue
        recalls, without = score(q, d, positives, (1, 3, 5, 50))
        assert without == sum(not len(p) for p in positives) and list(recalls) == [k for k in (1, 3, 5, 50) if k <= len(d)]
        for k, value in recalls.items(): assert value == pytest.approx(plain_recall(q, d, positives, k))
        values = list(recalls.values())
        assert values == sorted(values)


def test_no_query_with_a_positive(): pytest.raises(UserError, score, np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), [np.zeros(0, int)] * 2)


def images(df, size): return torch.stack([eval_transform(size)(load_image(p)) for p in df.image])


@pytest.mark.parametrize('batch', [1, 2, 4, 9])
def test_descriptors_are_the_models_own(model, town, batch):
    d = describe_table(model, town[0], (56, 42), batch_size=batch)
    assert d.dtype == np.float32
    assert np.allclose(d, model.describe(images(town[0], (56, 42))).numpy(), atol=1e-5)


@pytest.mark.parametrize('batch', [1, 2, 4, 9])
def test_head_over_descriptors_is_the_head_over_images(model, town, batch):
    x, order = images(town[0], 56), np.random.default_rng(1).permutation(9)
    want = np.empty((9, model.dim), np.float32)
    for s in range(0, 9, batch): want[order[s:s + batch]] = model.describe(x[order[s:s + batch]], cross_image=True).numpy()
    got = describe_table(model, town[0], 56, batch_size=batch, cross_image=True, rows=order)
    assert np.allclose(got, want, atol=2e-3)                                          # of norm √8448-like size
    assert np.array_equal(got, apply_head(model, describe_table(model, town[0], 56, batch_size=batch), batch, order))


def test_head_leaves_modes_alone(model):
    model.interact.train()
    d = np.random.default_rng(0).normal(size=(4, model.dim)).astype(np.float32)
    assert np.array_equal(apply_head(model, d, 2), apply_head(model, d, 2)) and model.interact.training
    model.interact.eval()


def test_result_carries_its_protocol(model, town):
    database, queries = town
    positives = positives_within(queries, database, 25)
    positives[3] = positives[3][:0]
    r = evaluate(model, database, queries, positives, size=56, batch_size=4, head=True, order='shuffled', seed=3, name='t', positive='within 25 m', label='m', notes=['a note'])
    text = str(r)
    for part in ('t · within 25 m · #database 9 · #queries 7 (1 without a positive, left out)', 'size 56x56', 'head on', 'order shuffled (seed 3), batches of 4', 'R@1', 'a note'): assert part in text
    row = r.to_row()
    assert row['without_positive'] == 1 and row['order'] == 'shuffled (seed 3)' and row['size'] == '56x56' and 'R@20' not in row
    again = evaluate(model, database, queries, positives, size=56, batch_size=4, head=True, order='shuffled', seed=3, name='t')
    assert again.recalls == r.recalls
    assert isinstance(r, Result)


def test_head_off_does_not_see_order_or_batch(model, town):
    database, queries = town
    positives = positives_within(queries, database, 25)
    results = [evaluate(model, database, queries, positives, size=56, batch_size=b, order=o, seed=s).recalls for b in (1, 4, 32) for o, s in (('sorted', 0), ('shuffled', 0), ('shuffled', 1))]
    assert all(r == results[0] for r in results)


def test_raw_baselines_are_timms_own(model, town):
    x = images(town[0], 112)                                                                        # the native grid: no resampling of positions
    raw = describe_raw(model, town[0], 112, batch_size=4)
    with torch.no_grad(): tokens = model.backbone.model.forward_features(x).numpy()                 # timm's, no DPN
    for kind, want in (('cls', tokens[:, 0]), ('mean', tokens[:, 1:].mean(1))): assert np.allclose(raw[kind], want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-5)
    assert raw['cls'].shape == raw['mean'].shape == (9, model.backbone.dim)
    for v in raw.values(): assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    assert not np.allclose(raw['cls'], raw['mean'], atol=1e-2)
    database, queries = town
    results = raw_baselines(model, database, queries, positives_within(queries, database, 25), size=112, name='t')
    q = describe_raw(model, queries, 112)
    for r, kind in zip(results, ('mean', 'cls')): assert r.recalls[1] == pytest.approx(plain_recall(q[kind], raw[kind], positives_within(queries, database, 25), 1))


def test_audit_measures_what_it_says(model, town):
    database, queries = town
    positives = positives_within(queries, database, 25)
    m = audit(model, database, queries, positives, size=56, batch=2, sizes=(1, 2, 8, 26), seeds=5)
    assert len(m) == 1 + 1 + 5 + 4 + 3 * 5
    assert list(m.setting[:2]) == ['head off', 'as published'] and set(m[m.setting == 'shuffled'].seed) == set(range(5))
    one = lambda s: m[m.setting == s].iloc[0]
    assert one('head off')['R@1'] == evaluate(model, database, queries, positives, size=56).recalls[1]
    assert one('as published')['R@1'] == evaluate(model, database, queries, positives, size=56, head=True, batch_size=2).recalls[1]
    assert m[m.setting == 'shuffled'].iloc[4]['R@1'] == evaluate(model, database, queries, positives, size=56, head=True, batch_size=2, order='shuffled', seed=4).recalls[1]
    assert audit_table(m).times.sum() == len(m)
    plot_audit(m)


def test_position_leaks_through_a_head_that_averages():
    "A head that averages the batch: aligned lists are found by their partners, shuffled lists are not."
    class Mean(torch.nn.Module):
        def forward(self, x): return x + 2 * x.mean(0, keepdim=True)
    model = torch.nn.Module(); model.interact = Mean(); model.register_parameter('p', torch.nn.Parameter(torch.zeros(1)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1, 64)) + 1.6 * rng.normal(size=(400, 2, 64))
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    m = audit_descriptors(model, x[:, 0], x[:, 1], [np.array([i]) for i in range(400)], batch=2).groupby('setting')['R@1'].mean()
    assert m['as published'] > m['shuffled'] + 5


@pytest.mark.parametrize('how, says', [(dict(size=57), '56'), (dict(size=56, head=True, order='x'), 'sorted'), (dict(size=(56, 0)), 'size')])
def test_bad_arguments(how, says, model, town):
    with pytest.raises(UserError, match=says): evaluate(model, *town, positives_within(town[1], town[0], 25), **how)


def test_headless_models_are_refused(town):
    plain = create_sage('sage_nano', pretrained=False, probes=8, probe_dim=16, token_dim=12)
    for f in (lambda: evaluate(plain, *town, positives_within(town[1], town[0], 25), size=56, head=True), lambda: audit(plain, *town, positives_within(town[1], town[0], 25), size=56)):
        with pytest.raises(UserError, match='InteractHead'): f()


def test_unreadable_image_names_itself(model, town, tmp_path):
    (tmp_path/'broken.jpg').write_bytes(b'\xff\xd8\xff')
    df = town[0].assign(image=[*town[0].image[:-1], str(tmp_path/'broken.jpg')])
    with pytest.raises(UserError, match='broken.jpg'): describe_table(model, df, 56)
