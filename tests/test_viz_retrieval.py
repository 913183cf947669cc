"The pictures of answers: against the recorded answers, with names that mean harm, with what is missing or damaged."
import shutil
import numpy as np, pandas as pd, pytest
from sage.core import MissingPath, UserError
from sage.retrieval import positives_within, recall_from_ranks
from sage.answers import Answers, answer_arrays
from sage.run import Run
from sage.viz.graph import show_view
from sage.viz.map import map_html
from sage.viz.retrieval import answer_table, answered_epochs, asked, failure_map, failure_map_figure, failure_view, far, gallery_figure, metres_between, recall_curve, recall_curve_figure
from sage.viz.style import MISSING
from sage.viz.toy import toy_run

EVIL = '"><img src=x onerror=alert(1)></script>'

@pytest.fixture(scope='module')
def run(tmp_path_factory): return toy_run(tmp_path_factory.mktemp('toy')/'run', epochs=2)

def rewrite(run, path, table=None, **changes):
    "A copy of a run whose table, or whose answers of the last epoch, differ."
    shutil.copytree(run.path, path)
    if table is not None: table.to_parquet(path/'tables'/'01.parquet')
    if changes:
        a = run.answers(2)['Otherville']._replace(**changes)
        np.savez(path/'epochs'/'0002'/'answers.npz', **answer_arrays(dict(Otherville=a)))
    return Run(path)

def test_table_against_positions(run):
    t, a = run.table('Otherville'), run.answers(1)['Otherville']
    told = answer_table(run, epoch=1)
    queries, database = (np.flatnonzero(t.role == r) for r in ('query', 'database'))
    positives = positives_within(t.iloc[queries], t.iloc[database])
    for i, row in told.iterrows():
        right = set(database[positives[i]])
        hits = [k + 1 for k, r in enumerate(a.rows[i]) if r in right]
        assert row['rank'] == (hits[0] if hits else 0) and row.positives == len(right) and row.row == queries[i]
        assert row.metres == pytest.approx(np.hypot(*(t[['easting', 'northing']].to_numpy()[row.answer] - t[['easting', 'northing']].to_numpy()[row.row])))
    wrong = answer_table(run, 'Otherville', 1, only_wrong=True)
    assert wrong['query'].tolist() == told[told['rank'] != 1]['query'].tolist() and set(wrong.verdict) <= {'later', 'wrong'}

def test_curve_is_the_logged_recall(run):
    fig = recall_curve_figure(run)
    for e, trace in zip(run.epochs(), fig.data):
        for k, r in run.recalls().query(f'epoch == {e}').set_index('k').recall.items(): assert trace.y[k - 1] == pytest.approx(r)
    assert len({(t.line.color, t.line.dash, t.marker.symbol) for t in fig.data}) == 3

def test_unanswerable_queries_are_left_out(run, tmp_path):
    positives = run.answers(2)['Otherville'].positives.copy(); positives[:100] = 0
    r = rewrite(run, tmp_path/'run', positives=positives)
    told = answer_table(r)
    assert (told.verdict[:100] == 'unanswerable').all() and not answer_table(r, only_wrong=True)['query'].lt(100).any()
    a = r.answers()['Otherville']
    assert recall_curve(a)[0] == pytest.approx(100*a.right[100:, 0].mean())
    assert '100 without' in recall_curve_figure(r).layout.title.text
    assert np.isnan(recall_curve(a._replace(positives=np.zeros(120)))).all()

def test_gallery_frames_say_right_and_wrong_twice(run):
    told = answer_table(run, epoch=0)
    q = int(told[told.verdict == 'later']['query'].iloc[0])
    fig = gallery_figure(run, query=q, epoch=0, k=20)
    right = asked(run, epoch=0).answers.right[q]
    for r, shape, note in zip(right, fig.layout.shapes[1:], fig.layout.annotations[1:]):
        assert (shape.line.dash == 'solid') == r and ('✓' in note.text) == r and ('✗' in note.text) != r
    assert fig.data[0].customdata[0] == told.row[q] and len(fig.data) == 1
    assert [len(gallery_figure(run, query=[1, 2], epoch=[0, 1, 2], k=3).layout.images)] == [24]

