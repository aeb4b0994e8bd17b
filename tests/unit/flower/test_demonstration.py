"""What the demo tells its parties; that they do it, the end-to-end test shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federations import make_config
from gateways import new_home

from flep_fl.contracts.errors import DataError, MissingExtraError, RuntimeStartError
from flep_fl.data_owner.network import PeerFilter, load_rules
from flep_fl.flower import demonstration
from flep_fl.flower.demonstration import Owner

PORTS = {"ingest": 4001, "release": 4002, "admin": 4003}


def test_analysts_are_told_the_key_of_an_owner_and_not_only_its_address(tmp_path: Path) -> None:
    home = new_home(tmp_path / "north")
    assert Owner("north", tmp_path, PORTS).url() == f"https://127.0.0.1:4002#{home.owner_key.hex()}"


def test_the_rules_let_this_machine_in_at_the_owners_ports_and_nobody_else(tmp_path: Path) -> None:
    Owner("north", tmp_path, PORTS).write_rules()
    rules = load_rules(tmp_path / "north-network.yaml")
    for name, port in PORTS.items():
        peers = PeerFilter(rules, name, port)
        assert peers.allows("127.0.0.1") and not peers.allows("10.0.0.1")


def test_analysts_that_go_on_long_after_the_cloud_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now, running = [0.0], [True]
    monkeypatch.setattr(demonstration.time, "monotonic", lambda: now[0])
    children: Any = SimpleNamespace(running=lambda _name: running[0])
    patience = demonstration._Patience(children)
    now[0] = 1e6
    patience(["cloud", "lab-1"])  # while the cloud runs nobody is late
    running[0] = False
    patience(["lab-1"])
    now[0] += demonstration._SITES_AFTER_CLOUD_SECONDS - 1
    patience(["lab-1"])
    now[0] += 2
    with pytest.raises(RuntimeStartError, match="have not: lab-1"):
        patience(["lab-1"])


def test_images_of_a_folder_need_the_folder() -> None:
    config = make_config("data=folder", "data.path=here", name="demo")
    assert demonstration._images(config) == ["dataset='folder'", f"images='{Path('here').resolve()}'"]
    config.data.path = None
    with pytest.raises(DataError, match="needs a folder"):
        demonstration._images(config)


@pytest.mark.parametrize("name", ["require_source", "require_tracking"])
def test_what_is_not_installed_is_named_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def missing(_name: str) -> None:
        raise MissingExtraError("not installed")

    monkeypatch.setattr(demonstration, name, missing)
    monkeypatch.setattr(demonstration, "output_dir", lambda: tmp_path)
    monkeypatch.setattr(demonstration, "Children", lambda *_given: 1 / 0)
    with pytest.raises(MissingExtraError, match="not installed"):
        demonstration.run_demo(make_config(name="demo"))
