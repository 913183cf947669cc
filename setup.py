"Everything about the package is said once, in settings.ini."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
config = parser['DEFAULT']

setup(
    name=config['lib_name'], version=config['version'], description=config['description'], keywords=config['keywords'],
    author=config['author'], author_email=config['author_email'], license='MIT', url=config['git_url'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires=f">={config['min_python']}",
    install_requires=shlex.split(config['requirements']), extras_require={'dev': shlex.split(config['dev_requirements'])},
    packages=find_packages(include=['sage', 'sage.*']),
    package_data={'sage': [f'**/*.{kind}' for kind in ('safetensors', 'json', 'js', 'css', 'txt', 'svg', 'html')]},
    entry_points={'console_scripts': config['console_scripts'].split(), 'nbdev': ['sage=sage._modidx:d']},
    zip_safe=False,
)
