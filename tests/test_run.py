"The run folder: what a crash, a careless user or a damaged copy may leave behind."
import json, os, shutil, signal, subprocess, sys, tempfile, time
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sage.core import MissingPath, UserError
from sage.places import make_table
from sage.lock import alone
from sage.checkpoint import read_header
from sage.lines import append_line, plain, read_lines
from sage.answers import answers_of, reduce_descriptors
from sage.run import Run, checkpoint_paths

def tables(n=5, seed=0):
    g = np.random.default_rng(seed)
    nodes = pd.DataFrame(dict(node=range(n), city='a', place=range(n), easting=g.random(n), northing=0., lat=0., lon=0., image='x.jpg', seed_score=g.random(n)))
    edges = pd.DataFrame(dict(src=[0], dst=[1], d_geo=[3.], d_vis=[.5], affinity=[-1.5], kind=['near'], state=['new']))
    cliques = pd.DataFrame(dict(batch=[0], slot=[0], place=[1], image=[2], rank=[0], mean_affinity=[-1.]))
    return nodes, edges, cliques, g.random((n, 4))

def some_answers(seed=0):
    g = np.random.default_rng(seed)
    return answers_of(g.random((6, 8)), [0, 1], [2, 3, 4, 5], [[0], []], np.sort(g.random((2, 3))), np.array([[1, 0, 2], [3, 2, 1]]))

@pytest.fixture
def run(tmp_path): return Run.create(tmp_path/'run', dict(seed=0))

def test_every_cut_of_the_metrics_reads(tmp_path):
    whole = b'{"epoch": 0, "loss": 1.5}\n{"epoch": 1, "loss": 0.25}\n'
    for cut in range(len(whole) + 1):
        path = tmp_path/'m.jsonl'
        path.write_bytes(whole[:cut])
        assert len(read_lines(path)) == whole[:cut].count(b'\n')
        append_line(path, dict(epoch=9))
        rows = read_lines(path)
        assert rows[-1] == dict(epoch=9) and len(rows) == whole[:cut].count(b'\n') + 1

def test_half_line_longer_than_a_block(tmp_path):
    path = tmp_path/'m.jsonl'
    path.write_bytes(b'{"a": 1}\n{"b": "' + b'x' * 200_000)
    append_line(path, dict(c=3))
    assert read_lines(path) == [dict(a=1), dict(c=3)]

@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=20))
def test_plain_is_always_json(value):
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)

def test_damaged_line_is_named(run):
    (run.path/'metrics.jsonl').write_bytes(b'{"epoch": 0}\n[1]\n')
    with pytest.raises(UserError, match='line 2'): run.metrics()

def test_create_refuses_and_open_explains(run, tmp_path):
    with pytest.raises(UserError, match='already'): Run.create(run.path, {})
    with pytest.raises(MissingPath, match='no such run folder'): Run(tmp_path/'none')
    (tmp_path/'empty').mkdir()
    with pytest.raises(UserError, match='config.json'): Run(tmp_path/'empty')
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='in the way'): Run.create(tmp_path/'file', {})
    (run.path/'config.json').write_text('{"seed":')
    with pytest.raises(UserError, match='not readable as JSON'): run.config
    (run.path/'config.json').unlink()
    with pytest.raises(MissingPath, match='config.json: no such file; the folder is no run, or was removed'): run.config

def test_metrics_kinds_and_nan(run):
    run.log(epoch=0, loss=float('nan'))
    run.log(kind='step', epoch=1, step=1, loss=np.float32(2))
    assert list(run.metrics().epoch) == [0] and run.metrics().loss.isna().all()
    assert list(run.metrics('step').loss) == [2.]

@pytest.mark.parametrize('name,read', [(f'{n}.parquet', n) for n in ('nodes', 'edges', 'cliques')] + [('descriptors.npy', 'descriptors'), ('attention.npz', 'attention'), ('answers.npz', 'answers')])
def test_truncated_file_is_named(run, name, read):
    run.write_epoch(0, *tables(), attention=dict(beta=np.zeros((2, 64))), answers=dict(town=some_answers()))
    path = run.path/'epochs'/'0000'/name
    size = path.stat().st_size
    for keep in (0, 7, size // 2, size - 9):
        data = path.read_bytes()
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match=name): getattr(run, read)(0)
        path.write_bytes(data)
    path.unlink()
    with pytest.raises(MissingPath, match=name): getattr(run, read)(0)

