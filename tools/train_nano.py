"""Train the backbone that ships with the package, `sage_nano`, on pictures this project draws itself.

    python tools/train_nano.py --out sage/weights

1. Draw poses in procedural towns named `nano-00`, `nano-01`, … (seed 90210; no demo, test or benchmark uses these) and
   photograph each pose twice, under two different conditions, plus once at a plain noon without traffic.
2. Train the ViT so that (a) each patch token, through one linear layer, tells what its patch looks like at that plain noon
   and how far away it is, whatever the hour, weather and traffic; (b) the class token of the two photographs of a pose agree
   and those of other poses in the same two towns do not (InfoNCE). All heads are thrown away. For the first four
   fifths of the time the ViT sees a random half of the patches, which doubles its speed.
`--source leaves` draws dead leaves in place of towns (tools/pictures.py): two altered copies of a picture, and the picture itself for noon; distances are left out.
`--objective vicreg` asks one thing of the class token alone: that two pictures of a pose agree while its 128 numbers vary from pose to pose and do not repeat one another (Bardes, Ponce, LeCun 2022).
No real image and no place label enters. The loss curve and every argument go into a JSON file beside the weights.
"""
import argparse, io, json, math, sys, time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from sage.backbone import nano_vit, pack_nano
from sage.core import has_bfloat16, stream
from sage.render import CONDITIONS, Camera, Condition, Photographer, draw_condition
from sage.retrieval import recall_at_k
from sage.sources import by_radius, world
from sage.town import Town, headings
from sage.where import describe_files

from grid import GridModel
from pictures import dead_leaves, palette, weather

SEED, SIZE, PATCH = 90210, 112, 14
NOON = Condition('noon', sun=50, cloud=.3, noise=0., exposure=1.)


def draw_camera(town, rng):
    "A pose in a street: mostly along it, sometimes to the side."
    line = town.streets[rng.integers(len(town.streets))]
    at = int(rng.integers(8, len(line) - 8))
    turn = rng.normal(0, 18) if rng.random() < .6 else rng.uniform(-180, 180)
    x, y = line[at] + rng.uniform(-2.5, 2.5, 2)
    return Camera(x, y, rng.uniform(1.3, 2.8), headings(line)[at] + turn + 180 * (rng.random() < .5), rng.normal(0, 4), rng.normal(0, 2), rng.uniform(60, 100))


def nudge(camera, rng):
    "Nearly the same pose."
    j = rng.normal(0, 1, 5)
    return Camera(camera.x + .4 * j[0], camera.y + .4 * j[1], camera.z + .1 * j[2], camera.heading + 2 * j[3], camera.pitch + 1.5 * j[4], camera.roll, camera.fov)


