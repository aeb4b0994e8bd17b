"""CKKS at the analyst: flat float64 vectors in, TenSEAL's wire format out, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import tenseal as ts
from tenseal import sealapi

from flep_fl.contracts.errors import ModelKeyError, WeightRangeError
from flep_fl.contracts.ports import Float64Vector
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.ciphertext_format import (
    assemble_vector,
    check_ciphertext,
    ciphertext_of,
    single_vector,
)
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import Profile


class CkksModelCipher:
    """Encrypts and decrypts under the analysts' model key (port ``ModelCipher``).

    The seeded profile goes through ``tenseal.sealapi``, which knows SEAL's half-size symmetric ciphertexts
    and complex slots; the classic one is plain ``ts.ckks_vector``. Both are TenSEAL's ``CKKSVectorProto`` on
    the wire, so the cloud adds either with plain TenSEAL. Every ciphertext has its own randomness.

    Raises
    ------
    ModelKeyError
        The key was made for other parameters than the profile's.
    """

    def __init__(self, key: ModelKey, profile: Profile) -> None:
        key.check_profile(profile)
        self._key_id = key.key_id
        self._profile = profile
        self._backend: _SeededComplex | _Classic
        self._backend = _SeededComplex(key, profile) if profile.seeded else _Classic(key, profile)

    @property
    def key_id(self) -> str:
        """Identifier of the model key."""
        return self._key_id

    @property
    def profile(self) -> Profile:
        """The profile in use."""
        return self._profile

    def encrypt(self, vector: Float64Vector) -> bytes:
        """Encrypt a float64 vector of shape ``(length,)`` with fresh randomness.

        Raises
        ------
        WeightRangeError
            The vector is empty, or a value is not finite or beyond the profile's headroom.
        """
        values = np.ascontiguousarray(vector, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise WeightRangeError("Only a non-empty flat vector can be encrypted", found=values.shape)
        if not np.isfinite(values).all() or float(np.abs(values).max()) > self._profile.headroom:
            raise WeightRangeError(
                "A value is not finite or too large to encrypt",
                expected=f"finite values of at most {self._profile.headroom:g}",
            )
        step = self._profile.values_per_ciphertext
        blobs = [self._backend.encrypt(values[start : start + step]) for start in range(0, values.size, step)]
        return assemble_vector(blobs, self._profile, values.size)

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Check the structure of ``payload``, then decrypt its ``length`` values (float64).

        Raises
        ------
        CiphertextError
            The payload does not have the structure that the profile prescribes.
        ModelKeyError
            The payload was made under another key: CKKS then decrypts to noise of full size.
        """
        blobs = check_ciphertext(payload, self._profile, length, allow_seeded=self._profile.seeded)
        slot_counts = self._profile.slot_counts(length)
        parts = [self._backend.decrypt(blob, slots) for blob, slots in zip(blobs, slot_counts, strict=True)]
        values = np.concatenate(parts)
        # Under a wrong key the coefficients are uniform over the headroom, and slots ~ sqrt(N) beyond it.
        # An honest sum stays within it save for a few check values, whose tags may add up to more.
        if not np.isfinite(values).all() or float(np.median(np.abs(values))) > self._profile.headroom:
            raise ModelKeyError(
                "The ciphertext was made under another model key",
                remedy="Provision every site of the federation in one go",
            )
        return values[:length]


class _SeededComplex:
    """Symmetric, seeded ciphertexts with two values a slot."""

    def __init__(self, key: ModelKey, profile: Profile) -> None:
        self._scale = profile.scale
        self._context = seal_parameters(profile).context
        self._file = ScratchFile()
        secret_key = sealapi.SecretKey()
        with ScratchFile() as file:
            file.write(key.parts.secret_key)
            try:
                secret_key.load(self._context, file.path)
            except (RuntimeError, ValueError) as exc:
                raise ModelKeyError("The model key is damaged", remedy="Provision the kits again") from exc
        self._encoder = sealapi.CKKSEncoder(self._context)
        self._encryptor = sealapi.Encryptor(self._context, secret_key)
        self._decryptor = sealapi.Decryptor(self._context, secret_key)

    def encrypt(self, values: Float64Vector) -> bytes:
        padded = np.zeros(values.size + values.size % 2)
        padded[: values.size] = values
        plaintext = sealapi.Plaintext()
        self._encoder.encode(padded.view(np.complex128).tolist(), self._scale, plaintext)
        self._encryptor.encrypt_symmetric(plaintext).save(self._file.path)
        return self._file.read()

    def decrypt(self, ciphertext: bytes, slots: int) -> Float64Vector:
        self._file.write(ciphertext)
        loaded, plaintext = sealapi.Ciphertext(), sealapi.Plaintext()
        loaded.load(self._context, self._file.path)
        self._decryptor.decrypt(loaded, plaintext)
        decoded = np.array(self._encoder.decode_complex(plaintext)[:slots], dtype=np.complex128)
        return decoded.view(np.float64)


class _Classic:
    """Plain ``ts.ckks_vector``, one ciphertext at a time (TenSEAL packs no better across them)."""

    def __init__(self, key: ModelKey, profile: Profile) -> None:
        self._profile = profile
        try:
            self._context: Any = ts.context_from(key.secret_context, n_threads=1)
        except (RuntimeError, ValueError) as exc:
            raise ModelKeyError("The model key is damaged", remedy="Provision the kits again") from exc

    def encrypt(self, values: Float64Vector) -> bytes:
        return ciphertext_of(ts.ckks_vector(self._context, values.tolist()).serialize())

    def decrypt(self, ciphertext: bytes, slots: int) -> Float64Vector:
        vector = ts.ckks_vector_from(self._context, single_vector(ciphertext, slots, self._profile))
        return np.array(vector.decrypt(), dtype=np.float64)
