"""The database and the owner's key to it: opening, sealing, transactions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, func, insert, inspect, select

from flep_fl.contracts.errors import DatabaseError
from flep_fl.private_database import schema
from flep_fl.private_database.checks import check_key
from flep_fl.private_database.clock import OwnerClock
from flep_fl.private_database.engine import Database, Location, create_file, database_url
from flep_fl.private_database.migrate import upgrade
from flep_fl.private_database.sealing import (
    KEY_BYTES,
    Unsealable,
    blind_index,
    index_key,
    padded,
    seal,
    unseal,
    wrapping_key,
)

_DESCRIPTION_BYTES = 1024  # sealed descriptions are padded to a multiple of this
_SALT = select(schema.meta.c.salt)


class Vault:
    """An open private database of which nothing is known but that its owner's key fits.

    Parameters
    ----------
    location
        The SQLite file (WAL files beside it), or the URL of a PostgreSQL database.
    owner_key
        32 random bytes that stay with the owner.
    read_only
        Open a file that nobody writes (a backup) and leave it as it is.

    Raises
    ------
    DatabaseError
        It is missing, no such database, of another owner key, or written by a newer release.
    """

    def __init__(self, location: Location, owner_key: bytes, *, read_only: bool = False) -> None:
        check_key(owner_key)
        self.database = _existing(location, read_only=read_only)
        try:
            upgrade(self.database, owner_key)
            with self.database.read() as connection:
                row = connection.execute(select(schema.meta.c.salt, schema.meta.c.sealed)).one_or_none()
            if row is None:
                raise DatabaseError(f"the private database has no head: {self.database.name}")
            self._salt: bytes = row.salt
            self._key = wrapping_key(owner_key, self._salt)
            self._index_key = index_key(self._key)
            unseal(self._key, row.sealed, what="description", place="meta")
        except Unsealable as exc:
            self.database.close()
            raise DatabaseError(
                "the private database belongs to another owner key, or its head is corrupt: "
                + self.database.name,
                remedy="Use the key that it was created with",
            ) from exc
        except DatabaseError:
            self.database.close()
            raise
        self.clock = OwnerClock(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.database.name!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self.database.path

    def close(self) -> None:
        """Close all connections; SQLite then merges and removes its WAL files."""
        self.database.close()

    def seal(self, plain: bytes, *, what: str, place: str) -> bytes:
        """Seal a few bytes under the database's own key, bound to ``what`` and ``place``."""
        return seal(self._key, plain, what=what, place=place)

    def unseal(self, sealed: bytes, *, what: str, place: str) -> bytes:
        """Undo :meth:`seal`; raise :class:`DatabaseError` when the blob does not fit."""
        try:
            return unseal(self._key, sealed, what=what, place=place)
        except Unsealable as exc:
            self.require_same_key()
            raise DatabaseError(
                f"a sealed {what} of the private database is corrupt: {self.database.name}"
            ) from exc

    def blind_index(self, what: str, *parts: str) -> bytes:
        """Return the keyed hash by which a row is found."""
        return blind_index(self._index_key, what, *parts)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a write transaction; refused when the owner's key was changed by somebody else meanwhile."""
        with self.database.write() as connection:
            self.require_same_key(connection)
            yield connection

    def require_same_key(self, connection: Connection | None = None) -> None:
        """Raise :class:`DatabaseError` when the owner's key was changed since this database was opened."""
        if connection is None:
            with self.database.read() as reader:
                self.require_same_key(reader)
            return
        if connection.execute(_SALT).scalar() != self._salt:
            raise DatabaseError(
                f"the owner's key to the private database was changed: {self.database.name}",
                remedy="Start again with the new key",
            )

    def adopt_key(self, key: bytes, salt: bytes) -> None:
        """Go on under a new wrapping key, after a rotation by this very object."""
        self._key, self._salt, self._index_key = key, salt, index_key(key)

    def seal_json(self, content: Mapping[str, Any], *, what: str, place: str) -> bytes:
        """Seal a small mapping, padded so that the length says little."""
        plain = padded(json.dumps(content).encode(), _DESCRIPTION_BYTES)
        return self.seal(plain, what=what, place=place)


def make_tables(location: Location, owner_key: bytes | None) -> None:
    """Make an empty database's tables, and its head where a key is given.

    Raises
    ------
    DatabaseError
        There is something already.
    """
    url = database_url(location)
    if url.get_backend_name() == "sqlite":
        create_file(Path(str(url.database)))
    database = Database(location)
    try:
        with database.read() as connection:
            taken = inspect(connection).get_table_names()
        if taken:
            raise DatabaseError(
                f"the database is not empty: {database.name}",
                found=f"the table {taken[0]}",
                remedy="Choose another one",
            )
        upgrade(database, fresh=True)
        if owner_key is None:
            return
        salt = secrets.token_bytes(KEY_BYTES)
        plain = padded(json.dumps({"format": schema.FORMAT_VERSION}).encode(), _DESCRIPTION_BYTES)
        sealed = seal(wrapping_key(owner_key, salt), plain, what="description", place="meta")
        row = {"id": 1, "version": schema.FORMAT_VERSION, "salt": salt, "sealed": sealed}
        with database.write() as connection:
            connection.execute(insert(schema.meta), row)
    finally:
        database.close()


def is_blank(database: Database) -> bool:
    """Say whether a database has this release's tables and not a single row in them."""
    with database.read() as connection:
        names = set(inspect(connection).get_table_names())
        tables = schema.metadata.sorted_tables
        return {table.name for table in tables} <= names and all(
            connection.execute(select(func.count()).select_from(table)).scalar() == 0 for table in tables
        )


def _existing(location: Location, *, read_only: bool) -> Database:
    database = Database(location, read_only=read_only)
    if database.is_sqlite:
        if not database.path.is_file():
            raise DatabaseError(
                f"the private database does not exist: {database.path}", remedy="Create it first"
            )
        if not read_only:
            database.path.chmod(0o600)
    return database
