"""Load certificates and node keys, and find out by name why a cloud and a site do not come together."""

from __future__ import annotations

import datetime
import hashlib
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flep_fl.contracts.errors import TransportSecurityError
from flep_fl.flower.runtime.environment import parse_address
from flep_fl.flower.runtime.security import CloudSecurity, SiteSecurity

_PROBE_LIMIT = 3.0
"""Seconds that the cloud gets to answer a probe; the SuperNode tries again anyway."""

_FINGERPRINT_DIGITS = 16

_EXPIRED, _NOT_YET_VALID = 10, 9  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID
_OTHER_NAMES = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def fingerprint(public_key: bytes) -> str:
    """Return a short name for a node's public key (PEM): the head of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:_FINGERPRINT_DIGITS]


def server_context(security: CloudSecurity) -> ssl.SSLContext:
    """Return the TLS settings of the sites' port: TLS 1.3 with the cloud's certificate.

    Raises
    ------
    TransportSecurityError
        When a file is missing or damaged, key and certificate do not belong together, or the certificate's
        time is over: every site would refuse it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(security.certificate, security.private_key)
        certificate = x509.load_pem_x509_certificate(security.certificate.read_bytes())
    except (OSError, ValueError) as exc:
        raise TransportSecurityError(
            f"The certificate {security.certificate} with the key {security.private_key} cannot be used",
            found=getattr(exc, "reason", None) or getattr(exc, "strerror", None) or type(exc).__name__,
            remedy="Use the cloud's kit as it was provisioned",
        ) from exc
    now = datetime.datetime.now(datetime.UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        raise TransportSecurityError(
            f"The cloud's certificate {security.certificate} is not valid now",
            expected=f"a time from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC",
            found=f"{now:%Y-%m-%d %H:%M} UTC",
            remedy="Check this machine's clock, or let the dealer issue a new certificate",
        )
    return context


def client_context(ca: Path) -> ssl.SSLContext:
    """Return the TLS settings with which a site checks the cloud: this authority and no other.

    Raises
    ------
    TransportSecurityError
        When the authority's certificate is missing or damaged.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=ca)
    except (OSError, ValueError) as exc:
        raise TransportSecurityError(
            f"The authority's certificate {ca} cannot be read",
            found=getattr(exc, "reason", None) or exc.strerror if isinstance(exc, OSError) else None,
            remedy="Use this site's kit as it was provisioned",
        ) from exc
    return context


def normal_node_keys(node_keys: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the sites' public node keys exactly as a SuperNode shows its own.

    Raises
    ------
    TransportSecurityError
        When a key is not one of ECDSA P-384, or two sites have the same.
    """
    found: dict[str, bytes] = {}
    for site, pem in sorted(node_keys.items()):
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise _wrong_node_key(f"The public node key of site {site}") from exc
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise _wrong_node_key(f"The public node key of site {site}")
        found[site] = _public_pem(key)
    if len(set(found.values())) < len(found):
        raise TransportSecurityError(
            "Two sites have the same node key", remedy="Use the kits as they were provisioned"
        )
    return found


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a site's private node key (PEM in PKCS 8 or OpenSSH's format, without a passphrase).

    Raises
    ------
    TransportSecurityError
        When the file is missing, or holds no key of ECDSA P-384.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise TransportSecurityError(
            f"The node key {path} cannot be read",
            found=exc.strerror,
            remedy="Use this site's kit as it was provisioned",
        ) from exc
    key = parse_private_key(content)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _wrong_node_key(f"The node key {path}")
    return key


def parse_private_key(content: bytes) -> object | None:
    """Return the private key in a PEM of PKCS 8 or of OpenSSH; None where there is none."""
    for load in (serialization.load_pem_private_key, serialization.load_ssh_private_key):
        try:
            return load(content, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
    return None


def node_fingerprint(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the fingerprint of a private key's public half."""
    return fingerprint(_public_pem(key.public_key()))


def require_same_language(cloud: str, security: SiteSecurity | None) -> None:
    """Raise when the cloud is there but TLS with it cannot work; say nothing when it is not there.

    Parameters
    ----------
    cloud
        ``host:port``.
    security
        What the site trusts; None: the site expects no TLS.

    Raises
    ------
    TransportSecurityError
        The cloud's certificate is of another authority, of another host, or of another time; or only one
        of the two speaks TLS.
    """
    host, port = parse_address(cloud)
    if security is None:
        # The certificate does not matter here: nothing is sent after the handshake.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = client_context(security.ca)
    try:
        with (
            socket.create_connection((host, port), timeout=_PROBE_LIMIT) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            pass
    except ssl.SSLCertVerificationError as exc:
        raise _refused_certificate(cloud, host, exc) from exc
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return  # it went away in the middle
    except ssl.SSLError as exc:
        if security is None:
            return
        raise TransportSecurityError(
            f"{cloud} does not speak TLS with this site",
            found=exc.reason or "no TLS",
            remedy="Is this the federation's cloud, started with its kit and TLS on? "
            "Or does another program answer there?",
        ) from exc
    except OSError:
        return
    if security is None:
        raise TransportSecurityError(
            f"{cloud} wants TLS, and this site was started without",
            remedy="Start the site with the kit that was provisioned for this address",
        )


def _refused_certificate(cloud: str, host: str, exc: ssl.SSLCertVerificationError) -> TransportSecurityError:
    if exc.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return TransportSecurityError(
            f"The certificate of {cloud} is not valid now",
            found=exc.verify_message,
            remedy="Check this machine's clock; the dealer can issue a new certificate for the cloud",
        )
    if exc.verify_code in _OTHER_NAMES:
        return TransportSecurityError(
            f"The certificate of {cloud} is not for this address",
            expected=f"a certificate for {host}",
            found=exc.verify_message,
            remedy="Dial the address that was provisioned, or provision the cloud again for this one",
        )
    return TransportSecurityError(
        f"The certificate of {cloud} is not from this federation's authority; nothing was sent to it",
        found=exc.verify_message,
        remedy="Another program or somebody in between answers there, or the kits are of two federations",
    )


def _wrong_node_key(what: str) -> TransportSecurityError:
    return TransportSecurityError(
        f"{what} cannot be used",
        expected="a key of ECDSA P-384 in PEM, without a passphrase",
        remedy="Use the kits as they were provisioned",
    )


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
