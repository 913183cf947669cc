"""A training step and a description on one GPU: images a second, share of the matrix peak, memory, and where the time goes.

    python bench/gpu_step.py                                   ViT-B and ViT-L at 224² and 322², 240 images, on the first GPU
    python bench/gpu_step.py --models ViT-B --sides 224        a part of it; what --out holds of other parts is kept
    python bench/gpu_step.py --tiny                            the small backbone at 56², 12 images, on the CPU: shows that the script runs, says nothing about a GPU

Ways: eager    float32, attention in steps, as published          (the alternative that ratios are against)
      bf16     bfloat16 autocast, attention in steps
      sdpa     bfloat16 autocast, fused attention                 (what sage_train does)
      compile  the same, blocks and probing through torch.compile
The matrix peak is measured first: the best of a few large products in bfloat16. The memory that sage_train --dry-run expects (with fused attention) stands beside what was held.
Parts of the time are told by events in the device's own queue, between the parts: the profiler books the kernels of the backward pass on another thread.
"""
import gc, json, time
from pathlib import Path

import torch

from common import arguments, keep, machine
from embedding import step_flops
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
    "Operations a second of a bfloat16 product, the best of a few sizes."
    best = 0.
    for n in (256, 512) if tiny else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * n**3 / seconds(lambda: a @ b, device, 10))
    return best


class Step:
    "Forward, loss, backward and optimiser on noise that stays on the device: no loader."
    def __init__(self, s, way, device):
        precision, fused, compiled = WAYS[way]
        self.s, self.device, self.precision = s, device, precision
        model = make_model(s, pretrained=False).to(device); model.backbone.fuse(fused)
        self.module = SageModule(model, s).train()
        self.optimizer = self.module.configure_optimizers()['optimizer']
        n = s.places_per_batch * s.images_per_place
        self.images, self.labels = torch.randn(n, 3, s.image_size, s.image_size, device=device), torch.arange(n, device=device) // s.images_per_place
        self.prefix, self.last, self.probe = model.backbone.prefix, model.backbone.suffix, model.probing
        if compiled: self.prefix, self.last, self.probe = (torch.compile(f) for f in (self.prefix, self.last, self.probe))

    def __call__(self, mark=lambda part: None):
        with autocast(self.device, self.precision):
            tokens = self.prefix(self.images); mark('frozen blocks')
            cls, patches = self.last(tokens); mark('last blocks')
            d = self.probe(patches, cls); mark('probing')
        d = d.float(); loss = self.module.loss(d, self.labels, self.module.miner(d, self.labels)); mark('miner and loss')
        loss.backward(); mark('backward')
        self.optimizer.step(); self.optimizer.zero_grad(); mark('optimizer')

    @torch.no_grad()
    def describe(self):
        self.module.eval()
        with autocast(self.device, self.precision): self.probe(*reversed(self.last(self.prefix(self.images))))
        self.module.train()

    def parts(self):
        "Share of the time by part."
        marks = [('', self.moment())]
        self(lambda part: marks.append((part, self.moment())))
        wait(self.device)
        spent = {part: between(a, b) for (_, a), (part, b) in zip(marks, marks[1:])}
        return {k: v / max(sum(spent.values()), 1e-9) for k, v in spent.items()}

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
    return dict(train_images_per_s=n / t, mfu=step_flops(s.backbone, s.image_size) * n / t / peak, describe_images_per_s=described, memory=held, expected=expected, parts=step.parts())

def tried(*args):
    "A row, or why there is none: one that fails takes no other with it."
    try: return measure(*args)
    except torch.cuda.OutOfMemoryError: return dict(failed='does not fit')
    except Exception as e: return dict(failed=f'{type(e).__name__}: {" ".join(str(e).split())[:300]}')

def line(row, first):
    "A row for a reader."
    name = f'{row["model"]} {row["side"]}² {row["way"]:<8}'
    if 'failed' in row: return f'{name} {row["failed"]}'
    gigabytes = ''.join(f', {what} {row[key]/1e9:.2f} GB' for what, key in (('expected', 'expected'), ('held', 'memory')) if row[key])
    ratio = f' ({row["train_images_per_s"]/first:.2f}×)' if first else ''
    return f'{name} {row["train_images_per_s"]:8.1f} images/s{ratio}, {row["mfu"]:.0%} of the peak, describe {row["describe_images_per_s"]:.1f}/s{gigabytes}; ' + ', '.join(f'{k} {v:.0%}' for k, v in row['parts'].items())

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
            rows.append(row)
            print(line(row, next((r.get('train_images_per_s') for r in rows if (r['model'], r['side'], r['way']) == (model, side, 'eager')), None)), flush=True)
            keep(name, args, rows, ('torch', 'timm', 'lightning', 'numpy'))

if __name__ == '__main__': main()
