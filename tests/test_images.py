"""Decoding against independent readings, damaged files of every kind, and augmentation that is the same in any process."""
import io, os, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from sage import images
from sage.core import MissingPath, UserError
from sage.images import ImageTable, check_size, eval_transform, image_loader, load_image, own_random, scan_images, train_transform
from sage.places import make_table


def picture(seed=0, size=(40, 30), mode='RGB'):
    rng = np.random.default_rng(seed)
    return Image.fromarray(np.kron(rng.integers(0, 255, (size[1]//5, size[0]//5, 3)), np.ones((5, 5, 1))).astype(np.uint8)).convert(mode)


def table(paths): return make_table(image=[str(p) for p in paths], easting=0., northing=0.)


def says(what, do, *args, **kwargs):
    with pytest.raises(UserError) as e: do(*args, **kwargs)
    assert what in str(e.value) and '\n' not in str(e.value), str(e.value)
    return e.value


@pytest.fixture
def many(tmp_path):
    paths = [tmp_path/f'{i}.png' for i in range(7)]
    for i, p in enumerate(paths): picture(i).save(p)
    return table(paths)


# ---- decoding

@pytest.mark.parametrize('turn', range(0, 10))
def test_orientation_equals_pillows(turn, tmp_path):
    exif = Image.Exif(); exif[0x0112] = turn
    for name in ('a.jpg', 'a.png', 'a.webp', 'a.tif'):
        picture().save(tmp_path/name, exif=exif)
        want = ImageOps.exif_transpose(Image.open(tmp_path/name)).convert('RGB')
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path/name)), np.asarray(want))


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    warnings.simplefilter('ignore')
    picture().save(tmp_path/'a.jpg', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff garbage')
    assert load_image(tmp_path/'a.jpg').size == (40, 30)


@pytest.mark.parametrize('mode, name', [('1', 'a.png'), ('L', 'a.jpg'), ('P', 'a.gif'), ('P', 'a.png'), ('CMYK', 'a.jpg'), ('CMYK', 'a.tif'), ('YCbCr', 'a.tif'), ('RGB', 'a.bmp'), ('LA', 'a.png'), ('RGBA', 'a.webp')])
def test_modes(mode, name, tmp_path):
    picture(mode=mode).save(tmp_path/name)
    got = load_image(tmp_path/name)
    assert got.mode == 'RGB' and got.size == (40, 30)
    if mode != '1': assert np.abs(np.asarray(got).astype(int) - np.asarray(picture(mode='L' if mode in ('L', 'LA') else 'RGB').convert('RGB'))).mean() < 25


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm'])
def test_sixteen_bits_are_scaled_not_clipped(name, tmp_path):
    values = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path/name, **({'format': 'PPM'} if name.endswith('pgm') else {}))
    (tmp_path/name).rename(tmp_path/'b.png')     # the name does not decide
    got = np.asarray(load_image(tmp_path/'b.png'))
    assert np.abs(got[..., 0] - values/257).max() <= 1 and (got == got[..., :1]).all()
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path/'dark.png'); assert np.asarray(load_image(tmp_path/'dark.png')).max() == 0    # dark stays dark


def test_whole_numbers_of_32_bits(tmp_path):
    "Sixteen bits in a larger box are used; what lies beyond has no scale, and is neither white nor black."
    values = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.int32)
    Image.fromarray(values).save(tmp_path/'a.tif'); assert np.abs(np.asarray(load_image(tmp_path/'a.tif'))[..., 0] - values/257).max() <= 1
    for bad in (values*2, values - 1, np.full((4, 4), 2**31 - 1, np.int32)): Image.fromarray(bad).save(tmp_path/'a.tif'); says('32-bit numbers from', load_image, tmp_path/'a.tif')


