"""What the report's parts share: a run's cells by group, and figures as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..measure.inference import MIN_CHUNKS, RatioTest, ratio_test
from ..measure.noise import GAUSSIAN, SIGNS
from ..words import ascii_safe
from .order import Order

Entry = dict[str, Any]  # a cell, as in `figures`
Interval = tuple[float, float]
NONE = "–"
REALISATION = "realisation"  # the kind of a cell that draws another cell's rounding anew


@dataclass(frozen=True)
class Control:
    """What stands in a rounding's place.

    label         in a legend
    costs, than   in sentences: "... 3 times as much", "Rounding costs more than ..."
    marker, opacity
                  of its points and of its bars
    """

    prefix: str
    label: str
    costs: str
    than: str
    marker: str
    opacity: float


CONTROLS = (
    Control(
        GAUSSIAN,
        "noise of the same length instead",
        "Gaussian noise of the same length in place of the rounding error costs",
        "its noise",
        "D",
        0.3,
    ),
    Control(
        SIGNS,
        "its errors with random signs instead",
        "The rounding's own errors with random signs cost",
        "with these",
        "x",
        0.0,
    ),
)


@dataclass
class Group:
    """The cells of one SITES=FORMAT, and the groups that stand beside it as its controls.

    parts         in the place of single cells, those of a unit's steps, of norms under one, or of profiles
    without       all of a unit's steps but one
    noise, signs  Gaussian noise of the rounding error's length, and that error with random signs
    indices       which of the text's each chunk is, from 0
    behind        single cells, or parts, that are left out: what is here is not ordered without them
    """

    name: str
    singles: list[Entry] = field(default_factory=list)
    cumulative: list[Entry] = field(default_factory=list)
    parts: list[Entry] = field(default_factory=list)
    without: list[Entry] = field(default_factory=list)
    together: Entry | None = None
    additivity: float | None = None
    additivity_interval: Interval | None = None
    sum_of_singles: float = 0.0
    noise: Group | None = None
    signs: Group | None = None
    indices: Sequence[int] = ()
    behind: Sequence[str] = ()

    @property
    def sites(self) -> str:
        return self.name.partition("=")[0]

    @property
    def spec(self) -> str:
        return self.name.partition("=")[2]

    @property
    def of_norms(self) -> bool:
        """Whether its single cells are norms that have a unit, as of `unit_charts.of_norms`."""
        return any(entry["kind"] == "norm" for entry in self.singles)

    @property
    def control(self) -> Control | None:
        """Which control it is of another group."""
        return next((control for control in CONTROLS if self.spec.startswith(control.prefix)), None)

    @property
    def controls(self) -> list[tuple[Control, Group]]:
        """Those of this group that were measured."""
        beside = zip(CONTROLS, (self.noise, self.signs), strict=True)
        return [(control, group) for control, group in beside if group is not None]

    @cached_property
    def order(self) -> Order[Entry]:
        """Of its single cells, or of its parts."""
        return order_of([] if self.behind else self.singles or self.parts)

    @property
    def whole(self) -> Entry | None:
        """Its sites all together; where it has only one, that one."""
        alone = len(self.singles) == 1 and not self.behind
        return self.together or (self.singles[0] if alone else None)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind_of(entry) for entry in self.singles))

    @property
    def panels(self) -> dict[str, list[Entry]]:
        """Its single cells by kind; output_norm, of which there is one, goes with the kind before it."""
        found: dict[str, list[Entry]] = {}
        for kind in self.kinds:
            mine = [entry for entry in self.singles if kind_of(entry) == kind]
            of_point = [key for key in found if key.endswith(kind.partition(".")[2])]
            if of_point and site_of(mine[0])[1] is None:
                last = of_point[-1]
                found[f"{last} and {kind}"] = [*found.pop(last), *mine]
            else:
                found[kind] = mine
        return found

    def text(self, entries: Sequence[Entry]) -> str:
        """Single cells of it: ``layers 3–5 and 9``, or ``ffn_norm.raw layer 3 and output_norm.raw``."""
        by_kind: dict[str, list[int | None]] = {}
        for entry in entries:
            by_kind.setdefault(kind_of(entry), []).append(site_of(entry)[1])
        parts = []
        for kind, layers in by_kind.items():
            known = [layer for layer in layers if layer is not None]
            text = f"layer{'s' if len(known) > 1 else ''} {ranges(known)}" if known else ""
            parts.append(f"{kind} {text}".strip() if len(self.kinds) > 1 or not text else text)
        return listed(parts)


def groups_of(data: dict[str, Any]) -> list[Group]:
    """In the run's order; a control stays in the list and is its format's ``noise`` or ``signs`` too."""
    indices = data["chunks_of_text"]
    groups = []
    for about in data["groups"]:
        mine = [e for e in data["cells"] if e["group"] == about["name"] and e["kind"] != REALISATION]
        if not mine:
            continue
        groups.append(
            Group(
                plain(about["name"]),
                [e for e in mine if e["kind"] == "single" and e["sites"]],
                [e for e in mine if e["kind"] == "cumulative"],
                [e for e in mine if e["kind"] in ("step", "norm", "unit", "profile")],
                [e for e in mine if e["kind"] == "without"],
                next((e for e in mine if e["kind"] == "together"), None),
                about.get("additivity"),
                _interval(about.get("additivity_ci95_chunks")),
                about["sum_of_single_klds"],
                indices=indices,
                behind=about.get("behind", ()),
            )
        )
    by_name = {group.name: group for group in groups}
    for group in groups:
        group.noise = by_name.get(f"{group.sites}={GAUSSIAN}{group.spec}")
        group.signs = by_name.get(f"{group.sites}={SIGNS}{group.spec}")
    return groups


def control_of(data: dict[str, Any]) -> Entry | None:
    return next((entry for entry in data["cells"] if "exactly_zero" in entry), None)


# ---------------------------------------------------------------- a cell


def site_of(entry: Entry) -> tuple[str, int | None, str | None]:
    """(kind, layer, point) of a single cell, or of a norm's that has a unit; values of norms have points."""
    if not entry["sites"]:
        kind, _, layer = entry["name"].partition("=")[0].removesuffix("]").partition("[")
        return kind, int(layer) if layer.isdecimal() and len(layer) <= 9 else None, None
    site = entry["sites"][0]
    return site["kind"], site["layer"], site["point"]


