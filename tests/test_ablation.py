"""The ablation harness: statistics against scipy, equal shares for all cells, a stopped one goes on, two experiments are never mixed."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from sage import ablation
from sage.ablation import CONTRASTS, METHODS, ablate, as_markdown, cells, finished, interval, paired, table5
from sage.core import UserError
from sage.places import make_table
from sage.settings import Settings

TINY = Settings(backbone='sage_nano', image_size=56, eval_size=56, places_per_batch=2, images_per_place=2, min_size=2, steps=1, epochs=1, embed_batch=16, augment='none', probes=4, probe_dim=8, token_dim=8)
PLAN = dict(poolings=('CFP', 'SoftP'), methods=('random', 'sage'), seeds=2, pretrained=False, progress=False)


@pytest.fixture(scope='module')
def towns(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp('towns'), []
    for city in 'ab':
        rng, rows = np.random.default_rng(ord(city)), []
        for p in range(5):
            pattern = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
            for v in range(3):
                path = folder/f'{city}{p}{v}.png'
                Image.fromarray(np.roll(np.kron(pattern, np.ones((14, 14, 1), np.uint8)), int(rng.integers(-5, 6)), 0)).save(path)
                rows.append((str(path), p, 60. * p, float(v), 'query' if v == 0 else 'database'))
        image, place, easting, northing, role = zip(*rows)
        out.append(make_table(image=image, city=city, place=place, easting=easting, northing=northing, role=role))
    return out[0], {'other': out[1]}


def toy(rng, seeds=6):
    luck = rng.normal(0, 3, seeds)
    return pd.DataFrame([dict(pooling=p, method=m, seed=s, r=60 + luck[s] + rng.normal()) for p in ('CFP', 'SoftP') for m in METHODS for s in range(seeds)])


def test_intervals_against_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 12):
        v = rng.normal(size=n)
        low, high = stats.t.interval(.95, n - 1, loc=v.mean(), scale=stats.sem(v))
        mean, half = interval(v)
        assert (mean - half, mean + half) == pytest.approx((low, high))


def test_paired_against_scipy():
    rows = toy(np.random.default_rng(1))
    rows = rows[~((rows.pooling == 'SoftP') & (rows.method == 'static') & (rows.seed == 2))].sample(frac=1, random_state=0)     # one cell unfinished, any order
    got = paired(rows, 'r').set_index(['first', 'second'])
    assert len(got) == len(CONTRASTS)
    for (a, b) in CONTRASTS:
        x, y = (rows[(rows.pooling == p) & (rows.method == m)].set_index('seed').r for p, m in (a, b))
        both = sorted(set(x.index) & set(y.index))
        test = stats.ttest_rel(x[both], y[both]).confidence_interval(.95)
        r = got.loc[(' + '.join(a), ' + '.join(b))]
        assert (r.low, r.high) == pytest.approx((test.low, test.high)) and r.seeds == len(both)
    assert table5(rows, 'r').seeds.sum() == len(rows)


def test_cells_cover_the_table():
    plan = cells(5)
    assert len(plan) == len(set(plan)) == 60 and [s for s, *_ in plan] == sorted(s for s, *_ in plan)


def test_equal_shares_and_same_start(towns, tmp_path):
    rows = ablate(TINY, *towns, tmp_path/'a', **PLAN)
    assert len(rows) == 8 and set(zip(rows.steps, rows.images)) == {(1, 4)}
    starts = {(r.seed, r.pooling): set() for r in rows.itertuples()}
    for r in rows.to_dict('records'): starts[r['seed'], r['pooling']].add(r['other/recall@1 by epoch'][0])
    assert all(len(s) == 1 for s in starts.values())                               # cells of one seed and pooling begin equal
    text = (tmp_path/'a'/'table.md').read_text()
    assert 'Every cell: 1 steps, 4 images.' in text and '| SoftP + sage − SoftP + random | 2 |' in text
    assert len(pd.read_csv(tmp_path/'a'/'results.csv')) == 8


def test_a_stopped_ablation_goes_on(towns, tmp_path, monkeypatch):
    whole = ablate(TINY, *towns, tmp_path/'whole', **PLAN)
    real, calls = ablation.fit, []
    def fails_later(settings, *args, **kwargs):
        calls.append((settings.strategy, settings.alpha, settings.seed))
        if len(calls) == 4: raise KeyboardInterrupt
        return real(settings, *args, **kwargs)
    monkeypatch.setattr(ablation, 'fit', fails_later)
    with pytest.raises(KeyboardInterrupt): ablate(TINY, *towns, tmp_path/'a', **PLAN)
    assert len(finished(tmp_path/'a')) == 3
    parts = ablate(TINY, *towns, tmp_path/'a', **PLAN)
    assert len(calls) == 9 and len(set(calls)) == 8                                # the stopped one twice, nothing else
    timeless = lambda d: d.drop(columns='train_s')
    pd.testing.assert_frame_equal(timeless(parts), timeless(whole))
    assert not [p for p in (tmp_path/'a').rglob('*') if p.name.startswith('.')]


def test_experiments_are_not_mixed(towns, tmp_path):
    one = dict(PLAN, seeds=1, poolings=('SoftP',), methods=('random',))
    ablate(TINY, *towns, tmp_path/'a', **one)
    with pytest.raises(UserError, match='lr = 6e-05, now 0.1'): ablate(replace(TINY, lr=.1), *towns, tmp_path/'a', **one)
    with pytest.raises(UserError, match='data'): ablate(TINY, towns[0].iloc[:12].reset_index(drop=True), towns[1], tmp_path/'a', **one)
    assert len(ablate(TINY, *towns, tmp_path/'a', **dict(one, seeds=2))) == 2          # more seeds are welcome


def test_nothing_left_of_a_refused_one(towns, tmp_path):
    for bad in (dict(image_size=57), dict(places_per_batch=50)):
        with pytest.raises(UserError): ablate(replace(TINY, **bad), *towns, tmp_path/'a', **dict(PLAN, methods=('sage',)))
        assert not (tmp_path/'a').exists()


def test_damaged_cell_says_so(towns, tmp_path):
    one = dict(PLAN, seeds=1, poolings=('SoftP',), methods=('random',))
    ablate(TINY, *towns, tmp_path/'a', **one)
    next((tmp_path/'a'/'cells').iterdir()).write_text('{')
    with pytest.raises(UserError, match='not readable as JSON'): ablate(TINY, *towns, tmp_path/'a', **one)


def test_unfinished_table_prints():
    rows = toy(np.random.default_rng(0), 2).rename(columns={'r': 'town/recall@1'}).assign(steps=1, images=4)
    assert 'Every cell' in as_markdown(rows) and 'differ' in as_markdown(rows.assign(images=np.arange(len(rows))))
