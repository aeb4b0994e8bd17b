"""Recovering the permutation of sub-blocks from images that the attacker knows or chose.

A cipher that permutes all images of an epoch alike falls to ``ceil(log_L(N))`` chosen images, N the number
of items moved and L the values an item can have (Li et al. 2008, "A general quantitative cryptanalysis of
permutation-only multimedia ciphers"; Jolfaei, Wu, Muthukkumarasamy 2016). Here an item is a sub-block of
four pixels and a blend with a secret image lies on top; the latter is the same for all images, so it cancels
in the difference to one flat image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.attacks.blocks import moved_blocks, original_blocks, put_back
from flep_fl.attacks.pictures import Row
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import ChosenPlaintext, KnownPlaintext
from flep_fl.attacks.similarity import ssim
from flep_fl.attacks.stolen_archive import GreyImage, image_of, make_owner
from flep_fl.attacks.victims import cipher_configuration, recognisable, victim_images
from flep_fl.config import Config
from flep_fl.data_security.metrics import psnr


def chosen_images(shape: tuple[int, int], side: int, levels: int) -> list[GreyImage]:
    """Make a flat black image, and as many as it takes to write every block's number in its own pixels.

    Parameters
    ----------
    shape
        (H, W), multiples of ``side``.
    side
        Side of a sub-block.
    levels
        Grey levels that one pixel is to tell apart, 2..256.

    Returns
    -------
    list of ndarray
        uint8 (H, W); two for 256 x 256 pixels, 2 x 2 blocks and 12 levels.
    """
    count, pixels = shape[0] * shape[1] // side**2, side * side
    digits = digits_needed(count, levels)
    numbers = np.arange(count)
    images = [np.zeros(shape, np.uint8)]
    for first in range(0, digits, pixels):
        blocks = np.zeros((count, pixels))
        for index in range(min(pixels, digits - first)):
            blocks[:, index] = (numbers // levels ** (first + index)) % levels
        grey = put_back(blocks * (255 / (levels - 1)), numbers, shape, side)
        images.append(np.rint(grey).astype(np.uint8))
    return images


def digits_needed(count: int, levels: int) -> int:
    """Return how many digits of base ``levels`` number ``count`` blocks."""
    digits = 1
    while levels**digits < count:
        digits += 1
    return digits


def places_from_digits(
    differences: Sequence[NDArray[np.float64]], side: int, levels: int
) -> NDArray[np.intp]:
    """Read where each moved block came from in the images that :func:`chosen_images` made.

    Parameters
    ----------
    differences
        The chosen images less the flat one, still scrambled, in grey levels, (H, W) each.
    side, levels
        As they were chosen.

    Returns
    -------
    ndarray
        intp (blocks,); -1 where the digits name no block.
    """
    count = differences[0].size // side**2
    needed = digits_needed(count, levels)
    digits = np.concatenate([moved_blocks(one, side) for one in differences], axis=1)[:, :needed]
    values = np.clip(np.rint(digits * (levels - 1) / 255), 0, levels - 1).astype(np.int64)
    places = values @ (levels ** np.arange(needed, dtype=np.int64))
    return np.where(places < count, places, -1).astype(np.intp)


def places_from_known(
    known: NDArray[np.float64], moved: NDArray[np.float64], *, chunk: int = 1024
) -> NDArray[np.intp]:
    """Find for each moved block the known block that it is nearest to.

    Parameters
    ----------
    known, moved
        (blocks, features): differences of the known images in their own order, and of their wires.
    chunk
        Moved blocks compared at once.
    """
    squares = np.square(known).sum(axis=1)
    found = [
        np.argmin(squares - 2 * moved[start : start + chunk] @ known.T, axis=1)
        for start in range(0, len(moved), chunk)
    ]
    return np.concatenate(found).astype(np.intp)


def run_chosen(config: Config, settings: ChosenPlaintext, folder: Path) -> Outcome:
    """Feed chosen images, steal the archive, recover the permutation, read the victims' images."""
    victims = victim_images(settings.images, settings.side, settings.victims)
    shape = (settings.side, settings.side)
    side = config.cipher.block_side
    chosen = chosen_images(shape, side, settings.levels)
    fed = [image for image in (*victims, *chosen) for _ in range(settings.repeats)]
    stolen = make_owner(config, folder).release(fed)
    wires, parameters = stolen.wires(), stolen.parameters
    means = [
        np.mean(wires[start : start + settings.repeats], axis=0)
        for start in range(0, len(wires), settings.repeats)
    ]
    first, flat = len(victims), means[len(victims)]
    marks = [image_of(mean - flat, parameters) for mean in means[first + 1 :]]
    places = places_from_digits(marks, side, settings.levels)
    guess = _blind_guess(places, config.seed)
    read, blind = [], []
    for wire in means[:first]:
        blocks = moved_blocks(image_of(wire - flat, parameters), side)
        read.append(put_back(blocks, places, shape, side).clip(0, 255))
        blind.append(put_back(blocks, guess, shape, side).clip(0, 255))
    return _outcome(
        config,
        victims,
        read,
        blind,
        configuration={
            "side": settings.side,
            "chosen_images": len(chosen),
            "releases_of_each_image": settings.repeats,
        },
        extra={"blocks_told_apart": len(set(places[places >= 0].tolist())) / len(places)},
    )


