"""From sealed records to the classifier's input, in memory only: decrypt, restore, denoise, reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flep_fl.contracts.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    EnvelopeError,
    RecordError,
    WrongImageKeyError,
)
from flep_fl.contracts.ports import Denoise, ImageCipher, RecordSource
from flep_fl.contracts.records import SealedRecord
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.labels import open_label
from flep_fl.data_security.pipeline import RestoreOrder, pixel_type
from flep_fl.data_security.restoring import decrypt_images, denoised, require_order, residual_std

_BATCH = 16  # images decrypted and denoised at once


@dataclass(frozen=True, slots=True)
class RestoredSplit:
    """Plain images of one split; they exist in memory only.

    Attributes
    ----------
    images
        float32, shape (N, C, S, S') on the 0..255 scale, clipped; C is 1 for grey images. Images of 16
        bits keep their fractions of a grey level.
    labels
        int64, shape (N,).
    skipped
        Ids of corrupt records that were left out.
    """

    images: NDArray[np.float32] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def restore_split(
    source: RecordSource,
    *,
    cipher: ImageCipher,
    bundle: ImageKeyBundle,
    denoise: Denoise | None,
    split: str,
    input_size: int | None,
    order: RestoreOrder = "restore_first",
    on_corrupt: Callable[[RecordError], None] | None = None,
) -> RestoredSplit:
    """Decrypt and restore all images of a split; nothing is written anywhere.

    Images are restored and denoised at the size at which they were sealed and reduced only then: noise that
    was added before a reduction costs the classifier less than noise added after it.

    Parameters
    ----------
    source
        Where the sealed records come from.
    cipher
        The image cipher over ``bundle``; undoes everything but irreversible noise. Where it leaves none,
        pixels are rounded to the levels that they were, so that a lossless wire costs nothing at all.
    bundle
        Key bundle, for the labels.
    denoise
        The denoiser for the bundle's noise, called with each channel as an image of its own; None where
        nothing is left to remove.
    split
        "train" or "test".
    input_size
        Side of the classifier's input in pixels, by exact area averages. Smaller images are not enlarged;
        None keeps every size. All images must end at one size, with one number of channels.
    order
        ``denoise_first``: the denoiser sees the wire image, as the paper has it.
    on_corrupt
        Receives the error of each corrupt record, which is then left out; None raises the first one.

    Returns
    -------
    RestoredSplit
        At least one image, in the order of the source.

    Raises
    ------
    RecordError
        A record does not decrypt or its label does not belong to it; its id is named.
    WrongImageKeyError
        The records were sealed under another bundle.
    EmptyDatasetError
        The split has no usable record.
    DenoiserError
        The denoiser returned something that is no such batch.
    DataError
        Images differ in channels, or in size while ``input_size`` is None.
    CipherParameterError
        The cipher cannot follow ``order``.
    """
    require_order(cipher, order)
    noiseless = residual_std(cipher) == 0
    if input_size is not None and input_size < 1:
        raise ConfigError("model.input_size is out of range", expected=">= 1 or null", found=input_size)
    skipped: list[str] = []

    def report(error: RecordError, record_id: str) -> None:
        if on_corrupt is None:
            raise error
        skipped.append(record_id)
        on_corrupt(error)

    def decrypt(envelopes: Sequence[bytes]) -> list[NDArray[np.float32]]:
        first = denoise if order == "denoise_first" else None
        images = decrypt_images(cipher, envelopes, denoise=first, order=order)
        if noiseless:
            pairs = zip(images, envelopes, strict=True)
            images = [_whole_levels(image, envelope) for image, envelope in pairs]
        return [image[None] if image.ndim == 2 else image for image in images]

    images: list[NDArray[np.float32]] = []
    labels: list[int] = []
    for batch in _batches(source.records(split), _BATCH):
        opened = list(_open(batch, decrypt, bundle, split, report))
        for _, group in groupby(opened, key=lambda pair: pair[0].shape):
            members = list(group)
            stack = np.stack([image for image, _ in members])
            if denoise is not None and order == "restore_first":
                stack = denoised(denoise, stack.reshape(-1, *stack.shape[2:])).reshape(stack.shape)
            images.extend(np.stack([reduce_area(plane, input_size) for plane in image]) for image in stack)
            labels.extend(label for _, label in members)
    if not images:
        raise EmptyDatasetError(f"the {split} split has no usable record")
    if len(shapes := {image.shape for image in images}) > 1:
        raise DataError(
            "the restored images differ in size or channels",
            expected="one shape",
            found=f"{len(shapes)} shapes",
            remedy="Set model.input_size, or seal the images at one data.image_size and in one colour mode",
        )
    pixels = np.stack(images)
    np.clip(pixels, 0.0, 255.0, out=pixels)
    return RestoredSplit(pixels, np.array(labels, dtype=np.int64), tuple(skipped))


def _open(
    batch: Sequence[SealedRecord],
    decrypt: Callable[[Sequence[bytes]], list[NDArray[np.float32]]],
    bundle: ImageKeyBundle,
    split: str,
    report: Callable[[RecordError, str], None],
) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Decrypt a batch to (C, H, W) each; where it fails, go one by one to name the record at fault."""
    try:
        images = decrypt([record.envelope for record in batch])
    except WrongImageKeyError:
        raise
    except EnvelopeError:
        images = None
    for i, record in enumerate(batch):
        try:
            image = images[i] if images is not None else decrypt([record.envelope])[0]
            yield image, open_label(bundle, record.record_id, split, record.sealed_label)
        except WrongImageKeyError:
            raise
        except EnvelopeError as exc:
            error = RecordError(
                f"record {record.record_id} does not open: {exc.problem}",
                remedy="Fetch the archive again; other records are not affected",
            )
            error.__cause__ = exc
            report(error, record.record_id)


def _whole_levels(image: NDArray[np.float32], envelope: bytes) -> NDArray[np.float32]:
    """Round to whole levels of the image's own dtype; 257 levels of a uint16 image are one of the scale."""
    levels = np.float32(np.iinfo(pixel_type(envelope)).max // 255)
    rounded: NDArray[np.float32] = np.rint(image * levels) / levels
    return rounded


def reduce_area(image: NDArray[np.float32], side: int | None) -> NDArray[np.float32]:
    """Reduce one channel, float32 (H, W), to ``side`` by area averages; never enlarge it."""
    if side is None or max(image.shape) <= side:
        return np.asarray(image, dtype=np.float32)
    floats = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.asarray(floats.resize((side, side), Image.Resampling.BOX), dtype=np.float32)


def _batches(records: Iterator[SealedRecord], size: int) -> Iterator[list[SealedRecord]]:
    while batch := list(islice(records, size)):
        yield batch
