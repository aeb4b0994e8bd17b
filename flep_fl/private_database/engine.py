"""Connections: SQLite by default, PostgreSQL by one setting; errors by name."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from flep_fl.contracts.errors import ConfigError, DatabaseError, DiskFullError, MissingExtraError

Location = Path | str
"""A SQLite file, or a URL such as ``postgresql+psycopg://owner@localhost/private``."""

_BUSY_SECONDS = 60
_WRITE_LOCK = 0x666C6570  # PostgreSQL's advisory lock: one writing transaction at a time, as in SQLite
_PAGE_BYTES = 16384  # images are large
_CHECKPOINT_PAGES = 2048  # 32 MB: large images would otherwise force a checkpoint every few commits
_WRITE_FAILURES = {"SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_TRUNCATE", "SQLITE_FULL"}
_PG_FULL = {"53100", "58030"}  # disk_full, io_error


class Database:
    """An engine, its transactions, and nothing of what the tables mean.

    Parameters
    ----------
    location
        SQLite file or database URL.
    read_only
        Open a SQLite file that nobody writes (a backup) and leave it as it is.

    Raises
    ------
    ConfigError
        The URL is none of the two kinds.
    MissingExtraError
        The driver is not installed.
    """

    def __init__(self, location: Location, *, read_only: bool = False) -> None:
        self.url = database_url(location)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.name = str(self.url.database) if self.is_sqlite else self.url.render_as_string()
        self._lock = threading.RLock()
        self._mine = threading.local()
        # hide_parameters: an SQL error must not carry row contents into a log.
        options: dict[str, Any] = {"hide_parameters": True, "pool_pre_ping": not self.is_sqlite}
        if self.is_sqlite:
            options["connect_args"] = {"timeout": _BUSY_SECONDS}
        url = self.url
        if read_only:
            query = {"mode": "ro", "immutable": "1", "uri": "true"}
            url = url.set(database=Path(self.name).resolve().as_uri(), query=query)
        try:
            self.engine: Engine = create_engine(url, pool_size=16, max_overflow=32, **options)
        except (ImportError, NoSuchModuleError) as exc:
            raise MissingExtraError(
                f"the database {self.name} needs a driver that is not installed",
                remedy="Run: pip install -e '.[postgres]' and use postgresql+psycopg://",
            ) from exc
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_reader if read_only else _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._writer = self.engine.execution_options(flep_write=True)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return Path(str(self.url.database))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a read transaction: one consistent view."""
        with named_errors(self.name), self.engine.connect() as connection:
            if self.is_sqlite:
                yield connection
            else:
                yield connection.execution_options(isolation_level="REPEATABLE READ")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a write transaction, one at a time: committed at the end, rolled back on any error."""
        with named_errors(self.name), self._lock, self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})"))
            self._mine.writing = True
            try:
                yield connection
            finally:
                self._mine.writing = False

    @property
    def writing(self) -> bool:
        """Whether this thread is inside a write transaction; a second one would wait for the first."""
        return getattr(self._mine, "writing", False)

    def truncate_log(self) -> bool:
        """Merge SQLite's write-ahead log and cut it to nothing; False while a reader keeps it in use."""
        if not self.is_sqlite:
            return True
        with named_errors(self.name), self._lock:
            raw = self.engine.raw_connection()
            try:
                busy = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                raw.close()
        return not busy

    def vacuum_keys(self) -> None:
        """Have PostgreSQL rewrite the small tables, so that dead rows leave its files; SQLite overwrites."""
        if self.is_sqlite:
            return
        with named_errors(self.name), self._lock, self.engine.connect() as connection:
            outside = connection.execution_options(isolation_level="AUTOCOMMIT")
            outside.execute(text("VACUUM (FULL) records"))
            outside.execute(text("VACUUM (FULL) devices"))
            outside.execute(text("VACUUM images"))
            outside.execute(text("VACUUM released"))

    def close(self) -> None:
        """Close all connections; SQLite then merges and removes its WAL files."""
        self.engine.dispose()


def database_url(location: Location) -> URL:
    """Turn a path or a URL into a URL; raise :class:`ConfigError` for other kinds of databases."""
    if isinstance(location, Path):
        return URL.create("sqlite", database=str(location))
    if "://" not in location:
        return URL.create("sqlite", database=location)
    try:
        url = make_url(location)
    except ArgumentError as exc:
        raise ConfigError("the database's URL cannot be read", remedy=_KINDS) from exc
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql") or not url.database:
        raise ConfigError("the database is of an unknown kind", found=url.drivername, remedy=_KINDS)
    return url


_KINDS = "Name a file, or postgresql+psycopg://USER@HOST:PORT/NAME"


def create_file(path: Path) -> None:
    """Make an empty file, 0600, that does not exist yet; SQLite gives its WAL files the same permissions.

    Raises
    ------
    DatabaseError
        It exists, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as exc:
        raise DatabaseError(
            f"the private database cannot be created: {path} ({exc.strerror})",
            remedy="Choose another path or remove the old file",
        ) from exc


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Transactions are begun below: the driver's own would start too late for a consistent read.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"page_size={_PAGE_BYTES}",  # heeded by a new file alone
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
        f"wal_autocheckpoint={_CHECKPOINT_PAGES}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _prepare_reader(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE: a writer that read first would fail when another process wrote in between.
    writes = connection.get_execution_options().get("flep_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turn the database's errors into named ones; the server's text may quote values and stays inside."""
    try:
        yield
    except SQLAlchemyError as exc:
        origin = getattr(exc, "orig", None)
        if _is_full(origin):
            raise DiskFullError(
                f"the private database cannot be written: {name}",
                expected="room on its disk",
                remedy="Free or add space, then send again what was not acknowledged",
            ) from exc
        raise DatabaseError(
            f"the private database cannot be used: {name} ({type(exc).__name__})",
            remedy="Check that it is a private database of this release, undamaged, reachable and writable",
        ) from exc


def _is_full(origin: object) -> bool:
    if isinstance(origin, sqlite3.Error):
        return getattr(origin, "sqlite_errorname", "") in _WRITE_FAILURES
    return getattr(origin, "sqlstate", None) in _PG_FULL
