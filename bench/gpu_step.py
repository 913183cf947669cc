"""A training step and a description on one GPU: images a second, share of the matrix peak, memory, and where the time goes.

    python bench/gpu_step.py            ViT-B and ViT-L at 224² and 322², 240 images, on the first GPU
    python bench/gpu_step.py --tiny     the small backbone at 56², 12 images, on the CPU: shows that the script runs, says nothing about a GPU

Ways: eager    float32, attention in steps, as published          (the alternative that ratios are against)
      sdpa     bfloat16 autocast, fused attention                 (what sage_train does)
      compile  the same, blocks and probing through torch.compile
The matrix peak is measured first: the best of a few large products in bfloat16. The memory that sage_train --dry-run expects stands beside what was held.
"""
import os, time
os.environ.setdefault("KINETO_LOG_LEVEL", "99") # the profiler's own messages

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common import arguments, keep, machine
from embedding import step_flops
from sage.feed import autocast
from sage.learner import SageModule
from sage.memory import expected_bytes
from sage.settings import Settings, make_model

WAYS = dict(eager=('32-true', False, False), sdpa=('bf16-mixed', True, False), compile=('bf16-mixed', True, True))


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

    def __call__(self):
        with autocast(self.device, self.precision):
            with record_function('part: frozen blocks'): tokens = self.prefix(self.images)
            with record_function('part: last blocks'): cls, patches = self.last(tokens)
            with record_function('part: probing'): d = self.probe(patches, cls)
        with record_function('part: miner and loss'):
            d = d.float(); loss = self.module.loss(d, self.labels, self.module.miner(d, self.labels))
        with record_function('part: backward'): loss.backward()
        with record_function('part: optimizer'): self.optimizer.step(); self.optimizer.zero_grad()

    @torch.no_grad()
    def describe(self):
        self.module.eval()
        with autocast(self.device, self.precision): self.probe(*reversed(self.last(self.prefix(self.images))))
        self.module.train()

    def parts(self):
        "Share of the time by part, as the profiler saw it."
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == 'cuda')) as p: self(); wait(self.device)
        spent = {e.key.removeprefix('part: '): max(e.device_time_total, 0) if self.device == 'cuda' else e.cpu_time_total for e in p.key_averages() if e.key.startswith('part: ')}
        return {k: v / max(sum(spent.values()), 1e-9) for k, v in spent.items()}


def measure(name, s, way, device, peak, turns):
    "One row."
    step = Step(s, way, device)
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    n, t = len(step.images), seconds(step, device, turns)
    held = torch.cuda.max_memory_allocated() if device == 'cuda' else None
    expected = expected_bytes(Settings(**{**vars(s), 'precision': WAYS[way][0]}), device=device)['peak']
    described = n / seconds(step.describe, device, turns)
    return dict(model=name, side=s.image_size, way=way, images=n, train_images_per_s=n / t, mfu=step_flops(s.backbone, s.image_size) * n / t / peak, describe_images_per_s=described, memory=held, expected=expected, parts=step.parts())

def main():
    parser = arguments(__doc__)
    parser.add_argument('--tiny', action='store_true', help='a toy size on the CPU')
    parser.add_argument('--turns', type=int, default=10)
    parser.add_argument('--ways', nargs='+', default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available(): return print('no GPU here, nothing measured; --tiny shows on the CPU that the script runs')
    device, turns = ('cpu', 2) if args.tiny else ('cuda', args.turns)
    cases = [('nano', 'sage_nano', 56)] if args.tiny else [(n, f'vit_{f}_patch14_dinov2.lvd142m', side) for n, f in (('ViT-B', 'base'), ('ViT-L', 'large')) for side in (224, 322)]
    peak, rows = matrix_peak(device, args.tiny), []
    print(machine(), torch.cuda.get_device_name() if device == 'cuda' else 'CPU, toy size: no statement about a GPU', f'matrix peak {peak/1e12:.1f} TFLOP/s', sep='\n', flush=True)
    for name, backbone, side in cases:
        s = Settings(backbone=backbone, image_size=side, places_per_batch=4 if args.tiny else 60, images_per_place=3 if args.tiny else 4, device=device)
        for way in args.ways:
            try: row = measure(name, s, way, device, peak, turns)
            except torch.cuda.OutOfMemoryError: row = dict(model=name, side=side, way=way, memory='does not fit')
            rows.append(row)
            first = next((r.get('train_images_per_s') for r in rows if (r['model'], r['side'], r['way']) == (name, side, 'eager')), None)
            if 'mfu' not in row: print(f'{name} {side}² {way}: does not fit'); continue
            print(f'{name} {side}² {way:<8} {row["train_images_per_s"]:8.1f} images/s' + (f' ({row["train_images_per_s"]/first:.2f}×)' if first else '') + f', {row["mfu"]:.0%} of the peak, describe {row["describe_images_per_s"]:.1f}/s, expected {row["expected"]/1e9:.2f} GB'
                  + (f', held {row["memory"]/1e9:.2f} GB' if row['memory'] else '') + '; ' + ', '.join(f'{k} {v:.0%}' for k, v in row['parts'].items()), flush=True)
            if device == 'cuda': torch.cuda.empty_cache()
    keep('gpu_step_tiny' if args.tiny else 'gpu_step', args, dict(device=torch.cuda.get_device_name() if device == 'cuda' else 'CPU', matrix_peak=peak, rows=rows), ('torch', 'timm', 'lightning', 'numpy'))

if __name__ == '__main__': main()
