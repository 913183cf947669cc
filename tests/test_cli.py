"""The commands on bad input: one sentence on stderr, exit code 2, no traceback, nothing half written. And on good input from start to end."""
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sage import cli
from sage.formats import write_gsv, write_msls, write_utm
from sage.model import create_sage, save_sage
from sage.places import make_table
from sage.run import Run, pause_path

SMALL = '--backbone sage_nano --image-size 56 --eval-size 56 --epochs 1 --steps 1 --places-per-batch 2 --images-per-place 2 --min-size 2 --augment none --log-every 1 --quiet'.split()


def cards(folder, city='aldwick', places=6, views=4, seed=0, origin=(500_000., 5_300_000.)):
    "A town of coloured patterns: places 60 m apart, several views of each, the first a query."
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for p in range(places):
        pattern = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        for v in range(views):
            path = folder/f'{city}_{p}_{v}.jpg'
            Image.fromarray(np.roll(np.kron(pattern, np.ones((14, 14, 1), np.uint8)), int(rng.integers(-5, 6)), 0)).save(path)
            rows.append((str(path), p, origin[0] + 60 * p + rng.uniform(0, 6), origin[1] + rng.uniform(0, 6), 'query' if v == 0 else 'database'))
    image, place, easting, northing, role = zip(*rows)
    return make_table(image=image, city=city, place=place, easting=easting, northing=northing, zone='32N', heading=90., role=role, time='2026-03')


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "A training town as GSV-Cities and as MSLS, another town as @utm@ with queries."
    t = tmp_path_factory.mktemp('sets')
    write_gsv(cards(t/'c0'), t/'gsv'); write_msls(cards(t/'c0'), t/'msls')
    write_utm(cards(t/'c1', 'bestadt', seed=1).assign(split='test'), t/'bestadt')
    return t


def run(name, *argv, capsys):
    "(exit code, stdout, stderr) of a command called in this process."
    capsys.readouterr()
    code = 0
    try: cli.COMMANDS[name]([str(a) for a in argv])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def refused(name, *argv, capsys, says=(), absent=()):
    code, _, err = run(name, *argv, capsys=capsys)
    said = [line for line in err.splitlines() if line.startswith(f'sage_{name}: ')]
    assert code == 2, err
    assert len(said) == 1 and 'Traceback' not in err, err
    for text in [says] if isinstance(says, str) else says: assert text in said[0], said[0]
    for path in absent: assert not Path(path).exists()
    return said[0]


# ---- bad data --------------------------------------------------------------------------------------------------

def gsv_with(sets, t, change):
    "A copy of the GSV-Cities town whose csv went through `change`."
    import shutil
    shutil.copytree(sets/'gsv', t/'gsv')
    path = t/'gsv'/'Dataframes'/'aldwick.csv'
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
    return t/'gsv'


def photos(folder, text):
    cards(folder)
    (folder/'where.csv').write_text(text)
    return folder