@given(st.lists(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=12), unique=True, max_size=3))
@settings(max_examples=20, deadline=None)
def test_answers_of_any_name_come_back(names):
    with tempfile.TemporaryDirectory() as folder:
        run, told = Run.create(folder + '/run', {}), {n: some_answers(i) for i, n in enumerate(names)}
        run.write_epoch(0, *tables(), answers=told)
        if not names: return
        back = run.answers(0)
        assert list(back) == names
        for n in names:
            for a, b in zip(told[n], back[n]): assert a.dtype == b.dtype and np.array_equal(a, b)

def test_answers_by_hand_and_absent(run):
    run.write_epoch(0, *tables(), answers=dict(town=some_answers()))
    run.write_epoch(1, *tables())
    a = run.answers(0)['town']
    assert a.rows.tolist() == [[3, 2, 4], [5, 4, 3]] and a.right.tolist() == [[False, True, False], [False] * 3] and a.positives.tolist() == [1, 0]
    with pytest.raises(MissingPath, match='before answers were kept'): run.answers(1)
    with pytest.raises(UserError, match='no epoch 7'): run.answers(7)
    path = run.path/'epochs'/'0000'/'answers.npz'
    np.savez(path, names=np.array(['town']))
    with pytest.raises(UserError, match='damaged, no array'): run.answers(0)

@pytest.mark.parametrize('shape', [(1, 5), (7, 3), (200, 90), (90, 700), (4, 1)])
def test_reduced_descriptors_are_the_principal_components(shape):
    g = np.random.default_rng(0)
    x = (g.normal(size=shape) * np.geomspace(9, .01, shape[1]) + 3).astype(np.float32)
    dim = min(64, *shape)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    ours, theirs = reduce_descriptors(x), (u * s)[:, :dim]
    assert ours.shape == (len(x), dim) and ours.dtype == np.float32
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-3 * max(s[0], 1)**2)
    assert np.isfinite(reduce_descriptors(np.ones(shape))).all()

def test_no_pickle(run):
    run.write_epoch(0, *tables())
    np.save(run.path/'epochs'/'0000'/'descriptors.npy', np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError): run.descriptors(0)

def test_best_needs_a_checkpoint(run):
    assert run.best() is None
    for e, r in enumerate((40., 70., 70.)): run.log(epoch=e, **{'a/recall@1': r, 'b/recall@1': -r})
    assert run.best() is None
    for e in range(3): checkpoint_paths(run, e)[0].write_bytes(b'')
    assert run.best() == 1 and run.best('b') == 0 and run.best(k=5) is None

def test_truncate(run):
    for e in range(3):
        run.log(kind='step', epoch=e, step=e)
        run.log(epoch=e)
        run.write_epoch(e, *tables(seed=e))
        for p in checkpoint_paths(run, e): p.write_bytes(b'')
    keep = (run.path/'notes.txt', run.path/'.DS_Store', run.path/'epochs'/'.hidden')
    for p in keep: p.write_text('mine')
    (run.path/'checkpoints'/'.0002.resume-0123abcd.safetensors').write_bytes(b'half')
    run.truncate(1)
    assert run.epochs() == [0, 1] and run.resumable() == [0, 1] and set(run.metrics('').epoch) == {0, 1}
    assert all(p.exists() for p in keep) and not list((run.path/'checkpoints').glob('.0002*'))

def test_names_that_look_like_numbers(run):
    "Digits that Python counts as such and cannot read, and folders that somebody put there."
    run.write_epoch(0, *tables())
    checkpoint_paths(run, 0)[0].write_bytes(b'')
    for name in ('²', '1²', '٣'): (run.path/'epochs'/name).mkdir(); (run.path/'checkpoints'/f'1{name}.safetensors').touch()
    assert run.epochs() == [0] and list(run.checkpoints()) == [0]

def test_an_epoch_is_removed_at_once(run, monkeypatch):
    "A kill while a folder is deleted leaves nothing that reads as an epoch, and what it leaves is swept."
    run.write_epoch(0, *tables())
    run.write_epoch(1, *tables())
    def killed(path): raise KeyboardInterrupt
    monkeypatch.setattr(shutil, 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt): run.truncate(-1)
    monkeypatch.undo()
    left = run.epochs()
    assert left == [1] and len(run.nodes(1)) == 5 and len(list((run.path/'epochs').glob('.0000-*'))) == 1
    run.truncate(-1)
    assert run.epochs() == [] and not list((run.path/'epochs').iterdir())

