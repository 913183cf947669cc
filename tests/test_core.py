"core: streams in other processes, writing that is cut off, devices and messages."
import json, os, pickle, signal, stat, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from sage import core
from sage.core import MissingPath, UserError, atomic, cache_dir, data_root, existing, peak_memory, pick_device, pick_precision, pick_workers, seed_of, stream, torch_stream

words = st.lists(st.one_of(st.text(max_size=6), st.integers(0, 99)), max_size=4)

def python(code, **variables):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, **variables}, check=True)
    return done.stdout

@given(st.integers(0, 2**63), words)
def test_same_names_same_numbers(seed, names):
    assert seed_of(seed, *names) == seed_of(seed, *names) and 0 <= seed_of(seed, *names) < 2**63
    assert (stream(seed, *names).random(4) == stream(seed, *names).random(4)).all()
    assert torch.equal(torch.rand(4, generator=torch_stream(seed, *names)), torch.rand(4, generator=torch_stream(seed, *names)))

@given(st.integers(0, 99), words, st.integers(0, 99), words)
def test_other_names_other_numbers(seed, names, other_seed, other):
    as_text = lambda s, n: [str(s), *map(str, n)]
    assert (seed_of(seed, *names) == seed_of(other_seed, *other)) == (as_text(seed, names) == as_text(other_seed, other))

def test_streams_do_not_depend_on_the_hash_seed():
    code = "from sage.core import *; print(stream(5, 'a', 'é', 7).random(), seed_of(5, 'a'), torch_stream(5, 'a').initial_seed())"
    assert python(code, PYTHONHASHSEED='1') == python(code, PYTHONHASHSEED='2')

def test_streams_leave_global_state_alone():
    np.random.seed(0); torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    stream(0, 'x').random(10); torch.rand(10, generator=torch_stream(0, 'x'))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])

@pytest.mark.parametrize('seed', [-1, 1.5, '3', None, True, float('nan')])
def test_bad_seed(seed):
    with pytest.raises(UserError, match='seed'): stream(seed, 'x')

def test_errors_survive_another_process():
    "Workers send exceptions by pickle."
    for error in (UserError('a b'), MissingPath('c d')):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)

def test_existing(tmp_path):
    (tmp_path/'a.csv').write_text('x')
    assert existing(tmp_path/'a.csv', 'file') == tmp_path/'a.csv'
    with pytest.raises(MissingPath, match='b.csv: no such file'): existing(tmp_path/'b.csv', 'file')
    with pytest.raises(FileNotFoundError): existing(tmp_path/'b')
    with pytest.raises(UserError, match='is not a folder'): existing(tmp_path/'a.csv')

@pytest.mark.parametrize('name', ['gpu', '', 'cuda:x', 3.5, 'cpu:7', 'cuda:99', 'meta'])
def test_bad_device(name):
    with pytest.raises(UserError, match='device'): pick_device(name)

def test_precision_on_a_gpu(monkeypatch):
    for capability, precision in (((7, 0), '16-mixed'), ((8, 0), 'bf16-mixed'), ((9, 0), 'bf16-mixed')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, c=capability: c)
        assert pick_precision('auto', 'cuda:0') == precision
    assert pick_precision('16', 'cuda') == '16-mixed' and pick_precision('32-true', 'cuda') == '32-true' and pick_precision('auto', 'mps') == '32-true'

def test_auto_takes_a_gpu_and_never_pretends(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True); monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert pick_device() == torch.device('cuda') and pick_device('cuda:0').index == 0
    with pytest.raises(UserError, match="'cuda:1' is not available"): pick_device('cuda:1')

