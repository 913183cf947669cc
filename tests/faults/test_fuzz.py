"""Bytes that nobody meant: whatever is read gives a result or one sentence. `make torture` runs more than 100,000 cases, a plain run some thousand."""
import bz2, copy, gzip, json, lzma, math, os, resource, signal, struct, zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.io import savemat

from sage.checkpoint import read_checked, read_header
from sage.cli import summary
from sage.describe import image_list
from sage.core import UserError
from sage.export import geojson, recorded, recorded_answers, write_parquet
from sage.formats import read_gsv, read_msls, utm_fields, write_gsv, write_msls
from sage.images import load_image
from sage.learner import load_state, save_state
from sage.model import build_sage, create_sage, load_official, load_sage, save_sage
from sage.official import official_name
from sage.photos import numbers, photo_label, read_csv, read_photos, whole_numbers
from sage.places import check_table, make_table
from sage.protocols import folder_protocol, load_benchmark
from sage.resume import fingerprint
from sage.lines import append_line, read_lines
from sage.run import Run
from sage.viz.toy import toy_run
from sage.photo_map import read_map
from sage.where import ask, own_rows, update_map

MUCH = bool(os.environ.get('SAGE_TORTURE'))
SHARES = dict(names=25_000, exif=30_000, csv=14_000, run=14_000, checkpoints=12_000, headers=4_000, sets=5_000, index=2_500, tables=2_500, states=2_500)       # 111,500; some of `sets` and `index` twice
RAN = dict.fromkeys(SHARES, 0)


def cases(kind, few):
    "How many cases of a kind are tried; the same every time, so that a failure can be had again."
    return settings(max_examples=SHARES[kind] if MUCH else few, deadline=None, database=None, derandomize=not MUCH, suppress_health_check=list(HealthCheck))


def sentence(read, *args, most=2000):
    "The result of a reader, or None after one sentence; anything else is a failure."
    try: return read(*args)
    except UserError as e: assert str(e) and len(str(e)) < most, str(e)


class Late(BaseException): "Raised in the midst of a reader, which must not take it for damage."

@contextmanager
def bounded(seconds=30, room=6 << 30):
    "What is read here may not take the machine's memory, nor forever."
    def late(*_): raise Late
    (soft, hard), mine = resource.getrlimit(resource.RLIMIT_AS), int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize() if Path('/proc/self/statm').exists() else None
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    if mine: resource.setrlimit(resource.RLIMIT_AS, (mine + room, hard))
    try: yield
    except Late: raise AssertionError(f'no end after {seconds} s') from None
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old); resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope='module', autouse=True)
def told():
    yield
    print(f'\nfuzz cases run: {sum(RAN.values()):,} ({", ".join(f"{k} {n:,}" for k, n in RAN.items())})')


@st.composite
def damaged(draw, whole):
    "Bytes with a few places changed, cut out, doubled or inserted."
    data = bytearray(draw(st.sampled_from(whole)) if isinstance(whole, (list, tuple)) else whole)
    for _ in range(draw(st.integers(1, 5))):
        at, how = draw(st.integers(0, max(0, len(data) - 1))), draw(st.sampled_from('flip byte cut insert double end'.split()))
        n = draw(st.integers(1, 40))
        if not data or how == 'end': data = data[:at]
        elif how == 'flip': data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 'byte': data[at] = draw(st.sampled_from([0, 1, 127, 128, 255, 44, 34, 10, 64]))
        elif how == 'cut': del data[at:at + n]
        elif how == 'double': data[at:at] = data[at:at + n]
        else: data[at:at] = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b'1e999', b'nan', b'-1', b'99999999999999999999', b'"', b',', b'\n', b'\xff\xfe', b'../', b'@', b'\0', '٣'.encode(), b'{"a":' * 50])))
    return bytes(data)


NASTY = [None, True, False, 0, -1, 1, 2, 3, 192, 10**7, 10**12, 2**63, 10**400, .5, -.5, 1e308, float('nan'), float('inf'), '', 'x', 'all', 'sage_nano', 'hf-hub:x/y', 'local-dir:/tmp', '../x', 'resnet18', 'vit_tiny_patch16_224', [], {}, [1], {'foo': 1}, {'sizes': 5}, [None]*3]
anything = st.recursive(st.one_of(st.sampled_from(NASTY).map(copy.deepcopy), st.text(max_size=4), st.integers(-5, 100)), lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)), max_leaves=8)

