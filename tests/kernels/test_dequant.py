"""Packed weights against gguf-py's reference, matvec and rope against their contracts."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import gguf
import numpy as np
import pytest
from fused import fma
from hypothesis import given
from hypothesis import strategies as st
from strategies import ROW_KINDS, assert_same_bits, layouts, make_row, seeds
from weight_blocks import SCALES as ALL_SCALES

from fq_kernels import (
    MATVEC_MAX_TOKENS,
    PACKED_TYPES,
    Executor,
    dequantize,
    force_isa,
    matvec,
    matvecs,
    mul_mat,
    mul_mats,
    rope,
)

TYPES = {gguf.GGMLQuantizationType(t).name: t for t in PACKED_TYPES}
SCALES = {name: ALL_SCALES[name] for name in TYPES if name in ALL_SCALES}
SPECIAL = np.array(
    [0.0, -0.0, 6e-8, -6e-8, 3e-5, 6.1e-5, 1.0, -1.0, 65504.0, -65504.0, np.inf, -np.inf, np.nan], np.float16
)


def expected_floats(packed: np.ndarray, ggml_type: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(ggml_type))
    return np.ascontiguousarray(values, np.float32)


def random_blocks(ggml_type: int, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    size = PACKED_TYPES[ggml_type][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), np.uint8)


def tame(packed: np.ndarray, name: str) -> np.ndarray:
    """The same blocks with every scale (and every plain float) of ordinary size."""
    if name == "F32":
        floats = np.random.default_rng(4).standard_normal((packed.shape[0], packed.shape[1] // 4))
        return floats.astype(np.float32).view(np.uint8)
    if name == "BF16":
        packed[:, 1::2] = packed[:, 1::2] & 0x80 | 0x3F
    for at in SCALES.get(name, []):
        packed[:, at + 1 :: PACKED_TYPES[TYPES[name]][1]] &= 0xAF
        packed[:, at + 1 :: PACKED_TYPES[TYPES[name]][1]] |= 0x20
    return packed


def test_the_types_are_ggmls():
    for ggml_type, block_and_size in PACKED_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type)] == block_and_size


@pytest.mark.threads
@pytest.mark.parametrize("name", TYPES)
def test_random_bytes(isa, executor, name):
    packed = random_blocks(TYPES[name], 24, 40)
    expected = expected_floats(packed, TYPES[name])
    assert_same_bits(dequantize(packed, TYPES[name]), expected)
    out = np.empty_like(expected)
    assert dequantize(packed, TYPES[name], out=out, executor=executor) is out
    assert_same_bits(out, expected)


def with_special_scales(name: str, quants: int | None = None) -> np.ndarray:
    """A row of two blocks for each pair of SPECIAL, their other bytes random or all ``quants``."""
    offsets, size = SCALES[name], PACKED_TYPES[TYPES[name]][1]
    pairs = [(a, b) for a in SPECIAL for b in SPECIAL]
    packed = random_blocks(TYPES[name], len(pairs), 2)
    if quants is not None:
        packed[:] = quants
    for at, scales in zip(offsets, zip(*pairs, strict=True), strict=False):
        for block in (0, 1):
            start = block * size + at
            packed[:, start : start + 2] = np.array(scales, np.float16)[:, np.newaxis].view(np.uint8)
    return packed


@pytest.mark.parametrize("name", SCALES)
def test_special_scales(isa, name):
    packed = with_special_scales(name)
    assert_same_bits(dequantize(packed, TYPES[name]), expected_floats(packed, TYPES[name]))


def test_all_float16_and_bfloat16(isa):
    codes = np.arange(2**16, dtype=np.uint16)
    packed = codes.view(np.uint8).reshape(4, -1)
    with np.errstate(invalid="ignore"):  # arm64's cast tells of signalling NaNs
        expected = codes.view(np.float16).astype(np.float32)
    assert_same_bits(dequantize(packed, TYPES["F16"]).ravel(), expected)
    bits = dequantize(packed, TYPES["BF16"]).ravel().view(np.uint32)
    assert np.array_equal(bits, codes.astype(np.uint32) << 16)


@given(data=st.data(), name=st.sampled_from(sorted(TYPES)), seed=seeds, blocks=st.integers(1, 3))
def test_layout_does_not_matter(data, name, seed, blocks):
    outer = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    flat = random_blocks(TYPES[name], int(np.prod(outer)), blocks, seed)
    expected = expected_floats(flat, TYPES[name]).reshape(*outer, -1)
    _, packed = data.draw(layouts(len(outer) + 1)).place(flat.reshape(*outer, -1))
    memory, out = data.draw(layouts(len(outer) + 1)).place(np.zeros_like(expected))
    before = memory.copy()
    dequantize(packed, TYPES[name], out=out)
    assert_same_bits(out, expected)
    out[...] = 0
    assert memory.tobytes() == before.tobytes(), "written beside the rows"


def test_empty():
    assert dequantize(np.empty((3, 0), np.uint8), TYPES["Q4_K"]).shape == (3, 0)
    assert dequantize(np.empty((0, 144), np.uint8), TYPES["Q4_K"]).shape == (0, 256)
    assert matvec(np.empty((0, 256), np.float32), np.zeros((5, 144), np.uint8), TYPES["Q4_K"]).shape == (0, 5)
    assert matvec(np.ones((2, 256), np.float32), np.empty((0, 144), np.uint8), TYPES["Q4_K"]).shape == (2, 0)
    for executor in (None, Executor(2)):
        out = np.full((2, 3), np.nan, np.float32)
        nothing = np.empty((2, 0), np.float32), np.empty((3, 0), np.uint8)
        assert not matvec(*nothing, TYPES["Q4_K"], out=out, executor=executor).any()


PROT_NONE = 0


def before_a_wall(data: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last of a page that no readable one follows."""
    size = -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + size), mmap.PAGESIZE, PROT_NONE) == 0
    copy = memory[size - data.nbytes : size].reshape(data.shape)
    copy[:] = data
    return copy


