"""Causal attention over the cache: by the kernel, or by BLAS where there is none for many tokens."""

from __future__ import annotations

import numpy as np

from fq_kernels import ATTENTION_MAX_DIM, MATVEC_MAX_TOKENS, Executor, attention, causal_exp, has_mul_mat
from fq_kernels import soft_cap as cap_scores

# Tokens per task of attention by BLAS: enough to pay for the hand-out.
ATTENTION_ROWS = 64


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    n_past: int,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    out: np.ndarray,
    executor: Executor,
) -> np.ndarray:
    """Into out (n_tokens, n_head * d); k and v are put into the layer's cache at n_past.

    window and soft_cap are AttentionAttributes'; q (n_tokens, n_head, d), k and v
    (n_tokens, n_head_kv, d), keys and values (n_head_kv, n_ctx, d)
    """
    if len(q) > MATVEC_MAX_TOKENS and not (has_mul_mat() and q.shape[2] <= ATTENTION_MAX_DIM):
        return _attend_by_blas(q, k, v, keys, values, n_past, scale, window, soft_cap, out, executor)
    return attention(
        q,
        k,
        v,
        keys,
        values,
        n_past,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        out=out,
        executor=executor,
    )


def _attend_by_blas(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    n_past: int,
    scale: float,
    window: int,
    soft_cap: float,
    out: np.ndarray,
    executor: Executor,
) -> np.ndarray:
    n_tokens, n_head, d = q.shape
    n_head_kv = len(keys)
    group = n_head // n_head_kv
    now = slice(n_past, n_past + n_tokens)
    keys[:, now] = k.transpose(1, 0, 2)
    values[:, now] = v.transpose(1, 0, 2)
    heads = q.reshape(n_tokens, n_head_kv, group, d)
    out_heads = out.reshape(n_tokens, n_head_kv, group, d)
    factor = np.float32(scale)
    n_blocks = -(-n_tokens // ATTENTION_ROWS)

    def attend_block(task: int) -> None:
        # the last blocks see the most keys: first, so that no thread is left with one
        block, head = divmod(task, n_head_kv)
        begin = (n_blocks - 1 - block) * ATTENTION_ROWS
        end = min(begin + ATTENTION_ROWS, n_tokens)
        n_kv = n_past + end
        first = max(n_past + begin + 1 - window, 0) if window else 0  # what is before it no row sees
        block_q = heads[begin:end, head].transpose(1, 0, 2) * factor  # (group, rows, d)
        with np.errstate(all="ignore"):  # each thread has its own
            # the heads of a group as more rows: one product rather than several
            p = np.matmul(block_q.reshape(-1, d), keys[head, first:n_kv].T)  # (group * rows, n_kv)
            if soft_cap:
                cap_scores(p, soft_cap)
            scores = p.reshape(group, end - begin, n_kv - first)
            sums = causal_exp(scores, n_past + begin + 1 - first, window)
            attended = np.matmul(p, values[head, first:n_kv]).reshape(block_q.shape)
            attended /= sums[:, :, None]
        out_heads[begin:end, head] = attended.transpose(1, 0, 2)

    executor.map(attend_block, n_blocks * n_head_kv)
    return out
