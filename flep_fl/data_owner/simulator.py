"""A device that plays images: what runs on a camera, with a folder or a data set for a sensor.

The device keeps its key, its next sequence number and the capture that is under way in a folder of its own,
written before a byte leaves. After a crash the same capture goes out again, byte for byte, under the same
number, and the gateway answers with the record that is there. It obeys ``Retry-After`` and waits longer and
longer where nobody answers; it gives up on refusals that trying again cannot change.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.contracts.errors import CaptureError, DeviceError, GatewayError
from flep_fl.contracts.files import read_bytes, write_atomic, write_secret
from flep_fl.contracts.owner_api import read_error
from flep_fl.data_owner.certificates import client_context
from flep_fl.data_owner.devices import (
    CAPTURE_HEADER,
    MAX_DESCRIPTION_BYTES,
    SIGNATURE_HEADER,
    Description,
    decode_header,
    digest_of,
    encode_header,
    is_name,
    sign_capture,
)

CAPTURES_PATH = "/v1/captures"
LAST_HEADER = "flep-last-sequence"
_RETRIED = frozenset((408, 429, 500, 502, 503, 504, 507))
_MAX_WAIT, _MAX_OBEYED = 30.0, 300.0
_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Shot:
    """One image as the sensor gives it.

    Attributes
    ----------
    name
        What it is called in messages.
    image
        The bytes to send.
    format, shape
        As in :class:`~flep_fl.data_owner.devices.Description`.
    label
        Class name, or None.
    """

    name: str
    image: bytes = field(repr=False)
    format: str
    shape: tuple[int, ...]
    label: str | None = field(default=None, repr=False)


@dataclass(slots=True)
class DeviceState:
    """What a device must not forget.

    Attributes
    ----------
    next
        The next sequence number.
    pending
        Description and signature, as their headers, of a capture that nobody has answered for yet.
    play
        Digest of the list that is being played.
    position
        Index of the next image of that list.
    """

    next: int = 1
    pending: tuple[str, str] | None = None
    play: str = ""
    position: int = 0


class Answer(Protocol):
    """What the device reads of an HTTP answer."""

    status_code: int

    @property
    def content(self) -> bytes:
        """The body."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers; names in any case."""
        ...


