"""A new owner's key: data keys and small sealed columns are sealed anew, no image is touched."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, bindparam, select, tuple_, update

from flep_fl.contracts.errors import DatabaseError, RecordError
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.private_database import schema
from flep_fl.private_database.checks import check_key
from flep_fl.private_database.engine import Location
from flep_fl.private_database.sealing import KEY_BYTES, blind_index, index_key, seal, wrapping_key
from flep_fl.private_database.store import OwnerDatabase

_CHUNK = 500
_NEXT = ".next"


def rotate_owner_key(database: OwnerDatabase, new_key: bytes) -> list[str]:
    """Change the owner's key, in one transaction: after a crash the old key fits or the new one.

    Every data key is wrapped anew; data-set descriptions, key bundles, grants, logs and lookup hashes are
    sealed anew. Pixels and cached releases stay as they are, under their data keys: whoever copied both file
    and old key before still reads what was in that copy.

    Parameters
    ----------
    database
        The open database; it goes on under the new key. Other processes that have it open are refused at
        their next write.
    new_key
        32 random bytes.

    Returns
    -------
    list of str
        Identifiers of records that did not open before and do not open now.

    Raises
    ------
    DatabaseError
        Something besides single records is corrupt; nothing was changed.
    """
    check_key(new_key)
    salt = secrets.token_bytes(KEY_BYTES)
    key = wrapping_key(new_key, salt)
    with database.write() as connection:
        broken = _records(database, connection, key)
        _datasets(database, connection, key)
        _devices(database, connection, key)
        _grants(database, connection, key)
        _entries(database, connection, key)
        _simple(database, connection, key)
        row = connection.execute(select(schema.meta)).one()
        plain = database.unseal(row.sealed, what="description", place="meta")
        values: dict[str, Any] = {
            "salt": salt,
            "sealed": seal(key, plain, what="description", place="meta"),
        }
        if row.sealed_clock is not None:
            time = database.unseal(row.sealed_clock, what="clock", place="meta")
            values["sealed_clock"] = seal(key, time, what="clock", place="meta")
        connection.execute(update(schema.meta).values(**values))
    database.adopt_key(key, salt)
    database.erase_traces()
    return broken


def open_with_key_file(location: Location, key_file: Path) -> OwnerDatabase:
    """Open a database with the owner's key file, and end a rotation that was interrupted.

    Raises
    ------
    DatabaseError
        The key cannot be read, or does not fit.
    """
    coming = key_file.with_name(key_file.name + _NEXT)
    try:
        database = OwnerDatabase(location, _read_key(key_file))
    except DatabaseError:
        if not coming.is_file():
            raise
        database = OwnerDatabase(location, _read_key(coming))
        _take_over(coming, key_file)
        return database
    with _locked(key_file, wait=False) as alone:
        # Another process may be changing the key just now: its new key is no leftover.
        if alone:
            coming.unlink(missing_ok=True)
    return database


def rotate_key_file(location: Location, key_file: Path) -> list[str]:
    """Change the owner's key and its file; a crash at any moment leaves a file with the key that fits.

    Returns
    -------
    list of str
        As :func:`rotate_owner_key`.
    """
    new_key = secrets.token_bytes(KEY_BYTES)
    coming = key_file.with_name(key_file.name + _NEXT)
    with open_with_key_file(location, key_file) as database, _locked(key_file, wait=True):
        write_secret(coming, new_key)
        broken = rotate_owner_key(database, new_key)
        _take_over(coming, key_file)
    return broken


def _take_over(coming: Path, key_file: Path) -> None:
    """Put the new key in the old one's place; who opens the database at the same moment does it, too."""
    try:
        coming.replace(key_file)
    except FileNotFoundError:
        if not key_file.is_file():  # pragma: no cover - somebody removes keys by hand
            raise


