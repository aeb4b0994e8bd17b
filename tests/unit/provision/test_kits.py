"""Startup kits: whole, private, and refused when they are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import ConfigError, KitError, KitMismatchError
from flep_fl.provision.kits import create_kits, load_cloud_kit, load_owner_kit, load_site_kit
from flep_fl.provision.manifest import read_manifest
from flep_fl.provision.wrapped_keys import unwrap_keys

ADDRESS = "127.0.0.1:9092"


def provision(folder: Path, *overrides: str, sites: tuple[str, ...] = ("a", "b", "c")) -> Path:
    create_kits(shared_part(make_config(*overrides)), sites, folder, address=ADDRESS)
    return folder


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provision(tmp_path_factory.mktemp("kits"))


def test_every_party_reads_the_same_federation(kits: Path) -> None:
    cloud, owner, site = (
        load_cloud_kit(kits / "cloud"),
        load_owner_kit(kits / "owner"),
        load_site_kit(kits / "b"),
    )
    assert cloud.federation == owner.federation == site.federation
    assert sorted(cloud.federation.sites) == ["a", "b", "c"]
    assert cloud.federation.address == ADDRESS
    assert site.name == "b"
    assert (
        site.federation.site_keys()["b"].public_bytes_raw()
        == site.signing_key.public_key().public_bytes_raw()
    )
    assert (
        cloud.federation.cloud_key().public_bytes_raw() == cloud.signing_key.public_key().public_bytes_raw()
    )


def test_the_untrusted_clouds_kit_holds_no_key_but_its_own_signature(kits: Path) -> None:
    assert sorted(path.name for path in (kits / "cloud").iterdir() if path.is_file()) == [
        "ca.crt",
        "kit.json",
        "manifest.json",
        "model.context",
        "server.crt",
        "server.key",
        "signing.key",
    ]
    assert load_cloud_kit(kits / "cloud").model_key is None
    assert len((kits / "cloud" / "model.context").read_bytes()) < 200


def test_the_owners_kit_holds_no_analyst_key(kits: Path) -> None:
    names = sorted(path.name for path in (kits / "owner").iterdir() if path.is_file())
    assert names == ["ca.crt", "kit.json", "manifest.json", "signing.key"]


def test_a_trusted_clouds_kit_holds_the_model_key_and_never_the_check_key(tmp_path: Path) -> None:
    cloud = provision(tmp_path, "cloud=trusted") / "cloud"
    site = load_site_kit(tmp_path / "a")
    assert load_cloud_kit(cloud).model_key == site.model_key
    for other in ("owner", "a"):  # what the cloud could try with its own key
        for name in ("keys.wrapped", "signing.key"):
            path = tmp_path / other / name
            assert not path.exists() or site.check_key not in path.read_bytes()
    key = X25519PrivateKey.from_private_bytes((cloud / "decryption.key").read_bytes())
    opened = unwrap_keys(
        (cloud / "keys.wrapped").read_bytes(),
        name="keys.wrapped",
        federation=site.federation.federation,
        party="cloud",
        private_key=key,
        dealer=read_manifest(cloud).dealer,
    )
    assert opened.check_key == b"", "the check key is the analysts' alone"
    with pytest.raises(KitMismatchError):
        unwrap_keys(
            (tmp_path / "a" / "keys.wrapped").read_bytes(),
            name="keys.wrapped",
            federation=site.federation.federation,
            party="a",
            private_key=key,
            dealer=read_manifest(cloud).dealer,
        )


def test_kit_json_holds_no_secret(kits: Path) -> None:
    for folder in kits.iterdir():
        if folder.name == "dealer":
            continue
        text = (folder / "kit.json").read_bytes() + (folder / "manifest.json").read_bytes()
        for key in folder.glob("*.key"):
            secret = key.read_bytes()
            assert secret.hex().encode() not in text
            assert secret[-200:] not in text


def test_a_repr_shows_no_secret(kits: Path) -> None:
    site = load_site_kit(kits / "a")
    text = repr(site) + repr(load_cloud_kit(kits / "cloud"))
    assert site.check_key.hex() not in text
    assert repr(site.check_key) not in text
    assert "Ed25519PrivateKey" not in text


def test_existing_kits_are_never_overwritten(kits: Path) -> None:
    before = (kits / "a" / "keys.wrapped").read_bytes()
    with pytest.raises(ConfigError, match="already holds kits"):
        provision(kits)
    assert (kits / "a" / "keys.wrapped").read_bytes() == before


@pytest.mark.parametrize(
    "names", [("a", "a", "b"), ("a", "cloud"), ("a", "owner"), ("a", "dealer"), ("a", "../b"), ("", "b")]
)
def test_unusable_names_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="sites"):
        provision(tmp_path, sites=names)
    assert not list(tmp_path.iterdir())


def test_another_role_is_refused(kits: Path) -> None:
    with pytest.raises(KitError, match="kit of a site"):
        load_cloud_kit(kits / "a")
    with pytest.raises(KitError, match="kit of a cloud"):
        load_site_kit(kits / "cloud")
    with pytest.raises(KitError, match="kit of a cloud"):
        load_owner_kit(kits / "cloud")


def test_edited_settings_are_noticed(tmp_path: Path) -> None:
    path = provision(tmp_path) / "a" / "kit.json"
    text = json.loads(path.read_text())
    text["shared"]["federation"]["min_contributors"] = 2
    path.write_text(json.dumps(text))
    with pytest.raises(KitError, match="edited after provisioning"):
        load_site_kit(tmp_path / "a")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"format": 1}', b'{"format": 99}', b"\xff\xfe"])
def test_a_damaged_description_is_named(tmp_path: Path, damage: bytes) -> None:
    (provision(tmp_path) / "a" / "kit.json").write_bytes(damage)
    with pytest.raises(KitError):
        load_site_kit(tmp_path / "a")


@pytest.mark.parametrize("name", ["keys.wrapped", "decryption.key", "signing.key", "ca.crt"])
def test_a_damaged_or_missing_key_is_named(tmp_path: Path, name: str) -> None:
    path = provision(tmp_path) / "a" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KitError, match=name):
        load_site_kit(tmp_path / "a")
    path.unlink()
    with pytest.raises(KitError, match=name):
        load_site_kit(tmp_path / "a")
