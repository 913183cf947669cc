"""What was only meant to be read never runs: no pickle, names are text in every page, a report asks the network for nothing, paths of a csv stay in their folder."""
import ast, io, os, re, shutil, sys, zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sage.core import UserError
from sage.model import load_official, load_sage
from sage.photos import inside
from sage.run import Run, answer_arrays
from sage.sources import load_checkpoint
from sage.viz.report import write_report
from sage.viz.toy import toy_run

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ('sage', 'tools', 'bench') for p in (ROOT/folder).rglob('*.py')) + [ROOT/'hubconf.py']
EVIL = '<script>window.top.hacked=1</script><img src=x onerror="window.top.hacked=1">{% endraw %}{{7*7}}{% raw %}${7*7}<a href=javascript:hacked=1>'


class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize('name', ['x.pth', 'x.pt', 'x.ckpt', 'x.bin', 'x.safetensors'])
@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_that_wants_to_run(name, zipped, tmp_path):
    torch.save(dict(model_state_dict={'backbone.model.pos_embed': Evil(tmp_path/'ran')}), tmp_path/name, _use_new_zipfile_serialization=zipped)
    for load in (load_official, load_sage, load_checkpoint):
        with pytest.raises(UserError, match=re.escape(name)): load(tmp_path/name)
    assert not (tmp_path/'ran').exists()


def test_arrays_that_want_to_run(tmp_path):
    run = toy_run(tmp_path/'run', epochs=0)
    folder = run.path/'epochs'/'0000'
    np.save(folder/'descriptors.npy', np.array([Evil(tmp_path/'ran')], dtype=object), allow_pickle=True)
    np.savez(folder/'answers.npz', names=np.array([Evil(tmp_path/'ran')], dtype=object))
    for read in (run.descriptors, run.answers):
        with pytest.raises(UserError): read(0)
    assert not (tmp_path/'ran').exists()


def calls(tree, *names): # calls of functions with these dotted ends
    return [c for c in ast.walk(tree) if isinstance(c, ast.Call) and ast.unparse(c.func) in names]


def given(call, name): return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def complaints(path):
    "What of a source could run code that lies in a file."
    tree, out = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name.split('.')[0] for a in node.names] if isinstance(node, ast.Import) else [(node.module or '').split('.')[0]]
            for n in {*names} & {'pickle', 'dill', 'cloudpickle', 'shelve', 'marshal', 'yaml'}:
                used = {ast.unparse(a) for a in ast.walk(tree) if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Name) and a.value.id == n}
                if used != {'pickle.UnpicklingError'}: out.append(f'imports {n} for {used}')            # the name of an error is no loading
    out += [f'line {c.lineno}: np.load may unpickle' for c in calls(tree, 'np.load', 'numpy.load') if given(c, 'allow_pickle') not in (None, 'False')]
    out += [f'line {c.lineno}: torch.load' for c in calls(tree, 'torch.load') if given(c, 'weights_only') != 'True']
    out += [f'line {c.lineno}: {ast.unparse(c.func)}' for c in calls(tree, 'eval', 'exec', 'pd.read_pickle', 'pandas.read_pickle', 'joblib.load', 'os.system')]
    return [f'{path.relative_to(ROOT)} {o}' for o in out if not (path.name == 'mutate.py' and 'exec' in o)]


def test_no_source_unpickles():
    assert np.lib.npyio.NpzFile and len(SOURCES) > 40
    import inspect
    assert inspect.signature(np.load).parameters['allow_pickle'].default is False
    assert sum((complaints(p) for p in SOURCES), []) == []


def test_a_source_that_would_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f'{__name__}.ROOT', tmp_path)
    for text in ('import pickle\npickle.load(f)', 'from pickle import load', 'import numpy as np\nnp.load(f, allow_pickle=True)', 'import torch\ntorch.load(f)', 'torch.load(f, weights_only=False)', 'eval(x)', 'import joblib\njoblib.load(f)'):
        (tmp_path/'x.py').write_text(text)
        assert complaints(tmp_path/'x.py'), text


