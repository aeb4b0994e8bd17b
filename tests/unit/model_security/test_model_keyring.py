from __future__ import annotations

import copy
import pickle

import pytest
import tenseal as ts

from flep_fl.contracts.errors import ModelKeyError
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import CheckKey, ModelKey
from flep_fl.model_security.profiles import PROFILES, Profile

pytestmark = pytest.mark.he


def test_a_key_survives_its_bytes_and_its_id_is_its_own(key):
    again = ModelKey.from_bytes(key.to_bytes())
    assert again.key_id == key.key_id and len(bytes.fromhex(key.key_id)) == 16
    assert again.to_bytes() == key.to_bytes()
    assert ModelKey.generate(PROFILES["default"]).key_id != key.key_id


def test_the_public_context_holds_no_key(key):
    public = key.public_context()
    assert len(public) < 100
    context = ts.context_from(public)
    assert not context.is_private()
    with pytest.raises(ModelKeyError, match="keyless"):
        ModelKey(public)


def test_reprs_show_no_secret(key):
    secret = CheckKey.generate()
    assert repr(secret) == "CheckKey(<redacted>)"
    assert repr(key) == f"ModelKey(key_id={key.key_id!r}, secret=<redacted>)"
    assert secret.to_bytes().hex() not in repr(secret)
    assert "secret_key" not in repr(key.parts)


@pytest.mark.parametrize("clone", [pickle.dumps, copy.copy])
def test_keys_are_not_pickled_by_accident(key, clone):
    for secret in (key, CheckKey.generate()):
        with pytest.raises(TypeError, match="write_secret"):
            clone(secret)


def test_damaged_keys_are_named_errors(key):
    data = key.to_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for bad in (b"", b"x" * 100, data[:-1], data[:30], data + b"\0", bytes(flipped)):
        with pytest.raises(ModelKeyError):
            ModelKey.from_bytes(bad)
    for bad in (b"", bytes(31), bytes(33)):
        with pytest.raises(ModelKeyError, match="32 bytes"):
            CheckKey.from_bytes(bad)


def test_a_key_for_other_parameters_is_refused(key):
    other = Profile("other", 8192, (60, 40, 60), 40, complex_packing=True, seeded=True)
    with pytest.raises(ModelKeyError, match=r"ckks\.profile=other"):
        CkksModelCipher(key, other)


def test_contexts_with_unneeded_keys_are_refused():
    context = ts.context(ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[60, 49])
    context.global_scale = 2.0**40
    with pytest.raises(ModelKeyError):
        ModelKey(context.serialize(save_secret_key=True))


def test_derived_bytes_depend_on_the_purpose():
    key = CheckKey.from_bytes(bytes(range(32)))
    assert key.derive(b"one", 16) != key.derive(b"two", 16)
    assert CheckKey.from_bytes(key.to_bytes()).derive(b"one", 16) == key.derive(b"one", 16)
