"The pictures of attention: against a real model's own numbers, with names that mean harm, with what is missing or damaged."
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sage.core import UserError
from sage.model import create_sage
from sage.places import make_table
from sage.run import Run
from sage.viz.attention import attended, attended_epochs, attention_figure, best_pairs, beta_curve, contributions, match_figure, match_of, patch_pairs, picture, probe_grid, recorded_images, tiles
from sage.viz.style import MISSING

EVIL = '"><img src=x onerror=alert(1)></script>'
G, D, K, GRID = 16, 12, 7, (4, 6)

def describe(model, seed=0):
    "A model's descriptors, and all it keeps on the way, of four random images of 4 × 6 patches; half precision as recorded."
    heard = []
    hook = model.probing.cluster_features.register_forward_hook(lambda net, inputs, output: heard.append(output))
    images = torch.randn(4, 3, 56, 84, generator=torch.Generator().manual_seed(seed))
    descriptors, maps = model.describe(images, maps=True)
    hook.remove()
    assert len(heard) == 1 and torch.equal(heard[0], maps.features)                      # what is kept is what was used
    return descriptors.numpy(), heard[0].numpy(), {k: np.asarray(v) for k, v in maps._asdict().items() if k != 'features'}

def make(path, keep=('descriptors', 'features'), epochs=(0, 1, 3), names=None, **changes):
    "A run folder with attention alone; at each epoch the model asks more sharply."
    path.mkdir(parents=True)
    files = names or [str(path/f'picture{i}.png') for i in range(4)]
    for i, f in enumerate(files):
        if not names: Image.fromarray(np.full((40, 60, 3), 40*i, np.uint8)).save(f)
    table = make_table(image=files, city=EVIL, place=[5, 5, 9, 9], easting=0., northing=0., condition=['day', '', EVIL, 'night'])
    run, model, exact, empty = Run.create(path/'run', dict(validation=['town'], model=dict(token_dim=G)), dict(town=table)), create_sage('sage_nano', pretrained=False, probes=K, probe_dim=D, token_dim=G), {}, table[:0]
    for e in epochs:
        descriptors, features, maps = exact[e] = describe(model)
        extra = dict(descriptors=descriptors.astype(np.float16), features=features.astype(np.float16))
        arrays = maps | dict(probes=maps['probes'].astype(np.float16), images=np.array(files), rows=np.arange(4)) | {k: v for k, v in extra.items() if k in keep} | changes
        run.write_epoch(e, empty, empty, empty, np.zeros((0, 3)), {k: v for k, v in arrays.items() if v is not None})
        with torch.no_grad(): model.probing.score[-1].weight *= 6; model.probing.soft_weighting.predictor[-1].weight *= 3
    return run, exact

@pytest.fixture(scope='module')
def made(tmp_path_factory): return make(tmp_path_factory.mktemp('attention')/'whole')

@pytest.fixture(scope='module')
def run(made): return made[0]

def kind(fig): return [(t.type, t.mode if t.type == 'scatter' else None, t.xaxis) for t in fig.data]

def test_parts_sum_to_the_dot_product(made):
    run, exact = made
    for e, (d, _, maps) in exact.items():
        parts = contributions(d[0], d[3], K, G)
        assert len(parts) == 1 + K and parts.sum() == pytest.approx(d[0] @ d[3], abs=1e-6) and np.abs(parts).max() <= 1/(1 + K) + 1e-6
        a, b = (v[G:].reshape(D, K)*(1 + K)**.5 for v in (d[0], d[3]))                   # unit columns, d-major
        np.testing.assert_allclose(parts[1:], (a*b).sum(0)/(1 + K), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), 1, atol=1e-5)

def test_pairs_of_patches_against_a_loop_over_them(made):
    "METHOD §2 by the letter in float64, one pair of patches and one probe at a time."
    d, f, maps = made[1][1]
    a = dict(maps, features=f)
    found, L = patch_pairs(a, 0, 1), f.shape[1]
    def pieces(n):
        x, p = f[n].astype(float) - f[n].astype(float).mean(), float(maps['exponent'][n])
        each = np.einsum('ld,kl->ldk', x, maps['probes'][n].astype(float))/L
        M = each.sum(0)
        out = np.sign(M)*(np.abs(M) + 1e-6)**p + M
        return each*(out/M)/np.linalg.norm(out, axis=0)
    one, other = pieces(0), pieces(1)
    for l, m in ((0, 0), (3, 17), (23, 5)):
        assert found[l, m] == pytest.approx(sum(one[l, :, k] @ other[m, :, k] for k in range(K))/(1 + K), abs=1e-9)
    np.testing.assert_allclose(one.sum(0), d[0][G:].reshape(D, K)*(1 + K)**.5, atol=2e-4)     # all patches together are the descriptor
    assert found.sum() == pytest.approx(contributions(d[0], d[1], K, G)[1:].sum(), abs=1e-4)
    np.testing.assert_allclose(patch_pairs(a, 1, 0), found.T, atol=1e-12)

