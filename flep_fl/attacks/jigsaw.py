"""Putting scrambled sub-blocks together by how well their edges fit: ciphertext alone, no known image.

A greedy assembler: from one block outwards, always the best fitting free block into the free place that
constrains it most. Literature breaks block scrambling of 8 x 8 and larger blocks so (Chuman, Kiya et al.
2017, "On the security of block scrambling-based EtC systems against extended jigsaw puzzle solver
attacks"); 2 x 2 blocks hold too little edge.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.attacks.blocks import moved_blocks
from flep_fl.attacks.pictures import Row
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import Jigsaw
from flep_fl.attacks.similarity import ssim
from flep_fl.attacks.stolen_archive import make_owner
from flep_fl.attacks.victims import cipher_configuration, victim_images
from flep_fl.config import Config
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.scramble import spiral_positions

Blocks = NDArray[np.float64]
"""(N, side, side)."""

_FLAT = 1e-6  # keeps a division by zero away

FITTING = 0.5
"""From this share of rightly joined neighbours on a picture can be recognised."""


def square_blocks(scrambled: NDArray[np.number], side: int) -> Blocks:
    """Cut a scrambled image into blocks and undo the spiral scan inside each, which takes no key."""
    flat = moved_blocks(scrambled, side)
    blocks = np.empty((len(flat), side, side))
    for index, (row, column) in enumerate(spiral_positions(side)):
        blocks[:, row, column] = flat[:, index]
    return blocks


def misfits(blocks: Blocks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how badly block j fits to the right of block i, and below it: two (N, N) arrays.

    The edge is predicted from the last two lines of either block, and the mean square of both predictions'
    errors taken, relative to the second-best partner of either block: flat blocks fit everywhere, which says
    nothing (Gallagher 2012). A block never fits itself.
    """
    return _relative(_misfit(blocks)), _relative(_misfit(blocks.transpose(0, 2, 1)))


def _relative(table: NDArray[np.float64]) -> NDArray[np.float64]:
    np.fill_diagonal(table, np.inf)
    of_row, of_column = (np.partition(table, 1, axis=axis) for axis in (1, 0))
    return np.asarray(table / (of_row[:, 1:2] + _FLAT) + table / (of_column[1:2] + _FLAT))


def _misfit(blocks: Blocks) -> NDArray[np.float64]:
    last, before = blocks[:, :, -1], blocks[:, :, -2] if blocks.shape[2] > 1 else blocks[:, :, -1]
    first, after = blocks[:, :, 0], blocks[:, :, 1] if blocks.shape[2] > 1 else blocks[:, :, 0]
    forward = _distances(2 * last - before, first)
    backward = _distances(last, 2 * first - after)
    return (forward + backward) / 2


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.asarray(squares.clip(0) / a.shape[1])


def assemble(blocks: Blocks, rows: int, columns: int) -> NDArray[np.intp]:
    """Arrange blocks on a grid.

    Parameters
    ----------
    blocks
        ``rows * columns`` of them, in any order.
    rows, columns
        Of the grid.

    Returns
    -------
    ndarray
        intp (rows, columns): which block lies where.
    """
    right, below = misfits(blocks)
    start = np.unravel_index(int(np.argmin(right)), right.shape)[0]
    placed: dict[tuple[int, int], int] = {(0, 0): int(start)}
    free = np.ones(len(blocks), bool)
    free[start] = False
    frontier: dict[tuple[int, int], tuple[float, int]] = {}
    low, high = [0, 0], [0, 0]
    size = (rows, columns)

    def inside(place: tuple[int, int]) -> bool:
        return all(max(high[axis], place[axis]) - min(low[axis], place[axis]) < size[axis] for axis in (0, 1))

    def best(place: tuple[int, int]) -> tuple[float, int]:
        r, c = place
        costs = []
        for neighbour, table in (
            ((r, c - 1), right),
            ((r, c + 1), right.T),
            ((r - 1, c), below),
            ((r + 1, c), below.T),
        ):
            if neighbour in placed:
                costs.append(table[placed[neighbour]])
        total = np.where(free, np.mean(costs, axis=0), np.inf)
        block = int(np.argmin(total))
        # A place with several neighbours says more than one with a single one.
        return float(total[block]) / len(costs), block

    def look(place: tuple[int, int]) -> None:
        for step in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            neighbour = (place[0] + step[0], place[1] + step[1])
            if neighbour not in placed and inside(neighbour):
                frontier[neighbour] = best(neighbour)

    look((0, 0))
    while free.any():
        place = min(frontier, key=lambda one: frontier[one][0])
        block = frontier.pop(place)[1]
        placed[place] = block
        free[block] = False
        for axis in (0, 1):
            low[axis], high[axis] = min(low[axis], place[axis]), max(high[axis], place[axis])
        for one in [one for one in frontier if not inside(one)]:
            del frontier[one]
        for one, (_, chosen) in list(frontier.items()):
            if chosen == block and free.any():
                frontier[one] = best(one)
        look(place)
    grid = np.empty(size, np.intp)
    for (r, c), block in placed.items():
        grid[r - low[0], c - low[1]] = block
    return grid


