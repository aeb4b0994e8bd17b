"""From a capture's bytes to pixels, however hostile the bytes are.

Two kinds of input, no other: PNG, and pixels as they are. The size is known before a single pixel is
decoded - from the signed description or from the PNG's first chunk - and bounded by ``max_pixels``, so a
small file that would unpack into gigabytes is refused at its head.
"""

from __future__ import annotations

import io
import math
import struct
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ImageFormatError

MAX_CHANNELS = 4
MAX_SIDE = 65535

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_IHDR = struct.Struct(
    ">I4sIIBBBBB"
)  # length, "IHDR", width, height, depth, colour, compression, filter, interlace
_PNG_COLOURS = {0: 1, 2: 3}  # grey, RGB; palettes and alpha channels are none of a camera's business
_PNG_MODES = {(8, 0): ("L",), (16, 0): ("I;16", "I;16B", "I"), (8, 2): ("RGB",)}
"""Pillow's modes by depth and colour type."""
_DTYPES: dict[str, np.dtype[Any]] = {"raw-uint8": np.dtype("u1"), "raw-uint16": np.dtype("<u2")}
_REMEDY = "Send PNG (grey 8 or 16 bits, RGB 8 bits) or raw pixels"


def decode_image(
    data: bytes, *, format: str, shape: tuple[int, ...], max_pixels: int
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode a capture.

    Parameters
    ----------
    data
        The image bytes.
    format, shape
        As in :class:`~flep_fl.data_owner.devices.Description`.
    max_pixels
        Upper limit of height times width.

    Returns
    -------
    uint8 or uint16 array
        (H, W) grey or (C, H, W) with channels, native byte order, C order.

    Raises
    ------
    ImageFormatError
        The bytes are not such an image, or it is too large.
    """
    if format == "png":
        return _decode_png(data, max_pixels)
    dtype = _DTYPES.get(format)
    if dtype is None:
        raise ImageFormatError("the image format is unknown", found=format, remedy=_REMEDY)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] > MAX_CHANNELS):
        raise ImageFormatError("the image has an unusable shape", expected="(H, W) or (C, H, W)", found=shape)
    _check_size(shape[-2], shape[-1], max_pixels)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ImageFormatError(
            "the image bytes do not fill the shape",
            expected=f"{math.prod(shape) * dtype.itemsize} bytes",
            found=f"{len(data)} bytes",
        )
    pixels = np.frombuffer(data, dtype).reshape(shape)
    if dtype.itemsize == 1:
        return pixels.view(np.uint8)
    return pixels.astype(np.uint16) if sys.byteorder == "big" else pixels.view(np.uint16)


def _decode_png(data: bytes, max_pixels: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    depth, colour, size = _png_head(data, max_pixels)
    if (depth, colour) not in ((8, 0), (16, 0), (8, 2)):
        raise ImageFormatError(
            "the PNG has an unsupported kind of pixels",
            expected="grey of 8 or 16 bits, or RGB of 8 bits",
            found=f"colour type {colour}, {depth} bits",
            remedy=_REMEDY,
        )
    from PIL import Image

    try:
        # No warnings filter: it is the process's, and captures are decoded in several threads at once. What
        # Pillow only warns of, a size beyond its own limit, the comparison of sizes refuses.
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if getattr(image, "n_frames", 1) != 1:
                raise ImageFormatError("the PNG is animated", remedy=_REMEDY)
            # A second header would take the place of the one that was checked.
            if image.size != size or image.mode not in _PNG_MODES[depth, colour]:
                raise ImageFormatError("the PNG has two headers", remedy=_REMEDY)
            pixels = np.asarray(image)
    except ImageFormatError:
        raise
    except Exception as exc:
        # Hostile bytes end Pillow in many ways (OSError, SyntaxError, struct.error, zlib.error, a bomb).
        raise ImageFormatError("the PNG cannot be decoded", remedy="Send the image again") from exc
    if depth == 16:
        return np.ascontiguousarray(pixels, np.uint16)
    if colour == 2:
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels, np.uint8)


def _png_head(data: bytes, max_pixels: int) -> tuple[int, int, tuple[int, int]]:
    """Check the size in the PNG's first chunk; return bit depth, colour type, and width and height."""
    if not data.startswith(_PNG_MAGIC) or len(data) < len(_PNG_MAGIC) + _IHDR.size:
        raise ImageFormatError("the image bytes are not a PNG", remedy=_REMEDY)
    length, name, width, height, depth, colour, *_ = _IHDR.unpack_from(data, len(_PNG_MAGIC))
    if length != 13 or name != b"IHDR":
        raise ImageFormatError("the image bytes are not a PNG", remedy=_REMEDY)
    _check_size(height, width, max_pixels)
    return depth, colour, (width, height)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if not 1 <= height <= MAX_SIDE or not 1 <= width <= MAX_SIDE or height * width > max_pixels:
        raise ImageFormatError(
            "the image is empty or too large",
            expected=f"at most {max_pixels} pixels",
            found=f"{height} x {width}",
        )
