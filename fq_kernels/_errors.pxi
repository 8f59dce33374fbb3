# What a rounding's errors are worth: their products with what was rounded and with gradients.

from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

import numpy as np

# That go into one call of error_products.
MAX_GRADS = FQ_MAX_GRADS

# Elements that format_errors rounds at a time, about: they stay in the first cache.
cdef int64_t BLOCK_ELEMENTS = 4096


cdef list _what_errors_meet(fq_error_products_args *a, x, weights, grads):
    """The arrays that are in a now, held: x, weights and grads, all but y and out."""
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array aw = _open("weights", weights, b"f")
    cdef _Array ag = _open("grads", grads, b"f")
    if ax.b.ndim != 2:
        raise ValueError(f"x must be of shape (rows, n), not {x.shape}")
    _check_like(aw, ax)
    if ag.b.ndim != 3 or grads.shape[1:] != x.shape or grads.shape[0] > FQ_MAX_GRADS:
        raise ValueError(
            f"grads must be of shape (n_grads, {x.shape[0]}, {x.shape[1]}) with at most {FQ_MAX_GRADS}, "
            f"not {grads.shape}")
    a.n, a.n_grads = ax.b.shape[1], ag.b.shape[0]
    a.x, a.x_stride = <const float *> ax.b.buf, _row_stride(ax)
    a.weights, a.weights_stride = <const float *> aw.b.buf, _row_stride(aw)
    a.grads, a.grad_stride = <const float *> ag.b.buf, _row_stride(ag)
    a.row_stride = ag.b.strides[1] // ag.b.itemsize
    return [ax, aw, ag]


cdef int64_t _row_stride(_Array a) noexcept:
    """Of its first axis, in elements."""
    return a.b.strides[0] // a.b.itemsize


cdef int _check_like(_Array a, _Array x) except -1:
    if not _same_shape(a, x):
        raise ValueError(f"{a.name} must be of shape {x.array.shape}, not {a.array.shape}")
    return 0


cdef _Array _centre_of(centre, _Array x):
    cdef _Array a = _open("centre", centre, b"f")
    if a.b.ndim != 1 or a.b.shape[0] != x.b.shape[1]:
        raise ValueError(f"centre must be of shape {x.array.shape[1:]}, not {centre.shape}")
    return a


def error_products(x, y, weights, grads, *, executor=None):
    """What a rounding's errors e = y - x are worth, row by row: e.e, e.x, (w e).e, (w e).x with weights w, and e.g
    for each gradient g.

    x, y and weights (rows, n), grads (n_grads, rows, n), up to MAX_GRADS of them: float32, the last axis
    contiguous. Returns float32 (rows, 4 + n_grads) (src/errors/contract.h). Raises TypeError or ValueError naming
    the argument.
    """
    cdef fq_error_products_args a
    cdef fq_task_fn fn = table.error_products
    cdef list held = _what_errors_meet(&a, x, weights, grads)
    cdef _Array ax = held[0]
    cdef _Array ay = _open("y", y, b"f")
    _check_like(ay, ax)
    cdef int64_t n_rows = ax.b.shape[0]
    a.y, a.y_stride = <const float *> ay.b.buf, _row_stride(ay)
    out = np.empty((n_rows, FQ_ERROR_SUMS + a.n_grads), np.float32)
    cdef _Array ao = _open("out", out, b"f", True)
    a.out = <float *> ao.b.buf
    cdef fq_pool *pool = _pool_of(executor)
    if n_rows > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.n * (FQ_ERROR_SUMS + a.n_grads))
    return out


def error_columns(x, y, centre, *, executor=None):
    """How a rounding's errors e = y - x go with what was rounded, column by column: the sums over rows of e and of
    e (x - centre).

    x and y (rows, n) float32, the last axis contiguous, centre (n) float32. Returns float32 (2, n)
    (src/errors/contract.h). Raises TypeError or ValueError naming the argument.
    """
    cdef fq_error_columns_args a
    cdef fq_task_fn fn = table.error_columns
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array ay = _open("y", y, b"f")
    if ax.b.ndim != 2:
        raise ValueError(f"x must be of shape (rows, n), not {x.shape}")
    _check_like(ay, ax)
    cdef _Array ac = _centre_of(centre, ax)
    a.n_rows, a.n = ax.b.shape[0], ax.b.shape[1]
    out = np.empty((2, a.n), np.float32)
    cdef _Array ao = _open("out", out, b"f", True)
    a.out = <float *> ao.b.buf
    a.x, a.x_stride = <const float *> ax.b.buf, _row_stride(ax)
    a.y, a.y_stride = <const float *> ay.b.buf, _row_stride(ay)
    a.centre = <const float *> ac.b.buf
    cdef fq_pool *pool = _pool_of(executor)
    if a.n > 0:
        with nogil:
            _run(pool, fn, &a, a.n, 2 * a.n_rows)
    return out


