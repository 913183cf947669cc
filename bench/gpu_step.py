"""A training step and a description on one GPU: images a second, share of the matrix peak, memory, and where the time goes.

    python bench/gpu_step.py                                   ViT-B and ViT-L at 224² and 322², 240 images, on the first GPU
    python bench/gpu_step.py --models ViT-B --sides 224        a part of it; what --out holds of other parts is kept
    python bench/gpu_step.py --tiny                            the small backbone at 56², 12 images, on the CPU: shows that the script runs, says nothing about a GPU

Ways: eager    float32 (no TF32), attention in steps, as published (the alternative that ratios are against)
      bf16     bfloat16 autocast, attention in steps
      sdpa     bfloat16 autocast, fused attention                 (what sage_train does)
      compile  the same, blocks and probing through torch.compile
The step is sage_train's own (`SageModule.training_step` and what follows it), without Lightning's loop and the loader. The matrix peak is measured first: the best of a few large products in bfloat16; every share is of it.
The memory that sage_train --dry-run expects (with fused attention) stands beside what was held. Parts of the time, means over the turns, are told by events in the device's own queue, between the parts: the profiler books the
kernels of the backward pass on another thread. At the end the bars: 45 % of the peak, 2 × eager, memory within 15 %.
"""
import gc, json, time
from collections import Counter
from pathlib import Path

import torch

from common import arguments, keep, machine
from embedding import flops
from sage.feed import autocast
from sage.learner import SageModule
from sage.memory import expected_bytes
from sage.settings import Settings, make_model

WAYS = dict(eager=('32-true', False, False), bf16=('bf16-mixed', False, False), sdpa=('bf16-mixed', True, False), compile=('bf16-mixed', True, True))


def wait(device):
    if device == 'cuda': torch.cuda.synchronize()

def seconds(f, device, turns):
    "Mean of some turns after two that do not count."
    for _ in range(2): f()
    wait(device); start = time.perf_counter()
    for _ in range(turns): f()
    wait(device)
    return (time.perf_counter() - start) / turns

def matrix_peak(device, tiny):
    "Operations a second of a bfloat16 product (on the CPU, which may only imitate it, float32), the best of a few sizes."
    best, kind = 0., torch.float32 if tiny else torch.bfloat16
    for n in (256, 512) if tiny else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
        best = max(best, 2 * n**3 / seconds(lambda: a @ b, device, 10))
    return best


class Step:
    "Forward, loss, backward and optimiser on noise that stays on the device: no loader."
    def __init__(self, s, way, device):
        precision, fused, compiled = WAYS[way]
        self.s, self.device, self.precision = s, device, precision
        self.model = m = make_model(s, pretrained=False).to(device); m.backbone.fuse(fused)
        self.module = SageModule(m, s).train()
        self.optimizer = self.module.configure_optimizers()['optimizer']
        n = s.places_per_batch * s.images_per_place
        self.images, self.labels = torch.randn(n, 3, s.image_size, s.image_size, device=device), torch.arange(n, device=device) // s.images_per_place
        if compiled: m.backbone.prefix, m.backbone.suffix, m.probing = (torch.compile(f) for f in (m.backbone.prefix, m.backbone.suffix, m.probing))

    def __call__(self):
        with autocast(self.device, self.precision): loss = self.module.training_step((self.images, torch.zeros_like(self.labels), self.labels), 0)
        loss.backward()
        self.finish()

    def finish(self):
        assert not self.module.broken_gradients()
        self.optimizer.step(); self.optimizer.zero_grad()

    def in_parts(self, mark):
        "The same, told after each part."
        m = self.model
        with autocast(self.device, self.precision):
            tokens = m.prefix(self.images); mark('frozen blocks')
            cls, patches = m.backbone.suffix(tokens); mark('last blocks')
            d = m.probing(patches, cls).float(); mark('probing')
        loss = self.module.loss(d, self.labels, self.module.miner(d, self.labels)); mark('miner and loss')
        loss.backward(); mark('backward')
        self.finish(); mark('optimizer')

    @torch.no_grad()
    def describe(self):
        self.module.eval()
        with autocast(self.device, self.precision): self.model(self.images)
        self.module.train()

    def parts(self, turns):
        "Share of the time by part."
        spent = Counter()
        for _ in range(turns):
            marks = [('', self.moment())]
            self.in_parts(lambda part: marks.append((part, self.moment())))
            wait(self.device)
            spent.update({part: between(a, b) for (_, a), (part, b) in zip(marks, marks[1:])})
        return {k: v / max(spent.total(), 1e-9) for k, v in spent.items()}

    def moment(self): # now, in the device's queue
        if self.device != 'cuda': return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True); event.record()
        return event


def between(a, b): return b - a if isinstance(a, float) else a.elapsed_time(b)

