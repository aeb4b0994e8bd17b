"""The life of one image and the figures of this run's cipher: what the owner's side shows in a report.

Keys, nonces and noise secrets are drawn for the page alone. The run's own keys and archives are not touched,
so that a page that shows a plain image beside its cipher image gives nobody a pair to attack the run with.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flep_fl.contracts.errors import DamagedResultsError
from flep_fl.contracts.ports import Denoise, ImageCipher
from flep_fl.data_security.limits import entropy_mean
from flep_fl.data_security.metrics import histogram, psnr
from flep_fl.data_security.parameters import CipherParameters
from flep_fl.data_security.pipeline import RestoreOrder, restore
from flep_fl.reporting.cipher_evaluation import Subject, evaluate, layer_subjects

GreyImage = NDArray[np.uint8]
"""uint8, shape (H, W), 0..255."""

LARGEST_SIDE = 320
"""Pixels; of larger images the middle is shown and measured."""

SMALLEST_SIDE = 64
"""Below it, statistics of one image say little: a sheet of several images is measured instead."""

SHEET_SIDE = 128
LEVEL = 0.05

_MEANINGS = {
    "scramble": "sub-blocks in the order of a chaotic sequence",
    "encode": "wavelet sub-bands, blended with a secret image",
    "noise": "noise from a secret of the owner",
    "mask": "plus a key stream: no structure is left",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One station in the life of an image: name, what happened, and the picture (PNG)."""

    name: str
    caption: str
    png: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageView:
    """What a report shows of images and their cipher.

    Attributes
    ----------
    stages
        The life of one image, in order.
    fourth
        Original, encrypted and decrypted picture, in the manner of the paper's Fig. 4.
    histograms
        Of these, 256 counts each.
    measured
        What was measured, in words.
    evaluation
        As :func:`.cipher_evaluation.evaluate` returns it; None where nothing was measured.
    """

    stages: Sequence[Stage]
    fourth: Sequence[Stage]
    histograms: Sequence[Sequence[int]]
    measured: str
    evaluation: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "stages": [stage_json(stage) for stage in self.stages],
            "fourth": [stage_json(stage) for stage in self.fourth],
            "histograms": [list(counts) for counts in self.histograms],
            "measured": self.measured,
            "evaluation": self.evaluation,
        }

    @classmethod
    def from_json(cls, value: Any) -> ImageView:
        """Undo :meth:`to_json`.

        Raises
        ------
        DamagedResultsError
            When the value is not of that form.
        """
        try:
            return cls(
                [stage_from(entry) for entry in value["stages"]],
                [stage_from(entry) for entry in value["fourth"]],
                [[int(count) for count in counts] for counts in value["histograms"]],
                str(value["measured"]),
                value["evaluation"],
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise DamagedResultsError(f"The pictures of a run cannot be read ({exc!r})") from exc


def view_images(
    images: Sequence[NDArray[np.uint8] | NDArray[np.uint16]],
    cipher: ImageCipher,
    subject: Subject | None,
    *,
    denoise: Denoise | None,
    order: RestoreOrder,
    keys: int,
    seed: int,
) -> ImageView:
    """Follow one image through the cipher, and measure the cipher on it.

    Parameters
    ----------
    images
        A few of the owner's, uint8 or uint16, (H, W) or (C, H, W). The one with the most contrast is
        followed. Colour becomes grey and 16 bits become 8 for this.
    cipher
        As the run's, under keys of its own.
    subject
        The layers of the run's cipher; None where it is a class of the user's own, which has none that
        could be shown or measured one by one.
    denoise, order
        How the run restores images.
    keys
        Random keys that the statistics are taken over; 0 measures nothing.
    seed
        Chooses pixels and blocks that are measured, never keys.
    """
    grey = [_middle(as_grey(image)) for image in images]
    followed = max(grey, key=lambda image: float(image.std()))
    sheet = followed if min(followed.shape) >= SMALLEST_SIDE else contact_sheet(grey)
    what = "an image of this run" if sheet is followed else "a sheet of this run's images"
    envelope = cipher.encrypt(sheet[None])[0]
    encrypted = _rows_of_bytes(envelope, sheet.shape[1])
    measured = "the sealed bytes"
    if subject is not None and subject.parameters.layers:
        encrypted = subject.cipher_images(subject.draw(), sheet[None])[0]
        measured = "the sealed bytes" if subject.sealed else "the wire image before the envelope"
    decrypted = restore(cipher, [envelope], denoise, order)[0].astype(np.uint8)
    evaluation = None
    if keys and subject is not None:
        evaluation = _evaluated(sheet, subject, denoise=denoise, order=order, keys=keys, seed=seed)
    shown = [("original", sheet), ("encrypted", encrypted), ("decrypted", decrypted)]
    return ImageView(
        life_of(followed, cipher, subject, denoise=denoise, order=order),
        [Stage(name, "", png(image)) for name, image in shown],
        [[int(count) for count in histogram(image)] for _, image in shown],
        f"{what}, {sheet.shape[1]} x {sheet.shape[0]} pixels; encrypted is {measured}",
        evaluation,
    )


def _evaluated(
    sheet: GreyImage, subject: Subject, *, denoise: Denoise | None, order: RestoreOrder, keys: int, seed: int
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    report = evaluate(
        {f"{sheet.shape[1]} x {sheet.shape[0]}": sheet},
        subject,
        keys=keys,
        denoise=denoise,
        order=order,
        rng=rng,
        level=LEVEL,
    )
    sizes = {entry["pixels"] for entry in report["limits"].values()}
    return report | {"level": LEVEL, "ideal_entropy": {str(pixels): entropy_mean(pixels) for pixels in sizes}}


def life_of(
    image: GreyImage,
    cipher: ImageCipher,
    subject: Subject | None,
    *,
    denoise: Denoise | None,
    order: RestoreOrder,
) -> list[Stage]:
    """Return the stations of one image: captured, layer upon layer, sealed, restored, denoised."""
    stages = [Stage("captured", f"{image.shape[1]} x {image.shape[0]}, seen by the owner alone", png(image))]
    for layer, _, up_to in [] if subject is None else layer_subjects(subject):
        if layer in _MEANINGS:
            wire = up_to.draw().wire_images(image[None])[0]
            stages.append(Stage(layer, _MEANINGS[layer], png(displayed(wire, up_to.parameters))))
    envelope = cipher.encrypt(image[None])[0]
    sealed = "" if subject is None or not subject.parameters.has("envelope") else ", AES-256-GCM-SIV"
    picture = png(_rows_of_bytes(envelope, image.shape[1]))
    stages.append(Stage("on the wire", f"{len(envelope):,} bytes{sealed}", picture))
    restored = restore(cipher, [envelope])[0].astype(np.uint8)
    stages.append(Stage("restored", f"at the analyst, in memory: {_quality(image, restored)}", png(restored)))
    if denoise is not None:
        final = restore(cipher, [envelope], denoise, order)[0].astype(np.uint8)
        stages.append(Stage("denoised", f"what the model learns from: {_quality(image, final)}", png(final)))
    return stages


def displayed(wire: NDArray[Any], parameters: CipherParameters) -> GreyImage:
    """Scale a wire image's coefficients to 0..255 for showing, each sub-band by its own bits."""
    shown = wire.astype(np.float64)
    if parameters.has("encode"):
        rows, columns = wire.shape[0] // 2, wire.shape[1] // 2
        places = [(slice(0, rows), slice(0, columns)), (slice(0, rows), slice(columns, None))]
        places += [(slice(rows, None), slice(0, columns)), (slice(rows, None), slice(columns, None))]
        for place, bits in zip(places, parameters.band_bits, strict=True):
            shown[place] *= 255 / (2**bits - 1)
    else:
        shown *= 255 / (2 ** max(parameters.band_bits) - 1)
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def as_grey(image: NDArray[Any]) -> GreyImage:
    """Return an image as 8-bit grey: 16 bits scaled, channels averaged with the weights of ITU-R BT.601."""
    scaled = image.astype(np.float64) * (255 / np.iinfo(image.dtype).max)
    if scaled.ndim == 3:
        weights = (
            np.array([0.299, 0.587, 0.114]) if len(scaled) == 3 else np.full(len(scaled), 1 / len(scaled))
        )
        scaled = np.tensordot(weights, scaled, axes=1)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def contact_sheet(images: Sequence[GreyImage], side: int = SHEET_SIDE) -> GreyImage:
    """Lay images side by side, repeated as often as needed, to a square of ``side`` pixels."""
    height, width = images[0].shape
    same = [image for image in images if image.shape == (height, width)]
    across, down = -(-side // width), -(-side // height)
    rows = [np.hstack([same[(row * across + i) % len(same)] for i in range(across)]) for row in range(down)]
    return np.ascontiguousarray(np.vstack(rows)[:side, :side])


def png(image: GreyImage) -> bytes:
    """Encode a grey image, the same bytes each time."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _middle(image: GreyImage) -> GreyImage:
    top, left = (max(0, side - LARGEST_SIDE) // 2 for side in image.shape)
    return np.ascontiguousarray(image[top : top + LARGEST_SIDE, left : left + LARGEST_SIDE])


def _rows_of_bytes(data: bytes, columns: int) -> GreyImage:
    """Return bytes as the rows of a picture; the last row is filled with zeros."""
    rows = -(-len(data) // columns)
    return np.frombuffer(data.ljust(rows * columns, b"\0"), np.uint8).reshape(rows, columns)


def _quality(image: GreyImage, other: GreyImage) -> str:
    decibel = psnr(image, other)
    return f"{decibel:.1f} dB PSNR" if np.isfinite(decibel) else "exact"


def stage_json(stage: Stage) -> dict[str, str]:
    """Return a station as plain JSON values."""
    return {"name": stage.name, "caption": stage.caption, "png": base64.b64encode(stage.png).decode()}


def stage_from(value: Any) -> Stage:
    """Undo :func:`stage_json`; KeyError, TypeError or ValueError where the value is not of that form."""
    return Stage(str(value["name"]), str(value["caption"]), base64.b64decode(value["png"], validate=True))
