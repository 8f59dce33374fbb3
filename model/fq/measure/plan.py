"""Which format where, within a budget: the cheapest choice for each site whose predicted costs add up to no
more.

Costs of independent roundings add up, as estimates have it; what they have in common, a measurement of the
plan shows. The choice is a knapsack with one item of each site, an integer program that HiGHS solves (through
scipy).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fq_kernels import exp, get_format
from fq_kernels.rules.rule import as_ranges, layers_text
from fq_kernels.rules.sites import POINTS, Site, Value

from ..arch.graph import Graph
from ..errors import FqError
from .estimates import Asked, Judged, ModelError, site_parts
from .inference import LEVEL, MIN_CHUNKS, Interval, standard_error, t_quantile
from .prices import read_prices_of

FLOAT_BITS = 32.0  # of a value that no rule takes
FRONT = 16  # plans on it
ROOM = 1e-9  # of a budget, for sums that are rounded
GAP = 1e-4  # of a plan's cost to the best, at which the solver ends
SECONDS = 60.0  # after which it has to


@dataclass(frozen=True)
class Option:
    """A format at a site; spec None: none, at no KL.

    cost  for all of a token's values there
    j     of the format in the estimate
    """

    spec: str | None
    cost: float
    kld: float
    j: int = -1


@dataclass(frozen=True)
class Choice:
    """A site and what may be chosen there, the cheapest first, each with less KL than those before it.

    i         in the estimate
    elements  of a token
    """

    site: str
    i: int
    elements: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Plan:
    """Of each of several choices an option.

    cost        for a value, over all of them
    kld         predicted, with its 95 % interval: None where the estimate has none
    """

    choices: tuple[Choice, ...]
    picked: tuple[Option, ...]
    cost: float
    kld: float
    interval: Interval | None

    @property
    def rules(self) -> list[str]:
        """As --fake-quant takes them, sites of a kind that share a format in one."""
        layers: dict[tuple[str, str | None, str], list[int]] = {}
        for choice, option in zip(self.choices, self.picked, strict=True):
            if option.spec is not None:
                kind, layer, point = site_parts(choice.site)
                layers.setdefault((kind, point, option.spec), []).extend([] if layer is None else [layer])
        return [
            f"{kind}{layers_text(kind, as_ranges(of)) if of else ''}{f'.{point}' if point else ''}={spec}"
            for (kind, point, spec), of in layers.items()
        ]


def planned_sites(values: Iterable[Value], point: str) -> list[Site]:
    """Of each norm one point, or "all"; of values with two names the first."""
    if point not in (*POINTS, "all"):
        raise FqError(f"the point must be {', '.join(POINTS)} or all, not {point!r}")
    return [
        site
        for value in values
        if not value.duplicate
        for site in value.sites
        if site.point is None or point in (site.point, "all")
    ]


def elements_of(graph: Graph) -> dict[str, int]:
    """Of a token, by site."""
    return {str(site): node.width for node in graph.nodes for value in node.values for site in value.sites}


def choices_of(
    asked: Asked,
    said: Judged,
    sites: Iterable[str],
    elements: Mapping[str, int],
    costs: Mapping[str, float] | None = None,
) -> list[Choice]:
    """Of the sites that were estimated. A cell that was measured has the KL that it has; one that is marked,
    and was not, is no option.

    costs  by format, of an element, or by SITE=FORMAT; formats that are not there are no options. None: their
           bits

    Raises FqError where nothing is left to choose.
    """
    found, wanted = [], set(sites)
    for i, site in enumerate(asked.sites):
        if site not in wanted:
            continue
        options = [Option(None, _unrounded(costs, site) * elements[site], 0.0)]
        for j, spec in enumerate(asked.formats):
            price = _price(costs, site, spec)
            if price is not None and said.trusted(i, j):
                options.append(Option(spec, price * elements[site], float(said.by_chunk(i, j).mean()), j))
        found.append(Choice(site, i, elements[site], _undominated(options)))
    if not found:
        raise FqError("the estimate has none of the sites that are to be planned")
    return found


def _unrounded(costs: Mapping[str, float] | None, site: str) -> float:
    return FLOAT_BITS if costs is None else costs.get(f"{site}=none", costs.get("none", FLOAT_BITS))


def _price(costs: Mapping[str, float] | None, site: str, spec: str) -> float | None:
    if costs is None:
        return get_format(spec).bits_per_value
    return costs.get(f"{site}={spec}", costs.get(spec))


def _undominated(options: Iterable[Option]) -> tuple[Option, ...]:
    """Those with less KL than all that cost no more."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.kld)):
        if not best or option.kld < best[-1].kld:
            best.append(option)
    return tuple(best)