def run_known(config: Config, settings: KnownPlaintext, folder: Path) -> Outcome:
    """Match blocks of images that the attacker happens to know with what became of them."""
    images = victim_images(settings.images, settings.side, settings.victims + settings.known)
    known, victims = images[: settings.known], images[settings.known :]
    shape, side = (settings.side, settings.side), config.cipher.block_side
    stolen = make_owner(config, folder).release(images)
    wires, parameters = stolen.wires(), stolen.parameters
    reference = known[0].astype(np.float64)
    plain = [original_blocks(image - reference, side) for image in known[1:]]
    moved = [moved_blocks(image_of(wire - wires[0], parameters), side) for wire in wires[1 : settings.known]]
    places = places_from_known(np.concatenate(plain, axis=1), np.concatenate(moved, axis=1))
    guess = _blind_guess(places, config.seed)
    read, blind = [], []
    own = original_blocks(reference, side)
    for wire in wires[settings.known :]:
        blocks = moved_blocks(image_of(wire - wires[0], parameters), side)
        read.append(put_back(blocks + own[places], places, shape, side).clip(0, 255))
        blind.append(put_back(blocks + own[guess], guess, shape, side).clip(0, 255))
    return _outcome(
        config,
        victims,
        read,
        blind,
        configuration={"side": settings.side, "known_images": settings.known},
        extra={},
    )


def _blind_guess(places: NDArray[np.intp], seed: int) -> NDArray[np.intp]:
    """Guess a permutation; as much stays grey as the attack left grey, which scores more than noise."""
    guess = np.random.default_rng(seed).permutation(len(places)).astype(np.intp)
    return np.where(places < 0, -1, guess[places]).astype(np.intp)


def _outcome(
    config: Config,
    victims: Sequence[GreyImage],
    read: Sequence[NDArray[np.float64]],
    blind: Sequence[NDArray[np.float64]],
    *,
    configuration: dict[str, int],
    extra: dict[str, float],
) -> Outcome:
    similar = float(np.mean([ssim(a, b) for a, b in zip(victims, read, strict=True)]))
    guessed = float(np.mean([ssim(a, b) for a, b in zip(victims, blind, strict=True)]))
    falls, criterion = recognisable(similar, guessed)
    return Outcome(
        configuration={**cipher_configuration(config), **configuration},
        success={
            "ssim": similar,
            "psnr_db": _decibels(victims, read),
            **extra,
        },
        baseline={"ssim": guessed, "psnr_db": _decibels(victims, blind)},
        falls=falls,
        criterion=criterion,
        pictures={
            "reconstruction": [
                Row("original", victims),
                Row("read from the stolen archive", read),
                Row("blind guess of the permutation", blind),
            ]
        },
    )


def _decibels(truth: Sequence[GreyImage], guess: Sequence[NDArray[np.float64]]) -> float:
    finite = [value for value in (psnr(a, b) for a, b in zip(truth, guess, strict=True)) if value < math.inf]
    return float(np.mean(finite)) if finite else math.inf
