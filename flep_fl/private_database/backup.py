"""Backup and restore: one SQLite file, sealed like the database, with a proof of its content.

A backup is made while the database is in use. It needs the owner's key to be restored, like the database
itself, and it moves a database between SQLite and PostgreSQL. Deletion and retention do not reach backups:
whoever must be able to destroy a record for good keeps backups no longer than the record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Boolean, Column, Connection, LargeBinary, MetaData, Table, func, insert, select

from flep_fl.contracts.errors import BackupError, DatabaseError, RecordError
from flep_fl.contracts.files import sync_path
from flep_fl.private_database import schema
from flep_fl.private_database.engine import Database, Location, create_file, database_url
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.private_database.vault import is_blank, make_tables

_PROOF = Table("backup_proof", MetaData(), Column("sealed", LargeBinary, nullable=False))
_CHUNK = 100
_TABLES = tuple(schema.metadata.sorted_tables)  # parents before children


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup holds.

    Attributes
    ----------
    records
        Number of records.
    digest
        SHA-256 over all rows of all tables, 64 hex digits.
    corrupt
        Identifiers of records that do not open.
    """

    records: int
    digest: str
    corrupt: tuple[str, ...]


def backup(database: OwnerDatabase, owner_key: bytes, target: Path) -> BackupReport:
    """Write a backup and verify it; the file appears whole or not at all.

    Parameters
    ----------
    database
        The database; it may be in use.
    owner_key
        Its key, to verify the copy.
    target
        A file that does not exist yet.

    Raises
    ------
    BackupError
        The file exists, cannot be written, or does not verify.
    """
    for taken in _with_logs(target):
        if taken.exists():
            raise BackupError(f"the backup exists already: {taken}", remedy="Choose another name")
    part = target.with_name(f".{target.name}.part")
    _remove(part)
    try:
        create_file(part)
        if database.database.is_sqlite:
            _copy_file(database.database, part)
        else:
            _copy_rows(database.database, part)
        _prove(database, part)
        report = verify_backup(part, owner_key)
        sync_path(part)
        part.replace(target)
        sync_path(target.parent)
    except (OSError, sqlite3.Error) as exc:
        raise BackupError(f"the backup cannot be written: {target} ({exc})") from exc
    finally:
        _remove(part)
    return report


def verify_backup(path: Path, owner_key: bytes) -> BackupReport:
    """Check a backup against its proof, and open every record of it; the file is not changed.

    Raises
    ------
    BackupError
        It is damaged, incomplete, or no backup.
    DatabaseError
        It belongs to another owner key or a newer release.
    """
    if path.with_name(path.name + "-wal").exists():
        raise BackupError(f"the backup is in use as a database: {path}", remedy="Restore it first")
    with OwnerDatabase(path, owner_key, read_only=True) as copy:
        with copy.database.read() as connection:
            try:
                sealed = connection.execute(select(_PROOF.c.sealed)).scalar_one()
            except Exception as exc:
                raise BackupError(f"this is not a backup, or it is damaged: {path}") from exc
            proof = json.loads(copy.unseal(sealed, what="backup", place="proof"))
            found = _digest(connection)
            if found != proof["digest"]:
                raise BackupError(
                    f"the backup was altered or is incomplete: {path}", remedy="Use another backup"
                )
            records = connection.execute(select(func.count()).select_from(schema.records)).scalar() or 0
        corrupt: list[str] = []

        def note(error: RecordError) -> None:
            corrupt.append(str(error.problem))

        for _record in copy.records(on_corrupt=note):
            pass
    return BackupReport(records, found, tuple(corrupt))


def restore(path: Path, location: Location, owner_key: bytes) -> BackupReport:
    """Verify a backup and make a database of it.

    Parameters
    ----------
    path
        The backup.
    location
        A file that does not exist yet, or the URL of an empty PostgreSQL database.
    owner_key
        The owner's key at the time of the backup.

    Raises
    ------
    BackupError, DatabaseError
        The backup does not verify, or there is something already; nothing was made.
    """
    url = database_url(location)
    if url.get_backend_name() == "sqlite":
        _require_free(Path(str(url.database)))
    report = verify_backup(path, owner_key)
    if url.get_backend_name() == "sqlite":
        _restore_file(path, Path(str(url.database)))
    else:
        _restore_rows(path, location)
    with OwnerDatabase(location, owner_key) as restored, restored.database.read() as connection:
        found = _digest(connection)
    if found != report.digest:
        raise BackupError("the restored database differs from the backup", remedy="Restore it once more")
    return report


