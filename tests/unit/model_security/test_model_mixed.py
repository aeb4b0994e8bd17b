"""Plain and encrypted payloads in one sum: the same sum, checked, and with check values that stay secret."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flep_fl.contracts.errors import CiphertextError, SumCheckError
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.authenticator import verify_sum
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.mixed import MixedAdder, TrustingModelCipher
from flep_fl.model_security.profiles import CHECK_SLOTS, Profile, get_profile

pytestmark = pytest.mark.he


def sizes(profile: Profile) -> list[int]:
    """Weights such that the check values begin, end or lie across the border of a ciphertext."""
    step = profile.values_per_ciphertext
    return [1, 50, step - 1 - CHECK_SLOTS, step - 5, step - 1, step + 40]


class Case:
    """Three sites' tagged vectors over a model of ``size`` weights."""

    def __init__(self, federation: Any, key: ModelKey, profile: Profile, size: int) -> None:
        self.federation, self.profile, self.length = federation, profile, size + 1 + CHECK_SLOTS
        self.context = key.public_context()
        self.cipher = CkksModelCipher(key, profile)
        self.trusting = TrustingModelCipher(self.cipher, profile)
        rng = np.random.default_rng(size)
        self.headers = {name: federation.header(name, key_id=key.key_id) for name in "abc"}
        self.vectors = {
            name: federation.tagged(header, np.append(rng.normal(size=size), 0.25 + 0.1 * len(name)))
            for name, header in self.headers.items()
        }

    def payload(self, name: str, trusting: str) -> bytes:
        return (self.trusting if name in trusting else self.cipher).encrypt(self.vectors[name])

    def total(self, trusting: str, adder: Any = None) -> np.ndarray:
        adder = adder or MixedAdder(self.context, self.profile, self.length)
        for name in "abc":
            adder.add(self.payload(name, trusting))
        assert adder.count == 3
        return self.cipher.decrypt(adder.result(), self.length)

    def verify(self, values: np.ndarray) -> None:
        verify_sum(
            self.federation.check_key, self.federation.context,
            [header.tag_input() for header in self.headers.values()],
            values[:-CHECK_SLOTS], values[-CHECK_SLOTS:], self.profile.tolerance(3),
        )  # fmt: skip


@pytest.fixture
def make(federation: Any, key: ModelKey, profile: Profile) -> Any:
    return lambda size=50: Case(federation, key, profile, size)


@pytest.mark.parametrize("index", range(6))
def test_the_sum_is_that_of_encrypted_payloads(make: Any, profile: Profile, index: int) -> None:
    case = make(sizes(profile)[index])
    encrypted = case.total("", KeylessAdder(case.context, profile, case.length))
    for trusting in ("", "a", "ac", "abc"):
        values = case.total(trusting)
        assert np.abs(values - encrypted).max() <= profile.tolerance(3)
        case.verify(values)


def test_any_order_gives_the_sum(make: Any) -> None:
    case = make()
    expected = sum(case.vectors.values())
    for order in ("abc", "bac", "bca"):
        adder = MixedAdder(case.context, case.profile, case.length)
        for name in order:
            adder.add(case.payload(name, "a"))
        assert np.abs(case.cipher.decrypt(adder.result(), case.length) - expected).max() < 1e-4


def alter(payload: bytes, change: Any) -> bytes:
    """Play the cloud: change the plain values of a trusting site's payload."""
    count = int.from_bytes(payload[8:16], "big")
    values = np.frombuffer(payload, "<f8", count, 16).copy()
    change(values)
    return payload[:16] + values.tobytes() + payload[16 + 8 * count :]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.__setitem__(3, v[3] + 1e-2),
        lambda v: v.__setitem__(-1, v[-1] * 2),
        lambda v: v.__imul__(2),
        lambda v: v.__imul__(-1),
        lambda v: v.__setitem__(slice(0, 2), v[1::-1].copy()),
    ],
    ids=["shift", "share", "double", "negative", "swap"],
)
@pytest.mark.parametrize("trusting", ["a", "abc"])
def test_a_cloud_that_alters_a_plain_vector_is_caught(make: Any, change: Any, trusting: str) -> None:
    case = make()
    adder = MixedAdder(case.context, case.profile, case.length)
    adder.add(alter(case.payload("a", trusting), change))
    for name in "bc":
        adder.add(case.payload(name, trusting))
    with pytest.raises(SumCheckError):
        case.verify(case.cipher.decrypt(adder.result(), case.length))


