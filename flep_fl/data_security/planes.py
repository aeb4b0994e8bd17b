"""The four layers on planes of pixels: everything between a padded image and its wire coefficients.

A plane is a grey image or one channel of a colour image. Planes of one size are worked on together; those
too large for the processor's cache go through transform and quantiser in strips of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.chaos import chaotic_order
from flep_fl.data_security.encode import (
    PEAK,
    blend_planes,
    forward,
    inverse,
    make_quantiser,
    modular_planes,
    window,
)
from flep_fl.data_security.keys import ImageKeyBundle, LayerKeys
from flep_fl.data_security.mask import add_mask, remove_mask
from flep_fl.data_security.noise import (
    NOISE_FAMILIES,
    integer_table,
    noise_words,
    real_table,
)
from flep_fl.data_security.packing import bands_of, word_type
from flep_fl.data_security.parameters import LOSSLESS_BITS, SUB_BANDS
from flep_fl.data_security.restoring import denoised
from flep_fl.data_security.scramble import Scrambled, Unscrambled
from flep_fl.data_security.stream import keystream32
from flep_fl.data_security.wavelets import exact_from_alpha, noise_gain

Words = NDArray[np.unsignedinteger]
"""(N, H, W) of uint8, uint16 or uint32: wire coefficients, sub-bands tiled."""

CHUNK_PIXELS = 1 << 18
"""About this many pixels are worked on at once, which stay in the processor's cache."""

_DC_GAIN = 2.0
"""A flat image of grey level g has the approximation coefficient 2g in any level-1 2-D DWT used here."""

