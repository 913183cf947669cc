"""What was only meant to be read never runs: no pickle, names are text in every page, a report asks the network for nothing, paths of a csv stay in their folder."""
import ast, json, os, re, shutil, sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sage.core import UserError
from sage.model import load_official, load_sage
from sage.photos import inside
from sage.lines import read_lines
from sage.run import Run
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


ALLOWED = {'mutate.py': 'exec', 'aside.py': 'ForkingPickler.loads'}        # mutants of our own sources; what one of our processes sends another over a pipe that nobody else has

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
    out += [f'line {c.lineno}: {ast.unparse(c.func)}' for c in calls(tree, 'eval', 'exec', 'pd.read_pickle', 'pandas.read_pickle', 'joblib.load', 'os.system') + [c for c in ast.walk(tree) if isinstance(c, ast.Call) and ast.unparse(c.func).endswith('Pickler.loads')]]
    return [f'{path.relative_to(ROOT)} {o}' for o in out if not any(path.name == name and what in o for name, what in ALLOWED.items())]


def test_no_source_unpickles():
    assert np.lib.npyio.NpzFile and len(SOURCES) > 40
    import inspect
    assert inspect.signature(np.load).parameters['allow_pickle'].default is False
    assert sum((complaints(p) for p in SOURCES), []) == []


def test_a_source_that_would_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f'{__name__}.ROOT', tmp_path)
    for text in ('import pickle\npickle.load(f)', 'from pickle import load', 'import numpy as np\nnp.load(f, allow_pickle=True)', 'import torch\ntorch.load(f)', 'torch.load(f, weights_only=False)', 'eval(x)', 'import joblib\njoblib.load(f)', 'ForkingPickler.loads(b)'):
        (tmp_path/'x.py').write_text(text)
        assert complaints(tmp_path/'x.py'), text


