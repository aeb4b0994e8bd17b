"""The access log: which records left for which site, under which key epoch, and when; sealed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select

from flep_fl.contracts.errors import DatabaseError
from flep_fl.private_database import schema
from flep_fl.private_database.sealing import padded
from flep_fl.private_database.store import OwnerDatabase

MAX_SITE_BYTES = 256
_ENTRY_BYTES = 512  # every sealed entry has one length, whatever the site's name
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Release:
    """One entry of the access log.

    Attributes
    ----------
    site
        The analyst that it was sealed for.
    epoch
        Epoch of the key bundle.
    released_at
        UTC.
    record_id
        The record that left, in an archive; "" for a page.
    release_id, first, last, count
        The page of a release that left: positions and number of records; "" and zeros for an archive.
    """

    site: str
    epoch: int
    released_at: datetime
    record_id: str = ""
    release_id: str = ""
    first: int = 0
    last: int = 0
    count: int = 0


def log_releases(database: OwnerDatabase, record_ids: Sequence[str], *, site: str, epoch: int) -> None:
    """Log that records are about to leave for ``site`` in an archive, in one transaction.

    Log first, release afterwards: an interrupted release leaves an entry too many, never one too few.

    Parameters
    ----------
    database
        Where the records are.
    record_ids
        Records of that database.
    site
        Name of the analyst, at most 256 bytes.
    epoch
        Epoch of the key bundle, >= 0.

    Raises
    ------
    DatabaseError
        A record is not in the database, or the site's name is too long; nothing is logged then.
    """
    at = datetime.fromtimestamp(database.clock.now(), UTC)
    rows = [_sealed(database, site, epoch, at, record_id=record_id) for record_id in record_ids]
    if not rows:
        return
    with database.write() as connection:
        known = 0
        for start in range(0, len(record_ids), _CHUNK):
            chunk = list(set(record_ids[start : start + _CHUNK]))
            counted = select(func.count()).where(schema.records.c.record_id.in_(chunk))
            known += (connection.execute(counted).scalar() or 0) - len(chunk)
        if known < 0:
            raise DatabaseError(
                "a record that is to be released is not in the private database", found=f"{-known} unknown"
            )
        connection.execute(insert(schema.access_log), rows)


def log_page(
    database: OwnerDatabase,
    connection: Connection,
    *,
    site: str,
    epoch: int,
    release_id: str,
    first: int,
    last: int,
    count: int,
) -> None:
    """Log in the caller's transaction that a page of a release is about to leave for ``site``."""
    at = datetime.fromtimestamp(database.clock.now(), UTC)
    row = _sealed(database, site, epoch, at, release_id=release_id, first=first, last=last, count=count)
    connection.execute(insert(schema.access_log), row)


def releases(database: OwnerDatabase, *, site: str | None = None) -> list[Release]:
    """Read the access log, oldest entry first, of one site or of all.

    Raises
    ------
    DatabaseError
        An entry is corrupt.
    """
    with database.database.read() as connection:
        sealed = connection.execute(
            select(schema.access_log.c.sealed).order_by(schema.access_log.c.id)
        ).scalars()
        entries = [json.loads(database.unseal(blob, what="access", place="log")) for blob in sealed]
    found = []
    for entry in entries:
        at = datetime.fromisoformat(entry.pop("at"))
        found.append(Release(released_at=at, **entry))
    return [entry for entry in found if site in (None, entry.site)]


def _sealed(database: OwnerDatabase, site: str, epoch: int, at: datetime, **what: object) -> dict[str, Any]:
    if len(site.encode()) > MAX_SITE_BYTES:
        raise DatabaseError("the site's name is too long for the access log", found=f"{len(site)} letters")
    entry = {"site": site, "epoch": epoch, "at": at.isoformat(), **what}
    plain = padded(json.dumps(entry, ensure_ascii=False).encode(), _ENTRY_BYTES)
    return {"sealed": database.seal(plain, what="access", place="log")}
