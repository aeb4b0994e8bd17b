"""Statistics of cipher images. Necessary, never sufficient: a weak cipher can pass all of them.

Limits come from :mod:`flep_fl.data_security.limits`, for any image size.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ImageFormatError

GreyImage = NDArray[np.uint8]
LEVELS = 256

LOCAL_BLOCKS, LOCAL_BLOCK_PIXELS = 30, 1936
"""Local entropy: number and size of the blocks (Wu et al. 2013)."""

_NEIGHBOURS: dict[str, tuple[tuple[slice, slice], tuple[slice, slice]]] = {
    "horizontal": ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    "vertical": ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
    "diagonal": ((slice(None, -1), slice(None, -1)), (slice(1, None), slice(1, None))),
}


def npcr(first: GreyImage, second: GreyImage) -> float:
    """Compute the number of pixels change rate, in percent: ``100 * mean(C1 != C2)``.

    Parameters
    ----------
    first, second
        uint8, equal shapes: cipher images of plaintexts that differ in one pixel.
    """
    _require_pair(first, second)
    return float(100 * np.mean(first != second))


def uaci(first: GreyImage, second: GreyImage) -> float:
    """Unified average changing intensity, in percent: ``100 * mean(|C1 - C2|) / 255``."""
    _require_pair(first, second)
    return float(100 * np.mean(np.abs(first.astype(np.int16) - second)) / 255)


def histogram(image: GreyImage) -> NDArray[np.int64]:
    """Count the pixels of each of the 256 grey levels; int64 (256,)."""
    _require_grey(image)
    return np.bincount(image.ravel(), minlength=LEVELS).astype(np.int64)


def entropy(image: GreyImage) -> float:
    """Shannon entropy of the histogram, in bits; an ideal 256 x 256 cipher has 7.9972 +- 0.00025."""
    counts = histogram(image)
    share = counts[counts > 0] / image.size
    return float(-np.sum(share * np.log2(share)))


def local_entropy(
    image: GreyImage,
    rng: np.random.Generator,
    *,
    blocks: int = LOCAL_BLOCKS,
    block_pixels: int = LOCAL_BLOCK_PIXELS,
) -> float:
    """Mean Shannon entropy of randomly chosen disjoint blocks, in bits (Wu et al. 2013).

    A block is a run of consecutive pixels in raster order: 30 disjoint squares of 44 x 44 pixels, which the
    defaults would otherwise mean, do not fit into 256 x 256.

    Parameters
    ----------
    image
        uint8, any shape.
    rng
        Chooses the blocks.
    blocks
        Number of blocks; fewer where the image has fewer.
    block_pixels
        Pixels in a block.

    Returns
    -------
    float
        7.9025 on average for an ideal cipher and the default block size; NaN when the image is smaller than
        one block.
    """
    _require_grey(image)
    whole = image.size // block_pixels
    if whole == 0:
        return float("nan")
    runs = image.ravel()[: whole * block_pixels].reshape(whole, block_pixels)
    chosen = rng.choice(whole, min(blocks, whole), replace=False)
    return float(np.mean([entropy(runs[index]) for index in chosen]))


def encryption_quality(plain: GreyImage, cipher: GreyImage) -> float:
    """Mean change of the histogram: ``sum(|H(cipher) - H(plain)|) / 256``."""
    return float(np.abs(histogram(cipher) - histogram(plain)).sum() / LEVELS)


def chi_square(image: GreyImage) -> float:
    """Pearson's statistic of the histogram against the uniform one (255 degrees of freedom)."""
    expected = image.size / LEVELS
    return float(np.sum((histogram(image) - expected) ** 2) / expected)


def adjacent_correlation(
    image: NDArray[np.number], direction: Literal["horizontal", "vertical", "diagonal"]
) -> float:
    """Pearson correlation of all pairs of neighbouring pixels in one direction; 0 for a constant image.

    Raises
    ------
    ImageFormatError
        When the direction is unknown or the image is too small to have such neighbours.
    """
    if direction not in _NEIGHBOURS:
        raise ImageFormatError(
            "Unknown direction", expected=f"one of {', '.join(_NEIGHBOURS)}", found=direction
        )
    here, there = (image[area].astype(np.float64).ravel() for area in _NEIGHBOURS[direction])
    if here.size == 0:
        raise ImageFormatError("The image has no neighbouring pixels", found=f"shape {image.shape}")
    here, there = here - here.mean(), there - there.mean()
    scale = np.sqrt(np.sum(here**2) * np.sum(there**2))
    return float(np.sum(here * there) / scale) if scale > 0 else 0.0


def psnr(reference: NDArray[np.number], image: NDArray[np.number]) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255; infinite for equal images."""
    if reference.shape != image.shape:
        raise ImageFormatError("The images differ in shape", expected=reference.shape, found=image.shape)
    error = float(np.mean((reference.astype(np.float64) - image) ** 2))
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")


_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_SSIM_K = (0.01, 0.03)


def ssim(reference: NDArray[np.number], image: NDArray[np.number]) -> float:
    """Structural similarity for a peak of 255: the mean of the map, where the whole window fits.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 13(4), 2004: an 11 x 11 Gaussian window of standard deviation 1.5, K1 = 0.01,
    K2 = 0.03, biased variances.

    Raises
    ------
    ImageFormatError
        The images differ in shape, or are no ``(H, W)`` of at least 11 pixels a side.
    """
    if reference.shape != image.shape:
        raise ImageFormatError("The images differ in shape", expected=reference.shape, found=image.shape)
    side = 2 * _SSIM_RADIUS + 1
    if image.ndim != 2 or min(image.shape) < side:
        raise ImageFormatError(
            "SSIM needs room for its window",
            expected=f"(H, W) of at least {side} pixels a side",
            found=image.shape,
        )
    x, y = reference.astype(np.float64), image.astype(np.float64)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x, variance_y = _window_mean(x * x) - mean_x**2, _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = ((k * 255) ** 2 for k in _SSIM_K)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)))


def _window_mean(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean over the Gaussian window at every place where it fits."""
    places = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    window = np.exp(-0.5 * (places / _SSIM_SIGMA) ** 2)
    window /= window.sum()
    height, width = (side - 2 * _SSIM_RADIUS for side in image.shape)
    rows = sum(weight * image[start : start + height] for start, weight in enumerate(window))
    result: NDArray[np.float64] = sum(
        weight * rows[:, start : start + width] for start, weight in enumerate(window)
    )
    return result


def _require_grey(image: GreyImage) -> None:
    if image.dtype != np.uint8 or image.size == 0:
        raise ImageFormatError("Statistics need an 8-bit image", expected="uint8", found=str(image.dtype))


def _require_pair(first: GreyImage, second: GreyImage) -> None:
    _require_grey(first)
    _require_grey(second)
    if first.shape != second.shape:
        raise ImageFormatError("The images differ in shape", expected=first.shape, found=second.shape)
