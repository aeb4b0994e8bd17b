"""From a data owner's gateway to a local sealed archive: checked record by record, resumable.

What is fetched stays three-layer-encrypted: a folder in the format of :mod:`flep_fl.contracts.archive`, less
the wrapped key bundle, whose content is in the keystore. The owner's signature covers the grant, the grant
covers manifest and bundle, the manifest covers the index, and the index covers every record. So a record that
is dropped, swapped, duplicated, altered or made up on the way is found and named.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flep_fl.contracts import archive
from flep_fl.contracts import grants as grant_format
from flep_fl.contracts.archive import ArchiveDescription, ArchiveHead, IndexEntry
from flep_fl.contracts.errors import (
    ArchiveError,
    EnvelopeError,
    FetchError,
    GrantError,
    GrantExpiredError,
    GrantRevokedError,
    KeystoreError,
    OwnerUnreachableError,
    RecordError,
    ReleaseChangedError,
    TamperedReleaseError,
    UnknownGrantError,
)
from flep_fl.contracts.files import lock_exclusively, sync_path, write_atomic
from flep_fl.contracts.grants import GrantDocument
from flep_fl.contracts.owner_api import (
    MAX_INDEX_LIMIT,
    MAX_PAGE_BYTES,
    MAX_RECORD_LIMIT,
    GrantListing,
    unpack_records,
)
from flep_fl.contracts.owner_records import OpenedGrant
from flep_fl.contracts.records import SealedRecord
from flep_fl.data_analyst.keystore import Keystore
from flep_fl.data_analyst.owner_client import AnalystIdentity, OwnerAddress, OwnerClient
from flep_fl.data_analyst.source import LocalArchive, describe
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.labels import open_blob
from flep_fl.data_security.wrapping import unwrap_bundle

_STATE = "fetch.json"
_FRAME_SLACK = 1 << 16
_REOPENINGS = 3

MAX_INDEX_BYTES = 1 << 30
"""What an index may take; it lies in memory while records are fetched."""

Progress = Callable[[str, int, int], None]
"""``progress(dataset, records_done, records_in_all)``."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A data set of one owner, sealed on this machine, with the key to it.

    Attributes
    ----------
    archive
        The sealed records.
    bundle
        The key bundle; keep it in memory only.
    description
        Classes.
    document
        The grant.
    downloaded
        Number of records that came over the network this time.
    """

    archive: LocalArchive
    bundle: ImageKeyBundle = field(repr=False)
    description: ArchiveDescription
    document: GrantDocument
    downloaded: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """An opened grant after all checks."""

    document: GrantDocument
    head: ArchiveHead
    bundle: ImageKeyBundle = field(repr=False)
    raw: OpenedGrant


def fetch_owner(
    address: OwnerAddress,
    identity: AnalystIdentity,
    keystore: Keystore,
    cache: Path,
    *,
    ca: Path | None = None,
    on_progress: Progress = lambda dataset, done, total: None,
    on_event: Callable[[str], None] = lambda _line: None,
    client: OwnerClient | None = None,
    clock: Callable[[], float] = time.time,
) -> list[Fetched]:
    """Fetch every data set that one owner grants to this analyst.

    What is here already, from a former call or an interrupted one, is not fetched again. Where the owner is
    out of reach, data sets whose grant still runs are taken from the cache.

    Parameters
    ----------
    address, identity, ca
        Where the owner is, who asks, and the certificate authority of its certificate.
    keystore
        Gets owner's key, grants and bundles.
    cache
        Folder for the sealed records.
    on_progress, on_event
        Get progress, and a line now and then.
    client
        A connection of the caller's own.
    clock
        Seconds since 1970.

    Raises
    ------
    OwnerPinError
        The owner shows another key than before.
    GrantError
        There is no grant, or one that is altered, for somebody else, expired, revoked, or played back.
    TamperedReleaseError
        Records are not those that the owner signed; says which and how.
    FetchError
        The owner does not answer and nothing usable is in the cache, or files cannot be written.
    """
    try:
        if client is not None:
            return _fetch(client, identity, keystore, cache, on_progress, on_event, clock)
        with OwnerClient(address, identity, ca=ca) as own:
            return _fetch(own, identity, keystore, cache, on_progress, on_event, clock)
    except OwnerUnreachableError:
        held = _from_cache(address, keystore, cache)
        if not held:
            raise
        names = ", ".join(fetched.document.dataset for fetched in held)
        on_event(f"{address.base} does not answer; going on with what was fetched before: {names}")
        return held
    except OSError as exc:
        raise FetchError(f"what is fetched cannot be kept in {cache} ({exc.strerror or exc})") from exc


def _fetch(
    client: OwnerClient,
    identity: AnalystIdentity,
    keystore: Keystore,
    cache: Path,
    on_progress: Progress,
    on_event: Callable[[str], None],
    clock: Callable[[], float],
) -> list[Fetched]:
    owner = client.hello()
    named = client.address.pin is not None
    if keystore.pin(client.address.base, owner, replace=named) and not named:
        on_event(f"{client.address.base} is trusted from now on; its key is {owner.hex()}")
    listed = client.grants()
    _forget_taken_back(keystore, owner, {listing.dataset for listing in listed}, on_event)
    if not listed:
        raise UnknownGrantError(
            f"the data owner at {client.address.base} grants nothing to this analyst",
            remedy="Give the owner your public keys (kit.json) and ask for a grant; it may also have ended",
        )
    if len({listing.dataset for listing in listed}) != len(listed):
        # One data set, several grants: the one that runs longest.
        best: dict[str, GrantListing] = {}
        for listing in sorted(listed, key=lambda listing: listing.not_after):
            best[listing.dataset] = listing
        listed = list(best.values())
    found = []
    for listing in listed:
        for attempt in range(_REOPENINGS):
            try:
                found.append(
                    _fetch_grant(client, listing, owner, identity, keystore, cache, on_progress, clock)
                )
                break
            except ReleaseChangedError:
                # The owner deleted a record, or began a new epoch, while we were at it.
                if attempt == _REOPENINGS - 1:
                    raise
            except (GrantRevokedError, GrantExpiredError):
                keystore.forget(owner.hex(), listing.dataset)
                raise
        on_event(f"{listing.dataset}: {found[-1].downloaded} records fetched from {client.address.base}")
    return found


def _fetch_grant(
    client: OwnerClient,
    listing: GrantListing,
    owner: bytes,
    identity: AnalystIdentity,
    keystore: Keystore,
    cache: Path,
    on_progress: Progress,
    clock: Callable[[], float],
) -> Fetched:
    opened = check_opened(client.open(listing.grant_id), listing, owner=owner, identity=identity, now=clock())
    keystore.store(opened.document, opened.bundle)
    folder = archive_folder(cache, owner, opened.document.dataset)
    downloaded = 0
    with _alone(folder, opened.document.dataset):
        if not _is_complete(folder, opened):
            downloaded = _download(client, opened, folder, on_progress)
    source = LocalArchive(folder, site=opened.document.analyst, owner_public_key=owner)
    source.manifest()
    return Fetched(source, opened.bundle, describe(source, opened.bundle), opened.document, downloaded)


def check_opened(
    raw: OpenedGrant, listing: GrantListing, *, owner: bytes, identity: AnalystIdentity, now: float
) -> _Opened:
    """Check everything that an opened grant claims, down to the key bundle.

    Raises
    ------
    GrantError
        It is not signed by this owner, or not for this analyst, data set, release, manifest or bundle.
    GrantExpiredError
        It has ended.
    ArchiveError, EnvelopeError, ImageKeyError
        Manifest or bundle are damaged, or belong to something else.
    """
    verifier = Ed25519PublicKey.from_public_bytes(owner)
    _verify(verifier, raw.grant_signature, grant_format.signed_message(raw.grant), "grant")
    document = GrantDocument.from_bytes(raw.grant)
    head = ArchiveHead.from_bytes(raw.manifest)
    key, signature = raw.manifest_signature[:32], raw.manifest_signature[32:]
    if not hmac.compare_digest(key, owner):
        raise GrantError("the release's manifest is signed by somebody else than the grant")
    _verify(verifier, signature, archive.signed_message(raw.manifest), "release's manifest")
    manifest = head.manifest
    for what, expected, found in (
        ("owner", owner.hex(), document.owner),
        ("analyst's signing key", identity.verify_key.hex(), document.analyst_verify_key),
        ("analyst's decryption key", identity.encryption_key.hex(), document.analyst_encryption_key),
        ("grant", listing.grant_id, document.grant_id),
        ("data set", listing.dataset, document.dataset),
        ("release", raw.release_id, document.release_id),
        ("key bundle", hashlib.sha256(raw.bundle).hexdigest(), document.bundle_sha256),
        ("manifest", hashlib.sha256(raw.manifest).hexdigest(), document.manifest_sha256),
        ("manifest's key bundle", head.bundle_sha256, document.bundle_sha256),
        ("manifest's analyst", manifest.site, document.analyst),
        ("manifest's data set", manifest.dataset, document.dataset),
        ("manifest's epoch", manifest.epoch, document.epoch),
        ("manifest's key", manifest.key_id, document.key_id),
    ):
        if expected != found:
            raise GrantError(
                f"the grant names another {what}", expected=expected, found=found, remedy="Ask the data owner"
            )
    if now > document.not_after:
        raise GrantExpiredError(f"the grant for {document.dataset} has ended", remedy="Ask the data owner")
    context = archive.wrap_context(document.analyst, document.dataset, document.epoch)
    bundle = ImageKeyBundle.from_bytes(unwrap_bundle(raw.bundle, identity.decryption_key, context=context))
    if (bundle.key_id, bundle.epoch) != (document.key_id, document.epoch):
        raise GrantError("the grant's key bundle is not the one that it names")
    try:
        open_blob(bundle, head.purpose(), head.sealed_description)
    except EnvelopeError as exc:
        raise GrantError("the release's description does not belong to its manifest") from exc
    return _Opened(document, head, bundle, raw)


def archive_folder(cache: Path, owner: bytes, dataset: str) -> Path:
    """Return the folder of one data set; its name says nothing about the data set's."""
    name = hashlib.sha256(owner + dataset.encode()).hexdigest()[:16]
    return cache / owner.hex()[:16] / name


