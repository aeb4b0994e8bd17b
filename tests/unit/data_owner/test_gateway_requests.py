"""What each listener takes and refuses, request by request, over a real database and audit log."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from gateways import DATASET, IMAGE, Camera, Parts, gateway_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flep_fl.contracts.owner_records import Analyst
from flep_fl.data_owner.audit import HEADS_NAME, LOG_NAME, verify_log
from flep_fl.data_owner.devices import CAPTURE_HEADER, SIGNATURE_HEADER
from flep_fl.data_owner.enrolment import Approval, DeviceRegistry
from flep_fl.data_owner.gateway.callers import NonceMemory
from flep_fl.data_owner.gateway.guard import Exchange, Guard, Listener
from flep_fl.data_owner.gateway.ingest import CapturePolicy
from flep_fl.data_owner.gateway.limits import Admission, Limits, TokenBuckets, peer_key
from flep_fl.data_owner.gateway.refusals import Refusal
from flep_fl.data_owner.gateway.release import Release, release_app

PIXELS = IMAGE.tobytes()
CAPTURES = "/v1/captures"


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    limits = Limits(body_bytes=1 << 16, rate=1e6, burst=10**6)
    with gateway_parts(tmp_path / "owner", limits=limits, policy=CapturePolicy(max_pixels=4096)) as made:
        yield made


@pytest.fixture
def camera(parts: Parts) -> Camera:
    made = Camera()
    approved(parts, made.statement(parts.home))
    return made


def ask(parts: Parts, listener: str, method: str, target: str, **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with parts.client(listener) as client:
            return await client.request(method, target, **options)

    return asyncio.run(go())


def post(parts: Parts, headers: dict[str, str], image: bytes = PIXELS) -> httpx.Response:
    return ask(parts, "ingest", "POST", CAPTURES, content=image, headers=headers)


def approved(parts: Parts, statement: bytes) -> None:
    answer = ask(parts, "admin", "POST", "/v1/approvals", content=statement)
    assert answer.status_code == 200, answer.text


def refused(parts: Parts, answer: httpx.Response, status: int, code: str, *, stored: int = 0) -> None:
    """Check a refusal: status and code, nothing stored, and a line in the audit log."""
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert set(answer.json()) == {"code", "reason"}
    assert parts.database.count() == stored
    assert parts.events()[-1]["event"] == "request.refused"
    assert (parts.events()[-1]["status"], parts.events()[-1]["code"]) == (status, code)


# --- devices ----------------------------------------------------------------------------------------


def test_a_capture_is_stored_as_it_was_taken(parts: Parts, camera: Camera) -> None:
    answer = post(parts, camera.headers(PIXELS))
    assert answer.status_code == 201
    record = parts.database.get(answer.json()["record"])
    assert np.array_equal(record.image, IMAGE)
    assert (record.label, record.split, record.tags.device, record.tags.sequence) == (1, "train", "cam-1", 1)
    line = parts.events()[-1]
    assert (line["event"], line["device"], line["sequence"]) == ("capture.stored", "cam-1", 1)
    assert line["record"] == answer.json()["record"]


@pytest.mark.parametrize("label", [None, "fine"])
def test_labels_go_by_name_and_may_be_missing(parts: Parts, camera: Camera, label: str | None) -> None:
    answer = post(parts, camera.headers(PIXELS, label=label))
    found = parts.database.get(answer.json()["record"]).tags.label
    assert found == (None if label is None else 0)


def test_png_and_16_bits_are_stored_exactly(parts: Parts, camera: Camera) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    found = [
        post(parts, camera.headers(buffer.getvalue(), format="png", shape=()), buffer.getvalue()),
        post(parts, camera.headers(deep.tobytes(), format="raw-uint16", shape=(5, 7)), deep.tobytes()),
    ]
    for answer in found:
        assert np.array_equal(parts.database.get(answer.json()["record"]).image, deep)


def test_a_retry_gets_the_same_record(parts: Parts, camera: Camera) -> None:
    headers = camera.headers(PIXELS)
    first, second = post(parts, headers), post(parts, headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json() and parts.database.count() == 1
    assert parts.events()[-1]["event"] == "capture.repeated"


def test_an_idempotency_key_stands_for_one_capture(parts: Parts, camera: Camera) -> None:
    headers = camera.headers(PIXELS) | {"idempotency-key": "k1"}
    first = post(parts, headers)
    assert post(parts, headers).json() == first.json()
    again = post(parts, camera.headers(PIXELS) | {"idempotency-key": "k1"})
    refused(parts, again, 409, "sequence", stored=1)
    wrong = post(parts, camera.headers(PIXELS) | {"idempotency-key": "x" * 129})
    refused(parts, wrong, 400, "idempotency_key", stored=1)


@pytest.mark.parametrize("delete", [False, True])
def test_a_used_number_is_refused_and_the_last_one_told(parts: Parts, camera: Camera, delete: bool) -> None:
    """Also after the record was deleted: a recorded request must not bring an image back."""
    old = camera.headers(PIXELS)
    record = post(parts, old).json()["record"]
    post(parts, camera.headers(PIXELS))
    other = bytes(36)
    answer = post(parts, camera.headers(other, sequence=1), other)
    refused(parts, answer, 409, "sequence", stored=2)
    assert answer.headers["flep-last-sequence"] == "2"
    if delete:
        parts.database.delete([record])
        refused(parts, post(parts, old), 409, "sequence", stored=1)
    else:
        assert post(parts, old).status_code == 200


def test_numbers_are_strictly_increasing_and_may_have_gaps(parts: Parts, camera: Camera) -> None:
    assert post(parts, camera.headers(PIXELS, sequence=9)).status_code == 201
    refused(parts, post(parts, camera.headers(PIXELS, sequence=8)), 409, "sequence", stored=1)
    assert post(parts, camera.headers(PIXELS, sequence=10)).status_code == 201


def test_the_replay_window_survives_a_restart(tmp_path: Path) -> None:
    camera = Camera()
    with gateway_parts(tmp_path / "owner") as parts:
        approved(parts, camera.statement(parts.home))
        headers = camera.headers(PIXELS)
        record = post(parts, headers).json()["record"]
        parts.database.delete([record])
    with gateway_parts(tmp_path / "owner") as parts:
        assert post(parts, headers).status_code == 409
        assert parts.database.count() == 0


def test_an_unknown_device_and_a_wrong_signature_are_one_answer(parts: Parts, camera: Camera) -> None:
    stranger = Camera("cam-9")
    answers = [
        post(parts, stranger.headers(PIXELS)),
        post(parts, camera.headers(PIXELS, key=stranger.key)),
        post(parts, camera.headers(PIXELS) | {CAPTURE_HEADER: camera.headers(PIXELS)[CAPTURE_HEADER]}),
    ]
    for answer in answers:
        refused_quietly = (answer.status_code, answer.content, sorted(answer.headers.items()))
        assert refused_quietly == (401, answers[0].content, sorted(answers[0].headers.items()))
    assert parts.database.count() == 0
    details = [line["detail"] for line in parts.events()[-3:]]
    assert details[0].startswith("unknown device") and details[1].startswith("wrong signature")


def test_an_unknown_device_costs_a_signature_check_like_a_known_one(
    parts: Parts, camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flep_fl.data_owner.gateway import ingest

    checks: list[int] = []
    real = ingest.verify_capture
    monkeypatch.setattr(ingest, "verify_capture", lambda *a: (checks.append(1), real(*a))[1])
    post(parts, Camera("cam-9").headers(PIXELS))
    post(parts, camera.headers(PIXELS, key=Ed25519PrivateKey.generate()))
    assert len(checks) == 2


def test_a_suspended_device_is_told_so_and_strangers_are_not(parts: Parts, camera: Camera) -> None:
    approved(parts, camera.statement(parts.home, "suspend"))
    refused(parts, post(parts, camera.headers(PIXELS)), 403, "device_suspended")
    refused(parts, post(parts, Camera("cam-1").headers(PIXELS)), 401, "unauthorised")
    approved(parts, camera.statement(parts.home, generation=1))
    assert post(parts, camera.headers(PIXELS)).status_code == 201


def test_a_device_that_waits_for_approvals_or_whose_have_expired_is_told_so(tmp_path: Path) -> None:
    camera = Camera()
    with gateway_parts(tmp_path / "owner", administrators=["admin", "bob"], threshold=2) as parts:
        approved(parts, camera.statement(parts.home))
        refused(parts, post(parts, camera.headers(PIXELS)), 403, "device_pending")
        approved(parts, camera.statement(parts.home, administrator="bob"))
        assert post(parts, camera.headers(PIXELS)).status_code == 201
        parts.now[0] = time.time() + 366 * 86400
        headers = camera.headers(PIXELS, time=int(parts.now[0] * 1e6))
        refused(parts, post(parts, headers), 403, "device_expired", stored=1)


def test_a_device_feeds_its_own_data_sets_only(parts: Parts, camera: Camera) -> None:
    parts.database.add_dataset("welds", ("fine", "scratch"))
    refused(parts, post(parts, camera.headers(PIXELS, dataset="welds")), 403, "dataset")
    approved(parts, camera.statement(parts.home, datasets=["plates", "nowhere"], now=time.time() + 1))
    refused(parts, post(parts, camera.headers(PIXELS, dataset="nowhere")), 404, "unknown_dataset")


@pytest.mark.parametrize(
    ("offset", "code"), [(-31 * 86400, "too_old"), (-29 * 86400, None), (100, None), (200, "clock")]
)
def test_clocks_may_differ_within_the_policy(
    parts: Parts, camera: Camera, offset: int, code: str | None
) -> None:
    answer = post(parts, camera.headers(PIXELS, time=int((time.time() + offset) * 1e6)))
    if code is None:
        assert answer.status_code == 201
    else:
        refused(parts, answer, 400, code)


def test_an_altered_image_is_refused(parts: Parts, camera: Camera) -> None:
    altered = bytes([PIXELS[0] ^ 1]) + PIXELS[1:]
    refused(parts, post(parts, camera.headers(PIXELS), altered), 400, "digest")
    assert post(parts, camera.headers(PIXELS)).status_code == 201


@pytest.mark.parametrize(
    ("image", "change", "status", "code"),
    [
        (PIXELS[:-1], {}, 422, "image_format"),
        (b"", {}, 400, "empty"),
        (b"no png", {"format": "png", "shape": ()}, 422, "image_format"),
        (bytes(5000), {"shape": (50, 100)}, 422, "image_format"),
        (bytes(36), {"shape": (6, 1, 6)}, 422, "image_format"),
        (PIXELS, {"label": "dent"}, 422, "label"),
    ],
)
def test_what_cannot_be_decoded_or_labelled_is_refused(
    parts: Parts, camera: Camera, image: bytes, change: dict[str, Any], status: int, code: str
) -> None:
    refused(parts, post(parts, camera.headers(image, **change), image), status, code)


def test_an_oversized_body_is_refused_before_it_is_read(parts: Parts, camera: Camera) -> None:
    image = bytes((1 << 16) + 1)
    answer = post(parts, camera.headers(image, shape=(1, len(image))), image)
    refused(parts, answer, 413, "too_large")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("missing", [CAPTURE_HEADER, SIGNATURE_HEADER])
def test_a_missing_or_garbled_header_is_refused(parts: Parts, camera: Camera, missing: str) -> None:
    headers = camera.headers(PIXELS)
    value = headers.pop(missing)
    refused(parts, post(parts, headers), 400, "capture")
    refused(parts, post(parts, headers | {missing: value + "="}), 400, "capture")


def test_pixels_labels_and_keys_stay_out_of_the_audit_log(parts: Parts, camera: Camera) -> None:
    secret = np.random.default_rng(1).integers(0, 256, 36, dtype=np.uint8).tobytes()
    assert post(parts, camera.headers(secret), secret).status_code == 201
    post(parts, camera.headers(secret, label="canary-label"), secret)
    log = b"".join(path.read_bytes() for path in parts.home.audit.iterdir())
    private = parts.home.signing_key().private_bytes_raw()
    for hidden in (secret, secret.hex().encode(), b"canary-label", b"scratch", private.hex().encode()):
        assert hidden not in log


# --- limits -----------------------------------------------------------------------------------------


def test_a_device_that_sends_too_fast_waits(tmp_path: Path) -> None:
    camera, other = Camera(), Camera("cam-2")
    with gateway_parts(tmp_path / "owner", limits=Limits(rate=0.5, burst=2)) as parts:
        for one in (camera, other):
            approved(parts, one.statement(parts.home))
        answers = [post(parts, camera.headers(PIXELS)) for _ in range(3)]
        assert [a.status_code for a in answers] == [201, 201, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 2
        forged = Camera("cam-2")
        for _ in range(5):
            assert post(parts, forged.headers(PIXELS)).status_code == 401
        assert post(parts, other.headers(PIXELS)).status_code == 201, (
            "a stranger cannot use up a device's rate"
        )


def test_one_address_is_limited_before_it_proved_anything(tmp_path: Path) -> None:
    with gateway_parts(tmp_path / "owner", limits=Limits(peer_rate=0.1, peer_burst=3)) as parts:
        found = [post(parts, Camera("x").headers(PIXELS)).status_code for _ in range(5)]
    assert found == [401, 401, 401, 429, 429]


def test_what_does_not_fit_is_refused_at_once_and_nothing_queues(parts: Parts) -> None:
    """Thirty requests at once, places for four: four wait for the database, the others get 503."""
    cameras = [Camera(f"cam-{n}") for n in range(30)]
    for camera in cameras:
        approved(parts, camera.statement(parts.home))
    parts.listeners["ingest"].admission = Admission(4, 4)

    async def go() -> list[httpx.Response]:
        async with parts.client("ingest") as client:
            return await asyncio.gather(
                *(client.post(CAPTURES, content=PIXELS, headers=c.headers(PIXELS)) for c in cameras)
            )

    answers = asyncio.run(go())
    busy = [answer for answer in answers if answer.status_code == 503]
    assert 0 < len(busy) <= 26 and len(answers) - len(busy) == parts.database.count()
    assert all(answer.headers["retry-after"] == "1" for answer in busy)
    assert parts.listeners["ingest"].admission.most <= 4
    parts.listeners["ingest"].flush()
    assert parts.events()[-1]["event"] == "refused.sum" and parts.events()[-1]["count"] == len(busy)


def test_health_answers_when_every_place_is_taken(parts: Parts) -> None:
    parts.listeners["ingest"].admission = Admission(0, 0)
    assert ask(parts, "ingest", "GET", "/health").json() == {"status": "ok"}
    assert ask(parts, "ingest", "GET", "/v1/nothing").status_code == 503


def stop_refill(listener: Listener) -> None:
    """Stop the clock of what may be logged line by line, so that a slow machine counts the same."""
    for buckets in (listener._audited, listener._audited_of_all):
        buckets._clock = lambda: 0.0


def test_a_flood_of_refusals_does_not_fill_the_log(parts: Parts) -> None:
    before = len(parts.events())
    stop_refill(parts.listeners["ingest"])
    for _ in range(300):
        ask(parts, "ingest", "GET", "/v1/nothing/there", headers={"transfer-encoding": "chunked"})
    assert len(parts.events()) - before == 50
    parts.listeners["ingest"].flush()
    sums = [line for line in parts.events() if line["event"] == "refused.sum"]
    assert sum(line["count"] for line in sums) + len(parts.events()) - before - len(sums) == 300


def test_buckets_refill_and_are_bounded() -> None:
    now = [0.0]
    buckets = TokenBuckets(2.0, 3, clock=lambda: now[0], limit=10)
    for _ in range(3):
        buckets.take("a")
    with pytest.raises(Refusal) as caught:
        buckets.take("a")
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    now[0] = 0.5
    buckets.take("a")
    for number in range(50):
        buckets.take(str(number))
    assert len(buckets) == 10


# --- requests as such -------------------------------------------------------------------------------


class RawGuard:
    """Drives a guard with exact ASGI messages."""

    def __init__(self, listener: Listener) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 299, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        self._guard = Guard(app, listener)

    def status(self, headers: list[tuple[bytes, bytes]], method: str = "POST", path: str = "/x") -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
        }
        asyncio.run(self._guard(scope, receive, send))
        return int(sent[0]["status"])


def test_ambiguous_framing_is_refused(parts: Parts) -> None:
    guard = RawGuard(parts.listeners["ingest"])
    length = (b"content-length", b"0")
    assert guard.status([length]) == 299
    assert guard.status([]) == 411
    assert guard.status([], method="GET") == 299
    assert guard.status([length, (b"transfer-encoding", b"chunked")]) == 400
    assert guard.status([(b"transfer-encoding", b"identity")], method="GET") == 400
    assert guard.status([length, length]) == 400
    assert guard.status([(b"content-length", b"+5")]) == 400
    assert guard.status([(b"content-length", b"0x5")]) == 400
    assert guard.status([(b"content-length", "٣".encode())]) == 400
    assert guard.status([length, (b"upgrade", b"websocket")]) == 400
    assert guard.status([length, (b"x", b"1"), (b"x", b"2")]) == 400
    assert guard.status([length], path="/" + "x" * 3000) == 414


@pytest.mark.parametrize(
    ("listener", "path"),
    [
        (name, path)
        for name in ("ingest", "release", "admin")
        for path in ("/docs", "/redoc", "/openapi.json")
    ],
)
def test_no_listener_describes_itself(parts: Parts, listener: str, path: str) -> None:
    assert ask(parts, listener, "GET", path).status_code == 404


def test_errors_look_alike(parts: Parts) -> None:
    for answer in (
        ask(parts, "ingest", "GET", CAPTURES),
        ask(parts, "ingest", "GET", "/nothing"),
        ask(parts, "release", "PUT", "/v1/grants", content=b""),
    ):
        assert set(answer.json()) == {"code", "reason"} and answer.status_code in (404, 405)


def test_a_bug_is_told_to_the_operator_alone(parts: Parts, camera: Camera, caplog: Any) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    parts.database.submit = broken  # type: ignore[assignment]
    answer = post(parts, camera.headers(PIXELS))
    assert answer.status_code == 500 and b"secret" not in answer.content
    assert parts.events()[-1]["detail"] == "ZeroDivisionError"
    assert "secret detail" in caplog.text


# --- administrators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/status", "/v1/devices", "/v1/audit/head"])
def test_administration_needs_an_administrators_signature(parts: Parts, path: str) -> None:
    admin = parts.home.administrator_key("admin")
    headers = parts.signed("GET", path, admin)
    assert ask(parts, "admin", "GET", path, headers=headers).status_code == 200
    again = ask(parts, "admin", "GET", path, headers=headers)
    assert again.status_code == 401 and again.json()["reason"].startswith("the request was made before")
    stranger = Ed25519PrivateKey.generate()
    for bad in ({}, parts.signed("GET", path, stranger), parts.signed("GET", path + "x", admin)):
        answer = ask(parts, "admin", "GET", path, headers=bad)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorised")


def test_a_bad_approval_is_refused_by_name(parts: Parts) -> None:
    camera = Camera()
    good = camera.statement(parts.home)
    forged = json.loads(good) | {"device": "cam-2"}
    for body, status in ((b"{", 400), (json.dumps(forged).encode(), 409), (b"x" * 20_000, 413)):
        assert ask(parts, "admin", "POST", "/v1/approvals", content=body).status_code == status
    assert parts.registry.names() == []


def test_an_approval_is_in_the_log_and_on_disk(parts: Parts, camera: Camera) -> None:
    line = next(line for line in parts.events() if line["event"] == "device.approved")
    assert (line["administrator"], line["device"], line["standing"]) == ("admin", "cam-1", "enrolled")
    assert camera.public.encode() in parts.home.devices.read_bytes()


# --- analysts ---------------------------------------------------------------------------------------


@pytest.fixture
def analyst() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def granted(parts: Parts, camera: Camera, analyst: Ed25519PrivateKey, images: int = 3) -> str:
    from flep_fl.private_database.grants import create_grant

    for _ in range(images):
        assert post(parts, camera.headers(PIXELS)).status_code == 201
    parts.book.release(DATASET)
    keys = Analyst(
        "site-a",
        analyst.public_key().public_bytes_raw(),
        X25519PrivateKey.generate().public_key().public_bytes_raw(),
    )
    return create_grant(parts.database, analyst=keys, dataset=DATASET, not_after=time.time() + 86400).grant_id


def fetch(parts: Parts, analyst: Ed25519PrivateKey, target: str, method: str = "GET") -> httpx.Response:
    return ask(parts, "release", method, target, headers=parts.signed(method, target, analyst))


def test_an_analyst_opens_a_grant_and_pages_through_it(
    parts: Parts, camera: Camera, analyst: Ed25519PrivateKey
) -> None:
    grant = granted(parts, camera, analyst)
    assert fetch(parts, analyst, "/v1/grants").json()["grants"][0]["grant_id"] == grant
    opened = fetch(parts, analyst, f"/v1/grants/{grant}/open", "POST").json()
    base = f"/v1/grants/{grant}/releases/{opened['release_id']}"
    first = fetch(parts, analyst, f"{base}/records?cursor=0&limit=2")
    assert first.status_code == 200 and "flep-cursor" in first.headers
    rest = fetch(parts, analyst, f"{base}/records?cursor={first.headers['flep-cursor']}&limit=2")
    assert rest.status_code == 200 and "flep-cursor" not in rest.headers
    assert len(fetch(parts, analyst, f"{base}/index").content) == 3 * 57
    line = parts.events()[-1]
    assert (line["event"], line["records"], line["grant"]) == ("records.released", 1, grant)


def test_strangers_and_revoked_analysts_get_nothing(
    parts: Parts, camera: Camera, analyst: Ed25519PrivateKey
) -> None:
    from flep_fl.private_database.grants import revoke_grant

    grant = granted(parts, camera, analyst)
    release = fetch(parts, analyst, f"/v1/grants/{grant}/open", "POST").json()["release_id"]
    target = f"/v1/grants/{grant}/releases/{release}/records"
    assert fetch(parts, Ed25519PrivateKey.generate(), target).status_code == 404
    assert ask(parts, "release", "GET", target).status_code == 401
    assert fetch(parts, analyst, target).status_code == 200
    revoke_grant(parts.database, grant)
    assert fetch(parts, analyst, target).json()["code"] == "grant_revoked"


def test_a_request_counts_once_for_one_owner_and_for_minutes(
    parts: Parts, camera: Camera, analyst: Ed25519PrivateKey
) -> None:
    from gateways import signed

    granted(parts, camera, analyst)
    target, home = "/v1/grants", parts.home
    headers = parts.signed("GET", target, analyst)
    assert ask(parts, "release", "GET", target, headers=headers).status_code == 200
    assert ask(parts, "release", "GET", target, headers=headers).status_code == 401
    now = int(time.time())
    for bad in (
        signed(home, "GET", target, analyst, created=now - 301),
        signed(home, "GET", target, analyst, created=now + 310),
        signed(home, "GET", target, analyst, audience=bytes(32)),
        signed(home, "POST", target, analyst),
        signed(home, "GET", target + "?x=1", analyst),
        signed(home, "GET", target, analyst, b"body"),
    ):
        assert ask(parts, "release", "GET", target, headers=bad).status_code == 401


@pytest.mark.parametrize(
    "query",
    ["cursor=-1", "cursor=x", "limit=0", "cursor=1&cursor=2", "other=1", "cursor", "limit=1e3", "&&&"],
)
def test_wrong_queries_are_refused(
    parts: Parts, camera: Camera, analyst: Ed25519PrivateKey, query: str
) -> None:
    grant = granted(parts, camera, analyst, 1)
    answer = fetch(parts, analyst, f"/v1/grants/{grant}/releases/{grant}/records?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "query")


def test_a_nonce_is_never_taken_twice_and_memory_is_bounded() -> None:
    memory = NonceMemory(per_caller=3, limit=100, seconds=10)
    assert all(memory.use(b"k", str(n), n, 5.0) for n in range(3))
    assert not memory.use(b"k", "0", 0, 9.0)
    assert memory.use(b"k", "3", 3, 9.0) and len(memory) == 3
    assert not memory.use(b"k", "0", 0, 9.0), "forgotten, and from a time that is closed for its caller"
    assert not memory.use(b"k", "new", 0, 9.0)
    assert memory.use(b"other", "0", 0, 9.0), "nobody else's time is closed"
    assert memory.use(b"k", "4", 30, 30.0) and len(memory) == 1, "what is too old to be taken is forgotten"


def test_an_old_request_does_not_come_back_with_a_clock_that_is_set_back() -> None:
    memory = NonceMemory(seconds=10)
    assert memory.use(b"k", "a", 100, 100.0)
    assert memory.use(b"q", "b", 200, 200.0)
    assert len(memory) == 1 and not memory.knows(b"q", "c", 101)
    assert not memory.use(b"k", "a", 100, 100.0)


def test_a_caller_with_a_wrong_clock_closes_no_ones_time_but_his_own() -> None:
    """His floor lies in the future, and all that he used besides runs out before it does."""
    memory = NonceMemory(per_caller=4, seconds=10)
    assert memory.use(b"bad", "future", 110, 100.0)
    assert all(memory.use(b"bad", f"late {number}", 91, 100.0) for number in range(4))
    assert not memory.use(b"bad", "x", 105, 100.0), "up to 110 he has closed his own time"
    assert memory.use(b"good", "g", 102, 102.0)
    assert memory.use(b"good", "h", 103, 103.0)
    assert not memory.use(b"bad", "y", 105, 103.0)
    assert memory.use(b"bad", "z", 111, 111.0)


def test_colluding_callers_fill_nobodys_memory_but_their_own() -> None:
    """Four callers at full tilt, one quiet one: his nonces stay, and no replay of anybody is taken."""
    memory = NonceMemory(per_caller=50, limit=120, seconds=300)
    assert memory.use(b"quiet", "q", 1000, 1000.0)
    used = []
    for number in range(400):
        for bad in (b"b1", b"b2", b"b3", b"b4"):
            created = 1000 + number // 10
            assert memory.use(bad, str(number), created, 1000.0 + number // 10), "their own go on, too"
            used.append((bad, str(number), created))
        assert len(memory) <= 120
    assert memory.use(b"quiet", "r", 1001, 1040.0), "the quiet one's time is open as before"
    assert not memory.use(b"quiet", "q", 1000, 1040.0)
    assert not any(memory.use(*one, 1040.0) for one in used)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from((b"a", b"b", b"c")), st.integers(0, 5), st.integers(-30, 30)), max_size=60
    ),
    jumps=st.lists(st.integers(-40, 60), min_size=60, max_size=60),
)
def test_whatever_clocks_and_callers_do_no_request_counts_twice(
    steps: list[tuple[bytes, int, int]], jumps: list[int]
) -> None:
    memory, now, taken = NonceMemory(per_caller=4, limit=8, seconds=30), 1000, set()
    for (key, number, offset), jump in zip(steps, jumps, strict=False):
        now = max(0, now + jump)
        created = max(0, now + offset)
        one = (key, f"{number}-{created}", created)
        if memory.use(*one, float(now)):
            assert one not in taken
            taken.add(one)
        assert len(memory) <= 8


def test_an_analyst_over_the_rate_is_refused_and_a_repetition_costs_nothing(
    tmp_path: Path, analyst: Ed25519PrivateKey
) -> None:
    camera, other = Camera(), Ed25519PrivateKey.generate()
    with gateway_parts(tmp_path / "owner", limits=Limits(rate=0.001, burst=3)) as parts:
        approved(parts, camera.statement(parts.home))
        granted(parts, camera, analyst, images=1)
        granted(parts, camera, other, images=1)
        codes = [fetch(parts, analyst, "/v1/grants").status_code for _ in range(8)]
        assert codes == [200] * 3 + [429] * 5
        headers = parts.signed("GET", "/v1/grants", other)
        again = [ask(parts, "release", "GET", "/v1/grants", headers=headers).status_code for _ in range(5)]
        assert again == [200] + [401] * 4
        assert fetch(parts, other, "/v1/grants").status_code == 200, "a repetition costs nothing"


def test_four_analysts_who_flood_do_not_lock_a_fifth_out(
    tmp_path: Path, analyst: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        NonceMemory.__init__, "__kwdefaults__", {"per_caller": 5, "limit": 12, "seconds": 300}
    )
    camera, colluding = Camera(), [Ed25519PrivateKey.generate() for _ in range(4)]
    with gateway_parts(tmp_path / "owner") as parts:
        approved(parts, camera.statement(parts.home))
        for one in (analyst, *colluding):
            granted(parts, camera, one, images=1)
        mine = parts.signed("GET", "/v1/grants", analyst)
        assert ask(parts, "release", "GET", "/v1/grants", headers=mine).status_code == 200
        for _ in range(10):
            for one in colluding:
                fetch(parts, one, "/v1/grants")
        assert fetch(parts, analyst, "/v1/grants").status_code == 200
        assert ask(parts, "release", "GET", "/v1/grants", headers=mine).status_code == 401


# --- places -----------------------------------------------------------------------------------------


def test_a_place_counts_for_its_caller_and_moves_with_him() -> None:
    admission = Admission(3, 2)
    first, second = admission.enter("peer 1"), admission.enter("peer 1")
    with pytest.raises(Refusal) as caught:
        admission.enter("peer 1")
    assert caught.value.status == 503
    first.belongs_to("caller a")
    third = admission.enter("peer 1")
    with pytest.raises(Refusal):
        admission.enter("peer 2")
    second.belongs_to("caller a")
    with pytest.raises(Refusal):
        third.belongs_to("caller a")
    for place in (first, first, second, third):
        place.leave()
    assert admission.taken == 0
    assert all(admission.enter("caller a") for _ in range(2)), "what was left is free again"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("not an address", "another", False),
    ],
)
def test_one_hosts_addresses_count_as_one(one: str, other: str, same: bool) -> None:
    assert (peer_key(one) == peer_key(other)) is same


class Stalled:
    """Requests whose bodies never come, straight into a listener's application."""

    def __init__(self, parts: Parts, listener: str) -> None:
        self._app, self.answers = parts.apps[listener], []

    async def send(self, method: str, path: str, headers: dict[str, str], *, length: int, peer: str) -> None:
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [*pairs, (b"content-length", str(length).encode())],
            "client": (peer, 1),
        }

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.answers.append(message["status"])

        await self._app(scope, receive, send)