def test_a_lock_from_another_container(tmp_path, monkeypatch):
    "Two containers may share the host's name, and neither sees the other's processes."
    from sage import lock as module
    theirs = dict(pid=2**22 + 1, host=os.uname().nodename, space='pid:[1]', started='x', since='2026-01-02 03:04')
    (tmp_path/'lock.json').write_text(json.dumps(theirs))
    if not module._space(): pytest.skip('this system counts processes in one space')
    with pytest.raises(UserError, match='if it has ended, remove'):
        with alone(tmp_path): pass
    (tmp_path/'lock.json').write_text(json.dumps(theirs | dict(space=module._space())))   # here, and gone
    with alone(tmp_path): pass

def test_an_owner_that_may_not_be_looked_at_keeps_its_lock(tmp_path, monkeypatch):
    "A system may hide when another user's process began, or the process itself (hidepid)."
    from sage import lock as module
    if not module._space(): pytest.skip('no /proc on this system')
    read = module.Path.read_text
    for hidden in (PermissionError, FileNotFoundError):
        with alone(tmp_path):
            monkeypatch.setattr(module.Path, 'read_text', lambda p, *a, **k: (_ for _ in ()).throw(hidden(13, 'hidden')) if str(p).startswith('/proc/') and str(p).endswith('/stat') else read(p, *a, **k))
            with pytest.raises(UserError, match='has been writing this run'):
                with alone(tmp_path): pass
            monkeypatch.undo()

def changed(path, **columns): # columns of a parquet file, `...` removes one
    df = pd.read_parquet(path)
    for c, v in columns.items(): df = df.drop(columns=c) if v is ... else df.assign(**{c: v})
    df.to_parquet(path)

@pytest.mark.parametrize('name, columns, says', [(n, {c: v}, c) for n, c, values in (('nodes', 'image', (..., None, 7, 7.5)), ('nodes', 'city', (..., 3)), ('nodes', 'place', (..., 'x', 1.5, None)), ('nodes', 'node', (..., -1, 2**40)), ('nodes', 'lat', ('x', True)), ('nodes', 'seed_score', (..., 'x')),
        ('edges', 'src', (..., -1, .5, 'x')), ('edges', 'state', (..., 1)), ('edges', 'affinity', ('x', None)), ('cliques', 'batch', (..., 'x')), ('cliques', 'rank', (-1, None)), ('cliques', 'node', ('x', -1)), ('cliques', 'city', (5,))) for v in values])
def test_a_record_that_is_another_table(run, name, columns, says):
    run.write_epoch(0, *tables())
    assert len(getattr(run, name)(0))
    changed(run.path/'epochs'/'0000'/f'{name}.parquet', **columns)
    with pytest.raises(UserError, match=f"{name}.parquet: damaged, .*'{says}'"): getattr(run, name)(0)

def test_a_record_whose_rows_are_named_or_none(run):
    "Rows go by their number, whatever a file calls them; a table without rows has the columns all the same."
    run.write_epoch(0, *tables())
    folder = run.path/'epochs'/'0000'
    pd.read_parquet(folder/'nodes.parquet').assign(i=7).set_index('i').to_parquet(folder/'nodes.parquet')
    assert run.nodes(0).index.tolist() == [0, 1, 2, 3, 4] and run.nodes(0).node.tolist() == [0, 1, 2, 3, 4]
    pd.DataFrame().to_parquet(folder/'edges.parquet')
    assert len(run.edges(0)) == 0 and {'src', 'dst', 'state'} <= {*run.edges(0)}

@pytest.mark.parametrize('column, value', [(c, v) for c, values in (('image', (..., None, 7)), ('role', (..., None, 'x')), ('city', (..., 1)), ('zone', (...,)), ('place', ('x', 1.5)), ('easting', (..., 'x', None, np.inf)), ('heading', ('x',))) for v in values])
def test_a_table_that_is_another(tmp_path, column, value):
    places = make_table(image=['a.jpg', 'b.jpg'], place=[0, 1], easting=0., northing=0.)
    run = Run.create(tmp_path/'run', {}, dict(mined=places))
    pd.testing.assert_frame_equal(run.table(), places)
    changed(run.path/'tables'/'00.parquet', **{column: value})
    with pytest.raises(UserError, match=f'00.parquet: .*{column}'): run.table()

