"Several processes train as one: same loss, same gradients, same batches; one run folder; failures and signals end all of them."
import json, os, signal, socket, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from sage import cli
from sage.core import UserError
from sage.formats import write_gsv, write_utm
from sage.run import Run, checkpoint_paths, pause_path
from sage.settings import Settings
from test_cli import cards
from test_train import settings, towns, train, wait_for

STEP = """
import sys, json, torch
from torch.nn.parallel import DistributedDataParallel
from sage.ranks import joined, world
from sage.learner import SageModule
from sage.settings import Settings, make_model
class Step(torch.nn.Module):
    def __init__(self, module): super().__init__(); self.module = module
    def forward(self, batch): return self.module.training_step(batch, 0)
def step(head, dropout, chunks, kind):
    s = Settings(backbone='sage_nano', image_size=56, places_per_batch=4, images_per_place=3, probes=24, probe_dim=32, token_dim=768, interact=head, chunk=chunks[world()[1] - 1])
    module = SageModule(make_model(s, pretrained=False), s).train().to(getattr(torch, kind))
    for m in module.modules():
        if not dropout and isinstance(m, (torch.nn.Dropout, torch.nn.MultiheadAttention)): m.p = m.dropout = 0.
    g = torch.Generator().manual_seed(0)
    images = (torch.rand(24, 3, 1, 1, generator=g) + torch.randn(24, 3, 56, 56, generator=g)).to(getattr(torch, kind))
    source, slot = torch.arange(24) // 12, torch.arange(24) % 12 // 3
    mine = slot // (4 // world()[1]) == world()[0]
    both = Step(module) if world()[1] == 1 else DistributedDataParallel(Step(module))
    both((images[mine], source[mine], slot[mine])).backward()
    return dict(last=module.last, grads={k: p.grad for k, p in module.model.named_parameters() if p.requires_grad})
with joined('cpu'):
    done = {name: step(*case) for name, case in json.loads(sys.argv[2]).items()}
    if world()[0] == 0: torch.save(done, sys.argv[1])
"""

def processes(code, n, *args, timeout=400):
    "Run a script in n joined processes."
    script = f'import sys; from sage.ranks import launch; sys.exit(launch([sys.executable, "-c", {code!r}, *{[str(a) for a in args]!r}], {n}))'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=timeout, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr

# head, dropout, images that one process and each of two processes takes at a time (0: all it has), kind of numbers
CASES = {'head, in halves': (True, True, (6, 0), 'float32'), 'plain, in pieces': (False, True, (3, 3), 'float32'),
         **{f'{"head" if head else "plain"}, at once, {kind}': (head, False, (0, 0), kind) for head in (True, False) for kind in ('float32', 'float64')}}

@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    "Every case by one process and by two."
    folder = tmp_path_factory.mktemp('steps')
    for n in (1, 2): processes(STEP, n, folder/str(n), json.dumps(CASES))
    return [torch.load(folder/str(n), weights_only=True) for n in (1, 2)]

@pytest.mark.parametrize('case', CASES)
def test_two_processes_step_as_one(steps, case):
    """Two sources: two processes give the loss and each gradient of one to 1e-5. With dropout, which is drawn anew for each piece, one process takes the pieces that two take; without, all may take what they have at once.

    There products of other sizes round differently, and two gradients are sums of terms that cancel. The scores' bias moves all scores of a probe alike, which the softmax over patches does not see: its gradient is zero (1e-18 in float64, 4e-10 in float32), and only that is asked.
    Of the exponent of the probed features, terms over images and features are 962 times as large as their sum, so float32 knows it to 1000 roundings (one process alone is 3e-5 off its own float64); in float64 1e-5 holds for it, too."""
    one, two = (s[case] for s in steps)
    for k, v in one['last'].items(): assert two['last'][k] == pytest.approx(v, rel=1e-5), k
    assert one['last']['images'] == 24 and one['last']['mined_pairs'] > 20 and one['grads'].keys() == two['grads'].keys() and len(one['grads']) > 30
    for k, g in one['grads'].items():
        eps, off, zero = torch.finfo(g.dtype).eps, (two['grads'][k] - g).norm().item(), k == 'probing.score.3.bias'
        if zero: assert max(x['grads'][k].norm().item() for x in (one, two)) <= 10*eps*one['grads']['probing.score.3.weight'].norm().item(), k
        else: assert off <= max(1e-5, 1000*eps if k.startswith('probing.gpn.') and 'at once' in case else 0)*g.norm().item(), (k, off/g.norm().item())

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('sets')
    write_gsv(cards(root/'a', places=12), root/'gsv')
    write_utm(cards(root/'b', 'bestadt', seed=1).assign(split='test'), root/'other')
    return root

