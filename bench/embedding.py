"""Describing, rebuilding the graph, loading: what each costs against the named alternative, run by turns in one process.

    python bench/embedding.py [--backbone NAME] [--images 8] [--turns 3] [--only describe,rebuild,loader,decoding,layout,compile]

describe  against the published way: the whole forward in float32, attention step by step, no gradient
rebuild   embedding of images on the disk: from pixels, and from kept tokens (sage.prefix) of the frozen blocks
loader    JPEG files of 640 x 480: decoded, distorted and batched by one process, and how many such processes a GPU would keep busy
decoding  from a file to a tensor: Pillow, as it is done, against torchvision's decoder and a resize of tensors, which were tried
layout    describing with images and weights laid out channels last, against as they are; only when asked for
compile   describing through torch.compile against without it, fused attention in both; only when asked for, since compiling takes minutes

Weights are random, LayerScale is set to 1 (as made it is 1e-5, and the blocks would hardly count): times do not depend on them, and rounding has something to work on.
"""
import argparse, copy, tempfile, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from common import arguments, keep, machine
from sage.core import stream
from sage.feed import Steps, Sources, Views, autocast, embed
from sage.images import MEAN, STD, eval_transform, load_image, train_transform
from sage.learner import SageModule
from sage.model import create_sage
from sage.places import make_table
from sage.prefix import PrefixCache
from sage.settings import Settings, make_model

SPEC = 989e12 # bfloat16 operations a second that NVIDIA states for one H200, dense


def model_for(name):
    "A SAGE with random weights whose blocks count."
    model = create_sage(name, pretrained=False).eval()
    for n, p in model.named_parameters():
        if n.endswith('.gamma'): p.data.fill_(1.)
    return model

