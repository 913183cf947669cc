"The workbench: what the browser is sent, what stays shared between tabs, how trainings are held, and what a user sees who gets something wrong."
import json, shutil, threading, time

import numpy as np
import plotly.graph_objects as go
import pytest

pytest.importorskip('ipywidgets')
from sage.core import UserError
from sage.run import Run
from sage.live import Plot, Training
from sage.viz.toy import toy_run
from sage.workbench import PAGES, State, Workbench, last_row, progress

@pytest.fixture(scope='module')
def run(tmp_path_factory): return toy_run(tmp_path_factory.mktemp('workbench')/'run', epochs=3)

@pytest.fixture
def bench(run):
    b = Workbench(run, dark=False)
    yield b
    b.close()

def opened(bench, number):
    bench.tabs.selected_index = number
    bench.wait(120)
    return bench.pages[number]

def until(what, bench, seconds=90):                     # waiting costs nothing when all is well
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, bench.status.value
        time.sleep(.01)

def drawn(plot): plot.heard(dict(kind='drawn', number=plot.sent))

def test_a_burst_leaves_no_queue():
    p = Plot(patience=float('inf'))
    for i in range(100): p.show(go.Figure(layout_title=str(i)))
    assert p.sent == 1 and p.title == '0'
    drawn(p)
    assert p.sent == 2 and p.title == '99' and p.waiting is None
    drawn(p)
    assert p.sent == 2

def test_a_silent_browser_is_asked_again():
    p = Plot(patience=0)
    p.show(go.Figure(layout_title='a')); p.show(go.Figure(layout_title='b'))
    assert p.title == 'b'

def test_the_script_is_one(): assert len({id(Plot().script) for _ in range(5)}) == 1

def test_only_the_open_tab_is_drawn(bench):
    assert [p.title for p in bench.pages] == [P.title for P in PAGES] == ['Graph', 'Cliques', 'Attention', 'Embedding', 'Retrieval', 'Training']
    bench.wait(120)
    assert bench.pages[0].graph.figure and not any(p.figure for page in bench.pages[1:] for p in page.plots)
    assert opened(bench, 5).curves.figure and not bench.pages[1].map.page

def test_one_selection_for_all(bench, run):
    cliques = run.cliques(3)
    node = int(cliques.node[cliques.batch == 1].iloc[-1])
    opened(bench, 0).graph.heard(dict(kind='click', points=[node]))
    bench.wait(120)
    assert bench.state.node == node and '<img' in bench.pages[0].card.value and 'after 3 epochs' in bench.pages[0].around.title
    page = opened(bench, 1)
    mine = cliques[(cliques.batch == page.batch.value) & (cliques.slot == page.slot.value)]
    assert node in set(mine.node)
    page.slot.value = next(v for _, v in page.slot.options if v != page.slot.value)       # and the other way round
    until(lambda: bench.state.node != node, bench)
    assert bench.state.node in set(cliques.node[(cliques.batch == page.batch.value) & (cliques.slot == page.slot.value)])
    bench.chosen.click()
    until(lambda: bench.state.node is None and 'no place' in bench.chosen.description, bench)

def test_a_lasso_fills_the_gallery_and_the_graph(bench):
    page = opened(bench, 3)
    page.picture.heard(dict(kind='select', points=[1, 2, 5]))
    bench.wait(120)
    assert page.chosen.value.count('<img') == 3 and bench.pages[0].selection() == [1, 2, 5]
    page.picture.heard(dict(kind='select', points=[]))
    bench.wait(120)
    assert bench.state.lasso is None and '<img' not in page.chosen.value

def test_a_lasso_of_images_of_the_map_rings_them(bench, run):
    table = run.table('Otherville')
    database, queries = (np.flatnonzero(table.role == role)[:30].tolist() for role in ('database', 'query'))
    try:
        for chosen, words in ((database, '30 images are chosen and ringed on the map, 0 of them queries: the query above'), (database + queries, '60 images are chosen and ringed on the map, 30 of them queries: answers of the first 4 below, lines from the first 12')):
            bench.state.set(lasso=('Otherville', tuple(chosen)))
            page = opened(bench, 4)
            assert words in page.said.value
            until(lambda: f'{len(chosen)} chosen images ringed' in page.map.title, bench)
    finally: bench.state.set(lasso=None)
    until(lambda: page.said.value == '' and 'ringed' not in page.map.title, bench)

