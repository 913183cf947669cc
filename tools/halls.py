"""Corridors, alleys and lanes with a camera in them: flat surfaces along a straight way, painted by chance. Other scenery than the towns of the package, for training alone."""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sage.core import stream

from pictures import dead_leaves, palette

LENGTH = 44.  # metres of a way


def _colour(rng, colours, spread=14):
    return tuple(int(v) for v in np.clip(colours[rng.integers(len(colours))] + rng.normal(0, spread, 3), 0, 255))


def pale(rng):
    "A palette of which some part is grey, with light and dark added."
    c = palette(rng).astype(float); grey = rng.uniform(.2, .9)
    return ((c * (1 - grey) + c.mean(1, keepdims=True) * grey) * np.exp(rng.normal(.15, .35, (len(c), 1)))).clip(0, 255).astype(int)


def _ground(rng, colours, w, h):
    "A plain surface: one colour or dead leaves, with a band, a grid or stripes."
    if rng.random() < .3: image = dead_leaves(rng, colours, 96, 120).resize((w, h), Image.Resampling.BICUBIC)
    else: image = Image.new('RGB', (w, h), _colour(rng, colours, 25))
    draw = ImageDraw.Draw(image)
    if rng.random() < .5: draw.rectangle((0, int(h * rng.uniform(.5, .9)), w, h), fill=_colour(rng, colours))
    dx, dy, line = int(rng.uniform(6, 60)), int(rng.uniform(5, 40)), _colour(rng, colours)
    if rng.random() < .45: [draw.line((x, 0, x, h), fill=line) for x in range(0, w, dx)]
    if rng.random() < .45: [draw.line((0, y, w, y), fill=line) for y in range(0, h, dy)]
    return image, draw


def _thing(draw, rng, colours, box):
    "A panel with a frame and something in it."
    x, y, u, v = box; frame = max(1, int(.05 * min(u - x, v - y) * rng.uniform(.5, 3)))
    draw.rectangle(box, fill=_colour(rng, colours, 30)); inner = (x + frame, y + frame, u - frame, v - frame)
    if inner[2] <= inner[0] or inner[3] <= inner[1]: return
    draw.rectangle(inner, fill=_colour(rng, colours, 40))
    for _ in range(rng.integers(0, 7)):
        a, b = sorted(rng.uniform(inner[0], inner[2], 2)), sorted(rng.uniform(inner[1], inner[3], 2))
        (draw.ellipse if rng.random() < .3 else draw.rectangle)((a[0], b[0], a[1], b[1]), fill=_colour(rng, colours, 40))


