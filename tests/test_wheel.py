"The wheel, built from a copy, installed in an environment with what it asks for and nothing else, used from another folder."
import os, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from command import commands
from env import env_folder, ensure, locked, requirements, settings

pytestmark = [pytest.mark.slow, pytest.mark.wheel]

def call(*command, folder, seconds=600, **variables):
    "Run a command without the checkout on its path; its output, with an error where it fails."
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')} | variables
    done = subprocess.run([str(c) for c in command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    assert done.returncode == 0, f'{" ".join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-4000:]}'
    return done.stdout

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what the package needs: the checkout stays as it is."
    source, built = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('built')
    for name in ('settings.ini', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/'sage', source/'sage', ignore=shutil.ignore_patterns('__pycache__'))
    call(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', built, source, folder=built)
    return next(built.glob('*.whl'))

@pytest.fixture(scope='module')
def python(wheel):
    "Python of the clean environment with this wheel in it; other runs wait until this one is done with it."
    python = ensure('runtime', install=[wheel])
    with locked(env_folder('runtime')):
        call(python, '-m', 'pip', 'install', '--disable-pip-version-check', '--force-reinstall', '--no-deps', wheel, folder=wheel.parent)
        yield python

def test_wheel_is_named_and_whole(wheel):
    config = settings()
    assert wheel.name == f'{config["lib_name"].replace("-", "_")}-{config["version"]}-py3-none-any.whl'
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT/'sage').rglob('*') if p.is_file() and '__pycache__' not in p.parts and not p.name.startswith('.')}
    assert not (left_out := sorted(wanted - held)), f'the wheel lacks {left_out}; see package_data in setup.py'
    assert not (other := sorted(n for n in held - wanted if '.dist-info/' not in n)), f'the wheel also holds {other}'

def test_wheel_says_what_settings_say(wheel):
    archive = zipfile.ZipFile(wheel)
    read = lambda name: archive.read(next(n for n in archive.namelist() if n.endswith(f'.dist-info/{name}'))).decode()
    metadata, scripts = read('METADATA'), read('entry_points.txt')
    needed = [line for line in metadata.splitlines() if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert len(needed) == len(requirements('runtime'))
    assert f'Requires-Python: >={settings()["min_python"]}' in metadata
    assert 'sage=sage._modidx:d' in scripts.replace(' ', '')
    for name in commands(): assert f'{name}={commands()[name]}' in scripts.replace(' ', '')

def test_clean_environment_is_consistent(python, tmp_path):
    assert 'No broken requirements' in call(python, '-m', 'pip', 'check', folder=tmp_path)
    listed = {line.split('==')[0].lower() for line in call(python, '-m', 'pip', 'freeze', '--all', folder=tmp_path).splitlines()}
    assert not listed & {'nbdev', 'pytest', 'hypothesis'}, 'the environment is meant to hold what the wheel asks for, not what developers use'

def test_import_from_another_folder(python, tmp_path):
    out = call(python, '-c', 'import sage, pathlib; print(sage.__version__, pathlib.Path(sage.__file__).parent)', folder=tmp_path)
    version, place = out.split(maxsplit=1)
    assert version == settings()['version'] and Path(place.strip()).is_relative_to(python.parents[1])

def test_every_module_imports(wheel, python, tmp_path):
    "Nothing in the package needs a developer's tool."
    modules = sorted(n[:-3].replace('/', '.') for n in zipfile.ZipFile(wheel).namelist() if n.startswith('sage/') and n.endswith('.py') and '/_' not in n)
    assert len(modules) > 10
    call(python, '-c', f'import importlib\nfor m in {modules}: importlib.import_module(m)', folder=tmp_path, MPLBACKEND='agg')

def test_demo_from_another_folder(python, tmp_path):
    "One step and one image of each kind, by the command the wheel installed."
    out = call(python.parent/'sage_demo', '--dev', folder=tmp_path, SAGE_CACHE=str(tmp_path/'cache'), MPLBACKEND='agg')
    assert 'R@1' in out, out[-2000:]
