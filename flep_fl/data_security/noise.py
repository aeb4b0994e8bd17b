"""Layer 3: noise, drawn from a key stream; the same key gives the same noise on every machine.

Two kinds stand behind one protocol. *Additive* families are tables of quantiles: one 16-bit word of an
AES-CTR key stream picks one of 65,536 midpoints, held as integers in units of 2^-12. They are added to wire
levels, so with recovery ``keyed`` the very integers are subtracted again. *Signal-dependent* families change
a value by an amount that depends on it. In image units they act on pixels before the transform, which is
where cameras and scanners make such noise and which means the same with and without the mask; in wire units
they act on wire levels before the mask. They cannot be undone with a key.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.stream import keystream16

if TYPE_CHECKING:
    from flep_fl.data_security.parameters import NoiseParameters

TABLE_SIZE = 1 << 16
TABLE_ONE = 1 << 12
"""Integer that stands for one standard deviation."""

PEAK = 255.0
"""Largest grey level of the scale on which noise is measured."""

GUARD_DEVIATIONS = 3.0
"""Noise saturates beyond this many standard deviations past black and white."""


class NoiseFamily(Protocol):
    """A family of noise, independent from pixel to pixel.

    Attributes
    ----------
    additive
        Whether it is added to the signal whatever the signal is, and so can be subtracted with a key.
    words
        16-bit words of key stream that one sample takes.
    """

    additive: ClassVar[bool]
    words: ClassVar[int]

    def deviation(self, noise: NoiseParameters, signal: float = PEAK / 2) -> float:
        """Root mean square of the noise at a grey level, on the 0..255 scale, without ``noise.mean``."""
        ...

    def overshoot(self, noise: NoiseParameters) -> float:
        """Return how far noisy values may leave 0..255 before the wire saturates."""
        ...

    def apply(
        self, signal: NDArray[np.floating], words: NDArray[np.uint16], noise: NoiseParameters
    ) -> NDArray[np.float32]:
        """Return ``signal`` (0..255 scale) with noise; ``words`` has shape (words, *signal.shape)."""
        ...


class AdditiveFamily(ABC):
    """Noise of mean 0 and variance 1, scaled by ``noise.std``; a family of one's own gives ``quantiles``."""

    additive: ClassVar[bool] = True
    words: ClassVar[int] = 1

    @abstractmethod
    def quantiles(self) -> NDArray[np.int16]:
        """Return int16 (65536,): the quantile midpoints, ascending, in units of 2^-12."""

    def deviation(self, noise: NoiseParameters, signal: float = PEAK / 2) -> float:
        """Return ``noise.std``, at every signal."""
        return noise.std

    def overshoot(self, noise: NoiseParameters) -> float:
        """Return three standard deviations."""
        return GUARD_DEVIATIONS * noise.std

    def apply(
        self, signal: NDArray[np.floating], words: NDArray[np.uint16], noise: NoiseParameters
    ) -> NDArray[np.float32]:
        """Add noise to ``signal``."""
        table = self.quantiles().astype(np.float32) * np.float32(noise.std / TABLE_ONE)
        noisy: NDArray[np.float32] = signal.astype(np.float32) + table[words[0]]
        return noisy


class Gaussian(AdditiveFamily):
    """Normal noise; the table ends at 4.33 standard deviations, which 1 draw in 65,536 would pass."""

    def quantiles(self) -> NDArray[np.int16]:
        """Return the quantile midpoints of the standard normal distribution, scaled to variance 1."""
        return _mirrored(NormalDist().inv_cdf)


class Laplacian(AdditiveFamily):
    """Double exponential noise: many small values, heavy tails; the table ends at 7.8 deviations."""

    def quantiles(self) -> NDArray[np.int16]:
        """Return the quantile midpoints of the Laplace distribution of variance 1."""
        return _mirrored(lambda p: -math.log(2 * (1 - p)) / math.sqrt(2))