def _verify(verifier: Ed25519PublicKey, signature: bytes, message: bytes, what: str) -> None:
    try:
        verifier.verify(signature, message)
    except InvalidSignature as exc:
        raise GrantError(f"the {what} is not signed by this data owner") from exc


def _forget_taken_back(
    keystore: Keystore, owner: bytes, granted: set[str], on_event: Callable[[str], None]
) -> None:
    """Destroy the keys of data sets that this owner no longer grants."""
    for held in keystore.grants(expired=True):
        document = held.document
        if document.owner == owner.hex() and document.dataset not in granted:
            keystore.forget(document.owner, document.dataset)
            on_event(f"{document.dataset}: the grant has ended or was taken back; its key is destroyed")


def _from_cache(address: OwnerAddress, keystore: Keystore, cache: Path) -> list[Fetched]:
    owner = keystore.pinned(address.base)
    if owner is None or (address.pin is not None and address.pin != owner):
        return []
    found = []
    for held in keystore.grants():
        document = held.document
        if document.owner != owner.hex():
            continue
        try:
            source = LocalArchive(
                archive_folder(cache, owner, document.dataset),
                site=document.analyst,
                owner_public_key=owner,
            )
            source.manifest()
            found.append(Fetched(source, held.bundle, describe(source, held.bundle), document, 0))
        except (ArchiveError, EnvelopeError, KeystoreError):
            continue  # never fetched to its end, or under an older key
    return found


