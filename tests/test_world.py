"""The embedded world: the same bytes everywhere, true geometry, and what the demo relies on."""
import hashlib, subprocess, sys

import numpy as np
import pytest

from sage.core import UserError, stream
from sage.render import CONDITIONS, Camera, Photographer, draw_condition, look, pixel_rays, render
from sage.town import STEP, Town, headings
from sage.world import SEEN, UNSEEN, city_views, make_world, test_plan as unseen_plan, training_plan

SCRIPT = """
import hashlib
from sage.core import stream; from sage.town import Town, headings; from sage.render import Camera, draw_condition, render
town = Town(11, 'bytes', (1, 1)); line = town.streets[0]
photo = render(town, Camera(*line[60], heading=headings(line)[60]), draw_condition('wet night', stream(11, 'c')))
print(hashlib.sha256(photo.tobytes() + town.walls.tobytes() + town.light.tobytes()).hexdigest())
"""


def test_a_seed_gives_the_same_bytes_in_any_process():
    runs = {subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    town = Town(11, 'bytes', (1, 1)); line = town.streets[0]
    photo = render(town, Camera(*line[60], heading=headings(line)[60]), draw_condition('wet night', stream(11, 'c')))
    runs.add(hashlib.sha256(photo.tobytes() + town.walls.tobytes() + town.light.tobytes()).hexdigest() + '\n')
    assert len(runs) == 1


@pytest.mark.parametrize('pitch,roll', [(0, 0), (8, 0), (-6, 5)])
def test_what_a_pixel_sees_lies_on_its_ray(pitch, roll):
    "Independent check: project each seen wall point back through a pinhole camera and land on the pixel it came from."
    town = Town(3, 'geometry', (2, 2)); line = town.streets[1]
    camera = Camera(*line[70], z=1.7, heading=headings(line)[70], pitch=pitch, roll=roll, fov=80)
    s = look(town, camera, 90, 120)
    at = np.flatnonzero(s.wall >= 0)
    assert len(at) > 1000
    a, p, r = np.radians([camera.heading, pitch, roll])
    ahead = np.array([np.sin(a) * np.cos(p), np.cos(a) * np.cos(p), np.sin(p)])
    right = np.array([np.cos(a), -np.sin(a), 0]); up = np.cross(right, ahead)
    right, up = right * np.cos(r) + up * np.sin(r), up * np.cos(r) - right * np.sin(r)
    d = np.stack([s.east[at] - camera.x, s.north[at] - camera.y, s.height[at] - camera.z], 1)
    focal = 60 / np.tan(np.radians(40))
    u, v = 59.5 + focal * (d @ right) / (d @ ahead), 44.5 - focal * (d @ up) / (d @ ahead)
    assert np.abs(u - at % 120).max() < .6 and np.abs(v - at // 120).max() < .6


def test_seen_wall_points_lie_on_their_walls():
    town = Town(3, 'geometry', (2, 2)); line = town.streets[0]
    s = look(town, Camera(*line[70], heading=headings(line)[70]), 112, 112)
    at = np.flatnonzero((s.wall >= 0) & (s.distance < 40))
    w = town.walls[s.wall[at]]
    on = np.stack([w['x0'] + s.u[at] * (w['x1'] - w['x0']), w['y0'] + s.u[at] * (w['y1'] - w['y0'])], 1)
    assert np.abs(on - np.stack([s.east[at], s.north[at]], 1)).max() < .5


def test_streets_of_different_corners_are_not_neighbours():
    views = city_views(Town(5, 'corners', (2, 2)), training_plan())
    xy, street = views[['x', 'y']].to_numpy(), views['street'].to_numpy()
    near = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) < 15
    assert not (near & (street[:, None] != street[None])).any()


def test_every_place_has_eight_views_over_several_conditions():
    views = city_views(Town(5, 'views', (2, 2)), training_plan(), fewest=8)
    each = views.groupby('place')
    assert each.size().min() >= 8 and each['kind'].nunique().min() >= 3


def test_unseen_conditions_are_unseen():
    assert not set(SEEN) & set(UNSEEN) and set(SEEN) | set(UNSEEN) == set(CONDITIONS)
    assert {k for k, _, _ in training_plan()} <= set(SEEN)
    assert {k for k, _, role in unseen_plan(UNSEEN) if role == 'query'} == set(UNSEEN)


def test_traffic_changes_from_drive_to_drive_but_houses_stay():
    town = Town(5, 'traffic', (1, 1)); line = town.streets[0]
    camera = Camera(*line[60], heading=headings(line)[60])
    a, b = (Photographer(town, draw_condition('day', stream(i, 'drive'))) for i in (1, 2))
    assert len(a.things) != len(b.things) or (a.things != b.things).any()
    assert (look(town, camera, 64, 64).wall == look(Town(5, 'traffic', (1, 1)), camera, 64, 64).wall).all()


def test_the_world_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    import sage.world as world
    monkeypatch.setattr(world, 'write_utm', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): make_world(tmp_path, seed=2, towns=('hamlet',), blocks=(1, 1), workers=1)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_told():
    with pytest.raises(UserError, match='blocks'): Town(1, blocks=(0, 3))
    with pytest.raises(UserError, match='hail'): draw_condition('hail', stream(0, 'x'))
