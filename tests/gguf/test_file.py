"""The GGUF reader: agreement with gguf-py on good files, typed errors and nothing else on bad ones."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import pickle
import re
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    HEADER_BYTES,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    pair,
    string,
    tensor,
    u32,
    u64,
)
from gguf_builder import gguf as build
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fq.errors import FqError
from fq.gguf.file import GGUFError, GGUFFile
from fq.gguf.types import GGML_TYPES, GGMLType, row_size
from fq_kernels import GGUFStrings

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Write bytes to a file and give its path."""

    def save(raw: bytes, name: str = "m.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(raw)
        return path

    return save


def refuse(path: Path) -> GGUFError:
    """The error that opening `path` gives; checks what holds for all of them."""
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    error = caught.value
    assert isinstance(error, FqError)
    assert error.path == str(path)
    text = str(error)
    assert str(path) in text and len(text.splitlines()) == 1 and text.isprintable()
    if error.offset is not None:
        assert 0 <= error.offset <= path.stat().st_size
        assert f"at byte {error.offset}:" in text
    return error


# ---- the table of types


def test_table_equals_gguf_py() -> None:
    theirs = {int(t): (int(t), t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {type_id: tuple(entry) for type_id, entry in GGML_TYPES.items()}
    # gguf-py up to 0.19 counts two F32 in a block of Q8_1, ggml two F16 (the next test has ggml's word).
    assert ours.pop(9) == (9, "Q8_1", 32, 36)
    assert theirs.pop(9)[:3] == (9, "Q8_1", 32)
    newer = {ours.pop(type_id)[1] for type_id in ours.keys() - theirs.keys()}
    assert newer <= {"NVFP4", "Q1_0", "Q2_0"}  # what the gguf-py versions in use may lack
    assert ours == theirs


def test_table_equals_ggml() -> None:
    spec = importlib.util.find_spec("libggml")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    header = (root / "include" / "ggml.h").read_text()
    named = re.findall(r"^\s*GGML_TYPE_(\w+)\s*=\s*(\d+),", header, re.MULTILINE)
    theirs = {int(number): name for name, number in named if name != "COUNT"}
    assert {type_id: entry.name for type_id, entry in GGML_TYPES.items()} == theirs
    ggml = ctypes.CDLL(str(root / "lib64" / "libggml-base.so"))
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    for type_id, entry in GGML_TYPES.items():
        assert ggml.ggml_blck_size(type_id) == entry.block_size, entry
        assert ggml.ggml_type_size(type_id) == entry.type_size, entry


def test_row_size() -> None:
    assert row_size(GGML_TYPES[30], 7) == 14
    assert row_size(GGML_TYPES[12], 2048) == 8 * 144
    assert row_size(GGML_TYPES[12], 0) == 0
    for n in (255, 257, -256):
        with pytest.raises(ValueError, match=r"Q4_K blocks of 256"):
            row_size(GGML_TYPES[12], n)


# ---- good files

WORDS = ["", "a", "Ġthe", "naïve", "日本語", "\n", "x" * 300, "\0"]
TENSORS = {
    "token_embd.weight": ((64, 512), gguf.GGMLQuantizationType.Q4_K),
    "norm.weight": ((33,), gguf.GGMLQuantizationType.F32),
    "half": ((3, 5), gguf.GGMLQuantizationType.F16),
    "brain": ((2, 7), gguf.GGMLQuantizationType.BF16),
    "q8": ((2, 3, 4, 64), gguf.GGMLQuantizationType.Q8_0),
    "q6": ((9, 256), gguf.GGMLQuantizationType.Q6_K),
    "q41": ((5, 96), gguf.GGMLQuantizationType.Q4_1),
    "ids": ((4, 2, 3), gguf.GGMLQuantizationType.I32),
}


def write_good(path: Path, alignment: int | None = None, tensors: bool = True) -> None:
    """All value types and, unless without `tensors`, one tensor of each kind above."""
    writer = gguf.GGUFWriter(path, "test")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1e-5)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "naïve\nΩ")
    writer.add_array("words", WORDS)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("bools", [True, False, True])
    writer.add_array("bytes", b"\x00\x01\xff")
    if tensors:
        rng = np.random.default_rng(0)
        for name, (shape, kind) in TENSORS.items():
            entry = GGML_TYPES[int(kind)]
            packed = (*shape[:-1], row_size(entry, shape[-1]))
            writer.add_tensor(name, rng.integers(0, 256, packed, np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 32, 64, 8])
@pytest.mark.parametrize("version", [2, 3])
def test_agrees_with_gguf_py(tmp_path: Path, alignment: int | None, version: int) -> None:
    path = tmp_path / "good.gguf"
    write_good(path, alignment)
    raw = bytearray(path.read_bytes())
    raw[4:8] = u32(version)
    path.write_bytes(raw)

    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        assert (ours.path, ours.size, ours.version) == (str(path), len(raw), version)
        assert ours.alignment == theirs.alignment == (alignment or 32)

        fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields) and len(ours.metadata) == len(fields)
        for key, field in fields.items():
            value, expected = ours.metadata[key], field.contents()
            if isinstance(value, np.ndarray):
                assert value.dtype == field.parts[field.data[0]].dtype
                assert not value.flags.owndata and not value.flags.writeable
                value = value.tolist()
            if isinstance(value, GGUFStrings):
                value = list(value)
            assert type(value) is type(expected) and value == expected, key

        assert list(ours.tensors) == [t.name for t in theirs.tensors] == list(TENSORS)
        for expected in theirs.tensors:
            info = ours.tensors[expected.name]
            assert info.name == expected.name
            assert info.shape == tuple(expected.shape.tolist()[::-1]) == TENSORS[info.name][0]
            assert info.type.id == expected.tensor_type
            assert (info.offset, info.n_bytes) == (expected.data_offset, expected.n_bytes)
            assert info.n_elements == expected.n_elements
            packed = ours.tensor(info.name)
            assert packed.shape == (info.n_rows, info.row_bytes) and packed.dtype == np.uint8
            assert info.n_rows * info.shape[-1] == info.n_elements
            assert packed.tobytes() == expected.data.tobytes()


