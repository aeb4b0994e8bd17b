"""The cloud's side: payloads are added without any key.

This module must never import the key ring or the cipher: it is what an untrusted cloud runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tenseal as ts

from flep_fl.contracts.errors import CiphertextError, ModelKeyError
from flep_fl.model_security import plain
from flep_fl.model_security._context import check_parameters, read_context
from flep_fl.model_security.ciphertext_format import (
    assemble_vector,
    check_ciphertext,
    ciphertext_of,
    single_vector,
)
from flep_fl.model_security.profiles import Profile


class KeylessAdder:
    """Adds CKKS payloads with plain TenSEAL and a context that holds no key (port ``Adder``).

    Parameters
    ----------
    public_context
        The keyless context from the cloud's kit.
    profile, length
        What every payload must hold.

    Raises
    ------
    ModelKeyError
        The context is damaged, holds a secret key, or was made for other parameters.
    """

    def __init__(self, public_context: bytes, profile: Profile, length: int) -> None:
        parts = read_context(public_context)
        if parts.secret_key:
            raise ModelKeyError(
                "The cloud's context holds a secret key",
                remedy="Rotate the keys: provision the kits again, and give the cloud its own kit only",
            )
        check_parameters(parts, profile)
        self._context = ts.context_from(public_context, n_threads=1)
        self._profile = profile
        self._length = length
        # One TenSEAL vector per ciphertext: a longer one prints a warning about features nobody uses here.
        self._sum: list[Any] = []
        self._count = 0

    @property
    def count(self) -> int:
        """Number of payloads added so far."""
        return self._count

    def add(self, payload: bytes) -> None:
        """Check a payload, then add it; a refused one leaves the sum and the count as they were.

        Raises
        ------
        CiphertextError
            The payload does not have the structure that the profile prescribes.
        """
        profile = self._profile
        blobs = check_ciphertext(payload, profile, self._length, allow_seeded=profile.seeded)
        slot_counts = profile.slot_counts(self._length)
        try:
            vectors = [
                ts.ckks_vector_from(self._context, single_vector(blob, slots, profile))
                for blob, slots in zip(blobs, slot_counts, strict=True)
            ]
            # Not in place: were one of the additions refused, the others must not have happened.
            total = [a + b for a, b in zip(self._sum, vectors, strict=True)] if self._sum else vectors
        except (RuntimeError, ValueError) as exc:
            raise CiphertextError(f"TenSEAL refuses the ciphertext ({exc})") from exc
        self._sum = total
        self._count += 1

    def result(self) -> bytes:
        """Serialise the sum.

        Raises
        ------
        CiphertextError
            Nothing has been added.
        """
        if not self._sum:
            raise CiphertextError("There is no sum: no payload was added")
        blobs = [ciphertext_of(vector.serialize()) for vector in self._sum]
        return assemble_vector(blobs, self._profile, self._length)


class PlainAdder:
    """Adds the float32 payloads of an open federation in float64 (port ``Adder``)."""

    def __init__(self, length: int) -> None:
        self._sum = np.zeros(length, dtype=np.float64)
        self._count = 0

    @property
    def count(self) -> int:
        """Number of payloads added so far."""
        return self._count

    def add(self, payload: bytes) -> None:
        """Check a payload, then add it; :class:`CiphertextError` if it does not fit or is not finite."""
        self._sum += plain.read_update(payload, self._sum.size)
        self._count += 1

    def result(self) -> bytes:
        """Serialise the sum; :class:`CiphertextError` if nothing has been added."""
        if self._count == 0:
            raise CiphertextError("There is no sum: no payload was added")
        return plain.write_sum(self._sum)
