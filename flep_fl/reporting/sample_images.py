"""Pictures to measure a cipher on: a folder, or those that scikit-image brings in its wheel."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flep_fl.contracts.errors import ConfigError, EmptyDatasetError, MissingExtraError
from flep_fl.data_owner.sources import decode_grey, resize_area

GreyImage = NDArray[np.uint8]
"""uint8, shape (H, W), 0..255."""

PACKAGED = ("camera", "brick", "grass", "gravel", "moon", "coins")
"""Grey pictures of scikit-image that lie in its wheel: nothing is downloaded."""

PACKAGED_SIDE = 256
MAX_SIDE = 4096


def named_images(folder: Path | None, *, side: int | None = None) -> dict[str, GreyImage]:
    """Load grey pictures by name, in the order of their names.

    Parameters
    ----------
    folder
        Folder of image files (not searched further down; other files are passed over). None takes
        scikit-image's pictures, cut to a square and reduced to 256 x 256.
    side
        Side in pixels, 1..4096, to which every image is resampled by area averages; None keeps the size.

    Returns
    -------
    dict
        Name to uint8 (H, W); at least one. The name is the file's without its ending, where that is unique.

    Raises
    ------
    ConfigError
        The folder does not exist, or ``side`` is out of range.
    EmptyDatasetError
        The folder holds no image file.
    ImageFormatError
        A file does not decode, or has more than 8 bits per channel.
    MissingExtraError
        There is no folder and no scikit-image.
    """
    if side is not None and not 1 <= side <= MAX_SIDE:
        raise ConfigError("image_size is out of range", expected=f"1..{MAX_SIDE} or null", found=side)
    images = _packaged() if folder is None else _from_folder(folder)
    return images if side is None else {name: resize_area(image, side) for name, image in images.items()}


def _from_folder(folder: Path) -> dict[str, GreyImage]:
    if not folder.is_dir():
        raise ConfigError(
            f"images={folder} is not a folder", remedy="Set images to a folder of image files, or to null"
        )
    endings = Image.registered_extensions()
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in endings)
    if not files:
        raise EmptyDatasetError(
            f"The folder {folder} holds no image file", remedy="Put PNG, TIFF or JPEG files into it"
        )
    stems = [file.stem for file in files]
    names = [file.name if stems.count(file.stem) > 1 else file.stem for file in files]
    return {name: decode_grey(file) for name, file in zip(names, files, strict=True)}


def _packaged() -> dict[str, GreyImage]:
    try:
        data: Any = importlib.import_module("skimage.data")
    except ImportError as exc:
        raise MissingExtraError(
            "Without images=FOLDER the pictures of scikit-image are used, which is not installed",
            remedy="Run: pip install -e '.[samples]', or give images=FOLDER",
        ) from exc
    return {name: resize_area(_square(getattr(data, name)()), PACKAGED_SIDE) for name in sorted(PACKAGED)}


def _square(image: NDArray[Any]) -> GreyImage:
    side = min(image.shape)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return np.ascontiguousarray(image[top : top + side, left : left + side], np.uint8)