@st.composite
def otherwise(draw, whole, among=anything):
    "JSON with a few of its values others, gone or new, however deep."
    new = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        at, name = new, None
        while isinstance(at, (dict, list)) and len(at):
            parent, name = at, draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            at = at[name]
            if draw(st.booleans()): break
        if name is None: return draw(among)
        how = draw(st.sampled_from('put put put drop add'.split()))
        if how == 'drop': del parent[name]
        elif how == 'add' and isinstance(parent, dict): parent[draw(st.text(max_size=4))] = draw(among)
        else: parent[name] = draw(among)
    return new


class Kept(tuple):
    "What a fixture gives; short when a failure is printed."
    def __new__(cls, *parts): return super().__new__(cls, parts)
    def __repr__(self): return '…'


# ---- @utm@ names

field = st.one_of(st.text(max_size=8), st.sampled_from(['', '0', '-1', 'nan', 'inf', '1e400', '500000.00', '5300000.0', '32', 'N', 'S', 'Z', '٣٣', '1_000', '60', '61', '0x1', ' 7 ', '+5', '\0', '..', '999999999999999999999']), st.floats().map(str))

@cases('names', 300)
@given(st.one_of(st.text(max_size=60), st.lists(field, max_size=18).map('@'.join)))
def test_names(name):
    RAN['names'] += 1
    f = sentence(utm_fields, name)
    if f: assert np.isfinite([f['easting'], f['northing']]).all() and (np.isnan(f['heading']) or 0 <= f['heading'] < 360) and (f['zone'] == '' or 1 <= int(f['zone'][:-1]) <= 60)


# ---- EXIF

def with_exif(tiff): # a small JPEG with this block
    import io
    out = io.BytesIO(); Image.new('RGB', (8, 8), (90, 120, 30)).save(out, 'JPEG', exif=b'Exif\0\0' + tiff[:60_000]); return out.getvalue()

def good_exif():
    exif = Image.Exif(); exif[0x0112], exif[0x0132] = 6, '2024:05:06 07:08:09'
    exif[0x8825] = {1: 'N', 2: (55., 42., 1.5), 3: 'E', 4: (13., 11., 9.), 17: 271.5}
    return exif.tobytes().removeprefix(b'Exif\0\0')

EXIF = good_exif()

@cases('exif', 200)
@given(st.one_of(damaged(EXIF), st.binary(max_size=200), st.binary(max_size=60).map(lambda b: EXIF[:8] + b)))
@pytest.mark.filterwarnings('ignore')
def test_exif(tmp_path_factory, tiff):
    RAN['exif'] += 1
    path = tmp_path_factory.getbasetemp()/'fuzz.jpg'
    path.write_bytes(with_exif(tiff))
    label = sentence(photo_label, path)
    if label: assert abs(label['lat']) <= 90 and abs(label['lon']) <= 180 and (np.isnan(label['heading']) or 0 <= label['heading'] < 360)
    assert load_image(path).size == (8, 8), 'damaged EXIF does not lose the picture'


# ---- csv

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    t = tmp_path_factory.mktemp('sets')
    (t/'photos').mkdir()
    for i in range(4): Image.new('RGB', (8, 8)).save(t/'photos'/f'{i}.jpg')
    (t/'photos'/'where.csv').write_bytes(PHOTO_CSV)
    (t/'g').mkdir()
    for i in range(4): Image.new('RGB', (8, 8)).save(t/'g'/f'{i}.jpg')
    write_gsv(make_table(image=[str(t/'g'/f'{i}.jpg') for i in range(4)], city='Lund', place=[0, 0, 1, 1], easting=5e5 + np.arange(4), northing=5.3e6, zone='32N', heading=90., time='2026-03'), t/'gsv')
    return t

PHOTO_CSV = b'path,lat,lon,heading,time,place\n0.jpg,55.1,13.2,90,2024-05-06,1\n1.jpg,55.1,13.2,,,1\n"2.jpg",55.2,13.3,1,,x\n3.jpg,-55.2,13.3,1,,x\n'
SUFFIXES = ['.csv', '.zip', '.gz', '.bz2', '.xz', '.zst', '.tar', '.csv.tar.gz']
PACKED = [bz2.compress(PHOTO_CSV), gzip.compress(PHOTO_CSV, mtime=0), lzma.compress(PHOTO_CSV)]
METRE_CSV = b'path,easting,northing,zone\n0.jpg,500000,5300000,32N\n1.jpg,500001,5300000,32N\n'

