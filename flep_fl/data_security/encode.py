"""Layer 2: level-1 wavelet transform, blended with a secret image and quantised to the wire.

With an image S, a secret image Z and the transform W, the paper sends ``alpha*W(S) + (1-alpha)*W(Z)``.
Two ways to put that into b bits live here:

- *modular* (with the mask on): the step is proportional to alpha, so S keeps the whole range, and the
  secret's term is added modulo 2^b. Nothing is lost whatever alpha is.
- *literal* (without the mask): the blend itself is quantised, as in the paper; S is restored with an
  error that grows as 1/alpha.

Alpha and bits may differ from sub-band to sub-band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pywt
from numpy.typing import NDArray

from flep_fl.data_security.packing import Scalar, bands_of, split, word_type
from flep_fl.data_security.wavelets import coefficient_bounds

__all__ = [
    "PEAK",
    "Quantiser",
    "blend_planes",
    "forward",
    "inverse",
    "make_quantiser",
    "modular_planes",
    "split",
    "window",
]

PEAK = 255
"""Largest grey level of an 8-bit image."""


def forward(
    images: NDArray[np.number], wavelet: str, dtype: type[np.float32 | np.float64] = np.float32
) -> NDArray[np.floating]:
    """Level-1 2-D DWT with periodic borders, sub-bands tiled: approximation top left, details clockwise.

    Parameters
    ----------
    images
        (N, H, W), grey levels, H and W even.
    wavelet
        Name of a discrete wavelet of PyWavelets.
    dtype
        Of the result.

    Returns
    -------
    ndarray
        ``dtype`` (N, H, W). Exact for Haar and integer images (multiples of 1/2).
    """
    if wavelet == "haar":
        return _haar_forward(images, dtype)
    approximation, details = pywt.dwt2(
        images.astype(np.float64), wavelet, mode="periodization", axes=(-2, -1)
    )
    tiled = np.empty(images.shape, dtype)
    for target, part in zip(split(tiled), (approximation, *details), strict=True):
        target[...] = part
    return tiled


def inverse(bands: NDArray[Scalar], wavelet: str) -> NDArray[Scalar]:
    """Undo :func:`forward`; (N, H, W) of the bands' own dtype, not clipped."""
    if wavelet == "haar":
        return _haar_inverse(bands)
    approximation, horizontal, vertical, diagonal = (band.astype(np.float64) for band in split(bands))
    image = pywt.idwt2(
        (approximation, (horizontal, vertical, diagonal)), wavelet, mode="periodization", axes=(-2, -1)
    )
    return np.ascontiguousarray(image, bands.dtype)


_HAAR_WORK = {"u1": np.int16, "u2": np.int32}
"""Sums of four pixels fit these integers, in which the eight additions are cheapest."""


def _haar_forward(images: NDArray[np.number], dtype: type[np.float32 | np.float64]) -> NDArray[np.floating]:
    work = _HAAR_WORK.get(images.dtype.str[1:], dtype)
    top, bottom = images[:, 0::2].astype(work), images[:, 1::2].astype(work)
    sums, differences = np.add(top, bottom), np.subtract(top, bottom)
    bands = np.empty(images.shape, dtype)
    approximation, horizontal, vertical, diagonal = split(bands)
    np.add(sums[..., 0::2], sums[..., 1::2], out=approximation, casting="unsafe")
    np.add(differences[..., 0::2], differences[..., 1::2], out=horizontal, casting="unsafe")
    np.subtract(sums[..., 0::2], sums[..., 1::2], out=vertical, casting="unsafe")
    np.subtract(differences[..., 0::2], differences[..., 1::2], out=diagonal, casting="unsafe")
    bands *= dtype(0.5)
    return bands


def _haar_inverse(bands: NDArray[Scalar]) -> NDArray[Scalar]:
    halves: NDArray[Scalar] = np.multiply(bands, 0.5, dtype=bands.dtype)
    approximation, horizontal, vertical, diagonal = split(halves)
    half = bands.shape[-2] // 2
    shape = (*bands.shape[:-2], half, bands.shape[-1])
    sums, differences = np.empty(shape, bands.dtype), np.empty(shape, bands.dtype)
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
class _Band:
    """Quantiser of one sub-band: ``level = (coefficient - low) / step``; ``knee`` bends it (0: straight)."""

    step: float
    low: float
    bits: int
    knee: float = 0.0

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def compress(self, levels: NDArray[np.floating]) -> None:
        """Give small details more levels than large ones, in place."""
        if self.knee:
            levels -= self._middle
            signs = np.sign(levels)
            np.abs(levels, out=levels)
            np.minimum(levels, self._middle - 1, out=levels)
            # With t = |level| / M: k = M (sqrt(r + t) - sqrt(r)) / (sqrt(r + 1) - sqrt(r)).
            levels *= 1 / (self._middle - 1)
            levels += self.knee
            np.sqrt(levels, out=levels)
            levels -= self.knee**0.5
            levels *= (self._middle - 1) / ((self.knee + 1) ** 0.5 - self.knee**0.5)
            levels *= signs
            levels += self._middle

    def expand(self, levels: NDArray[np.floating]) -> None:
        """Undo :meth:`compress`, in place."""
        if self.knee:
            levels -= self._middle
            signs = np.sign(levels)
            np.abs(levels, out=levels)
            levels *= ((self.knee + 1) ** 0.5 - self.knee**0.5) / (self._middle - 1)
            levels += self.knee**0.5
            np.square(levels, out=levels)
            levels -= self.knee
            levels *= self._middle - 1
            levels *= signs
            levels += self._middle


