"What others open: ONNX against torch, parquet, GeoJSON; and one sentence where something is missing."
import builtins, importlib.util, json, shutil, subprocess, sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sage import cli_export
from sage.core import MissingPath, UserError
from sage.export import answers, degrees, flatten, geojson, recorded, recorded_answers, run_of, write_geojson, write_onnx, write_parquet
from sage.geo import to_utm
from sage.model import create_sage, save_sage
from sage.places import make_table
from sage.retrieval import fit_pca
from sage.run import Run

ONNX = all(importlib.util.find_spec(m) for m in ('onnx', 'onnxruntime', 'onnxscript'))
needs_onnx = pytest.mark.skipif(not ONNX, reason='onnx, onnxruntime and onnxscript are not installed')
SMALL = dict(backbone='sage_nano', probes=8, probe_dim=16, token_dim=12)

def town(folder, name, places, views=3, role=None, split='train', zone='33N', seed=0):
    "Pictures of one colour for each place, 60 m apart."
    g, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for p in range(places):
        color = g.integers(0, 255, 3)
        for v in range(views):
            path = folder/f'{name}_{p}_{v}.png'
            Image.fromarray(np.clip(color + g.normal(0, 12, (28, 28, 3)), 0, 255).astype(np.uint8)).save(path)
            rows.append((str(path), p, 500_000. + 60 * p + v, 'query' if role and v == 0 else 'database'))
    image, place, easting, role = zip(*rows)
    return make_table(image=image, city=name, place=place, easting=easting, northing=5_300_000., zone=zone, role=role, split=split, condition='day, "fog"')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A run with a recorded epoch and a checkpoint; its two validation tables, one without a UTM zone."
    t = tmp_path_factory.mktemp('export')
    mined = town(t/'a', 'Ä town', 12)
    tables = dict(mined=mined, asked=town(t/'b', 'B', 6, role=True, split='val', seed=1), plan=town(t/'c', 'C', 4, role=True, split='val', zone='', seed=2))
    run = Run.create(t/'run', dict(settings=dict(backbone='sage_nano', eval_size=56, seed=0), validation=['asked', 'plan']), tables)
    nodes = mined.drop_duplicates('place').reset_index(drop=True)[['city', 'place', 'easting', 'northing', 'image']]
    lat, lon = degrees(mined.drop_duplicates('place'))
    nodes = nodes.assign(node=range(len(nodes)), lat=lat, lon=lon, seed_score=np.nan)
    empty = pd.DataFrame(dict(a=[1]))
    d = np.random.default_rng(0).normal(size=(12, 140)).astype(np.float16)
    run.write_epoch(0, nodes, empty, empty, d)
    run.log(kind='epoch', epoch=0, **{'asked/recall@1': 50.})
    save_sage(create_sage(**SMALL), run.path/'checkpoints'/'0000.safetensors', dict(epoch=0, settings=dict(backbone='sage_nano', eval_size=56)))
    return t

def refused(capsys, *argv):
    "The one sentence of `sage_export`."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli_export.sage_export([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('sage_export: ')]
    assert e.value.code == 2 and len(err) == 1
    return err[0]

# ---- ONNX ----------------------------------------------------------------------------------------------------------

@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize('size, make', [((56, 84), lambda: create_sage(**SMALL).reduce(fit_pca(np.random.default_rng(0).normal(size=(60, 140)), 9), whiten=True)),
                                        (112, lambda: create_sage('sage_nano', probes=8, probe_dim=80, token_dim=128, interact=True))], ids=['reduced', 'head'])
def test_onnx_agrees(tmp_path, size, make):
    import onnx, onnxruntime
    model = make()
    assert write_onnx(model, tmp_path/'m.onnx', size) <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']                           # one file, nothing beside it
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    h, w = (size, size) if isinstance(size, int) else size
    assert [i.name for i in session.get_inputs()] == ['images'] and session.get_inputs()[0].shape[1:] == [3, h, w]
    for n in (1, 3, 7):
        images = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n))
        d = session.run(None, {'images': images.numpy()})[0]
        assert d.shape == (n, model.dim) and np.abs(d - model.describe(images).numpy()).max() <= 1e-4   # head off: what describe gives
    facts = {p.key: p.value for p in onnx.load(tmp_path/'m.onnx').metadata_props}
    assert facts['dim'] == str(model.dim) and facts['size'] == f'{h}x{w}' and facts['head'] == 'off' and '0.485' in facts['mean']

