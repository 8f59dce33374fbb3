"""Bit-exact normalisation and rounding kernels; needs numpy alone.

>>> import numpy as np, fq_kernels
>>> x = np.array([[1.0, 2.0, 3.0]], np.float32)
>>> fq_kernels.rms_norm_f32(x, eps=1e-5, quant="bf16").shape
(1, 3)
"""

from importlib.util import find_spec as _find_spec

if _find_spec("._kernels", __package__) is None:
    raise ImportError(
        f"{__path__[0]} has no compiled module for this Python: it is fq's source, which hides an installed "
        "fq_kernels from a Python that is started beside it; start it in another folder, or run "
        "pip install -e . in this one",
        name=__name__,
    )

from ._kernels import (
    ATTENTION_MAX_DIM,
    MATVEC_MAX_TOKENS,
    MATVECS_MAX,
    MAX_GRADS,
    PACKED_TYPES,
    Executor,
    GGUFStrings,
    add_rms_norm_f32,
    attention,
    bf16_round_trip,
    bf16_to_float,
    causal_exp,
    cos,
    default_fpu,
    dequantize,
    error_columns,
    error_products,
    exp,
    float_to_bf16,
    force_isa,
    format_errors,
    geglu,
    get_include,
    isa,
    kl_divergence,
    log,
    log_softmax,
    log_sum_exp,
    matvec,
    matvecs,
    mul_mat,
    mul_mats,
    rms_norm_f32,
    rope,
    round_trip,
    sin,
    soft_cap,
    supported_isas,
    swiglu,
    unit_gains,
)
from .formats import Format, describe_formats, format_names, get_format, register_format
from .norm_unit import rms_norm_unit
from .units import NormUnit

CONTRACT = "fq-1"
"""Names the orders of summation and the functions in src/*/contract.h: what is computed under one has the
same bits on every machine."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # takes longer to import than the kernels

    return version("fq")


__all__ = [
    "ATTENTION_MAX_DIM",
    "CONTRACT",
    "MATVECS_MAX",
    "MATVEC_MAX_TOKENS",
    "MAX_GRADS",
    "PACKED_TYPES",
    "Executor",
    "Format",
    "GGUFStrings",
    "NormUnit",
    "add_rms_norm_f32",
    "attention",
    "bf16_round_trip",
    "bf16_to_float",
    "causal_exp",
    "cos",
    "default_fpu",
    "dequantize",
    "describe_formats",
    "error_columns",
    "error_products",
    "exp",
    "float_to_bf16",
    "force_isa",
    "format_errors",
    "format_names",
    "geglu",
    "get_format",
    "get_include",
    "isa",
    "kl_divergence",
    "log",
    "log_softmax",
    "log_sum_exp",
    "matvec",
    "matvecs",
    "mul_mat",
    "mul_mats",
    "register_format",
    "rms_norm_f32",
    "rms_norm_unit",
    "rope",
    "round_trip",
    "sin",
    "soft_cap",
    "supported_isas",
    "swiglu",
    "unit_gains",
]
