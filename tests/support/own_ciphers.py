"""Ciphers of a user's own, as a package outside this project would hold them; named in configurations."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from flep_fl.contracts.errors import EnvelopeError
from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle
from flep_fl.data_security.presets import Preset

NONCE_BYTES, SHAPE_BYTES = 12, 8


class ChaChaCipher:
    """ChaCha20-Poly1305 (RFC 8439) alone, in an envelope of its own: nonce, height, width, ciphertext."""

    opened = 0  # by all instances together

    def __init__(
        self,
        bundle: ImageKeyBundle,
        *,
        noise_secret: bytes | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        self._aead = ChaCha20Poly1305(bundle.subkey("own-ciphers/chacha20"))
        self._entropy = entropy

    def encrypt(self, images: NDArray[np.uint8]) -> list[bytes]:
        shape = b"".join(side.to_bytes(4, "big") for side in images.shape[1:])
        envelopes = []
        for image in images:
            nonce = self._entropy(NONCE_BYTES)
            envelopes.append(nonce + shape + self._aead.encrypt(nonce, image.tobytes(), shape))
        return envelopes

    def decrypt(self, envelopes: Sequence[bytes]) -> list[NDArray[np.float32]]:
        return [self._open(envelope) for envelope in envelopes]

    def _open(self, envelope: bytes) -> NDArray[np.float32]:
        nonce, shape = envelope[:NONCE_BYTES], envelope[NONCE_BYTES : NONCE_BYTES + SHAPE_BYTES]
        try:
            pixels = self._aead.decrypt(nonce, envelope[NONCE_BYTES + SHAPE_BYTES :], shape)
        except (InvalidTag, ValueError) as exc:
            raise EnvelopeError("The envelope was altered") from exc
        ChaChaCipher.opened += 1
        height, width = (int.from_bytes(side, "big") for side in (shape[:4], shape[4:]))
        return np.frombuffer(pixels, np.uint8).reshape(height, width).astype(np.float32)


unscrambled = Preset(CipherParameters(layers=("encode", "mask", "envelope")), "A choice of layers, by name.")

not_a_cipher = 7


class NoMethods:
    """Takes the right arguments, and can do nothing."""

    def __init__(self, bundle: ImageKeyBundle, **options: object) -> None:
        self.bundle = bundle


class OtherArguments:
    """Cannot be made from a bundle."""

    def __init__(self, key: bytes, rounds: int) -> None:
        self.key, self.rounds = key, rounds
