"""Values shown as they pass the sites, and left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .._kernels import rms_norm_f32
from .counter import Counter
from .fake_quant import FakeQuant
from .rule import Rule
from .sites import Place, Site, Value

_RULE = "=bf16"  # makes a rule of sites; nothing is rounded

See = Callable[[Site, np.ndarray], None]


class Observer(FakeQuant):
    """In the place of rules: calls ``see`` with a site and what passes there.

    values  what there is of a graph, in order: `Model.values`
    sites   as a rule names them, such as ``ffn_norm[*].weighted``
    see     (site, x): x is (rows, n) float32, one row a token or head, to be read at once and not changed

    Raises ValueError as FakeQuant does.
    """

    def __init__(self, values: Iterable[Value], sites: Sequence[str], see: See) -> None:
        for each in sites:
            if "=" in each:
                raise ValueError(f"sites {each!r} are named without a format")
        try:
            super().__init__(values, [Rule.parse(f"{each}{_RULE}") for each in sites], count_errors=False)
        except ValueError as e:
            raise ValueError(str(e).replace(_RULE, "")) from None
        self.see = see

    @property
    def seen_sites(self) -> list[Site]:
        """In graph order."""
        return [counter.site for counter in self.matched]

    def rms_norm(
        self,
        norm: Place,
        x: np.ndarray,
        *,
        eps: float,
        weight: np.ndarray,
        out: np.ndarray,
        executor: Any = None,
    ) -> np.ndarray:
        read, raw, weighted = self._by_place[norm]
        for counter in (read, raw, weighted):
            counter.rows_seen += len(x)
        if read.rule is not None:
            self.see(read.site, x)
        if raw.rule is not None:
            self.see(raw.site, rms_norm_f32(x, eps=eps, executor=executor))
        rms_norm_f32(x, eps=eps, weight=weight, out=out, executor=executor)
        if weighted.rule is not None:
            self.see(weighted.site, out)
        return out

    def _round(
        self,
        counter: Counter,
        x: np.ndarray,
        out: np.ndarray | None,
        executor: Any,
        wanted: int | None = None,
    ) -> np.ndarray:
        counter.rows_seen += len(x)
        self.see(counter.site, x)
        return x
