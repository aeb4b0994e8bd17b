"""The SuperLink's two listeners: what each serves, and who was refused on the sites' one."""

from __future__ import annotations

import asyncio
import datetime
import gc
import hmac
import json
import time
from base64 import b64decode
from collections.abc import Callable, Mapping

from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flep_fl.flower.runtime.clients import ADMIN_HEADER, FORGET_PATH
from flep_fl.flower.runtime.tls import fingerprint

_HEALTH = "/health"
_FLEET = "/v1/fleet/"
_ARRIVALS = frozenset({"/v1/fleet/register-node", "/v1/fleet/activate-node"})
_CHUNKS = ("/push-object", "/pull-object")
_TRANSFERS = frozenset("/v1/fleet" + path for path in _CHUNKS)
MOST_TRANSFERS = 4
"""Chunks (5 MB each) that are in the SuperLink's memory at a time; the others wait in their senders."""
_SLICE = 256 * 1024
_TRANSFER_LIMIT = 120.0
"""Seconds for one chunk, so that a site that stands still keeps no place; it tries again by itself."""

_REPEAT_SECONDS = 60.0
_MOST_KNOWN = 1000
"""How many refused parties are remembered, so that each is told of once a minute only."""
_CLOCK_TOLERANCE = 10.0


class AdminPort:
    """ASGI: the loopback listener. Control and runtime routes for whoever shows the token.

    It also takes ``POST`` :data:`~flep_fl.flower.runtime.clients.FORGET_PATH` with a JSON list of message
    ids, and calls ``forget`` with them.
    """

    def __init__(self, app: ASGIApp, token: bytes, forget: Callable[[set[str]], None]) -> None:
        self._app = app
        self._token = token
        self._forget = forget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 404."""
        if scope["type"] == "lifespan" or scope["path"] == _HEALTH:
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or not self._allowed(scope):
            await _not_here(scope, receive, send)
        elif scope["path"] == FORGET_PATH:
            ids = json.loads(await Request(scope, receive).body())
            await run_in_threadpool(self._forget, set(map(str, ids)))
            await Response(status_code=204)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        shown = dict(scope["headers"]).get(ADMIN_HEADER.encode(), b"")
        return hmac.compare_digest(shown, self._token)


class FreeingApp:
    """ASGI: upstream's app, whose chunks are freed when they are done with.

    A handled request is a reference cycle that holds its body and its answer, 5 MB each, and Python's
    collector counts objects, not bytes: dozens of chunks wait for it, the more the more sites there are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._chunks = 0
        gc.collect()
        gc.freeze()  # what is there now stays for good, and need not be looked through every time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; collect garbage once in :data:`MOST_TRANSFERS` chunks."""
        await self._app(scope, receive, send)
        if scope["type"] == "http" and str(scope["path"]).endswith(_CHUNKS):
            self._chunks += 1
            if self._chunks % MOST_TRANSFERS == 0:
                gc.collect()


