"The report: one file, no request, under 15 MB, and what it says of runs that are young, old, large or hostile."
import json, re, shutil, subprocess, sys

import numpy as np
import pandas as pd
import pytest

from sage.core import UserError
from sage.run import Run
from sage.viz.report import LIMIT, faces_html, figure_html, report_html, sections, some_epochs, telling_place, telling_queries, write_report
from sage.viz.toy import toy_run

@pytest.fixture(scope='module')
def run(tmp_path_factory): return toy_run(tmp_path_factory.mktemp('report')/'run', epochs=2)

@pytest.fixture(scope='module')
def page(run): return report_html(run)

def without_scripts(page): return re.sub(r'<script.*?</script>|<style.*?</style>|srcdoc="[^"]*"', '', page, flags=re.S)

def test_has_every_section(run, page):
    titles = [s.title for s in sections(run)]
    assert titles == ['Recall', 'Training', 'The graph', 'One place', 'Batches on the map', 'A clique, step by step', 'Attention', 'Embedding', 'Answers: Otherville', 'Settings']
    assert all(f'>{t}</h2>' in page for t in titles)
    assert page.count('class="figure"') >= 10 and page.count('<iframe') == 1

def test_under_the_limit(page): assert len(page.encode()) < LIMIT

def test_asks_for_nothing(page):
    markup = without_scripts(page)
    assert not re.search(r'(?:src|href)\s*=\s*["\'](?!data:|#)', markup)
    assert not re.search(r'url\((?!["\']?data:)', page.split('</style>')[0])
    assert 'cdn.plot.ly' not in markup and 'tile.openstreetmap' not in markup

def test_figures_are_json_that_cannot_end_its_script(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.S)
    assert len(found) >= 10
    for text in found: assert '<' not in text and {'data', 'layout', 'config'} <= set(json.loads(text))

def test_the_mouse_finds_a_picture_of_every_place_and_image(run, page):
    told = lambda text: json.loads(re.search(r'id="faces">(.*?)</script>', text)[1])
    known = {'places': len(run.nodes()), 'images of Otherville': len(run.table('Otherville'))}
    assert {name: len(pictures) for name, pictures in told(page).items()} == known and all(p.startswith('data:image/') for p in told(page)['places'])
    asking = [json.loads(text)['layout'].get('meta') for text in re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.S)]
    assert sorted(a for a in asking if a) == ['images of Otherville', 'places', 'places']
    assert told(faces_html(run, 10**8, known['places'])).keys() == {'places'} and told(faces_html(run, 100)) == {}

def test_recalls_are_those_of_the_run(run, page):
    last = run.recalls().query('epoch == 2 and k == 1').recall.iloc[-1]
    assert f'<td>after epoch 2</td><td>{last:.1f}</td>' in page

def test_an_empty_run_says_so(tmp_path):
    text = report_html(Run.create(tmp_path/'new', dict(settings=dict(seed=1))))
    assert 'no epoch is complete yet' in text and 'no recall was measured yet' in text and 'settings: seed' in text

def test_an_old_run_without_answers(run, tmp_path):
    path = tmp_path/'old'
    shutil.copytree(run.path, path)
    for f in path.glob('epochs/*/answers.npz'): f.unlink()
    text = report_html(Run(path))
    assert 'no epoch has answers yet' in text and text.count('class="figure"') >= 6

def test_hostile_names_are_text(tmp_path):
    run = toy_run(tmp_path/'"><img src=x onerror=alert(1)>', epochs=0)
    assert 'onerror=alert(1)>' not in report_html(run)

def test_too_big_is_left_out(run):
    text = report_html(run, 5_300_000)
    assert len(text.encode()) < 5_300_000 and 'is left out' in text and 'settings: seed' in text

def test_a_slider_of_few_epochs(run):
    assert some_epochs(run) == [0, 1, 2] and some_epochs(run, 2*len(run.nodes())) == [0, 2]

