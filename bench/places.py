"""How should photographs answer for a place? Each photograph of a map held out in turn (and the world's queries asked of its database): how often is the first answer within 25 m, how often one of five,
for several ways of joining the photographs of a place and of keeping answers apart.

    python bench/places.py [--photos FOLDER]

The maps are the world's test towns and, where given, a folder of photographs with positions. `sage_where` uses the first row: the nearest photograph, answers more than 25 m apart.
"""
from pathlib import Path

import numpy as np
import pandas as pd

from sage.benchmark import describe_table
from sage.photos import read_photos
from sage.places import make_places
from sage.sources import world
from sage.ground import distinct_places, in_space, latlon
from sage.where import packaged_model

from common import arguments, keep

RADIUS, TOP, DRAWS = 25., 5, 50


def nearest(d, near): # the photograph's own distance
    return d

def two_nearest(d, near): # mean of the two nearest within half the radius; the photograph's own and the farthest of all where it stands alone
    two = np.sort(np.where(near, d, np.inf), axis=1)[:, :2]
    return np.where(np.isfinite(two[:, 1]), two.mean(1), (two[:, 0] + d[np.isfinite(d)].max()) / 2)

def by_rank(d, near): # 1/rank, summed within half the radius
    rank = np.empty(len(d)); rank[np.argsort(d, kind='stable')] = np.arange(1, len(d) + 1)
    return -near.astype(float) @ np.where(np.isfinite(d), 1 / rank, 0)

def by_likeness(d, near): # exp(-2 (d - smallest)/spread), summed within half the radius
    known = d[np.isfinite(d)]
    return -near.astype(float) @ np.exp(-2 * (d - known.min()) / known.std())

JOIN = {'nearest photograph': nearest, 'mean of the two nearest': two_nearest, 'sum of 1/rank': by_rank, 'sum of likeness': by_likeness}


def cells(order, place): # the best photograph of each cell of a 25 m grid
    return order[np.sort(np.unique(place[order], return_index=True)[1])][:TOP]

def apart(order, xyz, metres): return order[distinct_places(xyz[order], metres, TOP)]


def measure(name, d, off, xyz, place):
    "d [Q, N]: descriptor distances, infinite for the photograph itself; off [Q, N]: metres. Percent of queries that have a photograph within 25 m."
    near = far(xyz, xyz) <= RADIUS / 2
    keepers = {'25 m apart': lambda o: apart(o, xyz, RADIUS), '12.5 m apart': lambda o: apart(o, xyz, RADIUS / 2), 'cells of 25 m': lambda o: cells(o, place)}
    asked = [q for q in range(len(d)) if ((off[q] <= RADIUS) & np.isfinite(d[q])).any()]
    def orders(join): return [(q, np.lexsort((d[q], np.where(np.isfinite(d[q]), join(d[q], near), np.inf)))[:np.isfinite(d[q]).sum()]) for q in asked]
    g = np.random.default_rng(0)
    ways = {n: orders(f) for n, f in JOIN.items()} | {'chance': [(q, g.permutation(np.flatnonzero(np.isfinite(d[q])))) for q in asked for _ in range(DRAWS)]}
    rows = []
    for way, found in ways.items():
        for kept, keeper in keepers.items():
            right = [off[q][keeper(o)] <= RADIUS for q, o in found]
            rows.append(dict(map=name, photographs=d.shape[1], asked=len(asked), join=way, kept=kept, first=round(100 * np.mean([r[0] for r in right]), 1), five=round(100 * np.mean([r.any() for r in right]), 1)))
    return rows


def far(a, b): return np.linalg.norm(a[:, None] - b[None], axis=2)

def held_out(name, f, xyz, place):
    d = far(f, f); np.fill_diagonal(d, np.inf)
    return measure(f'{name}, held out in turn', d, far(xyz, xyz), xyz, place)

def maps(args):
    "Rows of every map."
    model, _, side = packaged_model(); side = args.size or side
    tables = dict(world()['val']) | ({args.photos.name: read_photos(args.photos)} if args.photos else {})
    for name, df in tables.items():
        f, xyz = describe_table(model, df, side), in_space(df.assign(**dict(zip(('lat', 'lon'), latlon(df).T))))
        place = make_places(df.easting, df.northing)
        q = (df.role == 'query').to_numpy()
        if q.any(): yield measure(f'{name}, queries of the database', far(f[q], f[~q]), far(xyz[q], xyz[~q]), xyz[~q], place[~q])
        if not q.any() or df.condition.nunique() > 1 and name == next(iter(tables)): yield held_out(name, f, xyz, place)


def main():
    parser = arguments(__doc__)
    parser.add_argument('--photos', type=Path, help='a folder of photographs with positions')
    parser.add_argument('--size', type=int, help='pixels; default as sage_where')
    args = parser.parse_args()
    rows = sum(maps(args), [])
    print(pd.DataFrame(rows).pivot_table(index=['join', 'kept'], columns='map', values=['first', 'five'], sort=False).to_string())
    keep('places', args, rows, ('numpy', 'torch', 'timm'))


if __name__ == '__main__': main()
