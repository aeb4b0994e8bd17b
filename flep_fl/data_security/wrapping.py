"""A key bundle, wrapped for one analyst with HPKE (RFC 9180; X25519, HKDF-SHA256, AES-256-GCM).

HPKE's base mode hides the bundle from everybody but the recipient. It does not say who wrapped it: bundles
travel inside something that is signed (a startup kit).
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, ImageKeyError, WrongImageKeyError

FORMAT_VERSION = 1
_MAGIC = b"FLEW"
_FINGERPRINT_BYTES = 16
_RAW_KEY_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + 1 + _FINGERPRINT_BYTES
_MIN_BYTES = _HEAD_BYTES + 32 + 16
_INFO = b"flep-fl/v1/wrap-bundle/"
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def wrap_bundle(bundle_bytes: bytes, recipient: bytes | X25519PublicKey, *, context: bytes) -> bytes:
    """Encrypt a serialised bundle to one recipient.

    Parameters
    ----------
    bundle_bytes
        ``ImageKeyBundle.to_bytes()``.
    recipient
        The analyst's X25519 public key, raw (32 bytes) or as an object.
    context
        Public bytes that both sides agree on (federation, site); another context does not open it.

    Raises
    ------
    ImageKeyError
        When the public key is not a usable X25519 key.
    """
    public = _public_key(recipient)
    head = _MAGIC + bytes([FORMAT_VERSION]) + _fingerprint(public)
    try:
        return head + _SUITE.encrypt(bundle_bytes, public, _INFO + head + context)
    except ValueError as exc:
        raise ImageKeyError(
            "The recipient's public key is not usable", remedy="Have the analyst make a new key pair"
        ) from exc


def unwrap_bundle(wrapped: bytes, private_key: bytes | X25519PrivateKey, *, context: bytes) -> bytes:
    """Decrypt a bundle that was wrapped for this private key in this context.

    Parameters
    ----------
    wrapped
        The result of :func:`wrap_bundle`.
    private_key
        The analyst's X25519 private key, raw (32 bytes) or as an object.
    context
        As given to :func:`wrap_bundle`.

    Returns
    -------
    bytes
        For ``ImageKeyBundle.from_bytes``.

    Raises
    ------
    WrongImageKeyError
        When it was wrapped for somebody else; the message names both key fingerprints.
    EnvelopeVersionError
        When its format version is another one.
    EnvelopeError
        When it is truncated, altered or was wrapped in another context.
    """
    private = _private_key(private_key)
    if len(wrapped) < _MIN_BYTES or wrapped[: len(_MAGIC)] != _MAGIC:
        raise EnvelopeError("The wrapped key bundle is truncated or not one of ours")
    if wrapped[len(_MAGIC)] != FORMAT_VERSION:
        raise EnvelopeVersionError(
            "The wrapped key bundle has an unknown format version",
            expected=FORMAT_VERSION,
            found=wrapped[len(_MAGIC)],
        )
    head = bytes(wrapped[:_HEAD_BYTES])
    ours, theirs = _fingerprint(private.public_key()), head[-_FINGERPRINT_BYTES:]
    if not hmac.compare_digest(ours, theirs):
        raise WrongImageKeyError(
            "The key bundle was wrapped for somebody else",
            expected=f"recipient {ours.hex()}",
            found=f"recipient {theirs.hex()}",
            remedy="Use the kit that was made for this site",
        )
    try:
        return _SUITE.decrypt(bytes(wrapped[_HEAD_BYTES:]), private, _INFO + head + context)
    except (InvalidTag, ValueError) as exc:
        raise EnvelopeError(
            "The wrapped key bundle was altered, or belongs to another federation or site",
            remedy="Ask the data owner for it again",
        ) from exc


def _fingerprint(public: X25519PublicKey) -> bytes:
    return hashlib.sha256(_INFO + public.public_bytes_raw()).digest()[:_FINGERPRINT_BYTES]


def _public_key(key: bytes | X25519PublicKey) -> X25519PublicKey:
    if isinstance(key, X25519PublicKey):
        return key
    if not isinstance(key, bytes) or len(key) != _RAW_KEY_BYTES:
        raise ImageKeyError("An X25519 public key is unusable", expected="32 raw bytes")
    return X25519PublicKey.from_public_bytes(key)


def _private_key(key: bytes | X25519PrivateKey) -> X25519PrivateKey:
    if isinstance(key, X25519PrivateKey):
        return key
    if not isinstance(key, bytes) or len(key) != _RAW_KEY_BYTES:
        raise ImageKeyError("An X25519 private key is unusable", expected="32 raw bytes")
    return X25519PrivateKey.from_private_bytes(key)