@pytest.mark.parametrize('field, value', [('queries', np.array([0, 6])), ('queries', np.array([[0, 1]])), ('rows', np.full((2, 3), 10**6)), ('rows', np.full((2, 3), -1)), ('rows', np.zeros((1, 3), int)), ('rows', np.zeros((2, 0), int)), ('rows', np.zeros(2, int)), ('right', np.zeros((2, 3))),
                                          ('distances', np.full((2, 3), 'x')), ('positives', np.zeros(3, int)), ('reduced', np.zeros((0, 4))), ('names', np.array(['town', 'more']))])
def test_answers_that_do_not_fit(run, field, value):
    run.write_epoch(0, *tables(), answers=dict(town=some_answers()))
    path = run.path/'epochs'/'0000'/'answers.npz'
    with np.load(path) as z: arrays = dict(z)
    np.savez(path, **arrays | {field if field == 'names' else f'{field}_0': value})
    with pytest.raises(UserError, match='answers.npz: damaged'): run.answers(0)

@pytest.mark.parametrize('array', [np.zeros(5), np.zeros((5, 2), int), np.array('x'), np.zeros((2, 2, 2))], ids=str)
def test_descriptors_that_are_none(run, array):
    run.write_epoch(0, *tables())
    np.save(run.path/'epochs'/'0000'/'descriptors.npy', array)
    with pytest.raises(UserError, match='descriptors.npy: damaged'): run.descriptors(0)

@pytest.mark.parametrize('value', ['"<a href=x>1</a>"', '[1]', '{"a": 1}', '1' + '0'*40])
def test_a_metric_that_is_no_number(run, value):
    (run.path/'metrics.jsonl').write_text('{"kind": "step", "epoch": 0, "loss": 1.5, "lr": null}\n{"epoch": 1, "\x7floss": %s}\n' % value)
    with pytest.raises(UserError, match=r'line 2: its \\x7floss is no number'): run.metrics()


KILLED = '''
import sys, numpy as np, pandas as pd
sys.path[:0] = {path!r}
from test_run import tables
from sage.run import Run
run = Run({run!r})
print('go', flush=True)
for e in range(10_000):
    run.write_epoch(e, *tables(2000, e)); run.log(epoch=e, loss=1/(e+1))
'''

