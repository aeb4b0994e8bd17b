"""The signed envelope round every update, every sum, every instruction and every checkpoint of the cloud.

An envelope is ``magic (8 bytes) || u32 length of the header, big-endian || header || Ed25519 signature (64
bytes) || payload``. The header is canonical JSON and holds the payload's SHA-256, so the signature, which is
over a label and the header, covers everything. Labels keep the kinds of envelope apart.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts.errors import (
    ForeignUpdateError,
    MalformedUpdateError,
    SignatureError,
    StaleUpdateError,
    SumCheckError,
    TooFewContributorsError,
)
from flep_fl.model_security import _canonical

MODES: Final = ("ckks", "mixed", "open")
NONCE_BYTES: Final = 16

_LENGTH: Final = struct.Struct(">I")
_SIGNATURE_BYTES: Final = 64
_MAX_PAYLOAD: Final = 1 << 34
_LARGEST_NUMBER: Final = 1 << 31

_HEX32 = re.compile(r"[0-9a-f]{32}\Z")
_KEY_ID = re.compile(r"(?:[0-9a-f]{32}|open)\Z")
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of envelope: magic, signature label, largest header."""

    what: str
    magic: bytes
    label: bytes
    max_header: int


_UPDATE = _Kind("update", b"FLEPUP1\n", b"flep-fl/update/v1\0", 1 << 12)
_SUM = _Kind("sum", b"FLEPSU1\n", b"flep-fl/sum/v1\0", 1 << 24)
_CONTROL = _Kind("control message", b"FLEPCT1\n", b"flep-fl/control/v1\0", 1 << 20)
_CHECKPOINT = _Kind("checkpoint", b"FLEPCK1\n", b"flep-fl/checkpoint/v1\0", 1 << 26)


