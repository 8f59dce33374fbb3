"""Synthetic model files, read back with gguf-py: types, shapes, spread, vocabulary, atomic writing."""

from __future__ import annotations

import re
from itertools import pairwise

import gguf
import numpy as np
import pytest

from fq.errors import FqError
from fq.gguf.synthetic import (
    MIN_VOCAB,
    MIXES,
    SAMPLE_TEXT,
    TINYLLAMA_1B,
    VOCABULARY_CHARS,
    LlamaShape,
    _use_more_bits,
    tiny_shape,
    write_llama_gguf,
)

PLAIN_TYPES = {"F32": "F32", "F16": "F16", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15}


def write(path, shape, **options):
    write_llama_gguf(path, shape, **options)
    return gguf.GGUFReader(path)


def tensors(reader):
    """name -> (type name, shape as numpy has it, dequantised weights)"""
    return {
        t.name: (
            t.tensor_type.name,
            tuple(int(n) for n in reversed(t.shape)),
            gguf.quants.dequantize(t.data, t.tensor_type),
        )
        for t in reader.tensors
    }


def field(reader, key):
    return reader.fields[key].contents()


def expected_shapes(shape: LlamaShape, tied: bool):
    kv = shape.n_embd // shape.n_head * shape.n_head_kv
    layer = {
        "attn_norm": (shape.n_embd,),
        "attn_q": (shape.n_embd, shape.n_embd),
        "attn_k": (kv, shape.n_embd),
        "attn_v": (kv, shape.n_embd),
        "attn_output": (shape.n_embd, shape.n_embd),
        "ffn_norm": (shape.n_embd,),
        "ffn_gate": (shape.n_ff, shape.n_embd),
        "ffn_up": (shape.n_ff, shape.n_embd),
        "ffn_down": (shape.n_embd, shape.n_ff),
    }
    shapes = {f"blk.{i}.{name}.weight": dims for i in range(shape.n_layer) for name, dims in layer.items()}
    shapes |= {"token_embd.weight": (shape.n_vocab, shape.n_embd), "output_norm.weight": (shape.n_embd,)}
    if not tied:
        shapes["output.weight"] = (shape.n_vocab, shape.n_embd)
    return shapes


@pytest.mark.parametrize("mix", MIXES)
def test_types_shapes_and_spread(tmp_path, mix):
    shape = tiny_shape(n_layer=3, n_vocab=9000)  # token_embd spans more than one panel
    found = tensors(write(tmp_path / "m.gguf", shape, mix=mix))
    assert {name: dims for name, (_, dims, _) in found.items()} == expected_shapes(shape, tied=False)
    for name, (type_name, dims, weights) in found.items():
        assert weights.shape == dims
        assert np.isfinite(weights).all(), name
        if len(dims) == 1:
            assert type_name == "F32"
            assert 0.9 <= weights.min() < 0.92 and 1.08 < weights.max() <= 1.1
            continue
        # of three layers, llama.cpp gives only the last more bits (7 * 3 / 8 = 2)
        better = name in ("output.weight", "blk.2.attn_v.weight", "blk.2.ffn_down.weight")
        assert type_name == ("Q6_K" if better and mix == "Q4_K_M" else PLAIN_TYPES[mix]), name
        std = dims[1] ** -0.5
        assert abs(weights.std() / std - 1) < 0.03, name
        assert abs(weights.mean()) < 0.02 * std, name
        # no row was left unwritten or written twice
        assert weights.std(axis=1).min() > 0.2 * std, name
        assert len(np.unique(weights, axis=0)) == len(weights), name


def test_q4_k_fields_use_all_their_bits(tmp_path):
    reader = write(tmp_path / "m.gguf", tiny_shape())
    (data,) = (t.data for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    scales, mins = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(data.reshape(-1, 144)[:, 4:16]))
    assert scales.min() == 16 and scales.max() == 55
    assert mins.min() <= 12 and mins.max() >= 59
    # equal fields would hide a kernel that swaps them
    difference = mins.astype(int) - scales
    assert set(np.unique(difference)) == set(range(-8, 9))
    assert abs(difference.mean()) < 0.5


