"""Pictures from strangers: for each kind a stated outcome. Used, and then right; or left out, counted and named. Never a black substitute."""
import ast, base64, io, os, re, struct, subprocess, sys, tempfile, threading, time, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sage import cli, images
from sage.cli_data import sage_data
from sage.core import UserError
from sage.formats import read_gsv, read_msls, read_utm, write_gsv, write_msls, write_utm
from sage.images import load_image, scan_images
from sage.photos import below, inside, list_images, read_photos
from sage.places import make_table
from sage.run import Run
from sage.viz.style import MISSING, thumbnail

G = np.random.default_rng(0)
SCENE = np.kron(G.integers(40, 255, (4, 6, 3)), np.ones((14, 14, 1))).astype(np.uint8)           # 84 x 56, no black in it


def saved(kind='JPEG', image=None, **how):
    out = io.BytesIO(); (image or Image.fromarray(SCENE)).save(out, kind, **how); return out.getvalue()

def grey(): return np.asarray(Image.fromarray(SCENE).convert('L'))

def sixteen(): return saved('PNG', Image.fromarray(grey().astype(np.uint16) * 257))

def turned():
    exif = Image.Exif(); exif[0x0112] = 6
    return saved(image=Image.fromarray(SCENE).transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)

def film(kind): return saved(kind, save_all=True, append_images=[Image.new('RGB', (84, 56), 'red')] * 2)

def alpha():
    pixels = np.dstack([SCENE, np.full((56, 84, 1), 255, np.uint8)]); pixels[:, :42, 3] = 0
    return saved('PNG', Image.fromarray(pixels))

def deep_rgb():
    "A PNG of 16 bits in each of three channels, which Pillow reads and does not write."
    chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    rows = b''.join(b'\0' + row.tobytes() for row in (SCENE.astype('>u2') * 257))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 84, 56, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')

