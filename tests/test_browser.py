"""The workbench in JupyterLab in a real browser without a network: what is drawn, what clicks do, and that a training is watched live."""
import io, json, os, re, shutil, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed; pip install playwright runs the browser tests')
pytest.importorskip('jupyterlab', reason='jupyterlab is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason='no chromium on the path; apt-get install chromium runs the browser tests')]

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 90                                                                           # seconds for anything that must happen; waiting costs nothing when all is well
QUIET = {'@jupyterlab/apputils-extension:notification': {'fetchNews': 'false', 'checkForUpdates': False, 'doNotDisturbMode': True}}
DEAF = 'Failed to initialize model'       # what anywidget says of a widget that took more than two seconds to begin; ours need nothing of what such a one misses
STARTED = 'window.jupyterapp && window.jupyterapp.restored'
IDLE = "() => {const w = window.jupyterapp.shell.currentWidget, k = w && w.sessionContext && w.sessionContext.session && w.sessionContext.session.kernel; return !!k && k.status === 'idle'}"
INK = """() => {let n = 0; for (const c of document.querySelectorAll('.sage-plot .gl-canvas-context, .sage-plot .gl-canvas-focus')) {
    if (!c.width || !c.offsetParent) continue; const d = document.createElement('canvas'); d.width = c.width; d.height = c.height; const x = d.getContext('2d'); x.drawImage(c, 0, 0);
    const p = x.getImageData(0, 0, c.width, c.height).data; for (let i = 3; i < p.length; i += 4) n += p[i] > 0;} return n}"""      # pixels that WebGL has drawn

def notebook(path, *cells):
    "A notebook of code cells."
    cell = lambda i, text: dict(cell_type='code', id=f'c{i}', execution_count=None, metadata={}, outputs=[], source=text)
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), cells=[cell(i, c) for i, c in enumerate(cells)])))

@contextmanager
def lab(folder):
    "JupyterLab on a free port with settings of its own; yields its address."
    names = 'JUPYTER_CONFIG_DIR JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR JUPYTER_RUNTIME_DIR JUPYTER_DATA_DIR IPYTHONDIR'.split()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'IN_TEST': '', 'PYTHONWARNINGS': 'ignore', **{n: str(folder/'jupyter'/n.lower()) for n in names}}
    env.pop('MPLBACKEND', None)                                                         # figures belong into the page
    for n in names: Path(env[n]).mkdir(parents=True, exist_ok=True)
    (Path(env['JUPYTER_CONFIG_DIR'])/'labconfig').mkdir()
    (Path(env['JUPYTER_CONFIG_DIR'])/'labconfig'/'default_setting_overrides.json').write_text(json.dumps(QUIET))
    log = open(folder/'lab.log', 'w')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port=0', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.disable_check_xsrf=True', '--expose-app-in-browser',
                               f'--ServerApp.root_dir={folder}'], env=env, stdout=log, stderr=log, cwd=folder)
    try: yield address(server, Path(env['JUPYTER_RUNTIME_DIR']), folder/'lab.log')
    finally:
        server.terminate()
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()
        log.close()

def address(server, runtime, log, seconds=PATIENCE):
    "Where the server answers."
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        for f in runtime.glob('jpserver-*.json'):
            try:
                url = json.loads(f.read_text())['url']
                urllib.request.urlopen(url + 'api', timeout=5).read()
                return url
            except (OSError, ValueError): pass
        time.sleep(.1)
    raise RuntimeError(f'JupyterLab did not start: {log.read_text()[-2000:]}')

