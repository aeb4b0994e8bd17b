"""What an ideal cipher's statistics are, and how far chance moves them, for any image size.

Sources: Wu, Noonan, Agaian, *NPCR and UACI randomness tests for image encryption* (2011) for NPCR and UACI;
Miller (1955) for the entropy of a histogram; Wu et al., *Local Shannon entropy measure* (2013). One limit is
not theirs: the interval that the last prints for local entropy (7.901901 to 7.903037 for 30 blocks of 1936
pixels) is about five times narrower than the spread of ideal images, so it is computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from flep_fl.contracts.errors import ImageFormatError
from flep_fl.data_security.metrics import LEVELS, LOCAL_BLOCK_PIXELS, LOCAL_BLOCKS

LEVEL = 0.05
"""Significance level of every limit unless told otherwise."""

PEAK = LEVELS - 1

_EXACT_MEAN_PIXELS = 1 << 20
_MIN_CHI_SQUARE_PIXELS = LEVELS


@dataclass(frozen=True, slots=True)
class Interval:
    """An acceptance interval; either end may be infinite."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Limits:
    """Acceptance intervals of one image size at one significance level.

    Attributes
    ----------
    npcr, uaci
        Percent; one-sided and two-sided.
    chi2
        One-sided, 255 degrees of freedom whatever the size.
    entropy
        Bits, one-sided.
    local_entropy
        Bits, two-sided; NaN ends (nothing is inside) for an image smaller than one block.
    correlation
        Two-sided.
    """

    npcr: Interval
    uaci: Interval
    chi2: Interval
    entropy: Interval
    local_entropy: Interval
    correlation: Interval


