"""Train the SAGE that ships with the package, `create_sage('sage_nano', pretrained='world')`, over the packaged backbone: many scenes, pairs from one spot and along drives, disturbed photographs.

    python tools/train_scenes.py --work /tmp/scenes --out sage/weights

1. Photograph scenes of seeds that no demo, test or benchmark uses: towns (71001, 71002, …) under all ten conditions, two of three from nearly one spot and one along 20 m of street; more towns (71101, …) along 20 m only; and ways (73001, …): corridors, alleys and lanes (tools/halls.py).
2. Disturb every photograph once for each copy (tools/pictures.py: light, covers, perspective, crop, colour, blur, noise, JPEG; one copy of each mildly) and keep the frozen blocks' tokens of it; they never change, and a step then costs the last blocks alone.
3. Train: first Soft Probing alone, over finished tokens (`--steps` of the first phase), then the power norms and the last LayerNorm with it. A batch is of two towns, of two drives, or of four ways, so that what must be told apart is of one style. Supervised contrastive loss (the multi-similarity loss of `sage_train` stayed where all are at right angles: the pairs of other conditions are too hard for it); the weights that ship are a running mean.
4. Measure on towns and ways of other seeds (72002 to 72004, 72006, 74001, 74005) whose photographs went through changes that training has not seen (`foreign`), or through mild ones; at 112 and 224 pixels. Recall@1 of other photographs of a place against one of each place; the mean over these cells chooses.
No real image enters training or selection. The layers that train become sage_world.safetensors (float16) with its line in checksums.txt; arguments, curve, recalls and versions go into sage_world.json beside it.
"""
import argparse, io, json, math, sys, time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import safetensors
import timm
import torch
from PIL import Image
from pytorch_metric_learning.losses import SupConLoss

from sage.backbone import pack_weights
from sage.core import stream
from sage.images import eval_transform
from sage.learner import SageModule
from sage.model import create_sage, save_sage
from sage.render import CONDITIONS, Camera, Photographer, draw_condition
from sage.settings import Settings
from sage.town import STEP, Town, headings
from sage.world import MARGIN

from grid import GridModel
from halls import draw_way
from pictures import alter, disturb, foreign


def along(town, street, metre, backward, off, z, turn, pitch, roll, fov):
    "A camera beside the middle of a street."
    line = town.streets[street]; at = int(np.clip(metre / STEP, 0, len(line) - 1))
    h = headings(line)[at]; right, off = np.radians(h + 90), off * (1 - 2 * backward)
    return Camera(line[at, 0] + off * np.sin(right), line[at, 1] + off * np.cos(right), z, h + 180 * backward + turn, pitch, roll, fov)


def draw_town(seed, places, views, spot=True, size=224):
    "Photographs of places along a town's streets, each under another condition [places, views, size, size, 3]: from nearly one spot, or along 20 m of street."
    rng = stream(seed, 'scenes')
    town = Town(seed, 'tern', (2, 3), facades=int(rng.integers(7, 15)), colours=int(rng.integers(7, 13)))
    drives = [Photographer(town, draw_condition(kind, rng)) for kind in (*CONDITIONS, 'day', 'overcast')]
    spots = [(s, m, b) for s, line in enumerate(town.streets) for m in np.arange(MARGIN, len(line) * STEP - MARGIN, 10. if spot else 25.) for b in (0, 1)]
    spots = [spots[i] for i in rng.permutation(len(spots))[:places]]
    out = np.zeros((len(spots), views, size, size, 3), np.uint8)
    for i, (street, metre, back) in enumerate(spots):
        fov, off, high, turn = rng.uniform(62, 90), rng.uniform(-.8, 1.8), rng.uniform(1.4, 2.4), rng.normal(0, 25) if spot and rng.random() < .4 else 0
        for j, d in enumerate(rng.permutation(len(drives))[:views]):
            m = metre + (rng.normal(0, .5) if spot else rng.uniform(-10, 10))
            o, z, f = (off + rng.normal(0, .3), high + rng.normal(0, .1), fov * np.exp(rng.normal(0, .03))) if spot else (rng.uniform(-.8, 1.8), rng.uniform(1.5, 2.4), rng.uniform(66, 88))
            out[i, j] = drives[d](along(town, street, m, back, o, z, turn + rng.normal(0, 2.5 if spot else 7), rng.normal(0, 1.5), rng.normal(0, 1.), f), size)
    return out