def holes():
    "A palette, one colour of which is transparent and white nowhere beneath."
    image = Image.fromarray(SCENE).quantize(64)
    colours, pixels = image.getpalette(), np.asarray(image).copy()
    pixels[:, :42] = len(colours)//3
    out = Image.fromarray(pixels, 'P'); out.putpalette(colours + [10, 20, 30])
    return saved('PNG', out, transparency=len(colours)//3)

def png(wide, high, colours, data):
    "A PNG of 8 bits a channel, whatever its pixels are."
    chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', wide, high, 8, colours, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(data, 9)) + chunk(b'IEND', b'')

def bomb(side): return png(side, side, 2, b'\0' * 10**6)                             # says it has side x side pixels; the first few kB of them

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(hello) print\nshowpage\n%%EOF\n'

def white_half(x): x = x.astype(int).copy(); x[:, :42] = 255; return x

# name → (bytes, what becomes of it: the pixels it must show [H, W, 3], or words of the reason why it is left out)
KINDS = {
    'plain.jpg': (saved(quality=95), SCENE),
    'truncated.jpg': (saved()[:700], 'cannot be decoded'),
    'truncated.png': (saved('PNG')[:200], 'cannot be decoded'),
    'half.webp': (saved('WEBP')[:300], ''),
    'empty.jpg': (b'', 'the file is empty'),
    'page.jpg': (b'<html>404</html>', 'not an image'),
    'zeros.jpg': (b'\0' * 4096, 'not an image'),
    'eps.jpg': (EPS, 'not an image'),
    'svg.png': (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', 'not an image'),
    'really_a.png': (saved('JPEG', quality=95), SCENE),                          # the content decides, not the name
    'really_b.jpg': (saved('GIF'), SCENE),
    'cmyk.jpg': (saved(image=Image.fromarray(SCENE).convert('CMYK'), quality=95), SCENE),
    'sixteen.png': (sixteen(), np.repeat(grey()[..., None], 3, 2)),
    'grey.png': (saved('PNG', Image.fromarray(grey())), np.repeat(grey()[..., None], 3, 2)),
    'palette.png': (saved('PNG', Image.fromarray(SCENE).quantize(64)), SCENE),
    'deep.png': (deep_rgb(), SCENE), 'sixteen.tif': (saved('TIFF', Image.fromarray(grey().astype(np.uint16) * 257)), np.repeat(grey()[..., None], 3, 2)), 'holes.png': (holes(), white_half(SCENE)),
    'alpha.png': (alpha(), white_half(SCENE)),                                   # what is transparent is white, not what lies beneath
    'animated.gif': (film('GIF'), SCENE), 'animated.png': (film('PNG'), SCENE), 'animated.webp': (film('WEBP'), SCENE),   # the first frame
    'turned.jpg': (turned(), SCENE),
    'one.png': (saved('PNG', Image.new('RGB', (1, 1), (9, 200, 30))), np.array([[[9, 200, 30]]])),
    'progressive.jpg': (saved(progressive=True, quality=95), SCENE),
    'bomb30000.png': (bomb(30_000), '30000 x 30000 pixels|decompression bomb|exceeds limit'),
    'bomb12000.png': (bomb(12_000), '12000 x 12000 pixels'),
    'whole32.tif': (saved('TIFF', Image.fromarray(np.linspace(0, 2**31 - 1, 64).reshape(8, 8).astype(np.int32))), '32-bit numbers from 0 to 2,147,483,647'),
    'low32.tif': (saved('TIFF', Image.fromarray(grey().astype(np.int32) * 257)), np.repeat(grey()[..., None], 3, 2)), 'unpainted.png': (png(8, 8, 3, bytes(72)), 'cannot be decoded'),
    'float.tif': (saved('TIFF', Image.fromarray(np.ones((4, 4), np.float32))), 'floating-point'),
    'new\nline.jpg': (saved(quality=95), SCENE), 'quo"t\'e.jpg': (saved(quality=95), SCENE), '😀 ünï.jpg': (saved(quality=95), SCENE), '-rf.jpg': (saved(quality=95), SCENE), '<script>{{7*7}}.jpg': (saved(quality=95), SCENE),
    'bad\n\x1b[31mname.jpg': (b'', 'the file is empty'),
}
USED = {n for n, (_, want) in KINDS.items() if not isinstance(want, str)}


@pytest.fixture(scope='module')
def strangers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('strangers')/'photos'
    folder.mkdir()
    for name, (data, _) in KINDS.items(): (folder/name).write_bytes(data)
    return folder


@pytest.mark.parametrize('name', KINDS, ids=lambda n: re.sub(r'[^\w.]', '_', n))
def test_each_kind(name, strangers):
    want = KINDS[name][1]
    if isinstance(want, str):
        with pytest.raises(UserError) as e: load_image(strangers/name)
        assert re.search(want, str(e.value)) and str(strangers/name) in str(e.value)
    else:
        got = load_image(strangers/name)
        assert got.mode == 'RGB' and got.size == want.shape[1::-1]
        assert np.abs(np.asarray(got).astype(int) - want).mean() < 12 and (np.asarray(got).max(2) > 8).mean() > .99, 'no black substitute'


def test_each_outcome_is_stated(root):
    "docs/strangers.md has a line for every kind, and says the same."
    stated = {n: line.split('|')[2] for line in (root/'docs'/'strangers.md').read_text().splitlines() if line.startswith('| ') for n in re.findall(r'`([^`]+)`', line.split('|')[3] if line.count('|') > 3 else '')}
    for name, (_, want) in KINDS.items():
        outcome = stated[re.sub(r'[^\w.]', '_', name)]
        assert ('left out' in outcome) == isinstance(want, str), (name, outcome)


def table(folder):
    return make_table(image=[str(folder/n) for n in KINDS], easting=0., northing=0.)


def test_the_scan_names_exactly_those_it_leaves_out(strangers):
    good, bad = scan_images(table(strangers))
    assert {Path(p).name for p in good.image} == USED and {Path(p).name for p, _ in bad} == set(KINDS) - USED


def describe(tmp_path, capsys, *argv):
    capsys.readouterr(); code = 0
    try: cli.sage_describe([*map(str, argv), '-o', str(tmp_path/'d.parquet'), '--size', '56', '--quiet'])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def test_describe_leaves_out_counts_and_names(strangers, tmp_path, capsys):
    code, out, err = describe(tmp_path, capsys, strangers)
    d = pd.read_parquet(tmp_path/'d.parquet')
    assert code == 0 and {Path(p).name for p in d.image} == USED and f'{len(KINDS) - len(USED)} of {len(KINDS)} images cannot be read' in err and len(err.splitlines()) == 1 and '\x1b' not in err
    assert np.isfinite(np.stack(d.embedding)).all() and not [p for p in tmp_path.rglob('.*')]


def test_too_many_end_the_run_with_the_list(strangers, tmp_path, capsys):
    code, out, err = describe(tmp_path, capsys, strangers, '--max-bad', '1%')
    *listed, said = err.splitlines()
    assert code == 2 and said.startswith('sage_describe: ') and 'more than the 1% of --max-bad' in said and len(listed) == len(KINDS) - len(USED)
    assert all(any(re.sub(r'\W.*', '', n) in line for line in listed) for n in set(KINDS) - USED) and not list(tmp_path.iterdir()) and '\x1b' not in err
    assert describe(tmp_path, capsys, strangers, '--max-bad', '60%')[0] == 0
    for no in ('1', '-1%', '101%', 'x%', 'nan%'): assert describe(tmp_path, capsys, strangers, '--max-bad', no)[0] == 2


SMALL = '--backbone sage_nano --image-size 56 --eval-size 56 --epochs 1 --steps 1 --places-per-batch 2 --images-per-place 2 --min-size 2 --augment none --quiet --no-record-graph'.split()


def town(folder, names, bad=0):
    "Places 60 m apart, three views each; the last `bad` pictures are broken."
    folder.mkdir(parents=True)
    for i, n in enumerate(names): Image.fromarray(np.roll(SCENE, i, 1)).resize((56, 56)).save(folder/n, 'JPEG') if i < len(names) - bad else (folder/n).write_bytes(b'')
    place = np.arange(len(names)) // 3
    return make_table(image=[str(folder/n) for n in names], city=folder.name, place=place, easting=5e5 + 60. * place + np.arange(len(names)) % 3, northing=5.3e6, zone='32N', role=np.where(np.arange(len(names)) % 3, 'database', 'query'))


def test_training_with_strange_names_and_a_limit(tmp_path, capsys):
    "Newline, quote, emoji and a template in names go through training and back; one bad of 24 is more than 1 %."
    strange = [f'{i:02d}{mark}.jpg' for i, mark in enumerate(['\n', '"', "'", '😀', '<script>', '{{7*7}}', ' ', '%s'] * 3)]
    df = town(tmp_path/'photos', strange, bad=1)
    df[['image', 'easting', 'northing', 'zone', 'place']].assign(path=[Path(p).name for p in df.image]).drop(columns='image').to_csv(tmp_path/'photos'/'where.csv', index=False)
    write_utm(town(tmp_path/'v', [f'{i}.jpg' for i in range(12)]).assign(split='test'), tmp_path/'val')
    argv = ['--data', str(tmp_path/'photos'), '--val', str(tmp_path/'val'), '--run', str(tmp_path/'run'), *SMALL]
    with pytest.raises(SystemExit) as e: cli.sage_train([*argv, '--max-bad', '1%'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and '1 of 24 images cannot be read' in err and '23%s.jpg: the file is empty' in err and not (tmp_path/'run').exists()
    cli.sage_train([*argv, '--max-bad', '5%'])
    assert sorted(Path(p).name for p in Run(tmp_path/'run').table('mined').image) == sorted(strange[:-1])


def test_training_counts_what_a_table_left_out(tmp_path, capsys):
    "Files that no table could take in are unreadable images of the data set, too, or have no position; neither is lost in silence."
    from sage.sources import readable
    df = town(tmp_path/'photos', [f'{i}.jpg' for i in range(9)])
    df.attrs |= dict(left_out=[('my position/a.jpg', 'my position/a.jpg: the file is empty, wherever its position'), ('b.jpg', 'b.jpg: nowhere')], unplaced=['b.jpg'])
    assert len(readable(df, 'town', progress=False)) == 9
    err = capsys.readouterr().err
    assert '1 of 11 images cannot be read and are left out: my position/a.jpg' in err and '1 of 11 images have no position and are left out: b.jpg' in err
    with pytest.raises(UserError, match='1 of 11 images cannot be read, more than the 1%'): readable(df, 'town', progress=False, max_bad=.01)

def test_a_link_out_of_the_tree(tmp_path):
    "A folder may consist of links, as the downloaders of benchmarks make them; what a csv names may not lead out, links followed."
    (tmp_path/'secret').mkdir(); (tmp_path/'secret'/'a.jpg').write_bytes(saved())
    (tmp_path/'photos').mkdir(); (tmp_path/'photos'/'link.jpg').symlink_to(tmp_path/'secret'/'a.jpg'); (tmp_path/'photos'/'way').symlink_to(tmp_path/'secret')
    (tmp_path/'photos'/'loop.jpg').symlink_to('loop.jpg'); (tmp_path/'photos'/'nothing.jpg').symlink_to('/nowhere/x.jpg')
    for path in ('link.jpg', 'way/a.jpg', '../secret/a.jpg', str(tmp_path/'secret'/'a.jpg'), 'way/../../secret/a.jpg'):
        (tmp_path/'photos'/'where.csv').write_text(f'path,lat,lon\n{path},47,9\n')
        with pytest.raises(UserError, match='leads out of'): read_photos(tmp_path/'photos')
    for name in ('loop.jpg', 'nothing.jpg'):
        with pytest.raises(UserError, match=name): load_image(tmp_path/'photos'/name)
    assert load_image(tmp_path/'photos'/'link.jpg').size == (84, 56)


def test_pipes_and_devices_in_a_folder_of_photographs(tmp_path):
    "Nothing waits for them: they are left out by name, and no csv."
    from sage.preflight import doubles
    for i, name in enumerate(('a.jpg', 'b.jpg', 'c.csv')): os.mkfifo(tmp_path/name)
    (tmp_path/'d.png').symlink_to('/dev/zero'); (tmp_path/'e.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='none of the 4 images can be placed'): read_photos(tmp_path)
    df = make_table(image=[str(tmp_path/n) for n in ('a.jpg', 'b.jpg', 'd.png', 'e.jpg')], place=[0, 1, 2, 3], easting=[0., 900, 1800, 2700], northing=0.)
    assert doubles(df) == []
    with pytest.raises(UserError, match='none of the 4 images'): scan_images(df)
    (tmp_path/'f.jpg').write_bytes(saved())
    bad = {Path(p).name: why.removeprefix(f'{p}: ') for p, why in scan_images(pd.concat([df, df[:1].assign(image=str(tmp_path/'f.jpg'))], ignore_index=True))[1]}
    assert bad == dict.fromkeys(('a.jpg', 'b.jpg', 'd.png'), 'a pipe or a device, not a file') | {'e.jpg': 'the file is empty'}
    (tmp_path/'g.jpg').mkdir()
    with pytest.raises(UserError, match='g.jpg: a folder, not a file'): load_image(tmp_path/'g.jpg')

def test_linked_folders(tmp_path):
    "Entered, once each: two links to one folder, and links in a circle."
    a, b = tmp_path/'a', tmp_path/'b'
    for f in (a, b): f.mkdir(); (f/f'{f.name}.jpg').write_bytes(KINDS['plain.jpg'][0])
    (a/'one').symlink_to(b); (a/'two').symlink_to(b); (b/'back').symlink_to(a); (b/'.hidden').symlink_to(a)
    assert list_images(a) == [f'{a}/a.jpg', f'{a}/one/b.jpg']


def shown(image): # what a thumbnail shows
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(thumbnail(image, 64).split(',')[1]))).convert('RGB')).astype(int)


@pytest.mark.parametrize('name', [n for n, (_, want) in KINDS.items() if not isinstance(want, str)], ids=lambda n: re.sub(r'[^\w.]', '_', n))
def test_a_thumbnail_shows_what_the_network_sees(name, strangers):
    small = load_image(strangers/name); small.thumbnail((64, 64))
    assert np.abs(shown(strangers/name) - np.asarray(small)).mean() < 12


@pytest.mark.parametrize('name', [n for n, (_, want) in KINDS.items() if isinstance(want, str)], ids=lambda n: re.sub(r'[^\w.]', '_', n))
def test_a_thumbnail_of_what_is_left_out_is_a_crossed_box(name, strangers): assert thumbnail(strangers/name) == MISSING


@pytest.mark.filterwarnings("ignore")
def test_a_thumbnail_with_damaged_exif():
    "Two thousand damaged EXIF blocks in a picture that is whole: shown, or a crossed box; never an exception."
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x8825] = {1: 'N', 2: (55., 42., 0.), 3: 'E', 4: (13., 11., 0.)}
    data, g = saved(exif=exif), np.random.default_rng(0)
    at, n = data.index(b'Exif'), len(exif.tobytes())
    with tempfile.TemporaryDirectory() as t:
        for i in range(2000):
            bad = bytearray(data)
            for j in g.integers(at + 6, at + n, g.integers(1, 6)): bad[j] = g.integers(256)
            (Path(t)/'x.jpg').write_bytes(bad)
            assert thumbnail(Path(t)/'x.jpg').startswith('data:image/')


def test_a_name_that_is_no_text(tmp_path, capsys):
    "Bytes that are no UTF-8: refused by name, for no table could hold it."
    (tmp_path/'photos').mkdir()
    for n in (b'\xff\xfe.jpg', b'ok.jpg'): Path(os.fsdecode(os.fsencode(tmp_path/'photos') + b'/' + n)).write_bytes(saved())
    code, out, err = describe(tmp_path, capsys, tmp_path/'photos')
    assert code == 2 and len(err.splitlines()) == 1 and 'the name of this file is no UTF-8 text; rename it' in err and err.startswith('sage_describe: ') and not (tmp_path/'d.parquet').exists(), err


def test_a_bomb_does_not_go_off(strangers):
    "Refused by its header, within a small memory."
    code = f'import resource, sys; sys.path.insert(0, {str(Path(cli.__file__).parents[1])!r})\nfrom sage.images import load_image\nfrom sage.core import UserError, peak_memory\nbefore = peak_memory()\n' \
           f'try: load_image({str(strangers/"bomb30000.png")!r})\nexcept UserError as e: print(peak_memory() - before < 50e6)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'True\n'


# ---- nothing is run, nothing is hidden, nothing takes the whole memory

@pytest.mark.skipif(os.name == 'nt', reason='a program is a file that may be run')
def test_postscript_starts_no_program(tmp_path):
    "A Ghostscript that tells when it is started is the first on the path, and the picture is a PostScript program."
    (tmp_path/'bin').mkdir(); (tmp_path/'photos').mkdir()
    (tmp_path/'bin'/'gs').write_text(f'#!/bin/sh\ntouch "{tmp_path}/ran"\n'); (tmp_path/'bin'/'gs').chmod(0o755)
    for name in ('a.jpg', 'b.png', 'c.tif'): (tmp_path/'photos'/name).write_bytes(EPS)
    code = f'import sys; sys.path.insert(0, {str(Path(cli.__file__).parents[1])!r})\nfrom sage import cli\nfrom sage.viz.style import thumbnail, MISSING\nassert thumbnail({str(tmp_path/"photos"/"a.jpg")!r}) == MISSING\ncli.sage_describe([{str(tmp_path/"photos")!r}, "-o", {str(tmp_path/"d.parquet")!r}, "--size", "56", "--quiet"])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(PATH=f'{tmp_path}/bin:{os.environ["PATH"]}', PYTHONWARNINGS='ignore'))
    assert done.returncode == 2 and 'not an image' in done.stderr and 'Traceback' not in done.stderr and not (tmp_path/'ran').exists(), done.stderr


def test_every_picture_is_opened_as_one_of_the_stated_kinds(root):
    "The package opens files in one place, and there it says of which kinds they may be."
    opens = [(p.name, c) for p in sorted((root/'sage').rglob('*.py')) for c in ast.walk(ast.parse(p.read_text())) if isinstance(c, ast.Call) and ast.unparse(c.func) in ('Image.open', 'PIL.Image.open', 'plt.imread', 'imread')]
    files = [(name, c) for name, c in opens if 'io.BytesIO(' not in ast.unparse(c)]                       # a thumbnail of our own making lies in memory
    assert [name for name, _ in files] == ['photos.py'] and all('formats' in {k.arg for k in c.keywords} for _, c in files), [(name, ast.unparse(c)) for name, c in files]


@pytest.fixture
def unlisted(monkeypatch):
    "A function that takes the permission to list a folder away, from whoever asks, the owner of the machine included."
    scandir, gone = os.scandir, set()
    def scan(path='.'):
        if os.path.realpath(path) in gone: raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', scan)
    return lambda path: gone.add(os.path.realpath(path))


def test_a_folder_without_permission(tmp_path, capsys, unlisted, monkeypatch):
    "However deep it lies, its photographs are not left out in silence: one sentence that names it."
    deep = tmp_path/'photos'/'day one'/'evening'
    deep.mkdir(parents=True); (deep/'a.jpg').write_bytes(saved()); (tmp_path/'photos'/'b.jpg').write_bytes(saved())
    assert len(list_images(tmp_path/'photos')) == 2
    unlisted(deep)
    with pytest.raises(UserError, match='evening: this folder cannot be listed .Permission denied.'): list_images(tmp_path/'photos')
    code, out, err = describe(tmp_path, capsys, tmp_path/'photos')
    assert code == 2 and len(err.splitlines()) == 1 and f'{deep}: this folder cannot be listed' in err and not (tmp_path/'d.parquet').exists(), err
    write_gsv(town(tmp_path/'t', [f'{i}.jpg' for i in range(6)]).assign(heading=9., time='2026-03'), tmp_path/'gsv')
    unlisted(tmp_path/'gsv'/'Images'/'t')
    with pytest.raises(UserError, match='Images/t: this folder cannot be listed'): read_gsv(tmp_path/'gsv')
    for city in ('u', 'v'): write_utm(town(tmp_path/city, [f'{i}.jpg' for i in range(6)]).assign(split='test'), tmp_path/'utm'/city)
    assert read_utm(tmp_path/'utm').city.nunique() == 2
    monkeypatch.setattr(os, 'access', lambda path, mode: os.path.basename(path) != 'v')
    with pytest.raises(UserError, match='utm/v: this folder cannot be read'): read_utm(tmp_path/'utm')


def test_a_folder_whose_name_is_no_text(tmp_path, capsys):
    "The names in it are text, and no table could hold their paths."
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b'/map\xff'))
    try: bad.mkdir()
    except OSError: pytest.skip('this disk takes names of text only')
    (bad/'a.jpg').write_bytes(saved()); (tmp_path/'link').symlink_to(bad)
    write_gsv(town(tmp_path/'t', [f'{i}.jpg' for i in range(6)]).assign(heading=9., time='2026-03'), bad/'gsv')
    for read in (lambda: list_images(bad), lambda: inside(bad, ['a.jpg'], 'x.csv'), lambda: below(bad, ['b.jpg'], 'x.csv'), lambda: below(tmp_path/'link', ['a.jpg'], 'x.csv'), lambda: read_gsv(bad/'gsv')):
        with pytest.raises(UserError, match='the name of this file is no UTF-8 text; rename it'): read()
    with pytest.raises(UserError, match='x.csv: the path .* no file name has'): below(tmp_path, ['\udcff.jpg'], 'x.csv')
    (bad/'where.csv').write_text('path,lat,lon\na.jpg,47,9\n')
    for argv in (['check', str(bad)], ['check', str(bad/'gsv')]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: sage_data(argv)
        assert e.value.code == 2 and 'no UTF-8 text' in (err := capsys.readouterr().err) and len(err.splitlines()) == 1, err


@pytest.mark.parametrize('kind', ['gsv', 'msls'])
def test_links_of_named_images(kind, tmp_path):
    "A csv that gives names, not paths: a picture of that name may be a link within the data set, and none that leads out; a folder may lie elsewhere."
    write, read = dict(gsv=(write_gsv, read_gsv), msls=(write_msls, read_msls))[kind]
    write(town(tmp_path/'t', [f'{i}.jpg' for i in range(6)]).assign(heading=9., time='2026-03'), tmp_path/'set')
    first, second, *_ = sorted((tmp_path/'set').rglob('*.jpg'))
    first.unlink(); first.symlink_to(second)
    assert len(read(tmp_path/'set')) == 6
    folder = first.parent
    folder.rename(tmp_path/'disk'); folder.symlink_to(tmp_path/'disk')
    assert len(read(tmp_path/'set')) == 6, 'a whole folder behind a link'
    (tmp_path/'secret').mkdir(); (tmp_path/'secret'/'x.jpg').write_bytes(saved())
    first.unlink(); first.symlink_to(tmp_path/'secret'/'x.jpg')
    with pytest.raises(UserError, match=f'{re.escape(first.name)}. is a link that leads out of .*set'): read(tmp_path/'set')


def test_large_pictures_take_turns(tmp_path, monkeypatch):
    "Threads that decode have a stated number of pixels in hand, a broken picture gives its share back, and a child begins with none."
    monkeypatch.setattr(images, '_room', room := images._Room(6000)); monkeypatch.setattr(Image.Image, 'has_transparency_data', property(lambda self: time.sleep(.01) or seen.append(room.held)))
    seen, names = [], [f'{i}.png' for i in range(24)]
    for i, n in enumerate(names): (tmp_path/n).write_bytes(saved('PNG', Image.new('RGB', (50, 10 + 5*(i % 8)), (i, 90, 9)))) if i % 5 else (tmp_path/n).write_bytes(saved('PNG')[:200])
    good, bad = scan_images(make_table(image=[str(tmp_path/n) for n in names], easting=0., northing=0.), False)
    assert len(good) == 19 and 0 < max(seen) <= 6000 and room.held == 0
    assert load_image(tmp_path/'4.png', limit=10**9).size == (50, 30)
    monkeypatch.undo()
    if hasattr(os, 'fork'):
        code = f'import sys; sys.path.insert(0, {str(Path(cli.__file__).parents[1])!r})\nimport os\nfrom sage import images\nwith images._room(images._room.most):\n    pid = os.fork()\n    if not pid: images.load_image({str(tmp_path/"4.png")!r}); os._exit(7)\n    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))'
        assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120).stdout == '7\n'


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is measured as Linux does')
def test_transparency_takes_little_memory(tmp_path):
    "The pixels of the file, those of the result, and a few pieces: not four copies."
    side = 4000
    for name, colours, channels in (('rgba.png', 6, 4), ('grey.png', 4, 2)): (tmp_path/name).write_bytes(png(side, side, colours, bytes((1 + channels*side)*side)))
    (tmp_path/'small.png').write_bytes(alpha())
    for name in ('rgba.png', 'grey.png'):
        code = f'import sys; sys.path.insert(0, {str(Path(cli.__file__).parents[1])!r})\nfrom sage.images import load_image\nfrom sage.core import peak_memory\nload_image({str(tmp_path/"small.png")!r}); before = peak_memory()\nprint(load_image({str(tmp_path/name)!r}).size, peak_memory() - before)'
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
        assert out.startswith(f'({side}, {side}) ') and float(out.split()[-1]) < 2.7*4*side**2, out
