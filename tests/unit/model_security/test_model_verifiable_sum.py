"""A cloud that changes the sum is caught; an honest one never is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cheating import REAL_SPLITTER, SPLITTER, SPLITTER_STEP, CheatingCloud, polynomial_slots

from flep_fl.contracts.errors import SumCheckError
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.authenticator import (
    ProjectionContext,
    authenticate,
    project,
    projection_vectors,
    tags,
    verify_sum,
)
from flep_fl.model_security.ciphertext_format import assemble_vector
from flep_fl.model_security.contribution import weighted_vector
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.profiles import CHECK_SLOTS, PROFILES, TAG_RANGE, get_profile
from flep_fl.model_security.seal import new_nonce

DEFAULT = PROFILES["default"]
GOLDEN = Path(__file__).parents[2] / "golden"


class Round:
    """Three sites' uploads of one round, and what an analyst makes of a sum."""

    def __init__(self, federation, cipher, weights: int) -> None:
        self.federation, self.cipher, self.payload_size = federation, cipher, weights + 1
        self.profile = cipher.profile
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
            self.profile.tolerance(len(headers)) if tolerance is None else tolerance,
        )
        return vector


@pytest.fixture(scope="module")
def cloud(profile):
    return CheatingCloud(profile)


@pytest.fixture(scope="module", params=["one ciphertext", "check values on their own"])
def uploads(request, federation, cipher):
    weights = 500 if request.param == "one ciphertext" else cipher.profile.values_per_ciphertext - 1
    return Round(federation, cipher, weights)


@pytest.fixture(scope="module")
def loaded(uploads, cloud):
    return [cloud.load(payload, uploads.length) for payload in uploads.payloads]


@pytest.mark.he
def test_an_honest_sum_is_accepted(uploads, key, profile, cloud, loaded):
    adder = KeylessAdder(key.public_context(), profile, uploads.length)
    for payload in uploads.payloads:
        adder.add(payload)
    for payload in (adder.result(), cloud.sum(loaded, uploads.length)):
        vector = uploads.verify(payload)
        assert np.abs(vector - sum(uploads.vectors)).max() < profile.tolerance(3)


@pytest.mark.he
@pytest.mark.parametrize("factor", [2, -1, 5])
def test_scaling_one_site_is_caught(uploads, cloud, loaded, factor):
    changed = [cloud.times(ciphertext, factor) for ciphertext in loaded[0]]
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum([changed, *loaded[1:]], uploads.length))


@pytest.mark.he
@pytest.mark.parametrize("factor", [2, -1, 5])
def test_scaling_the_whole_sum_is_caught(uploads, cloud, loaded, factor):
    changed = [[cloud.times(ciphertext, factor) for ciphertext in update] for update in loaded]
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum(changed, uploads.length))


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
    with pytest.raises(SumCheckError):  # swapped: the right uploads under headers of other rounds
        old = [replace(header, nonce=new_nonce()) for header in uploads.headers]
        uploads.verify(cloud.sum(loaded, uploads.length), headers=old)


@pytest.mark.he
def test_a_replayed_upload_is_caught(uploads, federation, cloud, loaded):
    """An upload of an earlier round in place of this round's, under this round's header."""
    earlier = replace(federation.context, round=federation.context.round - 1)
    header, vector = uploads.headers[0], uploads.vectors[0]
    checks = authenticate(federation.check_key, earlier, header.tag_input(), vector)
    old = cloud.load(uploads.cipher.encrypt(np.concatenate([vector, checks])), uploads.length)
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum([old, *loaded[1:]], uploads.length))


@pytest.mark.he
@pytest.mark.parametrize("size", [1.0, 1e-3, 60.0])
def test_a_shift_is_caught(uploads, cloud, loaded, profile, size):
    """The last one in units of the tolerance: 60 of them in one value of eight."""
    step = size if size < 2 else size * profile.tolerance(3)
    shifted = [cloud.shift(loaded[0][0], [complex(step, -step)] * 250), *loaded[0][1:]]
    with pytest.raises(SumCheckError):
        uploads.verify(cloud.sum([shifted, *loaded[1:]], uploads.length))


@pytest.mark.he
def test_separate_ciphertexts_of_payload_and_check_values_cannot_be_played_apart(federation, cipher, cloud):
    uploads = Round(federation, cipher, cipher.profile.values_per_ciphertext - 1)
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
def test_a_polynomial_that_separates_check_slots_from_payload_is_caught(federation, cipher, cloud, profile):
    """A keyless multiplication doubles one site's payload and leaves its check slots as they were."""
    uploads = Round(federation, cipher, 1)
    splitter = polynomial_slots(SPLITTER_STEP, SPLITTER if profile.complex_packing else REAL_SPLITTER)
    if profile.complex_packing:
        assert np.abs(splitter[:5] - [2, 1, 1, 1, 1]).max() < 1e-9
    else:
        assert np.abs(splitter[:10].real - [2, 2, *[1] * 8]).max() < 1e-6
    loaded = [cloud.load(payload, uploads.length) for payload in uploads.payloads]
    forged = cloud.sum([[cloud.times(loaded[0][0], splitter)], *loaded[1:]], uploads.length)
    honest = cipher.decrypt(cloud.sum(loaded, uploads.length), uploads.length)
    changed = cipher.decrypt(forged, uploads.length)
    # the attack does what it promises ...
    noise = 10_000 * profile.tolerance(3)  # of the multiplication
    assert np.abs(changed[2:] - honest[2:]).max() < noise
    assert np.abs(changed[:2] - honest[:2] - uploads.vectors[0]).max() < noise
    # ... and is found, by more than the noise that the multiplication adds
    with pytest.raises(SumCheckError):
        uploads.verify(forged, tolerance=noise)


