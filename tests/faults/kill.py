"""SIGKILL at random moments of a training, then go on; in the end everything must equal an unbroken training, bit for bit.

    python tests/faults/kill.py --kills 100        # what `make torture` runs

Half of the kills come at random times, half at a random touch of the disk or within two milliseconds after it. A training may be killed several times before it may finish."""
import argparse, os, random, signal, sys, tempfile, time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
from victim import PHASES, bits, child, differences, phase, readable, said, tables, wait


def unbroken(folder, streets):
    "(what it says, seconds, touches of the disk)"
    p, start = child(folder, streets), time.monotonic()
    assert wait(p) == 0, said(folder).read_text()
    return bits(folder), time.monotonic() - start, int(said(folder).read_text().split()[-2])


def kill_once(folder, streets, g, seconds, touches, signum):
    "One process that is killed at a random moment. True when it was, False when it had finished before."
    at_touch = g.random() < .5 and signum == signal.SIGKILL
    p = child(folder, streets, *((g.randint(1, touches), g.choice([0, g.uniform(1e-5, 2e-3)])) if at_touch else ()))
    if not at_touch:
        time.sleep(g.uniform(0, seconds))
        with suppress(ProcessLookupError): os.kill(p.pid, signum)
    code = wait(p)
    if signum == signal.SIGKILL: asked = (-signal.SIGKILL, -signal.SIGALRM)
    else: asked = (128 + signum, *(-signum,)*(phase(folder) == 'beginning'))               # a clean end, but for one who did not listen yet
    if code and code not in asked: raise AssertionError(f'ended with {code} while {phase(folder)}:\n{said(folder).read_text()}')
    return bool(code)


def torture(kills, seed, root, say=print, signals=(signal.SIGKILL,)):
    "(survived, tried, what was being done): a kill is survived when what it left can be read, and the training it belongs to ends as if nothing had been."
    g, streets = random.Random(seed), tables()
    unbroken(root/'first', streets)                                                # makes machine code, which takes longer than all the rest
    want, seconds, touches = unbroken(root/'unbroken', streets)
    say(f'an unbroken training takes {seconds:.1f} s and touches the disk {touches} times')
    survived = tried = number = 0
    doing = Counter()
    while tried < kills:
        folder, mine, number = root/f'run{number}', 0, number + 1
        try:
            for _ in range(g.randint(1, 4)):
                if tried == kills or not kill_once(folder, streets, g, seconds, touches, g.choice(signals)): break
                tried += 1; mine += 1; doing[phase(folder)] += 1
                readable(folder)
            code = wait(child(folder, streets))
            wrong = differences(folder, want) if code == 0 else [said(folder).read_text()]
        except Exception as e: wrong = [f'{type(e).__name__}: {e}']
        if wrong: say(f'{folder}: {wrong[:5]}')
        else: survived += mine
        say(f'{survived} of {tried} survived') if tried // 10 > (tried - mine) // 10 else None
    return survived, tried, doing


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=100)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--signals', action='store_true', help='SIGINT and SIGTERM in place of SIGKILL')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as root:
        survived, tried, doing = torture(args.kills, args.seed, Path(root)/'runs', lambda text: print(text, flush=True), (signal.SIGINT, signal.SIGTERM) if args.signals else (signal.SIGKILL,))
    print('while ' + ', '.join(f'{name}: {doing[name]}' for name in (*PHASES, 'other', 'beginning')))
    print(f'{"signals" if args.signals else "kills"} survived: {survived} of {tried}')
    sys.exit(survived != tried)
