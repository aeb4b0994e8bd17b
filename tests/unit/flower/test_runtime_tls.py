"""What keeps a cloud and a site apart is named: certificates, node keys, TLS on one side only."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

from flep_fl.contracts.errors import TransportSecurityError
from flep_fl.flower.runtime.ports import Refusals, format_node_keys, parse_node_keys
from flep_fl.flower.runtime.security import CloudSecurity, SiteSecurity
from flep_fl.flower.runtime.tls import (
    client_context,
    fingerprint,
    load_node_key,
    normal_node_keys,
    require_same_language,
    server_context,
)


@contextlib.contextmanager
def listening(context: ssl.SSLContext | None) -> Iterator[str]:
    """Answer every connection: with a TLS handshake, or as a plain HTTP server does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    if context is None:
                        connection.recv(1)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    else:
                        context.wrap_socket(connection, server_side=True).recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def tls(files: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def site(authority: Authority) -> SiteSecurity:
    return SiteSecurity(authority.ca, authority.node("a", form=PrivateFormat.PKCS8))


def test_the_right_certificate_is_no_obstacle(authority: Authority, site: SiteSecurity) -> None:
    with listening(tls(authority.server())) as cloud:
        require_same_language(cloud, site)


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"days": -1.0}, "is not valid now.*expired", "clock"),
        ({"host": "192.0.2.7"}, "is not for this address.*127.0.0.1", "provision"),
    ],
)
def test_a_wrong_certificate_is_named(
    authority: Authority, site: SiteSecurity, changes: dict[str, Any], problem: str, remedy: str
) -> None:
    with (
        listening(tls(authority.server("wrong", **changes))) as cloud,
        pytest.raises(TransportSecurityError, match=rf"{problem}.*{remedy}"),
    ):
        require_same_language(cloud, site)


def test_a_foreign_authority_is_named(tmp_path: Path, site: SiteSecurity) -> None:
    foreign = Authority(tmp_path / "foreign")
    with (
        listening(tls(foreign.server())) as cloud,
        pytest.raises(TransportSecurityError, match="not from this federation's authority; nothing was sent"),
    ):
        require_same_language(cloud, site)


def test_tls_on_one_side_only_is_named(authority: Authority, site: SiteSecurity) -> None:
    with listening(None) as cloud:
        with pytest.raises(TransportSecurityError, match="does not speak TLS with this site"):
            require_same_language(cloud, site)
        require_same_language(cloud, None)
    with (
        listening(tls(authority.server())) as cloud,
        pytest.raises(TransportSecurityError, match="wants TLS, and this site was started without"),
    ):
        require_same_language(cloud, None)


def test_a_cloud_that_is_not_there_is_waited_for(site: SiteSecurity) -> None:
    with socket.socket() as sock:  # bound, not listening
        sock.bind(("127.0.0.1", 0))
        require_same_language(f"127.0.0.1:{sock.getsockname()[1]}", site)


