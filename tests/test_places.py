"""The table of places: bad input in one sentence, places against independent readings."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components

from sage.core import UserError
from sage.places import COLUMNS, big_places, check_table, fill_table, make_places, make_table, place_centers, place_rows


def table(n=3, **more): return make_table(**{**dict(image=[f'/{i}.jpg' for i in range(n)], easting=np.arange(n) * 1., northing=0.), **more})


@pytest.mark.parametrize('make, says', [
    (lambda: table(easting=[0., np.nan, 2.]), 'row 1 (/1.jpg) has easting nan'),
    (lambda: table(northing=[0., 1., -np.inf]), 'row 2 (/2.jpg) has northing -inf'),
    (lambda: make_table(image=['a']), 'easting nan'),
    (lambda: make_table(image=[], easting=[], northing=[]), 'no images'),
    (lambda: table(place=[1, None, 2]), "'place' row 1 is 'None'"),
    (lambda: table(place=['1', 'x', '2']), "'place' row 1 is 'x'"),
    (lambda: table(place=[1, np.inf, 2]), "'place' row 1 is 'inf'"),
    (lambda: table(heading=[1., 2.]), "'heading' has 2 values where 3"),
    (lambda: table(role='queries'), "role 'queries'"),
    (lambda: table(split=['train', 'val', 'dev']), "row 2 has split 'dev'"),
    (lambda: table(name='x'), "no column 'name'"),
    (lambda: check_table(table().drop(columns='northing'), 'city.csv'), "city.csv: the table of places has no column 'northing'"),
    (lambda: check_table(pd.DataFrame()), "no column 'image'"),
    (lambda: big_places(table(place=[0, 1, 2]), 2), 'only one-image places'),
    (lambda: big_places(table(place=[0, 0, 2]), 3), 'has 2 images'),
    (lambda: make_places([0., np.nan], [0., 0.]), 'row 1'),
    (lambda: make_places([0.], [0.], 'square'), "'square'"),
    (lambda: make_places([0.], [0.], 'grid', -1), 'above 0'),
    (lambda: make_places([0.], [0.], 'dbscan', np.nan), 'above 0'),
])
def test_bad_input_is_one_sentence(make, says):
    with pytest.raises(UserError) as e: make()
    assert says in str(e.value) and '\n' not in str(e.value)


def test_columns_types_and_order_whatever_is_given():
    want = fill_table(image='a').dtypes
    df = table(time=None, place=np.array([1, 2, 3], dtype=np.uint8), condition=pd.Series(['night', None, np.nan], index=[9, 8, 7]), zone='33N')
    assert list(df) == list(COLUMNS) and (df.dtypes == want).all() and df.index.equals(pd.RangeIndex(3))
    assert df.condition.tolist() == ['night', '', ''] and df.time.tolist() == [''] * 3 and df.place.dtype == np.int64
    assert (table(place=['4', '5', '6']).place == [4, 5, 6]).all()


def test_the_table_survives_parquet(tmp_path):
    df = table(condition='night', heading=[0., np.nan, 359.]); df.attrs['left_out'] = [('/x.jpg', 'no GPS')]
    df.to_parquet(tmp_path/'t.parquet')
    pd.testing.assert_frame_equal(check_table(pd.read_parquet(tmp_path/'t.parquet')), df)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['a', 'B', 'ab', 'é', '']), st.integers(-3, 3)), min_size=1, max_size=40))
def test_place_rows_equal_a_plain_reading(labels):
    cities, numbers = zip(*labels)
    df = table(len(labels), city=list(cities), place=list(numbers), easting=np.arange(len(labels)) ** 2.)
    places, codes = place_rows(df)
    want = sorted(set(labels))
    assert list(places.itertuples(index=False, name=None)) == want
    assert [want[c] for c in codes] == labels
    np.testing.assert_allclose(place_centers(df)[:, 0], [np.mean([i * i for i, x in enumerate(labels) if x == w]) for w in want])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(5, 60), st.integers(0, 2**32 - 1))
def test_dbscan_equals_connected_components(n, size, seed):
    xy = np.random.default_rng(seed).uniform(-300, 300, (n, 2))
    count, want = connected_components(np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) <= size)
    got = make_places(*xy.T, 'dbscan', size)
    assert (got.max() + 1 == count) and ((got[:, None] == got[None]) == (want[:, None] == want[None])).all()


def test_grid_cells_do_not_move_and_stay_small():
    xy = np.random.default_rng(3).uniform(-1e6, 1e6, (500, 2)) // 1
    xy[::2] = xy[1::2] + np.random.default_rng(4).uniform(-20, 20, (250, 2))
    got = make_places(*xy.T)
    assert set(got) == set(range(got.max() + 1))
    for i in range(got.max() + 1): assert (np.ptp(xy[got == i], axis=0) < 25).all()
    some = np.random.default_rng(5).permutation(500)[:200]
    again = make_places(*xy[some].T)
    assert ((again[:, None] == again[None]) == (got[some][:, None] == got[some][None])).all()


def test_half_a_million_rows_are_quick():
    import time
    n = 500_000; rng = np.random.default_rng(0)
    start = time.process_time()
    df = make_table(image=[f'/photos/{i:09d}.jpg' for i in range(n)], city=np.array(['oslo', 'bern'])[rng.integers(0, 2, n)].tolist(), place=rng.integers(0, 60_000, n),
                    easting=rng.uniform(0, 1e4, n), northing=rng.uniform(0, 1e4, n))
    codes = place_rows(big_places(df, 4))[1]
    make_places(df.easting, df.northing)
    assert len(codes) and time.process_time() - start < 20


@pytest.mark.parametrize('column, value, says', [('city', None, "row 1 has city 'None'; expected text"), ('image', None, "row 1 has image 'None'"), ('place', np.nan, "row 1 has place 'nan'; expected a whole number"), ('place', 1.5, "row 1 has place '1.5'"), ('place', 'x', "row 1 has place 'x'"), ('place', np.inf, "row 1 has place 'inf'")])
def test_a_row_of_no_place_is_refused(column, value, says):
    "Compiled code counts by these, and would write where nothing is."
    from sage.graph import GeoSide
    df = table()
    df[column] = df[column].astype(object); df.loc[1, column] = value
    for given in (df, df.infer_objects()):
        with pytest.raises(UserError) as e: GeoSide(given)
        assert says.replace("'None'", "'nan'") in str(e.value).replace("'None'", "'nan'"), str(e.value)

def test_whole_places_of_another_type_are_taken():
    df = table()
    for kind in ('float64', 'Int64', 'int32', 'uint8'): assert check_table(df.assign(place=df.place.astype(kind))) is not None
