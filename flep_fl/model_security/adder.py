"""The cloud's side: payloads are added without any key.

This module must never import the key ring or the cipher: it is what an untrusted cloud runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tenseal import sealapi

from flep_fl.contracts.errors import CiphertextError, ModelKeyError
from flep_fl.model_security import plain
from flep_fl.model_security._context import check_parameters, read_context
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.ciphertext_format import CheckedPayload, assemble_vector
from flep_fl.model_security.profiles import Profile


class KeylessAdder:
    """Adds CKKS payloads with a context that holds no key (port ``Adder``).

    The sum is all that it keeps: a payload is read ciphertext by ciphertext and added in place, so that
    memory depends neither on how many payloads there are nor, beyond the sum itself, on their size.

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
        self._context = seal_parameters(profile).context
        self._evaluator: Any = sealapi.Evaluator(self._context)
        self._file = ScratchFile()
        self._profile = profile
        self._length = length
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
        # The whole payload is checked before the first addition, because additions happen in place.
        blobs = CheckedPayload(payload, profile, self._length, allow_seeded=profile.seeded_uploads).check()
        added = 0
        try:
            if not self._sum:
                self._sum = [self._load(blob) for blob in blobs]
            else:
                for total, blob in zip(self._sum, blobs, strict=True):
                    self._evaluator.add_inplace(total, self._load(blob))
                    added += 1
        except (RuntimeError, ValueError) as exc:
            # Nothing that passes the check is known to get here. Should it happen all the same, what was
            # added is taken back, exactly: these are residues modulo a prime.
            for total, blob in zip(self._sum[:added], blobs, strict=False):
                self._evaluator.sub_inplace(total, self._load(blob))
            raise CiphertextError(f"SEAL refuses the ciphertext ({exc})") from exc
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
        return assemble_vector(map(self._saved, self._sum), self._profile, self._length)

    def _load(self, blob: bytes) -> Any:
        self._file.write(blob)
        ciphertext = sealapi.Ciphertext()
        ciphertext.load(self._context, self._file.path)
        return ciphertext

    def _saved(self, ciphertext: Any) -> bytes:
        ciphertext.save(self._file.path)
        return self._file.read()


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
