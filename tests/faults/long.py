"""A long training on a small world with the workbench open on it: does anything grow that should not?

    python tests/faults/long.py --minutes 60       # what `make torture` runs
    python tests/faults/long.py --records 1000     # no training: how long a run of so many epochs takes to open

Memory, threads and open files of the training, of the workbench and of the two processes beside it, which lay points out and look at photographs, are read every few seconds, and the files in the run folder and in
the folder for temporary files are counted. Growth is from the mean of the second tenth of the time to the mean of the last tenth. At the end the run, with as many epochs as were trained, is opened anew.
Ends with 1, and a sentence for each, where something grows, or where a run is read too slowly."""
import argparse, json, multiprocessing.util, os, shutil, signal, sys, tempfile, threading, time
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
from victim import Run, child, said, tables, wait
import numpy as np, pandas as pd
from sage.aside import layouts, networks
from sage.workbench import Workbench


def held(pid):
    "Resident memory in MB, threads and open files of a process."
    status = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    return dict(memory=int(status['VmRSS'].split()[0])/1024, threads=int(status['Threads']), files=len(os.listdir(f'/proc/{pid}/fd')))


def own():
    "The same of this process, the workbench's, without the threads that wait for slow results: one each, which is there while there is anything to wait for (`sage.live.Later`)."
    found = held(os.getpid())
    return found | dict(threads=found['threads'] - sum(t.name == 'sage later' for t in threading.enumerate()))


ASIDES = dict(layouts=layouts, networks=networks)

def beside(which):
    "The same of a process beside the workbench, and its number; nothing is known of one that has not begun, or has just ended."
    try: return held(which().process.pid) | dict(number=which().process.pid)
    except (AttributeError, OSError, KeyError): return dict.fromkeys(('memory', 'threads', 'files', 'number'), np.nan)


def sample(start, training, folder):
    "One row: all four processes, and files that look temporary."
    hidden = sum(name.startswith('.') for _, folders, files in os.walk(folder) for name in folders + files)
    held_by = dict(training=held(training), workbench=own()) | {name: beside(which) for name, which in ASIDES.items()}
    return dict(seconds=time.monotonic() - start, **{f'{name} {k}': v for name, found in held_by.items() for k, v in found.items()}, temporary=len(os.listdir(tempfile.gettempdir())), hidden=hidden)


