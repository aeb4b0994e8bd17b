from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tenseal as ts

from flep_fl.contracts.errors import CiphertextError, ModelKeyError, WeightRangeError
from flep_fl.model_security import _scratch
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import PROFILES

pytestmark = pytest.mark.he


@pytest.mark.parametrize("length", [1, 2, 9, 2047, 2048, 2049, 4096, 4097, 9001])
def test_round_trip(cipher, profile, length):
    vector = np.random.default_rng(length).uniform(-64, 64, length)
    payload = cipher.encrypt(vector)
    restored = cipher.decrypt(payload, length)
    assert restored.shape == (length,) and restored.dtype == np.float64
    assert np.abs(restored - vector).max() < profile.tolerance(1)
    assert cipher.encrypt(vector) != payload  # fresh randomness


@pytest.mark.parametrize(("length", "up", "down"), [(100_009, 8.3, 16.6), (120_009, 8.3, 16.6)])
def test_bytes_per_weight_of_the_default_profile(model_keys, ciphers, length, up, down):
    profile, cipher = PROFILES["default"], ciphers["default"]
    vectors = np.random.default_rng(0).normal(0, 0.5, (3, length))
    adder = KeylessAdder(model_keys["default"].public_context(), profile, length)
    payloads = [cipher.encrypt(vector) for vector in vectors]
    for payload in payloads:
        adder.add(payload)
    total = adder.result()
    assert len(payloads[0]) <= up * length and len(total) <= down * length
    error = cipher.decrypt(total, length) - vectors.sum(axis=0)
    assert np.abs(error).max() < profile.tolerance(3)
    assert error.std() == pytest.approx(profile.noise_std(3), rel=0.05)  # the model behind the tolerance


def test_plain_tenseal_reads_the_wire_format(cipher, key, profile):
    payload = cipher.encrypt(np.full(3000, 0.25))
    context = ts.context_from(key.public_context())
    doubled = ts.ckks_vector_from(context, payload)
    doubled.add_(ts.ckks_vector_from(context, cipher.encrypt(np.full(3000, 0.5))))
    total = cipher.decrypt(doubled.serialize(), 3000)
    assert np.abs(total - 0.75).max() < profile.tolerance(2)


def test_values_far_apart_in_one_ciphertext_keep_their_precision(cipher, profile):
    vector = np.concatenate([np.full(1000, 0.001), np.full(8, 1e5), np.full(1000, -0.002)])
    error = np.abs(cipher.decrypt(cipher.encrypt(vector), vector.size) - vector)
    assert error.max() < 2 * profile.tolerance(1)


@pytest.mark.parametrize("bad", [[], [np.nan], [np.inf, 0.0], [2.0**19 + 1], [[1.0, 2.0]]])
def test_vectors_that_cannot_be_encrypted(cipher, bad):
    with pytest.raises(WeightRangeError):
        cipher.encrypt(np.array(bad))


def test_another_key_is_noticed(cipher, profile):
    other = CkksModelCipher(ModelKey.generate(profile), profile)
    with pytest.raises(ModelKeyError, match="another model key"):
        other.decrypt(cipher.encrypt(np.ones(3000)), 3000)


def test_another_length_or_profile_is_refused(ciphers):
    payload = ciphers["default"].encrypt(np.ones(3000))
    for length in (1, 2998, 3001, 5000):
        with pytest.raises(CiphertextError):
            ciphers["default"].decrypt(payload, length)
    with pytest.raises(CiphertextError):
        ciphers["classic"].decrypt(payload, 3000)
    with pytest.raises(CiphertextError):
        ciphers["default"].decrypt(ciphers["classic"].encrypt(np.ones(3000)), 3000)


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