def _copy_file(database: Database, part: Path) -> None:
    raw = database.engine.raw_connection()
    target = sqlite3.connect(part)
    try:
        source: Any = raw.driver_connection
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")
    finally:
        target.close()
        raw.close()


def _copy_rows(database: Database, part: Path) -> None:
    part.unlink()
    make_tables(part, None)
    target = Database(part)
    try:
        with database.read() as source, target.write() as sink:
            _transfer(source, sink)
    finally:
        target.close()
    with sqlite3.connect(part) as raw:
        raw.execute("PRAGMA journal_mode=DELETE")
    raw.close()


def _prove(database: OwnerDatabase, part: Path) -> None:
    copy = Database(part, read_only=True)
    try:
        with copy.read() as connection:
            proof = json.dumps({"digest": _digest(connection)}).encode()
    finally:
        copy.close()
    sealed = database.seal(proof, what="backup", place="proof")
    with sqlite3.connect(part) as raw:
        raw.execute("CREATE TABLE backup_proof (sealed BLOB NOT NULL)")
        raw.execute("INSERT INTO backup_proof VALUES (?)", (sealed,))
    raw.close()


def _with_logs(path: Path) -> list[Path]:
    """Return a SQLite file's path and those of the logs that SQLite keeps beside it."""
    return [path.with_name(path.name + ending) for ending in ("", "-wal", "-shm", "-journal")]


def _remove(path: Path) -> None:
    for file in _with_logs(path):
        file.unlink(missing_ok=True)


def _require_free(target: Path) -> None:
    """Refuse a place where something lies; the log of a former database would be played into the new one."""
    for found in _with_logs(target):
        if found.exists():
            raise DatabaseError(
                f"the private database cannot be created: {found} exists",
                remedy="Choose another path or move the old files away",
            )


def _restore_file(path: Path, target: Path) -> None:
    """Copy a backup; a process that is killed leaves the whole database or none, and can be repeated."""
    part = target.with_name(f".{target.name}.part")
    try:
        _remove(part)  # with the journal that a killed restore left: SQLite would roll it back into this copy
        create_file(part)
        shutil.copyfile(path, part)
        with sqlite3.connect(part) as raw:
            raw.execute("DROP TABLE backup_proof")
        raw.close()
        sync_path(part)
        _require_free(target)
        target.hardlink_to(part)  # unlike a rename it takes nobody's place
        part.unlink()
        sync_path(target.parent)
    except (OSError, sqlite3.Error) as exc:
        raise BackupError(f"the backup cannot be restored to {target} ({exc})") from exc
    finally:
        _remove(part)


def _restore_rows(path: Path, location: Location) -> None:
    target = Database(location)
    try:
        blank = is_blank(target)
    finally:
        target.close()
    if not blank:  # tables without a row: a restore was interrupted after it had made them
        make_tables(location, None)
    copy, target = Database(path, read_only=True), Database(location)
    try:
        with copy.read() as source, target.write() as sink:
            _transfer(source, sink)
            for table in _TABLES:
                column = table.autoincrement_column
                if column is None:
                    continue
                counter = func.pg_get_serial_sequence(table.name, column.name)
                if sink.execute(select(counter)).scalar():
                    last = select(func.coalesce(func.max(column), 0) + 1).scalar_subquery()
                    sink.execute(select(func.setval(counter, last, False)))
    finally:
        copy.close()
        target.close()


def _transfer(source: Connection, sink: Connection) -> None:
    for table in _TABLES:
        batch: list[dict[str, Any]] = []
        for row in _rows(source, table):
            batch.append(dict(row._mapping))
            if len(batch) == _CHUNK:
                sink.execute(insert(table), batch)
                batch = []
        if batch:
            sink.execute(insert(table), batch)


def _digest(connection: Connection) -> str:
    """Hash all rows of all tables in the order of their keys; lengths first, so that nothing can shift."""
    digest = hashlib.sha256()
    for table in _TABLES:
        digest.update(f"table {table.name}\n".encode())
        for row in _rows(connection, table):
            for column, value in zip(table.columns, row, strict=True):
                data = _bytes_of(bool(value) if isinstance(column.type, Boolean) else value)
                digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _rows(connection: Connection, table: Table) -> Iterator[Any]:
    stream = connection.execution_options(stream_results=True, max_row_buffer=_CHUNK)
    with stream.execute(select(table).order_by(*table.primary_key.columns)) as rows:
        yield from rows


def _bytes_of(value: object) -> bytes:
    if value is None:
        return b"\x00"
    if isinstance(value, bytes):
        return b"\x01" + value
    return b"\x02" + repr(value).encode()
