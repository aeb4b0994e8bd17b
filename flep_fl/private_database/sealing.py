"""Sealing at rest: a random data key per record, wrapped by a key derived from the owner's.

AES-256-GCM-SIV (RFC 8452) throughout: a repeated nonce would leak no more than equality. What each blob
means and where it belongs is its associated data, so that blobs cannot be moved between records.
"""

from __future__ import annotations

import secrets
import struct

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES = 32
SPLITS = ("train", "test")

_NONCE_BYTES = 12
_TAGS = struct.Struct(">IB")  # label, split
_SHAPE = struct.Struct(">II")  # height, width
_WRAP_LABEL = b"flep private database, key wrapping, version 1"


class Unsealable(Exception):  # noqa: N818  # internal: callers turn it into a named error
    """A blob is truncated, altered, or sealed under another key or for another place."""


def wrapping_key(owner_key: bytes, salt: bytes) -> bytes:
    """Derive the database's key-wrapping key (32 bytes; HKDF-SHA256, RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_WRAP_LABEL).derive(owner_key)


def seal(key: bytes, plain: bytes, *, what: str, place: str) -> bytes:
    """Seal bytes: random 12-byte nonce, ciphertext, 16-byte tag; bound to ``what`` and ``place``."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCMSIV(key).encrypt(nonce, plain, _binding(what, place))


def unseal(key: bytes, sealed: bytes, *, what: str, place: str) -> bytes:
    """Undo :func:`seal`; raise :class:`Unsealable` when anything does not fit."""
    nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        return AESGCMSIV(key).decrypt(nonce, body, _binding(what, place))
    except (InvalidTag, ValueError) as exc:
        raise Unsealable from exc


def pack_tags(label: int, split: str) -> bytes:
    """Label and split in a constant length."""
    return _TAGS.pack(label, SPLITS.index(split))


def unpack_tags(data: bytes) -> tuple[int, str]:
    """Undo :func:`pack_tags`."""
    label, split = _TAGS.unpack(data)
    return label, SPLITS[split]


def pack_image(image: NDArray[np.uint8]) -> bytes:
    """Shape and pixels of a grey image (uint8, (H, W)); uncompressed: a length must not tell the content."""
    return _SHAPE.pack(*image.shape) + image.tobytes()


def unpack_image(data: bytes) -> NDArray[np.uint8]:
    """Undo :func:`pack_image`."""
    shape = _SHAPE.unpack_from(data)
    return np.frombuffer(data, np.uint8, offset=_SHAPE.size).reshape(shape)


def _binding(what: str, place: str) -> bytes:
    return b"\0".join((b"flep-db-1", what.encode(), place.encode()))
