"""The quickstart and its private twin: five changed lines, in one process and by `flwr run`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flower_apps import make_grid, make_kits
from flower_run import Deployment

from flep_fl.flower.local_grid import run_server_app

pytestmark = [pytest.mark.e2e, pytest.mark.he]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STOCK, PRIVATE = EXAMPLES / "quickstart", EXAMPLES / "quickstart_private"
RUN_CONFIG = {"num-server-rounds": 2, "local-epochs": 1, "learning-rate": 0.05, "batch-size": 32}


def files(folder: Path) -> dict[str, list[str]]:
    found = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(path.relative_to(folder)): path.read_text().splitlines() for path in found}


def changed_lines(before: list[str], after: list[str]) -> int:
    """Count lines as an author does: a replaced, a new and a removed line are one each."""
    codes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in codes if tag != "equal")


def test_the_private_twin_differs_in_at_most_five_lines() -> None:
    stock, private = files(STOCK), files(PRIVATE)
    assert stock.keys() == private.keys() >= {"pyproject.toml", "digits/client_app.py"}
    changes = {name: changed_lines(stock[name], private[name]) for name in stock}
    assert 0 < sum(changes.values()) <= 5, changes


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The private example as an importable package; another test may load its twin of the same name."""
    monkeypatch.syspath_prepend(str(PRIVATE))
    before = {name for name in sys.modules if name.split(".")[0] == "digits"}
    assert not before
    importlib.import_module("digits.client_app")
    importlib.import_module("digits.server_app")
    yield sys.modules["digits"]
    for name in [name for name in sys.modules if name.split(".")[0] == "digits"]:
        del sys.modules[name]


def test_the_private_twin_learns_in_process(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kits = make_kits(tmp_path, "federation.rounds=2")
    monkeypatch.chdir(tmp_path)  # as the SuperLink and the SuperNodes: beside kits/
    client, server = sys.modules["digits.client_app"].app, sys.modules["digits.server_app"].app
    grid = make_grid(client)
    for context in grid._contexts.values():
        context.run_config.update(RUN_CONFIG)
    run_server_app(server, grid, RUN_CONFIG)
    assert "round 2: {'eval_acc': 0.9" in capsys.readouterr().out
    assert not (tmp_path / "final_model.pt").exists(), "the cloud has no model to write"
    check_models(kits, sys.modules["digits.task"])


def check_models(kits: Path, task: ModuleType) -> None:
    """Every site holds one and the same model, and it is a good one; BatchNorm's buffers are in it."""
    nets = []
    for name in "abc":
        net = task.Net()
        net.load_state_dict(torch.load(kits / name / "model" / "model.pt", weights_only=True))
        nets.append(net)
        _, loader = task.load_data(0, 1, 64)
        assert task.test(net, loader)[1] > 0.9
    for key, value in nets[0].state_dict().items():
        assert all(torch.equal(value, net.state_dict()[key]) for net in nets[1:])
    assert not torch.equal(nets[0].features[1].running_mean, torch.zeros(16))


@pytest.mark.slow
def test_the_private_twin_runs_under_flwr_run(tmp_path: Path, digits: ModuleType) -> None:
    """Flower's own SuperLink and SuperNodes, a new process for every message."""
    kits = make_kits(tmp_path, "federation.rounds=2")
    flower = Deployment(tmp_path)
    try:
        flower.start([f'partition-id={i} num-partitions=3 kit="kits/{name}"' for i, name in enumerate("abc")])
        status, printed = flower.run(PRIVATE, "--run-config", "num-server-rounds=2 local-epochs=1")
        assert status == "finished:completed", flower.logs()
        assert "round 2: {'eval_acc': 0.9" in printed
    finally:
        flower.stop()
    check_models(kits, sys.modules["digits.task"])