def test_shape_is_outermost_first(save: Any) -> None:
    f = GGUFFile(save(build([], [tensor("w", [576, 4])], bytes(576 * 4 * 4))))
    assert f.tensors["w"].shape == (4, 576)
    assert f.tensors["w"].type == GGMLType(0, "F32", 1, 4)
    assert (f.tensors["w"].n_rows, f.tensors["w"].row_bytes) == (4, 2304)


def test_vocabulary_only_file_needs_no_data_section(save: Any) -> None:
    f = GGUFFile(save(build([pair("k", STRING, string("v")), pair("e", STRING, string(""))])))
    assert dict(f.metadata) == {"k": "v", "e": ""} and f.tensors == {}
    assert dict(GGUFFile(save(build())).metadata) == {}


def test_gaps_and_any_order_of_tensors_are_fine(save: Any) -> None:
    data = bytes(range(128))
    f = GGUFFile(save(build([], [tensor("b", [4], 24, 96), tensor("a", [4], 24, 0)], data)))
    assert f.tensor("b").tolist() == [[96, 97, 98, 99]]
    assert f.tensor("a").tolist() == [[0, 1, 2, 3]]


def test_limits_that_are_still_allowed(save: Any) -> None:
    key, name = "k" * 65535, "n" * 63
    pairs = [pair(key, U8, b"\x07"), pair("general.alignment", U32, u32(1))]
    f = GGUFFile(save(build(pairs, [tensor(name, [1, 1, 1, 1], 24, 1)], b"\x08\x09", alignment=1)))
    assert f.metadata[key] == 7 and f.alignment == 1
    assert f.tensor(name).tolist() == [[9]]


@pytest.mark.parametrize("item_type", [U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, U64, I64, F64])
def test_empty_array_at_the_end_of_the_file(save: Any, item_type: int) -> None:
    assert len(GGUFFile(save(build([pair("k", ARRAY, array(item_type, []))]))).metadata["k"]) == 0


