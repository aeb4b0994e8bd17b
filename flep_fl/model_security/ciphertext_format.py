"""The structural check: nothing reaches TenSEAL that is not exactly what the profile prescribes.

TenSEAL loads bit-flipped and short messages without complaint, reads out of bounds when the declared
sizes lie, and crashes on empty ones. So every byte with a meaning is compared here, and what TenSEAL gets is
a new message made of the checked values: no compressed or redundant part of the sender's reaches it.

A ciphertext's body (SEAL 4, ``native/src/seal/ciphertext.cpp``): parms_id 32 bytes, u8 NTT form,
u64 polynomials, u64 N, u64 moduli, f64 scale, u64 correction factor, then the coefficients as a DynArray
(envelope, u64 count, u64 values); a seeded one has half of them and then the generator (envelope, u8 type,
64-byte seed).
"""

from __future__ import annotations

import struct

import numpy as np

from flep_fl.contracts.errors import CiphertextError
from flep_fl.model_security import _protobuf, _seal_blob
from flep_fl.model_security._parameters import SealParameters, seal_parameters
from flep_fl.model_security.profiles import Profile

_SIZES, _CIPHERTEXTS, _SCALE = 1, 2, 3  # fields of TenSEAL's CKKSVectorProto

_PREFIX = struct.Struct("<32sBQQQdQ")
_COUNT = struct.Struct("<Q")
_ARRAY = _seal_blob.HEADER.size + _COUNT.size  # what precedes the values of a DynArray
_DATA = _PREFIX.size + _ARRAY
_SEED_BYTES = 64
_GENERATOR = _seal_blob.HEADER.size + 1 + _SEED_BYTES
_BLAKE2XB, _SHAKE256 = 1, 2


def check_ciphertext(payload: bytes, profile: Profile, length: int, *, allow_seeded: bool) -> list[bytes]:
    """Check a serialised CKKS vector and return its ciphertexts, each rebuilt from the checked values.

    Parameters
    ----------
    payload
        TenSEAL's ``CKKSVectorProto`` as it came over the wire.
    profile, length
        What it must hold: ``length`` real values, packed as the profile says.
    allow_seeded
        Whether the half-size form of a fresh upload is acceptable (a sum never has it).

    Returns
    -------
    list of bytes
        One uncompressed SEAL ciphertext each, in order.

    Raises
    ------
    CiphertextError
        Anything differs from what the profile prescribes.
    """
    expected = profile.slot_counts(length)
    try:
        blobs = _read_vector(payload, profile, expected)
        parameters = seal_parameters(profile)
        return [_rebuild(blob, profile, parameters, allow_seeded) for blob in blobs]
    except ValueError as exc:
        raise CiphertextError(
            f"The ciphertext is not one of profile {profile.name!r} with {length} values: {exc}",
            remedy="Use the same ckks.profile, model and release at every site",
        ) from None


def assemble_vector(ciphertexts: list[bytes], profile: Profile, length: int) -> bytes:
    """Join SEAL ciphertexts into the message that TenSEAL's ``ckks_vector_from`` reads."""
    return _message(ciphertexts, profile.slot_counts(length), profile.scale)


def single_vector(ciphertext: bytes, slots: int, profile: Profile) -> bytes:
    """Make the message of a vector that is one ciphertext with ``slots`` slots in use."""
    return _message([ciphertext], [slots], profile.scale)


def ciphertext_of(message: bytes) -> bytes:
    """Take the ciphertext out of a one-ciphertext message that TenSEAL itself has just written."""
    (blob,) = (value for field, _, value in _protobuf.fields(message) if field == _CIPHERTEXTS)
    if not isinstance(blob, bytes):
        raise TypeError("a ciphertext is a bytes field")
    return blob


