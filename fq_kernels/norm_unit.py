"""A norm by a unit, in C or, where a format is a Python function, by the reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import _kernels
from .units import NormUnit

Floats = npt.NDArray[np.float32]


def rms_norm_unit(
    x: Floats,
    unit: str | NormUnit,
    *,
    eps: float = 1e-5,
    weight: Floats | None = None,
    out: Floats | None = None,
    executor: _kernels.Executor | None = None,
    first_row: int = 0,
) -> Floats:
    """Root-mean-square norm of each row, by a unit that computes its steps in formats (src/norm/unit.h).

    x          (..., n) float32, last axis contiguous, outer axes of any stride
    unit       a NormUnit, or how it is written (fq_kernels/units/unit.py)
    eps        added to the mean square, or to its root; >= 0
    weight     (n,) float32, as the file has it; None for none
    out        None allocates, x works in place, or another array of x's shape
    executor   shares the rows among its threads; None: the calling thread
    first_row  what stochastic rounding counts the first row as

    A unit without steps computes what rms_norm_f32 does. Returns out. Raises TypeError or ValueError naming
    the argument, with nothing written. A step whose format is a Python function makes a norm a hundred times
    slower.
    """
    unit = NormUnit.parse(unit) if isinstance(unit, str) else unit
    if not isinstance(unit, NormUnit):
        raise TypeError(f"unit must be a NormUnit or a string, not {type(unit).__name__}")
    unit.check()
    in_c = unit.in_c
    values = x if in_c or not isinstance(x, np.ndarray) else x.copy()
    # without steps it checks the arguments, and makes out
    out = _kernels.rms_norm_unit(
        x,
        unit if in_c else NormUnit(),
        eps=eps,
        weight=weight,
        out=out,
        executor=executor,
        first_row=first_row,
    )
    if not in_c and out.size:
        from . import reference  # which most programs never need

        out[...] = reference.rms_norm_unit(values, unit, eps=eps, weight=weight, first_row=first_row)
    return out
