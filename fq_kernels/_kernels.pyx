# cython: language_level=3, embedsignature=True
"""Validation, the GIL, and the call into C. The contracts are in src/*.h."""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.math cimport isnan
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport strchr, strcmp
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import atexit
import operator
import os
import sys
import threading
import weakref

import numpy as np
from numpy import empty as np_empty, ndarray as np_ndarray

from .formats import Format, get_format, roundings

# ---------------------------------------------------------------- instruction sets

cdef const fq_kernel_table *table = NULL


cdef dict _supported():
    cdef int i = 0
    cdef dict found = {}
    while fq_table(i) != NULL:
        if fq_table_supported(i):
            found[fq_table(i).name.decode()] = i
        i += 1
    return found


def supported_isas():
    """Names of the instruction sets that this machine runs, best last."""
    return list(_supported())


def isa():
    """Name of the instruction set in use."""
    return table.name.decode()


def force_isa(name):
    """Use the instruction set ``name`` from now on, in the whole process.

    Raises ValueError if this machine or this build does not have it.
    """
    global table
    found = _supported()
    if name not in found:
        raise ValueError(f"instruction set {name!r} is not available here; there are {', '.join(found)}")
    table = fq_table(found[name])


force_isa(os.environ.get("FQ_KERNELS_ISA") or supported_isas()[-1])

# ---------------------------------------------------------------- executor

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

    def work(self, int thread):
        with nogil:
            fq_pool_work(self.c, thread)

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
    cdef bint closed
    cdef object start_lock
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
        self.start_lock = threading.Lock()

    def _after_fork(self):
        self.pool.after_fork()
        self._reset()

    cdef fq_pool *ready(self) except? NULL:
        if self.closed:
            raise RuntimeError("the executor is closed")
        if len(self.workers) < self.threads - 1:
            with self.start_lock:
                for i in range(len(self.workers) + 1, self.threads):
                    worker = threading.Thread(target=self.pool.work, args=(i,), name=f"fq-executor-{i}", daemon=True)
                    worker.start()
                    self.workers.append(worker)
        return self.pool.c

    def map(self, fn, n):
        """Call ``fn(i)`` for every i in range(n), on all threads, in no fixed order.

        For Python functions that spend their time with the GIL released (numpy, BLAS).
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
        workers, self.workers = self.workers, []
        for worker in workers:
            if worker is not threading.current_thread():
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
    for executor in list(_executors):
        executor._after_fork()


atexit.register(_close_executors)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# Elements per range at least: enough to pay for handing the range out. Elements per thread
# up to which each thread has one range, always the same: it finds its rows in its own L2.
# Beyond that, ranges at most: kernels overlap the rows of a range, not those of two.
cdef int64_t GRAIN = 32768
cdef int64_t OWN_ELEMENTS = 1 << 18
cdef int64_t MAX_RANGES = 16


cdef fq_pool *_pool_of(executor) except? NULL:
    if executor is None:
        return NULL
    if not isinstance(executor, Executor):
        raise TypeError(f"executor must be an Executor or None, not {type(executor).__name__}")
    return (<Executor> executor).ready()


# Output from which on it is written past the cache: it would not stay there anyway, and a
# line that is written whole need not be read first.
cdef int64_t STREAM_ELEMENTS = 1 << 19


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


cdef void _run(fq_pool *pool, fq_task_fn fn, void *args, int64_t rows, int64_t n) noexcept nogil:
    cdef int64_t grain = rows, ranges
    if pool != NULL:
        ranges = fq_pool_threads(pool)
        if rows * n > ranges * OWN_ELEMENTS:
            ranges = max(ranges, MAX_RANGES)
        grain = max((GRAIN + n - 1) // n, (rows + ranges - 1) // ranges)
    fq_pool_run(pool, fn, args, rows, grain)

# ---------------------------------------------------------------- arguments


cdef class _Array:
    """A numpy array's buffer, held for one call, seen as rows of its last axis."""

    cdef Py_buffer b
    cdef bint held
    cdef object array
    cdef str name
    cdef char *low   # first byte of any element
    cdef char *high  # one past the last

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.b)

    cdef int64_t n(self) noexcept:
        return self.b.shape[self.b.ndim - 1]

    cdef int64_t n_rows(self) noexcept:
        cdef int64_t rows = 1
        cdef int d
        for d in range(self.b.ndim - 1):
            rows *= self.b.shape[d]
        return rows

    cdef void rows(self, fq_rows *r) noexcept:
        """Outer axes, merged wherever two of them step evenly."""
        cdef int d, k = 0
        for d in range(self.b.ndim - 1):
            if self.b.shape[d] == 1:
                continue
            if k > 0 and r.stride[k - 1] == self.b.strides[d] * self.b.shape[d]:
                r.shape[k - 1] *= self.b.shape[d]
                r.stride[k - 1] = self.b.strides[d]
            else:
                r.shape[k] = self.b.shape[d]
                r.stride[k] = self.b.strides[d]
                k += 1
        if k == 0:
            r.shape[0] = 1
            r.stride[0] = 0
            k = 1
        r.ndim = k
        r.data = <char *> self.b.buf

    cdef bint same_layout(self, _Array other) noexcept:
        cdef int d
        if self.b.buf != other.b.buf or self.b.ndim != other.b.ndim or self.b.itemsize != other.b.itemsize:
            return False
        for d in range(self.b.ndim):
            if self.b.shape[d] != other.b.shape[d] or self.b.strides[d] != other.b.strides[d]:
                return False
        return True

    cdef bint overlaps(self, _Array other) except -1:
        # bounds first: the exact test is a search that can be slow, so it has a limit
        if self.low >= other.high or other.low >= self.high:
            return False
        try:
            return np.shares_memory(self.array, other.array, max_work=10**6)
        except np.exceptions.TooHardError:
            return True

    cdef bint overlaps_itself(self) except -1:
        if PyBuffer_IsContiguous(&self.b, b"C") or self.low == self.high:
            return False
        axes = sorted((abs(self.b.strides[d]), self.b.shape[d])
                      for d in range(self.b.ndim) if self.b.shape[d] > 1)
        extent = self.b.itemsize
        for stride, size in axes:
            if stride < extent:
                return True
            extent += stride * (size - 1)
        return False


