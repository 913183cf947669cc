"""The sizes of the workbench in a browser without a network: 50,000 places with 500,000 edges (a step of the slider, a drag, the wheel), 20,000 points on a map, a burst, all tabs of a run.

    python bench/browser.py [--run RUN] [--screens FOLDER]     RUN: a run folder with attention maps whose workbench is opened; default a made-up one
                                                               FOLDER: pictures of every tab at 1440 × 900, light and dark, and light on a taller screen

Prints seconds beside the bar of each; nothing is asserted. Needs what tests/test_browser.py needs: JupyterLab, playwright, chromium.
"""
import io, shutil, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests'), str(Path(__file__).parent)]
from common import arguments, keep
from PIL import Image
from test_browser import CHROMIUM, IDLE, INK, SPOT, Desk, lab, made_up, notebook, slide, sync_api

TABS = ('Graph', 'Cliques', 'Attention', 'Embedding', 'Retrieval', 'Training')
DRAWN = "() => {const seen = [...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent); return seen.length > 0 && seen.every(d => d.dataset.drawn)}"   # every plot of the open tab
NUMBER = "() => +([...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[0] || {dataset: {}}).dataset.drawn || 0"                                        # of the figure that was painted last

RECORD = "() => {window.sageFrames = []; window.sageHold = false; const f = t => {window.sageFrames.push(t); if (!window.sageHold) requestAnimationFrame(f);}; requestAnimationFrame(f);}"            # when the browser paints
FRAMES = "() => {window.sageHold = true; return window.sageFrames.slice(1).map((t, i) => (t - window.sageFrames[i])/1000)}"                                                                          # seconds between one picture and the next


def large_run(path, n=50_000, m=500_000, epochs=3, seed=0):
    "A run folder with a graph of n places and m stored edges in each epoch, and no pictures."
    from sage.run import Run
    g = np.random.default_rng(seed)
    run = Run.create(path, dict(settings={}, validation=[]))
    xy, empty = g.normal(0, 4000, (n, 2)), pd.DataFrame(dict(batch=[], slot=[], place=[], image=[], rank=[], mean_affinity=[]))
    nodes = pd.DataFrame(dict(node=np.arange(n), city='Largetown', place=np.arange(n), easting=5e5 + xy[:, 0], northing=5.8e6 + xy[:, 1], lat=np.nan, lon=np.nan, image='', seed_score=-g.gamma(2, 5, n)))
    for e in range(epochs):
        src, dst = g.integers(0, n, (2, m))
        d_geo, d_vis = np.hypot(*(xy[src] - xy[dst]).T), g.uniform(.4, 1.4, m)
        edges = pd.DataFrame(dict(src=np.minimum(src, dst), dst=np.maximum(src, dst), d_geo=d_geo, d_vis=d_vis, affinity=-d_geo*d_vis, kind='alike', state=g.choice(['kept', 'new', 'broken'], m, p=[.6, .2, .2])))
        run.write_epoch(e, nodes, edges, empty, g.normal(size=(n, 8)))
        run.log(kind='epoch', epoch=e, edges_kept=1, edges_new=1, edges_broken=1)
    return run


def figure_time(run):
    "Seconds for the graph figure of the newest epoch, imports apart."
    from sage.viz.graph import graph_figure
    start = time.perf_counter()
    graph_figure(run, -1)
    return time.perf_counter() - start


def map_page(path, n=20_000, seed=0):
    "A map with n points as a page."
    import folium
    from sage.viz.map import empty_map, features, fit, layer, map_html
    g = np.random.default_rng(seed)
    at = g.normal(0, 2000, (n, 2))
    m = empty_map(degrees=False)
    layer(features('Point', at, tip=[f'place {i}' for i in range(n)]), marker=folium.CircleMarker(radius=3, weight=1, fill=True)).add_to(m)
    fit(m, at)
    path.write_text(map_html(m))
    return path


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def map_time(browser, path):
    "Seconds from opening the page until its canvas has ink, and the points that are drawn."
    context = browser.new_context(viewport=dict(width=1440, height=900), offline=True)
    page, start = context.new_page(), time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_function("() => {const c = document.querySelector('canvas'); if (!c || !c.width) return false; const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < p.length; i += 4) n += p[i] > 0; return n > 5000}", timeout=60_000)
    took = time.perf_counter() - start
    drawn = page.evaluate("() => {let n = 0; for (const k in window) if (window[k] instanceof L.Map) window[k].eachLayer(l => n += l instanceof L.CircleMarker); return n}")
    context.close()
    return took, drawn


def desk_of(browser, url):
    "A notebook with a workbench on a run, not yet run."
    d = Desk(browser, url)
    d.open('work.ipynb')
    return d


def faults(d):
    "What the browser complained of, and what was asked of the network; then the page is closed, before its server is."
    found = [e for e in d.errors if 'favicon' not in e] + d.asked
    d.context.close()
    return found


