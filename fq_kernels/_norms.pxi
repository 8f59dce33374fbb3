# rms_norm_f32, round trips, conversions to and from bf16.

from libc.math cimport isnan
from libc.stdint cimport int64_t, uint64_t

import operator
import threading

import numpy as np

from .formats import Format, get_format, roundings
from .formats.blocks import check_length, rotated

N_STATS = FQ_STAT_COUNT

# Output from which on it is written past the cache: it would not stay there anyway, and a
# line that is written whole need not be read first.
cdef int64_t STREAM_ELEMENTS = 1 << 19

# formats already parsed, by what was asked for: parsing takes longer than a row
cdef dict _formats = {}

# the last one given as a Format: a graph's norms are rounded to one and the same, again and again
cdef object _last_format = None
cdef object _last_format_lock = threading.Lock()  # for writing it


cdef _renew_locks():
    """In a child: the thread that held one is not there."""
    global _last_format_lock
    _last_format_lock = threading.Lock()



cdef object _keep(key, fmt):
    if len(_formats) < 64:
        _formats[key] = fmt
    return fmt


cdef object _format_of(quant):
    """The format asked for; None for none."""
    global _last_format
    if quant is None or quant is _last_format:
        return quant
    if type(quant) is not str:
        fmt = get_format(quant)
        with _last_format_lock:
            _last_format = fmt
        return fmt
    fmt = _formats.get(quant)
    return _keep(quant, get_format(quant)) if fmt is None else fmt


cdef double _eps_of(eps) except -1:
    cdef double value
    try:
        value = eps
    except TypeError:
        raise TypeError(f"eps must be a number, not {eps!r}") from None
    except OverflowError:
        raise ValueError(f"eps is too large: {eps!r}") from None
    if isnan(value) or value < 0:
        raise ValueError(f"eps must be >= 0, not {eps!r}")
    return value


cdef _Array _weight_of(weight, int64_t n):
    """Of rows of n elements."""
    cdef _Array a = _open("weight", weight, b"f")
    if a.b.ndim != 1 or a.n() != n:
        raise ValueError(f"weight has shape {weight.shape}, rows of x have length {n}")
    return a


cdef int _rounding_of(fmt, int64_t n, fq_rounding *r) except -1:
    """How C rounds rows of n to a format; its quant is 0 for none, and if a Python function rounds to it."""
    r.quant = 0
    r.seed = 0
    r.narrow.count_from = FQ_NEVER
    if fmt is None:
        return 0
    _set_rounding(r, fmt.kernel, n)
    r.seed = fmt.seed
    if r.quant == 0:
        fmt.family  # raises if it is registered no more
    if fmt.options:
        check_length(fmt, n)
        if fmt.static_scale:
            fmt.scales_for(n)
    return 0


cdef int _set_rounding(fq_rounding *r, kernel, int64_t n) except -1:
    """From a formats.kernels.Kernel, for rows of n."""
    cdef _Array each
    r.quant, narrow, blocks = kernel
    if narrow is not None:
        (r.narrow.rounding, r.narrow.shift, r.narrow.min_exponent, r.narrow.unit, r.narrow.flush, r.narrow.largest,
         r.narrow.overflow, r.narrow.one_zero, r.narrow.random_bits, r.narrow.count_from) = narrow
    if blocks is not None:
        (r.blocks.rule, r.blocks.size, r.blocks.hadamard, r.blocks.top, r.blocks.emax, r.blocks.carry,
         r.blocks.outer_top, r.blocks.four, r.blocks.given, r.blocks.scale, r.blocks.zero, scales) = blocks
        r.blocks.scales = NULL
        if scales is not None:  # which the caller's format holds
            each = _open("scales", scales, b"f")
            if each.n() == 1:
                r.blocks.scale = scales[0]
            else:
                r.blocks.scales = <const float *> each.b.buf
    return 0


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


