"""What the data owner chooses: layers, block side, wavelet, alpha, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.noise import NOISE_FAMILIES

LAYERS = ("scramble", "encode", "noise", "mask", "envelope")
"""All layers, in the order in which they are applied."""

NOISE_UNITS = ("image", "wire")
RECOVERIES = ("denoise", "keyed")
MAX_BLOCK_SIDE = 32
ORTHOGONAL_FAMILIES = ("haar", "db", "sym", "coif")
"""Wavelets under which white noise stays white; a biorthogonal one would colour it."""


@dataclass(frozen=True, slots=True)
class CipherParameters:
    """Parameters of the three-layer cipher.

    Attributes
    ----------
    layers
        Subset of :data:`LAYERS`; kept in that order whatever the order given.
    block_side
        Side b of the sub-blocks that are spiral-scanned and reordered, 1..32 pixels.
    wavelet
        PyWavelets name of an orthogonal wavelet (haar, db, sym, coif).
    alpha
        Weight of the image in the blend with the secret image, in (0, 1].
    bits
        Bits per wire coefficient: 8, or 16 (lossless for uint8 images without irreversible noise).
    noise_units
        ``image``: the noise's standard deviation is that of the analyst's image, whatever alpha is.
        ``wire``: it is counted in grey levels of the 8-bit wire image, as the paper does.

    Raises
    ------
    CipherParameterError
        When a field is outside its valid set; the message names the field.
    """

    layers: tuple[str, ...] = LAYERS
    block_side: int = 2
    wavelet: str = "haar"
    alpha: float = 0.5
    bits: int = 8
    noise_units: str = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _ordered_layers(self.layers))
        _require_integer("cipher.block_side", self.block_side, 1, MAX_BLOCK_SIDE)
        _require_wavelet(self.wavelet)
        object.__setattr__(self, "alpha", _require_number("cipher.alpha", self.alpha, "a number in (0, 1]"))
        if not 0 < self.alpha <= 1:
            raise CipherParameterError(
                "cipher.alpha is out of range",
                expected="a number in (0, 1]",
                found=self.alpha,
                remedy="Use 0.5, or 1 to blend nothing in",
            )
        _require_choice("cipher.bits", self.bits, (8, 16))
        _require_choice("cipher.noise_units", self.noise_units, NOISE_UNITS)

    def has(self, layer: str) -> bool:
        """Whether ``layer`` is switched on."""
        return layer in self.layers


@dataclass(frozen=True, slots=True)
class NoiseParameters:
    """Parameters of the noise layer.

    Attributes
    ----------
    family
        Name in :data:`flep_fl.data_security.noise.NOISE_FAMILIES`.
    mean, std
        Grey levels of the 8-bit scale, in the units of ``CipherParameters.noise_units``;
        ``|mean| <= 255``, ``0 <= std <= 255``. The mean is known to the analyst, who subtracts it.
    recovery
        ``denoise``: the noise is drawn from a secret of the owner and nobody can subtract it.
        ``keyed``: it is drawn from the bundle and the analyst subtracts it exactly.

    Raises
    ------
    CipherParameterError
        When a field is outside its valid set; the message names the field.
    """

    family: str = "gaussian"
    mean: float = 0.0
    std: float = 0.0
    recovery: str = "denoise"

    def __post_init__(self) -> None:
        _require_choice("noise.family", self.family, tuple(NOISE_FAMILIES))
        object.__setattr__(self, "mean", _require_number("noise.mean", self.mean, "a number in [-255, 255]"))
        object.__setattr__(self, "std", _require_number("noise.std", self.std, "a number in [0, 255]"))
        if not -255 <= self.mean <= 255:
            raise CipherParameterError(
                "noise.mean is out of range", expected="a number in [-255, 255]", found=self.mean
            )
        if not 0 <= self.std <= 255:
            raise CipherParameterError(
                "noise.std is out of range",
                expected="a number in [0, 255]",
                found=self.std,
                remedy="Use 25 as in the paper, or 0 for no noise",
            )
        _require_choice("noise.recovery", self.recovery, RECOVERIES)


def _ordered_layers(layers: Sequence[str]) -> tuple[str, ...]:
    """Check a choice of layers and put it in the order of application."""
    if isinstance(layers, str):
        raise CipherParameterError(
            "cipher.layers is not a list", expected=f"a list out of {', '.join(LAYERS)}", found=repr(layers)
        )
    chosen = list(layers)
    for layer in chosen:
        _require_choice("cipher.layers", layer, LAYERS)
    if len(set(chosen)) != len(chosen):
        raise CipherParameterError("cipher.layers names a layer twice", found=", ".join(chosen))
    return tuple(layer for layer in LAYERS if layer in chosen)


def _require_choice(field: str, value: object, choices: Sequence[object]) -> None:
    # The type is compared as well: True == 1 and 8.0 == 8 would serialise differently.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise CipherParameterError(
            f"{field} is not a known choice",
            expected=f"one of {', '.join(str(choice) for choice in choices)}",
            found=repr(value),
        )


def _require_integer(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CipherParameterError(
            f"{field} does not fit", expected=f"an integer in {low}..{high}", found=repr(value)
        )


def _require_number(field: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CipherParameterError(f"{field} is not a finite number", expected=expected, found=repr(value))
    return float(value)


def _require_wavelet(name: object) -> None:
    import pywt

    known = isinstance(name, str) and name in pywt.wavelist(kind="discrete")
    if not known or str(name).rstrip("0123456789") not in ORTHOGONAL_FAMILIES:
        raise CipherParameterError(
            "cipher.wavelet is not an orthogonal wavelet that PyWavelets knows",
            expected="haar, dbN, symN or coifN",
            found=repr(name),
            remedy="Use haar",
        )
