"""Captures: what a device signs, and what is refused before a signature is looked at."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from flep_fl.contracts.errors import CaptureError
from flep_fl.data_owner.devices import (
    MAX_DESCRIPTION_BYTES,
    Description,
    decode_header,
    digest_of,
    encode_header,
    sign_capture,
    verify_capture,
)

CAPTURE = Description(
    device="cam-1",
    sequence=7,
    time=1_790_000_000_000_000,
    sha256=digest_of(b"pixels"),
    format="raw-uint8",
    shape=(2, 3),
    dataset="plates",
    label="scratch",
    split="train",
)


def test_a_description_survives_the_way_there_and_back() -> None:
    for capture in (CAPTURE, replace(CAPTURE, format="png", shape=(), label=None, split=None)):
        assert Description.from_bytes(capture.to_bytes()) == capture


def test_the_description_is_pinned() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    assert CAPTURE.to_bytes() == (
        b'{"v":1,"device":"cam-1","sequence":7,"time":1790000000000000,"sha256":"'
        + digest_of(b"pixels").encode()
        + b'","format":"raw-uint8","shape":[2,3],"dataset":"plates","label":"scratch","split":"train"}'
    )
    assert sign_capture(key, CAPTURE.to_bytes()) == key.sign(
        b"flep capture, version 1\0" + CAPTURE.to_bytes()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cam-2"},
        {"sequence": 8},
        {"time": CAPTURE.time + 1},
        {"sha256": digest_of(b"other")},
        {"format": "raw-uint16"},
        {"shape": (3, 2)},
        {"dataset": "others"},
        {"label": "fine"},
        {"split": "test"},
    ],
)
def test_every_field_is_signed(change: dict[str, object]) -> None:
    key = Ed25519PrivateKey.generate()
    signature = sign_capture(key, CAPTURE.to_bytes())
    assert verify_capture(key.public_key(), CAPTURE.to_bytes(), signature)
    assert not verify_capture(key.public_key(), replace(CAPTURE, **change).to_bytes(), signature)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 2),
        ("v", True),
        ("device", "../x"),
        ("device", "a" * 65),
        ("device", "cam\n"),
        ("sequence", 0),
        ("sequence", -1),
        ("sequence", 2**53),
        ("sequence", 1.0),
        ("sequence", True),
        ("time", -1),
        ("time", "now"),
        ("sha256", "AB" * 32),
        ("sha256", "ab" * 31),
        ("format", "jpeg"),
        ("format", ["png"]),
        ("shape", []),
        ("shape", [2, 3, 4, 5]),
        ("shape", [0, 3]),
        ("shape", "23"),
        ("dataset", ""),
        ("label", ""),
        ("label", "x" * 65),
        ("split", "validation"),
    ],
)
def test_fields_out_of_range_are_named(field: str, value: object) -> None:
    fields = json.loads(CAPTURE.to_bytes()) | {field: value}
    with pytest.raises(CaptureError, match="wrong"):
        Description.from_bytes(json.dumps(fields).encode())


def test_more_fields_and_longer_descriptions_are_refused() -> None:
    fields = json.loads(CAPTURE.to_bytes())
    with pytest.raises(CaptureError, match="wrong fields"):
        Description.from_bytes(json.dumps(fields | {"extra": 1}).encode())
    with pytest.raises(CaptureError, match="too long"):
        Description.from_bytes(CAPTURE.to_bytes() + b" " * MAX_DESCRIPTION_BYTES)


def test_png_says_its_own_shape() -> None:
    fields = json.loads(CAPTURE.to_bytes()) | {"format": "png"}
    with pytest.raises(CaptureError, match="shape"):
        Description.from_bytes(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"v":1}', b"[" * 1000, b"\xff\xfe", b"x" * (MAX_DESCRIPTION_BYTES + 1)],
)
def test_what_is_no_description_is_refused(data: bytes) -> None:
    with pytest.raises(CaptureError):
        Description.from_bytes(data)


@given(st.binary(max_size=200))
def test_headers_have_one_spelling(data: bytes) -> None:
    text = encode_header(data).encode()
    assert decode_header(text, limit=200) == data


@pytest.mark.parametrize("text", [b"YQ==", b"YR", b"Y Q", b"Y\nQ", b"+w", b"a", b"YWFhYQ"])
def test_other_spellings_are_refused(text: bytes) -> None:
    with pytest.raises(CaptureError):
        decode_header(text, limit=3)


@given(st.binary(max_size=1100))
def test_no_bytes_end_in_another_error(data: bytes) -> None:
    with pytest.raises(CaptureError):
        Description.from_bytes(data)