@needs_onnx
def test_onnx_that_differs_is_not_written(tmp_path, monkeypatch):
    class Program:
        model = type('M', (), dict(metadata_props={}))
        def save(self, path, external_data): open(path, 'wb').close()
    monkeypatch.setattr('sage.export.onnx_program', lambda *_: Program())
    monkeypatch.setattr('onnx.checker.check_model', lambda *_: None)
    for difference in (2e-4, float('nan')):
        monkeypatch.setattr('sage.export.onnx_difference', lambda *_: difference)
        with pytest.raises(UserError, match='was not written'): write_onnx(create_sage(**SMALL), tmp_path/'m.onnx', 56)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'onnxscript'])
def test_missing_package_is_named(tmp_path, monkeypatch, package):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name in ('onnx', 'onnxruntime', 'onnxscript'):
            if name == package: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
            return sys
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(UserError, match=f'the package {package}, which is not installed: pip install onnx onnxruntime onnxscript'): write_onnx(create_sage(**SMALL), tmp_path/'m.onnx', 56)

@needs_onnx
def test_onnx_size(tmp_path):
    with pytest.raises(UserError, match='multiple of the patch'): write_onnx(create_sage(**SMALL), tmp_path/'m.onnx', 100)

# ---- parquet -------------------------------------------------------------------------------------------------------

def test_parquet_of_a_run(folder, tmp_path):
    cli_export.sage_export(['--run', folder/'run', '--parquet', tmp_path/'d.parquet'])
    schema = {f.name: str(f.type) for f in pq.read_schema(tmp_path/'d.parquet')}
    assert schema['embedding'].startswith('list<') and 'float' in schema['embedding'] and 'x' not in schema
    df, run = pd.read_parquet(tmp_path/'d.parquet'), Run(folder/'run')
    np.testing.assert_array_equal(np.stack(df.embedding), run.descriptors().astype(np.float32))
    assert df.image.tolist() == run.nodes().image.tolist() and set(df.condition) == {'day, "fog"'} and set(df.city) == {'Ä town'}
    assert ((df.lat - 47.85).abs() < .01).all() and ((df.lon - 15).abs() < .02).all()

@pytest.mark.slow
def test_parquet_of_a_table_with_umap(folder, tmp_path):
    cli_export.sage_export(['--run', folder/'run', '--table', 'asked', '--umap', '--parquet', tmp_path/'d.parquet', '--quiet'])
    df = pd.read_parquet(tmp_path/'d.parquet')
    assert len(df) == 18 and df.role.value_counts().to_dict() == dict(database=12, query=6) and np.isfinite(df[['x', 'y']].to_numpy()).all()
    np.testing.assert_allclose(np.linalg.norm(np.stack(df.embedding), axis=1), 1, atol=1e-5)

@pytest.mark.parametrize('rows', [1, 3, 100])
def test_parquet_in_pieces(tmp_path, rows):
    d = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float16)
    labels = pd.DataFrame(dict(image=[f'{i}.jpg' for i in range(7)], place=range(7), lat=[np.nan] * 7, city='x', extra=1))
    write_parquet(labels, d, tmp_path/'d.parquet', rows=rows)
    df = pd.read_parquet(tmp_path/'d.parquet')
    assert list(df) == ['image', 'lat', 'city', 'place', 'embedding'] and df.lat.isna().all() and np.array_equal(np.stack(df.embedding), d.astype(np.float32))
    assert pq.read_table(tmp_path/'d.parquet')['lat'].null_count == 7

@pytest.mark.slow
def test_umap_is_seeded():
    d = np.random.default_rng(0).normal(size=(40, 6))
    assert np.array_equal(flatten(d, 1), flatten(d, 1)) and not np.array_equal(flatten(d, 1), flatten(d, 2))
    with pytest.raises(UserError, match='9 images'): flatten(d[:9])

