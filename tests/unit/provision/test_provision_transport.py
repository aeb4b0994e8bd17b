"""TLS: when it is on, what the certificates say, and what is refused."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import CertificateError, ConfigError, KitError
from flep_fl.flower.transport import cloud_security, site_security
from flep_fl.provision.certificates import general_name, require_valid
from flep_fl.provision.kits import create_kits, load_cloud_kit, load_site_kit
from flep_fl.provision.settings import is_loopback, tls_wanted

SITES = ("a", "b", "c")


def provision(folder: Path, address: str, **options: object) -> Path:
    create_kits(shared_part(make_config()), SITES, folder, address=address, **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provision(tmp_path_factory.mktemp("remote"), "10.1.2.3:9092", hosts=["fl.example.org"])


@pytest.mark.parametrize(
    ("address", "alone"),
    [
        ("127.0.0.1:9092", True),
        ("127.8.8.8:1", True),
        ("localhost:9092", True),
        ("[::1]:9092", True),
        ("10.0.0.5:9092", False),
        ("0.0.0.0:9092", False),
        ("[::]:9092", False),
        ("127.0.0.1.example.org:9092", False),
        ("localhost.example.org:9092", False),
        ("fl.example.org:9092", False),
    ],
)
def test_which_addresses_are_this_machine_alone(address: str, alone: bool) -> None:
    assert is_loopback(address) is alone
    assert tls_wanted("auto", address) is not alone
    assert tls_wanted("on", address)
    if alone:
        assert not tls_wanted("off", address)
    else:
        with pytest.raises(ConfigError, match=r"runtime\.tls=off"):
            tls_wanted("off", address)


def test_one_address_that_is_open_to_others_is_enough() -> None:
    assert tls_wanted("auto", "127.0.0.1:1", "10.0.0.5:1")
    assert tls_wanted("auto", "127.0.0.1:1", agreed=True)
    with pytest.raises(ConfigError):
        tls_wanted("off", "127.0.0.1:1", "10.0.0.5:1")
    with pytest.raises(ConfigError):
        tls_wanted("off", "127.0.0.1:1", agreed=True)


def test_a_kit_for_another_machine_turns_tls_and_node_authentication_on(remote: Path, tmp_path: Path) -> None:
    cloud, site = load_cloud_kit(remote / "cloud"), load_site_kit(remote / "a")
    config = make_config("runtime.address=10.1.2.3:9092")
    theirs, ours = cloud_security(cloud, config), site_security(site, config)
    assert theirs is not None
    assert ours is not None
    assert sorted(theirs.node_keys) == list(SITES)
    private = load_ssh_private_key(ours.node_key.read_bytes(), None)
    public = load_pem_public_key(theirs.node_keys["a"])
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
    with pytest.raises(ConfigError):
        cloud_security(cloud, make_config("runtime.tls=off"))
    with pytest.raises(ConfigError):
        site_security(site, make_config("runtime.tls=off"))
    # Through a tunnel the address is loopback; the kit still says TLS.
    assert site_security(site, make_config("runtime.address=127.0.0.1:9092")) is not None

    local = provision(tmp_path / "local", "127.0.0.1:9092")
    assert cloud_security(load_cloud_kit(local / "cloud"), make_config()) is None
    assert site_security(load_site_kit(local / "a"), make_config()) is None
    assert cloud_security(load_cloud_kit(local / "cloud"), make_config("runtime.tls=on")) is not None
    opened = make_config("runtime.address=0.0.0.0:9092")
    assert cloud_security(load_cloud_kit(local / "cloud"), opened) is not None
    agreed = provision(tmp_path / "agreed", "127.0.0.1:9092", tls="on")
    assert site_security(load_site_kit(agreed / "a"), make_config()) is not None


def handshake(remote: Path, ca: Path, host: str) -> str:
    """Connect to a server with the cloud's certificate; return the protocol, or raise."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(remote / "cloud" / "server.crt", remote / "cloud" / "server.key")
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True) as link:
                link.recv(1)
        except (ssl.SSLError, OSError):
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with near, client.wrap_socket(near, server_hostname=host) as link:
            return str(link.version())
    finally:
        thread.join(5)


