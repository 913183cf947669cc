"""Numbers that stay true: what is no number stops the training with the batch that made it, which can be had again; and what must hold of graph, recall and descriptors whatever the data."""
import json, os, sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings as how, strategies as st

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
from test_train import settings, toy_table
from sage import cli
from sage.aside import Aside
from sage.batches import STRATEGIES, CliqueBatches
from sage.checkpoint import read_checked
from sage.core import UserError
from sage.feed import Loader, Sources, Steps, Views, deaf, embed
from sage.graph import affinity
from sage.images import eval_transform, train_transform
from sage.learner import SageModule
from sage.places import make_table
from sage.retrieval import recall_at_k
from sage.run import Run
from sage.settings import make_model
from sage.epoch import EpochGraph
from sage.train import again, fit


@pytest.fixture(scope='module')
def towns(tmp_path_factory):
    root = tmp_path_factory.mktemp('towns')
    return [toy_table(root/n, places=12, seed=i) for i, n in enumerate(('adorf', 'castrop'))]


def stops(s, towns, path, **more):
    with pytest.raises(UserError) as e: fit(s, make_model(s), {'mined': towns[0], **more}, {'unseen': towns[1]}, path, progress=False)
    return str(e.value)


def test_a_loss_that_is_no_number_can_be_had_again(towns, tmp_path, capsys):
    said = stops(settings(lr=1e25, lr_end=1.), towns, tmp_path/'run')
    assert said.startswith('step ') and 'the loss is nan' in said and '--again' in said
    failed = json.loads((tmp_path/'run'/'failed.json').read_text())
    loss, gradients, batch = again(Run(tmp_path/'run'))
    assert np.isnan(loss) and len(batch) == 12 and not batch.finite.all()
    assert batch.image.tolist() == towns[0].image[np.ravel(failed['rows']['mined'])].tolist()
    cli.sage_train(['--run', str(tmp_path/'run'), '--again'])
    out = capsys.readouterr().out
    assert f'loss nan; {int((~batch.finite).sum())} of 12 descriptors are no numbers' in out and batch.image[0] in out
    assert Run(tmp_path/'run').resumable()


def test_a_gradient_that_is_no_number_is_not_taken(towns, tmp_path, monkeypatch):
    "The loss is a number and its gradient is not: the weights stay as they were, and the batch is that of this step."
    step = SageModule.training_step
    def spoilt(self, batch, index):
        loss = step(self, batch, index)
        return loss*1e38*1e38 if self.step == 2 else loss                     # as a number too large for float32 somewhere on its way back
    monkeypatch.setattr(SageModule, 'training_step', spoilt)
    said = stops(settings(), towns, tmp_path/'run')
    assert said.startswith('step 3: the gradient of ') and ' is no number, though the loss is' in said and '--again' in said
    failed = json.loads((tmp_path/'run'/'failed.json').read_text())
    weights = read_checked(tmp_path/'run'/'failed.safetensors')[0]
    assert failed['step'] == 3 and all(torch.isfinite(t).all() for t in weights.values())
    loss, gradients, batch = again(Run(tmp_path/'run'))
    assert np.isfinite(loss) and batch.finite.all() and said.split('of ')[1].split(' is')[0] == gradients[0] and Run(tmp_path/'run').resumable() == [0]


def test_weights_that_are_no_numbers_are_not_kept(towns, tmp_path, monkeypatch):
    "The last step of an epoch breaks them, and nobody computes with them before they would be written: the run goes on from the epoch before."
    end = EpochGraph.on_train_epoch_end
    def spoil(self, trainer, module):
        if self.epoch == 1: next(p for p in module.model.parameters() if p.requires_grad).data[0] = float('inf')
        end(self, trainer, module)
    with monkeypatch.context() as m:
        m.setattr(EpochGraph, 'on_train_epoch_end', spoil)
        said = stops(settings(), towns, tmp_path/'run')
    assert 'are no numbers any more, and are not kept' in said
    run = Run(tmp_path/'run')
    assert run.resumable() == [0, 1] and list(run.checkpoints()) == [0, 1]
    s = settings()
    fit(s, make_model(s), {'mined': towns[0]}, {'unseen': towns[1]}, run.path, resume=True, progress=False)
    assert Run(tmp_path/'run').resumable()[-1] == s.epochs