def mild(image, rng): return alter(image, rng, .03)


def plan(towns, drives, ways, town_places=50, way_places=14, views=5, held=(70, 44, 56, 60), large=True):
    "Name of a scene → (how to draw it, its token files: (tag, size, change, share of the places))."
    big = [('-a', 224, disturb, .5)] * large
    train, val = [('-a', 112, disturb, 1), ('-b', 112, disturb, 1), ('-c', 112, mild, 1), *big], [('', 112, foreign, 1), ('', 224, foreign, 1)]
    again = [('', 112, foreign, 1), ('-mild', 112, mild, 1), ('-mild', 224, mild, 1)]
    out = {'val-spot': (partial(draw_town, 72002, held[0], 4), val), 'val-spot2': (partial(draw_town, 72003, held[0], 4), again), 'val-drive': (partial(draw_town, 72004, held[1], 4, False), val[:1])}
    out |= {'val-way': (partial(draw_way, 74001, held[2], 3, days=3), val), 'val-way2': (partial(draw_way, 74005, held[2], 3, days=3), again), 'val-drive2': (partial(draw_town, 72006, held[3], 4, False), [('', 112, mild, 1)])}
    out |= {f'town-{i:02d}': (partial(draw_town, 71001 + i, town_places, views, i % 3 != 2), train) for i in range(towns)}
    out |= {f'drive-{i:02d}': (partial(draw_town, 71101 + i, town_places, views + 1, False), [('-a', 112, mild, 1), ('-b', 112, disturb, 1), *big]) for i in range(drives)}
    return out | {f'way-{i:02d}': (partial(draw_way, 73001 + i, way_places, views, days=5), train) for i in range(ways)}


def kept(path, make):
    "An array that is made once and stays on the disk."
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True); part = path.with_name(f'.{path.name}')
        np.save(part, make()); part.rename(path)
    return np.load(path, mmap_mode='r')


def frozen_tokens(model, pictures, size, change, *key, batch=16):
    "Tokens of pictures [places, views, side, side, 3], each changed on its own: [places, views, 1+L, C] float16."
    side, transform, out = 144 if size == 112 else 224, eval_transform(size), []
    flat = pictures.reshape(-1, *pictures.shape[2:])
    for i in range(0, len(flat), batch):
        changed = [change(Image.fromarray(p).resize((side, side), Image.Resampling.BILINEAR), stream(0, *key, j)) for j, p in enumerate(flat[i:i + batch], i)]
        with torch.no_grad(): out.append(model.prefix(torch.stack([transform(Image.open(io.BytesIO(c))) for c in changed])).half().numpy())
    return np.concatenate(out).reshape(*pictures.shape[:2], -1, model.backbone.dim)


def all_tokens(work, scenes, workers):
    "Name of a token file → tokens; drawn and computed where the work folder lacks them."
    joblib.Parallel(workers)(joblib.delayed(kept)(work / 'scenes' / f'{name}.npy', draw) for name, (draw, _) in scenes.items())
    model, out = create_sage('sage_nano').eval(), {}
    for name, (_, files) in scenes.items():
        x = np.load(work / 'scenes' / f'{name}.npy', mmap_mode='r')
        for tag, size, change, share in files: out[f'{name}{tag}-{size}'] = kept(work / 'tokens' / f'{name}{tag}-{size}.npy', lambda: frozen_tokens(model, x[:math.ceil(len(x) * share)], size, change, name, size, tag))
    return out


def tensor(tokens): return torch.from_numpy(np.array(tokens)).float()


@torch.no_grad()
def recalls(describe, tokens):
    "Held-out file → recall@1 in percent: the first photograph of each place is the map, the others ask."
    out = {}
    for name, x in tokens.items():
        if not name.startswith('val'): continue
        d = torch.stack([describe(tensor(place)) for place in x])
        near = torch.einsum('avd,bd->avb', d[:, 1:], d[:, 0]).argmax(-1)
        out[name[4:]] = round((near == torch.arange(len(x))[:, None]).float().mean().item() * 100, 1)
    return out


WATCHED = ('val-spot2-112', 'val-way-112', 'val-spot2-mild-112', 'val-way2-mild-112', 'val-drive2-112')  # cells measured on the way; their mean chooses the step


def mean(found): return round(sum(found.values()) / len(found), 2)


