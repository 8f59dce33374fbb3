"""What the kernels in C are told of a format: the structures of src/rounding/*.h."""

from __future__ import annotations

from typing import NamedTuple

from .arrays import Floats

# fq_quant_kind; bf16's rules are 1 to 5 (sixteen_bits.py)
NARROW = 6
BLOCKS = 7

# fq_block_rule
(
    INT,
    ZERO_POINT,
    SCALED,
    MX,
    MX_INT,
    NVFP4,
    Q8_0,
    Q8_0_NEAREST_EVEN,
    Q8_K,
    AROUND_ZERO,
    FROM_MINIMUM,
    IQ4_NL,
) = range(12)

# fq_given
BY_TENSOR, BY_OTHERS = 1, 2

NEVER = 0xFFFFFFFF  # a count_from that no value reaches


class NarrowRule(NamedTuple):
    """C's fq_narrow. All but the first three and ``one_zero``, ``random_bits`` are bits of float32."""

    rounding: int
    shift: int
    min_exponent: int
    unit: int
    flush: int
    largest: int
    overflow: int
    one_zero: int
    random_bits: int
    count_from: int


class BlockRule(NamedTuple):
    """C's fq_blocks. ``scales``: (1,) or (n,), C-contiguous, in place of ``scale``."""

    rule: int
    size: int = 0
    hadamard: int = 0
    top: float = 0
    emax: int = 0
    carry: int = 0
    outer_top: float = 0
    four: bool = False
    given: int = 0
    scale: float = 0
    zero: float = 0
    scales: Floats | None = None


class Kernel(NamedTuple):
    """C's fq_rounding but for the seed. ``quant`` is 0 where a function in Python rounds."""

    quant: int = 0
    narrow: NarrowRule | None = None
    blocks: BlockRule | None = None
