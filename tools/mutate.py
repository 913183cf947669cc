"""Are the tests any good? Change one thing in a module (a < into a <=, a 1 into a 2, an and into an or …) and see whether a test notices.

    python tools/mutate.py                          # what `make torture` runs: 60 mutants of each module, the same ones every time
    python tools/mutate.py --modules geo --sample 0 # every mutant of one module

Tests are those of the module in tests/ and the cells of its notebook. A mutant is killed when one of them fails or does not come to an end. Survivors are printed with the reason that tests/faults/survivors.toml gives; one without a reason ends the tool with 1.
Tools for this (mutmut, cosmic-ray) start an interpreter for each mutant and know no notebooks; here a process is forked that has already imported everything but the project, and machine code is kept."""
import argparse, ast, copy, json, os, random, re, resource, shutil, signal, sys, tempfile, time, tomllib
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = ROOT/'tests'/'faults'/'survivors.toml'      # mutants that survive, and why
MODULES = dict(geo=('01_geo', ['test_edges.py', 'test_geo.py']), graph=('20_graph', ['test_edges.py', 'test_graph.py']), clique=('21_clique', ['test_edges.py', 'test_clique.py']), batches=('22_batches', ['test_edges_batches.py', 'test_batches.py']),
               retrieval=('31_retrieval', ['test_edges.py', 'test_retrieval.py', 'test_recall_reference.py']))
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
SIGNS = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/', ast.FloorDiv: '//', ast.Mod: '%', ast.Pow: '**', ast.BitAnd: '&', ast.BitOr: '|'}
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


def at(tree, path):
    "(the node above, the node) that a path leads to."
    parent, node = None, tree
    for field, i in path: parent, node = node, getattr(node, field) if i is None else getattr(node, field)[i]
    return parent, node


def altered(node, how):
    "The node with its change, and the node whose text it replaces."
    new = copy.deepcopy(node)
    if how[0] == 'compare': new.ops[how[1]] = COMPARE[type(new.ops[how[1]])]()
    elif how[0] == 'arithmetic': new.op = ARITHMETIC[type(new.op)]()
    elif how[0] == 'bool': new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
    elif how[0] == 'unary': new = new.operand
    elif how[0] == 'constant': new.value = not new.value if isinstance(new.value, bool) else new.value + 1
    elif how[0] == 'test': return ast.UnaryOp(ast.Not(), new.test), node.test
    elif isinstance(new, ast.Attribute): new.attr = WORDS[new.attr]
    else: new.id = WORDS[new.id]
    return new, node


def changed(source, tree, path, how):
    "(the source with this change and no line moved, the line it is in, what → what)"
    new, old = altered(at(tree, path)[1], how)
    lines = source.encode().splitlines(keepends=True)
    begin, end = (sum(map(len, lines[:row - 1])) + column for row, column in ((old.lineno, old.col_offset), (old.end_lineno, old.end_col_offset)))
    inner = new.value if isinstance(new, ast.AugAssign) else new
    text = f'({ast.unparse(inner)}{chr(10)*(old.end_lineno - old.lineno)})'
    if inner is not new: text = f'{ast.unparse(new.target)} {SIGNS[type(new.op)]}= {text}'
    data = source.encode()
    return (data[:begin] + text.encode() + data[end:]).decode(), source.splitlines()[old.lineno - 1].strip(), f'{ast.unparse(old)} → {ast.unparse(new)}'


def mutants(source):
    "(source, line, what → what, function it lies in) of every change; a change that a line has twice is numbered."
    tree, seen = ast.parse(source), {}
    for path, how in places(tree):
        changed_source, line, what = changed(source, tree, path, how)
        n = seen[line, what] = seen.get((line, what), 0) + 1
        function = getattr(at(tree, path[:1])[1], 'name', '')
        yield changed_source, line, what if n == 1 else f'{what} ({n})', function


