"Shorter descriptors: against scikit-learn, kept with the model, applied wherever descriptors come from, and refused with one sentence."
import subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from sage import cli_export
from sage.benchmark import describe_table
from sage.checkpoint import read_header
from sage.core import UserError
from sage.feed import Views, embed
from sage.formats import write_gsv, write_utm
from sage.images import eval_transform
from sage.model import create_sage, load_official, load_sage, save_sage
from sage.official import official_name
from sage.places import make_table
from sage.retrieval import apply_pca, fit_pca, pca_solver
from sage.run import Run

SMALL = dict(backbone='sage_nano', pretrained=True, probes=8, probe_dim=16, token_dim=12)          # 140 numbers

def cards(folder, city='aldwick', places=6, views=4, seed=0):
    "A town of coloured patterns, several views of each place."
    g, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for p in range(places):
        pattern = g.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        for v in range(views):
            path = folder/f'{city}_{p}_{v}.jpg'
            Image.fromarray(np.roll(np.kron(pattern, np.ones((14, 14, 1), np.uint8)), int(g.integers(-5, 6)), 0)).save(path)
            rows.append((str(path), p, 500_000 + 60 * p + v, 'query' if v == 0 else 'database'))
    image, place, easting, role = zip(*rows)
    return make_table(image=image, city=city, place=place, easting=easting, northing=5_300_000., zone='32N', heading=90., role=role, time='2026-03')

def some(n=3, seed=0): return torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(seed))

def components(dim=5, of=140, n=60, seed=0):
    return fit_pca(np.random.default_rng(seed).normal(size=(n, of)) * np.linspace(1, 3, of), dim)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Training images, a run that trained on them with one checkpoint, and another town with queries."
    t = tmp_path_factory.mktemp('pca')
    write_gsv(cards(t/'c0'), t/'gsv')
    write_utm(cards(t/'c1', 'bestadt', seed=1).assign(split='test'), t/'bestadt')
    run = Run.create(t/'run', dict(settings=dict(backbone='sage_nano', eval_size=56)), dict(mined=cards(t/'c0'), bestadt=cards(t/'c1', 'bestadt', seed=1).assign(split='test')))
    run.log(kind='epoch', epoch=0, **{'bestadt/recall@1': 50.})
    save_sage(create_sage(**SMALL), t/'run'/'checkpoints'/'0000.safetensors', dict(epoch=0, settings=dict(backbone='sage_nano', eval_size=56)))
    return t

# ---- against scikit-learn ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n, d, dim', [(60, 12, 4), (30, 80, 20), (900, 600, 20)])
@pytest.mark.parametrize('whiten', [False, True])
def test_every_solver_against_the_exact_one(n, d, dim, whiten):
    x = (np.random.default_rng(0).normal(size=(n, d)) @ np.diag(.97 ** np.arange(d) * 5)).astype(np.float32)
    ours, theirs = fit_pca(x, dim), PCA(dim, svd_solver='full', whiten=whiten).fit(x)
    np.testing.assert_allclose(ours['variance'], theirs.explained_variance_, rtol=2e-2)
    assert abs(ours['explained'] - theirs.explained_variance_ratio_.sum()) < 3e-3 and ours['samples'] == n
    first = min(4, dim)
    np.testing.assert_allclose(np.abs(apply_pca(ours, x, whiten=whiten)[:, :first]), np.abs(theirs.transform(x)[:, :first]), rtol=.06, atol=.06 * (1 if whiten else x.std() * 5))

def test_solvers_are_all_met():
    assert {pca_solver(60, 12, 4), pca_solver(30, 80, 20), pca_solver(900, 600, 20)} == {'covariance_eigh', 'full', 'randomized'}

