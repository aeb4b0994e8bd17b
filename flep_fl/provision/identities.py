"""Who takes part in a federation, and what each party starts from. Records alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.config import shared_digest

CLOUD = "cloud"
OWNER = "owner"
DEALER = "dealer"
ANALYST = "analyst"
CONTRIBUTE_ONLY = "contribute_only"
MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class SiteIdentity:
    """What everybody may know of a site.

    Attributes
    ----------
    name
        Its name.
    verify_key, encryption_key
        Ed25519 and X25519 public keys, 32 raw bytes each.
    node_key
        Public key of its SuperNode, ECDSA P-384, PEM.
    role
        ``analyst`` (holds the model key) or ``contribute_only`` (holds the public key, cannot decrypt).
    consents
        What this site agrees to beyond the default; ``mixed`` is the only word in use.
    """

    name: str
    verify_key: bytes
    encryption_key: bytes
    node_key: bytes = b""
    role: str = ANALYST
    consents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Federation:
    """The public half of every kit.

    Attributes
    ----------
    federation
        Random identifier of the federation, 32 hex digits.
    key_id
        Identifier derived from the analysts' model key.
    address
        HOST:PORT at which sites reach the cloud.
    cloud_verify_key, owner_verify_key
        The cloud's and the data owner's Ed25519 public keys, 32 bytes.
    sites
        The sites by name.
    shared
        The settings that all parties hold alike.
    generation
        Counts the model keys: 1 at first, one more after each rotation.
    revision
        Counts what was changed within a generation: 0 at first, one more after each added site.
    tls
        Whether the sites' port uses TLS and node authentication.
    ca_fingerprint, server_fingerprint
        SHA-256 (hex) of the certificates, DER; empty in tests that need none.
    cloud_encryption_key
        X25519 public key of a trusted cloud; empty for any other.
    """

    federation: str
    key_id: str
    address: str
    cloud_verify_key: bytes
    owner_verify_key: bytes
    sites: Mapping[str, SiteIdentity]
    shared: Mapping[str, Any]
    generation: int = 1
    revision: int = 0
    tls: bool = False
    ca_fingerprint: str = ""
    server_fingerprint: str = ""
    cloud_encryption_key: bytes = b""

    @property
    def agreement(self) -> dict[str, Any]:
        """The shared settings and which kits they came with: parties compare this before a run."""
        return {**self.shared, "kits": {"generation": self.generation, "revision": self.revision}}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`agreement`."""
        return shared_digest(self.agreement)

    @property
    def trust(self) -> str:
        """``cloud.trust`` of the shared settings."""
        return str(self.shared["cloud"]["trust"])

    def site_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """Return the sites' signature keys by name; the same mapping for the same sites."""
        return _public_keys(tuple((name, site.verify_key) for name, site in self.sites.items()))

    def node_keys(self) -> dict[str, bytes]:
        """Return the public keys of the sites' SuperNodes by site, PEM."""
        return {name: s.node_key for name, s in self.sites.items()}

    def cloud_key(self) -> Ed25519PublicKey:
        """Return the cloud's signature key."""
        return Ed25519PublicKey.from_public_bytes(self.cloud_verify_key)

    def without_consent(self, word: str) -> list[str]:
        """Return the sites that do not consent to ``word``."""
        return sorted(name for name, site in self.sites.items() if word not in site.consents)


@lru_cache(maxsize=4)
def _public_keys(keys: tuple[tuple[str, bytes], ...]) -> Mapping[str, Ed25519PublicKey]:
    # A simulation of K sites would hold K * K keys otherwise.
    return MappingProxyType({name: Ed25519PublicKey.from_public_bytes(key) for name, key in keys})


@dataclass(frozen=True, slots=True)
class CloudKit:
    """What the cloud starts from. ``model_key`` is None unless the cloud is trusted."""

    folder: Path
    federation: Federation
    signing_key: Ed25519PrivateKey = field(repr=False)
    context: bytes = field(repr=False)
    model_key: bytes | None = field(repr=False)

    @property
    def certificate(self) -> Path:
        """The TLS certificate of the sites' port, PEM."""
        return self.folder / "server.crt"

    @property
    def private_key(self) -> Path:
        """The certificate's private key, PEM."""
        return self.folder / "server.key"

    @property
    def ca(self) -> Path:
        """The authority that signed the certificate, PEM."""
        return self.folder / "ca.crt"


@dataclass(frozen=True, slots=True)
class OwnerKit:
    """What the data owner starts from; the image keys are its own affair and made when it seals."""

    folder: Path
    federation: Federation
    signing_key: Ed25519PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class GenerationKeys:
    """The keys of one generation, as a site gets them.

    Attributes
    ----------
    generation, key_id
        Which generation; identifier of its model key.
    model_key
        ``ModelKey.to_bytes()``; None for a contribute-only site.
    public_key
        Public encryption key, for a contribute-only site; None for all others.
    check_key
        ``CheckKey.to_bytes()``; empty for a trusted cloud, which does not get it.
    """

    generation: int
    key_id: str
    model_key: bytes | None = field(repr=False)
    public_key: bytes | None = field(repr=False)
    check_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SiteKit:
    """What one analyst starts from.

    Attributes
    ----------
    model_key, public_key, check_key
        The current generation's; see :class:`GenerationKeys`.
    previous
        Earlier generations that this site has not yet forgotten, the newest first. Their only use is to
        open the last sum that was accepted under them.
    """

    folder: Path
    name: str
    federation: Federation
    signing_key: Ed25519PrivateKey = field(repr=False)
    decryption_key: X25519PrivateKey = field(repr=False)
    model_key: bytes | None = field(repr=False)
    check_key: bytes = field(repr=False)
    public_key: bytes | None = field(repr=False, default=None)
    previous: tuple[GenerationKeys, ...] = field(repr=False, default=())

    @property
    def identity(self) -> SiteIdentity:
        """Its entry in the federation."""
        return self.federation.sites[self.name]

    @property
    def contribute_only(self) -> bool:
        """Whether this site sends updates and cannot decrypt."""
        return self.identity.role == CONTRIBUTE_ONLY

    @property
    def consents(self) -> tuple[str, ...]:
        """What this site agrees to beyond the default."""
        return self.identity.consents

    @property
    def node_key(self) -> Path:
        """The private key of this site's SuperNode."""
        return self.folder / "node.key"

    @property
    def ca(self) -> Path:
        """The authority that signed the cloud's certificate, PEM."""
        return self.folder / "ca.crt"
