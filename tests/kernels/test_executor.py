"""Executor: every index once, errors, nesting, sharing, fork, and threads that end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fq_kernels
from fq_kernels import Executor, bf16_round_trip, rms_norm_f32

ROOT = Path(fq_kernels.__file__).parents[1]
pytestmark = pytest.mark.threads
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 1024)).astype(np.float32)


def workers() -> int:
    """Executor threads that Python knows of."""
    return sum(t.name.startswith("fq-executor") for t in threading.enumerate())


def native_threads() -> int:
    """Threads that the operating system knows of; one that has ended may linger for a moment."""
    if sys.platform == "linux":
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def no_stragglers():
    """Threads of executors that nobody joined have ended before the next test counts."""
    count = -1
    while count != (count := workers()):
        time.sleep(0.01)


def run_python(code: str) -> None:
    """Run ``code`` in an interpreter of its own, which must leave silently with status 0."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# map


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000, -1])
def test_map_covers_each_index_once(threads, n):
    seen: list[int] = []
    with Executor(threads) as executor:
        for _ in range(3):
            seen.clear()
            assert executor.map(seen.append, n) is None
            assert sorted(seen) == list(range(n))


def test_map_uses_its_threads_and_the_caller():
    with Executor(3) as executor:
        barrier = threading.Barrier(3, timeout=20)
        names = []
        executor.map(lambda i: (barrier.wait(), names.append(threading.current_thread().name)), 3)
        assert sorted(names) == sorted(["fq-executor-1", "fq-executor-2", threading.current_thread().name])
        assert executor.threads == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StopIteration])
@pytest.mark.parametrize("threads", [1, 3])
def test_exceptions_reach_the_caller(threads, error):
    seen = []

    def task(i):
        if i == 5:
            raise error("from the task")
        seen.append(i)

    with Executor(threads) as executor:
        with pytest.raises(error, match="from the task"):
            executor.map(task, 2000)
        assert len(seen) == len(set(seen)) < 2000
        x = rows(64)
        assert rms_norm_f32(x, executor=executor).tobytes() == rms_norm_f32(x).tobytes()
        seen.clear()
        executor.map(seen.append, 50)
        assert sorted(seen) == list(range(50))


def test_an_exception_of_a_worker_reaches_the_caller():
    both = threading.Barrier(2, timeout=20)
    caller = threading.current_thread()

    def task(i):
        both.wait()
        if threading.current_thread() is not caller:
            raise LookupError("from a worker")

    with Executor(2) as executor, pytest.raises(LookupError, match="from a worker"):
        executor.map(task, 2)


def test_a_task_may_use_the_same_executor():
    x = rows(64)
    expected = rms_norm_f32(x)
    results = [np.empty_like(x) for _ in range(20)]
    inner = []
    with Executor(3) as executor:

        def task(i):
            rms_norm_f32(x, out=results[i], executor=executor)
            executor.map(inner.append, 10)

        executor.map(task, len(results))
    assert all(result.tobytes() == expected.tobytes() for result in results)
    assert sorted(inner) == sorted(list(range(10)) * 20)


def test_map_arguments():
    with Executor(2) as executor:
        with pytest.raises(TypeError):
            executor.map(int, 1.5)
        with pytest.raises(TypeError):
            executor.map(None, 3)


# Several Python threads at once


def test_python_threads_share_an_executor():
    inputs = [rows(48, seed) for seed in range(4)]
    expected = [rms_norm_f32(x, quant="bf16").tobytes() for x in inputs]
    with Executor(3) as executor, ThreadPoolExecutor(4) as callers:

        def work(k):
            for _ in range(60):
                if rms_norm_f32(inputs[k], quant="bf16", executor=executor).tobytes() != expected[k]:
                    return False
                seen = []
                executor.map(seen.append, 20)
                if sorted(seen) != list(range(20)):
                    return False
            return True

        assert all(callers.map(work, range(4)))


def test_first_use_by_several_python_threads_starts_the_threads_once():
    before = workers()
    for _ in range(20):
        with Executor(3) as executor:
            gate = threading.Barrier(4, timeout=20)

            def work(gate=gate, executor=executor):
                gate.wait()
                executor.map(int, 3)

            callers = [threading.Thread(target=work) for _ in range(4)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            assert workers() == before + 2
        assert workers() == before


# Life and death


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**40])
def test_thread_counts_out_of_range(threads):
    with pytest.raises(ValueError, match=f"threads must be between 1 and 1024, not {threads}"):
        Executor(threads)


