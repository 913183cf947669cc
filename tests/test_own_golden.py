"""One descriptor kept with the project, so that every machine has something to match: sage_nano and the head, filled with numbers that do not depend on torch's generator.

`python tests/test_own_golden.py` writes it anew, which only a deliberate change of the model's arithmetic justifies."""
from pathlib import Path

import numpy as np
import torch

from sage.core import stream
from sage.model import create_sage

FILE = Path(__file__).with_name('own_golden.npz')

def computed():
    "Descriptors [2, 8448] and maps of two noise images, float32."
    model = create_sage('sage_nano', pretrained=False, interact=True).eval()
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            x = stream(0, 'own golden', name).normal(size=tuple(p.shape))*(.05 if p.ndim > 1 else .1)
            p.copy_(torch.from_numpy(x) + (1. if 'norm' in name and name.endswith('weight') and p.ndim == 1 else 0.))
    images = torch.from_numpy(stream(0, 'own golden', 'images').normal(size=(2, 3, 112, 140)).astype(np.float32))
    with torch.no_grad():
        d, maps = model.describe(images, maps=True)
        return dict(descriptors=d.numpy(), beta=maps.beta.numpy(), crossed=model.describe(images, cross_image=True).numpy())

def test_the_kept_descriptor_is_matched():
    kept = np.load(FILE)
    for name, x in computed().items():
        mine = x[:, ::8] if x.shape[1] > 1000 else x
        assert np.abs(mine - kept[name]).max() <= 1e-5*np.abs(kept[name]).max(), name

if __name__ == '__main__': np.savez_compressed(FILE, **{n: x[:, ::8] if x.shape[1] > 1000 else x for n, x in computed().items()})
