# A GGUF file's arrays of strings: each a uint64 length, little endian, and that many bytes of UTF-8.
# A vocabulary and its merges have some 10^5: a Python object for each would be a third of a start's time.

from cpython.buffer cimport PyBUF_SIMPLE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t
from libc.string cimport memset

import collections.abc


cdef inline Py_ssize_t _string_length(const uint8_t *at, Py_ssize_t left) noexcept nogil:
    """The length of the string at ``at``; -1 if that or the string reaches past the ``left`` bytes."""
    cdef uint64_t n = 0
    cdef int i
    if left < 8:
        return -1
    for i in range(8):
        n |= <uint64_t> at[i] << (8 * i)
    return -1 if n > <uint64_t> (left - 8) else <Py_ssize_t> n


cdef inline uint64_t _string_hash(const uint8_t *at, Py_ssize_t n) noexcept nogil:
    """FNV-1a. Whoever makes a file can make its strings collide: no more than time may depend on it."""
    cdef uint64_t h = 0xCBF29CE484222325u
    cdef Py_ssize_t i
    for i in range(n):
        h = (h ^ at[i]) * 0x100000001B3u
    return h


cdef class GGUFStrings:
    """An array of strings as it stands in a GGUF file: a read-only sequence, each str made when it is asked for.

    data     bytes, anything with the buffer protocol, held for as long as the array lives
    start    where the length of the first string is
    count    number of strings
    longest  of the strings, in bytes
    end      where the last string ends

    Bytes that are not UTF-8 are surrogate escapes. Raises ValueError, its second argument the position, if
    a string reaches past the end of data.
    """

    cdef Py_buffer b
    cdef bint held
    cdef const uint8_t **at  # of each string's length, and of the end: read once, since a file may change
    cdef readonly Py_ssize_t longest, end
    cdef Py_ssize_t n

    def __cinit__(self, data, Py_ssize_t start, count):
        cdef const uint8_t *at
        cdef Py_ssize_t i, n, left
        PyObject_GetBuffer(data, &self.b, PyBUF_SIMPLE)
        self.held = True
        if not 0 <= start <= self.b.len:
            raise ValueError(f"start must be from 0 to {self.b.len}, not {start}")
        left = self.b.len - start
        if not 0 <= count <= left // 8:
            raise ValueError(f"{count} strings cannot fit in the {left} bytes left", start)
        self.n = count
        self.at = <const uint8_t **> PyMem_Malloc((self.n + 1) * sizeof(uint8_t *))
        if self.at == NULL:
            raise MemoryError
        at = <const uint8_t *> self.b.buf + start
        for i in range(self.n):
            n = _string_length(at, left)
            if n < 0:
                raise ValueError(f"string {i} reaches past the end of the data", self.b.len - left)
            self.at[i] = at
            self.longest = max(self.longest, n)
            at += 8 + n
            left -= 8 + n
        self.at[self.n] = at
        self.end = self.b.len - left

    def __dealloc__(self):
        PyMem_Free(self.at)
        if self.held:
            PyBuffer_Release(&self.b)

    @classmethod
    def of(cls, strings):
        """The array of some str, of which lone surrogates are escapes. Raises UnicodeEncodeError."""
        packed = [text.encode("utf-8", "surrogateescape") for text in strings]
        return cls(b"".join([len(p).to_bytes(8, "little") + p for p in packed]), 0, len(packed))

    def __len__(self):
        return self.n

    cdef Py_ssize_t _length(self, Py_ssize_t i) noexcept nogil:
        return self.at[i + 1] - self.at[i] - 8

    cdef str _text(self, Py_ssize_t i):
        return PyUnicode_DecodeUTF8(<const char *> self.at[i] + 8, self._length(i), "surrogateescape")

    def __getitem__(self, index):
        cdef Py_ssize_t i
        if isinstance(index, slice):
            return [self._text(i) for i in range(*index.indices(self.n))]
        try:
            i = operator.index(index)
        except OverflowError:
            raise IndexError(f"no string {index} in an array of {self.n}") from None
        if i < 0:
            i += self.n
        if not 0 <= i < self.n:
            raise IndexError(f"no string {index} in an array of {self.n}")
        return self._text(i)

    def __eq__(self, other):
        if not isinstance(other, (GGUFStrings, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    index = collections.abc.Sequence.index
    count = collections.abc.Sequence.count

    def __repr__(self):
        return f"<GGUFStrings: {self.n} strings>"

    def hashes(self):
        """A number for each string, uint64 (count,): equal ones where strings are equal."""
        cdef Py_ssize_t i
        found = np.empty(self.n, np.uint64)
        cdef uint64_t[::1] out = found
        for i in range(self.n):
            out[i] = _string_hash(self.at[i] + 8, self._length(i))
        return found

    def find(self, wanted):
        """{text: index} of those of some str that are here, in order of their indices, each its first."""
        cdef uint8_t maybe[1 << 13]  # a bit for each 16 bits of a hash
        cdef Py_ssize_t i
        cdef uint64_t h
        cdef bytes key
        cdef dict found = {}
        wanted = frozenset(wanted)
        memset(maybe, 0, sizeof(maybe))
        for text in wanted:
            key = text.encode("utf-8", "surrogateescape")
            h = _string_hash(key, len(key))
            maybe[(h >> 3) & 0x1FFF] |= 1 << (h & 7)
        for i in range(self.n):
            h = _string_hash(self.at[i] + 8, self._length(i))
            if maybe[(h >> 3) & 0x1FFF] >> (h & 7) & 1:
                text = self._text(i)
                if text in wanted:
                    found.setdefault(text, i)
        return found


collections.abc.Sequence.register(GGUFStrings)
