"""The table of formats: what there is, what a user adds, and what a name with its options means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from . import ggml_blocks, integers, microscaling, narrow_floats, sixteen_bits, tapered
from .arrays import Floats, Rounded
from .format import DITHER, SCALE, Family, Format, Registration, chooses, find_families_in
from .gain import FAMILY as GAIN_FAMILY
from .noise import PREFIXES, noise_family

_BUILT_IN = (
    *sixteen_bits.FAMILIES,
    *narrow_floats.FAMILIES,
    *tapered.FAMILIES,
    *integers.FAMILIES,
    *ggml_blocks.FAMILIES,
    *microscaling.FAMILIES,
)


class _Table:
    """The families by name, and what else a name may stand for: an alias, a control, the noise of a
    family."""

    def __init__(self, families: Iterable[Family]) -> None:
        self.families = {family.name: family for family in families}
        self.aliases = {alias: family.name for family in self.families.values() for alias in family.aliases}

    def find(self, name: str) -> Family | None:
        if name == GAIN_FAMILY.name:
            return GAIN_FAMILY
        return self.families.get(name) or narrow_floats.family_of(name) or noise_family(name, self.find)

    def unknown(self, name: str, spec: str) -> ValueError:
        """The error that lists what there is, and what ``name`` is close to."""
        import difflib  # slow to import, and needed here alone

        close = difflib.get_close_matches(name, [*self.families, *self.aliases], 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        names = f"{', '.join(self.families)}, and eXmY with X bits of exponent and Y of mantissa"
        return ValueError(f"unknown format {spec!r}; there are {names}{hint}")

    def canonical(self, name: str) -> str:
        """Without aliases, also behind a control's prefix."""
        prefix = next((p for p in PREFIXES if name.startswith(p) and name not in self.families), "")
        rest = name[len(prefix) :]
        return prefix + self.aliases.get(rest, rest)


_table = _Table(_BUILT_IN)
find_families_in(_table)


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
    if _table.find(name) or name in _table.aliases:
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

    _table.families[name] = Family(
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
        registration=Registration(),
    )
    return Format(name)


def unregister_format(name: str) -> None:
    """Remove a format that ``register_format`` added. Raises ValueError for any other."""
    family = _table.families.get(name)
    if family is None or family.registration is None:
        raise ValueError(f"{name!r} is no registered format")
    del _table.families[name]
    family.registration.ended = True
    _parse.cache_clear()
    _checked.cache_clear()


def format_names() -> list[str]:
    """Every name with each of its rounding rules, the default rounding first; no other options."""
    return [
        str(Format(name, rounding)).split(",")[0]
        for name, family in _table.families.items()
        for rounding in family.roundings
    ]


def roundings(name: str) -> list[str]:
    """The rounding rules of the format ``name``, the default first."""
    found = _table.find(name)
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
        for name, family in _table.families.items()
    ]


# ---------------------------------------------------------------- parsing


def get_format(spec: str | Format, *, seed: int = 0) -> Format:
    """Parse ``name[:option[,option...]]``, or check a Format.

    seed  of stochastic rounding or dither, where a string names none

    Raises ValueError, naming what is unknown and what there is, and TypeError if ``spec`` is neither a
    string nor a Format.
    """
    if isinstance(spec, Format):
        # to hash the scales of a row takes longer than to look at all else
        parsed = _check(spec) if spec.scales else _checked(spec)
        return spec if parsed == spec else parsed
    if not isinstance(spec, str):
        raise TypeError(f"a format is a string such as 'bf16', not {type(spec).__name__}")
    found = _parse(spec)
    if seed and found.seeded and "seed=" not in spec.lower():
        found = get_format(found.with_seed(seed))
    return found


def _check(fmt: Format) -> Format:
    if not 0 <= fmt.seed < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, not {fmt.seed}")
    return replace(_parse(str(fmt)), scales=fmt.scales)


_checked = lru_cache(maxsize=4096)(_check)  # a seed for each site makes many formats of one