class Desk:
    "A page of JupyterLab with a notebook open; what went wrong in the browser is kept."
    def __init__(self, browser, url, size=(1440, 900)):
        self.context, self.url = browser.new_context(viewport=dict(width=size[0], height=size[1])), url
        self.context.set_default_timeout(1000*PATIENCE)
        self.asked, self.errors, self.heavy, self.deaf = [], [], [], []
        self.context.route('**/*', self.gate)
        self.page = self.context.new_page()
        self.page.on('console', lambda m: self.wrong(m.text) if m.type == 'error' else None)
        self.page.on('pageerror', lambda e: self.wrong(str(e)))
        self.page.on('websocket', lambda w: w.on('framereceived', lambda data: self.heavy.append(len(data)) if len(data) > 3_000_000 else None))

    def wrong(self, text): (self.deaf if DEAF in text else self.errors).append(text)

    def gate(self, route): # nothing but this machine
        if route.request.url.startswith((self.url, self.url.replace('http', 'ws', 1), 'data:', 'blob:', 'about:')): return route.continue_()
        self.asked.append(route.request.url)
        route.abort()

    def open(self, name):
        self.page.goto(f'{self.url}lab/workspaces/{Path(name).stem}/tree/{name}')                # a desk of its own: nothing another page has left open
        self.page.wait_for_function(STARTED)
        self.page.evaluate('async () => {await window.jupyterapp.restored; window.jupyterapp.shell.collapseLeft();}')
        self.page.wait_for_selector('.jp-NotebookPanel .jp-Cell')
        self.page.wait_for_function(IDLE)

    def command(self, name, args=None): return self.page.evaluate('([n, a]) => {window.jupyterapp.commands.execute(n, a); return null}', [name, args or {}])
    def run_all(self): self.command('notebook:run-all-cells')
    def theme(self, name): self.page.evaluate("async n => {await window.jupyterapp.commands.execute('apputils:change-theme', {theme: n})}", name)
    def tab(self, name): self.page.locator('.jupyter-widgets .lm-TabBar-tab', has_text=name).first.click()

    def title(self, n=0): # of the n-th plot that is seen
        return self.page.evaluate("n => {const p = [...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent && d.layout); return p[n] ? p[n].layout.title.text : ''}", n)

    def until(self, what, seconds=PATIENCE):
        "Wait for a function to be true; what it last said otherwise."
        end = time.monotonic() + seconds
        while not (said := what()):
            status = self.page.locator('.sage-status').all_text_contents()
            assert time.monotonic() < end, f'not within {seconds} s; the workbench says {status}, the first plot is called {self.title()!r}, errors: {self.errors}'
            self.page.wait_for_timeout(50)
        return said

    def tried(self, do, what, every=10):
        "Do it, and again every few seconds: a figure that is just being drawn anew hears no mouse."
        when = None
        def done():
            nonlocal when
            if when is None or time.monotonic() - when > every: do(); when = time.monotonic()
            return what()
        return self.until(done)

    def kernel(self, code): # run behind the notebook's back
        self.page.evaluate("async code => {await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}).done; return null}", code)

    def cell_errors(self): return self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"], .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').all_text_contents()

# ---------------------------------------------------------------- what the tests share

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture(scope='module')
def desk(browser, tmp_path_factory):
    "One JupyterLab for all tests, on a run that is made up but for its attention maps."
    folder = tmp_path_factory.mktemp('lab')
    finished = made_up(folder/'finished')
    waiting = [finished.path/'epochs'/f'{e:04d}' for e in (2, 3)]
    for p in waiting: p.rename(folder/p.name)
    for name in ('work', 'slow'): notebook(folder/f'{name}.ipynb', f'from sage.workbench import Workbench\nbench = Workbench({str(finished.path)!r})\nbench', 'import time\nbench.state.epoch')
    with lab(folder) as url:
        d = Desk(browser, url)
        d.folder, d.run, d.waiting = folder, finished, waiting
        d.open('work.ipynb')
        d.run_all()
        d.until(lambda: 'after 1 epoch' in d.title(), 2*PATIENCE)
        yield d

def made_up(path):
    "A toy run of three epochs, with attention maps such as a training records."
    import numpy as np
    from sage.viz.toy import toy_run
    run, g = toy_run(path, epochs=3), np.random.default_rng(0)
    table, answers = run.table('Otherville'), run.answers(3)['Otherville']
    rows = np.array([r for q in (0, 9) for r in (answers.queries[q], answers.rows[q, 0])])
    for e in run.epochs():
        maps, unit = g.dirichlet(np.full(24, .3 + e), (4, 16)), lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
        arrays = dict(beta=.5*g.random((4, 24)), norms=9 + g.random((4, 24)), probes=maps, dpn=g.random((4, 4)), exponent=g.random(4), descriptors=unit(g.random((4, 256 + 16*128))), grid=np.array([4, 6]), rows=rows, images=table.image.iloc[rows].to_numpy(dtype=str))
        np.savez(run.path/'epochs'/f'{e:04d}'/'attention.npz', **{k: v.astype(np.float32) if v.dtype == float else v for k, v in arrays.items()})
    return run