def measure(name, s, way, device, peak, turns):
    "One row."
    torch._dynamo.reset(); gc.collect()                        # a second size would be compiled for any size
    if device == 'cuda': torch.cuda.empty_cache()
    step = Step(s, way, device)
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    n, t = len(step.images), seconds(step, device, turns)
    held = torch.cuda.max_memory_allocated() if device == 'cuda' else None
    precision, fused, _ = WAYS[way]
    expected = expected_bytes(Settings(**{**vars(s), 'precision': precision}), device=device)['peak'] if fused else None
    described = n / seconds(step.describe, device, turns)
    share = lambda speed, **how: flops(s.backbone, s.image_size, **how) * speed / peak
    return dict(train_images_per_s=n / t, mfu=share(n / t), describe_images_per_s=described, describe_mfu=share(described, backward=False), memory=held, expected=expected, parts=step.parts(turns))

def tried(*args):
    "A row, or why there is none: one that fails takes no other with it."
    try: return measure(*args)
    except torch.cuda.OutOfMemoryError: return dict(failed='does not fit')
    except Exception as e: return dict(failed=f'{type(e).__name__}: {" ".join(str(e).split())[:300]}')

def against(row, eager):
    "A row with its ratios to the row of the published way, and how far the expected memory is off."
    ratios = {f'{what}_ratio': row[f'{what}_images_per_s'] / eager[f'{what}_images_per_s'] for what in ('train', 'describe')} if eager and 'failed' not in row else {}
    return row | ratios | (dict(memory_off=row['expected'] / row['memory'] - 1) if row.get('expected') and row.get('memory') else {})

def line(row):
    "A row for a reader."
    name, times = f'{row["model"]} {row["side"]}² {row["way"]:<8}', lambda key: f' ({row[key]:.2f}×)' if key in row else ''
    if 'failed' in row: return f'{name} {row["failed"]}'
    gigabytes = ''.join(f', {what} {row[key]/1e9:.2f} GB' for what, key in (('expected', 'expected'), ('held', 'memory')) if row[key])
    return (f'{name} {row["train_images_per_s"]:8.1f} images/s{times("train_ratio")}, {row["mfu"]:.0%} of the peak, describe {row["describe_images_per_s"]:.1f}/s{times("describe_ratio")}, {row["describe_mfu"]:.0%}{gigabytes}; '
            + ', '.join(f'{k} {v:.0%}' for k, v in row['parts'].items()))

def bars(rows):
    "What was to be reached, and what was, by the best way of each model and size."
    done = [r for r in rows if 'mfu' in r]
    for model, side in dict.fromkeys((r['model'], r['side']) for r in done):
        mine = [r for r in done if (r['model'], r['side']) == (model, side)]
        best, off = max(mine, key=lambda r: r['mfu']), [r['memory_off'] for r in mine if 'memory_off' in r and r['way'] == 'sdpa']
        yield f'{model} {side}²: {best["mfu"]:.0%} of the peak by {best["way"]} (bar 45 %), {best.get("train_ratio", float("nan")):.2f}× the eager step (bar 2×)' + (f', expected memory off by {off[0]:+.0%} (bar 15 %)' if off else '')

def main():
    parser = arguments(__doc__)
    parser.add_argument('--tiny', action='store_true', help='a toy size on the CPU')
    parser.add_argument('--turns', type=int, default=10)
    parser.add_argument('--ways', nargs='+', default=list(WAYS), choices=list(WAYS))
    parser.add_argument('--models', nargs='+', default=['ViT-B', 'ViT-L'], choices=['ViT-B', 'ViT-L'])
    parser.add_argument('--sides', nargs='+', type=int, default=[224, 322])
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available(): return print('no GPU here, nothing measured; --tiny shows on the CPU that the script runs')
    device, turns, name = ('cpu', 2, 'gpu_step_tiny') if args.tiny else ('cuda', args.turns, 'gpu_step')
    args.out = args.out or Path(__file__).parent/'results'/f'{name}.json'
    cases = [('nano', 'sage_nano', 56)] if args.tiny else [(n, f'vit_{dict(B="base", L="large")[n[-1]]}_patch14_dinov2.lvd142m', side) for n in args.models for side in args.sides]
    mine = lambda r: (r['model'], r['side']) in {(n, side) for n, _, side in cases} and r['way'] in args.ways
    peak, card = matrix_peak(device, args.tiny), torch.cuda.get_device_name() if device == 'cuda' else 'CPU, toy size: no statement about a GPU'
    rows = [r for r in json.loads(args.out.read_text())['rows'] if r['device'] == card and not mine(r)] if args.out.exists() else []
    print(machine(), card, f'matrix peak {peak/1e12:.1f} TFLOP/s', sep='\n', flush=True)
    for model, backbone, side in cases:
        s = Settings(backbone=backbone, image_size=side, places_per_batch=4 if args.tiny else 60, images_per_place=3 if args.tiny else 4, device=device)
        for way in args.ways:
            row = dict(device=card, matrix_peak=peak, model=model, side=side, way=way, images=s.places_per_batch * s.images_per_place) | tried(model, s, way, device, peak, turns)
            rows.append(against(row, next((r for r in rows + [row] if (r['device'], r['model'], r['side'], r['way']) == (card, model, side, 'eager') and 'failed' not in r), None)))
            print(line(rows[-1]), flush=True)
            keep(name, args, rows, ('torch', 'timm', 'lightning', 'numpy'))
    print(*bars([r for r in rows if r['device'] == card]), sep='\n')

if __name__ == '__main__': main()
