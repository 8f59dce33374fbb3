"""A format, and the family that its name stands for: options, numbers, and the function that rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import Floats, Mask, Rounded, Spacing
from .dither import dithered
from .kernels import Kernel

NEAREST_EVEN = "nearest-even"
DITHER = "dither"
SCALE = "scale="
# a choice of formats that round each element alone, unless they have a float32 scale
UNSCALED = ("unscaled", "row", "tensor", "group=")

# Elements that are rounded at a time, so that intermediate results stay in the cache.
_PIECE = 1 << 16


class Registration:
    """What ``register_format`` began: a family and the noise of it share one, so that both know its end."""

    ended = False


@dataclass(frozen=True)
class Family:
    """The formats that share a name and differ in their options.

    quantise        (x, format) -> Rounded; x is (rows, n) float32, C-contiguous, not empty, read-only.
                    That a finite element became infinite or NaN need not be said in the mask
    roundings       names of the rounding rules, the default first
    kernel          (format) -> what C needs to round to it; None: C does not
    tensor_kernel   (format, lowest, highest) -> the same for a format that is ``whole_tensor``, whose rows'
                    values lie between these, float32, NaN where one is; None: C does not round to it
    choices         further options, each a tuple of which one holds, the default first; an
                    entry that ends in ``=`` takes a positive integer
    bits            bits per value, shares of scales included; a function where options matter
    largest, smallest_normal, smallest_subnormal
                    positive numbers; None where they depend on a scale
    block           how many values share a scale, in words; None where there is no scale
    whole_tensor    whether the rows must come in one call; option ``tensor`` says so as well
    check           raises ValueError for options that do not go together
    spacing         (x, format) -> Spacing, x as for quantise; None: the format has no dither
    static_top      what the largest magnitude becomes under a static scale, a function where options
                    matter; None: it takes none
    static_channels whether each element of a row may have a static scale of its own
    noise           whether it is a control (noise.py), which hands its options on
    registration    of a user's own; None: there for good
    """

    name: str
    quantise: Callable[[Floats, Format], Rounded]
    roundings: tuple[str, ...] = (NEAREST_EVEN,)
    kernel: Callable[[Format], Kernel] | None = None
    tensor_kernel: Callable[[Format, np.float32, np.float32], Kernel] | None = None
    choices: tuple[tuple[str, ...], ...] = ()
    bits: float | Callable[[Format], float] | None = None
    largest: float | None = None
    smallest_normal: float | None = None
    smallest_subnormal: float | None = None
    block: str | None = None
    idempotent: bool = False
    whole_tensor: bool = False
    aliases: tuple[str, ...] = ()
    check: Callable[[Format], None] | None = None
    spacing: Callable[[Floats, Format], Spacing] | None = None
    static_top: float | Callable[[Format], float] | None = None
    static_channels: bool = True
    noise: bool = False
    note: str = ""
    registration: Registration | None = None

    @property
    def registered(self) -> bool:
        """Whether ``quantise`` is a user's own."""
        return self.registration is not None and not self.noise

    @property
    def gone(self) -> bool:
        """Whether it is registered no more: its name stands for nothing then, or for another."""
        return self.registration is not None and self.registration.ended


class Families(Protocol):
    """Where a Format finds the family of its name: the registry, which stands above this module."""

    def find(self, name: str) -> Family | None: ...

    def unknown(self, name: str, spec: str) -> ValueError:
        """What to raise where there is none; ``spec`` is how the format is written."""


_families: Families


def find_families_in(families: Families) -> None:
    """Formats find their families there from now on."""
    global _families
    _families = families


