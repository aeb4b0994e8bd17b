"""The owner's certificates: what a listener does not start with."""

from __future__ import annotations

from pathlib import Path

import pytest

from flep_fl.contracts.errors import GatewayCertificateError
from flep_fl.data_owner import certificates
from flep_fl.data_owner.certificates import TlsFiles, create_authority, issue_certificate, server_context


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    folder = tmp_path_factory.mktemp("root")
    made = TlsFiles(folder / "ca.crt", folder / "ca.key")
    create_authority(made.certificate, made.private_key, name="owner")
    return made


def issued(root: TlsFiles, folder: Path, name: str = "gateway") -> TlsFiles:
    files = TlsFiles(folder / f"{name}.crt", folder / f"{name}.key")
    issue_certificate(root, files, name=name, hosts=["127.0.0.1"])
    return files


def test_a_certificate_that_is_over_is_named(
    root: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_context(issued(root, tmp_path))
    monkeypatch.setattr(certificates, "LEAF_DAYS", 0)
    with pytest.raises(GatewayCertificateError, match="not valid now"):
        server_context(issued(root, tmp_path))


def test_a_key_of_another_certificate_is_named(root: TlsFiles, tmp_path: Path) -> None:
    one, other = issued(root, tmp_path, "one"), issued(root, tmp_path, "other")
    with pytest.raises(GatewayCertificateError, match="cannot be used"):
        server_context(TlsFiles(one.certificate, other.private_key))


def test_a_missing_or_damaged_file_is_named(root: TlsFiles, tmp_path: Path) -> None:
    files = issued(root, tmp_path)
    with pytest.raises(GatewayCertificateError, match="cannot be used"):
        server_context(TlsFiles(tmp_path / "none.crt", files.private_key))
    with pytest.raises(GatewayCertificateError, match="cannot be used"):
        server_context(TlsFiles(files.certificate, files.private_key, tmp_path / "none.crt"))
    files.certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(GatewayCertificateError, match="cannot be used"):
        server_context(files)


def test_a_new_certificate_keeps_the_key(root: TlsFiles, tmp_path: Path) -> None:
    files = issued(root, tmp_path)
    key = files.private_key.read_bytes()
    assert issued(root, tmp_path).private_key.read_bytes() == key
    assert files.private_key.stat().st_mode & 0o777 == 0o600
