"MSLS's validation cities never train, in whatever layout and under whatever name their images come."
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sage.core import UserError
from sage.formats import write_gsv, write_msls, write_utm
from sage.geo import to_latlon, to_utm
from sage.places import make_table
from sage.sources import training_tables

WHERE = dict(zurich=(47.37, 8.54), cph=(55.68, 12.57), sf=(37.77, -122.42))

def town(folder, where, city, places=6, views=3):
    "Grey squares at true positions of a city, called `city`."
    folder.mkdir(parents=True, exist_ok=True)
    x, y, zone = to_utm(*WHERE[where]); x, y = float(x), float(y)
    rows = []
    for p in range(places):
        for v in range(views):
            path = folder/f'{city}_{p}_{v}.jpg'
            Image.fromarray(np.full((28, 28, 3), 20*p + v, np.uint8)).save(path)
            rows.append((str(path), p, x + 60*p + v, y, 'query' if v == 0 else 'database'))
    image, place, east, north, role = zip(*rows)
    return make_table(image=image, city=city, place=place, easting=east, northing=north, zone=zone, heading=90., role=role, time='2026-03')

@pytest.mark.parametrize('where', ['cph', 'sf'])
@pytest.mark.parametrize('layout', ['gsv', 'utm', 'photos', 'msls'])
def test_a_copy_under_another_name(tmp_path, where, layout, capsys):
    both = pd.concat([town(tmp_path/'a', 'zurich', 'zurich'), town(tmp_path/'b', where, 'mytown')], ignore_index=True)
    mixed, alone = both, both[both.city == 'mytown'].reset_index(drop=True)
    for name, df in (('mixed', mixed), ('alone', alone)):
        root = tmp_path/name
        if layout == 'gsv': write_gsv(df, root)
        if layout == 'utm': write_utm(df.assign(split='train'), root)
        if layout == 'msls': write_msls(df, root)
        if layout == 'photos':
            root.mkdir()
            parts = []
            for zone, part in df.groupby('zone'):
                lat, lon = to_latlon(part.easting, part.northing, zone)
                parts.append(pd.DataFrame(dict(path=[p.rsplit('/', 1)[1] for p in part.image], lat=lat, lon=lon)))
                for p in part.image: shutil.copy(p, root)
            pd.concat(parts).to_csv(root/'photos.csv', index=False)
    table = training_tables([tmp_path/'mixed'], scan=False)['mined']
    assert len(table) == 18 and 'mytown' not in ' '.join(table.image) and 'left out' in capsys.readouterr().err
    with pytest.raises(UserError, match='never train'): training_tables([tmp_path/'alone'], scan=False)

@pytest.mark.parametrize('layout', ['gsv', 'utm'])
def test_by_name(tmp_path, layout):
    df = town(tmp_path/'a', 'zurich', 'cph')
    write_gsv(df, tmp_path/'x') if layout == 'gsv' else write_utm(df.assign(split='train'), tmp_path/'x')
    if layout == 'gsv':
        with pytest.raises(UserError, match='never train'): training_tables([tmp_path/'x'], scan=False)
    else: assert len(training_tables([tmp_path/'x'], scan=False)['mined'])     # a @utm@ folder has no names of cities; the position decides
