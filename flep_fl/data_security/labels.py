"""Labels and small blobs, sealed under the image key bundle with AES-256-GCM-SIV (RFC 8452)."""

from __future__ import annotations

import hmac
import secrets
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, RecordError, WrongImageKeyError
from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.keys import ImageKeyBundle

FORMAT_VERSION = 1
_MAGIC = b"FLEB"
_HEAD = struct.Struct(">4sB16sI12s")
_NONCE_BYTES = 12
_TAG_BYTES = 16
_LABEL = struct.Struct(">q")
_LABEL_LIMIT = 1 << 63


def seal_label(
    bundle: ImageKeyBundle,
    record_id: str,
    split: str,
    label: int,
    entropy: Entropy = secrets.token_bytes,
) -> bytes:
    """Seal a class label, bound to its record and split.

    Parameters
    ----------
    bundle
        The image key bundle.
    record_id
        Identifier of the record the label belongs to.
    split
        "train" or "test".
    label
        Class number, 0 or more.
    entropy
        Source of the nonce.

    Returns
    -------
    bytes
        61 bytes, whatever the label is.

    Raises
    ------
    RecordError
        When the label is not an integer from 0.
    """
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < _LABEL_LIMIT:
        raise RecordError(
            f"The label of record {record_id} is unusable", expected="an integer from 0", found=repr(label)
        )
    return _seal(bundle, "label", _bind(record_id, split), _LABEL.pack(label), entropy)


def open_label(bundle: ImageKeyBundle, record_id: str, split: str, sealed: bytes) -> int:
    """Open a sealed label of this record and split.

    Raises
    ------
    EnvelopeError
        When it is truncated, altered, or belongs to another record or split
        (:class:`WrongImageKeyError`, :class:`EnvelopeVersionError` for another bundle or format).
    """
    plain = _open(bundle, "label", _bind(record_id, split), sealed, f"The label of record {record_id}")
    if len(plain) != _LABEL.size:
        raise EnvelopeError(f"The label of record {record_id} has the wrong length")
    label: int = _LABEL.unpack(plain)[0]
    return label


def seal_blob(
    bundle: ImageKeyBundle, purpose: str, data: bytes, entropy: Entropy = secrets.token_bytes
) -> bytes:
    """Seal ``data`` for a stated purpose; it opens under the same bundle and purpose only."""
    return _seal(bundle, "blob", _bind(purpose), data, entropy)


def open_blob(bundle: ImageKeyBundle, purpose: str, sealed: bytes) -> bytes:
    """Open what :func:`seal_blob` sealed for the same purpose.

    Raises
    ------
    EnvelopeError
        When it is truncated, altered or was sealed for another purpose
        (:class:`WrongImageKeyError`, :class:`EnvelopeVersionError` for another bundle or format).
    """
    return _open(bundle, "blob", _bind(purpose), sealed, f"The sealed {purpose}")


def sealed_under(sealed: bytes) -> tuple[str, int]:
    """Return the key id (32 hex digits) and epoch that a sealed label or blob names in the clear.

    Raises
    ------
    EnvelopeError
        When it is truncated or not one of ours (:class:`EnvelopeVersionError` for another format).
    """
    _, key_id, epoch, _ = _parse(sealed, "The sealed label")
    return key_id.hex(), epoch


def _bind(*parts: str) -> bytes:
    # Lengths first, so that ("ab", "c") and ("a", "bc") differ.
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return b"".join(struct.pack(">I", len(part)) + part for part in encoded)


def _seal(bundle: ImageKeyBundle, label: str, context: bytes, data: bytes, entropy: Entropy) -> bytes:
    nonce = entropy(_NONCE_BYTES)
    head = _HEAD.pack(_MAGIC, FORMAT_VERSION, bytes.fromhex(bundle.key_id), bundle.epoch, nonce)
    return head + AESGCMSIV(bundle.subkey(label)).encrypt(nonce, data, head + context)


def _open(bundle: ImageKeyBundle, label: str, context: bytes, sealed: bytes, what: str) -> bytes:
    head, key_id, epoch, nonce = _parse(sealed, what)
    if not hmac.compare_digest(key_id, bytes.fromhex(bundle.key_id)) or epoch != bundle.epoch:
        raise WrongImageKeyError(
            f"{what} was sealed under another key bundle",
            expected=f"key {bundle.key_id} epoch {bundle.epoch}",
            found=f"key {key_id.hex()} epoch {epoch}",
            remedy="Ask the data owner for the bundle that matches the archive",
        )
    try:
        return AESGCMSIV(bundle.subkey(label)).decrypt(nonce, sealed[_HEAD.size :], head + context)
    except InvalidTag as exc:
        raise EnvelopeError(
            f"{what} was altered, or belongs to something else",
            remedy="Ask the data owner for this record again",
        ) from exc


def _parse(sealed: bytes, what: str) -> tuple[bytes, bytes, int, bytes]:
    """Return head, key id, epoch and nonce."""
    if not isinstance(sealed, bytes) or len(sealed) < _HEAD.size + _TAG_BYTES or sealed[:4] != _MAGIC:
        raise EnvelopeError(f"{what} is truncated or not one of ours")
    head = sealed[: _HEAD.size]
    _, version, key_id, epoch, nonce = _HEAD.unpack(head)
    if version != FORMAT_VERSION:
        raise EnvelopeVersionError(
            f"{what} has an unknown format version", expected=FORMAT_VERSION, found=version
        )
    return head, key_id, epoch, nonce