def gesture(d, moves):
    "Seconds between the pictures that are painted while the mouse does something, and from its end until the edges of the new window are."
    number = d.page.evaluate(NUMBER)
    d.page.evaluate(RECORD)
    moves()
    start, frames = time.perf_counter(), d.page.evaluate(FRAMES)
    d.until(lambda: d.page.evaluate(NUMBER) > number, 30)
    d.page.wait_for_timeout(1500)
    return frames, time.perf_counter() - start - 1.5


def drag(d):
    "Across the graph, thirty steps of a quarter of an inch."
    d.page.mouse.move(600, 500)
    d.page.mouse.down()
    for i in range(30): d.page.mouse.move(600 + 12*i, 500 - 4*i)
    d.page.mouse.up()


def wheel(d):
    "Closer, a notch at a time."
    d.page.mouse.move(600, 500)
    for _ in range(8): d.page.mouse.wheel(0, -100); d.page.wait_for_timeout(60)


def large_in_browser(browser, run, folder):
    "Seconds of a step of the slider until it is painted, of the pictures of a drag and of the wheel, and of a burst of a hundred figures."
    notebook(folder/'work.ipynb', f'from sage.workbench import Workbench\nbench = Workbench({str(run.path)!r})\nbench')
    with lab(folder) as url:
        d = desk_of(browser, url)
        d.run_all()
        d.until(lambda: 'after 2 epochs' in d.title() and d.page.evaluate(INK) > 1000, 120)
        steps = []
        for e in (1, 0, 1):
            start, number = time.perf_counter(), d.page.evaluate(NUMBER)
            slide(d, 'epoch', 'epoch', e)
            d.until(lambda: d.page.evaluate(NUMBER) > number and ('before training' if e == 0 else 'after 1 epoch ') in d.title(), 60)
            steps.append(time.perf_counter() - start)
        d.page.wait_for_timeout(1500)
        moved = {name: gesture(d, lambda: f(d)) for name, f in (('a drag', drag), ('the wheel', wheel))}
        d.page.evaluate("""() => {window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code: `
import copy
fig = bench.pages[0].figure[1]
for i in range(100): fig.layout.title.text = f'burst {i}'; bench.pages[0].graph.show(copy.copy(fig))
`}); return null}""")
        start = time.perf_counter()
        d.until(lambda: d.title() == 'burst 99', 120)
        burst = time.perf_counter() - start
        drawn = d.page.evaluate("() => +[...document.querySelectorAll('.sage-plot')].filter(d => d.offsetParent)[0].dataset.drawn")
        return steps, moved, burst, drawn, faults(d)


def tabs_in_browser(browser, run, folder, screens=None):
    "Seconds from running the cell until each tab is painted, one after another; then from the end of an epoch until its graph is."
    copy = folder/run.path.name
    shutil.copytree(run.path, copy)
    waiting = [copy/'epochs'/f'{e:04d}' for e in run.epochs()[-2:]]
    for p in waiting: p.rename(folder/p.name)
    notebook(folder/'work.ipynb', f'from sage.workbench import Workbench\nbench = Workbench({str(copy)!r})\nbench')
    with lab(folder) as url:
        d, out, live = desk_of(browser, url), {}, []
        start = time.perf_counter()
        d.run_all()
        for tab in TABS:
            if tab != 'Graph': d.tab(tab)
            d.until(lambda: d.page.evaluate(DRAWN), 120)
            if tab == 'Cliques': d.page.frame_locator('iframe.sage-map').locator('.sage-star').first.wait_for(timeout=60_000)
            out[tab] = time.perf_counter() - start
        d.tab('Graph')
        d.page.wait_for_timeout(1500)
        for p in waiting:
            number = d.page.evaluate(NUMBER)
            (folder/p.name).rename(p)
            start = time.perf_counter()
            d.until(lambda: f'after {int(p.name)} epoch' in d.title() and d.page.evaluate(NUMBER) > number and d.page.evaluate(INK) > 200, 60)
            live.append(time.perf_counter() - start)
            d.page.wait_for_timeout(500)
        if screens: take_screens(d, Path(screens))
        return out, live, len(d.heavy), faults(d)


TRAIN = """from sage.settings import Settings, make_model
from sage.sources import WORLD, world
from sage.workbench import Workbench
towns, settings = world(), Settings(**WORLD | dict(epochs=3))
bench = Workbench.training(settings, make_model(settings), towns['train'], towns['val'], 'trained')
bench"""

def while_training(browser, folder):
    "The training of `make demo` in the notebook's own process: seconds from the end of an epoch until its graph is painted, and from a click on a place until its neighbourhood is."
    notebook(folder/'work.ipynb', TRAIN)
    live, clicks = [], []
    with lab(folder) as url:
        d = desk_of(browser, url)
        d.run_all()
        for e in (1, 2, 3):
            d.until(lambda: f'after {e} epoch' in d.title() and d.page.evaluate(DRAWN), 300)
            live.append(time.time() - (folder/'trained'/'epochs'/f'{e:04d}').stat().st_ctime)        # when the folder got its name
            if e == 3: break
            for spot in (.2, .5, .8):
                before, start = d.title(1), time.perf_counter()
                d.page.mouse.click(*d.page.evaluate(SPOT, spot))
                d.until(lambda: d.title(1) not in ('', before), 60)
                clicks.append(time.perf_counter() - start)
                d.page.wait_for_timeout(1000)
            d.page.get_by_role('button', name='✕').click()
        d.page.wait_for_function(IDLE, timeout=60_000)
        return live, clicks, faults(d)


