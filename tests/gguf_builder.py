"""Raw bytes of GGUF files, right or wrong: nothing here checks what it is given."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
HEADER_BYTES = 24


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A length-prefixed string; `length` lies about it."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def pair(key: str | bytes, type_id: int, value: bytes) -> bytes:
    return string(key) + u32(type_id) + value


def array(item_type: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    return u32(item_type) + u64(len(items) if count is None else count) + b"".join(items)


def tensor(
    name: str | bytes, dims: Sequence[int], type_id: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    """An info record; `dims` innermost first, as in the file."""
    count = len(dims) if n_dims is None else n_dims
    return string(name) + u32(count) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf(
    pairs: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file. `data` follows the padding; without it the file ends after the last record."""
    pairs, tensors = list(pairs), list(tensors)
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(pairs) if n_pairs is None else n_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head if data is None else head + bytes(-len(head) % alignment) + data
