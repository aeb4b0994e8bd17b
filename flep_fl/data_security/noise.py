"""Layer 3: additive noise, drawn from a key stream through a table of quantiles.

One 16-bit word of an AES-CTR key stream picks one of 65,536 quantile midpoints, held as integers in units
of 2^-12. So the same key gives the same noise on every machine, and a draw is one table look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.stream import keystream16

TABLE_SIZE = 1 << 16
TABLE_ONE = 1 << 12
"""Integer that stands for one standard deviation."""


class NoiseFamily(Protocol):
    """A family of independent, identically distributed noise of mean 0 and variance 1."""

    def quantiles(self) -> NDArray[np.int16]:
        """Return int16 (65536,): the quantile midpoints, ascending, in units of 2^-12."""
        ...


class Gaussian:
    """Normal noise; the table ends at 4.33 standard deviations, which 1 draw in 65,536 would pass."""

    def quantiles(self) -> NDArray[np.int16]:
        """Return the quantile midpoints of the standard normal distribution, scaled to variance 1."""
        inverse: Callable[[float], float] = NormalDist().inv_cdf
        upper = np.array(
            [inverse((2 * i + 1) / (2 * TABLE_SIZE)) for i in range(TABLE_SIZE // 2, TABLE_SIZE)]
        )
        # Midpoints miss a little of the tails' variance; mirrored, so the mean is exactly zero.
        upper /= np.sqrt(np.mean(upper**2))
        half = np.rint(upper * TABLE_ONE).astype(np.int16)
        return np.concatenate([-half[::-1], half])


NOISE_FAMILIES: dict[str, NoiseFamily] = {"gaussian": Gaussian()}
"""Families by name; :func:`register_noise` adds to it."""


def register_noise(name: str, family: NoiseFamily) -> None:
    """Add a noise family.

    Raises
    ------
    CipherParameterError
        When the name is taken.
    """
    if name in NOISE_FAMILIES:
        raise CipherParameterError("noise.family is already registered", found=repr(name))
    NOISE_FAMILIES[name] = family


@lru_cache(maxsize=8)
def noise_table(family: str) -> NDArray[np.int16]:
    """Return the quantile table of ``family`` (built once, read-only)."""
    table = NOISE_FAMILIES[family].quantiles()
    table.flags.writeable = False
    return table


def real_table(family: str, std: float) -> NDArray[np.float32]:
    """Return float32 (65536,): quantiles scaled to ``std``, for noise that is added before rounding."""
    return noise_table(family).astype(np.float32) * np.float32(std / TABLE_ONE)


def integer_table(family: str, mean: float, std: float, bits: int) -> NDArray[np.unsignedinteger]:
    """Return ``uint{bits}`` (65536,): rounded quantiles modulo 2^bits, for noise that is subtracted again."""
    scaled = np.rint(noise_table(family).astype(np.float64) * (std / TABLE_ONE) + mean).astype(np.int64)
    return (scaled & ((1 << bits) - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def draw(table: NDArray[np.generic], key: bytes, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Draw noise of ``shape`` from ``table`` with the key stream of ``key``."""
    words = keystream16(key, int(np.prod(shape)))
    return np.take(table, words, mode="clip").reshape(shape)
