"""The three-layer image cipher: scramble, encode, noise, mask, envelope, and back."""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError, EnvelopeError, ImageFormatError
from flep_fl.contracts.ports import Denoise, Entropy, ImageBatch, ImageCipher
from flep_fl.data_security.encode import PEAK
from flep_fl.data_security.envelope import (
    DTYPE_UINT8,
    DTYPE_UINT16,
    DTYPES,
    IV_BYTES,
    KIND_PLAIN,
    KIND_SEALED,
    MAX_CHANNELS,
    MAX_SIDE,
    NONCE_BYTES,
    Header,
    parse_header,
    require_key,
    require_length,
    seal,
    unseal,
)
from flep_fl.data_security.keys import ImageKeyBundle, owner_noise_commitment, owner_noise_key
from flep_fl.data_security.noise import NOISE_FAMILIES
from flep_fl.data_security.packing import pack, packed_size, unpack, word_type
from flep_fl.data_security.planes import CHUNK_PIXELS, PlaneCoder, Words
from flep_fl.data_security.restoring import ResidualNoise, decrypt_images, denoised

RestoreOrder = Literal["restore_first", "denoise_first"]
RESTORE_ORDERS: tuple[RestoreOrder, ...] = ("restore_first", "denoise_first")

_Image = NDArray[np.uint8] | NDArray[np.uint16]


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


