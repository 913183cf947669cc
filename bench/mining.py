"""What an epoch's mining costs: the published clique miner against `CliqueBatches`.

    python bench/mining.py                        # 20 k images: a minute
    python bench/mining.py --all                  # up to 500 k × 8448: needs 10 GB of disk and of memory, 20 minutes

Both make batches of 30 places × 4 images of the same data, each in a process of its own and by turns, on one thread. Ours includes what an epoch prepares (looking through its new
descriptors), spread over its 2,000 batches. The geography never changes: it is prepared once for a data set and shown apart. So is the graph that is written down for an epoch's pictures,
on one thread here as well.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import tempfile
from itertools import islice
from pathlib import Path

import networkx as nx
import numpy as np
from scipy.spatial.distance import cdist

from common import Worker, arguments, keep, memory, msls_like, table_of

PLACES, IMAGES, EPOCH = 30, 4, 2000
SIZES = [(20_000, 512), (100_000, 512), (500_000, 512), (20_000, 8448), (100_000, 8448), (500_000, 8448)]
BARS = {(20_000, 512): 50, (100_000, 512): 50, (500_000, 512): 80, (20_000, 8448): 15, (500_000, 8448): 100}


class Published:
    "The clique miner as it was published, one batch at a time."
    def __init__(self, folder, seed=0):
        columns, F = dict(np.load(folder/'columns.npz')), np.load(folder/'F.npy').astype(np.float32)
        self.rng, self.cities, a = np.random.default_rng(seed), [], 0
        for city in np.unique(columns['city']):
            rows = np.flatnonzero(columns['city'] == city); place = columns['place'][rows]; order = np.argsort(place, kind='stable')
            images = np.split(rows[order], np.cumsum(np.bincount(place))[:-1])
            self.cities.append((images, F[a:a+len(images)])); a += len(images)
        self.xy = np.stack([columns['easting'], columns['northing']], 1)
        sizes = np.array([len(images) for images, _ in self.cities])
        self.p = sizes/sizes.sum()
        self.start = memory(reset=True)

    def batch(self):
        out = []
        while len(out) < PLACES:
            images, F = self.cities[self.rng.choice(len(self.cities), p=self.p)]
            seed = self.rng.integers(len(F))
            d = cdist(F[seed:seed+1], F)[0]                              # scipy makes both float64
            p = d.max() - d; p[seed] = 0
            others = self.rng.choice(len(F), 15, replace=False, p=p/p.sum())
            rows = np.concatenate([images[i] for i in (seed, *others)])
            near = cdist(self.xy[rows], self.xy[rows]) < 25
            while len(out) < PLACES:
                clique = next((c for c in nx.find_cliques(nx.from_numpy_array(near)) if len(c) >= IMAGES), None)
                if clique is None: break
                out.append(rows[self.rng.choice(clique, IMAGES, replace=False)])
                gone = near[clique].any(0)
                near[gone] = False; near[:, gone] = False
        return np.array(out)

    def batches(self, n):
        for _ in range(n): self.batch()

    def peak(self): return memory() - self.start


class Ours:
    def __init__(self, folder, strategy, seed=0):
        import pyarrow                                                   # (pandas may load it late, and it is no cost of mining)
        from sage.batches import CliqueBatches
        columns, self.F = dict(np.load(folder/'columns.npz')), np.load(folder/'F.npy', mmap_mode='r')
        if self.F.shape[1] <= 512: self.F = self.F.astype(np.float32)
        for a in range(0, len(self.F), 4096): self.F[a:a+4096].max()     # every page of a file on disk is in memory, and counted as data
        self.table, self.seed, self.strategy, self.CliqueBatches = table_of(columns), seed, strategy, CliqueBatches
        small = self.table[self.table.place < 40].reset_index(drop=True); n = small.groupby(['city', 'place']).ngroups
        some = np.random.default_rng(0).normal(size=(n, 512)).astype(self.F.dtype); some.flags.writeable = self.F.flags.writeable
        for b in islice(CliqueBatches(small, some, strategy, 5, min_size=IMAGES), 3): pass      # compiled
        self.start = memory(reset=True)

    def geography(self): self.sampler = self.CliqueBatches(self.table, None, self.strategy, PLACES, IMAGES, self.seed, min_size=IMAGES)

    def prepare(self, epoch):
        self.sampler.rebuild(self.F, epoch)
        self.running = iter(self.sampler)

    def batches(self, n):
        for _ in range(n): next(self.running)

    def peak(self): return memory() - self.start

    def graph(self):
        "What is written down of an epoch for its pictures; --no-record-graph leaves it out."
        from sage.graph import epoch_graph
        return len(epoch_graph(self.sampler.geo, self.F, None).edges)


def make_input(folder, n_images, dim, seed):
    "Table and descriptors (float16 for the long ones) on disk, once."
    if (folder/'done').exists(): return folder
    folder.mkdir(parents=True, exist_ok=True)
    columns, places, write = msls_like(n_images, dim, seed)
    np.savez(folder/'columns.npz', **columns)
    write(F := np.lib.format.open_memmap(folder/'F.npy', 'w+', np.float16 if dim > 512 else np.float32, (places, dim))); F.flush()
    (folder/'done').touch()
    return folder


def compare(folder, n_images, dim, strategies, seed, theirs_batches, turns=10):
    "One row for each strategy."
    theirs = Worker(Published, folder, seed); theirs('batches', 2)
    rows = []
    for strategy in strategies:
        ours = Worker(Ours, folder, strategy, seed)
        _, geography, _ = ours('geography')
        _, prepare, prepare_cpu = ours('prepare', 0)
        wall, cpu = np.zeros((2, turns)), np.zeros((2, turns))
        for t in range(turns):
            for who, worker, n in ((0, theirs, max(1, theirs_batches//turns)), (1, ours, EPOCH//turns)):
                _, w, c = worker('batches', n)
                wall[who, t], cpu[who, t] = w/n, c/n
        (peak, *_), (their_peak, *_) = ours('peak'), theirs('peak')
        edges, graph, _ = ours('graph')
        ours.close()
        each, other = wall[1].mean() + prepare/EPOCH, wall[0].mean()
        rows.append(dict(images=n_images, dim=dim, strategy=strategy, published_ms=other*1e3, ours_ms=each*1e3, ours_ms_without_preparation=wall[1].mean()*1e3, prepare_s=prepare, geography_s=geography, graph_s=graph, edges=edges,
                         ratio=other/each, ratio_cpu=cpu[0].mean()/(cpu[1].mean() + prepare_cpu/EPOCH), ratio_geography_included=other/(each + geography/EPOCH), bar=BARS.get((n_images, dim)),
                         peak_mb=peak, published_peak_mb=their_peak, batches=EPOCH, published_batches=max(1, theirs_batches//turns)*turns))
        r = rows[-1]
        print(f'{n_images:>9,} × {dim:<5} {strategy:6s} published {r["published_ms"]:6.1f} ms, ours {r["ours_ms"]:6.3f} ms a batch: {r["ratio"]:5.0f}× (bar {r["bar"] or "-"}; by CPU time {r["ratio_cpu"]:.0f}×; '
              f'with the geography of every epoch anew {r["ratio_geography_included"]:.0f}×) | prepare {prepare:.2f} s, geography once {geography:.1f} s, the epoch\'s graph for its pictures {graph:.1f} s | peak above the data {peak:.0f} MB, published {their_peak:.0f} MB', flush=True)
    theirs.close()
    return rows


def main():
    parser = arguments(__doc__)
    parser.add_argument('--all', action='store_true', help='all sizes')
    parser.add_argument('--size', action='append', help='one size, as 500000x512 (may be given again)')
    parser.add_argument('--published', type=int, default=50, help='batches of the published miner to time')
    parser.add_argument('--data', type=Path, help='folder that keeps the input between runs (default: a temporary one)')
    parser.add_argument('--strategies', nargs='+', default=['static', 'sage'])
    args = parser.parse_args()
    sizes = [tuple(map(int, s.split('x'))) for s in args.size] if args.size else SIZES if args.all else [s for s in SIZES if s[0] == 20_000]
    rows = []
    for n, dim in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_input(Path(args.data or temporary)/f'{n}x{dim}', n, dim, args.seed)
            rows += compare(folder, n, dim, args.strategies, args.seed, args.published)
    keep('mining', args, rows, ('numpy', 'scipy', 'numba', 'pandas', 'networkx'), '' if args.all else '_'.join(args.size or ['20000']))


if __name__ == '__main__': main()