def test_q8_0_has_no_quant_of_minus_128(tmp_path):
    reader = write(tmp_path / "m.gguf", tiny_shape(), mix="Q8_0")
    (data,) = (t.data for t in reader.tensors if t.name == "token_embd.weight")
    quants = data.reshape(-1, 34)[:, 2:].view(np.int8)
    assert quants.min() == -127 and quants.max() == 127


def test_metadata(tmp_path):
    shape = tiny_shape(rope_freq_base=5e5, rms_eps=1e-6)
    for mix in MIXES:
        reader = write(tmp_path / "m.gguf", shape, mix=mix)
        assert field(reader, "general.file_type") == FILE_TYPES[mix]
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "general.quantization_version") == 2
    assert "seed 0" in field(reader, "general.name")
    llama = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "rope.freq_base": 5e5,
        "rope.dimension_count": 64,
        "vocab_size": 1024,
    }
    assert {key: field(reader, f"llama.{key}") for key in llama} == llama


def test_tied_output_takes_the_better_type(tmp_path):
    shape = tiny_shape()
    found = tensors(write(tmp_path / "m.gguf", shape, tied_output=True))
    assert {name: dims for name, (_, dims, _) in found.items()} == expected_shapes(shape, tied=True)
    assert found["token_embd.weight"][0] == "Q6_K"


def test_rope_factors(tmp_path):
    factors = np.linspace(1, 8, 32)
    found = tensors(write(tmp_path / "m.gguf", tiny_shape(), rope_factors=factors))
    type_name, dims, values = found["rope_freqs.weight"]
    assert (type_name, dims) == ("F32", (32,))
    np.testing.assert_array_equal(values, factors.astype(np.float32))


def test_more_bits_in_half_of_the_layers():
    layers = [i for i in range(22) if _use_more_bits(i, 22)]
    assert layers == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]
    # 7 * 20 / 8 rounds down, so layer 17 is in the last eighth
    assert [i for i in range(20) if _use_more_bits(i, 20)] == [0, 1, 4, 7, 10, 13, 16, 17, 18, 19]


def test_tinyllama_shape():
    assert LlamaShape(22, 2048, 32, 4, 5632, 32000, 2048, 10000.0, 1e-5) == TINYLLAMA_1B
    assert TINYLLAMA_1B.head_dim == 64


