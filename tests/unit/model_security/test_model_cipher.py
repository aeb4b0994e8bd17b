from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tenseal as ts

from flep_fl.contracts.errors import (
    CiphertextError,
    ContributeOnlyError,
    ModelKeyError,
    WeightRangeError,
)
from flep_fl.model_security import _scratch
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.cipher import CkksModelCipher, PublicModelCipher
from flep_fl.model_security.keyring import ModelKey, PublicKey
from flep_fl.model_security.profiles import PROFILES, TAG_RANGE, get_profile

pytestmark = pytest.mark.he


@pytest.mark.parametrize("length", [1, 2, 9, 2047, 2048, 2049, 4096, 4097, 9001])
def test_round_trip(cipher, profile, length):
    vector = np.random.default_rng(length).uniform(-profile.default_bound, profile.default_bound, length)
    payload = cipher.encrypt(vector)
    restored = cipher.decrypt(payload, length)
    assert restored.shape == (length,) and restored.dtype == np.float64
    assert np.abs(restored - vector).max() < profile.tolerance(1)
    assert cipher.encrypt(vector) != payload  # fresh randomness


# bytes a weight: log2(q) / 8 up, twice that down, save for the last ciphertext, which is not full
FLOOR = {"default": 7.5, "compact": 5.0, "classic": 30.0}


@pytest.mark.parametrize("length", [100_009, 120_009])
def test_bytes_and_noise_are_those_of_the_arithmetic(cipher, key, profile, length):
    vectors = np.random.default_rng(0).normal(0, 0.5, (3, length))
    adder = KeylessAdder(key.public_context(), profile, length)
    payloads = [cipher.encrypt(vector) for vector in vectors]
    for payload in payloads:
        adder.add(payload)
    total = adder.result()
    full, room = FLOOR[profile.name], 1.03 if profile.packed else 1.12
    halves = 1 if profile.seeded_uploads or not profile.packed else 2
    assert len(payloads[0]) <= room * halves * full * length
    assert len(total) <= room * (2 if profile.packed else 1) * full * length
    error = cipher.decrypt(total, length) - vectors.sum(axis=0)
    assert np.abs(error).max() < profile.expected_error(3)
    # the model behind the tolerance; with the public key it is that of the average key
    assert error.std() == pytest.approx(profile.noise_std(3), rel=0.05)


def test_plain_tenseal_reads_the_classic_wire_format(ciphers, model_keys):
    cipher, profile = ciphers["classic"], PROFILES["classic"]
    payload = cipher.encrypt(np.full(3000, 0.25))
    context = ts.context_from(model_keys["classic"].public_context())
    doubled = ts.ckks_vector_from(context, payload)
    doubled.add_(ts.ckks_vector_from(context, cipher.encrypt(np.full(3000, 0.5))))
    total = cipher.decrypt(doubled.serialize(), 3000)
    assert np.abs(total - 0.75).max() < profile.tolerance(2)


def test_values_far_apart_in_one_ciphertext_keep_their_precision(cipher, profile):
    vector = np.concatenate([np.full(1000, 0.001), np.full(8, 8 * TAG_RANGE), np.full(1000, -0.002)])
    error = np.abs(cipher.decrypt(cipher.encrypt(vector), vector.size) - vector)
    assert error.max() < 2 * profile.tolerance(1)


@pytest.mark.parametrize("bad", [[], [np.nan], [np.inf, 0.0], [[1.0, 2.0]]])
def test_vectors_that_cannot_be_encrypted(cipher, bad):
    with pytest.raises(WeightRangeError):
        cipher.encrypt(np.array(bad))


def test_what_would_wrap_is_not_encrypted(cipher, profile):
    full = np.full(profile.slots, profile.headroom / 2)
    step = 2 if profile.complex_packing else 1
    vector = np.zeros(profile.values_per_ciphertext)
    vector[::step] = full * 0.999  # real values: the constant polynomial just below half the headroom
    assert np.allclose(cipher.decrypt(cipher.encrypt(vector), vector.size), vector, rtol=1e-6, atol=1e-3)
    with pytest.raises(WeightRangeError, match="too large"):
        cipher.encrypt(vector * 1.01)


