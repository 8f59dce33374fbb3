"""Who runs what, with workers that are made up: they die, hang, come late, are refused, forget."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq import FqError, NotFiniteError
from fq.cluster import spread, worker
from fq.cluster.spread import (
    AHEAD,
    LEAST_CELLS,
    TASKS_EACH,
    TRIES,
    BaselineLostError,
    LostError,
    Spread,
    Task,
    tasks_of,
)
from fq.cluster.worker import Job, ModelFiles, UnknownJobError
from fq_kernels import CONTRACT

JOB = Job("key", ModelFiles(("m.gguf",), "0" * 64, 1), None, None, None, (), (), None, None, None)
READY = {"contract": CONTRACT, "isa": "avx2", "threads": 1}
TASKS = [Task(chunk, (0, 1, 2)) for chunk in range(12)]


class Handle:
    def __init__(self):
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


class Pool:
    """begin, run: what a worker's functions do, by its address; a thread each. What never returns hangs."""

    def __init__(self, *addresses):
        self.there = {address: f"name of {address}" for address in addresses}
        self.begin = {}
        self.run = {}
        self.given = []  # address and task
        self.handles = []
        self.most = 0
        self._lock = threading.Lock()
        self._has = {}

    def workers(self):
        return dict(self.there)

    def start(self, address, done, function, *args):
        handle = Handle()
        self.handles.append(handle)

        def work():
            try:
                if function is worker.begin:
                    result = self.begin.get(address, lambda: READY)()
                else:
                    task = Task(*args[1:])
                    with self._lock:
                        self.given.append((address, task))
                        self._has[address] = self._has.get(address, 0) + 1
                        self.most = max(self.most, self._has[address])
                    self.run.get(address, lambda task: None)(task)
                    with self._lock:
                        self._has[address] -= 1
                    result = SimpleNamespace(chunk=task.chunk, cells=task.cells)
                done(result, None)
            except BaseException as e:
                done(None, e)

        threading.Thread(target=work, daemon=True).start()
        return handle

    def die(self, address):
        """In the midst of a task: nothing is heard of it any more."""
        self.there.pop(address, None)
        time.sleep(60)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(spread, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(spread, "LATE_SECONDS", 0.3)
    monkeypatch.setattr(spread, "ALONE_SECONDS", 0.05)


def run(pool, tasks=TASKS, said=None, each=lambda task: None):
    """Tasks in the order in which they ended."""
    ended = []
    for left, about in Spread(pool, JOB, tasks, [].append if said is None else said.append):
        assert about["contract"] == CONTRACT
        ended.append(Task(left.chunk, left.cells))
        each(ended[-1])
    return ended


def test_every_task_ends_once():
    pool, said = Pool("a", "b", "c"), []
    for address in pool.there:
        pool.run[address] = lambda task: time.sleep(0.01)
    ended = run(pool, said=said)
    assert sorted(ended) == TASKS and sorted(task for _, task in pool.given) == TASKS
    assert {address for address, _ in pool.given} == {"a", "b", "c"} and pool.most <= AHEAD
    assert sorted(said) == [f"worker name of {x}: avx2, 1 threads" for x in "abc"]


def test_steps_are_cells():
    made, steps = Spread(Pool("a"), JOB, TASKS, print), []
    assert made.steps == 36
    made.on_step = lambda: steps.append(made.steps)
    for _ in made:
        pass
    assert len(steps) == 36 and made.steps == 0 and made.n_workers == 1


def test_a_worker_that_dies_costs_its_tasks_alone():
    pool, said, dead = Pool("a", "b"), [], threading.Event()

    def dies(task):
        if task.chunk >= 3:
            dead.set()
            pool.die("b")

    pool.run["b"] = dies
    pool.run["a"] = lambda task: dead.wait(10)
    assert sorted(run(pool, said=said)) == TASKS
    again = [task for task in TASKS if [t for _, t in pool.given].count(task) > 1]
    assert 1 <= len(again) <= AHEAD and "worker name of b is gone" in said


def test_one_that_comes_back_is_told_again():
    """Under another address, as a process that is started again has, or under the same."""
    pool = Pool("a")
    known = {"a"}

    def forgets(task):
        if task.chunk == 4 and "a" in known:
            known.clear()
        if "a" not in known:
            raise UnknownJobError("key")

    def begin():
        known.add("a")
        pool.run["a"] = lambda task: None if "a" in known else forgets(task)
        return READY

    pool.run["a"], pool.begin["a"] = forgets, begin
    assert sorted(run(pool)) == TASKS


def test_one_that_comes_later_has_a_part_in_it():
    pool = Pool("a")
    pool.run["a"] = lambda task: time.sleep(0.02)
    run(pool, each=lambda task: pool.there.setdefault("z", "late one"))
    assert {address for address, _ in pool.given} == {"a", "z"}


def test_where_there_are_none_it_waits():
    pool, said = Pool(), []
    timer = threading.Timer(0.3, lambda: pool.there.setdefault("a", "first"))
    timer.start()
    assert sorted(run(pool, said=said)) == TASKS
    assert said == ["there are no workers: waiting", "worker first: avx2, 1 threads"]


def hanging():
    """What hangs until `over` is set; and who was waited for in vain."""
    over, waited = threading.Event(), []

    def hangs(task):
        if not over.wait(10):
            waited.append(task)

    return hangs, over, waited


def test_a_task_that_hangs_is_given_to_another():
    """And so is the one that waits behind it."""
    pool = Pool("a", "b")
    pool.run["b"], over, waited = hanging()
    assert sorted(run(pool)) == TASKS and not waited
    over.set()
    hung = [task for address, task in pool.given if address == "b"]
    assert len(hung) == AHEAD and set(hung) <= {task for address, task in pool.given if address == "a"}


def test_a_cut_connection_loses_nothing():
    """All workers seem gone, and come back with what they had ended meanwhile."""
    pool, said, cut = Pool("a", "b"), [], threading.Event()

    def each(task):
        if task == TASKS[3] and not cut.is_set():
            there = dict(pool.there)
            pool.there.clear()
            cut.set()
            threading.Timer(0.1, lambda: pool.there.update(there)).start()
        if cut.is_set():
            time.sleep(0.03)  # ends while nobody is there

    pool.run = {"a": each, "b": each}
    assert sorted(run(pool, said=said)) == TASKS
    assert "worker name of a is gone" in said and said.count("worker name of a: avx2, 1 threads") == 2


def test_another_contract_is_refused_by_name():
    pool, said = Pool("a", "b"), []
    pool.begin["b"] = lambda: READY | {"contract": "fq-0"}
    assert sorted(run(pool, said=said)) == TASKS
    assert {address for address, _ in pool.given} == {"a"}
    assert f"worker name of b is refused: its contract of numerics is fq-0, not {CONTRACT}" in said


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (lambda: READY | {"contract": "fq-0"}, "name of [ab]: its contract of numerics is fq-0"),
        (lambda: READY | {"lacks": "no m.gguf"}, "name of [ab]: no m.gguf"),
        (lambda: {}["fq"], "name of [ab]: KeyError: 'fq'"),
    ],
)
def test_where_all_are_refused_it_ends(begin, words):
    pool = Pool("a", "b")
    pool.begin = {"a": begin, "b": begin}
    with pytest.raises(FqError, match=f"^no worker can run this: {words}"):
        run(pool)