def tenths(rows):
    "The second and the last."
    tenth = max(1, len(rows)//10)
    return slice(tenth, 2*tenth), slice(-tenth, None)


def growth(rows):
    "First, last and growth of every column: from the mean of the second tenth of the rows to that of the last."
    first, last = (rows.iloc[part].mean() for part in tenths(rows))
    return pd.DataFrame(dict(first=first, last=last, percent=100*(last/first - 1))).drop(['seconds', *(f'{name} number' for name in ASIDES)])


PERCENT, SECONDS = 2, 2                   # how much memory may grow; how long the records of a thousand epochs may take to be read

def wrong(rows):
    "What grew, in words, one sentence for each."
    table = growth(rows)
    memory, counts = table[table.index.str.endswith('memory')], table.index[table.index.str.endswith(('threads', 'files')) | (table.index == 'temporary')]
    out = [f'{name} grew by {t.percent:.1f} % (bar {PERCENT} %)' for name, t in memory.iterrows() if t.percent >= PERCENT]
    out += [f'{name.removesuffix(" memory")}: this process was not there to be looked at' for name, t in memory.iterrows() if np.isnan(t.percent)]
    out += [f'{name} grew from {first:g} to {last:g} at least' for name, first, last in ((n, *(rows[n].iloc[part].min() for part in tenths(rows))) for n in counts) if last - first >= 1]       # threads come for a while, and go
    out += [f'{name}: {rows[f"{name} number"].nunique()} processes one after another, where one should last' for name in ASIDES if rows[f'{name} number'].nunique() > 1]
    return out + [f'{table["last"]["hidden"]:.1f} hidden files are in the run folder']*bool(table['last']['hidden'] >= 1)


def slow(epochs, read):
    "A sentence where a run takes too long to be read."
    most = SECONDS*max(1, epochs/1000)
    return [f'{epochs:,} epochs of records are read in {read:.2f} s (bar {most:g} s)']*bool(read >= most)


def opened(folder):
    "Seconds to open a run, its recalls and its workbench, drawn."
    start = time.perf_counter()
    run = Run(folder)
    run.recalls(), run.epochs()
    read = time.perf_counter() - start
    bench = Workbench(run)
    bench.wait(600)
    bench.close()
    return len(run.epochs()), read, time.perf_counter() - start


def recorded(path, epochs):
    "A run of so many epochs, made up: those of a toy run again and again."
    from sage.viz.toy import toy_run
    run = toy_run(path, epochs=3)
    lines = (path/'metrics.jsonl').read_text().splitlines()
    rows = {e: [line for line in lines if json.loads(line)['epoch'] == e] for e in (1, 2, 3)}
    with open(path/'metrics.jsonl', 'a') as f:
        for e in range(4, epochs + 1):
            like = 1 + e % 3
            shutil.copytree(path/'epochs'/f'{like:04d}', path/'epochs'/f'{e:04d}', copy_function=os.link)
            f.writelines(json.dumps(json.loads(line) | dict(epoch=e)) + '\n' for line in rows[like])
    return run.path


def watched(bench, p, minutes, every, folder):
    "A row for each look, one tab after another open."
    start, rows = time.monotonic(), []
    while time.monotonic() < start + 60*minutes:
        time.sleep(every)
        if p.exitcode is not None: raise SystemExit(f'the training ended with {p.exitcode}: {said(folder).read_text()}')
        bench.tabs.selected_index = len(rows) % len(bench.pages)
        if len(rows) == 0: bench.painter.do(lambda: bench.state.set(node=0))                           # from now on networks look at it in every epoch
        rows.append(sample(start, p.pid, folder))
        if len(rows) % 60 == 0: print({k: round(v, 1) for k, v in rows[-1].items()}, len(Run(folder).epochs()), 'epochs', flush=True)
    bench.close()
    return rows


def main(minutes, every, folder):
    streets = tables()
    p = child(folder, streets, epochs=10**6)
    while not (folder/'config.json').exists() and p.exitcode is None: time.sleep(.1)
    try: rows = watched(Workbench(Run(folder)), p, minutes, every, folder)
    except BaseException: p.kill(); raise                                                              # nobody else would end it
    os.kill(p.pid, signal.SIGTERM)
    code = wait(p)
    return pd.DataFrame(rows), code


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--every', type=float, default=5, help='seconds between two looks')
    parser.add_argument('--records', type=int, help='only open a made-up run of so many epochs')
    parser.add_argument('--folder', type=Path, help='where to train; kept; default: a temporary one')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = (args.folder or Path(place))/'runs'/'long'
        folder.parent.mkdir(parents=True, exist_ok=True)
        multiprocessing.util.get_temp_dir()                                                 # in the ordinary place: Python removes it last of all
        os.environ['TMPDIR'] = tempfile.tempdir = str(Path(place)/'temporary')                # of both processes, and of nobody else
        os.mkdir(tempfile.tempdir)
        if args.records:
            epochs, read, drawn = opened(recorded(folder, args.records))
            print(f'{epochs:,} epochs of records ({(folder/"metrics.jsonl").stat().st_size:,} bytes of metrics) are read in {read:.2f} s; their workbench is drawn after {drawn:.2f} s (bar for 1,000: read in {SECONDS} s)')
            sys.exit('\n'.join(slow(epochs, read)) or 0)
        rows, code = main(args.minutes, args.every, folder)
        print(growth(rows).round(1).to_string())
        epochs, read, drawn = opened(folder)
        print(f'{epochs:,} epochs of records are read in {read:.2f} s; their workbench is drawn after {drawn:.2f} s')
        grown, late = wrong(rows), slow(epochs, read)
        print(f'long run: {"GROWS" if grown else "flat"}; ended by SIGTERM with {code}')
    sys.exit('\n'.join(grown + late) or 0)
