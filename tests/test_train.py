"Training end to end on a toy town: same seed same numbers, stopped and resumed, bad data, bad luck."
import itertools, json, os, pickle, shutil, signal, subprocess, sys, threading, time, warnings
from dataclasses import asdict, replace
from pathlib import Path
import hypothesis, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
import sage
from sage.backbone import Backbone, make_vit
from sage.core import UserError, seed_of
from sage import feed
from sage.feed import Loader, Sources, Steps, Validation, Views, embed, kept_batches, one_image_each, prefix_cache, run_views
from sage.images import eval_transform, train_transform
from sage.learner import SageModule
from sage.places import make_table
from sage.prefix import PrefixCache
from sage.run import Run, Stopped, checkpoint_paths, pause_path
from sage.settings import Settings, make_model
from sage.resume import last_whole
from sage.epoch import beside
from sage.train import fit

def toy_table(root, places=24, views=6, side=56, seed=0):
    "A place is a coloured pattern; its views are shifted and shaded. 60 m between places, 8 m within."
    root, g, rows = Path(root), np.random.default_rng(seed), []
    root.mkdir(parents=True, exist_ok=True)
    for p in range(places):
        pattern = g.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        for v in range(views):
            big = np.roll(np.kron(pattern, np.ones((side // 4, side // 4, 1))), g.integers(-9, 10, 2), (0, 1)) * g.uniform(.4, 1)
            Image.fromarray(big.astype(np.uint8)).save(root/f'{p:03d}_{v}.png')
            rows.append((str(root/f'{p:03d}_{v}.png'), p, 60. * (p % 6) + g.uniform(0, 8), 60. * (p // 6) + g.uniform(0, 8), 'query' if v == 0 else 'database'))
    image, place, easting, northing, role = zip(*rows)
    return make_table(image=image, city=root.name, place=place, easting=easting, northing=northing, zone='33N', role=role)

TINY = dict(backbone='sage_nano', probes=8, probe_dim=16, token_dim=32, image_size=56, eval_size=56, places_per_batch=4, images_per_place=3, min_size=3,
            steps=3, epochs=2, log_every=1, embed_batch=16, lr=1e-3, precision='32', device='cpu')

@pytest.fixture(scope='session')
def towns(tmp_path_factory):
    root = tmp_path_factory.mktemp('towns')
    return [toy_table(root/name, seed=i) for i, name in enumerate(('adorf', 'bestadt', 'castrop'))]

def settings(**changes): return Settings(**{**TINY, **changes})

def train(s, towns, path, labelled=False, **how):
    tables = dict(mined=towns[0], labelled=towns[1]) if labelled else towns[0]
    return fit(s, make_model(s, pretrained=False), tables, {'unseen': towns[2]}, path, progress=False, **how)

def numbers(run):
    rows = [json.loads(line) for line in (run.path/'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.endswith('_s')} for r in rows]

def weights(run, epoch): return load_file(checkpoint_paths(run, epoch)[0])

def assert_same(a, b, epochs=2):
    assert numbers(a) == numbers(b)
    for e in range(epochs + 1):
        wa, wb = weights(a, e), weights(b, e)
        assert set(wa) == set(wb) and all(torch.equal(wa[k], wb[k]) for k in wa)
        for table in ('nodes', 'edges', 'cliques'): pd.testing.assert_frame_equal(getattr(a, table)(e), getattr(b, table)(e))
        assert np.array_equal(a.descriptors(e), b.descriptors(e))
        for x, y in zip(a.answers(e)['unseen'], b.answers(e)['unseen']): assert x.dtype == y.dtype and np.array_equal(x, y)

class After(threading.Event):
    "Set from the n-th time it is asked."
    def __init__(self, n): super().__init__(); self.n, self.asked = n, 0
    def is_set(self): self.asked += 1; return self.asked > self.n

@pytest.fixture(scope='session')
def whole(towns, tmp_path_factory): return train(settings(), towns, tmp_path_factory.mktemp('runs')/'whole', labelled=True)

def test_run_holds_everything(whole):
    assert whole.epochs() == [0, 1, 2] and list(whole.checkpoints()) == [0, 1, 2] and whole.resumable() == [1, 2]
    m, steps = whole.metrics(), whole.metrics('step')
    assert list(m.epoch) == [0, 1, 2] and list(steps.step) == [1, 2, 3, 4, 5, 6]
    assert {f'unseen/recall@{k}' for k in (1, 5, 10, 20)} <= set(m)
    assert {'loss', 'mined_pairs', 'hardest_positive', 'hardest_negative', 'edges_kept', 'edges_new', 'edges_broken', 'train_s', 'embed_s', 'draw_s', 'recall_s', 'graph_s', 'images_per_s'} <= set(m)
    np.testing.assert_allclose(m.loss[1:], steps.groupby('epoch').loss.mean())
    assert (m.images[1:] == 3 * 2 * 4 * 3).all()
    assert set(whole.config['tables']) == {'mined', 'labelled', 'unseen'} and len(whole.table('unseen')) == 144
    a = whole.attention(0)
    assert a['beta'].shape == (6, 16) and a['probes'].shape == (6, 8, 16) and (a['images'] == whole.attention(2)['images']).all()
    assert a['features'].dtype == np.float16 and a['features'].shape[:2] == (6, 16)
    assert (whole.nodes(0).image == whole.nodes(2).image).all() and (whole.nodes(1).mined_image != whole.nodes(2).mined_image).any()      # the graph is drawn of the same images, mining takes others
    np.testing.assert_allclose(a['probes'].astype(float).sum(2), 1, atol=.01)
    left = {p.name for p in whole.path.iterdir()}
    assert left == {'config.json', 'metrics.jsonl', 'epochs', 'checkpoints', 'tables'}

def test_answers_are_what_recall_was_measured_on(whole):
    t, m = whole.table('unseen'), whole.metrics().set_index('epoch')
    for e in whole.epochs():
        a = whole.answers(e)['unseen']
        assert (t.role.iloc[a.queries] == 'query').all() and (t.role.iloc[a.rows.ravel()] == 'database').all()
        assert len(a.queries) == (t.role == 'query').sum() and a.rows.shape == a.distances.shape == a.right.shape == (24, 20) and a.reduced.shape == (144, 64)
        assert (np.diff(a.distances, axis=1) >= 0).all()
        xy = t[['easting', 'northing']].to_numpy()
        np.testing.assert_array_equal(a.right, np.linalg.norm(xy[a.queries][:, None] - xy[a.rows], axis=2) <= 25)
        for k in (1, 5, 10, 20): np.testing.assert_allclose(m[f'unseen/recall@{k}'][e], 100 * a.right[a.positives > 0, :k].any(1).mean())
        assert (whole.path/'epochs'/f'{e:04d}'/'answers.npz').stat().st_size < 60_000

def test_cliques_are_what_was_trained(whole, towns):
    c = whole.cliques(0)
    assert set(c.batch) == set(range(3)) and len(c) == 3 * 4 * 3
    assert (whole.table('mined').image == towns[0].image).all()
    assert not c.duplicated(['batch', 'image']).any()

def test_same_seed_same_numbers(whole, towns, tmp_path):
    assert_same(whole, train(settings(), towns, tmp_path/'again', labelled=True))
    assert numbers(whole) != numbers(train(settings(seed=1), towns, tmp_path/'other', labelled=True))

def test_workers_change_nothing(whole, towns, tmp_path):
    assert_same(whole, train(settings(workers=2), towns, tmp_path/'workers', labelled=True))

def test_global_random_state_is_left_alone(towns, tmp_path):
    torch.manual_seed(5); np.random.seed(5)
    a, b = torch.get_rng_state(), np.random.get_state()[1]
    train(settings(epochs=1, steps=1), towns, tmp_path/'run')
    assert torch.equal(a, torch.get_rng_state()) and (b == np.random.get_state()[1]).all()

@pytest.mark.parametrize('part', range(6))
def test_stopped_and_resumed(whole, towns, tmp_path, part):
    "Stopped at moments spread over the whole training, each time resumed."
    asked = After(10**9)
    if part == 0:
        train(settings(), towns, tmp_path/'count', labelled=True, stop=asked)
        test_stopped_and_resumed.total = asked.asked
    moment = int((part + .5) / 6 * getattr(test_stopped_and_resumed, 'total', 120))
    with pytest.raises(Stopped): train(settings(), towns, tmp_path/'run', labelled=True, stop=After(moment))
    assert_same(whole, train(settings(), towns, tmp_path/'run', labelled=True, resume=True))

class AtStep(threading.Event):
    "Set once a run has logged a step."
    def __init__(self, run, step): super().__init__(); self.log, self.step = Path(run)/'metrics.jsonl', step
    def is_set(self): return self.log.exists() and f'"step": {self.step},' in self.log.read_text()

def steps_of(train, monkeypatch): # the steps that a training makes, by number
    made, step = [], SageModule.training_step
    with monkeypatch.context() as m:
        m.setattr(SageModule, 'training_step', lambda self, *a: (made.append(self.step + 1), step(self, *a))[1])
        return train(), made

def test_a_run_copied_without_its_checkpoints_is_kept(whole, towns, tmp_path):
    "What it recorded would be cut off and trained anew without a word."
    run = tmp_path/'run'; shutil.copytree(whole.path, run); shutil.rmtree(run/'checkpoints')
    before = (run/'metrics.jsonl').read_bytes()
    with pytest.raises(UserError, match='epochs up to 2 are recorded, but nothing in checkpoints/ is there'): train(settings(), towns, run, labelled=True, resume=True)
    assert (run/'metrics.jsonl').read_bytes() == before

@pytest.mark.parametrize('step', [1, 3, 5, 6])
def test_a_stopped_epoch_goes_on_with_its_next_step(whole, towns, tmp_path, step, monkeypatch):
    "Stopped within an epoch, no step is made twice; stopped or killed again before that epoch ends, too; nothing of it is left at the end."
    run = tmp_path/'run'
    go = lambda **how: train(settings(), towns, run, labelled=True, **how)
    with pytest.raises(Stopped, match=f'after step {step}$'): go(stop=AtStep(run, step))
    kept, rows = pause_path(Run(run), step // 3), Run(run).metrics('step')
    assert kept.exists() == (step % 3 > 0) and Run(run).resumable()[-1] == step // 3 and list(rows.step) == [*range(1, step + 1)]
    with pytest.raises(Stopped, match='while'): go(resume=True, stop=After(1))                        # before it has gone on
    assert kept.exists() == (step % 3 > 0)
    done, made = steps_of(lambda: go(resume=True), monkeypatch)
    assert made == [*range(step + 1, 7)] and list(done.metrics('step').step_s[:step]) == list(rows.step_s)
    assert_same(whole, done)
    assert {p.name for p in (run/'checkpoints').iterdir()} == {p.name for p in (whole.path/'checkpoints').iterdir()}
    assert (done.metrics().train_s[1:].to_numpy() >= done.metrics('step').groupby('epoch').step_s.sum().to_numpy()).all()

def test_a_disk_that_is_full_when_it_stops(whole, towns, tmp_path, monkeypatch):
    run = tmp_path/'run'
    go = lambda **how: train(settings(), towns, run, labelled=True, **how)
    with monkeypatch.context() as m:
        def full(*a): raise OSError(28, 'No space left on device', 'FILE')
        m.setattr('sage.epoch.EpochGraph.write_pause', full)
        with pytest.raises(UserError, match='FILE: No space left.*after step 5.*goes on after epoch 1'): go(stop=AtStep(run, 5))
    assert_same(whole, go(resume=True))

def test_a_second_ctrl_c_interrupts(towns, tmp_path, monkeypatch):
    def step(self, *a): signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(SageModule, 'training_step', step)
    with pytest.raises(KeyboardInterrupt): train(settings(), towns, tmp_path/'run')
    assert Run(tmp_path/'run').resumable() == [0] and not (tmp_path/'run'/'lock.json').exists()

def test_killed_after_going_on_from_a_stopped_epoch(whole, towns, tmp_path, monkeypatch):
    "What was logged after the state that is kept is made again."
    run = tmp_path/'run'
    go = lambda **how: train(settings(), towns, run, labelled=True, **how)
    with pytest.raises(Stopped): go(stop=AtStep(run, 4))
    with monkeypatch.context() as m:
        m.setattr('sage.epoch.EpochGraph.write_pause', lambda *a: None)                                     # as SIGKILL
        with pytest.raises(Stopped): go(resume=True, stop=AtStep(run, 5))
    done, made = steps_of(lambda: go(resume=True), monkeypatch)
    assert made == [5, 6]
    assert_same(whole, done)

@pytest.mark.parametrize('harm', ['cut', 'step'])
def test_a_damaged_pause_is_said_and_its_epoch_begins_anew(whole, towns, tmp_path, harm, monkeypatch, capfd):
    run = tmp_path/'run'
    go = lambda **how: train(settings(), towns, run, labelled=True, **how)
    with pytest.raises(Stopped): go(stop=AtStep(run, 5))
    kept = pause_path(Run(run), 1)
    if harm == 'cut': kept.write_bytes(kept.read_bytes()[:-7])
    else: kept.write_bytes(checkpoint_paths(whole, 2)[1].read_bytes())                                # a state of another moment
    done, made = steps_of(lambda: go(resume=True), monkeypatch)
    assert made == [4, 5, 6] and f'{kept}: damaged' in capfd.readouterr().err
    assert_same(whole, done)

@pytest.mark.parametrize('strategy,record', [('random', True), ('random', False), ('static', True), ('ogc', False), ('gws', False), ('diverse', True)])
def test_strategies_resume(towns, tmp_path, strategy, record):
    "Fixed strategies mine with the untrained model's descriptors, after a resume as well."
    s = settings(strategy=strategy, record_graph=record, cache_gb=.1, augment='none')
    caches = {}
    one = train(s, towns, tmp_path/'one', caches=caches)
    train(replace(s, epochs=1), towns, tmp_path/'two', caches=caches)
    two = train(s, towns, tmp_path/'two', caches=caches, resume=True)
    assert numbers(one) == numbers(two)
    assert one.epochs() == ([0, 1, 2] if record else [])
    if strategy in ('static', 'gws'): assert len(caches) == 2
    again = train(s, towns, tmp_path/'two', resume=True)                      # nothing left to do
    assert numbers(again) == numbers(one)

def test_work_is_done_beside():
    "Each waits for the other, so they must run together; what stops the work stops the body."
    a, b = threading.Event(), threading.Event()
    def work(): a.set(); return b.wait(90)
    with beside(work) as answer:
        assert a.wait(90); b.set()
        assert answer()[0]
    def stopped(): raise Stopped('stopped while drawing')
    with pytest.raises(Stopped, match='drawing'), beside(stopped) as answer: answer()

@pytest.mark.parametrize('epoch', [0, 1])
def test_fewer_epochs_than_are_done(towns, tmp_path, epoch):
    "Stopped after an epoch, before its record: nothing is trained, what is missing is recorded."
    run = tmp_path/'run'
    with pytest.raises(Stopped, match='step 3$'): train(settings(), towns, run, stop=AtStep(run, 3))
    assert train(settings(epochs=epoch), towns, run, resume=True).epochs() == [0, 1] and list(Run(run).metrics().epoch) == [0, 1]

def test_what_workers_are_sent_holds_no_open_files(towns, tmp_path):
    "Where a worker is spawned, not forked (macOS), its views are pickled: they decode the same images, and leave kept tokens to whoever asked."
    model = make_model(settings(), pretrained=False)
    kept = PrefixCache(tmp_path/'kept', model.backbone, 1).at(56)
    kept.add(towns[0].image[:1], torch.zeros(1, *kept.shape).half()); kept.flush()
    sent = Sources([Views(towns[0], train_transform(56), seed=3, kept=kept)])
    got = pickle.loads(pickle.dumps(sent))
    key = (0, 0, 5, 'augment', 1, 2)
    assert torch.equal(got[key][0], sent[key][0]) and got.views[0].kept is None and sent.views[0].kept is kept

def test_node_features_image(towns, tmp_path):
    s = settings(node_features='image', epochs=1)
    assert numbers(train(s, towns, tmp_path/'a')) == numbers(train(s, towns, tmp_path/'b'))

def test_bfloat16_resumes(towns, tmp_path):
    s = settings(precision='bf16', places_per_batch=2, steps=2)
    one = train(s, towns, tmp_path/'one')
    train(replace(s, epochs=1), towns, tmp_path/'two')
    assert_same(one, train(s, towns, tmp_path/'two', resume=True))
    exact = train(replace(s, precision='32', epochs=1), towns, tmp_path/'exact')
    assert abs(exact.metrics('step').loss[0] / one.metrics('step').loss[0] - 1) < .02

def test_interact_head_trains(towns, tmp_path):
    s = settings(interact=True, epochs=1, probes=8, probe_dim=64, token_dim=256)
    run = train(s, towns, tmp_path/'run')
    a, b = weights(run, 0), weights(run, 1)
    assert any(k.startswith('interact.') for k in a)
    assert all(not torch.equal(a[k], b[k]) for k in a if k.startswith('interact.') and k.endswith('weight'))

def test_frozen_stays_and_schedule_falls(whole):
    s = settings()
    model = make_model(s, pretrained=False)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(start[k], v) for k, v in weights(whole, 0).items())
    lr = whole.metrics('step').lr
    np.testing.assert_allclose(lr, s.lr * (1 - .8 * np.arange(1, 7) / 4000), rtol=1e-12)

def plain_multi_similarity(d, labels, alpha=1., beta=50., base=0., epsilon=.1):
    "The loss and its miner by loops (Wang et al., CVPR 2019)."
    d = d / np.linalg.norm(d, axis=1, keepdims=True)
    S, total, pairs = d @ d.T, 0., 0
    for i in range(len(d)):
        pos = [j for j in range(len(d)) if labels[j] == labels[i] and j != i]
        neg = [j for j in range(len(d)) if labels[j] != labels[i]]
        hard_neg = [j for j in neg if S[i, j] + epsilon > min(S[i, p] for p in pos)]
        hard_pos = [j for j in pos if S[i, j] - epsilon < max(S[i, n] for n in neg)]
        pairs += len(hard_neg) + len(hard_pos)
        total += np.log1p(sum(np.exp(-alpha * (S[i, j] - base)) for j in hard_pos)) / alpha + np.log1p(sum(np.exp(beta * (S[i, j] - base)) for j in hard_neg)) / beta
    return total / len(d), pairs

def test_loss_is_the_sum_of_both_sources():
    s = settings()
    module = SageModule(make_model(s, pretrained=False), s).train()
    views = torch.randn(24, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    sources, slots = torch.arange(24) // 12, torch.arange(24) % 12 // 3
    loss = module.training_step((views, sources, slots), 0).item()
    torch.manual_seed(seed_of(s.seed, 'dropout', 0))
    parts = [plain_multi_similarity(run_views(module.model, views[sources == i]).detach().double().numpy(), slots[sources == i].numpy()) for i in (0, 1)]
    assert abs(loss - sum(p[0] for p in parts)) < 1e-5 and module.last['mined_pairs'] == sum(p[1] for p in parts)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    module.eval()
    losses = [module.training_step((views[o], sources[o], slots[o]), 0).item() for o in (torch.arange(12), order)]
    assert abs(losses[0] - losses[1]) < 1e-5                                   # the order of images does not matter

UNFINISHED = """
import sys, numpy as np
from test_train import toy_table
from sage.feed import Views, view_batches
from sage.images import eval_transform
if __name__ == '__main__':
    sys.kept = view_batches(Views(toy_table(sys.argv[1], places=4), eval_transform(56)), np.arange(24), 4, workers=2)
    print(tuple(next(sys.kept).shape))
"""

def test_kept_tokens_on_a_full_disk_are_computed(towns, tmp_path, monkeypatch):
    "Even where the disk has no room for the folder itself; it is said, and any other trouble is an error."
    import errno
    from sage import prefix
    def fails(number): monkeypatch.setattr(prefix, 'claim_folder', lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number), str(tmp_path))))
    s, said = settings(), []
    backbone = make_model(s, pretrained=False).backbone
    fails(errno.ENOSPC)
    kept = PrefixCache(tmp_path/'kept', backbone, 1, said.append)
    (tmp_path/'kept').mkdir()
    keeper = kept.at(56)
    keeper.add([towns[0].image[0]], torch.zeros(1, *keeper.shape, dtype=torch.float16)); keeper.flush()
    assert len(keeper) == 0 and len(said) == 1 and 'no room on the disk' in said[0] and not list((tmp_path/'kept').rglob('*.tokens'))
    fails(errno.EACCES)
    with pytest.raises(PermissionError): PrefixCache(tmp_path/'other', backbone, 1)

def test_a_pass_that_nobody_finishes_holds_no_process_back(tmp_path):
    "As where an error's traceback still has the loader when Python ends."
    (tmp_path/'unfinished.py').write_text(UNFINISHED)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, tmp_path/'unfinished.py', tmp_path/'town'], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and '(4, 3, 56, 56)' in done.stdout, done.stderr

@pytest.fixture(scope='module')
def step(): return SageModule(make_model(settings(), pretrained=False), settings())

@given(st.permutations(range(12)), st.integers(2, 5), st.integers(0, 2**31))
@hypothesis.settings(max_examples=50, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_loss_knows_no_order_of_images(step, order, images, seed):
    "Whatever the places' sizes, and whether images of a place stand together or apart."
    d, places, order = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)), dim=1), torch.arange(12) // images, torch.tensor(order)
    loss = lambda o: step.loss(d[o], places[o], step.miner(d[o], places[o])).item()
    assert loss(torch.arange(12)) > 0 and abs(loss(torch.arange(12)) - loss(order)) < 1e-5

def test_tokens_train_like_images(towns, tmp_path):
    a, b = (train(settings(augment='none', cache_gb=gb, strategy='random', lr=1e-5), towns, tmp_path/str(gb)) for gb in (0, 1))
    np.testing.assert_allclose(a.metrics('step').loss[:3], b.metrics('step').loss[:3], rtol=.02)

def test_cache_respects_its_budget(towns, tmp_path):
    caches = {}
    train(settings(cache_gb=1e-4, epochs=1), towns, tmp_path/'run', caches=caches)
    assert not caches

def test_nan_stops_with_the_batch(towns, tmp_path):
    with pytest.raises(UserError, match=r'^step [2-6]: the loss is nan'): train(settings(lr=1e25, lr_end=1.), towns, tmp_path/'run')
    failed = json.loads((tmp_path/'run'/'failed.json').read_text())
    assert np.shape(failed['rows']['mined']) == (4, 3) and failed['loss'] is None
    run = Run(tmp_path/'run')
    assert run.epochs() and run.resumable()

def test_bad_data_makes_no_run(towns, tmp_path):
    s, (a, b, c) = settings(), towns
    model, path = make_model(s, pretrained=False), tmp_path/'run'
    cases = [(a, {}, 'no validation table'), (a, {'v': a}, 'must never train'), ({'labelled': a}, {'v': c}, "'mined'"), (a, {'mined': c}, 'another name'),
             (a, {'v': c[c.role == 'query'].reset_index(drop=True)}, 'recall needs both'), (a.drop(columns='zone'), {'v': c}, 'zone'),
             (a.assign(easting=np.nan), {'v': c}, 'easting'), (a.iloc[:0], {'v': c}, 'mined')]
    for train_table, val, words in cases:
        with pytest.raises(UserError, match=words): fit(s, model, train_table, val, path, progress=False)
    for change in (dict(image_size=57), dict(eval_size=(56, 60)), dict(device='cuda:7'), dict(precision='8')):
        with pytest.raises(UserError): fit(replace(s, **change), model, a, {'v': c}, path, progress=False)
    with pytest.raises(UserError, match='places'): fit(replace(s, places_per_batch=500), model, a, {'v': c}, path, progress=False)
    assert not path.exists()

def test_only_one_image_places(towns, tmp_path):
    lonely = towns[0].groupby('place').head(1).reset_index(drop=True)
    for strategy in ('sage', 'random'):
        with pytest.raises(UserError): train(settings(strategy=strategy), [lonely, *towns[1:]], tmp_path/strategy)

@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_image_is_one_sentence(towns, tmp_path, workers):
    table = toy_table(tmp_path/'town', seed=5)
    for path in table.image[::6]: Path(path).write_bytes(b'no image')
    with pytest.raises(UserError) as e: train(settings(workers=workers), [table, *towns[1:]], tmp_path/'run')
    assert len(str(e.value).splitlines()) == 1 and '.png' in str(e.value) and 'Caught' not in str(e.value)

def test_resume_refuses_other_settings_and_data(whole, towns, tmp_path):
    path = tmp_path/'run'
    train(settings(epochs=1), towns, path)
    with pytest.raises(UserError, match='already'): train(settings(), towns, path)
    with pytest.raises(UserError, match='lr = 0.001, now 0.002'): train(settings(lr=.002), towns, path, resume=True)
    with pytest.raises(UserError, match='data'): train(settings(), [towns[1], towns[0], towns[2]], path, resume=True)
    with pytest.raises(UserError, match='no such run'): train(settings(), towns, tmp_path/'none', resume=True)

def test_a_damaged_checkpoint_gives_way_to_the_one_before(towns, tmp_path, capsys):
    path = tmp_path/'run'
    train(settings(epochs=1), towns, path)
    for file in checkpoint_paths(Run(path), 1):
        data = file.read_bytes()
        for spoilt in (data[:-50], data[:-1] + bytes([data[-1] ^ 4])):                            # broken off, one bit
            file.write_bytes(spoilt)
            assert last_whole(Run(path)) == 0
            err = capsys.readouterr().err
            assert str(file) in err and 'damaged' in err and 'the epoch before' in err and len(err.splitlines()) == 1
        file.write_bytes(data)
    state = checkpoint_paths(Run(path), 1)[1]
    state.write_bytes(state.read_bytes()[:-50])
    assert numbers(train(settings(), towns, path, resume=True)) == numbers(train(settings(), towns, tmp_path/'fresh'))
    for e in Run(path).resumable(): checkpoint_paths(Run(path), e)[1].write_bytes(b'')
    before = {p: p.read_bytes() for p in path.rglob('*') if p.is_file()}
    with pytest.raises(UserError, match='none of its checkpoints'): train(settings(), towns, path, resume=True)
    assert {p: p.read_bytes() for p in path.rglob('*') if p.is_file()} == before                    # nothing was dropped

def test_a_checkpoint_under_a_false_name(towns, tmp_path, capsys):
    "Whole files of epoch 1 as those of epoch 3, or one of the two: offered nowhere as what the name says, and readable by their path."
    from sage.look import weights_of
    from sage.sources import load_checkpoint
    run = train(settings(), towns, tmp_path/'run')
    (w1, s1), (w2, s2), (w3, s3) = (checkpoint_paths(run, e) for e in (1, 2, 3))
    shutil.copy(w1, w3); shutil.copy(s1, s3)
    assert last_whole(run) == 2
    err = capsys.readouterr().err
    assert f'{w3}: holds epoch 1, its name says 3' in err and 'trying the epoch before' in err and len(err.splitlines()) == 1
    with pytest.raises(UserError, match='holds epoch 1, its name says 3'): weights_of(run, 3)
    assert load_checkpoint(w3)[1] == 'run epoch 1' and load_checkpoint(w2)[1] == 'run epoch 2'
    run.log(**{'epoch': 3, 'unseen/recall@1': 100.})
    with pytest.raises(UserError, match='holds epoch 1, its name says 3'): load_checkpoint(run.path)
    shutil.copy(w2, tmp_path/'0007.safetensors'); assert load_checkpoint(tmp_path/'0007.safetensors')[1] == '0007'
    w3.unlink(); s3.unlink(); shutil.copy(s1, s2)
    assert last_whole(run) == 1 and f'{s2}: holds step 3, and the weights beside it step 6' in capsys.readouterr().err

def test_weights_under_a_false_name_are_not_deleted(towns, tmp_path):
    "Those of epoch 2 were renamed; a copy of what stays may go."
    run = train(settings(), towns, tmp_path/'run')
    (w1, _), (w2, s2), (w5, _) = (checkpoint_paths(run, e) for e in (1, 2, 5))
    w2.rename(w5); s2.unlink()
    with pytest.raises(UserError, match='weights of epoch 5, .*would be deleted'): train(settings(), towns, run.path, resume=True)
    w5.unlink(); shutil.copy(w1, w5)
    assert train(settings(), towns, run.path, resume=True).epochs() == [0, 1, 2] and not w5.exists()

def test_weights_of_others_are_not_deleted(towns, tmp_path):
    "A name with other zeros is none of a run's; a file that another program wrote under one that is, stops a training before it would go."
    run = train(settings(), towns, tmp_path/'run')
    kept = run.path/'checkpoints'
    shutil.copy(kept/'0002.safetensors', kept/'7.safetensors'); shutil.copy(kept/'0002.safetensors', kept/'00012.resume.safetensors')
    assert list(train(settings(), towns, run.path, resume=True).checkpoints()) == [0, 1, 2] and (kept/'7.safetensors').exists() and (kept/'00012.resume.safetensors').exists()
    save_file(dict(a=torch.ones(2)), kept/'0100.safetensors')
    with pytest.raises(UserError, match='weights of epoch 100, .*would be deleted'): train(settings(), towns, run.path, resume=True)
    assert (kept/'0100.safetensors').exists()

def test_quiet(towns, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        train(settings(epochs=1, steps=1), towns, 'run')
    assert capfd.readouterr() == ('', '') and [p.name for p in tmp_path.iterdir()] == ['run']

def test_progress_in_a_log(towns, tmp_path, capfd):
    s = settings(epochs=1, steps=1)
    fit(s, make_model(s, pretrained=False), towns[0], {'unseen': towns[2]}, tmp_path/'run')
    out, err = capfd.readouterr()
    assert [line.split()[:2] for line in out.splitlines()] == [['epoch', '0/1'], ['epoch', '1/1']] and 'R@1' in out
    assert '\r' not in err

@pytest.mark.parametrize('name,value', [('strategy', 'best'), ('epochs', -1), ('steps', 0), ('steps', 1.5), ('steps', True), ('places_per_batch', 1), ('images_per_place', 1), ('lr', 0.), ('lr', float('nan')),
    ('lr', '1'), ('weight_decay', -1), ('workers', -2), ('workers', .5), ('seed', -1), ('seed', 1.5), ('augment', 'x'), ('node_features', 'x'), ('radius', 0), ('cache_gb', -1), ('devices', 0), ('alpha', -.1)])
def test_settings_are_checked(name, value):
    with pytest.raises(UserError, match=name): Settings(**{name: value})

def test_settings_survive_json():
    s = settings(image_size=(56, 70))
    assert Settings(**json.loads(json.dumps(asdict(s)))) == s

CHILD = '''
import sys, signal
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
import pandas as pd
from test_train import hold_step, settings, train
from sage.run import Stopped
towns = [pd.read_parquet(p) for p in {tables!r}]
hold_step(5)
print('go', flush=True)
try: train(settings(workers={workers}), towns, {run!r}, labelled=True)
except Stopped as e: print(e, flush=True); sys.exit(128 + e.signum)
'''

def child(towns, folder, run, workers=0):
    paths = [str(folder/f'{i}.parquet') for i in range(3)]
    for t, p in zip(towns, paths): t.to_parquet(p)
    code = CHILD.format(path=[os.path.dirname(__file__), str(Path(sage.__file__).parents[1])], tables=paths, run=str(run), workers=workers)
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, 'PYTHONHASHSEED': '7'})

def hold_step(n):
    "In a process that is to be stopped: its n-th step waits to be asked, so that it cannot be over before."
    import sage.train as trains
    listen, step, counted, stops = trains.stop_on_signals, SageModule.training_step, itertools.count(1), []
    def listening(stop): stops.append(stop); return listen(stop)
    def held(self, batch, index):
        if next(counted) == n: stops[0].wait(300)
        return step(self, batch, index)
    trains.stop_on_signals, SageModule.training_step = listening, held

def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is None and time.monotonic() < end: time.sleep(.002); continue
        code = process.poll(); process.terminate()
        raise AssertionError(f'waited in vain; the process {"goes on" if code is None else f"ended with {code}"} and said {process.communicate(timeout=240)}')

@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_signals_end_cleanly(whole, towns, tmp_path, signum):
    run = tmp_path/'run'
    p = child(towns, tmp_path, run, workers=2)
    wait_for(lambda: (run/'checkpoints'/'0001.resume.safetensors').exists(), p)
    os.killpg(p.pid, signum)                                                       # as a terminal or a scheduler does: its workers get it too
    out, err = p.communicate(timeout=240)
    assert p.returncode == 128 + signum and 'stopped' in out and 'Traceback' not in err, err
    assert Run(run).resumable()[-1] >= 1
    made = Run(run).metrics('step').step.max()
    assert ('after step' not in out or f'after step {made}' in out) and pause_path(Run(run), made // 3).exists() == (made % 3 > 0)
    assert_same(whole, train(settings(), towns, run, labelled=True, resume=True))

def test_prefix_cache_trains_as_without(towns, tmp_path):
    "Tokens on the disk: same numbers cold, warm and with a budget for a part of them; close to those without."
    s = settings(node_features='image', prefix_cache=str(tmp_path/'kept'), cache_gb=1.)
    cold = train(s, towns, tmp_path/'cold')
    size = sum(p.stat().st_size for p in (tmp_path/'kept').rglob('*.tokens'))
    assert size == 2 * 144 * 17 * 192 * 2                                     # mined and unseen, each image once
    assert_same(cold, train(s, towns, tmp_path/'warm'))
    assert sum(p.stat().st_size for p in (tmp_path/'kept').rglob('*.tokens')) == size
    tight = train(replace(s, prefix_cache=str(tmp_path/'tight'), cache_gb=.5e-3), towns, tmp_path/'part')
    assert 0 < sum(p.stat().st_size for p in (tmp_path/'tight').rglob('*')) < 1e6
    plain = train(replace(s, prefix_cache='', cache_gb=0.), towns, tmp_path/'plain')
    for run in (cold, tight): np.testing.assert_allclose(run.descriptors(0).astype(float), plain.descriptors(0).astype(float), atol=2e-3)

def test_prefix_cache_is_refused(towns, tmp_path):
    with pytest.raises(UserError, match='cache_gb'): train(settings(prefix_cache=str(tmp_path/'k')), towns, tmp_path/'a')
    train(settings(prefix_cache=str(tmp_path/'k'), cache_gb=1., epochs=0), towns, tmp_path/'b')
    with pytest.raises(UserError, match='tokens of another blocks'): train(settings(prefix_cache=str(tmp_path/'k'), cache_gb=1., dpns=2), towns, tmp_path/'c')
    assert not (tmp_path/'c').exists()

FULL = """
import resource, sys
from pathlib import Path
import torch
from sage.backbone import Backbone, make_vit
from sage.prefix import PrefixCache
b, folder = Backbone(make_vit('sage_nano')).eval(), Path(sys.argv[1])
kept, rows = PrefixCache(folder/'kept', b, 1).at(56), torch.randn(8, 17, 192).half()
paths = [folder/f'{i}.png' for i in range(8)]
for p in paths: p.write_bytes(b'x')
kept.add(paths[:2], rows[:2]); kept.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2)                     # three rows and a bit: the next write fails
kept.add(paths[2:], rows[2:]); kept.flush(); kept.add(paths, rows); kept.flush()
again = PrefixCache(folder/'kept', b, 1).at(56)
assert kept.find(paths).tolist() == again.find(paths).tolist() == [True] * 2 + [False] * 6, again.find(paths)
assert torch.equal(again.read(paths[:2]), rows[:2])
"""

FULL_OF_KEYS = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from sage.prefix import Keeper
folder, n = Path(sys.argv[1]), 1500
kept, rows = Keeper(folder, (1, 1), lambda: 1e9), torch.arange(n, dtype=torch.float32).reshape(n, 1, 1).half()      # keys are longer than tokens here
paths = [folder/f'{i}.png' for i in range(n)]
for p in paths: p.write_bytes(b'x')
kept.add(paths[:100], rows[:100]); kept.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2)                     # 1250 keys: the next write fails within them
kept.add(paths[100:], rows[100:]); kept.flush()
again = Keeper(folder, (1, 1), lambda: 1e9)
assert kept.find(paths).tolist() == again.find(paths).tolist() == [True]*100 + [False]*1400, (kept.find(paths).sum(), again.find(paths).sum())
assert torch.equal(again.read(paths[:100]), rows[:100]) and next(folder.glob('*.keys')).stat().st_size == 1600
"""

@pytest.mark.skipif(sys.platform == 'win32', reason='file size limits')
@pytest.mark.parametrize('script', [FULL, FULL_OF_KEYS], ids=['tokens', 'keys'])
def test_prefix_cache_survives_a_full_disk(tmp_path, script):
    done = subprocess.run([sys.executable, '-c', script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('computed each time') == 1 and 'File too large' in done.stderr

def test_prefix_cache_keeps_one_map_for_each_file(tmp_path):
    "However often it is flushed: a map of all for every flush would use up the addresses of a process."
    b = Backbone(make_vit('sage_nano')).eval()
    kept, rows = PrefixCache(tmp_path/'kept', b, 1).at(56), torch.randn(40, 17, 192).half()
    paths = [tmp_path/f'{i}.png' for i in range(40)]
    for p in paths: p.write_bytes(b'x')
    for i in range(0, 40, 4): kept.add(paths[i:i + 4], rows[i:i + 4]); kept.flush()
    assert len(kept.parts) == 1 and len(kept.parts[0]) == len(kept) == 40 and torch.equal(kept.read(paths), rows)
    again = PrefixCache(tmp_path/'kept', b, 1).at(56)
    assert torch.equal(again.read(paths[::-1]), rows.flip(0))
    again.add(paths[:2], rows[:2]); again.flush()
    assert len(list((tmp_path/'kept').rglob('*.keys'))) == 1

def test_kept_tokens_are_read_ahead(tmp_path, monkeypatch):
    "While a batch is used, the next is read; and where all are kept, nobody is started to decode."
    model = make_model(settings()).eval()
    table, begun = toy_table(tmp_path/'x', places=2), [threading.Event() for _ in range(3)]
    kept = lambda: Views(table, eval_transform(56), kept=PrefixCache(tmp_path/'kept', model.backbone, 1).at(56))
    first = embed(model, kept(), batch_size=4)
    views, reads = kept(), iter(begun)
    monkeypatch.setattr(views.kept, 'read', lambda paths, read=views.kept.read: (next(reads).set(), read(paths))[1])
    made = []
    monkeypatch.setattr(feed, 'Loader', lambda *args, num_workers, **more: made.append(num_workers) or iter(()))
    batches = kept_batches(model, views, np.arange(12), 4, workers=8)
    got = [next(batches)]
    assert begun[1].wait(60) and not begun[2].is_set()
    got += batches
    assert made == [0] and torch.equal(torch.cat(got), kept().kept.read(table.image.tolist())) and (embed(model, kept(), batch_size=4) == first).all()

@pytest.mark.filterwarnings('ignore:This DataLoader')
def test_many_workers_are_one_batch_ahead():
    assert [Loader([1, 2], num_workers=n).prefetch_factor for n in (0, 1, 16, 17, 64)] == [None, 2, 2, 1, 1]

def test_prefix_cache_may_be_added_to_a_run(towns, tmp_path):
    train(settings(epochs=1), towns, tmp_path/'run')
    more = settings(epochs=2, prefix_cache=str(tmp_path/'k'), cache_gb=1.)
    assert train(more, towns, tmp_path/'run', resume=True).epochs() == [0, 1, 2] and list((tmp_path/'k').rglob('*.tokens'))

def test_weights_that_cannot_be_gone_on_from_are_not_deleted(towns, tmp_path):
    "States (*.resume.safetensors) that were not copied, or removed to save room."
    run = train(settings(epochs=1), towns, tmp_path/'run')
    kept, first = run.path/'checkpoints', (run.path/'checkpoints'/'0001.resume.safetensors').read_bytes()
    train(settings(epochs=3), towns, run.path, resume=True)
    for p in kept.glob('*.resume.safetensors'): p.unlink()
    (kept/'2nd copy.safetensors').write_bytes(b'mine')
    held = lambda: ({p.name: p.read_bytes() for p in kept.iterdir()}, (run.path/'metrics.jsonl').read_bytes())
    def refused(says):
        before = held()
        with pytest.raises(UserError, match=says): train(settings(epochs=3), towns, run.path, resume=True)
        assert held() == before
    refused('epochs up to 3 are recorded, but nothing in checkpoints/ is there to go on from; copy the run whole')
    (kept/'0001.resume.safetensors').write_bytes(first)
    refused('weights of epoch 3, but what .* ends at epoch 1, .*copy the run whole')
    (kept/'0003.safetensors').rename(tmp_path/'3.safetensors')
    assert train(settings(epochs=3), towns, run.path, resume=True).resumable()[-1] == 3 and (kept/'2nd copy.safetensors').read_bytes() == b'mine'

@pytest.mark.parametrize('change, says', [(dict(settings=None), 'holds no settings'), (dict(settings=5), "'settings' is no table"), (dict(settings=dict(speed=1)), 'its settings speed are unknown'), (dict(settings=dict(epochs='x')), 'epochs'),
    (dict(tables=['a']), "'tables' is no table"), (dict(tables=dict(mined=3)), "'tables' is damaged"), (dict(validation='x'), "'validation' is no list"), (dict(validation=[3]), 'no list of names'), (dict(data=dict(mined=3)), "'data' is damaged"), (dict(model=[]), "'model' is no table"), (dict(tables=None), 'holds no settings'), (dict(tables=0), "'tables' is no table"), (dict(validation=''), "'validation' is no list")])
def test_a_config_of_another_shape_is_one_sentence(tmp_path, capsys, change, says):
    run = Run.create(tmp_path/'run', dict(settings=dict(), model={}, data={}, validation=[]))
    config = json.loads((run.path/'config.json').read_text()) | change
    (run.path/'config.json').write_text(json.dumps(config))
    from sage import cli
    with pytest.raises(SystemExit) as e: cli.sage_train(['--run', str(run.path), '--resume'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and len(err.splitlines()) == 1 and (says or 'holds no settings') in err, err
