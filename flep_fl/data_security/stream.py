"""AES-256-CTR key streams as integer arrays: the one source of keyed randomness in the cipher."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES = 32
"""Length of every key in this package."""

_ZERO_COUNTER = bytes(16)


def derive_key(secret: bytes, info: bytes, *, salt: bytes | None = None, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 (RFC 5869) of ``secret``.

    Parameters
    ----------
    secret
        Input key material, uniformly random.
    info
        Label that says what the key is for; different labels give independent keys.
    salt
        Extra public input; the per-image IV for keys of one image.
    length
        Number of bytes wanted.
    """
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


def keystream(key: bytes, count: int) -> NDArray[np.uint8]:
    """Return ``count`` bytes of the AES-256-CTR key stream of ``key``, counter from zero.

    A key is used for *one* stream: every caller derives its key from the per-image IV.
    """
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(_ZERO_COUNTER)).encryptor()
    return np.frombuffer(encryptor.update(bytes(count)), np.uint8)


def keystream16(key: bytes, count: int) -> NDArray[np.uint16]:
    """Return ``count`` little-endian 16-bit words of the key stream."""
    return keystream(key, 2 * count).view("<u2").astype(np.uint16, copy=False)


def keystream32(key: bytes, count: int) -> NDArray[np.uint32]:
    """Return ``count`` little-endian 32-bit words of the key stream."""
    return keystream(key, 4 * count).view("<u4").astype(np.uint32, copy=False)
