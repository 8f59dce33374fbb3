# The model's other operations: rotary embedding, SwiGLU, exponentials of the attention and the logits.

from libc.stdint cimport int64_t

import numpy as np


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