@pytest.mark.parametrize('name', ['../x.jpg', '/etc/hostname', 'a/../../x.jpg', '..', './../x.jpg', '~/x.jpg', 'a\0b'])
def test_paths_of_a_csv_stay_inside(name, tmp_path):
    (tmp_path/'root').mkdir(); (tmp_path/'x.jpg').write_bytes(b'')
    try: found = inside(tmp_path/'root', [name], 'a.csv')
    except (UserError, ValueError) as e: assert isinstance(e, UserError) or '\0' in name, e
    else: raise AssertionError(found)


# ---- a run of a stranger, in a browser

def evil_run(path):
    "A run in which everything that may hold a name holds one that wants to run."
    run, marked = toy_run(path.with_name('toy'), epochs=1), lambda i: f'{EVIL}{i}'
    tables = {n: run.table(n) for n in run.config['tables']}
    tables = {marked(n): t.assign(city=t.city.map(marked), condition=EVIL, sequence=EVIL, time=EVIL) for n, t in tables.items()}
    for t in tables.values(): t.loc[t.index[::7], 'image'] = f'/nowhere/{EVIL.replace("/", "")}.jpg'
    mined, other = tables.values()
    out = Run.create(path, dict(settings=dict(strategy=EVIL, seed=EVIL, notes=[EVIL]), validation=[marked('Otherville')], model={EVIL: EVIL}), dict(mined=mined, **{marked('Otherville'): other}))
    for e in run.epochs():
        answers = {marked('Otherville'): a for a in run.answers(e).values()}
        nodes = run.nodes(e); nodes['city'] = nodes.city.map(marked); nodes['image'] = nodes.image.where(np.arange(len(nodes)) % 5 > 0, EVIL)
        cliques = run.cliques(e); cliques['city'] = cliques.city.map(marked) if 'city' in cliques else EVIL
        attention = run.attention(e) if (run.path/'epochs'/f'{e:04d}'/'attention.npz').exists() else None
        if attention: attention['images'] = np.array([f'/nowhere/{EVIL.replace("/", "")}{i}' for i in range(len(attention['images']))])
        out.write_epoch(e, nodes, run.edges(e), cliques, run.descriptors(e), attention, answers)
    for row in run.metrics('').to_dict('records'): out.log(**{marked(k.split('/')[0]) + '/' + k.split('/', 1)[1] if '/recall@' in k else k: v for k, v in row.items()})
    return out


@contextmanager
def chromium():
    "(a browser, playwright); the test is skipped where there is none."
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    program = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not program: pytest.skip('no chromium on the path')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=['--no-sandbox'])
        yield browser
        browser.close()


INJECTED = "[...document.querySelectorAll('img, a')].filter(e => e.getAttribute('src') == 'x' || (e.getAttribute('href') || '').startsWith('javascript')).length"

def ran(page):
    "Whether a name became more than text, in the page or in a frame of it."
    return any(f.evaluate('window.hacked') or f.evaluate(INJECTED) for f in page.frames)


def visit(browser, path):
    "Open a page of this disk; (page, what it asked a network for, what it said in a dialogue)."
    asked, said, page = [], [], browser.new_page()
    page.on('request', lambda r: asked.append(r.url) if not r.url.startswith(('data:', 'blob:', 'about:', path.as_uri())) else None)
    page.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
    page.goto(path.as_uri(), timeout=120_000); page.wait_for_timeout(1500)
    return page, asked, said


def hover_plots(page, most):
    for plot in page.locator('.js-plotly-plot .nsewdrag').locator('visible=true').all()[:most]:
        box = plot.bounding_box()
        if box: page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)


def open_popups(page, most):
    for frame in page.frames:
        frame.evaluate("most => [...document.querySelectorAll('.leaflet-interactive')].slice(0, most).forEach(e => e.dispatchEvent(new MouseEvent('click', {bubbles: true})))", most)


