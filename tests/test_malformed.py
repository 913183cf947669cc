"""Damaged trees, tables, EXIF blocks and checkpoints through the commands: one sentence on stderr, exit code 2, and the disk as it was."""
import gzip, json, os, shutil, struct, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, TiffImagePlugin
from safetensors.torch import save_file
from scipy.io import savemat

from sage import cli
from sage.cli_data import sage_data
from sage.cli_export import sage_pca
from sage.formats import write_gsv, write_msls, write_utm
from sage.model import create_sage, save_sage
from sage.geo import to_utm
from sage.photos import read_photos
from sage.places import make_table

COMMANDS = cli.COMMANDS | dict(data=sage_data, pca=sage_pca)
SMALL = '--backbone sage_nano --image-size 56 --eval-size 56 --epochs 1 --steps 1 --places-per-batch 2 --images-per-place 2 --min-size 2 --augment none --quiet'.split()
SIZED = '--size 56 --quiet'.split()


def cards(folder, city='aldwick', places=4, views=3, seed=0, **more):
    "A town of coloured patterns: places 60 m apart, several views of each, the first a query."
    rng, n = np.random.default_rng(seed), places * views
    folder.mkdir(parents=True, exist_ok=True)
    image = [str(folder/f'{city}_{i}.jpg') for i in range(n)]
    for p in image: Image.fromarray(np.kron(rng.integers(0, 255, (4, 4, 3)).astype(np.uint8), np.ones((14, 14, 1), np.uint8))).save(p)
    place = np.arange(n) // views
    return make_table(**dict(image=image, city=city, place=place, easting=5e5 + 60. * place + rng.uniform(0, 6, n), northing=5.3e6 + rng.uniform(0, 6, n), zone='32N', heading=90.,
                             role=np.where(np.arange(n) % views, 'database', 'query'), time='2026-03') | more)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "One healthy set in each layout, and a checkpoint."
    t = tmp_path_factory.mktemp('good')
    write_gsv(cards(t/'c0'), t/'gsv'); write_msls(pd.concat([cards(t/'c0'), cards(t/'c1', 'cph', seed=1)], ignore_index=True), t/'msls'); write_utm(cards(t/'c2', 'bestadt', seed=2).assign(split='test'), t/'utm')
    cards(t/'photos', 'p'); (t/'photos'/'where.csv').write_text('path,lat,lon\n' + ''.join(f'p_{i}.jpg,47.85,{9 + i / 1e4}\n' for i in range(12)))
    save_sage(create_sage('sage_nano', pretrained=False, probes=4, probe_dim=8, token_dim=8), t/'m.safetensors', config=dict(settings=dict(eval_size=56)))
    return t


def tree(folder): return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob('*'))}


def refused(capsys, tmp_path, name, argv, says):
    "Exit 2, one sentence that says what is wrong, nothing on the disk changed."
    before = tree(tmp_path); capsys.readouterr()
    with pytest.raises(SystemExit) as e: COMMANDS[name]([str(a) for a in argv])
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith(f'sage_{name}: ')]
    rest = [line for line in err.splitlines() if line.strip() and line not in said and 'left out' not in line and not line.startswith('scanning')]
    assert e.value.code == 2 and len(said) == 1 and not rest and 'Traceback' not in err, err
    assert says in said[0], said[0]
    assert tree(tmp_path) == before, set(tree(tmp_path)) ^ set(before)


# ---- what is damaged, and how: (layout, what is done to a copy of it, what the sentence holds) -------------------

def edit(name, change):
    "Change one csv of a set, as text columns."
    def spoil(t):
        path = min(t.rglob(name)); df = pd.read_csv(path, dtype=str, index_col=0 if name not in ('aldwick.csv', 'where.csv') else None)
        change(df).to_csv(path, index=name not in ('aldwick.csv', 'where.csv'))
    return spoil


def put(name, data):
    def spoil(t): path = min(t.rglob(name)); path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data)
    return spoil


def swap(df): return df.assign(lat=df.lon.where(df.index != 3, '151.2'), lon=df.lat)
def remove(*names): return lambda t: [shutil.rmtree(p) if p.is_dir() else p.unlink() for n in names for p in list(t.rglob(n))]


def unlinked(t): # every image is a link to nothing
    for p in list((t/'images').rglob('*.jpg')): p.unlink(); p.symlink_to(t/'nothing')


def linked_out(t): # an image is a link to a picture elsewhere
    path, secret = min(t.rglob('*.jpg')), t.parent/'secret.jpg'
    Image.new('RGB', (56, 56), 'red').save(secret); path.unlink(); path.symlink_to(secret)


