"The page of curves: its numbers against brute force, and runs that lack something."
import json

import numpy as np
import pandas as pd
import pytest

from sage.run import Run
from sage.viz.toy import toy_descriptors, toy_run, toy_table
from sage.viz.training import PANELS, anchor_nodes, distances, edge_sets, hardness_figure, hardness_table, more_alike, overlap, training_figure

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp('toy')/'run')

def sentences(fig):
    return sorted(a.text for a in fig.layout.annotations if 'yet' in a.text)

def trace(fig, name):
    return next(t for t in fig.data if t.name == name)

def test_more_alike_against_loops():
    g = np.random.default_rng(0)
    for _ in range(20):
        F, others = g.normal(size=(g.integers(2, 9), 5)), g.normal(size=(30, 5))
        expected = []
        for i, f in enumerate(F):
            nearest = min(np.linalg.norm(f - o) for j, o in enumerate(F) if j != i)
            expected += [np.linalg.norm(f - o) < nearest for o in others]
        assert more_alike(F, others) == pytest.approx(100*np.mean(expected))
    np.testing.assert_allclose(distances(F, others), np.linalg.norm(F[:, None] - others[None], axis=2), atol=1e-4)

def test_twins_are_as_hard_as_can_be():
    g = np.random.default_rng(1)
    F = np.repeat(g.normal(size=(4, 8)), 2, axis=0)
    assert more_alike(F, g.normal(size=(100, 8))) == 0
    assert more_alike(F, F) == 0                                                         # a place is not more alike to itself

def test_hardness_table(run):
    table = hardness_table(run, batches=2)
    assert set(zip(table.drawn, table.seen)) == {(d, s) for s in range(5) for d in [-1, *range(s + 1)]}
    F, nodes = np.asarray(run.descriptors(3), np.float32), anchor_nodes(run.cliques(1), run.nodes(1), 2)
    expected = np.mean([more_alike(F[n], F) for n in nodes])                             # the sample holds all 96 places
    assert table.set_index(['drawn', 'seen']).harder[1, 3] == pytest.approx(expected, abs=1e-3)
    pd.testing.assert_frame_equal(table, hardness_table(run, batches=2))

def test_anchor_nodes_without_the_extra_column(run):
    cliques = run.cliques(0)
    plain = cliques[['batch', 'slot', 'place', 'image', 'rank', 'mean_affinity']]
    for a, b in zip(anchor_nodes(cliques, run.nodes(0)), anchor_nodes(plain, run.nodes(0))): np.testing.assert_array_equal(a, b)

def test_overlap_against_sets(run):
    shared = overlap(edge_sets(run))
    pairs = {e: {(a, b) for a, b, s, k in zip(t.src, t.dst, t.state, t.kind) if s != 'broken' and k == 'alike'} for e in run.epochs() for t in [run.edges(e)]}
    for a in pairs:
        for b in pairs: assert shared.loc[a, b] == pytest.approx(len(pairs[a] & pairs[b])/len(pairs[a] | pairs[b]))

def test_figure_shows_what_was_logged(run):
    fig, epochs = training_figure(run), run.metrics()
    assert sentences(fig) == [] and {a.text.split(':')[0] for a in fig.layout.annotations} == set(PANELS)
    for k, t in zip((1, 5, 10), [t for t in fig.data if t.name == 'Otherville']): np.testing.assert_allclose(t.y, epochs[f'Otherville/recall@{k}'])
    np.testing.assert_array_equal(trace(fig, 'broken').customdata, epochs.edges_broken)
    np.testing.assert_allclose(trace(fig, 'embed').y, epochs.embed_s)
    assert trace(fig, 'train').y[0] == 0                                                 # nothing was trained before epoch 0
    for axis in ('yaxis', 'yaxis4', 'yaxis5', 'yaxis7'): assert fig.layout[axis].title.text

def test_only_steps_so_far(tmp_path):
    young = Run.create(tmp_path/'young', {})
    young.log(kind='epoch', epoch=0, **{'A/recall@1': 12.})
    young.log(kind='step', epoch=1, step=10, loss=2.5, step_s=1.)
    fig = training_figure(young)
    assert len(sentences(fig)) == 6                                                      # loss, recall and the time of a step are there
    assert 'two epochs' in hardness_figure(young).layout.title.text

def test_lacking_numbers(tmp_path):
    odd = Run.create(tmp_path/'odd', {})
    odd.log(kind='epoch', epoch=0, loss=float('nan'), embed_s=None, edges_kept=0, edges_new=0, edges_broken=0, **{'A/recall@1': None})
    odd.log(kind='epoch', epoch=1, loss=1., embed_s=2., edges_new=3, **{'A/recall@1': 50.})
    fig = training_figure(odd)
    assert json.loads(fig.to_json())
    assert trace(fig, 'A').y[1] == 50 and trace(fig, 'mean of an epoch').y == (1.,)

def test_hostile_names(tmp_path):
    evil = '<img src=x onerror=alert(1)>'
    run = Run.create(tmp_path/evil, {})
    for table in (evil, '<b>x</b>', ' '): run.log(kind='epoch', epoch=0, **{f'{table}/recall@1': 1.})
    text = training_figure(run).to_json().replace('\\u003c', '<').replace('\\u003e', '>')
    assert '<img src=x' not in text and '<b>' not in text

def test_a_long_run_keeps_its_legend_short(tmp_path):
    long = toy_run(tmp_path/'long', epochs=9, batches=1)
    shown = [t.name for t in training_figure(long).data if (t.name or '').startswith('drawn') and t.showlegend]
    assert shown == ['drawn at 0', 'drawn at 9']

def test_toy_run_is_the_same_for_the_same_seed(tmp_path):
    a, b, other = (toy_run(tmp_path/n, epochs=1, batches=1, seed=s) for n, s in (('a', 3), ('b', 3), ('c', 4)))
    drop = ['image', 'lat', 'lon']
    pd.testing.assert_frame_equal(a.nodes(1).drop(columns=drop), b.nodes(1).drop(columns=drop))
    np.testing.assert_array_equal(a.descriptors(1), b.descriptors(1))
    assert not a.cliques(1).row.equals(other.cliques(1).row)
