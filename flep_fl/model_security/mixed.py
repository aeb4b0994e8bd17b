r"""``cloud=mixed``: sites that trust the cloud send their vector in the clear, the others encrypt theirs.

A trusting site's payload holds ``[c w..., c]`` as float64 and its check values *encrypted*, each in the slot
that it has in everybody's vector. The cloud adds the plain vectors, encodes the result without any key, and
adds it into the sum of the ciphertexts. What the analysts decrypt is the same sum with the same check
values as if all had encrypted; and the cloud, which can read and alter a trusting site's weights, still
knows neither the projections nor the tags that an altered vector would have to match.

Payload: ``"FLEPMX1\n" || u64 values, big-endian || values, float64 little-endian || u64 bytes of the tail ||
tail || zero``. The tail is the payload of the last ciphertexts, those that hold check values; zero is the
payload of one encrypted zero, to which the plain sum is added where no site of a round has encrypted.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from tenseal import sealapi

from flep_fl.contracts.errors import CiphertextError
from flep_fl.contracts.ports import Float64Vector, ModelCipher
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.ciphertext_format import CheckedPayload, assemble_vector
from flep_fl.model_security.profiles import CHECK_SLOTS, Profile

_MAGIC: Final = b"FLEPMX1\n"
_COUNT: Final = struct.Struct(">Q")
_FLOAT: Final = np.dtype("<f8")


class TrustingModelCipher:
    """The ``ModelCipher`` of a site that trusts the cloud with its weights: only check values are encrypted.

    Parameters
    ----------
    cipher
        Encrypts the check values, and decrypts the sums.
    profile
        Where the check values lie in the sum.
    """

    def __init__(self, cipher: ModelCipher, profile: Profile) -> None:
        self._cipher, self._profile = cipher, profile

    @property
    def key_id(self) -> str:
        """Identifier of the model key."""
        return self._cipher.key_id

    def encrypt(self, vector: Float64Vector) -> bytes:
        """Write ``vector``, whose last eight values are check values, as a payload for :class:`MixedAdder`.

        Raises
        ------
        WeightRangeError
            A value is not finite or too large.
        """
        values = np.asarray(vector, dtype=np.float64)
        plain = values[:-CHECK_SLOTS]
        _, offset = _tail(self._profile, values.size)
        tail = np.array(values[offset:])
        tail[:-CHECK_SLOTS] = 0.0
        sealed = self._cipher.encrypt(tail)
        return b"".join(
            (
                _MAGIC,
                _COUNT.pack(plain.size),
                plain.astype(_FLOAT).tobytes(),
                _COUNT.pack(len(sealed)),
                sealed,
                self._cipher.encrypt(np.zeros(1)),
            )
        )

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Decrypt a sum, which is an ordinary ciphertext."""
        return self._cipher.decrypt(payload, length)


