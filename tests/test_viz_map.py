"Maps: nothing is loaded from elsewhere, names do no harm, 20,000 points are drawn, and what is drawn is what the run says."
import hashlib, json, re, shutil, time
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from sage.core import UserError
from sage.places import make_table
from sage.run import Run
from sage.viz.map import add_ground, batch_members, city_boxes, city_streets, clique_map, empty_map, features, fit, hard_negatives, layer, leaflet_head, map_coordinates, map_html, street_lines
from sage.viz.style import escape
from sage.viz.toy import toy_run

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)>`${alert(1)}{{ 7*7 }}'

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp('toy')/'run')

def remote(page):
    "Addresses that a page would load from: everything outside Leaflet's own text that is a source, a style sheet or a css url."
    page = page.replace(leaflet_head(), '')
    return re.findall(r'(?:src|href)\s*=\s*["\']?((?:https?:)?//[^"\'\s>]+)|url\(["\']?((?:https?:)?//[^)]+)\)|(tile[^"\']*/\{z\}[^"\']*)', page)

def rows(n, seed=0, size=3000., zone='33N'):
    g = np.random.default_rng(seed)
    return make_table(image=[f'{i}.jpg' for i in range(n)], city='Adorf', place=np.arange(n)//4, easting=389_000 + g.uniform(0, size, n), northing=5_819_000 + g.uniform(0, size, n), zone=zone)

def test_leaflet_is_vendored_with_its_licence(root):
    here = root/'sage'/'viz'/'leaflet'
    assert 'BSD 2-Clause' in (here/'LICENSE.txt').read_text()
    assert 'Leaflet 1.9.4' in (here/'leaflet.js').read_text()[:200]
    assert hashlib.sha256((here/'leaflet.js').read_bytes()).hexdigest() == 'db49d009c841f5ca34a888c96511ae936fd9f5533e90d8b2c4d57596f4e5641a'
    assert not re.search(r'url\((?!["\']?(data:|#default))', leaflet_head())

def test_no_address_in_any_page(run):
    assert remote(map_html(empty_map())) == []
    assert remote(map_html(clique_map(run, [0, 4], [0, 1]))) == []
    assert remote(map_html(empty_map(degrees=False, dark=True))) == []
    assert len(remote(map_html(empty_map(tiles=True)))) == 1                             # only when asked for

def test_street_lines_against_networkx():
    for seed in range(10):
        xy = np.random.default_rng(seed).uniform(0, 200, (60, 2))
        d = np.linalg.norm(xy[:, None] - xy[None], axis=2)
        graph = nx.Graph([(i, j, dict(weight=d[i, j])) for i in range(60) for j in range(i) if d[i, j] < 60])
        tree = nx.minimum_spanning_tree(graph)
        assert {frozenset(e) for e in street_lines(xy).tolist()} == {frozenset(e) for e in tree.edges}

def test_streets_never_join_cities():
    df = pd.concat([rows(50, size=80.), rows(50, size=80.).assign(city='Bestadt')], ignore_index=True)
    pairs = city_streets(df)
    assert len(pairs) == 98 and (df.city.to_numpy()[pairs[:, 0]] == df.city.to_numpy()[pairs[:, 1]]).all()
    assert len(city_streets(df[:1])) == 0 and len(city_streets(df[:0])) == 0

def test_coordinates():
    two = pd.concat([rows(3), rows(3, zone='32N')], ignore_index=True)
    at, degrees = map_coordinates(two)
    assert degrees and (at[:3, 0] > 12).all() and (at[3:, 0] < 9).all()
    assert not map_coordinates(two.assign(zone=['33N', '', *['32N']*4]))[1]
    with pytest.raises(UserError): map_coordinates(two.assign(zone='99X'))

def test_members_are_where_the_table_says(run):
    table, members = run.table(), batch_members(run, 2, 1)
    assert len(members) == 32 and (members['rank'] == 0).sum() == 8
    np.testing.assert_allclose(members[['easting', 'northing']], table.loc[members.row, ['easting', 'northing']])
    assert members.metres.max() < 25
    without = Run.create(run.path.parent/'bare', {}, dict(mined=table.assign(image=[f'{i}.jpg' for i in range(len(table))])))
    cliques = run.cliques(2).assign(image=lambda d: [f'{i}.jpg' for i in d.row])[['batch', 'slot', 'place', 'image', 'rank', 'mean_affinity']]
    without.write_epoch(0, run.nodes(2), run.edges(2), cliques, run.descriptors(2))      # the schema without the helpful extras
    bare = batch_members(without, 0, 1)
    np.testing.assert_allclose(bare[['x', 'y']], members[['x', 'y']])
    pd.testing.assert_frame_equal(hard_negatives(without, 0, bare), hard_negatives(run, 2, members))

def test_hard_negatives_are_the_nearest(run):
    members = batch_members(run, 0, 0)
    F = np.asarray(run.descriptors(0), np.float32)[members.node[members['rank'] == 0]]
    d = np.linalg.norm(F[:, None] - F[None], axis=2)
    for hard in (1, 3, 99):
        found = hard_negatives(run, 0, members, hard)
        expected = {tuple(sorted((i, int(j)))) for i in range(8) for j in np.argsort(d[i] + 9*(np.arange(8) == i))[:min(hard, 7)]}
        assert set(zip(found.a, found.b)) == expected
        np.testing.assert_allclose(found.d_vis, d[found.a, found.b], atol=1e-5)
    assert hard_negatives(run, 0, members[members.slot == 0]).empty

def test_bad_requests(run, tmp_path):
    with pytest.raises(UserError, match='no batch 7 is recorded; there are batches 0 to 2'): clique_map(run, 0, 7)
    with pytest.raises(UserError, match='no epoch 8'): clique_map(run, 8)
    with pytest.raises(UserError, match='no epoch is complete'): clique_map(Run.create(tmp_path/'new', {}, dict(mined=run.table())))
    with pytest.raises(UserError, match='no table'): clique_map(Run.create(tmp_path/'none', {}))
    empty = Run.create(tmp_path/'empty', {}, dict(mined=run.table()))
    empty.write_epoch(0, run.nodes(0), run.edges(0), run.cliques(0)[:0], run.descriptors(0))
    with pytest.raises(UserError, match='no batches are recorded'): clique_map(empty)

def test_random_batches_have_no_affinity(run, tmp_path):
    drawn = Run.create(tmp_path/'random', {}, dict(mined=run.table()))
    drawn.write_epoch(0, run.nodes(0), run.edges(0), run.cliques(0).assign(mean_affinity=np.nan), run.descriptors(0))
    assert 'drawn without a graph' in map_html(clique_map(drawn))

def evil_run(run, path):
    table = run.table()
    out = Run.create(path, {}, dict(mined=table.assign(city=EVIL, image='/x/' + EVIL.replace('/', '') + '.jpg')))
    out.write_epoch(0, run.nodes(0).assign(city=EVIL), run.edges(0), run.cliques(0).assign(city=EVIL), run.descriptors(0))
    return out

def test_hostile_names(run, tmp_path):
    page = map_html(clique_map(evil_run(run, tmp_path/'evil'))).replace(leaflet_head(), '')
    assert 'alert(1)' in page                                                            # the name is there
    assert '<script>alert' not in page and not any(tag + name in page for tag in ('<', r'\u003c', r'\x3c') for name in ('img src=x', 'script>alert', r'script\u003ealert'))       # nor as HTML within a script
    for name in ('tip', 'card'):
        for value in re.findall(rf'"{name}": ("(?:[^"\\]|\\.)*")', page): assert '<img src=x' not in json.loads(value) and '<script' not in json.loads(value)

@pytest.mark.parametrize('name', ['{{ 7*7 }}', '{% endraw %}{{ 7*7 }}{% raw %}', '{% for i in range(9) %}x{% endfor %}', '{# gone #}', '{% broken'])
def test_a_name_is_no_template(run, tmp_path, name):
    "folium renders pages with a template engine that can run code: names of cities, in the note of a batch of several, are only text."
    table, cliques = run.table(), run.cliques(0)
    far = cliques.row[cliques.slot >= 6].to_numpy()
    table.loc[far, 'city'] = name
    two = Run.create(tmp_path/'two', {}, dict(mined=table))
    two.write_epoch(0, run.nodes(0), run.edges(0), cliques, run.descriptors(0))
    page = map_html(clique_map(two))
    assert f'{escape(name)} (2)</a>' in page and '49 (2)' not in page and 'xxxxxxxxx' not in page
    assert sum(t['properties'].get('tip', '').startswith(escape(name)) for part in drawn(page) for t in part) >= len(far)
    assert name in map_html(empty_map(note=name, tiles=True))

def drawn(page):
    "The GeoJSON collections of a page, in order."
    return [json.loads(data)['features'] for data in re.findall(r'_add\((\{.*\})\);', page)]

def test_layers(run):
    assert layer(features('Point', [])) is None
    page = map_html(clique_map(run, [0, 1], [0, 1, 2], hard=1))
    for e, b in np.ndindex(2, 3): assert f'epoch {e} \\u00b7 batch {b}' in page
    streets, photographs, *rest = drawn(page)
    assert len(streets) == 1 and len(photographs) == 600 and len(rest) == 6*4
    for hard, lines, others, anchors in zip(*[iter(rest)]*4):
        assert {f['geometry']['type'] for f in hard} == {'LineString'} and {f['geometry']['type'] for f in others + anchors} == {'Point'}
        assert [f['geometry']['type'] for f in lines] == ['MultiLineString']*8 and all(len(f['geometry']['coordinates']) == 6 for f in lines)      # a line for each pair of four members
        assert [f['properties']['slot'] for f in anchors] == list(range(8))
        assert [f['properties']['slot'] for f in others] == [s for s in range(8) for _ in range(3)]          # each member knows its clique; a line has its clique's colour and is not asked
        assert [f['properties']['color'] for f in lines] == [f['properties']['color'] for f in anchors]

def test_several_cities(run, tmp_path):
    table, cliques = run.table(), run.cliques(0)
    far = cliques.row[cliques.slot >= 6].to_numpy()
    table.loc[far, ['city', 'easting']] = table.loc[far].assign(city=EVIL, easting=lambda d: d.easting + 20_000)[['city', 'easting']]
    two = Run.create(tmp_path/'two', {}, dict(mined=table))
    two.write_epoch(0, run.nodes(0), run.edges(0), cliques, run.descriptors(0))
    members = batch_members(two, 0, 0)
    (first, at), (second, other) = city_boxes(members)
    assert first == 'Toytown (6)' and second.endswith('(2)') and '<' not in second and len(at) + len(other) == 32
    page = map_html(clique_map(two))
    assert page.count('onclick=') == 2 and remote(page) == []
    west, east = (float(v) for v in re.search(r'fitBounds\(\s*\[\[[\d.]+, ([\d.]+)\], \[[\d.]+, ([\d.]+)\]\]', page).groups())
    assert east - west < .01                                                             # opens at one city

def test_one_sheet_is_degrees_or_metres(run, tmp_path):
    "Where a city's zone is not known, everything on the map is in metres, the batch of another city, too."
    table = run.table()
    table.loc[table.index[:50], 'zone'] = ''
    two = Run.create(tmp_path/'two', {}, dict(mined=table))
    two.write_epoch(0, run.nodes(0), run.edges(0), run.cliques(0), run.descriptors(0))
    page = map_html(clique_map(two))
    at = np.array([f['geometry']['coordinates'] for part in drawn(page) for f in part if f['geometry']['type'] == 'Point'])
    assert 'L.CRS.Simple' in page and len(at) > 600 and np.abs(at).max() > 50 and np.ptp(at[-8:], axis=0).max() > 5         # members, last, are metres as the ground is

def test_many_photographs_are_thinned_and_that_is_said():
    m = empty_map()
    add_ground(m, rows(50_000))
    dots = drawn(map_html(m))[-1]
    assert len(dots) == 16_667 and 'photographs: 16,667 of 50,000' in [c.layer_name for c in m._children.values() if hasattr(c, 'layer_name')]

def test_twenty_thousand_points_are_quick():
    many, start = rows(20_000), time.process_time()
    m = empty_map()
    add_ground(m, many)
    fit(m, map_coordinates(many)[0])
    page = map_html(m)
    assert page.count('"type": "Point"') == 20_000 and len(page) < 6e6
    assert time.process_time() - start < 20

# in a browser, without a network

COUNT = '''() => { const m = Object.values(window).find(v => v instanceof L.Map), n = {circle: 0, marker: 0, line: 0};
  m.eachLayer(l => { if (l instanceof L.CircleMarker) n.circle++; else if (l instanceof L.Marker) n.marker++; else if (l instanceof L.Polyline) n.line++ });
  const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; n.painted = 0;
  for (let i = 3; i < d.length; i += 4) n.painted += d[i] > 0;
  n.load = performance.timing.loadEventEnd - performance.timing.navigationStart; return n }'''

@pytest.fixture(scope='module')
def chromium():
    program = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not program: pytest.skip('no Chromium on this machine: install the package chromium')
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=['--no-sandbox'])
        yield browser
        browser.close()

@pytest.fixture
def page(chromium):
    "A page that records what it asks for, what it says, and lets nothing out."
    context = chromium.new_context(viewport=dict(width=1100, height=720))
    context.set_default_timeout(90_000)
    page, page.asked, page.said = context.new_page(), [], []
    stop = lambda route: (page.asked.append(route.request.url), route.abort()) if route.request.url.startswith('http') else route.continue_()
    context.route('**/*', stop)
    page.on('console', lambda m: m.type == 'error' and page.said.append(m.text))
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('dialog', lambda d: (page.said.append('dialog ' + d.message), d.dismiss()))
    yield page
    context.close()

def show(page, m, path):
    Path(path).write_text(map_html(m), encoding='utf-8')
    page.goto(Path(path).as_uri())
    seen(page, 'n.painted > 5000')
    return page.evaluate(COUNT)

def seen(page, what): # until that is so of the counts
    page.wait_for_function(f'() => {{const n = ({COUNT})(); return {what}}}')

@pytest.mark.browser
def test_map_in_a_browser(run, page, tmp_path):
    found = show(page, clique_map(run, [0, 4], [0, 1]), tmp_path/'m.html')
    assert (found['circle'], found['marker']) == (600 + 24, 8) and found['line'] >= 10 and found['painted'] > 5000
    page.locator('.leaflet-control-layers-overlays input').nth(4).check()                # another epoch's batch
    seen(page, 'n.marker === 16')
    page.locator('.sage-star').first.click(position=dict(x=8, y=10))
    assert 'anchor of slot' in page.locator('.leaflet-popup-content').inner_text()
    assert page.locator('.leaflet-popup-content img').get_attribute('src').startswith('data:image/jpeg')
    assert page.asked == [] and page.said == []

@pytest.mark.browser
def test_hostile_names_in_a_browser(run, page, tmp_path):
    show(page, clique_map(evil_run(run, tmp_path/'evil')), tmp_path/'m.html')
    page.locator('.sage-star').first.click(position=dict(x=8, y=10))
    assert 'alert(1)' in page.locator('.leaflet-popup-content').inner_text()              # as text
    page.wait_for_timeout(300)                                                            # for what must not come
    assert page.asked == [] and page.said == []

@pytest.mark.browser
def test_twenty_thousand_points_in_a_browser(page, tmp_path):
    m, many = empty_map(), rows(20_000)
    add_ground(m, many)
    fit(m, map_coordinates(many)[0])
    found = show(page, m, tmp_path/'m.html')
    assert found['circle'] == 20_000 and found['painted'] > 50_000
    assert page.asked == [] and page.said == []
