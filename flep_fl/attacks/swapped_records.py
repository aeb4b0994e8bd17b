"""Records that change places: the attack that pseudonymised records alone do not survive.

The paper's motivation: records are released under pseudonyms, and somebody between owner and analyst lets
images and labels change places, drops or repeats some. Nothing has to be decrypted for that.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import SwappedRecords
from flep_fl.attacks.stolen_archive import SITE, Owner, make_owner
from flep_fl.attacks.victims import cipher_configuration, victim_images
from flep_fl.config import Config
from flep_fl.contracts import archive
from flep_fl.contracts.archive import ArchiveHead, unpack_index
from flep_fl.contracts.errors import FlepError
from flep_fl.data_analyst.restore import restore_split
from flep_fl.data_analyst.source import LocalArchive, unlock
from flep_fl.data_security.presets import build_cipher


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as it lies in an archive."""

    record_id: str
    envelope: bytes
    label: bytes


Change = Callable[[list[Entry]], list[Entry]]


def _swap_images(entries: list[Entry]) -> list[Entry]:
    a, b, *rest = entries
    return [replace(a, envelope=b.envelope), replace(b, envelope=a.envelope), *rest]


def _swap_labels(entries: list[Entry]) -> list[Entry]:
    a, b, *rest = entries
    return [replace(a, label=b.label), replace(b, label=a.label), *rest]


def _swap_names(entries: list[Entry]) -> list[Entry]:
    a, b, *rest = entries
    return [replace(a, record_id=b.record_id), replace(b, record_id=a.record_id), *rest]


def _repeat(entries: list[Entry]) -> list[Entry]:
    return [entries[0], entries[0], *entries[2:]]


def _drop(entries: list[Entry]) -> list[Entry]:
    return entries[1:]


CHANGES: dict[str, Change] = {
    "images": _swap_images,
    "labels": _swap_labels,
    "names": _swap_names,
    "repeat": _repeat,
    "drop": _drop,
}
"""What the attacker does; the archive's index, manifest and signature are made to fit."""


def run(config: Config, settings: SwappedRecords, folder: Path) -> Outcome:
    """Change an archive in every way, and let the analyst read it."""
    pool = victim_images(settings.images, settings.side, 2)
    images = [np.roll(pool[number % 2], number, axis=0) for number in range(settings.records)]
    owner = make_owner(config, folder)
    stolen = owner.release(images)
    pinned = owner.signing_key.public_key().public_bytes_raw()
    honest = _reads(owner, stolen.path, pinned)
    tried: dict[str, float] = {}
    for name, change in CHANGES.items():
        for depth in ("records", "index", "signed"):
            changed = _changed(stolen.path, folder / f"{name}_{depth}", change, depth)
            if _same(stolen.path, changed):
                continue  # names stand in the index, not in the records
            tried[f"{name}/{depth}"] = float(_reads(owner, changed, pinned))
            # An analyst who has not pinned the owner's key, as before the first kit.
            tried[f"{name}/{depth}/unpinned"] = float(_reads(owner, changed, None))
    flips = [
        float(_reads(owner, _flipped(stolen.path, folder / f"flip_{n}"), pinned))
        for n in range(settings.flips)
    ]
    return Outcome(
        configuration={**cipher_configuration(config), "records": settings.records, "ways": len(tried)},
        success={
            "accepted": float(np.mean(list(tried.values()))),
            "honest_archive_accepted": float(honest),
        },
        baseline={"accepted": float(np.mean(flips))},
        falls=any(tried.values()),
        criterion="an analyst takes a changed archive",
        note="Share of changed archives that an analyst reads. Each change is tried on the records alone, "
        "with the index made to fit, and with a new signature; with and without the owner's key pinned. "
        "Blind guessing: one flipped bit anywhere.",
    )


def _reads(owner: Owner, path: Path, pinned: bytes | None) -> bool:
    """Whether an analyst who holds the right key takes all records of an archive."""
    try:
        source = LocalArchive(path, site=SITE, owner_public_key=pinned)
        bundle = unlock(source, owner.recipient.private_bytes_raw())
        cipher = build_cipher(bundle, allow_targets=owner.config.allow_targets)
        restore_split(source, cipher=cipher, bundle=bundle, denoise=None, split="train", input_size=None)
    except FlepError:
        return False
    return True


def _changed(source: Path, target: Path, change: Change, depth: str) -> Path:
    """Copy an archive with its records changed, and as much of its paper work as ``depth`` says."""
    shutil.copytree(source, target)
    index = unpack_index((source / archive.INDEX).read_bytes())
    data, position, entries = (source / archive.RECORDS).read_bytes(), 0, []
    for one in index:
        middle, end = position + one.envelope_bytes, position + one.envelope_bytes + one.label_bytes
        entries.append(Entry(one.record_id, data[position:middle], data[middle:end]))
        position = end
    entries = change(entries)
    (target / archive.RECORDS).write_bytes(b"".join(entry.envelope + entry.label for entry in entries))
    if depth == "records":
        return target
    described = [
        replace(
            index[0],
            record_id=entry.record_id,
            envelope_bytes=len(entry.envelope),
            label_bytes=len(entry.label),
            digest=archive.record_digest(entry.envelope, entry.label),
        )
        for entry in entries
    ]
    packed = b"".join(one.pack() for one in described)
    (target / archive.INDEX).write_bytes(packed)
    head = ArchiveHead.from_bytes((source / archive.MANIFEST).read_bytes())
    head = replace(
        head,
        manifest=replace(head.manifest, train=len(entries)),
        records_bytes=sum(len(entry.envelope) + len(entry.label) for entry in entries),
        index_sha256=hashlib.sha256(packed).hexdigest(),
    )
    manifest = head.to_bytes()
    (target / archive.MANIFEST).write_bytes(manifest)
    if depth == "signed":
        key = Ed25519PrivateKey.generate()
        signature = key.sign(archive.signed_message(manifest))
        (target / archive.SIGNATURE).write_bytes(key.public_key().public_bytes_raw() + signature)
    return target


def _same(one: Path, other: Path) -> bool:
    files = (archive.RECORDS, archive.INDEX, archive.MANIFEST, archive.SIGNATURE)
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def _flipped(source: Path, target: Path) -> Path:
    """Copy an archive with one random bit flipped."""
    shutil.copytree(source, target)
    path = secrets.choice([target / archive.RECORDS, target / archive.INDEX, target / archive.MANIFEST])
    data = bytearray(path.read_bytes())
    data[secrets.randbelow(len(data))] ^= 1 << secrets.randbelow(8)
    path.write_bytes(data)
    return target
