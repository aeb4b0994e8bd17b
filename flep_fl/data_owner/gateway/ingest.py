"""Ingest: devices' captures come in, ``POST /v1/captures``.

The order of the checks is the order of their cost, and nothing is read or kept of a request before its
signature was verified: description, signature, standing of the device, its rate, time and size - then the
body, its digest, the pixels - then the database. The answer 201 (or 200 for a repetition) leaves once the
record is on stable storage; a device that got none sends the same capture again, and gets the same record.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from flep_fl.contracts.errors import CaptureError, ImageFormatError, SequenceConflictError
from flep_fl.contracts.owner_records import Capture, Receipt
from flep_fl.contracts.owner_store import ImageStore
from flep_fl.data_owner.decoding import decode_image
from flep_fl.data_owner.devices import (
    CAPTURE_HEADER,
    MAX_DESCRIPTION_BYTES,
    SIGNATURE_BYTES,
    SIGNATURE_HEADER,
    Description,
    decode_header,
    digest_of,
    verify_capture,
)
from flep_fl.data_owner.enrolment import Device, DeviceRegistry
from flep_fl.data_owner.gateway.description import describe_ingest, new_api
from flep_fl.data_owner.gateway.guard import Exchange, Guard, Listener, Reply
from flep_fl.data_owner.gateway.refusals import Refusal, unauthorised

CAPTURES_PATH = "/v1/captures"
IDEMPOTENCY_HEADER = b"idempotency-key"
LAST_HEADER = "flep-last-sequence"
MAX_IDEMPOTENCY_KEY = 128

_CAPTURE, _SIGNATURE = CAPTURE_HEADER.encode(), SIGNATURE_HEADER.encode()
_ITEM_BYTES = {"raw-uint8": 1, "raw-uint16": 2}
_INLINE_BYTES = 1 << 18
"""Images up to this size are hashed and sealed on the event loop: handing them to a thread costs more."""
_CHUNK_BYTES = 1 << 18
_DATASET_SECONDS = 5.0
_STANDINGS = {
    "pending": "the device waits for more administrators' approvals",
    "suspended": "the device is suspended",
    "expired": "the device's enrolment has expired",
}


@dataclass(frozen=True, slots=True)
class CapturePolicy:
    """What a capture may be.

    Attributes
    ----------
    max_pixels
        Largest height times width.
    ahead_seconds
        How far a device's clock may be ahead of the gateway's.
    age_seconds
        How old a capture may be when it arrives: devices keep what they cannot deliver. Order and replay are
        settled by sequence numbers, never by clocks.
    """

    max_pixels: int = 64_000_000
    ahead_seconds: float = 120.0
    age_seconds: float = 30 * 86400.0


class Ingest:
    """The handler of captures.

    Parameters
    ----------
    store
        Where images go.
    registry
        Who may send them.
    listener
        Limits and audit log.
    policy
        What is taken.
    clock
        Seconds since 1970.
    """

    def __init__(
        self,
        store: ImageStore,
        registry: DeviceRegistry,
        listener: Listener,
        policy: CapturePolicy | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._registry, self._listener = store, registry, listener
        self._policy, self._clock = policy or CapturePolicy(), clock
        self._nobody: Ed25519PublicKey = Ed25519PrivateKey.generate().public_key()
        self._sending: set[str] = set()
        self._last: dict[str, int] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._labels_until = 0.0
        self._monotonic = time.monotonic

    async def capture(self, exchange: Exchange) -> Reply:
        """Take one capture.

        Raises
        ------
        Refusal
            With the reason.
        """
        description, signed, signature = self._read(exchange)
        device = self._authenticate(description, signed, signature)
        exchange.who = device.name
        self._listener.identities.take(device.name)
        exchange.proved(device.name)
        self._check(description, device, exchange.length)
        key = _idempotency_key(exchange)
        if device.name in self._sending:
            raise Refusal(429, "busy", "one capture of a device at a time", retry_after=1)
        self._sending.add(device.name)
        try:
            label = await self._label(description)
            image = await exchange.body()
            if exchange.length <= _INLINE_BYTES and description.format != "png":
                pixels = self._pixels(description, image)
            else:
                pixels = await asyncio.to_thread(self._pixels, description, image)
            capture = Capture(
                dataset=description.dataset,
                device_id=device.name,
                sequence=description.sequence,
                image=pixels,
                label=label,
                split=description.split,
                captured_at=description.time / 1e6,
                idempotency_key=key,
                metadata={"description": signed.decode("ascii"), "signature": signature.hex()},
            )
            receipt = await self._put(capture, inline=exchange.length <= _INLINE_BYTES)
        finally:
            self._sending.discard(device.name)
        self._listener.audit.append(
            "capture.stored" if receipt.is_new else "capture.repeated",
            peer=exchange.peer,
            device=device.name,
            sequence=description.sequence,
            record=receipt.record_id,
            bytes=exchange.length,
        )
        return Reply(
            201 if receipt.is_new else 200,
            b'{"record":"%s","sequence":%d}' % (receipt.record_id.encode(), description.sequence),
        )

    def _read(self, exchange: Exchange) -> tuple[Description, bytes, bytes]:
        headers = exchange.headers
        try:
            signed = decode_header(headers[_CAPTURE], limit=MAX_DESCRIPTION_BYTES)
            signature = decode_header(headers[_SIGNATURE], limit=SIGNATURE_BYTES)
            return Description.from_bytes(signed), signed, signature
        except KeyError as exc:
            raise Refusal(
                400, "capture", f"the headers {CAPTURE_HEADER} and {SIGNATURE_HEADER} are needed"
            ) from exc
        except CaptureError as exc:
            raise Refusal(400, "capture", str(exc)) from exc

    def _authenticate(self, description: Description, signed: bytes, signature: bytes) -> Device:
        """Verify the signature; an unknown device costs the same time and gets the same answer."""
        device = self._registry.find(description.device, now=self._clock())
        known = device is not None and device.key is not None
        key = self._registry.public_key(device.key) if device and device.key else self._nobody
        valid = verify_capture(key, signed, signature)
        if device is None or not known or not valid:
            detail = "wrong signature" if known else "unknown device"
            raise unauthorised(f"{detail} for {description.device}, number {description.sequence}")
        if device.standing != "enrolled":
            raise Refusal(403, f"device_{device.standing}", _STANDINGS[device.standing], detail=device.name)
        return device

    def _check(self, description: Description, device: Device, length: int) -> None:
        if description.dataset not in device.datasets:
            raise Refusal(
                403, "dataset", "the device is not enrolled for this data set", detail=description.dataset
            )
        now = self._clock()
        if description.time / 1e6 > now + self._policy.ahead_seconds:
            raise Refusal(
                400,
                "clock",
                f"the capture is from the future: its time {_utc(description.time / 1e6)}, here {_utc(now)}",
            )
        if description.time / 1e6 < now - self._policy.age_seconds:
            raise Refusal(400, "too_old", f"the capture is too old: {_utc(description.time / 1e6)}")
        if length == 0:
            raise Refusal(400, "empty", "the image is missing")
        if description.format in _ITEM_BYTES:
            size = math.prod(description.shape) * _ITEM_BYTES[description.format]
            if size != length:
                raise Refusal(
                    422, "image_format", f"the shape needs {size} bytes and {length} were sent", close=True
                )

    async def _label(self, description: Description) -> int | None:
        """Translate the class name by the data set's own list, read again where a name is not in it."""
        classes = self._labels.get(description.dataset)
        fits = classes is not None and (description.label is None or description.label in classes)
        if not fits and self._monotonic() >= self._labels_until:
            infos = await asyncio.to_thread(self._store.datasets)
            self._labels = {
                info.name: {name: index for index, name in enumerate(info.classes)} for info in infos
            }
            self._labels_until = self._monotonic() + _DATASET_SECONDS
            classes = self._labels.get(description.dataset)
        if classes is None:
            raise Refusal(404, "unknown_dataset", "there is no such data set", detail=description.dataset)
        if description.label is None:
            return None
        if description.label not in classes:
            raise Refusal(422, "label", "the data set has no such class")
        return classes[description.label]

    def _pixels(self, description: Description, image: bytes) -> Any:
        if digest_of(image) != description.sha256:
            raise Refusal(400, "digest", "the image does not have the digest that was signed")
        try:
            return decode_image(
                image,
                format=description.format,
                shape=description.shape,
                max_pixels=self._policy.max_pixels,
            )
        except ImageFormatError as exc:
            raise Refusal(422, "image_format", exc.problem, detail=str(exc)) from exc

    async def _put(self, capture: Capture, *, inline: bool) -> Receipt:
        if inline:
            future = self._store.submit(capture)
        else:
            future = await asyncio.to_thread(partial(self._store.submit, capture))
        last = await self._last_of(capture.device_id)
        try:
            receipt = await asyncio.wrap_future(future)
        except SequenceConflictError as exc:
            # The device has proved who it is, so it may know where to go on after it lost its state.
            raise Refusal(
                409,
                "sequence",
                f"the sequence number was used before; the last one stored is {last or 0}",
                detail=f"{capture.device_id}, number {capture.sequence}",
                headers={LAST_HEADER: str(last or 0)},
            ) from exc
        self._last[capture.device_id] = max(last or 0, capture.sequence)
        return receipt

    async def _last_of(self, device: str) -> int | None:
        if device not in self._last:
            last = await asyncio.to_thread(self._store.last_sequence, device)
            if last is None:
                return None
            self._last[device] = last
        return self._last[device]