TRAIN = [
    ('gsv', remove('Images'), 'no such folder'),
    ('gsv', put('aldwick.csv', b''), 'aldwick.csv'),
    ('gsv', put('aldwick.csv', b'\x89PNG\r\n\x1a\n\0\0\0'), 'aldwick.csv'),
    ('gsv', put('aldwick.csv', 'place_id,year\n1,2\n'.encode('utf-16')), 'not UTF-8'),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(lat='north')), "row 0 has lat 'north'"),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(lat='inf')), 'inf'),
    ('gsv', edit('aldwick.csv', swap), 'row 3'),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(place_id='1e400')), 'place_id'),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(year='99999999999999999999')), 'year'),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(city_id='../..')), 'cannot be the name of a city'),
    ('gsv', edit('aldwick.csv', lambda d: pd.concat([d, d[:1]])), 'occurs twice'),
    ('gsv', edit('aldwick.csv', lambda d: d.drop(columns='panoid')), "no column 'panoid'"),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(panoid='a\0b')), 'aldwick.csv'),
    ('gsv', edit('aldwick.csv', lambda d: d.assign(panoid='x' * 400)), 'aldwick.csv'),
    ('gsv', lambda t: (shutil.rmtree(t/'Dataframes'), (t/'Dataframes').write_text('a file')), 'can be placed'),
    ('gsv', lambda t: (shutil.rmtree(t/'Dataframes'), (t/'Dataframes').symlink_to(t/'Dataframes')), 'can be placed'),
    ('gsv', linked_out, 'leads out of'),
    ('gsv', put('aldwick.csv', gzip.compress(b'place_id,year\n1,2\n', mtime=0)), 'not UTF-8'),
    ('msls', linked_out, 'leads out of'),
    ('msls', remove('raw.csv'), 'raw.csv'),
    ('msls', remove('postprocessed.csv'), 'postprocessed.csv'),
    ('msls', remove('aldwick'), "holds no city for the split 'train'"),
    ('msls', remove('query'), 'no such folder'),
    ('msls', edit('raw.csv', lambda d: d.assign(pano='maybe')), "'maybe'"),
    ('msls', edit('raw.csv', lambda d: d.assign(lat='95')), 'latitude 95'),
    ('msls', edit('postprocessed.csv', lambda d: d[:-1]), 'no row for the key'),
    ('msls', edit('postprocessed.csv', lambda d: d.assign(easting='')), 'easting'),
    ('msls', edit('postprocessed.csv', lambda d: d.assign(unique_cluster='1.5')), 'unique_cluster'),
    ('msls', edit('seq_info.csv', lambda d: d.assign(key='same')), 'occurs twice'),
    ('msls', edit('seq_info.csv', lambda d: d.assign(key='../../../../etc/passwd')), 'seq_info.csv'),
    ('photos', put('where.csv', 'path,lat,lon\n../../secret.jpg,1,1\n'), 'leads out'),
    ('photos', put('where.csv', 'path,lat,lon\np_0.jpg,1\n'), 'lon'),
    ('photos', put('where.csv', 'path,lat,lon\np_0.jpg,1,2\np_0.jpg,1,2\n'), 'occurs twice'),
    ('photos', put('where.csv', 'path,lat\np_0.jpg,1\n'), "'lat' and 'lon'"),
    ('photos', put('where.csv', 'path,easting,northing\np_0.jpg,1e999,2\np_1.jpg,1,2\n'), 'easting'),
    ('photos', put('where.csv', 'path,lat,lon,place\np_0.jpg,1,2,\n'), 'no place'),
    ('photos', put('where.csv', 'path,lat,lon\nx\0y.jpg,1,2\n'), 'where.csv'),
    ('photos', put('where.csv', 'path,lat,lon\nx\0y/0.jpg,1,2\n'), 'no file name has' if int(pd.__version__.split('.')[0]) > 2 else 'where.csv'),      # (pandas 2 drops what comes after a zero)
    ('photos', put('where.csv', 'path ,path,lat,lon\np_0.jpg,p_1.jpg,1,2\n'), "column 'path' twice"), ('photos', put('where.csv', 'path,lat,lon,lat,lon\np_0.jpg,1,2,3,4\n'), "column 'lat' twice"),
    ('photos', put('where.csv', 'path,easting,northing,zone\np_0.jpg,9e7,9e7,33N\n'), 'row 0 has easting 9e+07'),
    ('photos', put('where.csv', 'path,easting,northing,zone\np_0.jpg,5e5,5.3e6,32N\np_1.jpg,5e5,5.3e6,33N\np_2.jpg,5e5,5.3e6,\n'), 'row 2 has no zone'),
    ('photos', put('where.csv', 'path,easting,northing,zone\np_0.jpg,1,2,99Z\np_1.jpg,1,2,99Z\n'), "UTM zone '99Z' is unknown"),
]