def test_record_in_half_precision_is_near_enough(made):
    run, exact = made
    for e in run.epochs():
        match = match_of(run, attended(run, e)[1], 2, 3)
        assert match.parts.sum() == pytest.approx(exact[e][0][2] @ exact[e][0][3], abs=2e-3)
        assert match.pairs.sum() == pytest.approx(match.parts[1:].sum(), abs=5e-3)

def test_curve_is_the_soft_weight_of_method(run):
    "β = α·sigmoid(Linear(ReLU(Linear(s)))), α = 0.5, by the weights of the model of epoch 0."
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in create_sage('sage_nano', pretrained=False, probes=K, probe_dim=D, token_dim=G).probing.soft_weighting.predictor.parameters())
    s, beta = beta_curve(attended(run, 0)[1])
    np.testing.assert_allclose(beta, .5/(1 + np.exp(-(np.maximum(s[:, None]*w1.T + b1, 0) @ w2.T + b2)))[:, 0], atol=1e-6)
    fig = attention_figure(run, 2)
    for trace, e in ((fig.data[7], 0), (fig.data[8], 3)):
        a = attended(run, e)[1]
        np.testing.assert_array_equal(trace.x, a['norms'][2]); np.testing.assert_array_equal(trace.y, a['beta'][2])

def test_overlays_hold_what_was_recorded(run):
    fig, (first, last) = attention_figure(run, 1, epoch=3, before=1, probe=4), (attended(run, e)[1] for e in (1, 3))
    for n, a in ((1, first), (2, last)):
        np.testing.assert_array_equal(fig.data[n].customdata, a['beta'][1].reshape(GRID))
        b = a['beta'][1].reshape(GRID)
        np.testing.assert_allclose(fig.data[n].z, (b - b.min())/max(np.ptp(b), 1e-6), atol=1e-5)         # a spread of rounding errors paints nothing
    for n, a in ((3, first), (4, last)): np.testing.assert_allclose(fig.data[n].customdata, 24*a['probes'][1, 4].astype(np.float32).reshape(GRID), rtol=1e-6)
    assert [t.name for t in fig.data[5:7]] == ['after 1 epoch: all images', 'after 3 epochs: all images']
    together = attention_figure(run, 1).data[4].customdata
    np.testing.assert_allclose(together, 24*last['probes'][1].astype(float).mean(0).reshape(GRID), rtol=1e-3)
    np.testing.assert_allclose(fig.data[10].y, [*last['dpn'][1], last['exponent'][1]], rtol=1e-6)

def test_patches_lie_on_the_photograph(run):
    fig = attention_figure(run)
    for image in fig.layout.images: assert (image.x, image.y, image.sizex, image.sizey) == (-.5, -.5, 6, 4) and image.source.startswith('data:image/jpeg')
    assert fig.layout.yaxis.scaleratio == pytest.approx(6/4/1.5) and tuple(fig.layout.yaxis.range) == (3.5, -.5)      # a photograph of 60 × 40 in 6 × 4 patches: square ones
    pair = match_figure(run)
    assert sorted(i.x for i in pair.layout.images) == [-.5, 6.5] and np.shape(pair.data[0].z) == (4, 13)

