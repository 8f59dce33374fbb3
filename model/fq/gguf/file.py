"""A bounds-checked, memory-mapped, read-only view of a GGUF model file (version 2 or 3, little endian).

Layout: magic, version, tensor count, key-value count; the key-value pairs; one info record per tensor;
padding to `general.alignment`; the tensors' bytes. A string is a uint64 length and that many bytes.

Opening a file checks all of it except the weights themselves: every count and length is held against the
bytes that are left before anything is read or allocated for it, in time linear in what it describes.
"""

from __future__ import annotations

import builtins
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fq_kernels import GGUFStrings

from ..errors import FqError
from .types import GGML_TYPES, GGMLType, row_size

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 24  # bytes; far above any page size
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes with a closing NUL
MAX_DIMS = 4
MAX_ELEMENTS = 2**63 - 1  # ggml counts them in int64

_T = TypeVar("_T")

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Value type id -> format of one value; `struct` and numpy read these alike.
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<?",
            10: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
_STRUCTS = {type_id: struct.Struct(form) for type_id, form in _FORMATS.items()}
# By way of `.str`, so that "<q" becomes numpy's int64 and not its longlong.
_DTYPES = {type_id: np.dtype(np.dtype(form).str) for type_id, form in _FORMATS.items()}
_U32, _U64 = _STRUCTS[4], _STRUCTS[10]

# The shortest possible records, to bound the counts in the header.
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, value type, value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one dim, type, offset


def _shown(text: str) -> str:
    """`text` for a one-line message: names come from the file and may hold anything."""
    short = text if len(text) <= 120 else text[:119] + "…"
    return short if short.isprintable() else repr(short)


class GGUFError(FqError):
    """A GGUF file that cannot be read or is not what it says, or lacks what was asked of it.

    `path` is the file, `field` the key, tensor or header part at fault (None: the file as a whole),
    `offset` the byte where it stands (None if it stands nowhere).
    """

    def __init__(self, path: str, reason: str, offset: int | None = None, field: str | None = None) -> None:
        super().__init__(path, reason, offset, field)
        self.path, self.reason, self.offset, self.field = path, reason, offset, field

    def __str__(self) -> str:
        where = "" if self.field is None else f" {_shown(self.field)}"
        if self.offset is not None:
            where += f" at byte {self.offset}"
        path = self.path if self.path.isprintable() else repr(self.path)
        return f"{path}:{where}{': ' if where else ' '}{self.reason}"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `shape` is outermost first, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return self.n_rows * self.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.n_bytes // self.row_bytes

    @property
    def row_bytes(self) -> int:
        return row_size(self.type, self.shape[-1])


class _Array(NamedTuple):
    """A checked array value that stays in the file until it is asked for: bytes start..end."""

    item_type: int
    n_items: int
    start: int
    end: int