@dataclass(frozen=True, slots=True)
class UpdateHeader:
    """What a site signs.

    Attributes
    ----------
    federation, run
        Names.
    round, attempt
        Number of the round, and which try at it this is.
    sender
        Name of the site, as in the kits.
    nonce
        16 fresh random bytes, hexadecimal (:func:`new_nonce`); the tags depend on it.
    previous
        :attr:`SignedSum.digest` of the last sum that the sender accepted; empty before the first.
    key_id
        Identifier of the model key; ``open`` where there is none.
    layout, profile, config
        SHA-256 digests of the model's layout, the CKKS profile and the shared configuration.
    mode
        ``ckks``, ``mixed`` (some sites' weights are plain) or ``open``.
    payload_sha256, payload_bytes
        Digest and length of the payload; :func:`seal_update` fills them in.
    """

    federation: str
    run: str
    round: int
    attempt: int
    sender: str
    nonce: str
    previous: str
    key_id: str
    layout: str
    profile: str
    config: str
    mode: str
    payload_sha256: str = ""
    payload_bytes: int = 0

    def tag_input(self) -> bytes:
        """Return the header without the payload's fields, canonical: the input of the check values' tags.

        The tags are inside the payload, so they cannot depend on its digest; the nonce makes them unique.
        """
        known = asdict(self)
        del known["payload_sha256"], known["payload_bytes"]
        return _canonical.dump(known)

    def to_bytes(self) -> bytes:
        """Return the canonical JSON that is signed."""
        return _canonical.dump(asdict(self))


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the receiver knows of the round, from its own kit and state; fields as in :class:`UpdateHeader`.

    Every field must be equal, but ``attempt`` is the largest that is acceptable: a site answers a round
    that was opened again with the bytes that it signed before. ``None`` leaves ``attempt`` or ``previous``
    open: a site may not know them. The contributors of one sum must agree on ``previous`` in any case.
    """

    federation: str
    run: str
    round: int
    key_id: str
    layout: str
    profile: str
    config: str
    mode: str
    attempt: int | None = None
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class SealedUpdate:
    """An update whose envelope was verified; the payload was not looked into."""

    header: UpdateHeader
    header_bytes: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    payload: bytes = field(repr=False)

    def without_payload(self) -> SealedUpdate:
        """Return what :func:`seal_sum` needs of an update, so that the payload can be freed."""
        return replace(self, payload=b"")


@dataclass(frozen=True, slots=True)
class SignedSum:
    """A sum whose envelope and contributors were verified; the payload was not looked into.

    Attributes
    ----------
    headers
        The contributors' headers, sorted by sender.
    payload
        The serialised sum.
    digest
        SHA-256 of the sum's header, which holds the payload's digest: the ``previous`` of later updates.
    """

    headers: tuple[UpdateHeader, ...]
    payload: bytes = field(repr=False)
    digest: str

    @property
    def senders(self) -> tuple[str, ...]:
        """Names of the contributors."""
        return tuple(header.sender for header in self.headers)


def new_nonce() -> str:
    """Draw a nonce for :class:`UpdateHeader`."""
    return secrets.token_hex(NONCE_BYTES)


# --- updates -------------------------------------------------------------------------------------


def seal_update(header: UpdateHeader, payload: bytes, signing_key: Ed25519PrivateKey) -> bytes:
    """Sign an update.

    A nonce must be used for one payload only: to send again, send the same bytes again.

    Parameters
    ----------
    header
        All fields but the payload's, which are set here.
    payload
        The serialised vector.
    signing_key
        The site's key.
    """
    complete = replace(header, payload_sha256=hashlib.sha256(payload).hexdigest(), payload_bytes=len(payload))
    _check_header(asdict(complete))
    return _seal(_UPDATE, complete.to_bytes(), payload, signing_key)


def signed_header(blob: bytes) -> bytes:
    """Return the header of an update that this site has sealed: it recognises itself by it in a sum."""
    header, _, _ = _split(_UPDATE, blob)
    return header


def parse_header(header: bytes) -> UpdateHeader:
    """Return the fields of a header that this site has signed itself; no signature is looked at."""
    return _parse_update_header(header)


def open_update(
    blob: bytes, *, expected: Expectation, public_keys: Mapping[str, Ed25519PublicKey]
) -> SealedUpdate:
    """Verify an update's envelope.

    Parameters
    ----------
    blob
        What arrived.
    expected
        What the receiver knows of this round.
    public_keys
        The sites' keys by name, from the kit.

    Raises
    ------
    MalformedUpdateError
        It is truncated, has trailing bytes, or is not in this format.
    SignatureError
        The sender is not in the kit, or header or payload were altered.
    ForeignUpdateError
        It belongs to another federation, key, layout, profile, configuration, mode or previous sum.
    StaleUpdateError
        It belongs to another run, round or attempt.
    """
    header_bytes, signature, payload = _split(_UPDATE, blob)
    header = _parse_update_header(header_bytes)
    _verify_sender(header, header_bytes, signature, public_keys)
    _check_payload(_UPDATE, payload, header.payload_bytes, header.payload_sha256)
    _compare(header, expected)
    return SealedUpdate(header, header_bytes, signature, payload)


# --- sums ----------------------------------------------------------------------------------------


def seal_sum(updates: Sequence[SealedUpdate], payload: bytes, signing_key: Ed25519PrivateKey) -> bytes:
    """Sign a sum together with the signed headers of the updates in it.

    Parameters
    ----------
    updates
        The updates that were added, in any order (their payloads are not used); at least one, all opened
        with the same expectation.
    payload
        The serialised sum.
    signing_key
        The cloud's key.

    Raises
    ------
    TooFewContributorsError
        There is no update.
    """
    if not updates:
        raise TooFewContributorsError("A sum needs at least one update", expected="1 or more", found=0)
    first = updates[0].header
    header = {
        "federation": first.federation,
        "run": first.run,
        "round": first.round,
        "attempt": max(update.header.attempt for update in updates),
        "contributors": [
            [_to_base64(update.header_bytes), _to_base64(update.signature)]
            for update in sorted(updates, key=lambda update: update.header.sender)
        ],
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "payload_bytes": len(payload),
    }
    return _seal(_SUM, _canonical.dump(header), payload, signing_key)


def sum_digest(blob: bytes) -> str:
    """Return :attr:`SignedSum.digest` of a sealed sum, for the cloud that has just made it."""
    header, _, _ = _split(_SUM, blob)
    return _digest(header)


def sum_position(blob: bytes) -> tuple[str, int]:
    """Return run and round of a sealed sum that this party has kept itself; no signature is looked at."""
    header, _, _ = _split(_SUM, blob)
    document = _parse_sum_header(header)
    return str(document["run"]), int(document["round"])


def sum_previous(blob: bytes) -> str:
    """Return the digest of the sum before a sealed sum of this party's own; no signature is looked at."""
    header, _, _ = _split(_SUM, blob)
    first, _ = _parse_sum_header(header)["contributors"][0]
    return _parse_update_header(_from_base64(first)).previous


