"""GGUF files of llama architecture with seeded random weights.

They stand in for real weights in tests and benchmarks: the shapes, types, metadata and sizes
are those of a real file, and the weights have zero mean and a spread of 1/sqrt(n_in), so that
activations and logits stay of ordinary size. What such a model writes is noise.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fq_kernels import default_fpu

from ..errors import FqError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SAMPLE_TEXT = Path(__file__).parents[1] / "data" / "sample.txt"
# The part of it whose words make the vocabulary: what is appended later leaves the models as they were.
VOCABULARY_CHARS = 16133

# type of the matrices, llama.cpp's number for the file type
_MIXES = {
    "F32": ("F32", 0),
    "F16": ("F16", 1),
    "Q4_0": ("Q4_0", 2),
    "Q4_1": ("Q4_1", 3),
    "Q8_0": ("Q8_0", 7),
    "Q4_K_M": ("Q4_K", 15),
}
MIXES = tuple(_MIXES)

# how the name of such a model begins, in its metadata
RANDOM_WEIGHTS = "synthetic llama, random weights"

# <unk> <s> </s>, 256 bytes, 95 characters, the pieces of _PROBE, and room for some words
MIN_VOCAB = 512
# These words are single pieces in a vocabulary of any size.
_PROBE = "Hello world The answer is"


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a llama model; the rope dimension is the head's, n_embd // n_head."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int = 2048
    rope_freq_base: float = 10000.0
    rms_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "n_head", "n_head_kv", "n_ff", "n_ctx_train", "rope_freq_base"):
            if getattr(self, name) <= 0:
                raise FqError(f"{name} must be positive, got {getattr(self, name)}")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise FqError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads of even size")
        if self.n_head % self.n_head_kv:
            raise FqError(f"n_head {self.n_head} is not a multiple of n_head_kv {self.n_head_kv}")
        if self.n_vocab < MIN_VOCAB:
            raise FqError(f"n_vocab must be at least {MIN_VOCAB}, got {self.n_vocab}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


TINYLLAMA_1B = LlamaShape(n_layer=22, n_embd=2048, n_head=32, n_head_kv=4, n_ff=5632, n_vocab=32000)


def tiny_shape(**sizes: Any) -> LlamaShape:
    """A model of two layers and about 2 M weights, fit for every mix; `sizes` override its fields."""
    tiny = LlamaShape(n_layer=2, n_embd=256, n_head=4, n_head_kv=2, n_ff=512, n_vocab=1024, n_ctx_train=512)
    return replace(tiny, **sizes)


@default_fpu()
def write_llama_gguf(
    path: str | os.PathLike[str],
    shape: LlamaShape,
    *,
    mix: str = "Q4_K_M",
    seed: int = 0,
    tied_output: bool = False,
    rope_factors: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model of the given shape to `path`; the same arguments give the same bytes.

    `mix` is one of MIXES. Every matrix has the type the mix is named after, except under Q4_K_M,
    which follows llama.cpp's recipe: Q6_K for the output matrix (token_embd if it is tied) and
    for attn_v and ffn_down in half of the layers. Norm weights are F32.
    `rope_factors`: head_dim / 2 divisors of the rope frequencies, written as rope_freqs.weight.
    `progress(done, total)` is called after each tensor with counts of bytes.

    The file appears under its name only when complete. Raises FqError for an unknown mix, a row
    length that its blocks do not divide, or a wrong number of factors; OSError from writing.
    """
    import gguf  # takes half a second to import

    if mix not in _MIXES:
        raise FqError(f"unknown mix {mix!r}; choose one of {', '.join(MIXES)}")
    if seed < 0:
        raise FqError(f"seed must not be negative, got {seed}")
    if rope_factors is not None and len(rope_factors) != shape.head_dim // 2:
        raise FqError(f"rope_factors needs {shape.head_dim // 2} values, got {len(rope_factors)}")

    path = Path(path)
    # A dot file beside the target: os.replace is atomic only within one file system.
    unfinished = path.with_name(f".fq-{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_name(f"{RANDOM_WEIGHTS}, seed {seed}")
    writer.add_file_type(_MIXES[mix][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_freq_base(shape.rope_freq_base)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.n_vocab)
    _add_vocabulary(writer, shape.n_vocab)

    tensors = list(_tensors(shape, mix, tied_output))
    if rope_factors is not None:
        tensors.insert(0, ("rope_freqs.weight", (shape.head_dim // 2,), "F32"))
    planned = []
    for name, dims, type_name in tensors:
        ggml_type = gguf.GGMLQuantizationType[type_name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        if dims[-1] % block:
            raise FqError(f"{name}: rows of {dims[-1]} do not divide into {type_name} blocks of {block}")
        byte_dims = (*dims[:-1], dims[-1] // block * block_bytes)
        planned.append((name, dims, type_name, byte_dims))
        writer.add_tensor_info(name, byte_dims, np.dtype(np.uint8), prod(byte_dims), raw_dtype=ggml_type)

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(prod(byte_dims) for *_, byte_dims in planned)
        for name, dims, type_name, byte_dims in planned:
            # A stream of its own for each tensor: norms are the same in every mix.
            rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
            if name == "rope_freqs.weight":
                data = np.asarray(rope_factors, "<f4").view(np.uint8)
            elif len(dims) == 1:
                data = rng.uniform(0.9, 1.1, dims).astype("<f4").view(np.uint8)
            else:
                data = _random_matrix(rng, dims, type_name, byte_dims[-1])
            writer.write_tensor_data(data)
            done += data.nbytes
            if progress is not None:
                progress(done, total)
        writer.close()
        os.replace(unfinished, path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def _tensors(shape: LlamaShape, mix: str, tied_output: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, dimensions (rows first, as numpy has them) and type of each tensor, in file order."""
    embd, ff, kv = shape.n_embd, shape.n_ff, shape.n_head_kv * shape.head_dim
    usual = _MIXES[mix][0]
    better = "Q6_K" if mix == "Q4_K_M" else usual
    yield "token_embd.weight", (shape.n_vocab, embd), better if tied_output else usual
    for i in range(shape.n_layer):
        v_and_down = better if _use_more_bits(i, shape.n_layer) else usual
        yield f"blk.{i}.attn_norm.weight", (embd,), "F32"
        yield f"blk.{i}.attn_q.weight", (embd, embd), usual
        yield f"blk.{i}.attn_k.weight", (kv, embd), usual
        yield f"blk.{i}.attn_v.weight", (kv, embd), v_and_down
        yield f"blk.{i}.attn_output.weight", (embd, embd), usual
        yield f"blk.{i}.ffn_norm.weight", (embd,), "F32"
        yield f"blk.{i}.ffn_gate.weight", (ff, embd), usual
        yield f"blk.{i}.ffn_up.weight", (ff, embd), usual
        yield f"blk.{i}.ffn_down.weight", (embd, ff), v_and_down
    yield "output_norm.weight", (embd,), "F32"
    if not tied_output:
        yield "output.weight", (shape.n_vocab, embd), better


def _use_more_bits(layer: int, n_layer: int) -> bool:
    """llama.cpp's choice: the first and last eighth of the layers and every third between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def _random_matrix(rng: np.random.Generator, dims: tuple[int, ...], type_name: str, row_bytes: int) -> Bytes:
    """Bytes (n_out, row_bytes) of weights with mean 0 and standard deviation 1/sqrt(n_in)."""
    n_out, n_in = dims
    data = np.empty((n_out, row_bytes), np.uint8)
    panel = max(1, (1 << 21) // n_in)  # keeps the temporaries to some 20 MB
    for start in range(0, n_out, panel):
        rows = data[start : start + panel]
        rows[:] = _BLOCKS[type_name](rng, rows.size, n_in**-0.5).reshape(rows.shape)
    return data


# Each function below returns n_bytes of whole blocks whose weights have the given deviation.
# The quants are uniform, which fixes their variance: (count**2 - 1) / 12 for `count` values.


def _normal(rng: np.random.Generator, count: int, std: float, dtype: str) -> Bytes:
    values = rng.standard_normal(count, np.float32)
    values *= std
    return values.astype(dtype).view(np.uint8)


def _f32(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    return _normal(rng, n_bytes // 4, std, "<f4")


def _f16(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    return _normal(rng, n_bytes // 2, std, "<f2")


def _start(rng: np.random.Generator, n_bytes: int, block_bytes: int, unit: float) -> tuple[Bytes, Any]:
    """Blocks of random bytes, and for each a positive scale; the scales' root mean square is `unit`."""
    blocks = rng.integers(0, 256, (n_bytes // block_bytes, block_bytes), np.uint8)
    return blocks, rng.uniform(0.75, 1.25, len(blocks)) * (unit / (1 + 0.5**2 / 12) ** 0.5)


def _f16_bytes(values: Any) -> Any:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _q4_0(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    """18 bytes: d, 32 quants; w = d * (q - 8)."""
    blocks, d = _start(rng, n_bytes, 18, std / (21.25 + 0.25) ** 0.5)
    # q - 8 has mean -1/2: either sign of d, as in real files, balances it.
    blocks[:, 0:2] = _f16_bytes(d * rng.choice([-1.0, 1.0], len(d)))
    return blocks


def _q4_1(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    """20 bytes: d, m, 32 quants; w = d * q + m."""
    blocks, d = _start(rng, n_bytes, 20, std / (21.25 + 1 / 3) ** 0.5)
    blocks[:, 0:2] = _f16_bytes(d)
    blocks[:, 2:4] = _f16_bytes(d * rng.uniform(-8.5, -6.5, len(d)))
    return blocks


def _q8_0(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    """34 bytes: d, 32 signed quants; w = d * q."""
    blocks, d = _start(rng, n_bytes, 34, std / ((255**2 - 1) / 12) ** 0.5)
    quants = blocks[:, 2:]
    quants[quants == 0x80] = 0  # -128, which no quantiser writes and kernels may rely on
    blocks[:, 0:2] = _f16_bytes(d)
    return blocks


def _q4_k(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    """144 bytes: d, dmin, 8 scales and 8 mins of 6 bits, 256 quants; w = d * sc * q - dmin * m.

    With dmin = 7.5 * d and m = sc + j it is d * (sc * (q - 7.5) - 7.5 * j), of mean 0.
    """
    variance = 21.25 * (35.5**2 + (40**2 - 1) / 12) + 7.5**2 * (17**2 - 1) / 12
    blocks, d = _start(rng, n_bytes, 144, std / variance**0.5)
    sc = rng.integers(16, 56, (len(blocks), 8), np.uint8)
    m = sc + rng.integers(0, 17, sc.shape, np.uint8) - np.uint8(8)
    blocks[:, 0:2] = _f16_bytes(d)
    blocks[:, 2:4] = _f16_bytes(7.5 * d)
    # The upper four lend the two high bits of the lower bytes; their low halves share the last four.
    blocks[:, 4:8] = sc[:, :4] | sc[:, 4:] >> 4 << 6
    blocks[:, 8:12] = m[:, :4] | m[:, 4:] >> 4 << 6
    blocks[:, 12:16] = sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return blocks


def _q6_k(rng: np.random.Generator, n_bytes: int, std: float) -> Bytes:
    """210 bytes: 256 quants (low 4 and high 2 bits apart), 16 signed scales, d; w = d * sc * (q - 32).

    Scales of either sign balance the mean of -1/2 that q - 32 has.
    """
    variance = ((64**2 - 1) / 12 + 0.25) * ((256**2 - 1) / 12 + 0.25)
    blocks, d = _start(rng, n_bytes, 210, std / variance**0.5)
    blocks[:, 208:210] = _f16_bytes(d)
    return blocks


_BLOCKS = {
    "F32": _f32,
    "F16": _f16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def _add_vocabulary(writer: Any, n_vocab: int) -> None:
    """An SPM vocabulary: control tokens, bytes, word pieces, characters, unreachable filler.

    Every piece is a prefix of a word with its leading space, so merging a word can only extend
    the piece that starts it, one character at a time, and never stops at a dead end.
    """
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    characters = ["\u2581", *map(chr, range(ord("!"), ord("~") + 1))]
    n_free = n_vocab - len(special) - len(byte_tokens) - len(characters)
    pieces = _word_pieces()[:n_free]
    filler = [f"<unused{i}>" for i in range(n_free - len(pieces))]

    normal = pieces + characters + filler
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(special + byte_tokens + normal)
    # A normal token's score falls with its place in the list; the best score merges first.
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(normal))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(normal))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _word_pieces() -> list[str]:
    """Prefixes of the sample's words, most frequent first, those of _PROBE before all others.

    A prefix stands before its extensions, so the list may be cut anywhere.
    """
    text = SAMPLE_TEXT.read_text(encoding="utf-8")[:VOCABULARY_CHARS]
    words = Counter(re.findall(r"[A-Za-z]+", text))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for end in range(1, len(word) + 1):
            counts["\u2581" + word[:end]] += count
    for word in _PROBE.split():
        for end in range(1, len(word) + 1):
            counts["\u2581" + word[:end]] += words.total()
    return sorted(counts, key=lambda piece: (-counts[piece], len(piece), piece))
