"""Startup kits: whole, private, and refused when they are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import ConfigError, KitError
from flep_fl.provision.kits import create_kits, load_cloud_kit, load_owner_kit, load_site_kit

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
    assert sorted(path.name for path in (kits / "cloud").iterdir()) == [
        "kit.json",
        "model.context",
        "signing.key",
    ]
    assert load_cloud_kit(kits / "cloud").model_key is None
    assert len((kits / "cloud" / "model.context").read_bytes()) < 200


def test_the_owners_kit_holds_no_analyst_key(kits: Path) -> None:
    assert sorted(path.name for path in (kits / "owner").iterdir()) == ["kit.json", "signing.key"]


def test_a_trusted_clouds_kit_holds_the_model_key_and_never_the_check_key(tmp_path: Path) -> None:
    cloud = provision(tmp_path, "cloud=trusted") / "cloud"
    assert load_cloud_kit(cloud).model_key == (tmp_path / "a" / "model.key").read_bytes()
    assert not (cloud / "check.key").exists()


def test_kit_json_holds_no_secret(kits: Path) -> None:
    for folder in kits.iterdir():
        text = (folder / "kit.json").read_bytes()
        for key in folder.glob("*.key"):
            secret = key.read_bytes()
            assert secret.hex().encode() not in text
            assert secret[:32] not in text


def test_a_repr_shows_no_secret(kits: Path) -> None:
    site = load_site_kit(kits / "a")
    text = repr(site) + repr(load_cloud_kit(kits / "cloud"))
    assert site.check_key.hex() not in text
    assert repr(site.check_key) not in text
    assert "Ed25519PrivateKey" not in text


def test_existing_kits_are_never_overwritten(kits: Path) -> None:
    before = (kits / "a" / "model.key").read_bytes()
    with pytest.raises(ConfigError, match="already holds kits"):
        provision(kits)
    assert (kits / "a" / "model.key").read_bytes() == before


@pytest.mark.parametrize("names", [("a", "a", "b"), ("a", "cloud"), ("a", "owner"), ("a", "../b"), ("", "b")])
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


@pytest.mark.parametrize("name", ["check.key", "decryption.key", "signing.key"])
def test_a_damaged_or_missing_key_is_named(tmp_path: Path, name: str) -> None:
    path = provision(tmp_path) / "a" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KitError, match=name):
        load_site_kit(tmp_path / "a")
    path.unlink()
    with pytest.raises(KitError, match=name):
        load_site_kit(tmp_path / "a")