class Batches:
    "Tokens and places of batches, from two towns or four ways at a time."
    def __init__(self, tokens, a, seed):
        self.rng, self.a = np.random.default_rng(seed), a
        self.sizes = {size: {name: [x for k, x in tokens.items() if k.startswith(f'{name}-') and k.endswith(f'-{size}')] for name in {k.split('-a-')[0] for k in tokens if '-a-' in k}} for size in (112, 224)}
        names = sorted(self.sizes[112])
        self.kinds = [(k, n) for k, n in (([x for x in names if x.startswith(kind)], n) for kind, n in (('town', 2), ('drive', 2), ('way', 4))) if k]

    def draw(self):
        rng, large = self.rng, self.rng.random() < self.a.large
        places, pool = (max(self.a.places // 2, 8), self.sizes[224]) if large else (self.a.places, self.sizes[112])
        names, n = self.kinds[rng.integers(len(self.kinds))]
        xs, ys = [], []
        for i, name in enumerate(rng.choice(names, min(n, len(names)), replace=False)):
            copies = pool[name]
            for place in rng.permutation(len(copies[0]))[:places // n]:
                for v in rng.permutation(copies[0].shape[1])[:self.a.views]: xs.append(copies[rng.integers(len(copies))][place, v]); ys.append(1000 * i + place)
        return torch.from_numpy(np.stack(xs)).float(), torch.tensor(ys)


def mean_of(running, model, share):
    "The running mean of the weights, moved a little."
    with torch.no_grad():
        for k, v in model.state_dict().items():
            if k in running: running[k].lerp_(v, share)


def phase(a, model, part, describe, batches, steps, lr, curve, measure):
    "Some steps of a part of the model; the running mean of its weights is the model afterwards."
    model.train()
    params, module, start = [q for q in part.parameters() if q.requires_grad], SageModule(model, a.settings), time.time()
    running = {k: v.clone() for k, v in model.trainable_state().items()}
    opt, contrast = torch.optim.AdamW(params, lr=lr, weight_decay=a.weight_decay), SupConLoss(a.temperature or 1.)
    for step in range(1, steps + 1):
        for g in opt.param_groups: g['lr'] = lr * min(1, step / 50) * (.02 + .49 * (1 + math.cos(math.pi * step / steps)))
        x, y = batches.draw()
        d = describe(x); loss = contrast(d, y) if a.temperature else module.loss(d, y, module.miner(d, y))
        opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(params, 5.); opt.step()
        mean_of(running, model, max(1 - a.ema, 9 / (step + 10)))
        curve.append(loss.item())
        if step % 50 == 0: print(f'step {len(curve)}  loss {np.mean(curve[-50:]):.4f}  {(time.time() - start) / step:.2f} s a step', flush=True)
        if step % a.every == 0 and step < steps: measure(running, len(curve))
    model.load_state_dict(running, strict=False); measure(running, len(curve))


def cells(n, probes, spread):
    "Where each probe looks at first: a soft field of a grid over n patches, [n, probes], columns sum to 1."
    centre = lambda m: (torch.cartesian_prod(torch.arange(m), torch.arange(m)) + .5) / m
    far = torch.cdist(centre(math.isqrt(n)), centre(math.isqrt(probes)))
    return (-(far / spread)**2 / 2).softmax(0)


def linear(net, weight, bias):
    "Make a layer, ReLU and layer begin as one linear map: half of it on the positive side, half on the negative; spare units begin weak."
    first, last, n = net[0], net[-1], len(weight)
    with torch.no_grad():
        one, two = first.weight.flatten(1), last.weight.flatten(1)              # views of the weights
        one[:n], one[n:2 * n], first.bias[:n], first.bias[n:2 * n] = weight, -weight, bias, -bias
        two.mul_(.1); two[:n, :2 * n] = torch.cat([torch.eye(n), -torch.eye(n)], 1); last.bias.zero_()


def arrange(a, model, tokens):
    "Begin near what needs no training: features are principal components, brought nearer to one another's size, and so is the global token."
    with torch.no_grad():
        x = torch.cat([tensor(t[::3, :1]).flatten(0, 1) for k, t in tokens.items() if k.endswith('112')])
        for net, f in ((model.probing.cluster_features, model.probing.soft_weighting(x[:, 1:]).flatten(0, 1)), (model.probing.token_features, x[:, 0])):
            size, way = torch.linalg.eigh(torch.cov(f.T))
            n = min(net[-1].bias.numel(), f.shape[1])
            weight = (way.flip(1)[:, :n] / (size.flip(0)[:n] + 1e-3 * size[-1])**a.whiten).T
            linear(net, weight, -weight @ f.mean(0))


def locate(a, model, batches, steps):
    "Teach each probe a field of the picture, from finished tokens."
    opt, a.places, places = torch.optim.AdamW(model.probing.score.parameters(), lr=3e-3, weight_decay=0.), 8, a.places
    for step in range(1, steps + 1):
        for g in opt.param_groups: g['lr'] = 3e-3 * min(1, step / 20) * (1.01 - step / steps)
        with torch.no_grad(): f = model.probing.soft_weighting(batches.draw()[0][:, 1:])
        target = cells(f.shape[1], model.probing.score[-1].out_channels, a.spread)
        far = -(target * model.probing.score(f).log_softmax(1)).sum(1).mean() + (target * target.clamp(min=1e-9).log()).sum(0).mean()
        opt.zero_grad(); far.backward(); opt.step()
        if step % 100 == 0: print(f'probes look at their fields: {far.item():.3f} nats away at step {step}', flush=True)
    a.places = places


def finished(model, tokens):
    "The same files after the whole backbone, class token first."
    def of(x): cls, patches = model.backbone.suffix(tensor(x)); return torch.cat([cls[:, None], patches], 1).half().numpy()
    model.eval()
    with torch.no_grad(): return {k: np.stack([of(place) for place in x]) for k, x in tokens.items() if not k.startswith('val')}


def start(a):
    "An untrained SAGE whose power norms begin with exponents near `--exponent`, so that the frozen features pass nearly as they are."
    model = create_sage('sage_nano', dropout=a.dropout, seed=a.seed)
    for dpn in [*model.backbone.gpn_norms, model.probing.gpn]: torch.nn.init.constant_(dpn.projection[-1].bias, math.log(a.exponent / (1 - a.exponent))); dpn.projection[-1].weight.data.mul_(.1)
    return model


def train(a, tokens, log):
    "Both phases; the state with the best mean recall."
    torch.manual_seed(a.seed)
    model, curve, best = start(a), [], (-1, None, 0)
    trained = list(model.trainable_state())
    def measure(state, step):
        nonlocal best
        now = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state, strict=False); found = recalls(model.eval().from_prefix, {k: tokens[k] for k in WATCHED})
        log.append(dict(step=step, mean=mean(found), **found)); print(log[-1], flush=True)
        if mean(found) > best[0]: best = mean(found), {k: model.state_dict()[k].clone() for k in trained}, step
        save_sage(model, a.work / f'step-{step:05d}.safetensors', config=dict(step=step, settings=asdict(a.settings)))
        model.load_state_dict(now); model.train()
    measure(model.trainable_state(), 0)
    done = finished(model, tokens); batches = Batches(done, a, a.seed)
    if a.locate: arrange(a, model, done); locate(a, model.eval(), batches, a.locate); measure(model.trainable_state(), 0)
    phase(a, model, model.probing, lambda x: model.probing(x[:, 1:], x[:, 0]), batches, a.steps[0], a.lr, curve, measure)
    phase(a, model, model, model.from_prefix, Batches(tokens, a, a.seed + 1), a.steps[1], a.lr / 3, curve, measure)
    model.load_state_dict(best[1], strict=False)
    return model.eval(), curve, best[2]


def packaged(a, model, step):
    "The file for the package."
    part = save_sage(model, a.work / 'sage_world.safetensors', config=dict(step=step, settings=asdict(a.settings)))
    with safetensors.safe_open(part, 'pt') as f: return pack_weights({k: f.get_tensor(k) for k in f.keys()}, 'sage_world', a.out, {k: v for k, v in f.metadata().items() if k != 'sha256'})   # that sum is of float32


def card(a, curve, log, step, cells, minutes):
    "What the JSON beside the weights says."
    return dict(command=' '.join(['python', 'tools/train_scenes.py', *sys.argv[1:]]), date=time.strftime('%Y-%m-%d'), threads=torch.get_num_threads(), versions=dict(python=sys.version.split()[0], torch=torch.__version__, timm=timm.__version__, numpy=np.__version__),
                town_seeds=[71001 + i for i in range(a.towns)], drive_seeds=[71101 + i for i in range(a.drives)], way_seeds=[73001 + i for i in range(a.ways)], held_out_seeds=[72002, 72003, 72004, 72006, 74001, 74005], minutes=round(minutes, 1), step=step, settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != 'settings'},
                recall_at_1=log, all_cells=cells, curve_columns=['step', 'loss'], curve=[[i + 1, round(float(np.mean(curve[max(i - 19, 0):i + 1])), 4)] for i in range(19, len(curve), 20)] or [[len(curve), round(curve[-1], 4)]])


def everywhere(model, tokens):
    "Recalls on all held-out cells: of the trained model, the grid, a SAGE whose layers are random, and the SAGE that was in the package."
    grid = GridModel().eval()
    def pooled(x):                                                              # its `describe` begins at the image
        grid.backbone.prefix, grid.backbone.grid = lambda images: images, lambda images: 2 * (math.isqrt(x.shape[1]),)
        return grid.describe(x)
    ways = dict(trained=model.from_prefix, grid=pooled, untrained=create_sage('sage_nano').eval().from_prefix, before=create_sage('sage_nano', 'world').eval().from_prefix)
    return {name: dict(mean=mean(found), **found) for name, f in ways.items() for found in [recalls(f, tokens)]}


def settings(a):
    "What the weights' header says of the training."
    return Settings(backbone='sage_nano', image_size=112, eval_size=112, augment='none', strategy='random', lr=a.lr, weight_decay=a.weight_decay, dropout=a.dropout, loss_base=a.loss_base, places_per_batch=a.places, images_per_place=a.views, precision='32', epochs=1, steps=sum(a.steps), seed=a.seed)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--work', type=Path, required=True, help='folder for photographs and tokens'); p.add_argument('--out', type=Path, help='folder for the weights; none: only train and measure')
    p.add_argument('--towns', type=int, default=16); p.add_argument('--drives', type=int, default=12, help='towns seen from drives, photographs nearly plain'); p.add_argument('--ways', type=int, default=24); p.add_argument('--sizes', type=int, nargs=3, default=(50, 14, 5), help='places of a town, places of a way, photographs of a place'); p.add_argument('--held-out', type=int, nargs=4, default=(70, 44, 56, 60), help='places of the held-out scenes: spot, drive, way, plain drive')
    p.add_argument('--steps', type=int, nargs=2, default=(1200, 0), help='of the first and of the second phase'); p.add_argument('--every', type=int, default=150, help='steps between two measurements'); p.add_argument('--places', type=int, default=24, help='in a batch'); p.add_argument('--views', type=int, default=4, help='photographs of each')
    p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--weight-decay', type=float, default=0.); p.add_argument('--dropout', type=float, default=.3); p.add_argument('--large', type=float, default=0., help='share of batches at 224 pixels'); p.add_argument('--ema', type=float, default=.98); p.add_argument('--exponent', type=float, default=.95, help='of the power norms at the start')
    p.add_argument('--locate', type=int, default=150, help='steps that teach each probe a field of the picture, before all else; 0: begin at random'); p.add_argument('--spread', type=float, default=.1, help='size of a field'); p.add_argument('--whiten', type=float, default=.1, help='0: principal components as they are; 0.5: all of one size')
    p.add_argument('--temperature', type=float, default=.07, help='of the supervised contrastive loss; 0: the multi-similarity loss of sage_train')
    p.add_argument('--loss-base', type=float, default=0.); p.add_argument('--workers', type=int, default=2, help='processes that draw'); p.add_argument('--seed', type=int, default=71000); p.add_argument('--draw', action='store_true', help='only draw and keep the tokens')
    a = p.parse_args()
    tokens = all_tokens(a.work, plan(a.towns, a.drives, a.ways, *a.sizes, a.held_out, a.large > 0), a.workers)
    if a.draw: return
    a.settings = settings(a)
    begun, log = time.time(), []
    model, curve, step = train(a, tokens, log)
    minutes = (time.time() - begun) / 60
    print(f'{minutes:.1f} minutes, step {step} chosen', flush=True)
    found = everywhere(model, tokens); print(found)
    if a.out: packaged(a, model, step).with_suffix('.json').write_text(json.dumps(card(a, curve, log, step, found, minutes), indent=1))


if __name__ == '__main__': main()
