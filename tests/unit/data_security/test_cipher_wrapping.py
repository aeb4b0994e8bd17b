from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, ImageKeyError, WrongImageKeyError
from flep_fl.data_security.wrapping import unwrap_bundle, wrap_bundle


@pytest.fixture
def analyst() -> X25519PrivateKey:
    return X25519PrivateKey.generate()


def test_round_trip_with_raw_keys_and_objects(analyst: X25519PrivateKey) -> None:
    raw_public, raw_private = analyst.public_key().public_bytes_raw(), analyst.private_bytes_raw()
    wrapped = wrap_bundle(b"bundle", raw_public, context=b"federation/a")
    assert b"bundle" not in wrapped
    assert unwrap_bundle(wrapped, raw_private, context=b"federation/a") == b"bundle"
    wrapped = wrap_bundle(b"bundle", analyst.public_key(), context=b"")
    assert unwrap_bundle(wrapped, analyst, context=b"") == b"bundle"


def test_wrapping_is_randomised(analyst: X25519PrivateKey) -> None:
    public = analyst.public_key()
    assert wrap_bundle(b"x", public, context=b"") != wrap_bundle(b"x", public, context=b"")


def test_somebody_elses_bundle_is_named(analyst: X25519PrivateKey) -> None:
    wrapped = wrap_bundle(b"bundle", analyst.public_key(), context=b"")
    with pytest.raises(WrongImageKeyError, match="somebody else"):
        unwrap_bundle(wrapped, X25519PrivateKey.generate(), context=b"")


def test_other_context_is_refused(analyst: X25519PrivateKey) -> None:
    wrapped = wrap_bundle(b"bundle", analyst.public_key(), context=b"a")
    with pytest.raises(EnvelopeError):
        unwrap_bundle(wrapped, analyst, context=b"b")


def test_every_flipped_or_missing_byte_is_refused(analyst: X25519PrivateKey) -> None:
    wrapped = wrap_bundle(b"bundle", analyst.public_key(), context=b"")
    for position in range(len(wrapped)):
        altered = bytearray(wrapped)
        altered[position] ^= 0x01
        with pytest.raises(EnvelopeError):
            unwrap_bundle(bytes(altered), analyst, context=b"")
        with pytest.raises(EnvelopeError):
            unwrap_bundle(wrapped[:position], analyst, context=b"")
    with pytest.raises(EnvelopeVersionError):
        unwrap_bundle(wrapped[:4] + b"\x09" + wrapped[5:], analyst, context=b"")


def test_unusable_keys_are_named(analyst: X25519PrivateKey) -> None:
    wrapped = wrap_bundle(b"bundle", analyst.public_key(), context=b"")
    with pytest.raises(ImageKeyError):
        wrap_bundle(b"bundle", bytes(31), context=b"")
    with pytest.raises(ImageKeyError):  # a point of small order
        wrap_bundle(b"bundle", bytes(32), context=b"")
    with pytest.raises(ImageKeyError):
        unwrap_bundle(wrapped, b"short", context=b"")