class Rayleigh(AdditiveFamily):
    """Rayleigh noise, centred: skewed, with a hard lower end 1.91 deviations below its mean.

    The textbook form, which starts at zero, is ``noise.mean = 1.9131 * noise.std``.
    """

    def quantiles(self) -> NDArray[np.int16]:
        """Return the quantile midpoints of the Rayleigh distribution, mean 0 and variance 1."""
        middles = (2 * np.arange(TABLE_SIZE) + 1) / (2 * TABLE_SIZE)
        values = np.sqrt(-2 * np.log1p(-middles))
        values -= values.mean()
        return _table(values)


class Rician:
    """Magnitude of a complex signal with normal noise of ``noise.std`` in both parts, as in MRI."""

    additive: ClassVar[bool] = False
    words: ClassVar[int] = 2

    def deviation(self, noise: NoiseParameters, signal: float = PEAK / 2) -> float:
        """Return ``sqrt(E (y - signal)^2)``; about ``noise.std`` well above the noise."""
        mean = _rician_mean(signal, noise.std)
        return math.sqrt(max(2 * signal**2 + 2 * noise.std**2 - 2 * signal * mean, 0.0))

    def overshoot(self, noise: NoiseParameters) -> float:
        """Return three standard deviations."""
        return GUARD_DEVIATIONS * noise.std

    def apply(
        self, signal: NDArray[np.floating], words: NDArray[np.uint16], noise: NoiseParameters
    ) -> NDArray[np.float32]:
        """Return the magnitude."""
        table = real_table("gaussian", noise.std)
        real, imaginary = signal.astype(np.float32) + table[words[0]], table[words[1]]
        magnitude: NDArray[np.float32] = np.sqrt(real * real + imaginary * imaginary)
        return magnitude


class PoissonGaussian:
    """Photon noise plus read noise: ``noise.gain`` grey levels per photon, and a normal ``noise.std``.

    The Poisson part is drawn by inversion for the signal rounded to one of 256 levels, through a table that
    is built once per gain.
    """

    additive: ClassVar[bool] = False
    words: ClassVar[int] = 2

    def deviation(self, noise: NoiseParameters, signal: float = PEAK / 2) -> float:
        """Return ``sqrt(gain * signal + std^2)``."""
        return math.sqrt(noise.gain * max(signal, 0.0) + noise.std**2)

    def overshoot(self, noise: NoiseParameters) -> float:
        """Return three standard deviations at white."""
        return GUARD_DEVIATIONS * self.deviation(noise, PEAK)

    def apply(
        self, signal: NDArray[np.floating], words: NDArray[np.uint16], noise: NoiseParameters
    ) -> NDArray[np.float32]:
        """Add both parts."""
        levels = np.clip(np.rint(signal), 0, PEAK)
        keys = levels.astype(np.intp) * TABLE_SIZE + words[0]
        photons = np.take(_poisson_table(noise.gain), keys, mode="clip")
        shot = photons * noise.gain - levels
        result: NDArray[np.float32] = (signal + shot).astype(np.float32)
        result += real_table("gaussian", noise.std)[words[1]]
        return result


class SaltAndPepper:
    """A share ``noise.amount`` of the pixels turns white (share ``noise.salt`` of them) or black."""

    additive: ClassVar[bool] = False
    words: ClassVar[int] = 1

    def deviation(self, noise: NoiseParameters, signal: float = PEAK / 2) -> float:
        """Root mean square of the change at ``signal``."""
        white, black = noise.salt, 1 - noise.salt
        return math.sqrt(noise.amount * (white * (PEAK - signal) ** 2 + black * signal**2))

    def overshoot(self, noise: NoiseParameters) -> float:
        """Return 0: no value leaves the range."""
        return 0.0

    def apply(
        self, signal: NDArray[np.floating], words: NDArray[np.uint16], noise: NoiseParameters
    ) -> NDArray[np.float32]:
        """Replace values."""
        hit = round(noise.amount * TABLE_SIZE)
        white = round(noise.amount * noise.salt * TABLE_SIZE)
        result = signal.astype(np.float32)
        result[words[0] < hit] = 0
        result[words[0] < white] = PEAK
        return result