def test_a_query_with_few_answers(tmp_path):
    "A set whose database has three images."
    from sage.image_tabs import Chosen
    run = toy_run(tmp_path/'run', epochs=0)
    a = run.answers(0)['Otherville']
    few = Run.create(tmp_path/'few', {}, {n: run.table(n) for n in ('mined', 'Otherville')})
    few.write_epoch(0, run.nodes(0), run.edges(0), run.cliques(0), run.descriptors(0), answers={'Otherville': a._replace(rows=a.rows[:, :3], distances=a.distances[:, :3], right=a.right[:, :3])})
    assert len(Chosen(few, 0, 'Otherville', int(a.queries[0])).others()) == 3

def test_the_map_offers_other_batches(bench, run):
    page = opened(bench, 1)
    try:
        for what, names in (('batches of the epoch', [f'epoch 3 \\u00b7 batch {b}' for b in run.cliques(3).batch.unique()]), ('epoch by epoch', [f'epoch {e} \\u00b7 batch {page.batch.value}' for e in range(4)])):
            page.layers.value = what
            until(lambda: all(n in page.map.page for n in names), bench)
    finally: page.layers.value = 'this batch'
    until(lambda: 'epoch 2' not in page.map.page, bench)

def test_a_query_is_chosen_everywhere(bench, run):
    page, a = opened(bench, 4), run.answers(3)['Otherville']
    page.map.heard(dict(kind='click', points=[int(a.queries[7])]))
    bench.wait(120)
    assert page.query.value == 7 and bench.state.image == ('Otherville', int(a.queries[7]))
    page.query.value = 3
    bench.wait(120)
    assert bench.state.image == ('Otherville', int(a.queries[3]))
    embedding = bench.pages[3]
    embedding.of.value = 'Otherville'
    assert embedding.rows() == [int(a.queries[3])]
    page.wrong.value = True
    bench.wait(120)
    assert all('right' not in label for label, _ in page.query.options)

@pytest.fixture(scope='module')
def weighty(run, tmp_path_factory):
    "The run with weights of its first and last epoch, and a record of two images."
    import numpy as np
    from sage.look import look
    from sage.model import create_sage, save_sage
    from sage.run import checkpoint_paths
    path = tmp_path_factory.mktemp('weighty')/'run'
    shutil.copytree(run.path, path)
    it, model = Run(path), create_sage('sage_nano', probes=8, probe_dim=12, token_dim=16)
    (path/'checkpoints').mkdir(exist_ok=True)
    for e in (0, 3):
        save_sage(model, checkpoint_paths(it, e)[0], config=dict(settings=dict(eval_size=112)))
        rows = [int(it.answers(3)['Otherville'].queries[0]), 5]
        np.savez(path/'epochs'/f'{e:04d}'/'attention.npz', **look(it, it.table('Otherville').image.iloc[rows].tolist(), e), rows=np.array(rows))
    return it

def test_a_choice_made_while_a_picture_is_drawn_is_kept(weighty):
    bench = Workbench(weighty, dark=False)
    try:
        page, plain = opened(bench, 2), bench.pages[2].recorded
        def meanwhile(mine):
            page.recorded = plain
            bench.state.set(node=5)
            return plain(mine)
        page.recorded, page.stale = meanwhile, True
        until(lambda: page.image.value == 'node', bench)
    finally: bench.close()

def test_attention_looks_at_what_is_chosen(weighty, tmp_path):
    mine = Run(shutil.copytree(weighty.path, tmp_path/'run'))                           # it loses a checkpoint here
    bench = Workbench(mine, dark=False)
    try:
        page, a = opened(bench, 2), mine.answers(3)['Otherville']
        assert page.image.value == 0 and 'pair 0 query' in page.now.figure and [v for _, v in page.beside.options] == [1]
        bench.state.set(image=('Otherville', int(a.queries[7])))                       # a query that no record holds
        for p in page.plots: p.patience = 0                                             # no browser answers here
        until(lambda: page.image.value == 'image' and 'these two alike' in page.match.title, bench, 180)
        words, rows = zip(*page.beside.options)
        assert rows[:5] == tuple(a.rows[7, :5]) and all(('✓' in w) == r for w, r in zip(words, a.right[7]))
        page.beside.value = rows[1]
        until(lambda: f'place {mine.table("Otherville").place[rows[1]]}' in page.match.title, bench, 180)
        bench.state.set(node=5)                                                         # and a place of the graph
        until(lambda: page.image.value == 'node' and f'Toytown · place {mine.nodes(3).place[5]}' in page.now.title, bench, 180)
        bench.state.set(image=('Otherville', int(a.queries[0])))                        # one that was recorded
        until(lambda: page.image.value == 0 and 'What makes pair 0 match' in page.match.title, bench, 180)
        bench.state.set(image=('Otherville', int(a.queries[7])))
        until(lambda: page.image.value == 'image', bench, 180)
        mine.checkpoints()[3].unlink()                                                 # a run that was copied without its weights
        bench.state.set(looked=-1)
        until(lambda: [v for _, v in page.image.options] == [0, 1], bench, 180)
    finally: bench.close()

