"""Scalars of every round, with the real TensorBoard and, where it is installed, the real MLflow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from flep_fl.contracts.errors import ConfigError, MissingExtraError
from flep_fl.contracts.records import RoundRecord, SiteFailure
from flep_fl.reporting.tracking import Tracker, make_tracker, require_tracking, scalars_of

SETTINGS = {"noise": {"std": 25.0}, "cipher": {"secret_images": "swordfish"}}


def records(count: int = 3) -> list[RoundRecord]:
    return [
        RoundRecord(
            number,
            accuracy=number / 10,
            loss=1 / number,
            bytes_up=1000 * number,
            bytes_down=2000,
            seconds={"train": 1.5, "encrypt": 0.1, "aggregate": 0.2, "decrypt": 0.3},
            replied=["a", "b"],
            failed=[SiteFailure("c", "timeout")],
        )
        for number in range(1, count + 1)
    ]


class Kept:
    """Keeps what is written."""

    def __init__(self, fails_at: int = 0) -> None:
        self.steps: list[int] = []
        self.ended: list[bool] = []
        self._fails_at = fails_at

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise RuntimeError("the disk is full")
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.ended.append(failed)


def test_a_round_is_written_once_and_when_it_is_complete() -> None:
    kept, rounds = Kept(), records()
    tracker = Tracker(kept)
    for count in (1, 1, 2, 2, 3):
        tracker.update(rounds[:count])
    assert kept.steps == [1, 2], "the last round may still change"
    tracker.close()
    tracker.close()
    assert kept.steps == [1, 2, 3]
    assert kept.ended == [False]


def test_a_store_that_fails_costs_the_scalars_and_not_the_run() -> None:
    said: list[str] = []
    kept = Kept(fails_at=2)
    tracker = Tracker(kept, said.append)
    tracker.update(records())
    tracker.close()
    assert kept.steps == [1]
    assert len(said) == 1
    assert "the disk is full" in said[0]


def test_unknown_figures_are_left_out() -> None:
    scalars = scalars_of(RoundRecord(1))
    assert "accuracy" not in scalars
    assert scalars["sites/replied"] == 0


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    tracker = make_tracker(
        "tensorboard", folder=tmp_path / "tb", uri="", experiment="", run="", settings=SETTINGS
    )
    tracker.update(records())
    tracker.close()
    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = found.Tags()["tensors"]
    assert set(tags) >= {"accuracy", "loss", "bytes/up", "seconds/train", "sites/failed"}
    events = [(event.step, float(make_ndarray(event.tensor_proto))) for event in found.Tensors("accuracy")]
    assert events == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (3, pytest.approx(0.3))]


def test_mlflow_reads_what_was_written(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for run, failed in (("one", False), ("two", True)):
        tracker = make_tracker(
            "mlflow", folder=tmp_path, uri=uri, experiment="plates", run=run, settings=SETTINGS
        )
        tracker.update(records())
        tracker.close(failed=failed)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("plates")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {"one": "FINISHED", "two": "FAILED"}
    history = client.get_metric_history(runs["one"].info.run_id, "accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert runs["one"].data.params["noise.std"] == "25.0"
    assert "swordfish" not in str(runs["one"].data.params)


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        make_tracker("mlflow", folder=tmp_path, uri="nonsense://x", experiment="e", run="r", settings={})


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_extra_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.summary", None)
    with pytest.raises(MissingExtraError, match=rf"pip install -e '\.\[{name}\]'"):
        require_tracking(name)


def test_it_is_named_before_anything_starts(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['tensorboard'] = sys.modules['tensorboard.summary'] = None\n"
        f"sys.argv = ['simulate', 'tracking=tensorboard', 'data=digits', 'hydra.run.dir={tmp_path}']\n"
        "runpy.run_module('scripts.simulate', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "MissingExtraError" in done.stderr
    assert ".[tensorboard]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results.json").exists()
