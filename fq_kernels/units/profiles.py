"""What engines compute, as units: read from their sources, which each profile names.

Where a kernel's order of summation hangs on the device, a profile has a usual one. Formats of the products
around a norm are not a profile's matter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from .unit import UNROUNDED

# what a residual stream is made of, in the kinds of the graph
RESIDUAL = ("inp_embd", "ffn_inp", "l_out")
DTYPES = ("bf16", "f16")
# kinds of norms, by a model that has them: Gemma's multiply by 1 + w, of which checkpoints hold w; OLMo 2's
# cast after the weight where Llama's do before it
NORMS = ("llama", "gemma", "olmo2")


class Profile(NamedTuple):
    """An engine's norm.

    steps     of its unit; DTYPE stands for the type of the activations
    others    of its unit for models whose norms differ from Llama's, by their kind in NORMS
    residual  whether it says that the residual stream is kept in that type
    fused     whether a norm right behind a residual sum reads it before it is rounded
    source    repository, file and function
    note      what else is to be known
    """

    steps: str
    others: Mapping[str, str]
    residual: bool
    source: str
    note: str
    fused: bool = False


PROFILES = {
    "ggml": Profile(
        "acc=f64",
        {},
        False,
        "ggml-org/ggml src/ggml-cpu/ops.cpp ggml_compute_forward_rms_norm_f32",
        "float32 activations, squares added in double; a Gemma file holds 1 + w",
    ),
    "hf": Profile(
        "x=DTYPE;acc=f32;order=torch;raw=DTYPE;weight=DTYPE;out=DTYPE",
        {
            "gemma": "x=DTYPE;acc=f32;order=torch;weight=DTYPE;gain=1+w;out=DTYPE",
            "olmo2": "x=DTYPE;acc=f32;order=torch;weight=DTYPE;out=DTYPE",
        },
        True,
        "huggingface/transformers models/llama/modeling_llama.py LlamaRMSNorm, "
        "models/gemma3/modeling_gemma3.py Gemma3RMSNorm, models/olmo2/modeling_olmo2.py Olmo2RMSNorm",
        "Llama's casts before the weight, OLMo 2's after it, Gemma's after 1 + w, which is float32; the "
        "order is torch's on x86",
    ),
    "te": Profile(
        "x=DTYPE;acc=f32;order=lanes=32;weight=DTYPE;out=DTYPE",
        {"gemma": "x=DTYPE;acc=f32;order=lanes=32;weight=DTYPE;gain=1+w;out=DTYPE"},
        False,
        "NVIDIA/TransformerEngine transformer_engine/common/normalization/rmsnorm/rmsnorm_fwd_kernels.cuh "
        "rmsnorm_fwd_general_kernel",
        "one rounding, in the end; a lane a thread of a warp. Its tuned kernel centres the squares first; "
        "with NVTE_ZERO_CENTERED_GAMMA_IN_WTYPE cuDNN's has 1 + w in DTYPE",
    ),
    "vllm": Profile(
        "x=DTYPE;acc=f32;order=lanes=256;raw=DTYPE;weight=DTYPE;out=DTYPE",
        {"gemma": "x=DTYPE;acc=f32;order=lanes=256;weight=DTYPE;gain=1+w;out=DTYPE"},
        True,
        "vllm-project/vllm csrc/layernorm_kernels.cu fused_add_rms_norm_kernel, "
        "vllm/model_executor/layers/layernorm.py GemmaRMSNorm",
        "the residual is added in DTYPE, and the norm reads the rounded sum; 256 threads a row. Later "
        "versions of the kernel do not round before the weight",
    ),
    "flashinfer": Profile(
        "x=DTYPE;acc=f32;order=lanes=256;weight=DTYPE;out=DTYPE",
        {"gemma": "x=DTYPE;acc=f32;order=lanes=256;weight=DTYPE;gain=1+w;out=DTYPE"},
        True,
        "flashinfer-ai/flashinfer include/flashinfer/norm.cuh FusedAddRMSNormKernel",
        "the residual is added in float32 and stored in DTYPE, but the norm reads the sum as it was "
        "(x=unrounded); other norms read DTYPE",
        fused=True,
    ),
    "apex": Profile(
        "x=DTYPE;acc=f32;order=lanes=128;raw=DTYPE;weight=DTYPE;out=DTYPE",
        {},
        False,
        "NVIDIA/apex csrc/layer_norm_cuda_kernel.cu cuApplyRMSNorm",
        "FusedRMSNorm: casts before the weight; it knows no 1 + w",
    ),
    "aiter-bf16": Profile(
        "x=DTYPE;square=DTYPE;acc=DTYPE;order=chunk=8,f32;raw=DTYPE;weight=DTYPE;out=DTYPE",
        {},
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


def profile_rules(
    spec: str, kinds: Collection[str], *, norms: str = "llama", behind_sums: Iterable[str] = ()
) -> list[str]:
    """The rules of a profile, for a model.

    kinds        of the values that its graph has
    norms        of which kind its norms are, of NORMS
    behind_sums  its norms that stand right behind a residual sum, as a rule's left side names them

    Raises ValueError for a profile that there is not.
    """
    _, profile, dtype = find_profile(spec)
    steps = profile.others.get(norms, profile.steps).replace("DTYPE", dtype)
    rules = [f"{kind}[*]={dtype}" for kind in RESIDUAL if profile.residual and kind in kinds]
    fused = [f"{sites}=x={UNROUNDED}" for sites in behind_sums if profile.fused]
    return [*rules, f"*[*]={steps}", *fused]


def describe_profiles(dtype: str = DTYPES[0]) -> list[dict[str, Any]]:
    """A dict for each: name, units (as a unit is written, by the kind of norms), residual (its type, or
    None), fused, source, note."""
    return [
        {
            "name": name,
            "units": {
                norms: profile.others.get(norms, profile.steps).replace("DTYPE", dtype) for norms in NORMS
            },
            "residual": dtype if profile.residual else None,
            "fused": profile.fused,
            "source": profile.source,
            "note": profile.note.replace("DTYPE", dtype),
        }
        for name, profile in PROFILES.items()
    ]
