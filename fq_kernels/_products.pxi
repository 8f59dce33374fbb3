# Packed weights: unpacking, and products with them.

from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free

import numpy as np

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t, size_t)


# ggml type number -> (elements per block, bytes per block), for the types that C unpacks
PACKED_TYPES = {
    0: (1, 4), 1: (1, 2), 30: (1, 2),
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
}

MATVEC_MAX_TOKENS = FQ_MATVEC_MAX_TOKENS


cdef int64_t[FQ_TYPE_COUNT] _block_elements, _block_bytes
for _type, (_elements, _bytes) in PACKED_TYPES.items():
    _block_elements[_type], _block_bytes[_type] = _elements, _bytes


cdef int _type_of(ggml_type) except -1:
    """One that has a kernel."""
    if operator.index(ggml_type) not in PACKED_TYPES:
        raise ValueError(f"ggml type {ggml_type} has no kernel; there are {sorted(PACKED_TYPES)}")
    return ggml_type


cdef int64_t _row_length(_Array packed, int ggml_type) except -1:
    """Elements of a packed row."""
    cdef int64_t row_bytes = packed.b.shape[packed.b.ndim - 1]
    if row_bytes % _block_bytes[ggml_type]:
        raise ValueError(f"packed rows of {row_bytes} bytes are not whole blocks of {_block_bytes[ggml_type]} bytes")
    return row_bytes // _block_bytes[ggml_type] * _block_elements[ggml_type]


def dequantize(packed, ggml_type, *, out=None, executor=None):
    """Packed rows to float32, bit-equal to gguf-py's reference (src/unpack/contract.h).

    packed (..., row_bytes) uint8, last axis contiguous; ggml_type is ggml's number for the
    tensor type, one of PACKED_TYPES. out, if given, is float32 (..., n) with the same outer
    shape. Returns out. Raises TypeError or ValueError naming the argument.
    """
    cdef fq_dequant_args a
    cdef fq_pool *pool
    cdef fq_task_fn fn = table.dequantize
    cdef int64_t n_rows
    cdef _Array ap = _open("packed", packed, b"B")
    cdef int number = _type_of(ggml_type)
    a.n = _row_length(ap, number)
    a.fn = table.dequant[number]
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


cdef enum:
    MAX_PRODUCTS = 8

MATVECS_MAX = MAX_PRODUCTS

# Products of one x that are handed out together: rows of the second follow those of the first, and so on. For matvec
# "rows" are rows of a weight, for mul_mat they are panels of it.
cdef struct _Products:
    fq_task_fn fn
    int n
    int64_t begin[MAX_PRODUCTS + 1]
    void *each[MAX_PRODUCTS]


cdef void _rows_of_products(void *args, int64_t begin, int64_t end) noexcept nogil:
    cdef _Products *products = <_Products *> args
    cdef int64_t first, last
    cdef int i
    for i in range(products.n):
        first, last = max(begin, products.begin[i]), min(end, products.begin[i + 1])
        if first < last:
            products.fn(products.each[i], first - products.begin[i], last - products.begin[i])


cdef list _outs_for(weights, outs):
    """As many as weights."""
    if outs is None:
        outs = [None] * len(weights)
    if not 0 < len(weights) <= MAX_PRODUCTS or len(outs) != len(weights):
        raise ValueError(f"weights must be 1 to {MAX_PRODUCTS} and outs as many, not {len(weights)} and {len(outs)}")
    return list(outs)


cdef int _outs_apart(list held) except -1:
    """held: of each product the packed rows and out."""
    cdef _Array packed, out
    cdef int i, j
    for i in range(len(held)):
        for j in range(len(held)):
            packed, out = held[j]
            if i != j and ((<_Array> held[i][1]).overlaps(packed) or (<_Array> held[i][1]).overlaps(out)):
                raise ValueError("outs overlap one another or a weight")
    return 0


def matvec(x, packed, ggml_type, *, out=None, executor=None):
    """x @ unpacked(packed).T for few tokens; each packed row comes from memory once.

    x (n_tokens, k) float32 C-contiguous, n_tokens <= MATVEC_MAX_TOKENS; packed (n, row_bytes)
    uint8 C-contiguous. Returns out, (n_tokens, n) float32. The bits depend on neither
    threads, instruction set nor n_tokens. Raises TypeError or ValueError naming the argument.
    """
    return matvecs(x, [(packed, ggml_type)], [out], executor=executor)[0]


