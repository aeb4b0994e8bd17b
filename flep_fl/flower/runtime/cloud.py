"""Run a ServerApp in this process, on a SuperLink that lives and ends with it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import httpx
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient

from flep_fl.contracts.errors import RuntimeStartError, SuperLinkLostError, public_code
from flep_fl.contracts.files import write_secret
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
from flep_fl.flower.runtime.grid import GuardedGrid, SuperLinkEndedError
from flep_fl.flower.runtime.ports import format_node_keys
from flep_fl.flower.runtime.security import CloudSecurity
from flep_fl.flower.runtime.store import empty_folder, remove_folder
from flep_fl.flower.runtime.tls import normal_node_keys, server_context
from flep_fl.flower.runtime.wire import set_task_identity

Scalar = str | int | float | bool
Database = Literal["memory", "disk"]

MOST_RESTARTS = 5
"""How often the SuperLink of one run is started again before the run is given up."""

_START_LIMIT = 90.0
"""Seconds that the SuperLink gets to answer (about 3 on an idle machine)."""

_MEMORY_HABITS = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1048576"}
"""For the SuperLink: glibc gives the memory of a chunk (5 MB) back as soon as it is freed."""

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
        Flower's final status, for instance ``finished:completed``; ``unknown`` when the SuperLink ended
        after the app and before it could be asked.
    seconds
        Wall time of the ServerApp.
    """

    run_id: int
    status: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Terms:
    """What does not change when the SuperLink is started again."""

    address: str
    listener: socket.socket
    home: Path
    stop: threading.Event
    log: Callable[[str], None]
    security: CloudSecurity | None
    database: Database

    @property
    def log_file(self) -> Path:
        return self.home / "superlink.log"


