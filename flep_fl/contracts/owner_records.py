"""Records of the data owner's side: what devices bring, what analysts are granted, what leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.ports import ImageBatch
from flep_fl.contracts.records import SealedRecord

OwnerImage = NDArray[np.uint8] | NDArray[np.uint16]
"""One image as the owner holds it: uint8 or uint16 over the whole range, (H, W) or (C, H, W)."""


def stacked(images: Sequence[OwnerImage]) -> ImageBatch:
    """Stack images of one shape and dtype to a batch, (N, H, W) or (N, C, H, W)."""
    batch: ImageBatch = np.stack(images)  # type: ignore[assignment]  # numpy forgets the dtypes of a union
    return batch


@dataclass(frozen=True, slots=True)
class Capture:
    """One image on its way into the private database.

    Attributes
    ----------
    dataset
        Name of a data set that the database has.
    device_id, sequence
        Which device took it, and the device's own number for it (0 or more). The pair is stored once: the
        same pair with the same content is answered with the record that is there, with other content refused.
    image
        uint8 or uint16, (H, W) or (C, H, W).
    label
        Class index; None where it is not known yet. Records without a label are not released.
    split
        "train" or "test"; None lets the database draw it at the data set's test fraction.
    captured_at
        The device's clock, seconds since 1970 (UTC). Kept, never trusted: order comes from the database.
    idempotency_key
        The sender's key for this request (at most 128 bytes), unique for the device; None where it has none.
    metadata
        Short texts that stay with the image, sealed, and never leave.
    """

    dataset: str
    device_id: str
    sequence: int
    image: OwnerImage = field(repr=False)
    label: int | None = field(default=None, repr=False)
    split: str | None = None
    captured_at: float = 0.0
    idempotency_key: str | None = field(default=None, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the database answers once a capture is on stable storage.

    Attributes
    ----------
    record_id
        32 random hex digits.
    is_new
        False where the same capture was stored before.
    """

    record_id: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A data set of the owner.

    Attributes
    ----------
    name, classes
        Its name and its class names.
    epoch
        The current key epoch.
    train, test
        Numbers of records by split.
    unlabelled
        How many of them have no label yet.
    released
        How many records the current release holds; 0 where nothing was released in this epoch.
    """

    name: str
    classes: tuple[str, ...]
    epoch: int
    train: int
    test: int
    unlabelled: int
    released: int


@dataclass(frozen=True, slots=True)
class Analyst:
    """An analyst as the owner knows it: a name and two public keys, 32 raw bytes each.

    Attributes
    ----------
    name
        Name of the site; goes into manifests in the clear.
    verify_key
        Ed25519, verifies the analyst's requests.
    encryption_key
        X25519, to which key bundles are wrapped.
    """

    name: str
    verify_key: bytes
    encryption_key: bytes


@dataclass(frozen=True, slots=True)
class Grant:
    """What the owner decided: this analyst may fetch this data set until then.

    Attributes
    ----------
    grant_id
        32 random hex digits.
    analyst, dataset
        Who may fetch what.
    share
        ``(index, parts)``: which part of the data set; (0, 1) is all of it. Parts are disjoint, drawn by the
        records' random identifiers.
    not_after
        Last second of validity, seconds since 1970 (UTC).
    created_at
        When it was made, by the owner's clock.
    revoked_at
        When it was taken back; None while it stands.
    """

    grant_id: str
    analyst: Analyst
    dataset: str
    share: tuple[int, int]
    not_after: int
    created_at: int
    revoked_at: int | None = None


@dataclass(frozen=True, slots=True)
class OpenedGrant:
    """Everything that an analyst needs before it asks for records; all of it is checked at the analyst.

    Attributes
    ----------
    release_id
        32 hex digits; names the frozen set of records that the manifest describes.
    grant, grant_signature
        The signed grant (:mod:`flep_fl.contracts.grants`) and the owner's 64-byte signature.
    manifest, manifest_signature
        ``manifest.json`` and ``manifest.sig`` of :mod:`flep_fl.contracts.archive`.
    bundle
        The key bundle, wrapped for the analyst with HPKE.
    """

    release_id: str
    grant: bytes
    grant_signature: bytes
    manifest: bytes
    manifest_signature: bytes
    bundle: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class IndexPage:
    """Some entries of ``index.bin``, in order; ``cursor`` asks for what follows, None at the end."""

    entries: bytes = field(repr=False)
    cursor: int | None


@dataclass(frozen=True, slots=True)
class RecordPage:
    """Some released records, in the order of the index; ``cursor`` asks for what follows, None at the end."""

    records: tuple[SealedRecord, ...] = field(repr=False)
    cursor: int | None
