"The pictures of the graph and of cliques: what they draw against brute force, at full size, and with names and files that mean harm."
import io, json
from base64 import b64decode

import networkx as nx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from sage.core import UserError
from sage.graph import affinity
from sage.run import Run
from sage.viz.clique import clique_growth_figure, growth, inner_mean, neighborhood, neighbourhood_figure
from sage.viz.graph import STATES, bundled_edges, edges_for_view, fair_shares, graph_figure, graph_view, lines_for, map_positions, node_card, score_range, show_view
from sage.viz.style import CONFIG, MISSING, escape, palette, place_label, place_labels, template, thumbnail
from sage.viz.toy import toy_run

EVIL = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "</script>'`${1}", '%{customdata} {{ 7*7 }} {% raw %}', '<b>Adorf</b>']

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp('toy')/'run')

def town(n, edges, seed=0, size=1000.):
    "Nodes and edges at random, with numbers as a run has them."
    g = np.random.default_rng(seed)
    xy = g.uniform(0, size, (n, 2))
    src, dst = g.integers(0, n, (2, edges))
    d, v = np.linalg.norm(xy[src] - xy[dst], axis=1), g.uniform(.1, 1.4, edges)
    nodes = pd.DataFrame(dict(node=np.arange(n), city='Big', place=np.arange(n), easting=389_000 + xy[:, 0], northing=5_819_000 + xy[:, 1], lat=np.nan, lon=np.nan, image='', seed_score=np.where(g.random(n) < .1, np.nan, -g.gamma(2, 4, n))))
    return nodes, pd.DataFrame(dict(src=np.minimum(src, dst), dst=np.maximum(src, dst), d_geo=d, d_vis=v, affinity=-d*v, kind=np.where(d < 25, 'near', 'alike'), state=g.choice(list(STATES), edges, p=[.8, .12, .08])))

def drawn(view):
    "Lines in the edge traces of a view."
    return sum(int(np.isfinite(t['x']).sum())//2 for t in view.traces[:6])

# style

@pytest.mark.parametrize('name', EVIL)
def test_names_are_escaped(name):
    safe = escape(name)
    assert not set('<>"\'') & set(safe)
    assert place_labels(pd.DataFrame(dict(city=[name], place=[1])))[0] == place_label(dict(city=name, place=1)) == f'{safe} · place 1'

def test_thumbnail(tmp_path):
    picture = np.zeros((30, 90, 3), np.uint8)
    picture[:, :45] = 255
    Image.fromarray(picture).save(tmp_path/'a.png')
    exif = Image.Exif(); exif[274] = 6                                                   # lies on its side
    Image.fromarray(picture).save(tmp_path/'turned.jpg', exif=exif)
    Image.fromarray(picture).convert('P').save(tmp_path/'palette.png')
    (tmp_path/'zero.jpg').touch()
    (tmp_path/'text.jpg').write_text('no picture')
    decoded = lambda uri: Image.open(io.BytesIO(b64decode(uri.split(',')[1])))
    assert decoded(thumbnail(tmp_path/'a.png')).size == (64, 21)
    assert decoded(thumbnail(tmp_path/'turned.jpg')).size == (21, 64)
    assert decoded(thumbnail(tmp_path/'palette.png', 32)).size == (32, 11)
    assert decoded(thumbnail(picture/255.)).format == 'JPEG'
    for bad in ('zero.jpg', 'text.jpg', 'absent.jpg', ''): assert thumbnail(tmp_path/bad) == MISSING
    assert thumbnail('a\0b.jpg') == MISSING

def test_template_is_transparent_and_quiet():
    for dark in (None, True, False):
        layout = template(dark).layout
        assert layout.paper_bgcolor == layout.plot_bgcolor == 'rgba(0,0,0,0)'
    assert len(set(palette(6))) == 6 and json.dumps(CONFIG)

# positions and edges

def test_map_positions_keeps_distances_and_cities_apart():
    nodes, _ = town(400, 10)
    nodes['city'] = np.array(['A', 'B', 'C'])[np.arange(400) % 3]
    xy, own = map_positions(nodes), nodes[['easting', 'northing']].to_numpy()
    for city in 'ABC':
        i = np.flatnonzero(nodes.city == city)
        np.testing.assert_allclose(np.linalg.norm(xy[i][:, None] - xy[i][None], axis=2), np.linalg.norm(own[i][:, None] - own[i][None], axis=2), atol=.01)
    boxes = [(xy[nodes.city == c].min(0), xy[nodes.city == c].max(0)) for c in 'ABC']
    for k, (low, high) in enumerate(boxes):
        for l, h in boxes[:k]: assert (low > h).any() or (l > high).any()

@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 120))
@settings(deadline=None)
def test_fair_shares(wanted, limit):
    shares = fair_shares(wanted, limit)
    assert shares.sum() == min(limit, sum(wanted)) and (shares <= wanted).all()
    short = shares < np.array(wanted)                                                    # who goes short has at least as much as anybody else, but for one line
    if short.any(): assert shares[short].min() >= shares.max() - 1

