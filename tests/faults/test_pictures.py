"""Pictures from strangers: for each kind a stated outcome. Used, and then right; or left out, counted and named. Never a black substitute."""
import base64, io, os, re, struct, subprocess, sys, tempfile, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sage import cli
from sage.core import UserError
from sage.formats import write_utm
from sage.images import load_image, scan_images
from sage.photos import list_images, read_photos
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

def bomb(side):
    "A PNG that says it has side x side pixels; the first few kB of them."
    chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0' * 10**6, 9)) + chunk(b'IEND', b'')

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
