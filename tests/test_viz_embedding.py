"The layout of descriptors: points that move instead of jumping, arrays that stay in place, names that mean harm, 50,000 points."
import shutil, subprocess, sys, time
import numpy as np, pandas as pd, pytest
from sage.core import UserError
from sage.answers import answer_arrays
from sage.run import Run
from sage.viz import embedding as E
from sage.viz.embedding import ERRORS, embeddable, embedding_figure, embedding_positions, embedding_view, errors_of, layout_step, neighbours_of, place_colors, placed, point_card, settle
from sage.viz.graph import graph_figure, show_view
from sage.viz.toy import toy_run

EVIL = '"><img src=x onerror=alert(1)></script>'

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Three epochs; the last is a copy of the one before."
    run = toy_run(tmp_path_factory.mktemp('toy')/'run', epochs=3)
    for file in ('answers.npz', 'descriptors.npy'): shutil.copy(run.path/'epochs'/'0002'/file, run.path/'epochs'/'0003'/file)
    return run

def way(a, b): return float(np.linalg.norm(a - b, axis=1).mean())

def neighbours_kept(x, xy, k=10):
    "Share of the k nearest neighbours that are the same in both."
    near = lambda p: np.argsort(((p[:, None] - p[None])**2).sum(2), 1)[:, 1:k + 1]
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(near(x), near(xy))])/k

@pytest.mark.parametrize('of', ['places', 'Otherville'])
def test_points_stay_or_move_and_do_not_jump(run, of):
    xy = embedding_positions(run, of)
    assert np.array_equal(xy[2], xy[3])                                              # equal epochs: to the last bit
    x = {e: E._reduced(run, of, e) for e in xy}
    alone = {0: xy[0]}
    for e in (1, 2): alone[e] = settle(layout_step(x[e], seed=e), alone[e - 1])      # fitted anew, then turned onto the last: as fair as can be
    for e in (0, 1): assert way(xy[e], xy[e + 1]) < way(alone[e], alone[e + 1])
    for e in (0, 1, 2): assert neighbours_kept(x[e], xy[e]) > .8*neighbours_kept(x[e], alone[min(e, 2)]) > .2
    almost = x[2] + 1e-4*np.random.default_rng(0).normal(size=x[2].shape).astype(np.float32)
    assert way(xy[2], layout_step(almost, xy[2], neighbours_of(x[2]))) < .05         # spread is 1

def test_kept_in_memory_and_later_epochs_change_nothing(run, tmp_path):
    shutil.copytree(run.path, tmp_path/'run')
    shutil.rmtree(tmp_path/'run'/'epochs'/'0002'); shutil.rmtree(tmp_path/'run'/'epochs'/'0003')
    early = embedding_positions(Run(tmp_path/'run'), 'Otherville')
    for e in ('0002', '0003'): shutil.copytree(run.path/'epochs'/e, tmp_path/'run'/'epochs'/e)
    late = embedding_positions(Run(tmp_path/'run'), 'Otherville')
    assert all(late[e] is early[e] for e in early) and list(late) == [0, 1, 2, 3]
    assert embedding_positions(Run(tmp_path/'run'), 'Otherville')[3] is late[3]
    there = embedding_positions(run, 'Otherville')
    assert all(np.array_equal(there[e], late[e]) for e in there)                     # another folder, the same picture