@pytest.mark.browser
def test_a_hostile_report_is_only_shown(tmp_path):
    page_file = write_report(evil_run(tmp_path/'run'), tmp_path/'r.html')
    with chromium() as browser:
        page, asked, said = visit(browser, page_file)
        page.evaluate("for (const f of document.querySelectorAll('.figure')) f.scrollIntoView()"); page.wait_for_timeout(500)
        hover_plots(page, 12); open_popups(page, 8)
        page.wait_for_timeout(300)
        assert not ran(page) and said == [] and asked == []
        text = page.inner_text('body')
    assert '<script>window.top.hacked=1</script>' in text and '{{7*7}}' in text and '49' not in re.findall(r'(?<=onerror="window.top.hacked=1">).{2}', text)


@pytest.mark.browser
def test_a_hostile_answer_is_only_shown(tmp_path, capsys):
    "The page of sage_where: names of the photographs, of the map's photographs and of its places."
    from PIL import Image
    from sage import cli
    name = EVIL.replace('/', '∕')[:120]
    pictures = tmp_path/'map'/EVIL.replace('/', '∕')[:60]
    pictures.mkdir(parents=True)
    for i in range(4): Image.new('RGB', (64, 48), (40*i, 90, 120)).save(pictures/f'{name}{i}.jpg')
    rows = pd.DataFrame(dict(path=[f'{pictures.name}/{name}{i}.jpg' for i in range(4)], lat=55.7 + 1e-3*np.arange(4), lon=13.2, place=[EVIL + str(i) for i in range(4)], time=EVIL))
    rows.to_csv(tmp_path/'map'/'where.csv', index=False)
    shutil.copy(pictures/f'{name}1.jpg', tmp_path/f'{name}.jpg')
    cli.sage_where([str(tmp_path/f'{name}.jpg'), '--map', str(tmp_path/'map'), '--page', str(tmp_path/'a.html'), '--size', '56'])
    with chromium() as browser:
        page, asked, said = visit(browser, tmp_path/'a.html')
        page.evaluate('window.hacked = undefined')
        open_popups(page, 12); page.wait_for_timeout(300)
        assert page.locator('.leaflet-container').count() and not ran(page) and said == [] and asked == []
        assert '<script>window.top.hacked=1<' in page.inner_text('body') and '{{7*7}}' in page.inner_text('body')


@pytest.mark.browser
def test_a_hostile_run_in_a_notebook_is_only_shown(tmp_path):
    "The workbench and the run's tables in JupyterLab: every page of it, its hovers, the map's popups."
    pytest.importorskip('jupyterlab'); pytest.importorskip('playwright.sync_api')
    sys.path.insert(0, str(ROOT/'tests'))
    from test_browser import Desk, lab, notebook
    run = evil_run(tmp_path/'run')
    (tmp_path/'lab').mkdir()
    notebook(tmp_path/'lab'/'work.ipynb', f'from sage.workbench import Workbench\nbench = Workbench({str(run.path)!r})\nbench', 'bench.run.table().head(3)', 'bench.run.nodes(1).head(3)', 'bench.run.answers(1)')
    with chromium() as browser, lab(tmp_path/'lab') as url:
        d, said = Desk(browser, url), []
        d.page.on('dialog', lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        d.open('work.ipynb'); d.run_all()
        d.until(lambda: 'after 1 epoch' in d.title(), 300)
        for name in [t.strip() for t in d.page.locator('.jupyter-widgets .lm-TabBar-tab').all_text_contents()]:
            d.tab(name); d.page.wait_for_timeout(2500)
            hover_plots(d.page, 3); open_popups(d.page, 4)
            assert not ran(d.page), name
        text = d.page.inner_text('body')
        assert said == [] and d.asked == [] and not d.cell_errors()
    assert '<script>window.top.hacked=1</script>' in text and '{{7*7}}' in text