def chooses(option: str, choice: tuple[str, ...]) -> bool:
    key, equals, _ = option.partition("=")
    return key + equals in choice


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
    scales    of a static scale: one, or one for each element of a row; none where ``scale=@FILE`` waits for
              a site
    """

    name: str
    rounding: str = ""
    seed: int = 0
    options: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.rounding:
            object.__setattr__(self, "rounding", self._default_rounding)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a family's functions cannot be pickled, and it is found again by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def family(self) -> Family:
        """What the name stands for. Raises ValueError if it is not registered (any more)."""
        family = self._held_family()
        if family is None:
            raise _families.unknown(self.name, str(self))
        return family

    def _held_family(self) -> Family | None:
        """The family, looked up once; again if it is registered no more. None if there is none."""
        family: Family | None = self.__dict__.get("_family")
        if family is None or family.gone:
            family = _families.find(self.name)
            # not a field: equality, hash, repr, replace and pickling go by what the format is written with
            object.__setattr__(self, "_family", family)
        return family

    @property
    def _default_rounding(self) -> str:
        family = self._held_family()
        return family.roundings[0] if family else NEAREST_EVEN

    @cached_property  # a norm of one row asks for it
    def kernel(self) -> Kernel:
        """What C needs to round to it; its ``quant`` is 0 where a function in Python does, as it does for a
        format that is ``whole_tensor``."""
        family = None if self.dither else self._held_family()
        return family.kernel(self) if family and family.kernel and not self.whole_tensor else Kernel()

    def tensor_kernel(self, lowest: np.float32, highest: np.float32) -> Kernel:
        """As ``kernel``, once it is known what all rows' values lie between: of a ``whole_tensor`` format."""
        make = None if self.dither else self.family.tensor_kernel
        return make(self, lowest, highest) if make else Kernel()

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
            next((option for option in self.options if chooses(option, choice)), choice[0])
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
    def static_scale(self) -> str:
        """What stands after ``scale=``: a number, or @ and a file of `fq calibrate`; empty: none."""
        return next((o.removeprefix(SCALE) for o in self.options if o.startswith(SCALE)), "")

    @property
    def calibration(self) -> str:
        """The file that says the scale of each site; empty: none does."""
        return self.static_scale[1:] if self.static_scale.startswith("@") else ""

    def check_static_scale(self, *beside: str) -> None:
        """Raises ValueError for options that a static scale does not go with: all but dither, ``beside``."""
        default = self.rounding == self._default_rounding
        others = [] if default else [self.rounding]
        others += [o for o in self.options if o not in (DITHER, *beside) and not o.startswith(SCALE)]
        if self.static_scale and others:
            raise ValueError(f"a static scale of format {self.name} does not go with option {others[0]}")

    def with_ranges(self, ranges: npt.NDArray[np.float32]) -> Format:
        """With the static scales under which these magnitudes, (1,) or (n,), become the largest code.

        Raises ValueError for several where the format has one for all.
        """
        top = self.family.static_top
        assert top is not None
        if len(ranges) > 1 and not self.family.static_channels:
            raise ValueError(f"format {self} has one static scale for a tensor, not one for each channel")
        scales = ranges / np.float32(top(self) if callable(top) else top)
        scales = np.maximum(scales, np.finfo(np.float32).smallest_normal)
        return replace(self, scales=tuple(scales.tolist()))

    def scales_for(self, n: int) -> Floats:
        """Its static scales, float32 (1,) or (n,), for rows of n. Raises ValueError if it has none."""
        if not self.scales:
            raise ValueError(f"format {self}: its scale is one of a site's, which a rule names")
        if len(self.scales) not in (1, n):
            raise ValueError(f"format {self} has scales for rows of {len(self.scales)} values, not of {n}")
        return self.static_scales

    @cached_property
    def static_scales(self) -> Floats:
        """``scales`` as an array, which C reads for as long as the format lives."""
        return np.array(self.scales, np.float32)

    @property
    def by_element(self) -> bool:
        """Whether each value is rounded alone: none shares a scale that is made of them."""
        return self.family.block is None and not self.has_own_scale

    @property
    def has_own_scale(self) -> bool:
        """Whether a format of elements has a scale per row, group or tensor beside them."""
        scaled = UNSCALED[1:]
        return UNSCALED in self.family.choices and any(chooses(option, scaled) for option in self.options)

    @property
    def whole_tensor(self) -> bool:
        """Whether all rows must be quantised in one call: they share a scale."""
        return self.family.whole_tensor or ("tensor" in self.settings and not self.static_scale)

    @property
    def idempotent(self) -> bool:
        """Whether quantising a finite result again changes nothing."""
        return (
            self.family.idempotent and not self.dither and not self.number("had") and not self.has_own_scale
        )

    @property
    def bits_per_value(self) -> float | None:
        """Bits per value with its share of the block's scale (not of a row's or a tensor's)."""
        bits = self.family.bits
        return bits(self) if callable(bits) else bits

    @property
    def largest(self) -> float | None:
        """Largest finite number; None where it depends on a scale, here and below."""
        return None if self.has_own_scale else self.family.largest

    @property
    def smallest_normal(self) -> float | None:
        return None if self.has_own_scale else self.family.smallest_normal

    @property
    def smallest_subnormal(self) -> float | None:
        """None too where subnormals are flushed."""
        flushed = self.rounding == "nearest-even-ftz" or "flush-subnormals" in self.options
        return None if flushed or self.has_own_scale else self.family.smallest_subnormal

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
        from .._kernels import default_fpu  # which imports this package

        family = self.family
        in_one = (self.kernel.quant and self.by_element) or self.whole_tensor or family.registered
        step = rows if in_one else max(1, _PIECE // n)
        for begin in range(0, rows, step):
            piece = np.ascontiguousarray(x[begin : begin + step])
            piece.flags.writeable = False
            with default_fpu(), np.errstate(all="ignore"):
                dither = self.dither and not family.noise
                out, cut = self._dithered(piece) if dither else family.quantise(piece, self)
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

    def _dithered(self, x: Floats) -> Rounded:
        plain, quantise, spacing = self.without_dither, self.family.quantise, self.family.spacing
        assert spacing is not None
        return dithered(x, lambda y: quantise(y, plain), lambda y: spacing(y, plain), self.seed)

    def __str__(self) -> str:
        options = list(self.options)
        if self.rounding != self._default_rounding:
            options.insert(0, self.rounding)
        if self.seeded:
            options.append(f"seed={self.seed}")
        return f"{self.name}:{','.join(options)}" if options else self.name
