"""An owner's home: made once, read back, and refused by name where it is damaged or somebody else's."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import new_home

from flep_fl.contracts.errors import ConfigError, OwnerHomeError
from flep_fl.data_owner.home import OwnerHome, create_home, load_home


@pytest.fixture
def home(tmp_path: Path) -> OwnerHome:
    return new_home(tmp_path / "home", administrators=("ann", "bob"), threshold=2)


def test_a_home_is_made_once_and_its_secrets_are_its_owners_alone(home: OwnerHome) -> None:
    with pytest.raises(OwnerHomeError, match="already"):
        create_home(home.folder, administrators=["ann"], threshold=1, hosts=["localhost"])
    assert load_home(home.folder).owner_key == home.owner_key
    assert home.signing_key().public_key().public_bytes_raw() == home.owner_key
    assert home.audit_signing_key().public_key().public_bytes_raw() == home.audit_key
    keys = [*home.folder.rglob("*.key")]
    assert len(keys) == 7 and {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


@pytest.mark.parametrize(
    ("administrators", "threshold", "words"),
    [
        (["ann", "ann"], 1, "unusable or repeated"),
        (["../ann"], 1, "unusable or repeated"),
        ([""], 1, "unusable or repeated"),
        ([], 1, "cannot be reached"),
        (["ann"], 2, "cannot be reached"),
        (["ann"], 0, "cannot be reached"),
    ],
)
def test_administrators_who_could_never_approve_are_refused(
    tmp_path: Path, administrators: list[str], threshold: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        create_home(tmp_path / "h", administrators=administrators, threshold=threshold, hosts=["localhost"])
    assert not (tmp_path / "h").exists()


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir(mode=0o755)
    made = create_home(tmp_path / "h", administrators=["ann"], threshold=1, hosts=["localhost"])
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"threshold": True},
        {"threshold": 0},
        {"threshold": 3},
        {"threshold": "2"},
        {"owner_key": "00"},
        {"audit_key": "00" * 31},
        {"audit_key": "x"},
        {"administrators": {"ann": "00"}},
        {"administrators": []},
    ],
)
def test_a_damaged_home_is_named(home: OwnerHome, change: dict[str, object]) -> None:
    path = home.folder / "home.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(OwnerHomeError, match="is damaged"):
        load_home(home.folder)


def test_a_home_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OwnerHomeError, match="action=keys"):
        load_home(tmp_path / "nowhere")


def test_damaged_keys_are_named(home: OwnerHome) -> None:
    for name in ("database.key", "signing.key", "audit.key"):
        (home.folder / name).write_bytes(bytes(31))
    for read in (home.database_key, home.signing_key, home.audit_signing_key):
        with pytest.raises(OwnerHomeError, match="is damaged"):
            read()


def test_an_administrator_signs_with_his_own_key_alone(home: OwnerHome, tmp_path: Path) -> None:
    ann = home.administrator_key("ann")
    assert ann.public_key().public_bytes_raw() == home.administrators["ann"].public_bytes_raw()
    with pytest.raises(OwnerHomeError, match="no administrator"):
        home.administrator_key("eve")
    for key in (home.administrator_key("bob"), Ed25519PrivateKey.generate()):
        (tmp_path / "key").write_bytes(key.private_bytes_raw())
        with pytest.raises(OwnerHomeError, match="not the administrator ann's"):
            home.administrator_key("ann", tmp_path / "key")


def test_one_process_at_a_time_has_a_home(home: OwnerHome) -> None:
    with home.exclusive("serves") as first, load_home(home.folder).exclusive("enrols") as second:
        assert first and not second
        assert (home.folder / "lock").read_text().endswith(" serves\n")
    with home.exclusive("enrols") as again:
        assert again
