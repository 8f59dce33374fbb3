# The model's other operations: rotary embedding, gated activations, attention, exponentials of the logits.

from libc.math cimport isfinite, sqrt
from libc.stdint cimport int64_t

import numpy as np

# Of more tokens than matvec takes: longer heads go another way, with all scores in memory.
ATTENTION_MAX_DIM = FQ_ATTEND_MAX_DIM


def rope(x, cos, sin, *, neox=False, executor=None):
    """Rotary embedding in place; elements (2i, 2i+1) of a head are a pair, or with neox elements
    (i, i + n_rot / 2).

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
    cdef _Array table_of
    if not ax.dense(3):
        raise ValueError("x must be C-contiguous of shape (n_tokens, n_head, head_dim)")
    n_tokens, a.n_head, a.head_dim = ax.b.shape[0], ax.b.shape[1], ax.b.shape[2]
    for table_of in (ac, asn):
        if not table_of.dense(2) or table_of.b.shape[0] != n_tokens or table_of.b.shape[1] != ac.b.shape[1]:
            raise ValueError(f"{table_of.name} must be C-contiguous of shape (n_tokens, n_rot / 2)")
        _apart(ax, table_of)
    a.n_rot = 2 * ac.b.shape[1]
    if a.n_rot > a.head_dim:
        raise ValueError(f"cos rotates {a.n_rot} elements, a head of x has {a.head_dim}")
    a.neox = bool(neox)
    a.x = <float *> ax.b.buf
    a.token_stride = a.n_head * a.head_dim
    a.cos = <const float *> ac.b.buf
    a.sin = <const float *> asn.b.buf
    pool = _pool_of(executor)
    if n_tokens > 0 and a.token_stride > 0:
        with nogil:
            _run(pool, fn, &a, n_tokens, a.token_stride)
    return x


def attention(q, k, v, k_cache, v_cache, n_past, *, scale=None, window=0, soft_cap=0.0, out,
              decoding=False, executor=None):
    """Causal attention of n_tokens after n_past others of one sequence (src/attention/contract.h).

    q (n_tokens, n_head, d), k and v (n_tokens, n_head_kv, d), k_cache and v_cache
    (n_head_kv, n_ctx, d): all float32 C-contiguous, n_head a multiple of n_head_kv. k and v are
    written to the caches at n_past. The scores are multiplied by scale, 1 / sqrt(d) by default, and
    with a soft_cap become soft_cap * tanh(score / soft_cap). A token sees itself and those before it, or with a
    window that many in all. out is float32 (n_tokens, n_head * d), its last axis contiguous. With decoding up to
    MATVEC_MAX_TOKENS tokens are added up in another order, which is faster; so they are where d is more than
    ATTENTION_MAX_DIM. The bits depend on nothing else, neither on threads nor on the instruction set. Returns
    out. Raises TypeError or ValueError naming the argument.
    """
    cdef fq_attention_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn
    cdef int64_t tasks, n_ctx, few, end
    cdef _Array aq = _open("q", q, b"f")
    cdef _Array ak = _open("k", k, b"f")
    cdef _Array av = _open("v", v, b"f")
    cdef _Array akc = _open("k_cache", k_cache, b"f", True)
    cdef _Array avc = _open("v_cache", v_cache, b"f", True)
    cdef _Array ao = _open("out", out, b"f", True)
    cdef _Array scores
    cdef _Array array, other
    for array in (aq, ak, av, akc, avc):
        if not array.dense(3):
            raise ValueError(f"{array.name} must be C-contiguous with three axes")
    a.n_tokens, a.n_head, a.d = aq.b.shape[0], aq.b.shape[1], aq.b.shape[2]
    a.n_head_kv, n_ctx = akc.b.shape[0], akc.b.shape[1]
    if akc.b.shape[2] != a.d or a.n_head_kv == 0 or a.n_head % a.n_head_kv != 0:
        raise ValueError(f"k_cache of shape {k_cache.shape} does not fit q of shape {q.shape}")
    if not _same_shape(avc, akc):
        raise ValueError(f"v_cache must be of shape {k_cache.shape}, not {v_cache.shape}")
    if not isinstance(n_past, int) or not 0 <= n_past <= n_ctx - a.n_tokens:
        raise ValueError(f"n_past must be an integer from 0 to {n_ctx - a.n_tokens}, not {n_past!r}")
    if not isinstance(window, int) or not 0 <= window < 1 << 62:
        raise ValueError(f"window must be an integer from 0, not {window!r}")
    a.window = 0 if window >= n_ctx else window  # of more tokens than there are: all
    a.soft_cap = _soft_cap_of(soft_cap, True)
    for array in (ak, av):
        if array.b.shape[0] != a.n_tokens or array.b.shape[1] != a.n_head_kv or array.b.shape[2] != a.d:
            raise ValueError(
                f"{array.name} must be of shape {(a.n_tokens, a.n_head_kv, a.d)}, not {array.array.shape}")
    if ao.b.ndim != 2 or ao.b.shape[0] != a.n_tokens or ao.b.shape[1] != a.n_head * a.d:
        raise ValueError(f"out must be of shape {(a.n_tokens, a.n_head * a.d)}, not {out.shape}")
    for array in (akc, avc, ao):
        for other in (aq, ak, av, akc, avc):
            if array is not other:
                _apart(array, other)
    if ao.overlaps_itself():
        raise ValueError("out has elements that share memory")
    if ao.low == ao.high:
        return out
    a.q = <const float *> aq.b.buf
    a.k = <float *> akc.b.buf
    a.v = <float *> avc.b.buf
    a.kv_stride = n_ctx * a.d
    a.out = <float *> ao.b.buf
    a.out_stride = ao.b.strides[0] // ao.b.itemsize
    a.n_past = n_past
    a.scale = 1.0 / sqrt(<double> a.d) if scale is None else <double> scale
    pool = _pool_of(executor)
    fq_attend_append(&a, <const float *> ak.b.buf, <const float *> av.b.buf)
    if a.d <= FQ_ATTEND_MAX_DIM and not (decoding and a.n_tokens <= FQ_MATVEC_MAX_TOKENS):
        fn = table.attend_many
        tasks = a.n_head_kv * fq_attend_blocks(a.n_tokens, a.n_head, a.n_head_kv, a.d)
        with nogil:
            fq_pool_run(pool, fn, &a, tasks, 1)
    else:
        fn = table.attend_few
        # some at a time: the scores of a whole prompt would take much memory
        few, end = min(a.n_tokens, FQ_MATVEC_MAX_TOKENS), a.n_past + a.n_tokens
        scores = _open("scores", np_empty((few, a.n_head, end), np.float32), b"f")
        a.scores = <float *> scores.b.buf
        with nogil:
            while a.n_past < end:
                a.n_tokens = min(few, end - a.n_past)
                _run(pool, fn, &a, a.n_tokens * a.n_head, (a.n_past + a.n_tokens) * a.d)
                a.q += a.n_tokens * a.n_head * a.d
                a.out += a.n_tokens * a.out_stride
                a.n_past += a.n_tokens
    return out


cdef float _soft_cap_of(value, bint or_none) except? -1:
    cdef double given = value
    cdef float cap = <float> given
    if not isfinite(cap) or given < 0 or (cap == 0 and not (or_none and given == 0)):
        raise ValueError(f"soft_cap must be a positive number{', or 0 for none' if or_none else ''}, not {value!r}")
    return cap


def soft_cap(x, cap, *, executor=None):
    """x = cap * tanh(x / cap), in place (src/exp/contract.h).

    x float32, C-contiguous. Returns x. Raises TypeError or ValueError naming the argument.
    """
    cdef fq_soft_cap_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.soft_cap
    cdef int64_t n
    cdef _Array ax = _open("x", x, b"f", True)
    if not ax.dense(ax.b.ndim):
        raise ValueError("x must be C-contiguous")
    n = ax.n_rows() * ax.n()
    a.x = <float *> ax.b.buf
    a.cap = _soft_cap_of(cap, False)
    pool = _pool_of(executor)
    with nogil:
        _run(pool, fn, &a, n, 1)
    return x


def swiglu(gate, up, *, executor=None):
    """gate = gate / (1 + exp(-gate)) * up, in place (src/exp/contract.h).

    gate and up float32 of one shape, C-contiguous. Returns gate. Raises TypeError or
    ValueError naming the argument.
    """
    return _glu(table.swiglu, gate, up, executor)


def geglu(gate, up, *, executor=None):
    """gate = GELU(gate) * up with GELU's approximation by tanh, in place (src/exp/contract.h).

    gate and up float32 of one shape, C-contiguous. Returns gate. Raises TypeError or
    ValueError naming the argument.
    """
    return _glu(table.geglu, gate, up, executor)


cdef _glu(fq_task_fn fn, gate, up, executor):
    cdef fq_glu_args a
    cdef fq_pool *pool
    cdef int64_t n
    cdef _Array ag = _open("gate", gate, b"f", True)
    cdef _Array au = _open("up", up, b"f")
    cdef _Array array
    n = ag.n_rows() * ag.n()
    for array in (ag, au):
        if not array.dense(ag.b.ndim) or not _same_shape(array, ag):
            raise ValueError(f"{array.name} must be C-contiguous of shape {gate.shape}")
    _apart(ag, au)
    a.gate = <float *> ag.b.buf
    a.up = <const float *> au.b.buf
    pool = _pool_of(executor)
    with nogil:
        _run(pool, fn, &a, n, 1)
    return gate


def causal_exp(x, n_first, window=0):
    """The exponentials of a causal softmax, in place (src/exp/contract.h).

    x (heads, rows, n) float32 C-contiguous. Row i keeps n_first + i elements, or with a window the last
    so many of these, which become exp(element - their maximum); the others become 0. Returns the sums, float32 (heads, rows).
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
    if not isinstance(window, int) or not 0 <= window < 1 << 62:
        raise ValueError(f"window must be an integer from 0, not {window!r}")
    a.window = window
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
    (rows, n) float32, its last axis contiguous (src/exp/contract.h). Raises TypeError or ValueError
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