@pytest.mark.parametrize("trusting", ["a", "abc"])
def test_a_cloud_that_drops_or_repeats_a_plain_vector_is_caught(make: Any, trusting: str) -> None:
    case = make()
    for names in ("bc", "aabc"):
        adder = MixedAdder(case.context, case.profile, case.length)
        for name in names:
            adder.add(case.payload(name, trusting))
        with pytest.raises(SumCheckError):
            case.verify(case.cipher.decrypt(adder.result(), case.length))


def test_the_check_values_cannot_be_read(make: Any) -> None:
    case = make()
    payload = case.payload("a", "a")
    vector = case.vectors["a"]
    assert vector[:-CHECK_SLOTS].astype("<f8").tobytes() in payload
    for value in vector[-CHECK_SLOTS:]:
        assert value.astype("<f8").tobytes() not in payload
        assert value.astype("<f4").tobytes() not in payload
    # What is not plain is encrypted with fresh randomness: twice the same vector, nothing in common.
    plain = 16 + 8 * (vector.size - CHECK_SLOTS)
    again = case.payload("a", "a")
    assert again[:plain] == payload[:plain]
    ours, other = payload[plain + 64 :], again[plain + 64 :]
    size = min(len(ours), len(other))
    same = np.frombuffer(ours[:size], np.uint8) == np.frombuffer(other[:size], np.uint8)
    assert same.mean() < 0.1


def test_a_tail_without_encryption_is_refused(make: Any, profile: Profile) -> None:
    """A site must not be led to send its tags in the clear: only ciphertexts pass the structural check."""
    case = make()
    payload = case.payload("a", "a")
    plain = 16 + 8 * (case.length - CHECK_SLOTS)
    size = int.from_bytes(payload[plain : plain + 8], "big")
    bare = payload[: plain + 8] + bytes(size) + payload[plain + 8 + size :]
    with pytest.raises(CiphertextError):
        MixedAdder(case.context, profile, case.length).add(bare)


def test_a_zero_of_half_the_size_is_refused_under_a_public_key(
    make: Any, key: ModelKey, profile: Profile
) -> None:
    """Its second half would be expanded from a seed, which no one without the model key can have done."""
    if profile.seeded_uploads or not profile.packed:
        pytest.skip("half the size is the rule, or there is none")
    case = make()
    secret = get_profile(profile.name, "symmetric")
    seeded = TrustingModelCipher(CkksModelCipher(key, secret), secret).encrypt(case.vectors["a"])
    plain = 16 + 8 * (case.length - CHECK_SLOTS)

    def cut(payload: bytes) -> int:
        return plain + 8 + int.from_bytes(payload[plain : plain + 8], "big")

    good = case.payload("a", "a")
    MixedAdder(case.context, profile, case.length).add(good)
    with pytest.raises(CiphertextError, match="half-size"):
        MixedAdder(case.context, profile, case.length).add(good[: cut(good)] + seeded[cut(seeded) :])


def test_a_bad_payload_leaves_the_sum_as_it_was(make: Any, profile: Profile) -> None:
    case = make()
    adder = MixedAdder(case.context, profile, case.length)
    adder.add(case.payload("a", "a"))
    good = case.payload("b", "b")
    start = 16 + 8 * (case.length - CHECK_SLOTS)
    bad = [
        good[:-1], good + b"\0", good[:8], good[:40], b"", b"FLEPMX1\n", good[:16] + good[24:],
        alter(good, lambda v: v.__setitem__(0, np.nan)), alter(good, lambda v: v.__setitem__(0, np.inf)),
        alter(good, lambda v: v.__setitem__(0, 1e30)), good[:start] + b"\xff" * 8 + good[start + 8 :],
        good[:start] + bytes(8) + good[start + 8 :], good[:8] + bytes(8) + good[16:],
        good[: start + 16] + b"\xff" * 15 + good[start + 31 :],  # coefficients of the tail, not reduced
    ]  # fmt: skip
    for payload in bad:
        with pytest.raises(CiphertextError):
            adder.add(payload)
    assert adder.count == 1
    for name in "bc":
        adder.add(case.payload(name, "b"))
    case.verify(case.cipher.decrypt(adder.result(), case.length))


def test_there_is_no_sum_of_nothing(make: Any, profile: Profile) -> None:
    case = make()
    with pytest.raises(CiphertextError, match="no payload"):
        MixedAdder(case.context, profile, case.length).result()
