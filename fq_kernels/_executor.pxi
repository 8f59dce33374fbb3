# Executor, and how a kernel's rows are shared among its threads.

cimport cython
from libc.stdint cimport int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import atexit
import operator
import os
import threading
import weakref

import numpy as np


cdef class _Pool:
    """Owns the C pool; each worker holds a reference, so it outlives them."""

    cdef fq_pool *c
    cdef object __weakref__

    def __cinit__(self, int threads):
        self.c = fq_pool_new(threads)
        if self.c == NULL:
            raise MemoryError()

    def __dealloc__(self):
        fq_pool_free(self.c)

    def work(self):
        with nogil:
            fq_pool_work(self.c)

    def stop(self):
        fq_pool_stop(self.c)

    def after_fork(self):
        fq_pool_after_fork(self.c)


cdef class _PythonTask:
    cdef object fn
    cdef object error


cdef void _call_python(void *args, int64_t begin, int64_t end) noexcept with gil:
    cdef _PythonTask task = <_PythonTask> args
    if task.error is not None:
        return
    try:
        for i in range(begin, end):
            task.fn(i)
    except BaseException as e:
        with cython.critical_section(task):
            if task.error is None:
                task.error = e


cdef _map(fq_pool *pool, fn, int64_t n):
    """fn(i) for every i below n in the IEEE default environment; NULL: on the calling thread."""
    cdef _PythonTask task = _PythonTask.__new__(_PythonTask)
    task.fn = fn
    with nogil:
        fq_pool_run(pool, _call_python, <void *> task, n, 1)
    if task.error is not None:
        raise task.error


_executors = weakref.WeakSet()


# no_gc_clear: collected as part of a cycle, __dealloc__ still needs the pool
@cython.no_gc_clear
cdef class Executor:
    """Persistent threads that share the rows of a kernel call.

    ``threads`` counts the caller: ``Executor(2)`` starts one thread, at first use. Results
    do not depend on the number of threads. One executor may be used from several Python
    threads; a call that finds it busy runs on its own thread alone. After a fork the child
    starts threads of its own. ``close()`` (or leaving a ``with`` block) ends the threads.

    Raises ValueError if ``threads`` is not between 1 and 1024.
    """

    cdef readonly int threads
    cdef _Pool pool
    cdef list workers
    cdef int started  # workers; read without the lock
    cdef bint closed
    cdef object lock  # for what is written after the start
    cdef object __weakref__

    def __cinit__(self, threads):
        if not isinstance(threads, int) or isinstance(threads, bool):
            raise TypeError(f"threads must be an int, not {type(threads).__name__}")
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be between 1 and 1024, not {threads}")
        self.threads = threads
        self._reset()
        _executors.add(self)

    def _reset(self):
        self.pool = _Pool(self.threads)
        self.workers = []
        self.started = 0
        self.lock = threading.Lock()

    def _after_fork(self):
        self.pool.after_fork()
        self._reset()

    cdef fq_pool *ready(self) except? NULL:
        if self.closed:
            raise RuntimeError("the executor is closed")
        if self.started < self.threads - 1:
            self.start()
        return self.pool.c

    cdef int start(self) except -1:
        with self.lock:
            if self.closed:  # by now: nobody would end the threads that this starts
                raise RuntimeError("the executor is closed")
            for i in range(self.started + 1, self.threads):
                worker = threading.Thread(target=self.pool.work, name=f"fq-executor-{i}", daemon=True)
                # before it starts, which Ctrl-C may interrupt when the thread is there already
                self.workers.append(worker)
                worker.start()
                self.started = i
        return 0

    def map(self, fn, n):
        """Call ``fn(i)`` for every i in range(n), on all threads, in no fixed order.

        For Python functions that spend their time with the GIL released (numpy).
        The first exception is raised here once the calls under way have ended; calls not
        yet begun are dropped.
        """
        cdef int64_t count = operator.index(n)
        cdef fq_pool *pool = self.ready()
        cdef _Pool held = self.pool  # fn may fork, and the child's executor then lets it go
        _map(pool, fn, count)

    def close(self):
        """End the threads. Further calls raise RuntimeError."""
        self.closed = True
        self.pool.stop()
        # taken over first: of two workers that close at once, one must not join the other
        with self.lock:
            workers, self.workers = self.workers, []
        for worker in workers:
            if worker is not threading.current_thread() and worker.is_alive():
                worker.join()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.pool is not None:
            self.pool.stop()

    def __repr__(self):
        return f"Executor({self.threads})"


