"Tests marked torture run only with SAGE_TORTURE=1, as `make torture` sets it."
import os

def pytest_collection_modifyitems(config, items):
    if os.environ.get('SAGE_TORTURE'): return
    long = [i for i in items if i.get_closest_marker('torture')]
    if long: config.hook.pytest_deselected(items=long); items[:] = [i for i in items if i not in long]