cdef bytes _native_order = b"@=<" if sys.byteorder == "little" else b"@=>!"
cdef const char *_NATIVE_ORDER = _native_order
cdef dict _DTYPE_NAMES = {b"f": "float32", b"d": "float64", b"H": "uint16", b"B": "uint8"}


cdef _Array _open(str name, array, const char *code, bint writable=False):
    """The array's buffer if it has the dtype of the buffer protocol's ``code``, is aligned and
    has a contiguous last axis."""
    cdef _Array a = _Array.__new__(_Array)
    cdef int d, last
    if not isinstance(array, np_ndarray):
        raise TypeError(f"{name} must be a numpy array of {_DTYPE_NAMES[code]}, not {type(array).__name__}")
    try:
        PyObject_GetBuffer(array, &a.b, PyBUF_STRIDES | PyBUF_FORMAT)
    except ValueError:  # dtypes that the buffer protocol has no code for
        raise TypeError(f"{name} must have dtype {_DTYPE_NAMES[code]}, not {array.dtype}") from None
    a.held = True
    a.array = array
    a.name = name
    # the code may say native byte order in several ways
    if strcmp(a.b.format + (strchr(_NATIVE_ORDER, a.b.format[0]) != NULL), code) != 0:
        raise TypeError(f"{name} must have dtype {_DTYPE_NAMES[code]}, not {array.dtype}")
    if writable and a.b.readonly:
        raise ValueError(f"{name} is read-only")
    if a.b.ndim == 0:
        raise ValueError(f"{name} must have at least one axis")
    last = a.b.ndim - 1
    if a.b.shape[last] > 1 and a.b.strides[last] != a.b.itemsize:
        raise ValueError(f"the last axis of {name} must be contiguous")
    a.low = a.high = <char *> a.b.buf
    a.high += a.b.itemsize
    for d in range(a.b.ndim):
        if a.b.shape[d] == 0:
            a.high = a.low = <char *> a.b.buf
            return a
        if a.b.shape[d] > 1:
            if a.b.strides[d] % a.b.itemsize != 0:
                raise ValueError(f"{name} is not aligned to its element size")
            if a.b.strides[d] > 0:
                a.high += a.b.strides[d] * (a.b.shape[d] - 1)
            else:
                a.low += a.b.strides[d] * (a.b.shape[d] - 1)
    if <uintptr_t> a.b.buf % a.b.itemsize != 0:
        raise ValueError(f"{name} is not aligned to its element size")
    return a


