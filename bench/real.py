"""How far untrained pixels, gradients and the packaged weights get on real images: recall@1/5/10 of each descriptor on one folder.

    python bench/real.py --data FOLDER

FOLDER holds database and queries as `sage_eval --data` takes them (default: `corridor` in $SAGE_SHARED/data or ../shared/data; without it there is nothing to do).
No figure of this script chose any weight, pooling or size of the packaged SAGE; docs/model_card.md says what had been looked at before it was written.
"""
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sage.benchmark import describe_table, score
from sage.images import load_image
from sage.model import create_sage
from sage.sources import evaluation_sets

from common import arguments, keep
from grid import GridModel                # of tools/

SHARED = Path(os.environ.get('SAGE_SHARED', Path(__file__).parents[2]/'shared'))


POOLINGS = dict(mean='mean', gem='GeM', cls='class token')


def grey(path, side):
    "A picture [side, side], 0 to 1."
    return np.asarray(load_image(path).convert('L').resize((side, side)), np.float32)/255

def pixels(path, side=32):
    "Each patch of 8 × 8 of a small grey picture with mean 0 and deviation 1."
    x = grey(path, side).reshape(side//8, 8, side//8, 8).swapaxes(1, 2).reshape(-1, 64)
    return ((x - x.mean(1, keepdims=True))/(x.std(1, keepdims=True) + 1e-3)).ravel()

def hog(path, side=128, cell=16, bins=9):
    "Histograms of oriented gradients (Dalal and Triggs 2005): cells of 16 × 16, blocks of 2 × 2 cells at unit length, clipped at 0.2, unit length again."
    gy, gx = np.gradient(grey(path, side))
    size, angle = np.hypot(gx, gy), np.arctan2(gy, gx) % np.pi/np.pi*bins
    low, share, n = np.floor(angle).astype(int) % bins, angle % 1, side//cell
    votes = np.zeros((side, side, bins), np.float32)
    for b, w in ((low, 1 - share), ((low + 1) % bins, share)): np.put_along_axis(votes, b[..., None], np.take_along_axis(votes, b[..., None], 2) + (size*w)[..., None], 2)
    h = votes.reshape(n, cell, n, cell, bins).sum((1, 3))
    blocks = np.stack([h[i:n - 1 + i, j:n - 1 + j] for i in (0, 1) for j in (0, 1)], 2).reshape(-1, 4*bins)
    unit = lambda x: x/(np.linalg.norm(x, axis=1, keepdims=True) + 1e-6)
    return unit(np.minimum(unit(blocks), .2)).ravel()


class Raw(torch.nn.Module):
    "A frozen ViT with a pooling: 'mean', 'gem' (power 3) or 'cls'."
    def __init__(self, pooling, pretrained=True, seed=0):
        super().__init__()
        self.sage, self.pooling = create_sage('sage_nano', pretrained, seed=seed), pooling
        self.dim, self.patch = self.sage.backbone.dim, self.sage.patch

    def prefix(self, images): return self.sage.prefix(images)

    def from_prefix(self, tokens, cross_image=False):
        cls, patches = self.sage.backbone.suffix(tokens, power=False)
        return F.normalize(dict(cls=lambda: cls, mean=lambda: patches.mean(1), gem=lambda: patches.clamp(min=1e-6).pow(3).mean(1).pow(1/3))[self.pooling](), dim=1)


def by_path(describe): return lambda: lambda df, size: np.stack([describe(p) for p in df.image]).astype(np.float32)
def by_model(make): return lambda: (lambda model: lambda df, size: describe_table(model, df, size))(make())

def methods(seed):
    "Name → how to make a function (table, size) → descriptors."
    out = {'raw pixels, 32²': by_path(pixels), 'HOG, 128²': by_path(hog)}
    out |= {f'random ViT, {text}': by_model(lambda k=k: Raw(k, False, seed)) for k, text in POOLINGS.items()}
    out |= {f'sage_nano, {text}': by_model(lambda k=k: Raw(k)) for k, text in POOLINGS.items()}
    return out | {'sage_nano, grid and class token': by_model(GridModel), 'SAGE on sage_nano, untrained': by_model(lambda: create_sage('sage_nano', seed=seed)), 'SAGE on sage_nano, world': by_model(lambda: create_sage('sage_nano', 'world'))}


def measure(sets, sizes, seed, only=('',)):
    "A row for each set, method and size."
    rows = []
    for protocol, e in sets:
        for name, make in methods(seed).items():
            if not any(part in name for part in only): continue
            describe = make()
            for size in sizes if name.startswith(('sage_nano', 'SAGE', 'random')) else sizes[:1]:
                recalls, without = score(describe(e.queries, size), describe(e.database, size), e.positives, (1, 5, 10))
                rows.append(dict(set=protocol.title, rule=protocol.positive, queries=len(e.queries) - without, method=name, size=size if 'ViT' in name or 'nano' in name else None, **{f'R@{k}': round(v, 1) for k, v in recalls.items()}))
                print('  '.join(f'{v}' for v in rows[-1].values()), flush=True)
    return rows


def main():
    parser = arguments(__doc__)
    parser.add_argument('--data', type=Path, action='append', help='folder with database and queries, or world')
    parser.add_argument('--size', type=int, nargs='+', default=[112, 224])
    parser.add_argument('--only', nargs='+', default=[''], help='methods whose name holds one of these')
    args = parser.parse_args()
    data = args.data or [SHARED/'data'/'corridor']
    if not args.data and not data[0].is_dir(): return print(f'{data[0]} is not there: name a folder with --data')
    keep('real', args, measure(evaluation_sets([str(d) for d in data], progress=False), args.size, args.seed, args.only), ('numpy', 'torch', 'timm'))


if __name__ == '__main__': main()
