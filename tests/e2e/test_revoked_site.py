"""A site that was revoked: its old kit opens nothing, and no door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from parties import Parties, make_parties, run_script

from flep_fl.contracts.errors import KitError
from flep_fl.provision.kits import load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he]


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Parties]:
    made = make_parties(
        tmp_path,
        ("a", "b", "c", "d"),
        "federation.rounds=1",
        "train.local_epochs=1",
        "federation.round_timeout=90",
        "runtime.tls=on",
    )
    yield made
    made.stop()


@pytest.mark.slow
def test_a_revoked_site_is_refused_by_the_cloud_and_the_others_go_on(parties: Parties) -> None:
    kits, stolen = parties.folder / "kits", parties.folder / "stolen"
    before = load_site_kit(kits / "a")
    shutil.copytree(kits / "d", stolen)
    done = run_script(
        "scripts.provision",
        "action=revoke",
        "sites=[d]",
        f"out={kits}",
        f"hydra.run.dir={parties.folder / 'runs' / 'revoke'}",
    )
    assert done.returncode == 0, done.stderr
    after, old = load_site_kit(kits / "a"), load_site_kit(stolen)
    assert sorted(after.federation.sites) == ["a", "b", "c"]
    assert after.federation.key_id != before.federation.key_id
    assert after.model_key != before.model_key == old.model_key
    assert after.check_key != before.check_key == old.check_key
    # With the new keys before it, the revoked site still cannot unwrap them.
    mixed = parties.folder / "mixed"
    shutil.copytree(stolen, mixed)
    for name in ("kit.json", "manifest.json", "keys.wrapped"):
        shutil.copy(kits / "a" / name, mixed / name)
    with pytest.raises(KitError):
        load_site_kit(mixed)

    shutil.copytree(stolen, kits / "d", dirs_exist_ok=True)
    parties.start("cloud")
    parties.start("d", "runtime.idle_timeout=40")
    parties.wait_for("cloud", r"refused a node with the key [0-9a-f]+ that is not in the kit")
    for name in ("a", "b", "c"):
        parties.start(name)
    assert [parties.wait(name) for name in ("cloud", "a", "b", "c")] == [0, 0, 0, 0], parties.log("cloud")
    assert parties.wait("d") == 1
    assert "Traceback" not in parties.log("d")
    result = json.loads((parties.folder / "runs" / "cloud" / "results.json").read_text())
    assert [sorted(entry["replied"]) for entry in result["rounds"]] == [["a", "b", "c"]]