def test_what_fails_is_tried_again_elsewhere_and_not_for_ever():
    pool = Pool("a", "b")
    failed = []

    def fails(task):
        if task.chunk == 5 and len(failed) < TRIES - 1:
            failed.append(task)
            raise MemoryError("too little")

    pool.run = {"a": fails, "b": fails}
    assert sorted(run(pool)) == TASKS and len(failed) == TRIES - 1

    def always(task):
        if task.chunk == 5:
            raise MemoryError("too little")

    pool.run = {"a": always, "b": always}
    with pytest.raises(
        FqError, match=r"cells 0 to 2 of chunk 6 failed \d times, last on name of [ab]: MemoryError"
    ):
        run(pool)


def test_a_worker_where_all_fails_is_refused():
    """At once, while the others are busy: what it has spoilt they do."""
    pool, said = Pool("good", "bad"), []

    def fails(task):
        raise OSError("no space left")

    pool.run = {"good": lambda task: time.sleep(0.02), "bad": fails}
    assert sorted(run(pool, said=said)) == TASKS
    assert "worker name of bad is refused: 3 tasks failed there, the last by OSError: no space left" in said
    spoilt = [task for address, task in pool.given if address == "bad"]
    assert len(spoilt) == len(set(spoilt)), "while others may do it, none is given back"