@pytest.mark.parametrize("name", TYPES)
def test_reads_end_with_the_row(isa, name):
    # past it may be the end of the mapped file
    for blocks in (1, 2, 35):
        packed = random_blocks(TYPES[name], 1, blocks)
        assert_same_bits(dequantize(before_a_wall(packed), TYPES[name]), expected_floats(packed, TYPES[name]))


def test_dequantize_errors():
    packed, q4_k = np.zeros((2, 288), np.uint8), TYPES["Q4_K"]
    shared = np.zeros(4 * 512 * 2, np.uint8)
    cases = [
        (ValueError, "ggml type 9 has no kernel", (packed, 9), {}),
        (ValueError, "ggml type -1 has no kernel", (packed, -1), {}),
        (ValueError, "packed rows of 287 bytes", (packed[:, :287], q4_k), {}),
        (TypeError, "packed must .*uint8.*int8", (packed.view(np.int8), q4_k), {}),
        (TypeError, "packed must .*bytes", (b"\0" * 144, q4_k), {}),
        (ValueError, "packed must have at least one axis", (np.array(1, np.uint8), q4_k), {}),
        (ValueError, "last axis of packed", (packed[:, ::2], q4_k), {}),
        (ValueError, "out has shape", (packed, q4_k), {"out": np.ones((2, 511), np.float32)}),
        (TypeError, "out must .*float32.*float64", (packed, q4_k), {"out": np.ones((2, 512))}),
        (TypeError, "executor must ", (packed, q4_k), {"executor": 1}),
        (ValueError, "out overlaps packed", (shared[: 2 * 288].reshape(2, 288), q4_k),
         {"out": shared.view(np.float32)[:1024].reshape(2, 512)}),
        (ValueError, "out .*share", (packed, q4_k),
         {"out": np.lib.stride_tricks.as_strided(np.ones(512, np.float32), (2, 512), (0, 4))}),
    ]  # fmt: skip
    for error, message, arguments, options in cases:
        before = options["out"].copy() if "out" in options else None
        with pytest.raises(error, match=message):
            dequantize(*arguments, **options)
        assert before is None or before.tobytes() == options["out"].tobytes()


# matvec