@pytest.mark.slow
@pytest.mark.parametrize('dim', [512, 4096])
def test_the_sizes_that_are_published(dim):
    "The least and the most, each by its solver; descriptors of more numbers than either, with a spectrum that falls: directions are orthonormal, each has the spread that is said, and distances shrink as `explained` says."
    g = np.random.default_rng(0)
    x = (g.normal(size=(4400, 4224)) * np.geomspace(3, .05, 4224)).astype(np.float32)
    pca = fit_pca(x, dim)
    assert (pca['components'].shape, pca['samples'], pca['solver']) == ((dim, 4224), 4400, 'randomized' if dim == 512 else 'covariance_eigh')
    np.testing.assert_allclose(pca['components'] @ pca['components'].T, np.eye(dim), atol=2e-4)
    y = apply_pca(pca, x)
    np.testing.assert_allclose(y.var(0, ddof=1), pca['variance'], rtol=2e-2)
    assert y.var(0, ddof=1).sum()/x.var(0, ddof=1).sum() == pytest.approx(pca['explained'], abs=2e-3) and pca['explained'] > (.6 if dim == 512 else .95)
    assert np.allclose(apply_pca(pca, x, whiten=True).var(0, ddof=1), 1, atol=.03)

def test_a_seed_fixes_the_randomised_solver():
    x = np.random.default_rng(0).normal(size=(700, 600)).astype(np.float32)
    a, b = fit_pca(x, 10, seed=3), fit_pca(x, 10, seed=3)
    assert a['solver'] == 'randomized' and all(np.array_equal(a[k], b[k]) for k in ('mean', 'components', 'variance'))

@pytest.mark.parametrize('n, dim, says', [(4, 5, 'here are 4 images'), (1, 1, 'at least 2 images'), (200, 141, '140 numbers'), (10, 0, '0 dimensions')])
def test_too_few(n, dim, says):
    with pytest.raises(UserError, match=says): fit_pca(np.random.default_rng(0).normal(size=(n, 140)), dim)

def test_all_equal():
    with pytest.raises(UserError, match='are equal'): fit_pca(np.ones((20, 8)), 2)

# ---- with the model ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('whiten', [False, True])
def test_describe_is_the_plain_formula(whiten):
    model, pca, x = create_sage(**SMALL), components(), some()
    full = model.describe(x).numpy().astype(np.float64)
    y = (full - pca['mean']) @ pca['components'].T.astype(np.float64) / (np.sqrt(pca['variance']) if whiten else 1)
    model.reduce(pca, whiten)
    assert model.dim == 5 and model.pca.facts['whitened'] == whiten
    np.testing.assert_allclose(model.describe(x), y / np.linalg.norm(y, axis=1, keepdims=True), atol=2e-5)
    np.testing.assert_allclose(model.describe(x).norm(dim=1), 1, atol=1e-5)
    np.testing.assert_allclose(apply_pca(pca, full.astype(np.float32), normalize=True, whiten=whiten), model.describe(x), atol=2e-5)

def test_everybody_gets_it(world):
    "describe, its two halves, the feed and the benchmark: one place in the model serves them all."
    model, df = create_sage(**SMALL).reduce(components()), cards(world/'c0')
    views = Views(df, eval_transform((56, 56)))
    direct = model.describe(torch.stack([views[i] for i in range(len(df))])).numpy()
    for d in (embed(model, views), describe_table(model, df, 56)):
        assert d.shape == (len(df), 5) and np.allclose(d, direct, atol=1e-5)

def test_never_in_half_precision():
    model = create_sage(**SMALL).reduce(components())
    with torch.autocast('cpu', torch.bfloat16): half = model.describe(some())
    assert half.dtype == torch.float32 and (half - model.describe(some())).norm(dim=1).max() < .2
    full = torch.randn(4, 140)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(model.pca(full), model.pca(full.clone()))
    assert torch.equal(model.pca(full.double()), model.pca(full))

def test_nothing_about_it_trains():
    model, before = create_sage(**SMALL), create_sage(**SMALL)
    model.reduce(components())
    assert set(model.trainable_state()) == set(before.trainable_state()) and not any(n.startswith('pca') for n, _ in model.named_parameters())

