"""A disk that is full, may not be written to, or gives back less than it was given: one sentence, and the last whole checkpoint goes on."""
import os, resource, shutil, signal, subprocess, sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
import victim
from sage.core import UserError
from sage.learner import SageModule, step_of
from sage.prefix import MARK, Keeper, Kept, claim_folder
from sage.run import Run, checkpoint_paths, pause_path
from sage.resume import last_whole
from sage.train import read_failed

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


def stops_in_step(n):
    "Before a training: it is asked to stop in its n-th step."
    work, count = SageModule.training_step, [0]
    def step(self, *args):
        count[0] += 1
        if count[0] == n: os.kill(os.getpid(), signal.SIGTERM)
        return work(self, *args)
    SageModule.training_step = step


def fails_at_once():
    "Before a training: its first loss is no number."
    work = SageModule.source_loss
    SageModule.source_loss = lambda self, *args: (work(self, *args)[0]*float('nan'), *work(self, *args)[1:])


@pytest.fixture(scope='module')
def paused(streets, tmp_path_factory):
    "A training that was stopped after the second step of its second epoch."
    folder = tmp_path_factory.mktemp('paused')/'run'
    assert victim.wait(victim.child(folder, streets, before=partial(stops_in_step, 5))) == 128 + signal.SIGTERM, victim.said(folder).read_text()
    assert step_of(pause_path(Run(folder), 1)) == 5
    return folder


@pytest.fixture(scope='module')
def failed(streets, paused, tmp_path_factory):
    "The same, gone on with to a loss that is no number: here is every kind of file that a run may hold."
    folder = tmp_path_factory.mktemp('failed')/'run'
    shutil.copytree(paused, folder)
    assert victim.wait(victim.child(folder, streets, before=fails_at_once)) == 2 and 'the batch is kept' in victim.said(folder).read_text()
    return folder


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
        if (path := pause_path(run, e)).exists(): found[path] = lambda p=path: step_of(p)
    for name, read in (('failed.json', read_failed), ('failed.safetensors', victim.read_checked)):
        if (run.path/name).exists(): found[run.path/name] = lambda p=run.path/name, r=read: r(p)
    return found


def cuts(size, step): return sorted({*range(0, size, step), max(0, size - 1)})


SAID, PARTLY, SAME, NOT = 'a sentence that names the file', 'used as far as whole', 'nothing lost', 'not seen'

def held(path): # what a checkpoint holds, but for its checksum
    tensors, header = victim.read_checked(path)
    return {k: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for k, t in tensors.items()}, sorted(v for k, v in header.items() if k in ('state', 'model', 'config', 'holds', 'format', 'backbone_sha256'))


def damage(run, step, flips, g):
    """How often a damaged file met which end: every file cut at every `step` bytes, and bits of the checkpoints turned. Of the metrics, the rows that are whole are used without a sentence. A bit turned in the word
    sha256 itself leaves a file without a checksum, which is read: then all else must be what it was."""
    ends = Counter()
    for path, read in readers(run).items():
        data, rows, mine = path.read_bytes(), len(run.metrics('')), held(path) if path.suffix == '.safetensors' else None
        marks = g.integers(0, len(data), flips) if path.suffix == '.safetensors' else []
        cut, turned = (data[:c] for c in cuts(len(data) - (path.suffix == '.json'), step)), (data[:i] + bytes([data[i] ^ 1 << int(g.integers(8))]) + data[i + 1:] for i in marks)      # the newline at the end of a JSON file says nothing
        for bad in chain(cut, turned):
            path.write_bytes(bad)
            try: got = read(); end = PARTLY if path.suffix == '.jsonl' and len(got) < rows else SAME if mine and held(path) == mine else NOT
            except UserError as e: end = SAID if str(path) in str(e) and '\n' not in str(e) else NOT
            ends[end] += 1
            if end == NOT: print(f'{path}: {len(bad)} of {len(data)} bytes: {end}')
        path.write_bytes(data)
    return ends


def tell(ends): print(f'damaged files: {sum(ends.values())} tried; ' + ', '.join(f'{ends[k]} {k}' for k in (SAID, PARTLY, SAME, NOT)))


