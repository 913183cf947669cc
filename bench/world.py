"""How fast the world is drawn: photographs a second, one process against two.

    python bench/world.py
"""
import time
from concurrent.futures import ProcessPoolExecutor

from sage.core import stream
from sage.render import CONDITIONS, Camera, Photographer, draw_condition
from sage.town import Town, headings

from common import arguments, keep


def photographs(kind, n=100, size=112):
    "Take n photographs under one condition."
    town = Town(1, 'bench')
    take, line = Photographer(town, draw_condition(kind, stream(1, kind))), town.streets[0]
    for i in range(n): take(Camera(*line[20 + i % (len(line) - 40)], heading=headings(line)[i % len(line)]), size)
    return n


def main():
    args, rates = arguments(__doc__).parse_args(), {}
    for processes in (1, 2):
        with ProcessPoolExecutor(processes) as pool:
            list(pool.map(photographs, ['day'] * processes, [2] * processes))  # imports and first calls are not counted
            start = time.perf_counter()
            rates[processes] = sum(pool.map(photographs, CONDITIONS)) / (time.perf_counter() - start)
    print(f'one process   {rates[1]:6.0f} photographs/s at 112 × 112\ntwo processes {rates[2]:6.0f} photographs/s, {rates[2] / rates[1]:.2f} times as many')
    keep('world', args, [dict(processes=n, photographs_per_s=r) for n, r in rates.items()], ('numpy', 'pillow'))


if __name__ == '__main__': main()
