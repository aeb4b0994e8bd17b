"""Run a ClientApp in this process, behind a SuperNode that lives and ends with it."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from flep_fl.contracts.errors import IdleTimeoutError, NodeRefusedError, RuntimeStartError, public_code
from flep_fl.flower.processes import Interrupted, interruptible, spawn_child, terminate
from flep_fl.flower.runtime.clients import acquire_task, acquiring_client, task_client, task_heartbeat
from flep_fl.flower.runtime.environment import (
    LOOPBACK,
    bind,
    child_environment,
    flower_environment,
    log_tail,
    new_secret,
    parse_address,
    use_environment,
)
from flep_fl.flower.runtime.security import SiteSecurity
from flep_fl.flower.runtime.timing import TASK_POLL
from flep_fl.flower.runtime.tls import (
    client_context,
    load_node_key,
    node_fingerprint,
    require_same_language,
)
from flep_fl.flower.runtime.wire import describe, error_reply

Scalar = str | int | float | bool

_QUIET_START = 5.0
"""Seconds without a connection after which the user is told."""

_PROBE_INTERVAL = 2.0
"""Seconds between two looks at why there is no connection."""

_DELIVERY_LIMIT = 60.0
"""Seconds that the last reply gets to reach the SuperLink."""


@dataclass(slots=True)
class _SuperNode:
    """A SuperNode child and what it told so far."""

    child: subprocess.Popen[bytes]
    address: str
    log_file: Path
    news_fd: int
    secret: bytes = field(repr=False)
    connected: bool = False
    refusal: str | None = None
    delivered: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    _rest: bytes = b""

    def read_news(self) -> None:
        """Take in what the child has told since the last call; never waits."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.news_fd, 4096):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            word, _, message_id = line.decode().partition(" ")
            if word == "connected":
                self.connected = True
            elif word == "delivered":
                self.delivered.add(message_id)
            elif word == "lost":
                self.lost.add(message_id)
            elif word == "refused":
                self.refusal = message_id


def run_site(
    app: ClientApp,
    *,
    cloud: str,
    site: str,
    home: Path,
    done: Callable[[], bool],
    stop: threading.Event,
    idle_timeout: float,
    node_config: Mapping[str, Scalar],
    log: Callable[[str], None],
    security: SiteSecurity | None = None,
) -> None:
    """Connect to the cloud and answer its messages with ``app``, in this process, until ``done()``.

    Only the installed ``app`` runs: code in a bundle that the cloud ships is never executed. An exception of
    the app becomes an error reply that carries a public code and nothing else.

    Parameters
    ----------
    app
        The ClientApp.
    cloud
        ``host:port`` of the cloud.
    site
        This site's name, for the log lines.
    home
        Folder for Flower's files, the secret of this process (0600) and ``supernode.log``.
    done
        Asked after every reply; true ends the function, once the cloud has the reply.
    stop
        Set to end at once (a signal caught by :func:`~flep_fl.flower.processes.stop_on_signals` also breaks
        off a running app).
    idle_timeout
        Seconds without a message after which the site gives up; 0 waits for ever.
    node_config
        What the app finds in ``context.node_config``; it stays in this process.
    log
        Takes lines for the user.
    security
        TLS and this site's node key; None speaks in the clear (loopback only).

    Raises
    ------
    IdleTimeoutError
        When nothing was heard for ``idle_timeout`` seconds.
    TransportSecurityError
        When the certificate of whoever answers at ``cloud`` is not the federation's, not of this address or
        not of this time, when only one of the two speaks TLS, or a file of ``security`` cannot be used.
        A cloud that does not answer yet is waited for.
    NodeRefusedError
        When the cloud does not know this site's node key.
    RuntimeStartError
        When the SuperNode does not start or ends unexpectedly.
    Interrupted
        When ``stop`` was set.
    """
    parse_address(cloud)
    key = ""
    if security is not None:
        client_context(security.ca)
        key = node_fingerprint(load_node_key(security.node_key))
    heard = time.monotonic()
    with use_environment(flower_environment(home)):
        while True:
            with _supernode(cloud, home, security) as node:
                heard, finished = _serve(
                    app,
                    node,
                    peer=_Peer(cloud, security, key),
                    site=site,
                    done=done,
                    stop=stop,
                    idle_timeout=idle_timeout,
                    node_config=node_config,
                    log=log,
                    heard=heard,
                )
            if finished:
                return
            log(f"{site}: the cloud no longer knows this site (was it restarted?); connecting again")


@dataclass(frozen=True, slots=True)
class _Peer:
    """The cloud as this site knows it, and the fingerprint of the node key that it is shown."""

    cloud: str
    security: SiteSecurity | None
    key: str

    def require_acceptance(self, node: _SuperNode) -> None:
        """Raise by name when TLS cannot work, or the cloud has refused this node."""
        require_same_language(self.cloud, self.security)
        if node.refusal is not None:
            raise NodeRefusedError(
                f"{self.cloud} does not accept this site's node key"
                + (f" {self.key}" if self.key else ": it wants one, and this site was started without"),
                found=node.refusal,
                remedy="Cloud and site need kits of one federation and generation, and clocks that agree to "
                "the minute; the cloud's log names the key that it refused",
            )