def test_every_file_cut_at_every_64_kb(whole, failed, tmp_path):
    for folder in (whole[0], failed):
        shutil.copytree(folder, tmp_path/folder.parent.name/'run')
        tell(ends := damage(Run(tmp_path/folder.parent.name/'run'), 65536, 8, np.random.default_rng(0)))
        assert not ends[NOT] and 0 < ends[PARTLY] < ends[SAID]
    assert victim.bits(tmp_path/whole[0].parent.name/'run') == whole[1]
    kinds = {Path(p).name.split('.', 1)[-1] if p.parent.name == 'checkpoints' else p.name for p in readers(Run(failed))}
    assert kinds >= {'safetensors', 'resume.safetensors', 'pause.safetensors', 'failed.json', 'failed.safetensors', 'config.json', 'metrics.jsonl', 'answers.npz'}, kinds


@pytest.mark.torture
def test_every_file_cut_at_every_kb(whole, failed, tmp_path):
    for folder in (whole[0], failed):
        shutil.copytree(folder, tmp_path/folder.parent.name/'run')
        tell(ends := damage(Run(tmp_path/folder.parent.name/'run'), 1024, 300, np.random.default_rng(1)))
        assert not ends[NOT]


@pytest.mark.parametrize('cut', [-1, *(pytest.param(c, marks=pytest.mark.torture) for c in (0, 1, None))], ids=['all but one byte', 'empty', 'one byte', 'a bit turned'])
def test_a_damaged_pause_begins_the_epoch_anew(streets, whole, paused, tmp_path, cut):
    shutil.copytree(paused, tmp_path/'run')
    path = pause_path(Run(tmp_path/'run'), 1)
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut is not None else data[:-99] + bytes([data[-99] ^ 1]) + data[-98:])
    goes_on(tmp_path/'run', streets, whole[1])
    said = victim.said(tmp_path/'run').read_text()
    assert f'{path}: damaged' in said and 'epoch 2 begins anew' in said


def test_kept_tokens_are_used_as_far_as_whole(tmp_path):
    "Cut anywhere, keys or tokens, of either of two files: what is found is right, all that is whole is found, and what is lost can be kept again. (A turned bit is not seen: tokens have no checksum.)"
    shape, paths, folder, tried = (3, 8), [tmp_path/f'{i}.jpg' for i in range(24)], tmp_path/'tokens', 0
    for p in paths: p.write_bytes(p.name.encode())
    tokens = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0)).half()
    folder.mkdir()
    for part in (slice(0, 10), slice(10, 24)):
        keeper = Keeper(folder, shape, lambda: 1e9)
        keeper.add(paths[part], tokens[part]); keeper.flush()
    whole = {p: p.read_bytes() for p in folder.iterdir()}
    assert len(whole) == 4 and Kept(folder, shape, None).find(paths).all()
    for path, data in whole.items():
        for cut in (*cuts(len(data), 5 if len(data) < 400 else 16), None):
            path.unlink() if cut is None else path.write_bytes(data[:cut])
            kept = Kept(folder, shape, None)
            found = kept.find(paths)
            mine, lost = len((whole[path.with_suffix('.keys')]))//16, (cut or 0)//(16 if path.suffix == '.keys' else kept.bytes)
            assert found.sum() == 24 - mine + lost and torch.equal(kept.read([p for p, f in zip(paths, found) if f]), tokens[torch.from_numpy(found)]), (path.name, cut)
            keeper = Keeper(folder, shape, lambda: 1e9)
            keeper.add(paths, tokens); keeper.flush()
            again = Kept(folder, shape, None)
            assert again.find(paths).all() and torch.equal(again.read(paths), tokens), (path.name, cut)
            for p in folder.iterdir(): p.unlink()
            for p, d in whole.items(): p.write_bytes(d)
            tried += 1
    print(f'cut files of kept tokens: {tried} tried, all used as far as whole')


def test_a_damaged_mark_of_kept_tokens(tmp_path):
    claim_folder(tmp_path/'tokens', dict(format=1, backbone='a', blocks=9, transform='b'))
    path = tmp_path/'tokens'/MARK
    data = path.read_bytes()
    for c in range(len(data) - 1):
        path.write_bytes(data[:c])
        with pytest.raises(UserError, match=MARK): claim_folder(tmp_path/'tokens', dict(format=1, backbone='a', blocks=9, transform='b'))


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