def take_screens(d, folder):
    "Every tab with a place and a query chosen, in both themes."
    folder.mkdir(parents=True, exist_ok=True)
    def keep_screen(name):
        d.page.mouse.move(720, 892)                                                  # nothing hovered
        d.page.wait_for_timeout(1200)
        Image.open(io.BytesIO(d.page.screenshot())).convert('RGB').save(folder/f'{name}.webp', quality=80)
    d.command('notebook:hide-cell-code')
    d.page.wait_for_timeout(1000)
    keep_screen('graph_whole_light')
    d.page.mouse.click(*d.page.evaluate(SPOT, .4))
    d.until(lambda: 'place' in d.title(1), 30)
    d.tab('Retrieval')
    d.until(lambda: d.title().startswith('Answers'), 60)
    d.page.locator('.widget-dropdown:has-text("query") select').locator('visible=true').select_option(index=4)
    for theme in ('light', 'dark', 'tall'):
        d.theme(f'JupyterLab {"Dark" if theme == "dark" else "Light"}')
        if theme == 'tall': d.page.set_viewport_size(dict(width=1440, height=2300))
        for tab in TABS:
            d.tab(tab)
            if tab == 'Embedding': d.until(lambda: '(UMAP)' in d.title(), 120)
            if tab == 'Attention': d.until(lambda: 'these two alike' in d.title(1), 60)
            if tab == 'Cliques': d.page.frame_locator('iframe.sage-map').locator('.sage-star').first.wait_for(timeout=30_000)
            d.page.wait_for_timeout(800)
            keep_screen(f'{tab.lower()}_{theme}')


def main():
    parser = arguments(__doc__)
    parser.add_argument('--run', metavar='RUN', help='run folder whose tabs are opened; default a made-up one')
    parser.add_argument('--screens', metavar='FOLDER', help='pictures of every tab go there')
    args, rows = parser.parse_args(), []
    if CHROMIUM is None: return print('no chromium on the path, nothing measured')
    def say(what, seconds, bar, **more):
        rows.append(dict(what=what, seconds=round(seconds, 2), bar=bar, **more))
        print(f'{what:<58} {seconds:6.2f} s   {f"bar {bar:g} s   {seconds/bar:.2f} of it" if bar else "no bar"}   {more or ""}', flush=True)
    from sage.run import Run
    with tempfile.TemporaryDirectory() as tmp, sync_api.sync_playwright() as p:
        tmp = Path(tmp)
        for name in ('large', 'small'): (tmp/name).mkdir()
        large = large_run(tmp/'large'/'run', seed=args.seed)
        figure_time(large)                                                          # imports, and files into memory
        say('graph figure of 50,000 places and 500,000 edges', figure_time(large), 5)
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        took, drawn = map_time(browser, map_page(tmp/'map.html', seed=args.seed))
        say('map of 20,000 points, from opening to drawn', took, 3, points=drawn)
        steps, moved, burst, drawn, errors = large_in_browser(browser, large, tmp/'large')
        say('a step of the slider at that size, the slowest of three', max(steps), 2, all=[round(s, 2) for s in steps])
        for name, (frames, edges) in moved.items():
            say(f'a picture of {name} at that size, the median of {len(frames)}', float(np.median(frames)), .1, slowest=round(max(frames), 2), new_edges_after=round(edges, 2))
        say('a burst of 100 figures at that size, until the last is seen', burst, 10, drawn=drawn, errors=errors)
        run = Run(args.run) if args.run else made_up(tmp/'made'/'run')
        tabs, live, scripts, errors = tabs_in_browser(browser, run, tmp/'small', args.screens)
        say('the workbench with all tabs, from running its cell', max(tabs.values()), 15, scripts=scripts, errors=errors, tabs={t: round(s, 2) for t, s in tabs.items()})
        say('from the end of an epoch until its graph is painted', max(live), 2, all=[round(s, 2) for s in live])
        (tmp/'training').mkdir()
        live, clicks, errors = while_training(browser, tmp/'training')
        say('the same while the notebook trains', max(live), 2, all=[round(s, 2) for s in live], errors=errors)
        say('from a click on a place until its neighbourhood, meanwhile', max(clicks), None, all=[round(s, 2) for s in clicks])
        browser.close()
    keep('browser', args, rows, packages=('plotly', 'anywidget', 'ipywidgets', 'jupyterlab', 'folium'))


if __name__ == '__main__': main()