@cases('csv', 120)
@given(st.one_of(damaged([PHOTO_CSV, METRE_CSV]), st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode('utf-8', 'surrogatepass')), damaged(PACKED)), st.booleans(), st.sampled_from(SUFFIXES))
def test_csv(sets, data, gsv, suffix):
    RAN['csv'] += 1
    path = sets/'photos'/'where.csv'
    try:
        path.write_bytes(data)
        df = sentence(read_photos, sets/'photos', path)
        if df is not None: check_table(df); assert all(p.startswith(str(sets/'photos')) for p in df.image)
        df = sentence(image_list, [path])                                       # as sage_describe reads it
        if df is not None: assert len(df) and all(p.startswith(str(sets/'photos')) for p in df.image)
        packed = sets/f'x{suffix}'                                               # a name that pandas would take for something to unpack
        packed.write_bytes(data)
        for p in (path, packed):
            df = sentence(read_csv, p, 'path|lat')
            if df is not None and len(df):
                for c in df: sentence(numbers, df, c, p) is None or sentence(whole_numbers, df, c, p)
    finally: path.write_bytes(PHOTO_CSV)
    if gsv:
        path = next((sets/'gsv'/'Dataframes').iterdir()); whole = path.read_bytes()
        try: path.write_bytes(whole[:len(whole) // 2] + data); sentence(read_gsv, sets/'gsv')
        finally: path.write_bytes(whole)


# ---- benchmarks: MSLS's csv files, ground truth as csv, json and .mat

def pictures(folder, names):
    folder.mkdir(parents=True)
    for n in names: Image.new('RGB', (8, 8)).save(folder/n)
    return [str(folder/n) for n in names]

@pytest.fixture(scope='module')
def benchmarks(tmp_path_factory):
    "name of a kind → (files to damage, what reads them); every one of them reads as it is."
    t = tmp_path_factory.mktemp('benchmarks')
    images = pictures(t/'own', [f'{i}.jpg' for i in range(8)])
    write_msls(make_table(image=images, city='cph', place=[0, 0, 1, 1]*2, easting=347_000 + np.arange(8) % 4, northing=6_173_000., zone='33N', heading=90., time='2026-03', sequence='s', role=['database']*4 + ['query']*4), t/'msls')
    for side in (t/'msls'/'train_val'/'cph').iterdir():                          # the subtask's column is empty in what is written for a split of one's own
        path = side/'subtask_index.csv'; path.write_text(path.read_text().replace('False', 'True'))
    for kind in ('csv', 'json'):
        for side in ('database', 'queries'): pictures(t/kind/'images'/'test'/side, [f'{i}.jpg' for i in range(3)])
    (t/'csv'/'positives.csv').write_text('query,reference\n0.jpg,0.jpg\n0.jpg,1.jpg\n2.jpg,"2.jpg"\n')
    (t/'json'/'positives.json').write_text(json.dumps({'0.jpg': ['0.jpg', '1.jpg'], '2.jpg': ['2.jpg']}))
    for packed in (True, False):
        pictures(t/f'mat{packed}'/'000', [f'{i}.jpg' for i in range(6)]); (t/f'mat{packed}'/'datasets').mkdir()
        names = np.array([f'000/{i}.jpg' for i in range(6)], dtype=object)
        savemat(t/f'mat{packed}'/'datasets'/'pitts30k_test.mat', dict(dbStruct=dict(whichSet='test', dbImage=names[:4], utmDb=5e5 + np.arange(8.).reshape(2, 4), qImage=names[4:], utmQ=5e5 + np.arange(4.).reshape(2, 2))), do_compression=packed)
    reads = dict(msls=lambda: [read_msls(t/'msls', 'val', queries='all'), load_benchmark('msls_val', t/'msls')], csv=lambda: load_benchmark(folder_protocol(t/'csv'), t/'csv'), json=lambda: load_benchmark(folder_protocol(t/'json'), t/'json'),
                 matTrue=lambda: load_benchmark('pitts30k', t/'matTrue'), matFalse=lambda: load_benchmark('pitts30k', t/'matFalse'))
    files = dict(msls=sorted((t/'msls').rglob('*.csv')), csv=[t/'csv'/'positives.csv'], json=[t/'json'/'positives.json'], **{f'mat{p}': [t/f'mat{p}'/'datasets'/'pitts30k_test.mat'] for p in (True, False)})
    for read in reads.values(): assert read()
    assert len(files['msls']) == 8
    return Kept({k: ({p: p.read_bytes() for p in files[k]}, reads[k]) for k in reads})

@cases('sets', 100)
@given(st.data())
@pytest.mark.filterwarnings('ignore')
def test_benchmarks(benchmarks, data): benchmark(benchmarks, data, 'msls', 'msls', 'csv', 'json', 'matTrue')

def test_a_mat_file_without_compression(benchmarks):
    "Bits turned in one are met by scipy's reader itself, where a compressed one mostly does not unpack; some are the end of its process."
    files, read = benchmarks[0]['matFalse']
    (path, whole), g = next(iter(files.items())), np.random.default_rng(0)
    try:
        for _ in range(500 if MUCH else 25):
            bad = bytearray(whole)
            for at in g.integers(128, len(whole), g.integers(1, 4)): bad[at] ^= 1 << int(g.integers(8))
            path.write_bytes(bad)
            RAN['sets'] += 1
            sentence(read)
    finally: path.write_bytes(whole)

def benchmark(benchmarks, data, *kinds):
    RAN['sets'] += 1
    kind = data.draw(st.sampled_from(kinds))
    files, read = benchmarks[0][kind]
    path = data.draw(st.sampled_from(sorted(files)))
    how = [damaged(files[path]), st.binary(max_size=100)] + ([otherwise(json.loads(files[path])).map(lambda v: json.dumps(v).encode())] if kind == 'json' else [])
    path.write_bytes(data.draw(st.one_of(*how)))
    try:
        with bounded(): sentence(read)
    finally: path.write_bytes(files[path])


# ---- the index of sage_where

class Mean(torch.nn.Module):
    "Describes a picture by its colours."
    dim, patch = 4, 14
    def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.eye(4, 3), requires_grad=False)
    def describe(self, x): return torch.nn.functional.normalize(x.mean((2, 3)) @ self.weight.T, dim=1)

@pytest.fixture(scope='module')
def index(tmp_path_factory):
    "A calibrated map of 24 photographs, one of them left out: (folder, model, a descriptor, files of the index)."
    root, g, model = tmp_path_factory.mktemp('index')/'photos', np.random.default_rng(0), Mean()
    root.mkdir()
    for i in range(25): Image.new('RGB', (28, 28), tuple(g.integers(0, 255, 3).tolist())).save(root/f'{i}.jpg') if i else (root/'0.jpg').write_bytes(b'')
    (root/'where.csv').write_text('path,lat,lon\n' + ''.join(f'{i}.jpg,{55 + .01*(i//2):.6f},{13 + .0001*(i % 2):.6f}\n' for i in range(25)))
    m = update_map(root, model, 28)
    assert len(m.left_out) == 1 and min(len(v) for v in m.about['calibration'].values()) >= 20
    return Kept(root, model, np.ones(4, np.float32)/2, {p.name: p.read_bytes() for p in (root/'.sage').iterdir()})

@st.composite
def other_table(draw, whole):
    "A parquet file that is whole, and holds another table."
    import io
    df = pd.read_parquet(io.BytesIO(whole))
    for _ in range(draw(st.integers(1, 3))):
        c, how = draw(st.sampled_from(sorted(df))) if len(df.columns) else '', draw(st.sampled_from('drop text nan none zero rows twice index'.split()))
        if how == 'rows' or not c: df = df.iloc[:draw(st.integers(0, len(df)))]
        elif how == 'index': df = df.set_index(c)
        elif how == 'twice': df = pd.concat([df, df.iloc[:3]])
        elif how == 'drop': df = df.drop(columns=c)
        else: df = df.assign(**{c: dict(text='x', nan=np.nan, none=None, zero=0)[how]})
    df.to_parquet(out := io.BytesIO())
    return out.getvalue()

@cases('index', 120)
@given(st.data())
@pytest.mark.filterwarnings('ignore')
def test_index(index, data):
    "Damage of any length, the length told to be right, so that not only the length is looked at."
    name = data.draw(st.sampled_from(sorted(index[3])))
    how = [damaged(index[3][name])] + ([otherwise(json.loads(index[3][name])).map(lambda v: json.dumps(v).encode())] if name == 'index.json' else [])
    asked(index, name, data.draw(st.one_of(*how)), data.draw(st.booleans()))

@cases('index', 60)
@given(st.data())
@pytest.mark.filterwarnings('ignore')
def test_index_with_another_table(index, data):
    name = next(n for n in index[3] if n.endswith('.parquet'))
    asked(index, name, data.draw(other_table(index[3][name])), True)

def asked(index, name, bad, fits):
    "Read, ask and bring up to date a map with a bad file; fits: index.json tells its length."
    RAN['index'] += 1
    root, model, d, files = index
    folder = root/'.sage'
    try:
        (folder/name).write_bytes(bad)
        if name != 'index.json' and fits: about = json.loads(files['index.json']); about['bytes'][name] = len(bad); (folder/'index.json').write_text(json.dumps(about))
        with bounded():
            m = sentence(read_map, root)
            if m is not None: sentence(lambda: (m.left_out, m.photos, own_rows(m, root/'1.jpg'), ask(m, d), ask(m, d, skip=[0])))
            sentence(update_map, root, model, 28)
    finally:
        for p in folder.iterdir(): p.unlink()
        for n, whole in files.items(): (folder/n).write_bytes(whole)


# ---- run folders

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    r = toy_run(tmp_path_factory.mktemp('toy')/'run', epochs=1, batches=1)
    for e in (0, 1): (r.path/'checkpoints'/f'{e:04d}.safetensors').write_bytes(b'')
    return Kept(r, {p: p.read_bytes() for p in r.path.rglob('*') if p.is_file() and not {'pictures', 'checkpoints'} & {*p.parts}})

def read_all(r, name, epoch): # what a picture or a table would read of this file
    if name in ('config.json', 'metrics.jsonl'): return (r.config, r.metrics(''), r.metrics('step'), r.recalls(), r.best(), r.epochs(), r.resumable())
    if 'tables' in name: return [r.table(t) for t in r.config['tables']]
    return getattr(r, Path(name).stem)(epoch)

@cases('run', 150)
@given(st.data())
def test_run_folders(run, data):
    RAN['run'] += 1
    r, files = run
    path = data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(data.draw(st.one_of(damaged(files[path]), st.binary(max_size=100))))
    try:
        name = str(path.relative_to(r.path))
        sentence(read_all, r, name, int(path.parent.name) if path.parent.name.isdigit() else -1)
        if name == 'metrics.jsonl': sentence(read_lines, path); append_line(path, dict(epoch=1)); sentence(read_lines, path)
    finally: path.write_bytes(files[path])

@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    "A run whose tables know their zone, so that all that can be made of it can be made."
    r = toy_run(tmp_path_factory.mktemp('measured')/'run', epochs=1, batches=1)
    for p in (r.path/'tables').iterdir(): pd.read_parquet(p).assign(zone='33N').to_parquet(p)
    return Kept(r, {p: p.read_bytes() for p in sorted(r.path.rglob('*.parquet'))})

def used(r, out): # what commands make of a run's tables
    for n in r.config['tables']: sentence(lambda: (fingerprint(r.table(n)), summary(r.table(n))))
    sentence(lambda: write_parquet(*recorded(r), out/'o.parquet'))
    sentence(lambda: geojson(*recorded_answers(r, 'Otherville')[:2]))
    for e in r.epochs(): sentence(r.nodes, e); sentence(r.edges, e); sentence(r.cliques, e)

@cases('tables', 30)
@given(st.data())
def test_a_run_with_another_table(measured, tmp_path, data):
    RAN['tables'] += 1
    r, files = measured
    path = data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(data.draw(other_table(files[path])))
    try: used(r, tmp_path)
    finally: path.write_bytes(files[path])


@pytest.mark.parametrize('bad', ['{"kepoch": 0, "x/recall@1": 5}', '{"epoch": "0", "x/recall@1": 5}', '{"epoch": null}', '{"epoch": 0.5}', '{"epoch": 1, "x/recall@1": "5"}', '{"epoch": 1, "x/recall@1": [5]}', '{"epoch": 1, "x/recall@1": 1e999}', '{"epoch": 1, "x/recall@1": 101}'])
def test_a_row_that_is_no_row(tmp_path, bad):
    r = Run.create(tmp_path/'run', {})
    (r.path/'metrics.jsonl').write_text('{"epoch": 0, "x/recall@1": 4.5}\n' + bad + '\n')
    for read in (r.metrics, r.recalls, r.best, lambda: r.truncate(0)):
        with pytest.raises(UserError, match='metrics.jsonl, line 2: '): read()

def test_rows_that_look_odd_and_are_whole(tmp_path):
    r = Run.create(tmp_path/'run', {})
    for row in ({'epoch': 0, 'x/recall@²': 5, 'x/recall@' + '9'*5000: 5, 'x/recall@1': float('nan'), 'x/recall@5': None, '/recall@1': 3}, {'seconds': 4}): r.log(**row)
    assert r.recalls().k.tolist() == [1, 5, 1] and len(r.metrics()) == 2


# ---- checkpoints

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    t = tmp_path_factory.mktemp('checkpoint')
    model = create_sage('sage_nano', pretrained=True, probes=4, probe_dim=4, token_dim=4)
    save_sage(model, t/'m.safetensors')
    some = torch.nn.Linear(3, 2); optimizer = torch.optim.AdamW(some.parameters()); schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    some(torch.ones(1, 3)).sum().backward(); optimizer.step()
    save_state(t/'s.safetensors', optimizer, schedule, step=1)
    torch.save(dict(model_state_dict={'backbone.model.pos_embed': torch.zeros(1, 5, 4), 'x': torch.ones(2, 2)}), t/'o.pth')
    return Kept(t, optimizer, schedule, {n: (t/n).read_bytes() for n in ('m.safetensors', 's.safetensors', 'o.pth')})

@cases('checkpoints', 120)
@given(st.data())
def test_checkpoints(checkpoint, data):
    RAN['checkpoints'] += 1
    t, optimizer, schedule, files = checkpoint
    name = data.draw(st.sampled_from(sorted(files)))
    whole, path = files[name], t/f'x{Path(name).suffix}'
    if name != 'o.pth' and data.draw(st.booleans()):
        n = struct.unpack('<Q', whole[:8])[0]
        bad = struct.pack('<Q', len(head := data.draw(damaged(whole[8:8 + n])))) + head + whole[8 + n:]
    else: bad = data.draw(st.one_of(damaged(whole), st.binary(max_size=60)))
    path.write_bytes(bad)
    if name == 'o.pth': return sentence(load_official, path)
    got = sentence(read_checked, path)
    sentence(read_header, path)
    if name == 's.safetensors':
        sentence(load_state, path, optimizer, schedule)
        load_state(t/'s.safetensors', optimizer, schedule)
    elif got is None: sentence(load_sage, path)


# ---- the header of a checkpoint, which no checksum need protect, with whole tensors behind it

SIZES = dict(vit=dict(img_size=28, patch_size=14, in_chans=3, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2., init_values=1., num_classes=0), probing=dict(probes=4, probe_dim=4, token_dim=4, hidden=8), body=dict(dpns=2, hidden=4),
             interact=dict(descriptor_dim=20, d_model=4, heads=2, layers=1, ffn=8))

def with_header(whole, header):
    "The tensors of a safetensors file behind another header."
    n = struct.unpack('<Q', whole[:8])[0]
    head = json.dumps(json.loads(whole[8:8 + n]) | {'__metadata__': header}).encode()
    return struct.pack('<Q', len(head)) + head + whole[8 + n:]

@pytest.fixture(scope='module')
def headed(tmp_path_factory):
    "Four kinds of checkpoint without a checksum: (folder, {name: (bytes, header)}); each is read as it is."
    t, g = tmp_path_factory.mktemp('headed'), torch.Generator().manual_seed(0)
    sizes, small = build_sage(SIZES), dict(probes=4, probe_dim=4, token_dim=4)
    for p in sizes.parameters(): torch.nn.init.normal_(p.data, generator=g)
    named = create_sage('sage_nano', pretrained=True, **small)
    models = dict(trainable=named, all=create_sage('sage_nano', pretrained=False, **small), sizes=sizes, reduced=create_sage('sage_nano', pretrained=True, **small).reduce(dict(mean=np.zeros(20), components=np.eye(6, 20), variance=np.ones(6), samples=9, explained=.5)))
    found = {}
    for name, model in models.items():
        data = save_sage(model, t/f'{name}.safetensors', dict(settings=dict(eval_size=56))).read_bytes()
        header = json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]])['__metadata__']
        found[name] = data, {k: v for k, v in header.items() if k != 'sha256'}
    for data, header in found.values():
        (t/'x.safetensors').write_bytes(with_header(data, header))
        load_sage(t/'x.safetensors')
    return Kept(t, found)

