"""How sure a share of items is, the difference of two shares of the same items, and a curve of survival.

Items are questions or prompts, which are independent, as tokens are not. Sources: the interval of a share,
Wilson, Journal of the American Statistical Association 22 (1927); the test of two shares of the same items,
McNemar, Psychometrika 12 (1947), exact by the binomial distribution; the interval of their difference,
Tango, Statistics in Medicine 17 (1998), which holds where hardly any items differ; survival, Kaplan and
Meier, Journal of the American Statistical Association 53 (1958), its variance Greenwood's, the interval on
ln(-ln S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fq_kernels import exp, log

from .inference import Interval, beta_cdf

Z = 1.959963984540054  # that a normal variable exceeds, on either side, with the chance 0.05


def wilson_interval(hits: int, n: int) -> Interval | None:
    """95 % of a share of n independent items; None of none."""
    if not n:
        return None
    share, z2 = hits / n, Z * Z / n
    centre = share + z2 / 2
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max((centre - half) / (1 + z2), 0.0), min((centre + half) / (1 + z2), 1.0)


def mcnemar_p(lost: int, gained: int) -> float:
    """The chance, were items as likely lost as gained, that they are divided as unevenly as this or more."""
    n, few = lost + gained, min(lost, gained)
    if not n:
        return 1.0
    # that a binomial variable of n halves is at most few
    return min(2 * beta_cdf(0.5, n - few, few + 1), 1.0)


def tango_interval(lost: int, gained: int, n: int) -> Interval | None:
    """95 % of (gained - lost) / n, the difference of two shares of the same n items; None of none.

    lost, gained  items that the first alone has, and the second alone
    """
    if not n:
        return None

    def score(delta: float) -> float:
        """Of the hypothesis that the difference is delta: falls as that grows."""
        # the most likely chance of a lost item then
        b = 2 * n * delta - lost - gained - (gained - lost) * delta
        a, c = 2 * n, -lost * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        off = gained - lost - n * delta
        return off / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, off) if off else 0.0

    found = (gained - lost) / n
    return _crossing(score, Z, -1.0, found), _crossing(score, -Z, found, 1.0)


def _crossing(falling: object, level: float, low: float, high: float) -> float:
    assert callable(falling)
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


class Survival(NamedTuple):
    """At a time: the share that has outlived it, its 95 % interval, and how many are still watched."""

    time: int
    share: float
    interval: Interval | None
    at_risk: int


def survival(times: Sequence[int], ended: Sequence[bool]) -> list[Survival]:
    """By the Kaplan-Meier estimate, at each time at which any ended.

    times  of each item when it ended, or was last seen
    ended  whether it did
    """
    curve: list[Survival] = []
    share, variance = 1.0, 0.0  # the variance is Greenwood's, of ln(share)
    for time in sorted({t for t, e in zip(times, ended, strict=True) if e}):
        at_risk = sum(t >= time for t in times)
        deaths = sum(t == time and e for t, e in zip(times, ended, strict=True))
        share *= 1 - deaths / at_risk
        interval = None
        if deaths < at_risk:
            variance += deaths / (at_risk * (at_risk - deaths))
            hazard = -log(share)
            half = exp(Z * math.sqrt(variance) / hazard)
            interval = float(exp(-hazard * half)), float(exp(-hazard / half))
        curve.append(Survival(time, share, interval, at_risk))
    return curve


def median_survival(curve: Sequence[Survival]) -> tuple[int | None, tuple[int | None, int | None]]:
    """(the first time that no more than half outlive, and where the interval's ends do); None: none of them.

    The interval is that of Brookmeyer and Crowley, Biometrics 38 (1982), on ln(-ln S).
    """

    found = next((at.time for at in curve if at.share <= 0.5), None)
    # where nobody is left, no end is known
    low, high = (
        next((at.time for at in curve if at.interval and at.interval[end] <= 0.5), None) for end in (0, 1)
    )
    return found, (low, high)