@np.errstate(all="ignore")
def matvec_contract(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(t, k), (n, k) float32 -> (t, n): 64 partial sums by k modulo 64, then folded."""
    sums = np.zeros((x.shape[0], w.shape[0], 64), np.float32)
    for k in range(0, x.shape[1], 64):
        some = sums[..., : x.shape[1] - k]
        some[...] = fma(x[:, np.newaxis, k : k + 64], w[np.newaxis, :, k : k + 64], some)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0] + np.float32(0)


MATVEC_CASES = [
    (name, n, k)
    for name in TYPES
    for n, k in [(3, 256), (7, 1024), (40, 1280), (2, 2048), (5, 2816)]
] + [
    ("F32", 3, 1), ("F32", 3, 63), ("F32", 4, 65), ("F32", 2, 1023), ("F32", 3, 1025), ("F16", 3, 2047),
    ("BF16", 2, 1090), ("Q8_0", 5, 32), ("Q4_0", 5, 96), ("Q4_1", 3, 1056), ("Q5_0", 3, 1120),
    ("Q5_1", 4, 2080),
]  # fmt: skip


@pytest.mark.parametrize(("name", "n", "k"), MATVEC_CASES)
def test_matvec_is_its_contract(isa, name, n, k):
    packed = tame(random_blocks(TYPES[name], n, k // PACKED_TYPES[TYPES[name]][0]), name)
    x = np.random.default_rng(k).standard_normal((MATVEC_MAX_TOKENS, k)).astype(np.float32)
    w = expected_floats(packed, TYPES[name])
    expected = matvec_contract(x, w)
    bound = 1e-6 * np.abs(x).astype(np.float64) @ np.abs(w.T).astype(np.float64)
    assert (np.abs(expected - x.astype(np.float64) @ w.T.astype(np.float64)) <= bound).all()
    for tokens in range(1, MATVEC_MAX_TOKENS + 1):
        assert_same_bits(matvec(x[:tokens], packed, TYPES[name]), expected[:tokens])


@pytest.mark.parametrize("name", TYPES)
@given(data=st.data(), seed=seeds, n=st.integers(1, 19), scales=st.sampled_from(["tame", "special", "any"]))
def test_matvec_of_any_weights(isa, name, data, seed, n, scales):
    block, size = PACKED_TYPES[TYPES[name]]
    k = data.draw(st.sampled_from([k for k in (32, 96, 256, 576, 1536, 2048, 5632) if k % block == 0]))
    tokens = data.draw(st.integers(1, MATVEC_MAX_TOKENS))
    packed, rng = random_blocks(TYPES[name], n, k // block, seed), np.random.default_rng(seed)
    if scales != "any":
        packed = tame(packed, name)
    if scales == "special":
        for at in SCALES.get(name, []):
            row, place = rng.integers(n), rng.integers(k // block) * size + at
            packed[row, place : place + 2] = rng.choice(SPECIAL, 1).view(np.uint8)
    kinds = data.draw(st.lists(st.sampled_from(ROW_KINDS), min_size=tokens, max_size=tokens))
    x = np.array([make_row(kind, k, rng) for kind in kinds])
    expected = matvec_contract(x, expected_floats(packed, TYPES[name]))
    assert_same_bits(matvec(x, packed, TYPES[name]), expected)
    assert_same_bits(matvec(x[-1:], packed, TYPES[name]), expected[-1:])


@pytest.mark.parametrize("name", SCALES)
def test_matvec_special_scales(isa, name):
    # the same quants everywhere: infinite weights of both signs would all sum up to NaN
    for quants in (0x11, 0x55, 0x7F, 0xAA):
        packed = with_special_scales(name, quants)
        w = expected_floats(packed, TYPES[name])
        assert np.isinf(w).all(axis=1).any()
        x = np.stack([np.ones(w.shape[1]), np.linspace(1, 2, w.shape[1])]).astype(np.float32)
        assert_same_bits(matvec(x, packed, TYPES[name]), matvec_contract(x, w))


# Arrays that end where the readable memory does, as the last tensor of a mapped file may.
AT_THE_END = """
import ctypes, mmap, sys
import numpy as np
import fq_kernels

memory = mmap.mmap(-1, 65536 + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 65536), ctypes.c_size_t(mmap.PAGESIZE), 0):
    sys.exit("mprotect failed")

def at_the_end(array):
    view = np.frombuffer(memory, np.uint8)[65536 - array.nbytes : 65536].view(array.dtype)
    view = view.reshape(array.shape)
    view[...] = array
    return view

