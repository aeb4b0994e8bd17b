"""Run a ServerApp in this process, on a SuperLink that lives and ends with it."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from flwr.app import RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.runtime import RuntimeHttpClient

from flep_fl.contracts.errors import RuntimeStartError, public_code
from flep_fl.flower.processes import Interrupted, spawn_child, terminate
from flep_fl.flower.runtime.clients import (
    acquire_task,
    acquiring_client,
    control_client,
    task_client,
    task_heartbeat,
)
from flep_fl.flower.runtime.environment import (
    LOOPBACK,
    bind,
    child_environment,
    flower_environment,
    log_tail,
    new_secret,
    use_environment,
)
from flep_fl.flower.runtime.grid import GuardedGrid
from flep_fl.flower.runtime.wire import set_task_identity

Scalar = str | int | float | bool

_START_LIMIT = 90.0
"""Seconds that the SuperLink gets to answer (about 3 on an idle machine)."""

_BUNDLE = b"""\
[project]
name = "flep-fl-run"
version = "1.0.0"
description = "Names the apps that are installed at each party; holds no code."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "flep"

[tool.flwr.app.components]
serverapp = "installed:app"
clientapp = "installed:app"
"""
"""The Flower app bundle of every run. Nobody executes it: each party runs what is installed there."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    run_id
        Flower's number of the run.
    status
        Flower's final status, for instance ``finished:completed``.
    seconds
        Wall time of the ServerApp.
    """

    run_id: int
    status: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _SuperLink:
    child: subprocess.Popen[bytes]
    address: str
    log_file: Path
    secret: bytes = field(repr=False)
    admin_token: bytes = field(repr=False)

    def check(self) -> None:
        """Raise RuntimeStartError when the child has ended."""
        status = self.child.poll()
        if status is not None:
            raise RuntimeStartError(
                f"The SuperLink ended unexpectedly (exit status {status}); its last lines: "
                f"{log_tail(self.log_file)}"
            )


def run_cloud(
    app: ServerApp,
    *,
    address: str,
    home: Path,
    run_config: Mapping[str, Scalar],
    stop: threading.Event,
    log: Callable[[str], None],
) -> RunOutcome:
    """Start a SuperLink, run ``app`` in this process, end the SuperLink.

    Parameters
    ----------
    app
        The ServerApp; its grid's ``pull_messages`` does not wait, its context holds ``run_config``.
    address
        ``host:port`` that the sites connect to. It serves the fleet routes alone.
    home
        Folder for Flower's files, the secrets of this run (0600) and ``superlink.log``; made when missing.
    run_config
        Flat settings for the ServerApp's context. They stay in this process: what a site needs travels in
        messages.
    stop
        Set to end the run: the app's next grid call raises ``Interrupted``.
    log
        Takes lines for the user.

    Returns
    -------
    RunOutcome
        When the app returned.

    Raises
    ------
    PortInUseError
        Before anything starts, when the address is taken.
    RuntimeStartError
        When the SuperLink does not start or ends while the app runs.
    Interrupted
        When ``stop`` was set.
    Exception
        Whatever the app raises, after everything has been cleaned up.
    """
    with use_environment(flower_environment(home)), _superlink(address, home, stop) as link:
        log(f"SuperLink ready on {address}")
        return _execute(app, link, run_config, stop)


@contextlib.contextmanager
def _superlink(address: str, home: Path, stop: threading.Event) -> Iterator[_SuperLink]:
    """Run a SuperLink child for as long as the block runs."""
    home.mkdir(parents=True, exist_ok=True)
    log_file = home / "superlink.log"
    secret_file, token_file = home / "superexec.secret", home / "admin.token"
    with contextlib.ExitStack() as stack:
        public = stack.enter_context(bind(address))
        admin = stack.enter_context(bind(f"{LOOPBACK}:0"))
        secret, token = new_secret(secret_file), new_secret(token_file)
        stack.callback(secret_file.unlink, missing_ok=True)
        stack.callback(token_file.unlink, missing_ok=True)
        command = [sys.executable, "-m", "flep_fl.flower.runtime.superlink"]
        command += ["--public-fd", str(public.fileno()), "--admin-fd", str(admin.fileno())]
        command += ["--secret-file", str(secret_file), "--token-file", str(token_file)]
        admin_address = f"{LOOPBACK}:{admin.getsockname()[1]}"
        child = spawn_child(
            command, env=child_environment(home), log=log_file, pass_fds=(public.fileno(), admin.fileno())
        )
        stack.callback(terminate, child)
        # Only the child may hold the ports: they must be free as soon as it is gone.
        public.close()
        admin.close()
        link = _SuperLink(child, admin_address, log_file, secret, token)
        _wait_until_healthy(link, stop)
        yield link


def _wait_until_healthy(link: _SuperLink, stop: threading.Event) -> None:
    deadline = time.monotonic() + _START_LIMIT
    with httpx.Client(timeout=2.0) as client:
        while time.monotonic() < deadline:
            link.check()
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"http://{link.address}/health").is_success:
                    return
            if stop.wait(0.1):
                raise Interrupted
    raise RuntimeStartError(
        f"The SuperLink did not answer within {_START_LIMIT:.0f} s; its last lines: {log_tail(link.log_file)}"
    )


@contextlib.contextmanager
def _named_errors(link: _SuperLink) -> Iterator[None]:
    """Turn a failed call to the SuperLink into RuntimeStartError."""
    try:
        yield
    except httpx.HTTPError as exc:
        link.check()
        raise RuntimeStartError(
            "The SuperLink refused a call",
            found=type(exc).__name__,
            remedy=f"See {link.log_file}",
        ) from exc


def _start_run(link: _SuperLink) -> int:
    """Create the run; return its id."""
    bundle, _ = build_fab_from_files({"pyproject.toml": _BUNDLE})
    fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
    with control_client(link.address, link.admin_token) as control:
        response = control.StartRun(StartRunRequest(fab=fab_to_proto(fab), federation=""))
    run_id: int = response.run_id
    return run_id


def _run_status(link: _SuperLink, run_id: int) -> str:
    with control_client(link.address, link.admin_token) as control:
        runs = control.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
    status = run_from_proto(runs[run_id]).status
    return f"{status.status}:{status.sub_status}"


def _acquire(link: _SuperLink, stop: threading.Event) -> str:
    """Wait for the ServerApp's task; return its token."""
    deadline = time.monotonic() + _START_LIMIT
    with acquiring_client(link.address, link.secret, link.admin_token) as client:
        while time.monotonic() < deadline:
            link.check()
            if (token := acquire_task(client, TaskType.SERVER_APP)) is not None:
                return token
            if stop.wait(0.1):
                raise Interrupted
    raise RuntimeStartError("The SuperLink did not hand out the ServerApp's task")