def log_softmax(x, *, log_p, p, executor=None):
    """The logarithm of each row's softmax into log_p, and its softmax into p (src/exp/contract.h).

    x (rows, n) float32, its last axis contiguous; log_p and p (rows, n) float64 C-contiguous. Raises TypeError or
    ValueError naming the argument.
    """
    cdef fq_log_softmax_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.log_softmax
    cdef int64_t n_rows
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array al = _open("log_p", log_p, b"d", True)
    cdef _Array ap = _open("p", p, b"d", True)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be of shape (rows, n) with n > 0, not {x.shape}")
    for name, array in (("log_p", log_p), ("p", p)):
        if not array.flags.c_contiguous or array.shape != x.shape:
            raise ValueError(f"{name} must be C-contiguous of shape {x.shape}")
    _apart(al, ap)
    _apart(al, ax)
    _apart(ap, ax)
    n_rows = x.shape[0]
    a.x = <const float *> ax.b.buf
    a.stride = ax.b.strides[0] // ax.b.itemsize
    a.n = x.shape[1]
    a.log_p = <double *> al.b.buf
    a.p = <double *> ap.b.buf
    pool = _pool_of(executor)
    if n_rows > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.n)


def exp(x):
    """exp of a number or of each element of a float64 array, with the same bits on every machine
    (src/elementary/contract.h). Returns a number or a new array."""
    return _elementary(FQ_EXP, x)


