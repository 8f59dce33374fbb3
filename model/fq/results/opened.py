"""A store as a notebook has it: its runs, their cells, and what each left of every chunk."""

from __future__ import annotations

import html
import operator
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FqError
from ..measure.statistics import Paired
from .export import rows_of
from .runs import Results, stored_figures

if TYPE_CHECKING:
    import pandas as pd

# of what a run's table in a notebook shows, and what it is called there
SHOWN = {
    "name": "cell",
    "mean_kld": "mean KL",
    "mean_kld_ci95_chunks_low": "from",
    "mean_kld_ci95_chunks_high": "to",
}
SHOWN |= {"mean_kld_ci95_low": "from", "mean_kld_ci95_high": "to", "rank": "rank", "mark": "mark"}
MOST_ROWS = 50


def open_results(path: str | os.PathLike[str]) -> OpenedStore:
    """The store that ``fq sweep`` and ``fq sensitivity`` keep their runs in.

        import fq
        fq.open_results("fq-results.sqlite").cells()     # a pandas.DataFrame of the newest run

    Nothing is written, and the file is open only while something is read: runs that go on may be looked at.
    Raises FqError if it is not there, or is no store.
    """
    with Results(path, must_exist=True):
        return OpenedStore(os.fspath(path))


class OpenedStore:
    """Of `open_results`. Its methods raise FqError for a run that there is not, or a damaged file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<store {self.path}: {len(self.list())} runs>"

    def _repr_html_(self) -> str:
        return _html(self.list(), f"{len(self.list())} runs of {self.path}")

    def list(self) -> Sequence[dict[str, Any]]:
        """Of each run: run, started, model, text, n_cells, n_chunks_asked, ended, of, and damaged: None, or
        what is wrong with it."""
        with Results(self.path, must_exist=True) as store:
            return store.list()

    def runs(self) -> pd.DataFrame:
        """The same as a frame."""
        return _frame(self.list())

    def run(self, number: int | None = None) -> OpenedRun:
        """One of them, or the newest that is not damaged."""
        if number is None:
            with Results(self.path, must_exist=True) as store:
                number = store.newest()
        return OpenedRun(self.path, number)

    def cells(self, number: int | None = None) -> pd.DataFrame:
        """`OpenedRun.cells` of a run, or the newest."""
        return self.run(number).cells()

    def chunks(self, number: int | None = None) -> pd.DataFrame:
        """`OpenedRun.chunks` of a run, or the newest."""
        return self.run(number).chunks()


class OpenedRun:
    """A run as it is now; ask the store for it again to see what has ended since."""

    def __init__(self, path: str, number: int) -> None:
        self.path, self.number = path, operator.index(number)  # a frame's numbers are numpy's
        with Results(path, must_exist=True) as store:
            self.about = store.get(self.number)

    def __repr__(self) -> str:
        about = self.figures
        n, asked = about["n_chunks"], about["n_chunks_asked"]
        what = "estimate" if "estimate" in about else "sweep"
        model = os.path.basename(about["model"])
        size = f"{len(self.rows())} cells, {n} of {asked} chunks"
        return f"<run {self.number} of {self.path}: {what} of {model}, {size}>"

    def _repr_html_(self) -> str:
        rows = [{SHOWN[key]: row[key] for key in SHOWN if key in row} for row in self.rows()]
        return _html(rows, repr(self)[1:-1])

    @cached_property
    def figures(self) -> dict[str, Any]:
        """All of it, as ``fq results RUN --json`` writes it."""
        with Results(self.path, must_exist=True) as store:
            return stored_figures(store, self.number)

    def rows(self) -> list[dict[str, Any]]:
        """Of each cell what ``fq results RUN --csv`` writes."""
        return rows_of(self.figures)

    def cells(self) -> pd.DataFrame:
        """The same as a frame, a row per cell, by its name."""
        return _frame(self.rows(), index="name")

    @cached_property
    def names(self) -> list[str]:
        """Of the cells that were measured, in their order."""
        return [cell.name for cell in self.about.cells]

    @cached_property
    def _left(self) -> Mapping[tuple[int, int], Paired]:
        with Results(self.path, must_exist=True) as store:
            size = len(self.about.cells), self.about.settings["n_chunks_asked"]
            rows = store.rows(self.number)  # it may have been extended since
            return {(i, c): left.paired for i, c, left in rows if i < size[0] and c < size[1]}

    def klds(self) -> np.ndarray:
        """Mean KL divergence of each cell that was measured and chunk, float64 (cells, chunks); NaN where it
        has not ended."""
        return self._means("kld")

    def nlls(self) -> np.ndarray:
        """Mean negative log-likelihood, the same."""
        return self._means("nll")

    def _means(self, name: str) -> np.ndarray:
        found = np.full((len(self.names), self.about.settings["n_chunks_asked"]), np.nan)
        for at, paired in self._left.items():
            found[at] = np.mean(getattr(paired, name))
        return found

    def chunks(self) -> pd.DataFrame:
        """A row per cell and chunk that has ended: cell, chunk (as it was run, from 0), chunk_of_text,
        mean_kld, nll, nll_base, same_top."""
        indices = self.about.settings["chunk_indices"]
        return _frame(
            [
                {
                    "cell": self.names[cell],
                    "chunk": chunk,
                    "chunk_of_text": indices[chunk],
                    "mean_kld": float(np.mean(paired.kld)),
                    "nll": float(np.mean(paired.nll)),
                    "nll_base": float(np.mean(paired.nll_base)),
                    "same_top": float(np.mean(paired.same_top)),
                }
                for (cell, chunk), paired in sorted(self._left.items())
            ]
        )

    def tokens(self, cell: str, chunk: int = 0) -> Paired:
        """Of each scored token of a chunk: kld, nll, nll_base, dp, same_top, p_top_base. Raises FqError for
        a cell that there is not, or a chunk that has not ended."""
        if cell not in self.names:
            raise FqError(f"{self.path}: run {self.number} has no cell {cell!r}; names lists them")
        try:
            return self._left[self.names.index(cell), chunk]
        except KeyError:
            raise FqError(f"{self.path}: run {self.number}: chunk {chunk} of {cell} has not ended") from None


def _frame(rows: Sequence[Mapping[str, Any]], index: str | None = None) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError:
        raise FqError("frames need pandas: pip install 'fq[pandas]'; rows() and list() do without") from None
    frame = pd.DataFrame(list(rows))
    indexed: pd.DataFrame = frame if index is None or index not in frame else frame.set_index(index)
    return indexed


def _html(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in (rows[0] if rows else ()))
    lines = []
    for row in rows[:MOST_ROWS]:
        cells = (f"{x:.3e}" if isinstance(x, float) else "" if x is None else str(x) for x in row.values())
        lines.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in cells) + "</tr>")
    more = f"; {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
    top = f"<caption>{html.escape(caption)}{more}</caption><thead><tr>{head}</tr></thead>"
    return f"<table>{top}<tbody>{''.join(lines)}</tbody></table>"