@dataclass(frozen=True, slots=True)
class Quantiser:
    """Quantiser of image coefficients to wire levels, one entry of ``bands`` per sub-band.

    The approximation, and every band of 8 bits or more, is quantised uniformly; zero lies exactly on the
    middle level of a detail band. Details of fewer than 8 bits have levels that grow farther apart with their
    distance from zero (square-root companding), so that none is ever cut off.

    Attributes
    ----------
    bands
        Four entries (LL, LH, HL, HH), or one where there is no transform.
    """

    bands: tuple[_Band, ...]

    @property
    def step(self) -> float:
        """Grey levels per wire level, in the approximation band or the image itself."""
        return self.bands[0].step

    @property
    def steps(self) -> tuple[float, ...]:
        """Grey levels per wire level, per band (before companding)."""
        return tuple(band.step for band in self.bands)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits per wire level, per band."""
        return tuple(band.bits for band in self.bands)

    @property
    def real(self) -> type[np.float32 | np.float64]:
        """Floating-point type in which this many bits are exact."""
        return np.float32 if max(self.bits) <= 16 else np.float64

    def scale(self, coefficients: NDArray[Scalar], weights: Sequence[float] | None = None) -> NDArray[Scalar]:
        """Turn coefficients (N, H, W), times one weight per band, into levels; works in place."""
        plane: NDArray[np.floating] = coefficients  # type: ignore[assignment]
        for index, (band, part) in enumerate(zip(self.bands, bands_of(plane, self.bands), strict=True)):
            weight = 1.0 if weights is None else weights[index]
            np.multiply(part, part.dtype.type(weight / band.step), out=part)
            np.subtract(part, part.dtype.type(band.low / band.step), out=part)
        return coefficients

    def round(self, levels: NDArray[np.floating]) -> NDArray[np.unsignedinteger]:
        """Compress, round and saturate to wire words; works in place on ``levels``."""
        for band, part in zip(self.bands, bands_of(levels, self.bands), strict=True):
            band.compress(part)
        np.rint(levels, out=levels)
        if len(set(self.bits)) == 1:
            np.clip(levels, 0, (1 << self.bits[0]) - 1, out=levels)
        else:
            for band, part in zip(self.bands, bands_of(levels, self.bands), strict=True):
                np.clip(part, 0, (1 << band.bits) - 1, out=part)
        return levels.astype(word_type(self.bits))

    def expand(self, wires: NDArray[np.number]) -> NDArray[np.floating]:
        """Turn wire words (or real values between them) back into levels."""
        levels: NDArray[np.floating] = wires.astype(self.real)
        for band, part in zip(self.bands, bands_of(levels, self.bands), strict=True):
            band.expand(part)
        return levels

    def unscale(self, levels: NDArray[Scalar], weights: Sequence[float] | None = None) -> NDArray[Scalar]:
        """Undo :meth:`scale`; works in place."""
        plane: NDArray[np.floating] = levels  # type: ignore[assignment]
        for index, (band, part) in enumerate(zip(self.bands, bands_of(plane, self.bands), strict=True)):
            real, weight = part.dtype.type, 1.0 if weights is None else weights[index]
            np.multiply(part, real(band.step / weight), out=part)
            np.add(part, real(band.low / weight), out=part)
        return levels


KNEE_LEVELS = 2.0
"""Grey levels up to which companded details are quantised about evenly, where there is no noise."""


def make_quantiser(
    wavelet: str | None,
    bits: int | Sequence[int],
    *,
    guard: float = 0.0,
    peak: int = PEAK,
    knee: float = KNEE_LEVELS,
) -> Quantiser:
    """Return the quantiser whose range holds every coefficient of an image, plus a guard band.

    Parameters
    ----------
    wavelet
        Name of the wavelet, or None for no transform.
    bits
        One number, or four (LL, LH, HL, HH).
    guard
        Grey levels added at either end, so that noise does not saturate at black and white.
    peak
        Largest grey level of an image, 255 or 65,535.
    knee
        Details up to about this size (grey levels) share the closest companded levels: the noise, if any.
    """
    low, high, detail = coefficient_bounds(wavelet)
    reach = max(high - low, 2 * detail) * peak + 2 * guard
    each = (bits,) * 4 if isinstance(bits, int) else tuple(bits)
    bands = [_Band(reach / _span(each[0], peak), low * peak - guard, each[0])]
    if wavelet is None:
        return Quantiser(tuple(bands))
    for width in each[1:]:
        if width >= 8:
            step = reach / _span(width, peak)
            bands.append(_Band(step, -step * (1 << (width - 1)), width))
        else:
            extent = detail * peak + guard
            step = extent / ((1 << (width - 1)) - 1)
            bands.append(_Band(step, -step * (1 << (width - 1)), width, knee / extent))
    return Quantiser(tuple(bands))


def _span(bits: int, peak: int) -> int:
    """Return the number of steps that the range is cut into."""
    # ``peak`` times a power of two rather than 2^bits - 1: the Haar step is then a power of two as well, and
    # hits every coefficient of an integer image exactly once there are enough bits.
    spare = bits - peak.bit_length()
    return peak << spare if spare >= 0 else (1 << bits) - 1


# --- the secret image -----------------------------------------------------------------------------
#
# A secret image is repeated without end in both directions and cut at a keyed place; with periodic borders
# the transform of the repetition is the repetition of the transform, so it is computed once per cipher.

_RATIO_BITS = 16


def modular_planes(
    images: Sequence[NDArray[np.uint8]],
    wavelet: str,
    alphas: Sequence[float],
    quantiser: Quantiser,
    *,
    gain: int = 1,
) -> list[NDArray[np.number]]:
    """Return the term ``(1 - alpha) * W(Z)`` of each secret image Z in wire levels of alpha * step.

    Parameters
    ----------
    images
        Secret images, uint8 (h, w) with even sides; sizes may differ.
    wavelet
        Name of the wavelet.
    alphas
        Weight of the image in the blend, one per sub-band.
    quantiser
        Gives steps and bits.
    gain
        Grey levels of the image per grey level of the secret (257 for 16-bit images).

    Returns
    -------
    list of ndarray
        Wire words (4, h/2, w/2) each, modulo the word.
    """
    # The ratio is an integer in units of 2^-16, so that nothing a key decides depends on floating point;
    # only its residue matters.
    word = word_type(quantiser.bits)
    span = 8 * np.dtype(word).itemsize + _RATIO_BITS + 1
    factors = []
    for alpha, step in zip(alphas, quantiser.steps, strict=True):
        ratio = (1 - Fraction(alpha)) * gain / (Fraction(alpha) * Fraction(step))
        factors.append(round(ratio * (1 << _RATIO_BITS)) % (1 << span))
    planes: list[NDArray[np.number]] = []
    for image in images:
        # Twice a Haar coefficient is an integer; with other wavelets this rounds the secret image's.
        halves = np.rint(_planes(image, wavelet) * 2).astype(np.int64)
        product = halves * np.array(factors, np.int64)[:, None, None]
        planes.append((product >> (_RATIO_BITS + 1)).astype(word))
    return planes


def blend_planes(
    images: Sequence[NDArray[np.uint8]],
    wavelet: str,
    alphas: Sequence[float],
    quantiser: Quantiser,
    *,
    gain: int = 1,
) -> list[NDArray[np.number]]:
    """Return the term ``(1 - alpha) * W(Z)`` in wire levels of one step: real (4, h/2, w/2) each.

    The parameters are those of :func:`modular_planes`.
    """
    factors = [(1 - a) * gain / step for a, step in zip(alphas, quantiser.steps, strict=True)]
    weights = np.array(factors, np.float64)[:, None, None]
    return [(_planes(image, wavelet) * weights).astype(quantiser.real) for image in images]


def window(planes: NDArray[Scalar], row: int, column: int, shape: tuple[int, int]) -> NDArray[Scalar]:
    """Cut the endless repetition of ``planes`` (4, h, w) at (row, column) into a tiled ``shape``."""
    tiled = np.empty(shape, planes.dtype)
    for target, plane in zip(split(tiled), planes, strict=True):
        _fill(target, plane, row % planes.shape[1], column % planes.shape[2])
    return tiled


def _fill(target: NDArray[Scalar], plane: NDArray[Scalar], row: int, column: int) -> None:
    """Fill ``target`` with copies of ``plane``, turned by (row, column); slices are faster than a gather."""
    height, width = (min(pair) for pair in zip(plane.shape, target.shape, strict=True))
    above, left = min(plane.shape[0] - row, height), min(plane.shape[1] - column, width)
    for rows, source_rows in (
        (slice(0, above), slice(row, row + above)),
        (slice(above, height), slice(0, height - above)),
    ):
        target[rows, :left] = plane[source_rows, column : column + left]
        target[rows, left:width] = plane[source_rows, : width - left]
    # What is full is a whole number of periods, until nothing is left to fill.
    while width < target.shape[1]:
        count = min(width, target.shape[1] - width)
        target[:height, width : width + count] = target[:height, :count]
        width += count
    while height < target.shape[0]:
        count = min(height, target.shape[0] - height)
        target[height : height + count] = target[:count]
        height += count


def _planes(image: NDArray[np.uint8], wavelet: str) -> NDArray[np.floating]:
    return np.stack(split(forward(image[None], wavelet)[0]))
