"""Salt-and-pepper noise: find the pixels that were hit, and fill them from those that were not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.ports import Denoise

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

TOLERANCE = 6.5
"""Grey levels by which a hit pixel may lie off black or white: the wire's quantisation moves it so far."""

_STRIP = 256

_NATURAL = 0.5
"""Share of a 5x5 neighbourhood, beyond ``amount``, above which black or white belongs to the picture."""


def impulse_denoiser(amount: float, steps: Sequence[Denoise]) -> Denoise:
    """Return a denoiser for images of which a share ``amount`` of the pixels is black or white.

    Hit pixels are filled with the mean of the pixels around them that were not hit, then with what each of
    ``steps`` (denoisers for ever weaker noise) makes of them, the others being held: plug-and-play
    inpainting, as in Zhang et al., "Plug-and-play image restoration with deep denoiser prior", TPAMI 2022.
    """

    def denoise(images: Image) -> Image:
        result = np.empty_like(images)
        for index, image in enumerate(images):
            hit = find_impulses(image, amount)
            filled = fill(image, hit)
            if hit.any():
                for step in steps:
                    np.copyto(filled, step(filled[None])[0], where=hit)
            result[index] = filled
        return result

    return denoise


def find_impulses(image: Image, amount: float) -> Mask:
    """Say which pixels of ``(H, W)`` were hit; black or white areas of the picture itself are kept."""
    hit = np.zeros(image.shape, dtype=bool)
    for extreme in (image <= TOLERANCE, image >= 255 - TOLERANCE):
        share = _box_mean(extreme, 2)
        hit |= extreme & (share <= min(amount + _NATURAL, 0.95))
    return hit


def fill(image: Image, hit: Mask) -> Image:
    """Fill the pixels of ``hit`` with means over the others, in the smallest window that holds one."""
    filled = image.copy()
    open_places = hit.copy()
    radius = 1
    known = np.where(hit, np.float32(0), image)
    good = ~hit
    while open_places.any() and radius < 2 * max(image.shape):
        weight = _box_mean(good, radius)
        found = open_places & (weight > 0.5 / (2 * radius + 1) ** 2)
        filled[found] = (_box_mean(known, radius)[found] / weight[found]).astype(np.float32)
        open_places &= ~found
        radius *= 2
    return filled


def _box_mean(image: Image | Mask, radius: int) -> Image:
    """Mean over the square window of side ``2 radius + 1``, as far as it lies in the image."""
    height, width = image.shape
    columns = np.arange(width)
    left, right = np.maximum(columns - radius, 0), np.minimum(columns + radius + 1, width)
    mean = np.empty(image.shape, dtype=np.float32)
    for start in range(0, height, _STRIP):  # sums need double precision: not of a large image at once
        rows = np.arange(start, min(start + _STRIP, height))
        top, bottom = np.maximum(rows - radius, 0), np.minimum(rows + radius + 1, height)
        strip = image[top[0] : bottom[-1]].astype(np.float64)
        sums = np.pad(strip, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
        bands = sums[bottom - top[0]] - sums[top - top[0]]
        mean[rows] = (bands[:, right] - bands[:, left]) / np.outer(bottom - top, right - left)
    return mean
