"""CKKS at the analyst: flat float64 vectors in, payloads for the wire out, and back.

Both directions work ciphertext by ciphertext (4096 values), so that beside the vector and the payload
themselves nothing grows with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import tenseal as ts
from tenseal import sealapi

from flep_fl.contracts.errors import ContributeOnlyError, ModelKeyError, WeightRangeError
from flep_fl.contracts.ports import Float64Vector
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.ciphertext_format import (
    CheckedPayload,
    assemble_vector,
    ciphertext_of,
    single_vector,
)
from flep_fl.model_security.keyring import ModelKey, PublicKey
from flep_fl.model_security.profiles import Profile

_Encrypt = Callable[[Float64Vector], bytes]


class CkksModelCipher:
    """Encrypts and decrypts under the analysts' model key (port ``ModelCipher``).

    Profiles with complex slots go through ``tenseal.sealapi``, which knows SEAL's half-size symmetric
    ciphertexts and complex values; the classic one is plain ``ts.ckks_vector``. Every ciphertext has its own
    randomness. With a profile for public encryption, updates are encrypted under a public key that belongs
    to the model key.

    Raises
    ------
    ModelKeyError
        The key was made for other parameters than the profile's.
    """

    def __init__(self, key: ModelKey, profile: Profile) -> None:
        key.check_profile(profile)
        self._key_id = key.key_id
        self._profile = profile
        if profile.encryption == "public":
            self._encrypt: _Encrypt = _public_encryption(key.public_key(profile), profile)
        elif profile.complex_packing:
            self._encrypt = _symmetric_encryption(key, profile)
        else:
            self._encrypt = _tenseal_encryption(key)
        self._decrypt: _Decrypt = (
            _SealDecryption(key, profile) if profile.packed else _TensealDecryption(key, profile)
        )

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
            The vector is empty, or a value is not finite, or the vector is beyond the profile's headroom.
        """
        return _encrypt(vector, self._encrypt, self._profile)

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Check the structure of ``payload``, then decrypt its ``length`` values (float64).

        Raises
        ------
        CiphertextError
            The payload does not have the structure that the profile prescribes.
        ModelKeyError
            The payload was made under another key: CKKS then decrypts to noise of full size.
        """
        profile = self._profile
        payload_of = CheckedPayload(payload, profile, length, allow_seeded=profile.seeded)
        values = np.empty(length, dtype=np.float64)
        step = profile.values_per_ciphertext
        for index, blob in enumerate(payload_of):
            part = self._decrypt(blob)
            # Under a wrong key the coefficients are uniform over the headroom, and slots ~ sqrt(N) beyond
            # it; in an honest sum the mean magnitude over all slots stays within what `needed` counts.
            if not float(np.abs(part).mean()) <= profile.headroom:  # refuses a NaN, too
                raise ModelKeyError(
                    "The ciphertext was made under another model key",
                    remedy="Provision every site of the federation in one go",
                )
            rest = values[index * step : (index + 1) * step]
            rest[:] = part[: rest.size]
        return values


class PublicModelCipher:
    """Encrypts under the public key; decrypts nothing (port ``ModelCipher``), for contribute-only sites.

    Raises
    ------
    ModelKeyError
        The key was made for other parameters than the profile's.
    """

    def __init__(self, key: PublicKey, profile: Profile) -> None:
        self._key_id = key.key_id
        self._profile = profile
        self._encrypt = _public_encryption(key, profile)

    @property
    def key_id(self) -> str:
        """Identifier of the model key."""
        return self._key_id

    @property
    def profile(self) -> Profile:
        """The profile in use."""
        return self._profile

    def encrypt(self, vector: Float64Vector) -> bytes:
        """Encrypt as :meth:`CkksModelCipher.encrypt` does, in ciphertexts of full size."""
        return _encrypt(vector, self._encrypt, self._profile)

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Refuse: :class:`ContributeOnlyError`."""
        raise ContributeOnlyError(
            "This site contributes only: its kit holds the public key, which opens nothing",
            remedy="Provision the site without ckks.contribute_only, if it may see the global model",
        )


