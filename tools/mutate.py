"""Are the tests any good? Change one thing in a module (a < into a <=, a 1 into a 2, an and into an or …) and see whether a test notices.

    python tools/mutate.py --sample 200            # what `make torture` runs: 200 mutants, the same ones every time
    python tools/mutate.py --modules geo --sample 0 # every mutant of one module

Tests are those of the module in tests/ and the cells of its notebook. A mutant is killed when one of them fails or does not come to an end. Tools for this (mutmut, cosmic-ray) start an interpreter for each mutant
and know no notebooks; here a process is forked that has already imported everything but the project."""
import argparse, ast, copy, os, random, re, shutil, signal, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
ROOT = Path(__file__).resolve().parents[1]
MODULES = dict(geo=('01_geo', ['test_geo.py']), graph=('20_graph', ['test_graph.py']), clique=('21_clique', ['test_clique.py']), batches=('22_batches', ['test_batches.py']),
               retrieval=('31_retrieval', ['test_retrieval.py', 'test_recall_reference.py']))
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
WORDS = dict(min='max', max='min', argmin='argmax', argmax='argmin', any='all', all='any', floor='ceil', ceil='floor', zeros='ones', ones='zeros', minimum='maximum', maximum='minimum')


def left_alone(node):
    "What is said and not done: messages, docstrings, annotations, decorators, names that are exported."
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)): return True
    return isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__'


def places(node, path=()):
    "(path to a node, what to do with it) for every change that can be made."
    if left_alone(node): return
    kind = type(node)
    if kind is ast.Compare: yield from ((path, ('compare', i)) for i, op in enumerate(node.ops) if type(op) in COMPARE)
    if kind in (ast.BinOp, ast.AugAssign) and type(node.op) in ARITHMETIC and not any(isinstance(s, (ast.JoinedStr,)) or isinstance(s, ast.Constant) and isinstance(s.value, str) for s in ast.iter_child_nodes(node)): yield path, ('arithmetic',)
    if kind is ast.BoolOp: yield path, ('bool',)
    if kind is ast.UnaryOp and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)): yield path, ('unary',)
    if kind is ast.Constant and isinstance(node.value, (bool, int, float)): yield path, ('constant',)
    if kind in (ast.If, ast.While, ast.IfExp): yield path, ('test',)
    if kind is ast.Attribute and node.attr in WORDS or kind is ast.Name and node.id in WORDS and isinstance(node.ctx, ast.Load): yield path, ('word',)
    for field, value in ast.iter_fields(node):
        if field in ('annotation', 'returns', 'decorator_list'): continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST): yield from places(child, (*path, (field, i if isinstance(value, list) else None)))


def changed(tree, path, how):
    "(source with this change, what it was, line)"
    tree = copy.deepcopy(tree)
    parent, node = None, tree
    for step in path: parent, node = node, getattr(node, step[0]) if step[1] is None else getattr(node, step[0])[step[1]]
    before, line = ast.unparse(node).split('\n')[0], getattr(node, 'lineno', 0)
    put = lambda new: setattr(parent, path[-1][0], new) if path[-1][1] is None else getattr(parent, path[-1][0]).__setitem__(path[-1][1], new)
    if how[0] == 'compare': node.ops[how[1]] = COMPARE[type(node.ops[how[1]])]()
    elif how[0] == 'arithmetic': node.op = ARITHMETIC[type(node.op)]()
    elif how[0] == 'bool': node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif how[0] == 'unary': put(node := node.operand)
    elif how[0] == 'constant': node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif how[0] == 'test': node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Attribute): node.attr = WORDS[node.attr]
    else: node.id = WORDS[node.id]
    return ast.unparse(ast.fix_missing_locations(tree)), f'line {line}: {before}  →  {ast.unparse(node).split(chr(10))[0]}'


def run_tests(package, name):
    "In a child: 0 when the tests and the notebook's cells pass with the modules in `package`."
    import pytest
    notebook, files = MODULES[name]
    sys.path.insert(0, str(package)); os.environ['PYTHONPATH'] = str(package)
    if pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '--hypothesis-seed=0', f'--basetemp={package}/pytest', *(str(ROOT/'tests'/f) for f in files)]): return 1
    import importlib, nbformat
    os.chdir(ROOT/'nbs')
    names = {'__name__': '__main__', 'display': lambda *a: None}
    for cell in nbformat.read(ROOT/'nbs'/f'{notebook}.ipynb', 4).cells:
        if cell.cell_type != 'code': continue
        if '#| export' in cell.source: names |= {k: v for k, v in vars(importlib.import_module(f'sage.{name}')).items() if not k.startswith('__')}
        elif '#| default_exp' not in cell.source: exec(re.sub(r'^\s*[%!].*$', '', cell.source, flags=re.M), names)
    return 0


def survives(source, name, seconds):
    "Whether no test notices this source of a module; (that, seconds)."
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT/'sage', f'{folder}/sage', ignore=shutil.ignore_patterns('weights', '__pycache__'))
        os.symlink(ROOT/'sage'/'weights', f'{folder}/sage/weights')
        if source is not None: Path(f'{folder}/sage/{name}.py').write_text(source)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setsid()
                nothing = os.open(os.devnull if source is not None else f'{tempfile.gettempdir()}/mutate-{name}.log', os.O_WRONLY | os.O_CREAT)
                os.dup2(nothing, 1); os.dup2(nothing, 2)
                code = run_tests(Path(folder), name)
            except BaseException: import traceback; traceback.print_exc()
            finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
        while time.monotonic() < start + seconds:
            got, status = os.waitpid(pid, os.WNOHANG)
            if got: return os.waitstatus_to_exitcode(status) == 0, time.monotonic() - start
            time.sleep(.02)
        os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
        return False, seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--modules', nargs='+', default=list(MODULES), choices=MODULES)
    p.add_argument('--sample', type=int, default=200, help='mutants in all; 0: every one')
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    sys.path[:] = [s for s in sys.path if Path(s or '.').resolve() != ROOT]
    import faiss, hypothesis, matplotlib.pyplot, networkx, numba, numpy, pandas, pyproj, pytest, scipy.spatial, sklearn.cluster, torch      # so that no child has to
    assert 'sage' not in sys.modules
    tried, killed, g = 0, 0, random.Random(args.seed)
    for name in args.modules:
        tree = ast.parse((ROOT/'sage'/f'{name}.py').read_text())
        passes, seconds = survives(None, name, 600)
        if not passes: sys.exit(f'{name}: its tests fail as they are; see {tempfile.gettempdir()}/mutate-{name}.log')
        every = list(places(tree))
        chosen = every if not args.sample else g.sample(every, min(len(every), -(-args.sample // len(args.modules))))
        mine = 0
        for place in chosen:
            source, what = changed(tree, *place)
            lives, _ = survives(source, name, 3 * seconds + 30)
            mine += not lives
            if lives: print(f'  survived  sage/{name}.py {what}', flush=True)
        tried += len(chosen); killed += mine
        print(f'{name}: {mine} of {len(chosen)} killed (of {len(every)} possible; tests take {seconds:.0f} s)', flush=True)
    print(f'mutants killed: {killed} of {tried} ({100 * killed / max(tried, 1):.0f} %)')


if __name__ == '__main__': main()
