"""Ports: what one room may ask of another, without knowing who answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.records import ArchiveManifest, SealedRecord

Float64Vector = NDArray[np.float64]
ImageBatch = NDArray[np.uint8] | NDArray[np.uint16]
"""uint8 or uint16 over the whole range, grey (N, H, W) or with channels (N, C, H, W)."""

Denoise = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(N, H, W) float32 on the 0..255 scale in, the same out."""

Entropy = Callable[[int], bytes]
"""``entropy(n)`` returns n unpredictable bytes; ``secrets.token_bytes`` in every deployment."""


class ImageCipher(Protocol):
    """Tier 1: encrypts images for release and restores them at the analyst."""

    def encrypt(self, images: ImageBatch) -> list[bytes]:
        """Encrypt a batch, one self-describing envelope for each image."""
        ...

    def decrypt(self, envelopes: Sequence[bytes]) -> list[NDArray[np.float32]]:
        """Undo all but irreversible noise: float32 ``(H, W)`` or ``(C, H, W)``, 0..255 scale, not clipped."""
        ...


class RecordSource(Protocol):
    """Where an analyst's sealed records come from: a local archive, fetched or handed over."""

    def manifest(self) -> ArchiveManifest:
        """Describe the archive; checked for integrity."""
        ...

    def records(self, split: str) -> Iterator[SealedRecord]:
        """Yield the sealed records of ``split`` ("train" or "test") in a fixed order."""
        ...


class ModelCipher(Protocol):
    """Tier 2, analyst side: encrypts flat float64 vectors under the analysts' key."""

    @property
    def key_id(self) -> str:
        """Identifier derived from the key itself."""
        ...

    def encrypt(self, vector: Float64Vector) -> bytes:
        """Encrypt a vector; fresh randomness every time."""
        ...

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Decrypt a sum (or one update) of ``length`` values."""
        ...


class SumTerms(Protocol):
    """What a site knows of the sums that it may accept."""

    @property
    def digest(self) -> str:
        """SHA-256 of the scheme and its parameters, 64 hexadecimal digits; every signed header carries it."""
        ...

    def tolerance(self, contributors: int) -> float:
        """Largest deviation of a check value that an honest sum over so many updates may show."""
        ...


class ModelScheme(Protocol):
    """Another scheme for adding encrypted vectors, one class that ``ckks.scheme`` names.

    It is built without arguments. Signatures, check values, the round's protocol and the kits stay as they
    are. The scheme's secret is derived from the model key in the kits, so that whoever holds that key, and
    nobody else, can decrypt.
    """

    def cipher(self, secret: bytes, key_id: str) -> ModelCipher:
        """Return the analysts' side for a 32-byte secret; ``key_id`` is what its property must say."""
        ...

    def adder(self, length: int) -> Adder:
        """Return the cloud's side for sums of ``length`` values; it has no secret."""
        ...

    def tolerance(self, contributors: int) -> float:
        """Largest error of a decrypted sum, as in :class:`SumTerms`."""
        ...


class Adder(Protocol):
    """Tier 2, cloud side: adds payloads without any key."""

    @property
    def count(self) -> int:
        """Number of payloads added so far."""
        ...

    def add(self, payload: bytes) -> None:
        """Check the payload's structure, then add it; a refused payload leaves the sum untouched."""
        ...

    def result(self) -> bytes:
        """Return the serialised sum."""
        ...
