"""What a cloud without any key can do to ciphertexts, for the tests that play it."""

from __future__ import annotations

import numpy as np
from tenseal import sealapi

from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.ciphertext_format import CheckedPayload, assemble_vector
from flep_fl.model_security.profiles import PROFILES, Profile

DEFAULT = PROFILES["default"]

# u(x) = sum c_i x^(56 i), found with LLL: 2 at slot 0 and 1 at slots 1 to 4, to within 1e-11
SPLITTER_STEP = 56
SPLITTER = [
    -31, 2, 112, 124, -110, 83, -210, -275, 58, 115, 392, -112, -8, -180, 1, 197, -195, -123, 357, -96, 117,
    -85, -60, -55, -296, 17, 88, 254, 80, -203, 61, 37, -208, 179, 155, -72, -82, -77, -159, 145, 344, -213,
    115, -16, 60, -84, -147, -130, -142, 68, 140, 46, 103, -37, -40, -4, 45, 26, -42, -3, -8, 28, -20, -4, 14,
    -13, 4, 2, -6, -4, 3, 11,
]  # fmt: skip

# the same for profiles with real slots: real part 2 at slots 0 and 1, and 1 at slots 2 to 9, to within 1e-9
REAL_SPLITTER = [
    -22, -24, -1, -9, 7, 33, 21, 12, 40, 14, -21, -53, -66, 42, 30, 24, -11, 23, 27, -35, 16, 0, -13,
    30, 8, 23, -34, 24, 13, 28, -31, -24, 25, 18, -28, -25, -10, 32, -1, 35, -14, 5, -25, 30, 8, -21, 8,
    -5, 16, 22, 29, 1, 5, 16, -31, 15, -14, 2, 4, -31, 10, 24, 12, -1, 4, 22, -11, 4, 0, -8, -3, 0,
]  # fmt: skip


class CheatingCloud:
    """Everything that SEAL lets a party without a key do to ciphertexts."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.context = seal_parameters(profile).context
        self.encoder = sealapi.CKKSEncoder(self.context)
        self.evaluator = sealapi.Evaluator(self.context)
        self.file = ScratchFile()

    def load(self, payload: bytes, length: int) -> list:
        """Load the ciphertexts of an upload or of a sum."""
        loaded = []
        for blob in CheckedPayload(payload, self.profile, length, allow_seeded=True):
            self.file.write(blob)
            ciphertext = sealapi.Ciphertext()
            ciphertext.load(self.context, self.file.path)
            loaded.append(ciphertext)
        return loaded

    def times(self, ciphertext, slots: np.ndarray | complex):
        """Multiply by the integer polynomial that has these values in the slots."""
        plaintext, result = sealapi.Plaintext(), sealapi.Ciphertext()
        values = np.broadcast_to(np.asarray(slots, dtype=complex), (self.profile.slots,)).tolist()
        self.encoder.encode(values, 1.0, plaintext)
        self.evaluator.multiply_plain(ciphertext, plaintext, result)
        return result

    def shift(self, ciphertext, slots: list[complex]):
        plaintext, result = sealapi.Plaintext(), sealapi.Ciphertext()
        self.encoder.encode(slots, self.profile.scale, plaintext)
        self.evaluator.add_plain(ciphertext, plaintext, result)
        return result

    def add(self, ciphertexts: list):
        total = ciphertexts[0]
        for other in ciphertexts[1:]:
            result = sealapi.Ciphertext()
            self.evaluator.add(total, other, result)
            total = result
        return total

    def payload(self, ciphertexts: list, length: int) -> bytes:
        """Write ciphertexts as a payload that passes for an upload or for a sum."""
        return self.sum([ciphertexts], length)

    def sum(self, updates: list[list], length: int) -> bytes:
        blobs = []
        for column in zip(*updates, strict=True):
            self.add(list(column)).save(self.file.path)
            blobs.append(self.file.read())
        return assemble_vector(blobs, self.profile, length)


def polynomial_slots(step: int, coefficients: list[int]) -> np.ndarray:
    """Values of sum c_i x^(step i) at SEAL's slots: the powers 3^j of a primitive 2N-th root of unity."""
    degree = DEFAULT.poly_modulus_degree
    powers = np.array([pow(3, j, 2 * degree) for j in range(DEFAULT.slots)])
    exponents = np.outer(powers, step * np.arange(len(coefficients))) % (2 * degree)
    return np.exp(1j * np.pi * exponents / degree) @ np.array(coefficients, dtype=float)