@pytest.mark.parametrize('mode, kind', [('RGBA', 'PNG'), ('LA', 'PNG'), ('P', 'GIF'), ('P', 'PNG'), ('RGB', 'PNG'), ('L', 'PNG'), ('I;16', 'TIFF'), ('I;16B', 'TIFF'), ('I', 'TIFF')])
def test_in_pieces_as_in_one(mode, kind, tmp_path):
    "A picture of several pieces, transparent or deep, turned by EXIF: the pixels that converting it whole would give."
    g, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    if mode.startswith('I'): image = Image.fromarray(g.integers(0, 65536, (1100, 2001)).astype(dict(I=np.int32).get(mode, np.dtype('>u2' if mode.endswith('B') else '<u2'))))
    else: image = Image.fromarray(g.integers(0, 256, (1100, 2001, 4), dtype=np.uint8)).convert(mode)
    image.save(tmp_path/'a', kind, **(dict(transparency=dict(P=3, L=7, RGB=(1, 2, 3))[mode]) if mode in ('P', 'L', 'RGB') else {}), **(dict(exif=exif) if kind != 'GIF' else {}))
    with Image.open(tmp_path/'a') as whole:
        whole.load()
        if mode.startswith('I'): want = Image.fromarray((np.asarray(whole)//256).astype(np.uint8)).convert('RGB')
        else: want = Image.alpha_composite(Image.new('RGBA', whole.size, 'white'), whole.convert('RGBA')).convert('RGB')
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path/'a')), np.asarray(want if kind in ('GIF', 'TIFF') else want.transpose(Image.Transpose.ROTATE_270)))      # a TIFF is turned by Pillow as it is decoded


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path/'a.tif'); says('floating-point', load_image, tmp_path/'a.tif')


def test_transparency_shows_white_not_what_lies_beneath(tmp_path):
    hidden = Image.new('RGBA', (4, 4), (255, 0, 0, 0)); hidden.save(tmp_path/'a.png')
    palette = Image.new('P', (4, 4), 0); palette.putpalette([255, 0, 0, 0, 255, 0]); palette.save(tmp_path/'b.png', transparency=0); palette.save(tmp_path/'b.gif', transparency=0)
    Image.new('RGB', (4, 4), (255, 0, 0)).save(tmp_path/'c.png', transparency=(255, 0, 0)); Image.new('LA', (4, 4), (9, 0)).save(tmp_path/'d.png')
    for name in ('a.png', 'b.png', 'b.gif', 'c.png', 'd.png'): assert (np.asarray(load_image(tmp_path/name)) == 255).all(), name
    Image.new('RGBA', (1, 1), (10, 20, 30, 255)).save(tmp_path/'e.png'); assert np.asarray(load_image(tmp_path/'e.png')).ravel().tolist() == [10, 20, 30]