class MixedAdder:
    """Adds plain and encrypted payloads without any key (port ``Adder``).

    Parameters
    ----------
    public_context
        The keyless context from the cloud's kit.
    profile, length
        What every sum holds, check values included.
    """

    def __init__(self, public_context: bytes, profile: Profile, length: int) -> None:
        self._profile, self._length = profile, length
        self._first, offset = _tail(profile, length)
        self._encrypted = KeylessAdder(public_context, profile, length)
        self._tails = KeylessAdder(public_context, profile, length - offset)
        self._plain = np.zeros(length - CHECK_SLOTS, dtype=np.float64)
        self._zero = b""
        self._context = seal_parameters(profile).context
        self._file = ScratchFile()

    @property
    def count(self) -> int:
        """Number of payloads added so far."""
        return self._encrypted.count + self._tails.count

    def add(self, payload: bytes) -> None:
        """Check a payload of either kind, then add it; a refused one leaves everything as it was.

        Raises
        ------
        CiphertextError
            It does not have the structure that the profile prescribes, or holds a value that no sum can.
        """
        if not payload.startswith(_MAGIC):
            self._encrypted.add(payload)
            return
        plain, tail, zero = self._split(payload)
        total = self._plain + plain
        # What a sum cannot hold must be refused here, where it costs its sender alone. A coefficient is at
        # most the mean magnitude over a ciphertext's slots; SEAL encodes up to half of what a sum can hold.
        step = self._profile.values_per_ciphertext
        sums = np.add.reduceat(np.abs(total), range(0, total.size, step))
        if not bool((sums <= self._profile.headroom / 2 * self._profile.slots).all()):  # refuses a NaN, too
            raise CiphertextError("The plain payload holds a value that is not finite or too large")
        (blob,) = CheckedPayload(zero, self._profile, 1, allow_seeded=self._profile.seeded_uploads)
        self._tails.add(tail)
        self._plain = total
        self._zero = self._zero or blob

    def result(self) -> bytes:
        """Serialise the sum, an ordinary ciphertext.

        Raises
        ------
        CiphertextError
            Nothing has been added.
        """
        if self._tails.count == 0:
            return self._encrypted.result()
        evaluator = sealapi.Evaluator(self._context)
        encoder = sealapi.CKKSEncoder(self._context)
        total = self._blobs(self._encrypted, self._length)
        tails = self._blobs(self._tails, self._length - self._first * self._profile.values_per_ciphertext)
        blobs = []
        for index in range(len(self._profile.slot_counts(self._length))):
            ciphertext = self._load(total[index] if total else self._zero)
            if index >= self._first:
                evaluator.add_inplace(ciphertext, self._load(tails[index - self._first]))
            if (plain := self._encoded(encoder, index)) is not None:
                evaluator.add_plain_inplace(ciphertext, plain)
            ciphertext.save(self._file.path)
            blobs.append(self._file.read())
        return assemble_vector(blobs, self._profile, self._length)

    def _split(self, payload: bytes) -> tuple[Float64Vector, bytes, bytes]:
        """Cut a trusting site's payload; the ciphertexts in it are still unchecked."""
        start = len(_MAGIC) + _COUNT.size
        end = start + self._plain.size * _FLOAT.itemsize
        problem = CiphertextError("The plain payload does not fit the model", found=f"{len(payload)} bytes")
        if (
            len(payload) < end + _COUNT.size
            or _COUNT.unpack_from(payload, len(_MAGIC))[0] != self._plain.size
        ):
            raise problem
        (size,) = _COUNT.unpack_from(payload, end)
        cut = end + _COUNT.size + size
        if cut > len(payload):
            raise problem
        values = np.frombuffer(payload, dtype=_FLOAT, count=self._plain.size, offset=start)
        return values.astype(np.float64), payload[end + _COUNT.size : cut], payload[cut:]

    def _blobs(self, adder: KeylessAdder, length: int) -> list[bytes]:
        if adder.count == 0:
            return []
        return list(CheckedPayload(adder.result(), self._profile, length, allow_seeded=False))

    def _encoded(self, encoder: Any, index: int) -> Any:
        """Encode one ciphertext's share of the plain sum as SEAL's plaintext; None where it is all zero."""
        step = self._profile.values_per_ciphertext
        values = self._plain[index * step : (index + 1) * step]
        if not values.any():
            return None  # nothing to add; SEAL may refuse a zero plaintext as transparent
        if self._profile.complex_packing:
            padded = np.append(values, 0.0) if values.size % 2 else np.ascontiguousarray(values)
            slots = padded.view(np.complex128).tolist()
        else:
            slots = values.tolist()
        plaintext = sealapi.Plaintext()
        encoder.encode(slots, self._profile.scale, plaintext)
        return plaintext

    def _load(self, blob: bytes) -> Any:
        self._file.write(blob)
        ciphertext = sealapi.Ciphertext()
        ciphertext.load(self._context, self._file.path)
        return ciphertext


def _tail(profile: Profile, length: int) -> tuple[int, int]:
    """Return the first ciphertext that holds check values, and where it begins in the vector."""
    first = (length - CHECK_SLOTS) // profile.values_per_ciphertext
    return first, first * profile.values_per_ciphertext
