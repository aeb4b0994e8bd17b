"""The three-layer image cipher: scramble, encode, noise, mask, envelope, and back."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError, DenoiserError, EnvelopeError, ImageFormatError
from flep_fl.contracts.ports import Denoise, Entropy, ImageBatch
from flep_fl.data_security.chaos import chaotic_order
from flep_fl.data_security.encode import (
    blend_planes,
    forward,
    inverse,
    make_quantiser,
    modular_planes,
    split,
    window,
)
from flep_fl.data_security.envelope import (
    IV_BYTES,
    KIND_PLAIN,
    KIND_SEALED,
    MAX_SIDE,
    NONCE_BYTES,
    Header,
    parse_header,
    require_key,
    seal,
    unseal,
)
from flep_fl.data_security.keys import (
    ImageKeyBundle,
    LayerKeys,
    owner_noise_commitment,
    owner_noise_key,
)
from flep_fl.data_security.mask import add_mask, remove_mask
from flep_fl.data_security.noise import draw, integer_table, real_table
from flep_fl.data_security.scramble import scramble, unscramble
from flep_fl.data_security.stream import keystream32

RestoreOrder = Literal["restore_first", "denoise_first"]
WireBatch = NDArray[np.unsignedinteger]
"""(N, H', W') of uint8 or uint16: the padded wire images."""

RESTORE_ORDERS: tuple[RestoreOrder, ...] = ("restore_first", "denoise_first")

GUARD_DEVIATIONS = 3.0
"""Noise saturates beyond this many standard deviations past black and white."""

CHUNK_PIXELS = 1 << 18
"""Images are worked on in batches of about this many pixels, which stay in the processor's cache."""

_DC_GAIN = 2.0
"""A flat image of grey level g has the approximation coefficient 2g in any level-1 orthonormal 2-D DWT."""