def test_folders(monkeypatch, tmp_path):
    monkeypatch.delenv('SAGE_DATA', raising=False); monkeypatch.setenv('SAGE_CACHE', str(tmp_path/'c'))
    assert cache_dir('a', 'b') == tmp_path/'c/a/b' and data_root() == tmp_path/'c/data' and not (tmp_path/'c').exists()
    monkeypatch.setenv('SAGE_DATA', str(tmp_path/'d'))
    assert data_root() == tmp_path/'d' and data_root(tmp_path/'e') == tmp_path/'e'
    monkeypatch.setenv('SAGE_CACHE', ''); assert cache_dir() == Path.home()/'.cache/sage-vpr'

def test_atomic_syncs_before_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(core.os, 'fsync', lambda f: (order.append('fsync'), fsync(f)))
    monkeypatch.setattr(core.os, 'replace', lambda a, b: (order.append('rename'), replace(a, b)))
    with atomic(tmp_path/'x.json') as t: t.write_text('{}')
    assert order == ['fsync', 'rename', 'fsync']  # the file, the rename, the folder

def test_atomic_replaces_and_keeps_suffix_and_rights(tmp_path):
    (tmp_path/'x.parquet').write_text('old')
    with atomic(tmp_path/'x.parquet') as t:
        assert t.parent == tmp_path and t.suffix == '.parquet' and not t.exists()
        t.write_text('new')
        assert (tmp_path/'x.parquet').read_text() == 'old'
    assert (tmp_path/'x.parquet').read_text() == 'new' and len(list(tmp_path.iterdir())) == 1
    plain = tmp_path/'plain'; plain.write_text('')
    assert stat.S_IMODE((tmp_path/'x.parquet').stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_removes_what_failed(tmp_path, error):
    (tmp_path/'x').write_text('old')
    with pytest.raises(error):
        with atomic(tmp_path/'x') as t:
            t.write_text('half')
            raise error
    with pytest.raises(RuntimeError):
        with atomic(tmp_path/'folder') as t:
            t.mkdir(); (t/'a').write_text('half')
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and (tmp_path/'x').read_text() == 'old'

def test_atomic_says_where_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic(tmp_path/'x'): pass
    assert not list(tmp_path.iterdir())

def test_readers_never_see_half_a_file(tmp_path):
    "A writer killed at any moment leaves a whole file: the numbers 0 to 20,000 as one JSON list, 100 times over."
    file = tmp_path/'x.json'
    code = ("import json, sys\nfrom pathlib import Path\nfrom sage.core import atomic\nfor i in range(10000):\n"
            "    with atomic(Path(sys.argv[1])) as t: t.write_text(json.dumps([i]*20000))\n")
    writer = subprocess.Popen([sys.executable, '-c', code, str(file)])
    try:
        deadline = time.monotonic() + 240
        while not file.exists() and time.monotonic() < deadline: time.sleep(.01)
        seen = {len(set(json.loads(file.read_text()))) for _ in range(100)}
        writer.send_signal(signal.SIGKILL)
    finally: writer.kill(); writer.wait()
    assert seen == {1} and len(json.loads(file.read_text())) == 20000

def test_peak_memory_is_this_process_alone():
    "A child of a large parent reports its own peak, not the parent's."
    block = np.ones(60_000_000); assert peak_memory() > block.nbytes
    child = float(python('import sys; sys.modules["torch"] = type(sys)("torch"); sys.modules["torch"].device = sys.modules["torch"].Generator = object\n'
                         'from sage.core import peak_memory; print(peak_memory())'))
    assert 5e6 < child < 300e6

@pytest.mark.parametrize('processors, asked, device, processes, workers', [(200, -1, 'cuda', 1, 64), (65, -1, 'cuda', 1, 64), (64, -1, 'cuda', 1, 63), (64, -1, 'cuda', 4, 15), (2, -1, 'cuda', 4, 1), (64, -1, 'cpu', 1, 0), (64, 5, 'cuda', 4, 5), (4, 90, 'cpu', 1, 90)])
def test_workers(monkeypatch, processors, asked, device, processes, workers):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(processors)), raising=False)
    assert pick_workers(asked, device, processes) == workers
