# rms_norm_unit: a norm whose steps have formats of their own.

from .units.unit import ORDERS as _ORDERS


cdef int _step(unit, str step, fq_rounding *r) except -1:
    """How C rounds at a step."""
    return _rounding_of(unit.formats.get(step), 1, r)


cdef int _unit_of(unit, fq_unit *u) except -1:
    """The unit as C takes it."""
    root = unit.inverse_root
    order = unit.sum_order
    u.in_double = unit.sums_in_double
    u.order = _ORDERS.index(order.kind)
    u.order_n = order.n
    u.eps_outside = unit.eps_outside
    u.table_bits, u.linear, u.newton = root.table_bits, root.linear, root.newton
    _step(unit, "x", &u.x)
    _step(unit, "square", &u.square)
    _step(unit, "acc", &u.acc)
    _rounding_of(unit.outer_format, 1, &u.outer)
    _step(unit, "mean", &u.mean)
    _step(unit, "rsqrt", &u.rsqrt)
    _step(unit, "raw", &u.raw)
    _step(unit, "out", &u.out)
    return 0


def unit_gains(unit, weight):
    """What a unit multiplies by, (n,) float32, from the weight in the file."""
    one_plus, fmt = unit.gain_rule
    stored = unit.formats.get("weight")
    with default_fpu(), np.errstate(all="ignore"):
        gains = weight - np.float32(1) if one_plus else weight
        if stored is not None:
            gains = round_trip(gains, stored)
        if one_plus:
            gains = gains + np.float32(1)
        return gains if fmt is None else round_trip(gains, fmt)


def rms_norm_unit(x, unit, *, eps=1e-5, weight=None, out=None, executor=None, first_row=0):
    """fq_kernels.rms_norm_unit where C rounds to all formats of the unit (NormUnit.in_c)."""
    cdef fq_unit_args a
    cdef fq_task_fn fn = table.rms_norm_unit
    cdef fq_pool *pool
    cdef int64_t n_rows
    cdef _Array ag = None
    cdef _Array ax = _open("x", x, b"f")
    n_rows = ax.n_rows()
    a.n = ax.n()
    a.eps = _eps_of(eps)
    _index_of_first(first_row, &a.first_row)
    a.gain = NULL
    cdef _Array ao = _output(out, b"f", ax)
    if weight is not None:
        _apart(ao, _weight_of(weight, a.n))
        ag = _weight_of(unit_gains(unit, weight), a.n)
        a.gain = <const float *> ag.b.buf
    pool = _pool_of(executor)
    if a.n == 0 or n_rows == 0:
        return ao.array
    _unit_of(unit, &a.unit)
    ax.rows(&a.x)
    ao.rows(&a.out)
    with nogil:
        _run(pool, fn, &a, n_rows, a.n)
    return ao.array
