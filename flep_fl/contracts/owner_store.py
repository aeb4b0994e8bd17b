"""Ports of the private database: what the gateway may ask of it, without knowing how it stores.

All methods are safe to call from several threads. They block (a commit takes milliseconds), so an event
loop calls them in a thread, or uses :meth:`ImageStore.submit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from flep_fl.contracts.owner_records import (
    Capture,
    DatasetInfo,
    Grant,
    IndexPage,
    OpenedGrant,
    Receipt,
    RecordPage,
)


class ImageStore(Protocol):
    """The way in: images of authorised devices. Who is authorised is decided before it is called."""

    def submit(self, capture: Capture) -> Future[Receipt]:
        """Seal a capture in the caller's thread and queue it for the next group commit.

        The future is done once the record is on stable storage, or carries the reason why it is not:
        :class:`SequenceConflictError` (same device and sequence, other content), :class:`DiskFullError`,
        :class:`DatabaseError`.

        Raises
        ------
        StoreBusyError
            At once, when the queue is full; nothing was stored.
        UnknownDatasetError, ImageFormatError, DataError
            At once, when the capture cannot be stored.
        """
        ...

    def put(self, capture: Capture) -> Receipt:
        """Submit and wait; raises whatever :meth:`submit` or its future raises."""
        ...

    def put_many(self, captures: Sequence[Capture]) -> list[Receipt]:
        """Store all of them in one transaction, or none; raises as :meth:`put`."""
        ...

    def delete(self, record_ids: Sequence[str]) -> int:
        """Destroy records, their data keys and cached releases; returns how many there were."""
        ...

    def datasets(self) -> list[DatasetInfo]:
        """Describe all data sets."""
        ...

    def last_sequence(self, device_id: str) -> int | None:
        """Return the largest sequence number that was ever stored for a device, None for a device never seen.

        It is written in the transaction of the capture and stays when records are deleted: what was deleted
        must not come back by a replay. :meth:`submit` refuses a capture at or below it unless that is the
        repetition of a record that is there.
        """
        ...

    def queue_depth(self) -> tuple[int, int]:
        """Return how many captures wait for a commit, and the most that may wait."""
        ...


class ReleaseStore(Protocol):
    """The way out: what a granted analyst may fetch. Every call checks the grant again.

    ``verify_key`` is the raw Ed25519 key (32 bytes) that signed the request, verified by the caller.

    The errors, for all methods: :class:`UnknownGrantError` (no such grant for this key),
    :class:`GrantRevokedError`, :class:`GrantExpiredError`, :class:`NotReleasedError` (the owner has released
    nothing of this data set yet), :class:`ReleaseChangedError` (a record was deleted or a new epoch began
    since the grant was opened: open it again).
    """

    def grants_of(self, verify_key: bytes) -> list[Grant]:
        """List the standing grants of one analyst."""
        ...

    def open_grant(self, grant_id: str, verify_key: bytes) -> OpenedGrant:
        """Give manifest, grant and key bundle of the current release."""
        ...

    def index_page(
        self, grant_id: str, verify_key: bytes, *, release_id: str, cursor: int, limit: int
    ) -> IndexPage:
        """Give up to ``limit`` index entries after ``cursor`` (0 at first)."""
        ...

    def record_page(
        self, grant_id: str, verify_key: bytes, *, release_id: str, cursor: int, limit: int
    ) -> RecordPage:
        """Give up to ``limit`` records after ``cursor`` (0 at first), fewer where they are large; logged."""
        ...
