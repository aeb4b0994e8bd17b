"""Weights on disk: one safetensors file (float16, batch normalisation folded) and its JSON model card."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from flep_fl.contracts.errors import DenoiserError
from flep_fl.data_security.denoise.network import DnCNN, fold_batch_norm

_REMEDY = "Install the package again, or train with `python -m scripts.train_denoiser`"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a file of weights is and where it comes from.

    Attributes
    ----------
    noise_family, noise_std
        The noise that it removes; ``noise_std`` in units of the 8-bit scale.
    depth, channels
        Shape of the network.
    data, licence
        Training pictures in words, and what their licences allow.
    pictures, steps, batch, crop, seed
        How it was trained; steps do not count those behind the weights that it started from.
    validation, validation_psnr
        Held-out pictures in words, and the mean PSNR on them in dB (None where there were none).
    sha256
        Checksum of the safetensors file.
    noise_range
        Lowest and highest level of a network that serves a range; None for a single level.
    unshuffle, conditioned
        The variant of the network, see :class:`~flep_fl.data_security.denoise.network.DnCNN`. A range
        without condition is blind: it finds the level itself.
    start_sha256
        Checksum of the weights that the training started from; None for random ones.
    """

    noise_family: str
    noise_std: float
    depth: int
    channels: int
    data: str
    licence: str
    pictures: int
    steps: int
    batch: int
    crop: int
    seed: int
    validation: str | None
    validation_psnr: float | None
    sha256: str
    noise_range: tuple[float, float] | None = None
    unshuffle: int = 1
    conditioned: bool = False
    start_sha256: str | None = None

    def to_json(self) -> bytes:
        """Serialise, readable."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def parse_card(text: bytes) -> ModelCard:
    """Read a model card, or raise ``DenoiserError``."""
    try:
        values = json.loads(text)
        known = {
            field.name: values[field.name]
            for field in fields(ModelCard)
            if field.name in values or field.default is MISSING
        }
        span = known.get("noise_range")
        card = ModelCard(**{**known, "noise_range": None if span is None else (span[0], span[1])})
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise DenoiserError("The model card is damaged", found=repr(exc), remedy=_REMEDY) from exc
    # bool is an int in Python; type() keeps it out.
    numbers = type(card.depth) is int and type(card.channels) is int and type(card.noise_std) in {int, float}
    if (
        not numbers
        or not isinstance(card.sha256, str)
        or not 2 <= card.depth <= 64
        or not 1 <= card.channels <= 1024
        or not 0 < card.noise_std < math.inf
        or card.unshuffle not in (1, 2)
        or type(card.conditioned) is not bool
        or not _is_span(card.noise_range)
    ):
        raise DenoiserError(
            "The model card is damaged", expected="depth, channels, noise_std and sha256", remedy=_REMEDY
        )
    return card


def _is_span(span: tuple[float, float] | None) -> bool:
    if span is None:
        return True
    return all(type(level) in {int, float} for level in span) and 0 <= span[0] < span[1] < math.inf


def serialise(model: DnCNN) -> bytes:
    """Return the weights of ``model`` as safetensors: batch normalisation folded, float16."""
    state = fold_batch_norm(model).state_dict()
    return save({name: value.to(torch.float16).contiguous() for name, value in state.items()})


def checksum(weights: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(weights).hexdigest()


def deserialise(weights: bytes, card: ModelCard) -> DnCNN:
    """Build the network of ``card`` (float32, evaluation mode) from ``weights``.

    Raises
    ------
    DenoiserError
        The checksum is another one, the bytes are not safetensors, or they hold another network.
    """
    found = checksum(weights)
    if found != card.sha256:
        raise DenoiserError(
            "The denoiser's weights are not those of the model card",
            expected=f"SHA-256 {card.sha256}",
            found=found,
            remedy=_REMEDY,
        )
    try:
        state = {name: value.to(torch.float32) for name, value in load(weights).items()}
        model = DnCNN(
            card.depth,
            card.channels,
            batch_norm=False,
            unshuffle=card.unshuffle,
            conditioned=card.conditioned,
        )
        model.load_state_dict(state)
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise ValueError("weights that are not finite")
    except (SafetensorError, RuntimeError, ValueError) as exc:
        raise DenoiserError(
            "The denoiser's weights do not load",
            expected=f"safetensors of a folded DnCNN, depth {card.depth}, {card.channels} maps",
            found=str(exc).splitlines()[0],
            remedy=_REMEDY,
        ) from exc
    return model.eval()