def photographs(folder, n, seed=0):
    "JPEG files of 640 x 480 with some structure, as a table."
    paths = []
    for i in range(n):
        rough = stream(seed, 'photo', i).integers(0, 255, (12, 16, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(rough).resize((640, 480), Image.Resampling.BICUBIC), np.int16) + stream(seed, 'grain', i).integers(-12, 13, (480, 640, 1))
        paths.append(f'{folder}/{i:04d}.jpg'); Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return make_table(image=paths, city='x', place=np.arange(n) // 4, easting=np.arange(n) * 10., northing=0., zone='33N')

def by_turns(ways, turns):
    "(seconds of each way, the least of several turns, CPU seconds of all threads); every way is run once before."
    wall, cpu = (dict.fromkeys(ways, float('inf')) for _ in range(2))
    for turn in range(turns + 1):
        for name, f in ways.items():
            start = time.perf_counter(), time.process_time(); f()
            if turn: wall[name], cpu[name] = min(wall[name], time.perf_counter() - start[0]), min(cpu[name], time.process_time() - start[1])
    return wall, cpu


def describe(args):
    "Rows for 224² and 322². bfloat16 only where the processor has instructions for it, or --bf16 asks for it."
    model, rows = model_for(args.backbone), []
    for side in args.sides:
        images = torch.stack([eval_transform(side)(Image.open(p)) for p in args.photos.image[:args.images]])
        def way(fused, precision):
            def run():
                model.backbone.fuse(fused)
                with autocast('cpu', precision): return model.describe(images)
            return run
        ways = {'published: float32, attention in steps': way(False, '32-true'), 'float32, fused attention': way(True, '32-true')} | ({'bfloat16, fused attention': way(True, 'bf16-mixed')} if args.bf16 else {})
        seconds, cpu = by_turns(ways, args.turns)
        exact = (out := [f() for f in ways.values()])[0]
        between = (exact @ exact.T)[~torch.eye(len(exact), dtype=bool)]
        for (name, t), d in zip(seconds.items(), out):
            rows.append(dict(what='describe', side=side, images=len(images), way=name, images_per_s=len(images) / t, ratio=seconds[next(iter(ways))] / t, ratio_cpu=cpu[next(iter(ways))] / cpu[name], least_cosine=(d * exact).sum(1).min().item(), cosine_between_images=between.max().item()))
            print('describe {side}²  {way:<40} {ratio:5.2f}× (CPU time {ratio_cpu:.2f}×)  least cosine {least_cosine:.5f} (different images {cosine_between_images:.5f})'.format(**rows[-1]), flush=True)
    return rows


def layout(args):
    "Channels last: the patch embedding is the only convolution of a ViT."
    plain, rows, side = model_for(args.backbone), [], args.sides[0]
    plain.backbone.fuse(True)
    last, images = copy.deepcopy(plain).to(memory_format=torch.channels_last), torch.stack([eval_transform(side)(Image.open(p)) for p in args.photos.image[:args.images]])
    ways = {'as it is': (plain, images), 'channels last': (last, images.contiguous(memory_format=torch.channels_last))}
    for precision in ('32-true', 'bf16-mixed')[:1 + args.bf16]:
        def run(m, x):
            with autocast('cpu', precision): return m.describe(x)
        seconds, cpu = by_turns({name: lambda w=w: run(*w) for name, w in ways.items()}, 2*args.turns)
        rows.append(dict(what='layout', side=side, precision=precision, ratio=seconds['as it is']/seconds['channels last'], ratio_cpu=cpu['as it is']/cpu['channels last'], least_cosine=(run(*ways['as it is'])*run(*ways['channels last'])).sum(1).min().item()))
        print('layout {side}² {precision:<11} channels last {ratio:5.2f}× (CPU time {ratio_cpu:.2f}×)  least cosine {least_cosine:.5f}'.format(**rows[-1]), flush=True)
    return rows


def compiled(args):
    "torch.compile of blocks and pooling; how long compiling took, and after how many images it has paid."
    plain, rows = model_for(args.backbone), []
    plain.backbone.fuse(True)
    images = torch.stack([eval_transform(args.sides[0])(Image.open(p)) for p in args.photos.image[:args.images]])
    for precision in ('32-true', 'bf16-mixed')[:1 + args.bf16]:
        torch._dynamo.reset()
        model = copy.deepcopy(plain)
        model.backbone.prefix, model.backbone.suffix, model.probing = (torch.compile(f) for f in (model.backbone.prefix, model.backbone.suffix, model.probing))
        def run(m):
            with autocast('cpu', precision): return m.describe(images)
        start = time.perf_counter(); cosine = (run(model)*run(plain)).sum(1).min().item(); took = time.perf_counter() - start
        seconds, cpu = by_turns({'plain': lambda: run(plain), 'torch.compile': lambda: run(model)}, args.turns)
        saved = (seconds['plain'] - seconds['torch.compile'])/len(images)
        rows.append(dict(what='compile', side=args.sides[0], precision=precision, ratio=seconds['plain']/seconds['torch.compile'], ratio_cpu=cpu['plain']/cpu['torch.compile'], compiling_s=took, paid_after_images=took/saved if saved > 0 else None, least_cosine=cosine))
        print('compile {side}² {precision:<11} {ratio:5.2f}× (CPU time {ratio_cpu:.2f}×)  {compiling_s:.0f} s for the first batch  least cosine {least_cosine:.5f}'.format(**rows[-1]) + (f'; paid after {rows[-1]["paid_after_images"]:,.0f} images' if saved > 0 else ''), flush=True)
    return rows


def rebuild(args):
    "One image of every place, from pixels and from kept tokens."
    model, rows = model_for(args.backbone), []
    for precision in ('32-true', 'bf16-mixed')[:1 + args.bf16]:
        with tempfile.TemporaryDirectory() as folder:
            cache, transform, n = PrefixCache(folder, model.backbone, 10), eval_transform(args.sides[0]), np.arange(2 * args.images)  # once for a training: all weights are hashed
            plain = lambda: Views(args.photos, transform)
            kept = lambda: Views(args.photos, transform, kept=cache.at(args.sides[0], precision))                       # what the files hold, opened anew
            run = lambda views: embed(model, views(), n, batch_size=args.images, precision=precision)
            run(kept)                                                                  # the cold pass
            assert kept().kept.find(args.photos.image[:len(n)]).all(), 'not all tokens were written'
            seconds, cpu = by_turns({'from pixels': lambda: run(plain), 'from kept tokens': lambda: run(kept)}, args.turns)
            cosine = (run(plain) * run(kept)).sum(1).min()
        for name, t in seconds.items():
            rows.append(dict(what='rebuild', side=args.sides[0], precision=precision, way=name, images_per_s=len(n) / t, ratio=seconds['from pixels'] / t, ratio_cpu=cpu['from pixels'] / cpu[name], least_cosine=float(cosine)))
            print('rebuild {side}² {precision:<11} {way:<18} {ratio:5.2f}× (CPU time {ratio_cpu:.2f}×)  least cosine {least_cosine:.5f}'.format(**rows[-1]), flush=True)
    return rows


def flops(backbone, side, images=8, backward=True):
    "Floating-point operations of a training step for an image; of its description alone."
    with torch.device('meta'): model = make_model(Settings(backbone=backbone), pretrained=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = SageModule(model.to_empty(device='cpu'), Settings(backbone=backbone)).train()
        module.model.backbone.fuse(False)                                              # plain products, which the counter knows
        with FlopCounterMode(display=False) as counter:
            d = module.describe(torch.empty(images, 3, side, side), 0)
            if backward: d.sum().backward()
    return counter.get_total_flops() / images

@contextmanager
def one_thread():
    "Inside, torch works on one thread, as it does in a worker of a DataLoader."
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(threads)

def loader(args):
    "Images a second of one process, and how many processes a GPU at 45 % of its stated peak would need."
    rows, n, side = [], len(args.photos), args.sides[0]
    steps = Steps(1); steps.fill(1, [[np.arange(n).reshape(-1, 4)]])
    views = {'training: RandAugment': Sources([Views(args.photos, train_transform(side))]), 'embedding': Sources([Views(args.photos, eval_transform(side))])}
    with one_thread(): seconds, cpu = by_turns({name: lambda s=s: list(torch.utils.data.DataLoader(s, batch_sampler=steps)) for name, s in views.items()}, args.turns)
    work = flops(args.backbone, side)
    for name, t in seconds.items():
        rows.append(dict(what='loader', side=side, way=name, images_per_s=n / t, images_per_cpu_s=n / cpu[name], gflop_per_image=work / 1e9, processes_for_an_h200=.45 * SPEC / work / (n / cpu[name])))
        print('loader {side}²  {way:<22} {images_per_s:6.1f} images/s for one process ({images_per_cpu_s:.1f} a second of CPU time)'.format(**rows[-1]) + (f'; {work/1e9:.1f} GFLOP an image: 45 % of the stated peak of an H200 would take {rows[-1]["processes_for_an_h200"]:.0f} of them' if 'train' in name else ''), flush=True)
    return rows

def decoding(args):
    "From a file to a network's input, on one thread: what is done, against torchvision's decoder and against resizing as a tensor."
    side, rows, plain = args.sides[0], [], eval_transform(args.sides[0])
    tensor = v2.Compose([v2.Resize((side, side), v2.InterpolationMode.BICUBIC, antialias=True), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    ways = {'Pillow (as it is)': lambda p: plain(load_image(p)),
            'torchvision decodes, Pillow resizes': lambda p: plain(to_pil_image(decode_jpeg(read_file(p), mode=ImageReadMode.RGB))),
            'torchvision decodes, resized as a tensor': lambda p: tensor(decode_jpeg(read_file(p), mode=ImageReadMode.RGB))}
    with one_thread(): wall, cpu = by_turns({name: lambda f=f: [f(p) for p in args.photos.image] for name, f in ways.items()}, 2*args.turns)
    first = next(iter(ways.values()))
    for name, f in ways.items():
        off = max(float((first(p) - f(p)).abs().max()) for p in args.photos.image[:8])
        rows.append(dict(what='decoding', side=side, way=name, images_per_cpu_s=len(args.photos) / cpu[name], ratio_cpu=cpu[next(iter(ways))] / cpu[name], largest_difference=off))
        print('decoding {side}²  {way:<42} {ratio_cpu:5.2f}× (CPU time)  largest difference of a pixel {largest_difference:.4f}'.format(**rows[-1]), flush=True)
    return rows


def main():
    parser = arguments(__doc__)
    parser.add_argument('--backbone', default='vit_base_patch14_dinov2.lvd142m')
    parser.add_argument('--images', type=int, default=8, help='a batch')
    parser.add_argument('--turns', type=int, default=2)
    parser.add_argument('--sides', type=int, nargs='+', default=[224, 322])
    parser.add_argument('--only', default='describe,rebuild,loader,decoding')
    parser.add_argument('--bf16', action=argparse.BooleanOptionalAction, default=torch.cpu._is_avx512_bf16_supported(), help='measure bfloat16, too (default: where the processor has it)')
    args = parser.parse_args()
    print({**machine(), 'torch_threads': torch.get_num_threads()})
    with tempfile.TemporaryDirectory() as folder:
        args.photos = photographs(folder, max(32, 2 * args.images), args.seed)
        rows = [row for part in args.only.split(',') for row in dict(describe=describe, rebuild=rebuild, loader=loader, decoding=decoding, layout=layout, compile=compiled)[part](args)]
    keep('embedding', args, rows, ('torch', 'torchvision', 'timm', 'numpy', 'pillow'), '' if args.only == parser.get_default('only') else args.only.replace(',', '_'))


if __name__ == '__main__': main()