cdef _Array _output(out, const char *code, _Array x):
    """``out``, or a new array, checked against x."""
    cdef _Array a
    cdef int d
    cdef bint same_shape
    if out is None:
        return _open("out", np_empty(x.array.shape, _DTYPE_NAMES[code]), code)
    a = _open("out", out, code, True)
    same_shape = a.b.ndim == x.b.ndim
    for d in range(a.b.ndim):
        same_shape = same_shape and a.b.shape[d] == x.b.shape[d]
    if not same_shape:
        raise ValueError(f"out has shape {out.shape}, {x.name} has {x.array.shape}")
    if not a.same_layout(x) and a.overlaps(x):
        raise ValueError(f"out overlaps {x.name} in part; it must be {x.name} itself or apart from it")
    if a.overlaps_itself():
        raise ValueError("out has elements that share memory")
    return a


# What rms_norm_f32 and round_trip have in common: which rows are rounded, and their counts.

cdef int _which_rows(quant_rows, int64_t n_rows, int64_t *begin, int64_t *end) except -1:
    try:
        begin[0], end[0] = (0, n_rows) if quant_rows is None else map(operator.index, quant_rows)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"quant_rows must be (begin, end), not {quant_rows!r}") from None
    return 0


cdef int _index_of_first(first_row, uint64_t *index) except -1:
    try:
        index[0] = operator.index(first_row)
    except (TypeError, OverflowError):
        raise ValueError(f"first_row must be an integer from 0 to 2**64 - 1, not {first_row!r}") from None
    return 0


cdef _Array _stats_of(row_stats, int64_t n_rows):
    cdef _Array a = _open("row_stats", row_stats, b"d", True)
    if row_stats.shape != (n_rows, FQ_STAT_COUNT) or not row_stats.flags.c_contiguous:
        raise ValueError(f"row_stats must be C-contiguous of shape {(n_rows, FQ_STAT_COUNT)}, "
                         f"not {row_stats.shape}")
    return a


cdef int _apart(_Array a, _Array b) except -1:
    if a.overlaps(b):
        raise ValueError(f"{a.name} overlaps {b.name}")
    return 0


cdef object _format_of(quant):
    """The format asked for; None for none."""
    global _last_format
    if quant is None or quant is _last_format:
        return quant
    if type(quant) is not str:
        _last_format = get_format(quant)
        return _last_format
    fmt = _formats.get(quant)
    return _keep(quant, get_format(quant)) if fmt is None else fmt


# Rows of one call of a format's Python function, at least: few enough that threads can share them.
cdef int64_t FUNCTION_ROWS = 64


cdef _count_rows(value, result, row_stats):
    cdef fq_count_args a
    cdef _Array av = _open("value", value, b"f")
    cdef _Array ar = _open("result", result, b"f")
    cdef _Array ast = _stats_of(row_stats, av.n_rows())
    cdef fq_task_fn fn = table.count_rows
    cdef int64_t n_rows = av.n_rows()
    av.rows(&a.value)
    ar.rows(&a.result)
    a.n = av.n()
    a.stats = <double *> ast.b.buf
    with nogil:
        fq_pool_run(NULL, fn, &a, n_rows, n_rows)


def _in_parts(fn, int64_t begin, int64_t end, int64_t step, executor):
    """fn(rows) for slices of at most ``step`` rows from begin to end, shared among the threads."""
    parts = range(begin, end, step)

    def part(i):
        fn(slice(parts[i], min(parts[i] + step, end)))

    if executor is None:
        _map(NULL, part, len(parts))
    else:
        executor.map(part, len(parts))