@pytest.mark.parametrize('name', ['../x.jpg', '/etc/hostname', 'a/../../x.jpg', '..', './../x.jpg', '~/x.jpg', 'a\0b'])
def test_paths_of_a_csv_stay_inside(name, tmp_path):
    (tmp_path/'root').mkdir(); (tmp_path/'x.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='a.csv'): inside(tmp_path/'root', [name], 'a.csv')


# ---- a run of a stranger, in a browser

def evil_run(path):
    "A run in which everything that may hold a name holds one that wants to run."
    run, marked, g = toy_run(path.with_name('toy'), epochs=1), lambda i: f'{EVIL}{i}', np.random.default_rng(0)
    tables = {n: run.table(n) for n in run.config['tables']}
    tables = {marked(n): t.assign(city=t.city.map(marked), condition=EVIL, sequence=EVIL, time=EVIL) for n, t in tables.items()}
    seen = shutil.copy(tables[marked('mined')].image.iloc[0], path.with_name(EVIL.replace('/', '∕') + '.jpg'))            # a picture that is there
    for t in tables.values(): t.loc[t.index[::7], 'image'] = f'/nowhere/{EVIL.replace("/", "")}.jpg'
    mined, other = tables.values()
    out = Run.create(path, dict(settings=dict(strategy=EVIL, seed=EVIL, notes=[EVIL]), validation=[marked('Otherville')], model={EVIL: EVIL}), dict(mined=mined, **{marked('Otherville'): other}))
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    for e in run.epochs():
        answers = {marked('Otherville'): a for a in run.answers(e).values()}
        nodes = run.nodes(e); nodes['city'] = nodes.city.map(marked); nodes['image'] = nodes.image.where(np.arange(len(nodes)) % 5 > 0, EVIL)
        cliques = run.cliques(e); cliques['city'] = cliques.city.map(marked) if 'city' in cliques else EVIL
        attention = dict(beta=.5*g.random((4, 24)), norms=9 + g.random((4, 24)), probes=g.dirichlet(np.full(24, .3 + e), (4, 16)), dpn=g.random((4, 4)), exponent=g.random(4), descriptors=unit(g.random((4, 256 + 16*128))), grid=np.array([4, 6]), rows=np.arange(4), images=np.array([str(seen)]*4))
        out.write_epoch(e, nodes, run.edges(e), cliques, run.descriptors(e), attention, answers)
    for row in read_lines(run.path/'metrics.jsonl'): out.log(**{marked(k.split('/')[0]) + '/' + k.split('/', 1)[1] if '/recall@' in k else k: v for k, v in row.items()})
    assert len(out.recalls()) and set(out.recalls().table) == {marked('Otherville')}
    return out


def test_a_loss_of_text_is_in_no_picture(tmp_path):
    "A figure takes what it plots as it is, so a metric that is no number goes no further than its line."
    from sage.viz.training import training_figure
    run = toy_run(tmp_path/'run', epochs=1)
    rows = read_lines(run.path/'metrics.jsonl')
    (run.path/'metrics.jsonl').write_text(''.join(json.dumps(r | dict(loss='<a href="https://evil.example">click</a>')) + '\n' for r in rows))
    with pytest.raises(UserError, match='line 1: its loss is no number'): training_figure(run)
    assert 'evil.example' not in write_report(run, tmp_path/'r.html').read_text()


def test_a_name_does_not_steer_the_terminal(tmp_path, capsys):
    "Names of tables and of what was measured come out of a run's files."
    from dataclasses import asdict
    from sage import cli
    from sage.settings import Settings
    run = toy_run(tmp_path/'run', epochs=1)
    steers = '\x1b[2J\x1b]0;owned\x07'
    config = json.loads((run.path/'config.json').read_text())
    (run.path/'config.json').write_text(json.dumps(config | dict(tables={'mined': '00.parquet', steers: '01.parquet'}, settings=asdict(Settings(backbone='sage_nano', image_size=56, eval_size=56)))))
    with pytest.raises(SystemExit): cli.sage_train(['--resume', '--run', str(run.path), '--quiet'])
    said = ''.join(capsys.readouterr())
    run.log(epoch=2, **{f'{steers}/recall@1': 5.})
    said += cli.recall_table(run).to_string(index=False)
    assert r'\x1b[2J\x1b]0;owned\x07' in said and '\x1b' not in said and '\x07' not in said


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


INJECTED = "[...document.querySelectorAll('img, a')].filter(e => e.getAttribute('src') == 'x' || [e.getAttribute('href'), e.getAttribute('xlink:href')].some(h => (h || '').startsWith('javascript'))).length"

def ran(page):
    "Whether a name became more than text, in the page or in a frame of it."
    return any(f.evaluate('window.hacked') or f.evaluate(INJECTED) for f in page.frames)


def visit(browser, path):
    "Open a page of this disk; (page, what it asked a network for, what it said in a dialogue)."
    asked, said, page = [], [], browser.new_page(viewport=dict(width=1280, height=1200))
    page.on('request', lambda r: asked.append(r.url) if not r.url.startswith(('data:', 'blob:', 'about:', path.as_uri())) else None)
    page.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
    page.goto(path.as_uri(), timeout=120_000); page.wait_for_timeout(1500)
    return page, asked, said


SPOTS = """(d, most) => {const box = d.getBoundingClientRect(), out = [];              // where on the screen points of each trace are, the middle one first
    for (const t of d._fullData || []) {
        const x = d._fullLayout['xaxis' + (t.xaxis || '').slice(1)], y = d._fullLayout['yaxis' + (t.yaxis || '').slice(1)], n = t.y ? (t.x || []).length : 0;
        if (!x || !y || !x.d2p || t.visible !== true || t.hoverinfo === 'skip') continue;
        if (t.z) out.push([box.left + x._offset + .4*x._length, box.top + y._offset + .4*y._length]);
        for (let i = 0, found = 0; i < Math.min(n, 60) && found < most; i++) {
            const k = (Math.floor(n/2) + i) % n, a = x.d2p(t.x[k]), b = y.d2p(t.y[k]), at = [box.left + x._offset + a, box.top + y._offset + b];
            if (a >= 0 && a <= x._length && b >= 0 && b <= y._length && at[0] > 0 && at[0] < innerWidth && at[1] > 0 && at[1] < innerHeight) {out.push(at); found++;}
        }
    } return out;}"""

def shown(page, at, labels, wait):
    "What labels say with the mouse here; they come after a moment, or not at all."
    page.mouse.move(at[0] + 1, at[1] + 1); page.mouse.move(*at)
    for _ in range(wait // 50):
        page.wait_for_timeout(50)
        if said := labels(): return said
    return []


def hover_plots(page, plots, most=1):
    "What the labels said with the mouse on points of each trace, one list for each plot; each is looked at until it is drawn."
    out = []
    for plot in plots:
        plot.scroll_into_view_if_needed()
        drawn = plot if 'js-plotly-plot' in plot.get_attribute('class') else plot.locator('.js-plotly-plot').first
        drawn.locator('.main-svg').first.wait_for(state='attached', timeout=60_000)
        drawn.evaluate("d => d.scrollIntoView({block: 'center'})"); page.wait_for_timeout(600)
        for wait in (600, 3000):                                                        # longer where the machine is slow
            if said := sum((shown(page, at, lambda: drawn.locator('.hovertext').all_text_contents(), wait) for at in drawn.evaluate(SPOTS, most)), []): break
        out.append(said)
    return out


TIPPED = """most => {const map = Object.values(window).find(v => window.L && v instanceof L.Map), out = []; if (!map) return out;
    if (window.sageBounds) map.fitBounds(window.sageBounds, {padding: [120, 120], animate: false});                     // a name that is too long may lead the page to a wrong view of its own
    const size = map.getSize(), kinds = {}; map.eachLayer(l => {const p = ((l.feature || {}).properties || {}), kind = ('tip' in p) + 2*('card' in p) + (l._path || l._icon ? 8 : 16);
        if (!l.getLatLng || !('tip' in p)) return; const at = map.latLngToContainerPoint(l.getLatLng());
        if (at.x < 80 || at.y < 80 || at.x > size.x - 80 || at.y > size.y - 80) return;
        const [above] = document.elementsFromPoint(at.x, at.y); if (above !== l._icon && !(l._icon || {contains: () => false}).contains(above) && above.tagName !== 'CANVAS') return;
        kinds[kind] = (kinds[kind] || 0) + 1; if (kinds[kind] <= most) out.push([at.x, at.y]);}); return out;}"""      # where things that have a tip are, of each kind of them, and nothing above

def visit_maps(page, most=3):
    "What the tips and the popups of every map said, (tips, popups); with the mouse, as a reader would."
    tips, cards = [], []
    for frame in page.frames:
        where = (0, 0)
        if frame is not page.main_frame:
            if not (element := frame.frame_element()).is_visible(): continue                     # of another tab
            element.scroll_into_view_if_needed(); page.wait_for_timeout(300)
            box = element.bounding_box()
            frame.wait_for_load_state()
            where = box['x'], box['y']
        for i in range(4*most):                                                      # a popup moves the map
            if i >= len(spots := frame.evaluate(TIPPED, most)): break
            at = where[0] + spots[i][0], where[1] + spots[i][1]
            tips += shown(page, at, lambda: frame.locator('.leaflet-tooltip').all_text_contents(), 600)
            page.mouse.click(*at); page.wait_for_timeout(400)
            cards += frame.locator('.leaflet-popup-content').all_text_contents()
            page.keyboard.press('Escape'); page.wait_for_timeout(300)
    return tips, cards


TEXT = '<script>window.top.hacked=1</script>'

def check_labels(labels, least):
    "Plotly makes a part of a label of what looks like its own tags and leaves others out: a name that is all there was escaped."
    assert all(TEXT in t and '{{7*7}}' in t for t in sum(labels, []) if re.search('Toytown|Otherville', t)), labels
    assert sum(any(TEXT in t for t in plot) for plot in labels) >= least, labels


@pytest.mark.browser
def test_a_hostile_report_is_only_shown(tmp_path):
    page_file = write_report(evil_run(tmp_path/'run'), tmp_path/'r.html')
    with chromium() as browser:
        page, asked, said = visit(browser, page_file)
        assert page.locator('.absent').all_text_contents() == [], 'every chapter is drawn'
        labels, (tips, cards) = hover_plots(page, page.locator('.figure').all()), visit_maps(page)
        assert not ran(page) and said == [] and asked == []
        text = page.inner_text('body')
    assert TEXT in text and '{{7*7}}' in text and '49' not in re.findall(r'(?<=onerror="window.top.hacked=1">).{2}', text)
    check_labels(labels, 6)
    assert len(labels) > 10 and all(labels)
    for found in (tips, cards): assert len(found) > 2 and all(TEXT in t and '{{7*7}}' in t for t in found), found


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
        tips, cards = visit_maps(page)
        assert not ran(page) and said == [] and asked == []
        assert name in page.inner_text('body')
    assert tips and cards and all(name in c for c in cards), (tips, cards)


@pytest.mark.browser
def test_a_hostile_run_in_a_notebook_is_only_shown(tmp_path):
    "The workbench and the run's tables in JupyterLab: every page of it, its hovers, the map's popups."
    pytest.importorskip('jupyterlab'); pytest.importorskip('playwright.sync_api')
    sys.path.insert(0, str(ROOT/'tests'))
    from test_browser import Desk, lab, notebook
    run, labels, tips, cards = evil_run(tmp_path/'run'), {}, [], []
    (tmp_path/'lab').mkdir()
    notebook(tmp_path/'lab'/'work.ipynb', f'from sage.workbench import Workbench\nbench = Workbench({str(run.path)!r})\nbench', 'bench.run.table().head(3)', 'bench.run.nodes(1).head(3)', 'bench.run.answers(1)')
    with chromium() as browser, lab(tmp_path/'lab') as url:
        d, said = Desk(browser, url, (1440, 1200)), []
        d.page.on('dialog', lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        d.open('work.ipynb'); d.run_all()
        d.until(lambda: 'after 1 epoch' in d.title(), 300)
        for name in [t.strip() for t in d.page.locator('.jupyter-widgets .lm-TabBar-tab').all_text_contents()]:
            d.tab(name); d.page.wait_for_timeout(2500)
            labels[name] = hover_plots(d.page, d.page.locator('.js-plotly-plot').locator('visible=true').all())
            for found, more in zip((tips, cards), visit_maps(d.page)): found += more
            assert not ran(d.page), name
        text = d.page.inner_text('body')
        assert said == [] and d.asked == [] and not d.cell_errors()
    assert TEXT in text and '{{7*7}}' in text
    assert all(map(all, labels.values())) and {n for n, plots in labels.items() if any(TEXT in t for t in sum(plots, []))} >= {'Graph', 'Embedding', 'Retrieval', 'Training'}, labels
    check_labels(sum(labels.values(), []), 5)
    for found in (tips, cards): assert len(found) > 2 and all(TEXT in t and '{{7*7}}' in t for t in found), found
