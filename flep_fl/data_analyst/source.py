"""Sealed records from a local archive folder."""

from __future__ import annotations

import hashlib
import hmac
import io
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flep_fl.contracts import archive
from flep_fl.contracts.archive import ArchiveDescription, ArchiveHead, IndexEntry
from flep_fl.contracts.errors import ArchiveError, EnvelopeError, RecordError, WrongImageKeyError
from flep_fl.contracts.files import read_bytes
from flep_fl.contracts.records import ArchiveManifest, SealedRecord
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.labels import open_blob
from flep_fl.data_security.wrapping import unwrap_bundle


class LocalArchive:
    """A :class:`~flep_fl.contracts.ports.RecordSource` over an archive folder; checked before it is used.

    Parameters
    ----------
    path
        The archive's folder.
    site
        Name of this site; an archive for another one is refused.
    owner_public_key
        The owner's raw Ed25519 public key (32 bytes) from the site's kit. None accepts any signer: then
        only accidents are noticed before :func:`unlock`.
    on_corrupt
        Receives the error of each corrupt record, which is then left out; None raises the first one.

    Raises
    ------
    ArchiveError
        The archive is missing, incomplete, altered, of another format version, or for another site.
    """

    def __init__(
        self,
        path: Path,
        *,
        site: str,
        owner_public_key: bytes | None = None,
        on_corrupt: Callable[[RecordError], None] | None = None,
    ) -> None:
        self.path = path
        self._on_corrupt = on_corrupt
        if not path.is_dir():
            raise ArchiveError(f"the archive does not exist: {path}", remedy="Check the option archive")
        data = self._read(archive.MANIFEST)
        if len(data) > archive.MAX_MANIFEST_BYTES:
            raise ArchiveError("the archive's manifest is too large", found=f"{len(data)} bytes")
        self.head = ArchiveHead.from_bytes(data)
        self._verify_signature(data, owner_public_key)
        if self.head.manifest.site != site:
            raise ArchiveError(
                f"the archive belongs to another site: {path}",
                expected=site,
                found=self.head.manifest.site,
                remedy="Use the archive that the data owner sealed for this site",
            )
        self._check_records_file()

    def manifest(self) -> ArchiveManifest:
        """Return what the archive says of itself; its signature, hashes and counts have been checked."""
        entries = self._entries  # read and checked once
        for split in archive.SPLITS:
            expected, found = getattr(self.head.manifest, split), sum(e.split == split for e in entries)
            if expected != found:
                raise ArchiveError(
                    f"the archive holds another number of {split} records than its manifest says",
                    expected=expected,
                    found=found,
                )
        return self.head.manifest

    def records(self, split: str) -> Iterator[SealedRecord]:
        """Yield the sealed records of a split in the archive's (random) order, one at a time.

        Raises
        ------
        ArchiveError
            The archive is incomplete, or there is no such split.
        RecordError
            A record does not match the index; its id is named. See ``on_corrupt``.
        """
        if split not in archive.SPLITS:
            raise ArchiveError("there is no such split", expected="train or test", found=split)
        self.manifest()
        position = 0
        with self._open_records() as file:
            for entry in self._entries:
                size = entry.envelope_bytes + entry.label_bytes
                if entry.split == split:
                    file.seek(position)
                    record = self._checked(entry, file.read(size))
                    if record is not None:
                        yield record
                position += size

    def wrapped_bundle(self) -> bytes:
        """Return the wrapped key bundle, checked against the manifest."""
        return self._checked_file(archive.BUNDLE, self.head.bundle_sha256)

    @cached_property
    def _entries(self) -> list[IndexEntry]:
        entries = archive.unpack_index(self._checked_file(archive.INDEX, self.head.index_sha256))
        if sum(e.envelope_bytes + e.label_bytes for e in entries) != self.head.records_bytes:
            raise ArchiveError("the archive's index does not fit its records", remedy="Fetch it again")
        return entries

    def _checked(self, entry: IndexEntry, data: bytes) -> SealedRecord | None:
        envelope, label = data[: entry.envelope_bytes], data[entry.envelope_bytes :]
        if hmac.compare_digest(archive.record_digest(envelope, label), entry.digest):
            return SealedRecord(entry.record_id, envelope, label)
        error = RecordError(
            f"record {entry.record_id} of the archive is corrupt: {self.path}",
            remedy="Fetch the archive again; other records are not affected",
        )
        if self._on_corrupt is None:
            raise error
        self._on_corrupt(error)
        return None

    def _verify_signature(self, manifest: bytes, pinned: bytes | None) -> None:
        data = self._read(archive.SIGNATURE)
        if len(data) != archive.PUBLIC_KEY_BYTES + archive.SIGNATURE_BYTES:
            raise ArchiveError("the archive's signature is damaged", remedy="Fetch the archive again")
        key, signature = data[: archive.PUBLIC_KEY_BYTES], data[archive.PUBLIC_KEY_BYTES :]
        if pinned is not None and not hmac.compare_digest(key, pinned):
            raise ArchiveError(
                "the archive is signed by another data owner than the one in this site's kit",
                remedy="Ask the data owner",
            )
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, archive.signed_message(manifest))
        except (InvalidSignature, ValueError) as exc:
            raise ArchiveError(
                f"the archive's manifest was altered: {self.path}", remedy="Fetch the archive again"
            ) from exc

    def _check_records_file(self) -> None:
        with self._open_records() as file:
            found = file.seek(0, io.SEEK_END)
        if found != self.head.records_bytes:
            raise ArchiveError(
                f"the archive's records are truncated or too long: {self.path}",
                expected=f"{self.head.records_bytes} bytes",
                found=f"{found} bytes",
                remedy="Fetch the archive again",
            )

    def _open_records(self) -> io.BufferedReader:
        try:
            return (self.path / archive.RECORDS).open("rb")
        except OSError as exc:
            raise ArchiveError(f"the archive is incomplete: {self.path / archive.RECORDS}") from exc

    def _read(self, name: str) -> bytes:
        return read_bytes(self.path / name, what=f"the archive's {name}", error=ArchiveError)

    def _checked_file(self, name: str, sha256: str) -> bytes:
        data = self._read(name)
        if not hmac.compare_digest(hashlib.sha256(data).hexdigest(), sha256):
            raise ArchiveError(
                f"the archive's {name} does not match its manifest: {self.path}",
                remedy="Fetch the archive again",
            )
        return data