@pytest.mark.parametrize(
    ("listener", "method", "path", "status"),
    [
        ("release", "GET", "/v1/owner", 413),
        ("release", "GET", "/v1/grants", 413),
        ("release", "POST", "/v1/grants/00/open", 413),
        ("release", "GET", "/v1/grants/00/releases/00/index", 413),
        ("release", "GET", "/v1/grants/00/releases/00/records", 413),
        ("admin", "GET", "/v1/status", 413),
        ("admin", "GET", "/v1/devices", 413),
        ("admin", "GET", "/v1/audit/head", 413),
        ("admin", "POST", "/v1/approvals", None),
        ("ingest", "POST", CAPTURES, None),
    ],
)
def test_strangers_are_waited_for_in_no_place(
    parts: Parts, listener: str, method: str, path: str, status: int | None
) -> None:
    """A hundred requests of one address, each with a body that does not come: every place stays free."""
    stalled, stranger = Stalled(parts, listener), Camera("stranger")

    async def go() -> None:
        waiting = [
            asyncio.ensure_future(
                stalled.send(method, path, stranger.headers(PIXELS), length=900, peer="10.9.9.9")
            )
            for _ in range(100)
        ]
        await asyncio.sleep(0.3)
        assert parts.listeners[listener].admission.taken == 0
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(go())
    assert stalled.answers == ([status] * 100 if status else [])


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.disconnect"}],
        [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}],
        [{"type": "http.request", "body": b"abc", "more_body": False}],
        [{"type": "http.request", "body": b"abcdefghi", "more_body": False}],
        [{"type": "http.request", "body": b"abcd", "more_body": True}] * 3,
    ],
    ids=["gone", "gone half way", "short", "long", "long in parts"],
)
def test_a_body_that_is_not_whole_is_no_body(parts: Parts, messages: list[dict[str, Any]]) -> None:
    left = list(messages)

    async def receive() -> Any:
        return left.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"content-length", b"8")]}
    exchange = Exchange(scope, receive, parts.listeners["ingest"])
    exchange.check_head()
    with pytest.raises(Refusal) as caught:
        asyncio.run(exchange.body())
    assert (caught.value.status, caught.value.code) == (400, "framing")


