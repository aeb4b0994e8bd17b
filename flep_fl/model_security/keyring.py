"""The analysts' keys: the model key (CKKS) and the check key. Never imported by an untrusted cloud."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Final

import tenseal as ts
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from tenseal import sealapi

from flep_fl.contracts.errors import ModelKeyError
from flep_fl.model_security._context import ContextParts, check_parameters, read_context
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.profiles import Profile

_MAGIC: Final = b"FLEPMK1\n"
_PUBLIC_MAGIC: Final = b"FLEPPK1\n"
_KEY_ID_BYTES: Final = 16
_REMEDY = "Copy the key from the kit again, or provision the kits again"


class ModelKey:
    r"""The CKKS secret key that all analysts of a federation share.

    The file format is ``"FLEPMK1\n" || SHA-256 of the rest || TenSEAL's context with the secret key``; the
    hash tells accidental damage before TenSEAL, which crashes on some damaged input, sees a byte.
    """

    def __init__(self, context: bytes) -> None:
        self._context = context
        self._parts = read_context(context)
        if not self._parts.secret_key:
            raise ModelKeyError("A keyless context was given where the model key is needed", remedy=_REMEDY)
        self._key_id = _key_id(self._parts.secret_key)

    @classmethod
    def generate(cls, profile: Profile) -> ModelKey:
        """Make a new key for a profile's parameters (SEAL's generator, seeded by the operating system)."""
        context = ts.context(
            ts.SCHEME_TYPE.CKKS,
            profile.poly_modulus_degree,
            coeff_mod_bit_sizes=list(profile.coeff_mod_bit_sizes),
            encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
            n_threads=1,
        )
        context.global_scale = profile.scale
        return cls(
            context.serialize(
                save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelKey:
        """Read what :meth:`to_bytes` wrote.

        Raises
        ------
        ModelKeyError
            The bytes are not a model key, or damaged.
        """
        head = len(_MAGIC) + 32
        digest, context = data[len(_MAGIC) : head], data[head:]
        if not data.startswith(_MAGIC):
            raise ModelKeyError("This file is not a model key of this release", remedy=_REMEDY)
        if not hmac.compare_digest(digest, hashlib.sha256(context).digest()):
            raise ModelKeyError("The model key is damaged", remedy=_REMEDY)
        return cls(context)

    def to_bytes(self) -> bytes:
        """Serialise the key. Secret: write it with mode 0600 only."""
        return _MAGIC + hashlib.sha256(self._context).digest() + self._context

    @property
    def key_id(self) -> str:
        """Identifier derived from the secret key itself, 32 hexadecimal digits; not secret."""
        return self._key_id

    def public_context(self) -> bytes:
        """Serialise the context without any key (86 bytes): all that the cloud needs for adding."""
        return self._parts.keyless()

    def check_profile(self, profile: Profile) -> None:
        """Raise :class:`ModelKeyError` when the key was made for other parameters."""
        check_parameters(self._parts, profile)

    def derive(self, info: bytes, length: int) -> bytes:
        """Derive ``length`` secret bytes for one purpose, named by ``info`` (HKDF-SHA256, RFC 5869)."""
        return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(self._parts.secret_key)

    def public_key(self, profile: Profile) -> PublicKey:
        """Make a public key that belongs to this key; fresh randomness every time, all of them fit.

        Raises
        ------
        ModelKeyError
            The key is damaged or was made for other parameters.
        """
        context = seal_parameters(profile).context
        public_key = sealapi.PublicKey()
        sealapi.KeyGenerator(context, self.load_secret(profile)).create_public_key(public_key)
        with ScratchFile() as file:
            public_key.save(file.path)
            return PublicKey(self._key_id, file.read())

    def load_secret(self, profile: Profile) -> Any:
        """Load the secret key into SEAL (``sealapi.SecretKey``).

        Raises
        ------
        ModelKeyError
            The key is damaged or was made for other parameters.
        """
        self.check_profile(profile)
        secret_key = sealapi.SecretKey()
        with ScratchFile() as file:
            file.write(self._parts.secret_key)
            try:
                secret_key.load(seal_parameters(profile).context, file.path)
            except (RuntimeError, ValueError) as exc:
                raise ModelKeyError("The model key is damaged", remedy=_REMEDY) from exc
        return secret_key

    @property
    def secret_context(self) -> bytes:
        """TenSEAL's serialised context, secret key included."""
        return self._context

    @property
    def parts(self) -> ContextParts:
        """The context's parts, secret key included."""
        return self._parts

    def __repr__(self) -> str:
        return f"ModelKey(key_id={self._key_id!r}, secret=<redacted>)"

    def __reduce__(self) -> str | tuple[object, ...]:
        # A key that can be pickled ends up in some worker's queue or checkpoint.
        raise TypeError("a ModelKey is not pickled; use to_bytes() and write_secret()")


