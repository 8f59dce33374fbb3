"""Attention against float64, and what its bits may not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same_bits, seeds

from fq_kernels import MATVEC_MAX_TOKENS, Executor, attention, force_isa


def arguments(n_tokens, n_past, n_head_kv, group, d, *, more=0, seed=0, spread=1.0):
    """q, k, v, k_cache, v_cache, n_past; where the cache is not filled yet it holds NaN."""
    rng = np.random.default_rng(seed)
    q = (spread * rng.standard_normal((n_tokens, n_head_kv * group, d))).astype(np.float32)
    k, v = rng.standard_normal((2, n_tokens, n_head_kv, d), dtype=np.float32)
    caches = np.full((2, n_head_kv, n_past + n_tokens + more, d), np.nan, np.float32)
    caches[:, :, :n_past] = rng.standard_normal((2, n_head_kv, n_past, d))
    return q, k, v, caches[0], caches[1], n_past


def attend(q, k, v, k_cache, v_cache, n_past, executor=None, **options):
    out = np.empty((len(q), q.shape[1] * q.shape[2]), np.float32)
    return attention(q, k, v, k_cache.copy(), v_cache.copy(), n_past, out=out, executor=executor, **options)


def exact(q, k, v, k_cache, v_cache, n_past, window=0, soft_cap=0.0):
    n_tokens, n_head, d = q.shape
    keys = np.concatenate([k_cache[:, :n_past].transpose(1, 0, 2), k]).astype(np.float64)
    values = np.concatenate([v_cache[:, :n_past].transpose(1, 0, 2), v]).astype(np.float64)
    group = n_head // keys.shape[1]
    out = np.empty((n_tokens, n_head, d))
    for t in range(n_tokens):
        for h in range(n_head):
            seen = slice(max(n_past + t + 1 - window, 0) if window else 0, n_past + t + 1)
            scores = keys[seen, h // group] @ q[t, h] / np.sqrt(d)
            if soft_cap:
                scores = soft_cap * np.tanh(scores / soft_cap)
            p = np.exp(scores - scores.max())
            out[t, h] = p @ values[seen, h // group] / p.sum()
    return out.reshape(n_tokens, n_head * d)


@given(
    n_tokens=st.one_of(st.integers(1, MATVEC_MAX_TOKENS), st.integers(MATVEC_MAX_TOKENS + 1, 60)),
    n_past=st.sampled_from([0, 1, 15, 16, 200, 255, 256, 300, 530]),
    n_head_kv=st.integers(1, 3),
    group=st.integers(1, 8),
    d=st.sampled_from([1, 3, 4, 16, 20, 32, 40, 64, 80, 128]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    window=st.sampled_from([0, 0, 1, 2, 16, 17, 100, 255, 256, 257, 1000]),
    soft_cap=st.sampled_from([0.0, 0.0, 2.0, 50.0]),
    seed=seeds,
)
def test_it_is_softmax_attention(isa, n_tokens, n_past, n_head_kv, group, d, spread, window, soft_cap, seed):
    given = arguments(n_tokens, n_past, n_head_kv, group, d, more=3, seed=seed, spread=spread)
    q, k, v, k_cache, v_cache, _ = given
    memory = np.full((n_tokens, n_head_kv * group * d + 5), 7, np.float32)
    out = memory[:, : n_head_kv * group * d]
    keys, values = k_cache.copy(), v_cache.copy()
    options = {"window": window, "soft_cap": soft_cap}
    assert attention(q, k, v, keys, values, n_past, out=out, **options) is out
    # float32 scores are off by about 1e-6 of their size, which grows with the spread
    np.testing.assert_allclose(out, exact(*given, **options), rtol=0, atol=4e-6 * max(1, spread))
    assert (memory[:, n_head_kv * group * d :] == 7).all()
    for cache, before, new in ((keys, k_cache, k), (values, v_cache, v)):
        before[:, n_past : n_past + n_tokens] = new.transpose(1, 0, 2)
        assert_same_bits(cache, before)


@pytest.mark.threads
@pytest.mark.parametrize("n_tokens, n_past", [(1, 40), (1, 3000), (5, 700), (100, 0), (70, 600)])
def test_the_bits_do_not_depend_on_the_threads(isa, n_tokens, n_past):
    given = arguments(n_tokens, n_past, n_head_kv=3, group=3, d=64)
    one = attend(*given)
    for threads in (2, 3, 7, 16):
        with Executor(threads) as executor:
            assert_same_bits(attend(*given, executor=executor), one)


@given(
    n_tokens=st.integers(1, 40),
    n_past=st.integers(0, 90) | st.integers(200, 300),
    d=st.sampled_from([5, 16, 40, 64, 128]),
    window=st.sampled_from([0, 1, 20, 270]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    decoding=st.booleans(),
    seed=seeds,
)
def test_the_bits_do_not_depend_on_the_instruction_set(isa, n_tokens, n_past, d, seed, decoding, **options):
    given = arguments(n_tokens, n_past, n_head_kv=2, group=2, d=d, seed=seed)
    got = attend(*given, decoding=decoding, **options)
    force_isa("scalar")
    try:
        assert_same_bits(got, attend(*given, decoding=decoding, **options))
    finally:
        force_isa(isa)


@pytest.mark.parametrize("d", [20, 64])
@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("cuts", [(9, 300), (100, 256), (150,), (1, 2, 5)])
def test_the_bits_do_not_depend_on_the_other_tokens(isa, cuts, d, decoding):
    """A sequence in pieces; decoding, as long as all have few tokens."""
    few = decoding or cuts[-1] < MATVEC_MAX_TOKENS
    cuts, n_tokens = ((1, 2, 5), MATVEC_MAX_TOKENS) if few else (cuts, 400)
    q, k, v, k_cache, v_cache, _ = arguments(n_tokens, 0, n_head_kv=2, group=3, d=d)
    whole = attend(q, k, v, k_cache, v_cache, 0, decoding=decoding)
    parts = []
    for begin, end in zip((0, *cuts), (*cuts, n_tokens), strict=True):
        out = np.empty((end - begin, whole.shape[1]), np.float32)
        now = slice(begin, end)
        parts.append(attention(q[now], k[now], v[now], k_cache, v_cache, begin, out=out, decoding=decoding))
    assert_same_bits(np.concatenate(parts), whole)


def test_large_heads(isa):
    for d in (300, 1024, 1030):  # the last takes few tokens at a time
        given = arguments(20, 30, n_head_kv=1, group=2, d=d)
        np.testing.assert_allclose(attend(*given), exact(*given), rtol=0, atol=4e-6)


def test_no_tokens(isa):
    assert attend(*arguments(0, 3, n_head_kv=1, group=2, d=4)).shape == (0, 8)


@pytest.mark.parametrize("window", [8, 9, (1 << 62) - 1])
def test_a_window_of_all_tokens_or_more_is_none(isa, window):
    given = arguments(3, 5, 2, 2, 8)
    assert attend(*given, window=window).tobytes() == attend(*given).tobytes()


@pytest.mark.parametrize("cap", [1e-60, 1e300, float("inf"), -1.0])
def test_a_soft_cap_is_a_float32(cap):
    with pytest.raises(ValueError, match="soft_cap must be a positive number, or 0 for none"):
        attend(*arguments(3, 5, 2, 2, 8), soft_cap=cap)


def test_errors():
    given = dict(
        zip(("q", "k", "v", "k_cache", "v_cache", "n_past"), arguments(3, 5, 2, 2, 8, more=2), strict=True)
    )
    given["out"] = np.zeros((3, 32), np.float32)
    read_only = given["k_cache"].copy()
    read_only.flags.writeable = False
    for name, value, error, message in (
        ("q", given["q"].astype(np.float64), TypeError, "q must .*float64"),
        ("q", given["q"][:, ::2], ValueError, "q must be C-contiguous"),
        ("q", given["q"][0], ValueError, "q must be C-contiguous with three axes"),
        ("q", given["q"][:, :3].copy(), ValueError, "k_cache of shape .* does not fit q"),
        ("k", given["k"][:2], ValueError, r"k must be of shape \(3, 2, 8\)"),
        ("v", given["v"][:, :1].copy(), ValueError, r"v must be of shape \(3, 2, 8\)"),
        ("k_cache", given["k_cache"][:, :, :4].copy(), ValueError, "k_cache of shape"),
        ("k_cache", read_only, ValueError, "k_cache is read-only"),
        ("v_cache", given["v_cache"][:, :9].copy(), ValueError, "v_cache must be of shape"),
        ("v_cache", given["k_cache"], ValueError, "k_cache overlaps v_cache"),
        ("n_past", 8, ValueError, "n_past must be an integer from 0 to 7, not 8"),
        ("n_past", -1, ValueError, "n_past"),
        ("n_past", 1.0, ValueError, "n_past"),
        ("out", given["out"][:, :31], ValueError, r"out must be of shape \(3, 32\)"),
        ("out", given["q"].reshape(3, 32), ValueError, "out overlaps q|out must"),
    ):
        changed = given | {name: value}
        n_past, out = changed.pop("n_past"), changed.pop("out")
        with pytest.raises(error, match=message):
            attention(*changed.values(), n_past, out=out)
    assert np.isnan(given["k_cache"][:, 5:]).all() and (given["out"] == 0).all()