def matvecs(x, weights, outs=None, *, executor=None):
    """matvec of one x with several weights, which the threads share as if they were one.

    weights is a list of at most MATVECS_MAX (packed, ggml_type), outs one of as many arrays or None. Returns outs, whose
    bits are those of matvec. Raises TypeError or ValueError naming the argument.
    """
    cdef const fq_kernel_table *now = table  # one set for x's order and for the sums, whoever forces another
    cdef _Products products
    cdef fq_matvec_args each[MAX_PRODUCTS]
    cdef fq_matvec_args *a
    cdef fq_pool *pool = _pool_of(executor)
    cdef int64_t n_tokens, k, padded
    cdef int i, ggml_type
    cdef float *scratch
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array ap, ao
    cdef list held = [], results = []
    outs = _outs_for(weights, outs)
    products.fn, products.n = now.matvec, len(weights)
    products.begin[0] = 0
    k = -1
    for i in range(products.n):
        packed, given = weights[i]
        ggml_type = _type_of(given)
        out = outs[i]
        ap = _open("packed", packed, b"B")
        a = &each[i]
        products.each[i] = a
        a.k = _row_length(ap, ggml_type)
        if not ax.dense(2) or ax.b.shape[1] != a.k:
            raise ValueError(f"x must be C-contiguous of shape (n_tokens, {a.k}), not {x.shape}")
        a.n_tokens = n_tokens = ax.b.shape[0]
        k = a.k
        if n_tokens > FQ_MATVEC_MAX_TOKENS:
            raise ValueError(f"x has {n_tokens} tokens; matvec takes at most {FQ_MATVEC_MAX_TOKENS}")
        if not ap.dense(2):
            raise ValueError("packed must be C-contiguous of shape (n, row_bytes)")
        if out is None:
            out = np_empty((n_tokens, ap.b.shape[0]), np.float32)
        ao = _open("out", out, b"f", True)
        if not ao.dense(2) or ao.b.shape[0] != n_tokens or ao.b.shape[1] != ap.b.shape[0]:
            raise ValueError(f"out must be C-contiguous of shape {(n_tokens, ap.b.shape[0])}, not {out.shape}")
        if ao.overlaps(ax) or ao.overlaps(ap):
            raise ValueError("out overlaps an input")
        a.type = ggml_type
        a.fn = now.dequant[ggml_type]
        a.packed = <const uint8_t *> ap.b.buf
        a.row_bytes = ap.b.shape[1]
        a.x = <const float *> ax.b.buf
        a.x_stride = k
        a.out = <float *> ao.b.buf
        a.out_stride = ap.b.shape[0]
        products.begin[i + 1] = products.begin[i] + ap.b.shape[0]
        held.append((ap, ao))
        results.append(out)
    _outs_apart(held)
    if products.begin[products.n] > 0 and n_tokens > 0:
        padded = n_tokens * ((k + 63) // 64 * 64)
        scratch = _floats(products.n * padded + 16)
        with nogil:
            for i in range(products.n):
                now.matvec_begin(&each[i], scratch + i * padded)
            _run(pool, _rows_of_products, &products, products.begin[products.n], max(k, 1))
            free(scratch)
    return results


cdef float *_floats(int64_t n) except NULL:
    """For free(); at a cache line, so that no vector lies across two."""
    cdef float *room = <float *> aligned_alloc(64, (n * sizeof(float) + 63) // 64 * 64)
    if room == NULL:
        raise MemoryError
    return room


cdef int64_t _panels_per_range(int64_t panels, int64_t threads) noexcept:
    """Several, which read x from one another's cache, but as few as it takes to end together."""
    cdef int64_t best = 1, best_time = (panels + threads - 1) // threads, time, n
    for n in range(2, FQ_MUL_MAT_PANELS + 1):
        time = ((panels + n - 1) // n + threads - 1) // threads * n
        if time <= best_time:
            best = n
            best_time = time
    return best


def mul_mat(x, packed, ggml_type, *, out, executor=None):
    """x @ unpacked(packed).T for any number of tokens, into out.

    x (n_tokens, k) float32 and out (n_tokens, n) float32, last axis contiguous; packed
    (n, row_bytes) uint8 C-contiguous. Returns out. The bits depend on neither threads, instruction set nor
    n_tokens. Raises TypeError or ValueError naming the argument.
    """
    return mul_mats(x, [(packed, ggml_type)], [out], executor=executor)[0]


def mul_mats(x, weights, outs, *, executor=None):
    """mul_mat of one x with several weights, which the threads share as if they were one.

    weights is a list of at most MATVECS_MAX (packed, ggml_type), outs one of as many arrays. Returns outs, whose
    bits are those of mul_mat. Raises TypeError or ValueError naming the argument.
    """
    cdef const fq_kernel_table *now = table  # one set for x's order and for the sums, whoever forces another
    cdef _Products products
    cdef fq_mul_mat_args each[MAX_PRODUCTS]
    cdef fq_mul_mat_args *a
    cdef fq_pool *pool = _pool_of(executor)
    cdef int64_t grain, n_tokens, n, k
    cdef float *packed_x
    cdef int i, ggml_type
    cdef _Array ax = _open("x", x, b"f")
    cdef _Array ap, ao
    cdef list held = []
    outs = _outs_for(weights, outs)
    products.fn, products.n = now.mul_mat, len(weights)
    products.begin[0] = 0
    for i in range(products.n):
        packed, given = weights[i]
        ggml_type = _type_of(given)
        out = outs[i]
        ap = _open("packed", packed, b"B")
        ao = _open("out", out, b"f", True)
        a = &each[i]
        products.each[i] = a
        a.k = k = _row_length(ap, ggml_type)
        if not ap.dense(2):
            raise ValueError("packed must be C-contiguous of shape (n, row_bytes)")
        a.n_rows = ap.b.shape[0]
        if ao.b.ndim != 2 or ao.b.shape[1] != a.n_rows:
            raise ValueError(f"out must be of shape (n_tokens, {a.n_rows}), not {out.shape}")
        n_tokens = ao.b.shape[0]
        if ax.b.ndim != 2 or ax.b.shape[0] != n_tokens or ax.b.shape[1] != k:
            raise ValueError(f"x must be of shape {(n_tokens, k)}, not {x.shape}")
        _apart(ao, ax)
        _apart(ao, ap)
        if ao.overlaps_itself():
            raise ValueError("out has elements that share memory")
        a.fn = now.dequant[ggml_type]
        a.packed = <const uint8_t *> ap.b.buf
        a.row_bytes = ap.b.shape[1]
        a.x = <const float *> ax.b.buf
        a.x_stride = ax.b.strides[0] // ax.b.itemsize
        a.out = <float *> ao.b.buf
        a.out_stride = ao.b.strides[0] // ao.b.itemsize
        products.begin[i + 1] = products.begin[i] + (a.n_rows + FQ_MUL_MAT_ROWS - 1) // FQ_MUL_MAT_ROWS
        held.append((ap, ao))
    _outs_apart(held)
    for out in outs if k == 0 else ():
        out.fill(0.0)
    if k == 0 or products.begin[products.n] == 0 or n_tokens == 0:
        return outs
    grain = _panels_per_range(products.begin[products.n], 1 if pool == NULL else fq_pool_threads(pool))
    packed_x = _floats(min(n_tokens, FQ_MUL_MAT_TOKENS) * k)
    with nogil:
        while n_tokens > 0:
            n = min(n_tokens, FQ_MUL_MAT_TOKENS)
            for i in range(products.n):
                each[i].n_tokens = n
                each[i].packed_x = packed_x
            fq_pool_run(pool, now.mul_mat_begin, &each[0], (k + FQ_MUL_MAT_K - 1) // FQ_MUL_MAT_K, 1)
            fq_pool_run(pool, _rows_of_products, &products, products.begin[products.n], grain)
            for i in range(products.n):
                each[i].x += n * each[i].x_stride
                each[i].out += n * each[i].out_stride
            n_tokens -= n
        free(packed_x)
    return outs