SPOT = """n => {const d = [...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[0], t = d._fullData.find(t => t.name === 'place'), a = d._fullLayout, r = d.getBoundingClientRect(), i = Math.floor(t.x.length*n);
    return [r.left + a.xaxis._offset + a.xaxis.d2p(t.x[i]), r.top + a.yaxis._offset + a.yaxis.d2p(t.y[i])]}"""      # where on the screen the middle node is

def colours(png): # how many there are in a screenshot
    from PIL import Image
    picture = Image.open(io.BytesIO(png)).convert('RGB')
    return len(picture.getcolors(picture.width*picture.height))

def slide(d, kind, text, value): # move a slider by its keys
    s = d.page.locator(f'.widget-hslider:has-text("{text}") .noUi-handle').locator('visible=true').first
    now, end = lambda: int(d.page.locator(f'.widget-hslider:has-text("{text}") .widget-readout').locator('visible=true').first.text_content()), time.monotonic() + PATIENCE
    while (was := now()) != value:
        assert time.monotonic() < end, f'the slider of the {text} is at {was}, not {value}'
        s.focus()
        d.page.keyboard.press('ArrowRight' if was < value else 'ArrowLeft')
        for _ in range(40):                                                              # the key may take its time, and at an end of the slider it does nothing
            if now() != was: break
            d.page.wait_for_timeout(50)

def after(epoch): return 'after 1 epoch ' if epoch == 1 else f'after {epoch} epochs'

def at_epoch(d, epoch): # by the slider, on the tab of the graph
    d.until(lambda: slide(d, 'epoch', 'epoch', epoch) or after(epoch) in d.title())

def begin(d, tab):
    "The newest epoch on a tab, whatever the test before has left."
    for p in d.waiting:
        if (d.folder/p.name).exists(): (d.folder/p.name).rename(p)
    d.tab(tab)
    slide(d, 'epoch', 'epoch', 3)
    if tab == 'Graph': at_epoch(d, 3)

def lasso_all(d): # a line around everything in the first plot
    box = d.page.locator('.sage-plot').locator('visible=true').first.locator('.nsewdrag').first.bounding_box()
    at = lambda a, b: (box['x'] + a*box['width'], box['y'] + b*box['height'])
    d.page.mouse.move(*at(.02, .02))
    d.page.mouse.down()
    for a, b in ((.98, .02), (.98, .98), (.02, .98), (.02, .03)): d.page.mouse.move(*at(a, b), steps=5)
    d.page.mouse.up()

# ---------------------------------------------------------------- the tests, in the order a visitor would go

def test_the_graph_is_drawn_once_and_not_blank(desk):
    desk.until(lambda: desk.page.evaluate(INK) > 500)
    desk.until(lambda: colours(desk.page.locator('.sage-plot').locator('visible=true').first.screenshot()) > 50)          # and seen: a blank picture has a handful
    desk.until(lambda: desk.page.locator('.sage-plot').count() >= 6)
    assert len(desk.heavy) == 1                                                          # ten plots, and plotly's script came once

def test_a_figure_is_saved_as_a_picture(desk):
    from PIL import Image
    plot = desk.page.locator('.sage-plot').locator('visible=true').first
    plot.hover()
    with desk.page.expect_download() as found: plot.locator('.modebar-btn[data-title*="PNG" i]').click()
    picture = Image.open(found.value.path())
    assert picture.format == 'PNG' and picture.width > 1000 and len(picture.convert('RGB').getcolors(10**7)) > 50

def test_new_epochs_come_by_themselves(desk): # how soon: bench/browser.py
    for p in desk.waiting:
        (desk.folder/p.name).rename(p)
        desk.until(lambda: after(int(p.name)) in desk.title())
        desk.page.wait_for_timeout(300)
        desk.until(lambda: desk.page.evaluate(INK) > 500)

def test_the_slider_goes_back_and_newest_comes_back(desk):
    begin(desk, 'Graph')
    at_epoch(desk, 1)
    desk.page.get_by_role('button', name='newest').click()
    desk.until(lambda: 'after 3 epochs' in desk.title())

def test_play_goes_through_the_epochs(desk):
    begin(desk, 'Graph')
    for interval in (1200, 6000, 30_000):                                                # a browser that is slower than the play need not draw what is over: then the play is slower
        desk.kernel(f'bench.play.interval = {interval}')
        at_epoch(desk, 1)
        desk.page.locator('.widget-play button').locator('visible=true').first.click()
        seen = set()
        desk.until(lambda: seen.add(desk.title()) or 'after 3 epochs' in desk.title())
        if between := [t for t in seen if 'after 2 epochs' in t]: break
    assert between, seen

