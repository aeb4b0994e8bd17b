"""The wire format of complex-slot profiles: polynomials, packed to the bits of their prime.

SEAL keeps a coefficient in 64 bits and leaves the rest to a compressor. Here a payload is nothing but
coefficients (and seeds) in as many bytes as they need, so that

- it is as small as the parameters allow: log2(q) / 8 bytes a weight up, twice that down,
- its size is known exactly, nothing is decompressed, and there is no field that could contradict another:
  what SEAL gets (header, parameters, scale) is written here, on the receiver's side.

Layout: ``"FLEPCV1" || form``, then for every ciphertext the first polynomial, one residue polynomial per
prime, and, in form ``s``, SEAL's 64-byte seed of the second (Blake2xb, SEAL's default generator), or, in
form ``f``, the second polynomial itself. Coefficients are little-endian, in NTT form: 40-bit and 48-bit
primes in 5 and 6 bytes, 60-bit primes in 15 bytes a pair.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.model_security import _seal_blob
from flep_fl.model_security._parameters import SealParameters, seal_parameters
from flep_fl.model_security.profiles import Profile

SEED_BYTES = 64

_MAGIC = b"FLEPCV1"
_SEEDED, _FULL = b"s", b"f"
_HEAD = len(_MAGIC) + 1

_PREFIX = struct.Struct("<32sBQQQdQ")
_COUNT = struct.Struct("<Q")
_BLAKE2XB = 1

_SPLIT: dict[int, np.dtype[Any]] = {
    40: np.dtype([("low", "<u4"), ("high", "u1")]),
    48: np.dtype([("low", "<u4"), ("high", "<u2")]),
}
_PAIR = np.dtype({"names": ["low", "high"], "formats": ["<u8", "<u8"], "offsets": [0, 7], "itemsize": 15})
_PAIR_BITS = 60
_MASK = np.uint64((1 << _PAIR_BITS) - 1)

Residues = NDArray[np.uint64]


class PackedPayload:
    """A payload whose size and form fit; its ciphertexts are checked one by one as they are read.

    Parameters
    ----------
    payload
        The bytes as they came over the wire.
    profile, ciphertexts
        What it must hold.
    allow_seeded
        Whether the half-size form of a fresh upload is acceptable (a sum never has it).

    Raises
    ------
    ValueError
        Another size, or a form that is not acceptable.
    """

    def __init__(self, payload: bytes, profile: Profile, ciphertexts: int, *, allow_seeded: bool) -> None:
        self._profile = profile
        self._parameters = seal_parameters(profile)
        self._count = ciphertexts
        head, form = payload[: len(_MAGIC)], payload[len(_MAGIC) : _HEAD]
        if head != _MAGIC or form not in (_SEEDED, _FULL):
            raise ValueError("it does not begin as a packed ciphertext does")
        self._seeded = form == _SEEDED
        if self._seeded and not allow_seeded:
            raise ValueError("it has the half-size form, which only a fresh upload has")
        self._polynomial = polynomial_bytes(profile, self._parameters)
        self._step = ciphertext_bytes(profile, seeded=self._seeded)
        if len(payload) != _HEAD + ciphertexts * self._step:
            raise ValueError(f"it has {len(payload)} bytes, not {_HEAD + ciphertexts * self._step}")
        self._data = memoryview(payload)[_HEAD:]

    def check(self) -> None:
        """Look at every coefficient.

        Raises
        ------
        ValueError
            A coefficient is not reduced, or a ciphertext is not encrypted (its second polynomial is zero).
        """
        for index in range(self._count):
            self._polynomials(index)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        """Yield each ciphertext as SEAL reads it, uncompressed; :class:`ValueError` as in :meth:`check`."""
        for index in range(self._count):
            residues, seed = self._polynomials(index)
            yield _seal_ciphertext(residues, seed, self._profile, self._parameters)

    def residues(self) -> Iterator[list[Residues]]:
        """Yield each ciphertext's first polynomial: a row per prime, in NTT form; no key is needed."""
        for index in range(self._count):
            yield self._polynomials(index)[0]

    def _polynomials(self, index: int) -> tuple[list[Residues], bytes]:
        start = index * self._step
        part = self._data[start : start + self._step]
        polynomials = [self._unpack(part[: self._polynomial])]
        if self._seeded:
            return polynomials, bytes(part[self._polynomial :])
        polynomials.append(self._unpack(part[self._polynomial :]))
        if not polynomials[1].any():
            raise ValueError("it is not encrypted (its second polynomial is zero)")
        return polynomials, b""

    def _unpack(self, data: memoryview) -> Residues:
        degree, start = self._profile.poly_modulus_degree, 0
        rows = np.empty((len(self._parameters.primes), degree), dtype=np.uint64)
        for row, prime in zip(rows, self._parameters.primes, strict=True):
            size = _packed_bytes(degree, prime)
            _unpack_residues(data[start : start + size], prime, row)
            if int(row.max()) >= prime:
                raise ValueError("a coefficient is not reduced")
            start += size
        return rows


def head(*, seeded: bool) -> bytes:
    """Return what a payload begins with."""
    return _MAGIC + (_SEEDED if seeded else _FULL)