def _encrypt(vector: Float64Vector, encrypt: _Encrypt, profile: Profile) -> bytes:
    values = np.asarray(vector, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise WeightRangeError("Only a non-empty flat vector can be encrypted", found=values.shape)
    return assemble_vector(_blobs(values, encrypt, profile), profile, values.size)


def _blobs(values: Float64Vector, encrypt: _Encrypt, profile: Profile) -> Iterator[bytes]:
    step = profile.values_per_ciphertext
    for start in range(0, values.size, step):
        part = np.ascontiguousarray(values[start : start + step])
        # A coefficient is at most the mean magnitude over all slots, those beyond the vector included; SEAL
        # encodes up to half of what a sum can hold.
        if not float(np.abs(part).sum()) <= profile.headroom / 2 * profile.slots:  # refuses a NaN, too
            raise WeightRangeError(
                "A value is not finite or too large to encrypt",
                expected=f"finite values of at most {profile.headroom / 2:g}",
                remedy="Lower ckks.bound, or set ckks.profile=default",
            )
        yield encrypt(part)


class _Decrypt(Protocol):
    """Decrypts one ciphertext to the values of all its slots."""

    def __call__(self, ciphertext: bytes) -> Float64Vector: ...


def _encoder(profile: Profile) -> Callable[[Float64Vector], Any]:
    """Return what encodes up to one ciphertext's values, as SEAL's plaintext."""
    encoder, scale = sealapi.CKKSEncoder(seal_parameters(profile).context), profile.scale

    def encode(values: Float64Vector) -> Any:
        if profile.complex_packing:
            padded = np.append(values, 0.0) if values.size % 2 else values
            slots = padded.view(np.complex128).tolist()
        else:
            slots = values.tolist()
        plaintext = sealapi.Plaintext()
        encoder.encode(slots, scale, plaintext)
        return plaintext

    return encode


def _symmetric_encryption(key: ModelKey, profile: Profile) -> _Encrypt:
    """Symmetric ciphertexts that carry the seed of their second polynomial."""
    encode, file = _encoder(profile), ScratchFile()
    encryptor = sealapi.Encryptor(seal_parameters(profile).context, key.load_secret(profile))

    def encrypt(values: Float64Vector) -> bytes:
        encryptor.encrypt_symmetric(encode(values)).save(file.path)
        return file.read()

    return encrypt


def _public_encryption(key: PublicKey, profile: Profile) -> _Encrypt:
    encode, file = _encoder(profile), ScratchFile()
    encryptor = sealapi.Encryptor(seal_parameters(profile).context, key.load(profile))

    def encrypt(values: Float64Vector) -> bytes:
        ciphertext = sealapi.Ciphertext()
        encryptor.encrypt(encode(values), ciphertext)
        ciphertext.save(file.path)
        return file.read()

    return encrypt


def _tenseal_encryption(key: ModelKey) -> _Encrypt:
    """Plain ``ts.ckks_vector``, one ciphertext at a time (TenSEAL packs no better across them)."""
    context = _tenseal_context(key)
    return lambda values: ciphertext_of(ts.ckks_vector(context, values.tolist()).serialize())


def _tenseal_context(key: ModelKey) -> Any:
    try:
        return ts.context_from(key.secret_context, n_threads=1)
    except (RuntimeError, ValueError) as exc:
        raise ModelKeyError("The model key is damaged", remedy="Provision the kits again") from exc


class _SealDecryption:
    def __init__(self, key: ModelKey, profile: Profile) -> None:
        self._context = seal_parameters(profile).context
        self._file = ScratchFile()
        self._encoder = sealapi.CKKSEncoder(self._context)
        self._decryptor = sealapi.Decryptor(self._context, key.load_secret(profile))

    def __call__(self, ciphertext: bytes) -> Float64Vector:
        self._file.write(ciphertext)
        loaded, plaintext = sealapi.Ciphertext(), sealapi.Plaintext()
        loaded.load(self._context, self._file.path)
        self._decryptor.decrypt(loaded, plaintext)
        slots = self._encoder.decode_complex(plaintext)
        return np.fromiter(slots, dtype=np.complex128, count=len(slots)).view(np.float64)


class _TensealDecryption:
    def __init__(self, key: ModelKey, profile: Profile) -> None:
        self._context, self._profile = _tenseal_context(key), profile

    def __call__(self, ciphertext: bytes) -> Float64Vector:
        message = single_vector(ciphertext, self._profile.slots, self._profile)
        return np.array(ts.ckks_vector_from(self._context, message).decrypt(), dtype=np.float64)