def callers(source, function):
    "The function and all that lead to it, by name."
    uses = {f.name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} for f in ast.parse(source).body if isinstance(f, (ast.FunctionDef, ast.ClassDef))}
    found, more = set(), {function}
    while more: found |= more; more = {f for f, names in uses.items() if names & found} - found
    return found


class Order:
    "Quick tests first, by the times of the unchanged module's. A test that uses three times its own, and a minute to make machine code, will not come to an end: a signal ends the process."
    def __init__(self, path): self.path, self.took, self.known = path, {}, json.loads(path.read_text()) if path.exists() else {}
    def pytest_runtest_logreport(self, report): self.took[report.nodeid] = self.took.get(report.nodeid, 0) + report.duration
    def pytest_sessionfinish(self): signal.setitimer(signal.ITIMER_PROF, 0); self.path.exists() or self.path.write_text(json.dumps(self.took))
    def pytest_collection_modifyitems(self, items): items.sort(key=lambda i: self.known.get(i.nodeid, 0))
    def pytest_runtest_logstart(self, nodeid):
        if self.known: signal.setitimer(signal.ITIMER_PROF, 3*self.known.get(nodeid, 60) + 60)


def run_tests(package, name, times):
    "In a child: 0 when the tests and the notebook's cells pass with the modules in `package`."
    import pytest
    notebook, files = MODULES[name]
    sys.path.insert(0, str(package)); os.environ['PYTHONPATH'] = str(package)
    if pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '--hypothesis-seed=0', '--durations=15', f'--basetemp={package}/pytest', *(str(ROOT/'tests'/f) for f in files)], plugins=[Order(times)]): return 1
    import importlib, nbformat
    os.chdir(ROOT/'nbs')
    names = {'__name__': '__main__', 'display': lambda *a: None}
    for cell in nbformat.read(ROOT/'nbs'/f'{notebook}.ipynb', 4).cells:
        if cell.cell_type != 'code' or '#| slow' in cell.source: continue
        if '#| export' in cell.source: names |= {k: v for k, v in vars(importlib.import_module(f'sage.{name}')).items() if not k.startswith('__')}
        elif '#| default_exp' not in cell.source: exec(re.sub(r'^\s*[%!].*$', '', cell.source, flags=re.M), names)
    return 0


class Bench:
    "Tries sources of one module. Machine code that numba made of the unchanged module is kept; of a change, that of its function and of what calls it is made anew."
    def __init__(self, name, folder):
        self.name, self.store, self.log = name, Path(folder), Path(tempfile.gettempdir())/f'mutate-{name}.log'
        self.source = (ROOT/'sage'/f'{name}.py').read_text()
        self.cpu = 600
        self.passes, self.cpu, self.seconds = self.run(self.source)

    def lay(self, folder, source, function):
        "A copy of the package with this source, and with what numba may keep; all sources as old and as long as the unchanged ones, since numba asks for that."
        shutil.copytree(ROOT/'sage', f'{folder}/sage', ignore=shutil.ignore_patterns('weights', '__pycache__'))
        os.symlink(ROOT/'sage'/'weights', f'{folder}/sage/weights')
        path = Path(f'{folder}/sage/{self.name}.py')
        path.write_bytes(source.encode() + b'#'*(len(self.source.encode()) + 5000 - len(source.encode())))
        os.utime(path, (10**9, 10**9))
        anew = callers(self.source, function) if function else set()
        (path.parent/'__pycache__').mkdir()
        for p in self.store.glob('*.nb?'):
            module, rest = p.name.split('.', 1)
            if module != self.name or re.split(r'[-.]', rest)[0] not in anew: shutil.copy2(p, path.parent/'__pycache__')

    def run(self, source, function=''):
        "(whether no test notices this source, seconds of processor, seconds)."
        start, unchanged = time.monotonic(), source == self.source
        with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as folder:
            self.lay(folder, source, function)
            pid = os.fork()
            if not pid: self.child(folder, unchanged)
            _, status, used = os.wait4(pid, 0)
            if unchanged:
                for p in Path(folder, 'sage', '__pycache__').glob('*.nb?'): shutil.copy2(p, self.store)
        return os.waitstatus_to_exitcode(status) == 0, used.ru_utime + used.ru_stime, time.monotonic() - start

    def child(self, folder, unchanged):
        "Run the tests and end; by a signal where they use far more processor than they should, or wait for something that never comes."
        code = 1
        try:
            limit = int(3*self.cpu + 60)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)); signal.alarm(30*limit)
            out = os.open(self.log if unchanged else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1); os.dup2(out, 2)
            sys.dont_write_bytecode, sys.pycache_prefix = False, str(self.store/'pyc')     # tests are compiled once; sources have another folder each time
            code = run_tests(Path(folder), self.name, self.store/'times.json')
        except BaseException: import traceback; traceback.print_exc()
        finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def explained():
    "{(module, line, change): why it survives} of the mutants that no test can or need kill."
    return {(m['module'], m['line'], m['change']): m['why'] for m in tomllib.loads(SURVIVORS.read_text()).get('mutant', [])} if SURVIVORS.exists() else {}


