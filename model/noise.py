"""The noise control: as large an error as a format's rounding makes, without its structure.

Format ``noise_bf16`` adds to each row Gaussian noise of the same length as the error that bf16
would make in it. Rounding that costs more, or less, than such noise does so by where its errors
lie, not by their size.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from fq_kernels import format_names, get_format
from fq_kernels.formats import register_format

from .errors import FqError

PREFIX = "noise_"


def noise_format(spec: str) -> str:
    """The name of the noise that stands for a format, which is registered if it is not.

    Raises FqError for a format with options: its noise would have no name of its own.
    """
    try:
        fmt = get_format(spec)
    except ValueError as e:
        raise FqError(str(e)) from None
    if str(fmt) != fmt.name or fmt.name.startswith(PREFIX):
        raise FqError(f"--noise is for formats without options, not {spec}")
    name = PREFIX + fmt.name
    if name not in format_names():

        def add_noise(x: np.ndarray) -> np.ndarray:
            rounded = fmt.quantise(x).values
            length = np.linalg.norm(rounded.astype(np.float64) - x, axis=1)
            values = x.copy()
            for i in np.flatnonzero(length):
                # the row says which noise: the same wherever and in whatever company it comes
                noise = np.random.default_rng(zlib.crc32(x[i].tobytes())).standard_normal(x.shape[1])
                values[i] += noise * (length[i] / np.linalg.norm(noise))
            return values

        register_format(
            name,
            add_noise,
            bits_per_value=32,
            whole_tensor=fmt.whole_tensor,
            description=f"noise of the same length as {fmt.name}'s error in a row",
        )
    return name


def register_noise_in(rules: Iterable[str]) -> None:
    """Register what rules of a stored run name."""
    for rule in rules:
        name = rule.partition("=")[2].partition(":")[0]
        if name.startswith(PREFIX):
            noise_format(name[len(PREFIX) :])
