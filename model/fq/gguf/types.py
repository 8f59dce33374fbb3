"""The tensor types a GGUF file can name: how many elements and bytes one block holds.

The table is written out here because importing gguf-py for it costs more than opening a model; the tests
hold it equal to gguf-py's and to ggml's own. Type ids that ggml has withdrawn (4, 5, 31-33, 36-38) are
left out, so files using them are refused.
"""

from __future__ import annotations

from typing import NamedTuple


class GGMLType(NamedTuple):
    """One tensor type. `block_size` is in elements, `type_size` in bytes per block."""

    id: int
    name: str
    block_size: int
    type_size: int


GGML_TYPES: dict[int, GGMLType] = {
    entry[0]: GGMLType(*entry)
    for entry in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),  # two F16 and 32 bytes; gguf-py still counts the older pair of F32 (40)
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
    )
}


def row_size(type: GGMLType, n: int) -> int:
    """Bytes that a row of `n` elements takes. ValueError unless `n` is a whole number of blocks."""
    if n < 0 or n % type.block_size:
        raise ValueError(f"n={n} is not a whole number of {type.name} blocks of {type.block_size} elements")
    return n // type.block_size * type.type_size