class PublicKey:
    r"""What a contribute-only site encrypts with: it hides, and opens nothing.

    The file format is ``"FLEPPK1\n" || SHA-256 of the rest || key id (16 bytes) || SEAL's public key``. The
    key id is that of the model key. It cannot be derived from a public key, so that a kit's signed manifest
    is what binds the two.
    """

    def __init__(self, key_id: str, blob: bytes) -> None:
        self._key_id, self._blob = key_id, blob

    @classmethod
    def from_bytes(cls, data: bytes) -> PublicKey:
        """Read what :meth:`to_bytes` wrote.

        Raises
        ------
        ModelKeyError
            The bytes are not a public key, or damaged.
        """
        start = len(_PUBLIC_MAGIC)
        digest, rest = data[start : start + 32], data[start + 32 :]
        if not data.startswith(_PUBLIC_MAGIC) or len(rest) <= _KEY_ID_BYTES:
            raise ModelKeyError("This file is not a public key of this release", remedy=_REMEDY)
        if not hmac.compare_digest(digest, hashlib.sha256(rest).digest()):
            raise ModelKeyError("The public key is damaged", remedy=_REMEDY)
        return cls(rest[:_KEY_ID_BYTES].hex(), rest[_KEY_ID_BYTES:])

    def to_bytes(self) -> bytes:
        """Serialise the key; not secret, but not to be exchanged either: who does reads what is sent."""
        rest = bytes.fromhex(self._key_id) + self._blob
        return _PUBLIC_MAGIC + hashlib.sha256(rest).digest() + rest

    @property
    def key_id(self) -> str:
        """Identifier of the model key that this key belongs to."""
        return self._key_id

    def load(self, profile: Profile) -> Any:
        """Load the key into SEAL (``sealapi.PublicKey``).

        Raises
        ------
        ModelKeyError
            The key was made for other parameters.
        """
        public_key = sealapi.PublicKey()
        with ScratchFile() as file:
            file.write(self._blob)
            try:
                public_key.load(seal_parameters(profile).context, file.path)
            except (RuntimeError, ValueError) as exc:
                raise ModelKeyError(
                    f"The public key was not made for ckks.profile={profile.name}", remedy=_REMEDY
                ) from exc
        return public_key

    def __repr__(self) -> str:
        return f"PublicKey(key_id={self._key_id!r})"


class CheckKey:
    """The 32-byte key of the verifiable sum, shared by the analysts and never known to the cloud."""

    SIZE: Final = 32

    def __init__(self, secret: bytes) -> None:
        if len(secret) != self.SIZE:
            raise ModelKeyError(
                "The check key is damaged", expected=f"{self.SIZE} bytes", found=len(secret), remedy=_REMEDY
            )
        self._secret = secret

    @classmethod
    def generate(cls) -> CheckKey:
        """Draw a new key from the operating system."""
        return cls(secrets.token_bytes(cls.SIZE))

    @classmethod
    def from_bytes(cls, data: bytes) -> CheckKey:
        """Read a key; :class:`ModelKeyError` unless it has exactly 32 bytes."""
        return cls(data)

    def to_bytes(self) -> bytes:
        """Serialise the key. Secret: write it with mode 0600 only."""
        return self._secret

    def derive(self, info: bytes, length: int) -> bytes:
        """Derive ``length`` bytes for one purpose, named by ``info`` (HKDF-SHA256, RFC 5869)."""
        return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(self._secret)

    def __repr__(self) -> str:
        return "CheckKey(<redacted>)"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a CheckKey is not pickled; use to_bytes() and write_secret()")


NO_SECRET: Final = CheckKey(bytes(CheckKey.SIZE))
"""Stands for the check key in an open federation, which has no secrets: everybody knows it."""


def state_key(model_key: ModelKey, check_key: CheckKey) -> CheckKey:
    """Derive the key of states that analysts hand over (``transfer``) or keep.

    A state holds the global model. The check key alone must not open it, because contribute-only sites hold
    that one; the model key alone neither, because a trusted cloud holds that.
    """
    info = b"flep-fl/state-key/v1"
    secret = model_key.derive(info, CheckKey.SIZE) + check_key.derive(info, CheckKey.SIZE)
    return CheckKey(HKDF(algorithm=SHA256(), length=CheckKey.SIZE, salt=None, info=info).derive(secret))


def _key_id(secret_key: bytes) -> str:
    info = b"flep-fl/model-key-id/v1"
    derived = HKDF(algorithm=SHA256(), length=_KEY_ID_BYTES, salt=None, info=info).derive(secret_key)
    return derived.hex()
