"""The formats that a norm's output can be rounded to, by name.

A format is written ``name[:rounding][,seed=N]``: ``bf16``, ``bf16:truncate``,
``bf16:stochastic,seed=7``, ``f16``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NEAREST_EVEN = "nearest-even"

# (name, rounding) -> number of the C rule; order shared with src/rounding.h.
_KERNEL_RULES = {
    ("bf16", NEAREST_EVEN): 1,
    ("bf16", "nearest-even-ftz"): 2,
    ("bf16", "truncate"): 3,
    ("bf16", "nearest-away"): 4,
    ("bf16", "stochastic"): 5,
    ("f16", NEAREST_EVEN): 6,
}


@dataclass(frozen=True)
class Format:
    """A target format with its rounding rule; ``seed`` is used by stochastic rounding alone."""

    name: str
    rounding: str = NEAREST_EVEN
    seed: int = 0

    @property
    def kernel_rule(self) -> int:
        """Number of the C rounding rule (``fq_quant_kind``)."""
        return _KERNEL_RULES[self.name, self.rounding]

    def with_seed(self, seed: int) -> Format:
        return replace(self, seed=seed)

    def __str__(self) -> str:
        text = self.name if self.rounding == NEAREST_EVEN else f"{self.name}:{self.rounding}"
        return f"{text},seed={self.seed}" if self.rounding == "stochastic" else text


def format_names() -> list[str]:
    """Every format as it can be written, the default rounding first."""
    return [str(Format(name, rounding)).split(",")[0] for name, rounding in _KERNEL_RULES]


def roundings(name: str) -> list[str]:
    """The rounding rules of the format ``name``."""
    return [r for n, r in _KERNEL_RULES if n == name]


def get_format(spec: str | Format) -> Format:
    """Parse ``name[:rounding][,seed=N]``.

    Raises ValueError, naming what is unknown and what there is, and TypeError if ``spec``
    is neither a string nor a Format.
    """
    if isinstance(spec, Format):
        if (spec.name, spec.rounding) not in _KERNEL_RULES:
            name = f"{spec.name}:{spec.rounding}"
            raise ValueError(f"unknown format {name}; there are {', '.join(format_names())}")
        if not 0 <= spec.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, not {spec.seed}")
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"a format is a string such as 'bf16', not {type(spec).__name__}")
    name, _, options = spec.strip().lower().partition(":")
    fmt = Format(name)
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            fmt = replace(fmt, rounding=option)
        elif key == "seed" and value.isascii() and value.isdigit():
            fmt = fmt.with_seed(int(value))
        else:
            raise ValueError(f"unknown option {option!r} in format {spec!r}; there is seed=N")
    if (fmt.name, fmt.rounding) not in _KERNEL_RULES:
        raise ValueError(f"unknown format {spec!r}; there are {', '.join(format_names())}")
    return get_format(fmt)