def test_what_the_cloud_shows_is_checked_before_it_starts(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.server()
    assert server_context(CloudSecurity(certificate, key, authority.ca, {})).minimum_version == (
        ssl.TLSVersion.TLSv1_3
    )
    expired, its_key = authority.server("expired", days=-1.0)
    with pytest.raises(TransportSecurityError, match=r"is not valid now.*clock"):
        server_context(CloudSecurity(expired, its_key, authority.ca, {}))
    with pytest.raises(TransportSecurityError, match="cannot be used"):
        server_context(CloudSecurity(certificate, its_key, authority.ca, {}))
    with pytest.raises(TransportSecurityError, match="cannot be used"):
        server_context(CloudSecurity(tmp_path / "none", key, authority.ca, {}))
    with pytest.raises(TransportSecurityError, match="cannot be read"):
        client_context(tmp_path / "none")
    with pytest.raises(TransportSecurityError, match="cannot be read"):
        client_context(key)


def test_node_keys_are_p384_in_either_format_and_unique(authority: Authority, tmp_path: Path) -> None:
    for form in (PrivateFormat.PKCS8, PrivateFormat.OpenSSH):
        assert load_node_key(authority.node("x", known=False, form=form)).curve.name == "secp384r1"
    other = tmp_path / "key"
    for content in (
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        ),
        b"",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
    ):
        other.write_bytes(content)
        with pytest.raises(TransportSecurityError, match="ECDSA P-384"):
            load_node_key(other)
    with pytest.raises(TransportSecurityError, match="cannot be read"):
        load_node_key(tmp_path / "none")

    _, public = generate_key_pairs()
    pem = public_key_to_bytes(public)
    # A SuperNode shows exactly these bytes; what a kit holds may end in another line break.
    assert normal_node_keys({"a": pem.rstrip() + b"\r\n\n"}) == {"a": pem}
    assert parse_node_keys(format_node_keys({"a": pem})) == {"a": pem}
    with pytest.raises(TransportSecurityError, match="same node key"):
        normal_node_keys({"a": pem, "b": pem})
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    for wrong in (b"", small.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)):
        with pytest.raises(TransportSecurityError, match="site a cannot be used"):
            normal_node_keys({"a": wrong})


# --- who was refused ---------------------------------------------------------------------------------


def told(
    path: str, status: int, *, known: bool = True, prove: bool = True, late: float = 0.0, show: bool = True
) -> list[str]:
    """Return what is said of one answered request."""
    private, public = generate_key_pairs()
    pem = public_key_to_bytes(public)
    stamp = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=late)).isoformat()
    signer = private if prove else generate_key_pairs()[0]
    signature = sign_message(signer, stamp.encode())
    headers = [
        (b"flwr-public-key", b64encode(pem)),
        (b"flwr-timestamp", stamp.encode()),
        (b"flwr-signature", b64encode(signature)),
    ]
    lines: list[str] = []
    refusals = Refusals({"a": pem} if known else {}, lines.append)
    scope = {"path": path, "headers": headers if show else [], "client": ("192.0.2.9", 4711)}
    for _ in range(3):
        refusals.note(scope, status)
    return [line.replace(fingerprint(pem), "FINGERPRINT") for line in lines]


ACTIVATE, PULL = "/v1/fleet/activate-node", "/v1/fleet/pull-messages"


def test_the_log_says_once_who_was_refused() -> None:
    assert told(ACTIVATE, 400, known=False) == [
        "refused a node with the key FINGERPRINT that is not in the kit, at 192.0.2.9"
    ]
    assert told("/v1/fleet/register-node", 403, known=False) == [
        "refused a node with the key FINGERPRINT that registers itself, at 192.0.2.9"
    ]
    assert told(ACTIVATE, 401, show=False) == ["refused a node without a usable key, at 192.0.2.9"]
    # Whoever shows a site's public key without its private one is not that site.
    assert told(PULL, 401, prove=False) == [
        "refused a node that shows the key FINGERPRINT (site a) and does not prove it, at 192.0.2.9"
    ]
    (line,) = told(ACTIVATE, 401, late=4000)
    assert line.startswith("refused site a, whose request is 4000 s old (a clock behind")
    (line,) = told(ACTIVATE, 401, late=-4000)
    assert line.startswith("refused site a, whose clock is 4000 s ahead")


def test_what_is_no_refusal_of_a_party_is_not_said() -> None:
    assert told(PULL, 200) == []
    assert told(PULL, 403) == []  # the run is over
    assert told(PULL, 401) == []  # a node of an earlier SuperLink: it comes again
    assert told(PULL, 503, known=False) == []


def test_the_memory_of_refused_parties_is_bounded() -> None:
    lines: list[str] = []
    refusals = Refusals({}, lines.append)
    for number in range(2500):
        refusals.note({"path": ACTIVATE, "headers": [], "client": (f"peer {number}", 1)}, 401)
    assert len(lines) == 2500
    assert len(refusals._told) <= 1000