def photograph_town(number, poses):
    "Pairs of photographs [n, 2, S, S, 3], their noon pictures at half size [n, 2, S/2, S/2, 3] and log distances by patch [n, 2, 64]."
    rng = stream(SEED, 'nano', number)
    town = Town(SEED + number, f'nano-{number:02d}', blocks=(2, 3), facades=int(rng.integers(6, 14)), colours=int(rng.integers(6, 12)))
    plain = Photographer(town, NOON); plain.things = plain.things[:len(town.trees) + len(town.lamps)]; plain.lamplight = plain.lamplight[:len(plain.things)]
    drives = [Photographer(town, draw_condition(kind, rng)) for kind in CONDITIONS for _ in range(2)]
    out = np.zeros((poses, 2, SIZE, SIZE, 3), np.uint8), np.zeros((poses, 2, SIZE // 2, SIZE // 2, 3), np.uint8), np.zeros((poses, 2, 64), np.float16)
    for i in range(poses):
        first = draw_camera(town, rng)
        for j, camera in enumerate((first, nudge(first, rng))):
            out[0][i, j] = drives[rng.integers(len(drives))](camera, SIZE)
            noon, scene = plain(camera, SIZE, scene=True)
            out[1][i, j] = noon.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean((1, 3))
            near = np.log1p(np.minimum(scene.distance, 200)).reshape(8, PATCH, 8, PATCH)
            out[2][i, j] = near.mean((1, 3)).ravel() / 5
    return out


def paint_leaves(number, poses):
    "The same arrays from dead leaves of one palette."
    rng = stream(SEED, 'leaves', number)
    colours = palette(rng)
    out = np.zeros((poses, 2, SIZE, SIZE, 3), np.uint8), np.zeros((poses, 2, SIZE // 2, SIZE // 2, 3), np.uint8), np.zeros((poses, 2, 64), np.float16)
    for i in range(poses):
        big = dead_leaves(rng, colours, SIZE + 16)
        for j in range(2):
            x, y = rng.integers(0, 17, 2)
            clean = big.crop((x, y, x + SIZE, y + SIZE))
            out[0][i, j], out[1][i, j] = np.asarray(Image.open(io.BytesIO(weather(clean, rng)))), np.asarray(clean.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX))
    return out


SOURCES = dict(towns=photograph_town, leaves=paint_leaves)


def photograph(source, towns, poses, workers):
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(max(workers, 1)) as pool:
        parts = list(pool.map(SOURCES[source], range(towns), [poses] * towns))
    return [np.concatenate(p) for p in zip(*parts)]


def patches_of(noon):
    "Noon pictures [B, 56, 56, 3] as one target vector for each patch [B, 64, 147], each patch's own mean kept, contrast raised."
    x = noon.float().div(255).sub(.45).div(.25).reshape(-1, 8, 7, 8, 7, 3).permute(0, 1, 3, 2, 4, 5).reshape(len(noon), 64, 147)
    mean = x.mean(-1, keepdim=True)
    return mean + (x - mean) * 1.5


class Learner(torch.nn.Module):
    "The ViT with its two passing heads."
    def __init__(self, vit, together):
        super().__init__()
        self.vit, self.together, c = vit, together, vit.embed_dim
        self.look, self.far = torch.nn.Linear(c, 147), torch.nn.Linear(c, 1)
        self.agree = torch.nn.Sequential(torch.nn.Linear(c, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))
        self.register_buffer('mean', torch.tensor([.485, .456, .406]).view(3, 1, 1)); self.register_buffer('std', torch.tensor([.229, .224, .225]).view(3, 1, 1))

    def some_tokens(self, x, keep):
        "The ViT on a random share of each picture's patches: tokens [B, 1+n, C] and which patches they are [B, n]."
        v, n = self.vit, round(64 * keep)
        x = v.patch_embed(x) + v.pos_embed[:, 1:]
        kept = torch.rand(len(x), 64).argsort(1)[:, :n].sort(1).values
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(v.cls_token + v.pos_embed[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], 1)
        return v.norm(v.blocks(x)), kept

    def forward(self, photos, noon, far, keep):
        x = (photos.permute(0, 3, 1, 2).float().div(255) - self.mean) / self.std
        x = (x + .15 * torch.randn(len(x), 3, 1, 1)) * (1 + .15 * torch.randn(len(x), 1, 1, 1))
        tokens, kept = self.some_tokens(x, keep)
        look = F.mse_loss(self.look(tokens[:, 1:]).float(), patches_of(noon).gather(1, kept[..., None].expand(-1, -1, 147)))
        distance = F.mse_loss(self.far(tokens[:, 1:]).float()[..., 0], far.float().gather(1, kept))
        return look, distance, self.together(self.agree(tokens[:, 0]).float())


def info_nce(z):
    "Two pictures of a pose agree, those of other poses do not."
    z = F.normalize(z, dim=-1)
    scores, answer = z[0::2] @ z[1::2].T / .1, torch.arange(len(z) // 2)
    return (F.cross_entropy(scores, answer) + F.cross_entropy(scores.T, answer)) / 2


def vicreg(z):
    "Two pictures of a pose agree, every number varies with deviation 1 or more, no two go together; the weights of the paper, over 25."
    same = F.mse_loss(z[0::2], z[1::2])
    vary = sum(F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() for x in (z[0::2], z[1::2])) / 2
    cov = [torch.cov(x.T) for x in (z[0::2], z[1::2])]
    apart = sum((c.pow(2).sum() - c.diagonal().pow(2).sum()) / len(c) for c in cov) / 2
    return same + vary + apart / 25


OBJECTIVES = dict(look=(info_nce, 1.), vicreg=(vicreg, 0.))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder')
    p.add_argument('--towns', type=int, default=24); p.add_argument('--poses', type=int, default=600)
    p.add_argument('--minutes', type=float, default=40, help='length of the training; the schedule follows the clock'); p.add_argument('--steps', type=int, help='length in steps instead'); p.add_argument('--batch', type=int, default=64, help='poses in a batch')
    p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--workers', type=int, default=2); p.add_argument('--agree', type=float, default=.2)
    p.add_argument('--objective', choices=OBJECTIVES, default='look'); p.add_argument('--source', choices=SOURCES, default='towns'); p.add_argument('--measure', action='store_true', help='recall of the raw backbone on the rendered world at the end')
    p.add_argument('--pictures', type=Path, help='keep the photographs in this .npz and reuse them')
    a = p.parse_args()
    if a.pictures and a.pictures.exists():
        data = [np.load(a.pictures)[k] for k in ('photos', 'noon', 'far')]
    else:
        start = time.time(); data = photograph(a.source, a.towns, a.poses, a.workers)
        print(f'{2 * len(data[0])} photographs in {time.time() - start:.0f} s', flush=True)
        if a.pictures: np.savez(a.pictures, **dict(zip(('photos', 'noon', 'far'), data)))
    data = [torch.from_numpy(d) for d in data]
    torch.manual_seed(SEED)
    timm.layers.set_fused_attn(False)  # PyTorch's fused attention is slow backwards in bfloat16 on a CPU
    together, looking = OBJECTIVES[a.objective]
    learner = Learner(nano_vit(), together).train()
    decay = [q for q in learner.parameters() if q.ndim > 1]; rest = [q for q in learner.parameters() if q.ndim <= 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=.05), dict(params=rest, weight_decay=0.)], lr=a.lr, betas=(.9, .98))
    generator, start, step, curve = torch.Generator().manual_seed(SEED), time.time(), 0, []
    while (done := step / a.steps if a.steps else (time.time() - start) / (a.minutes * 60)) < 1:
        rows = draw_rows(a, generator)
        photos, noon, far = (d[rows].flatten(0, 1) for d in data)
        if torch.rand((), generator=generator) < .5: photos, noon, far = photos.flip(2), noon.flip(2), far.view(-1, 8, 8).flip(2).reshape(-1, 64)
        for g in opt.param_groups: g['lr'] = a.lr * min(1, (step + 1) / 200) * (.5 + .5 * math.cos(math.pi * done))
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=has_bfloat16()):
            look, distance, agree = learner(photos, noon, far, keep=.5 if done < .8 else 1.)
        loss = looking * (look + distance * 2 * (a.source == 'towns')) + (a.agree if looking else 1.) * agree
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.); opt.step()
        step += 1
        if step % 50 == 0 or step == a.steps:
            curve.append([step, round(look.item(), 4), round(distance.item(), 4), round(agree.item(), 4)])
            print(f'{done:5.1%} step {step} look {look:.3f} distance {distance:.4f} agree {agree:.3f}  {step * 2 * a.batch / (time.time() - start):.0f} images/s', flush=True)
        if step % 500 == 0: save(learner.vit, a, curve, step)
    save(learner.vit, a, curve, step)
    if a.measure:
        found = measure(learner.vit)
        print(found); save(learner.vit, a, curve, step, world_recall_at_1=found)


