"""A cloud that changes the sum is caught; an honest one never is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tenseal import sealapi

from flep_fl.contracts.errors import SumCheckError
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.authenticator import (
    ProjectionContext,
    authenticate,
    project,
    projection_vectors,
    tags,
    verify_sum,
)
from flep_fl.model_security.ciphertext_format import assemble_vector, check_ciphertext
from flep_fl.model_security.contribution import weighted_vector
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.profiles import CHECK_SLOTS, PROFILES, TAG_RANGE

DEFAULT = PROFILES["default"]
GOLDEN = Path(__file__).parents[2] / "golden"

# u(x) = sum c_i x^(56 i), found with LLL: 2 at slot 0 and 1 at slots 1 to 4, to within 1e-11
SPLITTER_STEP = 56
SPLITTER = [
    -31, 2, 112, 124, -110, 83, -210, -275, 58, 115, 392, -112, -8, -180, 1, 197, -195, -123, 357, -96, 117,
    -85, -60, -55, -296, 17, 88, 254, 80, -203, 61, 37, -208, 179, 155, -72, -82, -77, -159, 145, 344, -213,
    115, -16, 60, -84, -147, -130, -142, 68, 140, 46, 103, -37, -40, -4, 45, 26, -42, -3, -8, 28, -20, -4, 14,
    -13, 4, 2, -6, -4, 3, 11,
]  # fmt: skip


class CheatingCloud:
    """Everything that SEAL lets a party without a key do to ciphertexts."""

    def __init__(self) -> None:
        self.context = seal_parameters(DEFAULT).context
        self.encoder = sealapi.CKKSEncoder(self.context)
        self.evaluator = sealapi.Evaluator(self.context)
        self.file = ScratchFile()

    def load(self, payload: bytes, length: int) -> list:
        loaded = []
        for blob in check_ciphertext(payload, DEFAULT, length, allow_seeded=True):
            self.file.write(blob)
            ciphertext = sealapi.Ciphertext()
            ciphertext.load(self.context, self.file.path)
            loaded.append(ciphertext)
        return loaded

    def times(self, ciphertext, slots: np.ndarray | complex):
        """Multiply by the integer polynomial that has these values in the slots."""
        plaintext, result = sealapi.Plaintext(), sealapi.Ciphertext()
        values = np.broadcast_to(np.asarray(slots, dtype=complex), (DEFAULT.slots,)).tolist()
        self.encoder.encode(values, 1.0, plaintext)
        self.evaluator.multiply_plain(ciphertext, plaintext, result)
        return result

    def shift(self, ciphertext, slots: list[complex]):
        plaintext, result = sealapi.Plaintext(), sealapi.Ciphertext()
        self.encoder.encode(slots, DEFAULT.scale, plaintext)
        self.evaluator.add_plain(ciphertext, plaintext, result)
        return result

    def add(self, ciphertexts: list):
        total = ciphertexts[0]
        for other in ciphertexts[1:]:
            result = sealapi.Ciphertext()
            self.evaluator.add(total, other, result)
            total = result
        return total

    def sum(self, updates: list[list], length: int) -> bytes:
        blobs = []
        for column in zip(*updates, strict=True):
            self.add(list(column)).save(self.file.path)
            blobs.append(self.file.read())
        return assemble_vector(blobs, DEFAULT, length)


def polynomial_slots(step: int, coefficients: list[int]) -> np.ndarray:
    """Values of sum c_i x^(step i) at SEAL's slots: the powers 3^j of a primitive 2N-th root of unity."""
    degree = DEFAULT.poly_modulus_degree
    powers = np.array([pow(3, j, 2 * degree) for j in range(DEFAULT.slots)])
    exponents = np.outer(powers, step * np.arange(len(coefficients))) % (2 * degree)
    return np.exp(1j * np.pi * exponents / degree) @ np.array(coefficients, dtype=float)


class Round:
    """Three sites' uploads of one round, and what an analyst makes of a sum."""

    def __init__(self, federation, cipher, weights: int) -> None:
        self.federation, self.cipher, self.payload_size = federation, cipher, weights + 1
        rng = np.random.default_rng(weights)
        self.headers = [federation.header(name) for name in federation.signing]
        self.vectors = [weighted_vector(rng.normal(0, 0.5, weights), n, 1000, 64.0) for n in (150, 400, 900)]
        self.payloads = [
            cipher.encrypt(federation.tagged(header, vector))
            for header, vector in zip(self.headers, self.vectors, strict=True)
        ]

    @property
    def length(self) -> int:
        return self.payload_size + CHECK_SLOTS

    def verify(self, payload: bytes, headers=None, tolerance: float | None = None) -> np.ndarray:
        headers = self.headers if headers is None else headers
        values = self.cipher.decrypt(payload, self.length)
        vector, checks = values[: self.payload_size], values[self.payload_size :]
        verify_sum(
            self.federation.check_key,
            self.federation.context,
            [header.tag_input() for header in headers],
            vector,
            checks,
            DEFAULT.tolerance(len(headers)) if tolerance is None else tolerance,
        )
        return vector


