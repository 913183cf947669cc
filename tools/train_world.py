"""Train the SAGE that ships with the package, `create_sage('sage_nano', pretrained='world')`, over the packaged backbone.

    python tools/train_world.py --work /tmp/towns --out sage/weights

1. Photograph towns `tern-00`, `tern-01`, …, each of a seed of its own (71001, 71002, …; no demo, test or benchmark uses these), twelve drives each under all ten conditions.
2. `sage.train.fit` on them: the package's own training, with the strategy and augmentation asked for.
3. Keep the epoch with the best recall on a town of yet another seed (72001), queries and database *altered*: each photograph gets a perspective, a crop, a light, a colour cast, a blur, noise and a JPEG quality of its own.
   That stands in for reality; no real image enters training or selection.
The layers that train, and the LayerNorm, become sage_world.safetensors (float16) with its line in checksums.txt; arguments, curve and versions go into sage_world.json beside it.
"""
import argparse, json, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import timm
import torch
from PIL import Image

from sage.backbone import pack_weights
from sage.core import stream
from sage.formats import read_utm, write_utm
from sage.places import check_table
from sage.render import CONDITIONS
from sage.run import read_lines
from sage.settings import Settings, make_model
from sage.town import Town
from sage.train import fit
from sage.world import city_views, photograph, test_plan

from pictures import alter

TRAIN, HELD_OUT = 71001, 72001
DRIVES = [(kind, i >= 8, 'query' if i % 3 == 2 else 'database') for i, kind in enumerate([*CONDITIONS, 'day', 'overcast'])]


def make_town(seed, name, blocks, corner):
    "A town whose number of façades and colours is drawn, too."
    rng = stream(seed, 'sizes')
    return Town(seed, name, blocks, facades=int(rng.integers(7, 15)), colours=int(rng.integers(7, 13)), corner=corner)


def training_towns(work, towns, blocks, workers):
    "The table of all training towns, drawn once and kept."
    tables = []
    for i in range(towns):
        folder = work / f'tern-{i:02d}-{blocks[0]}x{blocks[1]}'
        if not (folder / 'done.parquet').exists():
            town = make_town(TRAIN + i, f'tern-{i:02d}', blocks, (500_000. + 20_000 * i, 5_300_000.))
            photograph(town, city_views(town, DRIVES, spacing=11., fewest=8), folder, workers=workers).to_parquet(folder / 'done.parquet')
        tables.append(pd.read_parquet(folder / 'done.parquet'))
    return check_table(pd.concat(tables, ignore_index=True))


def held_out(work, blocks, workers, size=224):
    "The validation table: one unseen town under all conditions, altered."
    plain, altered = work / f'held-out-{blocks[0]}x{blocks[1]}', work / f'altered-{blocks[0]}x{blocks[1]}'
    if not plain.exists():
        town = make_town(HELD_OUT, 'held-out', blocks, (900_000., 5_300_000.))
        views = city_views(town, test_plan(CONDITIONS), spacing=10., fewest=4)
        write_utm(photograph(town, views, work / 'photos', size, 'test', workers), plain)
    if not altered.exists():
        for i, path in enumerate(sorted(plain.rglob('*.jpg'))):
            to = altered / path.relative_to(plain); to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(alter(Image.open(path), stream(HELD_OUT, 'alter', i)))
    return {'altered': read_utm(altered)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--work', type=Path, required=True, help='folder for photographs and the run'); p.add_argument('--out', type=Path, help='folder for the weights; none: only train and measure')
    p.add_argument('--towns', type=int, default=10); p.add_argument('--blocks', type=int, nargs=2, default=(2, 3)); p.add_argument('--workers', type=int, default=2, help='processes that draw and decode')
    p.add_argument('--strategy', default='random'); p.add_argument('--augment', default='randaugment'); p.add_argument('--ops', type=int, default=3)
    p.add_argument('--epochs', type=int, default=4); p.add_argument('--steps', type=int, default=100); p.add_argument('--places', type=int, default=16); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--seed', type=int, default=71000)
    p.add_argument('--draw', action='store_true', help='only draw the towns')
    a = p.parse_args()
    start = time.time()
    train, val = training_towns(a.work, a.towns, a.blocks, a.workers), held_out(a.work, (2, 2) if min(a.blocks) > 1 else (1, 1), a.workers)
    print(f'{len(train)} photographs of {train.groupby(["city", "place"]).ngroups} places, {len(val["altered"])} held out ({time.time() - start:.0f} s)', flush=True)
    if a.draw: return
    settings = Settings(backbone='sage_nano', image_size=112, eval_size=112, augment=a.augment, augment_ops=a.ops, strategy=a.strategy, epochs=a.epochs, steps=a.steps, places_per_batch=a.places, lr=a.lr,
                        lr_steps=a.epochs * a.steps, cache_gb=2. if a.augment == 'none' else .05, precision='bf16', workers=a.workers if a.augment != 'none' else 0, node_features='place', record_graph=False, log_every=20, seed=a.seed)
    model, start = make_model(settings), time.time()
    model.backbone.fuse(False)  # PyTorch's fused attention is slow backwards in bfloat16 on a CPU
    run = fit(settings, model, train, val, a.work / f'run-{time.strftime("%H%M%S")}-{a.strategy}-{a.augment}', progress=False)
    minutes, recalls = (time.time() - start) / 60, run.recalls()
    first = recalls[recalls.k == 1].pivot(index='epoch', columns='table', values='recall').round(1)
    print(f'{first.to_string()}\n{minutes:.1f} minutes, {run.path}', flush=True)
    if a.out: ship(a, run, run.best('altered'), first, minutes, (len(train), len(val['altered'])))


def ship(a, run, epoch, recalls, minutes, images):
    "The weights of an epoch with their checksum, and the card of their training."
    checkpoint = run.checkpoints()[epoch]
    with safetensors.safe_open(checkpoint, 'pt') as f: path = pack_weights({k: f.get_tensor(k) for k in f.keys()}, 'sage_world', a.out, f.metadata())
    curve = [[r['step'], round(r['loss'], 4)] for r in read_lines(run.path / 'metrics.jsonl') if r['kind'] == 'step']
    card = dict(command=' '.join(['python', 'tools/train_world.py', *sys.argv[1:]]), date=time.strftime('%Y-%m-%d'), threads=torch.get_num_threads(), versions=dict(python=sys.version.split()[0], torch=torch.__version__, timm=timm.__version__, numpy=np.__version__),
                town_seeds=[TRAIN + i for i in range(a.towns)], held_out_seed=HELD_OUT, photographs=images[0], held_out_photographs=images[1], minutes=round(minutes, 1), epoch=epoch, settings=run.config['settings'],
                recall_at_1={name: dict(r) for name, r in recalls.items()}, curve_columns=['step', 'loss'], curve=curve)
    path.with_suffix('.json').write_text(json.dumps(card, indent=1, default=str))


if __name__ == '__main__': main()
