"""Tensors of a library that is not numpy, for DLPack: made with ctypes, bfloat16 and faults among them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CPU, GPU = 1, 2
CODES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "uint16": (1, 16), "float64": (2, 64)}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Tensor:
    """A view of a numpy array's memory. ``given`` and ``back`` count what was given away, and came back.

    major  version of DLPack that it speaks; 0: that before versions
    """

    def __init__(
        self,
        array: np.ndarray,
        dtype: str,
        *,
        major: int = 1,
        device: int = CPU,
        read_only: bool = False,
        copied: bool = False,
        shape: tuple[int, ...] | None = None,
        without_strides: bool = False,
        offset: int = 0,
    ) -> None:
        self.array, self.major, self.given, self.back = array, major, 0, 0
        sizes = (ctypes.c_int64 * array.ndim)(*(shape or array.shape))
        strides = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
        code, bits = CODES[dtype]
        data = array.ctypes.data - offset
        none = ctypes.POINTER(ctypes.c_int64)()
        self._tensor = _Tensor(
            data, device, 0, array.ndim, code, bits, 1, sizes, none if without_strides else strides, offset
        )
        self._flags, self._deleter = read_only | 2 * copied, _Deleter(self._delete)
        self._held: list[Any] = [sizes, strides]

    def _delete(self, _: int | None) -> None:
        self.back += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.device_type, 0

    def __dlpack__(self, **options: object) -> object:
        if self.major == 0 and options:
            raise TypeError("unexpected keyword argument")
        self.given += 1
        if self.major:
            managed: ctypes.Structure = _Versioned(
                self.major, 0, None, self._deleter, self._flags, self._tensor
            )
            name = b"dltensor_versioned"
        else:
            managed, name = _Managed(self._tensor, None, self._deleter), b"dltensor"
        self._held.append(managed)
        return _new_capsule(ctypes.addressof(managed), name, None)
