"""A scheme of a user's own, as a package outside this project would hold it: additive masks modulo 2^64.

After Castelluccia, Mykletun and Tsudik, "Efficient aggregation of encrypted data in wireless sensor networks"
(2005): a value in fixed point plus a mask from a pseudo-random function of the shared key and a nonce. A sum
carries the nonces of its terms.
"""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from flep_fl.contracts.errors import CiphertextError

UNIT = 2.0**32
NONCE = 16


def masks(secret: bytes, nonce: bytes, length: int) -> NDArray[np.uint64]:
    stream = Cipher(ChaCha20(secret, nonce), mode=None).encryptor().update(bytes(8 * length))
    return np.frombuffer(stream, "<u8")


def split(payload: bytes, length: int) -> tuple[list[bytes], NDArray[np.uint64]]:
    values, head = payload[: 8 * length], payload[8 * length :]
    if len(values) != 8 * length or not head or len(head) % NONCE:
        raise CiphertextError("The payload is not a masked vector")
    return [head[i : i + NONCE] for i in range(0, len(head), NONCE)], np.frombuffer(values, "<u8")


class MaskCipher:
    def __init__(self, secret: bytes, key_id: str) -> None:
        self._secret, self.key_id = secret, key_id

    def encrypt(self, vector: NDArray[np.float64]) -> bytes:
        nonce = secrets.token_bytes(NONCE)
        fixed = np.rint(vector * UNIT).astype(np.int64).astype(np.uint64)
        return (fixed + masks(self._secret, nonce, vector.size)).tobytes() + nonce

    def decrypt(self, payload: bytes, length: int) -> NDArray[np.float64]:
        nonces, values = split(payload, length)
        for nonce in nonces:
            values = values - masks(self._secret, nonce, length)
        return values.astype(np.int64) / UNIT


class MaskAdder:
    def __init__(self, length: int) -> None:
        self._length, self._nonces = length, []
        self._sum = np.zeros(length, np.uint64)

    @property
    def count(self) -> int:
        return len(self._nonces)

    def add(self, payload: bytes) -> None:
        nonces, values = split(payload, self._length)
        self._sum, self._nonces = self._sum + values, self._nonces + nonces

    def result(self) -> bytes:
        return self._sum.tobytes() + b"".join(self._nonces)


class Masks:
    def cipher(self, secret: bytes, key_id: str) -> MaskCipher:
        return MaskCipher(secret, key_id)

    def adder(self, length: int) -> MaskAdder:
        return MaskAdder(length)

    def tolerance(self, contributors: int) -> float:
        return 16.0 * contributors / UNIT


class NotOne:
    def cipher(self, secret: bytes, key_id: str) -> None: ...