def _close_executors():
    for executor in list(_executors):
        executor.close()


def _after_fork_in_child():
    _renew_locks()
    for executor in list(_executors):
        executor._after_fork()


atexit.register(_close_executors)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# Elements per range at least: enough to pay for handing the range out. Elements per thread
# up to which each thread has one range, always the same: it finds its rows in its own L2.
# Of these the last thread's is shorter, by what the caller does while a job reaches the others.
# Beyond that, ranges at most: kernels overlap the rows of a range, not those of two.
cdef int64_t GRAIN = 32768
cdef int64_t OWN_ELEMENTS = 1 << 18
cdef int64_t HEAD_START = 2048
cdef int64_t MAX_RANGES = 16


cdef fq_pool *_pool_of(executor) except? NULL:
    if executor is None:
        return NULL
    if not isinstance(executor, Executor):
        raise TypeError(f"executor must be an Executor or None, not {type(executor).__name__}")
    return (<Executor> executor).ready()


cdef void _run(fq_pool *pool, fq_task_fn fn, void *args, int64_t rows, int64_t n) noexcept nogil:
    cdef int64_t grain = rows, ranges, share
    n = max(n, 1)  # of rows without elements, too, something is written
    if pool != NULL:
        ranges = fq_pool_threads(pool)
        if rows * n > ranges * OWN_ELEMENTS:
            ranges = max(ranges, MAX_RANGES)
        share = (rows + ranges - 1) // ranges
        if ranges == fq_pool_threads(pool):
            share = max(share, (rows * n + ranges * (HEAD_START + n // 2)) // (ranges * n))
        grain = max((GRAIN + n - 1) // n, share)
    fq_pool_run(pool, fn, args, rows, grain)


# What bench/ times: through ``map`` it would be Python's overhead.

cdef extern from *:
    int64_t _atomic_add "__atomic_add_fetch"(int64_t *, int64_t, int) nogil
    int64_t _atomic_load "__atomic_load_n"(int64_t *, int) nogil
    int _SEQ_CST "__ATOMIC_SEQ_CST"


cdef int64_t _now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t> t.tv_sec * 1000000000 + t.tv_nsec


cdef void _nothing(void *args, int64_t begin, int64_t end) noexcept nogil:
    pass


cdef void _meet(void *args, int64_t begin, int64_t end) noexcept nogil:
    cdef int64_t *missing = <int64_t *> args
    cdef int64_t start = _now_ns()
    _atomic_add(missing, -1, _SEQ_CST)
    # a limit, since nothing promises that another thread takes the other range
    while _atomic_load(missing, _SEQ_CST) > 0 and _now_ns() - start < 1000000:
        pass


def _dispatch_ns(Executor executor, int64_t repeats, *, int64_t gap_ns=0, bint meet=False):
    """Nanoseconds that each of ``repeats`` empty jobs, a range per thread, keeps the caller.

    With ``meet`` a range waits for the others to begin: the time until all threads work.
    Between two jobs the caller computes for ``gap_ns``; the workers may fall asleep.
    """
    cdef fq_pool *pool = executor.ready()
    cdef int64_t i, begin, missing, threads = executor.threads
    times = np.empty(repeats, np.int64)
    cdef int64_t *t = <int64_t *> <size_t> times.ctypes.data
    with nogil:
        for i in range(repeats):
            begin = _now_ns()
            while _now_ns() - begin < gap_ns:
                pass
            missing = threads
            begin = _now_ns()
            fq_pool_run(pool, _meet if meet else _nothing, &missing, threads, 1)
            t[i] = _now_ns() - begin
    return times
