"""Release: granted analysts fetch sealed records, by the paths of :mod:`flep_fl.contracts.owner_api`."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from flep_fl.contracts.owner_api import (
    CURSOR_HEADER,
    GRANTS_PATH,
    INDEX_PATH,
    INDEX_TYPE,
    MAX_INDEX_LIMIT,
    MAX_RECORD_LIMIT,
    OPEN_PATH,
    OWNER_PATH,
    RECORDS_PATH,
    RECORDS_TYPE,
    OwnerHello,
    grants_body,
    opened_body,
    pack_records,
)
from flep_fl.contracts.owner_records import Grant
from flep_fl.contracts.owner_store import ReleaseStore
from flep_fl.data_owner.gateway.callers import Callers
from flep_fl.data_owner.gateway.description import describe_release, new_api
from flep_fl.data_owner.gateway.guard import Exchange, Guard, Listener, Reply
from flep_fl.data_owner.gateway.ingest import respond
from flep_fl.data_owner.gateway.refusals import Refusal

MAX_CURSOR = 2**53 - 1
_KNOWN_SECONDS = 5.0
_KNOWN_LIMIT = 10_000
_CHUNK = 1 << 18
_JSON = {"content-type": "application/json"}


class Release:
    """The handlers of the analysts' routes.

    Parameters
    ----------
    store
        What has been released, and to whom; checks the grant at every call.
    listener
        Limits and audit log.
    owner_key
        The owner's raw Ed25519 public key.
    clock
        Seconds since 1970.
    """

    def __init__(
        self,
        store: ReleaseStore,
        listener: Listener,
        *,
        owner_key: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._listener, self._owner_key, self._clock = store, listener, owner_key, clock
        self._callers = Callers(owner_key, clock=clock)
        self._known: OrderedDict[bytes, float] = OrderedDict()

    async def owner(self, exchange: Exchange) -> Reply:
        """Say who answers."""
        exchange.check_bodiless()
        return Reply(200, OwnerHello(self._owner_key, int(self._clock())).to_bytes(), dict(_JSON))

    async def grants(self, exchange: Exchange) -> Reply:
        """List the caller's grants."""
        _, grants = await self._caller(exchange, fresh=True)
        return Reply(200, grants_body(grants), dict(_JSON))

    async def open(self, exchange: Exchange, grant_id: str) -> Reply:
        """Open a grant."""
        key, _ = await self._caller(exchange)
        opened = await asyncio.to_thread(self._store.open_grant, grant_id, key)
        self._log("grant.opened", exchange, grant=grant_id, release=opened.release_id)
        return Reply(200, opened_body(opened), dict(_JSON))

    async def index(self, exchange: Exchange, grant_id: str, release_id: str) -> Reply:
        """Give a page of the index."""
        key, _ = await self._caller(exchange)
        cursor, limit = _paging(exchange, MAX_INDEX_LIMIT)
        page = await asyncio.to_thread(
            lambda: self._store.index_page(grant_id, key, release_id=release_id, cursor=cursor, limit=limit)
        )
        return Reply(200, page.entries, _page_headers(INDEX_TYPE, page.cursor))

    async def records(self, exchange: Exchange, grant_id: str, release_id: str) -> Reply:
        """Give a page of records."""
        key, _ = await self._caller(exchange)
        cursor, limit = _paging(exchange, MAX_RECORD_LIMIT)
        page = await asyncio.to_thread(
            lambda: self._store.record_page(grant_id, key, release_id=release_id, cursor=cursor, limit=limit)
        )
        body = pack_records(page.records)
        self._log(
            "records.released",
            exchange,
            grant=grant_id,
            release=release_id,
            cursor=cursor,
            records=len(page.records),
            bytes=len(body),
        )
        return Reply(200, body, _page_headers(RECORDS_TYPE, page.cursor))

    async def _caller(self, exchange: Exchange, *, fresh: bool = False) -> tuple[bytes, list[Grant]]:
        """Authenticate; only callers with a grant cost memory here, and nobody is waited for."""
        exchange.check_bodiless()
        signed = self._callers.signer(exchange)
        key = signed.key
        exchange.who = key.hex()
        grants: list[Grant] = []
        if fresh or self._known.get(key, 0.0) <= self._clock():
            grants = await asyncio.to_thread(self._store.grants_of, key)
            if grants:
                self._known[key] = self._clock() + _KNOWN_SECONDS
                self._known.move_to_end(key)
                while len(self._known) > _KNOWN_LIMIT:
                    self._known.popitem(last=False)
        if self._known.get(key, 0.0) > self._clock():
            self._callers.spend(exchange, signed, key.hex())
        return key, grants

    def _log(self, event: str, exchange: Exchange, **fields: Any) -> None:
        self._listener.audit.append(event, peer=exchange.peer, analyst=exchange.who, **fields)


def release_app(release: Release, listener: Listener) -> Guard:
    """Return the release listener's ASGI application."""
    return Guard(release_api(release), listener)


def release_api(release: Release) -> FastAPI:
    """Return the listener's routes and their description."""
    api = new_api("FLEP data owner: release", "Granted analysts fetch sealed records.")
    described = describe_release()

    async def owner(request: Request) -> Response:
        return await respond(request, release.owner)

    async def grants(request: Request) -> Response:
        return await respond(request, release.grants)

    async def open_grant(request: Request) -> Response:
        grant = request.path_params["grant_id"]
        return await respond(request, lambda exchange: release.open(exchange, grant))

    async def index(request: Request) -> Response:
        grant, name = request.path_params["grant_id"], request.path_params["release_id"]
        return await respond(request, lambda exchange: release.index(exchange, grant, name))

    async def records(request: Request) -> Response:
        grant, name = request.path_params["grant_id"], request.path_params["release_id"]
        return await respond(request, lambda exchange: release.records(exchange, grant, name))

    api.add_api_route(OWNER_PATH, owner, methods=["GET"], **described["owner"])
    api.add_api_route(GRANTS_PATH, grants, methods=["GET"], **described["grants"])
    api.add_api_route(OPEN_PATH, open_grant, methods=["POST"], **described["open"])
    api.add_api_route(INDEX_PATH, index, methods=["GET"], **described["index"])
    api.add_api_route(RECORDS_PATH, records, methods=["GET"], **described["records"])
    return api


def _page_headers(kind: str, cursor: int | None) -> dict[str, str]:
    headers = {"content-type": kind}
    if cursor is not None:
        headers[CURSOR_HEADER] = str(cursor)
    return headers


def _paging(exchange: Exchange, most: int) -> tuple[int, int]:
    """Read ``cursor`` and ``limit``; the limit is a wish, and ``most`` bounds it."""
    from urllib.parse import parse_qsl

    found = {"cursor": 0, "limit": most}
    try:
        query = exchange.scope["query_string"].decode("ascii")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=8)
        for name, text in pairs:
            if name not in found or len(text) > 16 or not (text.isascii() and text.isdigit()):
                raise ValueError(name)
            found[name] = int(text)
        if (
            len(pairs) != len({name for name, _ in pairs})
            or found["cursor"] > MAX_CURSOR
            or not found["limit"]
        ):
            raise ValueError("range")
    except ValueError as exc:
        raise Refusal(400, "query", "cursor and limit are whole numbers, each at most once") from exc
    return found["cursor"], min(found["limit"], most)