_Real = NDArray[Any]
_Image = NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True, slots=True)
class _Levels:
    """Noise in wire levels, one entry per band."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PlaneCoder:
    """Encodes and decodes planes of one pixel type under one key bundle.

    Parameters
    ----------
    bundle
        The key bundle.
    dtype
        uint8 or uint16.
    """

    def __init__(self, bundle: ImageKeyBundle, dtype: type[np.uint8 | np.uint16] = np.uint8) -> None:
        cipher, noise = bundle.cipher, bundle.noise
        self._cipher, self._noise, self._family = cipher, noise, NOISE_FAMILIES[noise.family]
        self._peak = int(np.iinfo(dtype).max)
        self._unit = self._peak // PEAK
        self._encodes, self._scrambles = cipher.has("encode"), cipher.has("scramble")
        self._modular = cipher.has("mask")
        self._wavelet = cipher.wavelet if self._encodes else None
        noisy = cipher.has("noise") and (noise.deviation > 0 or noise.mean != 0)
        self.owner_noise = noisy and noise.recovery == "denoise"
        self.draws_noise = self.owner_noise and noise.deviation > 0
        self._keyed = noisy and noise.recovery == "keyed"
        self.pad_side = math.lcm(cipher.block_side if self._scrambles else 1, 2 if self._encodes else 1)
        self._alphas = cipher.band_alphas if self._encodes else (1.0,)
        if self._encodes:
            bits = cipher.band_bits
        else:
            # Without transform and noise nothing has to be quantised: pixels travel in bits of their own.
            bits = cipher.band_bits[:1] if noisy else (self._peak.bit_length(),)
        self._quantiser = make_quantiser(
            self._wavelet,
            bits,
            guard=self._guard(),
            peak=self._peak,
            knee=self._unit * (2.0 + (noise.deviation if self.owner_noise else 0.0)),
        )
        self.bits = self._quantiser.bits
        self._refuse_bare_mean()
        self._weights = None if self._modular or set(self._alphas) == {1.0} else self._alphas
        self._levels = self._noise_levels()
        if self._encodes:
            make_planes = modular_planes if self._modular else blend_planes
            self._secret_planes = make_planes(
                bundle.secret_images, cipher.wavelet, self._alphas, self._quantiser, gain=self._unit
            )
        word = word_type(self.bits)
        self._ones = tuple(word((1 << width) - 1) for width in self.bits)
        self._fills_words = all(width == 8 * np.dtype(word).itemsize for width in self.bits)
        self._tables = self._noise_tables()

    @property
    def header_bits(self) -> tuple[int, ...]:
        """Bits of LL, LH, HL and HH as envelopes state them: the same four times without a transform."""
        return self.bits if self._encodes else self.bits * len(SUB_BANDS)

    # --- what the parameters mean in wire levels ----------------------------------------------------

    def _refuse_bare_mean(self) -> None:
        """Refuse a mean without noise where it could saturate, or where the bits promise every pixel back."""
        if not self.owner_noise or self.draws_noise or self._noise.mean == 0:
            return
        if self._guard() == 0 or min(self.bits) >= LOSSLESS_BITS:
            raise CipherParameterError(
                f"noise.mean={self._noise.mean:g} without noise is a mere shift, and would cost pixels here",
                remedy="Set noise.std above 0, noise.recovery=keyed, or noise.mean=0",
            )

    def _guard(self) -> float:
        noise = self._noise
        if not (self.owner_noise and self._modular and self._cipher.noise_units == "image"):
            return 0.0
        gain = _DC_GAIN if self._encodes else 1.0
        return self._unit * (self._family.overshoot(noise) + gain * abs(noise.mean))

    def _noise_levels(self) -> _Levels:
        noise = self._noise
        if self._cipher.noise_units == "wire":
            levels = [2.0 ** (width - 8) for width in self.bits]
            return _Levels(tuple(noise.mean * x for x in levels), tuple(noise.std * x for x in levels))
        weights = self._weights or (1.0,) * len(self.bits)
        levels = [
            self._unit * weight / step for weight, step in zip(weights, self._quantiser.steps, strict=True)
        ]
        # A mean in image units is a change of brightness: it lives in the approximation band alone.
        gain = _DC_GAIN if self._encodes else 1.0
        mean = (gain * noise.mean * levels[0], *(0.0 for _ in levels[1:]))
        spread = noise.std / noise_gain(self._wavelet)
        return _Levels(mean, tuple(spread * level for level in levels))

    def _noise_tables(self) -> list[_Real]:
        """Return one table per band, or one for all where they are alike; none where none is drawn."""
        name = self._noise.family
        if self._keyed:
            # Keyed noise is taken off exactly, so nobody sees its mean: one table for all bands is better.
            means = self._levels.mean
            if self._encodes and self._cipher.noise_units == "image":
                means = (0.0,) * len(self.bits)
            entries = list(zip(means, self._levels.std, self.bits, strict=True))
            word = word_type(self.bits)
            return [integer_table(name, *entry).astype(word) for entry in _merged(entries)]
        if self.draws_noise and self._family.additive:
            return [real_table(name, std).astype(self._quantiser.real) for std in _merged(self._levels.std)]
        return []

    def require_exact(self) -> None:
        """Refuse a lossless number of bits that a wavelet or a small alpha would make lossy.

        Raises
        ------
        CipherParameterError
            Naming the smallest alpha, or the wavelet.
        """
        lossless = LOSSLESS_BITS if self._peak == PEAK else 2 * LOSSLESS_BITS
        if min(self.bits) < lossless or self.owner_noise:
            return
        step = max(self._quantiser.steps)
        limit = exact_from_alpha(self._wavelet, step, self._peak, modular=self._modular)
        if math.isinf(limit):
            raise CipherParameterError(
                f"cipher.wavelet={self._wavelet} does not give back every pixel at {min(self.bits)} bits",
                expected="a wavelet with perfect reconstruction",
                remedy="Use haar, or fewer bits where a small loss is welcome",
            )
        if min(self._alphas) < limit:
            raise CipherParameterError(
                f"cipher.alpha is too small to give back every pixel at {min(self.bits)} bits without a mask",
                expected=f"at least {limit:.4g} with cipher.wavelet={self._wavelet}",
                found=min(self._alphas),
                remedy="Raise cipher.alpha, switch the mask on, or use fewer bits where a loss is welcome",
            )

    @property
    def residual_std(self) -> float:
        """Deviation of the noise left in a decoded plane, in grey levels of the 8-bit scale."""
        if not self.owner_noise:
            return 0.0
        if not self._family.additive and self._cipher.noise_units == "image":
            return self._noise.deviation
        weights = self._weights or (1.0,) * len(self.bits)
        deviations = self._levels.std
        if not self._family.additive:
            deviations = tuple(self._noise.deviation * 2.0 ** (width - 8) for width in self.bits)
        squares = [
            (deviation * step / weight) ** 2
            for deviation, step, weight in zip(deviations, self._quantiser.steps, weights, strict=True)
        ]
        return math.sqrt(sum(squares) / len(squares)) * noise_gain(self._wavelet) / self._unit

    # --- encoding -----------------------------------------------------------------------------------

    def encode(self, planes: _Image, keys: Sequence[LayerKeys], noise_keys: Sequence[bytes]) -> Words:
        """Apply every layer but the envelope.

        Parameters
        ----------
        planes
            (N, H, W) of the coder's dtype; H and W multiples of ``pad_side``.
        keys
            The layer keys of each plane.
        noise_keys
            The key of each plane's noise where it comes from the owner's secret, else empty.

        Returns
        -------
        ndarray
            Wire words (N, H, W), sub-bands tiled.
        """
        height, width = planes.shape[1:]
        wires = np.empty(planes.shape, word_type(self.bits))
        scrambled: Scrambled[Any] | None = None
        if self._scrambles:
            orders = self._orders(keys, (height, width))
            scrambled = Scrambled(planes, orders, self._cipher.block_side)
        words = [self._owner_words(key, (height, width)) for key in noise_keys] if self.draws_noise else []
        for strip in self._strips(planes.shape):
            plane = planes[:, strip] if scrambled is None else scrambled.rows(strip.start, strip.stop)
            levels = self._to_levels(plane, strip, words)
            if self._encodes and not self._modular:
                for image, key in enumerate(keys):
                    levels[image] += self._secret_term(key, strip, width)
            if self.owner_noise:
                self._add_wire_noise(levels, strip, words)
            self._put(wires, strip, self._quantiser.round(levels))
        for wire, key in zip(wires, keys, strict=True):
            self._add_keyed_layers(wire, key)
        return wires

    def _to_levels(self, plane: _Real, strip: slice, words: Sequence[NDArray[np.uint16]]) -> _Real:
        real: Any = self._quantiser.real
        if words and not self._family.additive and self._cipher.noise_units == "image":
            signal = plane.astype(np.float32) / np.float32(self._unit)
            for image, drawn in enumerate(words):
                signal[image] = self._family.apply(signal[image], drawn[:, strip], self._noise)
            plane = signal.astype(real) * real(self._unit)
        if self._wavelet is None:
            return self._quantiser.scale(plane.astype(real), self._weights)
        return self._quantiser.scale(forward(plane, self._wavelet, real), self._weights)

    def _owner_words(self, key: bytes, shape: tuple[int, int]) -> NDArray[np.uint16]:
        return noise_words(key, (self._family.words, *shape))

    def _add_wire_noise(self, levels: _Real, strip: slice, words: Sequence[NDArray[np.uint16]]) -> None:
        """Add what is drawn in wire levels, and the mean."""
        for image, drawn in enumerate(words):
            tiled = self._take(drawn, strip)
            if self._family.additive:
                for table, part, chosen in zip(
                    self._tables,
                    self._merged_bands(levels[image]),
                    self._merged_bands(tiled[0]),
                    strict=True,
                ):
                    np.add(part, np.take(table, chosen, mode="clip"), out=part)
            elif self._cipher.noise_units == "wire":
                self._apply_to_levels(levels[image], tiled)
        self._add_mean(levels, 1.0)

    def _apply_to_levels(self, levels: _Real, words: NDArray[np.uint16]) -> None:
        chosen = [bands_of(layer, self.bits) for layer in words]
        for index, part in enumerate(bands_of(levels, self.bits)):
            grey = 2.0 ** (self.bits[index] - 8)
            stacked = np.stack([layer[index] for layer in chosen])
            part[...] = self._family.apply(part / grey, stacked, self._noise) * grey

    def _merged_bands(self, plane: _Real) -> tuple[_Real, ...]:
        return (plane,) if len(self._tables) == 1 else bands_of(plane, self.bits)

    def _add_mean(self, levels: _Real, sign: float) -> None:
        for mean, part in zip(self._levels.mean, bands_of(levels, self.bits), strict=True):
            if mean:
                np.add(part, part.dtype.type(sign * mean), out=part)

    def _add_keyed_layers(self, wire: Words, key: LayerKeys) -> None:
        """Add secret, keyed noise and mask to one plane in place: integers, modulo 2^bits."""
        if self._encodes and self._modular:
            wire += self._secret_term(key, slice(0, wire.shape[0]), wire.shape[1])
        if self._keyed:
            for part, noise in self._keyed_noise(wire, key):
                np.add(part, noise, out=part)
        if self._modular:
            add_mask(wire, key.mask)
        self._drop_spare_bits(wire)

    def _keyed_noise(self, wire: Words, key: LayerKeys) -> Iterator[tuple[Words, Words]]:
        drawn = noise_words(key.noise, wire.shape)
        for table, part, chosen in zip(
            self._tables, self._merged_bands(wire), self._merged_bands(drawn), strict=True
        ):
            yield part, np.take(table, chosen, mode="clip")

    def _drop_spare_bits(self, wire: Words) -> None:
        if not self._fills_words:
            for part, ones in zip(bands_of(wire, self.bits), self._ones, strict=True):
                np.bitwise_and(part, ones, out=part)

    # --- decoding -----------------------------------------------------------------------------------

    def decode(
        self, wires: Words, keys: Sequence[LayerKeys], denoise: Denoise | None = None
    ) -> NDArray[np.float32]:
        """Undo :meth:`encode` but for irreversible noise; works in place on ``wires``.

        Parameters
        ----------
        wires
            Wire words (N, H, W).
        keys
            The layer keys of each plane.
        denoise
            Called with the unmasked wire image, as the paper has it; None leaves it alone.

        Returns
        -------
        ndarray
            float32 (N, H, W) on the 0..255 scale, not clipped.
        """
        height, width = wires.shape[1:]
        for wire, key in zip(wires, keys, strict=True):
            self._remove_keyed_layers(wire, key, secret=denoise is None)
        source: _Real = wires if denoise is None else self._denoised_wires(wires, keys, denoise)
        planes: NDArray[np.float32]
        target: Unscrambled[np.float32] | None = None
        if self._scrambles:
            orders = self._orders(keys, (height, width))
            target = Unscrambled(wires.shape, np.dtype(np.float32), orders, self._cipher.block_side)
            del orders
        else:
            planes = np.empty(wires.shape, np.float32)
        for strip in self._strips(wires.shape):
            restored = self._from_levels(self._quantiser.expand(self._take(source, strip)), strip, keys)
            if target is None:
                planes[:, strip] = restored
            else:
                target.put(strip.start, restored)
        return planes if target is None else target.images()

    def _from_levels(self, levels: _Real, strip: slice, keys: Sequence[LayerKeys]) -> NDArray[np.float32]:
        if self.owner_noise:
            self._add_mean(levels, -1.0)
        if self._encodes and not self._modular:
            for image, key in enumerate(keys):
                levels[image] -= self._secret_term(key, strip, levels.shape[2])
        coefficients = self._quantiser.unscale(levels, self._weights)
        plane = coefficients if self._wavelet is None else inverse(coefficients, self._wavelet)
        if self._unit != 1:
            plane /= self._unit
        return plane.astype(np.float32, copy=False)

    def _remove_keyed_layers(self, wire: Words, key: LayerKeys, *, secret: bool) -> None:
        if self._modular:
            remove_mask(wire, key.mask)
        if self._keyed:
            for part, noise in self._keyed_noise(wire, key):
                np.subtract(part, noise, out=part)
        if secret and self._encodes and self._modular:
            wire -= self._secret_term(key, slice(0, wire.shape[0]), wire.shape[1])
        self._drop_spare_bits(wire)

    def _denoised_wires(self, wires: Words, keys: Sequence[LayerKeys], denoise: Denoise) -> _Real:
        """Denoise the wire image on the 0..255 scale, then take the secret off where it was modular."""
        levels: _Real = wires.astype(self._quantiser.real)
        for width, part in zip(self.bits, bands_of(levels, self.bits), strict=True):
            np.multiply(part, 2.0 ** (8 - width), out=part)
        levels = denoised(denoise, levels.astype(np.float32)).astype(self._quantiser.real)
        for width, part in zip(self.bits, bands_of(levels, self.bits), strict=True):
            np.multiply(part, 2.0 ** (width - 8), out=part)
        if self._encodes and self._modular:
            whole = slice(0, wires.shape[1])
            for image, key in enumerate(keys):
                levels[image] -= self._secret_term(key, whole, wires.shape[2])
            for width, part in zip(self.bits, bands_of(levels, self.bits), strict=True):
                # The cut lies half a level below zero, so that a black pixel does not turn white.
                part[...] = np.mod(part + 0.5, 2.0**width) - 0.5
        return levels

    # --- shared -------------------------------------------------------------------------------------

    def _strips(self, shape: tuple[int, ...]) -> Iterator[slice]:
        """Cut rows into strips; any transform but Haar's needs all rows at once."""
        count, height, width = shape
        rows = height
        if self._wavelet in (None, "haar") and count * height * width > CHUNK_PIXELS:
            rows = max(1, CHUNK_PIXELS // (count * width * self.pad_side)) * self.pad_side
        for start in range(0, height, rows):
            yield slice(start, min(start + rows, height))

    def _take(self, planes: _Real, strip: slice) -> _Real:
        """Return the wire rows of a strip of image rows: a part of the upper and of the lower bands."""
        height = planes.shape[-2]
        if strip.stop - strip.start == height:
            return planes
        if not self._encodes:
            return planes[..., strip, :]
        top, bottom = self._wire_rows(strip, height)
        return np.concatenate([planes[..., top, :], planes[..., bottom, :]], axis=-2)

    def _put(self, planes: _Real, strip: slice, rows: _Real) -> None:
        """Undo :meth:`_take`."""
        if not self._encodes:
            planes[..., strip, :] = rows
            return
        half = (strip.stop - strip.start) // 2
        top, bottom = self._wire_rows(strip, planes.shape[-2])
        planes[..., top, :], planes[..., bottom, :] = rows[..., :half, :], rows[..., half:, :]

    @staticmethod
    def _wire_rows(strip: slice, height: int) -> tuple[slice, slice]:
        start, stop, half = strip.start // 2, strip.stop // 2, height // 2
        return slice(start, stop), slice(half + start, half + stop)

    def _secret_term(self, key: LayerKeys, strip: slice, width: int) -> _Real:
        """Return the secret image's term of one plane in wire levels: which image, cut where, is keyed."""
        which, row, column = (int(word) for word in keystream32(key.encode, 3))
        planes = self._secret_planes[which % len(self._secret_planes)]
        return window(planes, row + strip.start // 2, column, (strip.stop - strip.start, width))

    def _orders(self, keys: Sequence[LayerKeys], shape: tuple[int, int]) -> NDArray[np.intp]:
        side = self._cipher.block_side
        return chaotic_order([key.scramble for key in keys], (shape[0] // side) * (shape[1] // side))


def _merged(entries: Sequence[Any]) -> Sequence[Any]:
    """Return one entry where all are alike."""
    return entries[:1] if len(set(entries)) == 1 else entries
