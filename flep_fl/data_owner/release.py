"""Release: database records leave as one sealed archive per site."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.contracts import archive
from flep_fl.contracts.archive import ArchiveDescription, ArchiveHead, IndexEntry
from flep_fl.contracts.errors import ArchiveError, ConfigError, RecordError
from flep_fl.contracts.files import sync_path
from flep_fl.contracts.owner_records import OwnerImage, stacked
from flep_fl.contracts.ports import Entropy, ImageCipher
from flep_fl.contracts.records import ArchiveManifest
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.labels import seal_blob, seal_label
from flep_fl.data_security.wrapping import wrap_bundle

_BATCH = 16  # plain images in memory at once


class OwnerRecord(Protocol):
    """What sealing needs of a plain record."""

    @property
    def record_id(self) -> str:
        """32 hex digits."""
        ...

    @property
    def image(self) -> OwnerImage:
        """uint8 or uint16, shape (H, W) or (C, H, W)."""
        ...

    @property
    def label(self) -> int:
        """Class index."""
        ...

    @property
    def split(self) -> str:
        """Either "train" or "test"."""
        ...


class RecordStore(Protocol):
    """What sealing needs of the private database."""

    def get(self, record_id: str) -> OwnerRecord:
        """Open one record, or raise RecordError."""
        ...


def seal_archive(
    database: RecordStore,
    record_ids: Sequence[str],
    *,
    cipher: ImageCipher,
    bundle: ImageKeyBundle,
    site: str,
    dataset: str,
    classes: Sequence[str],
    majority_class: int,
    recipient_x25519: bytes,
    signing_key: bytes,
    out: Path,
    entropy: Entropy = secrets.token_bytes,
    overwrite: bool = False,
    on_corrupt: Callable[[RecordError], None] | None = None,
) -> ArchiveManifest:
    """Seal records for one site; the folder appears whole or not at all.

    Only :data:`_BATCH` plain images are in memory at once. Write the access log before calling this.

    Parameters
    ----------
    database
        Where the records are.
    record_ids
        Records for this site, of both splits; they are written in random order.
    cipher
        The image cipher over ``bundle``.
    bundle
        Key bundle of this site, data set and epoch.
    site, dataset
        Names; in the clear in the manifest.
    classes, majority_class
        Class names, and the most frequent class of the whole training split; sealed.
    recipient_x25519
        The site's raw X25519 public key, 32 bytes.
    signing_key
        The owner's raw Ed25519 private key, 32 bytes.
    out
        The archive's folder.
    entropy
        Source of the random order.
    overwrite
        Replace an archive that is there already; nothing else is ever replaced.
    on_corrupt
        Receives the error of each corrupt record, which is then left out; None raises the first one.

    Returns
    -------
    ArchiveManifest
        What was written.

    Raises
    ------
    ArchiveError
        The folder exists, or cannot be written.
    RecordError
        A record is corrupt.
    ConfigError
        A key has a wrong length, or ``majority_class`` is not a class.
    """
    owner = _signing_key(signing_key)
    if not 0 <= majority_class < len(classes):
        raise ConfigError("the majority class is not a class", found=majority_class)
    _check_target(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as exc:
        raise ArchiveError(f"the archive cannot be written: {out} ({exc.strerror})") from exc
    try:
        wrapped = wrap_bundle(
            bundle.to_bytes(), recipient_x25519, context=archive.wrap_context(site, dataset, bundle.epoch)
        )
        sealed = _sealed_records(database, record_ids, cipher, bundle, entropy=entropy, on_corrupt=on_corrupt)
        entries, size = _write_records(work / archive.RECORDS, sealed)
        index = b"".join(entry.pack() for entry in entries)
        splits = [entry.split for entry in entries]
        manifest = ArchiveManifest(
            site, dataset, bundle.key_id, bundle.epoch, splits.count("train"), splits.count("test")
        )
        head = ArchiveHead(manifest, size, _sha256(index), _sha256(wrapped))
        description = ArchiveDescription(tuple(classes), majority_class).to_bytes()
        data = replace(head, sealed_description=seal_blob(bundle, head.purpose(), description)).to_bytes()
        signature = owner.public_key().public_bytes_raw() + owner.sign(archive.signed_message(data))
        for name, content in (
            (archive.INDEX, index),
            (archive.BUNDLE, wrapped),
            (archive.MANIFEST, data),
            (archive.SIGNATURE, signature),
        ):
            _write(work / name, [content])
        work.chmod(0o755)
        _publish(work, out)
    except OSError as exc:
        raise ArchiveError(f"the archive cannot be written: {out} ({exc.strerror})") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already if the archive was published
    return manifest


def _sealed_records(
    database: RecordStore,
    record_ids: Sequence[str],
    cipher: ImageCipher,
    bundle: ImageKeyBundle,
    *,
    entropy: Entropy,
    on_corrupt: Callable[[RecordError], None] | None,
) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Yield (record id, split, envelope, sealed label) in random order."""
    tickets = [entropy(16) for _ in record_ids]
    order = [record_id for _, record_id in sorted(zip(tickets, record_ids, strict=True))]
    for start in range(0, len(order), _BATCH):
        groups: dict[tuple[object, ...], list[OwnerRecord]] = {}
        for record_id in order[start : start + _BATCH]:
            try:
                record = database.get(record_id)
            except RecordError as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                continue
            groups.setdefault((record.image.shape, record.image.dtype), []).append(record)
        for group in groups.values():
            envelopes = cipher.encrypt(stacked([record.image for record in group]))
            for record, envelope in zip(group, envelopes, strict=True):
                label = seal_label(bundle, record.record_id, record.split, record.label)
                yield record.record_id, record.split, envelope, label


def _write_records(
    path: Path, sealed: Iterator[tuple[str, str, bytes, bytes]]
) -> tuple[list[IndexEntry], int]:
    entries: list[IndexEntry] = []

    def blobs() -> Iterator[bytes]:
        for record_id, split, envelope, label in sealed:
            digest = archive.record_digest(envelope, label)
            entries.append(IndexEntry(record_id, split, len(envelope), len(label), digest))
            yield envelope
            yield label

    size = _write(path, blobs())
    return entries, size


def _write(path: Path, blobs: Iterator[bytes] | list[bytes]) -> int:
    size = 0
    with path.open("wb") as file:
        for blob in blobs:
            size += file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    return size


def _check_target(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite or not (out / archive.MANIFEST).is_file():
        raise ArchiveError(
            f"the archive's folder exists already: {out}", remedy="Remove it or choose another folder"
        )


def _publish(work: Path, out: Path) -> None:
    """Move the finished folder into place; an old archive is moved aside first and then removed."""
    sync_path(work)
    old: Path | None = None
    if out.exists():
        old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old.")) / out.name
        out.rename(old)
    work.rename(out)
    sync_path(out.parent)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _signing_key(raw: bytes) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(raw)
    except ValueError as exc:
        raise ConfigError(
            "the owner's signing key has a wrong length", expected="32 bytes", found=f"{len(raw)} bytes"
        ) from exc
