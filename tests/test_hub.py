"Where users are: save_pretrained and from_pretrained without a network, the model card, torch.hub."
import ast, json, socket, sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from sage.checkpoint import read_header
from sage.core import MissingPath, UserError
from sage.export import card_slots, write_hub
from sage.model import SAGE, create_sage, load_official, load_sage, save_sage
from sage.official import official_name
from sage.places import make_table
from sage.retrieval import fit_pca
from sage.run import Run

SMALL = dict(backbone='sage_nano', probes=8, probe_dim=16, token_dim=12)

@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_): raise AssertionError('the network was asked')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)

@pytest.fixture
def run(tmp_path):
    "A run of two sets and three epochs, the second the best."
    table = make_table(image=['a.jpg', 'b.jpg'], city='A', place=[0, 1], easting=[500_000., 500_100.], northing=5_300_000., zone='33N')
    run = Run.create(tmp_path/'my | run', dict(settings=dict(seed=7, eval_size=[56, 84], strategy='sage'), data={'mined': dict(images=2, places=2, sha256='x')}), dict(mined=table))
    for e, r in enumerate((20., 70.5, 60.)):
        run.log(kind='epoch', epoch=e, **{'new town/recall@1': r, 'new town/recall@5': r + 9, 'a|b <i>/recall@1': r / 2, 'a|b <i>/recall@5': r})
        save_sage(create_sage(**SMALL, seed=e), run.path/'checkpoints'/f'{e:04d}.safetensors', dict(epoch=e, settings=dict(eval_size=[56, 84])))
    return run

def same(a, b):
    "Two checkpoints hold the same; only the order of the header may differ."
    ours, theirs = load_file(a), load_file(b)
    return read_header(a) == read_header(b) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

def some(): return torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))

def headed(): return create_sage('sage_nano', probes=8, probe_dim=80, token_dim=128, interact=True)

def official():
    a = create_sage(**SMALL, pretrained=False)
    return load_official({official_name(k): v for k, v in a.state_dict().items()}, num_heads=a.backbone.model.blocks[0].attn.num_heads)

def reduced(): return create_sage(**SMALL).reduce(fit_pca(torch.randn(50, 140).numpy(), 6), whiten=True)

@pytest.mark.parametrize('make', [lambda: create_sage(**SMALL), lambda: create_sage(**SMALL, pretrained=False), headed, official, reduced], ids=['packaged', 'random', 'head', 'official', 'reduced'])
def test_round_trip_to_the_bit(tmp_path, make):
    model, x = make().eval(), some()
    model.save_pretrained(tmp_path/'hub')
    again = SAGE.from_pretrained(tmp_path/'hub')
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(again.describe(x), model.describe(x)) and again.config == model.config and not again.training
    if model.interact is not None: assert torch.equal(again.describe(x, cross_image=True), model.describe(x, cross_image=True))
    again.save_pretrained(tmp_path/'twice')
    assert same(tmp_path/'twice'/'model.safetensors', tmp_path/'hub'/'model.safetensors')
    assert all((tmp_path/'twice'/f).read_bytes() == (tmp_path/'hub'/f).read_bytes() for f in ('config.json', 'README.md'))