@pytest.mark.parametrize('layout, spoil, says', TRAIN, ids=[f'{i}-{t[0]}-{t[2][:24]}' for i, t in enumerate(TRAIN)])
def test_training_trees(layout, spoil, says, good, tmp_path, capsys):
    shutil.copytree(good/layout, tmp_path/'set', symlinks=True); spoil(tmp_path/'set')
    refused(capsys, tmp_path, 'train', ['--data', tmp_path/'set', '--val', good/'utm', '--run', tmp_path/'run', *SMALL], says)


def test_metres_of_two_zones(good, tmp_path):
    "The same numbers in two zones are two spots, hundreds of kilometres apart; those near the border between two zones are measured in one."
    shutil.copytree(good/'photos', tmp_path/'set')
    def table(rows):
        (tmp_path/'set'/'where.csv').write_text('path,easting,northing,zone\n' + ''.join(f'p_{i}.jpg,{e},{n},{z}\n' for i, (e, n, z) in enumerate(rows)))
        return read_photos(tmp_path/'set')
    far = table([(500000, 5300000, '32N'), (500001, 5300000, '33N')])
    assert far.place.nunique() == 2 and far.zone.nunique() == 1 and 440e3 < np.hypot(*np.diff(far[['easting', 'northing']].to_numpy(), axis=0)[0]) < 460e3
    assert table([(500000, 5300000, '32N'), (500000, 5300000, '50N')]).city.nunique() == 2
    e, n, _ = to_utm(np.array([47.85, 47.85]), np.array([11.9999, 11.9999]), zone='32N'); f, m, _ = to_utm(np.array([47.85]), np.array([12.0001]), zone='33N')
    near = table([(e[0], n[0], '32N'), (f[0], m[0], '33N')])
    assert near.city.nunique() == near.zone.nunique() == 1 and abs(np.hypot(*np.diff(near[['easting', 'northing']].to_numpy(), axis=0)[0]) - 15) < .5

EVAL = [
    (lambda t: shutil.rmtree(t/'images'/'test'/'queries'), ''),
    (lambda t: [p.unlink() for p in (t/'images'/'test'/'database').iterdir()], 'no images'),
    (lambda t: (shutil.rmtree(t/'images'/'test'/'queries'), (t/'images'/'test'/'queries').write_text('a file')), ''),
    (lambda t: (t/'images'/'test'/'database'/'@1@x@.jpg').touch(), '@1@x@'),
    (unlinked, 'can be read'),
    (lambda t: [p.write_bytes(b'\xff\xd8\xff\xe0' + b'\0' * 50) for p in (t/'images'/'test'/'queries').iterdir()], 'can be read'),
    (lambda t: (t/'positives.csv').write_text('query,answer\na,b\n'), "no column 'reference'"),
    (lambda t: (t/'positives.csv').write_text(''), 'positives.csv'),
    (lambda t: (t/'positives.csv').write_bytes(b'query,reference\n\xff\xfe,a\n'), 'positives.csv'),
    (lambda t: (t/'positives.csv').write_text('query,reference\nnobody.jpg,x.jpg\n'), 'nobody.jpg'),
    (lambda t: (t/'positives.json').write_text('{"a": ['), 'positives.json'),
    (lambda t: (t/'positives.json').write_text('[1, 2]'), 'positives.json'),
    (lambda t: (t/'positives.json').write_text('{"a": 3}'), 'positives.json'),
]


@pytest.mark.parametrize('spoil, says', EVAL, ids=range(len(EVAL)))
def test_evaluation_trees(spoil, says, good, tmp_path, capsys):
    shutil.copytree(good/'utm', tmp_path/'set'); spoil(tmp_path/'set')
    refused(capsys, tmp_path, 'eval', ['--checkpoint', good/'m.safetensors', '--data', tmp_path/'set', '--out', tmp_path/'out', *SIZED], says)


def pitts(t, **struct):
    (t/'pitts30k').mkdir(); savemat(t/'pitts30k'/'pitts30k_test.mat', dict(dbStruct=struct))

