"""A tiny training on the embedded world in processes that can be killed, and what must hold of its folder at every moment: shared by the fault tests and `make torture`."""
import ctypes, json, multiprocessing, os, signal, struct, subprocess, sys, traceback
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np, torch
from sage.checkpoint import read_checked
from sage.places import place_rows
from sage.run import Run, checkpoint_paths, pause_path
from sage.settings import Settings, make_model
from sage.sources import world
from sage.command import command
from sage.learner import SageModule
import sage.train as train_module
from sage.epoch import EpochGraph
from sage.train import fit

torch.set_num_threads(1)
TINY = Settings(backbone='sage_nano', probes=8, probe_dim=16, token_dim=32, image_size=42, eval_size=42, places_per_batch=2, images_per_place=3, min_size=3, steps=3, epochs=2, log_every=1, embed_batch=16,
                lr=1e-3, precision='32', device='cpu', cache_gb=0.)
TOUCHES = {'open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate'}      # moments at which a disk is asked for something


def some_places(df, n, fewest=3):
    "The images of the first places that have enough of them."
    codes = place_rows(df)[1]
    return df[np.isin(codes, np.flatnonzero(np.bincount(codes) >= fewest)[:n])].reset_index(drop=True)


def tables():
    "A street of the embedded world to train on, a street of another town to validate on. Rendered in a process of its own, so that nothing of it is left in this one."
    subprocess.run([sys.executable, '-c', 'from sage.sources import world; world(dev=True)'], check=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    towns = world(dev=True)
    return some_places(towns['train'], 8), some_places(towns['val']['unseen town'], 4)


def train(folder, streets, resume=None, **changes):
    "Train, or go on where a config says that there is something to go on with."
    s = replace(TINY, **changes)
    return fit(s, make_model(s), streets[0], {'unseen': streets[1]}, folder, progress=False, resume=(Path(folder)/'config.json').exists() if resume is None else resume)


def sage_train(*args, **changes):
    "As the command ends: one sentence and an exit code."
    @command
    def sage_train(argv): train(*args, **changes)
    sage_train([])


def without_power_over_files():
    "Root reads and writes whatever it likes; from here on this process does not."
    libc, bits = ctypes.CDLL(None, use_errno=True), 0b1110                  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    head, data = struct.pack('Ii', 0x20080522, 0), ctypes.create_string_buffer(24)
    if libc.capget(head, data): raise OSError(ctypes.get_errno(), 'capget')
    words = [w & ~bits if i < 3 else w for i, w in enumerate(struct.unpack('6I', data.raw))]
    if libc.capset(head, struct.pack('6I', *words)): raise OSError(ctypes.get_errno(), 'capset')


def armed(folder, event, delay):
    "Die, as by a pulled plug, `delay` seconds after the disk was touched for the `event`-th time; tells how often it was."
    count = [0]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    def touched(name, args):
        if name not in TOUCHES or not args or str(folder) not in str(args[0]): return
        count[0] += 1
        if count[0] == event: signal.setitimer(signal.ITIMER_REAL, delay) if delay else os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(touched)
    return count


def said(folder):
    "The file that takes the standard output and error of a folder's processes; outside the folder's own disk."
    return Path(folder).parents[1]/f'{Path(folder).parent.name}-{Path(folder).name}.err'


SERVER = multiprocessing.get_context('forkserver')                           # forks from a process without threads, whatever the one that asks has
SERVER.set_forkserver_preload(['victim'])


def read_only(folder):
    "Before a training: its folder may not be written to."
    os.chmod(folder, 0o555); without_power_over_files()


def frozen(folder, touch):
    "Before a training: when the disk is touched for the `touch`-th time, nothing in the folder may be written any more."
    count, active = [0], [False]
    def touched(name, args):
        if active[0] or name not in TOUCHES or not args or str(folder) not in str(args[0]): return
        count[0] += 1
        if count[0] == touch: active[0] = True; allow(folder, 0o555)
    without_power_over_files()
    sys.addaudithook(touched)


def allow(folder, mode):
    "Give a folder and all folders in it a mode."
    for p in (folder, *folder.rglob('*')):
        if p.is_dir(): os.chmod(p, mode)


PHASES = dict(embedding=(EpochGraph, 'embed_all'), mining=(EpochGraph, 'draw'), step=(SageModule, 'training_step'), checkpoint=(EpochGraph, 'keep'), record=(EpochGraph, 'graph_record'))


def phase_file(folder): return said(folder).with_suffix('.phase')


def tell_phase(folder):
    "From here on this process writes down what it is doing, for whoever kills it."
    out, inside = os.open(phase_file(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), ['other']
    write = lambda: os.pwrite(out, inside[-1].ljust(12).encode(), 0)
    def told(name, work):
        @wraps(work)
        def f(*args, **kwargs):
            inside.append(name); write()
            try: return work(*args, **kwargs)
            finally: inside.pop(); write()
        return f
    for name, (owner, method) in PHASES.items(): setattr(owner, method, told(name, getattr(owner, method)))
    listen = train_module.stop_on_signals
    @contextmanager
    def listening(stop):
        for name in (signal.SIGINT, signal.SIGTERM): signal.signal(name, signal.SIG_IGN)     # as it is again after the training, when there is nothing left to stop
        with listen(stop) as came: write(); yield came                          # from here on a signal ends the training cleanly
    train_module.stop_on_signals = listening


def phase(folder):
    "What a process that has ended was doing."
    with suppress(FileNotFoundError): return phase_file(folder).read_text().strip() or 'beginning'
    return 'beginning'


def trains(began, folder, streets, event, delay, before, changes):
    "What a child does: it ends without Python's own tidying up."
    code = 70
    try:
        err = os.open(said(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(err, 1); os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
        phase_file(folder).unlink(missing_ok=True)                              # before anyone may kill this process and read what it was doing
        signal.signal(signal.SIGINT, signal.SIG_DFL)                            # nobody listens yet
        began.close()
        count = armed(folder, event, delay)
        tell_phase(folder)
        if before: before()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sage_train(folder, streets, **changes)
        print(f'touched {count[0]} times')
        code = 0
    except SystemExit as e: code = e.code
    except BaseException: traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def child(folder, streets, event=None, delay=0., before=None, **changes):
    "A process that has begun to train, see `said`; `before` is called in it first and must be picklable."
    waits, began = SERVER.Pipe(duplex=False)
    p = SERVER.Process(target=trains, args=(began, Path(folder), streets, event, delay, before, changes))
    p.start()
    began.close()
    with waits, suppress(EOFError): waits.recv()                       # until the other end is closed: it has started, or is dead
    return p


def wait(p, seconds=600):
    "Exit code of a child, negative for a signal; a child that hangs is killed and is an error."
    p.join(seconds)
    if p.exitcode is not None: return p.exitcode
    p.kill(); p.join()
    raise TimeoutError(f'no end after {seconds} s')


def numbers(folder):
    "Rows of the metrics without times."
    rows = [json.loads(line) for line in (Path(folder)/'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.endswith('_s')} for r in rows]


def readable(folder):
    "Everything that a run folder lists opens, whatever moment it is."
    if not (Path(folder)/'config.json').exists(): return
    run = Run(folder)
    run.config, run.metrics(''), run.recalls(), run.best()
    for name in run.config['tables']: run.table(name)
    for e in run.epochs():
        assert len(run.nodes(e)) == len(run.descriptors(e)) and len(run.cliques(e)) and run.attention(e) and run.answers(e) is not None, e
        run.edges(e)
    for e in run.checkpoints(): read_checked(checkpoint_paths(run, e)[0])
    for e in run.resumable(): read_checked(checkpoint_paths(run, e)[1])
    for e in run.resumable(): pause_path(run, e).exists() and read_checked(pause_path(run, e))


def bits(folder):
    "All that a finished run says, but for times: comparable to the last bit."
    run = Run(folder)
    found = {'rows': numbers(folder), 'epochs': run.epochs(), 'resumable': run.resumable(), 'checkpoints': [*run.checkpoints()]}
    for e in run.checkpoints(): found |= {f'{e} {k}': v.numpy().tobytes() for k, v in read_checked(checkpoint_paths(run, e)[0])[0].items()}
    for e in run.resumable(): found |= {f'{e} resume {k}': v.numpy().tobytes() for k, v in read_checked(checkpoint_paths(run, e)[1])[0].items()}
    for e in run.epochs():
        found |= {f'{e} {t}': getattr(run, t)(e).to_csv(float_format='%.17g') for t in ('nodes', 'edges', 'cliques')} | {f'{e} descriptors': run.descriptors(e).tobytes()}
        found |= {f'{e} {n} {i}': a.tobytes() for n, t in run.answers(e).items() for i, a in enumerate(t)} | {f'{e} attention {k}': a.tobytes() for k, a in run.attention(e).items()}
    return found


def differences(folder, want):
    "What is not as in the unbroken run, by name; and files that should not be there."
    have = bits(folder)
    left = [str(p.relative_to(folder)) for p in Path(folder).rglob('*') if p.name.startswith('.') or '.pause' in p.name or p.name in ('lock.json', 'failed.json')]
    return sorted(k for k in {*have, *want} if have.get(k) != want.get(k)) + left
