"""The weights in the package: their size and sums, what refuses to load, and the scripts that train them at the smallest size."""
import hashlib, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sage.backbone, sage.model
from sage.backbone import packaged_file, weights_folder
from sage.core import MissingPath, UserError
from sage.model import create_sage, read_header
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


def test_pictures_come_from_their_seed():
    sys.path.insert(0, str(ROOT/'tools'))
    try: from pictures import alter, dead_leaves, palette
    finally: sys.path.pop(0)
    make = lambda seed: (lambda r: alter(dead_leaves(r, palette(r), 56), r))(np.random.default_rng(seed))
    assert make(1) == make(1) != make(2)


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
