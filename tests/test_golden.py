"""The layers against the authors' code: outputs in float32, gradients in float64 (power norms magnify float32 rounding near zero)."""
import pytest, torch
from safetensors.torch import load_file

from sage.dpn import DynamicPowerNorm
from sage.interact import InteractHead
from sage.model import load_official
from sage.probing import SoftProbing, SoftWeighting

TOLERANCE = 1e-5
# Older torch (seen with 2.6 and 2.7) rounds resampled positions otherwise, by 8e-7, which the power norms magnify; given the newer positions it agrees to 1e-6 as well.
RESAMPLED = TOLERANCE if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 14) else 5e-4
MODULES = dict(
    dpn_backbone_c32=lambda: DynamicPowerNorm(32, 16),
    dpn_aggregator_c8=lambda: DynamicPowerNorm(8, 4),
    softweighting_c32=lambda: SoftWeighting(hidden=128, alpha=0.5),
    softp_small=lambda: SoftProbing(48, probes=8, probe_dim=16, token_dim=12),
    encoder_small=lambda: InteractHead(96, d_model=24, heads=4, ffn=48),
)


class Golden:
    "One file: its state, inputs, outputs, intermediates and gradients."
    def __init__(self, shared, name):
        path = shared / 'golden' / f'{name}.safetensors'
        if not path.exists(): pytest.skip(f'no golden vectors at {path}')
        self.all = load_file(path)

    def part(self, prefix, dtype=torch.float32): return {k.removeprefix(prefix): v.to(dtype) for k, v in self.all.items() if k.startswith(prefix)}


def error(ours, theirs): # largest difference by the largest value
    return ((ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-12)).item()


def close(ours, theirs, what='', tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    assert error(ours, theirs) <= tolerance, (what, error(ours, theirs))


def inputs(golden, dtype=torch.float32):
    return {k: v.requires_grad_() for k, v in golden.part('in.', dtype).items() if k not in ('cotangent', 'x_big')}


@pytest.mark.parametrize('name', MODULES)
def test_outputs(shared, name):
    golden, layer = Golden(shared, name), MODULES[name]().eval()
    layer.load_state_dict(golden.part('sd.'))
    out = golden.part('out.')
    close(layer(*inputs(golden).values()), next(v for k, v in out.items() if k in ('y', 'desc')))
    if 'y_big' in out: close(layer(golden.all['in.x_big']), out['y_big'])


@pytest.mark.parametrize('name', MODULES)
def test_gradients(shared, name):
    golden, layer = Golden(shared, name), MODULES[name]().double().eval()
    layer.load_state_dict(golden.part('sd.'))
    given = inputs(golden, torch.float64)
    (layer(*given.values()) * golden.part('in.', torch.float64)['cotangent']).sum().backward()
    for key, grad in golden.part('grad.in.').items(): close(given[key].grad, grad, key)
    check_parameters(layer, golden.part('grad.sd.'))


def check_parameters(model, grads, rename=lambda k: k, tolerance=TOLERANCE):
    "A gradient that is zero in exact arithmetic (a bias under the softmax) is compared absolutely."
    parameters = dict(model.named_parameters())
    assert {rename(k) for k in grads} == set(parameters)
    for key, grad in grads.items():
        ours = parameters[rename(key)].grad
        if grad.abs().max() < 1e-12: assert ours.abs().max() < 1e-12
        else: close(ours, grad, key, tolerance)


@pytest.mark.parametrize('name', ['dpn_backbone_c32', 'dpn_aggregator_c8', 'softweighting_c32', 'encoder_small'])
def test_gradients_float32(shared, name):
    golden, layer = Golden(shared, name), MODULES[name]().eval()
    layer.load_state_dict(golden.part('sd.'))
    given = inputs(golden)
    (layer(*given.values()) * golden.all['in.cotangent']).sum().backward()
    for key, grad in golden.part('grad.in.').items(): close(given[key].grad, grad, key)
    check_parameters(layer, golden.part('grad.sd.'))


def test_stages(shared):
    golden, layer = Golden(shared, 'softp_small'), MODULES['softp_small']().eval()
    layer.load_state_dict(golden.part('sd.'))
    mid, kept = golden.part('mid.'), {}
    layer(golden.all['in.f'], golden.all['in.t'], kept)
    close(kept['probes'], mid['score_softmax'])
    close(layer.soft_weighting(golden.all['in.f']), mid['soft_weighted'])
    golden, layer = Golden(shared, 'softweighting_c32'), MODULES['softweighting_c32']().eval()
    layer.load_state_dict(golden.part('sd.')); layer(golden.all['in.x'], kept := {})
    close(kept['beta'], golden.all['mid.sigma'][..., 0] * 0.5)


@pytest.fixture
def tiny(shared):
    golden = Golden(shared, 'sage_tiny')
    return golden, load_official({'model_state_dict': golden.part('sd.')}, num_heads=4)


@pytest.mark.parametrize('size', ['56', '70', '42x70'])
@pytest.mark.parametrize('fused', [False, True])
def test_whole_model(tiny, size, fused):
    golden, model = tiny
    images, mid = golden.all[f'in.img_{size}'], golden.part('mid.')
    model.backbone.fuse(fused)
    descriptors, maps = model.describe(images, maps=True)
    close(descriptors, golden.all[f'out.desc_{size}'], 'descriptor', RESAMPLED)
    if fused: return
    with torch.no_grad():
        close(model.backbone.embed(images), mid[f'tokens_{size}'], 'tokens')
        cls, patches = model.backbone(images)
    close(cls, mid[f't_{size}'], 'class token', RESAMPLED)
    close(patches.transpose(1, 2).unflatten(2, maps.grid), mid[f'f_{size}'], 'patches', RESAMPLED)


def test_blocks(tiny):
    golden, model = tiny
    seen = []
    for block in model.backbone.model.blocks[:2]: block.register_forward_hook(lambda *a: seen.append(a[-1]))
    for dpn in model.backbone.gpn_norms: dpn.register_forward_hook(lambda *a: seen.append(a[-1]))
    model.describe(golden.all['in.img_56'])
    for i, tokens in enumerate(seen): close(tokens, golden.all[f'mid.after_block{i}_56'], i, RESAMPLED)
    assert len(seen) == 6


def test_whole_gradient(tiny):
    "The reference resamples positions in float32 and computes the rest in float64; so do we."
    golden, model = tiny
    model.double().requires_grad_(True)
    image = golden.all['in.img_56'].double().requires_grad_()
    (model(image) * golden.all['in.cotangent'].double()).sum().backward()
    close(image.grad, golden.all['grad.in.img_56'], 'image', RESAMPLED)
    check_parameters(model, golden.part('grad.sd.'), lambda k: k.replace('aggregator.', 'probing.'), RESAMPLED)
