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
from sage.sources import away_from, training_and_validation, training_tables

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


# ---- what is held out of one's own data

def across(folder, lon=12., places=20, step=1e-3):
    "Places along a border of two zones, of which every second lies on the other side, each measured in its own zone."
    folder.mkdir(); lines = ['path,lat,lon,place']
    for p in range(places):
        for v in range(3):
            Image.fromarray(np.full((28, 28, 3), 10*p + v, np.uint8)).save(folder/f'{p}_{v}.png')
            lines.append(f'{p}_{v}.png,{55 + p//2*step:.6f},{lon + (1e-5 if p % 2 else -1e-5):.6f},{p}')
    return folder, lines

def near(held, df, radius=25):
    "Images of a table within metres of one that is held out, by latitude and longitude."
    a, b = (np.stack([np.concatenate(c) for c in zip(*((to_latlon(t.easting[t.zone == z], t.northing[t.zone == z], z)) for z in t.zone.unique()))], 1) for t in (held, df))
    step = np.radians(b[:, None] - a[None])*6371e3*np.array([1, np.cos(np.radians(55))])
    return int((np.linalg.norm(step, axis=2) < radius).any(1).sum())

def test_what_is_held_out_is_near_nothing_that_trains_across_zones(tmp_path):
    "Two cities by name, one street on the ground; the far rows make that a table is measured in several zones."
    root, lines = across(tmp_path/'town')
    for i, lon in enumerate((-60., 100.)):
        Image.new('RGB', (28, 28)).save(root/f'far{i}.png'); lines.append(f'far{i}.png,10,{lon},{100 + i}')
    (root/'where.csv').write_text('\n'.join(lines) + '\n')
    train, val = training_and_validation([str(root)], progress=False)
    held = val['held out']
    assert train['mined'].zone.nunique() > 2 and len(held) and near(held, train['mined']) == 0

def test_a_second_source_is_cleared_of_what_is_held_out(tmp_path, capsys):
    def both(step):
        for name in ('a', 'b'):
            root, lines = across(tmp_path/f'{name}{step}', 12.3, step=step); (root/'where.csv').write_text('\n'.join(lines) + '\n')
            yield str(root)
    with pytest.raises(UserError, match='nothing is left to train'): training_and_validation([*both(1e-6)], progress=False)         # all on two metres
    capsys.readouterr()
    train, val = training_and_validation([*both(1e-3)], progress=False)
    held = val['held out']
    assert len(train['labelled']) == 60 - len(held) and near(held, train['labelled']) == near(held, train['mined']) == 0
    assert f'{len(held)} of the 60 labelled images lie within 25 m' in capsys.readouterr().err

def test_away_from_counts_rows_from_zero():
    held = make_table(image=['h'], easting=0., northing=0., city='x')
    df = make_table(image=list('abc'), easting=[24., 26., 10.], northing=0., city='x')
    assert away_from(held, df).image.tolist() == ['b'] and away_from(held, df[:0]).image.tolist() == []