ONE = dict(dbImage=np.array(['a.jpg'], dtype=object), utmDb=np.zeros((2, 1)), qImage=np.array(['q.jpg'], dtype=object), utmQ=np.zeros((2, 1)))
MATS = [
    (lambda t: ((t/'pitts30k').mkdir(), (t/'pitts30k'/'pitts30k_test.mat').write_bytes(b'')), 'pitts30k_test.mat'),
    (lambda t: ((t/'pitts30k').mkdir(), (t/'pitts30k'/'pitts30k_test.mat').write_bytes(b'MATLAB 5.0 MAT-file' + b' ' * 105 + struct.pack('<HH', 0x100, 0x4d49) + b'\xff' * 64)), 'pitts30k_test.mat'),
    (lambda t: pitts(t, **ONE | dict(utmDb=np.zeros((3, 5)))), 'pitts30k_test.mat'),
    (lambda t: pitts(t, **ONE | dict(utmDb=np.array(['x', 'y'], dtype=object))), 'pitts30k_test.mat'),
    (lambda t: pitts(t, **ONE | dict(utmQ=np.full((2, 1), np.nan))), 'nan'),
    (lambda t: pitts(t, **{k: v for k, v in ONE.items() if k != 'utmQ'}), 'utmQ'),
    (lambda t: pitts(t, **ONE | dict(dbImage=np.array(['../../x.jpg'], dtype=object))), 'leads out'),
    (lambda t: pitts(t, **ONE | dict(qImage=np.array(['/etc/passwd'], dtype=object))), 'leads out'),
]


@pytest.mark.parametrize('spoil, says', MATS, ids=range(len(MATS)))
def test_pittsburgh_structs(spoil, says, good, tmp_path, capsys):
    spoil(tmp_path)
    refused(capsys, tmp_path, 'eval', ['--checkpoint', good/'m.safetensors', '--benchmark', 'pitts30k', '--data-root', tmp_path, '--out', tmp_path/'out', *SIZED], says)


# ---- EXIF ------------------------------------------------------------------------------------------------------

def photo(path, gps):
    "A photograph whose GPS block is what the test says, or raw bytes in place of EXIF."
    image, exif = Image.new('RGB', (56, 56)), Image.Exif()
    if isinstance(gps, dict): exif.get_ifd(0x8825).update(gps); exif[0x8825] = exif.get_ifd(0x8825)
    image.save(path, exif=exif.tobytes() if isinstance(gps, dict) else b'Exif\0\0' + gps)

R = TiffImagePlugin.IFDRational
LUND = ((R(55), R(42), R(0)), (R(13), R(11), R(0)))
EXIF = [
    {1: 'N', 2: LUND[0], 3: 'E'},                                                # longitude missing
    {1: 'N', 2: (R(55, 0), R(0, 0), R(0, 0)), 3: 'E', 4: LUND[1]},               # 55/0 degrees
    {1: 'N', 2: (R(155), R(0), R(0)), 3: 'E', 4: LUND[1]},                       # latitude 155
    {1: 'Q', 2: LUND[0], 3: 'E', 4: LUND[1]},                                    # no hemisphere
    {1: 'N', 2: (R(0), R(0), R(0)), 3: 'E', 4: (R(0), R(0), R(0))},              # a receiver without a fix
    {1: 'N', 2: LUND[0], 3: 'E', 4: (R(999), R(0), R(0))},                       # longitude 999
    b'II*\0\x08\0\0\0\x01\0\x25\x88\x04\0\x01\0\0\0\xff\xff\xff\x7f',             # a block that lies behind the end of the file
    b'II*\0\x08\0\0\0\xff\xff' + b'\xff' * 40,                                   # 65,535 entries of nonsense
    b'MM',                                                                       # cut off
    b'',
]


@pytest.mark.parametrize('gps', EXIF, ids=range(len(EXIF)))
def test_exif(gps, good, tmp_path, capsys):
    (tmp_path/'trip').mkdir(); photo(tmp_path/'trip'/'a.jpg', gps)
    refused(capsys, tmp_path, 'train', ['--data', tmp_path/'trip', '--val', good/'utm', '--run', tmp_path/'run', *SMALL], 'can be placed')


# ---- checkpoints -----------------------------------------------------------------------------------------------

def header(data, **change): # a safetensors file whose header was changed
    n = struct.unpack('<Q', data[:8])[0]; head = json.loads(data[8:8 + n]); head.update(change); text = json.dumps(head).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + n:]

def tensors(good, change):
    from safetensors.torch import load_file
    return change(load_file(good/'m.safetensors'))