@pytest.mark.parametrize("threads", [1.0, "2", None, True])
def test_thread_counts_that_are_no_number(threads):
    with pytest.raises(TypeError, match="threads must be an int"):
        Executor(threads)


def test_no_threads_argument():
    with pytest.raises(TypeError):
        Executor()


def test_closed_executors_refuse():
    executor = Executor(2)
    executor.map(int, 5)
    executor.close()
    executor.close()
    for use in (
        lambda: executor.map(int, 5),
        lambda: rms_norm_f32(rows(4), executor=executor),
        lambda: bf16_round_trip(rows(4), executor=executor),
    ):
        with pytest.raises(RuntimeError, match="the executor is closed"):
            use()


def test_with_block_closes_and_lets_errors_through():
    before = workers()
    with pytest.raises(LookupError), Executor(4) as executor:
        executor.map(int, 5)
        assert workers() == before + 3
        raise LookupError
    assert workers() == before
    with pytest.raises(RuntimeError, match="closed"):
        executor.map(int, 5)


def test_threads_start_at_first_use():
    before = workers()
    with Executor(8) as executor:
        assert workers() == before
        executor.map(int, 5)
        assert workers() == before + 7


CTRL_C_AT_THE_START = """
import threading
import numpy as np
from fq_kernels import Executor, rms_norm_f32

start, interrupted = threading.Thread.start, []

def start_once_interrupted(thread):
    if thread.name == "fq-executor-2" and not interrupted:
        interrupted.append(thread)
        if {late}:
            start(thread)
        raise KeyboardInterrupt
    start(thread)

threading.Thread.start = start_once_interrupted
x = np.random.default_rng(0).standard_normal((8192, 64)).astype(np.float32)
expected = rms_norm_f32(x).tobytes()
with Executor(4) as executor:
    try:
        executor.map(int, 8)
    except KeyboardInterrupt:
        pass
    assert interrupted
    for _ in range(300):
        assert rms_norm_f32(x, executor=executor).tobytes() == expected
    gate = threading.Barrier(4, timeout=20)
    executor.map(lambda i: gate.wait(), 4)
    crowd = threading.Barrier(5, timeout=1)
    try:
        executor.map(lambda i: crowd.wait(), 5)
        raise SystemExit("there are five threads")
    except threading.BrokenBarrierError:
        pass
"""


@pytest.mark.parametrize("late", [True, False])
def test_ctrl_c_while_threads_start(late):
    """Before the thread is there, or as its start is waited for: two of one number would lose work."""
    run_python(CTRL_C_AT_THE_START.format(late=late))


def test_a_thread_that_the_system_has_not_is_asked_for_again(monkeypatch):
    start = threading.Thread.start

    def refused(thread):
        raise RuntimeError("can't start new thread")

    with Executor(3) as executor:
        monkeypatch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            executor.map(int, 8)
        monkeypatch.setattr(threading.Thread, "start", start)
        before = workers()
        executor.map(int, 8)
        assert workers() == before + 2


def test_close_in_the_middle_of_a_job():
    x = rows(256)
    expected = rms_norm_f32(x).tobytes()
    for _ in range(20):
        executor = Executor(3)
        executor.map(int, 3)
        closer = threading.Thread(target=executor.close)
        closer.start()
        try:
            assert rms_norm_f32(x, executor=executor).tobytes() == expected
        except RuntimeError as error:
            assert "closed" in str(error)
        closer.join()


def test_tasks_that_close_their_executor():
    before = workers()
    executor = Executor(3)
    gate = threading.Barrier(3, timeout=20)
    executor.map(lambda i: (gate.wait(), executor.close()), 3)
    assert wait_until(lambda: workers() == before)
    with pytest.raises(RuntimeError, match="closed"):
        executor.map(int, 3)


def test_collected_executors_end_their_threads():
    before, native = workers(), native_threads()
    executor = Executor(4)
    executor.map(int, 10)
    assert workers() == before + 3
    del executor
    assert wait_until(lambda: workers() == before)
    assert wait_until(lambda: native_threads() <= native)


def test_executors_collected_as_part_of_a_cycle_end_their_threads():
    class Owner:
        pass

    before = workers()
    for _ in range(3):
        owner = Owner()
        owner.executor, owner.itself = Executor(3), owner
        owner.executor.map(int, 10)
        first = [Executor(3)]  # this one stands before its owner in the collector's list
        first[0].map(int, 10)
        first.append(first)
        del owner, first
    gc.collect()
    assert wait_until(lambda: workers() == before)


