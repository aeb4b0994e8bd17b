"""TLS and node authentication of the port that faces the sites. Imports no flwr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CloudSecurity:
    """What the cloud shows to the sites, and which sites it knows.

    Attributes
    ----------
    certificate
        The server's certificate chain, PEM; its subject alternative names hold the host that the sites dial.
    private_key
        The certificate's private key, PEM without a passphrase, 0600.
    ca
        Certificate of the authority that the sites trust, PEM.
    node_keys
        Public key of every site's SuperNode by site name: ECDSA P-384, PEM (``SubjectPublicKeyInfo``).
    """

    certificate: Path
    private_key: Path
    ca: Path
    node_keys: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class SiteSecurity:
    """What a site trusts, and what it shows to the cloud.

    Attributes
    ----------
    ca
        Certificate of the authority that signed the cloud's certificate, PEM.
    node_key
        This site's private node key: ECDSA P-384, PEM (PKCS 8 or OpenSSH) without a passphrase, 0600.
    """

    ca: Path
    node_key: Path