def test_a_click_on_the_map_chooses_and_the_choice_is_ringed(bench, run):
    page, cliques = opened(bench, 1), run.cliques(3)
    mine = cliques[(cliques.batch == page.batch.value)]
    other = mine[mine.slot != page.slot.value].iloc[0]
    page.map._handle_custom_msg(dict(kind='click', points=[int(other.node)]), [])
    until(lambda: page.map.shown == dict(slot=int(other.slot), layer=f'3/{page.batch.value}', closer=False), bench)
    assert bench.state.node == other.node and page.slot.value == other.slot
    sent = page.map.page
    page.closer.value = 'this clique'
    until(lambda: page.map.shown['closer'], bench)
    assert page.map.page is sent or page.map.page == sent                               # looking closer sends no new map

def test_edges_are_chosen(bench, run):
    page = opened(bench, 0)
    drawn(page.graph)
    page.which.value = 'new and broken ones'
    bench.wait(120)
    drawn(page.graph)
    names = [t.name for t in page.figure[1].data[:6:2]]
    assert names[0] == 'kept 0' and not names[1].endswith(' 0')

def test_slider_and_newest(bench):
    bench.wait(120)
    graph = bench.pages[0].graph
    drawn(graph)
    bench.slider.value = 1
    bench.wait(120)
    until(lambda: 'after 1 epoch' in graph.title, bench)
    assert bench.state.epoch == 1 and bench.newest.value is False
    bench.newest.value = True
    bench.wait(120)
    assert bench.state.epoch == 3

def test_a_slider_moved_meanwhile_is_not_undone(bench):
    "The painter moves the slider after the epoch it shows; somebody else may have moved it a moment before."
    bench.wait(120)
    def moved():
        somebody = threading.Thread(target=lambda: setattr(bench.slider, 'value', 2))
        somebody.start(); somebody.join()
        bench.state.set(epoch=1)
    bench.painter.do(moved)
    until(lambda: bench.state.epoch == 2 and bench.slider.value == bench.play.value == 2, bench)

def test_positions_by_likeness(bench):
    page = opened(bench, 0)
    drawn(page.graph)
    before = page.figure[1].data[7].x
    page.positions.value = 'likeness'
    bench.wait(120)
    drawn(page.graph)
    assert len(page.figure[1].data[7].x) == len(before) and abs(page.figure[1].data[7].x).max() < 100

def test_new_epochs_appear_by_themselves(run, tmp_path):
    path, last = tmp_path/'live', tmp_path/'live'/'epochs'/'0003'
    shutil.copytree(run.path, path)
    last.rename(tmp_path/'later')
    bench = Workbench(path)
    try:
        bench.wait(120)
        graph = bench.pages[0].graph
        assert bench.state.epochs == [0, 1, 2]
        drawn(graph)
        (tmp_path/'later').rename(last)
        until(lambda: 'after 3' in graph.title, bench)
        shutil.rmtree(last)                             # a resumed training drops what came after its checkpoint
        drawn(graph)
        until(lambda: bench.state.epoch == 2 and 'after 2' in graph.title, bench)
    finally: bench.close()
    bench.painter.join(60)
    assert not bench.painter.is_alive()

def test_a_run_without_epochs_waits(tmp_path):
    bench = Workbench(Run.create(tmp_path/'new', dict(settings={})))
    try: until(lambda: 'waiting for the first epoch' in bench.status.value, bench)
    finally: bench.close()

def test_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match='nowhere'): Workbench(tmp_path/'nowhere')

def test_a_run_that_is_removed_is_said(run, tmp_path, capfd):
    "In a line, and not in a new story in the log with every look."
    shutil.copytree(run.path, tmp_path/'gone')
    bench = Workbench(tmp_path/'gone')
    try:
        bench.wait(120)
        shutil.rmtree(tmp_path/'gone')
        for node in range(3):
            bench.painter.do(lambda: bench.state.set(node=node)); start = bench.painter.rounds
            until(lambda: bench.painter.rounds > start + 1, bench)
        until(lambda: bench.error is not None, bench)
        assert isinstance(bench.error, UserError) and 'Traceback' not in capfd.readouterr().err
        for _ in range(3): bench._complain(RuntimeError('new'))                              # one that nobody foresaw
        assert capfd.readouterr().err.count('RuntimeError: new') == 1
    finally: bench.close()