class RestoringCipher(Protocol):
    """An image cipher that can denoise while it decrypts."""

    def decrypt(
        self,
        envelopes: Sequence[bytes],
        *,
        denoise: Denoise | None = None,
        order: RestoreOrder = "restore_first",
    ) -> list[NDArray[np.float32]]:
        """Decrypt, and denoise where the order says."""
        ...


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the parameters mean in wire levels; computed once per cipher."""

    modular: bool
    blend_alpha: float
    noise_mean: float
    noise_mean_details: float
    noise_std: float


class ThreeLayerCipher:
    """Encrypts 8-bit grey images for release and restores them at the analyst.

    Parameters
    ----------
    bundle
        The image key bundle; its parameters choose the layers.
    noise_secret
        The owner's secret that noise of recovery ``denoise`` is drawn from, at least 16 bytes, never in a
        bundle. Needed to encrypt with such noise, useless for decryption.
    entropy
        Source of nonces; anything but ``secrets.token_bytes`` is for tests.

    Raises
    ------
    CipherParameterError
        When the noise secret is too short.
    """

    def __init__(
        self,
        bundle: ImageKeyBundle,
        *,
        noise_secret: bytes | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        self._bundle = bundle
        self._entropy = entropy
        self._noise_secret = noise_secret
        self._commitment = b"" if noise_secret is None else owner_noise_commitment(noise_secret)
        self._mac_key, self._envelope_key = bundle.subkey("mac"), bundle.subkey("envelope")
        cipher, noise = bundle.cipher, bundle.noise
        self._encodes, self._scrambles = cipher.has("encode"), cipher.has("scramble")
        noisy = cipher.has("noise") and (noise.std > 0 or noise.mean != 0)
        self._owner_noise = noisy and noise.recovery == "denoise"
        self._keyed_noise = noisy and noise.recovery == "keyed"
        self._pad_side = math.lcm(cipher.block_side if self._scrambles else 1, 2 if self._encodes else 1)
        gain = _DC_GAIN if self._encodes else 1.0
        guarded = self._owner_noise and cipher.has("mask") and cipher.noise_units == "image"
        guard = GUARD_DEVIATIONS * noise.std + gain * abs(noise.mean) if guarded else 0.0
        self._quantiser = make_quantiser(cipher.wavelet if self._encodes else None, cipher.bits, guard=guard)
        self._plan = self._make_plan(gain)
        if self._encodes:
            planes = modular_planes if self._plan.modular else blend_planes
            self._secret_planes = planes(bundle.secret_images, cipher.wavelet, cipher.alpha, self._quantiser)
        if self._owner_noise:
            self._real_table = real_table(noise.family, self._plan.noise_std)
        if self._keyed_noise:
            self._integer_table = integer_table(
                noise.family, self._plan.noise_mean_details, self._plan.noise_std, cipher.bits
            )

    def _make_plan(self, gain: float) -> _Plan:
        cipher, noise = self._bundle.cipher, self._bundle.noise
        modular = cipher.has("mask")
        alpha = cipher.alpha if self._encodes and not modular else 1.0
        if cipher.noise_units == "wire":
            level = float(1 << (cipher.bits - 8))
            return _Plan(modular, alpha, noise.mean * level, noise.mean * level, noise.std * level)
        level = alpha / self._quantiser.step
        # A mean in image units is a change of brightness: it lives in the approximation band alone.
        details = 0.0 if self._encodes else noise.mean * level
        return _Plan(modular, alpha, gain * noise.mean * level, details, noise.std * level)

    @property
    def bundle(self) -> ImageKeyBundle:
        """The key bundle in use."""
        return self._bundle

    @property
    def residual_std(self) -> float:
        """Standard deviation of the noise left in a decrypted image, in grey levels of the 8-bit scale."""
        if not self._owner_noise:
            return 0.0
        return self._plan.noise_std * self._quantiser.step / self._plan.blend_alpha

    def __repr__(self) -> str:
        return f"ThreeLayerCipher(key_id={self._bundle.key_id!r}, epoch={self._bundle.epoch})"

    # --- encryption ---------------------------------------------------------------------------------

    def encrypt(self, images: ImageBatch) -> list[bytes]:
        """Encrypt images, one self-describing envelope each.

        Parameters
        ----------
        images
            uint8 (N, H, W), values 0..255, any H and W in 1..65536.

        Returns
        -------
        list of bytes
            N envelopes in the same order; all of one length.

        Raises
        ------
        ImageFormatError
            When ``images`` is not such an array.
        CipherParameterError
            When the noise layer needs the owner's noise secret and has none.
        """
        _require_images(images)
        return self._encrypt_with(images, self._nonces(len(images)))

    def wire_images(self, images: ImageBatch, *, nonces: Sequence[bytes] | None = None) -> WireBatch:
        """Return the wire images before the envelope: what NPCR, UACI and entropy are computed on.

        Parameters
        ----------
        images
            uint8 (N, H, W).
        nonces
            N nonces of 16 bytes for reproducible statistics; drawn afresh by default. Never release an
            image under a nonce that was used here.

        Returns
        -------
        ndarray
            ``uint{bits}`` (N, H', W'), H and W padded to a multiple of the block side and of 2.
        """
        _require_images(images)
        nonces = self._nonces(len(images)) if nonces is None else nonces
        if len(nonces) != len(images) or any(len(nonce) != NONCE_BYTES for nonce in nonces):
            raise CipherParameterError(
                "The nonces do not fit the images", expected=f"{len(images)} of {NONCE_BYTES} bytes"
            )
        shape = (len(images), *self._padded(images.shape[1], images.shape[2]))
        wires = np.empty(shape, np.uint8 if self._bundle.cipher.bits == 8 else np.uint16)
        for part in _chunks(len(images), shape[1] * shape[2]):
            _, wires[part] = self._wire(images[part], nonces[part])
        return wires

    def _encrypt_with(self, images: ImageBatch, nonces: Sequence[bytes]) -> list[bytes]:
        """Encrypt with given nonces (16 bytes each): for golden vectors only."""
        envelopes: list[bytes] = []
        for part in _chunks(len(images), images.shape[1] * images.shape[2]):
            headers, wires = self._wire(images[part], nonces[part])
            words = wires.astype(wires.dtype.newbyteorder("<"), copy=False)
            envelopes.extend(
                seal(header, wire.tobytes(), self._envelope_key)
                for header, wire in zip(headers, words, strict=True)
            )
        return envelopes

    def _nonces(self, count: int) -> list[bytes]:
        return [self._entropy(NONCE_BYTES) for _ in range(count)]

    def _wire(self, images: ImageBatch, nonces: Sequence[bytes]) -> tuple[list[Header], WireBatch]:
        """Apply every layer but the envelope to one chunk."""
        if self._owner_noise and self._bundle.noise.std > 0 and self._noise_secret is None:
            raise CipherParameterError(
                "noise.recovery=denoise needs the owner's noise secret to encrypt",
                expected="noise_secret of at least 16 random bytes",
                remedy="Pass noise_secret, or use noise.recovery=keyed",
            )
        headers = [self._header(image, nonce) for image, nonce in zip(images, nonces, strict=True)]
        keys = [self._bundle.layer_keys(header.iv) for header in headers]
        plane = self._pad(images)
        shape = plane.shape[1:]
        if self._scrambles:
            plane = scramble(plane, self._orders(keys, shape), self._bundle.cipher.block_side)
        coefficients = (
            forward(plane, self._bundle.cipher.wavelet) if self._encodes else plane.astype(np.float32)
        )
        plan = self._plan
        if plan.blend_alpha != 1.0:
            coefficients *= np.float32(plan.blend_alpha)
        levels = self._quantiser.scale(coefficients)
        if self._encodes and not plan.modular:
            for image, key in enumerate(keys):
                levels[image] += self._secret_term(key, shape)
        if self._owner_noise:
            self._add_owner_noise(levels, headers)
        wires = self._quantiser.round(levels)
        for image, key in enumerate(keys):
            if self._encodes and plan.modular:
                wires[image] += self._secret_term(key, shape)
            if self._keyed_noise:
                wires[image] += draw(self._integer_table, key.noise, shape)
            if plan.modular:
                add_mask(wires[image], key.mask, self._bundle.cipher.bits)
        return headers, wires

    def _header(self, image: NDArray[np.uint8], nonce: bytes) -> Header:
        """Return the header with its synthetic IV: a MAC of everything that decides the wire image."""
        header = Header(
            kind=KIND_SEALED if self._bundle.cipher.has("envelope") else KIND_PLAIN,
            key_id=self._bundle.key_id,
            epoch=self._bundle.epoch,
            bits=self._bundle.cipher.bits,
            height=image.shape[0],
            width=image.shape[1],
            nonce=nonce,
        )
        mac = HMAC(self._mac_key, SHA256())
        mac.update(header.without_iv())
        mac.update(image.tobytes())
        if self._owner_noise:
            mac.update(self._commitment)
        return replace(header, iv=mac.finalize()[:IV_BYTES])

    def _add_owner_noise(self, levels: NDArray[np.float32], headers: Sequence[Header]) -> None:
        if self._noise_secret is not None and self._bundle.noise.std > 0:
            for image, header in enumerate(headers):
                levels[image] += draw(
                    self._real_table, owner_noise_key(self._noise_secret, header.iv), levels.shape[1:]
                )
        self._add_mean(levels, 1.0)

    def _add_mean(self, levels: NDArray[np.float32], sign: float) -> None:
        if self._plan.noise_mean == 0 and self._plan.noise_mean_details == 0:
            return
        approximation, *details = split(levels) if self._encodes else (levels,)
        approximation += np.float32(sign * self._plan.noise_mean)
        for detail in details:
            np.add(detail, np.float32(sign * self._plan.noise_mean_details), out=detail)

    # --- decryption ---------------------------------------------------------------------------------

    def decrypt(
        self,
        envelopes: Sequence[bytes],
        *,
        denoise: Denoise | None = None,
        order: RestoreOrder = "restore_first",
    ) -> list[NDArray[np.float32]]:
        """Undo everything but irreversible noise.

        Parameters
        ----------
        envelopes
            Sealed images; sizes may differ.
        denoise
            Denoiser for (N, H, W) float32 on the 0..255 scale, called once per batch of equal size.
        order
            ``restore_first``: the denoiser sees the restored image. ``denoise_first``: it sees the wire
            image (unmasked, still scrambled), as the paper has it; far worse.

        Returns
        -------
        list of ndarray
            float32 (H, W), 0..255 scale, not clipped, in the order of ``envelopes``.

        Raises
        ------
        EnvelopeError
            When an envelope is truncated or altered (:class:`WrongImageKeyError` when it belongs to
            another bundle or epoch, :class:`EnvelopeVersionError` for another format version); no image
            is returned then.
        DenoiserError
            When the denoiser returns something that is no such batch.
        """
        if order not in RESTORE_ORDERS:
            raise CipherParameterError(
                "restore.order is not a known choice",
                expected=f"one of {', '.join(RESTORE_ORDERS)}",
                found=order,
            )
        headers = [self._accept(envelope) for envelope in envelopes]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, header in enumerate(headers):
            groups.setdefault((header.height, header.width), []).append(index)
        restored: dict[int, NDArray[np.float32]] = {}
        for (height, width), members in groups.items():
            for part in _chunks(len(members), height * width):
                chosen = members[part]
                wires = self._open([headers[i] for i in chosen], [envelopes[i] for i in chosen])
                images = self._restore_wires(wires, [headers[i] for i in chosen], denoise, order)
                restored.update(zip(chosen, images, strict=True))
        return [restored[index] for index in range(len(headers))]

    def _accept(self, envelope: bytes) -> Header:
        """Parse a header and refuse what this cipher cannot have written."""
        header = parse_header(envelope)
        require_key(header, self._bundle.key_id, self._bundle.epoch)
        cipher = self._bundle.cipher
        kind = KIND_SEALED if cipher.has("envelope") else KIND_PLAIN
        if header.bits != cipher.bits or header.kind != kind:
            raise EnvelopeError(
                "The envelope was altered: its header does not fit the key bundle",
                remedy="Ask the data owner for this record again",
            )
        return header

    def _open(self, headers: Sequence[Header], envelopes: Sequence[bytes]) -> WireBatch:
        bits = self._bundle.cipher.bits
        shape = self._padded(headers[0].height, headers[0].width)
        size = shape[0] * shape[1] * (bits // 8)
        wires = np.empty((len(headers), *shape), np.uint8 if bits == 8 else np.uint16)
        for wire, header, envelope in zip(wires, headers, envelopes, strict=True):
            opened = unseal(header, envelope, self._envelope_key, wire_bytes=size)
            wire[...] = np.frombuffer(opened, "<u1" if bits == 8 else "<u2").reshape(shape)
        return wires

    def _restore_wires(
        self,
        wires: WireBatch,
        headers: Sequence[Header],
        denoise: Denoise | None,
        order: RestoreOrder,
    ) -> NDArray[np.float32]:
        """Undo mask, secret, transform and scrambling of one chunk; works in place on ``wires``."""
        cipher = self._bundle.cipher
        keys = [self._bundle.layer_keys(header.iv) for header in headers]
        shape = wires.shape[1:]
        for image, key in enumerate(keys):
            if self._plan.modular:
                remove_mask(wires[image], key.mask, cipher.bits)
            if self._keyed_noise:
                wires[image] -= draw(self._integer_table, key.noise, shape)
        levels = self._remove_secret(wires, keys, denoise if order == "denoise_first" else None)
        coefficients = self._quantiser.unscale(levels)
        if self._plan.blend_alpha != 1.0:
            coefficients /= np.float32(self._plan.blend_alpha)
        plane = inverse(coefficients, cipher.wavelet) if self._encodes else coefficients
        if self._scrambles:
            plane = unscramble(plane, self._orders(keys, shape), cipher.block_side)
        images = np.ascontiguousarray(plane[:, : headers[0].height, : headers[0].width])
        if denoise is not None and order == "restore_first":
            images = _denoised(denoise, images)
        return images

    def _remove_secret(
        self, wires: WireBatch, keys: Sequence[LayerKeys], denoise: Denoise | None
    ) -> NDArray[np.float32]:
        """Return the image's own wire levels (float32), after denoising the wire image if asked to."""
        shape, bits = wires.shape[1:], self._bundle.cipher.bits
        modular = self._plan.modular and self._encodes
        if modular and denoise is None:
            for image, key in enumerate(keys):
                wires[image] -= self._secret_term(key, shape)
        levels = wires.astype(np.float32)
        if denoise is not None:
            scale = np.float32(1 << (bits - 8))
            levels = _denoised(denoise, levels / scale) * scale
            if modular:
                for image, key in enumerate(keys):
                    levels[image] -= self._secret_term(key, shape)
                # The cut lies half a level below zero, so that a black pixel does not turn white.
                half = np.float32(0.5)
                levels = np.mod(levels + half, np.float32(1 << bits)) - half
        if self._owner_noise:
            self._add_mean(levels, -1.0)
        if self._encodes and not self._plan.modular:
            for image, key in enumerate(keys):
                levels[image] -= self._secret_term(key, shape)
        return levels

    # --- shared -------------------------------------------------------------------------------------

    def _secret_term(self, key: LayerKeys, shape: tuple[int, ...]) -> NDArray[np.number]:
        """Return the secret image's term of one image in wire levels: which image, cut where, is keyed."""
        which, row, column = (int(word) for word in keystream32(key.encode, 3))
        planes = self._secret_planes[which % len(self._secret_planes)]
        return window(planes, row, column, (shape[0], shape[1]))

    def _orders(self, keys: Sequence[LayerKeys], shape: tuple[int, ...]) -> NDArray[np.intp]:
        side = self._bundle.cipher.block_side
        return chaotic_order([key.scramble for key in keys], (shape[0] // side) * (shape[1] // side))

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        side = self._pad_side
        return -(-height // side) * side, -(-width // side) * side

    def _pad(self, images: ImageBatch) -> ImageBatch:
        """Repeat the last row and column up to a size that every layer can cut evenly."""
        height, width = images.shape[1:]
        padded_height, padded_width = self._padded(height, width)
        if (padded_height, padded_width) == (height, width):
            return images
        rows, columns = padded_height - height, padded_width - width
        return np.pad(images, ((0, 0), (0, rows), (0, columns)), mode="edge")


def restore(
    cipher: RestoringCipher,
    envelopes: Sequence[bytes],
    denoise: Denoise | None = None,
    order: RestoreOrder = "restore_first",
) -> list[NDArray[np.uint8]]:
    """Decrypt, denoise, clip and round: the analyst's images, uint8 (H, W).

    Raises
    ------
    EnvelopeError, DenoiserError
        As :meth:`ThreeLayerCipher.decrypt`.
    """
    images = cipher.decrypt(envelopes, denoise=denoise, order=order)
    return [np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images]


def _require_images(images: ImageBatch) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 3:
        found = (
            f"{images.dtype} of shape {images.shape}"
            if isinstance(images, np.ndarray)
            else type(images).__name__
        )
        raise ImageFormatError(
            "The images cannot be encrypted",
            expected="a uint8 array of shape (N, H, W)",
            found=found,
            remedy="Convert them to 8-bit grey",
        )
    if not (1 <= images.shape[1] <= MAX_SIDE and 1 <= images.shape[2] <= MAX_SIDE):
        raise ImageFormatError(
            "The images have an impossible size",
            expected=f"sides of 1..{MAX_SIDE} pixels",
            found=f"{images.shape[1]} x {images.shape[2]}",
        )


def _chunks(count: int, pixels: int) -> Iterator[slice]:
    size = max(1, CHUNK_PIXELS // pixels)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _denoised(denoise: Denoise, images: NDArray[np.float32]) -> NDArray[np.float32]:
    result = denoise(images)
    if not isinstance(result, np.ndarray) or result.shape != images.shape or not np.isfinite(result).all():
        raise DenoiserError(
            "The denoiser returned no usable images",
            expected=f"finite float32 of shape {images.shape}",
            found=f"shape {getattr(result, 'shape', None)}",
        )
    return result.astype(np.float32, copy=False)