def test_kill_while_writing(run):
    "SIGKILL at a few moments: whatever is listed opens, the metrics read, and writing goes on."
    here = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    for wait in (.01, .1, .3):
        p = subprocess.Popen([sys.executable, '-c', KILLED.format(path=here, run=str(run.path))], stdout=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(wait)
        p.send_signal(signal.SIGKILL); p.wait()
        p.stdout.close()
        epochs = run.epochs()
        assert epochs == list(range(len(epochs)))
        for e in epochs[-2:]: assert len(run.nodes(e)) == 2000 and run.descriptors(e).shape == (2000, 4)
        assert len(epochs) - len(run.metrics()) in (0, 1)
        run.truncate(-1)
        assert not run.epochs() and not list((run.path/'epochs').iterdir())

def bomb(path, size=1_500_000_000, told=None):
    "An .npz of zeros, one array of `size` bytes in 1.5 MB; `told`: what the zip says its size is."
    import io, struct, zipfile
    head = io.BytesIO(); np.lib.format.write_array_header_1_0(head, dict(descr='|u1', fortran_order=False, shape=(size,)))
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('beta.npy', 'w', force_zip64=True) as f:
            f.write(head.getvalue())
            for _ in range(size // 10_000_000): f.write(bytes(10_000_000))
    if told is not None:
        data = bytearray(path.read_bytes()); at = data.rindex(b'PK\x01\x02')
        data[at + 24:at + 28] = struct.pack('<I', told); path.write_bytes(data)

PEAK = """
import resource, sys
from pathlib import Path
from sage.core import UserError
from sage.run import Run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: getattr(Run(sys.argv[1]), sys.argv[2])()
except UserError as e: print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

def refused(run, what, root):
    "(what is said, KB of memory that it took) of reading a part of a run."
    done = subprocess.run([sys.executable, '-c', PEAK, str(run.path), what], capture_output=True, text=True, cwd=root, timeout=120)
    assert not done.returncode, done.stderr
    said, _, took = done.stdout.strip().rpartition('\n')
    return said, int(took)

def test_small_files_that_would_fill_the_memory(run, root):
    "Zeros in attention.npz, one name for many rows in a table: refused before the memory is taken."
    import pyarrow as pa, pyarrow.parquet as pq
    folder = run.write_epoch(0, *tables())
    bomb(folder/'attention.npz')
    said, took = refused(run, 'attention', root)
    assert (folder/'attention.npz').stat().st_size < 2e6 and 'attention.npz: 1,4' in said and 'would fill 1.4 GiB of memory, more than the 1.0 GiB such a file may; copy the run again' in said and took < 100_000, (said, took)
    bomb(folder/'attention.npz', told=5000)
    said, took = refused(run, 'attention', root)
    assert 'attention.npz' in said and 'copy the run again' in said and took < 100_000
    n = 200_000_000 // 8
    for table in (dict(node=pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int8)), pa.array(['x'*1000]))), {f'c{i}': pa.array(np.zeros(n, np.int64)) for i in range(6)}):
        pq.write_table(pa.table(table), folder/'nodes.parquet')
        said, took = refused(run, 'nodes', root)
        assert 'nodes.parquet' in said and 'of memory, more than the 1.0 GiB such a file may; copy the run again' in said and took < 600_000, (said, took)

def test_a_header_as_long_as_a_film(run, root):
    "Of the version in which numpy's header may be 4 GiB."
    import struct, zipfile
    path = run.write_epoch(0, *tables())/'attention.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z, z.open('beta.npy', 'w', force_zip64=True) as f:
        f.write(b'\x93NUMPY\x02\x00' + struct.pack('<I', 600_000_000))
        for _ in range(60): f.write(b' '*10_000_000)
    said, took = refused(run, 'attention', root)
    assert 'attention.npz: damaged' in said and took < 100_000, (said, took)

def test_columns_that_become_an_object_a_row(run, root):
    "Ten million of them lie in 50 KB: kinds that no table has, and lists of nothing."
    import pyarrow as pa, pyarrow.parquet as pq
    path, n = run.write_epoch(0, *tables())/'nodes.parquet', 10**7
    zeros, some = pa.array(np.zeros(n, np.int8)), pa.array(np.zeros(1000, np.int8))
    for column, says in ((pa.StructArray.from_arrays([zeros], ['a']), 'damaged'), (pa.ListArray.from_arrays(pa.array(np.zeros(n + 1, np.int32)), some), 'would fill 1.3 GiB of memory'), (zeros.cast(pa.decimal128(5)), 'a column of decimal128'), (zeros.cast(pa.int32()).cast(pa.date32()), 'a column of date32')):
        pq.write_table(pa.table(dict(node=column)), path)
        said, took = refused(run, 'nodes', root)
        assert path.stat().st_size < 100_000 and 'nodes.parquet' in said and says in said and took < 100_000, (said, took)

def test_a_table_of_a_film_is_read(tmp_path, monkeypatch):
    "Where rows repeat, a table packs to a thirtieth: that alone is no reason to refuse one."
    from sage import core
    t = make_table(image=[f'/data/films/of/a/street/with/a/long/name/2026-11-28/{i//900:04d}/{i%900:06d}.jpg' for i in range(90_000)], city='a town', place=np.arange(90_000)//900, easting=np.repeat(np.arange(3000.), 30), northing=0., zone='33N')
    run = Run.create(tmp_path/'run', {}, dict(mined=t))
    size = next((run.path/'tables').iterdir()).stat().st_size
    monkeypatch.setattr(core, 'MOST', 0)
    assert t.memory_usage(deep=True).sum() > 20*size and run.table('mined').equals(t)
    monkeypatch.setattr(core, 'FACTOR', 20)
    with pytest.raises(UserError, match='of memory'): run.table('mined')

def test_what_lies_about_its_size(run, tmp_path):
    "The zip says little, or the array much: neither is unpacked further than is allowed."
    path = run.write_epoch(0, *tables())/'attention.npz'
    bomb(path, 10_000_000, told=200)
    with pytest.raises(UserError, match='attention.npz: damaged'): run.attention()
    np.savez_compressed(path, a=np.zeros((3, 4)), b=np.arange(5)); assert [v.shape for v in run.attention().values()] == [(3, 4), (5,)]
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match='attention.npz: damaged'): run.attention()

def test_lists_of_numbers_in_a_table(run, tmp_path):
    "As the cliques have them (affinities, candidates); many in a small file are refused, and lists of texts, of which there are none."
    import pyarrow as pa, pyarrow.parquet as pq
    *_, cliques, descriptors = whole = tables()
    path = run.write_epoch(0, *whole[:2], cliques.assign(affinities=[np.arange(3.)]), descriptors)/'cliques.parquet'
    assert run.cliques().affinities[0].tolist() == [0., 1., 2.]
    n = 2**27 + 1
    pq.write_table(pa.table(dict(a=pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), pa.array(np.zeros(n, np.int8))))), path)
    with pytest.raises(UserError, match='would fill 1.0 GiB of memory'): run.cliques()
    pq.write_table(pa.table(dict(a=pa.array([['x'], ['y']]))), path)
    with pytest.raises(UserError, match='a column of list<.*: string>'): run.cliques()

@pytest.mark.parametrize('name, read', [('metrics.jsonl', lambda r: r.metrics()), ('epochs/0000/nodes.parquet', lambda r: r.nodes()), ('epochs/0000/edges.parquet', lambda r: r.edges()), ('epochs/0000/attention.npz', lambda r: r.attention()),
    ('epochs/0000/answers.npz', lambda r: r.answers()), ('epochs/0000/descriptors.npy', lambda r: r.descriptors()), ('config.json', lambda r: r.config), ('tables/00.parquet', lambda r: r.table())])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device'])
def test_what_is_no_file(tmp_path, name, read, kind):
    "A pipe would let the reader wait for ever."
    run = Run.create(tmp_path/'run', {}, dict(mined=make_table(image=['a.jpg'], place=0, easting=0., northing=0.)))
    run.write_epoch(0, *tables(), attention=dict(beta=np.zeros(3)), answers=dict(a=some_answers())); run.log(epoch=0)
    path = run.path/name; path.unlink()
    dict(pipe=os.mkfifo, folder=os.mkdir, device=lambda p: os.symlink('/dev/zero', p))[kind](path)
    with pytest.raises(UserError, match='is in the place of this file|is not a file'): read(run)
    path.rmdir() if kind == 'folder' else path.unlink()

@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device'])
def test_what_is_no_lock_and_no_pause(run, kind):
    from sage.resume import last_step
    for path, use in ((run.path/'lock.json', lambda: alone(run.path).__enter__()), (run.path/'checkpoints'/'0000.pause.safetensors', lambda: last_step(run, 0)), (run.path/'checkpoints'/'0002.safetensors', lambda: read_header(run.path/'checkpoints'/'0002.safetensors'))):
        path.parent.mkdir(exist_ok=True)
        dict(pipe=os.mkfifo, folder=os.mkdir, device=lambda p: os.symlink('/dev/zero', p))[kind](path)
        with pytest.raises(UserError, match='is in the place of this file'): use()
        path.rmdir() if kind == 'folder' else path.unlink()

def test_a_link_to_a_file_is_followed(run, tmp_path):
    run.log(epoch=0); (run.path/'metrics.jsonl').rename(tmp_path/'m'); (run.path/'metrics.jsonl').symlink_to(tmp_path/'m')
    assert len(run.metrics()) == 1

TURNED = '''
import sys
from pathlib import Path
from sage.core import UserError
from sage.records import read_table
path = Path(sys.argv[1]); data = path.read_bytes()
start, said = len(data) - 8 - int.from_bytes(data[-8:-4], 'little'), 0
for i in range(start, len(data)):
    for bit in (1, 2, 16):
        path.write_bytes(data[:i] + bytes([data[i] ^ bit]) + data[i + 1:])
        try: read_table(path)
        except UserError: said += 1
print(len(data) - start, said)
'''

def test_a_turned_bit_in_the_directory_of_a_table_does_not_end_the_process(run):
    "pyarrow's own view of a column's directory does: an error of C++ that nobody catches."
    path = run.write_epoch(0, *tables())/'cliques.parquet'
    pd.read_parquet(path).assign(affinities=[[.5, 1.]]*len(pd.read_parquet(path))).to_parquet(path, index=False)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', TURNED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tried, said = map(int, done.stdout.split())
    assert tried > 1000 and said > tried, done.stdout

@pytest.mark.parametrize('rows, size', [(0, 10), (1, 10), (1000, 10), (1000, 300)])
def test_the_directory_of_a_table_is_what_pyarrow_says(tmp_path, rows, size):
    import pyarrow as pa, pyarrow.parquet as pq
    from sage.records import _directory
    pq.write_table(pa.table(dict(a=np.arange(rows), t=[f'{i % 7}' for i in range(rows)], l=pa.array([[0]*(i % 4) for i in range(rows)], pa.list_(pa.int32())), n=pa.array([None]*rows, pa.float64()))), tmp_path/'t.parquet', row_group_size=size)
    told = pq.ParquetFile(tmp_path/'t.parquet').metadata
    groups = [told.row_group(i) for i in range(told.num_row_groups)]
    found = _directory(tmp_path/'t.parquet')
    assert [(n, [numbers for numbers, _ in columns]) for n, columns in found] == [(g.num_rows, [g.column(j).num_values for j in range(told.num_columns)]) for g in groups]
    sizes = [(unpacked, g.column(j).total_uncompressed_size) for g, (_, columns) in zip(groups, found) for j, (_, unpacked) in enumerate(columns)]
    assert all(told - 200 < unpacked <= told for unpacked, told in sizes) and (rows < 1000 or size < 300 or all(u > 0 for u, _ in sizes))        # less by the pages' own headers

def test_a_directory_that_arrow_would_read_otherwise_is_refused(tmp_path):
    "Arrow takes a field's number for one of 16 bits, and the elements of a list for those it expects, whatever is said of them."
    import io
    from sage.records import _thrift
    field = lambda number, kind: bytes([kind]) + bytes([(v := 2*number) & 127 | 128, v >> 7 & 127 | 128, v >> 14])       # in its long form
    for bad in (field(65540, 6) + b'\x02\x00', b'\x15\x02\x05\x02\x02\x00', b'\x05\x00\x02\x00', b'\x05\x01\x02\x00'):
        with pytest.raises(ValueError, match='fields out of order'): _thrift(io.BytesIO(bad), 12)
    assert _thrift(io.BytesIO(b'\x29\x15\x04\x00'), 12, (4, 1, 3)) == {(2, 9): [2]}
    for bad in (b'\x29\x18\x04aaaa\x00', b'\x29\x11\x01\x00', b'\x2a\x15\x04\x00', b'\xf9\x1c\x00\x00'):
        with pytest.raises(ValueError, match='in its directory'): _thrift(io.BytesIO(bad), 12, (4, 1, 3))

def test_a_column_whose_pages_hold_more_than_is_told_is_refused(run):
    "Arrow reads a list to the end of its page, whatever the directory says."
    import pyarrow as pa, pyarrow.parquet as pq
    path, n = run.write_epoch(0, *tables())/'cliques.parquet', 100_000
    pq.write_table(pa.table(dict(a=pa.array([[0]*n], pa.list_(pa.int8())))), path)
    data, many, one = path.read_bytes(), b'\xc0\x9a\x0c', b'\x82\x80\x00'                  # 100,000 and 1, zigzagged, in three bytes
    start = len(data) - 8 - int.from_bytes(data[-8:-4], 'little')
    assert data[start:].count(many) and len(pq.read_table(path)['a'][0]) == n
    for lie in (data[:start] + data[start:].replace(many, one), data[:start].replace(many, one) + data[start:]):
        path.write_bytes(lie)
        with pytest.raises(UserError, match='its pages hold other numbers than its directory says'): run.cliques()

def test_tables_that_unpack_to_much_are_refused_before_they_are_read(run, tmp_path):
    "A long text a group; two columns of one name, of which pyarrow would unpack one as a whole."
    import pyarrow as pa, pyarrow.parquet as pq
    path = run.write_epoch(0, *tables())/'nodes.parquet'
    schema = pa.schema([('t', pa.string())])
    with pq.ParquetWriter(path, schema, compression='zstd') as w:
        for _ in range(8): w.write_table(pa.table(dict(t=['x' * 150_000_000]), schema))
    assert path.stat().st_size < 10**6
    with pytest.raises(UserError, match='would fill 1.* GiB of memory|would fill 2.* GiB of memory'): run.nodes()
    few = pa.array(['x' * 100_000]).take(pa.array([0]*1000))
    pq.write_table(pa.Table.from_arrays([few, pa.array(['y']*1000)], names=['t', 't']), path)
    with pytest.raises(UserError, match='a column occurs twice'): run.nodes()
