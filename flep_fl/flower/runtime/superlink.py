"""Child process: Flower's SuperLink with split ports.

One listener faces the sites and serves ``/v1/fleet/*`` and ``/health`` alone; the other, on loopback, serves
the control and runtime routes to the process that started this one, which shows the admin token. (Upstream
puts all of them on one port, the control routes without any authentication.)

``python -m flep_fl.flower.runtime.superlink --public-fd N --admin-fd N --secret-file F --token-file F``
"""

from __future__ import annotations

import argparse
import hmac
import importlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from flwr.app import Message
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.superlink import extensions
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flep_fl.flower.runtime.timing import accept_short_heartbeat

ADMIN_HEADER = "x-flep-admin"
_SHUTDOWN_LIMIT = 2
"""Seconds that open requests get after SIGTERM."""


class SplitPorts:
    """ASGI middleware: which listener may reach which routes."""

    def __init__(self, app: ASGIApp, admin_port: int, token: bytes) -> None:
        self._app = app
        self._admin_port = admin_port
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 404."""
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("not found", status_code=404)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allowed(self, scope: Scope) -> bool:
        path = str(scope["path"])
        if path == "/health":
            return True
        server = scope.get("server")
        if server is not None and server[1] == self._admin_port:
            shown = dict(scope["headers"]).get(ADMIN_HEADER.encode(), b"")
            return hmac.compare_digest(shown, self._token)
        return scope["type"] == "http" and path.startswith("/v1/fleet/")


GetReplies = Callable[[Any, set[str], int], list[Message]]
"""``InMemoryLinkState.get_message_res(state, message_ids, run_id)``."""


def whole_replies(upstream: GetReplies) -> GetReplies:
    """Make a reply count once all of it is here, and from then on whatever becomes of its sender.

    Upstream answers "node unavailable" when a node left after its reply arrived, and hands out replies whose
    parts are still on their way (the ServerApp then blocks for minutes if the sender died).
    """

    def get_message_res(state: Any, message_ids: set[str], run_id: int) -> list[Message]:
        with state.lock:
            replies = state.message_ins_id_to_message_res_id
            whole = {one for one in message_ids if one in replies and _is_whole(state, replies[one])}
            answered = _with_senders_online(state, whole, lambda: upstream(state, set(whole), run_id))
            partial = {one: replies.pop(one) for one in message_ids - whole if one in replies}
            try:
                return answered + upstream(state, message_ids - whole, run_id)
            finally:
                replies.update(partial)

    return get_message_res


def _is_whole(state: Any, message_id: str) -> bool:
    """Whether every object of a message has been uploaded."""
    try:
        tree = state.object_store.get_object_tree(message_id)
    except NoObjectInStoreError:
        return False
    return all(state.object_store.get(node.object_id) for node in iterate_object_tree(tree))


def _with_senders_online(
    state: Any, message_ids: set[str], call: Callable[[], list[Message]]
) -> list[Message]:
    """Run ``call`` as if the nodes that answered ``message_ids`` were still there; holds the state's lock."""
    if not message_ids:
        return []
    messages = (state.message_ins_store.get(one) for one in message_ids)
    nodes = [state.nodes.get(message.metadata.dst_node_id) for message in messages if message is not None]
    saved = {node.node_id: (node, node.status, node.online_until) for node in nodes if node is not None}
    try:
        for node, _, _ in saved.values():
            node.status, node.online_until = "online", float("inf")
        return call()
    finally:
        for node, status, online_until in saved.values():
            node.status, node.online_until = status, online_until


def _serve_on(listeners: list[socket.socket]) -> SimpleNamespace:
    """Return what the SuperLink command takes for the ``uvicorn`` module: it serves our listeners."""

    def run(app: Any, *, host: str, port: int, log_config: Any, **_: Any) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=log_config,
            access_log=False,
            timeout_graceful_shutdown=_SHUTDOWN_LIMIT,
        )
        uvicorn.Server(config).run(sockets=listeners)

    return SimpleNamespace(run=run)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--public-fd", type=int, required=True)
    parser.add_argument("--admin-fd", type=int, required=True)
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--token-file", type=Path, required=True)
    options = parser.parse_args()

    public, admin = socket.socket(fileno=options.public_fd), socket.socket(fileno=options.admin_fd)
    admin_port = int(admin.getsockname()[1])
    token = options.token_file.read_bytes()
    accept_short_heartbeat()
    link_state: Any = InMemoryLinkState
    link_state.get_message_res = whole_replies(InMemoryLinkState.get_message_res)
    extensions.get_middleware = lambda: (Middleware(SplitPorts, admin_port=admin_port, token=token),)
    command: Any = importlib.import_module(
        "flwr.superlink.cli.flower_superlink"
    )  # its package hides the module
    command.uvicorn = _serve_on([public, admin])
    sys.argv = ["flower-superlink", "--insecure", "--isolation", "process"]
    sys.argv += [
        "--host",
        "127.0.0.1",
        "--port",
        str(admin_port),
        "--disable-runtime-dependency-installation",
    ]
    sys.argv += ["--superexec-auth-secret-file", str(options.secret_file)]
    command.flower_superlink()


if __name__ == "__main__":
    main()
