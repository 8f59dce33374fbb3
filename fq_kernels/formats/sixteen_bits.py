"""bf16 and f16, which the kernels round: the contract is in src/rounding/contract.h."""

from __future__ import annotations

import numpy as np

from .arrays import Floats, Rounded, Spacing
from .format import NEAREST_EVEN, Family, Format
from .narrow_floats import float_step

# Rounding -> number of the C rule (fq_quant_kind); order shared with src/rounding/contract.h.
_BF16_RULES = {
    NEAREST_EVEN: 1,
    "nearest-even-ftz": 2,
    "truncate": 3,
    "nearest-away": 4,
    "stochastic": 5,
}
_F16_RULES = {NEAREST_EVEN: 6}


def _by_kernel(x: Floats, fmt: Format) -> Rounded:
    from .._kernels import round_trip  # which imports this package

    return round_trip(x, fmt), None


FAMILIES = (
    Family(
        "bf16",
        _by_kernel,
        roundings=tuple(_BF16_RULES),
        kernel_rules=_BF16_RULES,
        bits=16,
        largest=float(np.float32(2 - 2**-7) * np.float32(2.0**127)),
        smallest_normal=2.0**-126,
        smallest_subnormal=2.0**-133,
        idempotent=True,
        spacing=lambda x, fmt: Spacing(float_step(x, 7, -126)),
        note="ggml's rule by default; overflow to infinity",
    ),
    Family(
        "f16",
        _by_kernel,
        roundings=tuple(_F16_RULES),
        kernel_rules=_F16_RULES,
        bits=16,
        largest=65504.0,
        smallest_normal=2.0**-14,
        smallest_subnormal=2.0**-24,
        idempotent=True,
        spacing=lambda x, fmt: Spacing(float_step(x, 10, -14)),
        note="IEEE 754 binary16; overflow to infinity",
    ),
)