def kept_payload(blob: bytes) -> tuple[UpdateHeader, bytes]:
    """Return one contributor's header and the payload of a sealed sum that this party has kept itself.

    Raises
    ------
    UpdateError
        It is damaged; no signature is looked at.
    """
    header, _, payload = _split(_SUM, blob)
    document = _parse_sum_header(header)
    _check_payload(_SUM, payload, document["payload_bytes"], document["payload_sha256"])
    first, _ = document["contributors"][0]
    return _parse_update_header(_from_base64(first)), payload


def open_sum(
    blob: bytes,
    *,
    cloud_key: Ed25519PublicKey,
    site_keys: Mapping[str, Ed25519PublicKey],
    expected: Expectation,
    min_contributors: int,
    own_sender: str | None = None,
    own_header: bytes | None = None,
) -> SignedSum:
    """Verify a sum's envelope and everything its contributors signed.

    Sites that were shown different sums refuse to be added up: every update names the last sum that its
    sender accepted, and all contributors must name the same one, which is ``expected.previous`` if given.

    Parameters
    ----------
    blob
        What arrived.
    cloud_key, site_keys
        Public keys from the kit.
    expected
        What the receiver knows of the sum's round.
    min_contributors
        The receiver's own ``federation.min_contributors``.
    own_sender, own_header
        The receiver's name and the header that it signed in the sum's round (``None`` if it signed none). A
        sum may leave the receiver out, but what it says of the receiver must be true.

    Raises
    ------
    MalformedUpdateError
        The sum or a header in it is truncated or not in this format.
    SignatureError
        The sum was altered, or is not the cloud's, or one of its headers is not the named site's.
    ForeignUpdateError
        A contributor has another federation, key, layout, profile, configuration, mode or previous sum.
    StaleUpdateError
        The sum, or a contributor, belongs to another run, round or attempt.
    SumCheckError
        A sender is named twice, or the receiver is named with a header that it did not sign in that round.
    TooFewContributorsError
        There are fewer contributors than ``min_contributors``.
    """
    header_bytes, signature, payload = _split(_SUM, blob)
    document = _parse_sum_header(header_bytes)
    _verify(cloud_key, signature, _SUM.label + header_bytes, "The sum was altered or not signed by the cloud")
    _check_payload(_SUM, payload, document["payload_bytes"], document["payload_sha256"])

    headers: list[UpdateHeader] = []
    for encoded_header, encoded_signature in document["contributors"]:
        signed = _from_base64(encoded_header)
        header = _parse_update_header(signed)
        _verify_sender(header, signed, _from_base64(encoded_signature), site_keys)
        _compare(header, expected)
        if header.sender == own_sender and (
            own_header is None or not hmac.compare_digest(signed, own_header)
        ):
            raise SumCheckError("The sum names this site with an update that it did not send in this round")
        headers.append(header)
    _check_agreement(headers, document)
    if len(headers) < max(min_contributors, 1):
        raise TooFewContributorsError(
            "The sum has too few contributors: it would show their models to each other",
            expected=f"at least {min_contributors} (federation.min_contributors)",
            found=len(headers),
        )
    return SignedSum(tuple(headers), payload, _digest(header_bytes))


# --- instructions --------------------------------------------------------------------------------


def seal_control(message: Mapping[str, object], signing_key: Ed25519PrivateKey) -> bytes:
    """Sign a small JSON message without payload: an instruction of the cloud, or a site's introduction."""
    return _seal(_CONTROL, _canonical.dump(dict(message)), b"", signing_key)


def open_control(blob: bytes, public_key: Ed25519PublicKey) -> dict[str, Any]:
    """Verify a small message and return it; its fields are the caller's to check.

    Raises
    ------
    MalformedUpdateError
        It is truncated or not in this format.
    SignatureError
        It was altered or signed by another party.
    """
    return _open_message(_CONTROL, blob, public_key)


# --- checkpoints ---------------------------------------------------------------------------------


def seal_checkpoint(message: Mapping[str, object], signing_key: Ed25519PrivateKey) -> bytes:
    """Sign the state of a run that the cloud keeps for itself; never taken for an instruction."""
    return _seal(_CHECKPOINT, _canonical.dump(dict(message)), b"", signing_key)


