"""What the data owner chooses: layers, block side, wavelet, alpha, noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.noise import NOISE_FAMILIES
from flep_fl.data_security.wavelets import is_orthogonal

Number = TypeVar("Number", int, float)

LAYERS = ("scramble", "encode", "noise", "mask", "envelope")
"""All layers, in the order in which they are applied."""

NOISE_UNITS = ("image", "wire")
RECOVERIES = ("denoise", "keyed")
MAX_BLOCK_SIDE = 32
SUB_BANDS = ("LL", "LH", "HL", "HH")
"""Sub-bands in the order in which alpha and bits list them: approximation, horizontal, vertical, diagonal."""

BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32)
"""Bits that a wire coefficient may have."""

LOSSLESS_BITS = 16
"""From so many bits on in every band uint8 images come back bit for bit; uint16 ones from twice as many."""


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
        PyWavelets name of a discrete wavelet. A biorthogonal one warns: noise will not be white.
    alpha
        Weight of the image in the blend with the secret image, in (0, 1]: one number, or four
        (LL, LH, HL, HH).
    bits
        Bits per wire coefficient, out of :data:`BITS`: one number, or four (LL, LH, HL, HH). 16 are
        lossless for uint8 images without irreversible noise, 32 for uint16 images. Without the layers encode
        and noise they play no part: pixels keep the bits that they have.
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
    alpha: float | tuple[float, ...] = 0.5
    bits: int | tuple[int, ...] = 8
    noise_units: str = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _ordered_layers(self.layers))
        _require_integer("cipher.block_side", self.block_side, 1, MAX_BLOCK_SIDE)
        _require_wavelet(self.wavelet)
        object.__setattr__(self, "alpha", _per_band("cipher.alpha", self.alpha, _require_alpha))
        object.__setattr__(self, "bits", _per_band("cipher.bits", self.bits, _require_bits))
        if len(set(self.band_bits)) > 1 and "encode" not in self.layers:
            raise CipherParameterError(
                "cipher.bits names four sub-bands, but the layer that makes them is off",
                expected="one number",
                found=repr(self.bits),
                remedy="Add encode to cipher.layers, or give one number",
            )
        _require_choice("cipher.noise_units", self.noise_units, NOISE_UNITS)

    def has(self, layer: str) -> bool:
        """Whether ``layer`` is switched on."""
        return layer in self.layers

    @property
    def band_alphas(self) -> tuple[float, ...]:
        """Alpha of LL, LH, HL, HH."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(SUB_BANDS)

    @property
    def band_bits(self) -> tuple[int, ...]:
        """Bits of LL, LH, HL, HH."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits,) * len(SUB_BANDS)


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
        ``std`` is that of the noise (gaussian, laplacian, rayleigh), of either part of the complex signal
        (rician) or of the read noise (poisson_gaussian); salt_and_pepper has none.
    recovery
        ``denoise``: the noise is drawn from a secret of the owner and nobody can subtract it.
        ``keyed``: it is drawn from the bundle and the analyst subtracts it exactly; for families that do
        not depend on the signal.
    gain
        poisson_gaussian: grey levels per photon, in 0.01..255.
    amount, salt
        salt_and_pepper: share of the pixels that are hit, and share of those that turn white; in [0, 1].

    Raises
    ------
    CipherParameterError
        When a field is outside its valid set; the message names the field.
    """

    family: str = "gaussian"
    mean: float = 0.0
    std: float = 0.0
    recovery: str = "denoise"
    gain: float = 1.0
    amount: float = 0.05
    salt: float = 0.5

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
        object.__setattr__(self, "gain", _require_number("noise.gain", self.gain, "a number in 0.01..255"))
        if not 0.01 <= self.gain <= 255:
            raise CipherParameterError(
                "noise.gain is out of range",
                expected="a number in 0.01..255",
                found=self.gain,
                remedy="Use 1: one grey level per photon",
            )
        for field in ("amount", "salt"):
            value = _require_number(f"noise.{field}", getattr(self, field), "a number in [0, 1]")
            object.__setattr__(self, field, value)
            if not 0 <= value <= 1:
                raise CipherParameterError(
                    f"noise.{field} is out of range", expected="a number in [0, 1]", found=value
                )
        if self.recovery == "keyed" and not NOISE_FAMILIES[self.family].additive:
            raise CipherParameterError(
                f"noise.recovery=keyed cannot be supported for noise.family={self.family}, because "
                "this noise depends on the pixel and leaves nothing exact to subtract",
                expected="an additive family: "
                + ", ".join(name for name, family in NOISE_FAMILIES.items() if family.additive),
                remedy="Use noise.recovery=denoise, or another family",
            )

    @property
    def deviation(self) -> float:
        """Root mean square of the noise at mid grey, on the 0..255 scale, without ``mean``."""
        return NOISE_FAMILIES[self.family].deviation(self)


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


def _per_band(
    field: str, value: object, check: Callable[[str, object], Number]
) -> Number | tuple[Number, ...]:
    """Check one number or four; four come back as a tuple."""
    if not isinstance(value, list | tuple):
        return check(field, value)
    if len(value) != len(SUB_BANDS):
        raise CipherParameterError(
            f"{field} has the wrong length",
            expected=f"one number, or four for {', '.join(SUB_BANDS)}",
            found=f"{len(value)} entries",
        )
    return tuple(check(field, entry) for entry in value)


def _require_alpha(field: str, value: object) -> float:
    number = _require_number(field, value, "a number in (0, 1]")
    if not 0 < number <= 1:
        raise CipherParameterError(
            f"{field} is out of range",
            expected="a number in (0, 1]",
            found=number,
            remedy="Use 0.5, or 1 to blend nothing in",
        )
    return number


def _require_bits(field: str, value: object) -> int:
    _require_choice(field, value, BITS)
    return int(cast("int", value))


def _require_wavelet(name: object) -> None:
    import pywt

    if not isinstance(name, str) or name not in pywt.wavelist(kind="discrete"):
        raise CipherParameterError(
            "cipher.wavelet is not a discrete wavelet that PyWavelets knows",
            expected="haar, dbN, symN, coifN, dmey, biorN.M or rbioN.M",
            found=repr(name),
            remedy="Use haar",
        )
    if not is_orthogonal(name):
        warnings.warn(
            f"cipher.wavelet={name} is not orthogonal: the noise in restored images will not be white",
            stacklevel=4,
        )