@lru_cache(maxsize=64)
def limits(pixels: int, level: float = LEVEL) -> Limits:
    """Return the acceptance intervals for 8-bit images of ``pixels`` pixels.

    Raises
    ------
    ImageFormatError
        When the image has fewer than 256 pixels: fewer than one a grey level say nothing.
    """
    if pixels < _MIN_CHI_SQUARE_PIXELS:
        raise ImageFormatError(
            "The image is too small for statistics",
            expected=f"at least {_MIN_CHI_SQUARE_PIXELS} pixels",
            found=pixels,
        )
    blocks = min(LOCAL_BLOCKS, pixels // LOCAL_BLOCK_PIXELS)
    return Limits(
        npcr=Interval(npcr_limit(pixels, level), math.inf),
        uaci=uaci_limits(pixels, level),
        chi2=Interval(0.0, chi_square_limit(PEAK, level)),
        entropy=Interval(entropy_limit(pixels, level), math.inf),
        local_entropy=local_entropy_limits(blocks, LOCAL_BLOCK_PIXELS, level),
        correlation=correlation_limits(pixels, level),
    )


def npcr_mean() -> float:
    """Return the expected NPCR of two independent uniform images, in percent: ``100 F / (F + 1)``."""
    return 100 * PEAK / (PEAK + 1)


def npcr_std(pixels: int) -> float:
    """Return the standard deviation of NPCR, in percent: ``100 sqrt(F / n) / (F + 1)``."""
    return 100 * math.sqrt(PEAK / pixels) / (PEAK + 1)


def npcr_limit(pixels: int, level: float = LEVEL) -> float:
    """Return the one-sided lower limit of NPCR, in percent."""
    return npcr_mean() - _quantile(1 - level) * npcr_std(pixels)


def uaci_mean() -> float:
    """Return the expected UACI of two independent uniform images, in percent: ``100 (F + 2) / (3F + 3)``."""
    return 100 * (PEAK + 2) / (3 * PEAK + 3)


def uaci_std(pixels: int) -> float:
    """Return the standard deviation of UACI, in percent.

    ``100 sqrt((F + 2)(F^2 + 2F + 3) / (18 (F + 1)^2 F n))``
    """
    variance = (PEAK + 2) * (PEAK**2 + 2 * PEAK + 3) / (18 * (PEAK + 1) ** 2 * PEAK * pixels)
    return 100 * math.sqrt(variance)


def uaci_limits(pixels: int, level: float = LEVEL) -> Interval:
    """Return the two-sided limits of UACI, in percent."""
    return _two_sided(uaci_mean(), uaci_std(pixels), level)


def chi_square_limit(degrees: int, level: float = LEVEL) -> float:
    """Return the upper ``level`` point of the chi-square distribution.

    The cumulative distribution is summed as a series and inverted by bisection; accurate to 1e-6 for
    1 to 2,000 degrees of freedom.
    """
    low, high = 0.0, degrees + 40 * math.sqrt(2 * degrees) + 40
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _chi_square_cdf(middle, degrees) < 1 - level else (low, middle)
    return (low + high) / 2


def entropy_mean(pixels: int) -> float:
    """Return the expected entropy, in bits, of the histogram of a uniform image.

    Exact (a binomial sum) up to a million pixels, then ``8 - 255 / (2 n ln 2)`` (Miller), which is as good.
    """
    if pixels > _EXACT_MEAN_PIXELS:
        return math.log2(LEVELS) - PEAK / (2 * pixels * math.log(2))
    counts, probabilities = _binomial(pixels)
    share = counts / pixels
    return float(-LEVELS * np.sum(probabilities * share * np.log2(share)))


def entropy_std(pixels: int) -> float:
    """Return the standard deviation of that entropy, in bits: ``sqrt(2 * 255) / (2 n ln 2)``.

    To second order the entropy is ``8 - chi^2 / (2 n ln 2)``. From 1,900 pixels on the formula is within 5 %
    of simulated values.
    """
    return math.sqrt(2 * PEAK) / (2 * pixels * math.log(2))


def entropy_limit(pixels: int, level: float = LEVEL) -> float:
    """Return the one-sided lower limit of the entropy, in bits."""
    return entropy_mean(pixels) - _quantile(1 - level) * entropy_std(pixels)


def local_entropy_limits(
    blocks: int = LOCAL_BLOCKS, block_pixels: int = LOCAL_BLOCK_PIXELS, level: float = LEVEL
) -> Interval:
    """Return the two-sided limits of the local entropy, in bits; NaN ends when there is no block."""
    if blocks == 0:
        return Interval(math.nan, math.nan)
    return _two_sided(entropy_mean(block_pixels), entropy_std(block_pixels) / math.sqrt(blocks), level)


def correlation_limits(pixels: int, level: float = LEVEL) -> Interval:
    """Return the two-sided limits of the correlation of about ``pixels`` pairs: normal, ``1 / sqrt(n)``."""
    return _two_sided(0.0, 1 / math.sqrt(pixels), level)


def _two_sided(mean: float, std: float, level: float) -> Interval:
    reach = _quantile(1 - level / 2) * std
    return Interval(mean - reach, mean + reach)


def _quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _binomial(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts k >= 1 of one grey level and their probabilities, out to 12 standard deviations."""
    rate = 1 / LEVELS
    mean, reach = pixels * rate, 12 * math.sqrt(pixels * rate) + 40
    counts = np.arange(max(1, int(mean - reach)), min(pixels, int(mean + reach)) + 1)
    logs = np.array(
        [
            math.lgamma(pixels + 1)
            - math.lgamma(k + 1)
            - math.lgamma(pixels - k + 1)
            + k * math.log(rate)
            + (pixels - k) * math.log1p(-rate)
            for k in counts.tolist()
        ]
    )
    return counts, np.exp(logs)


def _chi_square_cdf(value: float, degrees: int) -> float:
    """Return the regularised lower incomplete gamma function P(degrees / 2, value / 2), by its series."""
    shape, x = degrees / 2, value / 2
    if x <= 0:
        return 0.0
    term = total = math.exp(shape * math.log(x) - x - math.lgamma(shape + 1))
    step = shape
    while term > total * 1e-16:
        step += 1
        term *= x / step
        total += term
    return min(total, 1.0)