@pytest.mark.parametrize('window', [None, (0, 300, 0, 300), (-9, -1, 0, 10)])
def test_window_against_brute_force(window):
    nodes, edges = town(200, 900)
    xy = nodes[['easting', 'northing']].to_numpy() - [389_000, 5_819_000]
    inside = lambda p: window is None or (window[0] <= p[0] <= window[1] and window[2] <= p[1] <= window[3])
    expected = sorted((*xy[a], *xy[b]) for a, b in zip(edges.src, edges.dst) if inside(xy[a]) or inside(xy[b]))
    lines = edges_for_view(xy, edges, window)
    assert sorted(map(tuple, lines[['x0', 'y0', 'x1', 'y1']].to_numpy())) == expected
    assert (lines['count'] == 1).all()

def test_strongest_of_each_state():
    nodes, edges = town(200, 3000)
    lines = edges_for_view(map_positions(nodes), edges, limit=300)
    assert lines.state.value_counts().to_dict() == {'kept': 100, 'new': 100, 'broken': 100}
    rank = edges.groupby('kind').affinity.rank(pct=True)
    for state in STATES: np.testing.assert_allclose(np.sort(lines.strength[lines.state == state]), np.sort(rank[edges.state == state])[-100:])

def test_bundles_lose_no_edge():
    nodes, edges = town(300, 5000)
    xy = map_positions(nodes)
    lines = bundled_edges(xy, edges, limit=10**9, cells=5)
    cell = np.floor((xy - xy.min(0))/(np.ptp(xy, axis=0).max()*(1 + 1e-6)/5)).astype(int)
    across = (cell[edges.src] != cell[edges.dst]).any(1)
    assert lines['count'].sum() == across.sum()
    for state in STATES: assert lines['count'][lines.state == state].sum() == (across & (edges.state == state)).sum()
    np.testing.assert_allclose((lines['count']*lines.affinity).sum(), edges.affinity[across].sum())
    assert not lines.duplicated(['x0', 'y0', 'x1', 'y1', 'state']).any()

def test_nothing_to_draw():
    nodes, edges = town(5, 4)
    for n, e in ((nodes, edges[:0]), (nodes[:0], edges[:0]), (nodes[:1], edges[:0]), (nodes.assign(seed_score=np.nan), edges)):
        view = graph_view(n, e)
        assert drawn(view) == len(e) and len(view.traces) == 9
    same = nodes.assign(easting=1., northing=2.)                                         # all at one spot
    assert drawn(graph_view(same, edges)) == 4
    assert drawn(graph_view(same, pd.concat([edges]*9), limit=2)) == 0                   # a bundle within one cell is no line
    assert score_range([]) == score_range([nodes.assign(seed_score=np.nan)]) == (-1., 0.)

def test_bad_input():
    nodes, edges = town(50, 40)
    with pytest.raises(UserError, match='positions of 10 nodes'): edges_for_view(np.zeros((10, 2)), edges)
    with pytest.raises(UserError, match='each of the 50 nodes'): graph_view(nodes, edges, np.zeros((50, 3)))
    with pytest.raises(UserError, match='node 3 has no position'): map_positions(nodes.assign(easting=nodes.easting.where(nodes.node != 3)))
    with pytest.raises(UserError, match='no node 50'): node_card(nodes, 50)