def ingest_app(ingest: Ingest, listener: Listener) -> Guard:
    """Return the ingest listener's ASGI application."""
    return Guard(ingest_api(ingest), listener, {("POST", CAPTURES_PATH): ingest.capture})


def ingest_api(ingest: Ingest) -> FastAPI:
    """Return the listener's routes and their description."""
    api = new_api("FLEP data owner: ingest", "Devices hand in signed captures.")

    async def capture(request: Request) -> Response:
        return await respond(request, ingest.capture)

    api.add_api_route(CAPTURES_PATH, capture, methods=["POST"], **describe_ingest())
    return api


async def respond(request: Request, handler: Callable[[Exchange], Awaitable[Reply]]) -> Response:
    """Run a handler inside FastAPI."""
    reply = await request.scope["exchange"].run(handler)
    if len(reply.body) <= _CHUNK_BYTES:
        return Response(reply.body, reply.status, reply.headers)

    async def chunks() -> AsyncIterator[bytes | memoryview]:
        # In pieces, so that a slow reader's answer waits here, in its place, and not in a socket's buffer.
        body = memoryview(reply.body)
        for start in range(0, len(body), _CHUNK_BYTES):
            yield body[start : start + _CHUNK_BYTES]

    headers = {**reply.headers, "content-length": str(len(reply.body))}
    return StreamingResponse(chunks(), reply.status, headers)


def _idempotency_key(exchange: Exchange) -> str | None:
    value = exchange.headers.get(IDEMPOTENCY_HEADER)
    if value is None:
        return None
    text = value.decode("latin-1")
    if not 0 < len(text) <= MAX_IDEMPOTENCY_KEY or not text.isascii() or not text.isprintable():
        raise Refusal(
            400, "idempotency_key", f"an idempotency key is 1 to {MAX_IDEMPOTENCY_KEY} ASCII characters"
        )
    return text


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(max(seconds, 0), 2**33)))