@pytest.fixture(scope="module")
def cloud():
    return CheatingCloud()


@pytest.fixture(scope="module", params=[500, 4095], ids=["one ciphertext", "check values on their own"])
def uploads(request, federation, ciphers):
    return Round(federation, ciphers["default"], request.param)


@pytest.fixture(scope="module")
def loaded(uploads, cloud):
    return [cloud.load(payload, uploads.length) for payload in uploads.payloads]


@pytest.mark.he
def test_an_honest_sum_is_accepted(uploads, model_keys, cloud, loaded):
    adder = KeylessAdder(model_keys["default"].public_context(), DEFAULT, uploads.length)
    for payload in uploads.payloads:
        adder.add(payload)
    for payload in (adder.result(), cloud.sum(loaded, uploads.length)):
        vector = uploads.verify(payload)
        assert np.abs(vector - sum(uploads.vectors)).max() < DEFAULT.tolerance(3)


@pytest.mark.he
@pytest.mark.parametrize("factor", [2, -1, 5])
def test_scaling_one_site_is_caught(uploads, cloud, loaded, factor):
    changed = [cloud.times(ciphertext, factor) for ciphertext in loaded[0]]
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum([changed, *loaded[1:]], uploads.length))


@pytest.mark.he
def test_dropping_a_named_site_and_counting_one_twice_are_caught(uploads, cloud, loaded):
    dropped = cloud.sum(loaded[1:], uploads.length)
    with pytest.raises(SumCheckError):
        uploads.verify(dropped)
    uploads.verify(dropped, headers=uploads.headers[1:])  # an honest account of the same sum
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum([loaded[0], *loaded], uploads.length))
    with pytest.raises(SumCheckError):  # replaced: one site stands in for another
        uploads.verify(cloud.sum([loaded[1], *loaded[1:]], uploads.length))


@pytest.mark.he
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_a_shift_is_caught(uploads, cloud, loaded, size):
    shifted = [cloud.shift(loaded[0][0], [complex(size, -size)] * 250), *loaded[0][1:]]
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum([shifted, *loaded[1:]], uploads.length))


@pytest.mark.he
def test_separate_ciphertexts_of_payload_and_check_values_cannot_be_played_apart(federation, ciphers, cloud):
    uploads = Round(federation, ciphers["default"], 4095)
    loaded = [cloud.load(payload, uploads.length) for payload in uploads.payloads]
    assert [len(update) for update in loaded] == [2, 2, 2]
    for factor in (2, -1, 5):
        for part in (0, 1):
            changed = list(loaded[0])
            changed[part] = cloud.times(changed[part], factor)
            with pytest.raises(SumCheckError):
                uploads.verify(cloud.sum([changed, *loaded[1:]], uploads.length))
    with pytest.raises(SumCheckError):  # the payload of one site, the check values of another
        uploads.verify(cloud.sum([[loaded[1][0], loaded[0][1]], *loaded[1:]], uploads.length))


@pytest.mark.he
def test_a_polynomial_that_separates_check_slots_from_payload_is_caught(federation, ciphers, cloud):
    """A keyless multiplication doubles one site's payload and leaves its check slots as they were."""
    uploads = Round(federation, ciphers["default"], 1)
    splitter = polynomial_slots(SPLITTER_STEP, SPLITTER)
    assert np.abs(splitter[:5] - [2, 1, 1, 1, 1]).max() < 1e-9
    loaded = [cloud.load(payload, uploads.length) for payload in uploads.payloads]
    forged = cloud.sum([[cloud.times(loaded[0][0], splitter)], *loaded[1:]], uploads.length)
    honest = ciphers["default"].decrypt(cloud.sum(loaded, uploads.length), uploads.length)
    changed = ciphers["default"].decrypt(forged, uploads.length)
    # the attack does what it promises ...
    assert np.abs(changed[2:] - honest[2:]).max() < 1e-5
    assert np.abs(changed[:2] - honest[:2] - uploads.vectors[0]).max() < 1e-5
    # ... and is found, by far more than the noise that the multiplication adds
    with pytest.raises(SumCheckError):
        uploads.verify(forged, tolerance=1e-4)


