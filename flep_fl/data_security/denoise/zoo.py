"""The denoisers that ship with the package, by name and noise level."""

from __future__ import annotations

import math
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ConfigError, DenoiserError
from flep_fl.contracts.ports import Denoise

if TYPE_CHECKING:
    from flep_fl.data_security.denoise.card import ModelCard

NETWORKS = ("dncnn9", "fast")
"""Names of :func:`load_denoiser` beside ``none``."""

SCALING = (0.4, 2.0)
"""A network serves noise of its own level times these factors: sigma 10 to 50 for the one of sigma 25."""


def identity(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``images`` as they are: the denoiser ``none``, and the one for no noise."""
    return images


def load_denoiser(
    name: str,
    std: float,
    *,
    threads: int | None = None,
    device: str = "auto",
    weights: Traversable | None = None,
) -> Denoise:
    """Return the denoiser ``name`` for white Gaussian noise of standard deviation ``std``.

    A level without a network of its own gets the nearest one, on intensities multiplied so that their noise
    has the network's level (and divided again after it). Measured with the network of sigma 25 on eight Kodak
    images (mean PSNR in dB; tuned: the same network trained on for 350 steps at that level):

    ====== ===== ===== ===== ===== ===== ===== =====
    sigma     10    15    20    25    30    35    50
    scaled 33.36 31.75 30.47 29.44 28.59 27.88 26.27
    tuned  34.01 31.90   --  29.43   --    --  26.33
    ====== ===== ===== ===== ===== ===== ===== =====

    Parameters
    ----------
    name
        ``dncnn9`` (the paper's), ``fast`` (half-size images, told the level), or ``none`` for the identity.
    std
        On the 8-bit scale, as it is *in the restored image*. 0 gives the identity.
    threads
        Threads of PyTorch during a call; None leaves the process's setting alone.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    weights
        Folder of weights and model cards (a ``Path`` will do); those of the package when None.

    Returns
    -------
    Denoise
        ``(N, H, W)`` float32, 0..255 scale, to the same, not clipped.

    Raises
    ------
    ConfigError
        Unknown ``name`` or ``device``, or ``threads`` below 1.
    DenoiserError
        ``std`` is no level, or is out of reach of the networks there are; weights are missing or damaged.
    """
    if name != "none" and name not in NETWORKS:
        raise ConfigError("Unknown denoiser", expected=" or ".join((*NETWORKS, "none")), found=name)
    if not math.isfinite(std) or std < 0:
        raise DenoiserError("This is no noise level", expected="a standard deviation >= 0", found=std)
    if name == "none" or std == 0:
        return identity
    # PyTorch is loaded only by those who denoise.
    from flep_fl.data_security.denoise.card import deserialise
    from flep_fl.data_security.denoise.inference import network_denoiser

    folder = files("flep_fl.data_security.denoise") / "weights" if weights is None else weights
    cards = _cards(name, folder)
    stem, card = min(cards.items(), key=lambda item: abs(math.log(std / _level(item[1], std))))
    gain = _level(card, std) / std
    low, high = _reach(card)
    if not low <= std <= high:
        ranges = sorted(_reach(c) for c in cards.values())
        raise DenoiserError(
            f"No {name} denoiser for this noise level",
            expected="a standard deviation in " + ", ".join(f"{low:g} to {high:g}" for low, high in ranges),
            found=f"{std:g}",
            remedy=f"Train one: python -m scripts.train_denoiser images=FOLDER noise_std={std:g} "
            f"out=WEIGHTS/{name}_gaussian_{std:g}.safetensors, and put both files beside the shipped weights",
        )
    data = _read(folder / f"{stem}.safetensors")
    return network_denoiser(deserialise(data, card), gain=gain, level=std, device=device, threads=threads)


def _level(card: ModelCard, std: float) -> float:
    """Return the level at which the network of ``card`` would serve noise of ``std``."""
    if card.noise_range is None:
        return card.noise_std
    return min(max(std, card.noise_range[0]), card.noise_range[1])


def _reach(card: ModelCard) -> tuple[float, float]:
    """Return the lowest and the highest standard deviation that a network serves."""
    low, high = card.noise_range or (card.noise_std, card.noise_std)
    factors = (1.0, 1.0) if card.noise_range else SCALING
    return low * factors[0], high * factors[1]


def _cards(name: str, folder: Traversable) -> dict[str, ModelCard]:
    """Model cards of the network ``name`` for Gaussian noise, by file stem: one a level, or one a range."""
    from flep_fl.data_security.denoise.card import parse_card

    found = [entry for entry in folder.iterdir() if entry.name.endswith(".json")] if folder.is_dir() else []
    prefix = f"{name}_gaussian"
    cards = {
        entry.name.removesuffix(".json"): parse_card(_read(entry))
        for entry in sorted(found, key=lambda entry: entry.name)
        if entry.name.startswith(prefix)
    }
    if not cards:
        raise DenoiserError(
            f"There are no weights for the denoiser {name}",
            expected=f"{prefix}_LEVEL.safetensors and .json in {folder}",
            remedy="Install the package again, or train with `python -m scripts.train_denoiser`",
        )
    return cards


def _read(entry: Traversable) -> bytes:
    try:
        return entry.read_bytes()
    except OSError as exc:
        raise DenoiserError(
            f"The denoiser's file {entry.name} cannot be read ({exc.strerror})",
            remedy="Install the package again, or train with `python -m scripts.train_denoiser`",
        ) from exc
