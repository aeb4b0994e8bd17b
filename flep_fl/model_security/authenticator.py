"""The verifiable sum: check values that only the sum of the signed updates can have.

Every site appends, to its payload ``v = [c w..., c]``, eight values ``a_i = <r_i, v> + t_i``. The
projection vectors ``r_i`` are the same for all sites of a round, the tags ``t_i`` belong to one upload, and
both come from a pseudo-random function of the check key, which the cloud does not have. Decrypted, an honest
sum satisfies ``sum a_i = <r_i, V> + sum t_i`` up to CKKS's noise. Dropping, repeating or scaling an upload
leaves its tags wrong by something unknown; changing the payload alone changes the projections by something
unknown. Projection and tag share one slot on purpose: a keyless cloud can multiply a ciphertext by a small
integer polynomial, which scales chosen slots differently, and so would get round a tag in a slot of its own.

``r_i`` is uniform with variance ``1 / d`` for the ``d`` values of ``v``, so that a projection has the size of
the payload's root mean square. All randomness comes from integers that float64 holds exactly (32 bits for a
projection, 53 for a tag), so that it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from flep_fl.contracts.errors import SumCheckError
from flep_fl.contracts.ports import Float64Vector
from flep_fl.model_security import _canonical
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.profiles import CHECK_SLOTS, TAG_RANGE

__all__ = [
    "CHECK_SLOTS",
    "ProjectionContext",
    "authenticate",
    "project",
    "projection_vectors",
    "tags",
    "verify_sum",
]

_CHUNK = 1 << 12  # payload values per step; 8 projections of them take 256 KiB and stay in the cache
_WORD = 4  # bytes of the stream for one component of a projection vector


@dataclass(frozen=True, slots=True)
class ProjectionContext:
    """What makes projection vectors fresh: they must never serve two rounds.

    Attributes
    ----------
    key_id
        Identifier of the model key.
    federation, run
        Names of the federation and of the run.
    round
        Number of the round.
    """

    key_id: str
    federation: str
    run: str
    round: int


def authenticate(
    check_key: CheckKey, context: ProjectionContext, tag_input: bytes, vector: Float64Vector
) -> Float64Vector:
    """Compute the check values of one upload.

    Parameters
    ----------
    check_key
        The analysts' check key.
    context
        Federation and round.
    tag_input
        ``UpdateHeader.tag_input()``: the header's fields that are known before encryption, its nonce among
        them. A nonce must not serve two different payloads.
    vector
        The payload, float64, shape ``(d,)``.

    Returns
    -------
    float64, shape ``(8,)``
    """
    return project(check_key, context, vector) + tags(check_key, tag_input)


def verify_sum(
    check_key: CheckKey,
    context: ProjectionContext,
    tag_inputs: Sequence[bytes],
    vector: Float64Vector,
    check_values: Float64Vector,
    tolerance: float,
) -> None:
    """Accept a decrypted sum only if it is the sum of exactly the uploads behind ``tag_inputs``.

    Parameters
    ----------
    check_key, context
        As for :func:`authenticate`.
    tag_inputs
        One per contributor, from the signed headers that came with the sum.
    vector, check_values
        The decrypted sum, shapes ``(d,)`` and ``(8,)``.
    tolerance
        ``Profile.tolerance(number of contributors)``.

    Raises
    ------
    SumCheckError
        The sum is another one. The message holds numbers for this site's own log; the cloud may learn the
        error's code only, because anything more would be an oracle.
    """
    expected = project(check_key, context, vector)
    for tag_input in tag_inputs:
        expected += tags(check_key, tag_input)
    whole = check_values.shape == expected.shape
    deviation = float(np.abs(check_values - expected).max()) if whole else math.nan
    if not deviation <= tolerance:  # written so that a NaN is refused too
        raise SumCheckError(
            "The decrypted sum is not the sum of the signed updates",
            expected=f"a deviation of at most {tolerance:.3g}",
            found=f"{deviation:.3g}",
            remedy="Do not use this cloud again before its operator has explained it",
        )


def tags(check_key: CheckKey, tag_input: bytes) -> Float64Vector:
    """Derive an upload's eight tags, uniform in [-1024, 1024), float64."""
    info = b"flep-fl/check-tag/v1\0" + hashlib.sha256(tag_input).digest()
    return _uniform(check_key.derive(info, 8 * CHECK_SLOTS)) * TAG_RANGE


def project(check_key: CheckKey, context: ProjectionContext, vector: Float64Vector) -> Float64Vector:
    """Project a vector of shape ``(d,)`` on the round's eight vectors; memory does not grow with ``d``."""
    stream = _projection_stream(check_key, context)
    result = np.zeros(CHECK_SLOTS, dtype=np.float64)
    rows = np.empty((min(vector.size, _CHUNK), CHECK_SLOTS), dtype=np.float64)
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        rows[: part.size] = _next_integers(stream, part.size)
        # <i + 1/2, v> = <i, v> + sum(v) / 2: one conversion of each integer, and no other work on it
        result += part @ rows[: part.size] + 0.5 * part.sum()
    return result * (_deviation(vector.size) * _UNIT)


def projection_vectors(check_key: CheckKey, context: ProjectionContext, length: int) -> Float64Vector:
    """Return the vectors themselves, float64, shape ``(length, 8)``; for tests and small lengths."""
    integers = _next_integers(_projection_stream(check_key, context), length)
    return (integers.astype(np.float64) + 0.5) * (_deviation(length) * _UNIT)


_UNIT = 2.0**-31  # midpoints of 2^32 equal parts of [-1, 1)


def _projection_stream(check_key: CheckKey, context: ProjectionContext) -> CipherContext:
    info = b"flep-fl/check-projection/v2\0" + _canonical.dump(asdict(context))
    # The key serves this one stream, so a counter from zero repeats nothing.
    return Cipher(AES(check_key.derive(info, 32)), CTR(bytes(16))).encryptor()


def _next_integers(stream: CipherContext, rows: int) -> NDArray[np.int32]:
    data = stream.update(bytes(_WORD * CHECK_SLOTS * rows))
    return np.frombuffer(data, dtype="<i4").reshape(rows, CHECK_SLOTS)


def _deviation(length: int) -> float:
    """Half width of a uniform distribution of variance ``1 / length``."""
    return math.sqrt(3.0 / length)


def _uniform(stream: bytes) -> Float64Vector:
    """Map eight little-endian bytes to the midpoint of one of 2^53 equal parts of [-1, 1)."""
    integers: NDArray[np.uint64] = np.frombuffer(stream, dtype="<u8") >> np.uint64(11)
    return (integers.astype(np.float64) - 2.0**52 + 0.5) * 2.0**-52
