"""Pictures of an attack: rows of grey images, each row under its caption."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flep_fl.contracts.files import write_atomic

_TILE = 96  # pixels that the shorter side of a shown image has at least
_GAP = 6
_CAPTION = 14
_MOST = 8  # images in a row


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes
    ----------
    caption
        What the images are.
    images
        (H, W) each, on the 0..255 scale; values outside are clipped.
    """

    caption: str
    images: Sequence[NDArray[np.number]]


def write_picture(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of images as one PNG; small images are enlarged, each pixel a square.

    Parameters
    ----------
    path
        The file.
    rows
        At least one row with at least one image; at most eight images of a row are shown.
    """
    tiles = [[_tile(image) for image in row.images[:_MOST]] for row in rows]
    width = max(sum(tile.width + _GAP for tile in line) for line in tiles) + _GAP
    height = sum(max(tile.height for tile in line) + _CAPTION + _GAP for line in tiles) + _GAP
    sheet = Image.new("L", (max(width, 240), height), 255)
    draw, top = ImageDraw.Draw(sheet), _GAP
    for row, line in zip(rows, tiles, strict=True):
        draw.text((_GAP, top), row.caption, fill=0)
        top += _CAPTION
        left = _GAP
        for tile in line:
            sheet.paste(tile, (left, top))
            left += tile.width + _GAP
        top += max(tile.height for tile in line) + _GAP
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    write_atomic(path, data.getvalue())


def _tile(image: NDArray[np.number]) -> Image.Image:
    pixels = np.clip(np.rint(np.asarray(image, np.float64)), 0, 255).astype(np.uint8)
    factor = max(1, -(-_TILE // min(pixels.shape)))
    return Image.fromarray(np.kron(pixels, np.ones((factor, factor), np.uint8)))