@contextmanager
def _locked(key_file: Path, *, wait: bool) -> Iterator[bool]:
    """Lock the key file; says whether that worked. The lock is gone when the process is."""
    descriptor = os.open(key_file, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _read_key(path: Path) -> bytes:
    return read_bytes(path, what="the owner's key", error=DatabaseError)


def _records(database: OwnerDatabase, connection: Connection, key: bytes) -> list[str]:
    table = schema.records
    columns = (table.c.seq, table.c.record_id, table.c.wrapped_key, table.c.sealed_tags)
    broken: list[str] = []
    subkey = index_key(key)
    for rows in _chunks(connection, table, columns):
        changed = []
        for row in rows:
            try:
                data_key, tags = database.open_tags(row.record_id, row.wrapped_key, row.sealed_tags)
            except RecordError:
                broken.append(row.record_id)
                continue
            origin = request = None
            if tags.sequence >= 0:
                origin = blind_index(subkey, "origin", tags.device, str(tags.sequence))
            if tags.idempotency_key is not None:
                request = blind_index(subkey, "request", tags.device, tags.idempotency_key)
            wrapped = seal(key, data_key, what="key", place=row.record_id)
            changed.append({"row": row.seq, "wrapped_key": wrapped, "origin": origin, "request": request})
        _update(connection, table, changed)
    return broken


def _datasets(database: OwnerDatabase, connection: Connection, key: bytes) -> None:
    table = schema.datasets
    for row in connection.execute(select(table)).all():
        plain = database.unseal(row.sealed, what="dataset", place=row.name_index.hex())
        index = blind_index(index_key(key), "dataset", json.loads(plain)["name"])
        sealed = seal(key, plain, what="dataset", place=index.hex())
        _update(connection, table, [{"row": row.id, "name_index": index, "sealed": sealed}])


def _devices(database: OwnerDatabase, connection: Connection, key: bytes) -> None:
    table = schema.devices
    for row in connection.execute(select(table)).all():
        plain = database.unseal(row.sealed, what="device", place=row.device_index.hex())
        index = blind_index(index_key(key), "device", json.loads(plain)["device"])
        sealed = seal(key, plain, what="device", place=index.hex())
        _update(connection, table, [{"row": row.device_index, "device_index": index, "sealed": sealed}])


def _grants(database: OwnerDatabase, connection: Connection, key: bytes) -> None:
    table = schema.grants
    for row in connection.execute(select(table)).all():
        plain = database.unseal(row.sealed, what="grant", place=row.grant_id)
        index = blind_index(index_key(key), "analyst", json.loads(plain)["verify_key"])
        sealed = seal(key, plain, what="grant", place=row.grant_id)
        _update(connection, table, [{"row": row.id, "analyst_index": index, "sealed": sealed}])


def _entries(database: OwnerDatabase, connection: Connection, key: bytes) -> None:
    table, records = schema.released, schema.records
    where = (table.c.dataset_id, table.c.epoch, table.c.position)
    last: tuple[int, int, int] = (-1, -1, -1)
    while True:
        rows = connection.execute(
            select(*where, table.c.sealed_entry, records.c.record_id)
            .join_from(table, records, records.c.seq == table.c.seq)
            .where(tuple_(*where) > last)
            .order_by(*where)
            .limit(_CHUNK)
        ).all()
        changed = []
        for row in rows:
            place = f"{row.record_id}/{row.epoch}"
            plain = database.unseal(row.sealed_entry, what="entry", place=place)
            sealed = seal(key, plain, what="entry", place=place)
            changed.append({"a": row.dataset_id, "b": row.epoch, "c": row.position, "sealed_entry": sealed})
        if changed:
            connection.execute(
                update(table).where(
                    table.c.dataset_id == bindparam("a"),
                    table.c.epoch == bindparam("b"),
                    table.c.position == bindparam("c"),
                ),
                changed,
            )
        if len(rows) < _CHUNK:
            return
        last = (rows[-1].dataset_id, rows[-1].epoch, rows[-1].position)


def _simple(database: OwnerDatabase, connection: Connection, key: bytes) -> None:
    """Seal anew what is bound to a place that does not change."""
    for row in connection.execute(select(schema.epochs)).all():
        place = f"{row.dataset_id}/{row.epoch}"
        plain = database.unseal(row.sealed_bundle, what="bundle", place=place)
        connection.execute(
            update(schema.epochs)
            .where(schema.epochs.c.dataset_id == row.dataset_id, schema.epochs.c.epoch == row.epoch)
            .values(sealed_bundle=seal(key, plain, what="bundle", place=place))
        )
    for row in connection.execute(
        select(schema.snapshots.c.id, schema.snapshots.c.release_id, schema.snapshots.c.sealed_head)
    ).all():
        plain = database.unseal(row.sealed_head, what="snapshot", place=row.release_id)
        sealed = seal(key, plain, what="snapshot", place=row.release_id)
        _update(connection, schema.snapshots, [{"row": row.id, "sealed_head": sealed}])
    table = schema.access_log
    for rows in _chunks(connection, table, (table.c.id, table.c.sealed)):
        changed = []
        for row in rows:
            plain = database.unseal(row.sealed, what="access", place="log")
            changed.append({"row": row.id, "sealed": seal(key, plain, what="access", place="log")})
        _update(connection, table, changed)


def _chunks(connection: Connection, table: Table, columns: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Read a table by its integer key (the first of ``columns``), a few hundred rows at a time."""
    last = -1
    while True:
        query = select(*columns).where(columns[0] > last).order_by(columns[0]).limit(_CHUNK)
        rows = list(connection.execute(query).all())
        if rows:
            yield rows
        if len(rows) < _CHUNK:
            return
        last = rows[-1][0]


def _update(connection: Connection, table: Table, changed: list[dict[str, Any]]) -> None:
    (key,) = table.primary_key.columns
    if changed:
        connection.execute(update(table).where(key == bindparam("row")), changed)