@pytest.mark.parametrize(
    ("item_type", "form", "dtype", "values"),
    [
        (U8, "<B", np.uint8, [0, 255]),
        (I8, "<b", np.int8, [-128, 127]),
        (U16, "<H", np.uint16, [0, 65535]),
        (I16, "<h", np.int16, [-32768, 32767]),
        (U32, "<I", np.uint32, [0, 2**32 - 1]),
        (I32, "<i", np.int32, [-(2**31), 2**31 - 1]),
        (F32, "<f", np.float32, [0.5, -np.inf]),
        (BOOL, "<?", np.bool_, [True, False]),
        (U64, "<Q", np.uint64, [0, 2**64 - 1]),
        (I64, "<q", np.int64, [-(2**63), 2**63 - 1]),
        (F64, "<d", np.float64, [1e-300, np.inf]),
    ],
)
def test_array_types(save: Any, item_type: int, form: str, dtype: Any, values: list[Any]) -> None:
    items = [struct.pack(form, value) for value in values]
    got = GGUFFile(save(build([pair("odd", ARRAY, array(item_type, items))]))).numbers("odd")
    assert got.dtype == dtype and got.tolist() == values


def test_strings_that_are_not_utf8_lose_nothing(save: Any) -> None:
    raw = b"a\xff\xc3"
    pairs = [pair("s", STRING, string(raw)), pair("a", ARRAY, array(STRING, [string(raw), string("Ω")]))]
    f = GGUFFile(save(build(pairs)))
    assert f.metadata["s"].encode("utf-8", "surrogateescape") == raw
    assert f.metadata["a"][0].encode("utf-8", "surrogateescape") == raw
    assert f.metadata["a"][1] == "Ω"
    assert f.metadata["a"] is f.metadata["a"]  # decoded once


def test_views_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    write_good(path)
    before = path.read_bytes()
    with GGUFFile(path) as f:
        for view in (f.tensor("norm.weight"), f.metadata["ints"]):
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 0
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                view.setflags(write=True)
        with pytest.raises(TypeError):
            f.metadata["u8"] = 1  # type: ignore[index]
        with pytest.raises(AttributeError):
            f.tensors["half"].offset = 0  # type: ignore[misc]
    assert path.read_bytes() == before


