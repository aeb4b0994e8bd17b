"""What every request passes before and after its handler: limits, uniform refusals, the audit log.

A plain ASGI middleware around each listener's FastAPI application. It charges the peer's token bucket,
refuses what has no stated length or a second framing (request smuggling), takes a place (or answers 503), and
leaves no connection open with an unread body on it.

A place is held while the gateway works, and while it waits for a caller who has proved who he is. Nobody else
holds one while he is waited for: not with a body that does not come, not with one that is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from flep_fl.contracts.errors import AuditDiskFullError, FlepError
from flep_fl.data_owner.audit import AuditLog
from flep_fl.data_owner.gateway.limits import Admission, Limits, Place, TokenBuckets, peer_key
from flep_fl.data_owner.gateway.refusals import Refusal, refusal_of

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH_PATH = "/health"
QUIET = frozenset(("rate", "busy"))
"""Refusals of back-pressure: counted, and told to the audit log as sums."""

_BODILESS = frozenset(("GET", "HEAD", "DELETE", "OPTIONS"))
_DRAIN_SECONDS = 5.0
_MAX_TARGET = 2048
_AUDIT_RATE, _AUDIT_BURST = 5.0, 50
_AUDIT_BURST_OF_ALL = 500
_MOST_SUMS, _MOST_COUNTED = 16, 1000
_SHOWN_TARGET, _SHOWN_DETAIL = 200, 500

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Reply:
    """What a handler answers."""

    status: int
    body: bytes = field(repr=False, default=b"")
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


class Listener:
    """What the requests of one listener share.

    Parameters
    ----------
    name
        "ingest", "release" or "admin".
    limits
        Its limits.
    audit
        The audit log.
    """

    def __init__(self, name: str, limits: Limits, audit: AuditLog) -> None:
        self.name, self.limits, self.audit = name, limits, audit
        self.admission = Admission(limits.in_flight, limits.in_flight_per_caller)
        self.peers = TokenBuckets(limits.peer_rate, limits.peer_burst)
        self.identities = TokenBuckets(limits.rate, limits.burst)
        self._audited = TokenBuckets(_AUDIT_RATE, _AUDIT_BURST)
        # Of all peers together: addresses cost nothing where one host has many of them.
        self._audited_of_all = TokenBuckets(_AUDIT_RATE, _AUDIT_BURST_OF_ALL)
        self._sums: Counter[tuple[str, str]] = Counter()

    def refused(self, refusal: Refusal, *, peer: str, what: str) -> None:
        """Log a refusal; what comes in floods is summed up, so that nobody fills the disk with refusals."""
        if refusal.code in QUIET:
            self._count(refusal.code, "")
            return
        self._note(
            "request.refused",
            peer,
            refusal.code,
            status=refusal.status,
            what=what[:_SHOWN_TARGET],
            detail=refusal.detail[:_SHOWN_DETAIL],
        )

    def connection_refused(self, peer: str, reason: str) -> None:
        """Log a connection that was refused."""
        self._note("connection.refused", peer, reason)

    def flush(self) -> None:
        """Write the sums of what was not logged line by line; on a full disk they are kept for later.

        Raises
        ------
        AuditError
            The log is broken.
        """
        sums, self._sums = self._sums, Counter()
        lines = [
            ("refused.sum", {"listener": self.name, "code": code, "count": count, "peer": peer})
            for (code, peer), count in sums.most_common(_MOST_SUMS)
        ]
        if rest := sums.total() - sum(count for _, count in sums.most_common(_MOST_SUMS)):
            lines.append(("refused.sum", {"listener": self.name, "code": "", "count": rest, "peer": ""}))
        try:
            self.audit.append_all(lines)
        except AuditDiskFullError:
            self._sums.update(sums)

    def _note(self, event: str, peer: str, code: str, **fields: Any) -> None:
        try:
            self._audited.take(peer_key(peer))
            self._audited_of_all.take("")
            self.audit.append(event, listener=self.name, peer=peer, code=code, **fields)
        except (Refusal, AuditDiskFullError):
            # A refusal gives and takes nothing: it may be told without its line, and counts later.
            self._count(code, peer)

    def _count(self, code: str, peer: str) -> None:
        key = (code, peer)
        self._sums[key if key in self._sums or len(self._sums) < _MOST_COUNTED else (code, "")] += 1


class Guard:
    """The middleware.

    Parameters
    ----------
    app
        The application behind it.
    listener
        What its requests share.
    hot
        Handlers by (method, path) that are called without the application's routing, for speed.
    """

    def __init__(
        self,
        app: AsgiApp,
        listener: Listener,
        hot: dict[tuple[str, str], Callable[[Exchange], Awaitable[Reply]]] | None = None,
    ) -> None:
        self._app, self._listener, self._hot = app, listener, hot or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, self._listener)
        try:
            self._listener.peers.take(peer_key(exchange.peer))
            exchange.check_head()
            if scope["path"] == HEALTH_PATH and scope["method"] == "GET":
                # Answers even when every place is taken: busy is not ill.
                await exchange.send(await exchange.run(_healthy), send)
                return
            exchange.enter()
            try:
                handler = self._hot.get((scope["method"], scope["path"]))
                if handler is not None:
                    reply = await exchange.run(handler)
                    await exchange.send(reply, send)
                else:
                    scope["exchange"] = exchange
                    await self._app(scope, exchange.receive, send)
            finally:
                exchange.leave()
        except Refusal as refusal:
            await exchange.send(await exchange.refuse(refusal), send)


async def _healthy(_exchange: Exchange) -> Reply:
    return Reply(200, b'{"status":"ok"}')


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, listener: Listener) -> None:
        self.scope, self.receive, self.listener = scope, receive, listener
        client = scope.get("client")
        self.peer = str(client[0]) if client else ""
        self.who = ""
        """Who signed the request; empty before that is known."""
        self.length = 0
        self._headers: dict[bytes, bytes] | None = None
        self._unread = False
        self._place: Place | None = None
        self._proved = False

    def enter(self) -> None:
        """Take a place.

        Raises
        ------
        Refusal
            503 where the caller or the listener has none left.
        """
        caller = f"caller {self.who}" if self._proved else f"peer {peer_key(self.peer)}"
        self._place = self.listener.admission.enter(caller)

    def leave(self) -> None:
        """Give the place back, if there is one."""
        if self._place is not None:
            self._place.leave()
            self._place = None

    def proved(self, who: str) -> None:
        """Count the request for an identity from here on, and no longer for its address.

        Raises
        ------
        Refusal
            503 where that identity has as many places as one may have.
        """
        self.who, self._proved = who, True
        self.listener.peers.give_back(peer_key(self.peer))
        if self._place is not None:
            self._place.belongs_to(f"caller {who}")

    def check_bodiless(self) -> None:
        """Refuse a body where none is due, before a byte of it is read.

        Raises
        ------
        Refusal
            413, and the connection ends.
        """
        if self.length:
            raise Refusal(413, "too_large", "the request takes no body", close=True)

    @property
    def target(self) -> str:
        """Path and query as they stand in the request line."""
        raw: bytes = self.scope.get("raw_path") or self.scope["path"].encode()
        query: bytes = self.scope.get("query_string", b"")
        return (raw + (b"?" + query if query else b"")).decode("latin-1")

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Headers by lower-case name.

        Raises
        ------
        Refusal
            A name stands twice: who reads the first and who reads the last would read two requests.
        """
        if self._headers is None:
            pairs = self.scope["headers"]
            found = dict(pairs)
            if len(found) != len(pairs):
                raise Refusal(400, "headers", "a header is given twice", close=True)
            self._headers = found
        return self._headers

    def text_headers(self) -> dict[str, str]:
        """Headers as text."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers.items()}

    def check_head(self) -> None:
        """Refuse what has no stated length, two framings, or is too large.

        Raises
        ------
        Refusal
            400, 411, 413 or 414, and the connection ends.
        """
        headers = self.headers
        if b"transfer-encoding" in headers or b"upgrade" in headers:
            raise Refusal(400, "framing", "send the body with Content-Length alone", close=True)
        if len(self.scope.get("raw_path") or b"") + len(self.scope.get("query_string", b"")) > _MAX_TARGET:
            raise Refusal(414, "target", "the path is too long", close=True)
        text = headers.get(b"content-length")
        if text is None:
            if self.scope["method"] not in _BODILESS:
                raise Refusal(411, "length", "Content-Length is missing", close=True)
            return
        if not text.isdigit() or len(text) > 15:
            raise Refusal(400, "framing", "Content-Length is not a number", close=True)
        self.length = int(text)
        if self.length > self.listener.limits.body_bytes:
            raise Refusal(
                413, "too_large", f"at most {self.listener.limits.body_bytes} bytes are taken", close=True
            )
        self._unread = self.length > 0

    async def body(self) -> bytes:
        """Read the body, whole; who has not proved who he is holds no place meanwhile.

        Raises
        ------
        Refusal
            408 when it does not arrive in time; 503 when there is no place any more.
        """
        if not self._unread:
            return b""
        if self._proved or self._place is None:
            return await self._read()
        self.leave()
        body = await self._read()
        self.enter()
        return body

    async def _read(self) -> bytes:
        try:
            async with asyncio.timeout(self.listener.limits.body_seconds):
                message = await self.receive()
                first: bytes = message.get("body", b"")
                if len(first) == self.length and message["type"] == "http.request":
                    self._unread = False
                    return first
                buffer = bytearray(first)
                while message["type"] == "http.request" and message.get("more_body", False):
                    message = await self.receive()
                    buffer += message.get("body", b"")
                    if len(buffer) > self.length:
                        break
        except TimeoutError as exc:
            self._unread = False
            raise Refusal(408, "too_slow", "the body did not arrive in time", close=True) from exc
        self._unread = False
        if message["type"] != "http.request" or len(buffer) != self.length:
            raise Refusal(400, "framing", "the body does not have its length", close=True)
        return bytes(buffer)

    async def run(self, handler: Callable[[Exchange], Awaitable[Reply]]) -> Reply:
        """Call a handler; whatever goes wrong becomes an answer and a line in the audit log."""
        try:
            reply = await handler(self)
        except Refusal as refusal:
            return await self.refuse(refusal)
        except FlepError as error:
            return await self.refuse(refusal_of(error))
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise
        except Exception as error:
            # The peer learns nothing of it; the operator reads the traceback on standard error.
            logger.exception("%s %s failed", self.scope["method"], self.scope["path"])
            return await self.refuse(
                Refusal(500, "error", "the data owner's gateway failed", detail=type(error).__name__)
            )
        if self._unread:
            await self._drain()
        return reply

    async def refuse(self, refusal: Refusal) -> Reply:
        """Log a refusal and make its answer; what is left of the body is thrown away first, in no place."""
        self.leave()
        what = f"{self.scope['method']} {self.target}"
        self.listener.refused(refusal, peer=self.peer, what=f"{what} by {self.who}" if self.who else what)
        headers = refusal.headers()
        if not refusal.close and self._unread and not await self._drain():
            headers["connection"] = "close"
        return Reply(refusal.status, refusal.body(), headers)

    async def send(self, reply: Reply, send: Send) -> None:
        """Send an answer."""
        headers = [(name.encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
        headers.append((b"content-length", str(len(reply.body)).encode()))
        headers.append((b"cache-control", b"no-store"))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    async def _drain(self) -> bool:
        """Throw the rest of the body away, chunk by chunk; say whether it ended."""
        self._unread = False
        ends = time.monotonic() + _DRAIN_SECONDS
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + ends - time.monotonic()):
                while True:
                    message = await self.receive()
                    if message["type"] != "http.request":
                        return False
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            return False
