"""Every format, with the options that matter, by what may be asked of it."""

from __future__ import annotations

from fq_kernels import format_names, get_format

OPTIONS = [
    "fp8_e4m3fn:no-saturate", "fp8_e5m2:no-saturate", "fp8_e4m3fnuz:no-saturate", "fp8_e5m2fnuz:no-saturate",
    "fp8_e5m2:flush-subnormals", "e5m7:truncate,no-saturate", "e3m3finite",
    "hif8:saturate", "fp8_e4m3fn:row", "fp8_e4m3fn:tensor", "fp8_e4m3fn:group=16", "fp4_e2m1:group=7",
    "int8:tensor", "int8:group=16", "int8:asymmetric", "int8:asymmetric,tensor", "int4:asymmetric,group=7",
    "nvfp4:row", "nvfp4:four-over-six", "nvfp4:row,four-over-six",
    "mxfp4:rceil", "mxfp8_e4m3:even,block=16", "mxint8:ceil,block=256", "mxfp6_e2m3:block=100",
]  # fmt: skip
# every name, and every rounding of bf16 and q8_0: the narrow floats share one kernel (test_narrow_floats.py)
SPECS = [name for name in format_names() if ":" not in name or name.split(":")[0] in ("bf16", "q8_0")]
SPECS.remove("e8m0")  # which has neither sign nor zero: test_tapered.py
SPECS += OPTIONS
# roundings whose errors have one sign, or no middle
DIRECTED = ("truncate", "up", "down", "odd")
ELEMENTS = [spec for spec in SPECS if get_format(spec).by_element]
DETERMINISTIC = [spec for spec in SPECS if "stochastic" not in spec]  # which counts its elements
# a block's scale by four-over-six hangs on all its elements
WITH_DITHER = [spec for spec in DETERMINISTIC if "four-over-six" not in spec]
SCALED = [spec for spec in SPECS if spec not in ELEMENTS]
# Formats whose codes do not include 0: a zero becomes something small, and small values may change sign.
WITHOUT_ZERO = ["q4_1", "q5_1", "iq4_nl"]
TO_INFINITY = [spec for spec in ELEMENTS if spec.split(":")[0] in ("bf16", "f16", "tf32")]
WITH_INFINITY = [*TO_INFINITY, "fp8_e5m2:no-saturate", "e5m7:truncate,no-saturate", "hif8"]
WITHOUT_MINUS_ZERO = [spec for spec in ELEMENTS if "fnuz" in spec or spec.startswith("hif8")]


def block_size(spec: str, n: int) -> int:
    """Values of a row that come out as NaN together."""
    fmt = get_format(spec)
    together = fmt.number("group") or fmt.number("block") or n
    if together == n and fmt.family.block and fmt.family.block[0].isdigit() and "row" not in fmt.settings:
        together = int(fmt.family.block.split(",")[0])
    return max(together, fmt.number("had"))
