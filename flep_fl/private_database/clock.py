"""The owner's clock as far as it can be trusted: it never runs backwards, and it does not jump unnoticed.

What ends at a time (a grant) is judged by the latest time that this database has ever seen, so that a clock
that is set back does not bring an ended grant back. What destroys by age (retention) is refused when the
clock has jumped ahead. The order of records comes from row numbers, never from a clock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Protocol

from sqlalchemy import Connection, select, update

from flep_fl.contracts.errors import ClockError
from flep_fl.private_database import schema
from flep_fl.private_database.engine import Database
from flep_fl.private_database.sealing import padded

WRITE_EVERY = 60.0
"""Seconds between two writes of the latest time: a crash forgets no more."""

MAX_LEAP = 7 * 86400.0
"""A database that nobody touched for longer is asked about before anything is destroyed by age."""


class SealedDatabase(Protocol):
    """What the clock needs of the database."""

    @property
    def database(self) -> Database:
        """The engine."""
        ...

    def seal(self, plain: bytes, *, what: str, place: str) -> bytes:
        """Seal under the database's key."""
        ...

    def unseal(self, sealed: bytes, *, what: str, place: str) -> bytes:
        """Undo :meth:`seal`."""
        ...


class OwnerClock:
    """The latest time that a private database has seen.

    Parameters
    ----------
    owner
        The database.
    wall
        The system's clock, seconds since 1970; replaced in tests.
    """

    def __init__(self, owner: SealedDatabase, wall: Callable[[], float] = time.time) -> None:
        self._owner, self._wall = owner, wall
        self._lock = threading.Lock()
        self._latest: float | None = None
        self._written = float("-inf")

    def now(self) -> float:
        """Return the time, never less than ever before; seconds since 1970."""
        with self._lock:
            if self._latest is None:
                self._latest = self._written = self._stored()
            self._latest = max(self._latest, self._wall())
            late = self._latest - self._written > WRITE_EVERY and not self._owner.database.writing
            if late:
                self._written = self._latest
            latest = self._latest
        if late:
            with self._owner.database.write() as connection:
                self._store(connection, max(latest, self._read(connection)))
        return latest

    def wall(self) -> float:
        """Return what the system's clock shows, whatever was seen before."""
        return self._wall()

    def require_steady(self) -> float:
        """Return the wall clock's time unless it lies far from the latest time that was seen.

        Raises
        ------
        ClockError
            It lies more than :data:`MAX_LEAP` ahead, or more than a minute behind.
        """
        latest, wall = self._stored(), self._wall()
        if latest != float("-inf") and not -WRITE_EVERY <= wall - latest <= MAX_LEAP:
            raise ClockError(
                "the owner's clock is far from the latest time that this database has seen",
                expected=f"within {MAX_LEAP / 86400:.0f} days after {_iso(latest)}",
                found=_iso(wall),
                remedy="Set the clock, or accept its time: python -m scripts.owner action=accept_clock",
            )
        return wall

    def accept(self) -> None:
        """Take the wall clock's time as the latest, backwards as well: the owner has looked at it."""
        with self._lock, self._owner.database.write() as connection:
            self._latest = self._written = self._wall()
            self._store(connection, self._latest)

    def _stored(self) -> float:
        with self._owner.database.read() as connection:
            return self._read(connection)

    def _read(self, connection: Connection) -> float:
        sealed = connection.execute(select(schema.meta.c.sealed_clock)).scalar_one()
        if sealed is None:
            return float("-inf")
        return float(json.loads(self._owner.unseal(sealed, what="clock", place="meta")))

    def _store(self, connection: Connection, value: float) -> None:
        sealed = self._owner.seal(padded(json.dumps(value).encode(), 64), what="clock", place="meta")
        connection.execute(update(schema.meta).values(sealed_clock=sealed))


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
