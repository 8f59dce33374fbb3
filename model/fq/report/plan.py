"""What any budget buys, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ..measure.plan import Plan
from .svg import FOR_PNG, style


def picture(plans: Sequence[Plan], plan: Plan, uniform: Sequence[Plan], kind: str) -> bytes:
    """A PNG or SVG (``kind``): the front of plans, a ring around the one that was made, and uniform formats.

    Raises FqError where matplotlib is missing.
    """
    with style(FOR_PNG):
        from matplotlib.figure import Figure

        ink = FOR_PNG
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis = figure.add_subplot()
        shown = [each for each in plans if each.kld > 0]  # what is exactly 0 is on no logarithmic axis
        axis.plot(
            [each.cost for each in shown],
            [each.kld for each in shown],
            "o-",
            color=ink.s0,
            markersize=3,
            linewidth=1,
            label="plans",
        )
        for each in uniform:
            if not each.kld > 0:
                continue
            axis.plot([each.cost], [each.kld], "x", color=ink.muted, markersize=4)
            axis.annotate(
                str(each.picked[0].spec),
                (each.cost, each.kld),
                textcoords="offset points",
                xytext=(4, 0),
                fontsize=5,
                color=ink.muted,
            )
        if plan.kld > 0:
            low, high = plan.interval or (plan.kld, plan.kld)
            error = [[max(plan.kld - low, 0.0)], [max(high - plan.kld, 0.0)]]
            axis.errorbar(plan.cost, plan.kld, error, fmt="none", elinewidth=1, color=ink.s1)
            axis.plot([plan.cost], [plan.kld], "o", markersize=9, markerfacecolor="none", color=ink.s1)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axis.set_xlabel("cost of a value, in bits or as of --costs")
        axis.set_ylabel("predicted mean KL divergence")
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
        return out.getvalue()