@pytest.mark.parametrize("host", ["10.1.2.3", "fl.example.org", "localhost", "127.0.0.1"])
def test_the_certificate_is_good_for_the_names_of_the_cloud(remote: Path, host: str) -> None:
    assert handshake(remote, remote / "a" / "ca.crt", host) == "TLSv1.3"


def test_another_name_or_another_federations_authority_is_refused(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        handshake(remote, remote / "a" / "ca.crt", "10.1.2.4")
    other = provision(tmp_path / "other", "10.1.2.3:9092")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(remote, other / "a" / "ca.crt", "10.1.2.3")


def test_the_authority_signs_servers_and_nothing_below(remote: Path) -> None:
    ca = x509.load_pem_x509_certificate((remote / "a" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((remote / "cloud" / "server.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert server.not_valid_after_utc - datetime.now(UTC) < timedelta(days=366)
    assert ca.not_valid_after_utc > server.not_valid_after_utc
    federation = load_site_kit(remote / "b").federation
    from cryptography.hazmat.primitives.hashes import SHA256

    assert federation.server_fingerprint == server.fingerprint(SHA256()).hex()
    assert federation.ca_fingerprint == ca.fingerprint(SHA256()).hex()


def test_a_server_certificate_never_outlives_its_authority(tmp_path: Path) -> None:
    kits = provision(tmp_path / "kits", "10.1.2.3:9092", server_days=365, authority_days=30)
    ca = x509.load_pem_x509_certificate((kits / "a" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((kits / "cloud" / "server.crt").read_bytes())
    assert server.not_valid_after_utc == ca.not_valid_after_utc


def test_an_expired_certificate_is_named_with_the_remedy(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = remote / "cloud" / "server.crt"
    require_valid(path, what="The certificate")
    later = datetime.now(UTC) + timedelta(days=366)
    with pytest.raises(CertificateError, match="action=rotate"):
        require_valid(path, what="The certificate", now=later)
    with pytest.raises(CertificateError, match="Set the clock"):
        require_valid(path, what="The certificate", now=later - timedelta(days=400))
    from flep_fl.provision import certificates

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return later

    monkeypatch.setattr(certificates, "datetime", Later)
    config = make_config("runtime.address=10.1.2.3:9092")
    with pytest.raises(CertificateError, match="expired"):
        cloud_security(load_cloud_kit(remote / "cloud"), config)
    later += timedelta(days=4000)
    with pytest.raises(CertificateError, match="expired"):
        site_security(load_site_kit(remote / "a"), config)


def test_what_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing")
    with pytest.raises(KitError, match="not a certificate"):
        require_valid(tmp_path / "ca.crt", what="The certificate")
    with pytest.raises(KitError, match="cannot be read"):
        require_valid(tmp_path / "none.crt", what="The certificate")


@pytest.mark.parametrize("host", ["", "a b", "-x", "x" * 64, "ä.example", "0.0.0.0", "::", "a..b", "*.b"])
def test_what_no_site_can_dial_is_refused(host: str) -> None:
    with pytest.raises(ConfigError):
        general_name(host)


def test_hosts_of_all_kinds_are_accepted() -> None:
    assert general_name("FL.Example.org") == x509.DNSName("fl.example.org")
    assert str(general_name("[2001:db8::1]").value) == "2001:db8::1"
    assert str(general_name("10.0.0.5").value) == "10.0.0.5"


def test_an_unusable_address_leaves_no_kits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        provision(tmp_path / "kits", "0.0.0.0:9092")
    with pytest.raises(ConfigError, match=r"runtime\.tls=off"):
        provision(tmp_path / "kits", "10.0.0.5:9092", tls="off")
    assert not (tmp_path / "kits").exists()


def test_the_kits_of_one_federation_say_the_same_about_tls(remote: Path) -> None:
    federation = load_cloud_kit(remote / "cloud").federation
    assert federation.tls
    assert replace(federation, tls=False).digest == federation.digest, "TLS is no setting of the models"
