"""Signed requests to a data owner's gateway; back-pressure and broken connections are retried."""

from __future__ import annotations

import hmac
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts import owner_api
from flep_fl.contracts.errors import (
    ConfigError,
    FetchError,
    FlepError,
    GrantError,
    GrantExpiredError,
    GrantRevokedError,
    NotReleasedError,
    OwnerPinError,
    OwnerUnreachableError,
    ReleaseChangedError,
    RequestSignatureError,
    UnknownGrantError,
)
from flep_fl.contracts.owner_api import GrantListing, OwnerHello
from flep_fl.contracts.owner_records import OpenedGrant
from flep_fl.contracts.request_signing import MAX_AGE_SECONDS, sign_request

if TYPE_CHECKING:
    import httpx

MAX_TRIES = 8
MAX_WAIT = 10.0
SLOWEST = 4096
"""Bytes a second: who sends less on average, after the first minute, is given up."""
_TIMEOUT = 60.0
_JSON_BYTES = 16 << 20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PIN = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ERRORS: dict[str, type[FlepError]] = {
    error.code: error
    for error in (
        UnknownGrantError,
        GrantRevokedError,
        GrantExpiredError,
        GrantError,
        NotReleasedError,
        ReleaseChangedError,
        RequestSignatureError,
    )
}


@dataclass(frozen=True, slots=True)
class AnalystIdentity:
    """The two private keys of an analyst.

    Attributes
    ----------
    signing_key
        Ed25519; signs requests.
    decryption_key
        X25519; opens wrapped key bundles.
    """

    signing_key: Ed25519PrivateKey = field(repr=False)
    decryption_key: X25519PrivateKey = field(repr=False)

    @property
    def verify_key(self) -> bytes:
        """Raw Ed25519 public key."""
        return self.signing_key.public_key().public_bytes_raw()

    @property
    def encryption_key(self) -> bytes:
        """Raw X25519 public key."""
        return self.decryption_key.public_key().public_bytes_raw()


@dataclass(frozen=True, slots=True)
class OwnerAddress:
    """Where an owner is, and which key it must show.

    Attributes
    ----------
    base
        ``https://HOST:PORT``.
    pin
        The owner's raw Ed25519 key, or None.
    """

    base: str
    pin: bytes | None


def parse_address(text: str) -> OwnerAddress:
    """Read ``https://HOST:PORT`` or ``https://HOST:PORT#KEY`` with the owner's Ed25519 key in hex.

    Raises
    ------
    ConfigError
        It is something else, or ``http`` to a host that is not this one.
    """
    try:
        parts = urlsplit(text)
        host = parts.hostname
        plain = parts.scheme == "http" and host in _LOOPBACK
        usable = bool(host) and (plain or parts.scheme == "https") and parts.path in ("", "/")
        usable = usable and not parts.query and parts.username is None and parts.port != 0
    except ValueError:
        usable = False
    if not usable or (parts.fragment and not _PIN.fullmatch(parts.fragment)):
        raise ConfigError(
            f"data.owners names {text}",
            expected="https://HOST:PORT, or https://HOST:PORT#OWNER_KEY with 64 hex digits",
            remedy="http:// is for this machine alone",
        )
    return OwnerAddress(
        f"{parts.scheme}://{parts.netloc}", bytes.fromhex(parts.fragment) if parts.fragment else None
    )


