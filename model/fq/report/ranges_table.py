"""The ranges of each site as a row of a table."""

from __future__ import annotations

import math
from typing import Any

HEADROOM = ("f16", "fp8_e5m2", "fp8_e4m3fn", "fp6_e3m2", "fp4_e2m1")
HEAD = ["site", "median", "99.9 %", "largest", "first tokens'", "exponents", "zeros", "outliers", "channel"]
HEAD += ["sum of squares", *(f"headroom {name}, bits" for name in HEADROOM)]


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def row_of(site: dict[str, Any]) -> list[str]:
    rest, first, channels = site["rest"], site["first"], site["channels"]
    exponents = list(rest["exponents"])
    outlier = channels["outliers"][0] if channels["outliers"] else None
    squares = site.get("sum_of_squares", {}).get("rest")
    return [
        site["site"],
        _number(rest["percentiles"]["50"]),
        _number(rest["percentiles"]["99.9"]),
        _number(rest["largest"]),
        _number(first["largest"]) if first["rows"] else "–",
        f"{exponents[0]} to {exponents[-1]}" if exponents else "–",
        str(rest["zeros"]),
        f"{channels['n_outliers']} of {channels['n']}",
        f"{outlier['channel']}: {outlier['times_median']:.0f} ×, {outlier['tokens']} tokens"
        if outlier
        else "–",
        f"{_number(squares['smallest'])} to {_number(squares['largest'])}" if squares else "–",
        *("–" if (b := site["headroom_bits"][name]) is None else f"{b:+.1f}" for name in HEADROOM),
    ]