def _round_by_function(fmt, values, begin, end, row_stats, weight, executor):
    """Rows begin to end of values (..., n), in C order, rounded in place by fmt.quantise; then
    all rows times weight, if there is one."""
    if not values.size:
        return
    rows = values.reshape(-1, values.shape[-1])
    begin, end = max(begin, 0), min(end, len(rows))

    def quantise(some):
        quantised = fmt.quantise(rows[some])
        if row_stats is not None:
            _count_rows(rows[some], quantised.values, row_stats[some])
            if quantised.clipped is not None:
                row_stats[some, FQ_STAT_OUT_OF_RANGE] = np.count_nonzero(quantised.clipped, axis=1)
        rows[some] = quantised.values

    def multiply(some):
        with np.errstate(all="ignore"):
            np.multiply(rows[some], weight, out=rows[some])

    step = max(FUNCTION_ROWS, GRAIN // rows.shape[1])
    _in_parts(quantise, begin, end, max(end - begin, 1) if fmt.whole_tensor else step, executor)
    if weight is not None:
        _in_parts(multiply, 0, len(rows), step, executor)
    if not np.may_share_memory(rows, values):  # strides that no view of two axes has
        values[...] = rows.reshape(values.shape)


# ---------------------------------------------------------------- kernels

N_STATS = FQ_STAT_COUNT

# formats already parsed, by what was asked for: parsing takes longer than a row
cdef dict _formats = {}


# the last one given as a Format: a graph's norms are rounded to one and the same, again and again
cdef object _last_format = None


cdef object _keep(key, fmt):
    if len(_formats) < 64:
        _formats[key] = fmt
    return fmt


def rms_norm_f32(x, *, eps=1e-5, weight=None, quant=None, point="raw", out=None, executor=None,
                 quant_rows=None, first_row=0, row_stats=None, result_quant=None):
    """Root-mean-square norm of each row, bit for bit what ggml computes (src/rms_norm.h).

    x          (..., n) float32, last axis contiguous, outer axes of any stride
    eps        added to the mean square; >= 0
    weight     (n,) float32 contiguous, multiplied in after the norm; None for none
    quant      format (or its name) that the result is rounded to; None for none
    point      "raw": round before the weight; "weighted": after it
    out        None allocates, x works in place, or another float32 array of x's shape
    executor   shares the rows among its threads; None: the calling thread
    quant_rows (begin, end): only these rows are rounded; None for all. Rows count in C
               order over the outer axes
    first_row  what stochastic rounding counts the first row as
    row_stats  (rows, N_STATS) float64 C-contiguous, filled with each rounded row's error
               sums (fq_kernels.rules.RowStat); rows not rounded get zeros, but for
               SUMMED_IN_ORDER
    result_quant
               format that the result, rounded at the raw point or not, is rounded to in the end;
               as round_trip(out, result_quant, out=out, quant_rows=..., first_row=...)

    Returns out. Raises TypeError or ValueError naming the argument, with nothing written:
    wrong dtype, last axis not contiguous, out overlapping x in part, eps negative or NaN,
    weight of another length. What a format's own Python function raises leaves out half done.
    """
    cdef fq_rms_norm_args a
    cdef fq_task_fn fn = table.rms_norm_f32
    cdef fq_pool *pool
    cdef int64_t n_rows
    cdef double eps_value
    cdef bint by_function = False
    cdef fq_round_args r
    cdef fq_task_fn round_fn = table.round_trip_f32

    cdef _Array ax = _open("x", x, b"f")
    n_rows = ax.n_rows()
    a.n = ax.n()
    try:
        eps_value = eps
    except TypeError:
        raise TypeError(f"eps must be a number, not {eps!r}") from None
    except OverflowError:
        raise ValueError(f"eps is too large: {eps!r}") from None
    if isnan(eps_value) or eps_value < 0:
        raise ValueError(f"eps must be >= 0, not {eps!r}")
    a.eps = eps_value

    cdef _Array aw
    a.weight = NULL
    if weight is not None:
        aw = _open("weight", weight, b"f")
        if aw.b.ndim != 1 or aw.n() != a.n:
            raise ValueError(f"weight has shape {weight.shape}, rows of x have length {a.n}")
        a.weight = <const float *> aw.b.buf
    if point not in ("raw", "weighted"):
        raise ValueError(f"point must be 'raw' or 'weighted', not {point!r}")
    a.quant_weighted = point == "weighted"
    a.quant = 0
    a.seed = 0
    fmt = _format_of(quant)
    if fmt is not None:
        a.quant = fmt.kernel_rule
        a.seed = fmt.seed
        by_function = a.quant == 0
        if by_function:
            fmt.family  # raises if it is registered no more
            if not a.quant_weighted:
                a.weight = NULL
    result_format = _format_of(result_quant)
    r.quant = 0 if result_format is None else result_format.kernel_rule
    if result_format is not None and r.quant == 0:
        result_format.family  # raises if it is registered no more
    _which_rows(quant_rows, n_rows, &a.quant_begin, &a.quant_end)
    _index_of_first(first_row, &a.first_row)

    cdef _Array ast
    a.stats = NULL
    if row_stats is not None:
        ast = _stats_of(row_stats, n_rows)
        a.stats = <double *> ast.b.buf
    cdef _Array ao = _output(out, b"f", ax)
    if weight is not None:
        _apart(ao, aw)
    if row_stats is not None:
        _apart(ao, ast)
        _apart(ast, ax)
        if weight is not None:
            _apart(ast, aw)
    pool = _pool_of(executor)
    ax.rows(&a.x)
    ao.rows(&a.out)
    a.stream = n_rows * a.n >= STREAM_ELEMENTS and ao.b.buf != ax.b.buf
    if row_stats is not None:
        row_stats.fill(0.0)
    if a.n > 0 and n_rows > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.n)
    if by_function:
        _round_by_function(fmt, ao.array, a.quant_begin, a.quant_end, row_stats,
                           None if a.quant_weighted else weight, executor)
    if r.quant != 0:
        r.x = r.out = a.out
        r.n = a.n
        r.seed = result_format.seed
        r.first_row = a.first_row
        r.quant_begin = a.quant_begin
        r.quant_end = a.quant_end
        r.stream = 0
        r.stats = NULL
        if a.n > 0 and n_rows > 0:
            with nogil:
                _run(pool, round_fn, &r, n_rows, a.n)
    elif result_format is not None:
        _round_by_function(result_format, ao.array, a.quant_begin, a.quant_end, None, None, executor)
    return ao.array


