"""Layer 2: level-1 wavelet transform, blended with a secret image and quantised to the wire.

With an image S, a secret image Z and the transform W, the paper sends ``alpha*W(S) + (1-alpha)*W(Z)``.
Two ways to put that into b bits live here:

- *modular* (with the mask on): the step is proportional to alpha, so S keeps the whole range, and the
  secret's term is added modulo 2^b. Nothing is lost whatever alpha is.
- *literal* (without the mask): the blend itself is quantised, as in the paper; S is restored with an
  error that grows as 1/alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pywt
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

PEAK = 255
"""Largest grey level."""


def forward(images: NDArray[np.number], wavelet: str) -> NDArray[np.float32]:
    """Level-1 2-D DWT with periodic borders, sub-bands tiled: approximation top left, details clockwise.

    Parameters
    ----------
    images
        (N, H, W), grey levels 0..255, H and W even.
    wavelet
        Name of an orthogonal wavelet.

    Returns
    -------
    ndarray
        float32 (N, H, W). Exact for Haar and integer images (multiples of 1/2).
    """
    if wavelet == "haar":
        return _haar_forward(images)
    approximation, details = pywt.dwt2(
        images.astype(np.float64), wavelet, mode="periodization", axes=(-2, -1)
    )
    return _tile((approximation, *details), images.shape)


def inverse(bands: NDArray[np.float32], wavelet: str) -> NDArray[np.float32]:
    """Undo :func:`forward`; float32 (N, H, W), not clipped."""
    if wavelet == "haar":
        return _haar_inverse(bands)
    approximation, horizontal, vertical, diagonal = (band.astype(np.float64) for band in split(bands))
    image = pywt.idwt2(
        (approximation, (horizontal, vertical, diagonal)), wavelet, mode="periodization", axes=(-2, -1)
    )
    return np.ascontiguousarray(image, np.float32)


def split(bands: NDArray[Scalar]) -> tuple[NDArray[Scalar], ...]:
    """Return views of the tiled sub-bands of (..., H, W): approximation, horizontal, vertical, diagonal."""
    height, width = bands.shape[-2] // 2, bands.shape[-1] // 2
    top, bottom = bands[..., :height, :], bands[..., height:, :]
    return top[..., :width], top[..., width:], bottom[..., :width], bottom[..., width:]


def _tile(parts: Sequence[NDArray[np.floating]], shape: tuple[int, ...]) -> NDArray[np.float32]:
    tiled = np.empty(shape, np.float32)
    for target, part in zip(split(tiled), parts, strict=True):
        target[...] = part
    return tiled


def _haar_forward(images: NDArray[np.number]) -> NDArray[np.float32]:
    # Integers of 8 bits fit twice over into int16, where the eight additions are cheapest.
    work: type[np.int16 | np.float32] = np.int16 if images.dtype == np.uint8 else np.float32
    top, bottom = images[:, 0::2].astype(work), images[:, 1::2].astype(work)
    sums, differences = np.add(top, bottom), np.subtract(top, bottom)
    bands = np.empty(images.shape, np.float32)
    approximation, horizontal, vertical, diagonal = split(bands)
    np.add(sums[..., 0::2], sums[..., 1::2], out=approximation, casting="unsafe")
    np.add(differences[..., 0::2], differences[..., 1::2], out=horizontal, casting="unsafe")
    np.subtract(sums[..., 0::2], sums[..., 1::2], out=vertical, casting="unsafe")
    np.subtract(differences[..., 0::2], differences[..., 1::2], out=diagonal, casting="unsafe")
    bands *= np.float32(0.5)
    return bands


def _haar_inverse(bands: NDArray[np.float32]) -> NDArray[np.float32]:
    halves: NDArray[np.float32] = bands * np.float32(0.5)
    approximation, horizontal, vertical, diagonal = split(halves)
    sums, differences = np.empty_like(bands), np.empty_like(bands)
    half = bands.shape[-2] // 2
    sums, differences = sums[:, :half], differences[:, :half]
    np.add(approximation, vertical, out=sums[..., 0::2])
    np.subtract(approximation, vertical, out=sums[..., 1::2])
    np.add(horizontal, diagonal, out=differences[..., 0::2])
    np.subtract(horizontal, diagonal, out=differences[..., 1::2])
    images = np.empty_like(bands)
    np.add(sums, differences, out=images[:, 0::2])
    np.subtract(sums, differences, out=images[:, 1::2])
    return images


# --- quantisation ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quantiser:
    """Uniform quantiser of image coefficients to ``bits`` bits.

    Attributes
    ----------
    step
        Coefficient units (grey levels) per wire level.
    low, detail_low
        Coefficient that level 0 stands for: in the approximation band (or the image itself when there
        is no transform), and in the detail bands, where zero lies exactly on the middle level.
    bits
        Bits per wire level.
    tiled
        Whether the plane holds four sub-bands.
    """

    step: float
    low: float
    detail_low: float
    bits: int
    tiled: bool

    def scale(self, coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn coefficients (N, H, W) into wire levels, not yet rounded; works in place."""
        coefficients *= np.float32(1 / self.step)
        for band, offset in self._offsets(coefficients):
            np.subtract(band, np.float32(offset / self.step), out=band)
        return coefficients

    def round(self, levels: NDArray[np.float32]) -> NDArray[np.unsignedinteger]:
        """Round and saturate to ``uint{bits}``; works in place on ``levels``."""
        np.rint(levels, out=levels)
        np.clip(levels, 0, (1 << self.bits) - 1, out=levels)
        return levels.astype(np.uint8 if self.bits == 8 else np.uint16)

    def unscale(self, levels: NDArray[np.number]) -> NDArray[np.float32]:
        """Turn wire levels back into coefficients, float32 (N, H, W)."""
        coefficients: NDArray[np.float32] = np.multiply(levels, np.float32(self.step), dtype=np.float32)
        for band, offset in self._offsets(coefficients):
            np.add(band, np.float32(offset), out=band)
        return coefficients

    def _offsets(self, plane: NDArray[np.float32]) -> list[tuple[NDArray[np.float32], float]]:
        if not self.tiled:
            return [(plane, self.low)]
        approximation, *details = split(plane)
        return [(approximation, self.low), *((detail, self.detail_low) for detail in details)]


