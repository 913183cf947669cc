"""What the benchmarks share: the input, timing side by side in processes of their own, memory, and the JSON that is kept.

Every script prints ratios against a named alternative and writes one JSON file (`--out`, default bench/results/NAME.json).
"""
import argparse, importlib.metadata, json, multiprocessing, os, platform, sys, time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).resolve().parents[1]/'tools'))            # models and pictures that are no part of the package

CITIES = 'trondheim london boston melbourne amsterdam helsinki tokyo toronto saopaulo moscow zurich paris bangkok budapest austin berlin ottawa phoenix goa amman nairobi manila'.split()
MORE = 'lisbon oslo lima quito rabat seoul delhi kigali'.split()


# The input

def city_sizes(n_images, cities, seed):
    "Images of each city, heavy-tailed."
    share = np.exp(np.random.default_rng([seed, 1]).normal(0, .9, len(cities)))
    share = np.maximum(share/share.sum(), .006); share /= share.sum()
    sizes = np.round(share*n_images).astype(int); sizes[sizes.argmax()] += n_images - sizes.sum()
    return sizes

def one_city(n, r, spacing=25.):
    "n images of places of 4 to 8, along straight streets of 10 to 60 places: (positions [n, 2], place [n], street of each place)."
    images = r.integers(4, 9, size=n//4 + 2)
    places = int(np.searchsorted(np.cumsum(images), n)) + 1
    images = images[:places].copy(); images[-1] -= images.sum() - n
    if images[-1] <= 0: places -= 1; images = images[:-1].copy(); images[-1] += n - images.sum()
    street, at, i, s, side = np.zeros(places, int), np.zeros((places, 2)), 0, 0, 40*np.sqrt(places) + 500
    while i < places:
        length = min(int(r.integers(10, 61)), places - i); heading = r.uniform(0, 2*np.pi); corner = r.uniform(0, side, 2)
        at[i:i+length] = corner + np.arange(length)[:, None]*spacing*np.array([np.cos(heading), np.sin(heading)]); street[i:i+length] = s
        i += length; s += 1
    place = np.repeat(np.arange(places), images)
    return at[place] + r.uniform(-8, 8, (n, 2)), place, street

def msls_like(n_images, dim, seed=0, cities=CITIES):
    """A data set shaped like MSLS: (columns city, place, easting, northing as a dict of arrays, descriptors: a function that writes them into an array [places, dim], row by row in the order of (city, place)).
    A place's descriptor is the sum of its street's and its own, of length 1."""
    columns, blocks = {c: [] for c in ('city', 'place', 'easting', 'northing')}, {}
    for c, (city, n) in enumerate(zip(cities, city_sizes(n_images, cities, seed))):
        r = np.random.default_rng([seed, 2, c])
        xy, place, street = one_city(n, r)
        r.integers(0, 2**62, n); r.random(n)                             # names and roles of images, which nobody looks at here
        order = r.permutation(n)
        for name, values in zip(columns, (np.full(n, city), place[order], 5e5 + xy[order, 0], 4e6 + xy[order, 1])): columns[name].append(values)
        blocks[city] = r, street
    def write(out, rows=512):
        a = 0
        for city in sorted(blocks):
            r, street = blocks[city]
            base = r.standard_normal((street.max() + 1, dim), dtype=np.float32)
            for b in range(0, len(street), rows):
                F = base[street[b:b+rows]] + r.standard_normal((len(street[b:b+rows]), dim), dtype=np.float32)
                out[a+b:a+b+len(F)] = F/np.linalg.norm(F, axis=1, keepdims=True)
            a += len(street)
        return out
    return {c: np.concatenate(v) for c, v in columns.items()}, sum(len(s) for _, s in blocks.values()), write

def table_of(columns):
    "As a table of places."
    from sage.places import make_table
    return make_table(image='', zone='33N', **columns)


# Timing and memory

def memory(reset=False):
    "Peak resident memory of this process since the last reset, in MB (Linux)."
    status = Path('/proc/self/status').read_text().split('\n')
    if reset: Path('/proc/self/clear_refs').write_text('5')
    return int(next(l for l in status if l.startswith('VmRSS' if reset else 'VmHWM')).split()[1])/1024

def _serve(pipe, make, args):
    "In the other process: build the thing, then run what is asked for, and answer with its seconds."
    thing = make(*args)
    pipe.send('ready')
    while (job := pipe.recv()) is not None:
        name, arguments = job
        wall, cpu = time.perf_counter(), time.process_time()
        answer = getattr(thing, name)(*arguments)
        pipe.send((answer, time.perf_counter() - wall, time.process_time() - cpu))

class Worker:
    "An object that lives in a process of its own: `worker('method', …)` gives (answer, seconds, CPU seconds)."
    def __init__(self, make, *args):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context('spawn').Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start(); theirs.close()
        self.pipe.recv()

    def __call__(self, name, *arguments):
        self.pipe.send((name, arguments))
        return self.pipe.recv()

    def close(self):
        self.pipe.send(None); self.process.join()


# The record

def machine():
    "What ran this."
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().split('\n') if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    return dict(cpu=cpu, cores=os.cpu_count(), fast=[f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f' {f} ' in flags], threads=os.environ.get('OMP_NUM_THREADS', 'all'),
                load=round(os.getloadavg()[0], 1), system=platform.platform(terse=True))

def arguments(description, **sizes):
    "Parser with what every script takes."
    parser = argparse.ArgumentParser(description=description.split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, help='JSON file (default bench/results/NAME.json)')
    parser.add_argument('--note', default='', help='kept in the JSON, e.g. what else the machine was doing')
    return parser

def keep(name, args, rows, packages=('numpy', 'scipy', 'numba', 'pandas'), part=''):
    "Write the JSON of one benchmark; of a `part` of it, into a file of its own."
    out = args.out or Path(__file__).parent/'results'/f'{name}{"_"*bool(part)}{part}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    record = dict(bench=name, date=str(date.today()), seed=args.seed, note=args.note, machine=machine(), python=platform.python_version(), versions={p: importlib.metadata.version(p) for p in packages}, rows=rows)
    out.write_text(json.dumps(record, indent=1) + '\n')
    print(f'-> {out}')