def test_a_long_run_is_laid_out_at_its_end(run, tmp_path, monkeypatch):
    "Of very many epochs the last are kept, and nothing is laid out twice; the others are seen by principal components."
    whole = embedding_positions(run, 'Otherville')
    shutil.copytree(run.path, tmp_path/'run'); shutil.move(tmp_path/'run'/'epochs'/'0003', tmp_path/'3')
    monkeypatch.setattr(E, 'MANY', 3)
    early, steps, step = embedding_positions(Run(tmp_path/'run'), 'Otherville'), [], E.layout_step
    monkeypatch.setattr(E, 'layout_step', lambda *a: steps.append(1) or step(*a))
    shutil.move(tmp_path/'3', tmp_path/'run'/'epochs'/'0003')
    late = embedding_positions(Run(tmp_path/'run'), 'Otherville')
    assert list(early) == [0, 1, 2] and list(late) == [1, 2, 3] and len(steps) == 1 and late[2] is early[2] and np.array_equal(late[3], whole[3])
    old = embedding_view(Run(tmp_path/'run'), 0, of='Otherville')
    assert 'principal components' in old.title and 'UMAP' in embedding_view(Run(tmp_path/'run'), 3, of='Otherville').title
    assert len(embedding_figure(Run(tmp_path/'run'), of='Otherville').frames) == 3

def test_few_points_and_equal_points():
    g = np.random.default_rng(0)
    for n in (1, 2, 4, 5, 8):
        xy = layout_step(g.normal(size=(n, min(n, 3))).astype(np.float32))
        assert xy.shape == (n, 2) and np.isfinite(xy).all()
    assert np.isfinite(layout_step(np.ones((30, 4), np.float32))).all()

def test_settle_undoes_turn_mirror_and_scale():
    g = np.random.default_rng(0)
    xy, angle = g.normal(size=(50, 2)), 1.
    turn = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    np.testing.assert_allclose(settle(9*xy @ turn + 3, settle(xy)), settle(xy), atol=1e-5)

def test_beyond_the_landmarks(run):
    x = E._reduced(run, 'Otherville', 2)
    few = embedding_positions(run, 'Otherville', most=200)
    assert few[2].shape == (600, 2) and np.isfinite(few[2]).all() and np.array_equal(few[2], few[3])
    assert neighbours_kept(x, few[2]) > .5*neighbours_kept(x, embedding_positions(run, 'Otherville')[2])

@pytest.mark.parametrize('of,color', [('places', 'place'), ('places', 'city'), ('places', 'condition'), ('Otherville', 'place'), ('Otherville', 'city'), ('Otherville', 'condition'), ('Otherville', 'error')])
def test_traces_keep_number_and_order(run, of, color):
    views = [embedding_view(run, e, color, of) for e in range(3)]
    n = len(run.nodes()) if of == 'places' else 600
    assert len({len(v.traces) for v in views}) == 1
    for e, v in enumerate(views):
        rows = np.concatenate([t['customdata'] for t in v.traces[:-1]])
        assert sorted(rows) == list(range(n))
        for t in v.traces[:-1]:
            if len(t['customdata']): assert len(t['x']) == len(t['text']) == len(t['customdata']) and np.array_equal(t['x'], embedding_positions(run, of)[e][t['customdata'], 0])
    fig = embedding_figure(run, 0, color, of, selection=[1])
    sizes = [t.marker.size for t in fig.data]
    show_view(fig, views[2])
    assert [t.marker.size for t in fig.data] == sizes and len(fig.data) == len(views[0].traces) and not fig.frames
    assert all(t.type == 'scattergl' for t in fig.data)

def test_slider_moves_every_trace(run):
    fig = embedding_figure(run, color='error', of='Otherville')
    assert [f.name for f in fig.frames] == ['0', '1', '2', '3'] and all(len(f.data) == len(fig.data) for f in fig.frames)
    assert all(len(t.x) == len(t.customdata) or not len(t.customdata) for f in fig.frames for t in f.data[:-1])

def test_errors_are_those_of_the_recall(run):
    a = run.answers(1)['Otherville']
    kinds = errors_of(a, 600)
    assert 100*(kinds == 'right').sum()/len(a.queries) == pytest.approx(run.recalls().query('epoch == 1 and k == 1').recall.iloc[0])
    assert set(kinds) <= set(ERRORS) and (kinds[a.queries] != 'map').all()