def joined_rightly(truth: Blocks, found: Blocks, grid: NDArray[np.intp]) -> float:
    """Return the share of neighbouring pairs that lie side by side in the original as well.

    Parameters
    ----------
    truth
        The original's blocks, (rows, columns, side, side).
    found
        The blocks that were assembled.
    grid
        Where they lie.
    """
    rows, columns = grid.shape
    keys = [[truth[r, c].tobytes() for c in range(columns)] for r in range(rows)]
    across = {(keys[r][c], keys[r][c + 1]) for r in range(rows) for c in range(columns - 1)}
    down = {(keys[r][c], keys[r + 1][c]) for r in range(rows - 1) for c in range(columns)}
    own = [[found[grid[r, c]].tobytes() for c in range(columns)] for r in range(rows)]
    good = sum((own[r][c], own[r][c + 1]) in across for r in range(rows) for c in range(columns - 1))
    good += sum((own[r][c], own[r + 1][c]) in down for r in range(rows - 1) for c in range(columns))
    return float(good / (rows * (columns - 1) + (rows - 1) * columns))


def run(config: Config, settings: Jigsaw, folder: Path) -> Outcome:
    """Assemble the blocks of one stolen image."""
    side = config.cipher.block_side
    victim = victim_images(settings.images, settings.side, settings.picture + 1)[-1]
    stolen = make_owner(config, folder).release([victim])
    (wire,) = stolen.wires()
    blocks = square_blocks(wire, side)
    count = settings.side // side
    grid = assemble(blocks, count, count)
    random = np.random.default_rng(config.seed).permutation(len(blocks)).reshape(count, count)
    truth = victim.astype(np.float64).reshape(count, side, count, side).transpose(0, 2, 1, 3)
    truth = np.ascontiguousarray(truth)
    found, blind = (_image(blocks, one) for one in (grid, random))
    joined, guessed = (joined_rightly(truth, blocks, one) for one in (grid, random))
    return Outcome(
        configuration={**cipher_configuration(config), "side": settings.side, "pieces": len(blocks)},
        success={"neighbours": joined, "ssim": ssim(victim, found), "psnr_db": psnr(victim, found)},
        baseline={"neighbours": guessed, "ssim": ssim(victim, blind), "psnr_db": psnr(victim, blind)},
        falls=joined >= FITTING,
        criterion=f"at least {FITTING:g} of all neighbouring blocks joined as in the original",
        pictures={
            "jigsaw": [
                Row("original", [victim]),
                Row("stolen", [wire]),
                Row("assembled", [found]),
                Row("blind guess", [blind]),
            ]
        },
        note="A greedy assembler of our own; a better one may join more.",
    )


def _image(blocks: Blocks, grid: NDArray[np.intp]) -> NDArray[np.float64]:
    rows, columns = grid.shape
    side = blocks.shape[1]
    return blocks[grid].transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
