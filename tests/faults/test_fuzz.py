"""Bytes that nobody meant: whatever is read gives a result or one sentence. `make torture` runs more than 100,000 cases, a plain run a few hundred."""
import os, struct, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from sage.core import UserError
from sage.formats import read_gsv, utm_fields, write_gsv
from sage.images import load_image
from sage.learner import load_state, save_state
from sage.model import create_sage, load_official, load_sage, read_checked, read_header, save_sage
from sage.photos import numbers, photo_label, read_csv, read_photos, whole_numbers
from sage.places import check_table, make_table
from sage.run import Run, append_line, read_lines
from sage.viz.toy import toy_run

MUCH = bool(os.environ.get('SAGE_TORTURE'))
SHARES = dict(names=60_000, exif=20_000, csv=8_000, run=8_000, checkpoints=6_000)       # 102,000
RAN = dict.fromkeys(SHARES, 0)


def cases(kind, few):
    "How many cases of a kind are tried; the same every time, so that a failure can be had again."
    return settings(max_examples=SHARES[kind] if MUCH else few, deadline=None, database=None, derandomize=not MUCH, suppress_health_check=list(HealthCheck))


def sentence(read, *args):
    "The result of a reader, or None after one sentence; anything else is a failure."
    try: return read(*args)
    except UserError as e: assert str(e) and len(str(e)) < 2000, str(e)


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
METRE_CSV = b'path,easting,northing,zone\n0.jpg,500000,5300000,32N\n1.jpg,500001,5300000,32N\n'

@cases('csv', 120)
@given(st.one_of(damaged([PHOTO_CSV, METRE_CSV]), st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode('utf-8', 'surrogatepass'))), st.booleans())
def test_csv(sets, data, gsv):
    RAN['csv'] += 1
    path = sets/'photos'/'where.csv'
    path.write_bytes(data)
    df = sentence(read_photos, sets/'photos', path)
    if df is not None: check_table(df); assert all(p.startswith(str(sets/'photos')) for p in df.image)
    df = sentence(read_csv, path, 'path|lat')
    if df is not None and len(df):
        for c in df: sentence(numbers, df, c, path) is None or sentence(whole_numbers, df, c, path)
    if gsv:
        path = next((sets/'gsv'/'Dataframes').iterdir()); whole = path.read_bytes()
        try: path.write_bytes(whole[:len(whole) // 2] + data); sentence(read_gsv, sets/'gsv')
        finally: path.write_bytes(whole)


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
