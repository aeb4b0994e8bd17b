"""Made-up images without licence, download or end: what a federation of a thousand sites is tried on.

Gratings of four orientations with random phase, period, contrast and noise. They say nothing of the accuracy
on real images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

CLASSES = ("horizontal", "rising", "vertical", "falling")
COUNT = 100_000
SIDE = 28

_NOISE = 20.0
_PURPOSE = 0x5EED


class SyntheticImages(Sequence[NDArray[np.uint8]]):
    """Image ``i`` is of class ``i % 4`` and follows from its index alone; it is made on access.

    Parameters
    ----------
    indices
        Which images; all :data:`COUNT` by default.
    """

    def __init__(self, indices: range = range(COUNT)) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> SyntheticImages: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.uint8] | SyntheticImages:
        if isinstance(index, slice):
            return SyntheticImages(self._indices[index])
        return _draw(self._indices[index])


def synthetic_labels() -> list[int]:
    """Return the class of every image of :class:`SyntheticImages`."""
    return [number % len(CLASSES) for number in range(COUNT)]


def _draw(number: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([_PURPOSE, number])
    angle = np.pi / len(CLASSES) * (number % len(CLASSES)) + rng.normal(0.0, 0.1)
    period, phase, contrast = rng.uniform(4.0, 9.0), rng.uniform(0.0, 2 * np.pi), rng.uniform(40.0, 100.0)
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin(2 * np.pi / period * (y * np.cos(angle) + x * np.sin(angle)) + phase)
    pixels = 127.5 + contrast * wave + rng.normal(0.0, _NOISE, wave.shape)
    image: NDArray[np.uint8] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return image