cdef _round(fq_task_fn fn, x, const char *in_code, out, const char *out_code, fmt, executor, str name_x="x",
            quant_rows=None, first_row=0, row_stats=None):
    cdef fq_round_args a
    cdef fq_pool *pool
    cdef int64_t n_rows
    cdef _Array ax = _open(name_x, x, in_code)
    a.n = ax.n()
    n_rows = ax.n_rows()
    a.quant = fmt.kernel_rule
    a.seed = fmt.seed
    if a.quant == 0:
        fmt.family  # raises if it is registered no more
    _which_rows(quant_rows, n_rows, &a.quant_begin, &a.quant_end)
    _index_of_first(first_row, &a.first_row)
    cdef _Array ast
    a.stats = NULL
    if row_stats is not None:
        ast = _stats_of(row_stats, n_rows)
        a.stats = <double *> ast.b.buf
    cdef _Array ao = _output(out, out_code, ax)
    if row_stats is not None:
        _apart(ao, ast)
        _apart(ast, ax)
    pool = _pool_of(executor)
    if row_stats is not None:
        row_stats.fill(0.0)
    if a.quant == 0:
        if ao.b.buf != ax.b.buf:
            ao.array[...] = ax.array
        _round_by_function(fmt, ao.array, a.quant_begin, a.quant_end, row_stats, None, executor)
        return ao.array
    ax.rows(&a.x)
    ao.rows(&a.out)
    a.stream = n_rows * a.n >= STREAM_ELEMENTS and ao.b.buf != ax.b.buf
    if a.n > 0 and n_rows > 0:
        # one long row is as much work as many: cut it where it is contiguous
        if a.x.ndim == 1 and a.x.shape[0] == 1 and row_stats is None and quant_rows is None and a.first_row == 0:
            n_rows = a.n
            a.n = 1
            a.quant_end = n_rows
            a.x.shape[0] = a.out.shape[0] = n_rows
            a.x.stride[0] = ax.b.itemsize
            a.out.stride[0] = ao.b.itemsize
        with nogil:
            _run(pool, fn, &a, n_rows, a.n)
    return ao.array


def round_trip(x, quant, *, out=None, executor=None, quant_rows=None, first_row=0, row_stats=None):
    """Each element of x rounded to the format ``quant`` and widened again.

    x (..., n) float32; out, quant_rows, first_row and row_stats as in rms_norm_f32; rows that
    are not rounded are copied. Returns out. Stochastic rounding counts elements in C order
    from first_row * n.
    """
    return _round(table.round_trip_f32, x, b"f", out, b"f", _format_of(quant or get_format(quant)), executor, "x",
                  quant_rows, first_row, row_stats)


def _bf16(rounding, seed):
    fmt = _formats.get((rounding, seed)) if type(rounding) is str and type(seed) is int else None
    if fmt is not None:
        return fmt
    if rounding not in roundings("bf16"):
        raise ValueError(f"rounding must be one of {', '.join(roundings('bf16'))}, not {rounding!r}")
    try:
        fmt = get_format(Format("bf16", rounding, operator.index(seed)))
    except TypeError:
        raise TypeError(f"seed must be an integer, not {seed!r}") from None
    return _keep((rounding, seed), fmt)