def kind_of(entry: Entry) -> str:
    """``ffn_norm.raw``, ``l_out``"""
    kind, _, point = site_of(entry)
    return kind if point is None else f"{kind}.{point}"


def kld(entry: Entry) -> float:
    return number(entry["comparison"]["mean_kld"])


def kld_interval(entry: Entry) -> Interval | None:
    return _interval(entry["comparison"]["mean_kld_ci95_chunks"])


def chunk_klds(entry: Entry) -> np.ndarray:
    """Mean KL in each chunk, float64 (chunks,); nan where JSON has none."""
    return np.array([number(value) for value in entry["comparison"]["chunks"]["mean_kld"]])


def is_finite(entry: Entry) -> bool:
    return not entry.get("not_finite_tokens") and bool(np.isfinite(chunk_klds(entry)).all())


def n_differing(entry: Entry) -> int:
    """In how many chunks it is not the unrounded model."""
    return int(np.count_nonzero(chunk_klds(entry)))


def differs_in_few(entry: Entry) -> bool:
    """Whether there would be an interval, were there not too few chunks that differ."""
    return is_finite(entry) and 0 < n_differing(entry) < MIN_CHUNKS <= len(chunk_klds(entry))


def unchanged(entries: Sequence[Entry]) -> list[Entry]:
    """Those that are the unrounded model in every chunk."""
    return [entry for entry in entries if is_finite(entry) and not n_differing(entry)]


def order_of(entries: Sequence[Entry]) -> Order[Entry]:
    """Of the cells that are finite and differ at all from the unrounded model."""
    known = [entry for entry in entries if is_finite(entry) and n_differing(entry)]
    return Order(known, [chunk_klds(entry) for entry in known])


