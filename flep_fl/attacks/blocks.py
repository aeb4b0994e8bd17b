"""Sub-blocks of an image, as the scramble layer moves them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flep_fl.data_security.scramble import spiral_positions

MISSING = 127.5
"""Grey level of what an attack could not place."""


def original_blocks(image: NDArray[np.number], side: int) -> NDArray[np.float64]:
    """Cut (H, W) into blocks in raster order, each in the order of the spiral scan: (blocks, side^2)."""
    return _cut(image, spiral_positions(side), side)


def moved_blocks(scrambled: NDArray[np.number], side: int) -> NDArray[np.float64]:
    """Cut a scrambled (H, W) into blocks in raster order.

    The scan order inside a block is public: the pixels come in the order of :func:`original_blocks`.
    """
    return _cut(scrambled, tuple((r, c) for r in range(side) for c in range(side)), side)


def put_back(
    blocks: NDArray[np.float64], places: NDArray[np.intp], shape: tuple[int, int], side: int
) -> NDArray[np.float64]:
    """Build the image whose block ``places[i]`` is ``blocks[i]``; float64 ``shape``.

    Parameters
    ----------
    blocks
        (blocks, side^2), from :func:`moved_blocks`.
    places
        (blocks,); where two blocks claim one place the last has it, -1 is no place, and a place that nobody
        claims is mid grey.
    shape, side
        Of the image and its blocks.
    """
    whole = np.full_like(blocks, MISSING)
    known = places >= 0
    whole[places[known]] = blocks[known]
    image = np.empty(shape, np.float64)
    grid = whole.reshape(shape[0] // side, shape[1] // side, side * side)
    for index, (row, column) in enumerate(spiral_positions(side)):
        image[row::side, column::side] = grid[..., index]
    return image


def _cut(image: NDArray[np.number], positions: tuple[tuple[int, int], ...], side: int) -> NDArray[np.float64]:
    parts = [np.asarray(image[row::side, column::side], np.float64).ravel() for row, column in positions]
    return np.stack(parts, axis=1)
