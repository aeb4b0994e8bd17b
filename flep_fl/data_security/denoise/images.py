"""Reading a folder of pictures as luma, for training and for validation."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flep_fl.contracts.errors import EmptyDatasetError, ImageFormatError

LumaImage = NDArray[np.uint8]
"""(H, W) uint8, ITU-R BT.601 luma."""

_log = logging.getLogger(__name__)
# What Pillow's plugins raise on damaged files, beside its own UnidentifiedImageError (an OSError).
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_luma(path: Path) -> LumaImage:
    """Decode one picture (grey, colour, 16-bit grey) to luma.

    Raises
    ------
    ImageFormatError
        The file is damaged, or not a picture.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "I" or image.mode.startswith("I;16"):
                wide = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
                return np.rint(wide / 257.0).astype(np.uint8)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            return np.array(image.convert("L"))
    except _UNDECODABLE as exc:
        raise ImageFormatError(f"{path} does not decode as a picture ({exc})") from exc


def load_folder(folder: Path, *, pixels: int = 1_000_000_000, seed: int = 0) -> list[LumaImage]:
    """Decode every picture under ``folder``, in a fixed order; damaged ones are skipped with a warning.

    Parameters
    ----------
    folder
        Searched recursively for the file name endings that Pillow reads.
    pixels
        Memory limit: reading stops once this many pixels (bytes) are held. A larger folder is read in
        a random order, so that what is held is a fair sample.
    seed
        Of that order.

    Raises
    ------
    EmptyDatasetError
        There is no such folder, or no picture in it.
    ImageFormatError
        There are pictures, but none decodes.
    """
    if not folder.is_dir():
        raise EmptyDatasetError("There is no such folder of pictures", found=str(folder))
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not paths:
        raise EmptyDatasetError(
            "The folder holds no pictures",
            expected="files that Pillow reads, such as .png, .jpg, .tif",
            found=str(folder),
        )
    order = np.random.default_rng(seed).permutation(len(paths))
    held: dict[int, LumaImage] = {}
    total = 0
    for index in order.tolist():
        try:
            image = read_luma(paths[index])
        except ImageFormatError as exc:
            _log.warning("skipped: %s", exc)
            continue
        if held and total + image.size > pixels:
            _log.warning("%d of %d pictures fill the limit of %d pixels", len(held), len(paths), pixels)
            break
        held[index] = image
        total += image.size
    if not held:
        raise ImageFormatError(
            "None of the pictures decodes", expected="readable pictures", found=f"{len(paths)} damaged files"
        )
    return [held[index] for index in sorted(held)]