@pytest.mark.parametrize('call,words', [(lambda r: embedding_positions(r, 'Nowhere'), 'places, Otherville'), (lambda r: embedding_view(r, 9), r'\[0, 1, 2, 3\]'), (lambda r: embedding_view(r, 0, 'smell'), 'place, city, condition, error'), (lambda r: embedding_view(r, 0, 'error'), 'Otherville'),
                                        (lambda r: embedding_view(r, 0, selection=[10**6]), 'is selected'), (lambda r: point_card(r, -1), 'from 0'), (lambda r: point_card(r, 600, of='Otherville'), 'from 0'), (lambda r: embedding_figure(r, of='mined'), 'places')])
def test_bad_wishes_name_the_choices(run, call, words):
    with pytest.raises(UserError, match=words): call(run)

def test_runs_without_answers_or_epochs(run, tmp_path):
    with pytest.raises(UserError, match='no epoch is complete yet'): embedding_figure(Run.create(tmp_path/'empty', {}))
    shutil.copytree(run.path, tmp_path/'old')
    for p in (tmp_path/'old').glob('epochs/*/answers.npz'): p.unlink()
    old = Run(tmp_path/'old')
    assert embeddable(old) == {'places': [0, 1, 2, 3]}
    assert len(embedding_positions(old)[0]) == len(run.nodes())

def test_harmful_names(run, tmp_path):
    shutil.copytree(run.path, tmp_path/'run')
    run.table('Otherville').assign(city=EVIL, condition=EVIL, image=EVIL).to_parquet(tmp_path/'run'/'tables'/'01.parquet')
    r = Run(tmp_path/'run')
    for color in ('city', 'condition'): assert '<img src=x' not in embedding_figure(r, 0, color, 'Otherville').to_json().replace('\\u003c', '<')
    card = point_card(r, 3, of='Otherville')
    assert '<img src=x' not in card and '</script>' not in card

def test_graph_takes_the_positions(run):
    assert len(graph_figure(run, epochs=[0, 1], positions=embedding_positions(run)).frames) == 2

def test_fifty_thousand_points_are_placed_and_drawn(run, monkeypatch):
    g, n = np.random.default_rng(0), 50_000
    x = g.normal(size=(n, 16)).astype(np.float32)
    start = time.process_time()
    xy = placed(x, np.arange(0, n, 100), g.normal(size=(500, 2)))
    rows = pd.DataFrame(dict(city=g.choice(list('abc'), n), place=np.arange(n), condition='', easting=g.random(n), northing=g.random(n), node=np.arange(n), image=''))
    monkeypatch.setattr(E, 'embedding_positions', lambda *a: {e: xy for e in range(4)}); monkeypatch.setattr(E, 'embedded_rows', lambda *a: rows)
    fig = embedding_figure(run, 2, 'place')
    assert len(fig.data[0].x) == n and time.process_time() - start < 12
    assert len(fig.to_json()) < 12e6

def test_umap_is_imported_only_to_fit():
    code = "import sys; sys.path.insert(0, '.'); import sage.viz.embedding; assert 'umap' not in sys.modules"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_hundreds_of_conditions_are_not_hundreds_of_traces(run, tmp_path):
    "Notes of photographs may all differ: the commonest keep a look of their own."
    from sage.run import Run
    from sage.viz.embedding import MOST_KINDS, principal_positions
    table = run.table()
    many = Run.create(tmp_path/'many', {}, dict(mined=table.assign(condition=[f'note {i if i % 3 else 0}' for i in range(len(table))])))
    many.write_epoch(0, run.nodes(0), run.edges(0), run.cliques(0), run.descriptors(0))
    fig = embedding_figure(many, 0, 'condition', positions=principal_positions(many, epoch=0))
    assert len(fig.data) == MOST_KINDS + 2 and 'others' in fig.data[MOST_KINDS].name and sum(np.isfinite(t.x).sum() for t in fig.data[:-1]) == len(run.nodes(0))
