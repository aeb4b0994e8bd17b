"""The denoisers that ship with the package, by name and noise level."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ConfigError, DenoiserError
from flep_fl.contracts.ports import Denoise

if TYPE_CHECKING:
    from flep_fl.data_security.denoise.card import ModelCard

NETWORKS = ("dncnn9", "fast", "blind")
"""Names of :func:`load_denoiser` beside ``none``."""

SCALING = (0.4, 2.0)
"""A network serves noise of its own level times these factors: sigma 10 to 50 for the one of sigma 25."""

SWITCHES = "switches.json"
"""Beside the weights: ``{"LOWER|UPPER": level}``, where the network UPPER begins to do better than LOWER."""


def identity(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``images`` as they are: the denoiser ``none``, and the one for no noise."""
    return images


def load_denoiser(
    name: str,
    std: float,
    *,
    family: str = "gaussian",
    threads: int | None = None,
    device: str = "auto",
    weights: Traversable | None = None,
) -> Denoise:
    """Return the network ``name`` for noise of standard deviation ``std``.

    A level without a network of its own gets one of its neighbours', on intensities multiplied so that their
    noise has the network's level (and divided again after it). Which of the two neighbours is a matter of
    measured PSNR: ``switches.json`` beside the weights holds the level from which the upper one does better;
    where it says nothing, that is the geometric mean. Measured with the network of sigma 25 on eight Kodak
    images (mean PSNR in dB; tuned: the same network trained on for 350 steps at that level):

    ====== ===== ===== ===== ===== ===== ===== =====
    sigma     10    15    20    25    30    35    50
    scaled 33.36 31.75 30.47 29.44 28.59 27.88 26.27
    tuned  34.01 31.90   --  29.43   --    --  26.33
    ====== ===== ===== ===== ===== ===== ===== =====

    Parameters
    ----------
    name
        ``dncnn9`` (the paper's), ``fast`` (half-size images, told the level), ``blind`` (half-size images,
        not told it), or ``none`` for the identity.
    std
        On the 8-bit scale, as it is *in the restored image*. 0 gives the identity.
    family
        Of the noise that the network was trained for. What to do with the other families of a key bundle:
        :func:`flep_fl.data_security.denoise.families.denoiser_for`.
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
    stem, card = choose(name, std, _cards(f"{name}_{family}", folder), _switches(folder))
    gain = _level(card, std) / std
    data = _read(folder / f"{stem}.safetensors")
    return network_denoiser(deserialise(data, card), gain=gain, level=std, device=device, threads=threads)


def find_card(name: str, std: float, *, family: str = "gaussian") -> ModelCard:
    """Return the model card of the network that serves ``std``, without loading its weights.

    Raises
    ------
    DenoiserError
        As :func:`load_denoiser`.
    """
    folder = files("flep_fl.data_security.denoise") / "weights"
    return choose(name, std, _cards(f"{name}_{family}", folder), _switches(folder))[1]


def has_network(name: str, family: str) -> bool:
    """Say whether weights of the network ``name`` for noise of ``family`` ship with the package."""
    return (files("flep_fl.data_security.denoise") / "weights" / f"{name}_{family}.json").is_file()


def choose(
    name: str, std: float, cards: Mapping[str, ModelCard], switches: Mapping[str, float]
) -> tuple[str, ModelCard]:
    """Return stem and card of the network that serves ``std`` best.

    Raises
    ------
    DenoiserError
        None serves it; the message names the levels, and the command that trains one.
    """
    stems = sorted(cards, key=lambda stem: _span(cards[stem]))
    best = stems[0]
    for lower, upper in pairwise(stems):
        middle = math.sqrt(_span(cards[lower])[1] * max(_span(cards[upper])[0], 1e-3))
        if std >= switches.get(f"{lower}|{upper}", middle):
            best = upper
    card = cards[best]
    low, high = _reach(card)
    if low <= std <= high:
        return best, card
    train = (
        f"noise_std={std:g} out=WEIGHTS/{name}_gaussian_{std:g}.safetensors"
        if card.noise_range is None
        else f"unshuffle={card.unshuffle} depth={card.depth} noise_family={card.noise_family} "
        f"blind={str(not card.conditioned).lower()} noise_std={std:g} "
        f"noise_range=[{min(std, low):g},{max(std, high):g}] out=WEIGHTS/{best}.safetensors"
    )
    levels = ", ".join("-".join(f"{end:g}" for end in sorted(set(_span(cards[stem])))) for stem in stems)
    raise DenoiserError(
        f"No {name} denoiser for this noise level",
        expected=f"a standard deviation in {_ranges([_reach(c) for c in cards.values()])} "
        f"(there are networks for {levels})",
        found=f"{std:g}",
        remedy=f"Train one: python -m scripts.train_denoiser images=FOLDER {train}, "
        "and put both files beside the shipped weights",
    )


def _ranges(spans: Sequence[tuple[float, float]]) -> str:
    """Join what overlaps: ``10 to 120`` for 10 to 50 and 24 to 120."""
    joined: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return ", ".join(f"{low:g} to {high:g}" for low, high in joined)


def _span(card: ModelCard) -> tuple[float, float]:
    """Return the levels for which a network was trained."""
    return card.noise_range or (card.noise_std, card.noise_std)


def _level(card: ModelCard, std: float) -> float:
    """Return the level at which the network of ``card`` would serve noise of ``std``."""
    low, high = _span(card)
    return min(max(std, low), high)


def _reach(card: ModelCard) -> tuple[float, float]:
    """Return the lowest and the highest standard deviation that a network serves."""
    low, high = _span(card)
    factors = (1.0, 1.0) if card.noise_range else SCALING
    return low * factors[0], high * factors[1]


def _switches(folder: Traversable) -> dict[str, float]:
    entry = folder / SWITCHES
    if not entry.is_file():
        return {}
    try:
        found = {str(pair): float(level) for pair, level in json.loads(_read(entry)).items()}
    except (ValueError, TypeError, AttributeError) as exc:
        raise DenoiserError(
            f"The denoisers' {SWITCHES} is damaged", found=repr(exc), remedy="Install the package again"
        ) from exc
    return found


def _cards(prefix: str, folder: Traversable) -> dict[str, ModelCard]:
    """Model cards of a network and family, by file stem: one a level, or one a range."""
    from flep_fl.data_security.denoise.card import parse_card

    found = [entry for entry in folder.iterdir() if entry.name.endswith(".json")] if folder.is_dir() else []
    stems = {entry.name.removesuffix(".json"): entry for entry in found}
    cards = {
        stem: parse_card(_read(entry))
        for stem, entry in sorted(stems.items())
        if stem == prefix or stem.startswith(f"{prefix}_")
    }
    if not cards:
        raise DenoiserError(
            f"There are no weights for the denoiser {prefix}",
            expected=f"{prefix}.safetensors or {prefix}_LEVEL.safetensors, and .json, in {folder}",
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