@pytest.fixture
def offline(monkeypatch):
    "A name in a file does not make the program ask a network."
    import huggingface_hub, socket
    asked = []
    def connect(self, address): asked.append(address); raise OSError('no network here')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(socket.socket, 'connect', connect)
    yield
    assert asked == []

def use(path):
    "Load a model and use it."
    model = load_sage(path)
    d = model.describe(torch.ones(1, 3, 2*model.patch, 2*model.patch))
    model.generate_model_card()
    return d

HEADERS = [[], 3, None, 'x', {}, {'foo': 1}, {'sizes': 5}, {'sizes': {}}, {'probes': 'x'}, {'backbone': None}, {'backbone': 'hf-hub:x/y'}, {'backbone': 'local-dir:/tmp'}, {'backbone': 'resnet18'}, {'backbone': []}, {'probes': 10**12}, {'probes': 10**7}, {'alpha': 'x'}, {'dropout': []},
           {'dpns': 10**12}, {'interact': [1]}, {'interact': {'layers': 10**9}}, {'interact': {'d_model': 10**7}}, {'interact': {'foo': 1}}, {'seed': 'x'}, {'pretrained': 'world'}, {'fused': [1]}, {'probes': None}, {'probes': True}, {'probes': 4.}]

@pytest.mark.parametrize('model', HEADERS, ids=lambda m: json.dumps(m)[:40])
@pytest.mark.parametrize('alone', [True, False], ids=['alone', 'with the rest'])
def test_a_header_of_anything(headed, offline, tmp_path, model, alone):
    "The model of a header, or one of its parts, is something else; with and without what else a header says."
    t, found = headed
    for name in ('trainable', 'sizes'):
        data, header = found[name]
        said = model if alone or not isinstance(model, dict) else json.loads(header['model']) | model
        for missing in ((), ('holds', 'backbone_sha256', 'config'), ('holds',), ('backbone_sha256',))[:4 if MUCH else 1]:
            (tmp_path/'x.safetensors').write_bytes(with_header(data, {k: v for k, v in header.items() if k not in missing} | dict(model=json.dumps(said))))
            with bounded(): sentence(read_header, tmp_path/'x.safetensors'); sentence(use, tmp_path/'x.safetensors', most=20_000)

