"""Administration, on loopback: approvals come in, status and signed heads of the audit log go out.

An approval needs no other authentication than the administrator's signature that it is. The other requests
are signed by an administrator like an analyst's are: being on the same machine proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from fastapi import FastAPI, Request, Response

from flep_fl.contracts.errors import EnrolmentError, RegistryFullError
from flep_fl.contracts.owner_store import ImageStore
from flep_fl.data_owner.enrolment import Approval, Device, DeviceRegistry, audited
from flep_fl.data_owner.gateway.callers import Callers
from flep_fl.data_owner.gateway.description import describe_admin, new_api
from flep_fl.data_owner.gateway.guard import Exchange, Guard, Listener, Reply
from flep_fl.data_owner.gateway.ingest import respond
from flep_fl.data_owner.gateway.refusals import Refusal, unauthorised

STATUS_PATH = "/v1/status"
DEVICES_PATH = "/v1/devices"
APPROVALS_PATH = "/v1/approvals"
HEAD_PATH = "/v1/audit/head"
MAX_APPROVAL_BYTES = 16384


class Admin:
    """The handlers of the administrators' routes.

    Parameters
    ----------
    store, registry
        The database and the devices.
    listener
        Limits and audit log of this listener.
    listeners
        All listeners, for the status.
    administrators
        Names by raw Ed25519 public key.
    owner_key
        The owner's raw Ed25519 public key.
    clock
        Seconds since 1970.
    """

    def __init__(
        self,
        store: ImageStore,
        registry: DeviceRegistry,
        listener: Listener,
        *,
        listeners: Mapping[str, Listener],
        administrators: Mapping[bytes, str],
        owner_key: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._registry, self._listener = store, registry, listener
        self._listeners, self._administrators = dict(listeners), dict(administrators)
        self._callers, self._clock = Callers(owner_key, clock=clock), clock

    async def status(self, exchange: Exchange) -> Reply:
        """Say how the gateway does."""
        self._administrator(exchange)
        datasets = await asyncio.to_thread(self._store.datasets)
        waiting, most = self._store.queue_depth()
        return _json(
            {
                "time": int(self._clock()),
                "datasets": [asdict(info) for info in datasets],
                "queue": {"waiting": waiting, "most": most},
                "listeners": {
                    name: {"in_flight": one.admission.taken, "most": one.admission.most}
                    for name, one in self._listeners.items()
                },
                "devices": len(self._registry.names()),
            }
        )

    async def devices(self, exchange: Exchange) -> Reply:
        """List the devices."""
        self._administrator(exchange)
        now = self._clock()
        return _json({"devices": [_shown(self._registry.device(n, now=now)) for n in self._registry.names()]})

    async def head(self, exchange: Exchange) -> Reply:
        """Sign a head of the audit log."""
        self._administrator(exchange)
        head = await asyncio.to_thread(self._listener.audit.head)
        return Reply(200, head.to_bytes())

    async def approve(self, exchange: Exchange) -> Reply:
        """Take an approval or a suspension."""
        if exchange.length > MAX_APPROVAL_BYTES:
            raise Refusal(413, "too_large", "an approval is smaller than that", close=True)
        body = await exchange.body()
        try:
            approval = Approval.from_bytes(body)
        except EnrolmentError as exc:
            raise Refusal(400, exc.code, str(exc)) from exc
        try:
            device, new = self._registry.apply(approval, now=self._clock(), before=self._log_statement)
        except RegistryFullError:
            raise
        except EnrolmentError as exc:
            raise Refusal(409, exc.code, str(exc)) from exc
        if new:
            self._listener.audit.append(
                f"device.{'approved' if approval.action == 'enrol' else 'suspended'}",
                durable=True,
                administrator=approval.administrator,
                **_shown(device),
            )
        return _json(_shown(device))

    def _log_statement(self, approval: Approval) -> None:
        self._listener.audit.append("device.statement", durable=True, **audited(approval))

    def _administrator(self, exchange: Exchange) -> None:
        exchange.check_bodiless()
        signed = self._callers.signer(exchange)
        name = self._administrators.get(signed.key)
        if name is None:
            raise unauthorised(f"{signed.key.hex()} is no administrator's key")
        exchange.who = name
        self._callers.spend(exchange, signed, name)


def admin_app(admin: Admin, listener: Listener) -> Guard:
    """Return the admin listener's ASGI application."""
    return Guard(admin_api(admin), listener)


def admin_api(admin: Admin) -> FastAPI:
    """Return the listener's routes and their description."""
    api = new_api("FLEP data owner: administration", "Approvals, status and heads of the audit log.")
    described = describe_admin()

    async def status(request: Request) -> Response:
        return await respond(request, admin.status)

    async def devices(request: Request) -> Response:
        return await respond(request, admin.devices)

    async def head(request: Request) -> Response:
        return await respond(request, admin.head)

    async def approve(request: Request) -> Response:
        return await respond(request, admin.approve)

    api.add_api_route(STATUS_PATH, status, methods=["GET"], **described["status"])
    api.add_api_route(DEVICES_PATH, devices, methods=["GET"], **described["devices"])
    api.add_api_route(HEAD_PATH, head, methods=["GET"], **described["head"])
    api.add_api_route(APPROVALS_PATH, approve, methods=["POST"], **described["approve"])
    return api


def _shown(device: Device) -> dict[str, object]:
    return {
        "device": device.name,
        "standing": device.standing,
        "generation": device.generation,
        "key": device.key,
        "datasets": list(device.datasets),
        "approved_by": list(device.approved_by),
        "expires": device.expires,
    }


def _json(content: object) -> Reply:
    return Reply(200, json.dumps(content, separators=(",", ":")).encode())