def unlock(source: LocalArchive, x25519_private: bytes) -> ImageKeyBundle:
    """Unwrap the archive's key bundle and check that the archive was sealed under it.

    Parameters
    ----------
    source
        The archive.
    x25519_private
        The site's raw X25519 private key, 32 bytes.

    Returns
    -------
    ImageKeyBundle
        Keep it in memory only.

    Raises
    ------
    WrongImageKeyError
        The bundle was wrapped for another key, or is not the one that the manifest names.
    EnvelopeError, ArchiveError
        The bundle or the manifest was altered.
    """
    manifest = source.manifest()
    context = archive.wrap_context(manifest.site, manifest.dataset, manifest.epoch)
    bundle = ImageKeyBundle.from_bytes(
        unwrap_bundle(source.wrapped_bundle(), x25519_private, context=context)
    )
    if (bundle.key_id, bundle.epoch) != (manifest.key_id, manifest.epoch):
        raise WrongImageKeyError(
            "the archive's key bundle is not the one that its manifest names",
            expected=f"key {manifest.key_id} epoch {manifest.epoch}",
            found=f"key {bundle.key_id} epoch {bundle.epoch}",
        )
    describe(source, bundle)
    return bundle


def describe(source: LocalArchive, bundle: ImageKeyBundle) -> ArchiveDescription:
    """Open the archive's description, which also proves that a holder of the bundle wrote its manifest.

    Raises
    ------
    WrongImageKeyError
        The archive was sealed under another bundle.
    ArchiveError
        The description was not sealed for this manifest.
    """
    try:
        return ArchiveDescription.from_bytes(
            open_blob(bundle, source.head.purpose(), source.head.sealed_description)
        )
    except WrongImageKeyError:
        raise
    except EnvelopeError as exc:
        raise ArchiveError(
            f"the archive's description does not belong to its manifest: {source.path}",
            remedy="Fetch the archive again",
        ) from exc
