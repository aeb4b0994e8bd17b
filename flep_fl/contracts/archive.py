"""Format of the archive that the owner hands to one site (shared by its writer and its reader).

An archive is a folder of five files:

``manifest.json``
    Format, version, site, data set, key id, epoch, number of records per split, size of ``records.bin``,
    SHA-256 of ``index.bin`` and ``bundle.hpke``, and a description (classes, majority class) sealed under
    the key bundle.
``manifest.sig``
    The owner's Ed25519 public key (32 bytes) and signature (64 bytes) over the manifest.
``bundle.hpke``
    The key bundle, sealed to the site's X25519 key with HPKE (RFC 9180).
``index.bin``
    57 bytes per record, in random order: split, record id, the two lengths, SHA-256 of both parts.
``records.bin``
    Envelope and sealed label of every record, in the order of the index.

The signature covers everything through the hashes. So does the sealed description, which only a holder of
the bundle can make: records cannot be added to or taken from an archive whose bundle is genuine.
"""

from __future__ import annotations

import hashlib
import json
import struct
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from typing import Any

from flep_fl.contracts.errors import ArchiveError
from flep_fl.contracts.records import ArchiveManifest

FORMAT = "flep-archive"
VERSION = 1
MANIFEST, SIGNATURE, BUNDLE, INDEX, RECORDS = (
    "manifest.json",
    "manifest.sig",
    "bundle.hpke",
    "index.bin",
    "records.bin",
)
SPLITS = ("train", "test")

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_MANIFEST_BYTES = 1 << 20

