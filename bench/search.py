"""Finding a query's nearest images: FAISS's flat index as the published evaluation uses it, against ours, float16 read in pieces, PCA-512 and IVF-PQ.

    python bench/search.py                        # 10,000 × 8448
    python bench/search.py --rows 50000           # 50,000 × 8448: 5 GB of memory
    python bench/search.py --rows 1000000 --dim 512

Recall, milliseconds a query, and memory: held between questions, and at most while answering. Each in a process of its own, answering all 1,000 queries by turns with the flat index (the quickest turn counts). Database and queries are made: places on
streets in 400 hidden dimensions, three images of each place with noise of their own.
"""
import tempfile
from pathlib import Path

import numpy as np

from common import Worker, arguments, keep, memory

QUERIES, K, HIDDEN = 1000, 20, 400


def make(folder, rows, dim, seed):
    "Database float16 [rows, dim], queries float32, and the place of each, on disk, once."
    if (folder/'places.npz').exists(): return
    folder.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng([seed, rows, dim])
    places = rows//3
    spread = r.standard_normal((HIDDEN, dim), dtype=np.float32)
    hidden = .7*r.standard_normal((places//20 + 1, HIDDEN), dtype=np.float32)[np.arange(places)//20] + .6*r.standard_normal((places, HIDDEN), dtype=np.float32)
    def images(place):
        x = (hidden[place] + 1.5*r.standard_normal((len(place), HIDDEN), dtype=np.float32)) @ spread + .5*HIDDEN**.5*r.standard_normal((len(place), dim), dtype=np.float32)
        return x/np.linalg.norm(x, axis=1, keepdims=True)
    place = r.permutation(np.arange(rows) % places); out = np.lib.format.open_memmap(folder/'database.npy', 'w+', np.float16, (rows, dim))
    for a in range(0, rows, 2000): out[a:a+2000] = images(place[a:a+2000])
    asked = r.integers(0, places, QUERIES)
    np.save(folder/'queries.npy', images(asked)); np.savez(folder/'places.npz', database=place, queries=asked)


class Flat:
    "The published way: all descriptors in an array, and again in the index."
    def __init__(self, folder, seed):
        import faiss, sage.retrieval, sage.stream
        self.folder, self.seed, self.queries = folder, seed, np.load(folder/'queries.npy')
        for kind in (np.float32, np.float16): one = np.zeros((1, 1), kind); sage.retrieval.search(one, one, 1)      # compiled
        self.start = memory(reset=True)
        self.build()
        self.held = memory(reset=True) - self.start

    def load(self):
        half = np.load(self.folder/'database.npy', mmap_mode='r')
        out = np.empty(half.shape, np.float32)
        for a in range(0, len(out), 2000): out[a:a+2000] = half[a:a+2000]
        return out

    def build(self):
        import faiss
        self.database = self.load()
        self.index = faiss.IndexFlatL2(self.database.shape[1]); self.index.add(self.database)

    def find(self, q): return self.index.search(q, K)[1]

    def answer(self): return self.find(self.queries)

    def used(self): return self.held, memory() - self.start


class Exact(Flat):
    "Ours, held once; distances in float64 decide."
    def build(self): self.database = self.load()

    def find(self, q):
        from sage.retrieval import search
        return search(q, self.database, K)[1]

class Half(Flat):
    "Ours from a float16 file, in pieces."
    def build(self): self.database = np.load(self.folder/'database.npy', mmap_mode='r')

    def find(self, q):
        from sage.stream import stream_search
        return stream_search(q, self.database, K, 1.2e9)[1]

class Pca(Flat):
    "512 principal components, learned from 3,000 images; whole descriptors are read in pieces and not kept."
    def build(self):
        from sage.retrieval import apply_pca, fit_pca
        half = np.load(self.folder/'database.npy', mmap_mode='r')
        some = np.sort(np.random.default_rng(self.seed).choice(len(half), min(3000, len(half)), replace=False))
        self.pca = fit_pca(half[some], min(512, half.shape[1]))
        self.database = np.concatenate([apply_pca(self.pca, half[a:a+2000]) for a in range(0, len(half), 2000)])

    def find(self, q):
        from sage.retrieval import apply_pca, search
        return search(apply_pca(self.pca, q), self.database, K)[1]

class IvfPq(Flat):
    "64 bytes an image, an eighth of the cells visited; learned from 10,000 images."
    def build(self):
        import faiss
        half = np.load(self.folder/'database.npy', mmap_mode='r'); rows, dim = half.shape; lists = int(rows**.5)//2
        self.index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, lists, 64, 8)
        self.index.cp.seed = self.index.pq.cp.seed = self.seed + 1; self.index.cp.min_points_per_centroid = self.index.pq.cp.min_points_per_centroid = 1
        some = np.sort(np.random.default_rng(self.seed).choice(rows, min(10_000, rows), replace=False))
        self.index.train(half[some].astype(np.float32))
        for a in range(0, rows, 2000): self.index.add(half[a:a+2000].astype(np.float32))
        self.index.nprobe = max(1, lists//8)

METHODS = {'faiss flat': Flat, 'exact': Exact, 'float16 in pieces': Half, 'PCA-512': Pca, 'IVF-PQ': IvfPq}


def recall(found, places, k): return float((places['database'][found[:, :k]] == places['queries'][:, None]).any(1).mean()*100)

def compare(folder, rows, dim, seed, turns):
    places, out = np.load(folder/'places.npz'), []
    flat = Worker(Flat, folder, seed); truth = flat('answer')[0]
    for name, make_one in METHODS.items():
        if make_one is Pca and dim <= 512: continue
        worker, seconds = (flat if make_one is Flat else Worker(make_one, folder, seed)), np.full(2, np.inf)
        for _ in range(turns):
            theirs, (found, mine, _) = flat('answer')[1], worker('answer')
            seconds = np.minimum(seconds, (theirs, mine))
        (held, peak), ms = worker('used')[0], seconds/QUERIES*1e3
        out.append(dict(rows=rows, dim=dim, method=name, ms_a_query=ms[1], flat_ms_a_query=ms[0], ratio=ms[0]/ms[1], held_mb=held, peak_mb=peak, same_first_as_flat=float((found[:, 0] == truth[:, 0]).mean()*100), **{f'recall_at_{k}': recall(found, places, k) for k in (1, 5, 10)}))
        r = out[-1]
        print(f'{rows:,} × {dim} {name:18s} {r["ms_a_query"]:7.2f} ms a query, {r["ratio"]:5.2f}× as fast as the flat index | held {held:7,.0f} MB, at most {peak:7,.0f} MB | R@1/5/10 {r["recall_at_1"]:.1f}/{r["recall_at_5"]:.1f}/{r["recall_at_10"]:.1f}, first as flat {r["same_first_as_flat"]:.1f} %', flush=True)
        if worker is not flat: worker.close()
    flat.close()
    return out


def main():
    parser = arguments(__doc__)
    parser.add_argument('--rows', type=int, default=10_000)
    parser.add_argument('--dim', type=int, default=8448)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--data', type=Path, help='folder that keeps the input between runs (default: a temporary one)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.data or temporary)/f'{args.rows}x{args.dim}'
        make(folder, args.rows, args.dim, args.seed)
        rows = compare(folder, args.rows, args.dim, args.seed, args.turns)
    keep('search', args, rows, ('numpy', 'faiss-cpu', 'scikit-learn'))


if __name__ == '__main__': main()
