"""What an analyst reads of an owner's answers: one form of each is accepted, the rest is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flep_fl.contracts import owner_api
from flep_fl.contracts.archive import ArchiveDescription, ArchiveHead
from flep_fl.contracts.errors import ArchiveError, FetchError, GrantError
from flep_fl.contracts.grants import MAX_BYTES, MAX_PARTS, GrantDocument
from flep_fl.contracts.owner_api import OwnerHello, read_error, read_grants, read_opened, unpack_records
from flep_fl.contracts.owner_records import Analyst, Grant, OpenedGrant
from flep_fl.contracts.records import ArchiveManifest, SealedRecord

DEEP = b"[" * 100_000
GRANT = GrantDocument(
    grant_id="1" * 32,
    release_id="2" * 32,
    owner="3" * 64,
    analyst="ann",
    analyst_verify_key="4" * 64,
    analyst_encryption_key="5" * 64,
    dataset="cells",
    share_index=0,
    share_parts=1,
    issued_at=1,
    not_after=2,
    epoch=1,
    key_id="6" * 32,
    bundle_sha256="7" * 64,
    manifest_sha256="8" * 64,
    release_number=1,
)
HELLO = OwnerHello(b"k" * 32, 5).to_bytes()
GRANTS = owner_api.grants_body([Grant("1" * 32, Analyst("ann", bytes(32), bytes(32)), "cells", (0, 1), 2, 1)])
OPENED = owner_api.opened_body(
    OpenedGrant(
        release_id="2" * 32,
        grant=b"g",
        grant_signature=b"s",
        manifest=b"m",
        manifest_signature=b"t",
        bundle=b"b",
    )
)


def changed(data: bytes, **change: object) -> bytes:
    fields: dict[str, Any] = json.loads(data)
    return json.dumps({name: value for name, value in (fields | change).items() if value != "gone"}).encode()


def listed(**change: object) -> bytes:
    return changed(GRANTS, grants=[json.loads(GRANTS)["grants"][0] | change])


def test_what_the_owner_writes_is_read() -> None:
    assert OwnerHello.from_bytes(HELLO) == OwnerHello(b"k" * 32, 5)
    assert [(one.dataset, one.not_after) for one in read_grants(GRANTS)] == [("cells", 2)]
    assert read_opened(OPENED).manifest_signature == b"t"
    assert GrantDocument.from_bytes(GRANT.to_bytes()) == GRANT
    assert read_error(owner_api.error_body("busy", "later")) == ("busy", "later")


@pytest.mark.parametrize(
    ("read", "data"),
    [
        *((read, data) for read in (OwnerHello.from_bytes, read_grants, read_opened) for data in (b"", DEEP)),
        (OwnerHello.from_bytes, b"[]"),
        (OwnerHello.from_bytes, changed(HELLO, time="5")),
        (OwnerHello.from_bytes, changed(HELLO, time=True)),
        (OwnerHello.from_bytes, changed(HELLO, verify_key="00")),
        (OwnerHello.from_bytes, changed(HELLO, verify_key="AB" * 32)),
        (OwnerHello.from_bytes, changed(HELLO, verify_key="zz" * 32)),
        (read_grants, changed(GRANTS, grants={})),
        (read_grants, changed(GRANTS, grants=["x"])),
        (read_grants, listed(grant_id="1" * 30)),
        (read_grants, listed(grant_id="../../../../../../../../../../..")),
        (read_grants, listed(not_after=2.5)),
        (read_grants, listed(dataset=None)),
        (read_opened, changed(OPENED, bundle="gone")),
        (read_opened, changed(OPENED, bundle=7)),
        (read_opened, changed(OPENED, bundle="no base64!")),
        (read_opened, changed(OPENED, release_id="2/../" + "2" * 27)),
    ],
)
def test_another_answer_is_named(read: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(FetchError, match="not of this release's format"):
        read(data)


def test_records_that_are_cut_off_are_named() -> None:
    records = [SealedRecord("ab" * 16, b"envelope", b"label"), SealedRecord("cd" * 16, b"", b"x")]
    data = owner_api.pack_records(records)
    assert list(unpack_records(data)) == records
    first = len(owner_api.pack_records(records[:1]))
    for end in range(1, len(data)):
        if end == first:
            assert list(unpack_records(data[:end])) == records[:1]
            continue
        with pytest.raises(FetchError, match="not of this release's format"):
            list(unpack_records(data[:end]))


@pytest.mark.parametrize("data", [b"", DEEP, b"[]", b'{"code": 1, "reason": "x"}', b'{"code": "x"}'])
def test_an_error_that_makes_no_sense_is_an_error_without_a_reason(data: bytes) -> None:
    assert read_error(data) == ("error", "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        DEEP,
        b"[]",
        b"{}",
        GRANT.to_bytes() + b" ",
        GRANT.to_bytes().replace(b'"epoch":1', b'"epoch":1.0'),
        GRANT.to_bytes().replace(b'"epoch":1', b'"epoch":true'),
        GRANT.to_bytes().replace(b'"epoch":1', b'"epoch":1,"more":1'),
        GRANT.to_bytes().replace(b'"epoch":1,', b""),
        replace(GRANT, share_index=1).to_bytes(),
        replace(GRANT, share_index=-1).to_bytes(),
        replace(GRANT, share_parts=MAX_PARTS + 1).to_bytes(),
        replace(GRANT, dataset="x" * MAX_BYTES).to_bytes(),
    ],
)
def test_a_damaged_grant_is_named(data: bytes) -> None:
    with pytest.raises(GrantError, match="damaged"):
        GrantDocument.from_bytes(data)


def test_a_grant_of_another_version_is_named() -> None:
    with pytest.raises(GrantError, match="format that this release does not read"):
        GrantDocument.from_bytes(GRANT.to_bytes().replace(b'"version":1', b'"version":2'))


def test_a_manifest_of_endless_depth_is_named() -> None:
    head = ArchiveHead(ArchiveManifest("a", "cells", "6" * 32, 1, 1, 1), 10, "7" * 64, "8" * 64)
    assert ArchiveHead.from_bytes(head.to_bytes()) == head
    for data in (DEEP, head.to_bytes().replace(b'"a"', DEEP)):
        with pytest.raises(ArchiveError, match="damaged"):
            ArchiveHead.from_bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        DEEP,
        b"[]",
        b"{}",
        b'{"classes": [], "majority_class": 0}',
        b'{"classes": [1, 2], "majority_class": 0}',
        b'{"classes": ["a"], "majority_class": 1}',
        b'{"classes": ["a"], "majority_class": -1}',
        b'{"classes": ["a"], "majority_class": 0.0}',
        b'{"classes": 7, "majority_class": 0}',
    ],
)
def test_a_description_of_something_else_is_named(data: bytes) -> None:
    described = ArchiveDescription(("a", "b"), 1)
    assert ArchiveDescription.from_bytes(described.to_bytes()) == described
    with pytest.raises(ArchiveError, match="description is damaged"):
        ArchiveDescription.from_bytes(data)