@pytest.mark.parametrize("heals", [True, False])
def test_one_that_was_refused_is_asked_again_where_the_others_are_gone(heals):
    """And where it fails still, that ends it."""
    pool, said, gone = Pool("good", "bad"), [], threading.Event()

    def fails(task):
        if not (heals and gone.is_set()):
            raise MemoryError("too little")

    def goes(task):
        while not any("is refused" in line for line in said):
            time.sleep(0.01)
        gone.set()
        pool.die("good")

    pool.run = {"good": goes, "bad": fails}
    if heals:
        assert sorted(run(pool, said=said)) == TASKS
    else:
        with pytest.raises(FqError, match="failed 5 times, last on name of bad: MemoryError"):
            run(pool, said=said)
    assert said.count("worker name of bad: avx2, 1 threads") == 2


def test_two_that_hang_hold_nothing_up():
    pool = Pool("a", "b")
    hangs, over, waited = hanging()
    pool.run = {"a": hangs, "b": hangs}
    threading.Timer(0.2, lambda: pool.there.update(c="late one")).start()
    assert sorted(run(pool)) == TASKS and not waited
    over.set()


def test_a_lost_connection_is_no_failure():
    """Of a worker that is there all the time, in its beginning and in its tasks."""
    pool, said, lost = Pool("a"), [], []

    def begin():
        if not lost:
            lost.append("begin")
            raise LostError("cut off")
        return READY

    def task_is_lost(task):
        if len(lost) < 12 and task == TASKS[2]:
            lost.append(task)
            raise LostError("cut off")

    pool.begin["a"], pool.run["a"] = begin, task_is_lost
    assert sorted(run(pool, said=said)) == TASKS and len(lost) == 12
    assert said.count("worker name of a is lost: cut off") == 12


def test_where_only_refused_ones_are_left_it_waits_and_says_so():
    pool, said = Pool("a", "b"), []
    pool.begin["b"] = lambda: READY | {"lacks": "no m.gguf"}

    def dies(task):
        if task.chunk == 3:
            threading.Timer(0.3, lambda: pool.there.update(c="new one")).start()
            pool.die("a")

    pool.run["a"] = dies
    assert sorted(run(pool, said=said)) == TASKS
    assert said.index("there are no workers: waiting") < said.index("worker new one: avx2, 1 threads")


def test_a_lost_baseline_ends_it():
    pool = Pool("a", "b")

    def lost(task):
        if task.chunk == 2:
            raise NotFiniteError("infinite")
        time.sleep(0.01)

    pool.run = {"a": lost, "b": lost}
    with pytest.raises(BaselineLostError, match="chunk 3") as e:
        run(pool)
    assert e.value.task == TASKS[2]


def test_who_ends_it_early_ends_what_was_given():
    pool = Pool("a")
    pool.run["a"] = lambda task: time.sleep(60) if task.chunk > 2 else None
    found = iter(Spread(pool, JOB, TASKS, print))
    for _ in range(3):
        next(found)
    found.close()
    left = [handle.cancelled for handle in pool.handles[4:]]  # after a beginning and three tasks
    assert left and all(left)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(0, 99), max_size=60, unique=True)), max_size=9
    ),
    st.integers(1, 40),
)
def test_tasks_are_all_of_it(to_do, n_workers):
    tasks = tasks_of(to_do, n_workers)
    found = [(task.chunk, cell) for task in tasks for cell in task.cells]
    assert found == [(chunk, cell) for chunk, cells in to_do for cell in cells]
    whole = [cells for _, cells in to_do if cells]
    assert all(len(task.cells) >= min(LEAST_CELLS, *map(len, whole)) for task in tasks)
    # no more than are of use
    assert len(tasks) <= max(len(whole), TASKS_EACH * n_workers + len(whole))
    if whole and all(len(cells) >= 60 for cells in whole):
        assert len(tasks) >= min(TASKS_EACH * n_workers, 7 * len(whole))


def test_few_workers_have_whole_chunks():
    assert tasks_of([(c, range(32)) for c in range(8)], 2) == [Task(c, tuple(range(32))) for c in range(8)]