def paired(one: Sequence[Entry], other: Sequence[Entry]) -> RatioTest | None:
    """The summed mean KL of some cells over that of others, chunk by chunk."""
    if not one or not other:
        return None
    return ratio_test(*(np.sum([chunk_klds(entry) for entry in side], axis=0) for side in (one, other)))


def ppl_change(entry: Entry) -> float:
    """PPL ratio - 1, in %; the mean over realisations where there are some."""
    return _percent((realisations(entry) or entry["comparison"])["ln_ppl_ratio"])


def ppl_interval(entry: Entry) -> Interval | None:
    """Over chunks and realisations, or over chunks and of this one rounding alone."""
    drawn = realisations(entry)
    ends = drawn.get("ln_ppl_ratio_ci95") if drawn else entry["comparison"]["ln_ppl_ratio_ci95_chunks"]
    found = _interval(ends)
    return None if found is None else (_percent(found[0]), _percent(found[1]))


def realisations(entry: Entry) -> dict[str, Any] | None:
    """The change of the perplexity over several drawings of the same rounding, where there are some."""
    return entry.get("realisations")


def same_top_text(entry: Entry) -> str:
    """``99.74 % (99.5 to 99.85 %)``"""

    def percent(share: float) -> str:
        for decimals in range(2, 9):
            text = f"{100 * share:.{decimals}f}".rstrip("0").rstrip(".")
            if text != "100" or share == 1:  # 100 % is all of them
                break
        return text

    interval = _interval(entry["comparison"]["same_top_ci95_chunks"])
    share = number(entry["comparison"]["same_top"])
    if math.isnan(share):
        return NONE
    around = "" if interval is None else f" ({percent(interval[0])} to {percent(interval[1])} %)"
    return f"{percent(share)} %{around}"


def number(value: Any) -> float:
    """What JSON and the store leave out is nan."""
    return math.nan if value is None else float(value)


def finite(value: Any) -> float:
    """What can be drawn; what cannot is nan and left out."""
    value = number(value)
    return value if math.isfinite(value) else math.nan


def _interval(ends: Sequence[float] | None) -> Interval | None:
    if ends is None or not all(math.isfinite(end) for end in ends):
        return None
    return float(ends[0]), float(ends[1])


def _percent(ln_ratio: float) -> float:
    ln_ratio = number(ln_ratio)
    return 100 * math.expm1(ln_ratio) if ln_ratio < 700 else math.inf


# ---------------------------------------------------------------- text


def plain(text: Any) -> str:
    """On one line and without control characters."""
    return ascii_safe(str(text))


def significant(value: Any, digits: int = 3) -> str:
    """``3.02e-05``, ``0.0412``, ``24.5``"""
    value = number(value)
    if not math.isfinite(value):
        return NONE if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and not 1e-3 <= abs(value) < 1e5:
        return minus(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])
    return minus(f"{value:.{max(decimals, 0)}f}" if value else "0")


def kl_text(value: Any, digits: int = 3) -> str:
    """``9.66e-03``: with an exponent, so that the ends of an interval and its middle look alike."""
    value = number(value)
    if not value or not math.isfinite(value) or abs(value) >= 0.1:
        return significant(value, digits)
    return minus(f"{value:.{digits - 1}e}")


def signed(value: Any, digits: int = 3) -> str:
    text = significant(value, digits)
    return f"+{text}" if number(value) > 0 else text


def minus(text: str) -> str:
    """A minus sign in front; the hyphen of an exponent stays, so that it can be pasted."""
    return f"−{text[1:]}" if text.startswith("-") else text


def between(interval: Interval | None, form: Callable[[float], str] = kl_text) -> str:
    return "no interval" if interval is None else f"{form(interval[0])} to {form(interval[1])}"


def listed(parts: Sequence[str]) -> str:
    return "".join(parts) if len(parts) < 2 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def ranges(numbers: Iterable[int]) -> str:
    """``0–3, 7, 8 and 10``"""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return listed(
        [part for run in runs for part in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else map(str, run))]
    )


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
