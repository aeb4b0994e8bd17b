"""Child process: Flower's SuperNode with quick polls, short heartbeats, and news for its parent.

``python -m flep_fl.flower.runtime.supernode --superlink ADDRESS --runtime-fd N --news-fd N --secret-file F
[--ca F --node-key F]``

News are lines on ``--news-fd``: ``connected``; ``delivered ID`` when the SuperLink has the whole reply ID;
``lost ID`` when that reply cannot be delivered any more; ``refused WHY`` before this process ends because
the SuperLink does not accept the node.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from flwr.supercore.retry import RetryInvoker, exponential, http_retry
from flwr.supernode import fleet_http_connection, start_client_internal

from flep_fl.flower.runtime.timing import NODE_POLL, RECONNECT_LIMIT, REPLY_POLL, shorten_node_heartbeat
from flep_fl.flower.runtime.tls import parse_private_key

Tell = Callable[[str], None]

_UPSTREAM_IDLE_SLEEP = 3
"""What upstream's loop sleeps when there is no message; its shorter sleeps wait for the app's reply."""


_LONGEST_REASON = 300


def _quick_clock() -> SimpleNamespace:
    """Return what the SuperNode's loop takes for the ``time`` module: the same clock, shorter sleeps."""

    def sleep(seconds: float) -> None:
        time.sleep(NODE_POLL if seconds >= _UPSTREAM_IDLE_SLEEP else min(seconds, REPLY_POLL))

    return SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)


def _patient_but_quick(upstream: Callable[[], RetryInvoker]) -> Callable[[], RetryInvoker]:
    """Keep upstream's endless retries, with at most :data:`RECONNECT_LIMIT` seconds between two."""

    def make() -> RetryInvoker:
        invoker = upstream()
        invoker.wait_gen_factory = lambda: exponential(max_delay=RECONNECT_LIMIT)
        return invoker

    return make


def _announcing_connection(upstream: Any, tell: Tell) -> Any:
    """Tell the parent when the SuperLink has accepted this node."""

    @contextlib.contextmanager
    def connect(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with upstream(*args, **kwargs) as connection:
            tell("connected")
            yield connection

    return connect


def _announcing_delivery(upstream: Callable[..., None], tell: Tell) -> Callable[..., None]:
    """Tell the parent what became of every reply; upstream only logs it."""

    def push(state: Any, object_store: Any, send: Any, push_object: Any) -> None:
        sent: list[str] = []
        failed: set[str] = set()
        lock = threading.Lock()

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any) -> Any:
                try:
                    return call(*args)
                except BaseException:
                    with lock:
                        failed.add(sent[-1])
                    raise

            return wrapper

        def watched_send(message: Any, *args: Any) -> Any:
            sent.append(message.metadata.message_id)
            return watched(send)(message, *args)

        upstream(state=state, object_store=object_store, send=watched_send, push_object=watched(push_object))
        for message_id in sent:
            tell(f"{'lost' if message_id in failed else 'delivered'} {message_id}")

    return push


def _announcing_exit(upstream: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    """Tell the parent why the connection could not be made; upstream logs it and ends the process."""

    def leave(code: int, message: str | None = None, *args: Any, **kwargs: Any) -> Any:
        tell(f"refused {' '.join((message or '').split())[:_LONGEST_REASON]}")
        return upstream(code, message, *args, **kwargs)

    return leave


def _leave_at_once(tell: Tell) -> SimpleNamespace:
    """Return what the retrying client takes for the ``os`` module: an unknown node ends, with status 0.

    Upstream sends itself a SIGINT when the SuperLink answers 401 (it was restarted and does not know this
    node). Its threads may do so twice, and a second one breaks the orderly exit of the first for ever.
    """

    def leave(_pid: int, _signal: int) -> None:
        tell("refused 401: the proof of the node key was not accepted")
        os._exit(0)

    return SimpleNamespace(kill=leave, getpid=os.getpid)


def _serve_on(listener: socket.socket) -> SimpleNamespace:
    """Return what the SuperNode command takes for the ``uvicorn`` module: it serves our listener."""

    class Server(uvicorn.Server):
        def run(self, sockets: list[socket.socket] | None = None) -> None:
            super().run(sockets=[listener] if sockets is None else sockets)

    return SimpleNamespace(Server=Server, Config=uvicorn.Config)


def main() -> None:
    """Serve until SIGTERM; the node is unregistered on the way out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--runtime-fd", type=int, required=True)
    parser.add_argument("--news-fd", type=int, required=True)
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--node-key", type=Path)
    options = parser.parse_args()

    def tell(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(options.news_fd, f"{line}\n".encode())

    listener = socket.socket(fileno=options.runtime_fd)
    shorten_node_heartbeat()
    loop: Any = start_client_internal
    loop.time = _quick_clock()
    loop._init_connection = _announcing_connection(loop._init_connection, tell)
    loop._push_messages = _announcing_delivery(loop._push_messages, tell)
    retrying: Any = http_retry
    retrying.os = _leave_at_once(tell)
    connection: Any = fleet_http_connection
    connection.make_simple_http_retry_invoker = _patient_but_quick(connection.make_simple_http_retry_invoker)
    connection.flwr_exit = _announcing_exit(connection.flwr_exit, tell)
    connection.os = _leave_at_once(tell)
    command: Any = importlib.import_module(
        "flwr.supernode.cli.flower_supernode"
    )  # its package hides the module
    command.uvicorn = _serve_on(listener)
    # Upstream reads OpenSSH's format alone.
    command.load_ssh_private_key = lambda content, _passphrase: parse_private_key(content)
    host, port = listener.getsockname()[:2]
    sys.argv = ["flower-supernode", "--isolation", "process", "--superlink", options.superlink]
    if options.ca is None:
        sys.argv += ["--insecure"]
    else:
        sys.argv += ["--root-certificates", str(options.ca)]
        sys.argv += ["--auth-supernode-private-key", str(options.node_key)]
    sys.argv += [
        "--host",
        host,
        "--port",
        str(port),
        "--superexec-auth-secret-file",
        str(options.secret_file),
    ]
    command.flower_supernode()


if __name__ == "__main__":
    main()
