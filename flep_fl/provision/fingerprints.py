"""Short forms of public keys that two people can compare by telephone."""

from __future__ import annotations

import hashlib

from flep_fl.provision.identities import CLOUD, DEALER, OWNER, Federation

_BYTES = 16
_GROUP = 4


def fingerprint(*keys: bytes) -> str:
    """Return 128 bits of the SHA-256 over the keys (each with its length), in groups of four hex digits."""
    digest = hashlib.sha256(b"flep-fl/v1/fingerprint")
    for key in keys:
        digest.update(len(key).to_bytes(4, "big") + key)
    return grouped(digest.digest()[:_BYTES].hex())


def grouped(digits: str) -> str:
    """Put a space after every four digits."""
    return " ".join(digits[start : start + _GROUP] for start in range(0, len(digits), _GROUP))


def fingerprints(federation: Federation, dealer: bytes) -> list[tuple[str, str]]:
    """Return ``(what, fingerprint)`` of everybody in a federation.

    Parameters
    ----------
    federation
        As in any kit.
    dealer
        The dealer's public key, 32 bytes.

    Returns
    -------
    list of (str, str)
        The dealer, the certificates, the cloud, the owner, the sites (all public keys of a party together).
    """
    rows = [
        (DEALER, fingerprint(dealer)),
        ("certificate authority", grouped(federation.ca_fingerprint[: 2 * _BYTES])),
        ("cloud's certificate", grouped(federation.server_fingerprint[: 2 * _BYTES])),
        (CLOUD, fingerprint(federation.cloud_verify_key, federation.cloud_encryption_key)),
        (OWNER, fingerprint(federation.owner_verify_key)),
        (f"model key, generation {federation.generation}", grouped(federation.key_id)),
    ]
    rows += [
        (f"site {site.name}", fingerprint(site.verify_key, site.encryption_key, site.node_key))
        for site in federation.sites.values()
    ]
    return rows
