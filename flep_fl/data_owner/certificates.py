"""The owner's own certificate authority: one root, one certificate for the gateway, TLS 1.3.

Devices and analysts trust this root and no other, so no public authority can stand in for the gateway. Keys
are ECDSA P-256 (what every TLS library speaks); who asks for what is settled by Ed25519 signatures above TLS.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flep_fl.contracts.errors import GatewayCertificateError
from flep_fl.contracts.files import write_atomic, write_secret

ROOT_DAYS = 3650
LEAF_DAYS = 397
_CLOCK_ALLOWANCE = datetime.timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a listener's certificate, its key and, if clients must show one too, their authority lie."""

    certificate: Path
    private_key: Path
    client_ca: Path | None = None


def create_authority(certificate: Path, private_key: Path, *, name: str) -> None:
    """Make a root: a certificate that may sign others' and nothing else, valid for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    built = (
        _builder(subject, subject, key.public_key(), ROOT_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_secret(private_key, _pem(key))
    write_atomic(certificate, built.public_bytes(serialization.Encoding.PEM))


def issue_certificate(
    authority: TlsFiles, out: TlsFiles, *, name: str, hosts: Sequence[str] = (), client: bool = False
) -> None:
    """Issue a certificate under the owner's root, valid for thirteen months.

    Parameters
    ----------
    authority
        The root's certificate and key.
    out
        Where certificate and key go; a key that is there already is used again.
    name
        Common name, for people to read.
    hosts
        DNS names and IP addresses under which clients reach the gateway; they check them.
    client
        For a client (device, analyst) instead of a server.

    Raises
    ------
    GatewayCertificateError
        The authority cannot be read, or there is no host for a server.
    """
    if not hosts and not client:
        raise GatewayCertificateError(
            "a certificate for the gateway needs a host", remedy="Add hosts=[NAME_OR_IP]"
        )
    root, root_key = _load_authority(authority)
    key: ec.EllipticCurvePrivateKey
    key = _load_key(out.private_key) if out.private_key.exists() else ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    builder = (
        _builder(_name(name), root.subject, key.public_key(), LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False
        )
    )
    if hosts:
        names = [_host(host) for host in hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    built = builder.sign(root_key, hashes.SHA256())
    write_secret(out.private_key, _pem(key))
    write_atomic(out.certificate, built.public_bytes(serialization.Encoding.PEM))


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a listener's TLS settings: TLS 1.3 alone; with ``client_ca``, clients must show a certificate.

    Raises
    ------
    GatewayCertificateError
        A file is missing or damaged, key and certificate do not belong together, or the time is over.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.private_key)
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        if files.client_ca is not None:
            context.load_verify_locations(cafile=files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as exc:
        raise GatewayCertificateError(
            f"the certificate cannot be used: {files.certificate}",
            found=getattr(exc, "reason", None) or getattr(exc, "strerror", None) or type(exc).__name__,
            remedy="Issue it again with action=keys",
        ) from exc
    now = datetime.datetime.now(datetime.UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        raise GatewayCertificateError(
            f"the certificate is not valid now: {files.certificate}",
            expected=f"a time from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC",
            found=f"{now:%Y-%m-%d %H:%M} UTC",
            remedy="Check this machine's clock, or issue it again with action=keys",
        )
    return context


def client_context(ca: Path, own: TlsFiles | None = None) -> ssl.SSLContext:
    """Return a client's TLS settings: the owner's root and no other; ``own`` is shown where it is asked for.

    Raises
    ------
    GatewayCertificateError
        A file is missing or damaged.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cafile=ca)
        if own is not None:
            context.load_cert_chain(own.certificate, own.private_key)
    except (OSError, ValueError) as exc:
        raise GatewayCertificateError(
            f"the owner's root certificate cannot be used: {ca}",
            found=getattr(exc, "reason", None) or getattr(exc, "strerror", None) or type(exc).__name__,
            remedy="Copy tls/ca.crt from the owner's home once more",
        ) from exc
    return context


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_ALLOWANCE)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as exc:
        raise GatewayCertificateError(
            "a host is neither a DNS name nor an IP address", expected="plain ASCII", found=host
        ) from exc


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise GatewayCertificateError(f"a TLS key cannot be read: {path}") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise GatewayCertificateError(f"a TLS key has the wrong kind: {path}", expected="ECDSA")
    return key


def _load_authority(files: TlsFiles) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        root = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    except (OSError, ValueError) as exc:
        raise GatewayCertificateError(
            f"the owner's root certificate cannot be read: {files.certificate}"
        ) from exc
    return root, _load_key(files.private_key)