def test_a_click_on_a_node_shows_its_neighbourhood(desk):
    begin(desk, 'Graph')
    point = lambda: (desk.page.mouse.move(5, 5), desk.page.mouse.move(*desk.page.evaluate(SPOT, .5)))
    desk.tried(point, lambda: desk.page.locator('.widget-html img').locator('visible=true').count() > 0)         # the card of the node under the mouse
    desk.tried(lambda: desk.page.mouse.click(*desk.page.evaluate(SPOT, .5)), lambda: 'place' in desk.title(1) and 'after 3 epochs' in desk.title(1))
    desk.until(lambda: 'edges of the selection' in desk.title())

def test_the_map_is_drawn_without_a_network(desk):
    begin(desk, 'Cliques')
    frame = desk.page.frame_locator('iframe.sage-map')
    frame.locator('.leaflet-container').wait_for()
    stars = frame.locator('.sage-star')
    desk.until(lambda: stars.count() == 8)
    inside = next(f for f in desk.page.frames if f.parent_frame and f.evaluate("() => !!window.L"))
    drawn = inside.evaluate("""() => {let n = 0; for (const k in window) if (window[k] instanceof L.Map) window[k].eachLayer(l => n += l instanceof L.Path || l instanceof L.Marker); return n}""")
    ink = lambda: inside.evaluate("() => {let n = 0; for (const c of document.querySelectorAll('canvas')) {const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; for (let i = 3; i < p.length; i += 4) n += p[i] > 0;} return n}")
    nodes = len(desk.run.table())
    desk.until(lambda: ink() > 1000)
    assert stars.count() == 8 and drawn > nodes, (stars.count(), drawn, nodes)
    stars.nth(2).click()
    frame.locator('.leaflet-popup-content img').wait_for()

def test_the_map_lists_the_batch_at_other_epochs(desk):
    begin(desk, 'Cliques')
    desk.page.locator('.widget-dropdown:has-text("batch") select').locator('visible=true').first.select_option('0')
    desk.page.locator('.widget-dropdown:has-text("layers") select').locator('visible=true').select_option('epoch by epoch')
    frame = desk.page.frame_locator('iframe.sage-map')
    choice = frame.locator('.leaflet-control-layers-overlays label', has_text='epoch 1 · batch 0')
    choice.wait_for()
    names = [t.strip() for t in frame.locator('.leaflet-control-layers-overlays label').all_text_contents()]
    assert [n for n in names if n.startswith('epoch')] == [f'epoch {e} · batch 0' for e in (3, 0, 1, 2)]
    choice.locator('input').check()
    desk.until(lambda: frame.locator('.sage-star').count() == 16)                        # those of both epochs
    desk.page.locator('.widget-dropdown:has-text("layers") select').locator('visible=true').select_option('this batch')
    desk.until(lambda: frame.locator('.sage-star').count() == 8)

def test_another_clique_is_chosen_everywhere(desk):
    begin(desk, 'Cliques')
    chosen, cliques = desk.page.locator('button:has-text("✕")'), desk.page.locator('.widget-dropdown:has-text("clique") select').locator('visible=true')
    desk.until(lambda: cliques.locator('option').count() > 4)
    before = chosen.all_text_contents()
    cliques.select_option(index=3 if cliques.evaluate('s => s.selectedIndex') != 3 else 4)
    desk.until(lambda: chosen.count() and 'place' in chosen.first.text_content() and chosen.all_text_contents() != before)
    name = chosen.first.text_content().replace(' ✕', '')
    desk.tab('Graph')
    desk.until(lambda: desk.title(1).startswith(name.replace('&', '&amp;')))

def test_the_probe_changes(desk):
    begin(desk, 'Attention')
    desk.until(lambda: 'Soft Probing' in desk.title())
    maps = "() => {const d = [...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[0]; return JSON.stringify([d.layout.annotations.map(a => a.text), d.dataset.drawn])}"
    before = desk.page.evaluate(maps)
    slide(desk, 'probe', 'probe', 5)
    desk.until(lambda: 'probe 5' in desk.page.evaluate(maps) and desk.page.evaluate(maps) != before)

