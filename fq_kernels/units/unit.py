"""A unit: how a norm itself computes, step by step.

It is written ``STEP=VALUE; STEP=VALUE; ...``; steps that are not named are ggml's:

    x=bf16                 what the norm reads, rounded (the residual itself stays)
    x=unrounded            the residual before a rule rounds it, where a rule does
    square=FORMAT          each square
    acc=bf16               the accumulator, rounded after every addition; f32; f64, which is ggml's
    order=lanes=16         in what order it adds: sequential, lanes=N, tree, chunk=N, torch
    order=chunk=128,f32    and in what the chunks' sums are added, where that is not acc
    mean=FORMAT            the mean square, and again with eps added
    eps=outside            added to the root instead of under it
    rsqrt=lut=8            the inverse root from a table of 2^8 entries
    rsqrt=lut=6,linear     interpolated between entries
    rsqrt=newton=2         two of Newton's steps from a bit trick; newton=1,lut=6 from a table
    rsqrt=lut=8,bf16       and rounded; so exact,bf16, which bf16 alone says too
    raw=bf16               what it makes of each element, before the weight
    weight=bf16            the weight as it is stored
    gain=1+w               the file holds 1 + w (Gemma's): w is stored, and 1 + w computed
    gain=1+w,bf16          in a format
    out=bf16               the product with the weight

A format keeps its own colon and commas, as in ``acc=e8m10:stochastic,seed=3``. Any that rounds each element
alone serves at every step, and so does f32, which rounds nothing. What each step computes to the last bit is
said in src/norm/unit.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

from ..formats import Format, get_format
from ..formats.kernels import BLOCKS

F32, F64 = "f32", "f64"
UNROUNDED = "unrounded"
# Order is shared with src/norm/unit.h.
ORDERS = ("sequential", "lanes", "tree", "chunk", "torch")
MAX_LANES = 512
MAX_CHUNK = 1 << 30
MAX_TABLE_BITS = 16
MAX_NEWTON = 8
# steps whose value is a format, or none
_FORMATS = ("square", "mean", "raw", "weight", "out")


class Order(NamedTuple):
    """outer: the format, or "f32", in which chunks' sums are added; None: the accumulator's."""

    kind: str = "sequential"
    n: int = 0
    outer: Format | str | None = None

    def __str__(self) -> str:
        text = f"{self.kind}={self.n}" if self.n else self.kind
        return text if self.outer is None else f"{text},{self.outer}"


class InverseRoot(NamedTuple):
    """table_bits 0: no table; newton: how many steps, from the bit trick where there is no table."""

    table_bits: int = 0
    linear: bool = False
    newton: int = 0
    format: Format | None = None

    def __str__(self) -> str:
        words = [f"newton={self.newton}"] if self.newton else []
        words += [f"lut={self.table_bits}"] if self.table_bits else []
        words += ["linear"] if self.linear else []
        if self.format is not None:
            words.append(str(self.format))
        return ",".join(words) or "exact"


class Gain(NamedTuple):
    one_plus: bool = False
    format: Format | None = None

    def __str__(self) -> str:
        return ("1+w" if self.one_plus else "w") + ("" if self.format is None else f",{self.format}")


@dataclass(frozen=True)
class NormUnit:
    """A norm's arithmetic. Each step is text as at the head of this module, or a Format; None: ggml's.

    >>> NormUnit(acc="bf16", order="tree", out="bf16")
    NormUnit('acc=bf16;order=tree;out=bf16')

    Two units that say the same are equal, and ``NormUnit.parse(str(unit)) == unit``. Raises ValueError
    naming the step and what is wrong with it.
    """

    x: str | Format | None = None
    square: str | Format | None = None
    acc: str | Format | None = None
    order: str | None = None
    mean: str | Format | None = None
    eps: str | None = None
    rsqrt: str | Format | None = None
    raw: str | Format | None = None
    weight: str | Format | None = None
    gain: str | None = None
    out: str | Format | None = None

    def __post_init__(self) -> None:
        for step, value in self.steps.items():
            text = str(value).strip()
            try:
                object.__setattr__(self, step, str(_PARSERS[step](text)))
            except ValueError as e:
                raise ValueError(f"step {step}: {e}") from None

    def check(self) -> None:
        """Raises ValueError for steps that do not go together, as those of several rules may not."""
        if self.order not in (None, "sequential") and self.acc in (None, F64):
            raise ValueError(f"step order: {self.order} needs acc, which adds in order where it is f64")
        if self.eps == "outside" and self.inverse_root[:3] != (0, False, 0):
            raise ValueError("step eps: outside needs an exact rsqrt")

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> NormUnit:
        """The unit that ``text`` writes; an empty one is ggml's.

        seed  of stochastic rounding, where the text names none
        """
        if not isinstance(text, str):
            raise TypeError(f"a unit is a string such as 'acc=bf16', not {type(text).__name__}")
        if "{" in text or "}" in text:
            raise ValueError("{a|b} is for fq sweep, with both braces; here it is one unit")
        steps: dict[str, str] = {}
        for piece in filter(None, map(str.strip, text.split(";"))):
            step, equals, value = (part.strip() for part in piece.partition("="))
            if step not in STEPS or not equals:
                raise ValueError(
                    f"{piece!r} is not written STEP=VALUE, with one of the steps {', '.join(STEPS)}"
                )
            if step in steps:
                raise ValueError(f"step {step} is there twice")
            unseeded = "stochastic" in value.lower() and "seed=" not in value.lower()
            steps[step] = f"{value},seed={seed}" if seed and unseeded else value
        return cls(**steps)

    @property
    def steps(self) -> dict[str, str]:
        """Those that are named, in order, as they are written."""
        named = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in named if value is not None}

    def changed(self, steps: Mapping[str, str]) -> NormUnit:
        """With these steps in the place of its own."""
        return NormUnit(**(self.steps | dict(steps)))

    def __str__(self) -> str:
        return ";".join(f"{step}={value}" for step, value in self.steps.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    @cached_property
    def formats(self) -> dict[str, Format]:
        """By step, what is rounded to: 1 + w under "gain", chunks' sums under "order"."""
        found: dict[str, Format | str | None] = {
            step: _format(str(getattr(self, step))) for step in _FORMATS if getattr(self, step)
        }
        found |= {
            "x": _read(str(self.x or F32)),
            "acc": _accumulator(str(self.acc or F64)),
            "rsqrt": self.inverse_root.format,
        }
        found |= {"gain": self.gain_rule.format, "order": self.sum_order.outer}
        return {step: fmt for step, fmt in found.items() if isinstance(fmt, Format)}

    @property
    def reads_unrounded(self) -> bool:
        return self.x == UNROUNDED

    @property
    def sums_in_double(self) -> bool:
        return self.acc in (None, F64)

    @cached_property
    def sum_order(self) -> Order:
        return _order(self.order or "sequential")

    @cached_property
    def inverse_root(self) -> InverseRoot:
        return _inverse_root(str(self.rsqrt or "exact"))

    @property
    def outer_format(self) -> Format | None:
        """In which chunks' sums are added."""
        return self.formats.get("acc" if self.sum_order.outer is None else "order")

    @property
    def eps_outside(self) -> bool:
        return self.eps == "outside"

    @cached_property
    def gain_rule(self) -> Gain:
        return _gain(self.gain or "w")

    @cached_property
    def without_gain(self) -> NormUnit:
        """What it computes up to the weight."""
        return NormUnit(**{k: v for k, v in self.steps.items() if k not in ("weight", "gain", "out")})

    @cached_property
    def in_c(self) -> bool:
        """Whether C rounds to all of its formats."""
        formats = [fmt for step, fmt in self.formats.items() if step not in ("weight", "gain")]
        return all(fmt.kernel.quant not in (0, BLOCKS) for fmt in formats)

    @lru_cache(maxsize=1024)  # noqa: B019 - units are few and small
    def seeded(self, name: str) -> NormUnit:
        """With seeds of its own for the norm ``name``, and for each step, where a format has one."""
        import zlib

        changes: dict[str, str] = {}
        for step, fmt in self.formats.items():
            if fmt.seeded:
                number = (1 << 32) + zlib.crc32(f"{name}.{step}".encode())
                mine = fmt.with_seed((fmt.seed * 0x9E3779B97F4A7C15 + number) % 2**64)
                if step == "rsqrt":
                    changes[step] = str(self.inverse_root._replace(format=mine))
                elif step == "order":
                    changes[step] = str(self.sum_order._replace(outer=mine))
                elif step == "gain":
                    changes[step] = str(self.gain_rule._replace(format=mine))
                else:
                    changes[step] = str(mine)
        return self.changed(changes) if changes else self