@contextlib.contextmanager
def _supernode(cloud: str, home: Path, security: SiteSecurity | None) -> Iterator[_SuperNode]:
    """Run a SuperNode child for as long as the block runs; it unregisters on the way out."""
    home.mkdir(parents=True, exist_ok=True)
    log_file, secret_file = home / "supernode.log", home / "superexec.secret"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind(f"{LOOPBACK}:0"))
        address = f"{LOOPBACK}:{listener.getsockname()[1]}"
        news_fd, tell_fd = os.pipe()
        stack.callback(os.close, news_fd)
        os.set_blocking(news_fd, False)
        try:
            secret = new_secret(secret_file)
            stack.callback(secret_file.unlink, missing_ok=True)
            command = [sys.executable, "-m", "flep_fl.flower.runtime.supernode", "--superlink", cloud]
            command += ["--runtime-fd", str(listener.fileno()), "--news-fd", str(tell_fd)]
            command += ["--secret-file", str(secret_file)]
            if security is not None:
                command += ["--ca", str(security.ca), "--node-key", str(security.node_key)]
            child = spawn_child(
                command, env=child_environment(home), log=log_file, pass_fds=(listener.fileno(), tell_fd)
            )
        finally:
            os.close(tell_fd)
            listener.close()
        stack.callback(terminate, child)
        yield _SuperNode(child, address, log_file, news_fd, secret)


def _serve(
    app: ClientApp,
    node: _SuperNode,
    *,
    peer: _Peer,
    site: str,
    done: Callable[[], bool],
    stop: threading.Event,
    idle_timeout: float,
    node_config: Mapping[str, Scalar],
    log: Callable[[str], None],
    heard: float,
) -> tuple[float, bool]:
    """Answer messages; return when the last one came, and whether ``done()`` (else the node must restart)."""
    started, cloud = time.monotonic(), peer.cloud
    # Without TLS there is nothing to compare at first, and a plain server would complain about the probe.
    probed = started - _PROBE_INTERVAL if peer.security is not None else started + _QUIET_START
    told = False
    with acquiring_client(node.address, node.secret) as acquiring:
        while True:
            if stop.is_set():
                raise Interrupted
            known = node.connected
            node.read_news()
            if node.connected and not known:
                log(f"{site}: connected to {cloud}")
                told = True
            if not _is_alive(node, peer):
                return heard, False
            now = time.monotonic()
            if not node.connected and now - probed >= _PROBE_INTERVAL:
                require_same_language(cloud, peer.security)
                probed = now
            if not told and now - started > _QUIET_START:
                log(f"{site}: {cloud} does not answer yet; trying again until it does")
                told = True
            if 0 < idle_timeout < now - heard:
                raise IdleTimeoutError(
                    f"{site} heard nothing from {cloud} for {idle_timeout:g} s",
                    remedy="Is the cloud running? runtime.idle_timeout=0 waits for ever",
                )
            token = acquire_task(acquiring, TaskType.CLIENT_APP)
            if token is None:
                stop.wait(TASK_POLL)
                continue
            reply_id = _run_task(app, node, peer, token, site=site, node_config=node_config, log=log)
            heard = time.monotonic()
            if reply_id is not None and done():
                if not _wait_for_delivery(node, reply_id, stop):
                    log(f"{site}: the cloud did not take the last reply")
                return heard, True


def _is_alive(node: _SuperNode, peer: _Peer) -> bool:
    """Whether the SuperNode runs; False after an orderly exit of a node that had been connected.

    (Upstream ends a SuperNode, with 0, when the SuperLink says that it does not know it.)
    """
    status = node.child.poll()
    if status is None:
        return True
    node.read_news()
    if status == 0 and node.connected:
        return False
    if not node.connected:
        peer.require_acceptance(node)
    raise RuntimeStartError(
        f"The SuperNode ended unexpectedly (exit status {status}); its last lines: {log_tail(node.log_file)}"
    )


def _run_task(
    app: ClientApp,
    node: _SuperNode,
    peer: _Peer,
    token: str,
    *,
    site: str,
    node_config: Mapping[str, Scalar],
    log: Callable[[str], None],
) -> str | None:
    """Answer one message; return the reply's id, or None when it could not be handed to the SuperNode."""

    def client() -> RuntimeHttpClient:
        return task_client(node.address, token)

    try:
        with task_heartbeat(client), client() as task:
            message, context, _, _ = pull_task_input(task)
            context.node_config = dict(node_config)
            reply, outcome, details = _answer(app, message, context, site=site, log=log)
            push_message(task, reply, context)
            push_task_output(task, context, outcome, details)
            reply_id: str = reply.metadata.message_id
        # flwr's views of a message (``content.array_records``) are reference cycles that hold a whole model.
        del message, reply
        gc.collect()
        return reply_id
    except httpx.HTTPError as exc:
        _is_alive(node, peer)
        log(f"{site}: a message was lost on the way to the local SuperNode ({type(exc).__name__})")
        return None


def _answer(
    app: ClientApp, message: Message, context: Context, *, site: str, log: Callable[[str], None]
) -> tuple[Message, str, str]:
    """Run the app; return its reply (or the error reply), Flower's outcome and its details."""
    try:
        with interruptible():
            reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
    except Exception as exc:
        log(f"{site}: {describe(exc)}")
        return error_reply(message, exc), SubStatus.FAILED, public_code(exc)
    return reply, SubStatus.COMPLETED, ""


def _wait_for_delivery(node: _SuperNode, reply_id: str, stop: threading.Event) -> bool:
    """Wait until the SuperLink has the whole reply; False when it never will."""
    deadline = time.monotonic() + _DELIVERY_LIMIT
    while time.monotonic() < deadline and not stop.is_set():
        node.read_news()
        if reply_id in node.delivered:
            return True
        if reply_id in node.lost or node.child.poll() is not None:
            return False
        stop.wait(0.05)
    return False
