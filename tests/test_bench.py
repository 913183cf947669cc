"The benchmark of a GPU runs where there is none, at a toy size: what it would print and keep there."
import json, os, subprocess, sys

import pytest


@pytest.mark.slow
def test_the_step_on_a_gpu_is_ready(root, tmp_path):
    out = tmp_path/'steps.json'
    other = dict(device='CPU, toy size: no statement about a GPU', model='ViT-B', side=224, way='sdpa')
    out.write_text(json.dumps(dict(rows=[other, other | dict(device='another card')])))                         # of an earlier call: what belongs to this card is kept
    done = subprocess.run([sys.executable, str(root/'bench'/'gpu_step.py'), '--tiny', '--ways', 'eager', 'sdpa', '--out', str(out)], capture_output=True, text=True, timeout=300, env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr
    kept, *rows = json.loads(out.read_text())['rows']
    assert kept == other and [r['way'] for r in rows] == ['eager', 'sdpa'] and all('failed' not in r for r in rows), rows
    for r in rows:
        assert set(r['parts']) == {'frozen blocks', 'last blocks', 'probing', 'miner and loss', 'backward', 'optimizer'} and abs(sum(r['parts'].values()) - 1) < 1e-6
        assert r['train_images_per_s'] > 0 and r['describe_images_per_s'] > 0 and 1 > r['mfu'] > 0 and 1 > r['describe_mfu'] > 0 and r['train_ratio'] > 0 and r['describe_ratio'] > 0 and r['parts']['backward'] > .05
    assert rows[0]['train_ratio'] == 1 and 'nano 56²' in done.stdout and '(bar 45 %)' in done.stdout
    assert rows[0]['expected'] is None and rows[1]['expected'] > 1e6