@pytest.mark.parametrize('facts', [[], None, 5, {}, *({k: v} for k in ('dims', 'of', 'samples', 'whitened', 'explained_variance') for v in (..., None, 'x', -1, 10**12, [1]))], ids=str)
def test_a_reduction_of_anything(headed, offline, tmp_path, facts):
    "What a header says of principal components; `...`: does not say."
    data, header = headed[1]['reduced']
    said = facts if not facts or not isinstance(facts, dict) else {k: v for k, v in (json.loads(header['pca']) | facts).items() if v is not ...}
    (tmp_path/'x.safetensors').write_bytes(with_header(data, header | dict(pca=json.dumps(said))))
    with bounded(): sentence(read_header, tmp_path/'x.safetensors'); sentence(use, tmp_path/'x.safetensors', most=20_000)

@cases('headers', 40)
@given(st.data())
def test_headers(headed, offline, data):
    RAN['headers'] += 1
    t, found = headed
    whole, header = found[data.draw(st.sampled_from(sorted(found)))]
    new = dict(header)
    for key in data.draw(st.lists(st.sampled_from(['model', 'model', 'model', 'pca', 'config', 'holds', 'backbone_sha256', 'format']), min_size=1, max_size=3, unique=True)):
        if key not in ('model', 'pca', 'config'): new |= {key: data.draw(st.one_of(st.sampled_from(['all', 'trainable', '', 'x', header['backbone_sha256']]), st.text(max_size=3)))}
        else: new |= {key: data.draw(st.one_of(otherwise(json.loads(header.get(key, '{}'))).map(json.dumps), anything.map(json.dumps), st.text(max_size=8)))}
        if data.draw(st.integers(0, 5)) == 0: del new[key]
    (t/'y.safetensors').write_bytes(with_header(whole, new))
    with bounded(): sentence(read_header, t/'y.safetensors'); sentence(use, t/'y.safetensors', most=20_000)


