"""The access log: which record left for which site, under which key epoch, and when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import insert, select

from flep_fl.contracts.errors import DatabaseError
from flep_fl.private_database.schema import ReleaseRow
from flep_fl.private_database.store import OwnerDatabase

_GRANT_BYTES = 256  # every sealed grant has one length, whatever the site's name


@dataclass(frozen=True, slots=True)
class Release:
    """One entry of the access log.

    Attributes
    ----------
    record_id
        The record that left.
    site
        The analyst that it was sealed for.
    epoch
        Epoch of the key bundle.
    released_at
        UTC.
    """

    record_id: str
    site: str
    epoch: int
    released_at: datetime


def log_releases(database: OwnerDatabase, record_ids: Sequence[str], *, site: str, epoch: int) -> None:
    """Log that records are about to leave for ``site``, in one transaction.

    Log first, release afterwards: an interrupted release leaves an entry too many, never one too few.

    Parameters
    ----------
    database
        Where the records are.
    record_ids
        Records of that database.
    site
        Name of the analyst, at most 100 bytes.
    epoch
        Epoch of the key bundle, >= 0.

    Raises
    ------
    DatabaseError
        A record is not in the database, or the site's name is too long; nothing is logged then.
    """
    plain = json.dumps({"site": site, "epoch": epoch}, ensure_ascii=False).encode()
    if len(plain) > _GRANT_BYTES:
        raise DatabaseError("the site's name is too long for the access log", found=f"{len(plain)} bytes")
    plain = plain.ljust(_GRANT_BYTES)
    now = datetime.now(UTC).replace(tzinfo=None)
    rows = [
        {
            "record_id": record_id,
            "sealed_grant": database.seal(plain, what="grant", place=record_id),
            "released_at": now,
        }
        for record_id in record_ids
    ]
    if rows:
        with database.session() as session:
            session.execute(insert(ReleaseRow), rows)


def releases(database: OwnerDatabase, *, site: str | None = None) -> list[Release]:
    """Read the access log, oldest entry first, of one site or of all.

    Raises
    ------
    DatabaseError
        An entry is corrupt.
    """
    with database.session() as session:
        rows = session.execute(
            select(ReleaseRow.record_id, ReleaseRow.sealed_grant, ReleaseRow.released_at).order_by(
                ReleaseRow.id
            )
        ).all()
    entries = []
    for record_id, sealed, when in rows:
        grant = json.loads(database.unseal(sealed, what="grant", place=record_id))
        entries.append(Release(record_id, grant["site"], grant["epoch"], when.replace(tzinfo=UTC)))
    return [entry for entry in entries if site in (None, entry.site)]
