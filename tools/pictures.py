"""Pictures that need no camera: dead leaves, and what another camera on another day does to a picture."""
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def alter(image, rng):
    "A perspective, a crop, a light, a colour cast, a blur, noise and a JPEG quality, drawn anew: a JPEG file's bytes."
    w, h = image.size
    corners = np.array([(0, 0), (0, h), (w, h), (w, 0)]) + rng.uniform(0, .09, (4, 2)) * [(w, h), (w, -h), (-w, -h), (-w, h)]
    image = image.transform((w, h), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC)
    return weather(image, rng)


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
