"""What is refused before it reaches the private database."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from flep_fl.contracts.errors import DatabaseError, DataError, ImageFormatError, RecordError
from flep_fl.contracts.owner_records import Capture, OwnerImage
from flep_fl.private_database.rows import Dataset
from flep_fl.private_database.sealing import KEY_BYTES, SPLITS

MAX_IMAGE_BYTES = 1 << 28
MAX_METADATA_BYTES = 4096


def checked_image(image: OwnerImage, what: str) -> OwnerImage:
    """Refuse what is no image.

    Raises
    ------
    ImageFormatError
        Not uint8 or uint16, not (H, W) or (C, H, W), empty, or too large.
    """
    kinds = (np.dtype(np.uint8), np.dtype(np.uint16))
    usable = isinstance(image, np.ndarray) and image.dtype.newbyteorder("=") in kinds and image.ndim in (2, 3)
    if not usable or 0 in image.shape:
        raise ImageFormatError(
            f"{what} is not of a supported shape and dtype",
            expected="(H, W) or (C, H, W), uint8 or uint16, not empty",
            found=f"{np.shape(image)}, {getattr(image, 'dtype', type(image).__name__)}",
        )
    if image.nbytes > MAX_IMAGE_BYTES or max(image.shape) > 1 << 16 or image.shape[0] >= 1 << 16:
        raise ImageFormatError(
            f"{what} is too large", expected=f"at most {MAX_IMAGE_BYTES} bytes", found=f"{image.nbytes} bytes"
        )
    return image


def check_key(owner_key: bytes) -> None:
    """Refuse an owner's key of another length; raise :class:`DatabaseError`."""
    if len(owner_key) != KEY_BYTES:
        raise DatabaseError(
            "the owner key has a wrong length", expected=f"{KEY_BYTES} bytes", found=f"{len(owner_key)} bytes"
        )


def corrupt(record_id: str) -> RecordError:
    """Make the error of a corrupt record."""
    return RecordError(
        f"record {record_id} of the private database is corrupt",
        remedy="Restore it from a backup or ingest the image again; other records are not affected",
    )


def unknown(record_id: str) -> RecordError:
    """Make the error of a record that is not there."""
    return RecordError(f"the private database has no record {record_id}")


def check_ingest(
    target: Dataset, images: Sequence[OwnerImage], labels: Sequence[int], splits: Iterable[str]
) -> None:
    """Refuse labels and splits that do not fit; raise :class:`DataError` with the position."""
    names = list(splits)
    if not len(images) == len(labels) == len(names):
        raise DataError(
            "images, labels and splits differ in number",
            found=f"{len(images)}, {len(labels)}, {len(names)}",
        )
    for i, (label, split) in enumerate(zip(labels, names, strict=True)):
        check_label(target, label, f"image {i}")
        if split not in SPLITS:
            raise DataError(
                f"split of image {i} is unknown", expected="one of " + ", ".join(SPLITS), found=split
            )


def check_label(target: Dataset, label: int, what: str) -> None:
    """Refuse a label that is no class of the data set; raise :class:`DataError`."""
    if not 0 <= label < len(target.classes):
        raise DataError(
            f"label of {what} is out of range", expected=f"0..{len(target.classes) - 1}", found=label
        )


def check_texts(capture: Capture) -> None:
    """Refuse long texts and numbers out of range; raise :class:`DataError`."""
    texts = [capture.device_id, capture.idempotency_key or "", *capture.metadata, *capture.metadata.values()]
    if sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) > MAX_METADATA_BYTES:
        raise DataError(
            "device, idempotency key and metadata are too long",
            expected=f"{MAX_METADATA_BYTES} bytes together",
        )
    if not math.isfinite(capture.captured_at):
        raise DataError("the time of a capture is not finite", found=capture.captured_at)
    if not 0 <= capture.sequence < 1 << 63:
        raise DataError("the sequence number is out of range", expected="0..2^63-1", found=capture.sequence)


def same_capture(stored: Capture, sent: Capture) -> bool:
    """Return whether two captures of one device and sequence are the same; idempotency keys may differ."""
    names = ("dataset", "device_id", "sequence", "label", "split")
    return (
        all(getattr(stored, name) == getattr(sent, name) for name in names)
        and float(stored.captured_at) == float(sent.captured_at)
        and dict(stored.metadata) == dict(sent.metadata)
        and stored.image.dtype.itemsize == sent.image.dtype.itemsize
        and np.array_equal(stored.image, sent.image)
    )