def test_the_first_frame_of_a_film(tmp_path):
    frames = [Image.new('RGB', (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for name in ('a.gif', 'a.webp', 'a.png', 'a.tif'):
        frames[0].save(tmp_path/name, save_all=True, append_images=frames[1:], **({'lossless': True} if name.endswith('webp') else {}))
        assert np.abs(np.asarray(load_image(tmp_path/name)).astype(int) - [255, 0, 0]).max() <= 2, name


def test_heic(tmp_path):
    pytest.importorskip('pillow_heif', reason='pillow-heif is not installed').register_heif_opener()
    exif = Image.Exif(); exif[0x0112] = 6
    picture(size=(20, 10)).resize((160, 80)).save(tmp_path/'a.heic', exif=exif.tobytes(), quality=95)
    got, want = load_image(tmp_path/'a.heic'), picture(size=(20, 10)).resize((160, 80)).transpose(Image.Transpose.ROTATE_270)
    assert got.mode == 'RGB' and got.size == (80, 160) and np.abs(np.asarray(got).astype(int) - np.asarray(want)).mean() < 5


# ---- files that are no photographs

def encoded(kind, **kwargs):
    out = io.BytesIO(); picture(size=(80, 60)).save(out, kind, **kwargs); return out.getvalue()


KINDS = {'JPEG': {}, 'PNG': {}, 'WEBP': {}, 'TIFF': {'compression': 'tiff_deflate'}, 'BMP': {}, 'GIF': {}}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('keep', [0., .3, .6, .9])
def test_a_download_that_broke_off(kind, keep, tmp_path):
    data = encoded(kind, **KINDS[kind]); path = tmp_path/'a.jpg'
    path.write_bytes(data); assert load_image(path).size == (80, 60)
    path.write_bytes(data[:int(keep*len(data))])
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); assert str(path) in str(says('', load_image, path))


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_picture_or_a_sentence(kind, tmp_path_factory, data):
    whole = bytearray(encoded(kind, **KINDS[kind]))
    for _ in range(data.draw(st.integers(1, 6))): whole[data.draw(st.integers(0, min(len(whole) - 1, 400)))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp()/f'damaged-{kind}'; path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: assert load_image(path, limit=10**6).mode == 'RGB'
        except UserError as e: assert str(path) in str(e) and '\n' not in str(e)


def test_bombs(tmp_path):
    path = tmp_path/'bomb.png'
    Image.new('1', (12_000, 12_000)).save(path)              # 144 million pixels in 20 kB
    assert path.stat().st_size < 50_000
    says('12000 x 12000 pixels are more than the limit of 80,000,000', load_image, path)
    data = bytearray(path.read_bytes()); data[16:24] = b'\0\1\0\0\0\1\0\0'                  # 65,536 x 65,536: Pillow itself refuses
    path.write_bytes(data); says('bomb.png', load_image, path)
    picture().save(tmp_path/'a.png'); says('limit of 1,199', load_image, tmp_path/'a.png', limit=1199); assert load_image(tmp_path/'a.png', limit=1200)


def test_not_files(tmp_path):
    assert isinstance(says('no such file', load_image, tmp_path/'x.jpg'), MissingPath)
    (tmp_path/'folder.jpg').mkdir(); says('folder.jpg', load_image, tmp_path/'folder.jpg')
    (tmp_path/'page.jpg').write_text('<html>404</html>'); says('not an image', load_image, tmp_path/'page.jpg')


def test_scan_lists_what_it_leaves_out(tmp_path, many):
    for name, data in {'zero.jpg': b'', 'half.jpg': encoded('JPEG')[:500], 'text.jpg': b'hello'}.items(): (tmp_path/name).write_bytes(data)
    df = table([*many.image, tmp_path/'zero.jpg', tmp_path/'half.jpg', tmp_path/'text.jpg', tmp_path/'gone.jpg']).assign(place=range(11)).sample(frac=1, random_state=0).reset_index(drop=True)
    df.attrs['queries'] = 'subtask'
    good, bad = scan_images(df)
    assert sorted(good.place) == list(range(7)) and (good.place == df.place[df.image.isin(good.image)].to_numpy()).all() and good.attrs == df.attrs and good.index.tolist() == list(range(7))
    assert {Path(p).name for p, _ in bad} == {'zero.jpg', 'half.jpg', 'text.jpg', 'gone.jpg'} and all(p in reason for p, reason in bad)
    says('none of the 4 images can be read', scan_images, df[~df.image.isin(good.image)])


@pytest.fixture
def opened(monkeypatch, tmp_path):
    "Names of the images that a scan decodes, with a cache of its own."
    monkeypatch.setenv('SAGE_CACHE', str(tmp_path/'cache'))
    names, load = [], images.load_image
    monkeypatch.setattr(images, 'load_image', lambda path: (names.append(Path(path).name), load(path))[1])
    return names


def test_what_could_be_read_is_not_decoded_again(tmp_path, many, opened):
    (tmp_path/'half.jpg').write_bytes(encoded('JPEG')[:500])
    df, again = table([*many.image, tmp_path/'half.jpg', tmp_path/'gone.jpg']), lambda: (opened.clear(), scan_images(df, False), sorted(opened))
    first = again()
    assert first[2] == sorted(Path(p).name for p in df.image) and len(first[1][0]) == len(many)
    _, (good, bad), names = again()
    assert names == ['gone.jpg', 'half.jpg'] and good.equals(first[1][0]) and bad == first[1][1]           # the reason may have gone
    path = Path(many.image[0]); data = path.read_bytes(); path.write_bytes(data[:-1])                      # another size
    os.utime(many.image[1], (1, 1))                                                                        # another time
    assert again()[2] == sorted([path.name, Path(many.image[1]).name, 'gone.jpg', 'half.jpg'])
    path.write_bytes(data)
    (tmp_path/'half.jpg').write_bytes(encoded('JPEG'))
    assert len(again()[1][0]) == len(many) + 1 and len(np.load(tmp_path/'cache'/'readable.npy')) >= len(many) + 1


@pytest.mark.parametrize('kept', [b'', b'no array', b'PK\3\4', None, np.zeros(3), np.zeros((2, 2), np.uint64), np.array([{}], object)], ids=['empty', 'text', 'zip', 'folder', 'floats', 'square', 'objects'])
def test_a_memory_of_something_else_is_none(tmp_path, many, opened, kept):
    "It is written anew; where it cannot be, the scan is as it was without one."
    path = tmp_path/'cache'/'readable.npy'; path.parent.mkdir()
    if kept is None: path.mkdir()
    elif isinstance(kept, bytes): path.write_bytes(kept)
    else: np.save(path, kept, allow_pickle=True)
    for n in (len(many), len(many) if kept is None else 0):
        opened.clear()
        assert len(scan_images(many, False)[0]) == len(many) == 7 and len(opened) == n


def test_a_scan_in_pieces(tmp_path, many, monkeypatch, opened):
    "More rows than are handed out at a time; each keeps its own reason."
    (tmp_path/'bad.png').write_bytes(b'x')
    df = table(([*many.image[:3], tmp_path/'bad.png']*1100))
    good, bad = scan_images(df, False)
    assert len(good) == 3300 and len(bad) == 1100 and len(opened) == 4400 and set(good.image) == set(many.image[:3])
    opened.clear(); scan_images(df, False)
    assert opened == ['bad.png']*1100


# ---- sizes and transforms

@pytest.mark.parametrize('size, what', [(225, 'the nearest to 225 are 224 and 238'), ((224, 230), 'the nearest to 230 are 224 and 238'), (13, 'are 14 and 28'), (0, 'image size 0'), (-14, 'image size -14'), (14., 'image size 14.0'),
                                        ('224', "image size '224'"), ((224,), 'image size (224,)'), (None, 'image size None'), (True, 'image size True')])
def test_bad_sizes(size, what): says(what, check_size, size)


def test_good_sizes():
    assert check_size(322) == (322, 322) and check_size([224, 14]) == (224, 14) and check_size(np.int64(28)) == (28, 28) and check_size(32, patch=16) == (32, 32)
    says('are 16 and 32', check_size, 14, 16)


def test_eval_transform_against_pillow():
    image = picture(size=(100, 70))
    got = eval_transform((28, 42))(image)
    want = (np.asarray(image.resize((42, 28), Image.Resampling.BICUBIC)) / 255 - [.485, .456, .406]) / [.229, .224, .225]
    assert got.dtype == torch.float32 and np.abs(got.numpy() - want.transpose(2, 0, 1)).max() < 1e-5
    says('image size', eval_transform, 'big'); says("augmentation 'cutmix' is unknown", train_transform, 224, 'cutmix')


# ---- the same in any process

def draw(df, workers, epoch=0, seed=0, shuffle=False):
    images = ImageTable(df, train_transform(28), seed); images.epoch = epoch
    order = torch.randperm(len(df)).tolist() if shuffle else range(len(df))
    return {int(i): x for xs, rows in DataLoader(images, 2, sampler=order, num_workers=workers) for x, i in zip(xs, rows)}


def test_augmentation_depends_on_seed_epoch_and_row_alone(many):
    want = draw(many, 0)
    for workers, shuffle in ((0, True), (1, False), (2, True)):
        torch.manual_seed(workers); np.random.seed(workers)
        got = draw(many, workers, shuffle=shuffle)
        assert all(torch.equal(got[i], want[i]) for i in range(7))
    for other in (draw(many, 0, epoch=1), draw(many, 0, seed=1)): assert sum(not torch.equal(other[i], want[i]) for i in range(7)) >= 6
    same = ImageTable(table([many.image[0]] * 7), train_transform(28))
    assert len({same[i][0].numpy().tobytes() for i in range(7)}) > 4, 'rows differ even where they show one file'


def test_global_generators_are_left_alone(many):
    import random
    state = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    before = state()
    ImageTable(many, train_transform(28))[0]; list(image_loader(many, eval_transform(28))); list(image_loader(many, eval_transform(28), workers=1))
    assert state() == before
    with pytest.raises(RuntimeError):
        with own_random(1): torch.rand(1); raise RuntimeError
    assert state() == before


def test_a_file_that_goes_after_the_scan(many):
    images = ImageTable(many, train_transform(28)); before = torch.get_rng_state()
    os.remove(many.image[3]); says('no such file', lambda: images[3]); assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match='3.png: no such file'): list(image_loader(many, eval_transform(28), workers=1))


def test_loader_keeps_the_order_asked_for(many):
    rows = np.array([6, 0, 3, 3, 1])
    for workers in (0, 2):
        xs, got = zip(*image_loader(many, eval_transform(28), 2, workers, rows))
        assert torch.cat(got).tolist() == rows.tolist() and [len(x) for x in xs] == [2, 2, 1]
        for x, i in zip(torch.cat(xs), rows): assert torch.equal(x, eval_transform(28)(load_image(many.image[i])))
    assert len(image_loader(many, eval_transform(28), rows=[])) == 0 and torch.cat([i for _, i in image_loader(many, eval_transform(28), 4)]).tolist() == list(range(7))
