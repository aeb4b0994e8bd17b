"""The federation's own certificate authority, the cloud's TLS certificate, SuperNode keys.

P-384 throughout: what Flower asks of node keys, and what every TLS library accepts.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flep_fl.contracts.errors import CertificateError, ConfigError, KitError
from flep_fl.contracts.files import read_bytes

_SKEW = timedelta(hours=1)
"""How far a site's clock may be behind the dealer's."""

_ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Names of the cloud for itself, and for a site that reaches it through a tunnel."""

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def new_private_key() -> bytes:
    """Make a P-384 private key: PEM, PKCS 8, no passphrase."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_node_key() -> tuple[bytes, bytes]:
    """Make a SuperNode's key pair: private in OpenSSH's format, as Flower reads it; public in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def public_half(private_key: bytes) -> bytes:
    """Return the public key (PEM) of :func:`new_private_key`."""
    public = _load_private(private_key).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def new_authority(private_key: bytes, *, federation: str, days: int) -> bytes:
    """Make the federation's root certificate, PEM.

    Parameters
    ----------
    private_key
        The authority's key, PEM.
    federation
        Identifier of the federation, part of the name.
    days
        How long it is valid.
    """
    key = _load_private(private_key)
    name = _name(f"FLEP federation {federation[:8]} CA")
    public = key.public_key()
    certificate = (
        _builder(name, name, public, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def new_server_certificate(
    public_key: bytes, *, hosts: Sequence[str], ca: bytes, ca_key: bytes, days: int
) -> bytes:
    """Make the certificate of the sites' port, PEM. It never outlives the authority.

    Parameters
    ----------
    public_key
        The cloud's TLS public key, PEM.
    hosts
        Names and addresses by which sites reach the cloud; those of this machine are added.
    ca, ca_key
        The authority's certificate and key, PEM.
    days
        How long it is valid.

    Raises
    ------
    ConfigError
        A host is neither a name nor an address.
    """
    authority, signer = x509.load_pem_x509_certificate(ca), _load_private(ca_key)
    public = load_pem_public_key(public_key)
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise KitError("The cloud's TLS key is not an elliptic-curve key", remedy="Provision new kits")
    names = [general_name(host) for host in dict.fromkeys((*hosts, *_ALWAYS))]
    certificate = (
        _builder(_name("FLEP AI cloud"), authority.subject, public, days, authority.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def general_name(host: str) -> x509.GeneralName:
    """Return a host for a certificate: an IP address or a DNS name.

    Raises
    ------
    ConfigError
        It is neither, or an address that nobody can dial (``0.0.0.0``).
    """
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.split(".")):
            raise ConfigError(
                f"{host!r} is neither a host name nor an IP address",
                remedy="Give runtime.address and provision.hosts as the sites will dial them",
            ) from None
        return x509.DNSName(host.lower())
    if address.is_unspecified:
        raise ConfigError(
            f"{host} is where a server listens, not what a site can dial",
            remedy="Provision with the address that sites reach, for instance runtime.address=10.0.0.5:9092; "
            "the server alone may then be started with runtime.address=0.0.0.0:9092",
        )
    return x509.IPAddress(address)


def fingerprint_of(certificate: bytes) -> str:
    """Return the SHA-256 (hex) of a certificate's DER form."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(SHA256()).hex()


def require_valid(path: Path, *, what: str, now: datetime | None = None) -> None:
    """Refuse a certificate outside its time.

    Parameters
    ----------
    path
        The certificate, PEM.
    what
        Its meaning, for the message.
    now
        The time; the clock's where None.

    Raises
    ------
    CertificateError
        It has expired, or is not valid yet (a clock is wrong).
    KitError
        It cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(read_bytes(path, what=what, error=KitError))
    except ValueError as exc:
        raise KitError(f"{path} is not a certificate", remedy="Copy the kit again") from exc
    now = datetime.now(UTC) if now is None else now
    if now > certificate.not_valid_after_utc:
        raise CertificateError(
            f"{what} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: {path}",
            remedy="Run `python -m scripts.provision action=rotate out=KITS` and copy the kits' new files",
        )
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{what} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only: {path}",
            found=f"{now:%Y-%m-%d %H:%M} UTC on this machine's clock",
            remedy="Set the clock",
        )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(end if latest is None else min(end, latest))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _load_private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as exc:
        raise KitError("A private key of the dealer is damaged", remedy="Restore it from a backup") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KitError("A private key of the dealer has another type", remedy="Restore it from a backup")
    return key
