"tools/env.py: one line of answer, built once, never half. The requirement is pip itself, which every venv has: no network needed."
import os, shutil, subprocess, sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from env import lowest, requirements

@pytest.mark.parametrize('text', requirements('dev'), ids=lambda r: Requirement(r).name)
def test_every_requirement_has_two_bounds_and_is_met(text):
    "At least one version, below one version; the newest major that is allowed is the last; what is installed lies between."
    wanted = Requirement(text)
    assert sorted(s.operator for s in wanted.specifier) == ['<', '>='] and not wanted.extras and not wanted.marker
    least, below = sorted((Version(s.version) for s in wanted.specifier))
    assert least < below and len(below.release) <= 2 and [s.operator for s in wanted.specifier if Version(s.version) == least] == ['>=']
    assert wanted.specifier.contains(version(wanted.name)), f'{wanted.name} {version(wanted.name)} is installed, {wanted.specifier} is wanted: make env'

def test_no_requirement_is_said_twice():
    names = [canonicalize_name(Requirement(r).name) for r in requirements('dev')]
    assert len({*names}) == len(names)

def test_lowest_versions(capsys):
    "Every requirement at its lower bound; one sentence where there is none."
    assert lowest('numpy>=1.26,<3') == 'numpy==1.26' and lowest('a_b>=2') == 'a_b==2'
    assert [Requirement(r).name for r in requirements('lowest')] == [Requirement(r).name for r in requirements('dev')]
    with pytest.raises(SystemExit, match="'numpy' has no lower bound"): lowest('numpy')

@pytest.fixture
def project(tmp_path):
    "A project with hardly any requirement, and a home for its environments (with a space in its name)."
    shutil.copytree(ROOT/'tools', tmp_path/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'Makefile', tmp_path)
    write_settings(tmp_path, 'pip')
    return tmp_path

def write_settings(folder, wanted, least='3.11'):
    (folder/'settings.ini').write_text(f'[DEFAULT]\nmin_python = {least}\nrequirements = pip\ndev_requirements = {wanted}\n')

def make_env(project, *options):
    variables = {**os.environ, 'SAGE_ENV_HOME': str(project/'the envs'), 'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': ''}
    variables = {k: v for k, v in variables.items() if k not in ('MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS', 'MAKELEVEL', 'PY', 'PYTHON')}  # this may run under make itself
    return subprocess.run(['make', 'env', f'PYTHON={sys.executable}', *options], cwd=project, env=variables, capture_output=True, text=True)

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('make'), reason='no make')
def test_environment_is_built_once_and_never_half(project):
    first = make_env(project)
    assert first.returncode == 0, first.stderr
    python = Path(first.stdout.splitlines()[-1])
    assert subprocess.run([python, '-c', 'import pip']).returncode == 0 and 'building' in first.stderr
    assert python.is_relative_to(project/'the envs')
    assert (again := make_env(project)).stdout == first.stdout and 'building' not in again.stderr
    folder = python.parents[1]
    (folder/'complete').unlink(); (folder/'left-over').touch()        # as if killed in the middle
    assert (mended := make_env(project)).stdout == first.stdout and 'building' in mended.stderr and not (folder/'left-over').exists()
    python.unlink()                                                   # as if the Python beneath it had gone
    assert (mended := make_env(project)).stdout == first.stdout and 'building' in mended.stderr

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('make'), reason='no make')
def test_a_failed_installation_says_so(project):
    write_settings(project, '"pip<0.1"')
    failed = make_env(project)
    assert failed.returncode and not failed.stdout and 'pip could not install the requirements' in failed.stderr
    assert not list((project/'the envs').rglob('complete'))

@pytest.mark.skipif(not shutil.which('make'), reason='no make')
def test_messages_and_a_python_of_ones_own(project):
    write_settings(project, 'pip', least='9.9')
    old = make_env(project)
    assert old.returncode and 'needs 9.9 or newer' in old.stderr and not (project/'the envs').exists()
    assert make_env(project, 'PY=/some/python').stdout.splitlines() == ['/some/python']