@pytest.mark.parametrize("mix", MIXES)
def test_same_arguments_same_bytes(tmp_path, mix):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_llama_gguf(tmp_path / name, tiny_shape(n_layer=1), mix=mix, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    one, other = (gguf.GGUFReader(tmp_path / name).tensors for name in "ac")
    assert not any(np.array_equal(a.data, c.data) for a, c in zip(one, other, strict=True))


def test_tensors_differ_and_norms_do_not_depend_on_the_mix(tmp_path):
    found = tensors(write(tmp_path / "a", tiny_shape(), mix="F32"))
    assert not np.array_equal(found["blk.0.ffn_up.weight"][2], found["blk.0.ffn_gate.weight"][2])
    assert not np.array_equal(found["blk.0.ffn_up.weight"][2], found["blk.1.ffn_up.weight"][2])
    other = tensors(write(tmp_path / "b", tiny_shape(), mix="Q4_0"))
    np.testing.assert_array_equal(found["output_norm.weight"][2], other["output_norm.weight"][2])


def read_vocabulary(path, n_vocab):
    reader = write(path, tiny_shape(n_layer=1, n_vocab=n_vocab), mix="Q4_0")
    return [field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")]


def merge_by_score(text, scores):
    """SPM's rule, naively: of all neighbours that form a piece, join the best; ties to the left."""
    pieces = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("n_vocab", [MIN_VOCAB, 1024, 9000])
def test_vocabulary(tmp_path, n_vocab):
    tokens, scores, types = read_vocabulary(tmp_path / "m.gguf", n_vocab)
    assert len(tokens) == len(scores) == len(types) == len(set(tokens)) == n_vocab
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[:3] == [2, 3, 3]
    assert tokens[3:259] == [f"<0x{b:02X}>" for b in range(256)] and set(types[3:259]) == {6}
    assert set(types[259:]) == {1}
    assert {chr(c) for c in range(33, 127)} | {"\u2581"} <= set(tokens[259:])
    assert sorted(scores[259:], reverse=True) == scores[259:]

    normal = dict(zip(tokens[259:], scores[259:], strict=True))
    assert len(set(normal.values())) == len(normal)
    assert merge_by_score("\u2581Hello\u2581world", normal) == ["\u2581Hello", "\u2581world"]
    assert merge_by_score("\u2581The\u2581answer\u2581is", normal) == [
        "\u2581The",
        "\u2581answer",
        "\u2581is",
    ]
    # every piece can be reached by merging, or is filler that cannot
    for piece in normal:
        unused = piece.startswith("<unused")
        assert (merge_by_score(piece, normal) == [piece]) is not unused, piece


def test_full_vocabulary_knows_every_word_of_its_part_of_the_sample(tmp_path):
    tokens, scores, _ = read_vocabulary(tmp_path / "m.gguf", 9000)
    assert any(token.startswith("<unused") for token in tokens)
    normal = dict(zip(tokens[259:], scores[259:], strict=True))
    part = SAMPLE_TEXT.read_text()[:VOCABULARY_CHARS]
    assert part.endswith("write the number down.\n")
    for word in set(re.findall(r"[A-Za-z]+", part)):
        assert merge_by_score("\u2581" + word, normal) == ["\u2581" + word]


def test_special_tokens(tmp_path):
    reader = write(tmp_path / "m.gguf", tiny_shape(n_layer=1))
    expected = {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert {key: field(reader, f"tokenizer.ggml.{key}") for key in expected} == expected


def test_sample_text():
    text = SAMPLE_TEXT.read_bytes().decode("ascii")
    # each word and each mark is at least one token of any vocabulary
    assert len(re.findall(r"\w+|[^\w\s]", text)) > 16 * 512
    assert text.count("Hello world") == text.count("The answer is") == 1
    assert text.endswith(".\n") and "\n\n\n" not in text and "  " not in text


class Interrupt(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("existing", [None, b"kept"])
def test_interrupted_write_leaves_nothing(tmp_path, existing):
    path = tmp_path / "m.gguf"
    if existing is not None:
        path.write_bytes(existing)
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if len(calls) == 5:
            others = [p for p in tmp_path.iterdir() if p != path]
            assert len(others) == 1 and others[0].stat().st_size > 0
            raise Interrupt

    with pytest.raises(Interrupt):
        write_llama_gguf(path, tiny_shape(), progress=progress)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if existing is None else [existing])


def test_progress_ends_at_the_total_and_the_file_is_alone(tmp_path):
    calls = []
    reader = write(
        tmp_path / "m.gguf", tiny_shape(), progress=lambda done, total: calls.append((done, total))
    )
    assert len(calls) == len(reader.tensors)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {calls[-1][0]} == {sum(t.n_bytes for t in reader.tensors)}
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {"mix": "Q4_K_X"}, "mix"),
        ({}, {"seed": -1}, "seed"),
        ({}, {"rope_factors": [1.0]}, "rope_factors"),
        ({"n_embd": 128}, {}, "token_embd.weight"),
        ({"n_ff": 320}, {}, "ffn_down"),
        ({"n_vocab": MIN_VOCAB - 1}, {}, "n_vocab"),
        ({"n_layer": 0}, {}, "n_layer"),
        ({"n_head": 3}, {}, "n_embd"),
        ({"n_head": 256, "n_head_kv": 256}, {}, "even"),
        ({"n_head_kv": 3}, {}, "n_head_kv"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, sizes, options, message):
    with pytest.raises(FqError, match=message):
        write_llama_gguf(tmp_path / "m.gguf", tiny_shape(**sizes), **options)
    assert list(tmp_path.iterdir()) == []