@pytest.mark.parametrize('where, change', [('mined', dict()), ('unseen', dict(strategy='random', record_graph=False))], ids=['mining', 'recall'])
def test_a_descriptor_that_is_no_number_can_be_had_again(towns, tmp_path, monkeypatch, capsys, where, change):
    "Weights that are numbers, too large to compute with: found when places are described for mining, or images for recall."
    end, s = EpochGraph.on_train_epoch_end, settings(**change)
    def spoil(self, trainer, module):
        if self.epoch == 1: module.model.probing.cluster_features[3].weight.data[:] = 3e38
        end(self, trainer, module)
    with monkeypatch.context() as m:
        m.setattr(EpochGraph, 'on_train_epoch_end', spoil)
        said = stops(s, towns, tmp_path/'run')
    assert 'NaN or infinity' in said and '--again' in said
    failed, run, table = json.loads((tmp_path/'run'/'failed.json').read_text()), Run(tmp_path/'run'), towns[where == 'unseen']
    assert failed['described'] and list(failed['rows']) == [where] and failed['epoch'] == run.resumable()[-1] == 2
    loss, gradients, batch = again(run)
    assert loss is None and not gradients and batch.image.tolist() == table.image[np.ravel(failed['rows'][where])].tolist()
    assert not batch.finite.all() and said.startswith(batch.image[~batch.finite].iloc[0])
    cli.sage_train(['--run', str(run.path), '--again'])
    assert capsys.readouterr().out.splitlines()[-1] == f'{int((~batch.finite).sum())} of {len(batch)} descriptors are no numbers'
    (run.path/'failed.json').write_text(json.dumps(failed | dict(rows={where: [[10**6]]})))
    with pytest.raises(UserError, match='damaged'): again(run)


@pytest.mark.parametrize('text', ['{}', '[]', '5', '{"epoch": 1, "step": 2, "rows": []}', '{"epoch": 1, "step": 2, "rows": {}}', '{"epoch": 1, "step": 2, "rows": {"mined": 3}}', '{"epoch": 1, "step": null, "rows": {"mined": [[1]]}}', '{"epoch": 1, "step": 2, "rows": {"mined": [["a"]]}}', '{"epoch": 1, "step": 2, "rows": {"mined": [[1, 2], [3]]}}'])
def test_a_batch_that_is_none(tmp_path, text):
    from dataclasses import asdict
    run = Run.create(tmp_path/'run', dict(settings=asdict(settings())))
    (run.path/'failed.json').write_text(text)
    with pytest.raises(UserError, match='failed.json: damaged'): again(run)


def test_again_needs_a_batch(towns, tmp_path, capsys):
    Run.create(tmp_path/'run', {})
    for argv in (['--again'], ['--again', '--run', str(tmp_path/'run')], ['--again', '--run', str(tmp_path/'no')]):
        with pytest.raises(SystemExit) as e: cli.sage_train(argv)
        assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path/'run'/'failed.json').write_text('{')
    with pytest.raises(UserError, match='damaged'): again(Run(tmp_path/'run'))


def test_the_repeated_batch_is_the_same_to_the_bit(towns, tmp_path, monkeypatch):
    "Augmentation, dropout and weights are those of the step that failed."
    seen, step = [], SageModule.training_step
    def fails(self, batch, index):
        loss = step(self, batch, index)
        seen.append(batch[0].clone())
        if self.step == 4: self.failed = dict(self.last); raise UserError(f'step 5: {self.last["loss"]!r}')
        return loss
    monkeypatch.setattr(SageModule, 'training_step', fails)
    said = stops(settings(), towns, tmp_path/'run')
    monkeypatch.setattr(SageModule, 'training_step', lambda self, batch, index: (seen.append(batch[0].clone()), step(self, batch, index))[1])
    loss, gradients, batch = again(Run(tmp_path/'run'))
    assert said == f'step 5: {loss!r}' and batch.finite.all() and torch.equal(seen[-2], seen[-1])


