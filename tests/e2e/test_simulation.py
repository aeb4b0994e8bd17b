"""One process, the whole path: the trust modes agree with each other and with an independent FedAvg."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import SMALL, make_config

from flep_fl.flower.simulation import simulate
from flep_fl.model_security.session import AnalystSession

pytestmark = pytest.mark.e2e

MODES = ("untrusted", "trusted", "open")
UNEQUAL = (*SMALL, "partition=dirichlet", "partition.alpha=0.5", "federation.rounds=2")

Local = dict[int, list[tuple[dict[str, np.ndarray], int]]]


class Runs:
    """The runs of all modes, with each site's own trained models beside the official outcome."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.models: dict[str, dict[str, np.ndarray]] = {}
        self.local: dict[str, Local] = {}
        self.first: dict[str, np.ndarray] = {}
        self.folder = folder
        official = AnalystSession.seal
        for mode in MODES:
            local: Local = defaultdict(list)

            def spy(
                session: AnalystSession, arrays: Any, examples: int, instruction: Any, local: Local = local
            ) -> bytes:
                local[instruction.round].append(({k: v.copy() for k, v in arrays.items()}, examples))
                self.first = {k: v.copy() for k, v in session._first.items()}
                return official(session, arrays, examples, instruction)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(AnalystSession, "seal", spy)
                config = make_config(*UNEQUAL, f"cloud={mode}", f"federation.rounds={rounds}")
                self.results[mode] = simulate(config, folder / mode)
            self.local[mode] = local
            with np.load(folder / mode / "sites" / "site-0" / "model.npz") as file:
                self.models[mode] = dict(file)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-round", "two-rounds"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("modes"), request.param)


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in a)


def test_the_modes_agree_at_one_seed(runs: Runs) -> None:
    limit = 1e-6 if len(runs.results["open"]["rounds"]) == 1 else 1e-4
    for mode in ("untrusted", "trusted"):
        assert largest_difference(runs.models[mode], runs.models["open"]) <= limit


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_the_weighted_average_of_the_local_models(runs: Runs, mode: str) -> None:
    last = runs.local[mode][max(runs.local[mode])]
    total = sum(examples for _, examples in last)
    assert len({examples for _, examples in last}) > 1, "the sites should be unequal"
    expected = {
        name: sum(arrays[name].astype(np.float64) * examples / total for arrays, examples in last)
        for name in last[0][0]
    }
    assert largest_difference(runs.models[mode], expected) <= 1e-6
    unweighted = {name: np.mean([arrays[name] for arrays, _ in last], axis=0) for name in last[0][0]}
    assert largest_difference(runs.models[mode], unweighted) > 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_training_moved_the_model(runs: Runs, mode: str) -> None:
    assert largest_difference(runs.models[mode], runs.first) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_all_sites_hold_the_same_model(runs: Runs, mode: str) -> None:
    for name in ("site-1", "site-2"):
        with np.load(runs.folder / mode / "sites" / name / "model.npz") as file:
            assert largest_difference(dict(file), runs.models[mode]) == 0


def test_only_a_cloud_that_may_see_the_model_writes_it(runs: Runs) -> None:
    files = {
        mode: {p.name for p in (runs.folder / mode / "cloud").rglob("*") if p.is_file()} for mode in MODES
    }
    assert files["untrusted"] == {"rounds.jsonl"}
    assert files["trusted"] == files["open"] == {"rounds.jsonl", "model.npz"}
    for mode in ("trusted", "open"):
        with np.load(runs.folder / mode / "cloud" / "model.npz") as file:
            assert largest_difference(dict(file), runs.models[mode]) == 0


@pytest.mark.parametrize("mode", MODES)
def test_results_have_the_promised_form(runs: Runs, mode: str) -> None:
    written = json.loads((runs.folder / mode / "results.json").read_text())
    assert written == runs.results[mode]
    assert set(written) == {
        "cloud", "sites", "parameters", "rounds", "final", "restore", "config_digest", "versions"
    }  # fmt: skip
    assert written["cloud"] == mode
    assert written["sites"] == ["site-0", "site-1", "site-2"]
    assert written["parameters"] >= 100_000
    for number, entry in enumerate(written["rounds"], start=1):
        assert set(entry) == {
            "round", "accuracy", "loss", "bytes_up", "bytes_down", "seconds", "replied", "failed"
        }  # fmt: skip
        assert entry["round"] == number
        assert set(entry["seconds"]) == {"train", "encrypt", "aggregate", "decrypt"}
        assert 0 <= entry["accuracy"] <= 1
        assert sorted(entry["replied"]) == written["sites"]
        assert entry["failed"] == []
    assert written["final"]["accuracy"] == written["rounds"][-1]["accuracy"]
    assert 0 < written["final"]["majority_accuracy"] < 1
    assert 19 < written["restore"]["noisy_psnr_db"] < 23, "sigma 25 is 20.2 dB before clipping"
    assert written["restore"]["psnr_db"] > 19
    lines = (runs.folder / mode / "cloud" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == written["rounds"]


def test_encrypted_traffic_stays_within_its_budget(runs: Runs) -> None:
    result = runs.results["untrusted"]
    for entry in result["rounds"]:
        per_weight = result["parameters"] * len(result["sites"])
        assert entry["bytes_up"] / per_weight <= 8.6
        assert entry["bytes_down"] / per_weight <= 17.0
        assert entry["bytes_up"] / per_weight > 7.5, (
            "below the floor of the packing: something is not counted"
        )


def test_the_same_seed_gives_the_same_model(tmp_path: Path, runs: Runs) -> None:
    rounds = len(runs.results["open"]["rounds"])
    simulate(make_config(*UNEQUAL, "cloud=open", f"federation.rounds={rounds}"), tmp_path)
    with np.load(tmp_path / "sites" / "site-0" / "model.npz") as file:
        assert largest_difference(dict(file), runs.models["open"]) == 0


# CI runs the command itself as its last step.
@pytest.mark.slow
def test_smoke_experiment_as_ci_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.simulate", "experiment=smoke", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning: federation.min_contributors=2" in done.stdout
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["cloud"], len(result["sites"]), len(result["rounds"])) == ("untrusted", 2, 2)


def test_sweep_writes_one_result_a_job(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "scripts.simulate", "-m", *SMALL, "federation.rounds=1",
        "cloud=untrusted,open", "noise.std=0,25", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/results.json"))]
    assert [r["cloud"] for r in results] == ["untrusted", "untrusted", "open", "open"]
    noiseless = [r["restore"]["noisy_psnr_db"] for r in results]
    assert noiseless[0] > 45 > 25 > noiseless[1]