CHECKPOINTS = [
    lambda g, f: f.write_bytes(b''),
    lambda g, f: f.write_bytes((g/'m.safetensors').read_bytes()[:5000]),
    lambda g, f: f.write_bytes((g/'m.safetensors').read_bytes()[:-1]),
    lambda g, f: f.write_bytes(struct.pack('<Q', 2**63) + b'{}'),
    lambda g, f: f.write_bytes(struct.pack('<Q', 2) + b'[]'),
    lambda g, f: f.write_bytes(struct.pack('<Q', 2) + b'{}'),
    lambda g, f: f.write_bytes(header((g/'m.safetensors').read_bytes(), __metadata__={})),
    lambda g, f: f.write_bytes(header((g/'m.safetensors').read_bytes(), __metadata__={'config': 'not json'})),
    lambda g, f: f.write_bytes(header((g/'m.safetensors').read_bytes(), __metadata__={'config': '{"backbone": "nobody", "probes": "many"}'})),
    lambda g, f: f.write_bytes(header((g/'m.safetensors').read_bytes(), __metadata__={'config': '[]'})),
    lambda g, f: save_file(tensors(g, lambda t: dict(list(t.items())[:-1])), f, metadata=meta(g)),
    lambda g, f: save_file(tensors(g, lambda t: t | dict(extra=torch.zeros(2))), f, metadata=meta(g)),
    lambda g, f: save_file(tensors(g, lambda t: {k: torch.zeros(3) for k in t}), f, metadata=meta(g)),
    lambda g, f: f.mkdir(),
    lambda g, f: f.symlink_to(f),
]

def meta(good):
    from safetensors import safe_open
    with safe_open(good/'m.safetensors', 'pt') as f: return {k: v for k, v in f.metadata().items() if k != 'sha256'}        # as before there were checksums


@pytest.mark.parametrize('make', CHECKPOINTS, ids=range(len(CHECKPOINTS)))
def test_checkpoints(make, good, tmp_path, capsys):
    make(good, tmp_path/'x.safetensors')
    refused(capsys, tmp_path, 'eval', ['--checkpoint', tmp_path/'x.safetensors', '--data', good/'utm', '--out', tmp_path/'out', *SIZED], 'x.safetensors')


# ---- names of paths --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path, says', [('a\0b', ''), ('x' * 300, ''), ('/dev/null', ''), ('', '')], ids=['null byte', 'too long', 'a device', 'empty'])
@pytest.mark.parametrize('name', ['train', 'eval', 'data'])
def test_paths_that_are_none(path, says, name, good, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = dict(train=['--data', path, '--val', good/'utm', '--run', tmp_path/'run', *SMALL], eval=['--checkpoint', good/'m.safetensors', '--data', path, *SIZED], data=['check', path])[name]
    refused(capsys, tmp_path, name, argv, says)


# ---- the check, and two processes of their own -----------------------------------------------------------------

@pytest.mark.parametrize('layout, spoil, says', [t for t in TRAIN if t[0] != 'photos'][::3], ids=lambda v: v if isinstance(v, str) else '')
def test_the_check_never_fails_on_a_damaged_set(layout, spoil, says, good, tmp_path, capsys):
    "0 where something is left to serve, 2 and one sentence where nothing is; never a traceback."
    shutil.copytree(good/layout, tmp_path/'set', symlinks=True); spoil(tmp_path/'set')
    before = tree(tmp_path)
    try: sage_data(['check', str(tmp_path/'set')]); code = 0
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert code in (0, 2) and len(err.splitlines()) == (code == 2) and tree(tmp_path) == before
    assert ('warnings' in out or 'missing' in out) or code == 2


@pytest.mark.parametrize('argv', [['train', '--data', 'SET', '--val', 'SET', '--run', 'run'], ['eval', '--checkpoint', 'bad.safetensors', '--data', 'SET', '--out', 'out']], ids=['train', 'eval'])
def test_in_a_process(argv, root, good, tmp_path):
    shutil.copytree(good/'gsv', tmp_path/'set'); put('aldwick.csv', b'\0\xff')(tmp_path/'set'); (tmp_path/'bad.safetensors').write_bytes(b'\xff' * 64)
    before = tree(tmp_path)
    done = subprocess.run([sys.executable, '-m', 'sage.cli', *[str(tmp_path/'set') if a == 'SET' else a for a in argv]], cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root), PYTHONWARNINGS='ignore'))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(f'sage_{argv[0]}: '), done.stderr
    assert tree(tmp_path) == before
