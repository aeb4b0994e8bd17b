"""Retention: records older than the owner keeps them are destroyed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flep_fl.contracts.errors import ConfigError, RecordError
from flep_fl.private_database.store import OwnerDatabase


@dataclass(frozen=True, slots=True)
class Expired:
    """What a call of :func:`expire` found.

    Attributes
    ----------
    destroyed
        Records that were older (or would be destroyed, in a dry run).
    kept
        Records that stay.
    undated
        Those of them whose age is not known: release 0.1 did not store it.
    """

    destroyed: int
    kept: int
    undated: int


def expire(
    database: OwnerDatabase, max_age: float, *, dataset: str | None = None, dry_run: bool = False
) -> Expired:
    """Destroy all records that were stored more than ``max_age`` seconds ago.

    Age counts from the owner's clock at storage, never from the device's. Backups are not touched.

    Parameters
    ----------
    database
        The owner's database.
    max_age
        Seconds, above 0.
    dataset
        One data set, or None for all.
    dry_run
        Count only.

    Raises
    ------
    ClockError
        The clock has jumped: nothing was destroyed.
    ConfigError
        The age is not above 0.
    """
    if not (math.isfinite(max_age) and max_age > 0):
        raise ConfigError("the retention is out of range", expected="seconds above 0", found=max_age)
    oldest = database.clock.require_steady() - max_age
    doomed: list[str] = []
    kept = undated = 0

    def keep(_error: RecordError) -> None:
        nonlocal kept
        kept += 1

    for record_id, tags in database.iter_all_tags(dataset, on_corrupt=keep):
        if tags.stored_at and tags.stored_at < oldest:
            doomed.append(record_id)
        else:
            kept += 1
            undated += not tags.stored_at
    if doomed and not dry_run:
        database.delete(doomed)
    return Expired(len(doomed), kept, undated)
