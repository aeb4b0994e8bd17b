"""Key bundles and rings, wrapped for one recipient with HPKE (RFC 9180; X25519, HKDF-SHA256, AES-256-GCM).

HPKE's base mode hides the keys from everybody but the recipient. It does not say who wrapped them: they
travel inside something that is signed (an archive).
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, ImageKeyError, WrongImageKeyError

FORMAT_VERSION = 1
_BUNDLE, _RING = 1, 2
_KINDS = {_BUNDLE: "key bundle", _RING: "ring of key bundles"}
_MAGIC = b"FLEW"
_FINGERPRINT_BYTES = 16
_RAW_KEY_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + 2 + _FINGERPRINT_BYTES
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
    return _wrap(_BUNDLE, bundle_bytes, recipient, context)


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
        When it is truncated, altered, not a bundle, or was wrapped in another context.
    """
    return _unwrap(_BUNDLE, wrapped, private_key, context)


def wrap_ring(ring_bytes: bytes, recipient: bytes | X25519PublicKey, *, context: bytes) -> bytes:
    """Encrypt a serialised ring (``BundleRing.to_bytes()``) to one recipient, as :func:`wrap_bundle` does.

    Raises
    ------
    ImageKeyError
        When the public key is not a usable X25519 key.
    """
    return _wrap(_RING, ring_bytes, recipient, context)


def unwrap_ring(wrapped: bytes, private_key: bytes | X25519PrivateKey, *, context: bytes) -> bytes:
    """Decrypt what :func:`wrap_ring` gave, for ``BundleRing.from_bytes``.

    Raises
    ------
    WrongImageKeyError, EnvelopeVersionError, EnvelopeError
        As :func:`unwrap_bundle`.
    """
    return _unwrap(_RING, wrapped, private_key, context)


def _wrap(kind: int, data: bytes, recipient: bytes | X25519PublicKey, context: bytes) -> bytes:
    public = _public_key(recipient)
    head = _MAGIC + bytes([FORMAT_VERSION, kind]) + _fingerprint(public)
    try:
        return head + _SUITE.encrypt(data, public, _INFO + head + context)
    except ValueError as exc:
        raise ImageKeyError(
            "The recipient's public key is not usable", remedy="Have the analyst make a new key pair"
        ) from exc


def _unwrap(kind: int, wrapped: bytes, private_key: bytes | X25519PrivateKey, context: bytes) -> bytes:
    what = f"The wrapped {_KINDS[kind]}"
    private = _private_key(private_key)
    if not isinstance(wrapped, bytes) or len(wrapped) < _MIN_BYTES or wrapped[: len(_MAGIC)] != _MAGIC:
        raise EnvelopeError(f"{what} is truncated or not one of ours")
    version, found = wrapped[len(_MAGIC)], wrapped[len(_MAGIC) + 1]
    if version != FORMAT_VERSION:
        raise EnvelopeVersionError(
            f"{what} has an unknown format version", expected=FORMAT_VERSION, found=version
        )
    if found != kind:
        raise EnvelopeError(
            f"{what} is something else", expected=f"a {_KINDS[kind]}", found=_KINDS.get(found, found)
        )
    head = wrapped[:_HEAD_BYTES]
    ours, theirs = _fingerprint(private.public_key()), head[-_FINGERPRINT_BYTES:]
    if not hmac.compare_digest(ours, theirs):
        raise WrongImageKeyError(
            f"{what} was made for somebody else",
            expected=f"recipient {ours.hex()}",
            found=f"recipient {theirs.hex()}",
            remedy="Use the kit that was made for this site",
        )
    try:
        return _SUITE.decrypt(wrapped[_HEAD_BYTES:], private, _INFO + head + context)
    except (InvalidTag, ValueError) as exc:
        raise EnvelopeError(
            f"{what} was altered, or belongs to another federation or site",
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
