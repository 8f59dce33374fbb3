# Arrays of 16 bits around kernels of float32, some rows at a time: what stays in the cache.

import numpy as np

cdef object _F32 = np.dtype(np.float32)
cdef object _F16 = np.dtype(np.float16)
cdef object _U16 = np.dtype(np.uint16)


cdef bint _is_plain(array) noexcept:
    """Whether it is float32 in numpy's hands, or nothing that would become so."""
    return array is None or (isinstance(array, np_ndarray) and array.dtype is _F32)


cdef bint _is_sixteen(array):
    """float16, bfloat16 of ml_dtypes, or uint16, which is bfloat16's bits."""
    return isinstance(array, np_ndarray) and array.dtype.itemsize == 2 and array.dtype.isnative and (
        array.dtype in (_F16, _U16) or array.dtype.name == "bfloat16")


cdef object _widened(array, bint copy=False):
    """float32 of an array of 16 bits, new; others as they are, or copied."""
    if not _is_sixteen(array):
        return array.copy() if copy else array
    bits = np.ascontiguousarray(array).view(np.uint16)
    return dequantize(bits.view(np.uint8), FQ_TYPE_F16) if array.dtype == _F16 else bf16_to_float(bits)


cdef _narrow_into(values, out):
    """values, float32, into an array of the same shape, to nearest even."""
    if out.dtype == _F32:
        out[...] = values
    elif out.dtype == _F16:
        _round(table.float_to_codes, values, b"f", out.view(np.uint16), b"H", _format_of("f16"), None)
    else:
        _round(table.float_to_codes, values, b"f", out.view(np.uint16), b"H", _bf16("nearest-even", 0), None)


cdef _Array _open_floats(str name, array, bint writable=False):
    """Checked as float32 is, whichever of the types it has."""
    if _is_sixteen(array):
        return _open(name, array.view(np.uint16), b"H", writable)
    return _open(name, array, b"f", writable)


def _by_rows(x, residual, weight, out, total, row_stats, executor, bint whole, compute):
    """compute(values, begin, row_stats) rounds or norms float32 rows in place: of x, or of x + residual, as total
    keeps it. Arrays are numpy's, and of float32 or 16 bits; returns out and total, made where they are None. weight is
    what compute multiplies by."""
    cdef _Array ax = _open_floats("x", x), a
    cdef _Array dummy = _open("x", np_empty((0, ax.n()), np.float32), b"f")
    cdef int64_t n = ax.n(), n_rows = ax.n_rows()
    _pool_of(executor)
    read = [ax] if residual is None else [ax, _open_floats("residual", residual)]
    if residual is not None and not _same_shape(read[1], ax):
        raise ValueError(f"residual has shape {residual.shape}, x has {x.shape}")
    made, written = [], []
    for name, array in (("out", out),) if residual is None else (("out", out), ("total", total)):
        array = np_empty(x.shape, x.dtype) if array is None else array
        a = _open_floats(name, array, True)
        for other in read:
            _check_output(a, other)
        for other in written:
            _apart(a, other)
        written.append(a)
        made.append(array)
    if weight is not None:
        read.append(_open_floats("weight", weight))
        for a in written:
            _apart(a, read[-1])
    compute(dummy.array, 0, None)  # all that is wrong with the other arguments, before anything is written
    _stats_of(row_stats, n_rows, written[0], read + written[1:])
    if not n or not n_rows:
        return made
    inputs = [array.reshape(-1, n) for array in ((x,) if residual is None else (x, residual))]
    outputs = [array.view(np_ndarray).reshape(-1, n) for array in made]

    def part(rows):
        values = _widened(inputs[0][rows], True)
        if residual is not None:
            with default_fpu(), np.errstate(all="ignore"):
                values += _widened(inputs[1][rows])
            _narrow_into(values, outputs[1][rows])
            if _is_sixteen(outputs[1]):
                values = _widened(outputs[1][rows])
        compute(values, rows.start, None if row_stats is None else row_stats[rows])
        _narrow_into(values, outputs[0][rows])

    _in_parts(part, 0, n_rows, n_rows if whole else max(1, GRAIN // n), executor)
    for array, rows in zip(made, outputs):
        if not np.may_share_memory(array, rows):  # strides that no view of two axes has
            array[...] = rows.reshape(array.shape)
    return made