def test_many_executors_one_after_another():
    before = workers()
    x = rows(64)
    expected = rms_norm_f32(x).tobytes()
    for _ in range(200):
        with Executor(3) as executor:
            assert rms_norm_f32(x, executor=executor).tobytes() == expected
    assert wait_until(lambda: workers() == before)


@pytest.mark.parametrize(
    "code",
    [
        "e = Executor(4); e.map(int, 100)",
        "e = Executor(4)",
        "e = Executor(2); f = Executor(3); e.map(lambda i: f.map(int, 9), 9)",
        "e = [Executor(3)]; e.append(e); e[0].map(int, 9); del e",
        "e = Executor(3); e.map(int, 9); import sys; sys.exit(0)",
        "import threading; e = Executor(3)\n"
        "threading.Thread(target=lambda: [e.map(int, 9) for _ in range(999)]).start()",
    ],
)
def test_interpreter_exit_with_open_executors_is_clean(code):
    run_python("from fq_kernels import Executor\n" + code)


# Fork


def fork() -> int:
    with warnings.catch_warnings():
        # from Python 3.12 on, for a process with threads: what is tested here
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def exit_status(pid: int) -> int | None:
    """The child's exit status; None, and an end to it, if it does not leave."""
    status = []

    def left():
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status.append(os.waitstatus_to_exitcode(code))
        return bool(status)

    if not wait_until(lambda: bool(status) or left()):
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        return None
    return status[0]


def in_child(check) -> int | None:
    pid = fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    return exit_status(pid)


@needs_fork
@pytest.mark.parametrize("threads", [1, 4])
def test_a_forked_child_computes_the_same(threads):
    x = rows(128)
    expected = rms_norm_f32(x, quant="bf16").tobytes()
    with Executor(threads) as executor:
        executor.map(int, 10)

        def check():
            alone = native_threads()  # one, but for what a sanitizer's runtime has started
            for _ in range(3):
                if rms_norm_f32(x, quant="bf16", executor=executor).tobytes() != expected:
                    return False
            alive = native_threads() == alone + threads - 1
            executor.close()
            gc.collect()
            return alive and wait_until(lambda: native_threads() == alone)

        for _ in range(5):
            assert in_child(check) == 0
        assert rms_norm_f32(x, quant="bf16", executor=executor).tobytes() == expected


@needs_fork
def test_fork_while_another_thread_runs_a_job():
    x = rows(512)
    expected = rms_norm_f32(x).tobytes()
    stop = threading.Event()
    wrong = []
    with Executor(3) as executor:

        def work():
            while not stop.is_set():
                if rms_norm_f32(x, executor=executor).tobytes() != expected:
                    wrong.append(1)

        caller = threading.Thread(target=work)
        caller.start()
        try:
            for _ in range(15):
                assert in_child(lambda: rms_norm_f32(x, executor=executor).tobytes() == expected) == 0
        finally:
            stop.set()
            caller.join()
    assert not wrong


@needs_fork
def test_a_closed_executor_stays_closed_in_the_child():
    executor = Executor(3)
    executor.map(int, 3)
    executor.close()

    def check():
        try:
            executor.map(int, 3)
        except RuntimeError:
            return True
        return False

    assert in_child(check) == 0


@needs_fork
def test_a_task_may_fork():
    # The child returns from the task and goes on inside map, whose pool its executor has left.
    run_python(
        """
import gc, os, threading, warnings
from fq_kernels import Executor
warnings.simplefilter("ignore", DeprecationWarning)
for threads in (1, 3):
    executor, seen, child = Executor(threads), [], None
    gate = threading.Barrier(threads, timeout=20)
    def task(i):
        global child
        seen.append(i)
        if i < threads:
            gate.wait()  # so that the caller has a task
        if child is None and threading.current_thread() is threading.main_thread():
            child = os.fork()
            gc.collect()
    executor.map(task, 4)
    if child == 0:
        executor.map(int, 9)
        ok = len(seen) == len(set(seen)) and (threads > 1 or seen == [0, 1, 2, 3])
        os._exit(0 if ok else 3)
    assert sorted(seen) == [0, 1, 2, 3]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    executor.close()
"""
    )


@needs_fork
def test_a_child_forked_on_a_worker_ends_with_the_job():
    class EndOfThread:
        def __del__(self):
            os._exit(7)

    children = []
    of_thread = threading.local()
    both = threading.Barrier(2, timeout=20)
    caller = threading.current_thread()

    def task(i):
        both.wait()
        if threading.current_thread() is not caller:
            children.append(fork())
            if children == [0]:
                of_thread.end = EndOfThread()

    with Executor(2) as executor:
        executor.map(task, 2)
    assert exit_status(children[0]) == 7