@pytest.fixture(scope='module')
def official():
    "A small checkpoint as the authors write theirs: name → tensor."
    model, g = build_sage(SIZES | dict(body=dict(dpns=3, hidden=4))), torch.Generator().manual_seed(0)
    for p in model.parameters(): torch.nn.init.normal_(p.data, generator=g)
    state = {official_name(k): v for k, v in model.state_dict().items()}
    load_official(state, num_heads=2, interact_heads=2)
    return state

@st.composite
def other_state(draw, state):
    "A state whose tensors are missing, of other shapes, boast of sizes that they do not hold, or are none of numbers."
    new = dict(state)
    for _ in range(draw(st.integers(1, 3))):
        k, how = draw(st.sampled_from(sorted(new))), draw(st.sampled_from('drop boast boast side side empty half name scalar sparse nan meta'.split()))
        v = new[k]
        sides = [draw(st.sampled_from([0, 1, 2, 3, 10**3, 10**6, n])) for n in v.shape] if how == 'boast' else []
        if how == 'drop': del new[k]
        elif how == 'boast' and v.ndim and math.prod(sides) < 2**62: new[k] = torch.zeros(1).expand(*sides)
        elif how == 'side' and v.ndim: i = draw(st.integers(0, v.ndim - 1)); new[k] = torch.zeros(*v.shape[:i], draw(st.sampled_from([0, 1, 2, 3, 5, 33, 64])), *v.shape[i+1:])
        elif how == 'name': new[draw(st.sampled_from(['x', 'backbone.model.blocks.999.x', 'encoder.layers.50.x', 'backbone.gpn_norms.7.x', 'aggregator.', k + '.x']))] = v
        elif how == 'half' and v.numel() < 10**6: new[k] = v.half()
        elif how == 'sparse' and v.is_cpu and v.layout == torch.strided and v.numel() < 10**6: new[k] = v.to_sparse()
        elif how == 'nan': new[k] = torch.full(v.shape, float('nan')) if v.numel() < 10**6 else v
        else: new[k] = dict(empty=torch.zeros(0), scalar=torch.tensor(1.), meta=torch.zeros(v.shape, device='meta')).get(how, v)
    return new