def read_costs(path: Path) -> dict[str, float]:
    """Of a CSV file with the columns item and cost; an item is a format, SITE=FORMAT, or none for no
    rounding.

    Raises FqError naming the file, the line and what is wrong with it.
    """

    def name(item: str) -> str:
        # a format's options have an equals sign, too, but behind a colon
        site, equals, spec = item.partition("=")
        if not equals or ":" in site:
            site, equals, spec = "", "", item
        return f"{site}{equals}{spec if spec == 'none' else get_format(spec)}"

    return read_prices_of(path, "cost", name)


def check_costs(costs: Mapping[str, float], elements: Mapping[str, int], asked: Asked) -> None:
    """Raises FqError for an item of a site that there is not, or a format that was not estimated."""
    for item in costs:
        site, equals, spec = item.partition("=")
        if not equals or ":" in site:
            site, spec = "", item
        if site and site not in elements:
            raise FqError(f"--costs: {item}: there is no site {site}; they are written as fq sites has them")
        if spec != "none" and spec not in asked.formats:
            raise FqError(f"--costs: {item}: the estimate has no {spec}; it has {', '.join(asked.formats)}")


def solve(
    choices: Sequence[Choice], said: Judged, *, kld: float | None = None, cost: float | None = None
) -> Plan:
    """The cheapest within a KL, or the one with the least KL within a cost for a value.

    Raises FqError where none is, or scipy is missing.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix, vstack
    except ImportError:
        raise FqError("fq plan solves with scipy, which is not installed: pip install 'fq[plan]'") from None
    assert (kld is None) != (cost is None)
    options = [option for choice in choices for option in choice.options]
    owner = np.repeat(np.arange(len(choices)), [len(choice.options) for choice in choices])
    elements = sum(choice.elements for choice in choices)
    costs = np.array([option.cost for option in options]) / elements
    klds = np.array([option.kld for option in options])
    one_each = csr_matrix((np.ones(len(options)), (owner, np.arange(len(options)))))
    if kld is not None:
        aim, limited, limit = costs, klds, kld
    else:
        assert cost is not None
        aim, limited, limit = klds, costs, cost
    least = math.fsum(limited[owner == n].min() for n in range(len(choices)))
    if least > limit * (1 + ROOM):
        what = "mean KL" if kld is not None else "cost"
        alone = [choice.site for choice in choices if len(choice.options) == 1]
        why = f"; {len(alone)} sites have one choice, such as {alone[0]}" if alone else ""
        raise FqError(f"no choice of formats has a {what} of at most {limit:g}: the least is {least:g}{why}")
    # what alone is more than all of it is out, which a solver's tolerance might let in
    within = limited <= limit * (1 + ROOM)
    # numbers near 1, as the solver's tolerances are absolute
    matrix = vstack([one_each, csr_matrix(limited[None] / (limit or 1.0))])
    upper = np.append(np.ones(len(choices)), 1 + ROOM if limit else 0.0)
    lower = np.append(np.ones(len(choices)), -np.inf)
    with _no_stdout():
        found = milp(
            aim / (aim.max() or 1.0),
            constraints=LinearConstraint(matrix, lower, upper),
            integrality=np.ones(len(options)),
            bounds=Bounds(0, within.astype(np.float64)),
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    if found.x is None:
        raise FqError(f"the solver found no plan: {found.message}")
    if found.status:
        warnings.warn(f"the solver's {SECONDS:g} s were over: there may be a better plan", stacklevel=2)
    taken = np.flatnonzero(found.x > 0.5)
    assert len(taken) == len(choices)
    return plan_of(choices, [options[k] for k in taken], said)


@contextlib.contextmanager
def _no_stdout() -> Iterator[None]:
    """HiGHS prints lines of its own there, whatever it is asked for."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def plan_of(choices: Sequence[Choice], picked: Sequence[Option], said: Judged) -> Plan:
    elements = sum(choice.elements for choice in choices)
    cost = math.fsum(option.cost for option in picked) / elements
    rounded = [(c, o) for c, o in zip(choices, picked, strict=True) if o.spec is not None]
    each = np.array([said.by_chunk(c.i, o.j) for c, o in rounded]).reshape(
        len(rounded), len(said.found.by_chunk)
    )
    total = float(each.mean(axis=1).sum()) if rounded else 0.0
    spread = said.found.spread
    spreads = [0.0 if (c.i, o.j) in said.exact else float(spread[c.i, o.j]) for c, o in rounded]
    return Plan(tuple(choices), tuple(picked), cost, total, _interval(each, np.array(spreads), said.errors))


