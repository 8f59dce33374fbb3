"""What engines compute, as units: read from their sources, which each profile names.

Where a kernel's order of summation hangs on the device, a profile has a usual one. Formats of the products
around a norm are not a profile's matter.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

# what a residual stream is made of, in the kinds of the graph
RESIDUAL = ("inp_embd", "ffn_inp", "l_out")
DTYPES = ("bf16", "f16")


class Profile(NamedTuple):
    """An engine's norm.

    steps     of its unit; DTYPE stands for the type of the activations
    plus_one  of its unit for models whose checkpoints hold w of 1 + w, as Gemma's do; None: the same
    residual  whether it says that the residual stream is kept in that type
    source    repository, file and function
    note      what else is to be known
    """

    steps: str
    plus_one: str | None
    residual: bool
    source: str
    note: str


PROFILES = {
    "ggml": Profile(
        "acc=f64",
        None,
        False,
        "ggml-org/ggml src/ggml-cpu/ops.cpp ggml_compute_forward_rms_norm_f32",
        "float32 activations, squares added in double; a Gemma file holds 1 + w",
    ),
    "hf": Profile(
        "x=DTYPE;acc=f32;order=torch;raw=DTYPE;weight=DTYPE;out=DTYPE",
        "x=DTYPE;acc=f32;order=torch;weight=DTYPE;gain=1+w;out=DTYPE",
        True,
        "huggingface/transformers models/llama/modeling_llama.py LlamaRMSNorm, "
        "models/gemma3/modeling_gemma3.py Gemma3RMSNorm",
        "Llama's casts before the weight, Gemma's after 1 + w, which is float32; the order is torch's on x86",
    ),
    "te": Profile(
        "x=DTYPE;acc=f32;order=lanes=32;weight=DTYPE;out=DTYPE",
        "x=DTYPE;acc=f32;order=lanes=32;weight=DTYPE;gain=1+w;out=DTYPE",
        False,
        "NVIDIA/TransformerEngine transformer_engine/common/normalization/rmsnorm/rmsnorm_fwd_kernels.cuh "
        "rmsnorm_fwd_general_kernel",
        "one rounding, in the end; a lane a thread of a warp. Its tuned kernel centres the squares first; "
        "with NVTE_ZERO_CENTERED_GAMMA_IN_WTYPE cuDNN's has 1 + w in DTYPE",
    ),
    "vllm": Profile(
        "x=DTYPE;acc=f32;order=lanes=256;raw=DTYPE;weight=DTYPE;out=DTYPE",
        "x=DTYPE;acc=f32;order=lanes=256;weight=DTYPE;gain=1+w;out=DTYPE",
        True,
        "vllm-project/vllm csrc/layernorm_kernels.cu fused_add_rms_norm_kernel, "
        "vllm/model_executor/layers/layernorm.py GemmaRMSNorm",
        "the residual is added in DTYPE, and the norm reads the rounded sum; 256 threads a row. Later "
        "versions of the kernel do not round before the weight",
    ),
    "flashinfer": Profile(
        "x=unrounded;acc=f32;order=lanes=256;weight=DTYPE;out=DTYPE",
        "x=unrounded;acc=f32;order=lanes=256;weight=DTYPE;gain=1+w;out=DTYPE",
        True,
        "flashinfer-ai/flashinfer include/flashinfer/norm.cuh FusedAddRMSNormKernel",
        "the residual is added in float32 and stored in DTYPE, but the norm reads the sum as it was",
    ),
    "apex": Profile(
        "x=DTYPE;acc=f32;order=lanes=128;raw=DTYPE;weight=DTYPE;out=DTYPE",
        None,
        False,
        "NVIDIA/apex csrc/layer_norm_cuda_kernel.cu cuApplyRMSNorm",
        "FusedRMSNorm: casts before the weight; it knows no 1 + w",
    ),
    "aiter-bf16": Profile(
        "x=DTYPE;square=DTYPE;acc=DTYPE;order=chunk=8,f32;raw=DTYPE;weight=DTYPE;out=DTYPE",
        None,
        False,
        "ROCm/aiter csrc/kernels/rmsnorm_kernels.cu rms_norm_kernel",
        "squares, and sums of the eight elements that a thread loads, in DTYPE; threads' sums in float32. "
        "For rows of up to 8192; later versions send the call to another kernel",
    ),
}


def find_profile(spec: str) -> tuple[str, Profile, str]:
    """Name, profile and type that ``NAME`` or ``NAME:DTYPE`` asks for.

    Raises ValueError naming what there is.
    """
    name, _, dtype = spec.strip().lower().partition(":")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {spec!r}; there are {', '.join(PROFILES)}")
    dtype = dtype or DTYPES[0]
    if dtype not in DTYPES:
        raise ValueError(f"profile {spec!r}: the type must be {' or '.join(DTYPES)}")
    return name, PROFILES[name], dtype


def profile_rules(spec: str, kinds: Collection[str], *, plus_one: bool) -> list[str]:
    """The rules of a profile, for a model.

    kinds     of the values that its graph has
    plus_one  whether its file holds 1 + w where its checkpoint holds w

    Raises ValueError for a profile that there is not.
    """
    _, profile, dtype = find_profile(spec)
    steps = profile.plus_one if plus_one and profile.plus_one is not None else profile.steps
    rules = [f"{kind}[*]={dtype}" for kind in RESIDUAL if profile.residual and kind in kinds]
    return [*rules, f"*[*]={steps.replace('DTYPE', dtype)}"]


def describe_profiles(dtype: str = DTYPES[0]) -> list[dict[str, Any]]:
    """A dict for each: name, unit and unit_plus_one (as a unit is written), residual (its type, or None),
    source, note."""
    return [
        {
            "name": name,
            "unit": profile.steps.replace("DTYPE", dtype),
            "unit_plus_one": (profile.steps if profile.plus_one is None else profile.plus_one).replace(
                "DTYPE", dtype
            ),
            "residual": dtype if profile.residual else None,
            "source": profile.source,
            "note": profile.note.replace("DTYPE", dtype),
        }
        for name, profile in PROFILES.items()
    ]
