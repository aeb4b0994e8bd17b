"""Connections: who may open one, how many, and how long a request and its answer may take.

uvicorn bounds how long a connection may idle after an answer, and little else. Here a peer is looked up in
the network rules and counted *before* TLS begins, a handshake and a request's head have deadlines (slow
loris), a head has a length, requests are not pipelined, and a client that stops reading is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server

from flep_fl.data_owner.gateway.limits import Limits

MAX_HEAD_BYTES = 16384
SHUTDOWN_SECONDS = 10
_ACCEPT_PAUSE = 0.05


class Doorkeeper:
    """Decides about connections of one listener, and counts them.

    Parameters
    ----------
    allows
        Says whether an address may speak (:attr:`flep_fl.data_owner.network.PeerFilter.allows`).
    limits
        The listener's limits.
    on_refused
        Told the address and the reason of every refused connection.
    """

    def __init__(
        self, allows: Callable[[str], bool], limits: Limits, on_refused: Callable[[str, str], None]
    ) -> None:
        self.limits = limits
        self._allows, self._on_refused = allows, on_refused
        self._peers: Counter[str] = Counter()
        self._total = 0

    @property
    def connections(self) -> int:
        """Open connections, those still in their handshake included."""
        return self._total

    def enter(self, address: str) -> bool:
        """Count a connection in, or refuse it."""
        reason = None
        if not self._allows(address):
            reason = "network_rules"
        elif self._total >= self.limits.connections:
            reason = "too_many_connections"
        elif self._peers[address] >= self.limits.connections_per_peer:
            reason = "too_many_connections_of_a_peer"
        if reason is not None:
            self._on_refused(address, reason)
            return False
        self._total += 1
        self._peers[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count a connection out."""
        self._total -= 1
        self._peers[address] -= 1
        if not self._peers[address]:
            del self._peers[address]


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with deadlines."""

    keeper: Doorkeeper
    address: str
    connected = False
    """Whether TLS has begun and HTTP may: from then on the connection counts itself out."""
    _head_deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; the first request's head is due."""
        self.connected = True
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection out."""
        self._stop(self._head_deadline, self._write_deadline)
        self.keeper.leave(self.address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; a head that is too long ends the connection (llhttp itself does not bound it)."""
        if self.transport.is_closing():
            return
        if self._head_deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        if self._head_deadline is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_deadline is not None and self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Refuse a request that comes before the answer to the last one: nothing queues up here."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            raise httptools.HttpParserError("requests are not pipelined")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request over; from here on the application's own deadlines count."""
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Wait for a slow reader, but not for ever."""
        super().pause_writing()
        self._stop(self._write_deadline)
        self._write_deadline = self.loop.call_later(self.keeper.limits.body_seconds, self._abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._stop(self._write_deadline)
        self._write_deadline = None

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_deadline = self.loop.call_later(self.keeper.limits.header_seconds, self._abort)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    @staticmethod
    def _stop(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()


class _Acceptor:
    """Accepts TCP connections: rules and counts first, then TLS, then HTTP."""

    def __init__(self, server: GuardedServer, listening: socket.socket) -> None:
        self._server, self._socket = server, listening
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._task = self._loop.create_task(self._run())

    def close(self) -> None:
        """Accept no more, and give up handshakes that have not ended."""
        for task in (self._task, *self._connecting):
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until that is done."""
        await asyncio.gather(self._task, *self._connecting, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                connection, peer = await self._loop.sock_accept(self._socket)
            except OSError:
                # Out of file descriptors, or the peer has gone again: others may still come.
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            address = str(peer[0])
            if not self._server.keeper.enter(address):
                connection.close()
                continue
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection, address))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket, address: str) -> None:
        protocol = self._server.make_protocol(address)
        tls = self._server.tls
        timeouts: dict[str, Any] = {}
        if tls is not None:
            timeouts = {
                "ssl_handshake_timeout": self._server.keeper.limits.header_seconds,
                "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
            }
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls, **timeouts)
        except (OSError, ssl.SSLError):
            pass  # not TLS, not our TLS, too slow, or gone; the peer sees the connection end
        finally:
            if not protocol.connected:
                connection.close()
                self._server.keeper.leave(address)


class GuardedServer(Server):
    """A uvicorn server behind a doorkeeper; signals are the caller's business.

    Parameters
    ----------
    app
        The ASGI application.
    keeper
        Decides about connections.
    tls
        TLS settings; None for plain HTTP.
    """

    def __init__(self, app: Any, keeper: Doorkeeper, tls: ssl.SSLContext | None) -> None:
        super().__init__(
            Config(
                app,
                http=GuardedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                timeout_keep_alive=int(keeper.limits.idle_seconds),
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                server_header=False,
                date_header=False,
                access_log=False,
                log_config=None,
                proxy_headers=False,
            )
        )
        self.keeper, self.tls = keeper, tls

    def make_protocol(self, address: str) -> GuardedProtocol:
        """Make the HTTP protocol of one connection."""
        protocol = GuardedProtocol(self.config, self.server_state, {})
        protocol.keeper, protocol.address = self.keeper, address
        return protocol

    async def startup(self, sockets: Any = None) -> None:
        """Listen on the sockets that the caller has bound."""
        await self.lifespan.startup()
        self.servers = [_Acceptor(self, listening) for listening in sockets]  # type: ignore[misc]
        self.started = True

    def capture_signals(self) -> Any:
        """Leave signals alone: three servers share one process."""
        return contextlib.nullcontext()
