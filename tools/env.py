#!/usr/bin/env python3
"""Build the project's environment outside the checkout and print the path of its python as the last line.

usage: env.py [dev|runtime|lowest|audit]   (dev, the default: everything; runtime: what the installed package needs; lowest: everything, at the
                                           lowest version that settings.ini allows, to try whether that is true; audit: pip-audit)

The environment holds dependencies only, never the package itself, so many clones share it: run with PYTHONPATH=<checkout>.
It lies in $SAGE_ENV_HOME, else ~/.cache/sage-vpr/envs, in a folder named after the requirements and the Python version;
other requirements make another folder. A stamp is written last: without it the folder is taken for half-built and made anew.
Standard library only."""
import configparser, contextlib, fcntl, hashlib, json, os, platform, shlex, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def say(*words):
    "Progress goes to stderr; stdout holds the answer alone."
    print(*words, file=sys.stderr, flush=True)

def settings(root=ROOT):
    "The project's settings.ini."
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def requirements(kind='dev', root=ROOT):
    "The requirement list for 'runtime', 'dev' (which contains it), 'lowest' ('dev', each at its lower bound) or 'audit'."
    config = settings(root)
    if kind == 'audit': return shlex.split(config['audit_requirements'])
    listed = shlex.split(config['requirements']) + (shlex.split(config['dev_requirements']) if kind != 'runtime' else [])
    return [lowest(r) for r in listed] if kind == 'lowest' else listed

def lowest(requirement):
    "'name>=1.2,<3' → 'name==1.2'; leave with one sentence where there is no lower bound."
    name, found, bounds = requirement.partition('>=')
    if not found: sys.exit(f'settings.ini: {requirement!r} has no lower bound; write name>=LOWEST,<NEXT')
    return f'{name}=={bounds.split(",")[0]}'

def check_python(root=ROOT):
    "Leave with one sentence where this Python is too old."
    least = settings(root)['min_python']
    if sys.version_info < tuple(map(int, least.split('.'))):
        sys.exit(f'Python {platform.python_version()} is too old: sage needs {least} or newer; name one with `make PYTHON=python{least} …`')

def env_folder(kind='dev', root=ROOT):
    "Where the environment for these requirements and this Python lives."
    home = Path(os.environ.get('SAGE_ENV_HOME') or '~/.cache/sage-vpr/envs').expanduser().absolute()
    facts = [*sorted(requirements(kind, root)), platform.python_version(), platform.machine()]
    return home/f'{kind}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}'

def python_of(folder):
    return folder/'bin'/'python'

def is_whole(folder):
    "Whether the stamp is there and the environment's python still starts (the Python it was made from may be gone)."
    if not (folder/'complete').is_file(): return False
    try: return subprocess.run([python_of(folder), '-c', ''], capture_output=True).returncode == 0
    except OSError: return False

@contextlib.contextmanager
def locked(folder):
    "One process at a time builds or changes an environment; the others wait."
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent/f'.{folder.name}.lock', 'w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

def run(command, failed):
    "Run a command with its output on stderr; leave with the sentence `failed` where it fails."
    if subprocess.run([str(c) for c in command], stdout=sys.stderr).returncode: sys.exit(failed)

def build(folder, install):
    "Make the environment anew and install the list `install` in one pip call, so that pip weighs all versions together."
    say(f'building the environment in {folder} (some minutes, up to 5.5 GB) …')
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, '-m', 'venv', folder], 'the venv module failed; on Debian or Ubuntu install the package python3-venv')
    run([python_of(folder), '-m', 'pip', 'install', '--disable-pip-version-check', '--no-input', *install],
        'pip could not install the requirements (its last lines say why); nothing half-built will be used, so simply try again')
    partial = folder/'complete.part'
    partial.write_text(f'{platform.python_version()}\n' + '\n'.join(map(str, install)) + '\n')
    os.replace(partial, folder/'complete')

def ensure(kind='dev', root=ROOT, install=None):
    "The python of a whole environment, built first where there is none; `install` replaces the requirement list (a wheel, say)."
    check_python(root)
    folder = env_folder(kind, root)
    if not is_whole(folder):
        with locked(folder):
            if not is_whole(folder): build(folder, install or requirements(kind, root)) # another process may have built it meanwhile
    return python_of(folder)

if __name__ == '__main__':
    kind = sys.argv[1] if len(sys.argv) > 1 else 'dev'
    if kind not in ('dev', 'runtime', 'lowest', 'audit') or len(sys.argv) > 2: sys.exit(__doc__)
    print(ensure(kind))