def open_checkpoint(blob: bytes, public_key: Ed25519PublicKey) -> dict[str, Any]:
    """Verify what :func:`seal_checkpoint` made; errors as in :func:`open_control`."""
    return _open_message(_CHECKPOINT, blob, public_key)


def checkpoint_fields(blob: bytes) -> dict[str, Any]:
    """Return what a checkpoint says of itself, to name whose it is; no signature is looked at."""
    header, _, _ = _split(_CHECKPOINT, blob)
    return _load(_CHECKPOINT, header)


def verify_kept_sum(blob: bytes, cloud_key: Ed25519PublicKey) -> str:
    """Verify that a sealed sum that the cloud has kept is whole and its own; return its digest.

    Raises
    ------
    MalformedUpdateError, SignatureError
        When it is not.
    """
    header, signature, payload = _split(_SUM, blob)
    document = _parse_sum_header(header)
    _verify(cloud_key, signature, _SUM.label + header, "The sum was altered or not signed by the cloud")
    _check_payload(_SUM, payload, document["payload_bytes"], document["payload_sha256"])
    return _digest(header)


def _open_message(kind: _Kind, blob: bytes, public_key: Ed25519PublicKey) -> dict[str, Any]:
    """Verify an envelope without payload."""
    header, signature, payload = _split(kind, blob)
    if payload:
        raise _malformed(kind, "bytes follow its signature")
    problem = f"A {kind.what} was altered, or signed by another party"
    _verify(public_key, signature, kind.label + header, problem)
    return _load(kind, header)


# --- envelope ------------------------------------------------------------------------------------


def _seal(kind: _Kind, header: bytes, payload: bytes, signing_key: Ed25519PrivateKey) -> bytes:
    if len(header) > kind.max_header:
        raise _malformed(kind, f"its header has {len(header)} bytes, more than {kind.max_header}")
    signature = signing_key.sign(kind.label + header)
    return b"".join((kind.magic, _LENGTH.pack(len(header)), header, signature, payload))


def _split(kind: _Kind, blob: bytes) -> tuple[bytes, bytes, bytes]:
    """Cut an envelope into header, signature and payload; nothing is trusted yet."""
    start = len(kind.magic) + _LENGTH.size
    if len(blob) < start or not blob.startswith(kind.magic):
        raise _malformed(kind, "it does not begin with this release's marker")
    (size,) = _LENGTH.unpack_from(blob, len(kind.magic))
    if size > kind.max_header or len(blob) < start + size + _SIGNATURE_BYTES:
        raise _malformed(kind, "it is truncated, or its header is too large")
    signature_start = start + size
    payload_start = signature_start + _SIGNATURE_BYTES
    return blob[start:signature_start], blob[signature_start:payload_start], blob[payload_start:]


def _load(kind: _Kind, data: bytes) -> dict[str, Any]:
    try:
        document = _canonical.load(data)
    except ValueError as exc:
        raise _malformed(kind, f"its header is {exc}") from None
    if not isinstance(document, dict):
        raise _malformed(kind, "its header is not an object")
    return document


def _malformed(kind: _Kind, problem: str) -> MalformedUpdateError:
    return MalformedUpdateError(
        f"The {kind.what} is malformed: {problem}", remedy="Use the same release at every party"
    )


def _verify(key: Ed25519PublicKey, signature: bytes, message: bytes, problem: str) -> None:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        raise SignatureError(problem, remedy="Check that all kits come from one provisioning") from None


def _verify_sender(
    header: UpdateHeader, signed: bytes, signature: bytes, keys: Mapping[str, Ed25519PublicKey]
) -> None:
    key = keys.get(header.sender)
    if key is None:
        raise SignatureError(
            f"An update comes from {header.sender!r}, who is not in the kit", expected=", ".join(sorted(keys))
        )
    problem = f"The update of {header.sender!r} was altered or not signed by that site"
    _verify(key, signature, _UPDATE.label + signed, problem)


def _check_payload(kind: _Kind, payload: bytes, size: int, digest: str) -> None:
    if len(payload) != size:
        raise _malformed(kind, f"its payload has {len(payload)} bytes where the header says {size}")
    if not hmac.compare_digest(hashlib.sha256(payload).hexdigest(), digest):
        raise SignatureError(f"The payload of the {kind.what} was altered")


def _digest(sum_header: bytes) -> str:
    return hashlib.sha256(_SUM.label + sum_header).hexdigest()


# --- headers -------------------------------------------------------------------------------------


