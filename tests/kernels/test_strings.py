"""Arrays of strings in a GGUF file: as Python reads them, and never past the end of the data."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fq_kernels import GGUFStrings

BYTES = st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode))


def packed(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(s)) + s for s in strings)


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@given(strings=BYTES, before=st.binary(max_size=9), after=st.binary(max_size=9))
def test_what_python_reads(strings: list[bytes], before: bytes, after: bytes) -> None:
    array = GGUFStrings(before + packed(strings) + after, len(before), len(strings))
    expected = [text(s) for s in strings]
    assert isinstance(array, Sequence) and len(array) == len(expected)
    assert list(array) == array[:] == expected and array == expected and array != [*expected, ""]
    assert array[1::2] == expected[1::2] and array[::-1] == expected[::-1]
    assert [array[-1 - i] for i in range(len(array))] == expected[::-1]
    assert array.longest == max(map(len, strings), default=0)
    assert array.end == len(before) + len(packed(strings))
    assert GGUFStrings.of(expected) == array


@given(strings=BYTES, others=BYTES)
@example(strings=[b"a", b"b", b"a", b""], others=[b"c", b"a"])
def test_find_and_hashes(strings: list[bytes], others: list[bytes]) -> None:
    array = GGUFStrings(packed(strings), 0, len(strings))
    expected = [text(s) for s in strings]
    wanted = {text(s) for s in strings[::2] + others}
    first = {t: i for i, t in reversed([*enumerate(expected)]) if t in wanted}
    assert list(array.find(wanted).items()) == sorted(first.items(), key=lambda item: item[1])
    hashes = array.hashes()
    assert hashes.dtype == np.uint64 and len(np.unique(hashes)) == len(set(expected))


@pytest.mark.parametrize("length", [6, 7, 2**31, 2**63 - 8, 2**63, 2**64 - 1])
def test_a_string_that_reaches_past_the_end(length: int) -> None:
    data = packed([b"ab"]) + struct.pack("<Q", length) + b"12345"
    with pytest.raises(ValueError, match="string 1 reaches past the end") as caught:
        GGUFStrings(data, 0, 2)
    assert caught.value.args[1] == 10


@pytest.mark.parametrize("left", range(8))
def test_a_length_that_reaches_past_the_end(left: int) -> None:
    data = packed([b"ab" * 8]) + bytes(left)
    with pytest.raises(ValueError, match="string 1 reaches past the end") as caught:
        GGUFStrings(data, 0, 2)
    assert caught.value.args[1] == 24


@pytest.mark.parametrize("count", [-1, 3, 2**62, 2**70])
def test_more_strings_than_fit(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} strings cannot fit in the 16 bytes left"):
        GGUFStrings(bytes(20), 4, count)


@pytest.mark.parametrize("start", [-1, 17])
def test_a_start_outside_of_the_data(start: int) -> None:
    with pytest.raises(ValueError, match=f"start must be from 0 to 16, not {start}"):
        GGUFStrings(bytes(16), start, 0)


def test_arguments() -> None:
    with pytest.raises(TypeError):
        GGUFStrings("text", 0, 0)  # type: ignore[arg-type]
    for index in (2, -3, 2**70):
        with pytest.raises(IndexError, match=rf"no string {index} in an array of 2"):
            GGUFStrings.of(["a", "b"])[index]
    strings = GGUFStrings.of(["a", "b", "a"])
    assert strings.index("b") == 1 and strings.count("a") == 2
    with pytest.raises(ValueError):
        strings.index("c")
    with pytest.raises(UnicodeEncodeError):
        GGUFStrings.of(["\ud800"])
    with pytest.raises(TypeError):
        hash(GGUFStrings.of([]))


def test_the_data_are_held_and_their_lengths_read_once(tmp_path: Path) -> None:
    """A file may change while it is open."""
    path = tmp_path / "strings"
    path.write_bytes(packed([b"ab", b"cd"]))
    with path.open("r+b") as file:
        data = mmap.mmap(file.fileno(), 0)
    array = GGUFStrings(data, 0, 2)
    with pytest.raises(BufferError):
        data.close()
    data[:8] = struct.pack("<Q", 1 << 40)
    assert array[:] == ["ab", "cd"] and list(array.find(["ab"])) == ["ab"]
