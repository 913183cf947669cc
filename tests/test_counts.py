"""The evaluation table, row by row: trees of the exact shape of each benchmark give exactly its numbers. MSLS-val's 740 and the frame sets' positives are in test_protocols."""
import os
import numpy as np
import pytest
from scipy.io import savemat

from sage.protocols import PROTOCOLS, get_protocol, load_benchmark

# benchmark: (database, queries, positive); None: as found
TABLE = {
    'pitts30k': (10_000, 6_816, 'within 25 m'), 'pitts30k_val': (10_000, 7_608, 'within 25 m'), 'pitts250k': (None, 8_280, 'within 25 m'), 'msls_val': (18_871, 740, 'within 25 m'),
    'nordland_subset': (27_592, 2_760, 'within ±1 frame'), 'nordland': (27_592, 27_592, 'within ±10 frames'), 'nordland_test': (3_450, 3_450, 'within ±2 frames'),
    'sped': (607, 607, 'same pair'), 'amstertime': (1_231, 1_231, 'same pair'), 'tokyo247': (75_984, 315, 'within 25 m'), 'eynsham': (23_935, 23_935, 'within 25 m'),
    'st_lucia': (None, None, 'within 25 m'), **{f'svox{c}': (None, None, 'within 25 m') for c in ('', '_night', '_overcast', '_rain', '_snow', '_sun')},
    **{f'sf_xl_{c}': (None, None, 'within 25 m') for c in ('v1', 'v2', 'night', 'occlusion')},
    **{f'gardenspoint_{p}': (200, 200, 'within ±2 frames') for p in ('day_left_day_right', 'day_left_night_right', 'day_right_night_right')},
}


def test_the_registry_is_the_table():
    assert {n: (PROTOCOLS[n].database, PROTOCOLS[n].queries, PROTOCOLS[n].positive) for n in TABLE} == TABLE
    assert set(PROTOCOLS) - set(TABLE) == {'msls_val_all', 'corridor'}
    assert get_protocol('nordland*').step == 10 and get_protocol('nordland**').step == 1


def touch(folder, names):
    os.makedirs(folder, exist_ok=True)
    for name in names: os.close(os.open(f'{folder}/{name}', os.O_CREAT | os.O_WRONLY))


@pytest.mark.parametrize('name, n, nq', [('pitts30k', 10_000, 6_816), ('pitts30k_val', 10_000, 7_608), ('pitts250k', 83_952, 8_280)])
@pytest.mark.parametrize('where', ['datasets', ''])
def test_pittsburgh_as_dbstruct(name, n, nq, where, tmp_path):
    p = get_protocol(name); side = np.arange(max(n, nq))
    xy = np.stack((585_000 + 60. * (side % 300), 4_477_000 + 60. * (side // 300)))
    struct = dict(whichSet=p.split, dbImage=np.array([f'{i // 1000:03d}/{i:06d}_pitch1_yaw1.jpg' for i in range(n)], dtype=object)[:, None], utmDb=xy[:, :n], utmQ=xy[:, :nq] + 3.,
                  qImage=np.array([f'{i // 1000:03d}/{i:06d}_pitch1_yaw1.jpg' for i in range(nq)], dtype=object)[:, None], numDb=n, numQ=nq, posDistThr=25., posDistSqThr=625., nonTrivPosDistSqThr=100.)
    folder = tmp_path/'Pittsburgh'/where; folder.mkdir(parents=True)
    savemat(folder/f'{p.family}_{p.split}.mat', {'dbStruct': struct})
    d, q, positives, notes = load_benchmark(name, tmp_path)
    assert (len(d), len(q)) == (n, nq) and not any('warning' in note for note in notes)
    assert [x.tolist() for x in positives] == [[i] for i in range(nq)]


@pytest.mark.parametrize('name', [n for n, (d, q, _) in TABLE.items() if d is None and q is None])
def test_sets_whose_counts_are_as_found(name, tmp_path):
    p = get_protocol(name); base = tmp_path/p.folders[0]/'images'/'test'
    at = lambda i, shift=0: f'@{5e5 + 60 * i + shift:.2f}@4000000.00@10@S@@@{i}@@@@@@@@.jpg'
    touch(base/p.parts[0][0], (at(i) for i in range(37))); touch(base/p.parts[0][1], (at(i, 5) for i in range(11)))
    d, q, positives, notes = load_benchmark(name, tmp_path)
    assert (len(d), len(q), notes) == (37, 11, []) and all(len(x) == 1 for x in positives)
