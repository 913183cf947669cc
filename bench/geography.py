"""The geography of a data set as large as MSLS, prepared once: time, memory, and how both grow.

    python bench/geography.py --figure docs/img/geography.png     # 100 k to 1.5 M images in 30 cities: three minutes

The named alternative is scipy's k-d tree, city by city, for the neighbours alone: everybody's (query_ball_point), and each pair once, as an array (query_pairs). Medians of several turns; how time grows is seen within each turn.
"""
import os, resource
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path

import numpy as np

from common import CITIES, MORE, Worker, arguments, keep, memory, msls_like, table_of

SIZES = [100_000, 200_000, 400_000, 800_000, 1_500_000]
SECONDS, GIGABYTES = 180, 6                                              # what 1.5 M images may take


class Geography:
    def __init__(self, n, seed):
        from sage.graph import GeoSide
        self.GeoSide, self.table = GeoSide, table_of(msls_like(n, 1, seed, CITIES + MORE)[0])
        GeoSide(self.table[:2000].reset_index(drop=True))                # compiled
        self.start = memory(reset=True)

    def prepare(self):
        system = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_stime
        before = system()
        self.geo = self.GeoSide(self.table)
        return len(self.geo.places), len(self.geo.neighbors.indices)//2, memory() - self.start, system() - before

    def trees(self):
        from scipy.spatial import cKDTree
        city = self.geo.place_city[self.geo.codes]
        return ((cKDTree(xy), xy) for xy in (self.geo.xy[city == c] for c in range(len(self.geo.cities))))

    def everybody(self): return sum(sum(map(len, tree.query_ball_point(xy, np.nextafter(25., 0)))) - len(xy) for tree, xy in self.trees())//2

    def pairs(self): return sum(len(tree.query_pairs(np.nextafter(25., 0), output_type='ndarray')) for tree, _ in self.trees())


def figure(rows, path):
    "CPU time against images, that of the first being 1, both axes logarithmic, with n · log n through the first point."
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    n, t = (np.array([r[c] for r in rows]) for c in ('images', 'cpu_seconds'))
    t = t/t[0]
    fig, ax = plt.subplots(figsize=(4.5, 2.8), dpi=90)
    ax.loglog(n, t, 'o-', label='geography, measured'); ax.loglog(n, t[0]*n*np.log(n)/(n[0]*np.log(n[0])), 'k:', label='n · log n')
    ax.set_xticks(n, [f'{x/1e6:g} M' for x in n]); ax.set_yticks(ticks := [v for v in (.5, 1, 2, 5, 10, 20, 50) if .7*t.min() < v < 1.5*t.max()], [f'{v:g}' for v in ticks]); ax.minorticks_off()
    ax.set(xlabel='images', ylabel=f'CPU time, {n[0]/1e6:g} M images = 1'); ax.legend(fontsize=8); ax.grid(alpha=.3); fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True); fig.savefig(path, metadata=dict(Software=None)); print(f'-> {path}')


def main():
    parser = arguments(__doc__)
    parser.add_argument('--sizes', nargs='+', type=int, default=SIZES)
    parser.add_argument('--repeats', type=int, default=5, help='turns; in each, every size works about as long, and is set against the first one')
    parser.add_argument('--figure', type=Path, help='draw it here')
    args = parser.parse_args()
    workers = [Worker(Geography, n, args.seed) for n in args.sizes]
    often = [max(1, round(args.sizes[-1]/n)) for n in args.sizes]
    first, turns, trees = [w('prepare')[0] for w in workers], [], []
    for _ in range(args.repeats):
        turns.append([[w('prepare') for _ in range(k + 1)][1:] for w, k in zip(workers, often)])         # once before it counts: what has been idle may have been moved out of memory
        trees.append([[w('everybody'), w('pairs')] for w in workers])
    for w in workers: w.close()
    times = np.array([[[np.mean([r[c] for r in runs]) for c in (1, 2)] for runs in turn] for turn in turns])         # [turn, size, (seconds, CPU seconds)]
    system = np.array([[np.mean([r[0][3] for r in runs]) for runs in turn] for turn in turns])
    growth, own = (t/t[:, :1]/(np.array(args.sizes)*np.log(args.sizes)/(args.sizes[0]*np.log(args.sizes[0]))) for t in (times[:, :, 1], times[:, :, 1] - system))
    tree_cpu, rows = np.median([[[t[2] for t in ways] for ways in turn] for turn in trees], 0), []
    for i, n in enumerate(args.sizes):
        (places, pairs, peak, _), (seconds, cpu), (least, middle, most) = first[i], np.median(times[:, i], 0), np.percentile(growth[:, i], [0, 50, 100])
        assert trees[0][i][0][0] == trees[0][i][1][0] == pairs
        rows.append(dict(images=n, places=places, pairs=pairs, seconds=seconds, cpu_seconds=cpu, peak_mb=peak, tree_cpu_seconds=tree_cpu[i, 0], ratio_to_tree=tree_cpu[i, 0]/cpu, pairs_cpu_seconds=tree_cpu[i, 1], ratio_to_pairs=tree_cpu[i, 1]/cpu, growth_over_n_log_n=middle, growth_least=least, growth_most=most, growth_without_system=np.median(own[:, i]), system_seconds=np.median(system[:, i])))
        print(f'{n:>9,} images, {places:,} places, {pairs:,} pairs: {seconds:6.2f} s (bar at 1.5 M: {SECONDS} s), {peak:,.0f} MB above the table (bar {GIGABYTES} GB), {middle:.2f} of n·log n ({least:.2f} to {most:.2f}; of it {np.median(system[:, i]):.2f} s in the system, for fresh memory; {np.median(own[:, i]):.2f} without them); the neighbours alone by scipy\'s tree {tree_cpu[i, 0]:.2f} s of CPU time ({tree_cpu[i, 0]/cpu:.1f}×), each pair once {tree_cpu[i, 1]:.2f} s ({tree_cpu[i, 1]/cpu:.1f}×)', flush=True)
    if args.figure: figure(rows, args.figure)
    keep('geography', args, rows)


if __name__ == '__main__': main()