cdef _rows_of(quant_rows):
    """quant_rows, looked at once."""
    cdef int64_t begin, end
    if quant_rows is None:
        return None
    _which_rows(quant_rows, 0, &begin, &end)
    return max(begin, 0), max(end, 0)


cdef _from_row(some, int64_t first):
    """Rows as _rows_of has them, counted from ``first``."""
    return None if some is None else (some[0] - first, some[1] - first)


cdef _row_number(first_row, int64_t begin):
    cdef uint64_t index
    _index_of_first(first_row, &index)
    return index + <uint64_t> begin


cdef bint _needs_all_rows(fmt, other=None):
    return (fmt is not None and fmt.whole_tensor) or (other is not None and other.whole_tensor)


cdef _Array _stats_of(row_stats, int64_t n_rows, _Array out, others):
    """row_stats, checked and set to zeros: after every other check, since it is written. ``others`` are read after
    that; each an _Array or None."""
    if row_stats is None:
        return None
    cdef _Array a = _open("row_stats", row_stats, b"d", True)
    if row_stats.shape != (n_rows, FQ_STAT_COUNT) or not row_stats.flags.c_contiguous:
        raise ValueError(f"row_stats must be C-contiguous of shape {(n_rows, FQ_STAT_COUNT)}, "
                         f"not {row_stats.shape}")
    _apart(out, a)
    for other in others:
        if other is not None:
            _apart(a, other)
    row_stats.fill(0.0)
    return a


# Rows of one call of a format's Python function, at least: few enough that threads can share them.
cdef int64_t FUNCTION_ROWS = 64


cdef _count_rows(value, result, row_stats):
    cdef fq_count_args a
    cdef _Array av = _open("value", value, b"f")
    cdef _Array ar = _open("result", result, b"f")
    cdef _Array ast = _open("row_stats", row_stats, b"d", True)
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


def _round_under_one_scale(fmt, rows, begin, end, row_stats, executor):
    """Rows begin to end rounded in place by C, once it is known what they lie between; whether C can."""
    cdef fq_round_args a
    cdef fq_task_fn fn = table.round_trip_f32
    cdef _Array ax, ast
    cdef fq_pool *pool = _pool_of(executor)
    some = rows[begin:end]
    size = fmt.number("had")
    with default_fpu(), np.errstate(all="ignore"):
        values = rotated(some, size) if size else some
        kernel = fmt.tensor_kernel(values.min(), values.max())
    if kernel.quant == 0:
        return False
    ax = _open("x", some, b"f", True)
    a.n = ax.n()
    _set_rounding(&a.rounding, kernel, a.n)
    a.rounding.narrow.count_from = kernel.narrow.count_from if kernel.narrow else FQ_NEVER
    ax.rows(&a.x)
    ax.rows(&a.out)
    a.quant_begin, a.quant_end = 0, end - begin
    a.first_row = a.rounding.seed = a.stream = 0
    a.stats = NULL
    if row_stats is not None:
        ast = _open("row_stats", row_stats[begin:end], b"d", True)
        a.stats = <double *> ast.b.buf
    with nogil:
        _run(pool, fn, &a, a.quant_end, a.n)
    return True


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
    if not fmt.whole_tensor:
        _in_parts(quantise, begin, end, step, executor)
    elif begin < end and not _round_under_one_scale(fmt, rows, begin, end, row_stats, executor):
        quantise(slice(begin, end))
    if weight is not None:
        _in_parts(multiply, 0, len(rows), step, executor)
    if not np.may_share_memory(rows, values):  # strides that no view of two axes has
        values[...] = rows.reshape(values.shape)


