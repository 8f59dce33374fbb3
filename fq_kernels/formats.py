"""The formats that a norm's output can be rounded to, by name.

A format is written ``name[:option[,option...]]``: ``bf16``, ``bf16:truncate``,
``bf16:stochastic,seed=7``, ``int8:asymmetric,group=32``. docs/formats.md describes each.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import ggml_blocks, integers, microscaling, narrow_floats
from .dither import dithered
from .format_family import Family, Floats, Mask, Rounded, Spacing
from .noise import PREFIXES, noise_family

NEAREST_EVEN = "nearest-even"
DITHER = "dither"

# (name, rounding) -> number of the C rule; order shared with src/rounding/contract.h.
_KERNEL_RULES = {
    ("bf16", NEAREST_EVEN): 1,
    ("bf16", "nearest-even-ftz"): 2,
    ("bf16", "truncate"): 3,
    ("bf16", "nearest-away"): 4,
    ("bf16", "stochastic"): 5,
    ("f16", NEAREST_EVEN): 6,
}

# Elements that are rounded at a time, so that intermediate results stay in the cache.
_PIECE = 1 << 16


class Quantised(NamedTuple):
    """``values``: (rows, n) float32. ``clipped``: (rows, n) bool, the elements cut to the format's
    range and the finite ones that became infinite or NaN; None if there are none."""

    values: Floats
    clipped: Mask | None


@dataclass(frozen=True)
class Format:
    """A target format with its options; made by ``get_format``.

    rounding  one of ``roundings(name)``
    seed      used by stochastic rounding and dither alone
    options   the other options that differ from the default, as written
    """

    name: str
    rounding: str = ""
    seed: int = 0
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rounding:
            found = _lookup(self.name)
            object.__setattr__(self, "rounding", found.roundings[0] if found else NEAREST_EVEN)

    @property
    def family(self) -> Family:
        """What the name stands for. Raises ValueError if it is not registered (any more)."""
        return _family(self.name, str(self))

    @property
    def kernel_rule(self) -> int:
        """Number of the C rounding rule (``fq_quant_kind``); 0 if there is none."""
        return 0 if self.dither else _KERNEL_RULES.get((self.name, self.rounding), 0)

    @property
    def dither(self) -> bool:
        """Whether errors fall anew for each seed (dither.py)."""
        return DITHER in self.options

    @property
    def without_dither(self) -> Format:
        return replace(self, seed=0, options=tuple(o for o in self.options if o != DITHER))

    @property
    def seeded(self) -> bool:
        """Whether the result depends on ``seed``."""
        return self.dither or self.rounding == "stochastic"

    @property
    def settings(self) -> tuple[str, ...]:
        """One option for each of the family's choices, defaults included."""
        return tuple(
            next((option for option in self.options if _chooses(option, choice)), choice[0])
            for choice in self.family.choices
        )

    def number(self, option: str) -> int:
        """N of the option ``option=N``; 0 if it is not set."""
        for setting in self.options:
            key, _, value = setting.partition("=")
            if key == option:
                return int(value)
        return 0

    @property
    def whole_tensor(self) -> bool:
        """Whether all rows must be quantised in one call: they share a scale."""
        return self.family.whole_tensor or "tensor" in self.settings

    @property
    def idempotent(self) -> bool:
        """Whether quantising a finite result again changes nothing."""
        return self.family.idempotent and not self.dither

    @property
    def bits_per_value(self) -> float | None:
        """Bits per value with its share of the block's scale (not of a row's or a tensor's)."""
        bits = self.family.bits
        return bits(self) if callable(bits) else bits

    @property
    def largest(self) -> float | None:
        """Largest finite number; None where it depends on a scale, here and below."""
        return self.family.largest

    @property
    def smallest_normal(self) -> float | None:
        return self.family.smallest_normal

    @property
    def smallest_subnormal(self) -> float | None:
        """None too where the rounding flushes subnormals."""
        return None if self.rounding == "nearest-even-ftz" else self.family.smallest_subnormal

    def with_seed(self, seed: int) -> Format:
        return replace(self, seed=seed)

    def quantise(self, x: npt.NDArray[np.float32]) -> Quantised:
        """x (rows, n) float32, not modified, rounded to the format and widened again.

        A NaN stays NaN in every format; a block (row, tensor) whose scale would come from a NaN
        or an infinity is NaN as a whole. Raises TypeError or ValueError for another x, or if
        a registered function does not return what it must.
        """
        if not isinstance(x, np.ndarray) or x.dtype != np.float32:
            raise TypeError(f"x must be a float32 array, not {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 2:
            raise ValueError(f"x must have two axes, rows and n, not shape {x.shape}")
        rows, n = x.shape
        values = np.empty(x.shape, np.float32)
        clipped: Mask | None = None
        if not x.size:
            return Quantised(values, clipped)
        from ._kernels import default_fpu  # which imports this module

        family = self.family
        in_one = self.kernel_rule or self.whole_tensor or self.name in _registered
        step = rows if in_one else max(1, _PIECE // n)
        for begin in range(0, rows, step):
            piece = np.ascontiguousarray(x[begin : begin + step])
            piece.flags.writeable = False
            with default_fpu(), np.errstate(all="ignore"):
                dither = self.dither and not family.noise
                out, cut = dithered(piece, self) if dither else family.quantise(piece, self)
            values[begin : begin + step] = out
            finite = np.isfinite(out)
            if not finite.all():
                lost = np.isfinite(piece) & ~finite
                cut = lost if cut is None else cut | lost
            if cut is not None and cut.any():
                if clipped is None:
                    clipped = np.zeros(x.shape, np.bool_)
                clipped[begin : begin + step] = cut
        return Quantised(values, clipped)

    def __str__(self) -> str:
        found = _lookup(self.name)
        options = list(self.options)
        if self.rounding != (found.roundings[0] if found else NEAREST_EVEN):
            options.insert(0, self.rounding)
        if self.seeded:
            options.append(f"seed={self.seed}")
        return f"{self.name}:{','.join(options)}" if options else self.name


# ---------------------------------------------------------------- the registry


def _kernel(x: Floats, fmt: Format) -> Rounded:
    from ._kernels import round_trip  # which imports this module

    return round_trip(x, fmt), None


_BUILT_IN = (
    Family(
        "bf16",
        _kernel,
        roundings=tuple(rounding for name, rounding in _KERNEL_RULES if name == "bf16"),
        bits=16,
        largest=float(np.float32(2 - 2**-7) * np.float32(2.0**127)),
        smallest_normal=2.0**-126,
        smallest_subnormal=2.0**-133,
        idempotent=True,
        spacing=lambda x, fmt: Spacing(narrow_floats.float_step(x, 7, -126)),
        note="ggml's rule by default; overflow to infinity",
    ),
    Family(
        "f16",
        _kernel,
        bits=16,
        largest=65504.0,
        smallest_normal=2.0**-14,
        smallest_subnormal=2.0**-24,
        idempotent=True,
        spacing=lambda x, fmt: Spacing(narrow_floats.float_step(x, 10, -14)),
        note="IEEE 754 binary16; overflow to infinity",
    ),
    *narrow_floats.FAMILIES,
    *integers.FAMILIES,
    *ggml_blocks.FAMILIES,
    *microscaling.FAMILIES,
)
_FAMILIES = {family.name: family for family in _BUILT_IN}
_ALIASES = {alias: family.name for family in _BUILT_IN for alias in family.aliases}
_registered: set[str] = set()


def register_format(
    name: str,
    fn: Callable[[Floats], npt.ArrayLike],
    *,
    bits_per_value: float | None = None,
    largest: float | None = None,
    smallest_normal: float | None = None,
    smallest_subnormal: float | None = None,
    idempotent: bool = False,
    whole_tensor: bool = False,
    description: str = "",
) -> Format:
    """Add the format ``name``, rounded by fn, for this process; returns it.

    fn gets x, (rows, n) float32, read-only, and returns an array of that shape that converts to
    float32. Rows may come in any number at a time, unless ``whole_tensor``. fn may be called
    from several threads. The other arguments are what ``fq formats`` shows.

    Raises ValueError if the name is taken or not lower-case letters, digits and underscores,
    and TypeError if fn cannot be called.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"a format's name is lower-case letters, digits and underscores, a letter first, not {name!r}"
        )
    if _lookup(name) or name in _ALIASES:
        raise ValueError(f"there is a format {name} already")
    if not callable(fn):
        raise TypeError(f"format {name}: fn must be a function of an array, not {type(fn).__name__}")

    def quantise(x: Floats, fmt: Format) -> Rounded:
        values = np.asarray(fn(x))
        if values.shape != x.shape:
            raise ValueError(f"format {name}: its function returned shape {values.shape} for shape {x.shape}")
        if not np.can_cast(values.dtype, np.float32, "same_kind"):
            raise ValueError(f"format {name}: its function returned {values.dtype}, which is not float32")
        return values.astype(np.float32), None

    _FAMILIES[name] = Family(
        name,
        quantise,
        roundings=("registered",),
        bits=bits_per_value,
        largest=largest,
        smallest_normal=smallest_normal,
        smallest_subnormal=smallest_subnormal,
        idempotent=idempotent,
        whole_tensor=whole_tensor,
        note=description,
    )
    _registered.add(name)
    return Format(name)


def unregister_format(name: str) -> None:
    """Remove a format that ``register_format`` added. Raises ValueError for any other."""
    if name not in _registered:
        raise ValueError(f"{name!r} is no registered format")
    _registered.remove(name)
    del _FAMILIES[name]
    _parse.cache_clear()


def format_names() -> list[str]:
    """Every name with each of its rounding rules, the default rounding first; no other options."""
    return [
        str(Format(name, rounding)).split(",")[0]
        for name, family in _FAMILIES.items()
        for rounding in family.roundings
    ]


def roundings(name: str) -> list[str]:
    """The rounding rules of the format ``name``, the default first."""
    found = _lookup(name)
    return list(found.roundings) if found else []


def describe_formats() -> list[dict[str, Any]]:
    """A dict for each name, in the order of docs/formats.md: name, aliases, options (alternatives
    separated by ``|``, the default first), bits_per_value, largest, smallest_normal,
    smallest_subnormal, rounding, block (how many values share a scale), note. None: depends on
    a scale, or is not known.
    """
    return [
        {
            "name": name,
            "aliases": list(family.aliases),
            "options": _options(family),
            "bits_per_value": Format(name).bits_per_value,
            "largest": family.largest,
            "smallest_normal": family.smallest_normal,
            "smallest_subnormal": family.smallest_subnormal,
            "rounding": family.roundings[0],
            "block": family.block,
            "note": family.note,
        }
        for name, family in _FAMILIES.items()
    ]


# ---------------------------------------------------------------- parsing


def get_format(spec: str | Format, *, seed: int = 0) -> Format:
    """Parse ``name[:option[,option...]]``, or check a Format.

    seed  of stochastic rounding or dither, where a string names none

    Raises ValueError, naming what is unknown and what there is (or the package that is missing),
    and TypeError if ``spec`` is neither a string nor a Format.
    """
    if isinstance(spec, Format):
        if not 0 <= spec.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, not {spec.seed}")
        parsed = _parse(str(spec))
        return spec if parsed == spec else parsed
    if not isinstance(spec, str):
        raise TypeError(f"a format is a string such as 'bf16', not {type(spec).__name__}")
    found = _parse(spec)
    if seed and found.seeded and "seed=" not in spec.lower():
        found = get_format(found.with_seed(seed))
    return found


def _lookup(name: str) -> Family | None:
    return _FAMILIES.get(name) or noise_family(name, _FAMILIES)


def _canonical(name: str) -> str:
    """Without aliases, also behind a control's prefix."""
    prefix = next((p for p in PREFIXES if name.startswith(p) and name not in _FAMILIES), "")
    rest = name[len(prefix) :]
    return prefix + _ALIASES.get(rest, rest)


def _family(name: str, spec: str) -> Family:
    family = _lookup(name)
    if family is None:
        import difflib  # slow to import, and needed here alone

        close = difflib.get_close_matches(name, [*_FAMILIES, *_ALIASES], 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown format {spec!r}; there are {', '.join(_FAMILIES)}{hint}")
    return family


def _choices(family: Family) -> tuple[tuple[str, ...], ...]:
    return (family.roundings, *family.choices)


def _options(family: Family) -> list[str]:
    options = ["|".join(f"{o}N" if o.endswith("=") else o for o in c) for c in _choices(family) if len(c) > 1]
    if family.spacing:
        options.append(DITHER)
    return [*options, "seed=N"] if _takes_seed(family) else options


def _takes_seed(family: Family) -> bool:
    return family.spacing is not None or "stochastic" in family.roundings


def _chooses(option: str, choice: tuple[str, ...]) -> bool:
    key, equals, _ = option.partition("=")
    return key + equals in choice


def _natural(text: str) -> bool:
    return text.isascii() and text.isdigit()


@lru_cache(maxsize=256)
def _parse(spec: str) -> Format:
    name, _, text = spec.strip().lower().partition(":")
    name = _canonical(name)
    family = _family(name, spec)
    chosen: dict[tuple[str, ...], str] = {}
    seed, dither = None, False
    for option in filter(None, text.split(",")):
        key, equals, value = option.partition("=")
        if key == "seed" and _natural(value) and _takes_seed(family):
            seed = int(value)
            continue
        if option == DITHER:
            if family.spacing is None:
                raise ValueError(f"format {name} has no dither: how far apart its values lie is not known")
            dither = True
            continue
        choice = next((c for c in _choices(family) if _chooses(option, c)), None)
        if choice is None or (equals and not (_natural(value) and int(value) > 0)):
            known = _options(family)
            has = f"there are {', '.join(known)}" if known else f"{name} has none"
            raise ValueError(f"unknown option {option!r} in format {spec!r}; {has}")
        option = f"{key}={int(value)}" if equals else option
        if chosen.setdefault(choice, option) != option:
            raise ValueError(f"options {chosen[choice]} and {option} of format {spec!r} exclude each other")
    rounding = chosen.get(family.roundings, family.roundings[0])
    if dither and rounding == "stochastic":
        raise ValueError(f"format {spec!r}: stochastic rounding falls anew for each seed without dither")
    if seed is not None:
        if not dither and rounding != "stochastic":
            needed = "stochastic rounding or dither" if "stochastic" in family.roundings else DITHER
            raise ValueError(f"option seed={seed} of format {spec!r} needs {needed}")
        if seed >= 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, not {seed}")
    if family.needs:
        try:
            importlib.import_module(family.needs)
        except ImportError:
            raise ValueError(f"format {name} needs the Python package {family.needs}") from None
    options = tuple(chosen[c] for c in family.choices if c in chosen and chosen[c] != c[0])
    return Format(name, rounding, seed or 0, (*options, DITHER) if dither else options)
