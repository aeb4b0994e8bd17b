"""A real full disk under a real gateway: a small tmpfs that holds the owner's whole home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from gateways import Camera, GatewayProcess, events, new_home, running_gateway

from flep_fl.data_owner.audit import HEADS_NAME, LOG_NAME, verify_log
from flep_fl.data_owner.enrolment import DeviceRegistry
from flep_fl.private_database.store import OwnerDatabase

SIDE = 120


def missing() -> str | None:
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    return None


pytestmark = [pytest.mark.e2e, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of eight megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount ({mounted.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(path: Path, *, leave: int) -> None:
    """Write a file that leaves so many bytes free."""
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    path.write_bytes(bytes(max(0, free - leave)))


class Sender:
    """A camera that sends new images, and remembers what was acknowledged."""

    def __init__(self, gateway: GatewayProcess, camera: Camera, client: httpx.Client) -> None:
        self.gateway, self.camera, self.client = gateway, camera, client
        self.acknowledged: dict[int, bytes] = {}
        self.waiting: tuple[int, bytes, dict[str, str]] | None = None

    def send(self) -> tuple[int, str]:
        """Send the next image, or once more the one that nobody acknowledged."""
        if self.waiting is None:
            number = self.camera.sequence + 1
            image = np.random.default_rng(number).integers(0, 256, SIDE * SIDE, dtype=np.uint8).tobytes()
            self.waiting = (number, image, self.camera.headers(image, shape=(SIDE, SIDE)))
        number, image, headers = self.waiting
        answer = self.client.post("/v1/captures", content=image, headers=headers)
        if answer.status_code in (200, 201):
            self.acknowledged[number], self.waiting = image, None
        return answer.status_code, json.loads(answer.content).get("code", "")


def test_a_full_disk_loses_nothing_and_ends_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    home, camera = new_home(disk / "owner"), Camera()
    ballast = disk / "ballast"
    with running_gateway(home, tmp_path) as gateway:
        with gateway.client("admin") as client:
            assert client.post("/v1/approvals", content=camera.statement(home)).status_code == 200
        with gateway.client("ingest") as client:
            sender = Sender(gateway, camera, client)
            assert sender.send() == (201, "")
            enrolled: list[Camera] = []
            answers: list[int] = []
            for _ in range(2):  # twice: full, room, full, room
                fill(ballast, leave=200_000)
                codes = [sender.send() for _ in range(40)]
                assert codes[-1] == (507, "disk_full"), codes
                assert {code for code, _ in codes} <= {200, 201, 507}, codes
                fill(disk / "rest", leave=0)  # not even a line of the log fits
                assert sender.send() == (507, "disk_full")
                assert client.get("/health").status_code == 200
                assert client.post("/v1/captures", content=b"").status_code == 400, "refusals need no room"
                with gateway.client("admin") as other:
                    for _ in range(12):  # a started page of the log may still take some
                        enrolled.append(Camera(f"more-{len(enrolled)}"))
                        statement = enrolled[-1].statement(home)
                        answers.append(other.post("/v1/approvals", content=statement).status_code)
                assert answers[-1] == 507
                ballast.unlink()
                (disk / "rest").unlink()
                assert sender.send()[0] in (200, 201)
                assert sender.send() == (201, "")
        code, said = gateway.stop()
        assert code == 0, said
    with OwnerDatabase(home.database, home.database_key()) as database:
        found = [(record.tags.sequence, record.image.tobytes()) for record in database.records()]
    stored = dict(found)
    assert len(stored) == len(found), "stored twice"
    assert stored == sender.acknowledged
    report = verify_log(
        home.audit / LOG_NAME, home.audit_signing_key().public_key(), heads=home.audit / HEADS_NAME
    )
    assert report.sound, report.findings
    logged = {line["sequence"] for line in events(home) if line["event"].startswith("capture.")}
    assert set(sender.acknowledged) <= logged
    told = {line["device"] for line in events(home) if line["event"] == "device.statement"}
    names = set(DeviceRegistry(home.devices, home.administrators).names())
    assert names <= told, "a device counts without a line in the log"
    assert {one.name for one, code in zip(enrolled, answers, strict=True) if code == 200} <= names
