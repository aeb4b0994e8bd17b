"""The gateway as it runs: TLS, slow and hostile connections, signals, kills, and a device that plays."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import DATASET, IMAGE, ROOT, Camera, GatewayProcess, events, new_home, running_gateway

from flep_fl.contracts.errors import DeviceError, GatewayError
from flep_fl.data_owner.audit import HEADS_NAME, LOG_NAME, verify_log
from flep_fl.data_owner.certificates import TlsFiles, client_context, issue_certificate
from flep_fl.data_owner.home import OwnerHome
from flep_fl.data_owner.simulator import Device, Shot, play
from flep_fl.private_database.store import OwnerDatabase

pytestmark = pytest.mark.e2e
PIXELS = IMAGE.tobytes()


def approve(gateway: GatewayProcess, *cameras: Camera, **change: Any) -> None:
    with gateway.client("admin") as client:
        for camera in cameras:
            answer = client.post("/v1/approvals", content=camera.statement(gateway.home, **change))
            assert answer.status_code == 200, answer.text


def device(gateway: GatewayProcess, folder: Path, name: str = "cam-1") -> Device:
    made = Device.create(
        folder, name=name, gateway=gateway.url("ingest"), ca=gateway.home.root.certificate.read_bytes()
    )
    camera = Camera(name, made._key)
    approve(gateway, camera)
    return made


def shots(count: int) -> list[Any]:
    def read(number: int) -> Shot:
        image = np.full((6, 6), number, np.uint8)
        return Shot(f"shot {number}", image.tobytes(), "raw-uint8", (6, 6), "fine")

    return [lambda number=number: read(number) for number in range(count)]


def stored(home: OwnerHome) -> dict[tuple[str, int], bytes]:
    """Read every record back: (device, sequence) -> pixels; a half record would not open."""
    with OwnerDatabase(home.database, home.database_key()) as database:
        found = [(record.tags, record.image.tobytes()) for record in database.records()]
    pixels = {(tags.device, tags.sequence): image for tags, image in found}
    assert len(pixels) == len(found), "a capture was stored twice"
    return pixels


def sound(home: OwnerHome) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(home.audit_key)
    report = verify_log(home.audit / LOG_NAME, key, heads=home.audit / HEADS_NAME)
    assert report.sound, report.findings


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """One gateway for the tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("gateway")
    quick = ("ingest.header_seconds=0.5", "ingest.body_seconds=0.5", "ingest.connections_per_peer=12")
    with running_gateway(new_home(folder / "owner"), folder, *quick) as running:
        yield running