for isa in fq_kernels.supported_isas():
    fq_kernels.force_isa(isa)
    for ggml_type, (block, size) in fq_kernels.PACKED_TYPES.items():
        for blocks in (1, 2, 3, 35, 70) if block == 1 else (1, 2, 3):
            for tokens in range(1, 6):
                for rows in (1, 3, 5):
                    x = np.zeros((tokens, block * blocks), np.float32)
                    packed = np.zeros((rows, size * blocks), np.uint8)
                    print(isa, ggml_type, blocks, tokens, rows)
                    fq_kernels.matvec(x, at_the_end(packed), ggml_type)
                    fq_kernels.matvec(at_the_end(x), packed, ggml_type)
                    out = np.empty((tokens, rows), np.float32)
                    fq_kernels.mul_mat(x, at_the_end(packed), ggml_type, out=out)
                    fq_kernels.mul_mat(at_the_end(x), packed, ggml_type, out=out)
                    fq_kernels.mul_mat(x, packed, ggml_type, out=at_the_end(out))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect of an anonymous mapping")
def test_products_stay_within_their_arrays():
    ran = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stderr} after {ran.stdout.splitlines()[-1:]}"


@pytest.mark.threads
def test_matvec_thread_count_does_not_matter(isa):
    packed = tame(random_blocks(TYPES["Q4_K"], 333, 4), "Q4_K")
    x = np.random.default_rng(1).standard_normal((3, 1024)).astype(np.float32)
    expected = matvec_contract(x, expected_floats(packed, TYPES["Q4_K"]))
    for threads in (1, 2, 3, 7):
        with Executor(threads) as executor:
            out = np.empty((3, 333), np.float32)
            assert matvec(x, packed, TYPES["Q4_K"], out=out, executor=executor) is out
            assert_same_bits(out, expected)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_1", "Q6_K"])
def test_a_zero_of_matvec_is_positive(isa, name):
    """Each product is too small for a float32, and negative."""
    smallest = np.float16(-6e-8)
    packed = {
        "F32": np.full(64, -1e-30, np.float32).view(np.uint8),
        "Q8_0": np.tile(np.concatenate([smallest[None].view(np.uint8), np.ones(32, np.uint8)]), 2),
        "Q4_1": np.tile(
            np.concatenate([np.array([0, smallest], np.float16).view(np.uint8), np.zeros(16, np.uint8)]), 2
        ),
        # codes 0 less 32, times 1, times d
        "Q6_K": np.concatenate([np.zeros(192), np.ones(16), (-smallest)[None].view(np.uint8)]).astype(
            np.uint8
        ),
    }[name][None]
    weights = expected_floats(packed, TYPES[name])
    assert (weights < 0).all()
    got = matvec(np.full((1, weights.size), 1e-45, np.float32), packed, TYPES[name])
    assert got.tobytes() == np.float32(0).tobytes()


