"""The envelope of one image: a canonical header and the wire bytes, sealed with AES-256-GCM-SIV (RFC 8452).

Confidentiality and integrity of a released image rest here. The header is associated data: it is readable
without a key and cannot be changed without one. A cipher without the ``envelope`` layer writes the same
header with a SHA-256 checksum instead, which finds accidents, not attacks.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, WrongImageKeyError
from flep_fl.data_security.parameters import BITS

FORMAT_VERSION = 1
NONCE_BYTES = 16
IV_BYTES = 16
MAX_SIDE = 1 << 16
MAX_CHANNELS = (1 << 16) - 1
DTYPE_UINT8 = 1
DTYPE_UINT16 = 2
DTYPES: dict[int, type[np.uint8 | np.uint16]] = {DTYPE_UINT8: np.uint8, DTYPE_UINT16: np.uint16}
"""Codes of the images' dtypes."""

KIND_PLAIN = 0
KIND_SEALED = 1

_MAGIC = b"FLEI"
_FIXED = struct.Struct(">4sBB16sIB4sHII")
_BANDS = 4
_SIV_NONCE_BYTES = 12
TAG_BYTES = 16
HEADER_BYTES = _FIXED.size + NONCE_BYTES + IV_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """What an envelope says of itself in the clear.

    Attributes
    ----------
    kind
        ``KIND_SEALED`` (AES-256-GCM-SIV) or ``KIND_PLAIN`` (checksum only).
    key_id, epoch
        Which key bundle opens it; 32 hex digits and a number.
    bits
        Bits per wire coefficient of LL, LH, HL, HH.
    height, width
        Shape of the image before padding, in pixels.
    nonce
        16 random bytes.
    iv
        16 bytes, the synthetic IV.
    dtype
        Code of the image's dtype.
    channels
        0 for a grey image (H, W), else the C of (C, H, W).
    """

    kind: int
    key_id: str
    epoch: int
    bits: tuple[int, ...]
    height: int
    width: int
    nonce: bytes
    iv: bytes = bytes(IV_BYTES)
    dtype: int = DTYPE_UINT8
    channels: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the image: (H, W) or (C, H, W)."""
        plane = (self.height, self.width)
        return (self.channels, *plane) if self.channels else plane

    def without_iv(self) -> bytes:
        """Return the header up to the nonce: what the synthetic IV authenticates."""
        return (
            _FIXED.pack(
                _MAGIC,
                FORMAT_VERSION,
                self.kind,
                bytes.fromhex(self.key_id),
                self.epoch,
                self.dtype,
                bytes(self.bits),
                self.channels,
                self.height,
                self.width,
            )
            + self.nonce
        )

    def to_bytes(self) -> bytes:
        """Return the canonical header, 73 bytes."""
        return self.without_iv() + self.iv


def parse_header(envelope: bytes) -> Header:
    """Read the header of an envelope, without any key.

    Raises
    ------
    EnvelopeError
        When the envelope is truncated or the header is not one that this release writes.
    EnvelopeVersionError
        When the format version is another one.
    """
    if not isinstance(envelope, bytes | bytearray | memoryview):
        raise EnvelopeError("An envelope has the wrong type", expected="bytes", found=type(envelope).__name__)
    envelope = bytes(envelope[:HEADER_BYTES])
    if envelope[: len(_MAGIC)] != _MAGIC[: len(envelope)] or not envelope:
        raise EnvelopeError("This is not an image envelope", remedy="Check where the record comes from")
    if len(envelope) > len(_MAGIC) and envelope[len(_MAGIC)] != FORMAT_VERSION:
        raise EnvelopeVersionError(
            "The envelope has an unknown format version",
            expected=FORMAT_VERSION,
            found=envelope[len(_MAGIC)],
            remedy="Install the release that wrote it",
        )
    if len(envelope) < HEADER_BYTES:
        raise EnvelopeError(
            "The envelope is truncated",
            expected=f"at least {HEADER_BYTES} bytes",
            found=len(envelope),
            remedy="Ask the data owner for this record again",
        )
    fields = _FIXED.unpack_from(envelope)
    _, _, kind, key_id, epoch, dtype, bits, channels, height, width = fields
    if dtype not in DTYPES or len(bits) != _BANDS or not all(width in BITS for width in bits):
        raise EnvelopeError("The envelope's header describes no image of 8 or 16 bits")
    if kind not in (KIND_PLAIN, KIND_SEALED):
        raise EnvelopeError("The envelope is of an unknown kind", found=kind)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise EnvelopeError("The envelope's header gives an impossible image size")
    nonce, iv = envelope[_FIXED.size : -IV_BYTES], envelope[-IV_BYTES:]
    return Header(kind, key_id.hex(), epoch, tuple(bits), height, width, nonce, iv, dtype, channels)


def seal(header: Header, wire: bytes, key: bytes) -> bytes:
    """Pack ``wire`` behind ``header``: sealed under ``key``, or with a checksum for ``KIND_PLAIN``."""
    head = header.to_bytes()
    if header.kind == KIND_PLAIN:
        return head + wire + _checksum(head, wire)
    return head + AESGCMSIV(key).encrypt(_siv_nonce(header), wire, head)


def unseal(header: Header, envelope: bytes, key: bytes, *, wire_bytes: int) -> bytes:
    """Open an envelope whose header has been parsed and accepted.

    Parameters
    ----------
    header
        The result of :func:`parse_header`.
    envelope
        The whole envelope.
    key
        32 bytes; unused for ``KIND_PLAIN``.
    wire_bytes
        Length of the wire image that the header's shape implies.

    Raises
    ------
    EnvelopeError
        When the envelope is truncated, too long or altered.
    """
    require_length(envelope, wire_bytes)
    head, body = bytes(envelope[:HEADER_BYTES]), bytes(envelope[HEADER_BYTES:])
    altered = EnvelopeError("The envelope was altered", remedy="Ask the data owner for this record again")
    if header.kind == KIND_PLAIN:
        wire, checksum = body[:-TAG_BYTES], body[-TAG_BYTES:]
        if not hmac.compare_digest(_checksum(head, wire), checksum):
            raise altered
        return wire
    try:
        return AESGCMSIV(key).decrypt(_siv_nonce(header), body, head)
    except InvalidTag as exc:
        raise altered from exc


def require_length(envelope: bytes, wire_bytes: int) -> None:
    """Refuse an envelope whose length does not follow from its header, before anything is allocated.

    Raises
    ------
    EnvelopeError
        When it is truncated or too long.
    """
    expected = HEADER_BYTES + wire_bytes + TAG_BYTES
    if len(envelope) != expected:
        raise EnvelopeError(
            "The envelope is truncated or has trailing bytes",
            expected=f"{expected} bytes",
            found=len(envelope),
            remedy="Ask the data owner for this record again",
        )


def require_key(header: Header, key_id: str, epoch: int) -> None:
    """Refuse an envelope of another bundle.

    Raises
    ------
    WrongImageKeyError
        Naming both keys or both epochs.
    """
    if not hmac.compare_digest(header.key_id, key_id):
        raise WrongImageKeyError(
            "The image was sealed under another key bundle",
            expected=f"key {key_id}",
            found=f"key {header.key_id}",
            remedy="Ask the data owner for the bundle that matches the archive",
        )
    if header.epoch != epoch:
        raise WrongImageKeyError(
            "The image was sealed in another key epoch",
            expected=f"epoch {epoch}",
            found=f"epoch {header.epoch}",
            remedy="Ask the data owner for the bundle of that epoch",
        )


def _siv_nonce(header: Header) -> bytes:
    # The IV is a MAC of nonce and image, so it repeats only when the whole image and its nonce do.
    return header.iv[:_SIV_NONCE_BYTES]


def _checksum(head: bytes, wire: bytes) -> bytes:
    return hashlib.sha256(head + wire).digest()[:TAG_BYTES]