@pytest.mark.parametrize('pretrained', [True, False])
@pytest.mark.parametrize('whole', [True, False])
def test_round_trip(tmp_path, pretrained, whole):
    model, x = create_sage(**SMALL | dict(pretrained=pretrained)).reduce(components(), whiten=True).eval(), some()
    path = save_sage(model, tmp_path/'m.safetensors', dict(epoch=2), whole=whole)
    again = load_sage(path)
    assert torch.equal(again.describe(x), model.describe(x)) and again.dim == 5 and again.config == model.config
    facts = read_header(path)['pca']
    assert facts == again.pca.facts == dict(dims=5, of=140, samples=60, whitened=True, explained_variance=facts['explained_variance']) and 0 < facts['explained_variance'] < 1
    with safe_open(path, 'pt') as f: assert {k for k in f.keys() if k.startswith('pca.')} == {'pca.mean', 'pca.components', 'pca.variance'}
    twice = save_sage(again, tmp_path/'n.safetensors', dict(epoch=2), whole=whole)
    ours, theirs = load_file(path), load_file(twice)
    assert read_header(twice) == read_header(path) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

def test_files_without_a_reduction_are_as_before(tmp_path):
    path = save_sage(create_sage(**SMALL), tmp_path/'m.safetensors')
    with safe_open(path, 'pt') as f: assert set(f.metadata()) == {'format', 'model', 'config', 'holds', 'backbone_sha256', 'sha256'} and not any('pca' in k for k in f.keys())

def test_official_weights_can_be_reduced(tmp_path):
    a = create_sage(**SMALL | dict(pretrained=False))
    state = {official_name(k): v for k, v in a.state_dict().items()}
    model = load_official(state, num_heads=a.backbone.model.blocks[0].attn.num_heads).reduce(components())
    path = save_sage(model, tmp_path/'m.safetensors')
    assert torch.equal(load_sage(path).describe(some()), model.describe(some()))

def test_the_head_goes(tmp_path):
    model = create_sage('sage_nano', probes=8, probe_dim=80, token_dim=128, interact=True)
    model.reduce(components(of=768))
    assert model.interact is None and model.config['interact'] is False
    with pytest.raises(UserError, match='InteractHead'): model.describe(some(), cross_image=True)
    assert load_sage(save_sage(model, tmp_path/'m.safetensors')).dim == 5

def test_refused_by_the_model():
    model = create_sage(**SMALL)
    with pytest.raises(UserError, match='of 12 numbers, this model gives 140'): model.reduce(components(of=12))
    flat = np.zeros((50, 140), np.float32); flat[:, :3] = np.random.default_rng(0).normal(size=(50, 3))
    with pytest.raises(UserError, match='only 3 of 5 components'): model.reduce(fit_pca(flat, 5), whiten=True)
    assert model.pca is None and model.reduce(components()).pca
    with pytest.raises(UserError, match='5 numbers already'): model.reduce(components())

@pytest.mark.parametrize('change', [lambda t: t.pop('pca.mean'), lambda t: t.update({'pca.components': t['pca.components'][:3].clone()}), lambda t: t.update({'pca.more': torch.zeros(1)})])
def test_damaged_reduction(tmp_path, change):
    path = save_sage(create_sage(**SMALL).reduce(components()), tmp_path/'m.safetensors')
    with safe_open(path, 'pt') as f: header = f.metadata()
    tensors = load_file(path)
    change(tensors); save_file(tensors, path, metadata=header)
    with pytest.raises(UserError, match='does not match its checksum'): load_sage(path)
    save_file(tensors, path, metadata={k: v for k, v in header.items() if k != 'sha256'})           # a file from before there were checksums
    with pytest.raises(UserError, match='reduction does not fit') as e: load_sage(path)
    assert '\n' not in str(e.value)

# ---- the command ---------------------------------------------------------------------------------------------------

