"""Integer fixed-point chaotic lanes that order the sub-blocks.

Obfuscation, not cryptography: the sequence only has to be keyed, long enough and the same on every
machine. Floating-point orbits are none of that: two compilers part after some sixty steps, and float32
orbits fall into cycles shorter than one image. So the logistic map x -> 4x(1 - x) runs in 32-bit fixed
point, many lanes at once, each of a few steps only and each seeded from an AES key stream. Confidentiality
rests on the mask and the envelope.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flep_fl.data_security.stream import keystream32

LANE_STEPS = 16
"""Values taken from one lane: far below the shortest cycle to be feared."""

WARM_UP_STEPS = 4
"""Steps thrown away, so that neighbouring seeds part before the first value."""

_ONE = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(30)


def chaotic_sequence(keys: Sequence[bytes], count: int) -> NDArray[np.uint32]:
    """Draw one keyed chaotic sequence per image.

    Parameters
    ----------
    keys
        N keys of 32 bytes, one per image.
    count
        Values per sequence.

    Returns
    -------
    ndarray
        uint32, shape (N, count); bit-exact on every platform.
    """
    lanes = -(-count // LANE_STEPS)
    if not keys:
        return np.empty((0, count), np.uint32)
    seeds = np.stack([keystream32(key, 2 * lanes) for key in keys]).astype(np.uint64)
    state, perturbation = seeds[:, :lanes].copy(), seeds[:, lanes:] >> np.uint64(16)
    values = np.empty((len(keys), LANE_STEPS, lanes), np.uint32)
    complement = np.empty_like(state)
    for step in range(-WARM_UP_STEPS, LANE_STEPS):
        # 4x(1 - x) of x = state / (2^32 - 1); below 2^62 before the shift, so nothing overflows.
        np.subtract(_ONE, state, out=complement)
        np.multiply(state, complement, out=state)
        np.right_shift(state, _SHIFT, out=state)
        # A keyed change of the low half keeps a lane out of the fixed point 0 and out of short cycles.
        np.bitwise_xor(state, perturbation, out=state)
        if step >= 0:
            values[:, step] = state
    return values.reshape(len(keys), -1)[:, :count]


def chaotic_order(keys: Sequence[bytes], count: int) -> NDArray[np.intp]:
    """Return the permutation that sorts each image's chaotic sequence ascending (ties keep their order).

    Parameters
    ----------
    keys
        N keys of 32 bytes.
    count
        Length of the permutation.

    Returns
    -------
    ndarray
        intp, shape (N, count); row n is a permutation of 0..count-1.
    """
    sequence = chaotic_sequence(keys, count)
    # Two stable passes over 16-bit halves equal one stable 32-bit argsort; NumPy sorts 16-bit keys by
    # radix, several times faster.
    low = (sequence & np.uint32(0xFFFF)).astype(np.uint16)
    high = (sequence >> np.uint32(16)).astype(np.uint16)
    first = np.argsort(low, axis=-1, kind="stable")
    second = np.argsort(np.take_along_axis(high, first, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(first, second, axis=-1)
