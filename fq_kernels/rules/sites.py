"""The norms of a graph and their sites, by the names that rules give them."""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("attn_norm", "ffn_norm", "output_norm")
POINTS = ("raw", "weighted")

# Kinds that a rule may name beside KINDS. llama.cpp calls the raw output of both norms of layer N "norm-N".
NORM_N = "norm"
NORM_N_KINDS = ("attn_norm", "ffn_norm")
EVERY_KIND = "*"


class Norm(NamedTuple):
    """One rms_norm of the graph; ``layer`` is None for output_norm."""

    kind: str
    layer: int | None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}[{self.layer}]"


class Site(NamedTuple):
    """One output of a norm: the norm and the point."""

    norm: Norm
    point: str

    def __str__(self) -> str:
        return f"{self.norm}.{self.point}"