@pytest.mark.parametrize('draw,count', [(lambda r, **k: attention_figure(r, k.pop('n'), **k), 11), (lambda r, **k: probe_grid(r, k.pop('n'), **k), 1), (lambda r, n, **k: match_figure(r, n//2, **k), 4)])
def test_traces_stay_the_same(run, draw, count):
    first = draw(run, n=0)
    assert len(first.data) == count
    for n, e, dark in ((3, 0, True), (2, 1, False), (1, -1, None)):
        fig = draw(run, n=n, epoch=e, dark=dark)
        assert kind(fig) == kind(first) and len(fig.layout.images) == len(first.layout.images) and len(fig.layout.annotations) == len(first.layout.annotations)

@pytest.mark.parametrize('keep,words', [((), 'no descriptors'), (('descriptors',), 'an estimate')])
def test_older_runs_say_what_they_lack(made, tmp_path, keep, words):
    run, _ = make(tmp_path/'old', keep, epochs=(0,))
    fig = match_figure(run, 1)
    assert kind(fig) == kind(match_figure(made[0])) and words in fig.layout.title.text
    match, maps = match_of(run, attended(run)[1], 2, 3), attended(run)[1]['probes'].astype(float)
    if keep: np.testing.assert_allclose(match.pairs, np.einsum('k,kl,km->lm', match.parts[1:], maps[2], maps[3]), atol=1e-9)
    else: assert np.isnan(fig.data[3].y).all() and match.pairs.sum() == pytest.approx(1, abs=5e-3)

def test_tiles_hold_every_probe(run):
    fig, maps = probe_grid(run, 2, 1), attended(run, 1)[1]['probes'][2].astype(np.float32)*24
    which, share = np.moveaxis(np.asarray(fig.data[0].customdata), -1, 0)
    for k in range(K): np.testing.assert_allclose(np.sort(share[which == k]), np.sort(maps[k]), rtol=1e-6)
    assert [a.text for a in fig.layout.annotations] == [str(k) for k in range(K)]
    z, which, corners = tiles(np.zeros((1, 2, 3)))
    assert z.shape == (2, 3) and corners.tolist() == [[0, 0]]

def test_best_pairs_use_a_patch_once():
    pairs = np.random.default_rng(0).normal(size=(9, 5))
    best = best_pairs(pairs, 50)
    assert best[0] == np.unravel_index(pairs.argmax(), pairs.shape) and len({l for l, _ in best}) == len({m for _, m in best}) == len(best) <= 5
    assert [pairs[p] for p in best] == sorted((pairs[p] for p in best), reverse=True) and best_pairs(-np.ones((3, 3))) == []

@pytest.mark.parametrize('call,words', [(lambda r: attended(r, 2), r'\[0, 1, 3\]'), (lambda r: attended(r, -4), r'\[0, 1, 3\]'), (lambda r: attention_figure(r, before=7), r'\[0, 1, 3\]'), (lambda r: attention_figure(r, 4), '4, numbered 0 to 3'), (lambda r: attention_figure(r, -1), 'numbered 0 to 3'),
                                        (lambda r: attention_figure(r, 1.5), 'numbered 0 to 3'), (lambda r: attention_figure(r, probe=7), 'no probe 7: there are 7, numbered 0 to 6'), (lambda r: attention_figure(r, probe='sky'), "'sky'"), (lambda r: probe_grid(r, 9), 'numbered 0 to 3'),
                                        (lambda r: match_figure(r, 2), 'no pair 2: there are 2, numbered 0 to 1'), (lambda r: match_figure(r, 0, 2), r'\[0, 1, 3\]'), (lambda r: contributions(np.ones(64), np.ones(64), K, G), 'full descriptor')])
def test_bad_wishes_name_the_choices(run, call, words):
    with pytest.raises(UserError, match=words): call(run)

def test_runs_without_attention_or_with_damage(tmp_path):
    with pytest.raises(UserError, match='no epoch has attention maps yet'): attention_figure(Run.create(tmp_path/'new', {}))
    for n, (change, words) in enumerate(((dict(beta=None), 'no beta'), (dict(grid=np.array([5, 6])), 'do not fit'), (dict(probes=np.ones((4, K, 23), np.float16)), 'do not fit'), (dict(beta=np.ones((3, 24))), 'do not fit'))):
        with pytest.raises(UserError, match=words): attention_figure(make(tmp_path/f'damaged{n}', epochs=(0,), **change)[0])

def test_names_are_text_and_absent_photographs_a_box(tmp_path):
    run, _ = make(tmp_path/'evil', epochs=(0,), names=[f'/nowhere/{EVIL}{i}.jpg' for i in range(4)])
    assert attended_epochs(run) == [0] and recorded_images(run)[1].startswith('pair 0 positive: ' + EVIL) and 'night' in recorded_images(run)[3]
    for fig in (attention_figure(run, 2), probe_grid(run, 2), match_figure(run, 1)):
        assert '<img' not in fig.layout.title.text and '&lt;img' in fig.layout.title.text
        assert {i.source for i in fig.layout.images} == {MISSING}
    assert picture('/nowhere.jpg', 1.5).wide == 1.5
