"""The data owner's private database: images sealed at rest, in SQLite or PostgreSQL."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Self

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from flep_fl.contracts.errors import (
    DatabaseError,
    DataError,
    RecordError,
    SequenceConflictError,
)
from flep_fl.contracts.owner_records import Capture, DatasetInfo, OwnerImage, Receipt
from flep_fl.private_database import schema
from flep_fl.private_database.catalogue import TEST_FRACTION, Catalogue
from flep_fl.private_database.checks import (
    check_ingest,
    check_key,
    check_label,
    check_texts,
    checked_image,
    corrupt,
    same_capture,
    unknown,
)
from flep_fl.private_database.engine import Location
from flep_fl.private_database.rows import Dataset, PlainRecord, RecordTags
from flep_fl.private_database.sealing import (
    KEY_BYTES,
    SPLITS,
    Tags,
    Unsealable,
    pack_image,
    pack_tags,
    padded,
    seal,
    unpack_image,
    unpack_tags,
    unseal,
)
from flep_fl.private_database.vault import make_tables
from flep_fl.private_database.writer import GroupWriter

_BATCH = 32  # records in memory at once
_CHUNK = 500  # rows, or values in one IN list
_UNIFORM = 1 << 32
# What a group commit says again and again is built once: that takes longer than SQLite takes to answer.
_SET_SEQUENCE = update(schema.devices).where(schema.devices.c.device_index == bindparam("row"))
_ADD_SEQUENCE = insert(schema.devices)
_SEQUENCES = select(schema.devices.c.device_index, schema.devices.c.sealed).where(
    schema.devices.c.device_index.in_(bindparam("values", expanding=True))
)
_KNOWN = {
    column.name: select(column, schema.records.c.record_id).where(
        column.in_(bindparam("values", expanding=True))
    )
    for column in (schema.records.c.origin, schema.records.c.request)
}
_NUMBERS = select(schema.records.c.record_id, schema.records.c.seq).where(
    schema.records.c.record_id.in_(bindparam("values", expanding=True))
)
_ADD_RECORD, _ADD_IMAGE = insert(schema.records), insert(schema.images)


class OwnerDatabase(Catalogue):
    """A private database and the owner's key to it; a context manager, safe for threads.

    Pixels, labels, splits, devices, times, class names and the data sets' names are sealed (:mod:`.sealing`)
    and deleted pages are overwritten: a stolen file shows counts, sizes and the order of arrival only.

    Parameters
    ----------
    location
        The SQLite file (WAL files beside it), or the URL of a PostgreSQL database.
    owner_key
        32 random bytes that stay with the owner.

    Raises
    ------
    DatabaseError
        It is missing, no such database, of another owner key, or written by a newer release.
    """

    def __init__(self, location: Location, owner_key: bytes, *, read_only: bool = False) -> None:
        super().__init__(location, owner_key, read_only=read_only)
        self._known_datasets: dict[str, Dataset] = {}
        self._writer: GroupWriter | None = None
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        location: Location,
        owner_key: bytes,
        *,
        dataset: str | None = None,
        classes: Sequence[str] = (),
        test_fraction: float = TEST_FRACTION,
    ) -> Self:
        """Create an empty database, with one data set where one is named.

        Parameters
        ----------
        location
            A file that does not exist yet, or the URL of an empty PostgreSQL database.
        owner_key
            32 random bytes.
        dataset, classes, test_fraction
            As for :meth:`add_dataset`.

        Raises
        ------
        DatabaseError
            There is something already, or it cannot be created.
        """
        check_key(owner_key)
        make_tables(location, owner_key)
        created = cls(location, owner_key)
        if dataset is not None:
            created.add_dataset(dataset, classes, test_fraction=test_fraction)
        return created

    def close(self) -> None:
        """Finish what is queued and close all connections."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self.database.close()

    # --- in ------------------------------------------------------------------------------------------

    def ingest(
        self,
        images: Sequence[OwnerImage],
        labels: Sequence[int],
        splits: Sequence[str],
        *,
        dataset: str | None = None,
    ) -> list[str]:
        """Seal and store images that no device sent, in one transaction: all of them, or none.

        Parameters
        ----------
        images
            uint8 or uint16, shape (H, W) or (C, H, W) each, sizes may differ; read one batch at a time.
        labels
            Class index of every image, 0..len(classes)-1.
        splits
            "train" or "test" for every image.
        dataset
            Where they belong; None where there is one data set only.

        Returns
        -------
        list of str
            The new record ids, in the order of ``images``. Rows are stored in random order: an order by
            class would give labels away.

        Raises
        ------
        ImageFormatError, DataError
            An image, a label or a split is not usable; names its position.
        DatabaseError
            The database refused.
        """
        target = self.dataset(dataset)
        check_ingest(target, images, labels, splits)
        ids = [secrets.token_hex(16) for _ in labels]
        order = list(range(len(ids)))
        secrets.SystemRandom().shuffle(order)
        stored_at = self.clock.now()
        with self.write() as connection:
            for start in range(0, len(order), _BATCH):
                self._insert(
                    connection,
                    [
                        self._sealed_row(
                            target,
                            checked_image(images[i], f"image {i}"),
                            Tags(labels[i], splits[i], stored_at=stored_at, given=(labels[i], splits[i])),
                            record_id=ids[i],
                        )
                        for i in order[start : start + _BATCH]
                    ],
                )
        return ids

    def submit(self, capture: Capture) -> Future[Receipt]:
        """Seal a capture and queue it for the next group commit; see :class:`.ports.ImageStore`."""
        writer = self._group_writer()
        with writer.reserved() as slot:
            return slot.enqueue(self._row_of(capture))

    def put(self, capture: Capture) -> Receipt:
        """Store one capture and wait until it is on stable storage."""
        return self.submit(capture).result()

    def put_many(self, captures: Sequence[Capture]) -> list[Receipt]:
        """Store captures in one transaction: all of them, or none."""
        rows = [self._row_of(capture) for capture in captures]
        found = self._commit(rows, whole=True)
        return [outcome for outcome in found if isinstance(outcome, Receipt)]

    def queue_depth(self) -> tuple[int, int]:
        """Return how many captures wait for a commit, and the most that may wait."""
        return self._group_writer().depth()

    def set_labels(self, labels: Mapping[str, int]) -> None:
        """Set or change labels by record id, in one transaction.

        A record that was released already keeps the label under which it was released until the next epoch.

        Raises
        ------
        RecordError
            A record is unknown or corrupt.
        DataError
            A label is out of range.
        """
        with self.write() as connection:
            names = {found.number: found for found in self.all_datasets()}
            for record_id, label in labels.items():
                row = connection.execute(
                    select(schema.records).where(schema.records.c.record_id == record_id)
                ).one_or_none()
                if row is None:
                    raise unknown(record_id)
                check_label(names[row.dataset_id], label, f"record {record_id}")
                key, tags = self.open_tags(record_id, row.wrapped_key, row.sealed_tags)
                changed = pack_tags(replace(tags, label=label))
                connection.execute(
                    update(schema.records)
                    .where(schema.records.c.seq == row.seq)
                    .values(sealed_tags=seal(key, changed, what="tags", place=record_id))
                )

    def _group_writer(self) -> GroupWriter:
        with self._lock:
            if self._writer is None:
                self._writer = GroupWriter(self._commit)
            return self._writer

    def _row_of(self, capture: Capture) -> dict[str, Any]:
        """Check and seal a capture."""
        target = self._known_datasets.get(capture.dataset)
        if target is None:
            target = self._known_datasets[capture.dataset] = self.dataset(capture.dataset)
        image = checked_image(capture.image, "the image")
        if capture.label is not None:
            check_label(target, capture.label, "the image")
        if capture.split not in (None, *SPLITS):
            raise DataError(
                "the split is unknown", expected="one of " + ", ".join(SPLITS), found=capture.split
            )
        check_texts(capture)
        split = capture.split
        if split is None:
            held_out = secrets.randbelow(_UNIFORM) < target.test_fraction * _UNIFORM
            split = "test" if held_out else "train"
        tags = Tags(
            capture.label,
            split,
            capture.device_id,
            capture.sequence,
            float(capture.captured_at),
            capture.idempotency_key,
            self.clock.now(),
            (capture.label, capture.split),
            dict(capture.metadata),
        )
        row = self._sealed_row(target, image, tags, record_id=secrets.token_hex(16))
        return {**row, "capture": capture}

    def _commit(self, rows: Sequence[dict[str, Any]], *, whole: bool = False) -> list[Receipt | Exception]:
        """Store rows in one transaction, those that are there already left out; one outcome a row.

        Where they are a ``whole``, the first refusal is raised and none is stored.
        """
        with self.write() as connection:
            known = self._known(connection, rows)
            devices = {row["capture"].device_id for row in rows}
            indexes = {device: self.blind_index("device", device) for device in devices}
            stored = self._last_sequences(connection, indexes)
            last = dict(stored)
            outcomes: list[Receipt | Exception] = []
            fresh: list[dict[str, Any]] = []
            for row in rows:
                same = [known[index] for index in (row["origin"], row["request"]) if index in known]
                capture: Capture = row["capture"]
                if not same and 0 <= capture.sequence <= last.get(capture.device_id, -1):
                    # Never stored, or stored and deleted: what was deleted must not come back by a replay.
                    outcomes.append(_used(last[capture.device_id]))
                    continue
                if not same:
                    last[capture.device_id] = max(capture.sequence, last.get(capture.device_id, -1))
                    fresh.append(row)
                    for index in (row["origin"], row["request"]):
                        if index is not None:
                            known[index] = row["capture"], row["record_id"]
                    outcomes.append(Receipt(row["record_id"], is_new=True))
                    continue
                outcomes.append(self._repeated(connection, capture, same))
            for outcome in outcomes:
                if whole and isinstance(outcome, Exception):
                    raise outcome
            self._insert(connection, fresh)
            used = {device: number for device, number in last.items() if number > stored.get(device, -1)}
            self._remember_sequences(connection, used, indexes, known=stored)
        return outcomes

    def last_sequence(self, device_id: str) -> int | None:
        """Return the largest sequence number ever stored for a device; deletions do not lower it."""
        index = self.blind_index("device", device_id)
        with self.database.read() as connection:
            return self._last_sequences(connection, {device_id: index}).get(device_id)

    def _last_sequences(self, connection: Connection, indexes: Mapping[str, bytes]) -> dict[str, int]:
        found = {}
        for row in connection.execute(_SEQUENCES, {"values": list(indexes.values())}):
            content = json.loads(self.unseal(row.sealed, what="device", place=row.device_index.hex()))
            found[str(content["device"])] = int(content["last"])
        return found

    def _remember_sequences(
        self,
        connection: Connection,
        used: Mapping[str, int],
        indexes: Mapping[str, bytes],
        known: Mapping[str, int],
    ) -> None:
        """Write down the numbers in ``used``, which are above those in ``known`` (what is stored so far)."""
        fresh, changed = [], []
        for device, last in used.items():
            index = indexes[device]
            content = padded(json.dumps({"device": device, "last": last}).encode(), 256)
            sealed = self.seal(content, what="device", place=index.hex())
            if device in known:
                changed.append({"row": index, "sealed": sealed})
            else:
                fresh.append({"device_index": index, "sealed": sealed})
        if fresh:
            connection.execute(_ADD_SEQUENCE, fresh)
        if changed:
            connection.execute(_SET_SEQUENCE, changed)

    def _known(
        self, connection: Connection, rows: Sequence[dict[str, Any]]
    ) -> dict[bytes, tuple[Capture | None, str]]:
        """Find which of the rows' keyed hashes are stored: hash -> (capture if in this batch, record id)."""
        known: dict[bytes, tuple[Capture | None, str]] = {}
        for name, query in _KNOWN.items():
            values = [row[name] for row in rows if row[name] is not None]
            for start in range(0, len(values), _CHUNK):
                found = connection.execute(query, {"values": values[start : start + _CHUNK]})
                known |= {row[0]: (None, row[1]) for row in found}
        return known

    def _repeated(
        self, connection: Connection, capture: Capture, same: list[tuple[Capture | None, str]]
    ) -> Receipt | Exception:
        """Answer a capture whose device and sequence, or idempotency key, were seen before."""
        stored, record_id = same[0]
        if all(other == record_id for _, other in same):
            if stored is None:
                stored = self._as_capture(connection, record_id)
            if same_capture(stored, capture):
                return Receipt(record_id, is_new=False)
        return SequenceConflictError(
            "the device used this sequence number, or this idempotency key, for another capture",
            remedy="A device counts on from its last number, also after a restart",
        )

    def _as_capture(self, connection: Connection, record_id: str) -> Capture:
        row = connection.execute(_whole_row(record_id)).one()
        record = self._opened_record(record_id, row)
        tags = record.tags
        number = connection.execute(
            select(schema.records.c.dataset_id).where(schema.records.c.record_id == record_id)
        ).scalar_one()
        name = next(found.name for found in self.all_datasets() if found.number == number)
        return Capture(
            name,
            tags.device,
            tags.sequence,
            record.image,
            tags.given[0],
            tags.given[1],
            tags.captured_at,
            tags.idempotency_key,
            tags.metadata,
        )

    def _sealed_row(
        self, target: Dataset, image: OwnerImage, tags: Tags, *, record_id: str
    ) -> dict[str, Any]:
        key = secrets.token_bytes(KEY_BYTES)
        origin = request = None
        if tags.sequence >= 0:
            origin = self.blind_index("origin", tags.device, str(tags.sequence))
        if tags.idempotency_key is not None:
            request = self.blind_index("request", tags.device, tags.idempotency_key)
        return {
            "record_id": record_id,
            "dataset_id": target.number,
            "origin": origin,
            "request": request,
            "wrapped_key": seal(self._key, key, what="key", place=record_id),
            "sealed_tags": seal(key, pack_tags(tags), what="tags", place=record_id),
            "sealed_image": seal(key, pack_image(image), what="image", place=record_id),
        }

    def _insert(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        columns = ("record_id", "dataset_id", "origin", "request", "wrapped_key", "sealed_tags")
        try:
            connection.execute(_ADD_RECORD, [{name: row[name] for name in columns} for row in rows])
        except IntegrityError as exc:  # pragma: no cover - writers are serialised
            raise DatabaseError("a record is stored already") from exc
        ids = [row["record_id"] for row in rows]
        seqs: dict[str, int] = {}
        for start in range(0, len(ids), _CHUNK):
            found = connection.execute(_NUMBERS, {"values": ids[start : start + _CHUNK]})
            seqs |= {row[0]: row[1] for row in found}
        connection.execute(
            _ADD_IMAGE,
            [{"seq": seqs[row["record_id"]], "sealed_image": row["sealed_image"]} for row in rows],
        )

    # --- out -----------------------------------------------------------------------------------------

    def datasets(self) -> list[DatasetInfo]:
        """Describe all data sets; reads the tags of every record."""
        described = []
        for found in self.all_datasets():
            counts = {"train": 0, "test": 0}
            unlabelled = 0
            for tags in self.iter_tags(found.name):
                counts[tags.split] += 1
                unlabelled += tags.label is None
            described.append(
                DatasetInfo(
                    found.name,
                    found.classes,
                    found.epoch,
                    counts["train"],
                    counts["test"],
                    unlabelled,
                    self._released(found),
                )
            )
        return described

    def _released(self, found: Dataset) -> int:
        rows = schema.released.c
        current = (
            select(schema.snapshots.c.last)
            .where(
                schema.snapshots.c.dataset_id == found.number,
                schema.snapshots.c.epoch == found.epoch,
                schema.snapshots.c.stale.is_(False),
            )
            .order_by(schema.snapshots.c.number.desc())
            .limit(1)
        )
        with self.database.read() as connection:
            last = connection.execute(current).scalar() or 0
            counted = select(func.count()).where(
                rows.dataset_id == found.number, rows.epoch == found.epoch, rows.position <= last
            )
            return connection.execute(counted).scalar() or 0

    def count(self, split: str | None = None, *, dataset: str | None = None) -> int:
        """Return the number of records, of one split or of all, of one data set or of all."""
        if split is not None:
            return sum(tags.split == split for tags in self.iter_tags(dataset))
        query = select(func.count()).select_from(schema.records)
        if dataset is not None:
            query = query.where(schema.records.c.dataset_id == self.dataset(dataset).number)
        with self.database.read() as connection:
            return connection.execute(query).scalar() or 0

    def tags(
        self,
        split: str | None = None,
        *,
        dataset: str | None = None,
        on_corrupt: Callable[[RecordError], None] | None = None,
    ) -> list[RecordTags]:
        """List identifiers, labels and splits, ordered by identifier (which is random).

        Parameters
        ----------
        split
            "train", "test", or None for both.
        dataset
            One data set, or None for all.
        on_corrupt
            Receives the error of each corrupt record, which is then left out; None raises the first one.

        Raises
        ------
        RecordError
            A record is corrupt.
        """
        found = self.iter_tags(dataset, on_corrupt=on_corrupt)
        return [tags for tags in found if split in (None, tags.split)]

    def iter_tags(
        self, dataset: str | None = None, *, on_corrupt: Callable[[RecordError], None] | None = None
    ) -> Iterator[RecordTags]:
        """Yield what :meth:`tags` lists, a few hundred rows in memory at once."""
        for record_id, tags in self.iter_all_tags(dataset, on_corrupt=on_corrupt):
            yield RecordTags(record_id, tags.label, tags.split)

    def iter_all_tags(
        self, dataset: str | None = None, *, on_corrupt: Callable[[RecordError], None] | None = None
    ) -> Iterator[tuple[str, Tags]]:
        """Yield identifier and tags of every record, ordered by identifier."""
        columns = schema.records.c
        number = None if dataset is None else self.dataset(dataset).number
        last = ""
        while True:
            query = select(columns.record_id, columns.wrapped_key, columns.sealed_tags).where(
                columns.record_id > last
            )
            if number is not None:
                query = query.where(columns.dataset_id == number)
            with self.database.read() as connection:
                rows = connection.execute(query.order_by(columns.record_id).limit(_CHUNK)).all()
            for record_id, wrapped, sealed in rows:
                try:
                    yield record_id, self.open_tags(record_id, wrapped, sealed)[1]
                except RecordError as error:
                    if on_corrupt is None:
                        raise
                    on_corrupt(error)
            if len(rows) < _CHUNK:
                return
            last = rows[-1].record_id

    def get(self, record_id: str) -> PlainRecord:
        """Open one record.

        Raises
        ------
        RecordError
            There is no such record, or it is corrupt; other records are not affected.
        """
        with self.database.read() as connection:
            row = connection.execute(_whole_row(record_id)).one_or_none()
        if row is None:
            raise unknown(record_id)
        return self._opened_record(record_id, row)

    def get_many(self, record_ids: Sequence[str], *, on_corrupt: Callable[[str], None]) -> list[PlainRecord]:
        """Open records in one query, in the order asked; unknown and corrupt ones go to ``on_corrupt``."""
        columns = schema.records.c
        query = _whole_rows().add_columns(columns.record_id).where(columns.record_id.in_(record_ids))
        with self.database.read() as connection:
            rows = {row.record_id: row for row in connection.execute(query)}
        found = []
        for record_id in record_ids:
            try:
                if record_id not in rows:
                    raise unknown(record_id)
                found.append(self._opened_record(record_id, rows[record_id]))
            except RecordError:
                on_corrupt(record_id)
        return found

    def records(
        self,
        split: str | None = None,
        *,
        dataset: str | None = None,
        on_corrupt: Callable[[RecordError], None] | None = None,
    ) -> Iterator[PlainRecord]:
        """Yield records one at a time, ordered by identifier; parameters and errors as in :meth:`tags`."""
        for tags in self.iter_tags(dataset, on_corrupt=on_corrupt):
            if split not in (None, tags.split):
                continue
            try:
                record = self.get(tags.record_id)
            except RecordError as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                continue
            yield record

    def open_tags(self, record_id: str, wrapped: bytes, sealed: bytes) -> tuple[bytes, Tags]:
        """Unwrap a record's data key and open its tags; raise :class:`RecordError` when they do not fit."""
        try:
            key = unseal(self._key, wrapped, what="key", place=record_id)
            return key, unpack_tags(unseal(key, sealed, what="tags", place=record_id))
        except Unsealable as exc:
            self.require_same_key()
            raise corrupt(record_id) from exc

    def data_key(self, record_id: str, wrapped: bytes) -> bytes:
        """Unwrap a record's data key; raise :class:`RecordError` when it does not fit."""
        try:
            return unseal(self._key, wrapped, what="key", place=record_id)
        except Unsealable as exc:
            self.require_same_key()
            raise corrupt(record_id) from exc

    def _opened_record(self, record_id: str, row: Any) -> PlainRecord:
        key, tags = self.open_tags(record_id, row.wrapped_key, row.sealed_tags)
        try:
            image = unpack_image(unseal(key, row.sealed_image or b"", what="image", place=record_id))
        except Unsealable as exc:
            raise corrupt(record_id) from exc
        return PlainRecord(record_id, image, tags)

    # --- away ----------------------------------------------------------------------------------------

    def delete(self, record_ids: Sequence[str]) -> int:
        """Destroy records: data keys, tags, pixels and cached releases, overwritten in the file.

        Releases that held one of them are no longer served; the owner releases again. Backups, copies that
        left before, and what the file system or the disk keeps of overwritten blocks are out of reach.

        Parameters
        ----------
        record_ids
            Unknown ones are passed over.

        Returns
        -------
        int
            How many there were.

        Raises
        ------
        DatabaseError
            The database refused, or a reader kept the write-ahead log from being cut: the records are gone
            from the database, but sealed traces may be left in the log; try again (:meth:`erase_traces`).
        """
        found = 0
        for start in range(0, len(record_ids), _CHUNK):
            with self.write() as connection:
                found += self._delete_chunk(connection, record_ids[start : start + _CHUNK])
        self.erase_traces()
        return found

    def erase_traces(self) -> None:
        """Cut the write-ahead log (SQLite) or rewrite the table of keys (PostgreSQL) after a deletion."""
        self.database.vacuum_keys()
        if not self.database.truncate_log():
            raise DatabaseError(
                "a reader kept the database's log from being cut: sealed traces of deleted rows may be left",
                remedy="Repeat the deletion, or stop the readers first",
            )

    def _delete_chunk(self, connection: Connection, record_ids: Sequence[str]) -> int:
        chosen = select(schema.records.c.seq).where(schema.records.c.record_id.in_(record_ids))
        seqs = list(connection.execute(chosen).scalars())
        if not seqs:
            return 0
        released = schema.released.c
        parts = (
            select(released.dataset_id, released.epoch, func.min(released.position))
            .where(released.seq.in_(seqs))
            .group_by(released.dataset_id, released.epoch)
        )
        for number, epoch, first in connection.execute(parts).all():
            columns = schema.snapshots.c
            connection.execute(
                update(schema.snapshots)
                .where(columns.dataset_id == number, columns.epoch == epoch, columns.last >= first)
                .values(stale=True)
            )
        for table in (schema.released, schema.images, schema.records):
            connection.execute(delete(table).where(table.c.seq.in_(seqs)))
        return len(seqs)


def _used(last: int) -> SequenceConflictError:
    return SequenceConflictError(
        "the device's sequence number does not lie above its last one",
        expected=f"more than {last}",
        remedy="A device counts on from its last number, also after a restart",
    )


def _whole_rows() -> Any:
    records, images = schema.records, schema.images
    return select(records.c.wrapped_key, records.c.sealed_tags, images.c.sealed_image).join_from(
        records, images, images.c.seq == records.c.seq, isouter=True
    )


def _whole_row(record_id: str) -> Any:
    return _whole_rows().where(schema.records.c.record_id == record_id)
