"""The noise controls that stand beside a format in a sweep; fq_kernels/formats/noise.py makes them."""

from __future__ import annotations

from collections.abc import Sequence

from fq_kernels.formats.noise import GAUSSIAN, PREFIXES, SIGNS

from ..errors import FqError

__all__ = ["GAUSSIAN", "PREFIXES", "SIGNS", "is_noise", "with_noise"]


def is_noise(spec: str) -> bool:
    return spec.strip().lower().startswith(PREFIXES)


def with_noise(specs: Sequence[str]) -> list[str]:
    """Formats, and after them each control of each. Raises FqError for one that is noise itself."""
    for spec in specs:
        if is_noise(spec):
            raise FqError(f"--noise: the format {spec} is noise itself")
    return [*specs, *(prefix + spec.strip() for prefix in PREFIXES for spec in specs)]