_ENTRY = struct.Struct(">B16sII32s")
_DESCRIPTION_BYTES = 1024  # a sealed description is padded to a multiple of this


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One record in ``index.bin``.

    Attributes
    ----------
    record_id
        32 hex digits.
    split
        "train" or "test".
    envelope_bytes, label_bytes
        Lengths in ``records.bin``.
    digest
        SHA-256 of envelope and sealed label, 32 bytes.
    """

    record_id: str
    split: str
    envelope_bytes: int
    label_bytes: int
    digest: bytes

    def pack(self) -> bytes:
        """Serialise to :data:`ENTRY_BYTES` bytes."""
        return _ENTRY.pack(
            SPLITS.index(self.split),
            bytes.fromhex(self.record_id),
            self.envelope_bytes,
            self.label_bytes,
            self.digest,
        )


ENTRY_BYTES = _ENTRY.size


@dataclass(frozen=True, slots=True)
class ArchiveHead:
    """The whole content of ``manifest.json``.

    Attributes
    ----------
    manifest
        What the archive says of itself in the clear.
    records_bytes
        Size of ``records.bin``.
    index_sha256, bundle_sha256
        SHA-256 of ``index.bin`` and ``bundle.hpke``, 64 hex digits.
    sealed_description
        :class:`ArchiveDescription`, sealed under the bundle and bound to everything above.
    """

    manifest: ArchiveManifest
    records_bytes: int
    index_sha256: str
    bundle_sha256: str
    sealed_description: bytes = field(default=b"", repr=False)

    def purpose(self) -> str:
        """Return the purpose under which the description is sealed: it names all other fields by hash."""
        return "archive description " + hashlib.sha256(_canonical(self._open_fields())).hexdigest()

    def to_bytes(self) -> bytes:
        """Serialise to canonical JSON."""
        return _canonical(
            {**self._open_fields(), "description": b64encode(self.sealed_description).decode("ascii")}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> ArchiveHead:
        """Parse ``manifest.json``.

        Raises
        ------
        ArchiveError
            It is not a manifest, or of another format version.
        """
        try:
            fields = json.loads(data)
            found = (fields["format"], fields["version"])
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise ArchiveError("the archive's manifest is damaged", remedy="Fetch the archive again") from exc
        if found != (FORMAT, VERSION):
            raise ArchiveError(
                "the archive has a format that this release does not read",
                expected=f"{FORMAT} version {VERSION}",
                found=f"{found[0]} version {found[1]}",
            )
        try:
            head = cls(
                ArchiveManifest(
                    site=fields["site"],
                    dataset=fields["dataset"],
                    key_id=fields["key_id"],
                    epoch=fields["epoch"],
                    train=fields["train"],
                    test=fields["test"],
                ),
                records_bytes=fields["records_bytes"],
                index_sha256=fields["index_sha256"],
                bundle_sha256=fields["bundle_sha256"],
                sealed_description=b64decode(fields["description"], validate=True),
            )
            # One and only one serialisation is valid: this also checks names and types of all fields.
            damaged = head.to_bytes() != data
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise ArchiveError("the archive's manifest is damaged", remedy="Fetch the archive again") from exc
        if damaged or not _is_plausible(head):
            raise ArchiveError("the archive's manifest is damaged", remedy="Fetch the archive again")
        return head

    def _open_fields(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "site": self.manifest.site,
            "dataset": self.manifest.dataset,
            "key_id": self.manifest.key_id,
            "epoch": self.manifest.epoch,
            "train": self.manifest.train,
            "test": self.manifest.test,
            "records_bytes": self.records_bytes,
            "index_sha256": self.index_sha256,
            "bundle_sha256": self.bundle_sha256,
        }


@dataclass(frozen=True, slots=True)
class ArchiveDescription:
    """What only the holder of the bundle learns of an archive.

    Attributes
    ----------
    classes
        Class names.
    majority_class
        Index of the most frequent class of the *whole* training split, all sites together.
    """

    classes: tuple[str, ...]
    majority_class: int

    def to_bytes(self) -> bytes:
        """Serialise, padded so that the length says little about the class names."""
        data = _canonical({"classes": list(self.classes), "majority_class": self.majority_class})
        return data + b" " * (-len(data) % _DESCRIPTION_BYTES)

    @classmethod
    def from_bytes(cls, data: bytes) -> ArchiveDescription:
        """Undo :meth:`to_bytes` (of authenticated bytes).

        Raises
        ------
        ArchiveError
            Who sealed it did not write a description.
        """
        try:
            fields = json.loads(data)
            classes, majority = tuple(fields["classes"]), fields["majority_class"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise _no_description() from exc
        named = classes and all(isinstance(name, str) for name in classes)
        if not named or type(majority) is not int or not 0 <= majority < len(classes):
            raise _no_description()
        return cls(classes, majority)


def wrap_context(site: str, dataset: str, epoch: int) -> bytes:
    """Return what binds a wrapped key bundle to one site, data set and epoch."""
    return _canonical({"purpose": "flep archive bundle", "site": site, "dataset": dataset, "epoch": epoch})


def signed_message(manifest: bytes) -> bytes:
    """Return what the owner signs: the manifest under a label of its own."""
    return b"flep archive manifest, version 1\0" + manifest


def record_digest(envelope: bytes, sealed_label: bytes) -> bytes:
    """SHA-256 of a record; the index gives both lengths, so the concatenation is unambiguous."""
    return hashlib.sha256(envelope + sealed_label).digest()


def unpack_index(data: bytes) -> list[IndexEntry]:
    """Parse ``index.bin``.

    Raises
    ------
    ArchiveError
        It is not a whole number of entries, or names an unknown split.
    """
    if len(data) % ENTRY_BYTES:
        raise ArchiveError(
            "the archive's index is truncated", expected=f"entries of {ENTRY_BYTES} bytes", found=len(data)
        )
    entries = []
    for split, record_id, envelope_bytes, label_bytes, digest in _ENTRY.iter_unpack(data):
        if split >= len(SPLITS):
            raise ArchiveError("the archive's index names an unknown split", found=split)
        entries.append(IndexEntry(record_id.hex(), SPLITS[split], envelope_bytes, label_bytes, digest))
    return entries


def _no_description() -> ArchiveError:
    return ArchiveError("the archive's description is damaged", remedy="Ask the data owner")


def _is_plausible(head: ArchiveHead) -> bool:
    manifest = head.manifest
    texts = (manifest.site, manifest.dataset, manifest.key_id, head.index_sha256, head.bundle_sha256)
    numbers = (manifest.epoch, manifest.train, manifest.test, head.records_bytes)
    return all(isinstance(text, str) for text in texts) and all(
        type(number) is int and number >= 0 for number in numbers
    )


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
