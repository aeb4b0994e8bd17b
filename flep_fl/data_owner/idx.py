"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped.

An IDX file of bytes is ``0 0 8 D``, then D sizes as big-endian 32-bit numbers, then the values
(http://yann.lecun.com/exdb/mnist, "the IDX file format").
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ImageFormatError

_BYTES = 0x08
_LARGEST = 1 << 31
_GZIP = b"\x1f\x8b"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    Parameters
    ----------
    path
        A plain or a gzipped file; its content decides, not its name.

    Returns
    -------
    uint8 array
        As many dimensions as the file says, read-only.

    Raises
    ------
    ImageFormatError
        The file cannot be read, is not of this format, is cut short or has bytes after its values. No more
        than the header announces is ever unpacked.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != bytes((0, 0, _BYTES)) or not head[3]:
                raise _bad(path, "it does not begin like an IDX file of bytes")
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise _bad(path, "it ends within its header")
            shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
            count = math.prod(shape)
            if count > _LARGEST:
                raise _bad(path, f"its header announces {count} values")
            values = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as exc:
        raise _bad(path, str(exc) or type(exc).__name__) from exc
    if len(values) != count:
        raise _bad(
            path, f"it holds {'more' if len(values) > count else 'fewer'} than the {count} values announced"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _bad(path: Path, problem: str) -> ImageFormatError:
    return ImageFormatError(f"an IDX file cannot be used: {path}: {problem}", remedy="Replace the file")
