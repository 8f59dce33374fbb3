"""Every format, with the options that matter, by what may be asked of it."""

from __future__ import annotations

from fq_kernels import format_names, get_format

OPTIONS = [
    "fp8_e4m3fn:no-saturate", "fp8_e5m2:no-saturate", "fp8_e4m3fnuz:no-saturate", "fp8_e5m2fnuz:no-saturate",
    "fp8_e5m2:flush-subnormals", "e5m7:truncate,no-saturate", "e3m3finite",
    "int8:tensor", "int8:group=16", "int8:asymmetric", "int8:asymmetric,tensor", "int4:asymmetric,group=7",
    "nvfp4:row",
]  # fmt: skip
# every name, and every rounding of bf16 and q8_0: the narrow floats share one kernel (test_narrow_floats.py)
SPECS = [name for name in format_names() if ":" not in name or name.split(":")[0] in ("bf16", "q8_0")]
SPECS += OPTIONS
# roundings whose errors have one sign, or no middle
DIRECTED = ("truncate", "up", "down", "odd")
ELEMENTS = [spec for spec in SPECS if get_format(spec).family.block is None]
DETERMINISTIC = [spec for spec in SPECS if "stochastic" not in spec]  # which counts its elements
SCALED = [spec for spec in SPECS if spec not in ELEMENTS]
# Formats whose codes do not include 0: a zero becomes something small, and small values may change sign.
WITHOUT_ZERO = ["q4_1", "q5_1", "iq4_nl"]
TO_INFINITY = [spec for spec in ELEMENTS if spec.split(":")[0] in ("bf16", "f16", "tf32")]
WITH_INFINITY = [*TO_INFINITY, "fp8_e5m2:no-saturate", "e5m7:truncate,no-saturate"]


def block_size(spec: str, n: int) -> int:
    """Values of a row that come out as NaN together."""
    fmt = get_format(spec)
    if fmt.number("group"):
        return fmt.number("group")
    return n if not fmt.family.block.isdigit() or spec == "nvfp4:row" else int(fmt.family.block)