def log(x):
    """The natural logarithm, as `exp`."""
    return _elementary(FQ_LOG, x)


def cos(x):
    """The cosine of radians, as `exp`."""
    return _elementary(FQ_COS, x)


def sin(x):
    """The sine of radians, as `exp`."""
    return _elementary(FQ_SIN, x)


cdef _elementary(int fn, x):
    cdef fq_elementary_args a
    cdef double one
    cdef int64_t n = 1
    cdef _Array ax
    a.fn = fn
    if isinstance(x, (int, float, np.number)):
        one = x
        a.x = a.out = &one
        fq_pool_run(NULL, table.elementary, &a, n, n)
        return one
    out = np.array(x, np.float64, order="C", ndmin=1)
    ax = _open("x", out, b"d", True)
    a.x = a.out = <double *> ax.b.buf
    n = out.size
    with nogil:
        fq_pool_run(NULL, table.elementary, &a, n, n)
    return out.reshape(np.shape(x))


def kl_divergence(x, log_p, p, *, executor=None):
    """KL divergence of each row of p from softmax of the logits x: the sum of p * (log_p - ln softmax(x)).

    x (rows, n) float32, its last axis contiguous; log_p and p (rows, n) float64 C-contiguous.
    Returns float64 (rows, 3): m and ln(sum) of log_sum_exp(x), then the divergence, from terms
    none of which is below 0 (src/exp/contract.h). Each row of p must add up to 1.
    Raises TypeError or ValueError naming the argument.
    """
    cdef fq_kl_divergence_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.kl_divergence
    cdef int64_t n_rows
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array al = _open("log_p", log_p, b"d")
    cdef _Array ap = _open("p", p, b"d")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be of shape (rows, n) with n > 0, not {x.shape}")
    for name, array in (("log_p", log_p), ("p", p)):
        if not array.flags.c_contiguous or array.shape != x.shape:
            raise ValueError(f"{name} must be C-contiguous of shape {x.shape}")
    n_rows = x.shape[0]
    out = np.empty((n_rows, 3))
    cdef _Array ao = _open("out", out, b"d", True)
    a.x = <const float *> ax.b.buf
    a.log_p = <const double *> al.b.buf
    a.p = <const double *> ap.b.buf
    a.stride = ax.b.strides[0] // ax.b.itemsize
    a.n = x.shape[1]
    a.out = <double *> ao.b.buf
    pool = _pool_of(executor)
    if n_rows > 0:
        with nogil:
            _run(pool, fn, &a, n_rows, a.n)
    return out