def test_telling_place_has_the_most_changes(run):
    e = run.edges(2).query('state != "kept"')
    n = np.bincount(np.r_[e.src, e.dst])
    assert n[telling_place(run, 2)] == n.max() > 0

def test_telling_queries_are_four(run): assert len(set(telling_queries(run, 'Otherville'))) == 4

def test_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    import sage.viz.report as report
    path = write_report(run, tmp_path/'a'/'r.html')
    before = path.read_bytes()
    def fails(run): raise UserError('no')
    monkeypatch.setattr(report, 'report_html', fails)
    with pytest.raises(UserError): write_report(run, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ['r.html']

def sage_report(*args, cwd=None):
    return subprocess.run([sys.executable, '-m', 'sage.cli_report', *map(str, args)], capture_output=True, text=True, cwd=cwd)

def test_command(run, tmp_path, root, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(root))
    done = sage_report(run.path, '-o', tmp_path/'r.html')
    assert done.returncode == 0 and 'written: ' in done.stdout and (tmp_path/'r.html').stat().st_size < LIMIT, done.stderr

@pytest.mark.parametrize('args,said', [(('/no/such/run',), '/no/such/run'), ((), 'run'), (('{tmp}',), 'config.json'), (('{run}', '-o', '{tmp}'), 'is a folder'), (('{run}', '-o', '{run}/metrics.jsonl'), 'page of HTML')])
def test_command_refuses(run, tmp_path, root, monkeypatch, args, said):
    from sage.cli_report import sage_report
    from sage.command import said as complaint
    text, code = complaint(sage_report, *(a.format(tmp=tmp_path, run=run.path) for a in args))
    assert code == 2 and said.lower() in text.lower() and len(text.splitlines()) == 1


@pytest.mark.parametrize('change', [lambda n: n.drop(columns='city'), lambda n: n.drop(columns='easting'), lambda n: n.drop(columns='image'), lambda n: n.assign(seed_score='x'), lambda n: n.assign(easting='x'), lambda n: n[:0]])
def test_a_record_of_another_shape_is_a_page_or_one_sentence(tmp_path, change):
    "Tables that are whole parquet files and hold something else."
    run = toy_run(tmp_path/'run', epochs=1)
    for e in (0, 1):
        path = run.path/'epochs'/f'{e:04d}'/'nodes.parquet'
        change(pd.read_parquet(path)).to_parquet(path)
    try: page = write_report(run, tmp_path/'r.html').read_text()
    except UserError as e: assert str(run.path) in str(e) and '\n' not in str(e); return
    assert 'cannot be drawn from what the run recorded' in page or 'class="absent"' in page


def test_a_validation_set_that_is_not_there(run, tmp_path):
    "A name without a table costs its own pictures, not the report."
    shutil.copytree(run.path, tmp_path/'run')
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    (tmp_path/'run'/'config.json').write_text(json.dumps(config | dict(validation=['Otherville', 'nowhere'])))
    page = write_report(Run(tmp_path/'run'), tmp_path/'r.html').read_text()
    assert "no answers of a table &#39;nowhere&#39;" in page and page.count('class="figure"') >= 10
    assert {*json.loads(re.search(r'id="faces">(.*?)</script>', page)[1])} == {'places', 'images of Otherville'}

@pytest.mark.parametrize('column, value', [('image', None), ('image', 7), ('image', 7.5), ('role', ...), ('city', ...), ('easting', 'x')])
def test_a_table_that_is_another_costs_its_own_pictures(run, tmp_path, column, value):
    shutil.copytree(run.path, tmp_path/'run')
    path = tmp_path/'run'/'tables'/'01.parquet'
    df = pd.read_parquet(path)
    (df.drop(columns=column) if value is ... else df.assign(**{column: value})).to_parquet(path)
    page = write_report(Run(tmp_path/'run'), tmp_path/'r.html').read_text()
    assert '01.parquet: ' in page and page.count('class="figure"') >= 5
