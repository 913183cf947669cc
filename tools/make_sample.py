"""Make the sample data in `data/`: one hamlet in the three layouts that the readers know.

    python tools/make_sample.py data
"""
import shutil, sys, tempfile
from pathlib import Path

from sage.formats import write_gsv, write_msls, write_utm
from sage.town import Town
from sage.world import SEEN, city_views, photograph, test_plan, training_plan


def main(out):
    town = Town(7, 'hamlet', blocks=(1, 1), corner=(500_000., 5_300_000.))
    photos = Path(tempfile.mkdtemp())
    train = photograph(town, city_views(town, training_plan(), spacing=11., fewest=8), photos / 'train')
    test = photograph(town, city_views(town, test_plan(SEEN[:3]), spacing=12.), photos / 'test', split='test')
    for name, write, table in (('msls', write_msls, train), ('gsv', write_gsv, train), ('utm', write_utm, test)):
        shutil.rmtree(out / name, ignore_errors=True)
        write(table, out / name)
    shutil.rmtree(photos)


if __name__ == '__main__': main(Path(sys.argv[1]))
