"""The owner's HTTP interface for analysts: paths, bodies and frames, shared by gateway and analyst.

==========================================================  =========================================
``GET  /v1/owner``                                          :class:`OwnerHello`, unsigned
``GET  /v1/grants``                                         JSON: :func:`grants_body`
``POST /v1/grants/{grant}/open``                            JSON: :func:`opened_body`; empty request body
``GET  /v1/grants/{grant}/releases/{release}/index``        entries of ``index.bin``
``GET  /v1/grants/{grant}/releases/{release}/records``      frames: :func:`pack_records`
==========================================================  =========================================

All but the first are signed (:mod:`flep_fl.contracts.request_signing`). The last two take ``cursor`` (a
decimal integer, 0 at first) and ``limit``; the header ``Flep-Cursor`` of the answer gives the next cursor and
is missing on the last page. An error is JSON, ``{"code": ..., "reason": ...}``, with the status of
:data:`STATUS`.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flep_fl.contracts.errors import FetchError
from flep_fl.contracts.owner_records import Grant, OpenedGrant
from flep_fl.contracts.records import SealedRecord

OWNER_PATH = "/v1/owner"
GRANTS_PATH = "/v1/grants"
OPEN_PATH = "/v1/grants/{grant_id}/open"
INDEX_PATH = "/v1/grants/{grant_id}/releases/{release_id}/index"
RECORDS_PATH = "/v1/grants/{grant_id}/releases/{release_id}/records"

CURSOR_HEADER = "flep-cursor"
INDEX_TYPE = "application/vnd.flep.index"
RECORDS_TYPE = "application/vnd.flep.records"

MAX_INDEX_LIMIT = 16384
MAX_RECORD_LIMIT = 1024
MAX_PAGE_BYTES = 8 << 20
"""A page of records ends before it grows beyond this; one record alone may be larger."""

MAX_RECORD_BYTES = 1 << 30
_FRAME = struct.Struct(">16sII")

STATUS: dict[str, int] = {
    "request_signature": 401,
    "unknown_grant": 404,
    "grant_revoked": 403,
    "grant_expired": 403,
    "not_released": 409,
    "release_changed": 410,
    "busy": 503,
    "disk_full": 507,
}
"""HTTP status by error code; every other error of the owner's is 500 with the code ``error``."""


@dataclass(frozen=True, slots=True)
class OwnerHello:
    """Who answers: the owner's raw Ed25519 public key, which analysts pin, and its clock."""

    verify_key: bytes
    time: int

    def to_bytes(self) -> bytes:
        """Serialise to JSON."""
        return json.dumps({"verify_key": self.verify_key.hex(), "time": self.time}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> OwnerHello:
        """Parse; raise :class:`FetchError` when it is not a hello."""
        fields = _json(data, {"verify_key": str, "time": int})
        key = _hex(fields["verify_key"], 32)
        return cls(key, fields["time"])


@dataclass(frozen=True, slots=True)
class GrantListing:
    """One line of an analyst's list of grants."""

    grant_id: str
    dataset: str
    not_after: int


def grants_body(grants: Sequence[Grant]) -> bytes:
    """Serialise an analyst's own grants."""
    listed = [{"grant_id": g.grant_id, "dataset": g.dataset, "not_after": g.not_after} for g in grants]
    return json.dumps({"grants": listed}).encode()


def read_grants(data: bytes) -> list[GrantListing]:
    """Parse :func:`grants_body`; raise :class:`FetchError` when it is something else."""
    listed = _json(data, {"grants": list})["grants"]
    if not all(isinstance(entry, dict) for entry in listed):
        raise _unexpected()
    found = []
    for entry in listed:
        fields = _checked(entry, {"grant_id": str, "dataset": str, "not_after": int})
        _hex(fields["grant_id"], 16)
        found.append(GrantListing(fields["grant_id"], fields["dataset"], fields["not_after"]))
    return found


_OPENED = ("grant", "grant_signature", "manifest", "manifest_signature", "bundle")


def opened_body(opened: OpenedGrant) -> bytes:
    """Serialise an opened grant: every part in base64."""
    parts = {name: b64encode(getattr(opened, name)).decode("ascii") for name in _OPENED}
    return json.dumps({"release_id": opened.release_id, **parts}).encode()


def read_opened(data: bytes) -> OpenedGrant:
    """Parse :func:`opened_body`; raise :class:`FetchError` when it is something else."""
    fields = _json(data, {"release_id": str, **dict.fromkeys(_OPENED, str)})
    _hex(fields["release_id"], 16)
    try:
        parts = {name: b64decode(fields[name], validate=True) for name in _OPENED}
    except ValueError as exc:
        raise _unexpected() from exc
    return OpenedGrant(release_id=fields["release_id"], **parts)


def pack_records(records: Iterable[SealedRecord]) -> bytes:
    """Frame records: identifier (16 bytes), two lengths (4 bytes each, big-endian), envelope, label."""
    parts: list[bytes] = []
    for record in records:
        head = _FRAME.pack(bytes.fromhex(record.record_id), len(record.envelope), len(record.sealed_label))
        parts += [head, record.envelope, record.sealed_label]
    return b"".join(parts)


def unpack_records(data: bytes) -> Iterator[SealedRecord]:
    """Undo :func:`pack_records`; raise :class:`FetchError` where a frame is cut off."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _FRAME.size:
            raise _unexpected()
        record_id, envelope_bytes, label_bytes = _FRAME.unpack_from(data, offset)
        offset += _FRAME.size
        if len(data) - offset < envelope_bytes + label_bytes:
            raise _unexpected()
        envelope = data[offset : offset + envelope_bytes]
        offset += envelope_bytes
        yield SealedRecord(record_id.hex(), envelope, data[offset : offset + label_bytes])
        offset += label_bytes


def error_body(code: str, reason: str) -> bytes:
    """Serialise an error."""
    return json.dumps({"code": code, "reason": reason}).encode()


def read_error(data: bytes) -> tuple[str, str]:
    """Parse :func:`error_body`; unknown bodies give ``("error", "")``."""
    try:
        fields = _json(data, {"code": str, "reason": str})
    except FetchError:
        return "error", ""
    return fields["code"], fields["reason"]


def _json(data: bytes, types: dict[str, type]) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _unexpected() from exc
    if not isinstance(fields, dict):
        raise _unexpected()
    return _checked(fields, types)


def _checked(fields: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    if any(type(fields.get(name)) is not kind for name, kind in types.items()):
        raise _unexpected()
    return fields


def _hex(text: str, length: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError as exc:
        raise _unexpected() from exc
    if len(value) != length or value.hex() != text:
        raise _unexpected()
    return value


def _unexpected() -> FetchError:
    return FetchError(
        "the data owner's answer is not of this release's format",
        remedy="Check that the address is a data owner's gateway of this release",
    )
