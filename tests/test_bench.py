"Benchmarks run at a toy size and keep what they say; that of a GPU where there is none, too. Their input is the agreed one."
import importlib, json, os, subprocess, sys, time

import numpy as np
import pytest


@pytest.fixture
def bench(root, monkeypatch):
    "Import a script of bench/ by name."
    for folder in ('tools', 'bench'): monkeypatch.syspath_prepend(str(root/folder))
    return importlib.import_module

@pytest.mark.parametrize('n,seed', [(20_000, 0), (1_500, 3)])
def test_the_input_is_the_agreed_one(bench, shared, monkeypatch, n, seed):
    "Every image of every city at the same position and of the same place, every descriptor bit by bit."
    if not (shared/'bench'/'make_msls_like.py').exists(): pytest.skip(f'no reference input: {shared/"bench"/"make_msls_like.py"} is not there')
    monkeypatch.syspath_prepend(str(shared/'bench'))
    images, descriptors = importlib.import_module('make_msls_like').make(n, 24, seed)
    columns, places, write = bench('common').msls_like(n, 24, seed)
    assert list(images) == list(dict.fromkeys(columns['city'])) and places == sum(map(len, descriptors.values()))
    for ours, theirs in dict(place='unique_cluster', easting='easting', northing='northing').items(): assert np.array_equal(columns[ours], np.concatenate([t[theirs] for t in images.values()])), ours
    assert (columns['city'] == np.repeat(list(images), [len(t) for t in images.values()])).all()
    assert np.array_equal(write(np.empty((places, 24), np.float32), 7), np.concatenate([descriptors[city] for city in sorted(descriptors)]))

class Here:
    "A `Worker` without a process of its own."
    def __init__(self, make, *args): self.thing = make(*args)

    def __call__(self, name, *arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        return getattr(self.thing, name)(*arguments), time.perf_counter() - wall, time.process_time() - cpu

    def close(self): pass

TOYS = dict(mining='--size 20000x16 --published 10 --strategies static sage', geography='--sizes 2000 4000 --repeats 1', search='--rows 600 --dim 576 --turns 1', stream='--rows 200 --memory 2GB',
            embedding='--only loader,rebuild --backbone sage_nano --sides 56 --images 2 --turns 1 --no-bf16', nano='--size 56 --images 2 --turns 1')
SAID = dict(mining=lambda rows: [r['strategy'] for r in rows] == ['static', 'sage'] and all(r['ratio'] > 1 and r['edges'] > 0 for r in rows),
            geography=lambda rows: [r['images'] for r in rows] == [2000, 4000] and rows[0]['growth_over_n_log_n'] == 1,
            search=lambda rows: [r['same_first_as_flat'] for r in rows[:3]] == [100]*3 and len(rows) == 5,
            stream=lambda rows: rows[0]['subset_equal'] and rows[0]['plain_equal'] and rows[0]['peak'] > 0,
            embedding=lambda rows: [r['what'] for r in rows] == ['loader']*2 + ['rebuild']*2 and rows[3]['least_cosine'] > .9999,
            nano=lambda rows: all(r['images_per_s'] > 0 for r in rows))

@pytest.mark.parametrize('name', TOYS)
def test_runs_at_a_toy_size(bench, monkeypatch, tmp_path, capsys, name):
    "What it keeps: the bench, when and where, with which versions and seed, and its rows."
    script, out = bench(name), tmp_path/'new'/'out.json'
    if name == 'mining': monkeypatch.setattr(script, 'EPOCH', 20)
    if name in ('mining', 'search'): monkeypatch.setattr(script, 'Worker', Here)
    monkeypatch.setattr(sys, 'argv', [name, *TOYS[name].split(), '--seed', '5', '--out', str(out)]); script.main()
    kept = json.loads(out.read_text())
    assert list(kept) == ['bench', 'date', 'seed', 'note', 'machine', 'python', 'versions', 'rows'] and (kept['bench'], kept['seed']) == (name, 5)
    assert kept['machine']['cores'] and all(kept['versions'].values()) and SAID[name](kept['rows']), kept['rows']
    assert capsys.readouterr().out.rstrip().endswith(f'-> {out}')


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

def test_the_readme_says_what_was_recorded(root):
    "Mining, from the slowest to the quickest row."
    rows, readme = json.loads((root/'bench'/'results'/'mining.json').read_text())['rows'], (root/'README.md').read_text()
    assert len(rows) == 12 and f'| {min(r["ratio"] for r in rows):.0f} to {max(r["ratio"] for r in rows):.0f}×, from 20,000 to 500,000 images' in readme
    assert all(r['ratio'] >= (r['bar'] or 0) for r in rows)