def rms_norm_f32(x, *, eps=1e-5, weight=None, quant=None, point="raw", out=None, executor=None,
                 quant_rows=None, first_row=0, row_stats=None, result_quant=None):
    """Root-mean-square norm of each row, bit for bit what ggml computes (src/norm/contract.h).

    x          (..., n) float32, float16 or bfloat16, last axis contiguous, outer axes of any stride. bfloat16
               is ml_dtypes', or its bits as uint16. A tensor of another library in the processor's memory
               (DLPack, as torch has it) is read and written where it is
    eps        added to the mean square; >= 0
    weight     (n,), as x, multiplied in after the norm; None for none
    quant      format (or its name) that the result is rounded to; None for none
    point      "raw": round before the weight; "weighted": after it
    out        None allocates a numpy array of x's type (of a bfloat16 tensor: uint16, its bits), x works in
               place, or another array of x's shape. All is computed in float32; 16 bits are rounded to in the
               end, to nearest even
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
    try:  # a look at each dtype first would cost a row as much as its norm
        return _rms_norm(x, None, None, eps, weight, quant, point, out, executor, quant_rows, first_row, row_stats,
                         result_quant)
    except TypeError:
        if _is_plain(x) and _is_plain(out) and _is_plain(weight):
            raise
    return _rms_norm_of_any(x, eps, weight, quant, point, out, executor, quant_rows, first_row, row_stats, result_quant)


def _rms_norm_of_any(x, eps, weight, quant, point, out, executor, quant_rows, first_row, row_stats, result_quant):
    """The same where an array is of 16 bits, or another library's."""
    given = out
    x, out, held = _numpy_of("x", x), _numpy_of("out", out), _numpy_of("weight", weight)
    weight = _widened(held)
    if _is_sixteen(x) or _is_sixteen(out):
        fmt, result_format, some = _format_of(quant), _format_of(result_quant), _rows_of(quant_rows)

        def norm(values, begin, stats):
            _rms_norm(values, None, None, eps, weight, fmt, point, values, None, _from_row(some, begin),
                      _row_number(first_row, begin), stats, result_format)

        whole = _needs_all_rows(fmt, result_format)
        (out,) = _by_rows(x, None, held, out, None, row_stats, executor, whole, norm)
    else:
        out = _rms_norm(x, None, None, eps, weight, quant, point, out, executor, quant_rows, first_row, row_stats,
                        result_quant)
    return out if given is None else given


def add_rms_norm_f32(x, residual, *, eps=1e-5, weight=None, quant=None, point="raw", out=None, total=None,
                     executor=None, quant_rows=None, first_row=0, row_stats=None):
    """x + residual, and its root-mean-square norm: what a block of a transformer begins with, in one pass.

    residual   as x; the sum is rounded to float32 once, and then to what total holds, which is what is normed
    total      where the sum goes: None allocates, or x or residual itself, or another array apart from both
    out        where the norm goes: None allocates, or an array apart from total: x or residual, if that is not
               total, or another

    The other arguments, and what is raised, are as of rms_norm_f32. Returns (out, total), with the bits of
    ``rms_norm_f32(x + residual, ...)`` and ``x + residual``.
    """
    try:
        return _add_rms_norm(x, residual, eps, weight, quant, point, out, total, executor, quant_rows, first_row,
                             row_stats)
    except TypeError:
        if _is_plain(x) and _is_plain(residual) and _is_plain(out) and _is_plain(total) and _is_plain(weight):
            raise
    return _add_rms_norm_of_any(x, residual, eps, weight, quant, point, out, total, executor, quant_rows, first_row,
                                row_stats)


def _add_rms_norm_of_any(x, residual, eps, weight, quant, point, out, total, executor, quant_rows, first_row,
                         row_stats):
    given = out, total
    x, residual = _numpy_of("x", x), _numpy_of("residual", residual)
    out, total, held = _numpy_of("out", out), _numpy_of("total", total), _numpy_of("weight", weight)
    weight = _widened(held)
    if _is_sixteen(x) or _is_sixteen(residual) or _is_sixteen(out) or _is_sixteen(total):
        _open_floats("residual", residual)
        fmt, some = _format_of(quant), _rows_of(quant_rows)

        def norm(values, begin, stats):
            _rms_norm(values, None, None, eps, weight, fmt, point, values, None, _from_row(some, begin),
                      _row_number(first_row, begin), stats, None)

        made = _by_rows(x, residual, held, out, total, row_stats, executor, _needs_all_rows(fmt), norm)
    else:
        made = _add_rms_norm(x, residual, eps, weight, quant, point, out, total, executor, quant_rows, first_row,
                             row_stats)
    return tuple(new if old is None else old for new, old in zip(made, given))