def measure(vit):
    "R@1 on the towns of the demo: the class token alone, and with the grid of `GridModel`."
    model, out = GridModel(), {}
    model.backbone.model = vit.eval()
    for name, table in world()['val'].items():
        _, e = by_radius(name, table)
        q, d = (np.concatenate([x for _, x, _ in describe_files(model, t.image.tolist(), SIZE)]) for t in (e.queries, e.database))
        for label, part in (('class token', slice(-vit.embed_dim, None)), ('grid and class token', slice(None))): out[f'{name}, {label}'] = round(recall_at_k(q[:, part], d[:, part], e.positives, (1,))[1], 1)
    return out


def draw_rows(a, generator):
    "Poses of a batch: half from one town, half from another, so that the pictures to tell apart are of one style."
    towns = torch.randperm(a.towns, generator=generator)[:2]
    return torch.cat([t * a.poses + torch.randperm(a.poses, generator=generator)[:a.batch // 2] for t in towns])


def save(vit, a, curve, step, **more):
    "The weights with their checksum, and the card that says how they came about."
    path = pack_nano(vit, a.out)
    made = dict(command=' '.join(['python', 'tools/train_nano.py', *sys.argv[1:]]), threads=torch.get_num_threads(), workers=a.workers, versions=dict(python=sys.version.split()[0], torch=torch.__version__, timm=timm.__version__, numpy=np.__version__))
    card = dict(made, seed=SEED, towns=a.towns, poses=a.poses, minutes=a.minutes, batch=a.batch, lr=a.lr, agree=a.agree, objective=a.objective, source=a.source, steps=step, curve_columns=['step', 'look', 'distance', 'agree'], curve=curve, **more)
    path.with_suffix('.json').write_text(json.dumps(card, indent=1))


if __name__ == '__main__': main()
