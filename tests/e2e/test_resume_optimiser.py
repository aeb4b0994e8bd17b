"""Real processes under TLS with node authentication: kill -9 of the server, and an optimiser's state.

With ``fedavgm`` and ``fedadam`` a site must not miss a sum, so these runs show what ``fedavg`` cannot: all
sites apply every sum across a resume, and end with the same bits; a site that is added later gets the state.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parties import SEAL_SMALL, Parties, make_parties, run_script

from flep_fl.model_security.keyring import CheckKey, ModelKey, state_key
from flep_fl.model_security.transfer import open_state
from flep_fl.provision.kits import load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he, pytest.mark.slow]

SITES = ("a", "b", "c")
LIMIT = 240.0


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[Parties]]:
    parties: list[Parties] = []
    yield parties
    for one in parties:
        one.stop()


def run_folder(parties: Parties) -> Path:
    return parties.folder / "runs" / "cloud"


def rounds_of(parties: Parties) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run_folder(parties) / "results.json").read_text())["rounds"]
    return found


def model(parties: Parties, site: str) -> dict[str, Any]:
    with np.load(parties.folder / "runs" / site / "sites" / site / "model.npz") as file:
        return dict(file)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def everybody_ends(parties: Parties) -> None:
    assert parties.wait("cloud", LIMIT) == 0, "".join(map(parties.log, ("cloud", *parties.names)))
    assert [parties.wait(name, LIMIT) for name in parties.names] == [0] * len(parties.names)


@pytest.mark.parametrize("optimiser", ["fedavgm", "fedadam"])
def test_a_server_killed_under_tls_goes_on_with_the_optimisers_model(
    tmp_path: Path, made: list[Parties], optimiser: str
) -> None:
    settings = ("federation.rounds=4", "train.local_epochs=1", "runtime.tls=on")
    parties = make_parties(tmp_path, SITES, *settings, f"federation.optimizer={optimiser}")
    made.append(parties)
    for name in ("cloud", *SITES):
        parties.start(name)
    parties.wait_for("cloud", "round 3/4: training", LIMIT)
    parties.processes["cloud"].send_signal(signal.SIGKILL)
    assert parties.wait("cloud", LIMIT) == -signal.SIGKILL
    again = f"hydra.run.dir={tmp_path / 'runs' / 'again'}"
    parties.start("cloud", f"resume={run_folder(parties)}", again)
    everybody_ends(parties)

    rounds = rounds_of(parties)
    assert [sorted(entry["replied"]) for entry in rounds] == [list(SITES)] * 4
    assert [entry.get("attempts", 1) for entry in rounds] == [1, 1, 2, 1]
    interrupted = model(parties, "a")
    assert all(same(model(parties, name), interrupted) for name in SITES[1:])
    assert [(tmp_path / "kits" / name / "state" / "optimiser.bin").is_file() for name in SITES] == [True] * 3


def states(parties: Parties) -> dict[str, bytes]:
    """Weights and moments of every site, opened with the keys of its kit."""
    found = {}
    for name in parties.names:
        kit = load_site_kit(parties.folder / "kits" / name)
        blob = (parties.folder / "kits" / name / "state" / "optimiser.bin").read_bytes()
        assert kit.model_key is not None
        key = state_key(ModelKey.from_bytes(kit.model_key), CheckKey.from_bytes(kit.check_key))
        found[name] = open_state(key, "kept", blob)[1]
    return found


def test_a_site_that_is_added_takes_the_optimisers_state_over(tmp_path: Path, made: list[Parties]) -> None:
    """After a rotation the model goes on; a new site has neither it nor the keys that it was made under."""
    settings = ("federation.rounds=1", "train.local_epochs=1", "runtime.tls=on")
    parties = make_parties(tmp_path, SITES, *settings, "federation.optimizer=fedadam")
    made.append(parties)
    for name in ("cloud", *SITES):
        parties.start(name)
    everybody_ends(parties)
    held = set(states(parties).values())
    assert len(held) == 1

    kits, archive = tmp_path / "kits", tmp_path / "archive-2"
    for script, *arguments in (
        ("scripts.provision", "action=add", "sites=[d]", f"out={kits}"),
        ("scripts.provision", "action=rotate", f"out={kits}"),
        ("scripts.seal", *SEAL_SMALL, f"kits={kits}", f"out={archive}"),
    ):
        done = run_script(script, *arguments, f"hydra.run.dir={tmp_path / 'runs' / 'add'}")
        assert done.returncode == 0, done.stderr
    parties.names = (*SITES, "d")
    assert not (kits / "d" / "state").exists(), "it has nothing of the model"
    for name in ("cloud", *parties.names):
        parties.start(name, *([f"archive={archive / name}"] if name != "cloud" else []))
    everybody_ends(parties)

    assert parties.log("cloud").count("has taken the optimiser's state over") == 1, parties.log("cloud")
    assert "site d has taken the optimiser's state over" in parties.log("cloud")
    assert [sorted(entry["replied"]) for entry in rounds_of(parties)] == [list(parties.names)]
    after = set(states(parties).values())
    assert len(after) == 1 and after != held
    assert same(model(parties, "d"), model(parties, "a"))