def format_errors(x, formats, weights, grads, *, centre=None, first_row=0, executor=None):
    """error_products of x rounded to each of several formats, and with ``centre`` error_columns: what was rounded
    is held for a few rows at a time, which are all only where rows are short.

    formats    formats, or their names
    first_row  what stochastic rounding counts the first row as

    The other arguments are as of error_products and error_columns. Returns float32 (formats, rows, 4 + n_grads),
    and (formats, 2, n) or None: columns are summed over 32 rows at a time, and then over those. Raises TypeError
    or ValueError naming the argument, and what a format's own Python function raises.
    """
    given = [_format_of(fmt or get_format(fmt)) for fmt in formats]
    in_c = [i for i, fmt in enumerate(given) if fmt.kernel.quant != 0]
    of_c = _errors_in_c(x, [given[i] for i in in_c], weights, grads, centre, first_row, executor)
    if len(in_c) == len(given):
        return of_c
    products = np.empty((len(given), *of_c[0].shape[1:]), np.float32)
    columns = None if centre is None else np.empty((len(given), *of_c[1].shape[1:]), np.float32)
    products[in_c] = of_c[0]
    if columns is not None:
        columns[in_c] = of_c[1]
    for i in set(range(len(given))).difference(in_c):
        y = round_trip(x, given[i], first_row=first_row, executor=executor)
        products[i] = error_products(x, y, weights, grads, executor=executor)
        if columns is not None:
            pieces = [slice(row, row + FQ_ERROR_ROWS) for row in range(0, len(x), FQ_ERROR_ROWS)]
            of_pieces = [error_columns(x[some], y[some], centre) for some in pieces]
            columns[i] = _sum_of_pieces(np.reshape(of_pieces, (len(pieces), 2, x.shape[1])))
    return products, columns


cdef _sum_of_pieces(pieces):
    with default_fpu(), np.errstate(all="ignore"):
        return np.sum(pieces, axis=0)


cdef _errors_in_c(x, formats, weights, grads, centre, first_row, executor):
    """format_errors where no function in Python rounds."""
    cdef fq_format_errors_args a
    cdef fq_task_fn fn = table.format_errors
    cdef list held = _what_errors_meet(&a.products, x, weights, grads)
    cdef _Array ax = held[0], ac, ap, acs
    cdef int64_t i, n = a.products.n, pieces = (ax.b.shape[0] + FQ_ERROR_ROWS - 1) // FQ_ERROR_ROWS
    a.n_rows, a.n_formats = ax.b.shape[0], len(formats)
    # fours, of which columns' sums are read and written once
    a.block = min(max(BLOCK_ELEMENTS // max(n, 1) // 4 * 4, 4), FQ_ERROR_ROWS)
    _index_of_first(first_row, &a.first_row)
    products = np.empty((a.n_formats, a.n_rows, FQ_ERROR_SUMS + a.products.n_grads), np.float32)
    ap = _open("products", products, b"f", True)
    a.products.out = <float *> ap.b.buf
    columns, a.centre, a.columns = None, NULL, NULL
    if centre is not None:
        ac = _centre_of(centre, ax)
        a.centre = <const float *> ac.b.buf
        columns = np.empty((pieces, a.n_formats, 2, n), np.float32)
        acs = _open("columns", columns, b"f", True)
        a.columns = <float *> acs.b.buf
    cdef fq_pool *pool = _pool_of(executor)
    cdef fq_rounding *roundings = <fq_rounding *> malloc(max(a.n_formats, 1) * sizeof(fq_rounding))
    a.room = NULL
    try:
        if roundings == NULL:
            raise MemoryError
        a.formats = roundings
        for i in range(a.n_formats):
            _rounding_of(formats[i], n, &roundings[i])
        a.room = _floats(max(pieces * a.block * n, 1))
        with nogil:
            fq_pool_run(pool, fn, &a, pieces, 1)
    finally:
        free(roundings)
        free(a.room)
    return products, None if columns is None else _sum_of_pieces(columns)
