"""A model in one file, or cut into parts ``NAME-00001-of-0000N.gguf``, as llama-gguf-split cuts it."""

from __future__ import annotations

import os
import re

import numpy as np
from numpy.typing import NDArray

from .file import GGUFError, GGUFFile, TensorInfo

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


class Parts:
    """All parts of a model as one GGUFFile, of which the first has the metadata. Close it as one, too.

    path, metadata, version  the first part's
    size, tensors            of all of them
    paths                    of each
    """

    def __init__(self, files: list[GGUFFile]) -> None:
        first = files[0]
        self.path, self.metadata, self.version = first.path, first.metadata, first.version
        self._files = files
        self._home: dict[str, GGUFFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise GGUFError(file.path, "an earlier part has this tensor too", info.offset, name)
                self.tensors[name], self._home[name] = info, file

    @property
    def size(self) -> int:
        return sum(file.size for file in self._files)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self._files)

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """As of GGUFFile."""
        return self._home.get(name, self._files[0]).tensor(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_model(path: str | os.PathLike[str]) -> GGUFFile | Parts:
    """A model's file, or with the first of its parts all of them.

    Raises GGUFError naming the part that is missing, or is another model's.
    """
    first = GGUFFile(path)
    try:
        n = _count(first, _COUNT, 1)
        if n <= 1:
            return first
    except BaseException:
        first.close()
        raise
    files = [first]
    try:
        match = _PART.fullmatch(first.path)
        if match is None or int(match[3]) != n:
            reason = f"is one of {n} parts, so its name must end in -00001-of-{n:05d}.gguf"
            raise GGUFError(first.path, reason, field=_COUNT)
        names = [f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf" for i in range(n)]
        if (no := _count(first, _NO, 0)) != 0:
            raise GGUFError(first.path, f"is part {no + 1} of {n}: give the first, {names[0]}", field=_NO)
        for i, name in enumerate(names[1:], 1):
            part = GGUFFile(name)
            files.append(part)
            for key, wanted in ((_NO, i), (_COUNT, n)):
                if (found := _count(part, key, 0)) != wanted:
                    raise GGUFError(name, f"is {found}, not {wanted}: no part of {first.path}", field=key)
        parts = Parts(files)
        wanted = _count(first, _TENSORS, len(parts.tensors))
        if wanted != len(parts.tensors):
            reason = f"the parts have {len(parts.tensors)} tensors, not {wanted}"
            raise GGUFError(first.path, reason, field=_TENSORS)
        return parts
    except BaseException:
        for file in files:
            file.close()
        raise


def _count(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int:
        raise GGUFError(file.path, f"must be int, not {type(value).__name__}", field=key)
    return value
