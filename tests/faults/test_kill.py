"""Killed, asked to stop, or met by a second process: nothing is lost, and the folder is never written by two."""
import json, os, platform, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import kill
from sage.core import UserError
from sage.lock import alone, holder, started
from sage.run import Run

HERE = Path(__file__).parent


def torture(*args, seconds=3600):
    done = subprocess.run([sys.executable, str(HERE/'kill.py'), *args], capture_output=True, text=True, timeout=seconds)
    print(done.stdout)
    return done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.parametrize('signals', [(signal.SIGKILL,), (signal.SIGINT, signal.SIGTERM)])
def test_a_few(tmp_path, signals):
    survived, tried, doing = kill.torture(2, 1, tmp_path/'runs', signals=signals)
    assert survived == tried == sum(doing.values()) == 2


@pytest.mark.torture
def test_a_hundred_kills():
    last, said = torture('--kills', '100')
    assert last == 'kills survived: 100 of 100', said
    met = dict(part.rsplit(': ', 1) for part in said.split('\nwhile ')[1].splitlines()[0].split(', '))
    assert sum(int(met[what]) for what in ('embedding', 'mining', 'step', 'checkpoint', 'record')) >= 10, met      # drawing takes milliseconds here, so not each is met for certain


@pytest.mark.torture
def test_signals():
    last, said = torture('--kills', '20', '--signals')
    assert last == 'signals survived: 20 of 20', said


# ---- the lock

HOLD = '''
import sys
from sage.lock import alone
with alone(sys.argv[1]): print('held', flush=True); sys.stdin.read()
'''


def hold(folder):
    p = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(HERE.parents[1])})
    assert p.stdout.readline() == 'held\n'
    return p


def test_a_second_process_is_refused_and_a_dead_owner_is_succeeded(tmp_path):
    run, lock = Run.create(tmp_path/'run', {}), tmp_path/'run'/'lock.json'
    p = hold(run.path)
    assert holder(lock)['pid'] == p.pid
    with pytest.raises(UserError, match=f'process {p.pid} on .* has been writing this run since 20'):
        with alone(run.path): pass
    assert holder(lock)['pid'] == p.pid, 'a refusal takes nothing away'
    p.kill()
    while started(p.pid): time.sleep(.01)                    # a zombie, not waited for, is dead
    assert lock.exists() and not holder(lock)
    with alone(run.path): assert holder(lock)['pid'] == os.getpid()
    assert not lock.exists() and Run(run.path)
    p.communicate()


def test_a_process_that_ends_leaves_no_lock(tmp_path):
    p = hold(tmp_path/'new')
    p.communicate('')
    assert p.returncode == 0 and not (tmp_path/'new').exists(), 'nor a folder in which no run began'


def test_another_machine_is_believed(tmp_path):
    (tmp_path/'lock.json').write_text(json.dumps(dict(pid=1, host='elsewhere', started='x', since='2026-01-02 03:04')))
    with pytest.raises(UserError, match='process 1 on elsewhere .*if it has ended, remove .*lock.json'):
        with alone(tmp_path): pass


@pytest.mark.parametrize('content', ['', '{', '[]', 'null', '{"pid": "x"}', '{"pid": null, "host": "a", "started": "", "since": ""}', *('{"pid": %s, "host": "HERE", "started": "", "since": ""}' % p for p in ('-1', '0', 'true')), '\0' * 50])
def test_a_lock_that_says_nothing_is_nobodys(tmp_path, content):
    (tmp_path/'lock.json').write_text(content.replace('HERE', platform.node()))
    with alone(tmp_path): assert holder(tmp_path/'lock.json')['pid'] == os.getpid()


def test_of_many_at_once_one_wins(tmp_path):
    "Eight threads want a folder whose owner has died; at no moment do two have it."
    (tmp_path/'lock.json').write_text(json.dumps(dict(pid=2**22 + 1, host='x', started='', since='')).replace('"x"', json.dumps(os.uname().nodename)))
    inside, most, won, gate = [0], [0], [0], threading.Barrier(8)
    def want():
        gate.wait()
        for _ in range(30):
            try:
                with alone(tmp_path):
                    inside[0] += 1; most[0] = max(most[0], inside[0]); won[0] += 1
                    time.sleep(.0005)
                    inside[0] -= 1
            except UserError: pass
    (tmp_path/'keep').touch()
    threads = [threading.Thread(target=want) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert most[0] == 1 and won[0] >= 1 and sorted(p.name for p in tmp_path.iterdir()) == ['keep']


def test_the_command_is_refused(tmp_path, root):
    "Exit code 2, one sentence, and the run as it was."
    run = Run.create(tmp_path/'run', dict(settings={}, model={}, data={}))
    p = hold(run.path)
    before = {q: q.stat().st_mtime_ns for q in run.path.rglob('*')}
    code = f"import sys; sys.argv[1:] = []; from sage.lock import alone\nfrom sage.train import fit\nfrom sage.command import command\n@command\ndef sage_train(argv):\n    with alone({str(run.path)!r}): pass\nsage_train([])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root), 'PYTHONWARNINGS': 'ignore'})
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and f'process {p.pid}' in done.stderr, done.stderr
    assert {q: q.stat().st_mtime_ns for q in run.path.rglob('*')} == before
    p.communicate('')


@pytest.mark.slow
def test_the_long_run_runs(root):
    "Ten seconds of it: that everything is looked at and reported; what grows in so short a time means nothing."
    done = subprocess.run([sys.executable, str(root/'tests'/'faults'/'long.py'), '--minutes', '.17', '--every', '1'], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root), 'PYTHONWARNINGS': 'ignore'})
    assert 'ended by SIGTERM with 143' in done.stdout and 'epochs of records are read in' in done.stdout and 'Traceback' not in done.stderr, done.stdout + done.stderr
    assert all(f'{who} memory' in done.stdout for who in ('training', 'workbench', 'layouts', 'networks'))
