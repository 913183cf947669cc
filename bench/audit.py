"""How much of a recall is the order of the lists? Models with InteractHead are trained on the world, one for each training seed; then queries and database are laid out as in SPED,
AmsterTime or Nordland, where query i and database i show one place, and recall is measured as published (sorted, in batches), with both sides shuffled, by batch size, and with the head off.

    python bench/audit.py [--seeds 1] [--epochs 1] [--data FOLDER] [--figure FILE]

FOLDER is a real evaluation set beside the world's two (default: `corridor` in $SAGE_SHARED/data or ../shared/data, where that is there). Some minutes for each training seed.
"""
import json, os, tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t as student

from sage.benchmark import audit_descriptors, describe_table
from sage.core import atomic
from sage.retrieval import positives_within
from sage.settings import Settings, make_model
from sage.sources import WORLD, evaluation_sets, world
from sage.train import fit
from sage.viz.style import COLORS

from common import arguments, keep

BATCH, SIZES, SHUFFLES, SIDE, RESULTS = 8, (1, 2, 8, 26), 5, 112, Path(__file__).parent/'results'/'audit.json'
CORRIDOR = Path(os.environ.get('SAGE_SHARED', Path(__file__).parents[2]/'shared'))/'data'/'corridor'


def aligned(df):
    "Queries along their drives, each with a database image of its place at the same row; every other database image is left out."
    d, q = (df[df.role == role].reset_index(drop=True) for role in ('database', 'query'))
    taken, rows = set(), []
    for i, positives in enumerate(positives_within(q, d, 25.)):
        near = [j for j in positives if j not in taken and abs((d.heading[j] - q.heading[i] + 180) % 360 - 180) < 45]
        if near:
            j = min(near, key=lambda j: np.hypot(d.easting[j] - q.easting[i], d.northing[j] - q.northing[i]))
            taken.add(j); rows.append((i, j))
    i, j = map(list, zip(*rows))
    q, d = q.iloc[i].reset_index(drop=True), d.iloc[j].reset_index(drop=True)
    return d, q, positives_within(q, d, 25.)


def sets(data):
    "Name → (database, queries, positives): query i and database i show one place."
    found = {name: aligned(df) for name, df in world()['val'].items()}
    return found | {p.title: e[:3] for p, e in evaluation_sets([str(data)], progress=False)} if data.is_dir() else found


def trained(seed, epochs, towns):
    "A model with InteractHead, trained on the world."
    settings = Settings(**WORLD | dict(interact=True, epochs=epochs, seed=seed, lr=3e-4, record_graph=False))
    model = make_model(settings)
    with tempfile.TemporaryDirectory() as folder: fit(settings, model, towns['train'], towns['val'], Path(folder)/'run', progress=False)
    return model


def measure(model, seed, asked):
    "One row for each set and setting."
    rows = []
    for name, (d, q, positives) in asked.items():
        own = [describe_table(model, t, SIDE, 64) for t in (d, q)]
        rows.append(audit_descriptors(model, *own, positives, BATCH, SIZES, SHUFFLES, ks=(1, 5)).assign(set=name, images=len(d), training_seed=seed))
    return pd.concat(rows).round(2).to_dict('records')


def interval(x):
    "Mean and half the width of its 95 % interval (Student)."
    return f'{x.mean():.1f} ± {student.ppf(.975, len(x) - 1) * x.std(ddof=1) / len(x) ** .5:.1f}' if len(x) > 1 else f'{x.mean():.1f}'


def table(rows):
    "R@1 of each set by batch size: sorted, shuffled, what the shared position gives; mean over training seeds, each shuffle's mean first."
    r = pd.DataFrame(rows); out = []
    for name, one in r.groupby('set', sort=False):
        by = one.groupby(['setting', 'training_seed'])['R@1'].mean()
        for b in SIZES:
            s, m = by[f'sorted, batches of {b}'], by.get(f'shuffled, batches of {b}')
            out.append(dict(set=f'{name} ({one.images.iloc[0]} + {one.images.iloc[0]} images)', batch=b, off=interval(by['head off']), sorted=interval(s)) | (dict(shuffled=interval(m), gain=interval(s - m), left=interval(m - by['head off'])) if b > 1 else dict(left=interval(s - by['head off']))))
    return pd.DataFrame(out).fillna('')


def figure(rows):
    "R@1 above that with the head off, of every training and shuffle."
    r = pd.DataFrame(rows); names = list(dict.fromkeys(r.set))
    r['above'] = r['R@1'] - r.merge(r[r.setting == 'head off'], on=['set', 'training_seed'])['R@1_y'].to_numpy()
    r = r[r.setting.str.contains('batches')]; settings = list(dict.fromkeys(r.setting))
    fig, looks = Figure(figsize=(3.2 * len(names) + 1, 3.2), dpi=110, layout='constrained'), dict(sorted=(COLORS['vermillion'], 'D'), shuffled=(COLORS['blue'], 'o'))
    for ax, name in zip(fig.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        for order, (color, mark) in looks.items():
            one = r[(r.set == name) & (r.order == order)]
            ax.scatter(one.above, [settings.index(s) + .12 * (seed - 2) for s, seed in zip(one.setting, one.training_seed)], c=color, marker=mark, s=12, alpha=.8, label=order)
        ax.axvline(0, color='#555555', lw=.8, ls=':'); ax.set_yticks(range(len(settings)), settings, fontsize=8); ax.grid(alpha=.3); ax.set_title(name, fontsize=9); ax.set_xlabel('points of R@1 above head off', fontsize=8)
    ax.invert_yaxis()
    fig.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return fig


def main():
    parser = arguments(__doc__)
    parser.add_argument('--seeds', type=int, default=1, help='trainings; 5 show the spread')
    parser.add_argument('--epochs', type=int, default=1, help='of each training; 3 in docs/performance.md')
    parser.add_argument('--data', type=Path, default=CORRIDOR, help='a real set whose query i and database i show one place')
    parser.add_argument('--figure', type=Path, help='PNG to write')
    parser.add_argument('--go-on', action='store_true', help='keep the seeds that --out holds already')
    args = parser.parse_args()
    out, towns, asked = args.out or RESULTS, world(), sets(args.data)
    rows = json.loads(out.read_text())['rows'] if args.go_on and out.exists() else []
    for seed in range(args.seed, args.seed + args.seeds):
        if seed in {r['training_seed'] for r in rows}: continue
        rows += measure(trained(seed, args.epochs, towns), seed, asked)
        keep('audit', args, rows, ('numpy', 'torch', 'faiss-cpu'))
    print(table(rows).to_string(index=False))
    if args.figure:
        with atomic(args.figure) as part: figure(rows).savefig(part)


if __name__ == '__main__': main()