def test_close(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    write_good(path)
    with GGUFFile(path) as f:
        view, copy = f.tensor("q6"), f.tensor("q6").copy()
        assert f.metadata["words"] == WORDS
    f.close()
    assert np.array_equal(view, copy)  # the map lives as long as its views
    assert f.metadata["words"] == WORDS and f.metadata["u8"] == 255
    for use in (lambda: f.tensor("q6"), lambda: f.metadata["ints"]):
        with pytest.raises(GGUFError, match="closed"):
            use()


def test_missing_tensor_names_close_ones(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    write_good(path)
    f = GGUFFile(path)
    with pytest.raises(GGUFError, match=r"norm\.wieght.*no such tensor.*norm\.weight") as caught:
        f.tensor("norm.wieght")
    assert caught.value.field == "norm.wieght"
    with pytest.raises(GGUFError, match=r"no such tensor$"):
        f.tensor("§")


# ---- typed access


def test_typed_access(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    write_good(path)
    f = GGUFFile(path)
    assert [f.uint(key) for key in ("u8", "u16", "u32", "u64")] == [255, 65535, 2**32 - 1, 2**64 - 1]
    assert f.float("f32") == float(np.float32(1e-5)) and f.float("f64") == 1e-5
    assert f.bool("yes") is True and f.bool("no") is False
    assert f.string("text") == "naïve\nΩ"
    assert f.strings("words") == WORDS
    assert f.numbers("ints").tolist() == [1, -2, 3]
    assert f.uint("none", 3) == 3 and f.uint("none", 0) == 0
    assert f.bool("none", False) is False and f.float("none", 0.5) == 0.5 and f.string("none", "") == ""


def test_uint_accepts_signed_types(save: Any) -> None:
    assert GGUFFile(save(build([pair("k", I32, u32(5))]))).uint("k") == 5


@pytest.mark.parametrize(
    ("getter", "keys"),
    {
        "uint": ["i8", "i64", "f32", "yes", "text", "ints", "words"],
        "float": ["u8", "i8", "yes", "text", "floats"],
        "bool": ["u8", "f32", "text", "bools"],
        "string": ["u8", "f32", "yes", "words", "bytes"],
        "strings": ["text", "ints"],
        "numbers": ["u8", "text", "words"],
    }.items(),
)
def test_typed_access_refuses_other_types(tmp_path: Path, getter: str, keys: list[str]) -> None:
    path = tmp_path / "good.gguf"
    write_good(path)
    f, raw = GGUFFile(path), path.read_bytes()
    for key in keys:
        with pytest.raises(GGUFError, match="should be") as caught:
            getattr(f, getter)(key)
        assert caught.value.field == key and caught.value.offset == raw.index(string(key))
    with pytest.raises(GGUFError, match=r"llama\.block_count.*no such key") as caught:
        getattr(f, getter)("llama.block_count")
    assert caught.value.field == "llama.block_count" and caught.value.offset is None


# ---- malformed files
#
# Each case: the bytes, the field at fault, the offset named, a piece of the message.

H = HEADER_BYTES
BYTE = 24  # the tensor type I8, one byte per element
AT = H + 8 + 1 + 4  # where the value of a first pair with a one-letter key starts
ALIGN = "general.alignment"
MIB = bytes(1 << 20)


def after_name(name: str | bytes) -> int:
    """Where n_dims of a first tensor without pairs before it stands; dims follow 4 bytes later."""
    return H + 8 + len(name)


def offset_at(name: str, n_dims: int = 1) -> int:
    return after_name(name) + 4 + 8 * n_dims + 4


def aligned(type_id: int, value: bytes) -> bytes:
    return build([pair(ALIGN, type_id, value)], [tensor("w", [1], BYTE)], bytes(64))


MALFORMED: dict[str, tuple[bytes, str, int, str]] = {
    # header
    "magic-wrong": (build(magic=b"GGML"), "magic", 0, "not a GGUF file"),
    "magic-byte-swapped": (build(magic=b"FUGG"), "magic", 0, "not a GGUF file"),
    "magic-short": (b"GGU", "magic", 0, "not a GGUF file"),
    "only-magic": (b"GGUF", "version", 4, "0 left"),
    "version-0": (build(version=0), "version", 4, "version 0 is not supported"),
    "version-1": (build(version=1), "version", 4, "version 1 is not supported"),
    "version-4": (build(version=4), "version", 4, "version 4 is not supported"),
    "version-2-big-endian": (build(version=2 << 24), "version", 4, "big-endian"),
    "version-3-big-endian": (build(version=3 << 24), "version", 4, "big-endian"),
    "tensor-count-huge": (build(n_tensors=2**64 - 1), "tensor_count", 8, "cannot fit"),
    "tensor-count-past-file": (build(data=bytes(400), n_tensors=13), "tensor_count", 8, "cannot fit"),
    "kv-count-huge": (build(n_pairs=2**63), "kv_count", 16, "cannot fit"),
    "kv-count-past-file": (build(data=bytes(100), n_pairs=8), "kv_count", 16, "cannot fit"),
    "counts-past-file-together": (
        build([pair("k", U8, b"\0")], [tensor("w", [1], BYTE)], n_pairs=2),
        "kv_count",
        16,
        "cannot fit",
    ),
    # keys
    "key-empty": (build([pair("", U8, b"\0\0")]), "kv[0]", H, "0 bytes long"),
    "key-too-long": (build([pair("k" * 65536, U8, b"\0")]), "kv[0]", H, "65536 bytes long"),
    "key-length-past-file": (build([string("k", 60000) + bytes(20)]), "kv[0]", H + 8, "60000 bytes"),
    "key-length-wraps": (build([string("k", 2**64 - 8) + bytes(20)]), "kv[0]", H, "allowed are 1 to"),
    "key-not-utf8": (build([pair(b"ab\xff", U8, b"\0")]), "kv[0]", H + 10, "not UTF-8"),
    "key-surrogate": (build([pair(b"\xed\xa0\x80", U8, b"\0")]), "kv[0]", H + 8, "not UTF-8"),
    "key-twice": (
        build([pair("k", U8, b"\0"), pair("k", U32, u32(1))]),
        "k",
        H + len(pair("k", U8, b"\0")),
        "twice",
    ),
    "key-second-bad": (build([pair("k", U8, b"\0"), pair("", U8, b"\0\0")]), "kv[1]", AT + 1, "0 bytes long"),
    # values
    "value-type-unknown": (build([pair("k", 13, b"\0")]), "k", AT - 4, "unknown value type 13"),
    "value-type-huge": (build([pair("k", 2**32 - 1, b"\0")]), "k", AT - 4, "unknown value type"),
    "value-missing": (build([pair("k", U64, b"\0" * 7)]), "k", AT, "takes 8 bytes, but the file has 7"),
    "bool-2": (build([pair("k", BOOL, b"\2")]), "k", AT, "bool is 0 or 1, here it is 2"),
    "bool-255": (build([pair("k", BOOL, b"\xff")]), "k", AT, "bool is 0 or 1"),
    "bool-missing": (build([pair("kk", BOOL, b"")]), "kk", AT + 1, "0 left"),
    "string-past-file": (build([pair("k", STRING, string("abc", 4))]), "k", AT + 8, "takes 4 bytes"),
    "string-length-wraps": (build([pair("k", STRING, string("", 2**64 - 1))]), "k", AT + 8, "takes 184467"),
    "string-length-cut": (build([pair("k", STRING, b"\0" * 7)]), "k", AT, "length"),
    # arrays
    "array-nested": (
        build([pair("k", ARRAY, array(ARRAY, [array(U8, [b"\0"])]))]),
        "k",
        AT,
        "arrays of arrays",
    ),
    "array-item-type-unknown": (build([pair("k", ARRAY, array(13, []))]), "k", AT, "item type 13"),
    "array-item-type-missing": (build([pair("k", ARRAY, b"\0\0")]), "k", AT, "item type"),
    "array-count-missing": (build([pair("k", ARRAY, u32(U8) + b"\0")]), "k", AT + 4, "array's length"),
    "array-count-past-file": (
        build([pair("k", ARRAY, array(U32, [u32(1)], 2))]),
        "k",
        AT + 4,
        "takes at least 8 bytes, 4 are left",
    ),
    "array-count-huge": (build([pair("k", ARRAY, array(U8, [], 2**64 - 1))]), "k", AT + 4, "are left"),
    "array-bytes-wrap": (build([pair("k", ARRAY, array(U64, [u64(0)], 2**61 + 1))]), "k", AT + 4, "are left"),
    "array-strings-past-file": (
        build([pair("k", ARRAY, array(STRING, [string("")], 2))]),
        "k",
        AT + 4,
        "takes at least 16 bytes, 8 are left",
    ),
    "array-string-too-long": (
        build([pair("k", ARRAY, array(STRING, [string("ab"), string("abc", 4)]))]),
        "k",
        AT + 12 + 10,
        "past the end",
    ),
    "array-string-length-wraps": (
        build([pair("k", ARRAY, array(STRING, [string("", 2**64 - 8), string("ab")]))]),
        "k",
        AT + 12,
        "past the end",
    ),
    "array-string-length-cut": (
        build([pair("k", ARRAY, array(STRING, [string("abcdefgh"), b"\0" * 4]))]),
        "k",
        AT + 12 + 16,
        "past the end",
    ),
    "array-bool-3": (build([pair("k", ARRAY, array(BOOL, [b"\1", b"\3"]))]), "k", AT + 13, "here it is 3"),
    # alignment
    "alignment-0": (aligned(U32, u32(0)), ALIGN, H, "not a power of two"),
    "alignment-24": (aligned(U32, u32(24)), ALIGN, H, "not a power of two"),
    "alignment-huge": (aligned(U32, u32(1 << 31)), ALIGN, H, "not a power of two from 1 to"),
    "alignment-uint64": (aligned(U64, u64(32)), ALIGN, H, "uint32"),
    "alignment-int32": (aligned(I32, u32(32)), ALIGN, H, "uint32"),
    "alignment-array": (aligned(ARRAY, array(U32, [u32(32)])), ALIGN, H, "uint32"),
    "alignment-string": (aligned(STRING, string("32")), ALIGN, H, "uint32"),
    # tensor infos
    "name-empty": (build([], [tensor("", [1, 1], BYTE)], MIB), "tensor[0]", H, "0 bytes long"),
    "name-64-bytes": (build([], [tensor("n" * 64, [1], BYTE)], MIB), "tensor[0]", H, "64 bytes long"),
    "name-not-utf8": (build([], [tensor(b"a\x80", [1], BYTE)], MIB), "tensor[0]", H + 9, "not UTF-8"),
    "name-past-file": (
        build([], [string("w", 60) + bytes(30)]),
        "tensor[0]",
        H + 8,
        "takes 60 bytes, but the file has 31 left",
    ),
    "name-twice": (
        build([], [tensor("w", [1], BYTE), tensor("w", [1], BYTE, 32)], MIB),
        "w",
        H + len(tensor("w", [1])),
        "two tensors",
    ),
    "no-dims": (build([], [tensor("w", [], BYTE)], MIB), "w", after_name("w"), "has 0 dimensions"),
    "five-dims": (build([], [tensor("w", [1] * 5, BYTE)], MIB), "w", after_name("w"), "has 5 dimensions"),
    "dims-huge": (
        build([], [tensor("w", [1], BYTE, n_dims=2**32 - 1)], MIB),
        "w",
        after_name("w"),
        "dimensions",
    ),
    "dims-past-file": (
        build([], [tensor("w", [1], n_dims=4)]),
        "w",
        after_name("w") + 4 + 16,
        "a dimension takes 8 bytes, but the file has 4 left",
    ),
    "dim-0": (build([], [tensor("w", [4, 0], BYTE)], MIB), "w", after_name("w") + 12, "dimension 1 is 0"),
    "dim-negative": (build([], [tensor("w", [2**64 - 1], BYTE)], MIB), "w", after_name("w") + 4, "2^63"),
    "dims-product-wraps-to-0": (
        build([], [tensor("w", [2**32, 2**32], BYTE)], MIB),
        "w",
        after_name("w") + 4,
        "2^63",
    ),
    "dims-product-wraps-to-small": (
        build([], [tensor("w", [2**62, 3, 3], BYTE)], MIB),
        "w",
        after_name("w") + 4,
        "2^63",
    ),
    "bytes-wrap": (build([], [tensor("w", [2**61, 2], 28)], MIB), "w", offset_at("w", 2), "ends past"),
    "type-unknown": (build([], [tensor("w", [1], 99)], MIB), "w", offset_at("w") - 4, "tensor type 99"),
    "type-withdrawn": (build([], [tensor("w", [32], 4)], MIB), "w", offset_at("w") - 4, "tensor type 4"),
    "row-not-whole-blocks": (
        build([], [tensor("w", [288, 256], 12)], MIB),
        "w",
        after_name("w") + 4,
        "not whole Q4_K blocks of 256",
    ),
    "offset-not-aligned": (
        build([], [tensor("w", [1], BYTE, 16)], MIB),
        "w",
        offset_at("w"),
        "16 is not a multiple of the alignment 32",
    ),
    "offset-cut": (build([], [tensor("ww", [1], BYTE)[:-1]]), "ww", offset_at("ww"), "the offset takes 8"),
    "offset-past-file": (build([], [tensor("w", [1], BYTE, 1 << 20)], MIB), "w", offset_at("w"), "ends past"),
    "offset-wraps": (build([], [tensor("w", [64], BYTE, 2**64 - 32)], MIB), "w", offset_at("w"), "ends past"),
    "data-byte-short": (build([], [tensor("w", [33], BYTE)], bytes(32)), "w", offset_at("w"), "ends past"),
    "data-absent": (build([], [tensor("w", [1], BYTE)]), "w", offset_at("w"), "ends past"),
    "tensors-overlap": (
        build([], [tensor("v", [33], BYTE), tensor("w", [1], BYTE, 32)], MIB),
        "w",
        offset_at("w") + len(tensor("v", [1])),
        "overlaps that of v",
    ),
    "tensors-at-one-place": (
        build([], [tensor("v", [1], BYTE, 32), tensor("w", [1], BYTE, 32)], MIB),
        "w",
        offset_at("w") + len(tensor("v", [1])),
        "overlaps that of v",
    ),
    "tensor-inside-another": (
        build([], [tensor("w", [1], BYTE, 64), tensor("v", [512], BYTE)], MIB),
        "w",
        offset_at("w"),
        "overlaps that of v",
    ),
    "a-line-break-in-a-key": (build([pair("a\nb\x1b[31m", 13, b"\0")]), "a\nb\x1b[31m", AT + 3, "unknown"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(save: Any, case: str) -> None:
    raw, field, offset, message = MALFORMED[case]
    error = refuse(save(raw))
    assert (error.field, error.offset) == (field, offset), error
    assert message in str(error)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    write_good(path)
    raw = path.read_bytes()
    data_start = min(info.offset for info in GGUFFile(path).tensors.values())
    for n in range(1, data_start):
        path.write_bytes(raw[:n])
        assert refuse(path).field is not None
    for info in GGUFFile(_rewrite(path, raw)).tensors.values():
        for n in (info.offset, info.offset + info.n_bytes - 1):
            assert refuse(_rewrite(path, raw[:n])).field in TENSORS


def _rewrite(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def test_message_names_file_field_and_byte(save: Any) -> None:
    path = save(build([pair("k", 13, b"\0")]))
    assert str(refuse(path)) == f"{path}: k at byte 33: unknown value type 13"


def test_error_survives_pickling(save: Any) -> None:
    error = refuse(save(build(version=1)))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and (again.offset, again.field) == (4, "version")


# ---- things that are not a file to be read


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    assert str(caught.value) == f"{path}: cannot be opened: No such file or directory"
    assert caught.value.field is caught.value.offset is None


def test_empty_file(save: Any) -> None:
    assert "is empty" in str(refuse(save(b"")))


def test_directory(tmp_path: Path) -> None:
    assert "is a directory" in str(refuse(tmp_path))


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert "not a regular file" in str(refuse(path))


def test_socket() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder, "s")  # socket paths must be short
        listener.bind(str(path))
        assert "cannot be opened" in str(refuse(path))


def test_permission_error_is_typed(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = save(build())
    monkeypatch.setattr(os, "open", deny)
    assert "cannot be opened: Permission denied" in str(refuse(path))


def test_unusual_paths(save: Any, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="null"):
        GGUFFile("a\0b")
    with pytest.raises(GGUFError) as caught:
        GGUFFile(save(b"x", "two\nlines"))
    assert len(str(caught.value).splitlines()) == 1
    assert GGUFFile(os.fsencode(save(build()))).size == HEADER_BYTES


def test_descriptors_are_not_leaked(save: Any) -> None:
    paths = [save(build()), save(build(version=1), "bad.gguf")]
    GGUFFile(paths[0]).close()
    refuse(paths[1])
    gc.collect()
    links = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert not set(links) & set(paths)


# ---- fuzzing


def use_all(path: Path) -> None:
    """Open `path` and touch everything; GGUFError from the opening is the only exception let off."""
    try:
        f = GGUFFile(path)
    except GGUFError as error:
        assert len(str(error).splitlines()) == 1
        return
    for value in f.metadata.values():
        assert isinstance(value, (bool, int, float, str, GGUFStrings, np.ndarray))
        if isinstance(value, np.ndarray):
            value.tobytes()
        if isinstance(value, GGUFStrings):
            assert value.find(value[:]).keys() == {*value}
    for name in f.tensors:
        assert f.tensor(name).nbytes == f.tensors[name].n_bytes
        f.tensor(name).sum()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    write_good(path)
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_fuzz_changed_bytes(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(good)
    n_head = good.index(b"ids") + 48
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, n_head - 1))] = data.draw(st.integers(0, 255))
    use_all(_rewrite(tmp_path / "f.gguf", bytes(raw)))


@FUZZ
@given(data=st.data())
def test_fuzz_changed_words(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(good)
    extreme = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1])
    at = data.draw(st.integers(0, good.index(b"ids") + 40))
    raw[at : at + 8] = u64(data.draw(extreme))
    use_all(_rewrite(tmp_path / "f.gguf", bytes(raw)))


@FUZZ
@given(raw=st.binary(max_size=400))
@example(raw=b"\0")
def test_fuzz_random_bytes(tmp_path: Path, raw: bytes) -> None:
    use_all(_rewrite(tmp_path / "f.gguf", raw or b"?"))
    use_all(_rewrite(tmp_path / "f.gguf", build() + raw))
    counts = build(n_tensors=len(raw) // 64, n_pairs=len(raw) // 32)
    use_all(_rewrite(tmp_path / "f.gguf", counts + raw))