class OwnerClient:
    """A connection to one owner; a context manager.

    Parameters
    ----------
    address
        Where it is.
    identity
        Whose requests these are.
    ca
        PEM file of the certificate authority; None: the system's.
    max_tries
        How often a request is tried while the owner is busy or out of reach.
    sleep, clock
        Replaced in tests.
    """

    def __init__(
        self,
        address: OwnerAddress,
        identity: AnalystIdentity,
        *,
        ca: Path | None = None,
        max_tries: int = MAX_TRIES,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        import httpx

        self.address, self._identity = address, identity
        self._max_tries, self._sleep, self._clock = max_tries, sleep, clock
        self._audience = b""
        self._http: httpx.Client = httpx.Client(
            verify=_trust(ca), timeout=_TIMEOUT, follow_redirects=False, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def hello(self) -> bytes:
        """Ask who answers; returns the owner's raw Ed25519 key, which the caller compares with its pin.

        Raises
        ------
        OwnerPinError
            It is not the key in the address.
        FetchError
            Nobody answers, or the clocks differ too much for signed requests.
        """
        data, _ = self._request("GET", owner_api.OWNER_PATH, limit=_JSON_BYTES, signed=False)
        hello = OwnerHello.from_bytes(data)
        pin = self.address.pin
        if pin is not None and not hmac.compare_digest(pin, hello.verify_key):
            raise OwnerPinError(
                f"the data owner at {self.address.base} shows another key than data.owners names",
                expected=pin.hex(),
                found=hello.verify_key.hex(),
                remedy="Ask the owner by another way; do not go on",
            )
        if abs(hello.time - self._clock()) > MAX_AGE_SECONDS:
            raise FetchError(
                f"this clock and that of {self.address.base} differ too much for signed requests",
                expected=f"within {MAX_AGE_SECONDS} s",
                found=f"{hello.time - self._clock():.0f} s",
                remedy="Set the clock",
            )
        self._audience = hello.verify_key
        return hello.verify_key

    def grants(self) -> list[GrantListing]:
        """List this analyst's grants."""
        return owner_api.read_grants(self._request("GET", owner_api.GRANTS_PATH, limit=_JSON_BYTES)[0])

    def open(self, grant_id: str) -> OpenedGrant:
        """Open a grant."""
        path = owner_api.OPEN_PATH.format(grant_id=grant_id)
        return owner_api.read_opened(self._request("POST", path, limit=_JSON_BYTES)[0])

    def index(self, grant_id: str, release_id: str, cursor: int, limit: int) -> tuple[bytes, int | None]:
        """Return some index entries and the next cursor."""
        path = owner_api.INDEX_PATH.format(grant_id=grant_id, release_id=release_id)
        return self._request("GET", f"{path}?cursor={cursor}&limit={limit}", limit=_JSON_BYTES)

    def records(
        self, grant_id: str, release_id: str, cursor: int, *, limit: int, max_bytes: int
    ) -> tuple[bytes, int | None]:
        """Return some framed records (at most ``max_bytes``) and the next cursor."""
        path = owner_api.RECORDS_PATH.format(grant_id=grant_id, release_id=release_id)
        return self._request("GET", f"{path}?cursor={cursor}&limit={limit}", limit=max_bytes)

    def _request(
        self, method: str, target: str, *, limit: int, signed: bool = True
    ) -> tuple[bytes, int | None]:
        """Send a request until it is answered; raises what the owner's error code stands for."""
        import httpx

        reason = ""
        for number in range(self._max_tries):
            if number:
                self._sleep(min(MAX_WAIT, 0.2 * 2**number) * random.uniform(0.5, 1.0))  # noqa: S311
            headers = {"accept-encoding": "identity"}
            if signed:
                # Signed anew every time: the owner remembers nonces.
                headers |= sign_request(
                    method,
                    target,
                    b"",
                    audience=self._audience,
                    key=self._identity.verify_key,
                    sign=self._identity.signing_key.sign,
                    created=int(self._clock()),
                )
            try:
                with self._http.stream(method, self.address.base + target, headers=headers) as answer:
                    body = _read(answer, limit)
                    status, cursor = answer.status_code, answer.headers.get(owner_api.CURSOR_HEADER)
                    retry_after = answer.headers.get("retry-after", "")
            except httpx.TransportError as exc:
                if isinstance(exc.__cause__ or exc.__context__, ssl.SSLCertVerificationError) or (
                    "CERTIFICATE_VERIFY" in str(exc)
                ):
                    raise FetchError(
                        f"the certificate of {self.address.base} cannot be verified ({exc})",
                        remedy="Name the owner's certificate authority: data.owner_ca=FILE",
                    ) from exc
                reason = f"{type(exc).__name__}: {exc}"
                continue
            if status in (429, 502, 503, 504):
                reason = f"status {status}"
                if retry_after.isdigit():
                    self._sleep(min(MAX_WAIT, float(retry_after)))
                continue
            if status != 200:
                raise self._refusal(status, body)
            return body, _cursor(cursor)
        raise OwnerUnreachableError(
            f"the data owner at {self.address.base} does not answer",
            found=reason,
            remedy="Check the address and that the gateway runs, then start again: what is here stays",
        )

    def _refusal(self, status: int, body: bytes) -> FlepError:
        code, reason = owner_api.read_error(body)
        error = _ERRORS.get(code, FetchError)
        return error(
            f"the data owner at {self.address.base} refused: {reason or code}"[:500], found=f"status {status}"
        )


def _read(answer: httpx.Response, limit: int) -> bytes:
    """Read a body; raw, because what was not asked for compressed is not unpacked either."""
    parts, size, began = [], 0, time.monotonic()
    for part in answer.iter_raw():
        size += len(part)
        if size > limit:
            raise FetchError("the data owner's answer is too large", expected=f"at most {limit} bytes")
        late = time.monotonic() - began - _TIMEOUT
        if late > 0 and size < late * SLOWEST:
            raise FetchError(
                "the data owner answers too slowly",
                expected=f"at least {SLOWEST} bytes/s",
                found=f"{size} bytes in {late + _TIMEOUT:.0f} s",
                remedy="Start again later: what is here stays",
            )
        parts.append(part)
    return b"".join(parts)


def _cursor(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise FetchError("the data owner's answer has a cursor that is no number")
    return int(text)


def _trust(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"data.owner_ca={ca} cannot be read as certificates ({exc})") from exc
