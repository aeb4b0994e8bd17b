"""What a discrete wavelet does to ranges, errors and noise, computed from its filters.

When is a wire lossless? With the mask on: every wavelet but ``dmey``, for every alpha, at 16 bits for uint8
and at 32 bits for uint16. Without the mask alpha must not be too small; for uint8 at 16 bits at least 0.0164
(haar, bior1.1), 0.131 (sym), 0.139 (coif), 0.148 (bior, rbio), and for db from 0.032 (db2) over 0.087 (db8)
to 0.89 (db38); for uint16 at 32 bits a 256th of that.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pywt

EXACT_ERROR = 0.49
"""Grey levels that an exact wire may be off before rounding."""


def is_orthogonal(wavelet: str) -> bool:
    """Whether white noise stays white under the transform."""
    return bool(pywt.Wavelet(wavelet).orthogonal)


@lru_cache(maxsize=128)
def coefficient_bounds(wavelet: str | None) -> tuple[float, float, float]:
    """Return the lowest and highest approximation and the largest absolute detail of an image in 0..1."""
    if wavelet is None:
        return 0.0, 1.0, 0.0
    if wavelet == "haar":
        return 0.0, 2.0, 1.0
    low_pass, high_pass = (np.array(taps) for taps in pywt.Wavelet(wavelet).filter_bank[:2])
    up, down = float(low_pass[low_pass > 0].sum()), float(-low_pass[low_pass < 0].sum())
    # A detail filter sums to zero, so its positive taps weigh half of its absolute sum.
    swing = float(np.abs(high_pass).sum()) / 2
    mixed, diagonal = swing * (up + down), 2 * swing**2
    return -2 * up * down, up**2 + down**2, max(mixed, diagonal)


@lru_cache(maxsize=128)
def error_gain(wavelet: str | None) -> float:
    """Return the largest pixel error that coefficient errors of at most 1 can add up to."""
    if wavelet is None:
        return 1.0
    low_pass, high_pass = (np.abs(taps) for taps in pywt.Wavelet(wavelet).filter_bank[2:])
    return max(float(low_pass[phase::2].sum() + high_pass[phase::2].sum()) for phase in (0, 1)) ** 2


@lru_cache(maxsize=128)
def noise_gain(wavelet: str | None) -> float:
    """Return the pixel standard deviation that white noise of deviation 1 in the coefficients gives.

    1 for orthogonal wavelets; for biorthogonal ones an average over pixels, and the noise is not white.
    """
    if wavelet is None or is_orthogonal(wavelet):
        return 1.0
    low_pass, high_pass = (np.array(taps) for taps in pywt.Wavelet(wavelet).filter_bank[2:])
    return float(low_pass @ low_pass + high_pass @ high_pass) / 2


@lru_cache(maxsize=128)
def reconstruction_defect(wavelet: str | None) -> float:
    """Return how far forth and back again can be from the identity, for an image in 0..1.

    Rounding only, except for ``dmey``, whose filters are truncated.
    """
    if wavelet is None or wavelet == "haar":
        return 0.0
    filters = pywt.Wavelet(wavelet)
    length = 4 * filters.dec_len + 8
    worst = 0.0
    for phase in (0, 1):
        impulse = np.zeros(length)
        impulse[length // 2 + phase] = 1
        approximation, detail = pywt.dwt(impulse, filters, "periodization")
        again = pywt.idwt(approximation, detail, filters, "periodization")
        worst = max(worst, float(np.abs(again - impulse).sum()))
    return (1 + worst) ** 2 - 1


def exact_from_alpha(wavelet: str | None, step: float, peak: int, *, modular: bool) -> float:
    """Return the smallest alpha for which rounding gives every pixel back.

    Parameters
    ----------
    wavelet
        Name, or None for no transform.
    step
        Grey levels per wire level.
    peak
        Largest grey level of the image.
    modular
        Whether the secret is added modulo 2^bits (mask on), where alpha costs no precision.

    Returns
    -------
    float
        0 when every alpha will do, infinity when none does.
    """
    spare = EXACT_ERROR - reconstruction_defect(wavelet) * peak
    # Half a level of rounding, and a little for the arithmetic on levels in single precision.
    error = error_gain(wavelet) * 0.51 * step
    if spare <= 0 or (modular and error > spare):
        return math.inf
    return 0.0 if modular else error / spare