class SitesPort:
    """ASGI: the listener that faces the sites. ``/v1/fleet/*`` and ``/health``, and nothing else.

    (Upstream puts all routes on one port, the control routes without any authentication.)
    """

    def __init__(self, app: ASGIApp, refusals: Refusals | None = None) -> None:
        self._app = app
        self._refusals = refusals
        self._transfers = asyncio.Semaphore(MOST_TRANSFERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 404."""
        path = str(scope["path"])
        if scope["type"] != "http" or not (path == _HEALTH or path.startswith(_FLEET)):
            await _not_here(scope, receive, send)
            return
        if path not in _TRANSFERS:
            await self._answer(scope, receive, send)
            return
        # The body of a request is read by the app, so that nothing piles up of those that wait here.
        async with self._transfers, asyncio.timeout(_TRANSFER_LIMIT):
            await self._answer(scope, receive, _in_slices(send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusals = self._refusals
        if refusals is None:
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                refusals.note(scope, int(message["status"]))
            await send(message)

        await self._app(scope, receive, watched)


class Refusals:
    """Say who was refused: the site where its key is known and proven, else the key and the address.

    Parameters
    ----------
    node_keys
        The sites' public node keys by name, PEM.
    say
        Takes one line per refused party, once a minute at most.
    """

    def __init__(self, node_keys: Mapping[str, bytes], say: Callable[[str], None]) -> None:
        self._sites = {key: site for site, key in node_keys.items()}
        self._say = say
        self._told: dict[str, float] = {}

    def note(self, scope: Scope, status: int) -> None:
        """Look at the status of an answered request; speak up when it is a refusal."""
        path = str(scope["path"])
        if status not in (401, 403) and not (path in _ARRIVALS and status >= 400):
            return
        who = self._describe({key.decode("latin-1"): value for key, value in scope["headers"]}, path, status)
        if who is None:
            return
        client = scope.get("client")
        line = f"refused {who}, at {client[0] if client else 'an unknown address'}"
        moment = time.monotonic()
        if moment - self._told.get(line, -_REPEAT_SECONDS) < _REPEAT_SECONDS:
            return
        if len(self._told) >= _MOST_KNOWN:
            self._told.clear()
        self._told[line] = moment
        self._say(line)

    def _describe(self, headers: Mapping[str, bytes], path: str, status: int) -> str | None:
        """Return who it was; None where it is no question of identity."""
        try:
            key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()], validate=True)
            public_key = bytes_to_public_key(key)
        except (KeyError, ValueError):
            return "a node without a usable key"
        site = self._sites.get(key)
        name = f"the key {fingerprint(key)}" + (f" (site {site})" if site else "")
        try:
            stamp = headers[TIMESTAMP_HEADER.lower()]
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower()], validate=True)
            proven = verify_signature(public_key, stamp, signature)
            age = (now() - datetime.datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
        except (KeyError, ValueError, TypeError, AttributeError):
            proven, age = False, 0.0
        if not proven:
            return f"a node that shows {name} and does not prove it"
        if site is None:
            how = "that registers itself" if path.endswith("register-node") else "that is not in the kit"
            return f"a node with {name} {how}"
        if status != 401 and path not in _ARRIVALS:
            return None  # a run that is over, for instance
        if abs(age) > _CLOCK_TOLERANCE:
            return f"site {site}, {_clock_trouble(age)}"
        # Its node is one of an earlier SuperLink: it will come again by itself.
        return None if path not in _ARRIVALS else f"site {site} (status {status})"


def _clock_trouble(age: float) -> str:
    """Say what may be wrong with a request of that age in seconds."""
    if age < 0.0:
        return f"whose clock is {-age:.0f} s ahead"
    # It may also have waited in the port's queue while the SuperLink was started again.
    return f"whose request is {age:.0f} s old (a clock behind, or somebody repeats it)"


def _in_slices(send: Send) -> Send:
    """Send a body slice by slice: uvicorn buffers what it is given, and waits for the peer before the next.

    A chunk given whole would stay in memory until a slow site has read it, and its place would be free.
    """

    async def forward(message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or len(body) <= _SLICE:
            await send(message)
            return
        for start in range(0, len(body), _SLICE):
            more = message.get("more_body", False) or start + _SLICE < len(body)
            await send({**message, "body": body[start : start + _SLICE], "more_body": more})

    return forward


async def _not_here(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await PlainTextResponse("not found", status_code=404)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def parse_node_keys(content: bytes) -> dict[str, bytes]:
    """Read the file with which the parent names the sites' keys: JSON, site to PEM."""
    return {str(site): str(pem).encode() for site, pem in json.loads(content).items()}


def format_node_keys(node_keys: Mapping[str, bytes]) -> bytes:
    """Write what :func:`parse_node_keys` reads."""
    return json.dumps({site: pem.decode() for site, pem in node_keys.items()}).encode()
