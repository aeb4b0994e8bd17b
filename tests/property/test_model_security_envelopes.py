from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from flep_fl.contracts.errors import UpdateError
from flep_fl.model_security.seal import (
    Expectation,
    UpdateHeader,
    open_control,
    open_update,
    seal_control,
    seal_update,
)

KEY = Ed25519PrivateKey.generate()
NAME = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
NUMBER = st.integers(0, 1 << 31)


def hexadecimal(digits: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=digits // 2, max_size=digits // 2).map(bytes.hex)


HEADER = st.builds(
    UpdateHeader,
    federation=NAME, run=NAME, round=NUMBER, attempt=st.integers(1, 1 << 31), sender=NAME,
    nonce=hexadecimal(32),
    previous=st.one_of(st.just(""), hexadecimal(64)), key_id=st.one_of(st.just("open"), hexadecimal(32)),
    layout=hexadecimal(64), profile=hexadecimal(64), config=hexadecimal(64),
    mode=st.sampled_from(["ckks", "open"]), payload_sha256=st.just(""), payload_bytes=st.just(0),
)  # fmt: skip


def expectation(header: UpdateHeader) -> Expectation:
    names = (
        "federation",
        "run",
        "round",
        "key_id",
        "layout",
        "profile",
        "config",
        "mode",
        "attempt",
        "previous",
    )
    return Expectation(**{name: getattr(header, name) for name in names})


@settings(max_examples=25, deadline=None)
@given(header=HEADER, payload=st.binary(max_size=300))
def test_what_was_sealed_opens(header, payload):
    update = open_update(
        seal_update(header, payload, KEY),
        expected=expectation(header),
        public_keys={header.sender: KEY.public_key()},
    )
    assert update.payload == payload
    assert replace(update.header, payload_sha256="", payload_bytes=0) == header


@settings(max_examples=25, deadline=None)
@given(header=HEADER, payload=st.binary(max_size=100), data=st.data())
def test_no_byte_can_be_changed_removed_or_added(header, payload, data):
    blob = seal_update(header, payload, KEY)
    position = data.draw(st.integers(0, len(blob) - 1))
    flipped = (
        blob[:position] + bytes([blob[position] ^ data.draw(st.integers(1, 255))]) + blob[position + 1 :]
    )
    keys = {header.sender: KEY.public_key()}
    for bad in (flipped, blob[:position], blob[:position] + b"\0" + blob[position:] + b"\0"):
        with pytest.raises(UpdateError):
            open_update(bad, expected=expectation(header), public_keys=keys)


@settings(max_examples=25, deadline=None)
@given(blob=st.binary(max_size=400), marker=st.sampled_from([b"", b"FLEPUP1\n", b"FLEPUP1\n\0\0\0\x20"]))
def test_noise_is_an_update_error(blob, marker):
    header = UpdateHeader("f", "r", 1, 1, "a", "0" * 32, "", "open", *["0" * 64] * 3, "open")
    with pytest.raises(UpdateError):
        open_update(marker + blob, expected=expectation(header), public_keys={"a": KEY.public_key()})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(message=st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_control_messages_round_trip(message):
    assert open_control(seal_control(message, KEY), KEY.public_key()) == message
