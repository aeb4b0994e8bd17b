"""TenSEAL's serialised context, read without TenSEAL: which keys it holds, and for which parameters.

Message ``TenSEALContextProto``: 1 encryption parameters, 2 public part {1 public key, 2 flags, 3 scale,
4 relinearisation keys, 5 Galois keys}, 3 private part {1 secret key}, 4 encryption type.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from flep_fl.contracts.errors import ModelKeyError
from flep_fl.model_security import _protobuf, _seal_blob
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security.profiles import Profile

_PARAMETERS, _PUBLIC, _PRIVATE, _TYPE = 1, 2, 3, 4
_FLAGS, _SCALE = 2, 3
_SECRET_KEY = 1
_SYMMETRIC = 1


@dataclass(frozen=True, slots=True)
class ContextParts:
    """The parts of a symmetric context that matter here.

    Attributes
    ----------
    parameters
        SEAL's serialised encryption parameters.
    public
        The serialised public part, which holds no key.
    scale
        Global scale.
    secret_key
        SEAL's serialised secret key; empty in a keyless context.
    """

    parameters: bytes
    public: bytes
    scale: float
    secret_key: bytes = field(repr=False)

    def keyless(self) -> bytes:
        """Serialise the context without its secret key."""
        return b"".join(
            (
                _protobuf.length_delimited(_PARAMETERS, self.parameters),
                _protobuf.length_delimited(_PUBLIC, self.public),
                _protobuf.key(_TYPE, _protobuf.VARINT),
                _protobuf.varint(_SYMMETRIC),
            )
        )


def read_context(data: bytes) -> ContextParts:
    """Take a serialised context apart.

    Raises
    ------
    ModelKeyError
        It is damaged, not symmetric, or holds keys that this scheme has no use for.
    """
    try:
        top = _unique_fields(data)
        public = top.get(_PUBLIC)
        parameters = top.get(_PARAMETERS)
        private = top.get(_PRIVATE, b"")
        if not (isinstance(public, bytes) and isinstance(parameters, bytes) and isinstance(private, bytes)):
            raise ValueError("a part is missing")
        if set(top) - {_PARAMETERS, _PUBLIC, _PRIVATE, _TYPE} or top.get(_TYPE) != _SYMMETRIC:
            raise ValueError("it is not a symmetric context")
        public_fields = _unique_fields(public)
        scale = public_fields.get(_SCALE)
        if set(public_fields) - {_FLAGS, _SCALE} or not isinstance(scale, bytes):
            raise ValueError("it holds keys that are not needed, or no scale")
        secret_key = _unique_fields(private).get(_SECRET_KEY, b"")
        if not isinstance(secret_key, bytes):
            raise ValueError("its secret key is damaged")
    except ValueError as exc:
        raise ModelKeyError(f"A CKKS context is damaged: {exc}", remedy="Provision the kits again") from None
    return ContextParts(parameters, public, struct.unpack("<d", scale)[0], secret_key)


def check_parameters(parts: ContextParts, profile: Profile) -> None:
    """Refuse a context that was made for other parameters than ``profile``'s.

    Raises
    ------
    ModelKeyError
        Ring degree, primes or scale differ.
    """
    expected = seal_parameters(profile).serialised
    try:
        same = _seal_blob.unwrap(parts.parameters, (len(expected),)) == expected
    except ValueError:
        same = False
    if not same or parts.scale != profile.scale:
        raise ModelKeyError(
            f"The model key or context was not made for ckks.profile={profile.name}",
            remedy="Use the profile that the kits were provisioned with, or provision them again",
        )


def _unique_fields(data: bytes) -> dict[int, int | bytes]:
    found: dict[int, int | bytes] = {}
    for number, _, value in _protobuf.fields(data):
        if number in found:
            raise ValueError(f"field {number} is repeated")
        found[number] = value
    return found
