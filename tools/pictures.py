"""Pictures that need no camera: dead leaves, and what another camera on another day does to a picture."""
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps


def alter(image, rng, tilt=.09):
    "A perspective, a crop, a light, a colour cast, a blur, noise and a JPEG quality, drawn anew: a JPEG file's bytes."
    w, h = image.size
    corners = np.array([(0, 0), (0, h), (w, h), (w, 0)]) + rng.uniform(0, tilt, (4, 2)) * [(w, h), (w, -h), (-w, -h), (-w, h)]
    image = image.transform((w, h), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC)
    return weather(image, rng)


def cover(image, rng):
    "Up to three things before the camera: what stands on the lower edge, and boxes of one colour or of noise."
    x = np.asarray(image).copy(); h, w = x.shape[:2]
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        wide, tall, colour = rng.uniform(.05, .3) * w, rng.uniform(.1, .55) * h, rng.integers(0, 256, 3)
        left, top = rng.uniform(-.05, .95) * w, h - tall if rng.random() < .6 else rng.uniform(0, .9) * h
        box = np.s_[int(max(top, 0)):int(top + tall), int(max(left, 0)):int(left + wide)]
        x[box] = colour if rng.random() < .7 else rng.integers(0, 256, x[box].shape)
    return Image.fromarray(x)


def light(image, rng):
    "Light that falls off to a side or to the edges, strong or weak contrast, few colours or none."
    x = np.asarray(image, np.float32) / 255; h, w = x.shape[:2]
    v, u = np.mgrid[-1:1:h * 1j, -1:1:w * 1j].astype(np.float32)
    x = x * np.exp(rng.normal(0, .25) * u + rng.normal(0, .2) * v - abs(rng.normal(0, .25)) * (u**2 + v**2))[..., None]
    grey = x.mean(2, keepdims=True); x = grey + (x - grey) * (0 if rng.random() < .15 else np.exp(rng.normal(-.1, .4)))
    if rng.random() < .3: x = (x - x.mean()) * np.exp(rng.normal(0, .5)) + x.mean() * np.exp(rng.normal(0, .3))
    return Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8))


def disturb(image, rng):
    "What training sees: `light`, `cover` and `alter`, the geometry mostly small. A JPEG file's bytes."
    return alter(cover(light(image, rng), rng), rng, rng.choice([.02, .05, .09]))


def foreign(image, rng):
    "What only held-out photographs go through: kinds of change that training has not seen, then `alter`. A JPEG file's bytes."
    w, h = image.size
    kind = int(rng.integers(6))
    if kind == 0: image = ImageOps.equalize(image)
    elif kind == 1: image = ImageOps.posterize(image, int(rng.integers(2, 4)))
    elif kind == 2: image = image.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.UnsharpMask(3, 250, 0))
    elif kind == 3: image = Image.fromarray((np.asarray(image, np.float32) @ (np.eye(3) * .5 + rng.dirichlet([1, 1, 1], 3) * .5)).clip(0, 255).astype(np.uint8))
    elif kind == 4: image = image.resize((w // 4, h // 4), Image.Resampling.BOX).resize((w, h), Image.Resampling.BILINEAR)
    else:                                                                       # the camera moved
        x = np.asarray(image, np.float32); steps = int(rng.integers(2, max(w // 25, 3)))
        image = Image.fromarray((sum(np.roll(x, i, 1) for i in range(steps)) / steps).astype(np.uint8))
    return alter(image, rng, rng.choice([.03, .09]))


def weather(image, rng):
    "`alter` without its geometry."
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, .005) * image.width))
    x = (np.asarray(image, np.float32) / 255)**np.exp(rng.normal(0, .35))
    x = (x - x.mean()) * np.exp(rng.normal(0, .25)) + x.mean() + rng.normal(0, .07)
    x = x * np.exp(rng.normal(0, .1, 3)) + rng.normal(0, 1, x.shape) * rng.uniform(0, .06)
    out = io.BytesIO()
    Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8)).save(out, 'jpeg', quality=int(rng.integers(20, 80)))
    return out.getvalue()


def palette(rng, colours=12):
    "Colours near one another, as those of a street are [n, 3]."
    return (rng.uniform(40, 215, 3) * .5 + rng.uniform(0, 255, (colours, 3)) * .5).astype(int)


def dead_leaves(rng, colours, size=112, leaves=220):
    "Shapes that fall upon one another, their sizes by a power law r⁻³, so that edges and spectrum are those of photographs (Lee, Mumford, Huang 2001); discs, boxes and polygons, some of them striped."
    image = Image.new('RGB', (2 * size, 2 * size), tuple(colours[0].tolist())); draw = ImageDraw.Draw(image)
    radius = 2 * size * (1600 - rng.random(leaves) * (1600 - 3.))**-.5
    for r in [*rng.uniform(.3, .7, 8) * 2 * size, *radius[rng.permutation(leaves)]]:
        x, y = rng.uniform(0, 2 * size, 2); corners, turn = int(rng.choice([3, 4, 4, 4, 5, 30])), rng.uniform(0, 2 * np.pi) * (rng.random() < .5)
        angle = turn + (np.arange(corners) + .5) * 2 * np.pi / corners
        c = np.clip(colours[rng.integers(len(colours))] + rng.normal(0, 8, 3), 0, 255).astype(int)
        draw.polygon([(x + r * np.cos(t) * (.6 if corners == 4 else 1), y + r * np.sin(t)) for t in angle], fill=tuple(c.tolist()))
        if rng.random() < .3 and r > 8:
            for k in np.arange(-.6, .6, .25): draw.line([(x + k * r * .5, y - r * .6), (x + k * r * .5, y + r * .6)], fill=tuple((c // 2).tolist()), width=max(1, int(r * .06)))
    return image.resize((size, size), Image.Resampling.BOX)