def honest_sums(federation, cipher, cloud, *, sites: int, rounds: int) -> None:
    """Make real sums of small vectors; the first false alarm ends it.

    Every sum has its own context, nonces and vectors. Encrypting is what takes time, so that each sum reuses
    all uploads but one of the one before: its noise and its tags differ all the same.
    """
    size, rng, profile = 40, np.random.default_rng(sites), cipher.profile
    bound = min(8.0, 0.9 * (profile.headroom / sites - 0.6) / 1.5)
    key, length = federation.check_key, size + CHECK_SLOTS
    context = ProjectionContext(cipher.key_id, "plant", "run", sites)
    uploads, headers, vectors = [], [], []

    def upload() -> None:
        vector = rng.uniform(-bound, bound, size)
        header = federation.header("a").tag_input()
        checks = authenticate(key, context, header, vector)
        (ciphertext,) = cloud.load(cipher.encrypt(np.concatenate([vector, checks])), length)
        uploads.append(ciphertext), headers.append(header), vectors.append(vector)

    for _ in range(sites - 1):
        upload()
    total = cloud.add(uploads) if uploads else None
    for number in range(rounds):
        upload()
        total = cloud.add([total, uploads[-1]])
        total.save(cloud.file.path)
        payload = assemble_vector([cloud.file.read()], profile, length)
        values = cipher.decrypt(payload, length)
        assert np.abs(values[:size] - sum(vectors[number:])).max() < profile.tolerance(sites)
        verify_sum(key, context, headers[number:], values[:size], values[size:], profile.tolerance(sites))
        cloud.evaluator.sub_inplace(total, uploads[number])
        uploads[number] = None


@pytest.mark.he
@pytest.mark.parametrize("sites", [2, 10, 100])
def test_honest_sums_without_a_false_alarm(federation, cipher, cloud, sites):
    honest_sums(federation, cipher, cloud, sites=sites, rounds=30)


@pytest.mark.he
@pytest.mark.slow
@pytest.mark.parametrize("sites", [2, 10, 100])
def test_10000_honest_sums_without_a_false_alarm(federation, cipher, cloud, sites):
    honest_sums(federation, cipher, cloud, sites=sites, rounds=10_000)


@pytest.mark.slow
def test_no_public_key_of_a_thousand_raises_false_alarms(federation):
    """The noise of public encryption depends on the key and the slot; no key may be an unlucky one.

    Sums are simulated with the exact noise: the rounding errors of two polynomials, the second times a
    ternary secret, at six slots; 20 sums for each of 1,000 keys, at 1, 10 and 100 sites.
    """
    profile, rng = get_profile("default", "public"), np.random.default_rng(5)
    degree, worst = profile.poly_modulus_degree, 0.0
    powers = np.array([pow(3, j, 2 * degree) for j in range(6)])
    roots = np.exp(1j * np.pi * np.outer(powers, np.arange(degree)) / degree)
    for _ in range(1000):
        secret = roots @ rng.integers(-1, 2, degree)
        for sites in (1, 10, 100):
            rounding = rng.normal(0, np.sqrt(sites / 12), (2, 20, degree))
            noise = rounding[0] @ roots.T + (rounding[1] @ roots.T) * secret
            worst = max(worst, np.abs(noise.view(float)).max() / profile.scale / profile.tolerance(sites))
    assert worst < 0.6, worst


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


def test_a_shift_of_25_tolerances_passes_as_rarely_as_stated(federation):
    """One check value lets it pass in 3 % of the rounds, and there are eight of them: about 2^-40."""
    rng, tolerance, length = np.random.default_rng(1), DEFAULT.tolerance(10), 60
    spread = rng.normal(size=length)
    for shift in (spread, np.eye(length)[3], np.ones(length)):
        shift = shift * 25 * tolerance / np.sqrt(np.mean(shift**2))
        rounds = [replace(federation.context, round=number) for number in range(1000)]
        noise = rng.normal(0, DEFAULT.noise_std(10) * np.sqrt(2), (len(rounds), CHECK_SLOTS))
        found = noise + [project(federation.check_key, context, shift) for context in rounds]
        passes = np.mean(np.abs(found) <= tolerance)
        assert 0.01 < passes < 0.04
        assert -53 < 8 * np.log2(passes) < -37


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
