"""Flower's simulation engine on Ray: many ClientApps at a time, on this machine or on a cluster.

Ray is an extra and is imported here alone. Nothing is reported to anybody: Ray's usage statistics and
Flower's telemetry are off.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import telemetry
from flwr.supercore.run import Run

from flep_fl.contracts.errors import MissingExtraError, RuntimeStartError
from flep_fl.flower.runtime.environment import use_environment

LOCAL = "local"
"""Address of a Ray that is started on this machine for one run."""

PARTITION = "partition-id"
"""Where a ClientApp finds its number, from 0, in ``context.node_config``."""

_STARTS = 3

_ASK_EVERY = 5.0
"""Seconds between two questions to Ray whether a machine of it is left."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU of their own share those that are there
    "FLWR_TELEMETRY_ENABLED": "0",
}


def require_ray() -> None:
    """Refuse to go on without Ray.

    Raises
    ------
    MissingExtraError
        It is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(
            "runtime=ray needs the package ray, which is not installed",
            remedy="Run: pip install -e '.[ray]', or take runtime=local",
        )


def run_on_ray(
    server: ServerApp,
    client: ClientApp,
    *,
    nodes: int,
    address: str = LOCAL,
    cpus: int = 1,
    log: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run a ServerApp and ``nodes`` copies of a ClientApp in Flower's simulation engine.

    Parameters
    ----------
    server
        Runs in this process.
    client
        Is pickled to Ray's processes; it finds its number under :data:`PARTITION`.
    nodes
        Number of nodes.
    address
        :data:`LOCAL`, ``auto`` (the cluster that this machine belongs to) or HOST:PORT of a cluster's head.
        A local Ray ends with this process, however it ends.
    cpus
        Cores that one ClientApp uses; Ray runs as many at a time as there is room for.
    log
        Takes a line of progress.

    Raises
    ------
    MissingExtraError
        Ray is not installed.
    RuntimeStartError
        Ray does not start, the cluster does not answer, it has too few cores, or its last machine with enough
        of them is lost during the run.
    Exception
        Whatever the ServerApp raised.
    """
    require_ray()
    from flwr.simulation import run_simulation

    stop, raised = threading.Event(), []

    def serve(grid: Grid, context: Context) -> None:
        try:
            server(_LiveGrid(grid, stop, lambda: _places(cpus)), context)
        except BaseException as exc:
            raised.append(exc)
            raise

    with use_environment(_QUIET), _quiet_flower(), _ray(address, cpus, log):
        try:
            run_simulation(
                _Wrapped(serve), client, nodes, backend_config={"client_resources": {"num_cpus": cpus}}
            )
        except Exception as exc:
            cause = raised[0] if raised else None
            if cause is not None:
                raise cause from None
            raise RuntimeStartError(
                f"Flower's simulation engine ended ({type(exc).__name__}: {exc})",
                remedy="Look at the lines before this one, or take runtime=local",
            ) from exc
        finally:
            stop.set()  # the ServerApp's thread would wait for its sites otherwise


class _Wrapped(ServerApp):
    """A ServerApp that is one function: the engine calls it with its grid."""

    def __init__(self, function: Callable[[Grid, Context], None]) -> None:
        super().__init__()
        self._function = function

    def __call__(self, grid: Grid, context: Context) -> None:
        self._function(grid, context)


class _LiveGrid(Grid):
    """Flower's grid, which raises in the ServerApp once the engine has ended or Ray has no machine left.

    The engine itself answers an error for every site of a dead Ray, and would go on so for ever.
    """

    def __init__(self, grid: Grid, stop: threading.Event, places: Callable[[], int]) -> None:
        self._grid, self._stop, self._places = grid, stop, places
        self._asked = time.monotonic()

    def _checked(self) -> Grid:
        if self._stop.is_set():
            raise RuntimeStartError("Flower's simulation engine has ended")
        if time.monotonic() - self._asked >= _ASK_EVERY:
            if self._places() == 0:
                raise RuntimeStartError(
                    "Ray was lost during the run: none of its machines is left to run a site",
                    remedy="Look for what ended the process `raylet` (memory, a cluster's head that was "
                    "stopped), then start again, or take runtime=local",
                )
            self._asked = time.monotonic()
        return self._grid

    def set_run(self, run: Run) -> None:
        self._checked().set_run(run)

    @property
    def run(self) -> Run:
        return self._checked().run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self._checked().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._checked().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._checked().pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._checked().send_and_receive(messages, timeout=timeout)


@contextmanager
def _ray(address: str, cpus: int, log: Callable[[str], None]) -> Iterator[None]:
    """Start Ray, or connect to a cluster, for as long as the block runs."""
    ray: Any = importlib.import_module("ray")  # an extra: checked alike with and without it

    path = os.pathsep.join([entry for entry in sys.path if entry] + [os.environ.get("PYTHONPATH", "")])
    options: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {**_QUIET, "PYTHONPATH": path.strip(os.pathsep)}},
    }
    folder = None
    if address == LOCAL:
        # A short path: Ray's sockets lie below it, and the name of a socket has 107 characters at most.
        folder = tempfile.mkdtemp(prefix="flep-ray-", dir="/tmp")  # 0700, random name
        options.update(address=LOCAL, _temp_dir=folder)
    else:
        options.update(address=address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _start(ray, options)
            except Exception as exc:
                raise RuntimeStartError(
                    f"Ray cannot be reached at runtime.address={address} ({type(exc).__name__}: {exc})",
                    remedy="Start a cluster with `ray start --head` and give its HOST:PORT, or leave "
                    "runtime.address=local",
                ) from exc
        places = _places(cpus)
        if places == 0:
            raise RuntimeStartError(
                "Ray has no machine with as many cores as one site should use",
                expected=f"runtime.threads={cpus} cores",
                remedy="Lower runtime.threads",
            )
        log(f"Ray: {places} sites at a time")
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _places(cpus: int) -> int:
    """Return how many sites of ``cpus`` cores run at a time on the machines that Ray has now."""
    ray: Any = importlib.import_module("ray")
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return int(sum(resources.get("CPU", 0) // cpus for resources in alive))


def _start(ray: Any, options: dict[str, Any]) -> None:
    """Start or connect; a machine with much else to do does not start Ray within Ray's fixed 30 seconds."""
    for left in reversed(range(_STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as exc:
            ray.shutdown()
            if not left or "timed out during startup" not in str(exc):
                raise


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Keep Flower from calling home, and from logging its own steps (and a deprecation) over ours."""
    # Flower reads the variable when it is imported, and that was long ago.
    before, telemetry.FLWR_TELEMETRY_ENABLED = telemetry.FLWR_TELEMETRY_ENABLED, "0"
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        telemetry.FLWR_TELEMETRY_ENABLED = before
