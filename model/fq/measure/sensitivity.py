"""What rounding would cost at every site, in every format, from a few backward passes.

Let g be the gradient, at a site, of the sum of ln p over labels that are drawn from the model itself, and e
the site's rounding error. To second order a chunk's KL divergence is half the mean square of <g, e> over such
labels, by scored token. Squared as a whole it would be one number a sample; errors of different tokens hardly
correlate, but for those of equal tokens, whose values are alike: so <g, e> is added up over equal tokens,
squared, and then summed. What all errors have in common is first taken out of them: their part along the
value, e = c x + r, costs c^2 times what a change of the site's scale does, which is measured exactly
(`gain_cells`), and the blocks of equal tokens serve r, with a cross term of both. What r has in common beyond
that is by channel: of each the line in the value that its errors are nearest to, which is squared as a whole,
too. What one token costs is bounded: once it is tipped over it is lost. `estimates` makes figures of what is
left here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import (
    MAX_GRADS,
    Executor,
    Format,
    default_fpu,
    error_products,
    format_errors,
    get_format,
    rms_norm_f32,
)
from fq_kernels.formats.gain import GAIN
from fq_kernels.rules import FakeQuant, Observer, Site, misfit

from ..arch.graph import NormAttributes
from ..arch.scaling import scaling_classes
from ..errors import FqError, NotFiniteError
from ..run.backward import Backward, Visited
from ..run.finite import all_finite, not_finite_text
from ..run.model import Model
from ..run.weights import times_float32
from .cells import Cell
from .chunks import Chunks, Settings
from .estimates import Asked
from .labels import sampled_labels

NEIGHBOURS = 16  # tokens, of which it is looked whether their errors correlate
LINES_EVERY = 2  # chunks, of which one says what errors have in common: it is one figure of a kind's sites
SUMS = 4  # of error_products, before those of gradients
PIECE = 1 << 16  # elements of a thread's share, about
TIPPED = 1.0  # nats that a token costs at most, however large its square: docs/sensitivity.md

# What a chunk leaves of a site and format. A cost is nats per scored token.
COLUMNS = (
    "value_sq",  # <x, x> over the chunk
    "error_sq",  # <e, e>
    "along",  # c = <e, x> / <x, x>
    "blocks",  # cost of r = e - c x, by blocks of equal tokens; of a token it is bounded
    "cross",  # cost of c x and r together
    "by_token",  # of r, token by token
    "neighbours",  # of r, by blocks of tokens that follow one another
    "by_element",  # of r, element by element: the diagonal of the Fisher matrix
    "whole_by_token",  # of e itself, token by token: for comparison
    "whole_by_element",  # and element by element
    "unbounded",  # of r, by blocks of equal tokens, without a bound
    "common",  # of r's lines in x, one a channel: what their square as a whole has beyond those of blocks;
    # NaN of a chunk where it is not looked at
    "largest",  # the share of one block of r in all of them
)
COSTS = set(COLUMNS[3:-1])

DEFAULT_FORMATS = (
    *("bf16", "bf16:truncate", "bf16:nearest-away", "bf16:odd", "bf16:stochastic"),
    *("f16", "f16:truncate", "f16:stochastic", "tf32"),
    *("fp8_e4m3fn", "fp8_e4m3fn:truncate", "fp8_e4m3fn:stochastic", "fp8_e4m3fn:row"),
    *("fp8_e5m2", "fp8_e5m2:truncate", "fp8_e5m2:stochastic", "fp8_e5m2:row"),
    *("fp8_e4m3fnuz", "fp8_e5m2fnuz", "fp8_e4m3_ieee", "fp8_e3m4", "fp8_e3m4:row"),
    *("fp6_e2m3:row", "fp6_e3m2:row", "fp4_e2m1:row"),
    *("int8", "int8:asymmetric", "int8:group=32", "int8:had=64", "int4", "int4:group=32"),
    *("q8_0", "q8_k", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl"),
    *("mxfp8_e4m3", "mxfp8_e4m3:rceil", "mxfp6_e2m3", "mxfp4", "mxfp4:rceil", "mxint8", "nvfp4:row"),
)


class Products(NamedTuple):
    """What a site's gradients and errors leave, row by row.

    own     error_products of 0 in the value's place: (rows, 4 + samples)
    errors  of each format: (formats, rows, 4 + samples)
    lines   <l, g> with l the line in the value that the errors of a channel are nearest to, over all rows:
            (formats, rows, samples); None where it is not looked at
    """

    own: np.ndarray
    errors: np.ndarray
    lines: np.ndarray | None


class Sensitivity:
    """One estimate; iterate over it to run it: a chunk's position is yielded as it ends.

    model, tokens  the whole text, tokenised once
    sites          as rules name them; none: all that the model has
    formats        as a rule's right side; None: DEFAULT_FORMATS, but for those whose blocks fit no row
    samples        labels for each scored token: backward passes of a chunk, which go together
    seed           of the labels, and of stochastic rounding where a format names none
    settings       on which chunks; they may be given by name too
    on_step        called for each of ``steps``: the nodes of the way back

    ``finished`` has for each chunk, by position, float64 (sites, formats, COLUMNS), NaN where a format leaves
    what is not finite or fits no row; what is in it already is not run again. ``asked`` says what of.
    Raises FqError for a text that is too short, a context that does not fit, or a site or format that there
    is not, and NotFiniteError if the model's own logits are not finite.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        sites: Sequence[str],
        formats: Sequence[str] | None,
        *,
        executor: Executor,
        samples: int = 4,
        seed: int = 0,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        self.settings = Settings.changed(settings, changes)
        if self.settings.activations != "exact":
            raise FqError("gradients are those of exact activations")
        if not 1 <= samples <= MAX_GRADS:
            raise FqError(f"samples must be from 1 to {MAX_GRADS}, not {samples}")
        self.model, self.samples, self.seed, self.executor = model, samples, seed, executor
        self.text = Chunks(model, tokens, self.settings)
        self.sites = sites_named(model, sites)
        if formats is not None and not formats:
            raise FqError("no formats to look at")
        self.formats = [_canonical(spec, seed) for spec in formats or self._default_formats()]
        if len(set(self.formats)) < len(self.formats):
            raise FqError(f"a format is asked for twice: {', '.join(self.formats)}")
        self._classes = scaling_classes(model.graph)
        # as a cell of the site alone has it: a seed is the site's own
        self._formats: dict[Site, list[Format]] = {site: [] for site in self.sites}
        values = [value._replace(width=0) for value in model.values]  # some may not fit
        for spec in self.formats:
            try:
                of = FakeQuant(values, [f"{site}={spec}" for site in self.sites], count_errors=False)
            except ValueError as e:
                raise FqError(str(e)) from None
            for counter in of.matched:
                assert counter.format is not None
                self._formats[counter.site].append(counter.format)
        self._numbers = {site: i for i, site in enumerate(self.sites)}
        self._misfits = self._that_do_not_fit()
        self.finished: dict[int, np.ndarray] = {}
        self.on_step: Callable[[], None] = lambda: None
        self._backward = Backward(model, self.settings.n_ctx, executor)

    def __repr__(self) -> str:
        return (
            f"<Sensitivity of {len(self.sites)} sites, {len(self.formats)} formats; {len(self.finished)} of "
            f"{self.text.n} chunks ended>"
        )

    def _default_formats(self) -> list[str]:
        widths = {self._widths[site] for site in self.sites}
        return [spec for spec in DEFAULT_FORMATS if not all(misfit(get_format(spec), n) for n in widths)]

    @property
    def _widths(self) -> dict[Site, int]:
        """Of a row, by site."""
        return {site: value.width for value in self.model.values for site in value.sites}

    def _that_do_not_fit(self) -> set[tuple[Site, int]]:
        """Sites and formats whose blocks rows of the site cannot be cut into. Raises FqError where one fits
        none."""
        widths, errors = self._widths, dict[tuple[int, int], str]()
        for i, _ in enumerate(self.formats):
            for width in {widths[site] for site in self.sites}:
                fmt = next(self._formats[site][i] for site in self.sites if widths[site] == width)
                if error := misfit(fmt, width):
                    errors[i, width] = error
        for i, spec in enumerate(self.formats):
            if all((i, widths[site]) in errors for site in self.sites):
                raise FqError(f"{spec}: {errors[i, widths[self.sites[0]]]}")
        return {
            (site, i)
            for site in self.sites
            for i, _ in enumerate(self.formats)
            if (i, widths[site]) in errors
        }

    @property
    def asked(self) -> Asked:
        classes = tuple(self._classes[site] for site in self.sites)
        return Asked(
            tuple(map(str, self.sites)), tuple(self.formats), classes, self.samples, self.seed, COLUMNS
        )

    @property
    def steps(self) -> int:
        """What is left to do."""
        return (self.text.n - len(self.finished)) * len(self.model.graph.nodes)

    def __iter__(self) -> Iterator[int]:
        for position in range(self.text.n):
            if position not in self.finished:
                self.finished[position] = self._chunk(position)
                yield position

    def _chunk(self, position: int) -> np.ndarray:
        ids, _ = self.text[position]
        first = self.settings.first_scored
        logits = self._backward.forward(ids[:-1], first)
        if not all_finite(logits):
            where = self.text.where_not_finite(position, None, self.executor, "exact")
            raise NotFiniteError(not_finite_text("the model", where))
        index = self.text.indices[position]
        labels = sampled_labels(logits, self.samples, self.seed, index, self.executor)
        left = np.full((len(self.sites), len(self.formats), len(COLUMNS)), np.nan)
        to_go = len(self.model.graph.nodes)
        same = np.unique(ids[:-1], return_inverse=True)[1]

        def visit(at: Visited) -> None:
            nonlocal to_go
            for site, x, grads, rows in self._seen(at):
                found = self._products(site, x, grads, position)
                left[self._numbers[site]] = costs(found, rows, same) / self._per_token
            to_go -= 1
            self.on_step()

        self._backward.backward_of(labels, visit)
        for _ in range(to_go):  # those that no gradient is of
            self.on_step()
        return left

    @property
    def _per_token(self) -> np.ndarray:
        """What each column is divided by: costs are by scored token."""
        n = float(self.settings.n_scored)
        return np.array([n if c in COSTS else 1.0 for c in COLUMNS])

    def _seen(self, at: Visited) -> Iterator[tuple[Site, np.ndarray, np.ndarray, int]]:
        """The sites of a node that are asked for: each with its value (rows, n), gradients (samples, rows,
        n), and how many rows a token has."""
        node = self.model.graph.nodes[at.number]
        for value in node.values:
            for site in value.sites:
                if site not in self._numbers:
                    continue
                x, grads = at.value, at.grad
                if site.point == "in":
                    x, grads = at.inputs[0], at.of_inputs[0]
                rows = len(x) * value.rows
                x, grads = x.reshape(rows, -1), grads.reshape(self.samples, rows, -1)
                if site.point == "raw":
                    assert node.weight is not None and isinstance(node.attributes, NormAttributes)
                    read = at.inputs[0].reshape(rows, -1)
                    x = rms_norm_f32(read, eps=node.attributes.eps, executor=self.executor)
                    grads = grads * self.model.vectors[node.weight]
                yield site, x, grads, value.rows

    def _products(self, site: Site, x: np.ndarray, grads: np.ndarray, position: int) -> Products:
        formats, rows = self._formats[site], len(x)
        worth = self._mean_square(grads)
        found = np.full((len(formats), rows, SUMS + self.samples), np.nan, np.float32)
        zero = np.broadcast_to(np.zeros(x.shape[1], np.float32), x.shape)
        own = error_products(x, zero, worth, grads, executor=self.executor)
        centre: np.ndarray | None = None
        columns: np.ndarray | None = None
        if position % LINES_EVERY == 0:
            with default_fpu(), np.errstate(all="ignore"):
                centre = x.mean(axis=0)
            columns = np.full((len(formats), 2, x.shape[1]), np.nan, np.float32)
        fitting = [i for i in range(len(formats)) if (site, i) not in self._misfits]
        users = [i for i in fitting if formats[i].family.registered]
        together = [i for i in fitting if i not in users]
        for some in filter(None, (together, *([i] for i in users))):
            try:
                products, of_columns = format_errors(
                    x,
                    [formats[i] for i in some],
                    worth,
                    grads,
                    centre=centre,
                    first_row=position * rows,  # where a sweep's counters stand
                    executor=self.executor,
                )
            except Exception as e:  # a user's own function may raise anything
                raise FqError(f"format {formats[some[0]]} at {site}: {e}") from e
            found[some] = products
            if columns is not None:
                columns[some] = of_columns
        if centre is None or columns is None:
            return Products(own, found, None)
        return Products(own, found, self._lines(x, grads, centre, columns))

    def _mean_square(self, grads: np.ndarray) -> np.ndarray:
        """Of gradients (samples, rows, n), over the samples."""
        total: np.ndarray = np.empty_like(grads[0])
        step = max(PIECE // total.shape[1], 1)

        def of_rows(k: int) -> None:
            some = slice(k * step, (k + 1) * step)
            with default_fpu(), np.errstate(all="ignore"):
                np.square(grads[0, some], out=total[some])
                for grad in grads[1:]:
                    total[some] += grad[some] * grad[some]
                total[some] /= np.float32(len(grads))

        self.executor.map(of_rows, -(-len(total) // step))
        return total

    def _lines(self, x: np.ndarray, grads: np.ndarray, centre: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """<l, g> of each row, (formats, rows, samples), with l the line in x that the errors of a channel are
        nearest to; columns as of format_errors."""
        with default_fpu(), np.errstate(all="ignore"):
            off = x - centre
            square = (off * off).sum(axis=0)
            slope = np.divide(columns[:, 1], square, out=np.zeros_like(columns[:, 1]), where=square > 0)
            level = columns[:, 0] / np.float32(len(x))
            slope[~np.isfinite(slope)] = 0  # of a channel that is all but constant
        lines: np.ndarray = np.empty((len(grads), len(level), len(x)), np.float32)

        def of_sample(k: int) -> None:
            more = np.empty_like(lines[k])
            with default_fpu(), np.errstate(all="ignore"):
                of_x = grads[k] * off
                for values, of_channels, out in ((grads[k], level, lines[k]), (of_x, slope, more)):
                    times_float32(of_channels, np.ascontiguousarray(values), out, None)
                lines[k] += more

        self.executor.map(of_sample, len(grads))
        of_formats: np.ndarray = lines.transpose(1, 2, 0)
        return of_formats


def gain_cells(asked: Asked) -> dict[int, Cell]:
    """By class: the cell that measures what a change of its scale costs, at the last of its sites, before
    which most is the baseline's."""
    last = {key: site for site, key in zip(asked.sites, asked.classes, strict=True) if key is not None}
    return {
        key: Cell(f"{site}={GAIN}", "gain", GAIN, (f"{site}={GAIN}",)) for key, site in sorted(last.items())
    }


@default_fpu()
def costs(products: Products, rows: int, same: np.ndarray) -> np.ndarray:
    """COLUMNS of a site's formats, (formats, COLUMNS), costs summed over the scored tokens.

    rows  a token's
    same  of each token of the chunk, whose last ones these are, which others are equal: numbers from 0
    """
    own, errors = _by_token(products.own[None], rows)[0], _by_token(products.errors, rows)
    lines = None if products.lines is None else _by_token(products.lines, rows)
    samples = len(own) - SUMS
    with np.errstate(all="ignore"):
        x_sq = own[0].sum()
        e_sq, e_x, e_worth = errors[:, :3].sum(axis=2).T
        c = np.divide(e_x, x_sq, out=np.zeros_like(e_x), where=x_sq > 0)
        of_e, of_x = errors[:, SUMS:], -own[SUMS:]
        of_r = of_e - c[:, None, None] * of_x
        tokens = of_r.shape[2]
        same = same[len(same) - tokens :]
        unbounded = _total(_half_square(_alike(of_r, same)))
        # as if an error were as much smaller where its token's cost is bounded
        smaller = np.sqrt(_bound(_half_square(of_r)))[:, None, :]
        of_r *= smaller
        blocks, x_blocks = _alike(of_r, same), _alike(of_x, same)
        common = np.full(len(c), np.nan)
        if lines is not None:
            of_line = (lines - c[:, None, None] * of_x) * smaller
            whole = of_line.sum(axis=2, keepdims=True)
            common = _total(_half_square(whole)) - _total(_half_square(_alike(of_line, same)))
        squares = blocks * blocks
        total, largest = _total(squares), squares.sum(axis=1).max(axis=1, initial=0.0)
        # below 0 by rounding alone
        worth = errors[:, 2] - c[:, None] * (2 * errors[:, 3] - c[:, None] * own[2])
        elements = np.maximum(worth, 0.0) / 2
        found = {
            "value_sq": np.broadcast_to(x_sq, e_sq.shape),
            "error_sq": e_sq,
            "along": c,
            "blocks": total / (2 * samples),
            "cross": c * _total(blocks * x_blocks) / samples,
            "by_token": _total(_half_square(of_r)),
            "neighbours": _total(_half_square(_alike(of_r, np.arange(tokens) // NEIGHBOURS))),
            "by_element": _total(elements * _bound(elements)),
            "whole_by_token": _total(_half_square(of_e)),
            "whole_by_element": e_worth / 2,
            "unbounded": unbounded,
            "common": common,
            "largest": np.divide(largest, total, out=np.zeros_like(total), where=total > 0),
        }
        table = np.stack([found[name] for name in COLUMNS], axis=1)
    seen = np.delete(table, COLUMNS.index("common"), axis=1) if lines is None else table
    table[~np.isfinite(seen).all(axis=1)] = np.nan
    return table


def _half_square(products: np.ndarray) -> np.ndarray:
    """Nats that each block or token costs: half the mean square over samples, the second axis."""
    total: np.ndarray = (products * products).sum(axis=1) / (2 * products.shape[1])
    return total


def _bound(nats: np.ndarray) -> np.ndarray:
    """What tokens' costs are multiplied by: 1 where they are small, so that none is above TIPPED."""
    over = nats / TIPPED
    return np.asarray(1 / np.sqrt(1 + over * over))


def _total(values: np.ndarray) -> np.ndarray:
    """Over all but the first axis."""
    total: np.ndarray = values.reshape(len(values), -1).sum(axis=1)
    return total


def _by_token(products: np.ndarray, rows: int) -> np.ndarray:
    """Of each token, float64 (formats, sums, tokens), from those of its rows, (formats, rows, sums)."""
    n_formats, n_rows, n_sums = products.shape
    of_rows = products.reshape(n_formats, n_rows // rows, rows, n_sums).transpose(2, 0, 3, 1)
    total = np.array(of_rows[0], np.float64, order="C")
    for more in of_rows[1:]:
        total += more
    return total


def _alike(values: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Sums of the tokens, the last axis, that have one number."""
    order = np.argsort(same, kind="stable")
    first = np.flatnonzero(np.diff(same[order], prepend=-1))
    total: np.ndarray = np.add.reduceat(values[..., order], first, axis=-1)
    return total


def sites_named(model: Model, patterns: Sequence[str]) -> list[Site]:
    """In graph order."""
    if not patterns:
        return [site for value in model.values for site in value.sites]
    try:
        return Observer(model.values, patterns, lambda site, x: None).seen_sites
    except ValueError as e:
        raise FqError(str(e)) from None


def _canonical(spec: str, seed: int) -> str:
    try:
        return str(get_format(spec, seed=seed))
    except ValueError as e:
        raise FqError(str(e)) from None