def test_folder(tmp_path):
    create_sage(**SMALL).save_pretrained(str(tmp_path/'hub'))
    assert sorted(p.name for p in (tmp_path/'hub').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert json.loads((tmp_path/'hub'/'config.json').read_text())['model']['backbone'] == 'sage_nano'
    with safe_open(tmp_path/'hub'/'model.safetensors', 'pt') as f: assert f.metadata()['holds'] == 'all'
    assert load_sage(tmp_path/'hub'/'model.safetensors').dim == 140                   # an ordinary checkpoint

def test_save_sage_is_as_it_was(tmp_path):
    "The trained part alone, unless asked for the whole."
    model = create_sage(**SMALL)
    a, b = save_sage(model, tmp_path/'a.safetensors'), save_sage(model, tmp_path/'b.safetensors', whole=True)
    assert read_header(a)['holds'] == 'trainable' and read_header(b)['holds'] == 'all' and b.stat().st_size > 5 * a.stat().st_size
    assert same(save_sage(load_sage(b), tmp_path/'c.safetensors'), a)                   # still known to have a packaged backbone

def test_missing_file(tmp_path):
    with pytest.raises(MissingPath, match='no such checkpoint file'): SAGE.from_pretrained(tmp_path)

def test_a_card_without_a_run():
    for model in (create_sage(**SMALL), headed(), reduced()):
        card = model.generate_model_card()
        data = ModelCard(str(card)).data.to_dict()
        assert data['license'] == 'mit' and 'visual-place-recognition' in data['tags'] and data['library_name'] == 'sage-vpr'
        text = str(card)
        assert '2509.25723' in text and 'No figures came with these weights' in text and f'{model.dim} numbers' in text and '{{' not in text and '{%' not in text
        assert ('depends on its batch-mates' in text) == (model.interact is not None) and ('whitened' in text) == (model.pca is not None)

@pytest.mark.parametrize('which', ['run', 'file'])
def test_a_card_from_a_run(run, tmp_path, which):
    folder = write_hub(run.path if which == 'run' else run.path/'checkpoints'/'0002.safetensors', tmp_path/'hub')
    text, epoch = (folder/'README.md').read_text(), 1 if which == 'run' else 2
    assert f'These weights are those of epoch {epoch}.' in text and f'**{epoch}**' in text
    assert '| **1** | new town | 70.5 | 79.5 |' in text or which == 'file'
    assert '| 0 | a\\|b &lt;i> | 10.0 | 20.0 |' in text                                # text of others stays text
    for said in ('within 25 m', '56x84', 'head off', 'one seed (7)', '"strategy": "sage"', '2 images of 2 places', 'my \\| run'): assert said in text, said
    assert torch.equal(SAGE.from_pretrained(folder).describe(some()), create_sage(**SMALL, seed=epoch).describe(some()))

def test_a_run_without_recall(tmp_path):
    empty = Run.create(tmp_path/'r', dict(settings={}), {})
    assert 'measured' not in card_slots(empty)
    with pytest.raises(UserError, match='no checkpoint'): write_hub(tmp_path/'r', tmp_path/'hub')

def test_hub_folder_in_the_way(run, tmp_path):
    write_hub(run.path, tmp_path/'hub')
    before = (tmp_path/'hub'/'README.md').read_bytes()
    with pytest.raises(UserError, match='holds a model already'): write_hub(run.path, tmp_path/'hub')
    (tmp_path/'file').touch()
    with pytest.raises(UserError, match='a file is in the way'): write_hub(run.path, tmp_path/'file')
    assert (tmp_path/'hub'/'README.md').read_bytes() == before

@pytest.mark.parametrize('text', ['{', '[1]', '5', '\udcff', '[' * 10_000])
def test_a_folder_whose_config_is_none(tmp_path, text):
    create_sage(**SMALL).save_pretrained(tmp_path/'hub')
    (tmp_path/'hub'/'config.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError, match='hub: its config.json is not what save_pretrained wrote'): SAGE.from_pretrained(tmp_path/'hub')

def test_a_checkpoint_that_was_renamed(run, tmp_path):
    "Its epoch is not known, and the card does not name one."
    (run.path/'checkpoints'/'0001.safetensors').rename(run.path/'checkpoints'/'best one.safetensors')
    card = (write_hub(run.path/'checkpoints'/'best one.safetensors', tmp_path/'hub')/'README.md').read_text()
    assert 'R@1' in card and 'These weights are those of epoch' not in card

def test_a_run_that_does_not_say_its_data(run, tmp_path):
    config = json.loads((run.path/'config.json').read_text())
    for data in ({'mined': {}}, {'mined': dict(images='2', places=2)}, {'mined': 5}):
        (run.path/'config.json').write_text(json.dumps(config | dict(data=data)))
        with pytest.raises(UserError, match="the part 'data' is damaged"): write_hub(run.path, tmp_path/'hub')

def test_text_of_others_in_a_card(run):
    config = json.loads((run.path/'config.json').read_text())
    (run.path/'config.json').write_text(json.dumps(config | dict(settings=dict(seed='<script>1</script>', eval_size='<b>'))))
    assert '<script>' not in card_slots(run)['measured'] and '<b>' not in card_slots(run)['measured']


# ---- torch.hub -----------------------------------------------------------------------------------------------------

def test_torch_hub_loads(root):
    model = torch.hub.load(str(root), 'sage_nano', source='local', seed=3)
    assert not model.training and torch.equal(model.describe(some()), create_sage('sage_nano', seed=3).describe(some()))
    assert torch.hub.load(str(root), 'sage', source='local', backbone='vit_tiny_patch16_224', pretrained=False).patch == 16

def test_torch_hub_loads_official(root, tmp_path):
    a = create_sage(**SMALL, pretrained=False)
    torch.save({'model_state_dict': {official_name(k): v for k, v in a.state_dict().items()}}, tmp_path/'released.pth')
    model = torch.hub.load(str(root), 'sage_official', tmp_path/'released.pth', source='local', num_heads=a.backbone.model.blocks[0].attn.num_heads)
    assert torch.allclose(model.describe(some()), a.describe(some()), atol=1e-4)
    with pytest.raises(MissingPath): torch.hub.load(str(root), 'sage_official', str(tmp_path/'nowhere.pth'), source='local')

def test_torch_hub_dependencies(root):
    "Everything hubconf needs is named, so that torch.hub says what is missing."
    named = next(ast.literal_eval(n.value) for n in ast.parse((root/'hubconf.py').read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == 'dependencies')
    needed, todo = set(), ['model']
    for module in todo:
        for node in ast.walk(ast.parse((root/'sage'/f'{module}.py').read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level and node.module and node.module not in todo: todo.append(node.module)
            needed |= {n.split('.')[0] for n in names}
    assert needed - set(sys.stdlib_module_names) - {'pillow_heif'} <= set(named)
    import hubconf
    assert all(getattr(hubconf, name).__doc__ for name in ('sage', 'sage_nano', 'sage_official'))
