"""How much of a recall is the order of the lists? A model with InteractHead is trained on the world; then queries and database are laid out as in SPED, AmsterTime
or Nordland, where query i and database i show one place, and recall is measured as published (sorted, in batches), with both sides shuffled, by batch size, and with the head off.

    python bench/audit.py [epochs] [seed] [folder]

Writes audit.csv, audit.md and audit.png into the folder (default runs/audit). One thread, some minutes: most of them training.
"""
import json, platform, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sage.benchmark import audit_descriptors, audit_table, describe_table, plot_audit
from sage.core import atomic, stream
from sage.retrieval import positives_within
from sage.settings import Settings, make_model
from sage.sources import WORLD, world
from sage.train import fit

BATCH, SIZES, SHUFFLES, SIDE = 8, (1, 2, 8, 26), 5, 112


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


def mean(measured, setting): return measured[measured.setting == setting]['R@1'].mean()


def effect(measured):
    "In points of R@1: what order gives, and what is left of the head without it."
    rows = [dict(batch=b, sorted=mean(measured, f'sorted, batches of {b}'), shuffled=mean(measured, f'shuffled, batches of {b}')) for b in SIZES if b > 1]
    return pd.DataFrame(rows).assign(shared_position=lambda t: t.sorted - t.shuffled)


def main():
    torch.set_num_threads(1)
    epochs, seed = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 3), (2, 0)))
    out, towns, start = Path(sys.argv[3] if len(sys.argv) > 3 else 'runs/audit'), world(), time.perf_counter()
    settings = Settings(**WORLD | dict(interact=True, epochs=epochs, seed=seed, lr=3e-4, record_graph=False))
    model = make_model(settings)
    with tempfile.TemporaryDirectory() as folder: fit(settings, model, towns['train'], towns['val'], Path(folder)/'run', progress=False)
    print(f'trained {epochs} epochs of {settings.steps} steps with the head, seed {seed}: {time.perf_counter() - start:.0f} s')
    parts, tables = [], []
    for name, df in towns['val'].items():
        d, q, positives = aligned(df)
        own = [describe_table(model, t, SIDE, 64) for t in (d, q)]
        measured = audit_descriptors(model, *own, positives, BATCH, SIZES, SHUFFLES, ks=(1, 5)).assign(set=name, training_seed=seed)
        line = f'{name}: {len(d)} database, {len(q)} queries, query i and database i show one place; batches of {BATCH}, training seed {seed}, shuffles 0 to {SHUFFLES - 1}'
        tables.append(f'{line}\n\n{audit_table(measured).to_string(index=False)}\n\n{effect(measured).round(1).to_string(index=False)}\n')
        print(tables[-1])
        with atomic(out/f'audit {name}.png') as part: plot_audit(measured, f"{name}, training seed {seed}: query i and database i show one place").savefig(part)
        parts.append(measured)
    with atomic(out/'audit.csv') as part: pd.concat(parts).to_csv(part, index=False)
    with atomic(out/'audit.md') as part: part.write_text('\n'.join(f'```\n{t}```\n' for t in tables))
    print(json.dumps(dict(bench='audit', epochs=epochs, seed=seed, seconds=round(time.perf_counter() - start), python=platform.python_version())))


if __name__ == '__main__': main()