cdef _add_rms_norm(x, residual, eps, weight, quant, point, out, total, executor, quant_rows, first_row, row_stats):
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array ar = _open("residual", residual, b"f")
    if not _same_shape(ax, ar):
        raise ValueError(f"residual has shape {residual.shape}, x has {x.shape}")
    cdef _Array at = _output(total, b"f", ax, "total")
    _check_output(at, ar)
    if out is None:
        out = np_empty(x.shape, np.float32)
    cdef _Array ao = _output(out, b"f", ar)
    _check_output(ao, ax)
    _apart(ao, at)
    if weight is not None:
        _apart(at, _open("weight", weight, b"f"))
    return _rms_norm(at.array, x, residual, eps, weight, quant, point, ao.array, executor, quant_rows, first_row,
                     row_stats, None), at.array


cdef _rms_norm(x, added, residual, eps, weight, quant, point, out, executor, quant_rows, first_row, row_stats,
               result_quant):
    """rms_norm_f32 of x; where ``added`` is given, x is first made of it and residual."""
    cdef fq_add_rms_norm_args sum
    cdef fq_rms_norm_args a
    cdef fq_task_fn fn = table.rms_norm_f32
    cdef fq_pool *pool
    cdef int64_t n_rows
    cdef bint by_function = False
    cdef fq_round_args r
    cdef fq_task_fn round_fn = table.round_trip_f32

    cdef _Array ax = _open("x", x, b"f")
    n_rows = ax.n_rows()
    a.n = ax.n()
    a.eps = _eps_of(eps)

    cdef _Array aw = None
    a.weight = NULL
    if weight is not None:
        aw = _weight_of(weight, a.n)
        a.weight = <const float *> aw.b.buf
    if point not in ("raw", "weighted"):
        raise ValueError(f"point must be 'raw' or 'weighted', not {point!r}")
    a.quant_weighted = point == "weighted"
    fmt = _format_of(quant)
    _rounding_of(fmt, a.n, &a.rounding)
    by_function = fmt is not None and a.rounding.quant == 0
    if by_function and not a.quant_weighted:
        a.weight = NULL
    result_format = _format_of(result_quant)
    _rounding_of(result_format, a.n, &r.rounding)
    _which_rows(quant_rows, n_rows, &a.quant_begin, &a.quant_end)
    _index_of_first(first_row, &a.first_row)

    cdef _Array ao = _output(out, b"f", ax)
    if aw is not None:
        _apart(ao, aw)
    pool = _pool_of(executor)
    cdef _Array axs = None, ars = None  # of the sum, where x is one
    if added is not None:
        axs, ars = _open("x", added, b"f"), _open("residual", residual, b"f")
    cdef _Array ast = _stats_of(row_stats, n_rows, ao, (ax, aw, axs, ars))
    a.stats = NULL if ast is None else <double *> ast.b.buf
    ax.rows(&a.x)
    ao.rows(&a.out)
    a.stream = n_rows * a.n >= STREAM_ELEMENTS and ao.b.buf != ax.b.buf
    if a.n > 0 and n_rows > 0:
        if added is None:
            with nogil:
                _run(pool, fn, &a, n_rows, a.n)
        else:
            fn = table.add_rms_norm_f32
            axs.rows(&sum.x)
            ars.rows(&sum.residual)
            sum.norm, sum.total = a, a.x
            with nogil:
                _run(pool, fn, &sum, n_rows, a.n)
    if by_function:
        _round_by_function(fmt, ao.array, a.quant_begin, a.quant_end, row_stats,
                           None if a.quant_weighted else weight, executor)
    if r.rounding.quant != 0:
        r.x = r.out = a.out
        r.n = a.n
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
    _rounding_of(fmt, a.n, &a.rounding)
    _which_rows(quant_rows, n_rows, &a.quant_begin, &a.quant_end)
    _index_of_first(first_row, &a.first_row)
    cdef _Array ao = _output(out, out_code, ax)
    pool = _pool_of(executor)
    cdef _Array ast = _stats_of(row_stats, n_rows, ao, (ax,))
    a.stats = NULL if ast is None else <double *> ast.b.buf
    if a.rounding.quant == 0:
        if ao.b.buf != ax.b.buf:
            ao.array[...] = ax.array
        _round_by_function(fmt, ao.array, a.quant_begin, a.quant_end, row_stats, None, executor)
        return ao.array
    ax.rows(&a.x)
    ao.rows(&a.out)
    a.stream = n_rows * a.n >= STREAM_ELEMENTS and ao.b.buf != ax.b.buf
    if a.n > 0 and n_rows > 0:
        # one long row is as much work as many: cut it where it is contiguous
        if (a.x.ndim == 1 and a.x.shape[0] == 1 and a.rounding.quant != FQ_QUANT_BLOCKS
                and row_stats is None and quant_rows is None and a.first_row == 0):
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

    x (..., n), out, quant_rows, first_row and row_stats as in rms_norm_f32; rows that
    are not rounded are copied. Returns out. Stochastic rounding counts elements in C order
    from first_row * n.
    """
    fmt = _format_of(quant or get_format(quant))
    try:
        return _round(table.round_trip_f32, x, b"f", out, b"f", fmt, executor, "x", quant_rows, first_row, row_stats)
    except TypeError:
        if _is_plain(x) and _is_plain(out):
            raise
    return _round_trip_of_any(x, fmt, out, executor, quant_rows, first_row, row_stats)


def _round_trip_of_any(x, fmt, out, executor, quant_rows, first_row, row_stats):
    given = out
    x, out = _numpy_of("x", x), _numpy_of("out", out)
    if _is_sixteen(x) or _is_sixteen(out):
        some = _rows_of(quant_rows)

        def trip(values, begin, stats):
            _round(table.round_trip_f32, values, b"f", values, b"f", fmt, None, "x", _from_row(some, begin),
                   _row_number(first_row, begin), stats)

        (out,) = _by_rows(x, None, None, out, None, row_stats, executor, _needs_all_rows(fmt), trip)
    else:
        out = _round(table.round_trip_f32, x, b"f", out, b"f", fmt, executor, "x", quant_rows, first_row, row_stats)
    return out if given is None else given


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
    """float32 -> bf16 -> float32, by ggml's rule or a named variant (src/rounding/contract.h).

    x (..., n) float32, last axis contiguous; ``out=x`` works in place. rounding is one of
    nearest-even, nearest-even-ftz, truncate, nearest-away, stochastic (which uses seed), up, down, odd.
    Raises TypeError or ValueError naming the argument, with nothing written.
    """
    return round_trip(x, _bf16(rounding, seed), out=out, executor=executor)


def float_to_bf16(x, *, rounding="nearest-even", seed=0, executor=None):
    """(..., n) float32 -> bf16 codes, uint16 of the same shape."""
    return _round(table.float_to_codes, x, b"f", None, b"H", _bf16(rounding, seed), executor)


def bf16_to_float(bits, *, executor=None):
    """(..., n) uint16 bf16 codes -> float32 of the same shape, exactly."""
    fmt = _bf16("nearest-even", 0)
    return _round(table.bf16_to_float, bits, b"H", None, b"f", fmt, executor, "bits")