class _Cursor:
    """A position in the map. Every read first checks that the bytes are there."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.pos = path, data, len(data), 0

    def error(self, field: str, reason: str, offset: int | None = None) -> GGUFError:
        return GGUFError(self.path, reason, self.pos if offset is None else offset, field)

    def need(self, n_bytes: int, field: str, what: str) -> None:
        left = self.size - self.pos
        if n_bytes > left:
            raise self.error(field, f"{what} takes {n_bytes} bytes, but the file has {left} left")

    def number(self, form: struct.Struct, field: str, what: str) -> Any:
        start = self.pos
        if start + form.size > self.size:
            self.need(form.size, field, what)
        self.pos = start + form.size
        return form.unpack_from(self.data, start)[0]

    def string(self, field: str, what: str, limit: int | None = None) -> bytes:
        """The bytes of a string; with a `limit` it must be 1 to `limit` bytes long."""
        start = self.pos
        n: int = self.number(_U64, field, f"the length of {what}")
        if limit is not None and not 1 <= n <= limit:
            raise self.error(field, f"{what} is {n} bytes long, allowed are 1 to {limit}", start)
        if n > self.size - self.pos:
            self.need(n, field, what)
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def name(self, field: str, what: str, limit: int) -> str:
        raw = self.string(field, what, limit)
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            raise self.error(field, f"{what} is not UTF-8", self.pos - len(raw) + e.start) from None

    def value(self, key: str) -> Any:
        """A scalar as a Python value, an array as a checked `_Array`."""
        start = self.pos
        type_id: int = self.number(_U32, key, "the value type")
        if type_id == _STRING:
            return self.string(key, "the value").decode(errors="surrogateescape")
        if type_id == _ARRAY:
            return self.array(key)
        form = _STRUCTS.get(type_id)
        if form is None:
            raise self.error(key, f"unknown value type {type_id}", start)
        if type_id == _BOOL:
            self.need(1, key, "the value")
            self.check_bools(1, key)
        return self.number(form, key, "the value")

    def array(self, key: str) -> _Array:
        start = self.pos
        item_type: int = self.number(_U32, key, "the array's item type")
        if item_type == _ARRAY:
            raise self.error(key, "arrays of arrays are not supported", start)
        if item_type != _STRING and item_type not in _STRUCTS:
            raise self.error(key, f"unknown array item type {item_type}", start)
        item_bytes = 8 if item_type == _STRING else _STRUCTS[item_type].size
        start = self.pos
        count: int = self.number(_U64, key, "the array's length")
        if count > (self.size - self.pos) // item_bytes:
            left = self.size - self.pos
            reason = f"an array of {count} items takes at least {count * item_bytes} bytes, {left} are left"
            raise self.error(key, reason, start)
        start = self.pos
        if item_type == _STRING:
            self.skip_strings(count, key)
        else:
            if item_type == _BOOL:
                self.check_bools(count, key)
            self.pos += count * item_bytes
        return _Array(item_type, count, start, self.pos)

    def skip_strings(self, count: int, key: str) -> None:
        try:
            self.pos = GGUFStrings(self.data, self.pos, count).end
        except ValueError as e:
            reason = "one of the array's strings reaches past the end of the file"
            raise self.error(key, reason, e.args[1]) from None

    def check_bools(self, count: int, key: str) -> None:
        # Any byte but 0 and 1 would become a numpy bool of undefined behaviour.
        bad = np.frombuffer(self.data, np.uint8, count, self.pos) > 1
        if bad.any():
            at = self.pos + int(bad.argmax())
            raise self.error(key, f"a bool is 0 or 1, here it is {self.data[at]}", at)


class _Metadata(Mapping[str, Any]):
    """The key-value pairs in file order. Arrays are made on access, those of strings are then kept."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data: mmap.mmap | None = data
        self.pairs: dict[str, tuple[int, Any]] = {}  # key -> offset of the pair, value

    def __getitem__(self, key: str) -> Any:
        offset, value = self.pairs[key]
        if not isinstance(value, _Array):
            return value
        if self.data is None:
            raise GGUFError(self.path, "the file has been closed", offset, key)
        if value.item_type != _STRING:
            return np.frombuffer(self.data, _DTYPES[value.item_type], value.n_items, value.start)
        strings = GGUFStrings(self.data, value.start, value.n_items)
        self.pairs[key] = offset, strings
        return strings

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __contains__(self, key: object) -> bool:
        return key in self.pairs

    def __len__(self) -> int:
        return len(self.pairs)


