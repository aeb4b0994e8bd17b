"""Devices: a key that never leaves the device, and captures that it signs.

A capture is an image and its *description*: device, sequence number, time, format, shape, SHA-256 of the
image bytes, data set, class and split. The device signs the description's exact bytes (Ed25519 over a label
and the bytes), so nothing has to be put into a canonical form before a signature is checked. Whoever checks
the digest of the image against a description with a valid signature knows that the device made both.

The description travels in a request's header, base64url; the image is the body. The sequence number takes
the part of a nonce: a device never signs two captures under one number, and the gateway never stores two.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts.errors import CaptureError

CAPTURE_HEADER = "flep-capture"
SIGNATURE_HEADER = "flep-signature"
FORMATS = ("png", "raw-uint8", "raw-uint16")
"""``raw-uint8`` and ``raw-uint16`` are the pixels alone in C order, 16 bits little-endian."""

MAX_DESCRIPTION_BYTES = 1024
MAX_SEQUENCE = 2**53 - 1
MAX_LABEL_LENGTH = 64
SPLITS = ("train", "test")
SIGNATURE_BYTES = 64

_LABEL = b"flep capture, version 1\0"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_VERSION = 1
_FIELDS = frozenset(
    ("v", "device", "sequence", "time", "sha256", "format", "shape", "dataset", "label", "split")
)


@dataclass(frozen=True, slots=True)
class Description:
    """The description that a device signs.

    Attributes
    ----------
    device
        The device's name: letters, digits, ``_``, ``-`` and ``.``, at most 64.
    sequence
        1, 2, 3, ...: strictly increasing over the device's whole life.
    time
        Microseconds since 1970 (UTC), by the device's clock.
    sha256
        SHA-256 of the image bytes as they are sent, 64 hex digits.
    format
        One of :data:`FORMATS`.
    shape
        (H, W) or (C, H, W) of a raw image; empty for PNG, which says it itself.
    dataset
        Name of the data set that the image goes into, by the same rule as ``device``.
    label
        Class of the image, by name; None where the device does not know it.
    split
        "train" or "test"; None lets the owner's database draw it.
    """

    device: str
    sequence: int
    time: int
    sha256: str
    format: str
    shape: tuple[int, ...]
    dataset: str
    label: str | None = field(default=None, repr=False)
    split: str | None = None

    def to_bytes(self) -> bytes:
        """Return the bytes that are signed and sent."""
        fields = {
            "v": _VERSION,
            "device": self.device,
            "sequence": self.sequence,
            "time": self.time,
            "sha256": self.sha256,
            "format": self.format,
            "shape": self.shape,
            "dataset": self.dataset,
            "label": self.label,
            "split": self.split,
        }
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Description:
        """Parse a description, whoever wrote it.

        Raises
        ------
        CaptureError
            It is too long, not JSON, has other fields than these, or one of them is out of range.
        """
        if len(data) > MAX_DESCRIPTION_BYTES:
            raise CaptureError(
                "a capture's description is too long",
                expected=f"at most {MAX_DESCRIPTION_BYTES} bytes",
                found=len(data),
            )
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise CaptureError("a capture's description is not JSON") from exc
        if not isinstance(fields, dict) or fields.keys() != _FIELDS:
            raise CaptureError(
                "a capture's description has wrong fields", expected=", ".join(sorted(_FIELDS))
            )
        if problem := _problem(fields):
            raise CaptureError(f"a capture's description has a wrong {problem}")
        return cls(
            fields["device"],
            fields["sequence"],
            fields["time"],
            fields["sha256"],
            fields["format"],
            tuple(fields["shape"]),
            fields["dataset"],
            fields["label"],
            fields["split"],
        )


def is_name(text: object) -> bool:
    """Say whether a text may name a device, an administrator or a data set."""
    return isinstance(text, str) and _NAME.match(text) is not None


def digest_of(image: bytes) -> str:
    """Return the SHA-256 of the image bytes, 64 hex digits."""
    return hashlib.sha256(image).hexdigest()


def sign_capture(key: Ed25519PrivateKey, description: bytes) -> bytes:
    """Sign a description (:meth:`Description.to_bytes`); 64 bytes."""
    return key.sign(_LABEL + description)


def verify_capture(key: Ed25519PublicKey, description: bytes, signature: bytes) -> bool:
    """Say whether the signature over a description is this device's."""
    try:
        key.verify(signature, _LABEL + description)
    except InvalidSignature:
        return False
    return True


def encode_header(data: bytes) -> str:
    """Return base64url without padding, as headers carry descriptions and signatures."""
    return urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode_header(text: bytes, *, limit: int) -> bytes:
    """Undo :func:`encode_header`.

    Raises
    ------
    CaptureError
        The text is too long, or not base64url; only the one spelling that :func:`encode_header` gives is
        read, so that equal requests have equal bytes.
    """
    if len(text) > (limit * 4 + 2) // 3:
        raise CaptureError("a header is too long", expected=f"at most {limit} bytes", found=f"{len(text)}")
    try:
        data = urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    except ValueError as exc:
        raise CaptureError("a header is not base64url") from exc
    if urlsafe_b64encode(data).rstrip(b"=") != text:
        raise CaptureError("a header is not base64url")
    return data


def _problem(fields: dict[str, Any]) -> str | None:
    """Name the first field that is out of range."""
    shape = fields["shape"]
    raw = fields["format"] != "png"
    checks = {
        "version": fields["v"] == _VERSION and type(fields["v"]) is int,
        "device name": is_name(fields["device"]),
        "sequence number": _is_count(fields["sequence"], 1),
        "time": _is_count(fields["time"], 0),
        "digest": isinstance(fields["sha256"], str) and _DIGEST.match(fields["sha256"]) is not None,
        "format": fields["format"] in FORMATS,
        "shape": isinstance(shape, list)
        and len(shape) in ((2, 3) if raw else (0,))
        and all(_is_count(side, 1) for side in shape),
        "data set name": is_name(fields["dataset"]),
        "label": fields["label"] is None
        or (isinstance(fields["label"], str) and 0 < len(fields["label"]) <= MAX_LABEL_LENGTH),
        "split": fields["split"] is None or fields["split"] in SPLITS,
    }
    return next((name for name, holds in checks.items() if not holds), None)


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value <= MAX_SEQUENCE