def test_embedding_lasso_fills_the_gallery(desk):
    begin(desk, 'Embedding')
    desk.until(lambda: 'laid out by likeness' in desk.title())                           # by principal components, at once
    desk.until(lambda: 'likeness (UMAP)' in desk.title(), 4*PATIENCE)
    desk.tried(lambda: lasso_all(desk), lambda: desk.page.locator('.widget-html figure img').locator('visible=true').count() > 5, 20)

def test_a_lasso_of_validation_images_rings_them_on_the_map(desk):
    begin(desk, 'Embedding')
    desk.page.locator('.widget-dropdown:has-text("points") select').locator('visible=true').select_option('Otherville')
    desk.until(lambda: 'images of Otherville' in desk.title() and '(UMAP)' in desk.title(), 4*PATIENCE)
    everything = len(desk.run.table('Otherville'))
    desk.tried(lambda: lasso_all(desk), lambda: f'and {everything - 24:,} more' in ' '.join(desk.page.locator('.widget-html').locator('visible=true').all_text_contents()), 20)
    desk.tab('Retrieval')
    desk.until(lambda: f'{everything:,} chosen images ringed' in desk.title(1))
    assert desk.page.evaluate("() => [...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[1]._fullData.at(-1).x.length") == everything
    desk.page.locator('button:has-text("no place chosen"), button:has-text("✕")').locator('visible=true').first.click(force=True)

def test_retrieval_and_training(desk):
    begin(desk, 'Retrieval')
    desk.until(lambda: desk.title().startswith('Answers in') and 'right at once' in desk.title(1) and desk.title(2).startswith('Recall'))
    desk.page.locator('.widget-checkbox:has-text("only wrong") input').locator('visible=true').check()
    options = desk.page.locator('.widget-dropdown:has-text("query") select').locator('visible=true')
    desk.until(lambda: all(not t.endswith('right') for t in options.locator('option').all_text_contents()))
    desk.tab('Training')
    desk.until(lambda: desk.title().startswith('Training of finished'))

def test_a_reload_shows_the_newest_state(desk):
    begin(desk, 'Graph')
    desk.command('docmanager:save')
    desk.until(lambda: 'widget-view+json' in (desk.folder/'work.ipynb').read_text())      # the output, which is what shows the workbench again
    at_epoch(desk, 2)
    desk.page.reload()
    desk.page.wait_for_function(STARTED)
    desk.until(lambda: 'after 2 epochs' in desk.title())

def test_the_dark_theme_is_followed(desk):
    begin(desk, 'Graph')
    desk.theme('JupyterLab Dark')
    ink = "() => {const d = [...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[0]; return d && d._fullLayout ? d._fullLayout.font.color : ''}"
    desk.until(lambda: desk.page.evaluate(ink).upper() == '#C8C8C8')

def test_nothing_was_asked_of_the_network_and_nothing_went_wrong(desk):
    assert desk.asked == []
    assert [e for e in desk.errors if 'favicon' not in e] == []
    assert desk.cell_errors() == []

def test_a_browser_that_is_slow_to_begin_misses_nothing(desk, browser):
    begin(desk, 'Graph')                                                                 # all epochs are there
    d = Desk(browser, desk.url)
    d.context.add_init_script('const timeout = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = () => timeout(0);')       # anywidget's patience is over at once
    d.open('slow.ipynb')
    d.run_all()
    d.until(lambda: after(3) in d.title() and d.page.evaluate(INK) > 500)
    assert d.deaf, 'no widget was slow'
    at_epoch(d, 2)
    d.tab('Cliques')
    d.until(lambda: d.page.frame_locator('iframe.sage-map').locator('.sage-star').count() == 8)
    d.context.close()

def test_a_burst_leaves_no_backlog(desk):
    begin(desk, 'Graph')
    number = lambda: desk.page.evaluate("() => +[...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[0].dataset.drawn")
    before = number()
    desk.kernel("import plotly.graph_objects as go\nfor i in range(100): bench.pages[0].graph.show(go.Figure(layout_title=f'burst {i}'))")
    desk.until(lambda: desk.title() == 'burst 99')
    sent = number() - before
    assert 0 < sent < 100, f'{sent} figures were drawn'

