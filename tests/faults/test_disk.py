"""A disk that is full, may not be written to, or gives back less than it was given: one sentence, and the last whole checkpoint goes on."""
import os, resource, shutil, subprocess, sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))
import victim
from sage.core import UserError
from sage.run import Run, checkpoint_paths
from sage.resume import last_whole

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork') or sys.platform != 'linux', reason='needs fork and Linux')


@pytest.fixture(scope='module')
def streets(): return victim.tables()


@pytest.fixture(scope='module')
def whole(streets, tmp_path_factory):
    "An unbroken training: (folder, what it says)."
    folder = tmp_path_factory.mktemp('whole')/'run'
    assert victim.wait(victim.child(folder, streets)) == 0, victim.said(folder).read_text()
    return folder, victim.bits(folder)


def fails_in_a_sentence(folder, streets, **how):
    "The training ends with exit code 2 and one sentence that names a file of the run; what is there can be read."
    victim.said(folder).unlink(missing_ok=True)
    code, err = victim.wait(victim.child(folder, streets, **how)), victim.said(folder).read_text()
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith('sage_train: ') and str(folder) in err, (code, err)
    victim.readable(folder)
    return err


def goes_on(folder, streets, want):
    code = victim.wait(victim.child(folder, streets))
    assert code == 0, victim.said(folder).read_text()
    assert not victim.differences(folder, want)


@contextmanager
def small_disk(folder, size):
    "A disk of `size` bytes; yields a function that changes its size."
    folder.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True, text=True)
    if made.returncode: pytest.skip(f'no small disk can be mounted here: {made.stderr.strip()}')
    try: yield lambda size: subprocess.run(['mount', '-o', f'remount,size={size}', str(folder)], check=True)
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)


def full(streets, whole, tmp_path, parts):
    "Disks that are full after 1/parts, 2/parts, … of what a run needs."
    needs = sum(-(-p.stat().st_size // 4096) + 1 for p in whole[0].rglob('*')) * 4096
    for i in range(parts):
        with small_disk(tmp_path/f'disk{i}', max(8192, int(needs * i / parts))) as resize:
            err = fails_in_a_sentence(tmp_path/f'disk{i}'/'run', streets)
            assert 'o space left' in err or 'written' in err or 'File too large' in err, err
            resize(4 * needs)
            goes_on(tmp_path/f'disk{i}'/'run', streets, whole[1])


def test_full_disk(streets, whole, tmp_path): full(streets, whole, tmp_path, 2)

@pytest.mark.torture
def test_full_disk_in_many_places(streets, whole, tmp_path): full(streets, whole, tmp_path, 40)


@pytest.mark.parametrize('limit', [3_000, 60_000])
def test_files_may_not_grow(streets, whole, tmp_path, limit):
    "As on a disk with a quota; also where nothing can be mounted."
    err = fails_in_a_sentence(tmp_path/'run', streets, before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
    assert 'too large' in err, err
    goes_on(tmp_path/'run', streets, whole[1])


def test_read_only_folder(streets, tmp_path):
    (tmp_path/'mine').mkdir(mode=0o555)
    code = victim.wait(victim.child(tmp_path/'mine'/'run', streets, before=partial(victim.read_only, tmp_path/'mine')))
    err = victim.said(tmp_path/'mine'/'run').read_text()
    assert code == 2 and len(err.splitlines()) == 1 and 'no permission' in err and str(tmp_path/'mine') in err, err


def lost(streets, whole, folder, touch):
    "The permission to write is taken away at a touch of the disk."
    err = fails_in_a_sentence(folder, streets, before=partial(victim.frozen, folder, touch))
    assert 'no permission' in err, err
    victim.allow(folder, 0o755)
    goes_on(folder, streets, whole[1])


@pytest.mark.parametrize('touch', [30, 70])
def test_permission_lost_midway(streets, whole, tmp_path, touch): lost(streets, whole, tmp_path/'run', touch)

@pytest.mark.torture
def test_permission_lost_anywhere(streets, whole, tmp_path):
    for touch in range(8, 100, 4): lost(streets, whole, tmp_path/f'run{touch}', touch)


def readers(run): # file → what reads it
    found = {run.path/'config.json': lambda: run.config, run.path/'metrics.jsonl': lambda: run.metrics('')}
    found |= {run.path/'tables'/file: lambda n=name: run.table(n) for name, file in run.config['tables'].items()}
    for e in run.epochs():
        for name in ('nodes', 'edges', 'cliques', 'descriptors', 'attention', 'answers'):
            path = next((run.path/'epochs'/f'{e:04d}').glob(f'{name}.*'))
            found[path] = lambda n=name, e=e: getattr(run, n)(e)
    for e in run.checkpoints():
        for path in checkpoint_paths(run, e):
            if path.exists(): found[path] = lambda p=path: victim.read_checked(p)
    return found


def cuts(size, step): return sorted({*range(0, size, step), max(0, size - 1)})


def damage(run, step, flips, g):
    "(handled, tried): every file cut at every `step` bytes, and bits of the checkpoints turned. Handled: a sentence that names the file; of the metrics, the rows that are whole."
    handled = tried = 0
    for path, read in readers(run).items():
        data, rows = path.read_bytes(), len(run.metrics(''))
        spoilt = [data[:c] for c in cuts(len(data) - (path.suffix == '.json'), step)]            # the newline at the end of a JSON file says nothing
        if path.suffix == '.safetensors': spoilt += [data[:i] + bytes([data[i] ^ 1 << int(g.integers(8))]) + data[i + 1:] for i in g.integers(0, len(data), flips)]
        for bad in spoilt:
            path.write_bytes(bad)
            tried += 1
            try: got = read(); said = path.suffix == '.jsonl' and len(got) < rows
            except UserError as e: said = str(path) in str(e) and '\n' not in str(e)
            if said: handled += 1
            else: print(f'{path}: {len(bad)} of {len(data)} bytes: {said}')
        path.write_bytes(data)
    return handled, tried


def test_every_file_cut_at_every_64_kb(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'run')
    handled, tried = damage(Run(tmp_path/'run'), 65536, 8, np.random.default_rng(0))
    print(f'damaged files handled: {handled} of {tried}')
    assert handled == tried and victim.bits(tmp_path/'run') == whole[1]


@pytest.mark.torture
def test_every_file_cut_at_every_kb(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'run')
    handled, tried = damage(Run(tmp_path/'run'), 1024, 300, np.random.default_rng(1))
    print(f'damaged files handled: {handled} of {tried}')
    assert handled == tried


def test_a_damaged_checkpoint_is_done_again(streets, whole, tmp_path, capfd):
    "Cut after the training: the epoch is trained again from the one before, to the same bits."
    shutil.copytree(whole[0], tmp_path/'run')
    weights, state = checkpoint_paths(Run(tmp_path/'run'), 2)
    data = weights.read_bytes(); weights.write_bytes(data[:65536])
    assert last_whole(Run(tmp_path/'run')) == 1
    err = capfd.readouterr().err
    assert str(weights) in err and 'trying the epoch before' in err
    goes_on(tmp_path/'run', streets, whole[1])


def test_rows_that_were_cut_off_are_said(streets, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'run')
    path = tmp_path/'run'/'metrics.jsonl'
    path.write_bytes(path.read_bytes()[:100])
    assert victim.wait(victim.child(tmp_path/'run', streets)) == 0
    assert 'the rows of epoch 0, 1 are missing; the training goes on without them' in victim.said(tmp_path/'run').read_text()
    assert Run(tmp_path/'run').epochs() == [0, 1, 2]
