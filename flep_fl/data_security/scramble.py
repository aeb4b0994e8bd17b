"""Layer 1: spiral scan inside sub-blocks, chaotic order between them (paper, section III-A).

A sub-block travels as one item. Large images are taken out of, and put back into, the chaotic order a strip
of rows at a time: what follows on a strip then finds it in the processor's cache, and no second copy of a
whole image in a wider type is ever held.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Generic, TypeVar

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


def _to_blocks(
    images: NDArray[Scalar], side: int, positions: tuple[tuple[int, int], ...]
) -> NDArray[np.generic]:
    """Cut (N, H, W) into (N, blocks) items of side^2 pixels in the order of ``positions``."""
    count, height, width = images.shape
    grid = np.empty((count, height // side, width // side, side * side), images.dtype)
    for index, (row, column) in enumerate(positions):
        grid[..., index] = images[:, row::side, column::side]
    return _as_items(grid.reshape(count, -1, side * side))


def _from_blocks(
    items: NDArray[np.generic],
    dtype: np.dtype[Scalar],
    width: int,
    side: int,
    positions: tuple[tuple[int, int], ...],
) -> NDArray[Scalar]:
    """Undo :func:`_to_blocks`."""
    grid = items[..., None].view(dtype).reshape(len(items), -1, width // side, side * side)
    images = np.empty((len(items), grid.shape[1] * side, width), dtype)
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
    return Scrambled(images, orders, side).rows(0, images.shape[1])


def unscramble(images: NDArray[Scalar], orders: NDArray[np.intp], side: int) -> NDArray[Scalar]:
    """Undo :func:`scramble` exactly; the arguments are the same."""
    target = Unscrambled(images.shape, images.dtype, orders, side)
    target.put(0, images)
    return target.images()


class Scrambled(Generic[Scalar]):
    """Scrambled images whose rows are made on demand; the parameters are those of :func:`scramble`."""

    def __init__(self, images: NDArray[Scalar], orders: NDArray[np.intp], side: int) -> None:
        self._items = _to_blocks(images, side, spiral_positions(side))
        self._orders, self._side = orders, side
        self._dtype, self._width = images.dtype, images.shape[2]

    def rows(self, start: int, stop: int) -> NDArray[Scalar]:
        """Return rows ``start`` to ``stop`` of all images; both are multiples of the block side."""
        first, last = (row // self._side * (self._width // self._side) for row in (start, stop))
        moved = np.empty((len(self._items), last - first), self._items.dtype)
        for image, items in enumerate(self._items):
            np.take(items, self._orders[image, first:last], out=moved[image], mode="clip")
        return _from_blocks(moved, self._dtype, self._width, self._side, _raster_positions(self._side))


class Unscrambled(Generic[Scalar]):
    """Takes scrambled images strip by strip and gives them back in their true order.

    Parameters
    ----------
    shape
        (N, H, W) of the images.
    dtype
        Of their pixels.
    orders, side
        As for :func:`scramble`.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Scalar], orders: NDArray[np.intp], side: int
    ) -> None:
        self._items = np.empty(orders.shape, _item_type(side * side, dtype))
        self._orders, self._side, self._dtype, self._width = orders, side, dtype, shape[2]

    def put(self, start: int, strip: NDArray[Scalar]) -> None:
        """Take the rows of all images from ``start`` on, a multiple of the block side."""
        items = _to_blocks(strip, self._side, _raster_positions(self._side))
        first = start // self._side * (self._width // self._side)
        for image, moved in enumerate(self._items):
            moved[self._orders[image, first : first + items.shape[1]]] = items[image]

    def images(self) -> NDArray[Scalar]:
        """Return the images, (N, H, W), once every row was put; nothing can be put after that."""
        self._orders = np.empty((0, 0), np.intp)
        return _from_blocks(self._items, self._dtype, self._width, self._side, spiral_positions(self._side))


_FAST_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def _item_type(pixels: int, dtype: np.dtype[Scalar]) -> np.dtype[np.generic]:
    size = pixels * dtype.itemsize
    return np.dtype(_FAST_ITEMS.get(size, (np.void, size)))


def _as_items(blocks: NDArray[Scalar]) -> NDArray[np.generic]:
    """View the pixels of one block as one item, so that moving a block is one copy."""
    return blocks.view(_item_type(blocks.shape[-1], blocks.dtype))[..., 0]