@pytest.mark.parametrize('network', [True, False])
def test_tiles_with_a_network_and_streets_without(browser, tmp_path, network):
    from PIL import Image
    from sage.viz.map import clique_map, map_html
    from sage.viz.toy import toy_run
    (tmp_path/'map.html').write_text(map_html(clique_map(toy_run(tmp_path/'run', epochs=0), tiles=True)))
    tile = io.BytesIO()
    Image.new('RGB', (256, 256), (12, 200, 40)).save(tile, 'PNG')
    context, asked = browser.new_context(viewport=dict(width=900, height=700)), []
    def gate(route):
        asked.append(route.request.url)
        return route.fulfill(body=tile.getvalue(), content_type='image/png') if network else route.abort()
    context.route('https://**/*', gate)
    context.set_default_timeout(1000*PATIENCE)
    page, end = context.new_page(), time.monotonic() + PATIENCE
    page.goto((tmp_path/'map.html').as_uri())
    page.locator('.sage-star').first.wait_for()
    page.wait_for_function("n => document.querySelectorAll('img.leaflet-tile-loaded').length > n" if network else "n => true", arg=3)
    def green():
        picture = Image.open(io.BytesIO(page.screenshot())).convert('RGB')
        return sum(n for n, (r, g, b) in picture.getcolors(10**7) if abs(r - 12) + abs(g - 200) + abs(b - 40) < 60)
    page.wait_for_timeout(500)
    while time.monotonic() < end and not (asked and (green() > 200_000 or not network)): page.wait_for_timeout(200)        # tiles fade in
    seen = green()
    context.close()
    assert asked and all(u.startswith('https://tile.openstreetmap.org/') for u in asked)
    assert (seen > 200_000) == network and page_streets(tmp_path/'map.html') > 0

def page_streets(path): # lines of the data's own streets in a map's page
    import re
    return next(len(f['geometry']['coordinates']) for data in re.findall(r'_add\((\{.*\})\);', path.read_text()) for f in json.loads(data)['features'] if f['geometry']['type'] == 'MultiLineString')

def test_the_report_needs_no_network(desk, browser, tmp_path):
    from sage.viz.report import write_report
    path, asked, errors = write_report(desk.run, tmp_path/'report.html'), [], []
    context = browser.new_context(viewport=dict(width=1440, height=900), offline=True)
    context.set_default_timeout(1000*PATIENCE)
    page = context.new_page()
    page.on('request', lambda r: asked.append(r.url) if not r.url.startswith(('file:', 'data:', 'blob:', 'about:')) else None)
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(path.as_uri())
    for figure in page.locator('.figure').all():
        figure.scroll_into_view_if_needed()
        figure.locator('.main-svg').first.wait_for()
    page.locator('iframe').scroll_into_view_if_needed()
    page.frame_locator('iframe').locator('.sage-star').first.wait_for()
    alive = page.evaluate("() => document.querySelectorAll('.gl-canvas').length")
    assert alive <= 16 and asked == [] and errors == []                # no more canvases than a browser keeps
    context.close()

# ---------------------------------------------------------------- a training that is started, watched, held and stopped in the browser

SMALLER = {'import WORLD, world': 'import DEV, WORLD, world', 'world()': 'world(dev=True)', "query(\"city == 'aldwick' and place < 900\")": 'copy()', 'WORLD | dict(epochs=3, steps=12, log_every=4)': 'WORLD | DEV | dict(epochs=3, steps=12, log_every=4)'}
HELD = """def held(go):
    "The second epoch waits for a file: however slow the browser is, the first one has to be seen while the training runs."
    import pathlib, time
    from sage.learner import SageModule
    step, taken = SageModule.training_step, []
    def waiting(self, batch, index):
        taken.append(index)
        while len(taken) > 16 and not pathlib.Path(go).exists(): time.sleep(.05)
        return step(self, batch, index)
    SageModule.training_step = waiting
held({!r})"""

