r"""One generation's keys, encrypted to one party and signed by the dealer.

HPKE (RFC 9180: X25519, HKDF-SHA256, AES-256-GCM) hides the keys from everybody but the party; the dealer's
Ed25519 signature says who wrapped them. So the file may travel in the open, which is how a rotation reaches
sites that already have their private keys. Format: ``"FLEPKW1\n" || head length (4 bytes, big-endian) ||
head (JSON) || ciphertext || signature (64 bytes)``; the head is bound to the ciphertext.
"""

from __future__ import annotations

import base64
import json

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from flep_fl.config import canonical_json
from flep_fl.contracts.errors import KitError, KitMismatchError
from flep_fl.provision.identities import GenerationKeys
from flep_fl.provision.manifest import AGAIN

_MAGIC = b"FLEPKW1\n"
_INFO = b"flep-fl/v1/kit-keys/"
_SIGNATURE_BYTES = 64
_LENGTH_BYTES = 4
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def wrap_keys(
    keys: GenerationKeys,
    *,
    federation: str,
    party: str,
    recipient: X25519PublicKey,
    dealer: Ed25519PrivateKey,
) -> bytes:
    """Encrypt a generation's keys to one party and sign the result.

    Parameters
    ----------
    keys
        What this party may have; leave out (None) what it may not.
    federation, party
        Bound to the ciphertext.
    recipient
        The party's public key.
    dealer
        Signs.
    """
    head = canonical_json(_head(keys.generation, keys.key_id, federation, party))
    payload = {
        name: base64.b64encode(value).decode()
        for name, value in (
            ("model_key", keys.model_key),
            ("public_key", keys.public_key),
            ("check_key", keys.check_key),
        )
        if value
    }
    sealed = _SUITE.encrypt(canonical_json(payload), recipient, _INFO + head)
    body = _MAGIC + len(head).to_bytes(_LENGTH_BYTES, "big") + head + sealed
    return body + dealer.sign(_INFO + body)


def unwrap_keys(
    data: bytes,
    *,
    name: str,
    federation: str,
    party: str,
    private_key: X25519PrivateKey,
    dealer: bytes,
) -> GenerationKeys:
    """Verify and decrypt what :func:`wrap_keys` made.

    Parameters
    ----------
    data
        The file's content.
    name
        The file's name, for messages.
    federation, party
        As in this party's kit.
    private_key
        This party's key.
    dealer
        Public key of the dealer that this party trusts, 32 bytes.

    Raises
    ------
    KitError
        It is damaged, or not encrypted to this key.
    KitMismatchError
        It was made for another party or federation, or by another dealer.
    """
    body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
    start = len(_MAGIC) + _LENGTH_BYTES
    if not body.startswith(_MAGIC) or len(body) < start:
        raise KitError(f"{name} holds no wrapped keys of this release", remedy=AGAIN)
    try:
        Ed25519PublicKey.from_public_bytes(dealer).verify(signature, _INFO + body)
    except InvalidSignature as exc:
        raise KitMismatchError(f"{name} is not signed by this federation's dealer", remedy=AGAIN) from exc
    length = int.from_bytes(body[len(_MAGIC) : start], "big")
    head, sealed = body[start : start + length], body[start + length :]
    try:
        told = json.loads(head)
        generation, key_id = int(told["generation"]), str(told["key_id"])
        if canonical_json(_head(generation, key_id, federation, party)) != head:
            raise KitMismatchError(
                f"{name} was wrapped for somebody else",
                expected=f"{party} of federation {federation}",
                found=f"{told.get('party')} of federation {told.get('federation')}",
                remedy="Use the kit that was made for this party",
            )
        payload = json.loads(_SUITE.decrypt(sealed, private_key, _INFO + head))
        opened = {key: base64.b64decode(value, validate=True) for key, value in payload.items()}
    except InvalidTag as exc:
        raise KitMismatchError(
            f"{name} does not open with this party's decryption.key", remedy=AGAIN
        ) from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise KitError(f"{name} is damaged", remedy=AGAIN) from exc
    return GenerationKeys(
        generation,
        key_id,
        opened.get("model_key"),
        opened.get("public_key"),
        opened.get("check_key", b""),
    )


def _head(generation: int, key_id: str, federation: str, party: str) -> dict[str, object]:
    return {"federation": federation, "party": party, "generation": generation, "key_id": key_id}