def make_quantiser(wavelet: str | None, bits: int, *, guard: float = 0.0) -> Quantiser:
    """Return the quantiser whose range holds every coefficient of an 8-bit image, plus a guard band.

    Parameters
    ----------
    wavelet
        Name of the wavelet, or None for no transform.
    bits
        8 or 16.
    guard
        Grey levels added at either end, so that noise does not saturate at black and white.
    """
    low, high, detail = _coefficient_bounds(wavelet)
    reach = max(high - low, 2 * detail) + 2 * guard
    # 255 * 256 levels rather than 65,535 at 16 bits: the Haar step is then 2^-7 and hits every
    # coefficient of an integer image exactly.
    step = reach / (PEAK << (bits - 8))
    return Quantiser(step, low - guard, -step * (1 << (bits - 1)), bits, wavelet is not None)


@lru_cache(maxsize=64)
def _coefficient_bounds(wavelet: str | None) -> tuple[float, float, float]:
    """Return the lowest and highest approximation and the largest absolute detail of an image in 0..255."""
    if wavelet is None:
        return 0.0, float(PEAK), 0.0
    if wavelet == "haar":
        return 0.0, 2.0 * PEAK, float(PEAK)
    low_pass, high_pass = (np.array(taps) for taps in pywt.Wavelet(wavelet).filter_bank[:2])
    up, down = low_pass[low_pass > 0].sum(), -low_pass[low_pass < 0].sum()
    # A detail filter sums to zero, so its positive taps weigh half of its absolute sum.
    swing = np.abs(high_pass).sum() / 2
    mixed, diagonal = swing * (up + down), 2 * swing**2
    return -2 * up * down * PEAK, (up**2 + down**2) * PEAK, max(mixed, diagonal) * PEAK


# --- the secret image -----------------------------------------------------------------------------
#
# A secret image is repeated without end in both directions and cut at a keyed place; with periodic borders
# the transform of the repetition is the repetition of the transform, so it is computed once per cipher.

_RATIO_BITS = 16


def modular_planes(
    images: Sequence[NDArray[np.uint8]], wavelet: str, alpha: float, quantiser: Quantiser
) -> list[NDArray[np.number]]:
    """Return the term ``(1 - alpha) * W(Z)`` of each secret image Z in wire levels of alpha * step.

    Parameters
    ----------
    images
        Secret images, uint8 (h, w) with even sides; sizes may differ.
    wavelet
        Name of the wavelet.
    alpha
        Weight of the image in the blend.
    quantiser
        Gives step and bits.

    Returns
    -------
    list of ndarray
        ``uint{bits}`` (4, h/2, w/2) each, modulo 2^bits.
    """
    # The ratio is an integer in units of 2^-16, so that nothing a key decides depends on floating point;
    # only its residue matters.
    ratio = (1 - Fraction(alpha)) / (Fraction(alpha) * Fraction(quantiser.step))
    factor = round(ratio * (1 << _RATIO_BITS)) % (1 << (quantiser.bits + _RATIO_BITS + 1))
    word = np.uint8 if quantiser.bits == 8 else np.uint16
    planes: list[NDArray[np.number]] = []
    for image in images:
        # Twice a Haar coefficient is an integer; with other wavelets this rounds the secret image's.
        halves = np.rint(_planes(image, wavelet) * 2).astype(np.int64)
        planes.append(((halves * factor) >> (_RATIO_BITS + 1)).astype(word))
    return planes


def blend_planes(
    images: Sequence[NDArray[np.uint8]], wavelet: str, alpha: float, quantiser: Quantiser
) -> list[NDArray[np.number]]:
    """Return the term ``(1 - alpha) * W(Z)`` in wire levels of one step: float32 (4, h/2, w/2) each.

    The parameters are those of :func:`modular_planes`.
    """
    factor = np.float32((1 - alpha) / quantiser.step)
    return [_planes(image, wavelet) * factor for image in images]


def window(planes: NDArray[np.number], row: int, column: int, shape: tuple[int, int]) -> NDArray[np.number]:
    """Cut the endless repetition of ``planes`` (4, h, w) at (row, column) into a tiled ``shape``."""
    rows = (row + np.arange(shape[0] // 2)) % planes.shape[1]
    columns = (column + np.arange(shape[1] // 2)) % planes.shape[2]
    tiled = np.empty(shape, planes.dtype)
    for target, plane in zip(split(tiled), planes, strict=True):
        target[...] = plane[rows[:, None], columns]
    return tiled


def _planes(image: NDArray[np.uint8], wavelet: str) -> NDArray[np.float32]:
    return np.stack(split(forward(image[None], wavelet)[0]))
