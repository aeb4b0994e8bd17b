"""``python -m scripts.owner``: grants, releases, keys, backups and retention, as a user types them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from flep_fl.config import CipherConfig, NoiseConfig
from flep_fl.contracts.errors import ConfigError, DatabaseError, GrantError, KitError, OwnerHomeError
from flep_fl.data_owner.home import load_home
from flep_fl.provision import owner_gateway, owner_keys, owner_store
from flep_fl.provision.owner_config import ACTIONS, OwnerConfig

KEYS = {"verify_key": "11" * 32, "encryption_key": "22" * 32}


@pytest.fixture
def owner(tmp_path, capsys):
    """A home with a data set of ten images; calls a command and returns what it printed."""

    def call(function, **settings):
        config = OwnerConfig(home=str(tmp_path / "owner"), **{"action": "test", **settings})
        function(config)
        return capsys.readouterr().out

    call(owner_keys.run_keys)
    call(
        owner_gateway.run_dataset,
        dataset="cells",
        classes=["good", "bad"],
        cipher=CipherConfig(name="aead"),
        noise=NoiseConfig(std=0.0),
    )
    home = load_home(tmp_path / "owner")
    call.home, call.config = home, OwnerConfig(home=str(tmp_path / "owner"))
    with owner_store.open_database(call.config, home) as database:
        images = np.random.default_rng(0).integers(0, 256, (10, 4, 4), dtype=np.uint8)
        call.ids = database.ingest(list(images), [0, 1] * 5, ["train"] * 8 + ["test"] * 2)
        assert database.bundle("cells", 1).cipher_name == "aead"
    return call


def test_a_grant_from_its_making_to_its_end(owner, tmp_path):
    assert "10 records, 10 of them encrypted now" in owner(owner_store.run_release)
    kit = tmp_path / "kit.json"
    kit.write_text(json.dumps({"sites": {"a": KEYS}}))
    grant = {"dataset": "cells", "until": "2030-01-31"}
    made = owner(owner_store.run_grant, analyst="a", kit=str(kit), **grant)
    assert "until 2030-01-31 23:59:59 UTC" in made
    owner(owner_store.run_grant, analyst="b", share=[1, 2], **KEYS, **grant)
    listed = owner(owner_store.run_grants).splitlines()
    assert len(listed) == 2 and listed[0].endswith("stands") and "part 1 of 2 to b" in listed[1]
    grant_id = re.search("[0-9a-f]{32}", made)[0]
    revoked = owner(owner_store.run_revoke, grant=grant_id)
    assert "no more records leave" in revoked and "epoch 2: 10 records, 10 of them encrypted" in revoked
    assert "revoked 20" in owner(owner_store.run_grants).splitlines()[0]
    assert "key epoch 3" in owner(owner_store.run_rotate, dataset="cells")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ConfigError, "needs dataset"),
        ({"dataset": "cells"}, ConfigError, "needs analyst"),
        ({"dataset": "cells", "analyst": "a"}, ConfigError, "needs verify_key"),
        ({"dataset": "cells", "analyst": "a", "kit": "none"}, KitError, "cannot be read"),
        ({"dataset": "cells", "analyst": "a", **KEYS, "until": "soon"}, ConfigError, "not a date"),
        ({"dataset": "cells", "analyst": "a", **KEYS, "until": "2020-01-01"}, GrantError, "before it begins"),
        ({"dataset": "x", "analyst": "a", **KEYS, "until": "2030-01-01"}, DatabaseError, "no such data set"),
        (
            {"dataset": "cells", "analyst": "a", **KEYS, "until": "2030-01-01", "share": [1]},
            ConfigError,
            "not a share",
        ),
    ],
)
def test_a_grant_that_is_not_said_well(owner, settings, error, words):
    with pytest.raises(error, match=words):
        owner(owner_store.run_grant, **settings)


def test_keys_backups_and_deletion(owner, tmp_path):
    old_key = (owner.home.folder / "database.key").read_bytes()
    assert "10 records, verified" in owner(owner_store.run_backup, out=str(tmp_path / "b"))
    with owner.home.exclusive("serves"), pytest.raises(OwnerHomeError, match="Stop it first"):
        owner(owner_store.run_rekey)
    owner(owner_store.run_rekey)
    assert (owner.home.folder / "database.key").read_bytes() != old_key
    assert "2 records destroyed" in owner(owner_store.run_delete, records=owner.ids[:2])
    with pytest.raises(DatabaseError, match="another owner key"):
        owner(owner_store.run_restore, backup=str(tmp_path / "b"))
    (owner.home.folder / "database.key").write_bytes(old_key)
    place = str(tmp_path / "again.db")
    assert "restored 10 records" in owner(owner_store.run_restore, backup=str(tmp_path / "b"), database=place)
    kept = owner(owner_store.run_retain, max_age_days=1.0, dry_run=True, database=place)
    assert "0 records would be destroyed, 10 stay" in kept
    assert "goes by" in owner(owner_store.run_accept_clock, database=place)


def test_every_action_leads_somewhere():
    from importlib import import_module

    for target in ACTIONS.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))