def _choices(family: Family) -> tuple[tuple[str, ...], ...]:
    return (family.roundings, *family.choices)


def _options(family: Family) -> list[str]:
    options = ["|".join(f"{o}N" if o.endswith("=") else o for o in c) for c in _choices(family) if len(c) > 1]
    if family.static_top is not None:
        options.append(f"{SCALE}N|{SCALE}@FILE")
    if family.spacing:
        options.append(DITHER)
    return [*options, "seed=N"] if _takes_seed(family) else options


def _takes_seed(family: Family) -> bool:
    return family.spacing is not None or "stochastic" in family.roundings


def _scale_of(fmt: Format) -> float:
    """The number that a format is written with. Raises ValueError for what is none."""
    text, limits = fmt.static_scale, np.finfo(np.float32)
    # not all that float() takes: 1_0, other scripts' digits
    plain = re.fullmatch(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE)
    with np.errstate(over="ignore"):
        scale = float(np.float32(text)) if plain else 0.0
    if not float(limits.smallest_normal) <= scale <= float(limits.max):
        raise ValueError(
            f"format {fmt}: a static scale is a number from 2^-126 to below 2^128, or @ and a file of "
            "fq calibrate"
        )
    return scale


def _natural(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(key: str, digits: str, least: int, bits: int) -> int:
    """Of an option. Raises ValueError for what has more bits; int() would for some thousand digits."""
    digits = digits.lstrip("0") or "0"
    if len(digits) > 20 or int(digits) >= 2**bits:
        said = digits if len(digits) <= 20 else f"{digits[:20]}…"
        raise ValueError(f"{key} must be between {least} and 2**{bits} - 1, not {said}")
    return int(digits)


@lru_cache(maxsize=256)
def _parse(spec: str) -> Format:
    name, _, text = spec.strip().partition(":")
    name = _table.canonical(name.lower())
    family = _table.find(name)
    if family is None:
        raise _table.unknown(name, spec)
    chosen: dict[tuple[str, ...], str] = {}
    seed, dither = None, False
    static = ""
    for written in filter(None, text.split(",")):
        option = written.lower()
        key, equals, value = option.partition("=")
        if key == "seed" and _natural(value) and _takes_seed(family):
            seed = _number(key, value, 0, 64)
            continue
        if option.startswith(SCALE) and family.static_top is not None:
            if static and static != written:
                raise ValueError(f"format {spec!r} has two static scales")
            static = written
            continue
        if option == DITHER:
            if family.spacing is None:
                raise ValueError(f"format {name} has no dither: how far apart its values lie is not known")
            dither = True
            continue
        choice = next((c for c in _choices(family) if chooses(option, c)), None)
        if choice is None or (equals and not (_natural(value) and value.strip("0"))):
            known = _options(family)
            has = f"there are {', '.join(known)}" if known else f"{name} has none"
            raise ValueError(f"unknown option {option!r} in format {spec!r}; {has}")
        option = f"{key}={_number(key, value, 1, 31)}" if equals else option
        if chosen.setdefault(choice, option) != option:
            raise ValueError(f"options {chosen[choice]} and {option} of format {spec!r} exclude each other")
    rounding = chosen.get(family.roundings, family.roundings[0])
    if dither and rounding == "stochastic":
        raise ValueError(f"format {spec!r}: stochastic rounding falls anew for each seed without dither")
    if seed is not None:
        if not dither and rounding != "stochastic":
            needed = "stochastic rounding or dither" if "stochastic" in family.roundings else DITHER
            raise ValueError(f"option seed={seed} of format {spec!r} needs {needed}")
    options = tuple(chosen[c] for c in family.choices if c in chosen and chosen[c] != c[0])
    if static:
        options = (*options, static)
    fmt = Format(name, rounding, seed or 0, (*options, DITHER) if dither else options)
    if static and not fmt.calibration:
        fmt = replace(fmt, scales=(_scale_of(fmt),))
    if family.check:
        family.check(fmt)
    return fmt
