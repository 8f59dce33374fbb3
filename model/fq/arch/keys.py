"""A file's keys, read one by one and checked: each error names the key."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import FqError
from ..gguf.file import GGUFFile
from ..gguf.split import Parts


class ModelError(FqError):
    """A GGUF file that is well-formed but not a model that can be run."""


class Keys:
    """The keys ``ARCHITECTURE.*`` of a file. What is read must have exactly the type that is asked for."""

    def __init__(self, file: GGUFFile | Parts) -> None:
        self.file, self._meta = file, file.metadata
        self.architecture: str = self._scalar("general.architecture", str, None)
        self.prefix = f"{self.architecture}."

    def fail(self, message: str) -> ModelError:
        return ModelError(f"{self.file.path}: {message}")

    def _scalar(self, key: str, kind: type, default: Any) -> Any:
        value = self._meta.get(key, default)
        if type(value) is not kind:  # exactly: an array has no truth value, and a bool is an int to Python
            wrong = f"must be {kind.__name__}, not {type(value).__name__}"
            raise self.fail(f"{key} {'is missing' if value is None else wrong}")
        return value

    def value(self, key: str) -> Any:
        """As it is; None where it is absent."""
        return self._meta.get(self.prefix + key)

    def text(self, key: str, default: str) -> str:
        text: str = self._scalar(self.prefix + key, str, default)
        return text

    def flag(self, key: str, default: bool) -> bool:
        flag: bool = self._scalar(self.prefix + key, bool, default)
        return flag

    def count(self, key: str, default: int | None = None, most: int = 1 << 24, least: int = 1) -> int:
        value: int = self._scalar(self.prefix + key, int, default)
        if not least <= value <= most:
            raise self.fail(f"{self.prefix}{key} is {value}; it must be between {least} and {most}")
        return value

    def number(self, key: str, default: float | None, least: float, most: float) -> float:
        value: float = self._scalar(self.prefix + key, float, default)
        if not least <= value <= most:  # false for NaN too
            raise self.fail(f"{self.prefix}{key} is {value}; it must be between {least} and {most}")
        return value

    def cap(self, key: str) -> float:
        """Of logits; 0, as where it is absent, stands for none."""
        return self.number(key, 0.0, 0.0, 1e6) and self.number(key, None, 1e-3, 1e6)

    def scale(self, key: str) -> float:
        """A factor, where 0, as where it is absent, stands for none: 1."""
        return self.number(key, 0.0, 0.0, 1e6) or 1.0

    def of_layers(self, key: str, n_layer: int, default: int | None = None, most: int = 1 << 24) -> int:
        """A count that may be given as one for each layer; all must be the same."""
        values = self.value(key)
        if not isinstance(values, np.ndarray):
            return self.count(key, default, most)
        if values.dtype.kind not in "iu" or len(values) != n_layer:
            raise self.fail(f"{self.prefix}{key} must be int, or {n_layer} of them, one per layer")
        if (values != values[0]).any():
            raise self.fail(f"{self.prefix}{key} differs between layers ({shown(values)}); not supported")
        if not 0 < (value := int(values[0])) <= most:
            raise self.fail(f"{self.prefix}{key} is {value}; it must be between 1 and {most}")
        return value

    def windows(self, n_layer: int, window: int, period: int) -> list[int]:
        """Of each layer, 0 where there is none: of every ``period`` layers all but the last have the window.

        ``attention.sliding_window_pattern`` is another period (0: all layers have it), or says it of each.
        """
        pattern = self.value("attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray | list):
            flags = np.asarray(pattern)
            if flags.dtype.kind not in "biu" or flags.shape != (n_layer,):
                what = f"must be int, or {n_layer} flags, one per layer"
                raise self.fail(f"{self.prefix}attention.sliding_window_pattern {what}")
            return [window if flag else 0 for flag in flags.tolist()]
        period = self.count("attention.sliding_window_pattern", period, most=1024, least=0)
        return [window if not period or il % period < period - 1 else 0 for il in range(n_layer)]


def shown(value: Any) -> str:
    """A value for a message of one line: it comes from the file and may be long."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