@pytest.mark.he
def test_300_honest_sums_without_a_false_alarm(federation, ciphers, cloud):
    cipher, rng = ciphers["default"], np.random.default_rng(9)
    size = 40
    for number in range(300):
        context = ProjectionContext(cipher.key_id, "plant", "run", number)
        vectors = rng.uniform(-8, 8, (3, size))
        headers = [federation.header(name, round=number).tag_input() for name in "abc"]
        uploads = []
        for vector, header in zip(vectors, headers, strict=True):
            checks = authenticate(federation.check_key, context, header, vector)
            payload = cipher.encrypt(np.concatenate([vector, checks]))
            uploads.append(cloud.load(payload, size + CHECK_SLOTS))
        values = cipher.decrypt(cloud.sum(uploads, size + CHECK_SLOTS), size + CHECK_SLOTS)
        verify_sum(federation.check_key, context, headers, values[:size], values[size:], DEFAULT.tolerance(3))


def simulated(federation, length: int, sites: int):
    """A decrypted honest sum, with noise of CKKS's size."""
    rng = np.random.default_rng(length)
    vectors = rng.normal(0, 0.3, (sites, length))
    headers = [federation.header(f"s{k}").tag_input() for k in range(sites)]
    checks = sum(
        authenticate(federation.check_key, federation.context, header, vector)
        for header, vector in zip(headers, vectors, strict=True)
    )
    noise = DEFAULT.noise_std(sites)
    return (
        headers,
        vectors.sum(axis=0) + rng.normal(0, noise, length),
        checks + rng.normal(0, noise, CHECK_SLOTS),
    )


def test_a_long_vector_and_many_sites(federation):
    headers, vector, checks = simulated(federation, 100_001, 10)
    arguments = (federation.check_key, federation.context)
    tolerance = DEFAULT.tolerance(10)
    verify_sum(*arguments, headers, vector, checks, tolerance)
    vector[5] += 1.0
    with pytest.raises(SumCheckError):
        verify_sum(*arguments, headers, vector, checks, tolerance)


def test_another_key_round_nonce_or_number_of_check_values_is_refused(federation):
    headers, vector, checks = simulated(federation, 100, 3)
    key, context, tolerance = federation.check_key, federation.context, DEFAULT.tolerance(3)
    verify_sum(key, context, headers, vector, checks, tolerance)
    other_round = ProjectionContext(context.key_id, context.federation, context.run, context.round + 1)
    for bad in (
        (CheckKey.generate(), context, headers, vector, checks),
        (key, other_round, headers, vector, checks),
        (key, context, headers[:2], vector, checks),
        (key, context, [*headers[:2], headers[2] + b" "], vector, checks),
        (key, context, headers, vector, checks[:7]),
        (key, context, headers, vector, np.append(checks[:7], np.nan)),
        (key, context, headers, vector * np.nan, checks),
    ):
        with pytest.raises(SumCheckError) as caught:
            verify_sum(*bad, tolerance)
        assert caught.value.code == "sum_rejected"


def test_golden_projections_and_tags():
    golden = json.loads((GOLDEN / "update_authenticator.json").read_text())
    key = CheckKey.from_bytes(bytes.fromhex(golden["check_key"]))
    context = ProjectionContext(**golden["context"])
    assert tags(key, golden["tag_input"].encode()).tolist() == golden["tags"]
    assert projection_vectors(key, context, 3).tolist() == golden["projection_vectors"]
    vector = np.array(golden["vector"])
    checks = authenticate(key, context, golden["tag_input"].encode(), vector)
    assert np.allclose(checks, golden["check_values"], rtol=0, atol=1e-12)


def test_projections_have_the_stated_distribution():
    key = CheckKey.from_bytes(bytes(range(32)))
    context = ProjectionContext("k", "f", "r", 1)
    vectors = projection_vectors(key, context, 40_000) * np.sqrt(40_000)
    assert np.abs(vectors.mean(axis=0)).max() < 0.03
    assert np.abs(vectors.T @ vectors / 40_000 - np.eye(CHECK_SLOTS)).max() < 0.03
    assert np.abs(vectors).max() <= np.sqrt(3)
    drawn = np.concatenate([tags(key, bytes([i])) for i in range(250)])
    assert np.abs(drawn).max() <= TAG_RANGE and drawn.std() == pytest.approx(TAG_RANGE / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize("length", [1, 1000, 32768, 32769, 70_000])
def test_chunks_do_not_show_in_the_projection(length):
    key = CheckKey.from_bytes(bytes(range(32)))
    context = ProjectionContext("k", "f", "r", 1)
    vector = np.random.default_rng(0).normal(size=length)
    whole = vector @ projection_vectors(key, context, length)
    assert np.allclose(project(key, context, vector), whole, rtol=0, atol=1e-10)
