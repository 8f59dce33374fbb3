"""The SQLite file that runs are kept in: opened, read where it cannot be written, and upgraded.

Several processes may write, and read, at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import FqError
from . import migrations

if TYPE_CHECKING:
    from typing_extensions import Self

BUSY_SECONDS = 60.0

# Version, number of tables, and of what no store has and what may take any time and memory to read, to check
# or to write.
_WHAT_IT_IS = """
SELECT user_version,
    (SELECT COUNT(*) FROM sqlite_master),
    (SELECT COUNT(*) FROM sqlite_master
        WHERE type NOT IN ('table', 'index') OR (type = 'index' AND sql IS NOT NULL)
            OR sql LIKE '%VIRTUAL%' OR sql LIKE '%CHECK%')
    + (SELECT COUNT(*) FROM sqlite_master AS t, pragma_table_xinfo(t.name) WHERE t.type = 'table' AND hidden)
FROM pragma_user_version
"""


class StoreFile:
    """Made if it is not there unless ``must_exist``; a context manager that closes it.

    Raises FqError naming the file when it cannot be opened or is something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, must_exist: bool = False) -> None:
        self.path = os.fspath(path)
        if must_exist and not os.path.exists(self.path):
            raise FqError(f"{self.path}: there is no such file; fq sweep --store makes one")
        with self._errors():
            try:
                self._open(self.path)
            except sqlite3.OperationalError as e:
                if not must_exist or not re.search("readonly|unable to open", str(e)):
                    raise
                self._open_to_read()

    def _open(self, name: str, *, uri: bool = False, writes: bool = True) -> None:
        self._db = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None, uri=uri)
        try:
            # at one moment: another process may be making it
            version, tables, strange = self._db.execute(_WHAT_IT_IS).fetchone()
            if not 0 <= version <= migrations.VERSION or (version == 0 and tables) or strange:
                raise FqError(f"{self.path}: not a store of this version of fq")
            self._version = version or migrations.VERSION
            if writes:
                self._write_ahead()
            if version == 0 and writes:
                with self._transaction():
                    if self._user_version() == 0:  # of several processes one makes it
                        migrations.upgrade(self._db, 0)
            elif 0 < version < migrations.VERSION:
                migrations.read_as_new(self._db, version)
        except BaseException:
            self._db.close()
            raise

    def _open_to_read(self) -> None:
        """Where the file or its folder cannot be written, so that SQLite cannot make what goes with a log."""
        path = os.path.realpath(self.path)
        name = f"file:{urllib.parse.quote(path)}?mode=ro"
        try:
            self._open(name, uri=True, writes=False)
        except sqlite3.OperationalError as e:
            with contextlib.suppress(OSError):
                if os.path.getsize(f"{path}-wal"):
                    raise FqError(
                        f"{self.path}: {e}: the newest rows are in {path}-wal, which can be read only where "
                        "it can be written; copy both files to such a folder"
                    ) from None
            # nobody can be writing it: they would have a log there
            self._open(f"{name}&immutable=1", uri=True, writes=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def _write_ahead(self) -> None:
        """SQLite does not wait for other processes when it changes the journal; this does."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        if mode != "wal":  # SQLite says so, and goes on without
            raise FqError(
                f"{self.path}: this file system has no write-ahead log (the journal is {mode!r}), without "
                "which several processes would wait for each other"
            )

    @contextlib.contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """A ValueError in the block is what the file holds: an FqError naming it and the run."""
        try:
            yield
        except ValueError as e:
            raise FqError(f"{self.path}: run {number} cannot be read: {e}") from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise FqError(f"{self.path}: {e}") from None
        except UnicodeDecodeError:  # of a name, or of what SQLite says of it
            raise FqError(f"{self.path}: it has text that is not UTF-8") from None

    def _user_version(self) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        return int(version)

    def _upgrade(self) -> None:
        """Of a file of an earlier version, before something is written to it; a copy of it stays.

        At one moment for all processes, and whole or not at all.
        """
        if self._version == migrations.VERSION:
            return
        with self._transaction():
            version = self._user_version()
            # where nothing can be written this says so, before there is a copy
            self._db.execute(f"PRAGMA user_version = {version}")
            if version < migrations.VERSION:
                self._back_up(version)
            migrations.forget_older(self._db, self._version)
            if version < migrations.VERSION:
                migrations.upgrade(self._db, version)
        self._version = migrations.VERSION

    def _back_up(self, version: int) -> None:
        """A copy beside the file, whole or not at all; one that is there is left alone."""
        backup = f"{os.path.realpath(self.path)}.version-{version}"
        if os.path.lexists(backup):
            return
        part = f"{backup}.part"
        try:
            # whoever holds the lock to write cannot read for a copy; with a log, another connection can
            with contextlib.closing(sqlite3.connect(self.path)) as source:
                with contextlib.closing(sqlite3.connect(part)) as copy:
                    source.backup(copy)
            os.replace(part, backup)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """All of what is written in the block is committed, or nothing of it."""
        self._upgrade()
        with self._transaction():
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of what is done in the block, or nothing."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