class GGUFFile:
    """A GGUF file opened for reading. Raises GGUFError if any part but the weights' bytes is malformed.

    `path`; `size` and `alignment`, in bytes; `version`; `metadata`: key -> bool, int, float, str, GGUFStrings
    or read-only array (bytes of a string that are not UTF-8 become surrogate escapes); `tensors`: name ->
    TensorInfo; both in file order. Arrays are views of the map and stay valid after `close`.
    A file cut while it is open cannot be defended against: reading a vanished page ends the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        self._data: mmap.mmap | None = _map(self.path)
        cursor = _Cursor(self.path, self._data)
        self.size = cursor.size
        self.version, n_tensors, n_pairs = _read_header(cursor)
        self._metadata = _Metadata(self.path, self._data)
        _read_pairs(cursor, n_pairs, self._metadata.pairs)
        self.alignment = _alignment(cursor, self._metadata.pairs)
        self.tensors: dict[str, TensorInfo] = _read_tensors(cursor, n_tensors, self.alignment)

    def __repr__(self) -> str:
        name = os.path.basename(self.path)
        return f"<GGUFFile {name}: version {self.version}, {len(self.tensors)} tensors, {self.size} bytes>"

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """The packed bytes of a tensor, (n_rows, row_bytes), read-only, without a copy."""
        info = self.tensors.get(name)
        if info is None:
            # Imported here since few runs need it; on some names only since it is slow on very many.
            from difflib import get_close_matches

            close = get_close_matches(name, islice(self.tensors, 4096))
            hint = f"; close to it: {', '.join(map(_shown, close))}" if close else ""
            raise GGUFError(self.path, f"the file has no such tensor{hint}", field=name)
        if self._data is None:
            raise GGUFError(self.path, "the file has been closed", info.offset, name)
        flat = np.frombuffer(self._data, np.uint8, info.n_bytes, info.offset)
        return flat.reshape(info.n_rows, info.row_bytes)

    # Typed access to metadata. GGUFError if the value is of another type, or missing without a default.

    def uint(self, key: str, default: int | None = None) -> int:
        """A non-negative integer, stored in any integer type."""
        return self._typed(key, int, "a non-negative integer", default)

    def float(self, key: str, default: builtins.float | None = None) -> builtins.float:
        """A float, stored as F32 or F64."""
        return self._typed(key, builtins.float, "a float", default)

    def bool(self, key: str, default: builtins.bool | None = None) -> builtins.bool:
        """A bool."""
        return self._typed(key, builtins.bool, "a bool", default)

    def string(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._typed(key, str, "a string", default)

    def strings(self, key: str) -> GGUFStrings:
        """An array of strings."""
        return self._typed(key, GGUFStrings, "an array of strings", None)

    def numbers(self, key: str) -> NDArray[Any]:
        """An array of numbers or bools, (n,), in the file's type, read-only."""
        return self._typed(key, np.ndarray, "an array of numbers", None)

    def _typed(self, key: str, kind: type[_T], wanted: str, default: _T | None) -> _T:
        if key not in self._metadata:
            if default is None:
                raise GGUFError(self.path, f"the metadata has no such key, {wanted} is needed", field=key)
            return default
        value: Any = self._metadata[key]
        negative = type(value) is int and value < 0  # the only int asked for is a uint
        # Exactly the type: a Python bool is an int, but not in GGUF.
        if type(value) is kind and not negative:
            return value
        if isinstance(value, (GGUFStrings, np.ndarray)):
            found = f"an array of {len(value)}"
        else:
            found = "a string" if isinstance(value, str) else f"the {type(value).__name__} {value}"
        raise GGUFError(self.path, f"should be {wanted}, is {found}", self._metadata.pairs[key][0], key)

    def close(self) -> None:
        """Drop the map. It is unmapped once the last array made from it is gone. May be called twice."""
        # Not `mmap.close`, which fails while arrays are alive.
        self._data = self._metadata.data = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _map(path: str) -> mmap.mmap:
    # Opening a FIFO would wait for its writer without O_NONBLOCK, which regular files ignore.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise GGUFError(path, "is a directory")
            if not stat.S_ISREG(status.st_mode):
                raise GGUFError(path, "is not a regular file")
            if status.st_size == 0:
                raise GGUFError(path, "is empty")
            return mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
    except GGUFError:
        raise
    except (OSError, ValueError, OverflowError) as e:  # ValueError: NUL in the path, or cut since the fstat
        raise GGUFError(path, f"cannot be opened: {getattr(e, 'strerror', None) or e}") from e


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of key-value pairs."""
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise cursor.error("magic", f"not a GGUF file: starts with {magic!r}")
    cursor.pos = 4
    version: int = cursor.number(_U32, "version", "the version")
    if version and version & 0xFFFF == 0:
        raise cursor.error("version", "a big-endian GGUF file, only little-endian ones are supported", 4)
    if version not in (2, 3):
        raise cursor.error("version", f"GGUF version {version} is not supported, only 2 and 3 are", 4)
    n_tensors: int = cursor.number(_U64, "tensor_count", "the number of tensors")
    n_pairs: int = cursor.number(_U64, "kv_count", "the number of metadata pairs")
    left = cursor.size - cursor.pos
    if n_tensors > left // _MIN_TENSOR_BYTES:
        raise cursor.error("tensor_count", f"{n_tensors} tensors cannot fit in the {left} bytes left", 8)
    left -= n_tensors * _MIN_TENSOR_BYTES
    if n_pairs > left // _MIN_PAIR_BYTES:
        raise cursor.error("kv_count", f"{n_pairs} metadata pairs cannot fit in the {left} bytes left", 16)
    return version, n_tensors, n_pairs


def _read_pairs(cursor: _Cursor, n_pairs: int, pairs: dict[str, tuple[int, Any]]) -> None:
    for i in range(n_pairs):
        start = cursor.pos
        key = cursor.name(f"kv[{i}]", "the key", MAX_KEY_BYTES)
        if key in pairs:
            raise cursor.error(key, "the key occurs twice", start)
        pairs[key] = start, cursor.value(key)


def _alignment(cursor: _Cursor, pairs: dict[str, tuple[int, Any]]) -> int:
    key = "general.alignment"
    if key not in pairs:
        return DEFAULT_ALIGNMENT
    start, value = pairs[key]
    (type_id,) = _U32.unpack_from(cursor.data, start + 8 + len(key))
    if type_id != 4:
        raise cursor.error(key, "should be a uint32", start)
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.error(key, f"{value} is not a power of two from 1 to {MAX_ALIGNMENT}", start)
    return int(value)


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    found: dict[str, tuple[tuple[int, ...], GGMLType, int, int]] = {}
    for i in range(n_tensors):
        start = cursor.pos
        name = cursor.name(f"tensor[{i}]", "the name", MAX_NAME_BYTES)
        if name in found:
            raise cursor.error(name, "two tensors have this name", start)
        shape, type = _read_shape_and_type(cursor, name)
        start = cursor.pos
        offset: int = cursor.number(_U64, name, "the offset")
        if offset % alignment:
            raise cursor.error(name, f"offset {offset} is not a multiple of the alignment {alignment}", start)
        found[name] = shape, type, offset, start

    # Offsets count from here.
    data_start = -(-cursor.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, (shape, type, offset, start) in found.items():
        offset += data_start
        n_bytes = math.prod(shape[:-1]) * row_size(type, shape[-1])
        if offset + n_bytes > cursor.size:
            reason = f"its data, {n_bytes} bytes from {offset}, ends past the file's {cursor.size} bytes"
            raise cursor.error(name, reason, start)
        tensors[name] = TensorInfo(name, shape, type, offset, n_bytes)

    for before, info in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
        if before.offset + before.n_bytes > info.offset:
            reason = f"its data at {info.offset} overlaps that of {_shown(before.name)}"
            raise cursor.error(info.name, reason, found[info.name][3])
    return tensors


def _read_shape_and_type(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], GGMLType]:
    start = cursor.pos
    n_dims: int = cursor.number(_U32, name, "the number of dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(name, f"has {n_dims} dimensions, allowed are 1 to {MAX_DIMS}", start)
    dims_at = cursor.pos
    dims: list[int] = [cursor.number(_U64, name, "a dimension") for _ in range(n_dims)]
    if 0 in dims:
        raise cursor.error(name, f"dimension {dims.index(0)} is 0", dims_at + 8 * dims.index(0))
    if math.prod(dims) > MAX_ELEMENTS:
        raise cursor.error(name, f"{dims} is more than 2^63 - 1 elements", dims_at)
    start = cursor.pos
    type_id: int = cursor.number(_U32, name, "the tensor type")
    type = GGML_TYPES.get(type_id)
    if type is None:
        raise cursor.error(name, f"unknown tensor type {type_id}", start)
    if dims[0] % type.block_size:
        reason = f"rows of {dims[0]} elements are not whole {type.name} blocks of {type.block_size}"
        raise cursor.error(name, reason, dims_at)
    return tuple(reversed(dims)), type
