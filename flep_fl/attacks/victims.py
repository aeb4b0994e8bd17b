"""Images to attack, and when an attack on them counts as a success."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flep_fl.attacks.stolen_archive import GreyImage
from flep_fl.config import Config
from flep_fl.contracts.errors import EmptyDatasetError
from flep_fl.data_security.presets import get_preset
from flep_fl.reporting.sample_images import named_images

RECOGNISABLE_SSIM = 0.5
"""From this structural similarity on a person recognises the picture (and see the picture itself)."""

BEYOND_GUESSING = 0.1
"""So much more SSIM than blind guessing an attack must have: two seeds of guessing differ by less."""


def victim_images(folder: str | None, side: int, count: int) -> list[GreyImage]:
    """Return ``count`` grey images of ``side`` pixels: scikit-image's, or those of a folder.

    Raises
    ------
    EmptyDatasetError
        There are fewer.
    """
    found = list(named_images(None if folder is None else Path(folder), side=side).values())
    if len(found) < count:
        raise EmptyDatasetError(
            "The attack needs more images",
            expected=f"{count}",
            found=len(found),
            remedy="Set attack.images to a folder with more of them, or attack.victims to fewer",
        )
    return [np.ascontiguousarray(image) for image in found[:count]]


def recognisable(similar: float, guessed: float) -> tuple[bool, str]:
    """Decide whether images were recovered, and say by which rule."""
    rule = f"SSIM of at least {RECOGNISABLE_SSIM:g}, and at least {BEYOND_GUESSING:g} above blind guessing"
    return similar >= RECOGNISABLE_SSIM and similar - guessed >= BEYOND_GUESSING, rule


def cipher_configuration(config: Config) -> dict[str, Any]:
    """Return what decides an attack on images: cipher, layers, keys per image or per epoch, noise."""
    preset = get_preset(config.cipher.name, allow_targets=config.allow_targets)
    layers = preset.parameters.layers if config.cipher.layers is None else tuple(config.cipher.layers)
    literal = config.cipher.name.startswith("flep_fl.attacks.")
    return {
        "cipher": "paper (literal)" if literal else config.cipher.name,
        "layers": ",".join(layers),
        "keys": "one per epoch" if literal else "one per image",
        "block_side": config.cipher.block_side,
        "alpha": config.cipher.alpha,
        "noise_std": config.noise.std if "noise" in layers else 0.0,
    }
