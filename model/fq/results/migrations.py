"""The store's schema, version by version: how a new file is made, and how an older one is read or upgraded.

A migration adds tables and columns and changes nothing that is there. So an older file reads like a new
one through temporary tables and views of what it lacks; it is upgraded, with a copy left beside it, when
something is first written to it.
"""

from __future__ import annotations

import json
import sqlite3
from typing import NamedTuple

# The columns of a chunk's counts, each site a row of float64; their order is that of a blob.
COUNTS_1 = (
    "rows_quantised",
    "elements",
    "max_abs_error",
    "sum_abs_error",
    "sum_error",
    "sum_sq_error",
    "sum_sq_value",
    "changed",
    "not_finite",
    "first_error",
    "last_error",
    "summed_in_order",
    "out_of_range",
)


class Column(NamedTuple):
    """One that a table gets. ``default``, as SQL, is what rows have that were there before."""

    table: str
    name: str
    declaration: str
    default: str


class Migration(NamedTuple):
    """From one version to the next: tables and rows of theirs, as SQL, and columns of other tables."""

    tables: tuple[tuple[str, str], ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()


MIGRATIONS = (
    Migration(
        tables=(
            (
                "runs",
                """(
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                started TEXT NOT NULL,       -- UTC
                model_sha256 TEXT NOT NULL,
                text_sha256 TEXT NOT NULL,
                cells TEXT NOT NULL,         -- JSON: name, kind, group and rules of each
                settings TEXT NOT NULL,      -- JSON: context, chunks, batch and the like
                numerics TEXT NOT NULL,      -- JSON
                versions TEXT NOT NULL,      -- JSON
                machine TEXT NOT NULL,       -- JSON
                identity TEXT NOT NULL       -- SHA-256 of all that the bits of a cell's chunk depend on
            )""",
            ),
            (
                "baselines",
                """(
                run INTEGER NOT NULL REFERENCES runs,
                chunk INTEGER NOT NULL,
                nll BLOB NOT NULL,
                PRIMARY KEY (run, chunk)
            )""",
            ),
            (
                "chunks",
                """(
                run INTEGER NOT NULL REFERENCES runs,
                cell INTEGER NOT NULL,
                chunk INTEGER NOT NULL,
                nll BLOB NOT NULL,
                kld BLOB NOT NULL,
                dp BLOB NOT NULL,
                same_top BLOB NOT NULL,      -- a byte a token
                counts BLOB NOT NULL,
                PRIMARY KEY (run, cell, chunk)
            )""",
            ),
        ),
    ),
    # the columns of the counts have their names beside them: a new statistic is one more
    Migration(
        tables=(
            (
                "count_columns",
                """(
                id INTEGER PRIMARY KEY,
                names TEXT NOT NULL UNIQUE   -- JSON: array of text
            )""",
            ),
        ),
        rows=(f"INSERT INTO count_columns VALUES (1, '{json.dumps(COUNTS_1)}')",),
        columns=(Column("chunks", "count_columns", "INTEGER NOT NULL", "1"),),
    ),
    # the baseline's largest probability of each token, float64
    Migration(columns=(Column("baselines", "p_top", "BLOB", "NULL"),)),
    # what a chunk leaves of an estimate of every site and format
    Migration(
        tables=(
            (
                "estimates",
                """(
                run INTEGER NOT NULL REFERENCES runs,
                chunk INTEGER NOT NULL,
                figures BLOB NOT NULL,       -- float64 (sites, formats, columns), as settings name them
                PRIMARY KEY (run, chunk)
            )""",
            ),
        ),
    ),
    # of each row, so that a flipped bit does not pass for a figure: `stored.digest`
    Migration(
        columns=tuple(
            Column(t, "digest", "BLOB", "NULL") for t in ("runs", "baselines", "chunks", "estimates")
        )
    ),
)
VERSION = len(MIGRATIONS)


def upgrade(db: sqlite3.Connection, version: int) -> None:
    """Bring a file of ``version``, 0 for a new one, to this one. Within a transaction of the caller's."""
    for migration in MIGRATIONS[version:]:
        for name, columns in migration.tables:
            db.execute(f"CREATE TABLE {name} {columns}")
        for row in migration.rows:
            db.execute(row)
        for c in migration.columns:
            db.execute(_add_column(c))
    db.execute(f"PRAGMA user_version = {VERSION}")


def _add_column(c: Column, schema: str = "") -> str:
    return f"ALTER TABLE {schema}{c.table} ADD COLUMN {c.name} {c.declaration} DEFAULT {c.default}"


def read_as_new(db: sqlite3.Connection, version: int) -> None:
    """Let a file of an earlier version be read as one of this. Nothing in the file changes."""
    made: set[str] = set()
    views: dict[str, list[str]] = {}
    for migration in MIGRATIONS[version:]:
        for name, columns in migration.tables:
            db.execute(f"CREATE TEMP TABLE {name} {columns}")
            made.add(name)
        for row in migration.rows:
            db.execute(row)
        for c in migration.columns:
            if c.table in made:
                db.execute(_add_column(c, "temp."))
            else:
                views.setdefault(c.table, []).append(f"{c.default} AS {c.name}")
    for table, added in views.items():
        db.execute(f"CREATE TEMP VIEW {table} AS SELECT *, {', '.join(added)} FROM main.{table}")


def forget_older(db: sqlite3.Connection, version: int) -> None:
    """Undo `read_as_new`, for the file to be upgraded."""
    made = {name for migration in MIGRATIONS[version:] for name, _ in migration.tables}
    for table in {c.table for migration in MIGRATIONS[version:] for c in migration.columns} - made:
        db.execute(f"DROP VIEW temp.{table}")
    for table in made:
        db.execute(f"DROP TABLE temp.{table}")