def test_the_live_lesson_runs(browser, tmp_path):
    "Tutorial 4, on a smaller town: the graph changes epoch while the cell below waits for the training."
    lesson = json.loads((ROOT/'nbs'/'tutorials'/'4_watch_the_graph_evolve.ipynb').read_text())
    cells = [''.join(c['source']) for c in lesson['cells'] if c['cell_type'] == 'code']
    for was, now in SMALLER.items():
        assert sum(was in c for c in cells) == 1, f'the lesson no longer says {was!r}; say here what makes it small'
        cells = [c.replace(was, now) for c in cells]
    notebook(tmp_path/'lesson.ipynb', HELD.format(str(tmp_path/'go')), *cells)
    with lab(tmp_path) as url:
        d = Desk(browser, url)
        d.open('lesson.ipynb')
        d.run_all()
        d.until(lambda: 'before training' in d.title() or after(1) in d.title(), 4*PATIENCE)
        d.until(lambda: d.page.evaluate(INK) > 200)
        d.until(lambda: after(1) in d.title(), 2*PATIENCE)
        assert not d.page.evaluate(IDLE), 'the graph changed only after the training'
        (tmp_path/'go').touch()
        d.until(lambda: after(3) in d.title(), 2*PATIENCE)
        d.page.wait_for_function(IDLE)
        d.until(lambda: d.page.evaluate(INK) > 200 and colours(d.page.locator('.sage-plot').locator('visible=true').first.screenshot()) > 50)
        assert [e for e in d.errors if 'favicon' not in e] == [] and d.asked == [] and d.cell_errors() == []

TRAIN = """from sage.settings import Settings, make_model
from sage.sources import DEV, WORLD, world
from sage.workbench import Workbench
towns = world(dev=True)
settings = Settings(**WORLD | DEV | dict(epochs=2000, steps=6, log_every=2))
bench = Workbench.training(settings, make_model(settings), towns['train'], {'unseen town': towns['val']['unseen town']}, 'trained')
bench"""

def test_a_training_is_watched_held_and_stopped(browser, tmp_path):
    notebook(tmp_path/'live.ipynb', TRAIN)
    with lab(tmp_path) as url:
        d = Desk(browser, url)
        d.open('live.ipynb')
        d.run_all()
        lit = lambda: {n for n in ('start', 'pause', 'stop') if d.page.get_by_role('button', name=n).and_(d.page.locator('.jupyter-button')).is_enabled()}
        press = lambda n: d.page.get_by_role('button', name=n).and_(d.page.locator('.jupyter-button')).click()
        seen = lambda: int((re.search(r'after (\d+) epoch', d.title()) or [0, 0])[1])
        d.until(lambda: 'before training' in d.title() or seen(), 4*PATIENCE)
        first = d.until(seen, 2*PATIENCE)
        d.until(lambda: lit() == {'pause', 'stop'} and d.page.evaluate(INK) > 200)
        d.until(lambda: seen() > first, 2*PATIENCE)                                     # the graph evolves while the training runs
        d.tried(lambda: d.page.mouse.click(*d.page.evaluate(SPOT, .5)), lambda: 'place' in d.title(1))
        d.page.evaluate("async code => {const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel, f = k.requestExecute({code}); await new Promise(r => {f.onIOPub = m => {if (m.header.msg_type === 'stream') r();};}); await k.interrupt(); await f.done; return null}", "import time\nprint('on and on', flush=True)\nwhile True: time.sleep(.05)")
        d.page.wait_for_function(IDLE)
        d.until(lambda: lit() == {'pause', 'stop'})                                     # an interrupted cell is no stopped training
        assert 'stopped' not in ' '.join(d.page.locator('.sage-status').all_text_contents())
        press('pause')
        d.until(lambda: lit() == {'start', 'stop'})
        held = (tmp_path/'trained'/'metrics.jsonl').stat().st_size
        d.page.wait_for_timeout(2500)
        written = (tmp_path/'trained'/'metrics.jsonl').stat().st_size - held
        assert written < 4000, 'a held training writes on'                              # at most what was in hand
        press('start')
        d.until(lambda: (tmp_path/'trained'/'metrics.jsonl').stat().st_size > held + written)
        press('stop')
        d.until(lambda: 'stopped' in ' '.join(d.page.locator('.sage-status').all_text_contents()) and lit() == {'start'})
        assert d.errors == [] and d.asked == [] and d.cell_errors() == []
        press('start')
        held = (tmp_path/'trained'/'metrics.jsonl').stat().st_size
        d.until(lambda: (tmp_path/'trained'/'metrics.jsonl').stat().st_size > held + 1000)
        d.page.evaluate("async () => {await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()}")
        def still():
            size = (tmp_path/'trained'/'metrics.jsonl').stat().st_size
            d.page.wait_for_timeout(3000)
            return (tmp_path/'trained'/'metrics.jsonl').stat().st_size == size
        d.until(still)                                                                  # its training is gone with the kernel
    from sage.run import Run
    run = Run(tmp_path/'trained')
    assert run.resumable() and all(len(run.nodes(e)) and len(run.edges(e)) for e in run.epochs())       # and nothing of what it had done is lost
