"Tests marked torture run only when asked for by -m torture, as `make torture` does."

def pytest_collection_modifyitems(config, items):
    if 'torture' in (config.option.markexpr or ''): return
    long = [i for i in items if i.get_closest_marker('torture')]
    if long: config.hook.pytest_deselected(items=long); items[:] = [i for i in items if i not in long]
