"""Exact search in bounded memory: 200,000 descriptors of 8448 float16 numbers (3.4 GB on the disk) asked 100 questions with 1 GB.

    python bench/stream.py [--rows 100000] [--memory 1GB]

Peak memory is that of a process that does nothing but search. Its answers are compared with a flat search of a subset held in memory, and for a few queries with plain numpy over all rows.
"""
import json, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

from common import arguments, keep

DIM, QUERIES, K, SUBSET = 8448, 100, 20, 10_000


def make(folder, rows, seed):
    "Descriptors of length 1, some of them copies, and noisy queries; written a piece at a time."
    g = np.random.default_rng(seed)
    out = np.lib.format.open_memmap(folder/'database.npy', 'w+', np.float16, (rows, DIM))
    for start in range(0, rows, 2000):
        x = g.standard_normal((min(2000, rows - start), DIM), dtype=np.float32)
        if start: x[:20] = first                                                      # ties across pieces
        else: first = x[:20].copy()
        out[start:start + len(x)] = x / np.linalg.norm(x, axis=1, keepdims=True)
    q = out[g.integers(0, rows, QUERIES)].astype(np.float32) + g.standard_normal((QUERIES, DIM), dtype=np.float32) * .02
    q[:5] = out[:5]
    np.save(folder/'queries.npy', q)


def ask(folder, memory):
    "The process that is measured."
    from sage.core import peak_memory
    from sage.stream import stream_search
    q, d, notes, before = np.load(folder/'queries.npy'), np.load(folder/'database.npy', mmap_mode='r'), [], peak_memory()
    start = time.perf_counter()
    distances, rows = stream_search(q, d, K, memory, notes)
    print(json.dumps(dict(seconds=round(time.perf_counter() - start, 1), before=before, peak=peak_memory(), note=notes[0])))
    np.savez(folder/'found.npz', distances=distances, rows=rows)


def compare(folder, memory):
    "Equal to the flat search on a subset, and to plain numpy for five queries on everything."
    from sage.retrieval import search
    from sage.stream import stream_search
    q, d, found = np.load(folder/'queries.npy'), np.load(folder/'database.npy', mmap_mode='r'), np.load(folder/'found.npz')
    part = np.array(d[:SUBSET])
    flat, streamed = search(q, part, K), stream_search(q, d[:SUBSET], K, memory / 10)
    subset = bool((flat[0] == streamed[0]).all() and (flat[1] == streamed[1]).all())
    asked = [0, 3, 50, 98, 99]
    exact = np.concatenate([np.square(d[s:s + 500].astype(np.float64)[:, None] - q[asked].astype(np.float64)).sum(2) for s in range(0, len(d), 500)])
    plain = np.argsort(exact, axis=0, kind='stable')[:K].T
    print(json.dumps(dict(subset_equal=subset, plain_equal=bool((plain == found['rows'][asked]).all()))))


def main():
    parser = arguments(__doc__)
    parser.add_argument('--rows', type=int, default=100_000)
    parser.add_argument('--memory', default='1GB')
    args = parser.parse_args()
    from sage.stream import parse_memory
    rows, memory, limit = args.rows, args.memory, parse_memory(args.memory)
    result = dict(rows=rows, dim=DIM, queries=QUERIES, memory=limit)
    with tempfile.TemporaryDirectory() as folder:
        for step, *numbers in (('make', rows, args.seed), ('ask', limit), ('compare', limit)):
            start = time.perf_counter()
            out = subprocess.run([sys.executable, __file__, step, folder, *map(str, numbers)], capture_output=True, text=True, check=True).stdout
            result |= json.loads(out) if out else {}
            print(f'{step}: {time.perf_counter() - start:.0f} s', flush=True)
    print(f'{rows:,} × {DIM} float16, {QUERIES} queries, {memory}: {result["seconds"]} s, {result["note"]}\nequal to the flat search of {SUBSET:,} rows: {result["subset_equal"]}; to plain numpy on all: {result["plain_equal"]}')
    keep('stream', args, [result], ('numpy', 'faiss-cpu'))


if __name__ == '__main__':
    if sys.argv[1:2] and sys.argv[1] in ('make', 'ask', 'compare'): globals()[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else: main()