NOISE_FAMILIES: dict[str, NoiseFamily] = {
    "gaussian": Gaussian(),
    "laplacian": Laplacian(),
    "rayleigh": Rayleigh(),
    "rician": Rician(),
    "poisson_gaussian": PoissonGaussian(),
    "salt_and_pepper": SaltAndPepper(),
}
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
    """Return the quantile table of an additive ``family`` (built once, read-only).

    Raises
    ------
    CipherParameterError
        When the family is not additive.
    """
    found = NOISE_FAMILIES[family]
    if not isinstance(found, AdditiveFamily):
        raise CipherParameterError(
            "noise.family has no table, because its noise depends on the signal", found=repr(family)
        )
    table = found.quantiles()
    table.flags.writeable = False
    return table


def real_table(family: str, std: float) -> NDArray[np.float32]:
    """Return float32 (65536,): quantiles scaled to ``std``, for noise that is added before rounding."""
    return noise_table(family).astype(np.float32) * np.float32(std / TABLE_ONE)


def integer_table(family: str, mean: float, std: float, bits: int) -> NDArray[np.unsignedinteger]:
    """Return (65536,) of the smallest word: rounded quantiles modulo 2^bits, to be subtracted again."""
    scaled = np.rint(noise_table(family).astype(np.float64) * (std / TABLE_ONE) + mean).astype(np.int64)
    word = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    return (scaled & ((1 << bits) - 1)).astype(word)


def noise_words(key: bytes, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Return the 16-bit words that decide the noise of ``shape``, from the key stream of ``key``."""
    return keystream16(key, math.prod(shape)).reshape(shape)


def draw(table: NDArray[np.generic], key: bytes, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Draw noise of ``shape`` from ``table`` with the key stream of ``key``."""
    return np.take(table, noise_words(key, shape), mode="clip")


def _mirrored(inverse: Callable[[float], float]) -> NDArray[np.int16]:
    """Tabulate a symmetric distribution; mirrored, so that its mean is exactly zero."""
    middles = ((2 * i + 1) / (2 * TABLE_SIZE) for i in range(TABLE_SIZE // 2, TABLE_SIZE))
    upper = np.array([inverse(p) for p in middles])
    return _table(np.concatenate([-upper[::-1], upper]))


def _table(values: NDArray[np.float64]) -> NDArray[np.int16]:
    # Midpoints miss a little of the tails' variance.
    scaled: NDArray[np.float64] = np.rint(values * (TABLE_ONE / np.sqrt(np.mean(values**2))))
    return scaled.astype(np.int16)


@lru_cache(maxsize=1)
def _poisson_table(gain: float) -> NDArray[np.uint16]:
    """Return uint16 (256 * 65536,): the photon count of every grey level and word, by inversion (32 MiB)."""
    table = np.empty((int(PEAK) + 1, TABLE_SIZE), np.uint16)
    for level, row in enumerate(table):
        rate = level / gain
        # Counts outside 6 deviations have probability below 1e-8: nothing of 65,536 words.
        reach = 6 * math.sqrt(rate) + 12
        counts = np.arange(max(0, math.floor(rate - reach)), math.ceil(rate + reach) + 1)
        logarithm = math.log(rate) if rate else -math.inf
        weights = [
            math.exp(k * logarithm - rate - math.lgamma(k + 1)) if k else math.exp(-rate) for k in counts
        ]
        cumulative = np.rint(np.cumsum(weights) / np.sum(weights) * TABLE_SIZE).astype(np.int64)
        row[:] = np.repeat(counts, np.diff(cumulative, prepend=0))
    table.flags.writeable = False
    return table.reshape(-1)


def _rician_mean(signal: float, std: float) -> float:
    """Mean of a Rician variable, by quadrature over the two normal parts' common density."""
    if std == 0:
        return signal
    real = signal + noise_table("gaussian")[32::64].astype(np.float64) * (std / TABLE_ONE)
    imaginary = noise_table("gaussian")[32::64].astype(np.float64) * (std / TABLE_ONE)
    return float(np.sqrt(real[:, None] ** 2 + imaginary[None, :] ** 2).mean())