def attack(name, count, seed):
    "(killed, tried, survivors without a reason) of `count` mutants of a module, or of all; tells of each survivor."
    reasons = explained()
    with tempfile.TemporaryDirectory() as store:
        bench = Bench(name, store)
        if not bench.passes: sys.exit(f'{name}: its tests fail as they are; see {bench.log}')
        every = list(mutants(bench.source))
        for key in [k for k in reasons if k[0] == name and k[1:] not in {m[1:3] for m in every}]: sys.exit(f'{SURVIVORS}: {name} has no such mutant: {key[1]!r}, {key[2]!r}')
        random.Random(f'{seed} {name}').shuffle(every)
        chosen = every[:count or None]
        killed = unknown = 0
        for source, line, what, function in chosen:
            if not bench.run(source, function)[0]: killed += 1; continue
            why = reasons.get((name, line, what))
            unknown += not why
            print(f'  survived  {name}: {what}\n            {line}\n            {why or "no reason known"}', flush=True)
    print(f'{name}: {killed} of {len(chosen)} killed, {100*killed/len(chosen):.0f} % (of {len(every)} possible); {len(chosen) - killed - unknown} survivors with a reason, {unknown} without; tests take {bench.seconds:.0f} s', flush=True)
    return killed, len(chosen), unknown


def verdict(counts, least):
    "What is wrong with {module: (killed, tried, survivors without a reason)}; '' where nothing is."
    few, unknown = [name for name, (k, n, _) in counts.items() if 100*k < least*n], [f'{u} of {name}' for name, (_, _, u) in counts.items() if u]
    return '; '.join([f'fewer than {least:g} % killed: {", ".join(few)}']*bool(few) + [f'survivors without a reason in {SURVIVORS.relative_to(ROOT)}: {", ".join(unknown)}']*bool(unknown))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--modules', nargs='+', default=list(MODULES), choices=MODULES)
    p.add_argument('--sample', type=int, default=60, help='mutants of each module; 0: every one')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--least', type=float, default=85., help='percent that must be killed in each module')
    args = p.parse_args()
    sys.path[:] = [s for s in sys.path if Path(s or '.').resolve() != ROOT]
    import faiss, hypothesis, matplotlib.pyplot, networkx, numba, numpy, pandas, PIL.Image, plotly.graph_objects, pyproj, pytest, scipy.spatial, sklearn.cluster, timm, torch, torchvision      # so that no child has to
    assert 'sage' not in sys.modules
    counts = {name: attack(name, args.sample, args.seed) for name in args.modules}
    killed, tried = (sum(c[i] for c in counts.values()) for i in (0, 1))
    print(f'mutants killed: {killed} of {tried} ({100*killed/max(tried, 1):.0f} %)')
    if wrong := verdict(counts, args.least): sys.exit(wrong)


if __name__ == '__main__': main()
