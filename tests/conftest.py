"Shared by all tests: the checkout's root, data that may lie beside it, and a sensible number of threads."
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', str(min(4, os.cpu_count() or 1)))  # before anything imports torch
os.environ.setdefault('MPLBACKEND', 'agg')

import hypothesis, pytest

hypothesis.settings.register_profile('sage', deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=not os.environ.get('SAGE_TORTURE'))     # a slow machine is no mistake; make torture looks for what is new
hypothesis.settings.load_profile('sage')

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root():
    "The checkout."
    return ROOT

@pytest.fixture(scope='session')
def shared():
    "Reference data kept outside the repository: $SAGE_SHARED, else a folder shared/ next to the checkout."
    folder = Path(os.environ.get('SAGE_SHARED') or ROOT.parent/'shared')
    if not folder.is_dir(): pytest.skip(f'no reference data: {folder} is not there (set SAGE_SHARED to its folder)')
    return folder
