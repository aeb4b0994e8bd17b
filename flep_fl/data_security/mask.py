"""Layer 4: diffusion. The wire coefficients plus an AES-256-CTR key stream, modulo 2^bits.

The paper does not mention this step, but its Table I cannot be reached without one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flep_fl.data_security.stream import keystream, keystream16


def mask_stream(key: bytes, shape: tuple[int, ...], bits: int) -> NDArray[np.unsignedinteger]:
    """Return the key stream of one image: ``uint{bits}`` of ``shape``, uniform.

    Parameters
    ----------
    key
        32 bytes, used for this image only.
    shape
        Shape of the wire image.
    bits
        8 or 16.
    """
    count = int(np.prod(shape))
    return (keystream(key, count) if bits == 8 else keystream16(key, count)).reshape(shape)


def add_mask(wire: NDArray[np.unsignedinteger], key: bytes, bits: int) -> None:
    """Add the key stream to ``wire`` (``uint{bits}``, one image) in place, modulo 2^bits."""
    np.add(wire, mask_stream(key, wire.shape, bits), out=wire)


def remove_mask(wire: NDArray[np.unsignedinteger], key: bytes, bits: int) -> None:
    """Undo :func:`add_mask` in place."""
    np.subtract(wire, mask_stream(key, wire.shape, bits), out=wire)
