"""Sealing at rest: a random data key per record, wrapped by a key derived from the owner's.

AES-256-GCM-SIV (RFC 8452) throughout: a repeated nonce would leak no more than equality. What each blob
means and where it belongs is its associated data, so that blobs cannot be moved between records.
"""

from __future__ import annotations

import hmac
import json
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flep_fl.contracts.owner_records import OwnerImage

KEY_BYTES = 32
SPLITS = ("train", "test")

_NONCE_BYTES = 12
_OLD_TAGS = struct.Struct(">IB")  # label, split: what release 0.1 wrote
_OLD_SHAPE = struct.Struct(">II")  # height, width; its first byte is 0
_HEAD = struct.Struct(">BBHII")  # version, bytes per sample, channels (0: grey), height, width
_IMAGE_VERSION = 2
_TAGS_BYTES = 512  # tags are padded to a multiple of this
_WRAP_LABEL = b"flep private database, key wrapping, version 1"
_INDEX_LABEL = b"flep private database, blind index, version 1"


class Unsealable(Exception):  # noqa: N818  # internal: callers turn it into a named error
    """A blob is truncated, altered, or sealed under another key or for another place."""


@dataclass(frozen=True, slots=True)
class Tags:
    """What is known of an image besides its pixels; sealed.

    Attributes
    ----------
    label, split
        Class index (None: not known yet), and "train" or "test".
    device, sequence, captured_at, idempotency_key
        Where it came from; "" and -1 for images that no device sent.
    stored_at
        The owner's clock when it was stored, seconds since 1970.
    given
        Label and split as they were sent, to tell a repetition from a conflict.
    metadata
        Short texts.
    """

    label: int | None = field(repr=False)
    split: str
    device: str = ""
    sequence: int = -1
    captured_at: float = 0.0
    idempotency_key: str | None = field(default=None, repr=False)
    stored_at: float = 0.0
    given: tuple[int | None, str | None] = field(default=(None, None), repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


def wrapping_key(owner_key: bytes, salt: bytes) -> bytes:
    """Derive the database's key-wrapping key (32 bytes; HKDF-SHA256, RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_WRAP_LABEL).derive(owner_key)


def index_key(key: bytes) -> bytes:
    """Derive the key of the lookup hashes (32 bytes) from the wrapping key."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=_INDEX_LABEL).derive(key)


def blind_index(subkey: bytes, what: str, *parts: str) -> bytes:
    """Return a keyed hash (32 bytes) by which a row is found without saying what it is about.

    ``subkey`` is :func:`index_key` of the database's wrapping key.
    """
    return hmac.digest(subkey, json.dumps([what, *parts], ensure_ascii=True).encode(), "sha256")


def seal(key: bytes, plain: bytes, *, what: str, place: str) -> bytes:
    """Seal bytes: random 12-byte nonce, ciphertext, 16-byte tag; bound to ``what`` and ``place``."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCMSIV(key).encrypt(nonce, plain, _binding(what, place))


def unseal(key: bytes, sealed: bytes, *, what: str, place: str) -> bytes:
    """Undo :func:`seal`; raise :class:`Unsealable` when anything does not fit."""
    nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        return AESGCMSIV(key).decrypt(nonce, body, _binding(what, place))
    except (InvalidTag, ValueError) as exc:
        raise Unsealable from exc


def pack_tags(tags: Tags) -> bytes:
    """Serialise tags, padded so that the length says little."""
    content = [
        tags.label,
        tags.split,
        tags.device,
        tags.sequence,
        tags.captured_at,
        tags.idempotency_key,
        tags.stored_at,
        tags.given,
        dict(tags.metadata),
    ]
    return padded(json.dumps(content, separators=(",", ":")).encode(), _TAGS_BYTES)


def unpack_tags(data: bytes) -> Tags:
    """Undo :func:`pack_tags`, or read the tags of release 0.1."""
    if len(data) == _OLD_TAGS.size:
        label, split = _OLD_TAGS.unpack(data)
        return Tags(label, SPLITS[split], given=(label, SPLITS[split]))
    label, name, device, sequence, captured, key, stored, given, metadata = json.loads(data)
    return Tags(label, name, device, sequence, captured, key, stored, (given[0], given[1]), metadata)


def pack_image(image: OwnerImage) -> bytes:
    """Shape, dtype and pixels (little-endian); uncompressed: a length must not tell the content."""
    channels = image.shape[0] if image.ndim == 3 else 0
    head = _HEAD.pack(_IMAGE_VERSION, image.dtype.itemsize, channels, *image.shape[-2:])
    return head + image.astype(image.dtype.newbyteorder("<"), copy=False).tobytes()


def unpack_image(data: bytes) -> OwnerImage:
    """Undo :func:`pack_image`, or read the 8-bit grey image of release 0.1; read-only."""
    if data[0] == 0:
        return np.frombuffer(data, np.uint8, offset=_OLD_SHAPE.size).reshape(_OLD_SHAPE.unpack_from(data))
    _, itemsize, channels, height, width = _HEAD.unpack_from(data)
    dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
    dtype = np.dtype(np.uint8) if itemsize == 1 else np.dtype("<u2")
    shape = (channels, height, width) if channels else (height, width)
    pixels: OwnerImage = np.frombuffer(data, dtype, offset=_HEAD.size).reshape(shape)
    return pixels


def padded(data: bytes, multiple: int) -> bytes:
    """Append spaces up to a multiple of so many bytes; JSON does not mind."""
    return data + b" " * (-len(data) % multiple)


def _binding(what: str, place: str) -> bytes:
    return b"\0".join((b"flep-db-1", what.encode(), place.encode()))