@pytest.mark.parametrize('make, says', [
    (lambda s, t: t/'nowhere', 'no such folder'),
    (lambda s, t: t, 'is no data set'),
    (lambda s, t: gsv_with(s, t, lambda d: d.drop(columns='northdeg')), "no column 'northdeg'"),
    (lambda s, t: gsv_with(s, t, lambda d: d.assign(lat='nan')), "lat 'nan'"),
    (lambda s, t: gsv_with(s, t, lambda d: d.assign(lat='95.5')), '95.5'),
    (lambda s, t: gsv_with(s, t, lambda d: d.iloc[:0]), 'no images'),
    (lambda s, t: gsv_with(s, t, lambda d: d.assign(panoid='gone')), 'not in'),
    (lambda s, t: photos(t/'p', 'path,lat,lon\naldwick_0_0.jpg,151.2,-33.9\n'), 'may be swapped'),
    (lambda s, t: photos(t/'p', 'path,lat,lon\naldwick_0_0.jpg,55.7,\n'), 'lon'),
    (lambda s, t: photos(t/'p', 'path,easting,northing\naldwick_0_0.jpg,nan,5\n'), 'easting'),
    (lambda s, t: photos(t/'p', 'path,lat\naldwick_0_0.jpg,55.7\n'), "'lon'"),
    (lambda s, t: photos(t/'p', 'path,lat,lon\n/etc/passwd,55.7,13.2\n'), 'leads out'),
    (lambda s, t: write_utm(cards(t/'c').assign(split='test'), t/'only_test'), "no split 'train'"),
], ids=['missing', 'empty', 'csv column', 'nan', 'out of range', 'no rows', 'images gone', 'swapped', 'blank', 'nan metres', 'half a position', 'path leads out', 'no training split'])
def test_bad_data(make, says, sets, tmp_path, capsys):
    (tmp_path/'data').mkdir()
    refused('train', '--data', make(sets, tmp_path/'data'), '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL, capsys=capsys, says=says, absent=[tmp_path/'run'])


def test_one_image_places_only(tmp_path, sets, capsys):
    write_gsv(cards(tmp_path/'c', views=1).assign(role='database'), tmp_path/'gsv')
    refused('train', '--data', tmp_path/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL, capsys=capsys, absent=[tmp_path/'run'])


def test_all_images_unreadable(tmp_path, sets, capsys):
    table = cards(tmp_path/'c')
    for p in table.image: Path(p).write_bytes(b'')
    write_gsv(table, tmp_path/'gsv')
    refused('train', '--data', tmp_path/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL, capsys=capsys, says='can be read', absent=[tmp_path/'run'])
    write_utm(table.assign(split='test'), tmp_path/'utm')
    refused('eval', '--backbone', 'sage_nano', '--data', tmp_path/'utm', '--size', 56, '--out', tmp_path/'out', '--quiet', capsys=capsys, says='can be read', absent=[tmp_path/'out'])


def test_unreadable_images_are_counted_named_and_left_out(tmp_path, sets, capsys):
    table = cards(tmp_path/'c')
    for i, damage in ((2, b''), (7, Path(table.image[7]).read_bytes()[:200])): Path(table.image[i]).write_bytes(damage)
    write_gsv(table, tmp_path/'gsv')
    code, out, err = run('train', '--data', tmp_path/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL, capsys=capsys)
    assert code == 0, err
    assert '2 of 24 images cannot be read and are left out' in err and 'mined: 22 images' in out
    assert all(Path(table.image[i]).stem in err for i in (2, 7))
    val = cards(tmp_path/'c2', 'cestadt', seed=2).assign(split='test')
    Path(val.image[1]).write_bytes(b'x' * 50)
    write_utm(val, tmp_path/'cestadt')
    code, out, err = run('eval', '--checkpoint', tmp_path/'run', '--data', tmp_path/'cestadt', '--quiet', capsys=capsys)
    assert code == 0, err
    assert '#database 17' in out and '1 of the 18 database images cannot be read and are left out' in out


@pytest.mark.parametrize('argv, says', [
    (['--image-size', '225'], ('225', '224', '238')),
    (['--eval-size', '60'], ('60', '56', '70')),
    (['--strategy', 'hardest'], ('hardest', 'sage')),
    (['--epochs', '-1'], 'epochs'), (['--epochs', 'two'], 'epochs'), (['--lr', 'nan'], 'lr'), (['--images-per-place', '1'], 'images_per_place'),
    (['--backbone', 'vit_of_nobody'], 'vit_of_nobody'), (['--backbone', 'resnet18'], 'resnet18'),
    (['--device', 'cuda:77'], 'cuda:77'), (['--precision', 'fp3'], 'fp3'), (['--devices', '0'], 'devices'), (['--augment', 'flip'], 'flip'), (['--seed', '-1'], 'seed'),
    (['--no-such-flag'], 'no-such-flag'), (['--format', 'zip'], 'zip'), (['--places-per-batch', '400'], 'places'),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_bad_settings(argv, says, sets, tmp_path, capsys):
    refused('train', '--data', sets/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL, *argv, capsys=capsys, says=says, absent=[tmp_path/'run'])


def test_bad_train_paths(sets, tmp_path, capsys):
    common = ['--data', sets/'gsv', '--run', tmp_path/'run', *SMALL]
    refused('train', *SMALL, capsys=capsys, says='--data')
    refused('train', *common, '--val', sets/'gsv', capsys=capsys, says='')
    refused('train', *common, '--val', tmp_path/'nowhere', capsys=capsys, says='no such folder')
    refused('train', *common, '--val', sets/'bestadt', '--resume', capsys=capsys, says='no such run folder')
    refused('train', '--data', sets/'gsv', '--resume', capsys=capsys, says='--run')
    refused('train', *common, *['--data', sets/'gsv'] * 2, '--val', sets/'bestadt', capsys=capsys, says='3 times')
    assert not (tmp_path/'run').exists()
    (tmp_path/'file').write_text('')
    refused('train', '--data', sets/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'file', *SMALL, capsys=capsys, says='a file is in the way')


def test_photographs_of_ones_own_validate_on_their_eastern_end(tmp_path):
    write_gsv(cards(tmp_path/'a', 'Fdorf', places=24), tmp_path/'gsv')
    cli.sage_train(['--data', tmp_path/'gsv', '--run', tmp_path/'run', '--quiet', *SMALL])
    tables = {n: cli.Run(tmp_path/'run').table(n) for n in ('mined', 'held out')}
    assert tables['mined'].easting.max() + 25 <= tables['held out'].easting.min()
    assert set(cli.Run(tmp_path/'run').recalls().table) == {'held out'}


def test_existing_run_needs_resume(sets, tmp_path, capsys):
    argv = ['--data', sets/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL]
    assert run('train', *argv, capsys=capsys)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    refused('train', *argv, capsys=capsys, says='--resume')
    refused('train', *argv, '--resume', '--lr', '1', capsys=capsys, says='lr')
    refused('train', '--data', sets/'msls', *argv[2:], '--resume', capsys=capsys, says='data')
    assert before == {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    code, out, err = run('train', *argv[:6], '--resume', '--epochs', 2, '--quiet', capsys=capsys)
    assert code == 0, err
    assert Run(tmp_path/'run').epochs() == [0, 1, 2]
    code, out, err = run('train', '--run', tmp_path/'run', '--resume', '--epochs', 3, '--quiet', capsys=capsys)     # the run remembers its data
    assert code == 0, err
    assert Run(tmp_path/'run').epochs() == [0, 1, 2, 3]


@pytest.mark.parametrize('make, says', [
    (lambda t: t/'nowhere.safetensors', 'no such'),
    (lambda t: (t/'x.safetensors', (t/'x.safetensors').write_text('not tensors'))[0], 'no SAGE checkpoint'),
    (lambda t: (t/'x.safetensors', save_file({'w': torch.zeros(2)}, t/'x.safetensors'))[0], 'no SAGE checkpoint'),
    (lambda t: (t/'x.pth', torch.save({'model_state_dict': {'w': torch.zeros(2)}}, t/'x.pth'))[0], ''),
    (lambda t: (t/'x.pth', (t/'x.pth').write_bytes(b'junk'))[0], 'x.pth'),
    (lambda t: t, 'config.json'),
], ids=['missing', 'text', 'other tensors', 'other dict', 'junk pth', 'folder'])
def test_wrong_checkpoints(make, says, sets, tmp_path, capsys):
    refused('eval', '--checkpoint', make(tmp_path), '--data', sets/'bestadt', '--size', 56, '--out', tmp_path/'out', '--quiet', capsys=capsys, says=says, absent=[tmp_path/'out'])


def test_pickles_are_not_run(sets, tmp_path, capsys):
    class Boom:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save({'model_state_dict': Boom()}, tmp_path/'x.pth')
    refused('eval', '--checkpoint', tmp_path/'x.pth', '--data', sets/'bestadt', '--quiet', capsys=capsys, absent=[tmp_path/'ran'])


@pytest.mark.parametrize('argv, says', [
    ([], 'nothing to measure on'), (['--data', '/no/such/folder'], 'no such folder'), (['--benchmark', 'imagenet'], 'imagenet'), (['--benchmark', 'sped,pitts30k', '--data-root', '/no/such'], '/no/such'),
    (['--data', 'BESTADT', '--size', '57'], ('57', '56', '70')), (['--data', 'BESTADT', '--size', 'big'], 'big'), (['--data', 'BESTADT', '--head'], 'InteractHead'), (['--data', 'BESTADT', '--audit'], 'InteractHead'),
    (['--data', 'BESTADT', '--batch-size', '0'], '0'), (['--data', 'BESTADT', '--order', 'random'], 'random'), (['--data', 'BESTADT', '--radius', '-5'], '-5'), (['--data', 'BESTADT', '--radius', '0.0001'], 'has a database image'),
    (['--data', 'BESTADT', '--size', '0'], "'0' is no image size"), (['--data', 'BESTADT', '--size', '56x0'], "'56x0' is no image size"), (['--data', 'BESTADT', '--frames', '-1'], "'-1' is no whole number from 0 on"),
    (['--data', 'BESTADT', '--workers', '300'], 'from 0 to 256'), (['--data', 'BESTADT', '--memory', 'lots'], 'write for example 2GB'), (['--benchmark', 'sf_xl'], 'sf_xl_night'), (['--data', 'BESTADT', '--device', 'cuda:77'], 'cuda:77'), (['--data', 'BESTADT', '--frames', '1'], 'within 25 m'),
    (['--data', 'BESTADT', '--memory', '2GB', '--search-costs'], '--search-costs holds all'), (['--data', 'BESTADT', '--memory', '2GB', '--search', 'float16'], 'in pieces is exact'), (['--data', 'BESTADT', '--search', 'ivfpq'], 'learns 256 prototypes, and the database of'), (['--data', 'BESTADT', '--search', 'fast'], 'fast'), (['--data', 'BESTADT', '--memory', '2GB', '--baselines'], '--baselines holds all'), (['--benchmark', 'sped', '--frames', '3'], 'its own rule'), (['--data', 'BESTADT', '--audit', '--batch-size', '4'], 'own batch sizes'),
    (['--data', 'GSV'], 'was not found'),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_bad_eval(argv, says, sets, capsys):
    argv = [{'BESTADT': sets/'bestadt', 'GSV': sets/'gsv'}.get(a, a) for a in argv]
    size = [] if '--size' in argv else ['--size', 56]
    refused('eval', '--backbone', 'sage_nano', *argv, *size, '--quiet', capsys=capsys, says=says)


def test_eval_without_a_model_says_who_answers(sets, capsys):
    code, out, err = run('eval', '--data', sets/'bestadt', '--size', 56, '--quiet', capsys=capsys)
    assert code == 0 and 'the packaged small SAGE' in out and err.startswith('no --checkpoint') and err.count('\n') == 1
    code, out, err = run('eval', '--checkpoint', 'world', '--data', sets/'bestadt', '--size', 56, '--quiet', capsys=capsys)
    assert code == 0 and 'sage_world' in out and not err


def test_bad_ablation(sets, tmp_path, capsys):
    common = ['--data', sets/'gsv', '--val', sets/'bestadt', '--out', tmp_path/'a', '--backbone', 'sage_nano']
    for argv, says in ((['--strategies', 'best'], 'best'), (['--poolings', 'GeM'], 'GeM'), (['--seeds', '0'], 'seed'), (['--steps', '0'], 'steps'), (['--image-size', '57'], '57')):
        refused('ablate', *common, *argv, '--quiet', capsys=capsys, says=says, absent=[tmp_path/'a'])


def test_unknown_command(capsys):
    for argv, code in ((['fly'], 2), ([], None)):
        try: cli.main(argv); got = None
        except SystemExit as e: got = e.code
        assert got == code
    assert "no command is called 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize('name', list(cli.COMMANDS))
def test_help_of_every_command(name, capsys):
    code, out, err = run(name, '--help', capsys=capsys)
    assert code == 0 and f'sage_{name}' in out and '--' in out and not err


def test_a_process_of_its_own(root, tmp_path):
    "The same through the interpreter, from another folder: code 2, one line, no traceback."
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'sage.cli', 'train', '--data', str(tmp_path/'nowhere')], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.strip() == f'sage_train: {tmp_path}/nowhere: no such folder; check the path'


def test_ctrl_c_ends_with_a_sentence_and_can_be_resumed(sets, tmp_path, capsys):
    "SIGINT in the middle of a long training: exit code 130, one sentence, a run that goes on."
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    argv = ['--data', str(sets/'gsv'), '--val', str(sets/'bestadt'), '--run', str(tmp_path/'run'), *SMALL]
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'sage.cli', 'train', *argv, '--steps', '3000'], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path, env=env)
    deadline = time.monotonic() + 240
    while not ((tmp_path/'run'/'metrics.jsonl').exists() and '"step"' in (tmp_path/'run'/'metrics.jsonl').read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.2)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=240)[1]
    assert process.returncode == 130 and 'Traceback' not in err, err
    assert [line for line in err.splitlines() if line.startswith('sage_train: stopped after step') and 'can be resumed' in line], err
    run = Run(tmp_path/'run')
    assert run.epochs() == [0] and run.resumable() == [0] and pause_path(run, 0).exists()


# ---- good data -------------------------------------------------------------------------------------------------

def test_train_two_sources_then_eval(sets, tmp_path, capsys):
    write_msls(cards(tmp_path/'c3', 'dorf', seed=3, origin=(400_000., 5_300_000.)), tmp_path/'msls')
    code, out, err = run('train', '--data', tmp_path/'msls', '--data', sets/'gsv', '--val', sets/'bestadt', '--run', tmp_path/'run', *SMALL, capsys=capsys)
    assert code == 0, err
    assert 'mined: 24 images, 6 places, 1 cities' in out and 'labelled: 24 images' in out and f'run folder: {tmp_path}/run' in out
    assert Run(tmp_path/'run').metrics().images.max() == 8                      # two sources × 2 places × 2 images
    argv = ['eval', '--data', sets/'bestadt', '--baselines', '--quiet']
    code, out, err = run(*argv, '--checkpoint', tmp_path/'run', '--out', tmp_path/'out', capsys=capsys)
    assert code == 0, err
    for part in ('bestadt · within 25 m · #database 18 · #queries 6 (0 without a positive', 'size 56x56 · head off · order sorted', 'backbone, mean-pooled', 'backbone, class token', 'R@1', 'R@5'): assert part in out, out
    rows = pd.read_csv(tmp_path/'out'/'results.csv')
    assert len(rows) == 3 and list(rows['size']) == ['56x56'] * 3
    best = Run(tmp_path/'run').recalls()
    assert round(best[best.k == 1].recall.max(), 2) == rows['R@1'].iloc[-1]     # what training measured is what eval measures


def test_msls_validation_cities_never_train(sets, tmp_path, capsys):
    "cph in the folder of the training cities: it validates, by default, and does not train."
    both = pd.concat([cards(tmp_path/'a', 'zurich'), cards(tmp_path/'b', 'cph', seed=5)], ignore_index=True)
    write_msls(both, tmp_path/'msls')
    code, out, err = run('train', '--data', tmp_path/'msls', '--run', tmp_path/'run', *SMALL, capsys=capsys)
    assert code == 0, err
    assert 'mined: 24 images, 6 places, 1 cities' in out and 'msls val (subtask queries): 24 images' in out


def test_ablation_of_two_cells(sets, tmp_path, capsys):
    argv = ['--data', sets/'gsv', '--val', sets/'bestadt', '--out', tmp_path/'a', '--seeds', 2, '--poolings', 'SoftP', '--strategies', 'random', 'sage', *SMALL]
    code, out, err = run('ablate', *argv, capsys=capsys)
    assert code == 0, err
    assert '| SoftP + sage − SoftP + random | 2 |' in out and 'Every cell: 1 steps, 4 images.' in out
    assert sorted(p.name for p in (tmp_path/'a').iterdir()) == ['cells', 'config.json', 'results.csv', 'runs', 'table.md'] and not list((tmp_path/'a'/'runs').iterdir())


def test_audit_of_a_model_with_a_head(sets, tmp_path, capsys):
    save_sage(create_sage('sage_nano', interact=True, probes=8, probe_dim=80, token_dim=128), tmp_path/'head.safetensors', config=dict(settings=dict(eval_size=56)))
    code, out, err = run('eval', '--checkpoint', tmp_path/'head.safetensors', '--data', sets/'bestadt', '--head', '--order', 'shuffled', '--audit', '--out', tmp_path/'out', '--quiet', capsys=capsys)
    assert code == 0, err
    for part in ('head on · order shuffled (seed 0), batches of 8', 'as published', 'sorted, batches of 26', 'head off'): assert part in out, out
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['audit_bestadt.csv', 'audit_bestadt.png', 'results.csv']
    assert len(pd.read_csv(tmp_path/'out'/'audit_bestadt.csv')) == 26
    assert 'audit_bestadt.png and .csv' in out and '--out FOLDER' not in out
    with Image.open(tmp_path/'out'/'audit_bestadt.png') as figure: assert figure.width > 400 and len(np.unique(np.asarray(figure.convert('RGB')).reshape(-1, 3), axis=0)) > 50      # three kinds of marks, and text


def test_corridor_as_a_real_data_set(shared, tmp_path, capsys):
    folder = shared/'data'/'corridor'
    if not folder.exists(): pytest.skip('no corridor data')
    code, out, err = run('eval', '--backbone', 'sage_nano', '--data', folder, '--size', 56, '--baselines', '--quiet', capsys=capsys)
    assert code == 0, err
    assert 'Corridor (VPR-Bench) · within ±2 frames · #database 111 · #queries 111 (0 without a positive' in out and out.count('R@1 ') == 3


def test_dry_run_tells_the_memory_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run('train', '--data', 'nowhere', '--dry-run', '--device', 'cpu', *SMALL, capsys=capsys)
    assert code == 0 and 'peak' in out and 'GB' in out and not err and not list(tmp_path.iterdir())


# ---- what every command does with its words and its output

def test_a_home_folder_in_any_argument(monkeypatch, tmp_path):
    from sage.command import at_home
    monkeypatch.setenv('HOME', str(tmp_path))
    assert [at_home(a) for a in ('~/x', '--out=~/x', '--out', 'a~b', '--seed=3', '~nobody-of-that-name/x', '~')] == [f'{tmp_path}/x', f'--out={tmp_path}/x', '--out', 'a~b', '--seed=3', os.path.abspath('~nobody-of-that-name/x'), str(tmp_path)]

@pytest.mark.parametrize('argv', [['data', 'check', '~nobody-of-that-name/x'], ['train', '--data=~nobody-of-that-name/x'], ['where', 'a.jpg', '--map', '~nobody-of-that-name'], ['describe', '~nobody-of-that-name', '-o', 'x.npy']])
def test_nobodys_home(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*argv, capsys=capsys)
    assert code == 2 and len(err.strip().splitlines()) == 1, err

def test_a_result_goes_to_the_home_folder(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    code, out, err = run('eval', '--backbone', 'sage_nano', '--data', sets/'bestadt', '--size', 56, '--out=~/found', '--quiet', capsys=capsys)
    assert code == 0 and (tmp_path/'found'/'results.csv').exists() and not (tmp_path/'~').exists(), err

def ended(argv, root, **env):
    p = subprocess.run([sys.executable, '-c', f'from sage.cli import COMMANDS; COMMANDS[{argv[0]!r}]({[str(a) for a in argv[1:]]!r})'], capture_output=True, env={**os.environ, 'PYTHONPATH': str(root), **env})
    return p.returncode, p.stdout, p.stderr

def test_a_terminal_of_few_letters(sets, root):
    "What it cannot show is written as Python writes it."
    for env in (dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'), dict(PYTHONIOENCODING='latin-1')):
        code, out, err = ended(['data', 'check', sets/'gsv'], root, **env)
        assert b'Traceback' not in err and b'UnicodeEncodeError' not in err and code in (0, 1) and out, err

def test_nobody_reads_any_more(sets, root):
    "As in `| head -0`: a silent end."
    p = subprocess.Popen([sys.executable, '-c', f'from sage.cli import COMMANDS; COMMANDS["data"](["check", {str(sets/"gsv")!r}])'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(root), 'PYTHONUNBUFFERED': '1'})
    p.stdout.close()
    assert p.stderr.read() == b'' and p.wait() == 128 + signal.SIGPIPE

def test_more_than_there_is():
    from sage.command import command, said
    @command
    def sage_try(argv): raise MemoryError('Unable to allocate 7.28 PiB')
    assert said(sage_try) == ('sage_try: not enough memory (Unable to allocate 7.28 PiB); ask for less at a time', 2)

@pytest.mark.parametrize('flag, value', [('workers', 257), ('workers', 99999999999), ('similar', 999999999999), ('places-per-batch', 900000000000000), ('labelled-places', 10**6), ('lr', 1e99), ('lr-end', 1.5), ('miner-epsilon', 1e99), ('tau2', 1e99), ('steps', 10**12), ('seed', 2**64)])
def test_numbers_beyond_all_use(flag, value, capsys):
    code, out, err = run('train', '--data', 'world', '--dry-run', f'--{flag}', value, capsys=capsys)
    assert code == 2 and flag.replace('-', '_') in err and len(err.strip().splitlines()) == 1 and not out, err

@pytest.mark.parametrize('argv, says', [
    (['train', '--data', 'world', '--labelled-places', '8'], '--labelled-places is for a second --data'), (['eval', '--data', 'world', '--seed', '3'], '--seed is that of the shuffle'), (['eval', '--data', 'world', '--data-root', 'x'], '--data-root holds the benchmarks'),
    (['train', '--resume', '--run', 'RUN', '--val', 'nowhere'], '--val belongs to --data'), (['train', '--resume', '--run', 'RUN', '--format', 'gsv'], '--format belongs to --data'), (['train', '--resume', '--run', 'RUN', '--max-bad', '0%'], '--max-bad belongs to --data'),
    (['ablate', '--dev', '--data', 'nowhere'], '--dev tries'), (['ablate', '--dev', '--val', 'nowhere'], '--dev tries'),
    (['eval', '--data', 'world', '--checkpoint', 'world', '--backbone', 'sage_nano'], 'give one of the two'), (['eval', '--data', 'world', '--checkpoint', ''], 'is given an empty name'),
    (['where', 'a.png', '--map', '.', '--checkpoint', 'world', '--backbone', 'sage_nano'], 'give one of the two'), (['where', 'a.png', '--map', '.', '--checkpoint', ''], 'is given an empty name'),
    (['export', '--run', 'RUN', '--checkpoint', 'x', '--parquet', 'p.parquet'], '--checkpoint has no part'), (['export', '--checkpoint', 'x', '--run', 'RUN', '--onnx', 'p.onnx'], '--run has no part'),
    (['export', '--run', 'RUN', '--size', '56', '--parquet', 'p.parquet'], '--size has no part'), (['export', '--run', 'RUN', '--umap', '--geojson', 'p.geojson'], '--umap has no part'), (['export', '--checkpoint', 'x', '--onnx', 'p.onnx', '--table', 'mined'], '--table has no part')])
def test_what_would_be_ignored_is_refused(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Run.create(tmp_path/'RUN', dict(settings=dict(seed=0))); Image.new('RGB', (28, 28)).save('a.png')
    code, out, err = run(*argv, capsys=capsys)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err

SIGNALLED = """
import importlib.abc, os, signal, sys
class Listening(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *more):
        if name == {module!r}: os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Listening())
sys.argv = ['x', '--help']
from sage.start import {command}
sys.exit({command}())
"""

@pytest.mark.parametrize('command, module', [*((f'sage_{name}', 'numpy') for name in cli.COMMANDS), ('sage_train', 'sage.command')])
def test_ctrl_c_while_a_command_is_imported(root, command, module):
    "What a console script does, and SIGINT at the moment when the first, or one of the last modules is asked for."
    code = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n' + SIGNALLED.format(module=module, number=int(signal.SIGINT), command=command)          # (whoever runs the tests may have it ignored)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr, done.stdout) == (130, f'{command}: interrupted\n', '')

def test_what_a_shell_starts(root):
    "Every console script begins in the light module, which imports nothing large; a shell's own SIGINT handling is kept."
    sys.path.insert(0, str(root/'tools'))
    from command import commands
    from sage.start import HOME
    assert commands() == {name: f'sage.start:{name}' for name in HOME} and {n.removeprefix('sage_') for n in HOME} == set(cli.COMMANDS)
    out = subprocess.run([sys.executable, '-c', 'import sage.start, sys; print(*{"numpy", "torch", "pandas", "fastcore"} & {*sys.modules})'], capture_output=True, text=True, cwd=root).stdout
    assert out.strip() == ''
    code = 'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n' + SIGNALLED.format(module='numpy', number=int(signal.SIGINT), command='sage_report')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and 'usage: sage_report' in done.stdout and not done.stderr

@pytest.mark.parametrize('name, value', [('NUMBA_NUM_THREADS', '0'), ('NUMBA_NUM_THREADS', 'abc'), ('NUMBA_NUM_THREADS', '-1'), ('NUMBA_NUM_THREADS', '4,2'), ('OMP_NUM_THREADS', '0'), ('OMP_NUM_THREADS', 'abc'), ('OMP_NUM_THREADS', '4,,2'), ('OMP_NUM_THREADS', '1e3\n')])
def test_no_number_of_threads(root, name, value):
    done = subprocess.run([sys.executable, root/'tools'/'command.py', 'sage_train', '--help'], capture_output=True, text=True, env=os.environ | {name: value})
    assert (done.returncode, done.stdout) == (2, '') and done.stderr == f'sage_train: {name} is {ascii(value.strip())} in the environment, which is no number of threads; set it to 1 or more, or unset it\n'

def test_no_backend_of_matplotlib(root):
    done = subprocess.run([sys.executable, root/'tools'/'command.py', 'sage_train', '--help'], capture_output=True, text=True, env=os.environ | dict(MPLBACKEND='qtag'))
    assert (done.returncode, done.stdout, done.stderr) == (2, '', "sage_train: MPLBACKEND is 'qtag' in the environment, which matplotlib does not know; unset it\n")

@pytest.mark.parametrize('threads', [dict(NUMBA_NUM_THREADS='', OMP_NUM_THREADS=''), dict(NUMBA_NUM_THREADS=' 2', OMP_NUM_THREADS='4, 2')])
def test_a_number_of_threads(root, threads):
    done = subprocess.run([sys.executable, root/'tools'/'command.py', 'sage_train', '--help'], capture_output=True, text=True, env=os.environ | threads)
    assert done.returncode == 0 and not done.stderr
