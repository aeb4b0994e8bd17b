"""Releases: records are three-layer-encrypted once per data set and key epoch, cached, and served in pages.

A snapshot is a frozen release: all cached records of an epoch up to a position. Positions are drawn at random
within each call of :meth:`ReleaseBook.release`. Every analyst of a data set gets the same ciphertext; what is
made for one analyst is the wrapped key bundle, the signed manifest and the signed grant.

The cached ciphertext is sealed once more under the record's data key, so that destroying that key destroys
it too, and so that a data set whose cipher has no envelope does not lie open in the file.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, delete, func, insert, select, update

from flep_fl.contracts import archive
from flep_fl.contracts import grants as grant_format
from flep_fl.contracts.archive import ArchiveDescription, ArchiveHead, IndexEntry
from flep_fl.contracts.errors import (
    NotReleasedError,
    RecordError,
    ReleaseChangedError,
)
from flep_fl.contracts.grants import GrantDocument
from flep_fl.contracts.owner_api import MAX_INDEX_LIMIT, MAX_PAGE_BYTES, MAX_RECORD_LIMIT
from flep_fl.contracts.owner_records import Grant, IndexPage, OpenedGrant, RecordPage, stacked
from flep_fl.contracts.ports import ImageCipher
from flep_fl.contracts.records import ArchiveManifest, SealedRecord
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.labels import seal_blob, seal_label
from flep_fl.data_security.presets import build_cipher
from flep_fl.data_security.wrapping import wrap_bundle
from flep_fl.private_database import schema
from flep_fl.private_database.access import log_page
from flep_fl.private_database.checks import corrupt
from flep_fl.private_database.grants import grants_of, require_grant
from flep_fl.private_database.rows import Dataset, PlainRecord
from flep_fl.private_database.sealing import Unsealable, seal, unseal
from flep_fl.private_database.store import OwnerDatabase

_BATCH = 16  # plain images in memory at once
_COMMIT_RECORDS, _COMMIT_BYTES = 256, 8 << 20  # what is encrypted before it is committed
_CHUNK = 500
_SUMMARIES = 64  # shares whose index hash is remembered
_LENGTHS = struct.Struct(">I")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Released:
    """What a call of :meth:`ReleaseBook.release` gave.

    Attributes
    ----------
    release_id, number, epoch
        The snapshot.
    records
        How many records it holds.
    encrypted
        How many of them were encrypted just now; the others were in the cache.
    unlabelled
        How many records were left out for want of a label.
    corrupt
        Identifiers of records that were left out because they do not open.
    """

    release_id: str
    number: int
    epoch: int
    records: int
    encrypted: int
    unlabelled: int
    corrupt: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    release_id: str
    dataset_id: int
    epoch: int
    number: int
    last: int
    majority_class: int


@dataclass(frozen=True, slots=True)
class _Summary:
    """What a manifest says of one share of a snapshot."""

    index_sha256: str
    records_bytes: int
    train: int
    test: int


class ReleaseBook:
    """The way out of a private database: a :class:`~flep_fl.contracts.owner_store.ReleaseStore`.

    Parameters
    ----------
    database
        The owner's database.
    signing_key
        The owner's Ed25519 key.
    allow_targets
        Prefixes of dotted cipher names that may be imported.
    page_bytes
        A page ends before it grows beyond this.
    """

    def __init__(
        self,
        database: OwnerDatabase,
        signing_key: Ed25519PrivateKey,
        *,
        allow_targets: Sequence[str] = (),
        page_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        self._database, self._signing_key = database, signing_key
        self._allow_targets, self._page_bytes = tuple(allow_targets), page_bytes
        self._summaries: OrderedDict[tuple[str, int, int], _Summary] = OrderedDict()
        self._lock = threading.Lock()

    # --- making a release ----------------------------------------------------------------------------

    def release(
        self, dataset: str | None = None, *, on_progress: Progress = lambda done, total: None
    ) -> Released:
        """Encrypt what is not encrypted yet in this epoch, and freeze a new snapshot.

        An interrupted call loses nothing: what it had encrypted is in the cache, and no snapshot shows it
        until the next call ends.

        Parameters
        ----------
        dataset
            Name of the data set; None where there is one only.
        on_progress
            Gets the numbers of records done and to do.

        Raises
        ------
        DatabaseError
            The data set has no key bundle.
        NotReleasedError
            It holds no labelled record at all, or a new epoch began meanwhile.
        """
        found = self._database.dataset(dataset)
        bundle = self._database.bundle(found.name, found.epoch)
        self._drop_old_epochs(found)
        waiting, unlabelled, broken = self._waiting(found)
        cipher = build_cipher(bundle, noise_secret=found.noise_secret, allow_targets=self._allow_targets)
        encrypted, done, size = 0, 0, 0
        ready: list[tuple[PlainRecord, SealedRecord]] = []
        for start in range(0, len(waiting), _BATCH):
            batch = waiting[start : start + _BATCH]
            done += len(batch)
            ready += self._encrypted(bundle, cipher, batch, broken)
            size += sum(len(sealed.envelope) for _, sealed in ready[-len(batch) :])
            if done == len(waiting) or len(ready) >= _COMMIT_RECORDS or size >= _COMMIT_BYTES:
                with self._database.write() as connection:
                    self._require_epoch(connection, found)
                    encrypted += self._cache(connection, found, ready)
                ready, size = [], 0
                on_progress(done, len(waiting))
        snapshot, records = self._freeze(found)
        return Released(
            snapshot.release_id,
            snapshot.number,
            snapshot.epoch,
            records,
            encrypted,
            unlabelled,
            tuple(broken),
        )

    def _drop_old_epochs(self, found: Dataset) -> None:
        """Remove what was cached under former keys, a few records at a time."""
        table = schema.released
        while True:
            with self._database.write() as connection:
                old = connection.execute(
                    select(table.c.epoch, table.c.position)
                    .where(table.c.dataset_id == found.number, table.c.epoch < found.epoch)
                    .limit(_CHUNK)
                ).all()
                for epoch in {row.epoch for row in old}:
                    positions = [row.position for row in old if row.epoch == epoch]
                    connection.execute(
                        delete(table).where(
                            table.c.dataset_id == found.number,
                            table.c.epoch == epoch,
                            table.c.position.in_(positions),
                        )
                    )
            if not old:
                return

    def _waiting(self, found: Dataset) -> tuple[list[str], int, list[str]]:
        """List records to encrypt, in random order; count those without a label; name the corrupt ones."""
        records, released = schema.records.c, schema.released.c
        cached = (
            select(released.seq)
            .where(
                released.seq == records.seq,
                released.dataset_id == found.number,
                released.epoch == found.epoch,
            )
            .exists()
        )
        waiting: list[str] = []
        broken: list[str] = []
        unlabelled, last = 0, 0
        while True:
            query = (
                select(records.seq, records.record_id, records.wrapped_key, records.sealed_tags)
                .where(records.dataset_id == found.number, records.seq > last, ~cached)
                .order_by(records.seq)
                .limit(_CHUNK)
            )
            with self._database.database.read() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                try:
                    tags = self._database.open_tags(row.record_id, row.wrapped_key, row.sealed_tags)[1]
                except RecordError:
                    broken.append(row.record_id)
                    continue
                if tags.label is None:
                    unlabelled += 1
                else:
                    waiting.append(row.record_id)
            if len(rows) < _CHUNK:
                break
            last = rows[-1].seq
        secrets.SystemRandom().shuffle(waiting)
        return waiting, unlabelled, broken

    def _encrypted(
        self, bundle: ImageKeyBundle, cipher: ImageCipher, batch: Sequence[str], broken: list[str]
    ) -> list[tuple[PlainRecord, SealedRecord]]:
        """Encrypt a batch, in its (random) order; what does not open goes to ``broken``."""
        groups: dict[tuple[object, ...], list[PlainRecord]] = {}
        order = self._database.get_many(batch, on_corrupt=broken.append)
        for record in order:
            groups.setdefault((record.image.shape, record.image.dtype), []).append(record)
        sealed: dict[str, SealedRecord] = {}
        for group in groups.values():
            envelopes = cipher.encrypt(stacked([record.image for record in group]))
            for record, envelope in zip(group, envelopes, strict=True):
                label = seal_label(bundle, record.record_id, record.split, record.label)
                sealed[record.record_id] = SealedRecord(record.record_id, envelope, label)
        return [(record, sealed[record.record_id]) for record in order]

    def _cache(
        self,
        connection: Connection,
        found: Dataset,
        pairs: Sequence[tuple[PlainRecord, SealedRecord]],
    ) -> int:
        table, records = schema.released, schema.records
        ids = [record.record_id for record, _ in pairs]
        keys = {
            row.record_id: (row.seq, row.wrapped_key)
            for row in connection.execute(
                select(records.c.record_id, records.c.seq, records.c.wrapped_key).where(
                    records.c.record_id.in_(ids)
                )
            )
        }
        mine = (table.c.dataset_id == found.number, table.c.epoch == found.epoch)
        taken = set(
            connection.execute(
                select(table.c.seq).where(*mine, table.c.seq.in_([seq for seq, _ in keys.values()]))
            ).scalars()
        )
        position = connection.execute(select(func.max(table.c.position)).where(*mine)).scalar() or 0
        rows = []
        for record, sealed in pairs:
            # Deleted, or cached by another process, since it was listed.
            if record.record_id not in keys or keys[record.record_id][0] in taken:
                continue
            seq, wrapped = keys[record.record_id]
            key = self._database.data_key(record.record_id, wrapped)
            position += 1
            digest = archive.record_digest(sealed.envelope, sealed.sealed_label)
            entry = IndexEntry(
                record.record_id, record.split, len(sealed.envelope), len(sealed.sealed_label), digest
            )
            place = f"{record.record_id}/{found.epoch}"
            parts = _LENGTHS.pack(len(sealed.envelope)) + sealed.envelope + sealed.sealed_label
            rows.append(
                {
                    "dataset_id": found.number,
                    "epoch": found.epoch,
                    "position": position,
                    "seq": seq,
                    "bucket": int(record.record_id[:7], 16),
                    "sealed_entry": self._database.seal(entry.pack(), what="entry", place=place),
                    "sealed_parts": seal(key, parts, what="parts", place=place),
                }
            )
        if rows:
            connection.execute(insert(table), rows)
        return len(rows)

    def _freeze(self, found: Dataset) -> tuple[_Snapshot, int]:
        """Make a snapshot of all that is cached, or return the current one where it holds just that."""
        table = schema.released
        mine = (table.c.dataset_id == found.number, table.c.epoch == found.epoch)
        majority = self._majority(found)
        with self._database.write() as connection:
            self._require_epoch(connection, found)
            count, last = connection.execute(
                select(func.count(), func.max(table.c.position)).where(*mine)
            ).one()
            if not count:
                raise NotReleasedError(
                    f"the data set {found.name} holds no labelled record", remedy="Store and label some first"
                )
            current = self._current(connection, found)
            if current is not None and (current.last, current.majority_class) == (last, majority):
                return current, count
            number = connection.execute(
                update(schema.datasets)
                .where(schema.datasets.c.id == found.number)
                .values(releases=schema.datasets.c.releases + 1)
                .returning(schema.datasets.c.releases)
            ).scalar_one()
            snapshot = _Snapshot(secrets.token_hex(16), found.number, found.epoch, number, last, majority)
            head = self._database.seal_json(
                {"majority_class": majority}, what="snapshot", place=snapshot.release_id
            )
            connection.execute(
                insert(schema.snapshots),
                {
                    "release_id": snapshot.release_id,
                    "dataset_id": found.number,
                    "epoch": found.epoch,
                    "number": number,
                    "last": last,
                    "stale": False,
                    "sealed_head": head,
                },
            )
        return snapshot, count

    def _majority(self, found: Dataset) -> int:
        """Return the most frequent class of the labelled training records; the smallest of several."""
        counts: Counter[int] = Counter()
        for tags in self._database.iter_tags(found.name, on_corrupt=lambda _error: None):
            if tags.split == "train" and tags.label is not None:
                counts[tags.label] += 1
        return min(counts, key=lambda label: (-counts[label], label), default=0)

    def _require_epoch(self, connection: Connection, found: Dataset) -> None:
        epoch = connection.execute(
            select(schema.datasets.c.epoch).where(schema.datasets.c.id == found.number)
        ).scalar()
        if epoch != found.epoch:
            raise NotReleasedError(
                f"a new key epoch of {found.name} began while it was being released",
                expected=f"epoch {found.epoch}",
                found=f"epoch {epoch}",
                remedy="Release again",
            )

    def sample(self, dataset: str | None, count: int) -> list[tuple[PlainRecord, SealedRecord]]:
        """Return a random sample of what is released, beside what is stored: for the owner alone.

        Parameters
        ----------
        dataset
            Name of the data set; None where there is one only.
        count
            How many records at most.

        Raises
        ------
        NotReleasedError
            Nothing is released in the current epoch.
        RecordError
            A record is corrupt.
        """
        found = self._database.dataset(dataset)
        with self._database.database.read() as connection:
            snapshot = self._current(connection, found)
            if snapshot is None:
                raise NotReleasedError(
                    f"nothing of {found.name} is released in its current key epoch", remedy="Release it first"
                )
            # Positions were drawn at random, so the first ones are a sample.
            query = self._range(snapshot, (0, 1), 0, schema.released.c.sealed_parts)
            rows = connection.execute(query.add_columns(schema.records.c.wrapped_key).limit(count)).all()
        return [(self._database.get(row.record_id), self._opened(row, snapshot.epoch)) for row in rows]

    # --- serving it ----------------------------------------------------------------------------------

    def grants_of(self, verify_key: bytes) -> list[Grant]:
        """List the standing grants of one analyst."""
        return grants_of(self._database, verify_key)

    def open_grant(self, grant_id: str, verify_key: bytes) -> OpenedGrant:
        """Give manifest, grant and key bundle of the current release.

        Raises
        ------
        UnknownGrantError, GrantRevokedError, GrantExpiredError
            The grant does not stand.
        NotReleasedError
            Nothing is released in the current epoch.
        """
        grant = require_grant(self._database, grant_id, verify_key)
        found = self._database.dataset(grant.dataset)
        with self._database.database.read() as connection:
            snapshot = self._current(connection, found)
        if snapshot is None:
            raise NotReleasedError(
                f"the data owner has not released {found.name} in its current key epoch yet",
                remedy="Try again later",
            )
        bundle = self._database.bundle(found.name, snapshot.epoch)
        summary = self._summary(snapshot, grant.share)
        analyst = grant.analyst
        wrapped = wrap_bundle(
            bundle.to_bytes(),
            analyst.encryption_key,
            context=archive.wrap_context(analyst.name, found.name, snapshot.epoch),
        )
        manifest = ArchiveManifest(
            analyst.name, found.name, bundle.key_id, snapshot.epoch, summary.train, summary.test
        )
        head = ArchiveHead(manifest, summary.records_bytes, summary.index_sha256, _sha256(wrapped))
        description = ArchiveDescription(found.classes, snapshot.majority_class).to_bytes()
        data = replace(head, sealed_description=seal_blob(bundle, head.purpose(), description)).to_bytes()
        public = self._signing_key.public_key().public_bytes_raw()
        document = GrantDocument(
            grant_id=grant.grant_id,
            release_id=snapshot.release_id,
            owner=public.hex(),
            analyst=analyst.name,
            analyst_verify_key=analyst.verify_key.hex(),
            analyst_encryption_key=analyst.encryption_key.hex(),
            dataset=found.name,
            share_index=grant.share[0],
            share_parts=grant.share[1],
            issued_at=int(self._database.clock.now()),
            not_after=grant.not_after,
            epoch=snapshot.epoch,
            key_id=bundle.key_id,
            bundle_sha256=_sha256(wrapped),
            manifest_sha256=_sha256(data),
            release_number=snapshot.number,
        ).to_bytes()
        return OpenedGrant(
            release_id=snapshot.release_id,
            grant=document,
            grant_signature=self._signing_key.sign(grant_format.signed_message(document)),
            manifest=data,
            manifest_signature=public + self._signing_key.sign(archive.signed_message(data)),
            bundle=wrapped,
        )

    def index_page(
        self, grant_id: str, verify_key: bytes, *, release_id: str, cursor: int, limit: int
    ) -> IndexPage:
        """Give up to ``limit`` index entries after ``cursor``; errors: :class:`.owner_store.ReleaseStore`."""
        grant = require_grant(self._database, grant_id, verify_key)
        size = min(max(limit, 1), MAX_INDEX_LIMIT)
        with self._database.database.read() as connection:
            snapshot = self._served(connection, grant, release_id)
            rows = self._entries(connection, snapshot, grant.share, cursor, size)
        entries = b"".join(self._entry(row.record_id, snapshot.epoch, row.sealed_entry) for row in rows)
        return IndexPage(entries, rows[-1].position if len(rows) == size else None)

    def record_page(
        self, grant_id: str, verify_key: bytes, *, release_id: str, cursor: int, limit: int
    ) -> RecordPage:
        """Give up to ``limit`` records after ``cursor``, in about :data:`MAX_PAGE_BYTES`; logged first.

        Raises
        ------
        UnknownGrantError, GrantRevokedError, GrantExpiredError, ReleaseChangedError
            The grant or the release does not stand.
        RecordError
            A record's cached ciphertext is corrupt.
        """
        grant = require_grant(self._database, grant_id, verify_key)
        size = min(max(limit, 1), MAX_RECORD_LIMIT)
        table, records = schema.released, schema.records
        with self._database.database.read() as connection:
            snapshot = self._served(connection, grant, release_id)
            query = (
                self._range(snapshot, grant.share, cursor, table.c.sealed_parts)
                .add_columns(records.c.wrapped_key)
                .limit(size)
            )
            chosen: list[Any] = []
            total = 0
            stream = connection.execution_options(stream_results=True, max_row_buffer=8)
            with stream.execute(query) as rows:
                more = False
                for row in rows:
                    if chosen and total + len(row.sealed_parts) > self._page_bytes:
                        more = True
                        break
                    chosen.append(row)
                    total += len(row.sealed_parts)
        opened = tuple(self._opened(row, snapshot.epoch) for row in chosen)
        with self._database.write() as connection:
            # Between the check above and here the owner may have taken the grant back.
            self._served(connection, grant, release_id)
            if chosen:
                log_page(
                    self._database,
                    connection,
                    site=grant.analyst.name,
                    epoch=snapshot.epoch,
                    release_id=release_id,
                    first=chosen[0].position,
                    last=chosen[-1].position,
                    count=len(chosen),
                )
        more = more or len(chosen) == size
        return RecordPage(opened, chosen[-1].position if more else None)

    def _current(self, connection: Connection, found: Dataset) -> _Snapshot | None:
        """Return the newest snapshot of the current epoch that is still served."""
        columns = schema.snapshots.c
        row = connection.execute(
            select(schema.snapshots)
            .where(
                columns.dataset_id == found.number,
                columns.epoch == found.epoch,
                columns.stale.is_(False),
            )
            .order_by(columns.number.desc())
            .limit(1)
        ).one_or_none()
        return None if row is None else self._read_snapshot(row)

    def _served(self, connection: Connection, grant: Grant, release_id: str) -> _Snapshot:
        """Return the snapshot that a page is asked of, if it is one of the grant's data set and stands."""
        table = schema.snapshots
        row = connection.execute(
            select(table, schema.datasets.c.epoch.label("current"), schema.datasets.c.name_index)
            .join_from(table, schema.datasets, schema.datasets.c.id == table.c.dataset_id)
            .where(table.c.release_id == release_id)
        ).one_or_none()
        index = self._database.blind_index("dataset", grant.dataset)
        if row is None or row.stale or row.epoch != row.current or row.name_index != index:
            raise ReleaseChangedError(
                "this release is no longer served: records were deleted, or a new key epoch began",
                remedy="Open the grant again",
            )
        return self._read_snapshot(row)

    def _read_snapshot(self, row: Any) -> _Snapshot:
        head = json.loads(self._database.unseal(row.sealed_head, what="snapshot", place=row.release_id))
        return _Snapshot(
            row.release_id, row.dataset_id, row.epoch, row.number, row.last, head["majority_class"]
        )

    def _summary(self, snapshot: _Snapshot, share: tuple[int, int]) -> _Summary:
        """Hash the index of one share of a snapshot; remembered, because snapshots never change."""
        name = (snapshot.release_id, *share)
        with self._lock:
            if name in self._summaries:
                self._summaries.move_to_end(name)
                return self._summaries[name]
        digest, size = hashlib.sha256(), 0
        counts = Counter[str]()
        for data in self._all_entries(snapshot, share):
            digest.update(data)
            (entry,) = archive.unpack_index(data)
            counts[entry.split] += 1
            size += entry.envelope_bytes + entry.label_bytes
        summary = _Summary(digest.hexdigest(), size, counts["train"], counts["test"])
        with self._lock:
            self._summaries[name] = summary
            while len(self._summaries) > _SUMMARIES:
                self._summaries.popitem(last=False)
        return summary

    def _all_entries(self, snapshot: _Snapshot, share: tuple[int, int]) -> Iterator[bytes]:
        cursor = 0
        while True:
            with self._database.database.read() as connection:
                rows = self._entries(connection, snapshot, share, cursor, _CHUNK)
            for row in rows:
                yield self._entry(row.record_id, snapshot.epoch, row.sealed_entry)
            if len(rows) < _CHUNK:
                return
            cursor = rows[-1].position

    def _entries(
        self,
        connection: Connection,
        snapshot: _Snapshot,
        share: tuple[int, int],
        cursor: int,
        limit: int,
    ) -> Sequence[Any]:
        query = self._range(snapshot, share, cursor, schema.released.c.sealed_entry).limit(limit)
        return connection.execute(query).all()

    def _range(self, snapshot: _Snapshot, share: tuple[int, int], cursor: int, column: Any) -> Any:
        """Select position, record id and one column of a share, after a position (never an offset)."""
        table, records = schema.released, schema.records
        index, parts = share
        query = (
            select(table.c.position, records.c.record_id, column)
            .join_from(table, records, records.c.seq == table.c.seq)
            .where(
                table.c.dataset_id == snapshot.dataset_id,
                table.c.epoch == snapshot.epoch,
                table.c.position > cursor,
                table.c.position <= snapshot.last,
            )
            .order_by(table.c.position)
        )
        return query if parts == 1 else query.where(table.c.bucket % parts == index)

    def _entry(self, record_id: str, epoch: int, sealed: bytes) -> bytes:
        return self._database.unseal(sealed, what="entry", place=f"{record_id}/{epoch}")

    def _opened(self, row: Any, epoch: int) -> SealedRecord:
        key = self._database.data_key(row.record_id, row.wrapped_key)
        try:
            parts = unseal(key, row.sealed_parts, what="parts", place=f"{row.record_id}/{epoch}")
        except Unsealable as exc:
            raise corrupt(row.record_id) from exc
        (length,) = _LENGTHS.unpack_from(parts)
        start = _LENGTHS.size + length
        return SealedRecord(row.record_id, parts[_LENGTHS.size : start], parts[start:])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
