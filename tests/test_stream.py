"""Search in bounded memory: bit-equal to the flat search for every kind of array, piece and tie; amounts of memory; float16 and IVF-PQ."""
import json, os, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sage import stream
from sage.core import UserError
from sage.retrieval import search
from sage.stream import half_search, ivfpq_search, parse_memory, piece_bytes, release, search_costs, stream_search


def same(a, b): return (a[0] == b[0]).all() and (a[1] == b[1]).all() and a[0].dtype == b[0].dtype and a[1].dtype == b[1].dtype


@pytest.fixture
def tiny(monkeypatch):
    "Pieces of a few rows."
    monkeypatch.setattr(stream, '_LEAST', 3000.)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 200), st.integers(1, 40), st.integers(1, 60), st.booleans(), st.integers(4, 4000))
def test_equal_to_the_flat_search(seed, nq, n, dim, k, ties, size):
    g = np.random.default_rng(seed)
    make = lambda m: (g.integers(-1, 2, (m, dim)) if ties else g.normal(size=(m, dim))).astype(g.choice([np.float16, np.float32]))
    q, d = make(nq), make(n)
    old, stream._LEAST = stream._LEAST, float(size)
    try: assert same(stream_search(q, d, k, memory=1), search(q, d, k))
    finally: stream._LEAST = old


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
@pytest.mark.parametrize('mode', ['r', 'r+', 'c'])
def test_memory_maps_and_slices_of_them(dtype, mode, tmp_path, tiny):
    g = np.random.default_rng(0)
    d, q = g.normal(size=(501, 64)).astype(dtype), g.normal(size=(9, 64)).astype(np.float32)
    np.save(tmp_path/'d.npy', d); np.save(tmp_path/'q.npy', q)
    m = np.load(tmp_path/'d.npy', mmap_mode=mode)
    if mode == 'c': m[7] = d[7] = d[8]                                                  # a change that exists in memory only survives
    notes = []
    assert same(stream_search(np.load(tmp_path/'q.npy', mmap_mode='r'), m, 10, 1, notes), search(q, d, 10))
    assert same(stream_search(q, m[100:400], 10, 1), search(q, d[100:400], 10))
    assert same(stream_search(q, m[::3], 10, 1), search(q, d[::3], 10))
    assert 'pieces of' in notes[0] and 'before' in notes[0] and 'after' in notes[0] and int(notes[0].split()[2]) > 10
    release(m); assert (np.asarray(m) == d).all()


def test_bad_input_names_the_row(tiny):
    g = np.random.default_rng(0); d = g.normal(size=(300, 32)).astype(np.float32); d[250, 3] = np.nan
    with pytest.raises(UserError, match='database row 250: the descriptor is NaN'): stream_search(d[:2], d, 5, 1)
    with pytest.raises(UserError, match='queries row 1: '): stream_search(d[249:251], d[:100], 5, 1)
    with pytest.raises(UserError, match='one model'): stream_search(d[:2, :8], d, 5, 1)
    with pytest.raises(UserError, match='at least one'): stream_search(d[:2], d, 0, 1)
    with pytest.raises(UserError, match='table'): stream_search(d[0], d, 1, 1)


@pytest.mark.parametrize('text', ['', 'GB', '-1GB', '0GB', '1e9', '2 GBs', 'two', '1..5G', 'nan', '1,5GB', '∞'])
def test_amounts_that_are_none(text):
    with pytest.raises(UserError, match='write for example 2GB'): parse_memory(text)


def test_amounts(): assert [parse_memory(t) for t in ('2GB', '2gb', ' 2 g ', '500MB', '1GiB', '123')] == [2e9, 2e9, 2e9, 5e8, 2**30, 123]


def test_a_piece_is_smaller_where_less_is_left():
    d = np.zeros((10, 4), np.float16)
    assert piece_bytes(1e9, 2e8, d) > piece_bytes(1e9, 6e8, d) > piece_bytes(1e9, 2e9, d) == stream._LEAST


def test_peak_memory_stays_below(tmp_path):
    "In a process of its own: 160 MB on the disk, searched with 100 MB more than the interpreter and its packages take."
    g = np.random.default_rng(0)
    d = np.lib.format.open_memmap(tmp_path/'d.npy', 'w+', np.float16, (40_000, 2000))
    for s in range(0, len(d), 4000): d[s:s + 4000] = g.integers(-9, 9, (4000, 2000), dtype=np.int8)
    code = '''if 1:
        import json, sys, numpy as np
        from sage.core import peak_memory
        from sage.stream import resident, stream_search
        q = np.random.default_rng(0).normal(size=(4, 2000)).astype(np.float32)
        limit = resident() + 100e6
        stream_search(q, np.load(sys.argv[1], mmap_mode='r'), 5, limit)
        print(json.dumps([limit, peak_memory()]))'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'d.npy')], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    limit, peak = json.loads(done.stdout)
    assert peak < limit


def test_float16_and_ivfpq():
    g = np.random.default_rng(1)
    d = g.normal(size=(600, 48)).astype(np.float32); q = d[:80] + g.normal(size=(80, 48)).astype(np.float32) * .3
    assert same(half_search(q, d, 5), search(q, d.astype(np.float16), 5))
    a, b = ivfpq_search(q, d, 5, seed=3), ivfpq_search(q, d, 5, seed=3)
    assert same(a, b) and a[1].shape == (80, 5)
    costs = search_costs(q, d, [[i] for i in range(80)])
    assert costs.search.tolist() == ['exact', 'float16', 'ivfpq'] and costs.lost[0] == 0 and costs['R@1'][0] == 100
    with pytest.raises(UserError, match='at least as many'): ivfpq_search(q, d[:200], 5)
    with pytest.raises(UserError, match='float16'): half_search(q, d * 1e6, 5)