def _parse_update_header(data: bytes) -> UpdateHeader:
    document = _load(_UPDATE, data)
    _check_header(document)
    return UpdateHeader(**document)


def _check_header(document: Mapping[str, Any]) -> None:
    """Require exactly the fields of :class:`UpdateHeader`, each of its form."""
    if set(document) != {entry.name for entry in fields(UpdateHeader)}:
        raise _malformed(_UPDATE, "its header does not have exactly the fields of this release")
    for name in ("federation", "run", "sender"):
        _require(_UPDATE, document, name, _NAME)
    _require(_UPDATE, document, "nonce", _HEX32)
    _require(_UPDATE, document, "key_id", _KEY_ID)
    for name in ("layout", "profile", "config", "payload_sha256"):
        _require(_UPDATE, document, name, _HEX64)
    if document["previous"] != "":
        _require(_UPDATE, document, "previous", _HEX64)
    _require_numbers(_UPDATE, document)
    if document["mode"] not in MODES:
        raise _malformed(_UPDATE, "field 'mode' is unknown")


def _parse_sum_header(data: bytes) -> dict[str, Any]:
    document = _load(_SUM, data)
    names = {
        "federation", "run", "round", "attempt", "contributors", "payload_sha256", "payload_bytes",
    }  # fmt: skip
    if set(document) != names:
        raise _malformed(_SUM, "its header does not have exactly the fields of this release")
    _require(_SUM, document, "payload_sha256", _HEX64)
    _require_numbers(_SUM, document)
    entries = document["contributors"]
    if not isinstance(entries, list) or not all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        for entry in entries
    ):
        raise _malformed(_SUM, "field 'contributors' is not a list of signed headers")
    return document


def _require(kind: _Kind, document: Mapping[str, Any], name: str, form: re.Pattern[str]) -> None:
    value = document[name]
    if not isinstance(value, str) or not form.match(value):
        raise _malformed(kind, f"field {name!r} has not the form {form.pattern}")


def _require_numbers(kind: _Kind, document: Mapping[str, Any]) -> None:
    limits = {"round": _LARGEST_NUMBER, "attempt": _LARGEST_NUMBER, "payload_bytes": _MAX_PAYLOAD}
    for name, limit in limits.items():
        value = document[name]
        if type(value) is not int or not 0 <= value <= limit:
            raise _malformed(kind, f"field {name!r} is not a number from 0 to {limit}")


def _compare(header: UpdateHeader, expected: Expectation) -> None:
    for name in ("federation", "key_id", "layout", "profile", "config", "mode"):
        _require_same(ForeignUpdateError, header, name, getattr(expected, name))
    for name in ("run", "round"):
        _require_same(StaleUpdateError, header, name, getattr(expected, name))
    if not 1 <= header.attempt <= (expected.attempt or header.attempt):
        raise StaleUpdateError(
            f"The update of {header.sender!r} has another attempt",
            expected=f"1..{expected.attempt or 'any'}",
            found=header.attempt,
        )
    if expected.previous is not None:
        _require_same(ForeignUpdateError, header, "previous", expected.previous)


def _require_same(
    error: type[ForeignUpdateError | StaleUpdateError], header: UpdateHeader, name: str, value: object
) -> None:
    found = getattr(header, name)
    if found != value:
        raise error(
            f"The update of {header.sender!r} has another {name}", expected=repr(value), found=repr(found)
        )


def _check_agreement(headers: Sequence[UpdateHeader], document: Mapping[str, Any]) -> None:
    """Require distinct senders, one previous sum, and a sum header that says the same.

    Attempts may differ: each site signs a round once, with the attempt at which it was first asked.
    """
    if len({header.sender for header in headers}) != len(headers):
        raise SumCheckError("The sum names a contributor twice")
    for header in headers:
        if header.previous != headers[0].previous:
            raise ForeignUpdateError(
                "The contributors of the sum were shown different previous sums",
                remedy="Do not use this cloud again before its operator has explained it",
            )
        for name in ("federation", "run", "round"):
            _require_same(StaleUpdateError, header, name, document[name])
    attempts = {header.attempt for header in headers}
    if headers and max(attempts) != document["attempt"]:
        raise StaleUpdateError(
            "The sum names another attempt than its contributors",
            expected=max(attempts),
            found=document["attempt"],
        )


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed(_SUM, "a signed header is not base64") from None
