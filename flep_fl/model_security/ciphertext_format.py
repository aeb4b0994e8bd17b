"""The structural check: nothing reaches SEAL that is not exactly what the profile prescribes.

Profiles with complex slots have a wire format without any redundancy (``packed_format``). The classic one
travels as TenSEAL's own message, which is read here.

TenSEAL loads bit-flipped and short messages without complaint, reads out of bounds when the declared
sizes lie, and crashes on empty ones. So every byte with a meaning is compared here, and what TenSEAL gets is
a new message made of the checked values: no compressed or redundant part of the sender's reaches it.

A ciphertext's body (SEAL 4, ``native/src/seal/ciphertext.cpp``): parms_id 32 bytes, u8 NTT form,
u64 polynomials, u64 N, u64 moduli, f64 scale, u64 correction factor, then the coefficients as a DynArray
(envelope, u64 count, u64 values).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from flep_fl.contracts.errors import CiphertextError
from flep_fl.model_security import _protobuf, _seal_blob
from flep_fl.model_security._parameters import SealParameters, seal_parameters
from flep_fl.model_security.packed_format import (
    PackedPayload,
    ciphertext_bytes,
    head,
    pack_ciphertext,
)
from flep_fl.model_security.profiles import Profile

_SIZES, _CIPHERTEXTS, _SCALE = 1, 2, 3  # fields of TenSEAL's CKKSVectorProto

_PREFIX = struct.Struct("<32sBQQQdQ")
_COUNT = struct.Struct("<Q")
_ARRAY = _seal_blob.HEADER.size + _COUNT.size  # what precedes the values of a DynArray
_DATA = _PREFIX.size + _ARRAY


class CheckedPayload:
    """The ciphertexts of a payload, each rebuilt from checked values as it is read.

    Parameters
    ----------
    payload
        What came over the wire.
    profile, length
        What it must hold: ``length`` real values, packed as the profile says.
    allow_seeded
        Whether the half-size form of a fresh upload is acceptable (a sum never has it).

    Raises
    ------
    CiphertextError
        The payload's size or form is wrong; while reading, a ciphertext of it.
    """

    def __init__(self, payload: bytes, profile: Profile, length: int, *, allow_seeded: bool) -> None:
        self._profile, self._length = profile, length
        self._source: PackedPayload | _TensealMessage
        try:
            if profile.packed:
                count = profile.ciphertexts(length)
                self._source = PackedPayload(payload, profile, count, allow_seeded=allow_seeded)
            else:
                self._source = _TensealMessage(payload, profile, length)
        except ValueError as exc:
            raise self._refused(exc) from None

    def check(self) -> CheckedPayload:
        """Look at every ciphertext; returns itself.

        Raises
        ------
        CiphertextError
            Anything differs from what the profile prescribes.
        """
        try:
            self._source.check()
        except ValueError as exc:
            raise self._refused(exc) from None
        return self

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the ciphertexts, in order, as uncompressed SEAL ciphertexts."""
        try:
            yield from self._source
        except ValueError as exc:
            raise self._refused(exc) from None

    def _refused(self, exc: ValueError) -> CiphertextError:
        return CiphertextError(
            f"The ciphertext is not one of profile {self._profile.name!r} with {self._length} values: {exc}",
            remedy="Use the same ckks.profile, ckks.encryption, model and release at every site",
        )


class _TensealMessage:
    """TenSEAL's ``CKKSVectorProto``; the ciphertexts inside may be compressed."""

    def __init__(self, payload: bytes, profile: Profile, length: int) -> None:
        self._profile = profile
        self._blobs = _read_vector(payload, profile, profile.slot_counts(length))

    def check(self) -> None:
        """Replace every ciphertext by what was checked, so that none is decompressed twice."""
        self._blobs = list(self)

    def __len__(self) -> int:
        return len(self._blobs)

    def __iter__(self) -> Iterator[bytes]:
        parameters = seal_parameters(self._profile)
        for blob in self._blobs:
            yield _rebuild(blob, self._profile, parameters)


def assemble_vector(ciphertexts: Iterable[bytes], profile: Profile, length: int) -> bytes:
    """Write the payload of ciphertexts that this process's SEAL has made, one by one.

    Raises
    ------
    ValueError
        Seeded and full ciphertexts are mixed.
    """
    if not profile.packed:
        return _message(list(ciphertexts), profile.slot_counts(length), profile.scale)
    out, sizes = io.BytesIO(), set()
    out.write(head(seeded=False))
    for blob in ciphertexts:
        sizes.add(out.write(pack_ciphertext(blob, profile)))
    (size,) = sizes
    if size == ciphertext_bytes(profile, seeded=True):
        out.seek(0)
        out.write(head(seeded=True))
    return out.getvalue()


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


def _rebuild(blob: bytes, profile: Profile, parameters: SealParameters) -> bytes:
    """Check one SEAL ciphertext; returns an uncompressed one with the same coefficients."""
    count = 2 * profile.poly_modulus_degree * len(parameters.primes)
    body = _seal_blob.unwrap(blob, (_DATA + 8 * count,))
    prefix = _PREFIX.pack(
        parameters.parms_id, 1, 2, profile.poly_modulus_degree, len(parameters.primes), profile.scale, 1
    )
    if body[: _PREFIX.size] != prefix:
        raise ValueError("its parameters, size or inner scale are not the profile's")
    data = _sub_body(body[_PREFIX.size :], _ARRAY - _seal_blob.HEADER.size + 8 * count)
    if _COUNT.unpack_from(data)[0] != count:
        raise ValueError("its number of coefficients is wrong")
    coefficients = np.frombuffer(data, dtype="<u8", offset=_COUNT.size).reshape(2, len(parameters.primes), -1)
    primes = np.array(parameters.primes, dtype=np.uint64)[None, :, None]
    if not (coefficients < primes).all():
        raise ValueError("a coefficient is not reduced")
    if not coefficients[1].any():
        raise ValueError("it is not encrypted (its second polynomial is zero)")
    minor = parameters.minor_version
    return _seal_blob.wrap(prefix + _seal_blob.wrap(data, minor), minor)


def _sub_body(data: bytes, size: int) -> bytes:
    """Open an uncompressed envelope inside a body."""
    inner = data[: _seal_blob.HEADER.size + size]
    if len(inner) < _seal_blob.HEADER.size or inner[5] != _seal_blob.NONE:
        raise ValueError("a part of it is compressed on its own")
    return _seal_blob.unwrap(inner, (size,))