def paint_side(rng, day, colours, metres, height, ppm, see_through=False, changes=.1):
    "A side of the way, RGBA: things that repeat at one distance, and single ones; a few are elsewhere or away on another `day`."
    w, h = int(metres * ppm), max(int(height * ppm), 4)
    image, draw = _ground(rng, colours, w, h)
    for repeated in range(rng.integers(1, 4)):                                  # doors, windows, pillars: alike, at equal distances
        step, wide, low, high, kind = rng.uniform(1.6, 9), rng.uniform(.2, 1.6), rng.uniform(.0, .4), rng.uniform(.5, 1), int(rng.integers(1 << 30))
        for x in np.arange(rng.uniform(0, step), metres, step):
            own = kind if rng.random() > .3 else int(rng.integers(1 << 30))
            if day.random() < changes / 2: own = int(day.integers(1 << 30))
            _thing(draw, np.random.default_rng(own), colours, (x * ppm, h * (1 - high), (x + wide) * ppm, h * (1 - low)))
    for _ in range(rng.poisson(metres * .5)):                                   # posters, boxes, pipes: one by one
        x, y, wide, tall, own = rng.uniform(0, metres), rng.uniform(.05, .9), rng.uniform(.15, 1.8), rng.uniform(.05, .5), int(rng.integers(1 << 30))
        if day.random() < changes: continue
        _thing(draw, np.random.default_rng(own), colours, (x * ppm, h * y, (x + wide) * ppm, h * min(y + tall, 1)))
    grain = rng.normal(0, rng.uniform(0, 12), (h // 2 + 1, w // 2 + 1, 1)).repeat(2, 0).repeat(2, 1)[:h, :w]
    x = np.clip(np.asarray(image, np.float32) + grain, 0, 255) / 255
    alpha = np.ones((h, w, 1), np.float32)
    if see_through:                                                             # pillars, or what grows
        along = np.arange(w) / ppm
        if rng.random() < .5: alpha[:, (along + rng.uniform(0, 9)) % rng.uniform(2, 9) > rng.uniform(.2, 1.2)] = 0
        else:
            top = sum(np.sin(along * f + rng.uniform(0, 6)) * rng.uniform(0, .3) / f**.5 for f in (.3, .7, 1.7, 4, 9)) + rng.uniform(.2, .7)
            alpha[(1 - np.arange(h)[:, None] / h) > top] = 0
    return np.concatenate([x**2.2, alpha], 2)[::-1]                             # row 0 is the ground, light is linear


def _mips(picture):
    levels = [np.ascontiguousarray(picture, np.float32)]
    while min(levels[-1].shape[:2]) > 4 and len(levels) < 5:
        a = levels[-1]; a = a[:len(a) // 2 * 2, :a.shape[1] // 2 * 2]
        levels.append((a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4)
    return levels


class Way:
    "One corridor, alley or lane on one day. Axes: 0 to the right, 1 up, 2 along."
    def __init__(self, seed, day):
        rng, self.day = stream(seed, 'way'), stream(seed, 'day', day)
        light, open_air = self.day, rng.random() < .35
        self.width, self.height = (rng.uniform(5, 26), rng.uniform(.8, 7)) if open_air else (rng.uniform(1.8, 7), rng.uniform(2.3, 4.5))
        colours, ppm, w, h = pale(rng), 20, self.width / 2, self.height
        self.faces = []                                                         # (axis, where, mips, first metre of both other axes, share of light)
        def face(axis, at, picture, first, share): self.faces.append((axis, at, _mips(picture), first, share))
        for side in (-1, 1): face(0, side * w, paint_side(rng, light, colours, LENGTH, h, ppm), (0., 0.), rng.uniform(.6, 1.1))
        flat = lambda: paint_side(rng, light, colours, LENGTH, self.width, ppm / 2 if self.width > 8 else ppm, changes=.05)
        face(1, 0., flat(), (-w, 0.), rng.uniform(.5, 1.1)); self.open_air = open_air
        if not open_air: face(1, h, flat(), (-w, 0.), rng.uniform(.4, 1.2))
        for at in (0., LENGTH): face(2, at, paint_side(rng, light, colours, self.width, h, ppm), (0., -w), rng.uniform(.5, 1.1))
        for _ in range(rng.integers(0, 3)): face(0, rng.uniform(.45, .85) * w * rng.choice([-1, 1]), paint_side(rng, light, colours, LENGTH, h * rng.uniform(.4, 1), ppm, True), (0., 0.), rng.uniform(.5, 1.1))
        for at in rng.uniform(3, LENGTH, rng.integers(0, 5)):                   # gates and beams across
            gate = paint_side(rng, light, colours, self.width, h, ppm)
            a, b, c = rng.uniform(.05, .3), rng.uniform(.7, .95), rng.uniform(.6, .95); gh, gw = gate.shape[:2]
            gate[:int(gh * c), int(gw * a):int(gw * b), 3] = 0
            face(2, at, gate, (0., -w), rng.uniform(.5, 1.1))
        z = np.arange(int(LENGTH * 2)) / 2; lamp = np.zeros(len(z))
        step = rng.uniform(2, 12); power = rng.uniform(.2, 1.2)
        for at in np.arange(rng.uniform(0, step), LENGTH, step):
            if light.random() > .12: lamp += power / (1 + ((z - at) / rng.uniform(.8, 2.5))**2)
        on = 0. if open_air and light.random() < .7 else light.uniform(.4, 1.2)
        cast = np.exp(light.normal(0, .12, 3))
        self.lamp, self.ambient = lamp * on, (light.uniform(.15, .5) + (light.uniform(.2, .6) if open_air else 0)) * cast
        self.slope, self.sky = light.normal(0, .3), light.uniform(.3, 1.1) * np.exp(light.normal(0, .2, 3)) * [.85, .95, 1.1]
        self.haze = light.uniform(0, .02) if open_air else light.uniform(0, .006)
        self.clouds = light.uniform((1, 0, 0), (8, 6.3, 6.3), (4, 3))

    def __call__(self, x, y, z, heading, pitch, roll, fov, size=224):
        "A photograph [size, size, 3] uint8."
        s = np.tan(np.radians(fov) / 2); pixel = 2 * s / size
        right, up = np.meshgrid(((np.arange(size) + .5) / size * 2 - 1) * s, (1 - (np.arange(size) + .5) / size * 2) * s)
        h, p, r = np.radians([heading, pitch, roll])
        right, up = right * np.cos(r) - up * np.sin(r), right * np.sin(r) + up * np.cos(r)
        ahead, up = np.cos(p) - up * np.sin(p), np.sin(p) + up * np.cos(p)
        ray = np.stack([right * np.cos(h) + ahead * np.sin(h), up, ahead * np.cos(h) - right * np.sin(h)]).reshape(3, -1).astype(np.float32)
        eye, best, out = np.array([x, y, z], np.float32), np.full(ray.shape[1], np.inf, np.float32), np.zeros((ray.shape[1], 3), np.float32)
        wave = sum(np.sin(k * ray[0] + a) * np.cos(2 * k * ray[1] + b) for k, a, b in self.clouds) / 4
        out[:] = self.sky * (1 + .25 * wave - .3 * np.clip(ray[1], 0, 1))[:, None]
        for axis, at, mips, first, share in self.faces:
            with np.errstate(divide='ignore', invalid='ignore'): t = (at - eye[axis]) / ray[axis]
            i = np.flatnonzero((t > .15) & (t < best))
            if not len(i): continue
            hit = eye[:, None] + ray[:, i] * t[i]
            a, b = {0: (hit[1], hit[2]), 1: (hit[0], hit[2]), 2: (hit[1], hit[0])}[axis]
            ppm = mips[0].shape[1] / (self.width if axis == 2 else LENGTH)
            level = np.clip(np.log2(np.maximum(t[i] * pixel * ppm, 1)).astype(int), 0, len(mips) - 1)
            for k in np.unique(level):
                m, on = mips[k], level == k
                row, col = ((a[on] - first[0]) * ppm / 2**k).astype(int), ((b[on] - first[1]) * ppm / 2**k).astype(int)
                good = (row >= 0) & (row < len(m)) & (col >= 0) & (col < m.shape[1]) & (a[on] >= first[0]) & (b[on] >= first[1])
                texel = m[row[good], col[good]]; solid = texel[:, 3] > .5
                j, d = i[on][good][solid], hit[:, on][:, good][:, solid]
                light = self.ambient + (np.interp(d[2], np.arange(len(self.lamp)) / 2, self.lamp) * np.clip(.4 + d[1] / 4, .3, 1.1))[:, None]
                clear = np.exp(-self.haze * t[j])[:, None]
                out[j] = texel[solid, :3] * light * share * (1 + self.slope * np.clip(d[0:1].T / self.width, -.5, .5)) * clear + self.sky * .6 * (1 - clear); best[j] = t[j]
        return (np.clip(out, 0, 1)**(1 / 2.2) * 255).astype(np.uint8).reshape(size, size, 3)


def draw_way(seed, places, views, size=224, days=5):
    "Photographs of places along a way, each from nearly one spot on another day [places, views, size, size, 3]."
    rng = stream(seed, 'walk'); ways = [Way(seed, d) for d in range(days)]
    out = np.zeros((places, views, size, size, 3), np.uint8)
    step = rng.uniform(1., 2.4); fov = rng.uniform(58, 90); back = rng.random() < .3
    for i in range(places):
        along = 1.5 + step * i * min(1, (LENGTH - 4) / (step * places)); turn = rng.normal(0, 22) if rng.random() < .4 else 0.
        x, y = rng.normal(0, .12) * ways[0].width, rng.uniform(1.3, 1.8)
        for j in range(views):
            way = ways[(i + j) % days]
            x_ = np.clip(x + rng.normal(0, .12), -.35 * way.width, .35 * way.width)
            out[i, j] = way(x_, y + rng.normal(0, .05), np.clip(along + rng.normal(0, .12 * step), .5, LENGTH - .5), 180 * back + turn + rng.normal(0, 2.5), rng.normal(0, 1.5), rng.normal(0, 1), fov * np.exp(rng.normal(0, .03)), size)
    return out
