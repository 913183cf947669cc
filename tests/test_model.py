"""The model against an independent reading of the paper's code, its promises, its files, and bad input."""
import hashlib, math, os, re, socket, subprocess, sys, threading, time

import huggingface_hub, pytest, timm, torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from sage.backbone import NANO, Backbone, hub_reachable, make_vit, nano_vit, pack_nano, packaged_nano, read_tensors, resample_positions
from sage.checkpoint import read_header
from sage.core import MissingPath, UserError
from sage.model import create_sage, load_official, load_sage, parameter_table, raw_descriptors, save_sage

SMALL = dict(backbone='sage_nano', pretrained=False, probes=8, probe_dim=16, token_dim=12)


@pytest.fixture(scope='module')
def model(): return create_sage(**SMALL).eval()


def images(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- an independent reading: plain functions over an authors' state dict ---------------------------------------------

def reference_dpn(sd, name, x):
    h = x.mean(1) @ sd[f'{name}.projection.0.weight'].T + sd[f'{name}.projection.0.bias']
    p = torch.sigmoid(h.clamp_min(0) @ sd[f'{name}.projection.3.weight'].T + sd[f'{name}.projection.3.bias'])
    return torch.sign(x) * (torch.abs(x) + 1e-6) ** p[:, None] + x


def reference_norm(sd, name, x, eps): return F.layer_norm(x, x.shape[-1:], sd[f'{name}.weight'], sd[f'{name}.bias'], eps)


def reference_attention(q, k, v, heads):
    "[L, N, C] each: sequence, batch, width."
    (l, n, c), d = q.shape, q.shape[-1] // heads
    q, k, v = (t.reshape(l, n * heads, d).transpose(0, 1) for t in (q, k, v))
    return ((q / math.sqrt(d)) @ k.transpose(1, 2)).softmax(-1).bmm(v).transpose(0, 1).reshape(l, n, c)


def reference_linear(sd, name, x): return F.linear(x, sd[f'{name}.weight'], sd[f'{name}.bias'])


def reference_backbone(sd, x, heads, depth, native):
    m = 'backbone.model.'
    patch = sd[m + 'patch_embed.proj.weight'].shape[-1]
    x = F.conv2d(x, sd[m + 'patch_embed.proj.weight'], sd[m + 'patch_embed.proj.bias'], stride=patch)
    h, w = x.shape[-2:]
    pos = sd[m + 'pos_embed']
    grid = pos[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    if (h, w) != (native, native): grid = F.interpolate(grid, scale_factor=((h + .1) / native, (w + .1) / native), mode='bicubic', antialias=False)
    x = torch.cat([(sd[m + 'cls_token'] + pos[:, :1]).expand(len(x), -1, -1), (x + grid).flatten(2).transpose(1, 2)], 1)
    for i in range(depth):
        b = f'{m}blocks.{i}.'
        q, k, v = reference_linear(sd, b + 'attn.qkv', reference_norm(sd, b + 'norm1', x, 1e-6)).transpose(0, 1).chunk(3, -1)
        x = x + sd[b + 'ls1.gamma'] * reference_linear(sd, b + 'attn.proj', reference_attention(q, k, v, heads).transpose(0, 1))
        x = x + sd[b + 'ls2.gamma'] * reference_linear(sd, b + 'mlp.fc2', F.gelu(reference_linear(sd, b + 'mlp.fc1', reference_norm(sd, b + 'norm2', x, 1e-6))))
        if i >= depth - 4: x = reference_dpn(sd, f'backbone.gpn_norms.{i - depth + 4}', x)
    x = reference_norm(sd, m + 'norm', x, 1e-6)
    return x[:, 0], x[:, 1:].transpose(1, 2).unflatten(2, (h, w))


def reference_softp(sd, t, f):
    a = 'aggregator.'
    s = f.flatten(2).norm(dim=1)[..., None] + 1e-6
    beta = .5 * torch.sigmoid(reference_linear(sd, a + 'soft_weighting.predictor.2', reference_linear(sd, a + 'soft_weighting.predictor.0', s).relu()))
    f = f * (1 + beta.transpose(1, 2).reshape(len(f), 1, *f.shape[-2:]))
    def net(name): return F.conv2d(F.conv2d(f, sd[f'{a}{name}.0.weight'], sd[f'{a}{name}.0.bias']).relu(), sd[f'{a}{name}.3.weight'], sd[f'{a}{name}.3.bias']).flatten(2)
    features, scores = net('cluster_features'), net('score')
    features = features - features.mean((1, 2), keepdim=True)
    m = torch.einsum('bdl,bkl->bdk', features, scores.softmax(-1)) / features.shape[-1]
    m = F.normalize(reference_dpn(sd, a + 'gpn', m), dim=1).flatten(1)
    g = F.normalize(reference_linear(sd, a + 'token_features.2', reference_linear(sd, a + 'token_features.0', t).relu()), dim=1)
    return F.normalize(torch.cat([g, m], 1), dim=1)


def reference_head(sd, x, heads, layers, d):
    x = x.reshape(len(x), -1, d)
    for i in range(layers):
        e = f'encoder.layers.{i}.'
        q, k, v = F.linear(x, sd[e + 'self_attn.in_proj_weight'], sd[e + 'self_attn.in_proj_bias']).chunk(3, -1)
        x = reference_norm(sd, e + 'norm1', x + reference_linear(sd, e + 'self_attn.out_proj', reference_attention(q, k, v, heads)), 1e-5)
        x = reference_norm(sd, e + 'norm2', x + reference_linear(sd, e + 'linear2', F.gelu(reference_linear(sd, e + 'linear1', x))), 1e-5)
    return x.flatten(1)


def official(width=32, depth=5, native=4, patch=14, probes=8, probe_dim=12, token_dim=24, hidden=20, mlp=3, head=None, seed=0):
    "A random checkpoint in the authors' layout, written down from its description and not from our modules."
    gen, sd = torch.Generator().manual_seed(seed), {}
    def put(name, *shape, scale=None, around=0.): sd[name] = around + (scale or shape[-1] ** -.5 if len(shape) < 3 else shape[1] ** -.5) * torch.randn(*shape, generator=gen)
    def linear(name, out, inn, conv=False): put(name + '.weight', *((out, inn, 1, 1) if conv else (out, inn))); put(name + '.bias', out, scale=.1)
    def norm(name, n): put(name + '.weight', n, scale=.3, around=1.); put(name + '.bias', n, scale=.1)
    m = 'backbone.model.'
    sd[m + 'cls_token'], sd[m + 'pos_embed'] = torch.randn(1, 1, width, generator=gen), .5 * torch.randn(1, 1 + native ** 2, width, generator=gen)
    sd[m + 'mask_token'] = torch.zeros(1, width)
    sd[m + 'patch_embed.proj.weight'] = torch.randn(width, 3, patch, patch, generator=gen) / (patch * 3 ** .5); put(m + 'patch_embed.proj.bias', width, scale=.1)
    for i in range(depth):
        b = f'{m}blocks.{i}.'
        norm(b + 'norm1', width); norm(b + 'norm2', width)
        linear(b + 'attn.qkv', 3 * width, width); linear(b + 'attn.proj', width, width); linear(b + 'mlp.fc1', mlp * width, width); linear(b + 'mlp.fc2', width, mlp * width)
        for ls in ('ls1', 'ls2'): sd[f'{b}{ls}.gamma'] = .1 + .8 * torch.rand(width, generator=gen)
    norm(m + 'norm', width)
    for i in range(4): linear(f'backbone.gpn_norms.{i}.projection.0', 16, width); linear(f'backbone.gpn_norms.{i}.projection.3', 1, 16)
    a = 'aggregator.'
    linear(a + 'soft_weighting.predictor.0', 128, 1); linear(a + 'soft_weighting.predictor.2', 1, 128)
    for name, out in (('cluster_features', probe_dim), ('score', probes), ('single_branch', 9)): linear(f'{a}{name}.0', hidden, width, True); linear(f'{a}{name}.3', out, hidden, True)
    linear(a + 'token_features.0', hidden, width); linear(a + 'token_features.2', token_dim, hidden)
    linear(a + 'gpn.projection.0', probes // 2, probes); linear(a + 'gpn.projection.3', 1, probes // 2)
    for i in range(head['layers'] if head else 0):
        e, d = f'encoder.layers.{i}.', head['d_model']
        put(e + 'self_attn.in_proj_weight', 3 * d, d); put(e + 'self_attn.in_proj_bias', 3 * d, scale=.1)
        linear(e + 'self_attn.out_proj', d, d); linear(e + 'linear1', head['ffn'], d); linear(e + 'linear2', d, head['ffn']); norm(e + 'norm1', d); norm(e + 'norm2', d)
    return sd


@pytest.mark.parametrize('size', [(56, 56), (42, 84), (98, 28)])
@pytest.mark.parametrize('head', [None, dict(d_model=20, layers=3, ffn=17)])
def test_against_reference(size, head):
    sd, x = official(head=head), images(3, 3, *size)
    ours = load_official(sd, num_heads=2, interact_heads=4).double()
    exact = {k: v.double() for k, v in sd.items()}
    want = reference_softp(exact, *reference_backbone(exact, x.double(), 2, 5, 4))
    assert relative(ours.describe(x.double()), want) < 1e-6
    if head: assert relative(ours.describe(x.double(), cross_image=True), reference_head(exact, want, 4, 3, 20)) < 1e-6
    assert relative(ours.float().describe(x), want) < 1e-4                # float32: rounding, magnified by the power norms


def test_sizes_from_shapes():
    for kw in (dict(width=48, depth=6), dict(native=5, patch=16), dict(probes=4, probe_dim=8, token_dim=16, hidden=11, mlp=4)):
        m = load_official({'model_state_dict': {f'module.{k}': v for k, v in official(**kw).items()}}, num_heads=2)
        assert m.describe(images(1, 3, 5 * m.patch, 4 * m.patch)).shape == (1, m.dim)
    assert m.dim == 16 + 4 * 8


def test_default_heads():
    heads = load_official(official(width=128)).backbone.model.blocks[0].attn.num_heads
    assert heads == 2                                                  # C / 64


# --- counts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, ours, authors, single, total', [('vit_base_patch14_dinov2.lvd142m', 1_464_326, 1_956_550, 492_224, 88.54e6), ('vit_large_patch14_dinov2.lvd142m', 1_874_438, 2_497_734, 623_296, 306.86e6)])
def test_parameter_table(name, ours, authors, single, total):
    with torch.device('meta'): table = parameter_table(create_sage(name, pretrained=False, interact=True)).set_index('part')
    head = table.loc['interact head', 'trainable']
    assert head == 7_880_192
    assert table.loc['sum', 'trainable'] - head == ours and ours + single == authors
    assert abs(table.loc['sum', 'total'] - head + single - total) < .01e6
    assert table.drop('sum').sum().total == table.loc['sum', 'total'] and table.drop('sum').sum().trainable == table.loc['sum', 'trainable']
    assert table.loc['blocks', 'trainable'] == 0


def test_nano_is_small():
    assert sum(p.numel() for p in nano_vit().parameters()) <= 6e6
    with torch.device('meta'): assert create_sage('sage_nano', pretrained=False).dim == 8448


# --- promises ----------------------------------------------------------------------------------------------------------

def test_only_trained_parts_get_gradients():
    m = create_sage(**SMALL, interact=False)
    m.train()(images(2, 3, 56, 56)).square().mean().backward()
    got = {n for n, p in m.named_parameters() if p.grad is not None}
    assert got == {n for n, p in m.named_parameters() if p.requires_grad} == set(m.trainable_state())
    assert all(n.startswith(('backbone.gpn_norms', 'backbone.model.norm.', 'probing.')) for n in got)


def test_prefix_records_nothing_unless_asked(model):
    x = images(1, 3, 56, 56)
    assert not model.prefix(x).requires_grad
    assert model.prefix(x.clone().requires_grad_()).requires_grad
    with torch.no_grad(): assert not model.prefix(x.clone().requires_grad_()).requires_grad


def test_prefix_is_constant_in_training(model):
    m, x = create_sage(**SMALL), images(2, 3, 56, 56)
    before = m.train().prefix(x)
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1.)
    m(x).square().sum().backward(); opt.step()
    assert torch.equal(before, m.prefix(x))


def test_frozen_part_has_no_dropout():
    vit = VisionTransformer(**NANO | dict(drop_path_rate=.5, proj_drop_rate=.5, attn_drop_rate=.5))
    body = Backbone(vit).train()
    assert body.gpn_norms[0].projection[1].training and torch.equal(body.prefix(x := images(1, 3, 56, 56)), body.prefix(x))


def test_describe_keeps_every_mode(model):
    m, x = create_sage(**SMALL).train(), images(2, 3, 56, 56)
    m.probing.gpn.eval()
    modes = [k.training for k in m.modules()]
    first = m.describe(x)
    assert [k.training for k in m.modules()] == modes and torch.equal(first, m.describe(x))
    with pytest.raises(UserError): m.describe(images(2, 3, 57, 56))
    assert [k.training for k in m.modules()] == modes                   # also after an error
    assert first.dtype == torch.float32 and not first.requires_grad


def test_batch_mates_matter_only_on_request():
    m, x = create_sage('sage_nano', pretrained=False, interact=True, probes=8, probe_dim=64, token_dim=256), images(5, 3, 56, 56)
    alone = torch.cat([m.describe(i[None]) for i in x])
    torch.testing.assert_close(m.describe(x), alone, rtol=0, atol=1e-5)
    together = m.describe(x, cross_image=True)
    assert (together - torch.cat([m.describe(i[None], cross_image=True) for i in x])).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(together.norm(dim=1), torch.full((5,), m.dim ** .5), rtol=.02, atol=0)
    torch.testing.assert_close(m.describe(x[[3, 1, 0, 4, 2]], cross_image=True), together[[3, 1, 0, 4, 2]], rtol=0, atol=2e-3)


def test_maps_cost_no_second_forward(model):
    calls = []
    handles = [m.register_forward_hook(lambda mod, *_: calls.append(mod)) for m in [*model.backbone.model.blocks, model.probing]]
    d, maps = model.describe(x := images(2, 3, 56, 98), maps=True)
    for h in handles: h.remove()
    assert len(calls) == len(set(calls)) == len(model.backbone.model.blocks) + 1
    assert torch.equal(d, model.describe(x))
    assert maps.grid == (4, 7) and maps.beta.shape == maps.norms.shape == (2, 28) and maps.probes.shape == (2, 8, 28) and maps.dpn.shape == (2, 4) and maps.exponent.shape == (2,)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in maps[:-1])


def test_maps_are_what_was_used(model):
    x = images(1, 3, 56, 98)
    _, maps = model.describe(x, maps=True)
    with torch.no_grad(): _, patches = model.backbone(x)
    torch.testing.assert_close(maps.norms, patches.norm(dim=2) + 1e-6)
    with torch.no_grad(): scores = model.probing.score(patches * (1 + maps.beta[..., None]))
    torch.testing.assert_close(maps.probes, scores.softmax(1).transpose(1, 2), rtol=1e-4, atol=1e-7)


def test_cfp_baseline():
    m = create_sage(**SMALL | dict(alpha=0.))
    _, maps = m.describe(images(1, 3, 56, 56), maps=True)
    assert maps.beta.abs().max() == 0


def test_half_precision(model):
    m, x = create_sage(**SMALL, interact=False), images(3, 3, 56, 84)
    exact = m.describe(x)
    with torch.autocast('cpu', torch.bfloat16):
        rough, maps = m.describe(x, maps=True)
        loss = m.train()(x).square().sum()
    assert rough.dtype == torch.float32 and maps.dpn.dtype == torch.float32 and (exact * rough).sum(1).min() > .98
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
    torch.testing.assert_close(m.eval().from_prefix(m.prefix(x).half()).detach(), exact, rtol=0, atol=.02)   # tokens kept in half precision


def test_seed_alone_decides():
    torch.manual_seed(1); a = create_sage(**SMALL, seed=5)
    torch.manual_seed(2); b = create_sage(**SMALL, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.probing.score[0].weight, create_sage(**SMALL, seed=6).probing.score[0].weight)


def test_raw_descriptors(model):
    x = images(2, 3, 112, 112)
    raw, tokens = raw_descriptors(model, x), model.backbone.model.forward_features(x).detach()
    torch.testing.assert_close(raw['cls'], F.normalize(tokens[:, 0], dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(raw['mean'], F.normalize(tokens[:, 1:].mean(1), dim=1), rtol=0, atol=1e-5)


def test_positions_are_not_timms():
    smooth = F.interpolate(images(1, 16, 9, 9), (37, 37), mode='bicubic').flatten(2).transpose(1, 2)
    ours = resample_positions(smooth, (37, 37), (16, 23))
    timms = resample_abs_pos_embed(smooth, new_size=(16, 23), old_size=(37, 37), num_prefix_tokens=0)
    assert ours.shape == timms.shape and .005 < relative(ours, timms) < .3
    assert resample_positions(smooth, (37, 37), (37, 37)) is smooth
    assert not torch.equal(resample_positions(images(1, 64, 4), (8, 8), (4, 16)), images(1, 64, 4))   # equal count, not square


def test_other_vits():
    vit = VisionTransformer(**NANO | dict(patch_size=16, no_embed_class=True, pre_norm=True, depth=4))
    body = Backbone(vit, dpns=2).eval()
    with torch.no_grad(): cls, patches = body.suffix(body.prefix(x := images(1, 3, 112, 112)), power=False)
    torch.testing.assert_close(torch.cat([cls[:, None], patches], 1), vit.eval().forward_features(x), rtol=0, atol=1e-4)
    assert body.patch == 16 and body.frozen_blocks == 3


# --- bad input ---------------------------------------------------------------------------------------------------------

def sentence(error, *words):
    text = str(error.value)
    assert '\n' not in text and all(w in text for w in words), text


@pytest.mark.parametrize('size, words', [((100, 112), ('98', '112')), ((112, 13), ('14',)), ((224, 225), ('224', '238'))])
def test_image_size(model, size, words):
    with pytest.raises(UserError) as e: model.describe(torch.zeros(1, 3, *size))
    sentence(e, *words)


@pytest.mark.parametrize('bad', [torch.zeros(3, 56, 56), torch.zeros(1, 4, 56, 56), torch.zeros(1, 3, 56, 56, dtype=torch.uint8)])
def test_image_tensor(model, bad):
    with pytest.raises(UserError) as e: model.describe(bad)
    sentence(e, '[N, 3, H, W]')


def test_no_head(model):
    with pytest.raises(UserError) as e: model.describe(images(1, 3, 56, 56), cross_image=True)
    sentence(e, 'interact=True')


def test_head_must_divide():
    with pytest.raises(UserError) as e: create_sage(**SMALL, interact=True)
    sentence(e, '140', '768')


@pytest.mark.parametrize('name, word', [('resnet18', 'VisionTransformer'), ('vit_base_patch14_reg4_dinov2.lvd142m', 'register'), ('vit_base_patch16_siglip_224', 'class token'), ('vit_small_r26_s32_224', 'convolution'), ('nothing_at_all', 'timm.list_models'), ('vit_base_patch14_dinov2.none', 'tag')])
def test_unsuitable_backbones(name, word):
    with pytest.raises(UserError) as e: create_sage(name)
    sentence(e, name, word)


@pytest.mark.parametrize('missing', ['backbone.gpn_norms.2.projection.3.bias', 'aggregator.score.0.bias', 'backbone.model.blocks.1.ls2.gamma', 'backbone.model.cls_token'])
def test_official_missing(missing):
    with pytest.raises(UserError) as e: load_official({k: v for k, v in official().items() if k != missing}, num_heads=2)
    sentence(e, missing)


def test_official_left_over_or_misshapen():
    with pytest.raises(UserError) as e: load_official(official() | {'backbone.model.register_tokens': torch.zeros(1)}, num_heads=2)
    sentence(e, 'left over', 'backbone.model.register_tokens')
    with pytest.raises(UserError) as e: load_official(official() | {'aggregator.gpn.projection.0.weight': torch.zeros(3, 8)}, num_heads=2)
    sentence(e, 'aggregator.gpn.projection.0.weight')
    with pytest.raises(UserError) as e: load_official(official(), num_heads=5)
    sentence(e, 'num_heads')
    with pytest.raises(UserError): load_official(official(), num_heads=2, img_size=224)


@pytest.mark.parametrize('content', [b'', b'hello', b'\xff\xd8\xff\xe0picture', b'\x80\x02garbage', b'PK\x03\x04garbage', bytes(range(256))])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_no_checkpoint(tmp_path, content, suffix):
    path = tmp_path / f'x{suffix}'
    path.write_bytes(content)
    for load in (load_official, load_sage, lambda p: create_sage('sage_nano', pretrained=p)):
        with pytest.raises(UserError) as e: load(path)
        sentence(e, str(path))


class Payload:
    def __reduce__(self): return os.mkdir, ('unpickled',)


def test_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model_state_dict': Payload()}, 'evil.pth')
    with pytest.raises(UserError): load_official('evil.pth')
    assert not (tmp_path / 'unpickled').exists()


def test_missing_files(tmp_path):
    for load in (load_official, load_sage, read_tensors):
        with pytest.raises(MissingPath) as e: load(tmp_path / 'nowhere.safetensors')
        sentence(e, 'nowhere.safetensors')
    with pytest.raises(UserError): load_official(tmp_path)              # a folder
    with pytest.raises(UserError): load_official({})
    with pytest.raises(UserError): load_official({'epoch': 3})


# --- files -------------------------------------------------------------------------------------------------------------

def test_official_file(tmp_path):
    sd = official(head=dict(d_model=20, layers=2, ffn=16))
    torch.save({'epoch': 7, 'model_state_dict': {f'module.{k}': v for k, v in sd.items()}}, tmp_path / 'SAGE.pth')
    a, b = load_official(tmp_path / 'SAGE.pth', num_heads=2, interact_heads=2), load_official(sd, num_heads=2, interact_heads=2)
    x = images(2, 3, 56, 56)
    assert torch.equal(a.describe(x, cross_image=True), b.describe(x, cross_image=True)) and not a.training
    save_sage(a, tmp_path / 'again.safetensors')
    assert torch.equal(load_sage(tmp_path / 'again.safetensors').describe(x, cross_image=True), a.describe(x, cross_image=True))
    next(iter(sd.values())).zero_()                                     # the model holds its own tensors
    assert torch.equal(a.describe(x), b.describe(x))


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(11)
    vit = nano_vit()
    return vit, pack_nano(vit, tmp_path / 'weights')


def test_packaged_weights(weights):
    vit, path = weights
    digest, name = (path.parent / 'checksums.txt').read_text().split()
    assert name == path.name and digest == hashlib.sha256(path.read_bytes()).hexdigest() and path.stat().st_size <= 12e6
    for k, v in packaged_nano(path.parent).items(): torch.testing.assert_close(v.float(), vit.state_dict()[k], rtol=1e-3, atol=1e-6)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError) as e: packaged_nano(path.parent)
    sentence(e, 'checksum', 'damaged')
    path.unlink()
    with pytest.raises(MissingPath) as e: packaged_nano(path.parent)
    sentence(e, 'sage_nano.safetensors')


def test_shipped_nano():
    from sage.backbone import weights_folder
    if not (weights_folder() / 'sage_nano.safetensors').exists(): pytest.skip('sage_nano is not trained yet')
    m = create_sage('sage_nano')
    assert m.describe(images(1, 3, 112, 112)).isfinite().all() and all(p.dtype == torch.float32 for p in m.parameters())


def test_save_trained_part(weights, tmp_path):
    _, path = weights
    m, x = create_sage(**SMALL | dict(pretrained=path), seed=3), images(2, 3, 56, 56)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad: p.add_(.01)
    out = save_sage(m, tmp_path / 'm.safetensors', dict(epoch=2, note='ü'))
    assert out.stat().st_size < 1.1 * sum(v.nbytes for v in m.trainable_state().values()) + 20_000
    assert read_header(out)['config'] == dict(epoch=2, note='ü') and read_header(out)['holds'] == 'trainable'
    again = load_sage(out, pretrained=path)
    assert torch.equal(again.describe(x), m.describe(x)) and not again.training
    torch.manual_seed(12)
    other = pack_nano(nano_vit(), tmp_path / 'other')
    with pytest.raises(UserError) as e: load_sage(out, pretrained=other)
    sentence(e, 'other weights', 'sage_nano')


def test_save_random_backbone(tmp_path):
    m, x = create_sage(**SMALL, seed=4), images(2, 3, 56, 56)
    path = save_sage(m, tmp_path / 'm.safetensors')
    assert read_header(path)['holds'] == 'all' and torch.equal(load_sage(path).describe(x), m.describe(x))


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = save_sage(create_sage(**SMALL), tmp_path / 'm.safetensors')
    before = path.read_bytes()
    monkeypatch.setattr('sage.checkpoint.save_file', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): save_sage(create_sage(**SMALL, seed=1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['m.safetensors']


def test_trainable_state(model):
    other = create_sage(**SMALL, seed=9)
    other.load_trainable(model.trainable_state())
    assert all(torch.equal(v, model.trainable_state()[k]) for k, v in other.trainable_state().items())
    state = dict(model.trainable_state())
    state.pop('probing.score.0.bias'); state['nonsense'] = torch.zeros(1)
    with pytest.raises(UserError) as e: other.load_trainable(state)
    sentence(e, 'missing: probing.score.0.bias', 'left over: nonsense')


def test_wrong_checkpoint(tmp_path):
    save_file({'w': torch.zeros(2)}, tmp_path / 'other.safetensors')
    with pytest.raises(UserError) as e: load_sage(tmp_path / 'other.safetensors')
    sentence(e, 'no SAGE checkpoint', '.pth file')
    with pytest.raises(UserError) as e: create_sage('sage_nano', pretrained=tmp_path / 'other.safetensors')
    sentence(e, 'does not fit', 'other.safetensors')
    save_file({'w': torch.zeros(2)}, tmp_path / 'broken.safetensors', metadata=dict(format='sage-vpr 1', model='{'))
    with pytest.raises(UserError) as e: load_sage(tmp_path / 'broken.safetensors')
    sentence(e, 'broken.safetensors')


# --- timm's weights ----------------------------------------------------------------------------------------------------

NAME = 'vit_small_patch14_dinov2.lvd142m'


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No network and an empty cache."
    for holder in (huggingface_hub.constants, huggingface_hub.file_download): monkeypatch.setattr(holder, 'HF_HUB_CACHE', str(tmp_path / 'hub'), raising=False)      # before 1.0 one is a copy
    def refuse(*a, **k): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    return tmp_path


def test_offline(offline, monkeypatch):
    "Neither long work nor waiting: nothing is tried again and again."
    slept, sleep, me, start = [], time.sleep, threading.get_ident(), time.process_time()
    monkeypatch.setattr(time, 'sleep', lambda s: slept.append(s) if threading.get_ident() == me else sleep(s))
    with pytest.raises(UserError) as e: create_sage(NAME)
    sentence(e, NAME, 'pretrained=False', 'sage_nano', 'FILE')
    assert time.process_time() - start < 8 and sum(slept) < 2 and not hub_reachable(), slept


def test_offline_mode(monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(UserError) as e: create_sage(NAME)
    sentence(e, 'sage_nano')


@pytest.fixture
def dinov2_file(tmp_path):
    "A ViT-S of random numbers as facebookresearch publishes it (with a mask token)."
    torch.manual_seed(0)
    vit = timm.create_model(NAME, pretrained=False, num_classes=0)
    torch.save(vit.state_dict() | {'mask_token': torch.zeros(1, 384)}, path := tmp_path / 'dinov2_vits14_pretrain.pth')
    return vit, path


def test_local_file(offline, dinov2_file):
    vit, path = dinov2_file
    ours = make_vit(NAME, path)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in vit.state_dict().items()) and 'state_dict' not in ours.pretrained_cfg
    with pytest.raises(UserError) as e: make_vit('vit_base_patch14_dinov2.lvd142m', path)
    sentence(e, 'position embedding')
    torch.save({k: v for k, v in vit.state_dict().items() if 'blocks.3' not in k}, path)
    with pytest.raises(UserError) as e: make_vit(NAME, path)
    sentence(e, 'could not be loaded')


def test_cached_file(offline, dinov2_file):
    vit, _ = dinov2_file
    repo = offline / 'hub' / f'models--timm--{NAME}'
    (repo / 'refs').mkdir(parents=True); (repo / 'snapshots' / 'abc').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text('abc')
    save_file({k: v.contiguous() for k, v in vit.state_dict().items()}, repo / 'snapshots' / 'abc' / 'model.safetensors')
    assert torch.equal(make_vit(NAME).blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)


def test_import_does_no_work():
    code = 'import sys, torch; s = torch.random.get_rng_state(); import sage.model; assert torch.equal(s, torch.random.get_rng_state())'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('prefix', ['backbone.model.blocks.11.', 'backbone.gpn_norms.3.', 'encoder.layers.1.'])
def test_official_missing_the_last_of_its_kind(prefix):
    "A released width says how many there must be: a checkpoint without the last is not a smaller model."
    sd = official(width=384, depth=12, head=dict(layers=2, d_model=24, ffn=16))
    whole = load_official(sd, interact_heads=4)
    assert len(whole.backbone.model.blocks) == 12 and len(whole.backbone.gpn_norms) == 4
    gone = [k for k in sd if k.startswith(prefix)]
    with pytest.raises(UserError) as e: load_official({k: v for k, v in sd.items() if k not in gone}, interact_heads=4)
    assert gone and all(k in str(e.value) for k in gone)


def test_official_lists_every_key_and_a_gap():
    sd = official()
    gone = [k for k in sd if k.startswith(('backbone.model.blocks.1.', 'aggregator.gpn.'))]
    with pytest.raises(UserError) as e: load_official({k: v for k, v in sd.items() if k not in gone}, num_heads=2)
    assert len(gone) > 10 and all(k in str(e.value) for k in gone)


@pytest.mark.parametrize('key', ['aggregator.score.3.weight', 'aggregator.token_features.2.weight', 'aggregator.score.0.weight', 'backbone.model.pos_embed', 'backbone.gpn_norms.0.projection.0.weight', 'backbone.model.patch_embed.proj.weight'])
def test_official_of_another_shape_is_one_sentence(key):
    for value in (torch.tensor(1.), torch.zeros(3)):
        with pytest.raises(UserError, match=key.replace('.', r'\.')): load_official(official() | {key: value}, num_heads=2)


def test_a_checkpoint_of_thousands_of_other_names_is_told_shortly():
    "A block numbered 999 asks for a thousand blocks, and a name may be as long as a file."
    sd = official(); many = {f'backbone.model.blocks.999.{k}': torch.zeros(1) for k in ('norm1.weight', 'x'*10**6)}
    with pytest.raises(UserError) as e: load_official(sd | many, num_heads=2)
    assert len(str(e.value)) < 20_000 and ' more' in str(e.value) and 'missing: ' in str(e.value)


def test_official_named_twice():
    sd = official()
    with pytest.raises(UserError, match='twice'): load_official({**sd, **{f'module.{k}': v for k, v in sd.items()}}, num_heads=2)


def test_official_heads():
    for heads in (-1, -3):
        with pytest.raises(UserError, match='head'): load_official(official(), num_heads=heads)


def boast(*shape): return torch.zeros(1).expand(*shape)                       # one number that claims to be many


@pytest.mark.parametrize('key, shape', [('aggregator.score.3.weight', (10**6, 10**6, 1, 1)), ('aggregator.score.0.weight', (10**6, 10**6, 1, 1)), ('backbone.model.pos_embed', (1, 10**12, 32)), ('backbone.model.pos_embed', (1, 26, 10**6)), ('aggregator.gpn.projection.0.weight', (10**6, 10**6))])
def test_official_that_boasts(tmp_path, key, shape):
    "A file of some kilobytes asks for terabytes: refused before any memory is taken."
    torch.save(dict(model_state_dict=official() | {key: boast(*shape)}), tmp_path/'o.pth')
    with pytest.raises(UserError, match=f'bytes of numbers and tells of .* most of them in {re.escape(key)}'): load_official(tmp_path/'o.pth', num_heads=2)


def test_official_is_compared_before_it_gets_memory(monkeypatch):
    "Also where one tensor is whole and large, and the others are not what it asks for."
    asked = []
    monkeypatch.setattr(torch.nn.Module, 'to_empty', lambda self, device=None, **_: asked.append(str(device)) or self)
    with pytest.raises(UserError, match='does not fit the model'): load_official(official() | {'aggregator.score.3.weight': torch.zeros(1000, 8, 1, 1)}, num_heads=2)
    assert set(asked) <= {'meta'}


@pytest.mark.parametrize('key, shape', [('backbone.model.pos_embed', (1, 0, 32)), ('backbone.model.pos_embed', (1, 1, 32)), ('backbone.model.pos_embed', (1, 26, 0)), ('backbone.model.patch_embed.proj.weight', (32, 3, 0, 0)), ('backbone.model.blocks.0.mlp.fc1.weight', (0, 32)),
                                        ('aggregator.score.3.weight', (0, 8, 1, 1)), ('backbone.gpn_norms.0.projection.0.weight', (0, 32))])
def test_official_without_numbers(key, shape):
    with pytest.raises(UserError) as e: load_official(official() | {key: torch.zeros(*shape)}, num_heads=2)
    sentence(e, key, str(list(shape)))


@pytest.mark.parametrize('odd', [torch.zeros(3, 3).to_sparse(), torch.zeros(3, 3, device='meta')], ids=['sparse', 'without numbers'])
def test_official_of_odd_tensors(odd):
    with pytest.raises(UserError) as e: load_official(official() | {'aggregator.score.3.bias': odd}, num_heads=2)
    sentence(e, 'aggregator.score.3.bias')


@pytest.mark.parametrize('settings', [5, [], None, 'x', *(dict(eval_size=s) for s in ('x', -14, 0, 2.5, True, {}, [], [56], [56, 0], [56, 'x'], {'a': 1}, 10**400, 1_400_000, [14, 99_999_998]))], ids=lambda s: str(s)[:30])
def test_a_header_whose_settings_are_none(tmp_path, settings):
    "What a checkpoint was evaluated at is read by every command that describes."
    save_sage(create_sage('sage_nano', pretrained=False, probes=4, probe_dim=4, token_dim=4), tmp_path/'m.safetensors', dict(settings=settings))
    for read in (read_header, load_sage):
        with pytest.raises(UserError) as e: read(tmp_path/'m.safetensors')
        sentence(e, 'm.safetensors')


def test_a_header_whose_settings_are_some(tmp_path):
    for settings in ({}, dict(eval_size=None), dict(eval_size=322), dict(eval_size=[56, 84]), dict(eval_size=57)):
        save_sage(create_sage('sage_nano', pretrained=False, probes=4, probe_dim=4, token_dim=4), tmp_path/'m.safetensors', dict(settings=settings))
        assert read_header(tmp_path/'m.safetensors')['config']['settings'] == settings

def test_a_packed_pth_of_zeros(tmp_path, monkeypatch):
    "torch.save packs nothing; what somebody packed afterwards may be any size. (The limit is lowered, for a test may not take a gigabyte.)"
    import zipfile
    monkeypatch.setattr('sage.core.MOST', 2**22)
    torch.save({'w': torch.zeros(5_000_000)}, tmp_path/'a.pth')
    assert read_tensors(tmp_path/'a.pth')['w'].shape == (5_000_000,)
    with zipfile.ZipFile(tmp_path/'a.pth') as z, zipfile.ZipFile(tmp_path/'b.pth', 'w', zipfile.ZIP_DEFLATED) as packed:
        for i in z.infolist(): packed.writestr(i.filename, z.read(i))
    with pytest.raises(UserError, match='b.pth: .* bytes that would fill 0.0 GiB of memory, .*torch.save packs nothing'): read_tensors(tmp_path/'b.pth')