STEPS = tuple(each.name for each in fields(NormUnit))


def _format(text: str) -> Format | str:
    """F32 or a format whose elements are rounded each alone."""
    if text.lower() == F32:
        return F32
    fmt = get_format(text)
    if fmt.dither:
        raise ValueError(f"format {fmt} has dither, which falls by the place of an element in an array")
    if fmt.family.noise:
        raise ValueError(f"format {fmt} is a row's noise")
    alone = fmt.by_element or (fmt.static_scale and fmt.family.static_channels)
    if not alone or fmt.calibration or fmt.whole_tensor:
        raise ValueError(f"format {fmt} does not round each element alone")
    return fmt


def _read(text: str) -> Format | str:
    return UNROUNDED if text.lower() == UNROUNDED else _format(text)


def _accumulator(text: str) -> Format | str:
    return F64 if text.lower() == F64 else _format(text)


def _natural(text: str, most: int, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise ValueError(f"{text!r} must be a number from {least} to {most}")
    return int(text)


def _order(text: str) -> Order:
    words, comma, outer = text.partition(",")
    kind, equals, value = (word.strip() for word in words.partition("="))
    if kind not in ORDERS or bool(equals) != (kind in ("lanes", "chunk")) or (comma and kind != "chunk"):
        raise ValueError(f"must be sequential, lanes=N, tree, torch, chunk=N or chunk=N,FORMAT, not {text!r}")
    if kind == "lanes":
        n = _natural(value, MAX_LANES, 2)
        if n & (n - 1):
            raise ValueError(f"lanes must be a power of two, not {n}")
        return Order(kind, n)
    return Order(kind, _natural(value, MAX_CHUNK) if equals else 0, _format(outer.strip()) if comma else None)


def _inverse_root(text: str) -> InverseRoot:
    root = InverseRoot()
    words = text.split(",")
    while words:
        key, equals, value = words[0].strip().partition("=")
        if key == "lut" and equals and not root.table_bits:
            root = root._replace(table_bits=_natural(value, MAX_TABLE_BITS))
        elif key == "newton" and equals and not root.newton:
            root = root._replace(newton=_natural(value, MAX_NEWTON))
        elif key == "linear" and not equals and root.table_bits and not root.linear:
            root = root._replace(linear=True)
        elif key != "exact" or equals or root != InverseRoot():
            break
        words.pop(0)
    if not words:
        return root
    try:
        fmt = _format(",".join(words).strip())
    except ValueError as e:
        raise ValueError(f"must be exact, lut=BITS, newton=K, or such and a format: {e}") from None
    return root._replace(format=fmt if isinstance(fmt, Format) else None)


def _gain(text: str) -> Gain:
    kind, _, rest = text.partition(",")
    kind = kind.replace(" ", "")
    if kind not in ("w", "1+w"):
        raise ValueError(f"must be w or 1+w, and a format behind a comma, not {text!r}")
    fmt = _format(rest.strip()) if rest.strip() else None
    return Gain(kind == "1+w", fmt if isinstance(fmt, Format) else None)


def _eps(text: str) -> str:
    if text not in ("inside", "outside"):
        raise ValueError(f"must be inside or outside, not {text!r}")
    return text


_PARSERS = dict.fromkeys(_FORMATS, _format) | {
    "x": _read,
    "acc": _accumulator,
    "order": _order,
    "eps": _eps,
    "rsqrt": _inverse_root,
    "gain": _gain,
}
