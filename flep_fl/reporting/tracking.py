"""Scalars of every round for TensorBoard or MLflow, both on the local disk unless one says otherwise.

What is tracked is what a cloud may know of a round (:class:`~flep_fl.contracts.records.RoundRecord`), so an
untrusted cloud may track as well.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flep_fl.contracts.errors import ConfigError, MissingExtraError
from flep_fl.contracts.records import RoundRecord
from flep_fl.reporting.redaction import flat_settings

_MODULES = {"tensorboard": "tensorboard.summary", "mlflow": "mlflow"}
_BATCH = 100
"""Parameters that MLflow takes at once."""

_LONGEST_VALUE = 500


class Sink(Protocol):
    """Where scalars go."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one round."""
        ...

    def close(self, *, failed: bool) -> None:
        """Finish; what was written is on the disk afterwards."""
        ...


class Tracker:
    """Writes each round once, when nothing about it can change any more.

    A round's figures are complete when the next one has begun, or the run has ended: its model is evaluated
    after its sum was made. A store that fails in mid-run costs the scalars, never the run.

    Parameters
    ----------
    sink
        Where the scalars go; None tracks nothing.
    on_event
        Gets a line where the store has failed.
    """

    def __init__(self, sink: Sink | None, on_event: Callable[[str], None] = lambda _line: None) -> None:
        self._sink = sink
        self._say = on_event
        self._written = 0
        self._rounds: Sequence[RoundRecord] = ()

    def update(self, rounds: Sequence[RoundRecord]) -> None:
        """Take the records as they are now; all but the last are written."""
        self._rounds = rounds
        self._write(len(rounds) - 1)

    def close(self, *, failed: bool = False) -> None:
        """Write what is left, and finish."""
        self._write(len(self._rounds))
        sink, self._sink = self._sink, None
        if sink is not None:
            self._guarded(partial(sink.close, failed=failed))

    def _write(self, end: int) -> None:
        for record in self._rounds[self._written : end]:
            if self._sink is not None:
                self._guarded(partial(self._sink.write, record.round, scalars_of(record)))
        self._written = max(self._written, end)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:  # the stores raise what they like
            self._sink = None
            self._say(f"tracking has stopped ({type(exc).__name__}: {str(exc)[:200]})")


def require_tracking(name: str) -> None:
    """Refuse to start where the extra is missing.

    Raises
    ------
    MissingExtraError
        Naming the command that installs it.
    """
    if name == "none":
        return
    _quiet_mlflow()
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as exc:
        raise MissingExtraError(
            f"tracking={name} needs {name}, which is not installed",
            remedy=f"Run: pip install -e '.[{name}]', or set tracking=none",
        ) from exc


def make_tracker(
    name: str,
    *,
    folder: Path,
    uri: str,
    experiment: str,
    run: str,
    settings: Mapping[str, Any],
    on_event: Callable[[str], None] = lambda _line: None,
) -> Tracker:
    """Open a tracker.

    Parameters
    ----------
    name
        ``none``, ``tensorboard`` or ``mlflow``.
    folder
        Where TensorBoard's events go.
    uri, experiment, run
        MLflow's store, and the names that the run gets there.
    settings
        The run's configuration, nested; MLflow keeps it as parameters, secrets hidden.
    on_event
        Gets a line where the store fails later.

    Raises
    ------
    MissingExtraError
        As :func:`require_tracking`.
    ConfigError
        MLflow cannot open the store.
    """
    require_tracking(name)
    if name == "tensorboard":
        return Tracker(_TensorBoard(folder), on_event)
    if name == "mlflow":
        return Tracker(_Mlflow(uri, experiment, run, settings), on_event)
    return Tracker(None)


def scalars_of(record: RoundRecord) -> dict[str, float]:
    """Return a round's figures by name; what is unknown is left out."""
    found: dict[str, float | None] = {
        "accuracy": record.accuracy,
        "loss": record.loss,
        "majority_accuracy": record.majority_accuracy,
        "cloud_accuracy": record.cloud_accuracy,
        "cloud_loss": record.cloud_loss,
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "sites/replied": len(record.replied),
        "sites/failed": len(record.failed),
        **{f"seconds/{name}": value for name, value in record.seconds.items()},
    }
    return {name: float(value) for name, value in found.items() if value is not None}


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._writer = importlib.import_module(_MODULES["tensorboard"]).Writer(str(folder))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, uri: str, experiment: str, run: str, settings: Mapping[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            known = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if known is None else known.experiment_id
            self._run = self._client.create_run(number, run_name=run).info.run_id
            parameters = [
                self._entities.Param(name.replace("'", ""), value[:_LONGEST_VALUE])
                for name, value in flat_settings(settings)
            ]
            for start in range(0, len(parameters), _BATCH):
                self._client.log_batch(self._run, params=parameters[start : start + _BATCH])
        except Exception as exc:  # MLflow raises what its stores raise
            raise ConfigError(
                f"MLflow cannot use the store of tracking.uri ({type(exc).__name__}: {str(exc)[:300]})",
                remedy="Set tracking.uri to something like sqlite:///mlflow.db",
            ) from exc

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _quiet_mlflow() -> None:
    """Keep MLflow from reporting its use over the network, which it does unless it is told not to."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "true"
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
