"""Integer fixed-point chaotic lanes that order the sub-blocks.

Obfuscation, not cryptography: the sequence only has to be keyed and the same on every machine.
Floating-point orbits are none of that: two compilers part after some sixty steps, and float32 orbits fall
into cycles shorter than one image. So the logistic map x -> 4x(1 - x) runs in 32-bit fixed point, in one
short lane for every sub-block, each seeded with a word of an AES key stream of its own.

One lane gives one value. Successive values of a lane would be a point and its image under the map, and
x < 4x(1 - x) holds for two thirds of all x: whoever knows one sub-block's place would know something of the
next one's. Values of independent lanes are exchangeable, so every order is equally likely (but for ties),
whatever the map makes of a seed. Confidentiality rests on the mask and the envelope.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flep_fl.data_security.stream import keystream32

STEPS = 8
"""Steps of the map from a seed to the value: 256 branches, and far below the cycles to be feared."""

_TILE = 1 << 14
"""Lanes that are iterated at once; they stay in the processor's cache."""

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
    if not keys or not count:
        return np.empty((len(keys), count), np.uint32)
    words = np.stack([keystream32(key, count + 1) for key in keys])
    values, perturbations = words[:, 1:], words[:, :1].astype(np.uint64) >> np.uint64(16)
    images = max(1, _TILE // count)
    for first in range(0, len(keys), images):
        for start in range(0, count, _TILE):
            lanes = values[first : first + images, start : start + _TILE]
            lanes[...] = _iterate(lanes.astype(np.uint64), perturbations[first : first + images], STEPS)
    return values


def _iterate(state: NDArray[np.uint64], perturbation: NDArray[np.uint64], steps: int) -> NDArray[np.uint64]:
    """Run lanes on for ``steps`` steps, in place; ``perturbation`` is below 2^16, one for each image."""
    complement = np.empty_like(state)
    for _ in range(steps):
        # 4x(1 - x) of x = state / (2^32 - 1); below 2^62 before the shift, so nothing overflows.
        np.subtract(_ONE, state, out=complement)
        np.multiply(state, complement, out=state)
        np.right_shift(state, _SHIFT, out=state)
        # A keyed change of the low half keeps a lane out of the fixed point 0 and of short cycles.
        np.bitwise_xor(state, perturbation, out=state)
    return state


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
    packed = chaotic_sequence(keys, count).astype(np.uint64)
    # The place rides in the low half: keys are distinct, so that every sorting algorithm gives the one
    # stable order, and sorting plain 64-bit numbers is what NumPy vectorises best. It also runs through
    # memory in order, so that a large image costs per pixel little more than a small one.
    packed <<= np.uint64(32)
    packed |= np.arange(count, dtype=np.uint64)
    packed.sort(axis=-1)
    packed &= np.uint64(0xFFFFFFFF)
    return packed.view(np.int64).astype(np.intp, copy=False)