# figures

def contrast(color, page):
    "Of two colours '#rrggbb', as the Web Content Accessibility Guidelines define it: 1 to 21."
    light = lambda c: np.dot([.2126, .7152, .0722], [v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4 for v in (int(c[i:i+2], 16)/255 for i in (1, 3, 5))]) + .05
    return max(light(color), light(page))/min(light(color), light(page))

@pytest.mark.parametrize('dark, page', [(False, '#FFFFFF'), (True, '#212121')])
def test_edges_are_seen_on_either_page(run, dark, page):
    assert min(contrast(t.line.color, page) for t in graph_figure(run, -1, dark=dark).data[:6]) > 3.4

def test_figure_of_a_run(run, tmp_path):
    fig = graph_figure(run)
    assert [f.name for f in fig.frames] == [str(e) for e in run.epochs()] and len(fig.layout.sliders[0].steps) == 5
    for e, frame in zip(run.epochs(), fig.frames):
        edges, names = run.edges(e), [t.name for t in frame.data[:6:2]]
        assert names == [f'{s} {(edges.state == s).sum():,}' for s in STATES]
        assert sum(np.isfinite(t.x).sum() for t in frame.data[:6]) == 2*min(len(edges), lines_for(len(run.nodes(e))))
    assert len(graph_figure(run, -1).frames) == 0 and 'after 4' in graph_figure(run, -1).layout.title.text
    moving = graph_figure(run, positions={e: np.full((96, 2), float(e)) for e in run.epochs()})
    assert moving.frames[2].data[7].x[0] == 2
    with pytest.raises(UserError, match='no epoch is complete'): graph_figure(Run.create(tmp_path/'empty', {}))
    with pytest.raises(UserError, match='no epoch 9'): graph_figure(run, 9)

def test_dash_and_colour_both_tell_states_apart(run):
    fig = graph_figure(run, 1)
    looks = {(t.line.color, t.line.dash) for t in fig.data[:6]}
    assert len(looks) == len({c for c, _ in looks}) == len({d for _, d in looks}) == 3
    assert all('[m]' in t.marker.colorbar.title.text for t in fig.data if t.name == 'place')

def test_live_figure_takes_a_view(run):
    fig = go.FigureWidget(graph_figure(run, 0))
    view = graph_view(run.nodes(3), run.edges(3), epoch=3, selection=[5])
    show_view(fig, view)
    for trace, new in zip(fig.data, view.traces): np.testing.assert_array_equal(trace.x, new['x'])
    assert fig.layout.title.text == view.title and fig.data[8].x.shape == (1,)
    assert set(np.concatenate([t.customdata for t in fig.data[6:8]])) == set(range(96))

def hostile(run, path):
    "A copy of a run whose names mean harm."
    table, cities = run.table(), dict(zip(sorted(set(run.nodes(0).city)), EVIL))
    out = Run.create(path, {}, dict(mined=table.assign(city=EVIL[0], image=EVIL[1] + '.jpg')))
    nodes = run.nodes(0).assign(image=EVIL[1])
    nodes['city'] = np.array(EVIL, dtype=object)[np.arange(len(nodes)) % len(EVIL)]
    out.write_epoch(0, nodes, run.edges(0), run.cliques(0).assign(city=EVIL[0], image=EVIL[1]), run.descriptors(0))
    return out

def test_hostile_names_do_no_harm(run, tmp_path):
    bad = hostile(run, tmp_path/'evil')
    node = int(bad.cliques(0).node.iloc[0])
    texts = json.dumps([graph_figure(bad).to_plotly_json(), neighbourhood_figure(bad, 0, node).to_plotly_json()], default=lambda o: o.tolist()) + node_card(bad.nodes(0), node)
    for name in ('<script', '<b>Adorf', 'onerror=alert(1)>', '<img src=x'): assert name not in texts