# ---- GeoJSON -------------------------------------------------------------------------------------------------------

def plain_answers(labels, d, radius):
    "The definition, query by query."
    xy, q, b = labels[['easting', 'northing']].to_numpy(), np.flatnonzero(labels.role == 'query'), np.flatnonzero(labels.role == 'database')
    for i in q:
        near = b[np.argsort(((d[b] - d[i]) ** 2).sum(1), kind='stable')]
        ok = np.hypot(*(xy[near] - xy[i]).T) <= radius
        yield near[0], bool(ok[0]), bool(ok.any()), int(ok[:20].argmax() + 1) if ok[:20].any() else 0, float(np.hypot(*(xy[near[0]] - xy[i])))

def test_answers_by_the_definition():
    g = np.random.default_rng(0)
    labels = make_table(image=[str(i) for i in range(90)], city='A', place=0, easting=500_000 + g.uniform(0, 150, 90), northing=5_300_000 + g.uniform(0, 150, 90), zone='33N', role=g.choice(['query', 'database'], 90))
    d = g.normal(size=(90, 3)).astype(np.float32)
    found, want = answers(labels, d), list(plain_answers(labels, d, 25.))
    assert list(zip(found.answer, found.right, found.asked, found['rank'])) == [w[:4] for w in want]
    np.testing.assert_allclose(found.metres, [w[4] for w in want])

def test_geojson_of_a_run(folder, tmp_path):
    cli_export.sage_export(['--run', folder/'run', '--geojson', tmp_path/'m.geojson', '--quiet'])
    text = (tmp_path/'m.geojson').read_text(encoding='utf-8')
    made = json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    assert made['type'] == 'FeatureCollection' and all(f['geometry']['type'] == 'Point' for f in made['features'])
    places, queries = ([f for f in made['features'] if f['properties']['kind'] == k] for k in ('place', 'query'))
    assert len(places) == 6 and len(queries) == 6
    assert sum(p['properties']['recalled'] for p in places) == sum(q['properties']['right'] for q in queries) > 3
    for f in made['features']: lon, lat = f['geometry']['coordinates']; assert abs(lon - 15) < .02 and abs(lat - 47.85) < .01
    assert all(q['properties']['right'] == (q['properties']['rank'] == 1) for q in queries)

def test_coordinates_come_back():
    "Both hemispheres, to the millimetre."
    for zone, lat, lon in (('33N', 47.85, 15.1), ('56S', -33.9, 151.2), ('1N', 10., -179.9)):
        e, n, _ = to_utm([lat], [lon], zone)
        got = degrees(pd.DataFrame(dict(easting=e, northing=n, zone=zone)))
        assert abs(got[0][0] - lat) < 1e-8 and abs(got[1][0] - lon) < 1e-8

def test_recorded_answers_are_used(tmp_path):
    from sage.viz.toy import toy_run
    run = toy_run(tmp_path/'toy', epochs=1)
    labels, found, epoch = recorded_answers(run, run.config['validation'][0])
    recall = run.recalls().query('k == 1 and epoch == @epoch').recall.iloc[0]
    assert epoch == 1 and abs(100 * found.right[found.asked].mean() - recall) < .06
    cli_export.sage_export(['--run', run.path, '--geojson', tmp_path/'m.geojson'])               # no checkpoint is needed
    asked = [f for f in json.loads((tmp_path/'m.geojson').read_text())['features'] if f['properties']['kind'] == 'query']
    assert sum(f['properties']['right'] is True for f in asked) == found.right[found.asked].sum()

def test_geojson_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError): write_geojson(dict(a=float('nan')), tmp_path/'m.geojson')
    assert not list(tmp_path.iterdir())

# ---- bad input -----------------------------------------------------------------------------------------------------

