"""Wire coefficients as bytes: each sub-band in its own number of bits, one band after another.

Bands come in the order LL, LH, HL, HH, row by row. Coefficients of 8, 16 or 32 bits are little-endian words;
all others are packed without gaps, most significant bit first, and a band is filled up to a whole byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

WORD_BITS = (8, 16, 32)


def word_type(bits: Sequence[int]) -> type[np.uint8 | np.uint16 | np.uint32]:
    """Return the smallest word that holds every coefficient."""
    most = max(bits)
    return np.uint8 if most <= 8 else np.uint16 if most <= 16 else np.uint32


def split(bands: NDArray[Scalar]) -> tuple[NDArray[Scalar], ...]:
    """Return views of the tiled sub-bands of (..., H, W): approximation, horizontal, vertical, diagonal."""
    height, width = bands.shape[-2] // 2, bands.shape[-1] // 2
    top, bottom = bands[..., :height, :], bands[..., height:, :]
    return top[..., :width], top[..., width:], bottom[..., :width], bottom[..., width:]


def bands_of(plane: NDArray[Scalar], bits: Sequence[object]) -> tuple[NDArray[Scalar], ...]:
    """Return the sub-bands of a plane, or the plane itself where ``bits`` has one entry."""
    return (plane,) if len(bits) == 1 else split(plane)


def packed_size(shape: tuple[int, int], bits: Sequence[int]) -> int:
    """Return how many bytes :func:`pack` makes of a plane of ``shape``."""
    count = shape[0] * shape[1] // len(bits)
    return sum(-(-count * width // 8) for width in bits)


def pack(plane: NDArray[np.unsignedinteger], bits: Sequence[int]) -> bytes:
    """Pack one plane.

    Parameters
    ----------
    plane
        Unsigned words (H, W), every band's values below 2 to the power of its bits.
    bits
        One entry, or four for the tiled sub-bands.
    """
    return b"".join(_pack_band(band, width) for band, width in zip(bands_of(plane, bits), bits, strict=True))


def unpack(data: bytes, shape: tuple[int, int], bits: Sequence[int]) -> NDArray[np.unsignedinteger]:
    """Undo :func:`pack`; ``data`` has exactly :func:`packed_size` bytes."""
    plane = np.empty(shape, word_type(bits))
    offset = 0
    for band, width in zip(bands_of(plane, bits), bits, strict=True):
        size = -(-band.size * width // 8)
        band[...] = _unpack_band(data, offset, size, band.size, width).reshape(band.shape)
        offset += size
    return plane


def _pack_band(band: NDArray[np.unsignedinteger], width: int) -> bytes:
    if width in WORD_BITS:
        return band.astype(f"<u{width // 8}", copy=False).tobytes()
    group, size = _group(width)
    # ``group`` coefficients fill a whole number of bytes: gather them in one 64-bit word, the first on top.
    words = _gather_bytes(band, width) if width < 8 else _gather(band, width, group)
    words <<= np.uint64(64 - 8 * size)
    packed = words.astype(">u8").view(np.uint8).reshape(-1, 8)[:, :size]
    return packed.tobytes()[: -(-band.size * width // 8)]


def _gather(band: NDArray[np.unsignedinteger], width: int, group: int) -> NDArray[np.uint64]:
    padded = np.zeros((-(-band.size // group), group), band.dtype)
    padded.reshape(-1)[: band.size] = band.reshape(-1)
    words = np.zeros(len(padded), np.uint64)
    for column in range(group):
        words <<= np.uint64(width)
        words |= padded[:, column]
    return words


def _gather_bytes(band: NDArray[np.unsignedinteger], width: int) -> NDArray[np.uint64]:
    """Gather eight coefficients at once: neighbours of 8, then 16, then 32 bits move together in one word."""
    padded = np.zeros(-(-band.size // 8) * 8, np.uint8)
    padded[: band.size] = band.reshape(-1)
    words = padded.view(">u8").astype(np.uint64)
    for lane in (8, 16, 32):
        low = _repeat((1 << lane) - 1, 2 * lane)
        upper = words & ~low
        upper >>= np.uint64(lane - lane * width // 8)
        words &= low
        words |= upper
    return words


def _spread_bytes(words: NDArray[np.uint64], width: int) -> NDArray[np.uint8]:
    """Undo :func:`_gather_bytes`, works in place on ``words``; (8 * len(words),)."""
    for lane in (32, 16, 8):
        bits = lane * width // 8
        low = _repeat((1 << bits) - 1, 2 * lane)
        upper = words & (low << np.uint64(bits))
        upper <<= np.uint64(lane - bits)
        words &= low
        words |= upper
    return words.astype(">u8").view(np.uint8)


@lru_cache(maxsize=64)
def _repeat(pattern: int, lane: int) -> np.uint64:
    """Return a word with ``pattern`` in each of its lanes."""
    return np.uint64(sum(pattern << shift for shift in range(0, 64, lane)))


def _unpack_band(data: bytes, offset: int, size: int, count: int, width: int) -> NDArray[np.unsignedinteger]:
    if width in WORD_BITS:
        return np.frombuffer(data, f"<u{width // 8}", count, offset)
    group, group_size = _group(width)
    groups = -(-count // group)
    packed = np.zeros((groups, 8), np.uint8)
    whole = np.zeros(groups * group_size, np.uint8)
    whole[:size] = np.frombuffer(data, np.uint8, size, offset)
    packed[:, :group_size] = whole.reshape(groups, group_size)
    words = packed.view(">u8")[:, 0].astype(np.uint64)
    words >>= np.uint64(64 - 8 * group_size)
    if width < 8:
        return _spread_bytes(words, width)[:count]
    values = np.empty((groups, group), word_type([width]))
    low = np.uint64((1 << width) - 1)
    for column in reversed(range(group)):
        values[:, column] = words & low
        words >>= np.uint64(width)
    return values.reshape(-1)[:count]


def _group(width: int) -> tuple[int, int]:
    """Return how many coefficients of ``width`` bits are packed at once, and into how many bytes."""
    group = 8 if width < 8 else 4
    return group, group * width // 8