# --- the download ----------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path, dataset: str) -> Iterator[None]:
    """Be the one process that fills this folder; the kernel lets go of it when the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = lock_exclusively(folder.with_name(folder.name + ".lock"))
    except BlockingIOError as exc:
        raise FetchError(
            f"another process is fetching {dataset} into {folder.parent}", remedy="Wait for it, or stop it"
        ) from exc
    try:
        yield
    finally:
        os.close(lock)


def _is_complete(folder: Path, opened: _Opened) -> bool:
    """Whether the folder holds just the records of this release, whole; its manifest is then as good."""
    try:
        source = LocalArchive(
            folder, site=opened.document.analyst, owner_public_key=bytes.fromhex(opened.document.owner)
        )
        if source.manifest() != opened.head.manifest:
            return False
        if not hmac.compare_digest(source.head.index_sha256, opened.head.index_sha256):
            return False
        for split in archive.SPLITS:
            for _ in source.records(split):
                pass  # each is compared with its digest: what a disk has spoilt is fetched again
    except (ArchiveError, RecordError):
        return False
    return True


def _download(client: OwnerClient, opened: _Opened, folder: Path, on_progress: Progress) -> int:
    """Fill ``folder`` with the release; returns the number of records that came over the network."""
    part = folder.with_name(folder.name + ".part")
    index = _index(client, opened)
    entries = _checked_index(index, opened.head)
    free = shutil.disk_usage(folder.parent).free
    if opened.head.records_bytes + len(index) > free:
        raise FetchError(
            f"{opened.document.dataset} does not fit on the disk of {folder.parent}",
            expected=f"{opened.head.records_bytes + len(index)} bytes free",
            found=f"{free} bytes",
            remedy="Make room, or name another folder with data.cache=",
        )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    held, cursor = _reuse(opened, entries, [part, folder], fresh / archive.RECORDS)
    (fresh / archive.INDEX).write_bytes(index)
    _save_state(fresh, opened, cursor, held)
    shutil.rmtree(part, ignore_errors=True)
    fresh.rename(part)
    total = len(entries)
    on_progress(opened.document.dataset, held, total)
    largest = max((entry.envelope_bytes + entry.label_bytes for entry in entries), default=0)
    done = held
    known = {entry.record_id: place for place, entry in enumerate(entries)}
    with (part / archive.RECORDS).open("ab") as file:
        while done < total:
            data, after = client.records(
                opened.document.grant_id,
                opened.document.release_id,
                cursor,
                limit=MAX_RECORD_LIMIT,
                max_bytes=2 * MAX_PAGE_BYTES + largest + _FRAME_SLACK,
            )
            before = done
            for record in unpack_records(data):
                _require_next(record, entries, done, known)
                file.write(record.envelope + record.sealed_label)
                done += 1
            if done < total and (done == before or after is None or after <= cursor):
                raise TamperedReleaseError(
                    f"{total - done} records of {opened.document.dataset} were dropped",
                    expected=f"record {entries[done].record_id} next",
                    found="the end",
                    remedy="Start again; if it happens again, ask the data owner",
                )
            file.flush()
            os.fsync(file.fileno())
            if after is not None:
                cursor = after
                _save_state(part, opened, cursor, done)
            on_progress(opened.document.dataset, done, total)
    (part / archive.MANIFEST).write_bytes(opened.raw.manifest)
    (part / archive.SIGNATURE).write_bytes(opened.raw.manifest_signature)
    _publish(part, folder)
    return done - held


def _index(client: OwnerClient, opened: _Opened) -> bytes:
    total = (opened.head.manifest.train + opened.head.manifest.test) * archive.ENTRY_BYTES
    if total > MAX_INDEX_BYTES:
        raise FetchError(
            f"the release of {opened.document.dataset} claims more records than can be fetched",
            expected=f"at most {MAX_INDEX_BYTES // archive.ENTRY_BYTES}",
            found=total // archive.ENTRY_BYTES,
            remedy="Ask the data owner for a share of it",
        )
    parts: list[bytes] = []
    size, cursor = 0, 0
    while True:
        data, after = client.index(
            opened.document.grant_id, opened.document.release_id, cursor, MAX_INDEX_LIMIT
        )
        parts.append(data)
        size += len(data)
        if after is None or size > total:
            return b"".join(parts)
        if after <= cursor or not data:
            raise FetchError("the data owner sends pages of the index that lead nowhere")
        cursor = after


def _checked_index(index: bytes, head: ArchiveHead) -> list[IndexEntry]:
    if not hmac.compare_digest(hashlib.sha256(index).hexdigest(), head.index_sha256):
        raise TamperedReleaseError(
            "the release's index is not the one that the data owner signed",
            remedy="Start again; if it happens again, ask the data owner",
        )
    entries = archive.unpack_index(index)
    if len({entry.record_id for entry in entries}) != len(entries):
        raise TamperedReleaseError("the release's index names a record twice", remedy="Ask the data owner")
    if len({entry.digest for entry in entries}) != len(entries):
        raise TamperedReleaseError("the release holds one record twice", remedy="Ask the data owner")
    counts = Counter(entry.split for entry in entries)
    size = sum(entry.envelope_bytes + entry.label_bytes for entry in entries)
    claimed = head.manifest
    if (counts["train"], counts["test"], size) != (claimed.train, claimed.test, head.records_bytes):
        raise TamperedReleaseError(
            "the release's index does not fit its manifest",
            expected=f"{claimed.train} train, {claimed.test} test, {head.records_bytes} bytes",
            found=f"{counts['train']} train, {counts['test']} test, {size} bytes",
            remedy="Ask the data owner",
        )
    return entries


def _require_next(record: SealedRecord, entries: list[IndexEntry], place: int, known: dict[str, int]) -> None:
    """Accept the one record that must come next, or say what was done to it."""
    remedy = "Start again: what came before it is kept. If it happens again, ask the data owner"
    if place >= len(entries):
        what = "duplicated" if record.record_id in known else "added"
        raise TamperedReleaseError(f"record {record.record_id} was {what}", remedy=remedy)
    entry = entries[place]
    if record.record_id != entry.record_id:
        found = known.get(record.record_id)
        if found is None:
            raise TamperedReleaseError(
                f"record {record.record_id} is not in the release: it was made up, or put in the place of "
                f"{entry.record_id}",
                remedy=remedy,
            )
        what = "duplicated" if found < place else f"sent in place of {entry.record_id} (dropped or swapped)"
        raise TamperedReleaseError(f"record {record.record_id} was {what}", remedy=remedy)
    lengths = (len(record.envelope), len(record.sealed_label)) == (entry.envelope_bytes, entry.label_bytes)
    digest = archive.record_digest(record.envelope, record.sealed_label)
    if not lengths or not hmac.compare_digest(digest, entry.digest):
        raise TamperedReleaseError(f"record {record.record_id} was altered or substituted", remedy=remedy)


def _reuse(opened: _Opened, entries: list[IndexEntry], folders: list[Path], target: Path) -> tuple[int, int]:
    """Copy what is here already to ``target``; returns how many records, and the cursor to go on from.

    Positions of an epoch never change and new records come at the end, so what was fetched up to a cursor is
    all that any later release has up to that cursor, but for deletions.
    """
    target.touch(mode=0o600)
    for folder in folders:
        state = _saved_state(folder, opened)
        if state is None:
            continue
        cursor, records = state
        held = _held_records(folder, records)
        if held is None:
            continue  # the cursor is that of records which are not here
        done = 0
        with (folder / archive.RECORDS).open("rb") as source, target.open("wb") as sink:
            for entry in entries:
                if entry.digest not in held:
                    break
                source.seek(held[entry.digest])
                data = source.read(entry.envelope_bytes + entry.label_bytes)
                label = data[entry.envelope_bytes :]
                if archive.record_digest(data[: entry.envelope_bytes], label) != entry.digest:
                    break
                sink.write(data)
                done += 1
            whole = done == len(entries) or entries[done].digest not in held
            if done and whole:
                return done, cursor
    target.write_bytes(b"")
    return 0, 0


def _held_records(folder: Path, count: int) -> dict[bytes, int] | None:
    """Return digest -> offset of the first ``count`` records of a folder; None where not all are there."""
    found: dict[bytes, int] = {}
    try:
        size = (folder / archive.RECORDS).stat().st_size
        entries = archive.unpack_index((folder / archive.INDEX).read_bytes())[:count]
    except (OSError, ArchiveError):
        return None  # a power failure can leave such a file
    offset = 0
    for entry in entries:
        end = offset + entry.envelope_bytes + entry.label_bytes
        if end > size:
            return None
        found[entry.digest] = offset
        offset = end
    return found if len(found) == count else None


def _save_state(folder: Path, opened: _Opened, cursor: int, records: int) -> None:
    document = opened.document
    state = {
        "owner": document.owner,
        "dataset_sha256": hashlib.sha256(document.dataset.encode()).hexdigest(),
        "epoch": document.epoch,
        "share": [document.share_index, document.share_parts],
        "cursor": cursor,
        "records": records,
    }
    write_atomic(folder / _STATE, json.dumps(state).encode(), mode=0o600)


def _saved_state(folder: Path, opened: _Opened) -> tuple[int, int] | None:
    """Return the cursor up to which a folder was filled, and the number of records up to there.

    None where it belongs to another epoch or share.
    """
    document = opened.document
    try:
        state = json.loads((folder / _STATE).read_bytes())
        same = (
            state["owner"] == document.owner
            and state["epoch"] == document.epoch
            and state["share"] == [document.share_index, document.share_parts]
        )
        files = (folder / archive.INDEX).is_file() and (folder / archive.RECORDS).is_file()
        cursor, records = int(state["cursor"]), int(state["records"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (cursor, records) if same and files else None


def _publish(part: Path, folder: Path) -> None:
    for file in part.iterdir():
        sync_path(file)
    sync_path(part)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    sync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