def _interval(each: np.ndarray, spreads: np.ndarray, errors: ModelError | None) -> Interval | None:
    """Of a sum of costs, (cells, chunks): how the chunks scatter, and of those that are estimates, which
    have a spread, the estimates' own error: its mean is common to all, known from so many, and the rest
    each cell's own."""
    n = each.shape[1] if each.size else 0
    if n < MIN_CHUNKS or (spreads.any() and errors is None):
        return None
    by_chunk, means = each.sum(axis=0), each.mean(axis=1)
    total = float(means.sum())
    if not total > 0:
        return None
    half = t_quantile(LEVEL, n - 1) * standard_error(by_chunk) / total
    centre = 0.0
    if errors is not None:
        shares = means / total
        estimated = float(shares[spreads > 0].sum())
        own = shares * spreads
        spread = math.sqrt(estimated * estimated / errors.weight + float((own * own).sum()))
        half = math.hypot(half, errors.quantile * errors.sd * spread)
        centre = estimated * errors.mean
    return total * exp(centre - half), total * exp(centre + half)


def least_sure(plan: Plan, said: Judged, n: int) -> list[tuple[str, str]]:
    """Sites and formats of a plan that were not measured: the n that its interval hangs on most, by the
    estimate's own error or by one chunk. None where there are too few chunks for any interval."""
    if len(said.found.by_chunk) < MIN_CHUNKS:
        return []
    unsure = []
    sd = 1.0 if said.errors is None else said.errors.sd
    spread = said.found.spread
    for choice, option in zip(plan.choices, plan.picked, strict=True):
        if option.spec is not None and (choice.i, option.j) not in said.exact:
            of_model = option.kld * sd * float(spread[choice.i, option.j])
            se = standard_error(said.by_chunk(choice.i, option.j))
            unsure.append((-math.hypot(of_model, se), choice.site, option.spec))
    return [(site, spec) for _, site, spec in sorted(unsure)[:n]]


def uniform(
    choices: Sequence[Choice], said: Judged, asked: Asked, spec: str, costs: Mapping[str, float] | None
) -> Plan:
    """One format at every site, marked or not."""
    j = asked.formats.index(spec)
    picked = []
    for choice in choices:
        price = _price(costs, choice.site, spec)
        kld = float(said.by_chunk(choice.i, j).mean())
        picked.append(Option(spec, math.inf if price is None else price * choice.elements, kld, j))
    return plan_of(choices, picked, said)


def uniform_plans(
    choices: Sequence[Choice], said: Judged, asked: Asked, costs: Mapping[str, float] | None
) -> list[Plan]:
    """Of each format that fits everywhere, the cheapest first."""
    plans = [uniform(choices, said, asked, spec, costs) for spec in asked.formats]
    fitting = [plan for plan in plans if math.isfinite(plan.cost) and math.isfinite(plan.kld)]
    return sorted(fitting, key=lambda plan: (plan.cost, plan.kld))


def front(choices: Sequence[Choice], said: Judged, n: int = FRONT) -> list[Plan]:
    """Plans from the cheapest to one with hardly any KL, each with the least KL for its cost."""
    elements = sum(choice.elements for choice in choices)
    low = math.fsum(choice.options[0].cost for choice in choices) / elements
    high = math.fsum(choice.options[-1].cost for choice in choices) / elements
    plans: list[Plan] = []
    for k in range(n):
        # a little above the least, which rounding may put out of reach
        plan = solve(choices, said, cost=low * (1 + 1e-9) + (high - low) * k / max(n - 1, 1))
        if not plans or plan.kld < plans[-1].kld:
            plans.append(plan)
    return plans
