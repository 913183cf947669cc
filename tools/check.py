"""All checks, in order; stops at the first that fails and names it. Run by `make test` with the environment's python.

usage: check.py [quick]      (quick: leaves out tests marked slow or browser, and the wheel)"""
import os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

def pytest(*args): return [sys.executable, '-m', 'pytest', '-q', *args]

def project(test): return pytest('tests/test_project.py', '-k', test)

def steps(quick=False):
    "(name, command, threads for each process) of every check."
    rest = ['--ignore', 'tests/test_project.py', '-m', 'not wheel' + (' and not slow and not browser' if quick else '')]
    return [
        ('export freshness', project('export'), 1),
        ('notebooks clean', project('clean'), 1),
        ('import order', project('order'), 1),
        ('project', project('not export and not clean and not order'), 1),
        ('notebook tests', [BIN/'nbdev_test', '--n_workers', '2', '--timing'], 1),
        ('pytest', pytest('-n', '2', '--dist', 'loadfile', '--durations', '10', *rest), 1),
    ] + ([] if quick else [('wheel', pytest('-s', 'tests/test_wheel.py'), 1)])

def environment(threads):
    "The checkout on the path, no display, a bounded number of threads (numba, once it runs, gives its own number to torch too)."
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': str(threads), 'NUMBA_NUM_THREADS': str(threads), 'JUPYTER_PLATFORM_DIRS': '1'}

def main(quick=False):
    start = time.monotonic()
    for name, command, threads in steps(quick):
        print(f'\n=== {name} ===', flush=True)
        begin = time.monotonic()
        code = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment(threads)).returncode
        print(f'=== {name}: {"FAILED" if code else "ok"}, {time.monotonic() - begin:.0f} s ===', flush=True)
        if code: sys.exit(f'FAILED: {name}')
    print(f'\nall checks passed in {(time.monotonic() - start)/60:.1f} minutes')

if __name__ == '__main__':
    if sys.argv[1:] not in ([], ['quick']): sys.exit(__doc__)
    main(quick=bool(sys.argv[1:]))
