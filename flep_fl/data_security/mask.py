"""Layer 4: diffusion. The wire coefficients plus an AES-256-CTR key stream, modulo 2^bits.

The paper does not mention this step, but its Table I cannot be reached without one. The addition is modulo
the word that holds a coefficient; coefficients of fewer bits keep their low bits, which is the same modulo
2^bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flep_fl.data_security.stream import keystream, keystream16, keystream32


def mask_stream(key: bytes, shape: tuple[int, ...], bits: int) -> NDArray[np.unsignedinteger]:
    """Return the key stream of one image plane: ``uint{bits}`` of ``shape``, uniform.

    Parameters
    ----------
    key
        32 bytes, used for this plane only.
    shape
        Shape of the wire image.
    bits
        Size of a word: 8, 16 or 32.
    """
    count = math.prod(shape)
    if bits == 8:
        return keystream(key, count).reshape(shape)
    return (keystream16(key, count) if bits == 16 else keystream32(key, count)).reshape(shape)


def add_mask(wire: NDArray[np.unsignedinteger], key: bytes) -> None:
    """Add the key stream to ``wire`` (one plane of unsigned words) in place, modulo the word."""
    np.add(wire, mask_stream(key, wire.shape, 8 * wire.itemsize), out=wire)


def remove_mask(wire: NDArray[np.unsignedinteger], key: bytes) -> None:
    """Undo :func:`add_mask` in place."""
    np.subtract(wire, mask_stream(key, wire.shape, 8 * wire.itemsize), out=wire)
