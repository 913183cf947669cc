"""How many images a second the packaged model describes: `create_sage('sage_nano', 'world')` and the grid, from decoded images in memory.

    python bench/nano.py [--size 112 224] [--images 32] [--turns 5]
"""
import time

import torch

from common import arguments, keep
from grid import GridModel                # of tools/
from sage.model import create_sage


def rate(model, images, turns):
    "Images a second: the best of several turns, after one that does not count."
    seconds = []
    for _ in range(turns + 1):
        start = time.perf_counter(); model.describe(images); seconds.append(time.perf_counter() - start)
    return len(images) / min(seconds[1:])


def main():
    parser = arguments(__doc__)
    parser.add_argument('--size', type=int, nargs='+', default=[112, 224]); parser.add_argument('--images', type=int, default=32, help='in a batch'); parser.add_argument('--turns', type=int, default=5)
    args, rows = parser.parse_args(), []
    for name, model in (('SAGE on sage_nano, world', create_sage('sage_nano', 'world').eval()), ('sage_nano, grid and class token', GridModel().eval())):
        for size in args.size:
            images = torch.randn(args.images, 3, size, size, generator=torch.Generator().manual_seed(args.seed))
            rows.append(dict(model=name, size=size, threads=torch.get_num_threads(), images_per_s=round(rate(model, images, args.turns), 1)))
            print('{model}: {images_per_s} images/s at {size}² with {threads} threads'.format(**rows[-1]), flush=True)
    keep('nano', args, rows, ('torch', 'timm'))


if __name__ == '__main__': main()