def test_map_keeps_its_traces(run):
    one, other = failure_view(run, epoch=0), failure_view(run, epoch=2, query=[3, 9], k=4)
    assert len(one.traces) == len(other.traces) == 9
    for v in (one, other): assert sorted(np.concatenate([t['customdata'] for t in v.traces[1:5]])) == sorted(run.answers(0)['Otherville'].queries)
    assert sum(np.isfinite(t['x']).sum() for t in other.traces[5:7]) == 2*2*4
    fig = failure_map_figure(run, epoch=0)
    look = [t.marker.symbol for t in fig.data]
    show_view(fig, other)
    rows = run.answers(2)['Otherville'].queries
    ringed = failure_view(run, epoch=2, query=[3, 9], images=[int(rows[3]), int(np.setdiff1d(np.arange(200), rows)[0])])           # a chosen query, and an image of the map
    assert len(ringed.traces[8]['x']) == 3 and '2 chosen images ringed' in ringed.title
    assert [t.marker.symbol for t in fig.data] == look and len(fig.data[8].x) == 2 and 'after 2 epochs' in fig.layout.title.text

@pytest.mark.parametrize('call,words', [(lambda r: asked(r, 'Nowhere'), 'Otherville'), (lambda r: asked(r, epoch=7), r'\[0, 1, 2\]'), (lambda r: asked(r, epoch=-4), r'\[0, 1, 2\]'), (lambda r: gallery_figure(r, query=120), 'from 0'), (lambda r: gallery_figure(r, query=-1), 'from 0'), (lambda r: failure_view(r, images=[0, 10**6]), 'no image 1000000'), (lambda r: failure_view(r, images=[-1]), 'no image -1'),
                                        (lambda r: gallery_figure(r, k=0), 'at least one'), (lambda r: gallery_figure(r, query=[]), 'no query'), (lambda r: failure_view(r, query=[0, 999]), 'from 0'), (lambda r: recall_curve_figure(r, 'x'), 'Otherville')])
def test_bad_wishes_name_the_choices(run, call, words):
    with pytest.raises(UserError, match=words): call(run)

def test_runs_without_answers(run, tmp_path):
    shutil.copytree(run.path, tmp_path/'run')
    (tmp_path/'run'/'epochs'/'0001'/'answers.npz').unlink()
    r = Run(tmp_path/'run')
    assert answered_epochs(r) == [0, 2] and len(recall_curve_figure(r).data) == 2
    with pytest.raises(UserError, match=r'no answers of epoch 1; there are those of \[0, 2\]'): asked(r, epoch=1)
    with pytest.raises(MissingPath): r.answers(1)
    for picture in (recall_curve_figure, failure_map_figure, gallery_figure, answer_table):
        with pytest.raises(UserError, match='no epoch has answers yet'): picture(Run.create(tmp_path/f'empty_{picture.__name__}', {}))

def test_answers_of_another_table_are_refused(run, tmp_path):
    with pytest.raises(UserError, match='copy the run again'): asked(rewrite(run, tmp_path/'run', run.table('Otherville')[:50]))

def test_harmful_names_and_missing_pictures(run, tmp_path):
    r = rewrite(run, tmp_path/'run', run.table('Otherville').assign(city=EVIL, condition=EVIL, image=f'/nowhere/{EVIL}.jpg'))
    fig = gallery_figure(r, k=2)
    assert all(i.source == MISSING for i in fig.layout.images)
    for page in (fig.to_html(include_plotlyjs=False), failure_map_figure(r, query=3).to_html(include_plotlyjs=False), map_html(failure_map(r, query=[3]))): assert '<img src=x' not in page and '\\u003cimg src=x' not in page

def test_metres_across_a_zone_border():
    from sage.geo import to_utm
    east, north, zone = zip(*(to_utm(np.array([52.]), np.array([lon]), zone=z) for lon, z in ((11.99994, '32N'), (12.00006, '33N'))))
    t = pd.DataFrame(dict(easting=np.concatenate(east), northing=np.concatenate(north), zone=['32N', '33N'], city='a'))
    assert metres_between(t, [0], [1])[0] == pytest.approx(8.2, abs=.2)
    assert [far(m) for m in (0, 24.6, 25.2, 26.1, 999, 1500, np.nan)] == ['0 m', '24.6 m', '25.2 m', '26 m', '999 m', '1.5 km', 'elsewhere']
