"""The gateway's process: three listeners on one event loop, one way to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from flep_fl.contracts.errors import AuditDiskFullError, FlepError, PortInUseError, RuntimeStartError
from flep_fl.data_owner.audit import AuditLog
from flep_fl.data_owner.gateway.connections import Doorkeeper, GuardedServer
from flep_fl.data_owner.gateway.guard import Guard, Listener
from flep_fl.data_owner.network import PeerFilter, parse_address

_TICK_SECONDS = 0.5
_FLUSH_TICKS = 10
_BACKLOG = 256


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One listener, ready to be served.

    Attributes
    ----------
    listener
        Name, limits, audit log.
    app
        Its application.
    socket
        Bound already (:func:`bind`).
    peers
        Who may connect.
    tls
        TLS settings; None for plain HTTP.
    """

    listener: Listener
    app: Guard
    socket: socket.socket
    peers: PeerFilter
    tls: ssl.SSLContext | None


def bind(address: str, *, name: str) -> socket.socket:
    """Bind a listener's socket, before anything else is started.

    Raises
    ------
    PortInUseError
        Another process has the address.
    RuntimeStartError
        The address is not one of this machine's.
    """
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except OSError as exc:
        bound.close()
        if exc.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"{address} is taken by another process: the {name} listener cannot start",
                remedy=f"Stop it, or choose another address with {name}.address=HOST:PORT",
            ) from exc
        raise RuntimeStartError(
            f"the {name} listener cannot use {address} ({exc.strerror or exc})",
            remedy=f"Set {name}.address to an address of this machine",
        ) from exc
    bound.setblocking(False)
    return bound


def serve(
    endpoints: Sequence[Endpoint], audit: AuditLog, *, on_ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what has begun and return; main thread only.

    Raises
    ------
    FlepError
        A listener, or the audit log, failed; the others are stopped in good order first.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(endpoints, audit, on_ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # pragma: no cover - it comes with flwr wherever it exists
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(endpoints: Sequence[Endpoint], audit: AuditLog, on_ready: Callable[[], None] | None) -> None:
    servers = []
    for endpoint in endpoints:
        keeper = Doorkeeper(
            endpoint.peers.allows, endpoint.listener.limits, endpoint.listener.connection_refused
        )
        servers.append(GuardedServer(endpoint.app, keeper, endpoint.tls))

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    failures: list[FlepError] = []
    async with _ticking([e.listener for e in endpoints], audit, stop, failures):
        running = [
            asyncio.ensure_future(server.serve(sockets=[endpoint.socket]))
            for server, endpoint in zip(servers, endpoints, strict=True)
        ]
        if on_ready is not None:
            while not all(server.started for server in servers) and not any(t.done() for t in running):
                await asyncio.sleep(0.005)
            on_ready()
        _, pending = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        stop()
        if pending:
            await asyncio.wait(pending)
    for task in running:
        task.result()
    if failures:
        raise failures[0]


@contextlib.asynccontextmanager
async def _ticking(
    listeners: Sequence[Listener], audit: AuditLog, stop: Callable[[], None], failures: list[FlepError]
) -> AsyncIterator[None]:
    """Let the audit log reach the disk in the background for as long as the block runs."""

    async def tick() -> None:
        for number in itertools.count():
            await asyncio.sleep(_TICK_SECONDS)
            try:
                if number % _FLUSH_TICKS == 0:
                    for listener in listeners:
                        listener.flush()
                await asyncio.to_thread(audit.tick)
            except AuditDiskFullError:
                continue  # requests are answered with 507 until there is room again
            except FlepError as error:
                # Without its log the gateway takes and gives nothing.
                failures.append(error)
                stop()
                return

    task = asyncio.ensure_future(tick())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        with contextlib.suppress(FlepError):
            for listener in listeners:
                listener.flush()
