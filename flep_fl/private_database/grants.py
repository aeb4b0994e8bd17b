"""Grants: which analyst may fetch which data set until when, and how that is taken back."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, insert, select, update

from flep_fl.contracts.errors import (
    GrantError,
    GrantExpiredError,
    GrantRevokedError,
    ImageKeyError,
    UnknownGrantError,
)
from flep_fl.contracts.grants import MAX_PARTS
from flep_fl.contracts.owner_records import Analyst, Grant
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.private_database import schema
from flep_fl.private_database.access import MAX_SITE_BYTES
from flep_fl.private_database.store import OwnerDatabase

RAW_KEY_BYTES = 32
_LAST_TIME = 253402300799  # the end of the year 9999

Rotate = Callable[[ImageKeyBundle], ImageKeyBundle]


def create_grant(
    database: OwnerDatabase,
    *,
    dataset: str,
    analyst: Analyst,
    not_after: float,
    share: tuple[int, int] = (0, 1),
) -> Grant:
    """Grant a data set to an analyst until a date.

    Parameters
    ----------
    database
        The owner's database.
    dataset
        Name of a data set of it.
    analyst
        Name and public keys.
    not_after
        Last second of validity, seconds since 1970 (UTC); in the future.
    share
        ``(index, parts)``: one of so many disjoint parts of the data set; (0, 1) is all of it.

    Raises
    ------
    UnknownDatasetError
        There is no such data set.
    GrantError
        A key, the name, the share or the date is unusable.
    """
    now = database.clock.now()
    _check(analyst, not_after, share, now)
    target = database.dataset(dataset)
    grant = Grant(secrets.token_hex(16), analyst, dataset, share, int(not_after), int(now))
    row = {
        "grant_id": grant.grant_id,
        "dataset_id": target.number,
        "analyst_index": _analyst_index(database, analyst.verify_key),
        "sealed": _sealed(database, grant),
    }
    with database.write() as connection:
        connection.execute(insert(schema.grants), row)
    return grant


def list_grants(database: OwnerDatabase, *, dataset: str | None = None) -> list[Grant]:
    """List all grants, revoked and expired ones included, oldest first."""
    query = select(schema.grants.c.grant_id, schema.grants.c.sealed).order_by(schema.grants.c.id)
    if dataset is not None:
        query = query.where(schema.grants.c.dataset_id == database.dataset(dataset).number)
    with database.database.read() as connection:
        return [_opened(database, row) for row in connection.execute(query)]


def grants_of(database: OwnerDatabase, verify_key: bytes) -> list[Grant]:
    """List the grants of one analyst that stand: neither revoked nor expired."""
    query = (
        select(schema.grants.c.grant_id, schema.grants.c.sealed)
        .where(schema.grants.c.analyst_index == _analyst_index(database, verify_key))
        .order_by(schema.grants.c.id)
    )
    with database.database.read() as connection:
        found = [_opened(database, row) for row in connection.execute(query)]
    now = database.clock.now()
    return [grant for grant in found if grant.revoked_at is None and now <= grant.not_after]


def require_grant(database: OwnerDatabase, grant_id: str, verify_key: bytes) -> Grant:
    """Return a grant that stands, read from the database now: a revocation counts at once.

    Raises
    ------
    UnknownGrantError
        There is none of that identifier for this key.
    GrantRevokedError, GrantExpiredError
        It no longer stands.
    """
    query = select(schema.grants.c.grant_id, schema.grants.c.sealed).where(
        schema.grants.c.grant_id == grant_id,
        schema.grants.c.analyst_index == _analyst_index(database, verify_key),
    )
    with database.database.read() as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        raise UnknownGrantError("there is no such grant for this key", remedy="Ask the data owner for one")
    grant = _opened(database, row)
    if grant.revoked_at is not None:
        raise GrantRevokedError(
            f"the data owner has taken the grant for {grant.dataset} back", remedy="Ask the data owner"
        )
    if database.clock.now() > grant.not_after:
        raise GrantExpiredError(
            f"the grant for {grant.dataset} has ended", remedy="Ask the data owner for a new one"
        )
    return grant


def revoke_grant(database: OwnerDatabase, grant_id: str, *, rotate: Rotate = ImageKeyBundle.rotate) -> Grant:
    """Take a grant back: no more records from now on, and a new key epoch for what is released afterwards.

    One transaction. Nothing of the data set leaves any more, to nobody, until the owner releases it again:
    what an analyst without a grant could still open must not travel to others either. What was fetched and
    decrypted before stays decrypted.

    Parameters
    ----------
    database
        The owner's database.
    grant_id
        Which grant.
    rotate
        Makes the next epoch's bundle from the current one.

    Raises
    ------
    UnknownGrantError
        There is no such grant.
    GrantRevokedError
        It was taken back before.
    """
    query = select(schema.grants).where(schema.grants.c.grant_id == grant_id)
    with database.write() as connection:
        row = connection.execute(query).one_or_none()
        if row is None:
            raise UnknownGrantError("there is no such grant", remedy="List them: action=grants")
        grant = _opened(database, row)
        if grant.revoked_at is not None:
            raise GrantRevokedError(f"the grant for {grant.dataset} was taken back before")
        revoked = Grant(
            grant.grant_id,
            grant.analyst,
            grant.dataset,
            grant.share,
            grant.not_after,
            grant.created_at,
            int(database.clock.wall()),
        )
        connection.execute(
            update(schema.grants)
            .where(schema.grants.c.id == row.id)
            .values(sealed=_sealed(database, revoked))
        )
        begin_epoch(database, connection, grant.dataset, rotate=rotate)
    return revoked


def begin_epoch(
    database: OwnerDatabase,
    connection: Connection,
    dataset: str,
    *,
    rotate: Rotate = ImageKeyBundle.rotate,
) -> None:
    """Begin a data set's next key epoch in the caller's transaction, where it has a bundle at all."""
    found = database.dataset(dataset, connection)
    if found.epoch == 0:
        return
    database.set_bundle(dataset, rotate(database.bundle(dataset, found.epoch)), connection)
    columns = schema.snapshots.c
    connection.execute(update(schema.snapshots).where(columns.dataset_id == found.number).values(stale=True))


def _check(analyst: Analyst, not_after: float, share: tuple[int, int], now: float) -> None:
    if not 0 < len(analyst.name.encode()) <= MAX_SITE_BYTES:
        raise GrantError("the analyst's name is unusable", expected=f"1 to {MAX_SITE_BYTES} bytes")
    if {len(analyst.verify_key), len(analyst.encryption_key)} != {RAW_KEY_BYTES}:
        raise GrantError("an analyst's public key has a wrong length", expected="32 bytes each")
    _require_usable(analyst.encryption_key)
    if not (math.isfinite(not_after) and now < not_after <= _LAST_TIME):
        raise GrantError("the grant would end before it begins", expected="a date in the future")
    index, parts = share
    if not 0 <= index < parts <= MAX_PARTS:
        raise GrantError(
            "the share is out of range",
            expected=f"0 <= index < parts <= {MAX_PARTS}",
            found=f"{index} of {parts}",
        )


def _require_usable(encryption_key: bytes) -> None:
    from flep_fl.data_security.wrapping import wrap_bundle

    try:
        wrap_bundle(b"", encryption_key, context=b"")
    except ImageKeyError as exc:
        raise GrantError("the analyst's X25519 key is not usable", remedy="Have it made anew") from exc


def _analyst_index(database: OwnerDatabase, verify_key: bytes) -> bytes:
    return database.blind_index("analyst", verify_key.hex())


def _sealed(database: OwnerDatabase, grant: Grant) -> bytes:
    content = {
        "analyst": grant.analyst.name,
        "verify_key": grant.analyst.verify_key.hex(),
        "encryption_key": grant.analyst.encryption_key.hex(),
        "dataset": grant.dataset,
        "share": list(grant.share),
        "not_after": grant.not_after,
        "created_at": grant.created_at,
        "revoked_at": grant.revoked_at,
    }
    return database.seal_json(content, what="grant", place=grant.grant_id)


def _opened(database: OwnerDatabase, row: Any) -> Grant:
    content = json.loads(database.unseal(row.sealed, what="grant", place=row.grant_id))
    return Grant(
        row.grant_id,
        Analyst(
            content["analyst"],
            bytes.fromhex(content["verify_key"]),
            bytes.fromhex(content["encryption_key"]),
        ),
        content["dataset"],
        (content["share"][0], content["share"][1]),
        content["not_after"],
        content["created_at"],
        content["revoked_at"],
    )