class Device:
    """A device's folder: key, state, and where its gateway is.

    Parameters
    ----------
    folder
        Made by :meth:`create`.

    Raises
    ------
    DeviceError
        It is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        data = read_bytes(folder / "device.json", what="the device's description", error=DeviceError)
        raw = read_bytes(folder / "device.key", what="the device's key", error=DeviceError)
        try:
            content = json.loads(data)
            self.name, self.gateway = str(content["device"]), str(content["gateway"])
            self._key = Ed25519PrivateKey.from_private_bytes(raw)
        except (ValueError, KeyError, TypeError) as exc:
            raise DeviceError(f"the device's folder is damaged: {folder}", remedy="Enrol it anew") from exc
        self.folder = folder
        self.state = self._read_state()

    @classmethod
    def create(cls, folder: Path, *, name: str, gateway: str, ca: bytes | None) -> Device:
        """Make a device's folder with a new key.

        Parameters
        ----------
        folder
            Must not be a device's already.
        name
            The device's name.
        gateway
            URL of the ingest listener.
        ca
            The owner's root certificate, PEM; None for plain HTTP.

        Raises
        ------
        DeviceError
            The folder is taken, or the name unusable.
        """
        if not is_name(name):
            raise DeviceError(
                "the device's name is unusable", expected="letters, digits, _, - and .", found=name
            )
        if (folder / "device.key").exists():
            raise DeviceError(f"there is a device already: {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if ca is not None:
            write_atomic(folder / "ca.crt", ca)
        content = {"device": name, "gateway": gateway}
        write_atomic(folder / "device.json", json.dumps(content, indent=2).encode() + b"\n")
        write_secret(folder / "device.key", Ed25519PrivateKey.generate().private_bytes_raw())
        return cls(folder)

    def __repr__(self) -> str:
        return f"Device({self.name!r})"

    @property
    def public_key(self) -> str:
        """The device's public key, 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def tls(self) -> ssl.SSLContext | bool:
        """Return how the gateway's certificate is checked."""
        return client_context(self.folder / "ca.crt") if (self.folder / "ca.crt").exists() else True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Be the one process that sends for this device.

        Raises
        ------
        DeviceError
            Another process does.
        """
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise DeviceError(
                    f"another process is sending for {self.name}",
                    remedy="Two processes with one key would use each sequence number twice: stop one",
                ) from exc
            self.state = self._read_state()
            yield
        finally:
            os.close(descriptor)

    def begin(self, shot: Shot, *, dataset: str, split: str | None, now: float) -> tuple[str, str]:
        """Sign a capture under the next number, on disk before this returns; gives the two headers."""
        description = Description(
            self.name,
            self.state.next,
            int(now * 1e6),
            digest_of(shot.image),
            shot.format,
            shot.shape,
            dataset,
            shot.label,
            split,
        ).to_bytes()
        signature = sign_capture(self._key, description)
        self.state.pending = (encode_header(description), encode_header(signature))
        self.state.next += 1
        self._write_state()
        return self.state.pending

    def pending(self) -> tuple[Description, tuple[str, str]] | None:
        """Return the capture that nobody has answered for yet."""
        if self.state.pending is None:
            return None
        try:
            data = decode_header(self.state.pending[0].encode(), limit=MAX_DESCRIPTION_BYTES)
            return Description.from_bytes(data), self.state.pending
        except CaptureError as exc:
            raise DeviceError(f"the device's state is damaged: {self.folder}") from exc

    def end(self, *, position: int, last: int = 0) -> None:
        """Forget the capture under way; ``last`` is the largest number that the gateway says it has."""
        self.state.pending = None
        self.state.position = position
        self.state.next = max(self.state.next, last + 1)
        self._write_state()

    def start_list(self, digest: str, *, length: int) -> int:
        """Begin a list, or go on with it after an interruption; returns the index to go on from."""
        if self.state.play != digest or self.state.position >= length:
            self.state.play, self.state.position = digest, 0
            self._write_state()
        return self.state.position

    def _read_state(self) -> DeviceState:
        path = self.folder / "state.json"
        if not path.exists():
            return DeviceState()
        try:
            content = json.loads(path.read_bytes())
            pending = content["pending"]
            return DeviceState(
                int(content["next"]),
                None if pending is None else (str(pending[0]), str(pending[1])),
                str(content["play"]),
                int(content["position"]),
            )
        except (ValueError, KeyError, TypeError, IndexError, OSError) as exc:
            raise DeviceError(
                f"the device's state is damaged: {path}",
                remedy="Remove the file; the gateway tells the last number that it has",
            ) from exc

    def _write_state(self) -> None:
        state = self.state
        content = {
            "next": state.next,
            "pending": state.pending,
            "play": state.play,
            "position": state.position,
        }
        write_secret(self.folder / "state.json", json.dumps(content).encode())


@dataclass(slots=True)
class Played:
    """What came of a list.

    Attributes
    ----------
    stored, repeated
        Captures that are new at the gateway, and those it had already.
    refused
        Captures that it does not take, with the reason.
    retries
        Requests that were sent again.
    """

    stored: int = 0
    repeated: int = 0
    refused: list[str] = field(default_factory=list)
    retries: int = 0


def play(
    device: Device,
    shots: Sequence[Callable[[], Shot]],
    *,
    dataset: str,
    split: str | None = None,
    source: str = "",
    rate: float,
    patience: float = float("inf"),
    on_event: Callable[[str], None] = lambda _: None,
    post: Callable[[str, bytes, dict[str, str]], Answer] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Played:
    """Play a list of images, at most ``rate`` a second; goes on where an interrupted run of it ended.

    Parameters
    ----------
    device
        Whose images they are.
    shots
        Functions that read one image each.
    dataset, split
        Where the images go.
    source
        What the list is called: another list of the same length is not taken for the rest of this one.
    rate
        Images per second, > 0.
    patience
        Seconds for which an unreachable or busy gateway is tried, per capture.
    on_event
        Receives a line about everything out of the ordinary.
    post
        Sends one request, ``(url, body, headers)``; HTTPS by httpx where None.
    sleep, clock
        For tests.

    Raises
    ------
    GatewayError
        The gateway refuses this device, or patience is over.
    DeviceError
        Another process plays this device.
    """
    played = Played()
    with device.in_use(), _poster(device, post) as send:
        digest = hashlib.sha256(json.dumps([dataset, split, len(shots), source]).encode()).hexdigest()
        start = device.start_list(digest, length=len(shots))
        if start:
            on_event(f"goes on with image {start + 1} of {len(shots)}, number {device.state.next}")
        due = time.monotonic()
        for position in range(start, len(shots)):
            shot = shots[position]()
            under_way = device.pending()
            if under_way is not None and under_way[0].sha256 == digest_of(shot.image):
                headers = under_way[1]
                on_event(f"{shot.name}: sends number {under_way[0].sequence} again after an interruption")
            else:
                headers = device.begin(shot, dataset=dataset, split=split, now=clock())
            last = _deliver(device, shot, headers, send, played, patience, on_event, sleep)
            if last is not None:
                # The gateway has this number already, for another capture: the state was lost or restored.
                device.end(position=position, last=last)
                on_event(f"{shot.name}: goes on after number {last}, the last one that the gateway has")
                headers = device.begin(shot, dataset=dataset, split=split, now=clock())
                if _deliver(device, shot, headers, send, played, patience, on_event, sleep) is not None:
                    raise GatewayError(f"the gateway refuses every sequence number of {device.name}")
            device.end(position=position + 1)
            due = max(due + 1 / rate, time.monotonic() - 1 / rate)
            if position + 1 < len(shots):
                sleep(max(0.0, due - time.monotonic()))
    return played


def _deliver(
    device: Device,
    shot: Shot,
    headers: tuple[str, str],
    send: Callable[[str, bytes, dict[str, str]], Answer],
    played: Played,
    patience: float,
    on_event: Callable[[str], None],
    sleep: Callable[[float], None],
) -> int | None:
    """Send one capture until it is answered for; a number says where to go on after a used one."""
    sent = {
        CAPTURE_HEADER: headers[0],
        SIGNATURE_HEADER: headers[1],
        "content-type": "image/png" if shot.format == "png" else "application/octet-stream",
    }
    began, wait = time.monotonic(), 0.5
    while True:
        pause, reason = wait * random.uniform(0.8, 1.2), ""  # noqa: S311 - spreads retries, no secret
        try:
            answer = send(device.gateway + CAPTURES_PATH, shot.image, sent)
        except OSError as exc:
            reason = f"{device.gateway} does not answer ({exc})"
        else:
            if answer.status_code in (200, 201):
                played.stored += answer.status_code == 201
                played.repeated += answer.status_code == 200
                return None
            code, text = read_error(answer.content)
            if answer.status_code == 409 and LAST_HEADER in answer.headers:
                return int(answer.headers[LAST_HEADER])
            if answer.status_code not in _RETRIED:
                _refuse(device, shot, answer.status_code, code, text, played, on_event)
                return None
            reason = f"the gateway answers {answer.status_code} {code}"
            pause = max(pause, _retry_after(answer))
        if time.monotonic() + pause - began > patience:
            raise GatewayError(
                f"{shot.name} could not be delivered: {reason}",
                remedy="The device keeps it; play again later",
            )
        on_event(f"{shot.name}: {reason}; tries again in {pause:.1f} s")
        played.retries += 1
        sleep(pause)
        wait = min(2 * wait, _MAX_WAIT)


def _refuse(
    device: Device,
    shot: Shot,
    status: int,
    code: str,
    text: str,
    played: Played,
    on_event: Callable[[str], None],
) -> None:
    """Pass over an image that is not taken; stop where the device itself is not."""
    line = f"{shot.name}: refused with {status} {code}: {text}"
    if status in (401, 403) or code in ("clock", "capture", "unknown_dataset"):
        raise GatewayError(
            f"the gateway does not take images of {device.name}: {text}",
            found=f"{status} {code}",
            remedy="Enrol the device for this data set, and check its clock",
        )
    played.refused.append(line)
    on_event(line)


def _retry_after(answer: Answer) -> float:
    text = str(answer.headers.get("retry-after", ""))
    return min(float(text), _MAX_OBEYED) if text.isdigit() else 0.0


@contextmanager
def _poster(
    device: Device, post: Callable[[str, bytes, dict[str, str]], Answer] | None
) -> Iterator[Callable[[str, bytes, dict[str, str]], Answer]]:
    if post is not None:
        yield post
        return
    import httpx

    with httpx.Client(verify=device.tls(), timeout=_TIMEOUT, trust_env=False) as client:

        def send(url: str, body: bytes, headers: dict[str, str]) -> Answer:
            try:
                return client.post(url, content=body, headers=headers)
            except httpx.TransportError as exc:
                raise ConnectionError(str(exc) or type(exc).__name__) from exc

        yield send
