"""Run one of the package's commands from the checkout, without installing it: command.py sage_demo --dev

The commands are the console scripts of settings.ini."""
import importlib, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from env import settings

def commands():
    "Name of each console script → 'module:function'."
    return dict(line.split('=') for line in settings()['console_scripts'].split())

if __name__ == '__main__':
    known = commands()
    if len(sys.argv) < 2 or sys.argv[1] not in known: sys.exit(f'name one of {", ".join(known)}, then its options')
    sys.argv = sys.argv[1:]
    module, function = known[sys.argv[0]].split(':')
    sys.exit(getattr(importlib.import_module(module), function)())
