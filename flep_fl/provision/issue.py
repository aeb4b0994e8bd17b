"""Make the files of one party's kit from what the dealer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from flep_fl.provision import description, manifest
from flep_fl.provision.certificates import new_node_key
from flep_fl.provision.identities import (
    ANALYST,
    CLOUD,
    CONTRIBUTE_ONLY,
    MIXED,
    OWNER,
    Federation,
    GenerationKeys,
    SiteIdentity,
)
from flep_fl.provision.loading import KEYS, previous_name
from flep_fl.provision.wrapped_keys import wrap_keys

PREVIOUS_KEPT = 3
"""How many earlier generations a kit may hold: rotations without an accepted sum between them."""


@dataclass(frozen=True, slots=True)
class NewSite:
    """A site that gets its first kit: who it is, and its secret files by name."""

    identity: SiteIdentity
    secrets: Mapping[str, bytes]


def new_site(name: str, shared: Mapping[str, Mapping[str, object]]) -> NewSite:
    """Draw a site's own keys; its role and consents follow from the shared settings."""
    signing, decryption = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
    node_key, node_public = new_node_key()
    contribute_only = shared["ckks"].get("contribute_only")
    identity = SiteIdentity(
        name,
        signing.public_key().public_bytes_raw(),
        decryption.public_key().public_bytes_raw(),
        node_public,
        CONTRIBUTE_ONLY if isinstance(contribute_only, list) and name in contribute_only else ANALYST,
        (MIXED,) if shared["cloud"]["trust"] == MIXED else (),
    )
    secrets = {
        "signing.key": signing.private_bytes_raw(),
        "decryption.key": decryption.private_bytes_raw(),
        "node.key": node_key,
    }
    return NewSite(identity, secrets)


def keys_for(
    party: str, keys: GenerationKeys, federation: Federation, dealer: Ed25519PrivateKey
) -> dict[str, bytes]:
    """Return ``keys.wrapped`` of a party, or nothing for one that gets no key.

    A trusted cloud gets the model key alone, an analyst the model key and the check key, and a
    contribute-only site the public key and the check key.
    """
    if party == CLOUD and federation.trust == "trusted":
        theirs = replace(keys, check_key=b"", public_key=None)
        recipient = federation.cloud_encryption_key
    elif party in federation.sites:
        site = federation.sites[party]
        analyst = site.role == ANALYST
        theirs = replace(keys, public_key=None) if analyst else replace(keys, model_key=None)
        recipient = site.encryption_key
    else:
        return {}
    return {KEYS: _wrap(party, theirs, recipient, federation, dealer)}


def earlier_keys_for(
    party: str, keys: GenerationKeys, federation: Federation, dealer: Ed25519PrivateKey
) -> dict[str, bytes]:
    """Return the file with a past generation's keys; only those who could decrypt have a use for it."""
    site = federation.sites.get(party)
    if site is None or site.role != ANALYST:
        return {}
    name = previous_name(keys.generation)
    return {name: _wrap(party, keys, site.encryption_key, federation, dealer)}


def role_of(party: str) -> str:
    """Return the role that a kit names: ``cloud``, ``owner`` or ``site``."""
    return party if party in (CLOUD, OWNER) else "site"


def sealed_kit(
    party: str,
    federation: Federation,
    descriptions: description.KitDescriptions,
    fresh: Mapping[str, bytes],
    kept: Mapping[str, str],
    dealer: Ed25519PrivateKey,
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Complete a kit with its ``kit.json`` and its signed manifest.

    Parameters
    ----------
    party, federation, descriptions
        Whose kit, and what it says.
    fresh
        Files that are new.
    kept
        SHA-256 (hex) by name of the files that the party has already and keeps.
    dealer
        Signs the manifest.

    Returns
    -------
    dict
        All new files by name, the manifest among them.
    dict
        SHA-256 (hex) of all files but the manifest, new and kept.
    """
    files = {**fresh, description.NAME: descriptions.of(role_of(party), party)}
    digests = {**kept, **{name: manifest.file_digest(data) for name, data in files.items()}}
    optional = {name for name in digests if name.startswith("previous-")}
    signed = manifest.sign_manifest(
        manifest.Manifest(
            federation=federation.federation,
            role=role_of(party),
            party=party,
            generation=federation.generation,
            revision=federation.revision,
            files={name: digest for name, digest in digests.items() if name not in optional},
            optional={name: digest for name, digest in digests.items() if name in optional},
            dealer=dealer.public_key().public_bytes_raw(),
        ),
        dealer,
    )
    return {**files, manifest.NAME: signed}, digests


def _wrap(
    party: str, keys: GenerationKeys, recipient: bytes, federation: Federation, dealer: Ed25519PrivateKey
) -> bytes:
    return wrap_keys(
        keys,
        federation=federation.federation,
        party=party,
        recipient=X25519PublicKey.from_public_bytes(recipient),
        dealer=dealer,
    )