@pytest.mark.threads
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matvecs_are_matvec_of_each(isa, threads):
    names, rows = ("Q4_K", "Q6_K", "Q8_0", "Q4_1", "Q4_K", "F32"), (70, 1, 33, 0, 129, 5)
    packed = [
        tame(random_blocks(TYPES[name], n, 512 // PACKED_TYPES[TYPES[name]][0], seed), name)
        for seed, (name, n) in enumerate(zip(names, rows, strict=True))
    ]
    weights = [(rows, TYPES[name]) for rows, name in zip(packed, names, strict=True)]
    x = np.random.default_rng(2).standard_normal((3, 512)).astype(np.float32)
    given = [None, np.full((3, 1), np.nan, np.float32), None, None, None, None]
    with Executor(threads) as executor:
        found = matvecs(x, weights, given, executor=executor)
    assert found[1] is given[1]
    for out, (rows, ggml_type) in zip(found, weights, strict=True):
        assert_same_bits(out, matvec(x, rows, ggml_type))


def test_matvecs_errors():
    x, packed, q4_k = np.ones((2, 512), np.float32), np.zeros((3, 288), np.uint8), TYPES["Q4_K"]
    outs, shared = np.ones((3, 2, 3), np.float32), np.zeros(288, np.uint8)
    cases = [
        ("weights must be 1 to 8", [], None),
        ("weights must be 1 to 8", [(packed, q4_k)] * 9, None),
        ("outs as many", [(packed, q4_k)] * 2, [None]),
        ("x must .*256", [(packed, q4_k), (packed[:, :144], q4_k)], None),
        ("outs overlap", [(packed, q4_k)] * 3, [outs[0], outs[1], outs[0]]),
        (
            "outs overlap",
            [(packed, q4_k), (shared.reshape(1, 288), q4_k)],
            [shared[:24].view("f4")[:6].reshape(2, 3), None],
        ),
    ]
    for message, weights, wanted in cases:
        with pytest.raises(ValueError, match=message):
            matvecs(x, weights, wanted)
    assert (outs == 1).all()


def test_matvec_errors():
    x, packed, q4_k = np.ones((2, 512), np.float32), np.zeros((3, 288), np.uint8), TYPES["Q4_K"]
    cases = [
        (ValueError, "x has 9 tokens", (np.ones((9, 512), np.float32), packed, q4_k), {}),
        (ValueError, "x must .*512", (np.ones((2, 511), np.float32), packed, q4_k), {}),
        (ValueError, "x must ", (np.ones(512, np.float32), packed, q4_k), {}),
        (ValueError, "x must ", (np.ones((2, 513), np.float32)[:, :512], packed, q4_k), {}),
        (TypeError, "x must .*float64", (np.ones((2, 512)), packed, q4_k), {}),
        (ValueError, "packed must ", (x, np.zeros((6, 288), np.uint8)[::2], q4_k), {}),
        (ValueError, "packed must ", (x, packed[0], q4_k), {}),
        (ValueError, "packed rows of 287 bytes", (x, packed[:, :287], q4_k), {}),
        (ValueError, "ggml type 4 has no kernel", (x, packed, 4), {}),
        (ValueError, "out must ", (x, packed, q4_k), {"out": np.ones((3, 2), np.float32)}),
        (ValueError, "out must ", (x, packed, q4_k), {"out": np.ones((2, 6), np.float32)[:, :3]}),
        (TypeError, "out must .*float64", (x, packed, q4_k), {"out": np.ones((2, 3))}),
        (ValueError, "out overlaps an input", (x, packed, q4_k), {"out": x.reshape(-1)[:6].reshape(2, 3)}),
        (TypeError, "executor must ", (x, packed, q4_k), {"executor": 1}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            matvec(*arguments, **options)
    assert (x == 1).all()


# mul_mat


def strided(shape: tuple[int, int], gap: int, seed: int) -> np.ndarray:
    """Normal float32 rows with NaN before and after them and in the gaps between."""
    memory = np.full((shape[0] + 2, shape[1] + gap), np.nan, np.float32)
    rows = memory[1:-1, : shape[1]]
    rows[...] = np.random.default_rng(seed).standard_normal(shape)
    return rows


@pytest.mark.threads
@given(
    name=st.sampled_from(sorted(TYPES)),
    tokens=st.one_of(st.integers(1, 40), st.sampled_from([511, 512, 513, 530])),
    rows=st.one_of(st.integers(1, 100), st.sampled_from([192, 193, 400])),
    blocks=st.integers(1, 40),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=seeds,
)
def test_mul_mat(isa, executor, name, tokens, rows, blocks, gaps, seed):
    k, type_ = min(blocks, 1 + 1300 // PACKED_TYPES[TYPES[name]][0]), TYPES[name]
    packed = tame(random_blocks(type_, rows, k, seed), name)
    x = strided((tokens, k * PACKED_TYPES[type_][0]), gaps[0], seed)
    out = strided((tokens, rows), gaps[1], seed)
    assert mul_mat(x, packed, type_, out=out, executor=executor) is out
    w = expected_floats(packed, type_).astype(np.float64)
    bound = 1e-6 * np.abs(x.astype(np.float64)) @ np.abs(w.T)
    assert (np.abs(out - x.astype(np.float64) @ w.T) <= bound).all()
    found = out.copy()
    out[...] = np.nan
    assert np.isnan(out.base).all(), "written beside the rows"
    # a token's bits depend on neither the other tokens nor the threads
    alone = np.empty((1, rows), np.float32)
    for t in {0, tokens // 2, tokens - 1}:
        assert_same_bits(mul_mat(x[t : t + 1], packed, type_, out=alone), found[t : t + 1])


@pytest.mark.threads
@given(
    name=st.sampled_from(["F32", "Q8_0", "Q4_K"]),
    tokens=st.integers(1, 30),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 12),
    seed=seeds,
)
def test_mul_mat_has_the_same_bits_on_every_instruction_set(isa, executor, name, tokens, rows, blocks, seed):
    block, _ = PACKED_TYPES[TYPES[name]]
    k = blocks if block > 1 else blocks * 61
    packed = tame(random_blocks(TYPES[name], rows, k, seed), name)
    x = strided((tokens, k * block), 3, seed)
    found = mul_mat(x, packed, TYPES[name], out=np.empty((tokens, rows), np.float32), executor=executor)
    force_isa("scalar")
    try:
        assert_same_bits(mul_mat(x, packed, TYPES[name], out=np.empty_like(found)), found)
    finally:
        force_isa(isa)


def test_mul_mat_sums_blocks_of_256(isa):
    # 2^24 + 1 is no float32: ones are lost beside it, but not in a block of their own
    x = np.ones((1, 600), np.float32)
    x[0, 0] = 2.0**24
    packed = np.ones((1, 600), np.float32).view(np.uint8)
    out = mul_mat(x, packed, TYPES["F32"], out=np.empty((1, 1), np.float32))
    assert out[0, 0] == 2.0**24 + 256 + 88
    # a product is not rounded before it is added
    x[:], w = 0, np.zeros((1, 600), np.float32)
    x[0, :2], w[0, :2] = (1 + 2**-12, 1), (1 + 2**-12, -1)
    out = mul_mat(x, w.view(np.uint8), TYPES["F32"], out=np.empty((1, 1), np.float32))
    assert out[0, 0] == np.float32((1 + 2**-12) ** 2) - 1


@pytest.mark.threads
@pytest.mark.parametrize("tokens", [1, 7, 530])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mul_mats_are_mul_mat_of_each(isa, threads, tokens):
    names, rows = ("Q4_K", "Q6_K", "Q8_0", "Q4_1", "F32"), (70, 1, 33, 0, 129)
    packed = [
        tame(random_blocks(TYPES[name], n, 512 // PACKED_TYPES[TYPES[name]][0], seed), name)
        for seed, (name, n) in enumerate(zip(names, rows, strict=True))
    ]
    weights = [(rows, TYPES[name]) for rows, name in zip(packed, names, strict=True)]
    x = np.random.default_rng(2).standard_normal((tokens, 512)).astype(np.float32)
    outs = [np.full((tokens, n), np.nan, np.float32) for n in rows]
    with Executor(threads) as executor:
        found = mul_mats(x, weights, outs, executor=executor)
    assert all(a is b for a, b in zip(found, outs, strict=True))
    for out, (rows, ggml_type) in zip(found, weights, strict=True):
        assert_same_bits(out, mul_mat(x, rows, ggml_type, out=np.empty_like(out)))


def test_mul_mats_errors():
    x, packed, q4_k = np.ones((2, 512), np.float32), np.zeros((3, 288), np.uint8), TYPES["Q4_K"]
    outs, shared = np.ones((3, 2, 3), np.float32), np.zeros(288, np.uint8)
    short = np.ones((1, 3), np.float32)
    cases = [
        ("weights must be 1 to 8", [], []),
        ("weights must be 1 to 8", [(packed, q4_k)] * 9, [*outs] * 3),
        ("outs as many", [(packed, q4_k)] * 2, [outs[0]]),
        ("x must .*256", [(packed, q4_k), (packed[:, :144].copy(), q4_k)], [outs[0], outs[1]]),
        ("x must .*1, 512", [(packed, q4_k), (packed, q4_k)], [outs[0], short]),
        ("outs overlap", [(packed, q4_k)] * 3, [outs[0], outs[1], outs[0]]),
        (
            "outs overlap",
            [(packed, q4_k), (shared.reshape(1, 288), q4_k)],
            [shared[:24].view("f4")[:6].reshape(2, 3), np.ones((2, 1), np.float32)],
        ),
    ]
    for message, weights, wanted in cases:
        with pytest.raises(ValueError, match=message):
            mul_mats(x, weights, wanted)
    assert (outs == 1).all()


def test_mul_mat_of_nothing(isa):
    empty, q4_k = np.empty((3, 0), np.float32), TYPES["Q4_K"]
    out = np.ones((3, 2), np.float32)
    assert not mul_mat(empty, np.empty((2, 0), np.uint8), q4_k, out=out).any()
    mul_mat(np.ones((3, 256), np.float32), np.zeros((0, 144), np.uint8), q4_k, out=empty)
    mul_mat(np.ones((0, 256), np.float32), np.zeros((2, 144), np.uint8), q4_k, out=out[:0])


def test_mul_mat_errors(isa):
    x, packed, q4_k = np.ones((2, 512), np.float32), np.zeros((3, 288), np.uint8), TYPES["Q4_K"]
    out = np.ones((2, 3), np.float32)
    shared = np.lib.stride_tricks.as_strided(out, (2, 3), (4, 4))
    cases = [
        (ValueError, "x must .*512", (np.ones((2, 511), np.float32), packed, q4_k), {}),
        (ValueError, "x must .*512", (np.ones((3, 512), np.float32), packed, q4_k), {}),
        (ValueError, "last axis of x", (np.ones((2, 1024), np.float32)[:, ::2], packed, q4_k), {}),
        (TypeError, "x must .*float64", (np.ones((2, 512)), packed, q4_k), {}),
        (ValueError, "packed must ", (x, np.zeros((6, 288), np.uint8)[::2], q4_k), {}),
        (ValueError, "packed must ", (x, packed[0], q4_k), {}),
        (ValueError, "ggml type 4 has no kernel", (x, packed, 4), {}),
        (ValueError, "out must ", (x, packed, q4_k), {"out": np.ones((2, 4), np.float32)}),
        (ValueError, "out must ", (x, packed, q4_k), {"out": np.ones(3, np.float32)}),
        (ValueError, "out has elements that share", (x, packed, q4_k), {"out": shared}),
        (ValueError, "out overlaps x", (x, packed, q4_k), {"out": x.reshape(-1)[:6].reshape(2, 3)}),
        (TypeError, "executor must ", (x, packed, q4_k), {"executor": 1}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            mul_mat(*arguments, **({"out": out} | options))
    assert (x == 1).all() and (out == 1).all()


# rope


@pytest.mark.threads
@pytest.mark.parametrize("n_rot", [0, 2, 10, 16, 64])
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 3, 64), (70, 9, 64)])
def test_rope_rotates_pairs(isa, executor, shape, n_rot):
    rng = np.random.default_rng(n_rot)
    x = rng.standard_normal(shape).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, (shape[0], n_rot // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    pairs = x[..., :n_rot:2].astype(np.float64) + 1j * x[..., 1:n_rot:2]
    turned = pairs * (cos.astype(np.float64) + 1j * sin)[:, np.newaxis]
    got = x.copy()
    assert rope(got, cos, sin) is got
    bound = 1e-6 * np.abs(pairs)
    assert (np.abs(got[..., :n_rot:2] - turned.real) <= bound).all()
    assert (np.abs(got[..., 1:n_rot:2] - turned.imag) <= bound).all()
    assert got[..., n_rot:].tobytes() == x[..., n_rot:].tobytes()
    # the contract's bits: two products and a sum, each rounded to float32
    a, b, c, s = x[..., :n_rot:2], x[..., 1:n_rot:2], cos[:, np.newaxis], sin[:, np.newaxis]
    assert_same_bits(got[..., :n_rot:2], a * c - b * s)
    assert_same_bits(got[..., 1:n_rot:2], a * s + b * c)
    assert_same_bits(rope(x.copy(), cos, sin, executor=executor), got)


def test_rope_errors():
    x, cos = np.ones((2, 3, 8), np.float32), np.ones((2, 4), np.float32)
    read_only, wide = x.copy(), np.ones((2, 5), np.float32)
    read_only.flags.writeable = False
    cases = [
        (ValueError, "x must be C-contiguous", (x[0], cos, cos)),
        (ValueError, "x must be C-contiguous", (x[:, ::2], cos, cos)),
        (ValueError, "x is read-only", (read_only, cos, cos)),
        (ValueError, "x overlaps cos", (x[:1], x[0, :1, :4], cos[:1])),
        (ValueError, "x overlaps sin", (x[:1], cos[:1], x[0, :1, :4])),
        (TypeError, "x must .*float64", (x.astype(np.float64), cos, cos)),
        (TypeError, "cos must .*float64", (x, cos.astype(np.float64), cos)),
        (TypeError, "sin must .*list", (x, cos, [1.0])),
        (ValueError, "cos must be C-contiguous", (x, cos[:1], cos)),
        (ValueError, "cos must be C-contiguous", (x, cos[0], cos)),
        (ValueError, "sin must be C-contiguous", (x, cos, cos[:, :3])),
        (ValueError, "cos rotates 10 elements", (x, wide, wide)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            rope(*arguments)
    assert (x == 1).all()
