"""The weights in the package: their size and sums, what refuses to load, and the scripts that train them at the smallest size."""
import hashlib, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sage.backbone, sage.model
from sage.backbone import packaged_file, weights_folder
from sage.checkpoint import read_header
from sage.core import MissingPath, UserError
from sage.model import create_sage, load_sage
from sage.sources import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def test_size_and_sums():
    files = sorted(weights_folder().glob('*.safetensors'))
    assert [f.stem for f in files] == ['sage_nano', 'sage_world'] and sum(f.stat().st_size for f in files) <= 12e6
    lines = (weights_folder()/'checksums.txt').read_text().splitlines()
    assert lines == [f'{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}' for f in files]
    for f in files: assert json.loads(f.with_suffix('.json').read_text())['curve']


def test_world_is_trained_and_says_on_what():
    a, b = create_sage('sage_nano', pretrained='world', seed=1), create_sage('sage_nano', pretrained='world', seed=2)
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a.describe(x), b.describe(x)) and all(p.dtype == torch.float32 for p in a.parameters())
    model, name, settings = load_checkpoint('world')
    assert torch.equal(model.describe(x), a.describe(x)) and name == 'sage_world' and settings['eval_size'] == 112
    assert 'Users' not in json.dumps(read_header(packaged_file('sage_world'))) and '/tmp' not in json.dumps(read_header(packaged_file('sage_world')))


@pytest.mark.parametrize('options, says', [(dict(backbone='vit_tiny_patch16_224'), 'belongs to the backbone'), (dict(probes=8), 'of another shape'), (dict(interact=True), 'missing'), (dict(dpns=2), 'left over')])
def test_world_belongs_to_one_architecture(options, says):
    with pytest.raises(UserError) as e: create_sage(**dict(backbone='sage_nano', pretrained='world') | options)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_damaged_world_is_refused(tmp_path, monkeypatch):
    for f in weights_folder().iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    monkeypatch.setattr(sage.backbone, 'weights_folder', lambda: tmp_path)
    create_sage('sage_nano', pretrained='world')
    whole = (tmp_path/'sage_world.safetensors').read_bytes()
    (tmp_path/'sage_world.safetensors').write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match='checksum'): create_sage('sage_nano', pretrained='world')
    (tmp_path/'sage_world.safetensors').unlink()
    with pytest.raises(MissingPath, match='reinstall'): create_sage('sage_nano', pretrained='world')


def test_other_backbone_weights_are_refused(tmp_path, monkeypatch):
    for f in weights_folder().iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    monkeypatch.setattr(sage.backbone, 'weights_folder', lambda: tmp_path)
    torch.manual_seed(0)
    sage.backbone.pack_nano(sage.backbone.nano_vit())                              # its checksum fits, its numbers are others
    with pytest.raises(UserError, match='other weights'): create_sage('sage_nano', pretrained='world')


def run(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)


@pytest.mark.parametrize('objective, source', [('look', 'towns'), ('vicreg', 'leaves')])
def test_training_the_backbone_at_the_smallest_size(objective, source, tmp_path):
    done = run('tools/train_nano.py', '--out', tmp_path, '--towns', 2, '--poses', 4, '--batch', 4, '--steps', 2, '--workers', 1, '--objective', objective, '--source', source)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path/'sage_nano.json').read_text())
    assert (card['steps'], card['objective'], card['source'], card['towns']) == (2, objective, source, 2)
    state = sage.backbone.packaged_nano(tmp_path)
    assert all(v.isfinite().all() for v in state.values())


def test_training_sage_over_it_at_the_smallest_size(tmp_path):
    small = ['--work', tmp_path/'work', '--towns', 2, '--ways', 1, '--sizes', 3, 4, 2, '--drives', 1, '--held-out', 2, 2, 2, 2, '--places', 4, '--views', 2, '--steps', 2, 1, '--every', 9, '--locate', 1, '--large', .5, '--workers', 1]
    done = run('tools/train_scenes.py', *small, '--out', tmp_path/'out')
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path/'out'/'sage_world.json').read_text())
    assert card['curve'] and len(card['recall_at_1']) == 4 and set(card['all_cells']) == {'trained', 'grid', 'untrained', 'before'} and all(len(c) == 13 for c in card['all_cells'].values())
    model = load_sage(packaged_file('sage_world', tmp_path/'out'))
    assert model.describe(torch.zeros(1, 3, 112, 112)).isfinite().all()
    tokens = np.load(tmp_path/'work'/'tokens'/'way-00-a-112.npy')
    assert tokens.shape == (4, 2, 65, 192) and np.isfinite(tokens).all()


@pytest.fixture
def tools():
    sys.path.insert(0, str(ROOT/'tools'))
    yield
    sys.path.remove(str(ROOT/'tools'))


def test_pictures_come_from_their_seed(tools):
    from pictures import alter, dead_leaves, disturb, foreign, palette
    for change in (alter, disturb, foreign):
        make = lambda seed: (lambda r: change(dead_leaves(r, palette(r), 56), r))(np.random.default_rng(seed))
        assert make(1) == make(1) != make(2)


def test_a_way_is_the_same_way_on_another_day(tools):
    from halls import Way
    at = dict(x=0., y=1.6, z=9., heading=0., pitch=0., roll=0., fov=75.)
    a, again, other_day, other = (Way(seed, day)(**at, size=64).astype(float) for seed, day in ((5, 0), (5, 0), (5, 1), (6, 0)))
    assert np.array_equal(a, again) and not np.array_equal(a, other_day)
    alike = lambda p, q: np.corrcoef(np.abs(np.diff(p.mean(2), axis=1)).ravel(), np.abs(np.diff(q.mean(2), axis=1)).ravel())[0, 1]
    assert alike(a, other_day) > alike(a, other) + .2                              # edges stay where they were; light does not


def test_probes_and_features_begin_where_they_are_told(tools):
    from train_scenes import cells, linear
    near = cells(64, 64, .05)
    assert torch.equal(near.argmax(0), torch.arange(64)) and torch.allclose(near.sum(0), torch.ones(64))
    assert torch.equal(cells(256, 64, .05).argmax(0)//16//2, torch.arange(64)//8)    # the same field on a finer grid
    net = create_sage('sage_nano').probing.cluster_features.eval()
    weight, bias, x = torch.randn(128, 192, generator=torch.Generator().manual_seed(0)), torch.ones(128), torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1))
    linear(net, weight, bias)
    wanted = x @ weight.T + bias
    assert (net(x) - wanted).abs().max() < .1*wanted.std()


def test_descriptors_of_the_benchmark():
    sys.path.insert(0, str(ROOT/'bench'))
    try: from real import hog, pixels
    finally: sys.path.pop(0)
    from PIL import Image
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        ramp = np.tile(np.arange(128, dtype=np.uint8), (128, 1))
        for name, x in (('h', ramp), ('v', ramp.T), ('bright', ramp + 40)): Image.fromarray(x).save(f'{folder}/{name}.png')
        h, v, bright = (hog(f'{folder}/{n}.png') for n in ('h', 'v', 'bright'))
        np.testing.assert_allclose(h, bright, atol=1e-4)                           # light does not matter
        assert h.shape == (7*7*36,) and h.reshape(49, 4, 9)[:, :, 0].min() > .4 and np.abs(h @ v) < 1   # a ramp to the right points to the right, into the first bin
        assert v.reshape(49, 4, 9).sum((0, 1)).argmax() in (4, 5)
        np.testing.assert_allclose(pixels(f'{folder}/h.png'), pixels(f'{folder}/bright.png'), atol=.02)
