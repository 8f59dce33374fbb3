"""Units by what they cost and what they do, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ..measure.pareto import Priced
from .svg import FOR_PNG, style


def picture(
    units: Sequence[Priced], best: Sequence[Priced], pick: Priced | None, budget: float | None, kind: str
) -> bytes:
    """A PNG or SVG (``kind``) of all units, the Pareto set joined by steps, and a ring around ``pick``.

    Raises FqError where matplotlib is missing.
    """
    with style(FOR_PNG):
        from matplotlib.figure import Figure

        ink = FOR_PNG
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = figure.add_subplot()
        shown = [each for each in units if each.kld > 0]  # what is exactly 0 is on no logarithmic axis
        for each in shown:
            colour = ink.s0 if each in best else ink.muted
            low, high = each.interval or (each.kld, each.kld)
            error = [[max(each.kld - low, 0.0)], [max(high - each.kld, 0.0)]]
            axis.errorbar(
                each.cost, each.kld, error, fmt="o", markersize=3.5, elinewidth=1, color=colour, zorder=3
            )
        steps = [each for each in best if each.kld > 0]
        axis.step([u.cost for u in steps], [u.kld for u in steps], where="post", color=ink.s0, linewidth=1)
        for number, each in enumerate(steps, 1):
            axis.annotate(
                str(number), (each.cost, each.kld), textcoords="offset points", xytext=(4, 4), fontsize=7
            )
        if pick is not None and pick.kld > 0:
            axis.plot([pick.cost], [pick.kld], "o", markersize=10, markerfacecolor="none", color=ink.s1)
        if budget is not None:
            axis.axhline(budget, color=ink.s1, linewidth=1, linestyle="--")
            axis.annotate(f"budget {budget:g}", (1, budget), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=7, color=ink.s1)  # fmt: skip
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axis.set_xlabel("cost of the unit, in the prices' unit")
        axis.set_ylabel("mean KL divergence")
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
        return out.getvalue()