def bf16_round_trip(x, *, rounding="nearest-even", seed=0, out=None, executor=None):
    """float32 -> bf16 -> float32, by ggml's rule or a named variant (src/rounding.h).

    x (..., n) float32, last axis contiguous; ``out=x`` works in place. rounding is one of
    nearest-even, nearest-even-ftz, truncate, nearest-away, stochastic (which uses seed).
    Raises TypeError or ValueError naming the argument, with nothing written.
    """
    return round_trip(x, _bf16(rounding, seed), out=out, executor=executor)


def float_to_bf16(x, *, rounding="nearest-even", seed=0, executor=None):
    """(..., n) float32 -> bf16 codes, uint16 of the same shape."""
    return _round(table.float_to_bf16, x, b"f", None, b"H", _bf16(rounding, seed), executor)


def bf16_to_float(bits, *, executor=None):
    """(..., n) uint16 bf16 codes -> float32 of the same shape, exactly."""
    fmt = _bf16("nearest-even", 0)
    return _round(table.bf16_to_float, bits, b"H", None, b"f", fmt, executor, "bits")

# ---------------------------------------------------------------- packed weights

# ggml type number -> (elements per block, bytes per block), for the types that C unpacks
PACKED_TYPES = {
    0: (1, 4), 1: (1, 2), 30: (1, 2),
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
}

MATVEC_MAX_TOKENS = FQ_MATVEC_MAX_TOKENS


cdef int64_t _row_length(packed, ggml_type) except -1:
    if ggml_type not in PACKED_TYPES:
        raise ValueError(f"ggml type {ggml_type} has no kernel; there are {sorted(PACKED_TYPES)}")
    block, size = PACKED_TYPES[ggml_type]
    if packed.shape[-1] % size:
        raise ValueError(f"packed rows of {packed.shape[-1]} bytes are not whole blocks of {size} bytes")
    return packed.shape[-1] // size * block


def dequantize(packed, int ggml_type, *, out=None, executor=None):
    """Packed rows to float32, bit-equal to gguf-py's reference (src/dequant.h).

    packed (..., row_bytes) uint8, last axis contiguous; ggml_type is ggml's number for the
    tensor type, one of PACKED_TYPES. out, if given, is float32 (..., n) with the same outer
    shape. Returns out. Raises TypeError or ValueError naming the argument.
    """
    cdef fq_dequant_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.dequantize
    cdef int64_t n_rows
    cdef _Array ap = _open("packed", packed, b"B")
    a.n = _row_length(packed, ggml_type)
    a.fn = table.dequant[ggml_type]
    shape = packed.shape[:-1] + (a.n,)
    if out is None:
        out = np.empty(shape, np.float32)
    cdef _Array ao = _open("out", out, b"f", True)
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, the rows unpack to {shape}")
    if ao.overlaps(ap):
        raise ValueError("out overlaps packed")
    if ao.overlaps_itself():
        raise ValueError("out has elements that share memory")
    pool = _pool_of(executor)
    n_rows = ap.n_rows()
    ap.rows(&a.packed)
    ao.rows(&a.out)
    if a.n > 0 and n_rows > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.n)
    return out


def matvec(x, packed, int ggml_type, *, out=None, executor=None):
    """x @ unpacked(packed).T for few tokens; each packed row comes from memory once.

    x (n_tokens, k) float32 C-contiguous, n_tokens <= MATVEC_MAX_TOKENS; packed (n, row_bytes)
    uint8 C-contiguous. Returns out, (n_tokens, n) float32. The bits depend on neither
    threads, instruction set nor n_tokens. Raises TypeError or ValueError naming the argument.
    """
    cdef fq_matvec_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.matvec
    cdef int64_t n_rows
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array ap = _open("packed", packed, b"B")
    a.k = _row_length(packed, ggml_type)
    if x.ndim != 2 or not x.flags.c_contiguous or x.shape[1] != a.k:
        raise ValueError(f"x must be C-contiguous of shape (n_tokens, {a.k}), not {x.shape}")
    if x.shape[0] > FQ_MATVEC_MAX_TOKENS:
        raise ValueError(f"x has {x.shape[0]} tokens; matvec takes at most {FQ_MATVEC_MAX_TOKENS}")
    if packed.ndim != 2 or not packed.flags.c_contiguous:
        raise ValueError("packed must be C-contiguous of shape (n, row_bytes)")
    n_rows = packed.shape[0]
    if out is None:
        out = np.empty((x.shape[0], n_rows), np.float32)
    cdef _Array ao = _open("out", out, b"f", True)
    if out.shape != (x.shape[0], n_rows) or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous of shape {(x.shape[0], n_rows)}, not {out.shape}")
    if ao.overlaps(ax) or ao.overlaps(ap):
        raise ValueError("out overlaps an input")
    a.type = ggml_type
    a.fn = table.dequant[ggml_type]
    a.packed = <const uint8_t *> ap.b.buf
    a.row_bytes = packed.shape[1]
    a.x = <const float *> ax.b.buf
    a.x_stride = a.k
    a.out = <float *> ao.b.buf
    a.out_stride = n_rows
    a.n_tokens = x.shape[0]
    pool = _pool_of(executor)
    if n_rows > 0 and a.n_tokens > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.k)
    return out