def _message(ciphertexts: list[bytes], slot_counts: list[int], scale: float) -> bytes:
    parts = [_protobuf.length_delimited(_SIZES, b"".join(map(_protobuf.varint, slot_counts)))]
    for blob in ciphertexts:
        parts += [_protobuf.key(_CIPHERTEXTS, _protobuf.BYTES), _protobuf.varint(len(blob)), blob]
    parts += [_protobuf.key(_SCALE, _protobuf.FIXED64), struct.pack("<d", scale)]
    return b"".join(parts)


def _read_vector(payload: bytes, profile: Profile, expected: list[int]) -> list[bytes]:
    """Walk the protobuf message; returns the SEAL blobs, still unchecked."""
    sizes = scale = None
    blobs: list[bytes] = []
    for field, wire_type, value in _protobuf.fields(payload):
        if (field, wire_type) == (_CIPHERTEXTS, _protobuf.BYTES) and isinstance(value, bytes):
            if len(blobs) == len(expected):
                raise ValueError(f"there are more than {len(expected)} ciphertexts")
            blobs.append(value)
        elif (field, wire_type) == (_SIZES, _protobuf.BYTES) and isinstance(value, bytes) and sizes is None:
            sizes = value
        elif (field, wire_type) == (_SCALE, _protobuf.FIXED64) and isinstance(value, bytes) and scale is None:
            scale = value
        else:
            raise ValueError(f"field {field} is unknown or repeated")
    if sizes != b"".join(map(_protobuf.varint, expected)):
        raise ValueError("its sizes are not those of the model")
    if scale != struct.pack("<d", profile.scale):
        raise ValueError("its scale is not the profile's")
    if len(blobs) != len(expected):
        raise ValueError(f"there are {len(blobs)} ciphertexts, not {len(expected)}")
    return blobs


def _rebuild(blob: bytes, profile: Profile, parameters: SealParameters, allow_seeded: bool) -> bytes:
    """Check one SEAL ciphertext; returns an uncompressed one with the same coefficients."""
    values = profile.poly_modulus_degree * len(parameters.primes)  # of one polynomial
    full_size = _DATA + 2 * 8 * values
    seeded_size = _DATA + 8 * values + _GENERATOR
    body = _seal_blob.unwrap(blob, (full_size, seeded_size) if allow_seeded else (full_size,))
    seeded = len(body) == seeded_size

    prefix = _PREFIX.pack(
        parameters.parms_id, 1, 2, profile.poly_modulus_degree, len(parameters.primes), profile.scale, 1
    )
    if body[: _PREFIX.size] != prefix:
        raise ValueError("its parameters, size or inner scale are not the profile's")
    data = _sub_body(body[_PREFIX.size :], _ARRAY - _seal_blob.HEADER.size + 8 * values * (2 - seeded))
    count = values * (2 - seeded)
    if _COUNT.unpack_from(data)[0] != count:
        raise ValueError("its number of coefficients is wrong")
    coefficients = np.frombuffer(data, dtype="<u8", offset=_COUNT.size).reshape(
        2 - seeded, len(parameters.primes), -1
    )
    primes = np.array(parameters.primes, dtype=np.uint64)[None, :, None]
    if not (coefficients < primes).all():
        raise ValueError("a coefficient is not reduced")
    if not seeded and not coefficients[1].any():
        raise ValueError("it is not encrypted (its second polynomial is zero)")
    minor = parameters.minor_version
    parts = [prefix, _seal_blob.wrap(data, minor)]
    if seeded:
        generator = _sub_body(body[-_GENERATOR:], 1 + _SEED_BYTES)
        if generator[0] not in (_BLAKE2XB, _SHAKE256):
            raise ValueError("its random generator is unknown")
        parts.append(_seal_blob.wrap(generator, minor))
    return _seal_blob.wrap(b"".join(parts), minor)


def _sub_body(data: bytes, size: int) -> bytes:
    """Open an uncompressed envelope inside a body."""
    inner = data[: _seal_blob.HEADER.size + size]
    if len(inner) < _seal_blob.HEADER.size or inner[5] != _seal_blob.NONE:
        raise ValueError("a part of it is compressed on its own")
    return _seal_blob.unwrap(inner, (size,))
