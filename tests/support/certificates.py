"""Certificates and node keys for tests, made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from flep_fl.contracts.files import write_secret


class Authority:
    """A certificate authority with its files in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.crt"
        self.node_keys: dict[str, bytes] = {}
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        certificate = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.ca.write_bytes(certificate.sign(self._key, hashes.SHA384()).public_bytes(Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float = 1.0
    ) -> x509.CertificateBuilder:
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
        return (
            x509.CertificateBuilder(None, subject, key)
            .serial_number(x509.random_serial_number())
            .issuer_name(self._name)
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=2 + days))
        )

    def server(self, name: str = "server", host: str = "127.0.0.1", days: float = 1.0) -> tuple[Path, Path]:
        """Make a server certificate and its key; negative ``days``: it has expired that long ago."""
        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud")])
        builder = self._builder(subject, key.public_key(), days).add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False
        )
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(builder.sign(self._key, hashes.SHA384()).public_bytes(Encoding.PEM))
        write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private

    def node(self, site: str, *, known: bool = True, form: PrivateFormat = PrivateFormat.OpenSSH) -> Path:
        """Make a site's node key; ``known``: the cloud is told of it."""
        key = ec.generate_private_key(ec.SECP384R1())
        path = self.folder / f"{site}.node.key"
        write_secret(path, key.private_bytes(Encoding.PEM, form, NoEncryption()))
        if known:
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            self.node_keys[site] = public
        return path

    def known_keys(self) -> Path:
        """Write the node keys that the cloud is told of."""
        path = self.folder / "nodes.json"
        path.write_text(json.dumps({site: pem.decode() for site, pem in self.node_keys.items()}))
        return path