def has_mul_mat():
    """Whether ``mul_mat`` has a kernel for the instruction set in use."""
    return table.mul_mat != NULL


cdef int64_t _panels_per_range(int64_t panels, int64_t threads) noexcept:
    """Several, which read x from one another's cache, but as few as it takes to end together."""
    cdef int64_t best = 1, best_time = (panels + threads - 1) // threads, time, n
    for n in range(2, FQ_MUL_MAT_PANELS + 1):
        time = ((panels + n - 1) // n + threads - 1) // threads * n
        if time <= best_time:
            best = n
            best_time = time
    return best


def mul_mat(x, packed, int ggml_type, *, out, executor=None):
    """x @ unpacked(packed).T for any number of tokens, into out.

    x (n_tokens, k) float32 and out (n_tokens, n) float32, last axis contiguous; packed
    (n, row_bytes) uint8 C-contiguous. Rows of x a multiple of 4096 bytes apart share cache
    lines, which costs some 5 %. Returns out. The bits depend on neither threads nor n_tokens.
    Raises TypeError or ValueError naming the argument, RuntimeError where the instruction set
    in use has no such kernel (``has_mul_mat``).
    """
    cdef fq_mul_mat_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.mul_mat
    cdef int64_t panels, grain
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array ap = _open("packed", packed, b"B")
    cdef _Array ao = _open("out", out, b"f", True)
    a.k = _row_length(packed, ggml_type)
    if fn == NULL:
        raise RuntimeError(f"mul_mat has no kernel for {isa()}")
    if packed.ndim != 2 or not packed.flags.c_contiguous:
        raise ValueError("packed must be C-contiguous of shape (n, row_bytes)")
    a.n_rows = packed.shape[0]
    if out.ndim != 2 or out.shape[1] != a.n_rows:
        raise ValueError(f"out must be of shape (n_tokens, {a.n_rows}), not {out.shape}")
    a.n_tokens = out.shape[0]
    if x.shape != (a.n_tokens, a.k):
        raise ValueError(f"x must be of shape {(a.n_tokens, a.k)}, not {x.shape}")
    _apart(ao, ax)
    _apart(ao, ap)
    if ao.overlaps_itself():
        raise ValueError("out has elements that share memory")
    a.fn = table.dequant[ggml_type]
    a.packed = <const uint8_t *> ap.b.buf
    a.row_bytes = packed.shape[1]
    a.x = <const float *> ax.b.buf
    a.x_stride = ax.b.strides[0] // ax.b.itemsize
    a.out = <float *> ao.b.buf
    a.out_stride = ao.b.strides[0] // ao.b.itemsize
    pool = _pool_of(executor)
    if a.k == 0:
        out.fill(0.0)
    elif a.n_rows > 0 and a.n_tokens > 0:
        panels = (a.n_rows + FQ_MUL_MAT_ROWS - 1) // FQ_MUL_MAT_ROWS
        grain = _panels_per_range(panels, 1 if pool == NULL else fq_pool_threads(pool))
        with nogil:
            fq_pool_run(pool, fn, &a, panels, grain)
    return out


def rope(x, cos, sin, *, executor=None):
    """Rotary embedding in place; elements (2i, 2i+1) of a head are a pair.

    x (n_tokens, n_head, head_dim) float32 C-contiguous; cos and sin (n_tokens, n_rot / 2)
    float32 C-contiguous with n_rot <= head_dim; the rest of a head stays as it is.
    Returns x. Raises TypeError or ValueError naming the argument.
    """
    cdef fq_rope_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.rope
    cdef int64_t n_tokens
    cdef _Array ax = _open("x", x, b"f", True)
    cdef _Array ac = _open("cos", cos, b"f")
    cdef _Array asn = _open("sin", sin, b"f")
    if x.ndim != 3 or not x.flags.c_contiguous:
        raise ValueError("x must be C-contiguous of shape (n_tokens, n_head, head_dim)")
    n_tokens = x.shape[0]
    for name, array in (("cos", cos), ("sin", sin)):
        if array.ndim != 2 or not array.flags.c_contiguous or array.shape != (n_tokens, cos.shape[1]):
            raise ValueError(f"{name} must be C-contiguous of shape (n_tokens, n_rot / 2)")
    if 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"cos rotates {2 * cos.shape[1]} elements, a head of x has {x.shape[2]}")
    a.x = <float *> ax.b.buf
    a.n_head = x.shape[1]
    a.head_dim = x.shape[2]
    a.token_stride = a.n_head * a.head_dim
    a.n_rot = 2 * cos.shape[1]
    a.cos = <const float *> ac.b.buf
    a.sin = <const float *> asn.b.buf
    pool = _pool_of(executor)
    if x.size:
        with nogil:
            _run(pool, fn, &a, n_tokens, a.token_stride)
    return x

