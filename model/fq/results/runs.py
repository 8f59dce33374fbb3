"""Results on disk: one SQLite file, a row per run and a row per chunk of each cell.

Table ``runs`` says what was measured, on what and with what. Table ``chunks`` holds the figures
of each scored token as little-endian float64, which `measure.figures` turns into the same
tables at any time, and ``baselines`` the baseline's. Each chunk of a cell is one transaction,
made as it ends, so that a run killed at any moment can go on from its last one. A run can be
extended, by cells and by chunks: what is there stays, with its numbers. `store_file` is the file,
`migrations` has the schema.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import FqError
from ..measure.cells import COUNT_COLUMNS, Cell, CellChunk
from ..measure.chunks import n_scored_per_chunk
from ..measure.estimates import Asked, Judged, judged, sensitivity_figures
from ..measure.figures import figures
from . import stored
from .estimated import in_order, measured
from .run import COLUMNS, Run, check_scales, run_of, texts_of
from .store_file import StoreFile

# Tables with rows of runs; and one's run that is not there, found from run to run, by the index.
_OF_RUNS = ("chunks", "baselines", "estimates")
_ASTRAY = """
WITH RECURSIVE found(run) AS (
    SELECT MIN(run) FROM {table}
    UNION ALL
    SELECT (SELECT MIN(run) FROM {table} WHERE {table}.run > found.run) FROM found WHERE run IS NOT NULL
)
SELECT run FROM found WHERE run IS NOT NULL AND run NOT IN (SELECT id FROM runs) LIMIT 1
"""


class Known(NamedTuple):
    """What a run's rows are held against as they are read: the run, and by number the names of the columns of
    counts with the text that has them."""

    run: Run
    columns: dict[int, tuple[list[str], str]]


class OtherBitsError(Exception):
    """What is there already is not the same; the message names it."""


class Begun(NamedTuple):
    """A run that is to be measured: its number, what it is now, and what it was before, if it was there."""

    number: int
    run: Run
    was: Run | None


class Results(StoreFile):
    """The runs of a store, which is opened as `StoreFile` says."""

    def add(self, run: Run) -> int:
        """A new run's number."""
        with self.writing():
            return self.insert(run)

    def begin(self, run: Run, more: Run | None = None) -> Begun:
        """A new run, or with ``more`` one that it extends: `Run.extended`.

        It is the newest of the same identity that has all cells of ``more``, else the newest;
        a new run, which is ``run``, if there is none. At one moment for all processes: of
        several that begin the same run at once, one makes it. Raises FqError, and extends nothing, where
        its static scales are not in their files any more.
        """
        with self.writing():
            was = None if more is None else self._newest_like(more)
            if was is None or more is None:
                return Begun(self.insert(run), run, None)
            number, before = was
            now = before.extended(more)
            check_scales(number, now)
            if now is not before:
                self.replace(number, now)
            return Begun(number, now, before)

    def extend(self, number: int, cells: Sequence[Cell]) -> Run:
        """The run with these cells after its own, but for those that it has."""
        with self.writing():
            run = self.get(number)
            run = replace(run, cells=run.cells + tuple(cell for cell in cells if cell not in run.cells))
            self.replace(number, run)
        return run

    def _newest_like(self, run: Run) -> tuple[int, Run] | None:
        # static scales were once a part of the identity that is kept
        found = self._db.execute(
            "SELECT id, identity FROM runs WHERE identity = ? OR (model_sha256 = ? AND text_sha256 = ? "
            "AND settings LIKE '%\"calibrations\"%') ORDER BY id DESC",
            (run.identity, run.model_sha256, run.text_sha256),
        )
        newest = None
        for number, identity in found.fetchall():
            there = number, self.get(number)
            if run.identity not in (identity, there[1].identity) or not run.can_be_one_with(there[1]):
                continue
            if set(run.cells) <= set(there[1].cells):
                return there
            newest = newest or there
        return newest

    def insert(self, run: Run) -> int:
        """Within `writing`: a new run's number."""
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        number = self._db.execute(
            "INSERT INTO runs (started, identity, model_sha256, text_sha256, cells, settings, numerics, "
            "versions, machine) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (started, run.identity, *texts_of(run)),
        ).lastrowid
        assert number is not None
        self._sign(number)
        return number

    def replace(self, number: int, run: Run, *, identity: str | None = None) -> None:
        """Within `writing`: what is said of a run whose rows stay, and its identity, where no other is given:
        what goes on with it is what would have."""
        self._db.execute(
            "UPDATE runs SET model_sha256 = ?, text_sha256 = ?, cells = ?, settings = ?, numerics = ?, "
            "versions = ?, machine = ?, identity = coalesce(?, identity) WHERE id = ?",
            (*texts_of(run), identity, number),
        )
        self._sign(number)

    def _sign(self, number: int) -> None:
        row = self._db.execute(f"SELECT {COLUMNS} FROM runs WHERE id = ?", (number,)).fetchone()
        self._db.execute("UPDATE runs SET digest = ? WHERE id = ?", (stored.digest(*row), number))

    def get(self, number: int) -> Run:
        """Raises FqError if there is none of this number."""
        with self._errors():
            row = self._db.execute(f"SELECT digest, {COLUMNS} FROM runs WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise FqError(f"{self.path}: there is no run {number}")
        with self.reading(number):
            return run_of(*row)

    def save(self, number: int, cell: int, chunk: int, left: CellChunk) -> None:
        """Commit what a cell left of a chunk; one that is there already stays as it is.

        Raises FqError if the chunk's baseline is not the one that its other cells were compared with.
        """
        with self.writing():
            try:
                self.put(number, cell, chunk, left)
            except OtherBitsError as e:
                what = f"{e} is not the same as before in run {number}; start a new run"
                raise FqError(f"{self.path}: {what}") from None

    def put(self, number: int, cell: int, chunk: int, left: CellChunk) -> bool:
        """Within `writing`: what a cell left of a chunk, and whether it was not there; else it stays.

        Raises OtherBitsError if the chunk's baseline is another.
        """
        self._there(number)
        paired = left.paired
        nll_base = _bytes(paired.nll_base)
        # of a store that did not keep it there is none
        p_top = None if np.isnan(paired.p_top_base).all() else _bytes(paired.p_top_base)
        self._db.execute(
            "INSERT INTO baselines (run, chunk, nll, p_top, digest) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (run, chunk) DO UPDATE SET p_top = excluded.p_top, digest = excluded.digest "
            "WHERE p_top IS NULL",
            (number, chunk, nll_base, p_top, stored.digest(number, chunk, nll_base, p_top)),
        )
        found = self._db.execute(
            "SELECT nll FROM baselines WHERE run = ? AND chunk = ?", (number, chunk)
        ).fetchone()
        if found[0] != nll_base:
            raise OtherBitsError(f"the baseline of chunk {chunk + 1}")
        figures = map(_bytes, (paired.nll, paired.kld, paired.dp))
        values = *figures, paired.same_top.tobytes(), _bytes(left.counts)
        done = self._db.execute(
            "INSERT OR IGNORE INTO chunks "
            "(run, cell, chunk, nll, kld, dp, same_top, counts, count_columns, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                cell,
                chunk,
                *values,
                self._count_columns(),
                stored.digest(number, cell, chunk, *values, json.dumps(COUNT_COLUMNS)),
            ),
        )
        return done.rowcount == 1

    def _there(self, number: int) -> None:
        """Raises FqError for a run that there is not, or that somebody has deleted."""
        if not self.has(number):
            raise FqError(f"{self.path}: there is no run {number} any more")

    def has(self, number: int) -> bool:
        with self._errors():
            found = self._db.execute("SELECT 1 FROM runs WHERE id = ?", (number,)).fetchone()
        return found is not None

    def save_estimates(self, number: int, chunk: int, figures: np.ndarray) -> None:
        """Commit what a chunk left of every site and format; what is there already stays as it is."""
        with self.writing():
            self._there(number)
            self._db.execute(
                "INSERT OR IGNORE INTO estimates (run, chunk, figures, digest) VALUES (?, ?, ?, ?)",
                (number, chunk, _bytes(figures), stored.digest(number, chunk, _bytes(figures))),
            )

    def load_estimates(self, number: int, run: Run | None = None) -> dict[int, np.ndarray]:
        """What the chunks of a run have left of every site and format, by chunk; nothing for a sweep.

        run  where it is known: what `get` says
        """
        run = run or self.get(number)
        asked = run.asked
        if asked is None:
            return {}
        with self._errors():
            rows = self._db.execute(
                "SELECT chunk, figures, digest FROM estimates WHERE run = ? ORDER BY chunk LIMIT ?",
                (number, run.settings["n_chunks_asked"]),
            ).fetchall()
        left = {}
        with self.reading(number):
            for chunk, blob, digest in rows:
                if chunk not in range(run.settings["n_chunks_asked"]):
                    raise ValueError(f"a row is of chunk {chunk!r:.40}")
                left[chunk] = stored.estimates_of(asked, blob)
                try:
                    stored.check_digest(digest, number, chunk, blob)
                except ValueError as e:
                    raise ValueError(f"estimates of chunk {chunk + 1}: {e}") from None
        return left

    def _count_columns(self) -> int:
        """The number of the columns that counts have now."""
        names = json.dumps(COUNT_COLUMNS)
        self._db.execute("INSERT OR IGNORE INTO count_columns (names) VALUES (?)", (names,))
        (number,) = self._db.execute("SELECT id FROM count_columns WHERE names = ?", (names,)).fetchone()
        return int(number)

    def known(self, number: int) -> Known:
        """What `rows` needs of a run, for those that ask for more than once."""
        run = self.get(number)
        self._none_astray()
        with self._errors():
            names = self._db.execute(
                "SELECT id, substr(names, 1, ?) FROM count_columns LIMIT ?",
                (stored.MAX_NAMES_CHARS, stored.MAX_COLUMN_SETS),
            ).fetchall()
        with self.reading(number):
            return Known(run, {key: (stored.count_columns_of(text), text) for key, text in names})

    def load(self, number: int, known: Known | None = None) -> dict[tuple[int, int], CellChunk]:
        """What the cells of a run have left, by (cell, chunk)."""
        return {(cell, chunk): left for cell, chunk, left in self.rows(number, known=known)}

    def rows(
        self, number: int, at: tuple[int, int] | None = None, known: Known | None = None
    ) -> Iterator[tuple[int, int, CellChunk]]:
        """The same one by one, as (cell, chunk, left); with ``at`` only that cell and chunk."""
        known = known or self.known(number)
        with self._errors():
            where = "" if at is None else " AND cell = ? AND chunk = ?"
            found = self._db.execute(
                "SELECT baselines.digest, chunks.digest, cell, chunk, count_columns, baselines.nll, "
                "chunks.nll, kld, dp, same_top, counts, baselines.p_top "
                f"FROM chunks LEFT JOIN baselines USING (run, chunk) WHERE run = ?{where}",
                (number, *(at or ())),
            )
        while True:
            with self._errors():
                row = found.fetchone()
            if row is None:
                return
            with self.reading(number):
                yield self._checked(number, known, row)

    @staticmethod
    def _checked(number: int, known: Known, row: Sequence[Any]) -> tuple[int, int, CellChunk]:
        run, columns = known
        n_scored = n_scored_per_chunk(run.settings["n_ctx"], run.settings["scored"])
        of_baseline, of_row, cell, chunk, key, *blobs = row
        if cell not in range(len(run.cells)) or chunk not in range(run.settings["n_chunks_asked"]):
            raise ValueError(f"a row is of cell {cell!r:.40}, chunk {chunk!r:.40}")
        if key not in columns:
            raise ValueError(f"cell {cell}, chunk {chunk + 1}: its counts have no columns")
        names, text = columns[key]
        nll_base, *values, p_top = blobs
        try:
            left = stored.chunk_of(n_scored, names, blobs)
            stored.check_digest(of_row, number, cell, chunk, *values, text)
        except ValueError as e:
            raise ValueError(f"cell {cell}, chunk {chunk + 1}: {e}") from None
        try:
            stored.check_digest(of_baseline, number, chunk, nll_base, p_top)
        except ValueError as e:
            raise ValueError(f"the baseline of chunk {chunk + 1}: {e}") from None
        return cell, chunk, left

    def delete(self, number: int) -> None:
        """A run and all that it left; its number is not given again, but its place in the file is.

        A damaged one too. Raises FqError if there is none.
        """
        with self.writing():
            self._there(number)
            for table in _OF_RUNS:
                self._db.execute(f"DELETE FROM {table} WHERE run = ?", (number,))
            self._db.execute("DELETE FROM runs WHERE id = ?", (number,))

    def whole(self) -> None:
        """Raises FqError where SQLite finds that the file is damaged, or rows are of no run."""
        with self._errors():
            (said,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                raise FqError(f"{self.path}: {' '.join(said.split())}")
        self._none_astray()

    def _none_astray(self) -> None:
        """Raises FqError for rows of a run that there is not, as damage to their number leaves them."""
        for table in _OF_RUNS:
            with self._errors():
                lost = self._db.execute(_ASTRAY.format(table=table)).fetchone()
            if lost is not None:
                raise FqError(f"{self.path}: {table} has rows of run {lost[0]!r:.40}, which is not there")

    def list(self, number: int | None = None) -> Sequence[dict[str, Any]]:
        """Each run, or one: number, started, model, text, cells, chunks asked for, how much has ended; of a
        damaged one no more than its number and what is wrong."""
        with self._errors():
            rows = self._db.execute(
                "SELECT (SELECT COUNT(*) FROM chunks WHERE run = id), "
                f"(SELECT COUNT(*) FROM estimates WHERE run = id), digest, {COLUMNS} FROM runs "
                "WHERE id = coalesce(?, id) ORDER BY id",
                (number,),
            ).fetchall()
        runs = []
        for ended, estimated, digest, number, started, *said in rows:
            if not isinstance(number, int):
                raise FqError(f"{self.path}: a run's number is {number!r:.40}")
            about: dict[str, Any] = {"run": number, "started": "", "model": "", "text": None}
            about |= {"n_cells": 0, "n_chunks_asked": 0, "ended": 0, "of": 0, "damaged": None}
            runs.append(about)
            try:
                run = run_of(digest, number, started, *said)
            except ValueError as e:
                about["damaged"] = str(e)
                continue
            n_cells, chunks = len(run.cells), run.settings["n_chunks_asked"]
            if asked := run.settings.get("sensitivity"):
                n_cells = len(asked["sites"]) * len(asked["formats"])
                ended = estimated * n_cells
            about |= {"started": started, "model": run.settings["model"], "text": run.settings.get("text")}
            about |= {"n_cells": n_cells, "n_chunks_asked": chunks, "ended": ended, "of": n_cells * chunks}
        return runs

    def sound(self) -> Sequence[int]:
        """Numbers of the runs that are not damaged, the newest first."""
        return [about["run"] for about in reversed(self.list()) if about["damaged"] is None]

    def newest(self) -> int:
        """The first of them. Raises FqError if there is no run, or none that can be read."""
        if found := self.sound():
            return found[0]
        for about in reversed(self.list()):
            raise FqError(f"{self.path}: run {about['run']} cannot be read: {about['damaged']}")
        raise FqError(f"{self.path}: there is no run in it")


def _bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f8").tobytes()


def stored_figures(store: Results, number: int) -> dict[str, Any]:
    """`figures` of a run that is kept, with its number as ``run``.

    Raises FqError naming the store and the run if it is damaged, or has rules of another version.
    """
    known = store.known(number)
    run, left = known.run, store.load(number, known)
    asked, estimates = run.asked, store.load_estimates(number, run)
    with store.reading(number):
        if asked is None:
            return {"run": number} | figures(run.about, run.cells, left)
        about = {key: value for key, value in run.about.items() if key not in ("values", "sensitivity")}
        chunks = in_order(estimates)
        return {"run": number} | sensitivity_figures(about, asked, chunks, *measured(asked, run.cells, left))


def judgement(store: Results, number: int) -> tuple[Asked, Judged]:
    """Of a kept run. Raises FqError for one that is no estimate, or has no chunk yet."""
    run = store.get(number)
    asked = run.asked
    if asked is None:
        raise FqError(f"{store.path}: run {number} is a sweep, not an estimate (fq sensitivity)")
    chunks = in_order(store.load_estimates(number))
    if not chunks:
        raise FqError(f"{store.path}: no chunk of run {number} has ended")
    found = measured(asked, run.cells, store.load(number))
    with store.reading(number):
        said = judged(asked, chunks, found.gains, found.exact, found.chosen)
    if not said.found.scaled.all():
        what = "has yet to measure what a change of scale costs: fq sensitivity --resume"
        raise FqError(f"{store.path}: run {number} {what}")
    return asked, said
