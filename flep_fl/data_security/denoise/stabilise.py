"""Variance-stabilising transforms: noise that depends on the signal made Gaussian of one level, and back.

The way back is the *exact unbiased* inverse: the denoised value ``D`` estimates the mean of the transformed
noisy pixel, so it is mapped to the signal whose transformed noise has that mean. The algebraic inverse would
be biased, most where the signal is weakest. Means are computed here by quadrature and kept as tables.

Sources: M. Mäkitalo and A. Foi, "Optimal inversion of the generalized Anscombe transformation for
Poisson-Gaussian noise", IEEE TIP 22(1), 2013; A. Foi, "Noise estimation and removal in MR imaging: the
variance-stabilization approach", ISBI 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.ports import Denoise

Values = NDArray[np.float64]

_PEAK = 255.0
_HEADROOM = 1.25
"""Tables of signals end so far above white: denoised pixels overshoot a little."""

_STRIP = 256
_SIGNALS = 256
_NODES = 32


@dataclass(frozen=True)
class Stabiliser:
    """A transform and its inverse, as tables.

    Attributes
    ----------
    level
        Standard deviation of the noise after ``forward``, about the same at every signal.
    forward
        Noisy pixels, 0..255 scale, to stabilised ones (of about the same scale).
    means, signals
        float64, ascending: mean of a stabilised noisy pixel, and the signal it belongs to.
    """

    level: float
    forward: Callable[[NDArray[np.floating]], NDArray[np.floating]]
    means: Values
    signals: Values

    def inverse(self, denoised: NDArray[np.floating]) -> NDArray[np.floating]:
        """Map denoised values back to signals; below the mean that belongs to black there is only black."""
        found: NDArray[np.floating] = np.interp(denoised, self.means, self.signals)
        return found

    def around(self, denoise: Denoise) -> Denoise:
        """Return a denoiser for the original noise from one for Gaussian noise of ``level``."""

        def stabilised(images: NDArray[np.float32]) -> NDArray[np.float32]:
            result = np.empty_like(images)
            # Both ways go through double precision: not with a large image at once.
            strips = [slice(start, start + _STRIP) for start in range(0, images.shape[1], _STRIP)]
            for image, target in zip(images, result, strict=True):
                for rows in strips:
                    target[rows] = self.forward(image[rows].astype(np.float64))
                clean = denoise(target[None])[0]
                for rows in strips:
                    target[rows] = self.inverse(clean[rows])
            return result

        return stabilised


@lru_cache(maxsize=8)
def anscombe(gain: float, std: float) -> Stabiliser:
    """Generalised Anscombe transform for ``gain * Poisson(x / gain) + N(0, std^2)``.

    ``f(z) = 2 / gain * sqrt(gain z + 3/8 gain^2 + std^2)``, stretched so that black and white stay at 0 and
    255: that decides the level.

    Parameters
    ----------
    gain
        Grey levels per photon, above 0.
    std
        Of the read noise, grey levels.
    """

    def root(values: NDArray[np.floating]) -> NDArray[np.floating]:
        inner = gain * values + 0.375 * gain**2 + std**2
        result: NDArray[np.floating] = (2 / gain) * np.sqrt(np.maximum(inner, 0.0))
        return result

    black, white = root(np.array([0.0, _PEAK]))
    stretch = float(_PEAK / (white - black))

    def forward(values: NDArray[np.floating]) -> NDArray[np.floating]:
        moved: NDArray[np.floating] = (root(values) - black) * stretch
        return moved

    # Close to black the mean bends most: the table's signals stand closer there.
    signals = _HEADROOM * _PEAK * np.linspace(0, 1, _SIGNALS) ** 2
    nodes, weights = _normal_nodes()
    means = np.empty_like(signals)
    for place, signal in enumerate(signals):
        counts, chances = _poisson(signal / gain)
        values = forward(gain * counts[:, None] + std * nodes)
        means[place] = chances @ values @ weights
    return Stabiliser(stretch, forward, means, signals)


@lru_cache(maxsize=8)
def rician(std: float) -> Stabiliser:
    """Transform for ``sqrt((x + N(0, std^2))^2 + N(0, std^2))``, the magnitude of a complex signal.

    The first-order transform ``f(y) = integral of std / s(m)``, where ``s(m)`` is the standard deviation of
    noisy pixels of mean ``m``; beyond some deviations above black it is ``y`` plus a constant. (Foi optimises
    the transform further; here the level near black differs a little from ``std``.)
    """
    nodes, weights = _normal_nodes()
    signals = (_HEADROOM * _PEAK + 4 * std) * np.linspace(0, 1, _SIGNALS) ** 2
    chances = np.outer(weights, weights)
    noisy = np.sqrt((signals[:, None, None] + std * nodes[:, None]) ** 2 + (std * nodes) ** 2)
    average = (noisy * chances).sum(axis=(1, 2))
    spread = np.sqrt(((noisy - average[:, None, None]) ** 2 * chances).sum(axis=(1, 2)))
    grid = np.concatenate([[0.0], average])
    slope = std / np.concatenate([[spread[0]], spread])
    area = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (slope[1:] + slope[:-1]) / 2)])

    def forward(values: NDArray[np.floating]) -> NDArray[np.floating]:
        # Beyond the table's end noise is nearly Gaussian, so the slope is one.
        inner = np.interp(values, grid, area)
        moved: NDArray[np.floating] = inner + np.maximum(values - grid[-1], 0.0)
        return moved

    means = (forward(noisy) * chances).sum(axis=(1, 2))
    return Stabiliser(std, forward, means, signals)


def _normal_nodes() -> tuple[Values, Values]:
    """Gauss-Hermite nodes and weights of the standard normal distribution."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes, weights / math.sqrt(2 * math.pi)


def _poisson(rate: float) -> tuple[Values, Values]:
    """Return the counts that matter and their probabilities, which sum to 1."""
    reach = 7 * math.sqrt(rate) + 16
    counts = np.arange(max(0, math.floor(rate - reach)), math.ceil(rate + reach) + 1, dtype=np.float64)
    if rate == 0:
        return counts[:1], np.ones(1)
    logarithms = counts * math.log(rate) - np.array([math.lgamma(count + 1) for count in counts])
    chances = np.exp(logarithms - logarithms.max())
    return counts, chances / chances.sum()