def pack_ciphertext(blob: bytes, profile: Profile) -> bytes:
    """Pack a ciphertext that this process's SEAL has just written; seeded ones stay seeded.

    Raises
    ------
    ValueError
        SEAL wrote something else than this format knows, for instance another generator.
    """
    parameters = seal_parameters(profile)
    values = profile.poly_modulus_degree * len(parameters.primes)
    seeded_size, full_size = seal_sizes(profile, parameters)
    body = memoryview(_seal_blob.unwrap(blob, (seeded_size, full_size)))
    seeded = len(body) == seeded_size
    coefficients = np.frombuffer(
        body, dtype="<u8", count=values * (2 - seeded), offset=_PREFIX.size + _ARRAY_HEAD
    ).reshape(2 - seeded, len(parameters.primes), -1)
    parts = [
        _pack_residues(row, prime)
        for polynomial in coefficients
        for row, prime in zip(polynomial, parameters.primes, strict=True)
    ]
    if seeded:
        if body[-SEED_BYTES - 1] != _BLAKE2XB:
            raise ValueError("SEAL was built with another generator than its default")
        parts.append(bytes(body[-SEED_BYTES:]))
    return b"".join(parts)


def polynomial_bytes(profile: Profile, parameters: SealParameters) -> int:
    """Size of one packed polynomial."""
    return sum(_packed_bytes(profile.poly_modulus_degree, prime) for prime in parameters.primes)


def ciphertext_bytes(profile: Profile, *, seeded: bool) -> int:
    """Size of one packed ciphertext."""
    polynomial = polynomial_bytes(profile, seal_parameters(profile))
    return polynomial + (SEED_BYTES if seeded else polynomial)


def payload_bytes(profile: Profile, length: int, *, seeded: bool) -> int:
    """Size of a payload of ``length`` values."""
    return _HEAD + profile.ciphertexts(length) * ciphertext_bytes(profile, seeded=seeded)


_ARRAY_HEAD = _seal_blob.HEADER.size + _COUNT.size  # what precedes the values of SEAL's DynArray
_GENERATOR = _seal_blob.HEADER.size + 1 + SEED_BYTES


def seal_sizes(profile: Profile, parameters: SealParameters) -> tuple[int, int]:
    """Sizes of SEAL's own serialisation without its outer envelope: seeded and full."""
    polynomial = 8 * profile.poly_modulus_degree * len(parameters.primes)
    common = _PREFIX.size + _ARRAY_HEAD + polynomial
    return common + _GENERATOR, common + polynomial


def _seal_ciphertext(
    polynomials: list[Residues], seed: bytes, profile: Profile, parameters: SealParameters
) -> bytes:
    """Write a ciphertext as SEAL's ``Ciphertext::load`` reads it (see ``ciphertext_format``)."""
    count = sum(polynomial.size for polynomial in polynomials)
    minor = parameters.minor_version
    prefix = _PREFIX.pack(
        parameters.parms_id, 1, 2, profile.poly_modulus_degree, len(parameters.primes), profile.scale, 1
    )
    seeded = _seal_blob.wrap(bytes([_BLAKE2XB]) + seed, minor) if seed else b""
    array = _seal_blob.head(_COUNT.size + 8 * count, minor)
    outer = _seal_blob.head(len(prefix) + len(array) + _COUNT.size + 8 * count + len(seeded), minor)
    data = [polynomial.astype("<u8", copy=False).data for polynomial in polynomials]
    return b"".join((outer, prefix, array, _COUNT.pack(count), *data, seeded))


def _width(prime: int) -> int:
    bits = prime.bit_length()
    return next((width for width in (*_SPLIT, _PAIR_BITS) if bits <= width), 64)


def _packed_bytes(count: int, prime: int) -> int:
    return count * _width(prime) // 8


def _pack_residues(values: Residues, prime: int) -> bytes:
    width = _width(prime)
    if width in _SPLIT:
        split = np.empty(values.size, dtype=_SPLIT[width])
        split["low"] = values & np.uint64(0xFFFFFFFF)
        split["high"] = values >> np.uint64(32)
        return split.tobytes()
    if width == _PAIR_BITS:
        # 120 bits in 15 bytes: two words, which share the byte in the middle and write the same value there
        first, second = values[::2], values[1::2]
        pairs = np.empty(first.size, dtype=_PAIR)
        pairs["low"] = first | second << np.uint64(_PAIR_BITS)
        pairs["high"] = first >> np.uint64(56) | second << np.uint64(4)
        return pairs.tobytes()
    return values.astype("<u8").tobytes()


def _unpack_residues(data: memoryview, prime: int, out: Residues) -> None:
    width = _width(prime)
    if width in _SPLIT:
        split = np.frombuffer(data, dtype=_SPLIT[width])
        np.left_shift(split["high"], np.uint64(32), out=out, dtype=np.uint64)
        out |= split["low"]
    elif width == _PAIR_BITS:
        pairs = np.frombuffer(data, dtype=_PAIR)
        np.bitwise_and(pairs["low"], _MASK, out=out[::2])
        np.right_shift(pairs["high"], np.uint64(4), out=out[1::2])
    else:
        out[:] = np.frombuffer(data, dtype="<u8")