def test_errors_become_a_line(bench):
    bench.tabs.selected_index = 2
    until(lambda: 'no epoch has attention maps' in bench.status.value, bench)
    opened(bench, 0)
    assert bench.error is None and 'attention' not in bench.status.value         # and it goes with the tab
    bench.tabs.selected_index = 2
    until(lambda: 'no epoch has attention maps' in bench.status.value, bench)

def test_a_bug_becomes_a_line(bench, capsys):
    bench.wait(120)
    bench.pages[0].draw = lambda: [][1]
    bench.pages[0].graph.heard(dict(kind='click', points=[2]))
    until(lambda: 'IndexError' in bench.status.value, bench)
    assert 'list index out of range' in capsys.readouterr().err
    del bench.pages[0].draw
    bench.pages[0].graph.heard(dict(kind='error', text='no WebGL'))
    until(lambda: 'no WebGL' in bench.status.value, bench)

def test_a_damaged_epoch_is_named(run, tmp_path):
    path = tmp_path/'damaged'
    shutil.copytree(run.path, path)
    (path/'epochs'/'0003'/'edges.parquet').write_bytes(b'no table')
    bench = Workbench(path)
    try:
        until(lambda: 'edges.parquet' in bench.status.value, bench)
        bench.slider.value = 2
        until(lambda: 'after 2' in bench.pages[0].graph.title, bench)
    finally: bench.close()

def test_hostile_names_are_text(run, tmp_path):
    path = tmp_path/'<script>alert(1)<'
    shutil.copytree(run.path, path)
    bench = Workbench(path)
    try: assert '<script>' not in bench.widget.children[0].children[0].value
    finally: bench.close()

def test_last_row_of_a_file_being_written(tmp_path):
    path = tmp_path/'metrics.jsonl'
    assert last_row(path) == {}
    path.write_bytes(b'{"kind": "step", "epoch": 2, "step": 30, "loss": 0.5}\n{"kind": "st')
    assert progress(last_row(path)) == 'epoch 2 · step 30 · loss 0.500'
    path.write_bytes(b'{"epoch": null}\nbroken\n')
    assert last_row(path) == {} and progress(dict(epoch=None, loss=float('nan'))) == 'loss nan'

def test_training_fails_aloud():
    said = []
    def bad(stop): raise UserError('no such folder')
    t = Training(bad, said.append)
    t.run(); t.thread.join(60)
    assert said == ['no such folder'] and t.state == 'idle'

def test_start_twice_is_once():
    n = []
    def work(stop):
        n.append(1)
        while not stop.is_set(): time.sleep(.01)
    t = Training(work, lambda s: None)
    t.run(); t.run(); time.sleep(.05)
    t.reins.set(); t.thread.join(60)
    assert n == [1]

def test_a_stop_ends_a_pause():
    ended = threading.Event()
    def work(stop):
        while not stop.is_set(): time.sleep(.005)
        ended.set()
    t = Training(work, lambda s: None)
    t.run(); t.reins.pause(); time.sleep(.05)
    assert not ended.is_set() and t.state == 'paused'
    t.reins.set()
    assert ended.wait(60)

def test_buttons_hold_a_training(run):
    def work(stop):
        while not stop.is_set(): time.sleep(.005)
    bench = Workbench(run, work, dark=True)
    lit = lambda: {n for n, b in bench.reins.items() if not b.disabled}
    try:
        until(lambda: lit() == {'start'}, bench)
        for name, after in (('start', {'pause', 'stop'}), ('pause', {'start', 'stop'}), ('start', {'pause', 'stop'}), ('stop', {'start'})):
            bench.reins[name].click()
            until(lambda: lit() == after, bench)
        until(lambda: 'finished' in bench.status.value, bench)
    finally: bench.close()

def test_a_training_that_cannot_start_is_said(tmp_path):
    from sage.settings import Settings, make_model
    settings = Settings(backbone='sage_nano', image_size=112, epochs=1, steps=1)
    with pytest.raises(UserError): Workbench.training(settings, make_model(settings), 'no table', {}, tmp_path/'run')

def test_state_keeps_its_epoch_when_not_following(run):
    s = State(run)
    s.follow, s.epoch = False, 1
    s.refresh()
    assert s.epoch == 1