def run(*argv, capsys):
    capsys.readouterr()
    code = 0
    try: cli_export.sage_pca([str(a) for a in argv])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()

def test_command_on_data_and_on_a_run(world, tmp_path, capsys):
    before = {p: p.read_bytes() for p in (world/'run').rglob('*') if p.is_file()}
    for extra in (['--data', world/'gsv'], []):
        out = tmp_path/f'short{len(extra)}.safetensors'
        code, said, err = run('--checkpoint', world/'run', '--dims', 6, '-o', out, '--quiet', *extra, capsys=capsys)
        assert code == 0 and not err, err
        assert '24 of 24 training images' in said and '140 → 6' in said
        model, head = load_sage(out), read_header(out)
        assert model.dim == 6 and head['config']['settings']['eval_size'] == 56 and head['pca']['samples'] == 24
    assert before == {p: p.read_bytes() for p in (world/'run').rglob('*') if p.is_file()}
    full = describe_table(load_sage(world/'run'/'checkpoints'/'0000.safetensors'), cards(world/'c0'), 56)
    want = apply_pca(fit_pca(full, 6), full, normalize=True)
    assert np.allclose(want, describe_table(model, cards(world/'c0'), 56), atol=1e-4)

@pytest.mark.parametrize('argv, says', [
    (['--dims', 140], '140 of 140 numbers'), (['--dims', 4096], '4096 of 140 numbers'), (['--dims', 0], '--dims'), (['--dims', 25], 'here are 24'),
    (['--dims', 6, '--images', 5], 'here are 5'), (['--dims', 6, '--data', '{t}/nowhere'], 'nowhere'), (['--dims', 6, '--size', 50], 'multiple of the patch'),
    (['--dims', 6, '--checkpoint', '{t}/nowhere'], 'nowhere'), (['--dims', 6, '-o', '{t}/a.pt'], 'ends in .safetensors'), (['--dims', 6, '-o', '{t}/run/config.json'], 'ends in'),
    (['--dims', 6, '-o', '{t}/run/checkpoints/0000.safetensors'], 'there already'), (['--dims', 6, '-o', '{t}/run/checkpoints/short.safetensors'], "run's checkpoints"), ([], '--dims')])
def test_command_refuses(world, tmp_path, capsys, argv, says):
    argv = ['--checkpoint', world/'run', '-o', tmp_path/'out.safetensors', '--quiet', *(str(a).replace('{t}', str(world)) for a in argv)]
    code, _, err = run(*argv, capsys=capsys)
    said = [line for line in err.splitlines() if line.startswith('sage_pca: ')]
    assert code == 2 and len(said) == 1 and says in said[0] and 'Traceback' not in err, err
    assert not (tmp_path/'out.safetensors').exists()

def test_only_training_images(world, tmp_path, capsys):
    "A test set is refused, named by --data or kept by a run in a wrong place."
    code, _, err = run('--checkpoint', world/'run', '--data', world/'bestadt', '--dims', 6, '-o', tmp_path/'o.safetensors', '--quiet', capsys=capsys)
    assert code == 2 and not (tmp_path/'o.safetensors').exists() and len(err.strip().splitlines()) == 1, err

def test_a_file_alone_needs_data(world, tmp_path, capsys):
    alone = tmp_path/'alone.safetensors'
    alone.write_bytes((world/'run'/'checkpoints'/'0000.safetensors').read_bytes())
    code, _, err = run('--checkpoint', alone, '--dims', 6, '-o', tmp_path/'o.safetensors', capsys=capsys)
    assert code == 2 and 'give them with --data' in err

def test_as_a_process(world, tmp_path, root):
    done = subprocess.run([sys.executable, '-m', 'sage.cli', 'pca', '--checkpoint', world/'run', '--dims', '200', '-o', tmp_path/'o.safetensors'], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('sage_pca: 200 of 140 numbers') and len(done.stderr.splitlines()) == 1