@pytest.mark.slow
def test_fifty_thousand_places(tmp_path):
    run = Run.create(tmp_path/'big', {})
    for e in range(3):
        nodes, edges = town(50_000, 500_000, e, 9000.)
        run.write_epoch(e, nodes, edges, pd.DataFrame(dict(batch=[0], slot=0, place=5, image='', rank=0, mean_affinity=-1., node=5)), np.random.default_rng(e).normal(size=(50_000, 16)))
    fig = graph_figure(run)                                                  # how long it takes: bench/browser.py
    assert sum(len(t.x) for t in fig.data[:6]) < 3*1500
    close = graph_view(nodes, edges, window=(-400, 400, -300, 300))
    assert sum(len(t['x']) for t in close.traces[:6]) < 3*1500

# cliques

def test_neighborhood_against_brute_force(run):
    for epoch in (0, 4):
        nodes, F = run.nodes(epoch), np.asarray(run.descriptors(epoch), np.float32)
        xy = nodes[['easting', 'northing']].to_numpy()
        for node in range(0, 96, 13):
            found = neighborhood(run, epoch, node, similar=5)
            d = np.linalg.norm(F - F[node], axis=1); d[node] = np.inf
            assert set(np.argsort(d)[:5]) - set(found.near) == set(found.alike)
            np.testing.assert_allclose(found.distance, d[found.alike], atol=2e-3)         # descriptors are kept as float16
            order = [node, *found.near, *found.alike]
            np.testing.assert_allclose(found.W, affinity(xy[order], F[order]), atol=1e-3)
            assert (np.linalg.norm(xy[found.near] - xy[node], axis=1) < 25).all()

def test_place_without_anything(run, tmp_path):
    alone = Run.create(tmp_path/'alone', {})
    alone.write_epoch(0, run.nodes(0), run.edges(0)[:0], run.cliques(0)[:0], run.descriptors(0))
    fig = neighbourhood_figure(alone, 0, 3)
    assert any('none of the recorded' in a.text for a in fig.layout.annotations)
    with pytest.raises(UserError, match='no node 96'): neighbourhood_figure(alone, 0, 96)

@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_growth_against_loops(seed, n):
    g = np.random.default_rng(seed)
    W = -g.random((n, n)); W = (W + W.T)/2
    W[g.random((n, n)) < .1] = np.nan
    order = g.permutation(n)[:max(1, n - 1)]
    steps = growth(W, order)
    for t in range(len(order)):
        for i in range(n):
            if i in order[:t]: assert np.isnan(steps[t, i]); continue
            others = order[:t] if t else [j for j in range(n) if j != i]
            expected = np.mean([W[i, j] if np.isfinite(W[i, j]) else -np.inf for j in others])
            assert steps[t, i] == pytest.approx(expected)

def test_clique_growth_figure(tmp_path):
    g = np.random.default_rng(0)
    W = affinity(g.uniform(0, 15, (9, 2)), g.normal(size=(9, 4)))
    images = [g.integers(0, 255, (20, 30, 3)).astype(np.uint8) for _ in range(8)] + ['absent.jpg']
    fig = clique_growth_figure(images, W, labels=EVIL + list('abcd'))
    assert len(fig.layout.images) == 8 and all(i.source.startswith('data:image/') for i in fig.layout.images)
    assert all('<' not in a.text for a in fig.layout.annotations)
    np.testing.assert_allclose([t for t in fig.data if t.name == 'greedy'][0].y[0], W.sum(1).max()/8)
    cut = np.where(W < np.median(W), -np.inf, W)
    assert clique_growth_figure(images, cut).layout.title.text
    with pytest.raises(UserError, match='2 images but affinities of 9'): clique_growth_figure(images[:2], W)
    with pytest.raises(UserError, match='cannot take 10 of 9'): clique_growth_figure(images, W, k=10)

def test_inner_mean():
    W = np.array([[0, -1, -5], [-1, 0, -3], [-5, -3, 0.]])
    graph = nx.from_numpy_array(-W)
    assert inner_mean(W, [0, 1, 2]) == pytest.approx(-np.mean([d['weight'] for *_, d in graph.edges(data=True)]))
    assert inner_mean(W, [1]) == 0