def test_another_key_is_noticed(cipher, profile):
    other = CkksModelCipher(ModelKey.generate(profile), profile)
    with pytest.raises(ModelKeyError, match="another model key"):
        other.decrypt(cipher.encrypt(np.ones(3000)), 3000)


def test_another_length_or_profile_is_refused(ciphers):
    payload = ciphers["default"].encrypt(np.ones(3000))
    with pytest.raises(CiphertextError):
        ciphers["default"].decrypt(payload, 5000)
    for length in (1, 2998, 3001, 5000):
        with pytest.raises(CiphertextError):
            ciphers["classic"].decrypt(ciphers["classic"].encrypt(np.ones(3000)), length)
    with pytest.raises(CiphertextError):
        ciphers["classic"].decrypt(payload, 3000)
    with pytest.raises(CiphertextError):
        ciphers["default"].decrypt(ciphers["classic"].encrypt(np.ones(3000)), 3000)
    with pytest.raises(CiphertextError):
        ciphers["default"].decrypt(ciphers["compact"].encrypt(np.ones(3000)), 3000)


def test_the_public_key_encrypts_and_opens_nothing(cipher, key, profile):
    public = PublicKey.from_bytes(key.public_key(profile).to_bytes())
    contributor = PublicModelCipher(public, profile)
    assert contributor.key_id == cipher.key_id == public.key_id
    vector = np.random.default_rng(1).normal(size=5000)
    payload = contributor.encrypt(vector)
    assert np.abs(cipher.decrypt(payload, 5000) - vector).max() < get_profile(
        profile.name, "public"
    ).tolerance(1)
    assert contributor.encrypt(vector) != payload
    with pytest.raises(ContributeOnlyError):
        contributor.decrypt(payload, 5000)


def test_a_damaged_or_foreign_public_key_is_refused(model_keys):
    data = model_keys["default"].public_key(PROFILES["default"]).to_bytes()
    for bad in (b"", data[:-1], data[:30] + b"\0" + data[31:], data[:1000] + b"\0\0" + data[1002:]):
        with pytest.raises(ModelKeyError):
            PublicKey.from_bytes(bad)
    with pytest.raises(ModelKeyError, match="compact"):
        PublicModelCipher(PublicKey.from_bytes(data), PROFILES["compact"])
    with pytest.raises(ModelKeyError, match="not made for"):
        model_keys["default"].public_key(PROFILES["compact"])


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_noise_of_public_encryption_differs_between_slots_as_the_model_says(model_keys, name):
    """The noise of a slot is Gaussian times the key's value there: known keys, exact prediction."""
    profile = get_profile(name, "public")
    cipher = CkksModelCipher(model_keys[name], profile)
    length = 60 * profile.values_per_ciphertext
    noise = cipher.decrypt(cipher.encrypt(np.zeros(length)), length).reshape(60, -1)
    if profile.complex_packing:
        deviation = np.sqrt(
            (noise.view(np.complex128).real ** 2 + noise.view(np.complex128).imag ** 2).mean(0) / 2
        )
    else:
        deviation = np.sqrt((noise**2).mean(0))
    unit = profile.noise_std(1)
    assert np.sqrt((deviation**2).mean()) == pytest.approx(unit, rel=0.06)
    # exponential: exp(-4) = 1.8 % of the slots have more than twice the deviation; none if it were flat
    assert 0.005 < (deviation > 2 * unit).mean() < 0.05
    assert deviation.max() > 2.3 * unit


def test_nothing_is_printed(cipher, key, profile, capfd):
    adder = KeylessAdder(key.public_context(), profile, 9000)
    adder.add(cipher.encrypt(np.ones(9000)))
    adder.add(cipher.encrypt(np.ones(9000)))
    cipher.decrypt(adder.result(), 9000)
    assert capfd.readouterr() == ("", "")


def test_the_scratch_file_works_without_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with _scratch.ScratchFile() as file:
        assert Path(file.path).stat().st_mode & 0o777 == 0o600
        file.write(b"longer")
        file.write(b"short")
        assert file.read() == b"short"
    assert not Path(file.path).exists()