@dataclass(slots=True)
class _SuperLink:
    child: subprocess.Popen[bytes]
    address: str
    log_file: Path
    news_fd: int
    log: Callable[[str], None]
    secret: bytes = field(repr=False)
    admin_token: bytes = field(repr=False)
    _rest: bytes = b""

    def check(self) -> None:
        """Pass the child's news on; raise SuperLinkEndedError when it has ended."""
        self.read_news()
        status = self.child.poll()
        if status is not None:
            raise SuperLinkEndedError(
                f"The SuperLink ended unexpectedly (exit status {status}); its last lines: "
                f"{log_tail(self.log_file)}"
            )

    def read_news(self) -> None:
        """Tell the user what the child has told since the last call; never waits."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.news_fd, 4096):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self.log(line.decode(errors="replace"))


def run_cloud(
    app: ServerApp,
    *,
    address: str,
    home: Path,
    run_config: Mapping[str, Scalar],
    stop: threading.Event,
    log: Callable[[str], None],
    security: CloudSecurity | None = None,
    database: Database = "disk",
) -> RunOutcome:
    """Start a SuperLink, run ``app`` in this process, end the SuperLink.

    A SuperLink that ends while the app runs is started again on the same address, at most
    :data:`MOST_RESTARTS` times. What was on its way is lost: the app's next grid call (or the one that is
    under way) raises SuperLinkLostError, and after that the grid works on the new SuperLink, to which the
    sites come back by themselves, as new nodes.

    Parameters
    ----------
    app
        The ServerApp; its grid's ``pull_messages`` does not wait, its context holds ``run_config``. It must
        call the grid in the thread in which it is run.
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
        Takes lines for the user, among them who was refused.
    security
        TLS and node authentication of ``address``; None serves everybody in the clear (loopback only).
    database
        Where messages wait in the SuperLink: ``disk`` (files in ``home``, 0600, removed at the end; the
        SuperLink's memory does not grow with the sites) or ``memory``.

    Returns
    -------
    RunOutcome
        When the app returned.

    Raises
    ------
    PortInUseError, TransportSecurityError
        Before anything starts, when the address is taken or the certificate or a key cannot be used.
    RuntimeStartError
        When the SuperLink does not start, or ends too often.
    SuperLinkLostError
        When the app lets it pass.
    Interrupted
        When ``stop`` was set.
    Exception
        Whatever the app raises, after everything has been cleaned up.
    """
    if security is not None:
        server_context(security)
        keys = normal_node_keys(security.node_keys)
        security = CloudSecurity(security.certificate, security.private_key, security.ca, keys)
    home.mkdir(parents=True, exist_ok=True)
    with use_environment(flower_environment(home)), bind(address) as listener:
        terms = _Terms(address, listener, home, stop, log, security, database)
        with contextlib.closing(_Service(terms)) as service:
            log(f"SuperLink ready on {address}")
            return service.execute(app, run_config)


@contextlib.contextmanager
def _superlink(terms: _Terms) -> Iterator[_SuperLink]:
    """Run a SuperLink child for as long as the block runs."""
    home, public = terms.home, terms.listener
    secret_file, token_file = home / "superexec.secret", home / "admin.token"
    objects, keys_file = home / "objects", home / "node-keys.json"
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(bind(f"{LOOPBACK}:0"))
        secret, token = new_secret(secret_file), new_secret(token_file)
        stack.callback(secret_file.unlink, missing_ok=True)
        stack.callback(token_file.unlink, missing_ok=True)
        command = [sys.executable, "-m", "flep_fl.flower.runtime.superlink"]
        command += ["--secret-file", str(secret_file), "--token-file", str(token_file)]
        if terms.database == "disk":
            empty_folder(objects)
            stack.callback(remove_folder, objects)
            command += ["--objects", str(objects)]
        if (security := terms.security) is not None:
            write_secret(keys_file, format_node_keys(security.node_keys))
            stack.callback(keys_file.unlink, missing_ok=True)
            command += [
                "--certificate",
                str(security.certificate),
                "--private-key",
                str(security.private_key),
            ]
            command += ["--ca", str(security.ca), "--node-keys", str(keys_file)]
        news_fd, tell_fd = os.pipe()
        stack.callback(os.close, news_fd)
        os.set_blocking(news_fd, False)
        handed_on = (public.fileno(), admin.fileno(), tell_fd)
        command += ["--public-fd", str(handed_on[0]), "--admin-fd", str(handed_on[1])]
        command += ["--news-fd", str(tell_fd)]
        try:
            environment = child_environment(home) | _MEMORY_HABITS
            child = spawn_child(command, env=environment, log=terms.log_file, pass_fds=handed_on)
        finally:
            os.close(tell_fd)
        admin_address = f"{LOOPBACK}:{admin.getsockname()[1]}"
        link = _SuperLink(child, admin_address, terms.log_file, news_fd, terms.log, secret, token)
        stack.callback(link.read_news)
        stack.callback(terminate, child)
        # Only the child may hold the loopback port: a call must fail as soon as it is gone. The sites' port
        # stays open here as well, so that nobody can take it while a SuperLink is started again.
        admin.close()
        _wait_until_healthy(link, terms.stop)
        yield link


def _wait_until_healthy(link: _SuperLink, stop: threading.Event) -> None:
    deadline = time.monotonic() + _START_LIMIT
    with httpx.Client(timeout=2.0, trust_env=False) as client:
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


@dataclass(slots=True)
class _Started:
    """A SuperLink with Flower's run on it, whose ServerApp's task is ours."""

    link: _SuperLink
    token: str
    run: Run
    context: Context
    task: RuntimeHttpClient


@contextlib.contextmanager
def _started(terms: _Terms) -> Iterator[_Started]:
    """Run a SuperLink, start Flower's run and keep its task alive for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(_superlink(terms))
        with _named_errors(link):
            _start_run(link)
        token = _acquire(link, terms.stop)

        def client() -> RuntimeHttpClient:
            return task_client(link.address, token, link.admin_token)

        stack.enter_context(task_heartbeat(client))
        task = stack.enter_context(client())
        with _named_errors(link):
            entry = task.PullTaskInput(PullTaskInputRequest())
        run, context = run_from_proto(entry.run), context_from_proto(entry.context)
        set_task_identity(run.run_id, context.node_id, entry.task_id)
        yield _Started(link, token, run, context, task)


class _Service:
    """The SuperLink that is there now, and its successors."""

    def __init__(self, terms: _Terms) -> None:
        self._terms = terms
        self._stack = contextlib.ExitStack()
        self._now = self._stack.enter_context(_started(terms))
        self._restarts = 0

    def close(self) -> None:
        """End the SuperLink."""
        self._stack.close()

    def execute(self, app: ServerApp, run_config: Mapping[str, Scalar]) -> RunOutcome:
        """Run the app to its end and tell the SuperLink how it ended."""
        started = time.monotonic()
        context = self._now.context
        context.run_config = dict(run_config)
        self._grid = GuardedGrid(
            self._now.link.address,
            self._now.token,
            admin_token=self._now.link.admin_token,
            stop=self._terms.stop,
            check=self._check,
            recover=self._recover,
        )
        self._grid.set_run(self._now.run)
        outcome, details = SubStatus.FAILED, "error"
        with contextlib.closing(self._grid):
            try:
                app(self._grid, context)
                outcome, details = SubStatus.COMPLETED, ""
            except BaseException as exc:
                outcome, details = SubStatus.FAILED, public_code(exc)
                raise
            finally:
                self._finish(context, outcome, details)
        run_id, status = self._now.run.run_id, "unknown"
        with contextlib.suppress(httpx.HTTPError):
            status = _run_status(self._now.link, run_id)
        return RunOutcome(run_id, status, time.monotonic() - started)

    def _check(self) -> None:
        self._now.link.check()

    def _finish(self, context: Context, outcome: str, details: str) -> None:
        context.state = RecordDict()
        request = PushTaskOutputRequest(
            context=context_to_proto(context), sub_status=outcome, details=details
        )
        # (A client whose SuperLink could not be replaced is closed: RuntimeError.)
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            self._now.task.PushTaskOutput(request)

    def _recover(self, ended: SuperLinkEndedError) -> NoReturn:
        """Start a SuperLink in the place of one that ended; then say what is lost."""
        if self._restarts >= MOST_RESTARTS:
            raise RuntimeStartError(
                f"The SuperLink ended {self._restarts + 1} times in one run; the last time: {ended}"
            ) from ended
        self._restarts += 1
        status = self._now.link.child.poll()
        self._terms.log(f"the SuperLink ended (exit status {status}); starting it again")
        self._stack.close()
        self._now = self._stack.enter_context(_started(self._terms))
        self._grid.connect_to(self._now.link.address, self._now.token, self._now.link.admin_token)
        self._grid.set_run(self._now.run)
        self._terms.log(f"SuperLink ready again on {self._terms.address}; the sites connect by themselves")
        raise SuperLinkLostError(
            "The SuperLink ended and was started again: the messages on their way are lost",
            found=f"exit status {status}",
            remedy="See superlink.log in the run's folder; an out-of-memory kill shows in the system's log",
        ) from ended