@contextlib.contextmanager
def raw(gateway: GatewayProcess, data: bytes = b"") -> Iterator[ssl.SSLSocket]:
    """Open a TLS connection and send bytes as they are."""
    context = client_context(gateway.home.root.certificate)
    with (
        socket.create_connection(("127.0.0.1", gateway.ports["ingest"]), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        secured.sendall(data)
        yield secured


def answer(connection: socket.socket) -> bytes:
    """Read until the gateway ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while chunk := connection.recv(65536):
            found += chunk
    return found


def test_all_three_listeners_speak_tls_1_3_under_the_owners_root(gateway: GatewayProcess) -> None:
    for listener in ("ingest", "release", "admin"):
        with gateway.client(listener) as client:
            assert client.get("/health").json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(gateway.url(listener) + "/health", trust_env=False)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            httpx.get(gateway.url(listener).replace("https", "http") + "/health", trust_env=False)
    old = client_context(gateway.home.root.certificate)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        httpx.get(gateway.url("ingest") + "/health", verify=old, trust_env=False)


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (
            b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (b"POST /v1/captures HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (
            b"POST /v1/captures HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            400,
        ),
        (b"POST /v1/captures HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\nhello", 400),
        (b"POST /v1/captures HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello", 400),
        (b"POST /v1/captures HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/captures HTTP/1.1\r\nHost: x\r\n\r\n", 411),
        (b"POST /v1/captures HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01 nonsense\r\n\r\n", 400),
    ],
)
def test_hostile_framing_is_refused_and_the_connection_ends(
    gateway: GatewayProcess, request_head: bytes, status: int
) -> None:
    with raw(gateway, request_head) as connection:
        found = answer(connection)
    assert re.findall(rb"HTTP/1\.1 (\d+)", found) == [str(status).encode()], found
    with raw(gateway, request_head + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        found = answer(connection)
    assert b'"status":"ok"' not in found, "a second request was read out of the first one's rest"


def test_pipelined_requests_do_not_queue(gateway: GatewayProcess) -> None:
    one = b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    with raw(gateway, one * 50) as connection:
        assert answer(connection).count(b"HTTP/1.1 404") <= 1


@pytest.mark.parametrize(
    "start", [b"", b"\r\n", b"GET /health HT", b"GET /health HTTP/1.1\r\nX: 1\r\n"], ids=range(4)
)
def test_a_client_that_never_finishes_its_head_is_dropped(gateway: GatewayProcess, start: bytes) -> None:
    began = time.monotonic()
    with raw(gateway, start) as connection:
        assert answer(connection) == b""
    assert time.monotonic() - began < 8


def test_a_client_that_drips_is_dropped(gateway: GatewayProcess) -> None:
    with raw(gateway, b"GET /health HTTP/1.1\r\n") as connection, contextlib.suppress(OSError):
        for number in range(60):
            connection.sendall(b"X-%d: 1\r\n" % number)
            time.sleep(0.1)
        raise AssertionError("six seconds of one head were waited for")


def test_an_endless_head_is_cut_off(gateway: GatewayProcess) -> None:
    with raw(gateway, b"GET /health HTTP/1.1\r\nX: ") as connection, contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"y" * 4096)
        found = answer(connection)
        assert found == b"" or found.startswith(b"HTTP/1.1 431 "), found


def test_a_body_that_does_not_come_is_not_waited_for(gateway: GatewayProcess) -> None:
    camera = Camera("slow")
    approve(gateway, camera)
    head = "".join(f"{name}: {value}\r\n" for name, value in camera.headers(PIXELS).items())
    request = f"POST /v1/captures HTTP/1.1\r\nHost: x\r\nContent-Length: 36\r\n{head}\r\n".encode()
    with raw(gateway, request + PIXELS[:10]) as connection:
        assert b" 408 " in answer(connection)
    with gateway.client("ingest") as client:
        headers = camera.headers(PIXELS)
        assert client.post("/v1/captures", content=PIXELS, headers=headers).status_code == 201


def test_a_handshake_that_does_not_come_is_not_waited_for(gateway: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", gateway.ports["ingest"]), timeout=10) as silent:
        assert silent.recv(1) == b""


def test_one_peer_has_so_many_connections_and_gets_them_back(gateway: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", gateway.ports["ingest"])
        held = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(12)]
        time.sleep(0.2)
        extra = stack.enter_context(socket.create_connection(address, timeout=0.5))
        assert extra.recv(1) == b"", "the thirteenth is closed at once"
        assert held[0] is not None
    time.sleep(0.3)
    with gateway.client("ingest") as client:
        assert client.get("/health").status_code == 200


def test_a_taken_port_is_named(gateway: GatewayProcess, tmp_path: Path) -> None:
    other = new_home(tmp_path / "owner")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.owner", "action=serve", *gateway.options(), f"home={other.folder}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "PortInUseError" in done.stderr and str(gateway.ports["ingest"]) in done.stderr
    assert not (other.audit / LOG_NAME).exists()


def test_two_gateways_do_not_share_a_home(gateway: GatewayProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.owner", "action=serve", *gateway.options()],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "another process serves this home" in done.stderr


def test_commands_reach_the_running_gateway(gateway: GatewayProcess, tmp_path: Path) -> None:
    def owner(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "scripts.owner", *arguments, *gateway.options(), f"devices={tmp_path}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "enrolled for plates" in owner("action=enrol", "device=hall-3", f"dataset={DATASET}")
    assert "hall-3: enrolled" in owner("action=devices")
    assert "hall-3: suspended" in owner("action=suspend", "device=hall-3")
    assert '"queue"' in owner("action=status")
    head = tmp_path / "head.json"
    owner("action=audit", f"out={head}")
    assert "sound" in owner("action=audit", f"heads=[{head}]")


def test_network_rules_hold_inside_the_gateway(tmp_path: Path) -> None:
    """Loopback has sixteen million addresses: 127.7.0.0/16 are the devices, everybody else is nobody."""
    home = new_home(tmp_path / "owner")
    with running_gateway(home, tmp_path, ingest="127.7.0.0/16") as gateway:
        address = ("127.0.0.1", gateway.ports["ingest"])
        context = client_context(home.root.certificate)
        with (
            socket.create_connection(address, timeout=10, source_address=("127.7.0.9", 0)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            secured.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in answer(secured)
        with socket.create_connection(address, timeout=10, source_address=("127.8.0.9", 0)) as refused:
            assert answer(refused) == b""
        assert gateway.stop()[0] == 0
    refusals = [line for line in events(home) if line["event"] == "connection.refused"]
    assert [(line["peer"], line["code"]) for line in refusals] == [("127.8.0.9", "network_rules")]


def test_client_certificates_can_be_demanded(tmp_path: Path) -> None:
    home = new_home(tmp_path / "owner")
    files = TlsFiles(tmp_path / "client.crt", tmp_path / "client.key")
    issue_certificate(home.root, files, name="cam-1", client=True)
    with running_gateway(home, tmp_path, f"ingest.client_ca={home.root.certificate}") as gateway:
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)), gateway.client("ingest") as client:
            client.get("/health")
        context = client_context(home.root.certificate, files)
        assert (
            httpx.get(gateway.url("ingest") + "/health", verify=context, trust_env=False).status_code == 200
        )


def test_sigterm_finishes_what_has_begun_and_exits_0(tmp_path: Path) -> None:
    home = new_home(tmp_path / "owner")
    with running_gateway(home, tmp_path) as gateway:
        camera = Camera()
        approve(gateway, camera)
        codes: list[int] = []
        stop = threading.Event()

        def send() -> None:
            with gateway.client("ingest") as client, contextlib.suppress(httpx.TransportError):
                while not stop.is_set():
                    headers = camera.headers(PIXELS)
                    codes.append(client.post("/v1/captures", content=PIXELS, headers=headers).status_code)

        sender = threading.Thread(target=send)
        sender.start()
        while len(codes) < 5:
            time.sleep(0.01)
        code, said = gateway.stop()
        stop.set()
        sender.join()
    assert code == 0 and "stopped" in said
    assert set(codes) == {201}
    assert len(stored(home)) >= len(codes)
    assert events(home)[-1]["event"] == "gateway.stopped"
    sound(home)


def kill_under_load(tmp_path: Path, *, times: int, devices: int) -> None:
    """Kill the gateway again and again while devices send; then count."""
    home = new_home(tmp_path / "owner")
    gateway = GatewayProcess(home, tmp_path)
    gateway.start()
    cameras = [Camera(f"cam-{number}") for number in range(devices)]
    approve(gateway, *cameras)
    acknowledged: dict[tuple[str, int], bytes] = {}
    stop = threading.Event()
    failures: list[BaseException] = []

    def send(camera: Camera) -> None:
        number, client = 0, gateway.client("ingest")
        rng = np.random.default_rng(int(camera.name.partition("-")[2]))
        try:
            while not stop.is_set():
                number += 1
                image = rng.integers(0, 256, 36, dtype=np.uint8).tobytes()
                headers = camera.headers(image, sequence=number)
                while True:
                    try:
                        reply = client.post("/v1/captures", content=image, headers=headers)
                    except httpx.TransportError:
                        if stop.is_set():
                            return
                        time.sleep(0.05)
                        continue
                    if reply.status_code in (200, 201):
                        acknowledged[camera.name, number] = image
                        break
                    assert reply.status_code in (429, 503), reply.text
                    time.sleep(0.05)
        except BaseException as error:
            failures.append(error)
        finally:
            client.close()

    senders = [threading.Thread(target=send, args=(camera,)) for camera in cameras]
    for sender in senders:
        sender.start()
    try:
        for _ in range(times):
            enough = len(acknowledged) + 4 * devices
            while len(acknowledged) < enough and not failures:
                time.sleep(0.01)
            gateway.kill()
            gateway.start()
        while len(acknowledged) < enough + devices and not failures:
            time.sleep(0.01)
    finally:
        stop.set()
        for sender in senders:
            sender.join()
    assert gateway.stop()[0] == 0
    assert not failures
    found = stored(home)
    kept = {place: found.get(place) for place in acknowledged}
    assert kept == acknowledged, "an acknowledged capture is lost"
    # What is there beyond it was committed and its answer lost: at most one for each device.
    assert len(found) <= len(acknowledged) + devices
    logged = {(e["device"], e["sequence"]) for e in events(home) if e["event"].startswith("capture.")}
    assert set(acknowledged) <= logged
    sound(home)


@pytest.mark.slow
def test_killed_three_times_under_load(tmp_path: Path) -> None:
    kill_under_load(tmp_path, times=3, devices=4)


@pytest.mark.slow
def test_killed_fifty_times_under_load(tmp_path: Path) -> None:
    kill_under_load(tmp_path, times=50, devices=8)


def numbers(home: OwnerHome, name: str) -> list[int]:
    return sorted(number for device_, number in stored(home) if device_ == name)


def test_a_device_plays_a_list_and_goes_on_after_it_was_killed(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    made = device(gateway, tmp_path / "cam", "player")

    class Killed(BaseException):
        pass

    with gateway.client("ingest") as client:
        sent = []

        def dies(url: str, body: bytes, headers: dict[str, str]) -> Any:
            reply = client.post(url, content=body, headers=headers)
            sent.append(headers["flep-capture"])
            if len(sent) == 3:
                raise Killed  # stored at the gateway, and the device never heard of it
            return reply

        with pytest.raises(Killed):
            play(made, shots(6), dataset=DATASET, rate=1e6, post=dies)
    lines: list[str] = []
    played = play(Device(made.folder), shots(6), dataset=DATASET, rate=1e6, on_event=lines.append)
    assert (played.stored, played.repeated) == (3, 1)
    assert any("goes on with image 3 of 6" in line for line in lines), lines
    assert numbers(gateway.home, "player") == [1, 2, 3, 4, 5, 6]


def test_another_list_of_the_same_length_is_played_whole(tmp_path: Path) -> None:
    """The first list was interrupted after two of its images; the second one is no rest of it."""
    made = Device.create(tmp_path / "cam", name="cam-1", gateway="http://x", ca=None)
    sent: list[bytes] = []

    def post(url: str, body: bytes, headers: dict[str, str]) -> Any:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(body)
        return Reply(201)

    with pytest.raises(KeyboardInterrupt):
        play(made, shots(4), dataset=DATASET, source="monday", rate=1e6, post=post)
    sent.clear()
    rest = play(
        Device(made.folder),
        shots(4),
        dataset=DATASET,
        source="tuesday",
        rate=1e6,
        post=lambda _url, body, _headers: (sent.append(body), Reply(201))[1],
    )
    assert rest.stored == 4 and len(sent) == 4


def test_a_device_that_lost_its_state_goes_on_after_the_gateways_last_number(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    made = device(gateway, tmp_path / "cam", "forgetful")
    play(made, shots(3), dataset=DATASET, rate=1e6)
    (made.folder / "state.json").unlink()
    played = play(Device(made.folder), shots(4)[2:], dataset=DATASET, rate=1e6)
    assert played.stored == 2
    assert numbers(gateway.home, "forgetful") == [1, 2, 3, 4, 5]


class Reply:
    def __init__(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.status_code, self.content = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def test_a_device_obeys_retry_after_and_sends_the_same_bytes(tmp_path: Path) -> None:
    made = Device.create(tmp_path / "cam", name="cam-1", gateway="http://x", ca=None)
    replies = [Reply(503, retry_after="7"), Reply(429, retry_after="3"), None, Reply(201)]
    sent: list[dict[str, str]] = []
    slept: list[float] = []

    def post(url: str, body: bytes, headers: dict[str, str]) -> Any:
        sent.append(headers)
        reply = replies.pop(0)
        if reply is None:
            raise ConnectionError("refused")
        return reply

    played = play(made, shots(1), dataset=DATASET, rate=1e6, post=post, sleep=slept.append)
    assert (played.stored, played.retries) == (1, 3)
    assert slept[0] >= 7 and slept[1] >= 3
    assert all(headers == sent[0] for headers in sent)


@pytest.mark.parametrize(
    ("status", "code"), [(401, "unauthorised"), (403, "device_suspended"), (400, "clock")]
)
def test_a_device_stops_where_it_is_not_taken(tmp_path: Path, status: int, code: str) -> None:
    made = Device.create(tmp_path / "cam", name="cam-1", gateway="http://x", ca=None)
    body = json.dumps({"code": code, "reason": "no"}).encode()
    calls: list[int] = []
    with pytest.raises(GatewayError, match=code):
        play(
            made,
            shots(3),
            dataset=DATASET,
            rate=1e6,
            post=lambda *_: (calls.append(1), Reply(status, body))[1],
        )
    assert len(calls) == 1


def test_two_processes_do_not_send_for_one_device(tmp_path: Path) -> None:
    made = Device.create(tmp_path / "cam", name="cam-1", gateway="http://x", ca=None)
    with made.in_use(), pytest.raises(DeviceError, match="another process"):
        play(Device(made.folder), shots(1), dataset=DATASET, rate=1, post=lambda *_: Reply(201))