@cases('states', 25)
@given(st.data())
@pytest.mark.filterwarnings('ignore')
def test_an_official_state(official, tmp_path, data):
    RAN['states'] += 1
    torch.save(dict(model_state_dict=data.draw(other_state(official))), tmp_path/'o.pth')
    def use(): return sentence(load_official(tmp_path/'o.pth', num_heads=data.draw(st.sampled_from([None, 2])), interact_heads=data.draw(st.sampled_from([2, 16]))).describe, torch.ones(1, 3, 28, 28))
    with bounded(): sentence(use, most=200_000)

UNREADABLE, INCOMPLETE = 'o.pth is not a readable checkpoint', 'the checkpoint has no '


@pytest.mark.parametrize('was, bad, says', [(b'K\x01K\x05K\x04\x87', b'K\x87', UNREADABLE), (b'K\x01K\x05K\x04\x87', b')', UNREADABLE), (b'\x89ccollections', b'ccollections', UNREADABLE), (b'K\x01K\x05K\x04\x87', b'NNN\x87', UNREADABLE),
                                            (b'X\x03\x00\x00\x00cpu', b'X\x03\x00\x00\x00cpx', INCOMPLETE), (b'FloatStorage', b'FloatStorag_', UNREADABLE)])
def test_a_checkpoint_whose_tensors_are_none(tmp_path, was, bad, says):
    "Found by fuzzing: torch's reader does not check what it is told to build. A device of no known name does no harm, for all is read into memory: then only the other names of a SAGE are missing."
    torch.save(dict(model_state_dict={'backbone.model.pos_embed': torch.zeros(1, 5, 4)}), tmp_path/'o.pth')
    with zipfile.ZipFile(tmp_path/'o.pth') as z: parts = {n: z.read(n) for n in z.namelist()}
    assert any(was in data for data in parts.values())
    with zipfile.ZipFile(tmp_path/'o.pth', 'w', zipfile.ZIP_STORED) as z:
        for n, data in parts.items(): z.writestr(n, data.replace(was, bad) if n.endswith('data.pkl') else data)
    with pytest.raises(UserError, match=says): load_official(tmp_path/'o.pth')
