"""Connections: who may open one, how many, and how long a request and its answer may take.

uvicorn bounds how long a connection may idle after an answer, and little else. Here a peer is looked up in
the network rules and counted *before* TLS begins, a handshake and a request's head have deadlines (slow
loris), a head has a length however it arrives, requests are not pipelined, and a client that stops reading,
or reads too slowly, is dropped: no connection outlives its deadline, whatever its peer does or leaves undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server

from flep_fl.contracts.owner_api import error_body
from flep_fl.data_owner.gateway.limits import SLOWEST_READER, Limits, TokenBuckets, peer_key
from flep_fl.data_owner.gateway.refusals import Refusal

MAX_HEAD_BYTES = 16384
HEADER_OVERHEAD = 32
"""What a header counts beyond its bytes, as in HTTP/2: many small ones cost memory, too."""
SMALL_WRITE = 4096
"""Bytes; what is longer is sent at once."""
SHUTDOWN_SECONDS = 10
_ACCEPT_PAUSE = 0.05

# uvicorn warns of every request that is not HTTP; strangers must not be able to fill the operator's terminal.
_logger = logging.getLogger("uvicorn.error.connections")
_logger.setLevel(logging.ERROR)


class Doorkeeper:
    """Decides about connections of one listener, and counts them.

    Parameters
    ----------
    allows
        Says whether an address may speak (:attr:`flep_fl.data_owner.network.PeerFilter.allows`).
    limits
        The listener's limits.
    on_refused
        Told the address and the reason of every connection that was refused, or ended for its head.
    """

    def __init__(
        self, allows: Callable[[str], bool], limits: Limits, on_refused: Callable[[str, str], None]
    ) -> None:
        self.limits = limits
        self._allows, self.on_refused = allows, on_refused
        self._new = TokenBuckets(limits.connection_rate, 2 * limits.connections_per_peer)
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
        elif self._peers[peer_key(address)] >= self.limits.connections_per_peer:
            reason = "too_many_connections_of_a_peer"
        elif not self._may_begin(address):
            reason = "too_many_new_connections"
        if reason is not None:
            self.on_refused(address, reason)
            return False
        self._total += 1
        self._peers[peer_key(address)] += 1
        return True

    def leave(self, address: str) -> None:
        """Count a connection out."""
        peer = peer_key(address)
        self._total -= 1
        self._peers[peer] -= 1
        if not self._peers[peer]:
            del self._peers[peer]

    def _may_begin(self, address: str) -> bool:
        try:
            self._new.take(peer_key(address))
        except Refusal:
            return False
        return True


class JoinedWrites:
    """A transport that sends an answer's head together with its body: one TLS record, one waking of the peer.

    uvicorn writes the two apart. What is small waits for the next write, but only for this turn of the loop.

    Parameters
    ----------
    transport
        What is written to; everything but writing and closing is its own.
    loop
        The transport's loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send ``data``, after what is held; alone and small, it is held."""
        if not self._held and len(data) <= SMALL_WRITE:
            self._held = data
            self._loop.call_soon(self._flush)
            return
        held, self._held = self._held, b""
        self._transport.write(held + data)

    def close(self) -> None:
        """Send what is held, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with deadlines."""

    keeper: Doorkeeper
    address: str
    connected = False
    """Whether TLS has begun and HTTP may: from then on the connection counts itself out."""
    _head_deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None
    _end_deadline: asyncio.TimerHandle | None = None
    _paused_at = 0.0
    _patience: float | None = None
    """Seconds for which the answer under way may still wait for its reader; None before it has waited."""
    _head_bytes = _counted_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; the first request's head is due."""
        self.connected = True
        self.logger = _logger
        super().connection_made(cast(asyncio.Transport, JoinedWrites(transport, self.loop)))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection out."""
        self._stop(self._head_deadline, self._write_deadline, self._end_deadline)
        self.keeper.leave(self.address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; a head that is too long ends the connection (llhttp itself does not bound it).

        Bytes of an unfinished head are counted as they come, so that none is gathered for ever. A head that
        comes whole in one read is counted piece by piece as the parser hands it over.
        """
        if self.transport.is_closing():
            return
        if self._head_deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        if self._head_deadline is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_deadline is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Refuse a request that comes before the answer to the last one: nothing queues up here."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            raise httptools.HttpParserError("requests are not pipelined")
        self._counted_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._count_head(len(name) + len(value) + HEADER_OVERHEAD)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request over; from here on the application's own deadlines count."""
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the end of the connection."""
        super().on_response_complete()
        self._patience = None
        if self.transport.is_closing():
            self._end_soon()

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection, even if its peer never read the last answer."""
        super().timeout_keep_alive_handler()
        self._end_soon()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the form of all refusals here."""
        self._answer_and_end(400, "framing", "the request is not HTTP/1.1 as it is taken here")

    def pause_writing(self) -> None:
        """Wait for a slow reader, but not for ever: all waits for one answer share one allowance."""
        super().pause_writing()
        if self._write_deadline is not None:
            return
        if self._patience is None:
            left = self.cycle.expected_content_length if self.cycle is not None else 0
            self._patience = self.keeper.limits.body_seconds + left / SLOWEST_READER
        self._paused_at = self.loop.time()
        self._write_deadline = self.loop.call_later(max(0.0, self._patience), self._abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        if self._write_deadline is None:
            return
        self._write_deadline.cancel()
        self._write_deadline = None
        if self._patience is not None:
            self._patience -= self.loop.time() - self._paused_at

    def _count_head(self, size: int) -> None:
        self._counted_bytes += size
        if self._counted_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
            raise httptools.HttpParserError("the head is too long")

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self.keeper.on_refused(self.address, "head_too_long")
        self._answer_and_end(431, "head", f"a request's head is {MAX_HEAD_BYTES} bytes at most")

    def _answer_and_end(self, status: int, code: str, reason: str) -> None:
        """Refuse a request that the application never sees."""
        if self.transport.is_closing():
            return
        body = error_body(code, reason)
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\ncache-control: no-store\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
        self._end_soon()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_deadline = self.loop.call_later(self.keeper.limits.header_seconds, self._abort)

    def _end_soon(self) -> None:
        """Let what was written reach the peer, but not wait for him longer than that."""
        if self._end_deadline is None:
            self._end_deadline = self.loop.call_later(SHUTDOWN_SECONDS, self._abort)

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
