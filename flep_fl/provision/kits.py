"""Make and read startup kits: the names that the rest of the code uses.

Whoever makes the kits is a trusted dealer: for a moment it holds every key. Each kit is one folder,

- ``kit.json``: who takes part (public keys), the shared settings; no secret,
- ``manifest.json``: the SHA-256 of every file, signed by the dealer,
- ``signing.key``: this party's Ed25519 key; ``ca.crt``: the federation's certificate authority,
- site: ``decryption.key`` (X25519), ``node.key`` (ECDSA P-384, its SuperNode) and ``keys.wrapped``, the model
  key and the check key encrypted to this site; after a rotation ``previous-N.wrapped``, the earlier ones,
- owner: nothing more; its signature is what tells the sites that an archive is the owner's,
- cloud: ``model.context``, CKKS parameters without any key, ``server.crt`` and ``server.key`` (TLS); a
  trusted cloud also ``decryption.key`` and ``keys.wrapped`` with the model key.

``dealer/`` beside them is what whoever provisions keeps.
"""

from flep_fl.provision.identities import (
    CLOUD,
    CONTRIBUTE_ONLY,
    DEALER,
    MIXED,
    OWNER,
    CloudKit,
    Federation,
    GenerationKeys,
    OwnerKit,
    SiteIdentity,
    SiteKit,
)
from flep_fl.provision.loading import forget_previous, load_cloud_kit, load_owner_kit, load_site_kit
from flep_fl.provision.operations import add_sites, create_kits, revoke_sites, rotate_keys

__all__ = [
    "CLOUD",
    "CONTRIBUTE_ONLY",
    "DEALER",
    "MIXED",
    "OWNER",
    "CloudKit",
    "Federation",
    "GenerationKeys",
    "OwnerKit",
    "SiteIdentity",
    "SiteKit",
    "add_sites",
    "create_kits",
    "forget_previous",
    "load_cloud_kit",
    "load_owner_kit",
    "load_site_kit",
    "revoke_sites",
    "rotate_keys",
]