# ---------------------------------------------------------------- exponentials


def swiglu(gate, up, *, executor=None):
    """gate = gate / (1 + exp(-gate)) * up, in place (src/exp_ops.h).

    gate and up float32 of one shape, C-contiguous. Returns gate. Raises TypeError or
    ValueError naming the argument.
    """
    cdef fq_swiglu_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.swiglu
    cdef int64_t n
    cdef _Array ag = _open("gate", gate, b"f", True)
    cdef _Array au = _open("up", up, b"f")
    n = gate.size
    for name, array in (("gate", gate), ("up", up)):
        if not array.flags.c_contiguous or array.shape != gate.shape:
            raise ValueError(f"{name} must be C-contiguous of shape {gate.shape}")
    _apart(ag, au)
    a.gate = <float *> ag.b.buf
    a.up = <const float *> au.b.buf
    pool = _pool_of(executor)
    with nogil:
        _run(pool, fn, &a, n, 1)
    return gate


def causal_exp(x, n_first):
    """The exponentials of a causal softmax, in place (src/exp_ops.h).

    x (heads, rows, n) float32 C-contiguous. Row i keeps n_first + i elements, which become
    exp(element - their maximum); the others become 0. Returns the sums, float32 (heads, rows).
    Raises TypeError or ValueError naming the argument. Runs on the calling thread.
    """
    cdef fq_causal_exp_args a
    cdef fq_task_fn fn = table.causal_exp
    cdef int64_t n_rows
    cdef _Array ax = _open("x", x, b"f", True)
    if x.ndim != 3 or not x.flags.c_contiguous:
        raise ValueError("x must be C-contiguous of shape (heads, rows, n)")
    a.x = <float *> ax.b.buf
    a.n_rows = x.shape[1]
    a.n = x.shape[2]
    if not isinstance(n_first, int) or not 1 <= n_first <= a.n - a.n_rows + 1:
        raise ValueError(f"n_first must be an integer from 1 to {a.n - a.n_rows + 1}, not {n_first!r}")
    a.n_first = n_first
    sums = np.empty(x.shape[:2], np.float32)
    cdef _Array asum = _open("sums", sums, b"f", True)
    a.sums = <float *> asum.b.buf
    n_rows = sums.size
    with nogil:
        fq_pool_run(NULL, fn, &a, n_rows, n_rows)
    return sums


def log_sum_exp(x, *, executor=None):
    """m and ln(sum(exp(x - m))) of each row of x, float64 (rows, 2), where m is its maximum.

    Added up they are ln(sum(exp(x))), but where m is huge the second would be lost. x is
    (rows, n) float32, its last axis contiguous (src/exp_ops.h). Raises TypeError or ValueError
    naming the argument.
    """
    cdef fq_log_sum_exp_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.log_sum_exp
    cdef int64_t n_rows
    cdef _Array ax = _open("x", x, b"f")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be of shape (rows, n) with n > 0, not {x.shape}")
    n_rows = x.shape[0]
    out = np.empty((n_rows, 2))
    cdef _Array ao = _open("out", out, b"d", True)
    a.x = <const float *> ax.b.buf
    a.stride = ax.b.strides[0] // ax.b.itemsize
    a.n = x.shape[1]
    a.out = <double *> ao.b.buf
    pool = _pool_of(executor)
    if n_rows > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.n)
    return out