def _execute(
    app: ServerApp, link: _SuperLink, run_config: Mapping[str, Scalar], stop: threading.Event
) -> RunOutcome:
    """Start a run and execute its ServerApp here."""
    started = time.monotonic()
    with _named_errors(link):
        run_id = _start_run(link)
    token = _acquire(link, stop)
    grid = GuardedGrid(link.address, token, admin_token=link.admin_token, stop=stop, check=link.check)
    outcome, details = SubStatus.FAILED, "error"

    def client() -> RuntimeHttpClient:
        return task_client(link.address, token, link.admin_token)

    with contextlib.closing(grid), task_heartbeat(client), client() as task:
        with _named_errors(link):
            entry = task.PullTaskInput(PullTaskInputRequest())
        run, context = run_from_proto(entry.run), context_from_proto(entry.context)
        set_task_identity(run.run_id, context.node_id, entry.task_id)
        grid.set_run(run)
        context.run_config = dict(run_config)
        try:
            app(grid, context)
            outcome, details = SubStatus.COMPLETED, ""
        except BaseException as exc:
            outcome, details = SubStatus.FAILED, public_code(exc)
            raise
        finally:
            context.state = RecordDict()
            with contextlib.suppress(httpx.HTTPError):
                task.PushTaskOutput(
                    PushTaskOutputRequest(
                        context=context_to_proto(context), sub_status=outcome, details=details
                    )
                )
    with _named_errors(link):
        return RunOutcome(run_id, _run_status(link, run_id), time.monotonic() - started)