STEPS = 8
FLAGS = ('--backbone sage_nano --image-size 56 --eval-size 56 --places-per-batch 4 --images-per-place 3 --min-size 3 --steps 8 --epochs 2 --log-every 1 --embed-batch 8 --lr 1e-3 '
         '--precision 32 --device cpu --probes 8 --probe-dim 16 --token-dim 32 --node-features image --no-scan --quiet').split()

def command(data, folder, *more): return [sys.executable, '-m', 'sage.cli', 'train', '--data', str(data/'gsv'), '--val', str(data/'other'), '--run', str(folder), *FLAGS, *more]

def sage_train(data, folder, *more):
    return subprocess.run(command(data, folder, *more), capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})

@pytest.fixture(scope='module')
def one(data, tmp_path_factory):
    "The run of one device that takes its batches in two pieces: what several devices compute, too."
    folder = tmp_path_factory.mktemp('one')/'run'
    done = sage_train(data, folder, '--chunk', '6')
    assert done.returncode == 0, done.stderr
    return Run(folder)

def assert_like(run, one):
    "Same batches, same graph, same curve."
    for kind in ('epoch', 'step'):
        a, b = one.metrics(kind), run.metrics(kind)
        assert list(a.epoch) == list(b.epoch)
        for c in ('loss', 'mined_pairs', 'hardest_positive', 'hardest_negative', 'images', *(c for c in a if '@' in c)): np.testing.assert_allclose(a[c].astype(float), b[c].astype(float), rtol=2e-3, err_msg=c)
    np.testing.assert_allclose(one.metrics('step').loss[:1], run.metrics('step').loss[:1], rtol=1e-5)
    assert (one.cliques(0).row == run.cliques(0).row).all()
    assert np.array_equal(one.descriptors(0), run.descriptors(0)), 'each device embeds whole batches'
    a, b = (load_file(checkpoint_paths(r, 2)[0]) for r in (one, run))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-2, atol=1e-3)
    assert {p.name for p in run.path.rglob('*')} == {p.name for p in one.path.rglob('*')}

def test_two_devices_train_as_one(data, one, tmp_path):
    "The whole command."
    done = sage_train(data, tmp_path/'two', '--devices', '2')
    assert done.returncode == 0 and done.stdout.count('run folder') == 1 and 'Traceback' not in done.stderr, done.stderr
    assert_like(Run(tmp_path/'two'), one)