def test_analysts_who_were_looked_up_are_forgotten_again(
    parts: Parts, camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flep_fl.data_owner.gateway.release._KNOWN_LIMIT", 2)
    release = Release(parts.book, parts.listeners["release"], owner_key=parts.home.owner_key)
    parts.apps["release"] = release_app(release, parts.listeners["release"])
    for _ in range(4):
        analyst = Ed25519PrivateKey.generate()
        granted(parts, camera, analyst, 1)
        assert [fetch(parts, analyst, "/v1/grants").status_code for _ in range(2)] == [200, 200]
    assert len(release._known) == 2


def test_who_was_waited_for_outside_of_the_places_needs_one_afterwards(parts: Parts) -> None:
    """An approval's body arrives when the only place is taken: busy, and nothing is approved."""
    listener, statement = parts.listeners["admin"], Camera().statement(parts.home)
    listener.admission = Admission(1, 1)

    async def go() -> int:
        arrives = asyncio.Event()

        async def body() -> Any:
            await arrives.wait()
            yield statement

        async with parts.client("admin") as client:
            headers = {"content-length": str(len(statement))}
            request = asyncio.ensure_future(client.post("/v1/approvals", content=body(), headers=headers))
            await asyncio.sleep(0.2)
            place = listener.admission.enter("somebody else")
            arrives.set()
            status = (await request).status_code
            place.leave()
        return status

    assert asyncio.run(go()) == 503
    assert parts.registry.names() == []


@pytest.mark.parametrize(("change", "length", "status"), [({}, 900, 422), ({"shape": (30, 30)}, 35, 422)])
def test_what_the_description_alone_shows_is_refused_before_the_body(
    parts: Parts, camera: Camera, change: dict[str, Any], length: int, status: int
) -> None:
    """The body never comes, and the answer is there all the same."""
    stalled = Stalled(parts, "ingest")

    async def go() -> None:
        request = stalled.send(
            "POST", CAPTURES, camera.headers(PIXELS, **change), length=length, peer="10.9.9.9"
        )
        async with asyncio.timeout(8):
            await request

    asyncio.run(go())
    assert stalled.answers == [status]


def test_a_device_holds_one_place_while_its_body_is_waited_for(parts: Parts, camera: Camera) -> None:
    stalled = Stalled(parts, "ingest")

    async def go() -> None:
        waiting = [
            asyncio.ensure_future(
                stalled.send("POST", CAPTURES, camera.headers(PIXELS), length=36, peer="10.9.9.9")
            )
            for _ in range(20)
        ]
        await asyncio.sleep(0.3)
        assert parts.listeners["ingest"].admission.taken == 1
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert parts.listeners["ingest"].admission.taken == 0

    asyncio.run(go())


def test_an_analyst_has_so_many_places_and_others_have_theirs(
    parts: Parts, camera: Camera, analyst: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant, other = granted(parts, camera, analyst, 1), Ed25519PrivateKey.generate()
    granted(parts, camera, other, 1)
    assert fetch(parts, analyst, "/v1/grants").status_code == 200
    slow = parts.book.open_grant
    gate = threading.Event()
    monkeypatch.setattr(parts.book, "open_grant", lambda *a: (gate.wait(10), slow(*a))[1])
    target = f"/v1/grants/{grant}/open"

    async def go() -> tuple[list[int], int]:
        async with parts.client("release") as client, parts.client("release") as second:
            many = [
                asyncio.ensure_future(client.post(target, headers=parts.signed("POST", target, analyst)))
                for _ in range(20)
            ]
            await asyncio.sleep(0.2)
            one = await second.get("/v1/grants", headers=parts.signed("GET", "/v1/grants", other))
            gate.set()
            return sorted(answer.status_code for answer in await asyncio.gather(*many)), one.status_code

    codes, honest = asyncio.run(go())
    assert codes == [200] * 8 + [503] * 12 and honest == 200


def test_many_devices_behind_one_address_are_not_counted_as_one(tmp_path: Path) -> None:
    """Who proves an identity costs his address nothing: here it may make five unproved requests."""
    cameras = [Camera(f"cam-{number}") for number in range(12)]
    with gateway_parts(tmp_path / "owner", limits=Limits(peer_rate=0.01, peer_burst=5)) as parts:
        for camera in cameras:
            parts.registry.apply(Approval.from_bytes(camera.statement(parts.home)))
        codes = [post(parts, camera.headers(PIXELS)).status_code for camera in cameras for _ in range(2)]
        assert codes == [201] * 24
        strangers = [post(parts, Camera("x").headers(PIXELS)).status_code for _ in range(7)]
        assert strangers == [401] * 5 + [429] * 2
        assert ask(parts, "ingest", "GET", "/health").status_code == 429, "health is no way round it"


def test_many_addresses_do_not_fill_the_log_either(parts: Parts) -> None:
    listener, before = parts.listeners["ingest"], len(parts.events())
    stop_refill(listener)
    for number in range(3000):
        listener.connection_refused(f"2001:db8:{number:x}::1", "network_rules")
    assert len(parts.events()) - before == 500
    listener.flush()
    sums = [line for line in parts.events() if line["event"] == "refused.sum"]
    assert len(sums) <= 17
    singles = len(parts.events()) - before - len(sums)
    assert sum(line["count"] for line in sums) + singles == 3000


def test_a_refusal_with_long_and_strange_text_has_its_line(parts: Parts) -> None:
    refusal = Refusal(400, "x", "y", detail="\xff" * 5000)
    parts.listeners["ingest"].refused(refusal, peer="1.2.3.4", what="\xff" * 5000)
    assert parts.events()[-1]["code"] == "x"


# --- a full disk ------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Refuse what is written into the audit log while ``full[0]``."""
    from flep_fl.contracts.errors import AuditDiskFullError
    from flep_fl.data_owner import audit

    state, real = [False], audit._write_whole

    def write(descriptor: int, data: bytes, path: Path) -> None:
        if state[0]:
            os.write(descriptor, data[: len(data) // 2])
            raise AuditDiskFullError("full")
        real(descriptor, data, path)

    monkeypatch.setattr(audit, "_write_whole", write)
    return state


def test_without_room_for_its_line_nothing_is_acknowledged_and_later_it_goes_on(
    parts: Parts, camera: Camera, full: list[bool]
) -> None:
    headers = camera.headers(PIXELS)
    full[0] = True
    answer = post(parts, headers)
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert post(parts, Camera("x").headers(PIXELS)).status_code == 401, "a refusal needs no room"
    parts.listeners["ingest"].flush()
    full[0] = False
    again = post(parts, headers)
    assert again.status_code == 200 and parts.database.count() == 1
    parts.listeners["ingest"].flush()
    logged = [(line["event"], line.get("code")) for line in parts.events()[-4:]]
    assert ("capture.repeated", None) in logged and ("refused.sum", "unauthorised") in logged
    report = verify_log(
        parts.home.audit / LOG_NAME,
        parts.home.audit_signing_key().public_key(),
        heads=parts.home.audit / HEADS_NAME,
    )
    assert report.sound, report.findings


def test_an_approval_that_does_not_fit_on_the_disk_does_not_count(
    parts: Parts, camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it reached the disk; it is taken back, and the next one stands on a line of its own."""
    second = Camera("cam-2")
    real = os.write
    registry = parts.home.devices

    def write(descriptor: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == registry:
            return real(descriptor, data[: len(data) // 2])
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        answer = ask(parts, "admin", "POST", "/v1/approvals", content=second.statement(parts.home))
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    refused_ = post(parts, second.headers(PIXELS))
    assert refused_.status_code == 401
    approved(parts, second.statement(parts.home))
    assert post(parts, second.headers(PIXELS)).status_code == 201
    again = DeviceRegistry(registry, parts.home.administrators)
    assert again.names() == ["cam-1", "cam-2"]
