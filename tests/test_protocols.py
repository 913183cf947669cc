"""Protocols: trees of the exact shape of each benchmark give FORMATS' counts; positives equal an independent reading; bad trees say so in one sentence."""
import os, pickle, resource, subprocess
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pyproj import Geod
from scipy.io import savemat

from sage.core import MissingPath, UserError
from sage.geo import to_utm
from sage.places import make_table
from sage.protocols import (EvalSet, PROTOCOLS, count_note, folder_protocol, folder_table, frame_numbers, frame_positives, get_protocol, keep_rows, load_benchmark, read_mat, read_positives)
from sage.retrieval import positives_within


def touch(folder, names):
    "Empty files: loading a benchmark reads names only."
    os.makedirs(folder, exist_ok=True)
    for name in names: os.close(os.open(f'{folder}/{name}', os.O_CREAT | os.O_WRONLY))


def at(easting, northing=0., pano='', zone='17', letter='N'):
    return f'@{easting:.2f}@{northing:.2f}@{zone}@{letter}@@@{pano}@@@@@@@@.jpg'


def grid(n, offset=0.): return [at(500_000 + 30. * (i % 300) + offset, 4_000_000 + 30. * (i // 300), pano=i) for i in range(n)]


COUNTED = [p for p in PROTOCOLS.values() if p.queries and p.family != 'msls' and p.layouts[0] == 'folders']


@pytest.mark.parametrize('p', [p for p in COUNTED if p.rule == 'radius'], ids=lambda p: p.name)
def test_counts_of_coordinate_trees(p, tmp_path):
    base = tmp_path/p.folders[0]/'images'/p.split
    n = p.database or 9_000
    touch(base/'database', grid(n)); touch(base/'queries', grid(p.queries, 1.))
    d, q, positives, notes = load_benchmark(p.name, tmp_path)
    assert (len(d), len(q)) == (n, p.queries) and notes == []
    assert len(positives) == len(q) and all(len(x) == 1 for x in positives[:min(n, p.queries)][:50])   # 30 m apart: its own twin only


@pytest.mark.parametrize('p', [p for p in COUNTED if p.rule != 'radius'], ids=lambda p: p.name)
@pytest.mark.parametrize('named', ['plain', 'at'])
def test_counts_of_frame_trees(p, named, tmp_path):
    if named == 'at' and p.parts[0] != ('database', 'queries'): pytest.skip('this set only comes as plain folders')
    make = (lambda i: f'{i}.jpg') if named == 'plain' else lambda i: f'@0@{i * 25 / 1.5:07.1f}@@@@@{i}@@@@@@@@.jpg'
    d_part, q_part = p.parts[0] if named == 'at' else p.parts[-1]
    base = tmp_path/p.folders[0]/('images/test' if named == 'at' else '')
    touch(base/d_part, map(make, range(p.database))); touch(base/q_part, map(make, range(0, p.queries * p.step, p.step)))
    d, q, positives, notes = load_benchmark(p.name, tmp_path)
    assert (len(d), len(q)) == (p.database, p.queries) and notes == []
    number = lambda path: int(os.path.basename(path).split('@')[7]) if named == 'at' else int(os.path.basename(path)[:-4])
    frames = np.array([number(i) for i in d.image])
    for i in np.linspace(0, p.queries - 1, 40).astype(int):
        want = np.flatnonzero(np.abs(frames - number(q.image[i])) <= p.within)
        assert np.array_equal(positives[i], want)


def test_nordland_queries_counted_on_their_own(tmp_path):
    "Nordland* with its queries named 0, 1, 2 …: query i is frame 10·i."
    touch(tmp_path/'nordland_subset'/'ref', (f'{i}.jpg' for i in range(301))); touch(tmp_path/'nordland_subset'/'query', (f'{i}.jpg' for i in range(30)))
    d, q, positives, notes = load_benchmark('nordland*', tmp_path)
    names = [{int(os.path.basename(d.image[j])[:-4]) for j in positives[i]} for i in range(30)]
    for i in range(30):
        n = int(os.path.basename(q.image[i])[:-4]); assert names[i] == {x for x in (10 * n - 1, 10 * n, 10 * n + 1) if 0 <= x <= 300}


def test_a_missing_frame_shifts_nothing(tmp_path):
    touch(tmp_path/'sped'/'ref', (f'{i:07d}.jpg' for i in range(607) if i != 5)); touch(tmp_path/'sped'/'query', (f'{i:07d}.jpg' for i in range(607)))
    d, q, positives, notes = load_benchmark('sped', tmp_path)
    assert [len(p) for p in positives].count(0) == 1 and len(positives[5]) == 0
    assert all(os.path.basename(d.image[p[0]]) == os.path.basename(i) for p, i in zip(positives, q.image) if len(p))
    assert len(notes) == 1 and 'warning' in notes[0] and '606 / 607' in notes[0] and 'no known variant' in notes[0]


def test_pitts_mat_equals_folders(tmp_path):
    rng = np.random.default_rng(0)
    xy, asked = rng.uniform(0, 2000, (10_000, 2)), rng.uniform(0, 2000, (6_816, 2))
    names, q_names = [f'{i // 100:03d}/{i:06d}_pitch1_yaw1.jpg' for i in range(10_000)], [f'{i // 100:03d}/{i:06d}_pitch1_yaw1.jpg' for i in range(6_816)]
    root = tmp_path/'Pittsburgh'; (root/'datasets').mkdir(parents=True); (root/'queries_real').mkdir()
    savemat(root/'datasets'/'pitts30k_test.mat', {'dbStruct': dict(whichSet='test', dbImage=np.array(names, dtype=object)[:, None], utmDb=xy.T, qImage=np.array(q_names, dtype=object)[:, None],
            utmQ=asked.T, numDb=10_000, numQ=6_816, posDistThr=25., posDistSqThr=625., nonTrivPosDistSqThr=100.)})
    d, q, positives, notes = load_benchmark('pitts30k', tmp_path)
    assert (len(d), len(q)) == (10_000, 6_816) and notes == ['read from pitts30k_test.mat']
    assert d.image[101] == str(root/names[101]) and q.image[7] == str(root/'queries_real'/q_names[7])
    for i in range(0, 6_816, 97): assert np.array_equal(positives[i], np.flatnonzero(((xy - asked[i]) ** 2).sum(1) <= 625.))


def test_a_mat_is_read_where_memory_is_limited(tmp_path, monkeypatch):
    "By `ulimit -v`, as on a cluster: a hard limit cannot be raised."
    path, run = tmp_path/'x.mat', subprocess.run
    savemat(path, {'dbStruct': dict(dbImage=np.array(['a.jpg'], dtype=object), utmDb=np.zeros((2, 1)), qImage=np.array(['q.jpg'], dtype=object), utmQ=np.zeros((2, 1)))})
    monkeypatch.setattr(subprocess, 'run', lambda *args, **more: run(*args, **more, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))))
    assert [len(t) for t in read_mat(path, tmp_path)] == [1, 1]


def write_msls(root, cities=(('cph', 12_556, 498), ('sf', 6_315, 242)), extra=7, more=0):
    "MSLS-val's csv files in their exact shape: `extra` subtask queries without a positive, `more` queries outside the subtask, two panoramas on each side."
    for c, (city, n, nq) in enumerate(cities):
        for role, good, far in (('database', n, 0), ('query', nq, extra if c == 0 else 0)):
            rest = more if role == 'query' else 0
            total = good + far + rest + 2
            folder = root/'train_val'/city/role; os.makedirs(folder/'images', exist_ok=True)
            key = [f'{city}{role[0]}{i:018d}' for i in range(total)]
            easting = np.where((np.arange(total) >= good) & (np.arange(total) < good + far), 9e5, 5e5 + 40. * (np.arange(total) % 200)) + (3. if role == 'query' else 0.)
            northing = 4e6 + 40. * (np.arange(total) // 200) * 1.
            pano = np.arange(total) >= total - 2
            pd.DataFrame(dict(key=key, lon=12.5, lat=55.7, ca=0., captured_at='2018-01-01', pano=pano)).to_csv(folder/'raw.csv')
            pd.DataFrame(dict(key=key, sequence_key='s0', frame_number=np.arange(total))).to_csv(folder/'seq_info.csv')
            pd.DataFrame(dict(key=key, easting=easting, northing=northing, night=False, control_panel=False, view_direction='Forward', unique_cluster=np.arange(total))).to_csv(folder/'postprocessed.csv')
            sub = np.ones(total, bool) if role == 'database' else (np.arange(total) < good + far) | pano
            pd.DataFrame(dict(key=key, all=sub, s2w=False, w2s=False, o2n=False, n2o=False, d2n=False, n2d=False)).to_csv(folder/'subtask_index.csv')
            touch(folder/'images', (f'{k}.jpg' for k in key))


def test_msls_val_by_subtask_is_740_and_by_all_is_more(tmp_path):
    write_msls(tmp_path/'msls', more=5_150)
    d, q, positives, notes = load_benchmark('msls_val', tmp_path)
    assert (len(d), len(q)) == (18_871, 740) and all(len(p) for p in positives)
    assert any('747' in n and '7 without a positive' in n for n in notes) and not any('warning' in n for n in notes)
    assert d.city.value_counts().to_dict() == {'cph': 12_556, 'sf': 6_315} and q.city.value_counts().to_dict() == {'cph': 498, 'sf': 242}
    d, q, positives, notes = load_benchmark('msls_val_all', tmp_path)
    assert (len(d), len(q)) == (18_871, 740 + 7 + 2 * 5_150) and not any('warning' in n for n in notes)


@pytest.mark.parametrize('asked, counts, says', [
    ('pitts30k', (10_000, 7_608), 'Pitts30k-val'), ('nordland', (27_592, 2_760), 'Nordland*'), ('nordland', (3_450, 3_450), 'Nordland-test'),
    ('nordland_subset', (27_592, 27_592), 'Nordland**'), ('msls_val', (18_871, 11_084), 'all queries'), ('msls_val_all', (18_871, 740), '(740)'),
    ('msls_val', (18_871, 747), 'before queries without a positive'), ('sped', (600, 607), 'no known variant')])
def test_wrong_counts_name_the_variant(asked, counts, says):
    note = count_note(get_protocol(asked), *counts)
    assert note.startswith('warning') and says in note and '\n' not in note


def test_frame_positives_against_a_plain_reading():
    rng = np.random.default_rng(1)
    for _ in range(50):
        d, q, n = rng.permutation(40), rng.integers(-1, 45, 12), int(rng.integers(0, 4))
        got = frame_positives(q, d, n)
        for i, f in enumerate(q): assert list(got[i]) == ([] if f < 0 else [j for j, x in enumerate(d) if abs(int(x) - int(f)) <= n])


def test_keep_rows_against_names():
    rng = np.random.default_rng(2)
    d, q = (make_table(image=[f'/{r}{i}.jpg' for i in range(30)], city='x', place=np.arange(30), easting=0., northing=0.) for r in 'dq')
    positives = [np.flatnonzero(rng.random(30) < .2) for _ in range(30)]
    truth = {q.image[i]: {d.image[j] for j in p} for i, p in enumerate(positives)}
    dk, qk = (np.flatnonzero(rng.random(30) < .6) for _ in range(2))
    kept = keep_rows(EvalSet(d, q, positives, []), dk, qk)
    left = set(kept.database.image)
    for i, p in enumerate(kept.positives): assert {kept.database.image[j] for j in p} == truth[kept.queries.image[i]] & left


def test_corridor_rule_equals_its_ground_truth(shared):
    "The one place where the pickled ground truth is read: two frames either way, row by row."
    folder = shared/'data'/'corridor'
    if not folder.exists(): pytest.skip('no corridor data')
    p = folder_protocol(folder); e = load_benchmark(p, folder)
    assert p.name == 'corridor' and (len(e.database), len(e.queries)) == (111, 111) and e.notes == []
    for query, refs in np.load(folder/'ground_truth_new.npy', allow_pickle=True):
        assert list(e.positives[int(query)]) == sorted(map(int, refs))
    assert folder_protocol(folder, frames=1).within == 1


def test_object_arrays_are_never_unpickled(tmp_path):
    class Boom:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    touch(tmp_path/'walk'/'ref', ['0.jpg', '1.jpg']); touch(tmp_path/'walk'/'query', ['0.jpg', '1.jpg'])
    with open(tmp_path/'walk'/'ground_truth_new.npy', 'wb') as f: pickle.dump(Boom(), f)
    load_benchmark(folder_protocol(tmp_path/'walk'), tmp_path/'walk')
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('radius', [10., 25., 50.])
def test_daejeon_positives_equal_geodesic(shared, radius):
    folder = shared/'data'/'daejeon520'
    if not folder.exists(): pytest.skip('no daejeon520 data')
    sides = []
    for name in ('database', 'query'):
        df = pd.read_csv(folder/f'{name}.csv', header=None, names=['id', 'lat', 'lon'], skipinitialspace=True).dropna()
        e, n, zone = to_utm(df.lat.to_numpy(), df.lon.to_numpy(), zone='52N')
        sides.append((df, make_table(image=[f'/{i}.jpg' for i in df.id], city='daejeon', place=np.arange(len(df)), easting=e, northing=n, zone=zone)))
    (db, d), (qu, q) = sides
    got, geod = positives_within(q, d, radius), Geod(ellps='WGS84')
    for i in range(0, len(q), 7):
        near = np.flatnonzero(np.hypot(d.easting - q.easting[i], d.northing - q.northing[i]) < radius + 5)
        real = geod.inv(np.full(len(near), qu.lon.iloc[i]), np.full(len(near), qu.lat.iloc[i]), db.lon.to_numpy()[near], db.lat.to_numpy()[near])[2]
        for j, metres in zip(near, real):
            if abs(metres - radius) > .05: assert (j in got[i]) == (metres <= radius), (i, j, metres)


@pytest.mark.parametrize('spoil, says', [
    (lambda t: None, 'was not found'),
    (lambda t: touch(t/'pitts30k'/'images'/'test'/'database', grid(2)), 'images/test/queries'),
    (lambda t: (touch(t/'pitts30k'/'images'/'test'/'database', grid(2)), os.makedirs(t/'pitts30k'/'images'/'test'/'queries')), 'holds no images'),
    (lambda t: (touch(t/'pitts30k'/'images'/'test'/'database', ['a.jpg']), touch(t/'pitts30k'/'images'/'test'/'queries', grid(2))), 'a.jpg'),
    (lambda t: (touch(t/'pitts30k'/'images'/'test'/'database', ['@x@y@.jpg']), touch(t/'pitts30k'/'images'/'test'/'queries', grid(2))), '@x@y@'),
    (lambda t: (os.makedirs(t/'pitts30k'), (t/'pitts30k'/'pitts30k_test.mat').write_bytes(b'junk')), 'not a MATLAB file'),
    (lambda t: (os.makedirs(t/'pitts30k'), savemat(t/'pitts30k'/'pitts30k_test.mat', {'other': 1})), 'dbImage'),
    (lambda t: (os.makedirs(t/'pitts30k'), savemat(t/'pitts30k'/'pitts30k_test.mat', {'dbStruct': dict(dbImage=np.array(['a'], dtype=object), utmDb=np.zeros((2, 3)), qImage=np.array(['q'], dtype=object), utmQ=np.zeros((2, 1)))})), 'coordinates'),
], ids=['empty root', 'no queries', 'empty queries', 'no coordinates', 'bad coordinates', 'junk mat', 'mat without struct', 'mat of wrong length'])
def test_bad_trees_are_one_sentence(spoil, says, tmp_path):
    spoil(tmp_path)
    with pytest.raises(UserError) as e: load_benchmark('pitts30k', tmp_path)
    assert says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('spelling, name', [('Tokyo 24/7', 'tokyo247'), ('tokyo_24_7', 'tokyo247'), ('Pitts30k', 'pitts30k'), ('Pitts250k-test', 'pitts250k'), ('MSLS', 'msls_val'), ('Msls_740', 'msls_val'), ('Nordland**', 'nordland'),
    ('nordland *', 'nordland_subset'), ('SVOX-night', 'svox_night'), ('SF_XL_v1', 'sf_xl_v1'), ('st lucia', 'st_lucia'), ('GardensPoint day_left/night_right', 'gardenspoint_day_left_night_right')])
def test_usual_spellings(spelling, name): assert get_protocol(spelling).name == name


def test_every_title_is_a_name():
    assert [get_protocol(p.title) for p in PROTOCOLS.values()] == list(PROTOCOLS.values())


def test_unknown_names():
    with pytest.raises(UserError, match='begin so are: sf_xl_v1, sf_xl_v2, sf_xl_night, sf_xl_occlusion'): get_protocol('SF-XL')
    with pytest.raises(UserError, match='begin so are: gardenspoint_day_left_day_right'): get_protocol('GardensPoint')
    with pytest.raises(UserError, match='known are: pitts30k'): get_protocol('')
    with pytest.raises(UserError, match='no benchmark is called'): get_protocol('imagenet')
    with pytest.raises(MissingPath): load_benchmark('sped', '/nowhere/at/all')
    with pytest.raises(MissingPath): folder_protocol('/nowhere/at/all')

def utm_set(root, database, queries):
    from PIL import Image
    for part, names in (('database', database), ('queries', queries)):
        (root/'images'/'test'/part).mkdir(parents=True)
        for n in names: Image.new('RGB', (8, 8)).save(root/'images'/'test'/part/n)
    return load_benchmark(folder_protocol(root), root)

def test_a_zone_that_only_some_names_say(tmp_path):
    "Names without a zone lie in the set's only one; where there are several, nobody can tell."
    e = utm_set(tmp_path/'a', ['@500000@5000000@17@S@.png', '@500100@5000000@17@S@.png'], ['@500001@5000000@.png', '@500101@5000000@17@S@.png'])
    assert [p.tolist() for p in e.positives] == [[0], [1]] and '1 of 4 names say no UTM zone; read as 17N' in ' '.join(e.notes)
    with pytest.raises(UserError, match='1 of 3 names say no UTM zone while others say 17N and 18N'): utm_set(tmp_path/'b', ['@500000@5000000@17@S@.png', '@500000@5000000@18@S@.png'], ['@500001@5000000@.png'])
    with pytest.raises(UserError, match='none of its 1 queries has a database image within 25 m'): utm_set(tmp_path/'c', ['@500000@5000000@17@S@.png'], ['@500900@5000000@17@S@.png'])

@pytest.mark.parametrize('name', ['@1e308@-1e308@.png', '@-1e308@1@.png', '@1e9@1@33@U@.png'])
def test_coordinates_beyond_the_earth(tmp_path, name):
    with pytest.raises(UserError, match='no easting and northing'): utm_set(tmp_path, ['@500000@5000000@.png'], [name])

def test_all_frames_on_both_sides():
    "A whole copy of Nordland: query i shows frame i, not frame 10·i."
    names = [str(i) for i in range(50)]
    frames, asked = frame_numbers(names, names, 10)
    assert asked.tolist() == frames.tolist() == [*range(50)]
    assert frame_numbers(names, names[:5], 10)[1].tolist() == [0, 10, 20, 30, 40]

def test_json_too_deep_to_read(tmp_path):
    (tmp_path/'positives.json').write_text('['*100_000)
    with pytest.raises(UserError, match='is not json'): read_positives(tmp_path/'positives.json', ['a'], ['b'])


def test_positives_of_equal_names(tmp_path):
    "Image folders that count anew in each folder: a path decides, a name alone is refused."
    for f in ('database/a', 'database/b', 'queries/x', 'queries/y'):
        (tmp_path/'s'/f).mkdir(parents=True)
        for i in range(2): Image.new('RGB', (8, 8), (i, 9, 9)).save(tmp_path/'s'/f/f'{i}.jpg')
    write = lambda *rows: (tmp_path/'s'/'positives.csv').write_text('query,reference\n' + ''.join(f'{q},{r}\n' for q, r in rows))
    write(('x/0.jpg', 'b/0.jpg'), ('y/1.jpg', 'a/1.jpg'), ('y/1.jpg', 'b/1.jpg'))
    e = load_benchmark(folder_protocol(tmp_path/'s'), tmp_path/'s')
    assert [list(p) for p in e.positives] == [[2], [], [], [1, 3]]
    write(('x/0.jpg', '0.jpg'))
    with pytest.raises(UserError, match=r"names '0.jpg', which 2 images are called; write the path below their folder, as a/0.jpg"): load_benchmark(folder_protocol(tmp_path/'s'), tmp_path/'s')


def test_two_sets_of_one_name(tmp_path):
    from sage.sources import evaluation_sets, validation_tables
    for f in ('a', 'b'): utm_set(tmp_path/f/'town', ['@500000@5000000@17@S@.png', '@500100@5000000@17@S@.png'], ['@500001@5000000@17@S@.png'])
    for read in (lambda paths: validation_tables(paths, progress=False), lambda paths: evaluation_sets(paths, progress=False)):
        with pytest.raises(UserError, match="another set is called 'town', too"): read([str(tmp_path/'a'/'town'), str(tmp_path/'b'/'town')])

def test_a_struct_of_zeros_does_not_fill_the_memory(tmp_path, monkeypatch):
    "160 MB in 160 kB; the limit is lowered, for a test may not take a gigabyte."
    monkeypatch.setattr('sage.core.MOST', 2**26)
    path = tmp_path/'pitts30k_test.mat'
    struct = lambda n: dict(dbStruct=dict(dbImage=np.array(['a.jpg'], dtype=object), utmDb=np.zeros((2, n)), qImage=np.array(['q.jpg'], dtype=object), utmQ=np.zeros((2, 1))))
    savemat(path, struct(10_000_000), do_compression=True)
    with pytest.raises(UserError, match=f'{path}: 15.,... bytes that would fill more than 0.1 GiB of memory; copy the file again'): read_mat(path, tmp_path)
    savemat(path, struct(1), do_compression=True)
    assert len(read_mat(path, tmp_path)[0]) == 1

@pytest.mark.parametrize('name', ['positives.json', 'positives.csv', 'pitts30k_test.mat'])
def test_a_pipe_in_the_place_of_a_file(tmp_path, name):
    os.mkfifo(tmp_path/name)
    with pytest.raises(UserError, match=f'{name}: a pipe or a device is in the place|{name} is not a file'): read_mat(tmp_path/name, tmp_path) if name.endswith('.mat') else read_positives(tmp_path/name, ['a.jpg'], ['q.jpg'])
