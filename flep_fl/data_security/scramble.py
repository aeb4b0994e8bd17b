"""Layer 1: spiral scan inside sub-blocks, chaotic order between them (paper, section III-A)."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


@lru_cache(maxsize=64)
def spiral_positions(side: int) -> tuple[tuple[int, int], ...]:
    """Return the (row, column) positions of a ``side`` x ``side`` block along a clockwise inward spiral.

    >>> spiral_positions(2)
    ((0, 0), (0, 1), (1, 1), (1, 0))
    """
    grid = np.arange(side * side).reshape(side, side)
    order: list[int] = []
    while grid.size:
        order.extend(int(index) for index in grid[0])
        grid = np.rot90(grid[1:])
    return tuple(divmod(index, side) for index in order)


@lru_cache(maxsize=64)
def _raster_positions(side: int) -> tuple[tuple[int, int], ...]:
    return tuple((row, column) for row in range(side) for column in range(side))


def _to_blocks(images: NDArray[Scalar], side: int, positions: tuple[tuple[int, int], ...]) -> NDArray[Scalar]:
    """Cut (N, H, W) into (N, blocks, side^2), pixels of a block in the order of ``positions``."""
    count, height, width = images.shape
    grid = np.empty((count, height // side, width // side, side * side), images.dtype)
    for index, (row, column) in enumerate(positions):
        grid[..., index] = images[:, row::side, column::side]
    return grid.reshape(count, -1, side * side)


def _from_blocks(
    blocks: NDArray[Scalar], shape: tuple[int, int], side: int, positions: tuple[tuple[int, int], ...]
) -> NDArray[Scalar]:
    """Undo :func:`_to_blocks`; ``shape`` is (H, W)."""
    count, (height, width) = len(blocks), shape
    grid = blocks.reshape(count, height // side, width // side, side * side)
    images = np.empty((count, height, width), blocks.dtype)
    for index, (row, column) in enumerate(positions):
        images[:, row::side, column::side] = grid[..., index]
    return images


def scramble(images: NDArray[Scalar], orders: NDArray[np.intp], side: int) -> NDArray[Scalar]:
    """Spiral-scan each sub-block and reorder the sub-blocks.

    Parameters
    ----------
    images
        (N, H, W), any dtype; H and W are multiples of ``side``.
    orders
        intp (N, H*W / side^2): sub-block ``orders[n, i]`` moves to place i (raster order).
    side
        Side of a sub-block in pixels.

    Returns
    -------
    ndarray
        (N, H, W), the same pixels in another place.
    """
    blocks = _as_records(_to_blocks(images, side, spiral_positions(side)))
    moved = np.empty_like(blocks)
    for image in range(len(blocks)):
        np.take(blocks[image], orders[image], out=moved[image], mode="clip")
    return _from_blocks(_as_pixels(moved, images.dtype), _plane(images), side, _raster_positions(side))


def unscramble(images: NDArray[Scalar], orders: NDArray[np.intp], side: int) -> NDArray[Scalar]:
    """Undo :func:`scramble` exactly; the arguments are the same."""
    blocks = _as_records(_to_blocks(images, side, _raster_positions(side)))
    moved = np.empty_like(blocks)
    for image in range(len(blocks)):
        moved[image][orders[image]] = blocks[image]
    return _from_blocks(_as_pixels(moved, images.dtype), _plane(images), side, spiral_positions(side))


def _plane(images: NDArray[Scalar]) -> tuple[int, int]:
    return images.shape[1], images.shape[2]


_FAST_RECORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def _as_records(blocks: NDArray[Scalar]) -> NDArray[np.generic]:
    """View the pixels of one block as one item, so that moving a block is one copy."""
    size = blocks.shape[-1] * blocks.dtype.itemsize
    record = np.dtype(_FAST_RECORDS.get(size, (np.void, size)))
    return blocks.view(record)[..., 0]


def _as_pixels(records: NDArray[np.generic], dtype: np.dtype[Scalar]) -> NDArray[Scalar]:
    return records[..., None].view(dtype)