class ThreeLayerCipher:
    """Encrypts grey and colour images of 8 or 16 bits for release and restores them at the analyst.

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
        self._coders: dict[type[np.uint8 | np.uint16], PlaneCoder] = {}

    def _coder(self, dtype: type[np.uint8 | np.uint16]) -> PlaneCoder:
        if dtype not in self._coders:
            self._coders[dtype] = PlaneCoder(self._bundle, dtype)
        return self._coders[dtype]

    @property
    def bundle(self) -> ImageKeyBundle:
        """The key bundle in use."""
        return self._bundle

    @property
    def residual_std(self) -> float:
        """Standard deviation of the noise left in a decrypted image, in grey levels of the 8-bit scale.

        For noise that depends on the signal, its root mean square at mid grey.
        """
        return self._coder(np.uint8).residual_std

    @property
    def residual_noise(self) -> ResidualNoise:
        """The noise left in a decrypted image.

        Noise that depends on the signal keeps its family in image units: there it acts on the pixels
        themselves. Additive noise keeps it with Haar or without a transform; a longer wavelet mixes so many
        coefficients in a pixel that the sum is nearly Gaussian.
        """
        noise, cipher, std = self._bundle.noise, self._bundle.cipher, self.residual_std
        if NOISE_FAMILIES[noise.family].additive:
            kept = not cipher.has("encode") or cipher.wavelet == "haar"
            return ResidualNoise(noise.family if kept else "gaussian", std)
        if std == 0 or cipher.noise_units != "image":
            return ResidualNoise("gaussian", std)
        return ResidualNoise(noise.family, noise.std, noise.gain, noise.amount)

    def __repr__(self) -> str:
        return f"ThreeLayerCipher(key_id={self._bundle.key_id!r}, epoch={self._bundle.epoch})"

    # --- encryption ---------------------------------------------------------------------------------

    def encrypt(self, images: ImageBatch) -> list[bytes]:
        """Encrypt images, one self-describing envelope each.

        Parameters
        ----------
        images
            uint8 or uint16, grey (N, H, W) or with channels (N, C, H, W); any H and W in 1..65536.

        Returns
        -------
        list of bytes
            N envelopes in the same order; all of one length.

        Raises
        ------
        ImageFormatError
            When ``images`` is not such an array.
        CipherParameterError
            When the noise layer needs the owner's noise secret and has none, or when the bits promise a
            lossless wire that wavelet and alpha cannot keep.
        """
        batch = _require_images(images)
        return self._encrypt_with(batch, self._nonces(len(batch)))

    def wire_images(self, images: ImageBatch, *, nonces: Sequence[bytes] | None = None) -> Words:
        """Return the wire images before packing and envelope: what NPCR, UACI and entropy are computed on.

        Parameters
        ----------
        images
            As for :meth:`encrypt`.
        nonces
            N nonces of 16 bytes for reproducible statistics; drawn afresh by default. Never release an
            image under a nonce that was used here.

        Returns
        -------
        ndarray
            (N, H', W') or (N, C, H', W'), one coefficient per entry: uint8 where no band has more than 8
            bits, else uint16 or uint32. The sub-bands are tiled, and each has values below 2 to the power of
            its own bits: where those are not 8, take statistics on :meth:`wire_bytes`.

        Raises
        ------
        ImageFormatError, CipherParameterError
            As :meth:`encrypt`.
        """
        batch = _require_images(images)
        coder = self._coder(batch.dtype.type)
        shape = (*batch.shape[:-2], *_padded(batch.shape[-2:], coder.pad_side))
        wires = np.empty(shape, word_type(coder.bits))
        checked = self._checked_nonces(nonces, len(batch))
        for part in _chunks(len(batch), math.prod(shape[1:])):
            _, words = self._wire(batch[part], checked[part])
            wires[part] = words.reshape(-1, *shape[1:])
        return wires

    def wire_bytes(self, images: ImageBatch, *, nonces: Sequence[bytes] | None = None) -> NDArray[np.uint8]:
        """Return the bytes that go into the envelope: coefficients packed in their own number of bits.

        With the mask on, every byte is uniform over 0..255 (but for the fill of a band's last byte), whatever
        the bits are.

        Parameters
        ----------
        images, nonces
            As for :meth:`wire_images`.

        Returns
        -------
        ndarray
            uint8 (N, B): channel by channel, band by band (LL, LH, HL, HH), row by row.
        """
        batch = _require_images(images)
        coder = self._coder(batch.dtype.type)
        checked = self._checked_nonces(nonces, len(batch))
        size = self._wire_size(coder, batch.shape[1:])
        found = np.empty((len(batch), size), np.uint8)
        for part in _chunks(len(batch), math.prod(batch.shape[1:])):
            _, words = self._wire(batch[part], checked[part])
            for row, data in zip(found[part], _packed(words, coder.bits, len(batch[part])), strict=True):
                row[:] = np.frombuffer(data, np.uint8)
        return found

    def _checked_nonces(self, nonces: Sequence[bytes] | None, count: int) -> Sequence[bytes]:
        if nonces is None:
            return self._nonces(count)
        if len(nonces) != count or any(len(nonce) != NONCE_BYTES for nonce in nonces):
            raise CipherParameterError(
                "The nonces do not fit the images", expected=f"{count} of {NONCE_BYTES} bytes"
            )
        return nonces

    def _encrypt_with(self, images: ImageBatch, nonces: Sequence[bytes]) -> list[bytes]:
        """Encrypt with given nonces (16 bytes each): for golden vectors only."""
        envelopes: list[bytes] = []
        bits = self._coder(images.dtype.type).bits
        for part in _chunks(len(images), math.prod(images.shape[1:])):
            headers, words = self._wire(images[part], nonces[part])
            packed = _packed(words, bits, len(headers))
            del words
            envelopes.extend(
                seal(header, wire, self._envelope_key) for header, wire in zip(headers, packed, strict=True)
            )
        return envelopes

    def _nonces(self, count: int) -> list[bytes]:
        return [self._entropy(NONCE_BYTES) for _ in range(count)]

    def _wire(self, images: ImageBatch, nonces: Sequence[bytes]) -> tuple[list[Header], Words]:
        """Apply every layer but the envelope to one chunk: headers, and the words of all channels."""
        coder = self._coder(images.dtype.type)
        if coder.draws_noise and self._noise_secret is None:
            raise CipherParameterError(
                "noise.recovery=denoise needs the owner's noise secret to encrypt",
                expected="noise_secret of at least 16 random bytes",
                remedy="Pass noise_secret, or use noise.recovery=keyed",
            )
        coder.require_exact()
        headers = [self._header(image, nonce, coder) for image, nonce in zip(images, nonces, strict=True)]
        planes = _pad(images.reshape(-1, *images.shape[-2:]), coder.pad_side)
        salts = _plane_ivs(headers)
        noise_keys: list[bytes] = []
        if coder.draws_noise and self._noise_secret is not None:
            noise_keys = [owner_noise_key(self._noise_secret, salt) for salt in salts]
        keys = [self._bundle.layer_keys(salt) for salt in salts]
        return headers, coder.encode(planes, keys, noise_keys)

    def _header(self, image: _Image, nonce: bytes, coder: PlaneCoder) -> Header:
        """Return the header with its synthetic IV: a MAC of everything that decides the wire image."""
        header = Header(
            kind=KIND_SEALED if self._bundle.cipher.has("envelope") else KIND_PLAIN,
            key_id=self._bundle.key_id,
            epoch=self._bundle.epoch,
            bits=coder.header_bits,
            height=image.shape[-2],
            width=image.shape[-1],
            nonce=nonce,
            dtype=DTYPE_UINT8 if image.dtype == np.uint8 else DTYPE_UINT16,
            channels=image.shape[0] if image.ndim == 3 else 0,
        )
        mac = HMAC(self._mac_key, SHA256())
        mac.update(header.without_iv())
        little = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
        mac.update(little.reshape(-1).view(np.uint8).data)
        if coder.owner_noise:
            mac.update(self._commitment)
        return replace(header, iv=mac.finalize()[:IV_BYTES])

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
            Denoiser for (N, H, W) float32 on the 0..255 scale, called once per batch of equal size; it
            gets every channel of a colour image as an image of its own.
        order
            ``restore_first``: the denoiser sees the restored image. ``denoise_first``: it sees the wire
            image (unmasked, still scrambled), as the paper has it; far worse.

        Returns
        -------
        list of ndarray
            float32 (H, W) or (C, H, W), 0..255 scale for uint16 images too (257 of their levels are one),
            not clipped, in the order of ``envelopes``.

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
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for index, header in enumerate(headers):
            groups.setdefault((header.dtype, header.shape), []).append(index)
        restored: dict[int, NDArray[np.float32]] = {}
        for (_, shape), members in groups.items():
            for part in _chunks(len(members), math.prod(shape)):
                chosen = members[part]
                images = self._restore(
                    [headers[i] for i in chosen], [envelopes[i] for i in chosen], denoise, order
                )
                restored.update(zip(chosen, images, strict=True))
        return [restored[index] for index in range(len(headers))]

    def _accept(self, envelope: bytes) -> Header:
        """Parse a header and refuse what this cipher cannot have written."""
        header = parse_header(envelope)
        require_key(header, self._bundle.key_id, self._bundle.epoch)
        cipher = self._bundle.cipher
        kind = KIND_SEALED if cipher.has("envelope") else KIND_PLAIN
        coder = self._coder(DTYPES[header.dtype])
        if header.bits != coder.header_bits or header.kind != kind:
            raise EnvelopeError(
                "The envelope was altered: its header does not fit the key bundle",
                remedy="Ask the data owner for this record again",
            )
        require_length(envelope, self._wire_size(coder, header.shape))
        return header

    def _restore(
        self,
        headers: Sequence[Header],
        envelopes: Sequence[bytes],
        denoise: Denoise | None,
        order: RestoreOrder,
    ) -> NDArray[np.float32]:
        """Open and decode images of one shape and dtype: float32 of that shape."""
        shape = headers[0].shape
        coder = self._coder(DTYPES[headers[0].dtype])
        padded = _padded(shape[-2:], coder.pad_side)
        size = packed_size(padded, coder.bits)
        wires = np.empty((len(headers) * math.prod(shape[:-2]), *padded), word_type(coder.bits))
        planes = iter(wires)
        for header, envelope in zip(headers, envelopes, strict=True):
            opened = unseal(header, envelope, self._envelope_key, wire_bytes=self._wire_size(coder, shape))
            for offset in range(0, len(opened), size):
                next(planes)[...] = unpack(opened[offset : offset + size], padded, coder.bits)
        del opened
        keys = [self._bundle.layer_keys(salt) for salt in _plane_ivs(headers)]
        decoded = coder.decode(wires, keys, denoise if order == "denoise_first" else None)
        images = np.ascontiguousarray(decoded[:, : shape[-2], : shape[-1]])
        if denoise is not None and order == "restore_first":
            images = denoised(denoise, images)
        return images.reshape(len(headers), *shape)

    @staticmethod
    def _wire_size(coder: PlaneCoder, shape: tuple[int, ...]) -> int:
        """Return the bytes of one image's wire."""
        return math.prod(shape[:-2]) * packed_size(_padded(shape[-2:], coder.pad_side), coder.bits)


def restore(
    cipher: ImageCipher,
    envelopes: Sequence[bytes],
    denoise: Denoise | None = None,
    order: RestoreOrder = "restore_first",
) -> list[_Image]:
    """Decrypt, denoise, clip and round: the analyst's images in their own shape and dtype.

    Raises
    ------
    CipherParameterError, EnvelopeError, DenoiserError
        As :func:`flep_fl.data_security.restoring.decrypt_images`.
    """
    images = decrypt_images(cipher, envelopes, denoise=denoise, order=order)
    return [to_pixels(image, pixel_type(envelope)) for image, envelope in zip(images, envelopes, strict=True)]


def to_pixels(image: NDArray[np.float32], dtype: type[np.uint8 | np.uint16] = np.uint8) -> _Image:
    """Clip and round an image of the 0..255 scale to ``dtype``; 255 is white in either."""
    peak = int(np.iinfo(dtype).max)
    scaled = image if dtype is np.uint8 else image * np.float32(peak // PEAK)
    pixels: NDArray[Any] = np.clip(np.rint(scaled), 0, peak).astype(dtype)
    return pixels


def pixel_type(envelope: bytes) -> type[np.uint8 | np.uint16]:
    """Return the dtype of the image in an envelope; uint8 for envelopes of other ciphers."""
    try:
        return DTYPES[parse_header(envelope).dtype]
    except EnvelopeError:
        return np.uint8


def _require_images(images: ImageBatch) -> ImageBatch:
    """Refuse what is no batch of images; return it in the machine's byte order."""
    known = isinstance(images, np.ndarray) and images.dtype.kind == "u" and images.dtype.itemsize <= 2
    if not known or images.ndim not in (3, 4):
        found = (
            f"{images.dtype} of shape {images.shape}"
            if isinstance(images, np.ndarray)
            else type(images).__name__
        )
        raise ImageFormatError(
            "The images cannot be encrypted",
            expected="a uint8 or uint16 array of shape (N, H, W) or (N, C, H, W)",
            found=found,
            remedy="Convert them to 8 or 16 bits, channels before rows",
        )
    if not all(1 <= side <= MAX_SIDE for side in images.shape[-2:]):
        raise ImageFormatError(
            "The images have an impossible size",
            expected=f"sides of 1..{MAX_SIDE} pixels",
            found=f"{images.shape[-2]} x {images.shape[-1]}",
        )
    if images.ndim == 4 and not 1 <= images.shape[1] <= MAX_CHANNELS:
        raise ImageFormatError(
            "The images have an impossible number of channels",
            expected=f"1..{MAX_CHANNELS}",
            found=images.shape[1],
        )
    batch: NDArray[Any] = images.astype(images.dtype.newbyteorder("="), copy=False)
    return batch


def _padded(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Round (H, W) up to multiples of ``side``."""
    return -(-shape[0] // side) * side, -(-shape[1] // side) * side


def _pad(planes: _Image, side: int) -> _Image:
    """Repeat the last row and column up to a size that every layer can cut evenly."""
    height, width = planes.shape[1:]
    padded_height, padded_width = _padded((height, width), side)
    rows, columns = padded_height - height, padded_width - width
    if not rows and not columns:
        return planes
    padded: NDArray[Any] = np.pad(planes, ((0, 0), (0, rows), (0, columns)), mode="edge")
    return padded


def _plane_ivs(headers: Sequence[Header]) -> list[bytes]:
    """Return what the layer keys of every plane are salted with: the IV, and the channel from 1 on.

    So the channels of a colour image share one envelope and IV but no layer key.
    """
    salts: list[bytes] = []
    for header in headers:
        if header.channels:
            salts.extend(header.iv + struct.pack(">H", channel + 1) for channel in range(header.channels))
        else:
            salts.append(header.iv)
    return salts


def _packed(words: Words, bits: Sequence[int], images: int) -> Iterator[bytes]:
    """Pack the planes of each image, one after another."""
    for planes in words.reshape(images, -1, *words.shape[1:]):
        yield b"".join(pack(plane, bits) for plane in planes)


def _chunks(count: int, pixels: int) -> Iterator[slice]:
    size = max(1, CHUNK_PIXELS // pixels)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
