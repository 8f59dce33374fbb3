"""bf16, whose rules are ggml's and hardware's (src/rounding/contract.h), and f16."""

from __future__ import annotations

from .format import NEAREST_EVEN
from .narrow_floats import BF16, F16, to_infinity_family

# Rounding -> number of the C rule (fq_quant_kind); order shared with src/rounding/contract.h.
_BF16_RULES = {
    NEAREST_EVEN: 1,
    "nearest-even-ftz": 2,
    "truncate": 3,
    "nearest-away": 4,
    "stochastic": 5,
}

FAMILIES = (
    to_infinity_family("bf16", BF16, "ggml's rule by default; overflow to infinity", _BF16_RULES),
    to_infinity_family("f16", F16, "IEEE 754 binary16; overflow to infinity"),
)
