"""Kits whose dealer signed what does not belong together, and what killed commands leave about."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import KitError, KitMismatchError
from flep_fl.contracts.files import write_secret
from flep_fl.provision import transaction
from flep_fl.provision.identities import GenerationKeys
from flep_fl.provision.issue import keys_for
from flep_fl.provision.kits import (
    create_kits,
    load_cloud_kit,
    load_owner_kit,
    load_site_kit,
    rotate_keys,
)
from flep_fl.provision.manifest import NAME, file_digest, read_manifest, sign_manifest

ADDRESS = "127.0.0.1:9092"
LOADERS: dict[str, Callable[[Path], object]] = {
    "cloud": load_cloud_kit,
    "owner": load_owner_kit,
    "a": load_site_kit,
}


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    create_kits(shared_part(make_config()), ("a", "b", "c"), tmp_path / "kits", address=ADDRESS)
    return tmp_path / "kits"


def signed_again(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes into a kit, with a manifest that names them: a dealer's mistake, not an attack."""
    dealer = dealer_key(folder.parent)
    manifest = read_manifest(folder)
    (folder / name).write_bytes(data)
    files = {**manifest.files, name: file_digest(data)}
    (folder / NAME).write_bytes(sign_manifest(replace(manifest, files=files), dealer))


def dealer_key(kits: Path) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes((kits / "dealer" / "dealer.key").read_bytes())


@pytest.mark.parametrize("party", sorted(LOADERS))
def test_a_signing_key_that_the_federation_does_not_know_is_refused(kits: Path, party: str) -> None:
    signed_again(kits / party, "signing.key", Ed25519PrivateKey.generate().private_bytes_raw())
    with pytest.raises(KitMismatchError, match=r"signing\.key"):
        LOADERS[party](kits / party)


@pytest.mark.parametrize(
    ("name", "named"), [("kit.json", r"kit\.json"), ("keys.wrapped", "keys of another generation")]
)
def test_a_file_of_another_generation_is_refused(kits: Path, name: str, named: str) -> None:
    earlier = (kits / "a" / name).read_bytes()
    rotate_keys(kits)
    assert load_site_kit(kits / "a").federation.generation == 2
    signed_again(kits / "a", name, earlier)
    with pytest.raises(KitMismatchError, match=named):
        load_site_kit(kits / "a")


@pytest.mark.parametrize("lost", [{"model_key": None}, {"check_key": b""}], ids=["model_key", "check_key"])
def test_an_analyst_without_a_key_is_refused(kits: Path, lost: dict[str, Any]) -> None:
    kit = load_site_kit(kits / "a")
    federation = kit.federation
    keys = GenerationKeys(federation.generation, federation.key_id, kit.model_key, None, kit.check_key)
    wrapped = keys_for("a", replace(keys, **lost), federation, dealer_key(kits))["keys.wrapped"]
    signed_again(kits / "a", "keys.wrapped", wrapped)
    with pytest.raises(KitError, match="does not hold what a site with the role analyst needs"):
        load_site_kit(kits / "a")


@pytest.mark.parametrize("name", ["model.key", "keys.wrapped", "decryption.key"])
def test_a_key_beside_an_untrusted_clouds_files_is_refused(kits: Path, name: str) -> None:
    write_secret(kits / "cloud" / name, b"key")
    with pytest.raises(KitError, match=f"holds {name}.*never hold a key"):
        load_cloud_kit(kits / "cloud")


def test_an_earlier_key_that_the_manifest_does_not_name_is_removed(kits: Path) -> None:
    planted = kits / "a" / "previous-7.wrapped"
    planted.write_bytes(b"key")
    load_site_kit(kits / "a")
    assert not planted.exists()


def test_what_a_killed_change_left_is_removed(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealer = kits / "dealer"
    with monkeypatch.context() as patch:
        patch.setattr(transaction, "resume", lambda _out: None)  # killed right after its moment of change
        rotate_keys(kits)
    assert transaction.interrupted(kits)
    halves = [kits / party / f".{NAME}.half" for party in "abc"]
    for path in (*halves, dealer / "pending.done" / "1", dealer / "pending.new" / "1"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"secret")
    rotate_keys(kits)
    assert not transaction.interrupted(kits)
    assert not [path for path in kits.rglob("*") if "pending" in path.name or path.name.endswith(".half")]
    assert load_site_kit(kits / "a").federation.generation >= 2


def test_a_change_is_written_where_a_killed_one_had_begun_to(kits: Path) -> None:
    stage = kits / "dealer" / "pending.new"
    stage.mkdir()
    (stage / "plan.json").write_text("{")
    (stage / "99").write_bytes(b"secret")
    rotate_keys(kits)
    assert load_site_kit(kits / "a").federation.generation == 2
    assert not stage.exists()


def test_a_kit_is_written_where_a_killed_creation_had_begun_to(tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    (kits / ".a.new").mkdir(parents=True)
    (kits / ".a.new" / "signing.key").write_bytes(b"half")
    (kits / "..creating.half").write_bytes(b"[")
    (kits / transaction.CREATING).write_text(json.dumps(["a", "b", "c"]))
    create_kits(shared_part(make_config()), ("a", "b", "c"), kits, address=ADDRESS)
    assert load_site_kit(kits / "a").name == "a"
    assert not [path.name for path in kits.iterdir() if path.name.startswith(".")]
