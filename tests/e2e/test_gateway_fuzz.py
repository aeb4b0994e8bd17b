"""The OpenAPI descriptions, fuzzed against a running gateway: whatever is sent, nothing ends in a 5xx.

Half of the requests are signed as they should be, by an enrolled device, a granted analyst or an
administrator, so that the fuzz gets behind the signatures too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from gateways import DATASET, IMAGE, Camera, GatewayProcess, events, new_home, running_gateway, signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from flep_fl.contracts.owner_records import Analyst
from flep_fl.private_database.grants import create_grant
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.provision.owner_gateway import openapi_descriptions

pytestmark = pytest.mark.e2e
LISTENERS = ("ingest", "release", "admin")
PIXELS = IMAGE.tobytes()


class Target:
    """A gateway, and everybody who may ask it something."""

    def __init__(
        self, gateway: GatewayProcess, camera: Camera, analyst: Ed25519PrivateKey, grant: str
    ) -> None:
        self.gateway, self.camera, self.grant, self.release = gateway, camera, grant, ""
        self._keys = {"release": analyst, "admin": gateway.home.administrator_key("admin")}
        self._session = requests.Session()
        self._session.trust_env = False

    def base(self, listener: str) -> str:
        return self.gateway.url(listener).replace("https", "http")

    def send(self, listener: str, request: dict[str, Any], *, sign: bool, place: int) -> int:
        prepared = requests.Request(
            **{k: v for k, v in request.items() if k not in ("timeout", "verify")}
        ).prepare()
        assert prepared.url is not None
        target = prepared.path_url
        if place and listener == "release" and "/grants/" in target:
            parts = target.partition("?")[0].split("/")
            parts[3] = self.grant
            if len(parts) > 5:
                parts[5] = self.release or "0" * 32
            target = "/".join(parts) + target[len(target.partition("?")[0]) :]
            prepared.url = self.base(listener) + target
        body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body or b""
        if not isinstance(body, bytes):
            body = b"".join(body)
        prepared.body, prepared.headers["Content-Length"] = body, str(len(body))
        prepared.headers.pop("Transfer-Encoding", None)
        if sign and listener == "ingest":
            if place:
                body = PIXELS
                prepared.body, prepared.headers["Content-Length"] = body, str(len(body))
            own = self.camera.headers(body, format=("png", "raw-uint8")[place], shape=((), (6, 6))[place])
            prepared.headers.update(own)
        elif sign:
            own = signed(self.gateway.home, str(prepared.method), target, self._keys[listener], body)
            prepared.headers.update(own)
        answer = self._session.send(prepared, timeout=60)
        if target.endswith("/open") and answer.status_code == 200:
            self.release = answer.json()["release_id"]
        return answer.status_code


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    home = new_home(folder / "owner")
    camera, analyst = Camera(), Ed25519PrivateKey.generate()
    with OwnerDatabase(home.database, home.database_key()) as database:
        database.ingest([IMAGE] * 3, [0, 1, 1], ["train", "train", "test"])
        ReleaseBook(database, home.signing_key()).release(DATASET)
        keys = Analyst(
            "site-a",
            analyst.public_key().public_bytes_raw(),
            X25519PrivateKey.generate().public_key().public_bytes_raw(),
        )
        grant = create_grant(database, dataset=DATASET, analyst=keys, not_after=time.time() + 86400)
    wide = [f"{name}.{limit}=1000000" for name in LISTENERS for limit in ("rate", "burst", "peer_rate")]
    wide += [f"{name}.peer_burst=1000000" for name in LISTENERS]
    with running_gateway(home, folder, "tls=false", *wide) as gateway:
        made = Target(gateway, camera, analyst, grant.grant_id)
        statement = camera.statement(home)
        assert requests.post(made.base("admin") + "/v1/approvals", data=statement).status_code == 200
        yield made


def fuzz(target: Target, examples: int) -> dict[str, set[int]]:
    """Fuzz every operation of every listener; gives the status codes by operation."""
    seen: dict[str, set[int]] = {}
    for listener, description in openapi_descriptions().items():
        for found in schemathesis.openapi.from_dict(description).get_all_operations():
            operation = found.ok()
            codes = seen.setdefault(f"{listener} {operation.label}", set())
            for mode in schemathesis.GenerationMode:
                fuzz_one(target, listener, operation, mode, codes, examples)
    return seen


def fuzz_one(
    target: Target, listener: str, operation: Any, mode: Any, codes: set[int], examples: int
) -> None:
    """Send requests that follow the description, or break it, as ``mode`` says."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), sign=st.booleans(), place=st.integers(0, 1))
    def run(case: Any, sign: bool, place: int) -> None:
        request = case.as_transport_kwargs(base_url=target.base(listener))
        try:
            codes.add(target.send(listener, request, sign=sign, place=place))
        except (requests.exceptions.InvalidHeader, UnicodeError, requests.exceptions.InvalidURL):
            return  # the client itself cannot send this
        assert max(codes) < 500, (case, codes)

    with contextlib.suppress(Unsatisfiable):  # a request without any part cannot break its description
        run()


def check(target: Target, examples: int) -> None:
    seen = fuzz(target, examples)
    assert len(seen) == 10
    for operation in ("ingest POST /v1/captures", "release GET /v1/grants", "admin GET /v1/status"):
        # Both sides of the signature were reached, so the fuzz did not just knock at a closed door.
        assert seen[operation] & {200, 201} and seen[operation] & {400, 401}, (operation, seen)
    assert not [line for line in events(target.gateway.home) if line.get("status") == 500]
    assert target.gateway.process is not None and target.gateway.process.poll() is None


def test_no_request_ends_in_a_5xx(target: Target) -> None:
    check(target, 8)


@pytest.mark.slow
def test_no_request_of_many_ends_in_a_5xx(target: Target) -> None:
    check(target, 400)