def test_a_descriptor_that_hides_behind_its_loss(towns):
    "Comparisons with NaN are false, so the miner drops such an image, and the loss of the others is a number."
    s = settings()
    module = SageModule(make_model(s), s).train()
    views = torch.randn(12, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    views[5] = float('nan')
    with pytest.raises(UserError, match='1 of 12 descriptors are no numbers'): module.training_step((views, torch.zeros(12, dtype=torch.long), torch.arange(12) // 3), 0)


def test_mining_with_damaged_weights_names_the_image(towns):
    model = make_model(settings())
    with torch.no_grad(): model.probing.token_features[0].weight[:] = float('inf')
    with pytest.raises(UserError, match='000_0.png: the model describes it by NaN or infinity'): embed(model, Views(towns[0], eval_transform(56)))


# ---- whatever the data

seeds = st.integers(0, 2**32 - 1)

@how(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 25), st.integers(1, 9), st.floats(.1, 1e4))
def test_affinity_is_symmetric_and_never_positive(seed, n, d, spread):
    g = np.random.default_rng(seed)
    a = np.asarray(affinity(g.uniform(0, spread, (n, 2)), g.normal(size=(n, d)).astype(np.float32)))
    off = ~np.eye(n, dtype=bool)
    assert a.shape == (n, n) and np.array_equal(a, a.T) and (a[off] <= 0).all()


@how(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 30), st.integers(1, 5))
def test_recall_grows_with_k_and_knows_no_order(seed, q, n, d):
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(q, d)).astype(np.float32), g.normal(size=(n, d)).astype(np.float32)
    positives, ks = [g.choice(n, g.integers(0, min(n, 3) + 1), replace=False) for _ in range(q)], (1, 2, 5, 10, 20)
    if not any(map(len, positives)): return
    r = recall_at_k(x, y, positives, ks)
    assert all(r[a] <= r[b] for a, b in zip(ks, ks[1:]))
    a, b = g.permutation(q), g.permutation(n)
    back = np.argsort(b)
    assert dict(recall_at_k(x[a], y[b], [back[positives[i]] for i in a], ks)) == dict(r)


@how(max_examples=8, deadline=None)
@given(seeds)
def test_a_descriptor_depends_on_its_image_alone(seed):
    model, g = make_model(settings()).eval(), torch.Generator().manual_seed(seed)
    x = torch.randn(7, 3, 56, 56, generator=g)
    whole, order = model.describe(x), torch.randperm(7, generator=g)
    assert (whole[order] - model.describe(x[order])).abs().max() < 1e-5
    for i in range(7): assert (whole[i] - model.describe(x[i:i + 1])[0]).abs().max() < 1e-5


@how(max_examples=5, deadline=None)
@given(seeds, st.integers(1, 2), st.integers(1, 6), st.integers(1, 4))
def test_views_are_those_of_any_number_of_workers(towns, seed, workers, places, images):
    "What two epochs of two sources feed to a model, distorted at random: to the bit, and in the same order."
    g, tables = np.random.default_rng(seed), towns
    sources = Sources([Views(t, train_transform(28, 'randaugment'), None, seed + i) for i, t in enumerate(tables)])
    rows = [[[g.integers(0, len(t), (places, images)) for _ in range(2)] for t in tables] for _ in range(2)]
    def fed(n):
        steps, out = Steps(2), []
        loader = Loader(sources, batch_sampler=steps, num_workers=n, generator=torch.Generator().manual_seed(0), worker_init_fn=deaf)
        for epoch, batches in enumerate(rows, 1): steps.fill(epoch, batches); out += loader
        return out
    alone, many = fed(0), fed(workers)
    assert len(alone) == len(many) == 4 and all(torch.equal(a, b) for x, y in zip(alone, many) for a, b in zip(x, y))


def drawn(seed, strategy, places, images):
    "Batches of two epochs, as the bytes of their rows; called here and in another process."
    g = np.random.default_rng(seed)
    spots = g.uniform(0, 900, (60, 2)).repeat(6, 0) + g.normal(0, 4, (360, 2))
    table = make_table(image=[str(i) for i in range(360)], city=g.choice(['adorf', 'castrop'], 60).repeat(6), place=np.arange(60).repeat(6), easting=spots[:, 0], northing=spots[:, 1], zone='33N')
    b, out = CliqueBatches(table, None, strategy, places, images, seed=seed), []
    for epoch in (1, 2):
        b.rebuild(g.normal(size=(60, 16)).astype(np.float32), epoch)
        out.append(np.stack([*islice(b, 5)]).tobytes())
    return out

@pytest.fixture(scope='module')
def elsewhere():
    "Another process, whose sets and dicts of text have another order."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONHASHSEED', '4711')
        aside = Aside()
        aside('test_numbers', 'drawn', 0, 'random', 2, 3)
    yield aside
    aside.close()

@how(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(sorted(STRATEGIES)), st.integers(1, 8), st.integers(1, 5))
def test_seeds_draw_the_same_batches_in_any_process(elsewhere, seed, strategy, places, images):
    here = drawn(seed, strategy, places, images)
    assert elsewhere('test_numbers', 'drawn', seed, strategy, places, images) == here and here[0] != here[1]
