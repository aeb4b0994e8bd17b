"""The data owner's private database: images sealed at rest in SQLite."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, create_engine, event, func, insert, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from flep_fl.contracts.errors import DatabaseError, DataError, ImageFormatError, RecordError
from flep_fl.private_database.schema import FORMAT_VERSION, Base, MetaRow, RecordRow
from flep_fl.private_database.sealing import (
    KEY_BYTES,
    SPLITS,
    Unsealable,
    pack_image,
    pack_tags,
    seal,
    unpack_image,
    unpack_tags,
    unseal,
    wrapping_key,
)

_BATCH = 32  # records in memory at once
_DESCRIPTION_BYTES = 1024  # the sealed description is padded to a multiple of this


@dataclass(frozen=True, slots=True)
class PlainRecord:
    """One record as the owner sees it.

    Attributes
    ----------
    record_id
        32 hex digits, random.
    image
        uint8, shape (H, W), read-only.
    label
        Class index.
    split
        "train" or "test".
    """

    record_id: str
    image: NDArray[np.uint8] = field(repr=False)
    label: int = field(repr=False)
    split: str


@dataclass(frozen=True, slots=True)
class RecordTags:
    """Identifier, class index and split of a record, without its pixels."""

    record_id: str
    label: int = field(repr=False)
    split: str


class OwnerDatabase:
    """A database file and the owner's key to it; a context manager.

    Pixels, labels, splits, class names and the data set's name are sealed (:mod:`.sealing`), deleted pages
    are overwritten, and rows lie in random order: a stolen file shows counts, sizes and times only.

    Parameters
    ----------
    path
        The SQLite file (WAL files beside it); created 0600 by :meth:`create`.
    owner_key
        32 random bytes that stay with the owner.

    Raises
    ------
    DatabaseError
        The file is missing, is not such a database, or belongs to another owner key.
    """

    def __init__(self, path: Path, owner_key: bytes) -> None:
        _check_key(owner_key)
        if not path.is_file():
            raise DatabaseError(f"the private database does not exist: {path}", remedy="Create it first")
        path.chmod(0o600)
        self.path = path
        self._engine = _engine(path)
        try:
            with self.session() as session:
                meta = session.get(MetaRow, 1)
                found = None if meta is None else (meta.version, meta.salt, meta.sealed)
            if found is None or found[0] != FORMAT_VERSION:
                raise DatabaseError(
                    f"the file is not a private database of this release: {path}",
                    expected=f"format version {FORMAT_VERSION}",
                    found="none" if found is None else found[0],
                )
            self._key = wrapping_key(owner_key, found[1])
            description = json.loads(unseal(self._key, found[2], what="description", place="meta"))
        except Unsealable as exc:
            self._engine.dispose()
            raise DatabaseError(
                f"the private database belongs to another owner key, or its head is corrupt: {path}",
                remedy="Use the key that it was created with",
            ) from exc
        except DatabaseError:
            self._engine.dispose()
            raise
        self.dataset: str = description["dataset"]
        self.classes: tuple[str, ...] = tuple(description["classes"])

    @classmethod
    def create(cls, path: Path, owner_key: bytes, *, dataset: str, classes: Sequence[str]) -> Self:
        """Create an empty database.

        Parameters
        ----------
        path
            A file that does not exist yet.
        owner_key
            32 random bytes.
        dataset, classes
            Name of the data set and of its classes; sealed.

        Raises
        ------
        DatabaseError
            The file exists already or cannot be created.
        """
        _check_key(owner_key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite gives its WAL files the permissions of the database file.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as exc:
            raise DatabaseError(
                f"the private database cannot be created: {path} ({exc.strerror})",
                remedy="Choose another path or remove the old file",
            ) from exc
        salt = secrets.token_bytes(32)
        plain = json.dumps({"dataset": dataset, "classes": list(classes)}).encode()
        plain += b" " * (-len(plain) % _DESCRIPTION_BYTES)
        sealed = seal(wrapping_key(owner_key, salt), plain, what="description", place="meta")
        engine = _engine(path)
        with _named_errors(path):
            Base.metadata.create_all(engine)
            with Session(engine) as session, session.begin():
                session.add(MetaRow(id=1, version=FORMAT_VERSION, salt=salt, sealed=sealed))
        engine.dispose()
        return cls(path, owner_key)

    def __repr__(self) -> str:
        return f"OwnerDatabase({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; SQLite then merges and removes its WAL files."""
        self._engine.dispose()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open one transaction: committed at the end, rolled back on any error; SQL errors are named."""
        with _named_errors(self.path), Session(self._engine) as session, session.begin():
            yield session

    def seal(self, plain: bytes, *, what: str, place: str) -> bytes:
        """Seal a few bytes under the database's own key, bound to ``what`` and ``place``."""
        return seal(self._key, plain, what=what, place=place)

    def unseal(self, sealed: bytes, *, what: str, place: str) -> bytes:
        """Undo :meth:`seal`; raise :class:`DatabaseError` when the blob does not fit."""
        try:
            return unseal(self._key, sealed, what=what, place=place)
        except Unsealable as exc:
            raise DatabaseError(f"a sealed {what} of the private database is corrupt: {self.path}") from exc

    def ingest(
        self, images: Sequence[NDArray[np.uint8]], labels: Sequence[int], splits: Sequence[str]
    ) -> list[str]:
        """Seal and store images in one transaction: all of them, or none.

        Parameters
        ----------
        images
            Grey images, uint8, shape (H, W) each, sizes may differ; read one batch at a time.
        labels
            Class index of every image, 0..len(classes)-1.
        splits
            "train" or "test" for every image.

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
        self._check_ingest(images, labels, splits)
        ids = [secrets.token_hex(16) for _ in labels]
        order = list(range(len(ids)))
        secrets.SystemRandom().shuffle(order)
        with self.session() as session:
            for start in range(0, len(order), _BATCH):
                rows = [
                    self._sealed_row(ids[i], _checked_image(images[i], i), labels[i], splits[i])
                    for i in order[start : start + _BATCH]
                ]
                session.execute(insert(RecordRow), rows)
        return ids

    def count(self, split: str | None = None) -> int:
        """Return the number of records, of one split or of all."""
        if split is not None:
            return len(self.tags(split))
        with self.session() as session:
            return session.scalar(select(func.count()).select_from(RecordRow)) or 0

    def tags(
        self, split: str | None = None, *, on_corrupt: Callable[[RecordError], None] | None = None
    ) -> list[RecordTags]:
        """List identifiers, labels and splits, ordered by identifier (which is random).

        Parameters
        ----------
        split
            "train", "test", or None for both.
        on_corrupt
            Receives the error of each corrupt record, which is then left out; None raises the first one.

        Raises
        ------
        RecordError
            A record is corrupt.
        """
        with self.session() as session:
            rows = session.execute(
                select(RecordRow.record_id, RecordRow.wrapped_key, RecordRow.sealed_tags).order_by(
                    RecordRow.record_id
                )
            ).all()
        found = []
        for record_id, wrapped, sealed in rows:
            try:
                _, label, name = self._open_tags(record_id, wrapped, sealed)
            except RecordError as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                continue
            if split in (None, name):
                found.append(RecordTags(record_id, label, name))
        return found

    def get(self, record_id: str) -> PlainRecord:
        """Open one record.

        Raises
        ------
        RecordError
            There is no such record, or it is corrupt; other records are not affected.
        """
        with self.session() as session:
            row = session.get(RecordRow, record_id)
            if row is None:
                raise RecordError(f"the private database has no record {record_id}")
            columns = (row.wrapped_key, row.sealed_tags, row.sealed_image)
        key, label, split = self._open_tags(record_id, *columns[:2])
        try:
            image = unpack_image(unseal(key, columns[2], what="image", place=record_id))
        except Unsealable as exc:
            raise _corrupt(record_id) from exc
        return PlainRecord(record_id, image, label, split)

    def records(
        self, split: str | None = None, *, on_corrupt: Callable[[RecordError], None] | None = None
    ) -> Iterator[PlainRecord]:
        """Yield records one at a time, ordered by identifier; parameters and errors as in :meth:`tags`."""
        for tags in self.tags(split, on_corrupt=on_corrupt):
            try:
                record = self.get(tags.record_id)
            except RecordError as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                continue
            yield record

    def _sealed_row(self, record_id: str, image: NDArray[np.uint8], label: int, split: str) -> dict[str, Any]:
        key = secrets.token_bytes(KEY_BYTES)
        return {
            "record_id": record_id,
            "wrapped_key": seal(self._key, key, what="key", place=record_id),
            "sealed_tags": seal(key, pack_tags(label, split), what="tags", place=record_id),
            "sealed_image": seal(key, pack_image(image), what="image", place=record_id),
        }

    def _open_tags(self, record_id: str, wrapped: bytes, sealed: bytes) -> tuple[bytes, int, str]:
        try:
            key = unseal(self._key, wrapped, what="key", place=record_id)
            return key, *unpack_tags(unseal(key, sealed, what="tags", place=record_id))
        except Unsealable as exc:
            raise _corrupt(record_id) from exc

    def _check_ingest(
        self, images: Sequence[NDArray[np.uint8]], labels: Sequence[int], splits: Sequence[str]
    ) -> None:
        if not len(images) == len(labels) == len(splits):
            raise DataError(
                "images, labels and splits differ in number",
                found=f"{len(images)}, {len(labels)}, {len(splits)}",
            )
        for i, (label, split) in enumerate(zip(labels, splits, strict=True)):
            if not 0 <= label < len(self.classes):
                raise DataError(
                    f"label of image {i} is out of range", expected=f"0..{len(self.classes) - 1}", found=label
                )
            if split not in SPLITS:
                raise DataError(
                    f"split of image {i} is unknown", expected="one of " + ", ".join(SPLITS), found=split
                )


def _checked_image(image: NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
    if image.dtype != np.uint8 or image.ndim != 2 or 0 in image.shape:
        raise ImageFormatError(
            f"image {position} is not of a supported shape and dtype",
            expected="(H, W), uint8, not empty",
            found=f"{image.shape}, {image.dtype}",
        )
    return image


def _check_key(owner_key: bytes) -> None:
    if len(owner_key) != KEY_BYTES:
        raise DatabaseError(
            "the owner key has a wrong length", expected=f"{KEY_BYTES} bytes", found=f"{len(owner_key)} bytes"
        )


def _corrupt(record_id: str) -> RecordError:
    return RecordError(
        f"record {record_id} of the private database is corrupt",
        remedy="Restore it from a backup or ingest the image again; other records are not affected",
    )


def _engine(path: Path) -> Engine:
    # hide_parameters: an SQL error must not carry row contents into a log.
    engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)
    event.listen(engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as exc:
        raise DatabaseError(
            f"the private database cannot be used: {path} ({type(exc).__name__})",
            remedy="Check that it is a private database of this release, undamaged and writable",
        ) from exc
