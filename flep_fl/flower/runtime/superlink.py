"""Child process: Flower's SuperLink with split ports, TLS on the one that faces the sites.

One listener faces the sites (see :class:`~flep_fl.flower.runtime.ports.SitesPort`); the other, on loopback,
serves the process that started this one. The sites' listener answers nobody before their node keys are
registered.

``python -m flep_fl.flower.runtime.superlink --public-fd N --admin-fd N --news-fd N --secret-file F
--token-file F [--objects FOLDER] [--certificate F --private-key F --ca F --node-keys F]``

News are lines on ``--news-fd`` for the user: who was refused.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.object_store import ObjectStoreFactory

from flep_fl.flower.runtime.ports import AdminPort, FreeingApp, Refusals, SitesPort, parse_node_keys
from flep_fl.flower.runtime.replies import dropped_orders, forget, whole_replies
from flep_fl.flower.runtime.security import CloudSecurity
from flep_fl.flower.runtime.store import FileObjectStore
from flep_fl.flower.runtime.timing import accept_short_heartbeat
from flep_fl.flower.runtime.tls import server_context

_LOG = logging.getLogger("flwr")
_SHUTDOWN_LIMIT = 2
"""Seconds that open requests get after SIGTERM."""


def _serve_on(
    admin: socket.socket,
    public: socket.socket,
    token: bytes,
    say: Callable[[str], None],
    security: CloudSecurity | None,
) -> SimpleNamespace:
    """Return what the SuperLink command takes for the ``uvicorn`` module: it serves our two listeners."""

    def run(app: Any, *, log_config: Any, **_: Any) -> None:
        state = app.state.linkstate_factory.state()
        refusals = None
        if security is not None:
            app.state.enable_supernode_auth = True
            _register(state, security.node_keys)
            refusals = Refusals(security.node_keys, say)

        def server(served: Any, lifespan: str, context: ssl.SSLContext | None) -> uvicorn.Server:
            config = uvicorn.Config(
                served,
                log_config=log_config,
                access_log=False,
                lifespan=lifespan,  # type: ignore[arg-type]
                timeout_graceful_shutdown=_SHUTDOWN_LIMIT,
                ssl_context_factory=None if context is None else lambda _config, _default: context,
            )
            return uvicorn.Server(config)

        context = None if security is None else server_context(security)
        freeing = FreeingApp(app)
        inner = server(AdminPort(freeing, token, lambda ids: forget(state, ids)), "on", None)
        outer = server(SitesPort(freeing, refusals), "off", context)

        async def both() -> None:
            # SIGTERM reaches the server that was started last; it passes the signal on when it has ended.
            serving = asyncio.create_task(inner.serve(sockets=[admin]))
            while not inner.started and not serving.done():
                await asyncio.sleep(0.01)
            if inner.started:
                await outer.serve(sockets=[public])
            await serving

        with asyncio.Runner(loop_factory=inner.config.get_loop_factory()) as runner:
            runner.run(both())

    return SimpleNamespace(run=run)


def _register(state: Any, node_keys: Mapping[str, bytes]) -> None:
    """Make the sites' node keys the only ones that the SuperLink accepts."""
    for site, public_key in node_keys.items():
        state.create_node(
            owner_aid=NOOP_FLWR_AID,
            owner_name=NOOP_ACCOUNT_NAME,
            public_key=public_key,
            heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
            name=site,
        )


def _teller(news_fd: int) -> Callable[[str], None]:
    """Return what tells the log and, as far as its pipe has room, the parent."""
    os.set_blocking(news_fd, False)

    def say(line: str) -> None:
        _LOG.warning(line)
        try:
            os.write(news_fd, f"{line}\n".encode())
        except OSError:
            return

    return say


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("--public-fd", "--admin-fd", "--news-fd"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--secret-file", "--token-file"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--objects", "--certificate", "--private-key", "--ca", "--node-keys"):
        parser.add_argument(name, type=Path)
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM."""
    options = _options()
    public, admin = socket.socket(fileno=options.public_fd), socket.socket(fileno=options.admin_fd)
    security = None
    if options.certificate is not None:
        node_keys = parse_node_keys(options.node_keys.read_bytes())
        security = CloudSecurity(options.certificate, options.private_key, options.ca, node_keys)
    accept_short_heartbeat()
    link_state: Any = InMemoryLinkState
    link_state.get_message_res = whole_replies(InMemoryLinkState.get_message_res)
    link_state.delete_messages = dropped_orders(InMemoryLinkState.delete_messages)
    if options.objects is not None:
        factory: Any = ObjectStoreFactory
        store = FileObjectStore(options.objects)
        factory.store = lambda _factory: store
    # Its package hides the module.
    command: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    token = options.token_file.read_bytes()
    command.uvicorn = _serve_on(admin, public, token, _teller(options.news_fd), security)
    host, port = admin.getsockname()[:2]
    # The sites' TLS and node authentication are set up above; upstream knows one port, the loopback one.
    sys.argv = [
        "flower-superlink",
        "--insecure",
        "--isolation",
        "process",
        "--host",
        host,
        "--port",
        str(port),
    ]
    sys.argv += ["--disable-runtime-dependency-installation"]
    sys.argv += ["--superexec-auth-secret-file", str(options.secret_file)]
    command.flower_superlink()


if __name__ == "__main__":
    main()