def test_refused(folder, tmp_path, capsys):
    run, out = folder/'run', tmp_path
    cases = [((), 'nothing to write'), (('--parquet', out/'a.parquet'), 'give it with --run'), (('--onnx', out/'a.onnx'), 'give --checkpoint'), (('--hub', out/'hub'), 'give --checkpoint'),
             (('--run', folder/'nowhere', '--parquet', out/'a.parquet'), 'no such run folder'), (('--run', folder/'a', '--parquet', out/'a.parquet'), 'not a run folder'),
             (('--run', run, '--parquet', out/'a.csv'), 'ends in .parquet'), (('--run', run, '--geojson', out/'a.json'), 'ends in .geojson'), (('--run', run, '--geojson', out/'a.geojson', '--table', 'none'), "no table 'none'"),
             (('--run', run, '--geojson', out/'a.geojson', '--table', 'plan'), 'zone is unknown'), (('--run', run, '--geojson', out/'a.geojson', '--table', 'mined', '--quiet'), '0 queries'),
             (('--checkpoint', folder/'nowhere', '--onnx', out/'a.onnx'), 'no such'), (('--checkpoint', folder/'nowhere', '--hub', out/'hub'), 'no such'), (('--checkpoint', run, '--onnx', out/'a.onnx', '--size', 'big'), '--size')]
    for argv, says in cases: assert says in refused(capsys, *argv), says
    assert not list(out.iterdir())

@pytest.mark.parametrize('file, column, value', [('nodes', 'image', ...), ('nodes', 'image', None), ('nodes', 'place', 'x'), ('nodes', 'lat', 'x'), ('mined', 'role', ...), ('mined', 'image', ...), ('asked', 'role', ...), ('asked', 'zone', ...), ('asked', 'zone', '99Z'), ('asked', 'easting', 'x'), ('asked', 'easting', 9e7), ('asked', 'place', 1.5)])
def test_a_run_of_other_tables(folder, tmp_path, capsys, file, column, value):
    "Parquet files that are whole and hold something else than a training writes: one sentence, and nothing is written."
    shutil.copytree(folder/'run', tmp_path/'run')
    path = tmp_path/'run'/'epochs'/'0000'/'nodes.parquet' if file == 'nodes' else tmp_path/'run'/'tables'/Run(tmp_path/'run').config['tables'][file]
    df = pd.read_parquet(path)
    (df.drop(columns=column) if value is ... else df.assign(**{column: value})).to_parquet(path)
    said = refused(capsys, '--run', tmp_path/'run', *(('--geojson', tmp_path/'m.geojson') if file == 'asked' else ('--parquet', tmp_path/'m.parquet')), '--quiet')
    assert path.name in said or str(value) in said or 'no position of zone' in said, said
    assert [p.name for p in tmp_path.iterdir()] == ['run']

def test_answers_to_another_table(tmp_path, capsys):
    from sage.viz.toy import toy_run
    run = toy_run(tmp_path/'toy', epochs=0)
    path = run.path/'tables'/'01.parquet'
    pd.read_parquet(path)[:300].to_parquet(path)
    assert "its answers are to 600 images, and its table 'Otherville' holds 300" in refused(capsys, '--run', run.path, '--geojson', tmp_path/'m.geojson')


def test_a_file_in_the_way_stays(folder, tmp_path, capsys):
    (tmp_path/'a.parquet').write_text('mine')
    assert 'is there already' in refused(capsys, '--run', folder/'run', '--parquet', tmp_path/'a.parquet')
    assert (tmp_path/'a.parquet').read_text() == 'mine'

def test_a_run_without_records(tmp_path, capsys):
    Run.create(tmp_path/'r', dict(settings={}), {})
    assert 'no epoch' in refused(capsys, '--run', tmp_path/'r', '--parquet', tmp_path/'a.parquet')
    assert 'no validation table' in refused(capsys, '--run', tmp_path/'r', '--geojson', tmp_path/'a.geojson')

def test_run_of(folder, tmp_path):
    assert run_of(folder/'run'/'checkpoints'/'0000.safetensors').path == folder/'run' and run_of(tmp_path/'x.safetensors') is None
    with pytest.raises(MissingPath): Run(folder/'nowhere')

def test_python_m(folder, tmp_path, root):
    "python -m sage.export is sage_export."
    done = subprocess.run([sys.executable, '-m', 'sage.export', '--run', folder/'run', '--parquet', tmp_path/'d.parquet'], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and '12 rows' in done.stdout and (tmp_path/'d.parquet').exists(), done.stderr
