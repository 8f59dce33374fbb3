"""How fast one thread rounds to formats, beside casts of ml_dtypes, and of torch where it is installed.

A round trip, float32 to the format and back, of rows that stay in the second cache; numpy's own cast for
f16. Beside it the norm with the rounding fused in, over the norm alone. What is compared is timed in turns.
Beside each its speed over that of numpy's copy from the one array into the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fq_kernels import isa, rms_norm_f32, round_trip

from .harness import Contestant, alternate, own_processors, quartiles

ROWS, N = 64, 1024
# one or two of each family, and their names in other libraries
FORMATS: dict[str, tuple[str | None, str | None]] = {
    "bf16": ("bfloat16", "bfloat16"),
    "bf16:stochastic": (None, None),
    "f16": ("float16", "float16"),
    "tf32": (None, None),
    "fp8_e4m3fn": ("float8_e4m3fn", "float8_e4m3fn"),
    "fp8_e4m3fn:truncate": (None, None),
    "fp8_e4m3fn:up": (None, None),
    "fp8_e4m3fn:stochastic": (None, None),
    "fp8_e5m2": ("float8_e5m2", "float8_e5m2"),
    "fp8_e4m3fnuz": ("float8_e4m3fnuz", "float8_e4m3fnuz"),
    "fp6_e3m2": ("float6_e3m2fn", None),
    "fp4_e2m1": ("float4_e2m1fn", None),
    "int8": (None, None),
    "int8:tensor": (None, None),
    "int8:asymmetric,group=32": (None, None),
    "int8:scale=0.03": (None, None),
    "q8_0": (None, None),
    "q4_0": (None, None),
    "q4_1": (None, None),
    "iq4_nl": (None, None),
    "mxfp8_e4m3": (None, None),
    "mxfp4": (None, None),
    "mxfp4:had=32": (None, None),
    "mxint8": (None, None),
    "nvfp4": (None, None),
    "nvfp4:row": (None, None),
    "nvfp4:row,four-over-six": (None, None),
}
COLUMNS = (
    "format",
    "10^9 elements/s",
    "over a copy",
    "over ml_dtypes",
    "over torch",
    "norm with it / norm alone",
)


def _ml_dtypes_cast(x: np.ndarray, name: str) -> Callable[[], object]:
    dtype = np.dtype(np.float16) if name == "float16" else np.dtype(getattr(ml_dtypes, name))
    return lambda: x.astype(dtype).astype(np.float32)


def _torch_cast(x: np.ndarray, name: str) -> Callable[[], object] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    tensor, dtype = torch.from_numpy(x), getattr(torch, name)
    return lambda: tensor.to(dtype).to(torch.float32)


def measure(fmt: str, rounds: int, turn: float) -> dict[str, Any]:
    """Elements a second, and medians of ratios within a round."""
    x = np.random.default_rng(0).standard_normal((ROWS, N), dtype=np.float32)
    out = np.empty_like(x)
    theirs, torchs = FORMATS[fmt]
    contestants = {
        "fq": Contestant(lambda: round_trip(x, fmt, out=out)),
        "copy": Contestant(lambda: np.copyto(out, x)),
        "norm": Contestant(lambda: rms_norm_f32(x, out=out)),
        "fused": Contestant(lambda: rms_norm_f32(x, quant=fmt, out=out)),
    }
    if theirs is not None:
        contestants["ml_dtypes"] = Contestant(_ml_dtypes_cast(x, theirs))
    if torchs is not None and (cast := _torch_cast(x, torchs)) is not None:
        contestants["torch"] = Contestant(cast)
    times = alternate(contestants, rounds=rounds, turn=turn)

    def ratio(a: str, b: str) -> float | None:
        return quartiles(times[a] / times[b])[1] if a in times else None

    return {
        "format": fmt,
        "elements_per_s": x.size / quartiles(times["fq"])[1],
        "over_copy": ratio("copy", "fq"),
        "over_ml_dtypes": ratio("ml_dtypes", "fq"),
        "over_torch": ratio("torch", "fq"),
        "fused": ratio("fused", "norm"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.casts", description=__doc__)
    parser.add_argument("--format", action="append", choices=FORMATS, help="may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="alternations (default: %(default)s)")
    parser.add_argument("--turn", type=float, default=2e-3, help="seconds of each (default: %(default)s)")
    args = parser.parse_args(argv)
    with own_processors(lambda: None):
        print(f"{isa()}, one thread, {ROWS} rows of {N}\n")
        print(f"| {' | '.join(COLUMNS)} |\n| --- |{' --: |' * (len(COLUMNS) - 1)}")
        for fmt in args.format or FORMATS:
            row = measure(fmt, args.rounds, args.turn)
            speed, copy = f"{row['elements_per_s'] / 1e9:.2f}", f"{row['over_copy']:.2f}"
            fused = f"{row['fused']:.2f}"
            over = ["" if r is None else f"{r:.1f}" for r in (row["over_ml_dtypes"], row["over_torch"])]
            print(f"| {' | '.join([f'`{fmt}`', speed, copy, *over, fused])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