def machines(data, folder, *more, again=True):
    "The command on two machines (both are this one): a process each, that find one another by three variables."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = str(s.getsockname()[1])
    where = lambda i: {**os.environ, 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'NODE_RANK': str(i)}
    running = [subprocess.Popen(command(data, folder, '--num-nodes', '2', *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=where(i)) for i in range(2)]
    try:
        said = [running[0].communicate(timeout=600)]
        if running[0].returncode: running[1].terminate()                            # it would wait for hours
        said.append(running[1].communicate(timeout=600))
    finally:
        for p in running: p.terminate()
    if again and running[0].returncode and 'address already in use' in said[0][1].lower(): return machines(data, folder, *more, again=False)      # somebody took the port
    return [(s, p.returncode) for s, p in zip(said, running)]

def torchrun(data, folder, *more):
    "The same under torchrun."
    how = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', '--', *command(data, folder, '--devices', '2', *more)[2:]]
    done = subprocess.run(how, capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return [((done.stdout, done.stderr), done.returncode)]

@pytest.mark.parametrize('start', (machines, torchrun))
def test_two_machines_and_torchrun(data, one, tmp_path, start):
    "However two processes are started: the first step's loss is that of one, and one run folder is written."
    for (_, err), code in start(data, tmp_path/'two', '--epochs', '1'): assert code == 0 and 'Traceback' not in err, err
    two = Run(tmp_path/'two')
    np.testing.assert_allclose(one.metrics('step').loss[:1], two.metrics('step').loss[:1], rtol=1e-5)
    assert (one.cliques(0).row == two.cliques(0).row).all() and two.resumable() == [0, 1]

def told_once(err, says): assert says in err and len([line for line in err.splitlines() if 'sage_train' in line]) == 1 and 'Traceback' not in err, err

@pytest.mark.parametrize('more,says', [(('--devices', '3'), 'give a multiple of 3'), (('--devices', '2', '--num-nodes', '2'), 'MASTER_ADDR'), (('--devices', '2', '--device', 'cuda:1'), 'leave out the number')])
def test_mistakes_before_anyone_is_started(data, tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    with pytest.raises(SystemExit) as e: cli.sage_train(command(data, tmp_path/'run', *more)[4:])
    assert e.value.code == 2 and not (tmp_path/'run').exists()
    told_once(capsys.readouterr().err, says)

def test_a_mistake_that_all_meet_is_told_once(data, tmp_path):
    done = sage_train(data, tmp_path/'run', '--devices', '2', '--places-per-batch', '40')
    assert done.returncode == 2 and not (tmp_path/'run').exists()
    told_once(done.stderr, 'places of a batch could be filled')

HELD = 'import sys; sys.path.insert(0, {path!r}); from test_train import hold_step; from sage import cli; hold_step(12); cli.main()'
LAUNCH = 'import sys; from sage import cli; launch = cli.launch; cli.launch = lambda argv, *how: launch([argv[0], "-c", {held!r}, *argv[3:]], *how); cli.main()'

def test_stopped_by_a_signal(data, one, tmp_path):
    "All end after the same step, and one device goes on from there to what one device trains. The twelfth step waits for the signal."
    folder = tmp_path/'run'
    argv = command(data, folder, '--devices', '2')
    assert argv[1:3] == ['-m', 'sage.cli']
    p = subprocess.Popen([argv[0], '-c', LAUNCH.format(held=HELD.format(path=os.path.dirname(__file__))), *argv[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    log = folder/'metrics.jsonl'
    wait_for(lambda: log.exists() and '"kind": "step"' in log.read_text(), p)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=240)
    assert p.returncode == 143 and 'Traceback' not in err, err
    run, steps = Run(folder), len(Run(folder).metrics('step'))
    assert run.resumable()[-1] == steps // STEPS and pause_path(run, steps // STEPS).exists() == (steps % STEPS > 0), (steps, err)
    done = sage_train(data, folder, '--resume', '--chunk', '6')
    assert done.returncode == 0, done.stderr
    assert_like(run, one)

def describe(*args, **how):
    return subprocess.run([sys.executable, '-m', 'sage.cli', 'describe', *map(str, args), '--size', '56', '--quiet', '--device', 'cpu'], capture_output=True, text=True, timeout=400, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **how)

def test_describe_in_parts(tmp_path, capsys):
    "Two processes write parts; what is there stays; a part without a readable image is a part; the whole is what one process makes."
    t = cards(tmp_path/'a', places=5)
    for i in (4, 5, 6, 7, 9): Path(t.image[i]).write_bytes(b'broken')
    alone = lambda *args: cli.sage_describe([*map(str, args), '--size', '56', '--quiet', '--device', 'cpu'])
    alone(tmp_path/'a', '-o', tmp_path/'whole.npy')
    folder = tmp_path/'parts.npy'
    done = describe(tmp_path/'a', '-o', folder, '--parts', 4, '--devices', 2)
    assert done.returncode == 0 and 'written' in done.stdout and '5 parts: 15 descriptors' in done.stdout, done.stderr + done.stdout
    assert done.stderr.count('5 of 20 images cannot be read') == 1
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder/'00003.npy').unlink(); (folder/'00003.csv').unlink()
    alone(tmp_path/'a', '-o', folder, '--parts', 4)
    assert {n for n, t in times.items() if (folder/n).stat().st_mtime_ns != t} == {'00003.npy', '00003.csv'}
    assert [len(np.load(p)) for p in sorted(folder.glob('*.npy'))] == [4, 0, 3, 4, 4]
    np.testing.assert_allclose(np.concatenate([np.load(p) for p in sorted(folder.glob('*.npy'))]), np.load(tmp_path/'whole.npy'), atol=1e-5)
    assert pd.concat([pd.read_csv(p) for p in sorted(folder.glob('0*.csv'))]).image.tolist() == pd.read_csv(tmp_path/'whole.csv').image.tolist()
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: alone(tmp_path/'a', '-o', folder, '--parts', 5)
    assert e.value.code == 2 and 'parts of other rows' in capsys.readouterr().err
    beach = tmp_path/'x.npy'; beach.mkdir(); (beach/'beach.jpg').touch()
    with pytest.raises(SystemExit): alone(tmp_path/'a', '-o', beach, '--parts', 4)
    assert 'no parts of a description' in capsys.readouterr().err and len(list(beach.iterdir())) == 1

def test_several_need_a_start(towns, tmp_path):
    with pytest.raises(UserError, match='started by sage_train --devices 2'): train(settings(devices=2), towns, tmp_path/'run')
