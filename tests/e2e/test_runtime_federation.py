"""Real SuperLink and SuperNode processes round trivial apps (``runtime_party.py``)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

PARTY = Path(__file__).with_name("runtime_party.py")
ROOT = PARTY.parents[2]


class Party:
    """One process and the lines that it has printed so far."""

    def __init__(self, *args: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(PARTY), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, pattern: str, limit: float = 40.0, *, since: float = 0.0) -> float:
        """Return when a line matched, on the monotonic clock."""

        def find() -> float | None:
            return next(
                (at for at, line in list(self.lines) if at >= since and re.search(pattern, line)), None
            )

        until(lambda: find() is not None or self.process.poll() is not None, limit)
        time.sleep(0.1)
        found = find()
        assert found is not None, f"no line matches {pattern!r} in:\n{self.text}"
        return found

    def exit_status(self, limit: float) -> int:
        """Wait for the process to end."""
        status = self.process.wait(limit)
        self._reader.join(5)
        return status

    def children(self) -> list[int]:
        """Return the pids of the living children."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == self.process.pid and stat[0] != "Z":
                found.append(int(entry.name))
        return found


def until(condition: Callable[[], bool], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def is_gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def can_bind(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError:
            return False
    return True


def http_status(port: int, path: str, method: str = "GET") -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", method=method, data=b"" if method == "POST" else None
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def listening_ports(pid: int) -> set[int]:
    inodes = set()
    for link in (Path("/proc") / str(pid) / "fd").iterdir():
        target = str(link.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def start(port: int, tmp_path: Path) -> Iterator[Callable[..., Party]]:
    parties: list[Party] = []

    def start(role: str, name: str = "cloud", *args: str) -> Party:
        home = str(tmp_path / name)
        party = Party(role, "--address", f"127.0.0.1:{port}", "--home", home, "--name", name, *args)
        parties.append(party)
        return party

    yield start
    for party in parties:
        if party.process.poll() is None:
            party.process.kill()
        party.process.wait()


def test_two_sites_two_rounds_end_by_themselves_behind_split_ports(
    start: Callable[..., Party], port: int, tmp_path: Path
) -> None:
    cloud = start("cloud")
    cloud.wait_for("SuperLink ready")
    (superlink,) = cloud.children()
    (admin_port,) = listening_ports(superlink) - {port}

    assert http_status(port, "/health") == 200
    # The route exists on this port: an empty request is understood, not "not found".
    assert http_status(port, "/v1/fleet/pull-messages", "POST") not in (200, 404)
    for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task"):
        assert http_status(port, path, "POST") == 404
        assert http_status(port, f"/v1/fleet/..{path[3:]}", "POST") == 404
        # The loopback port serves them to whoever shows the token, and to nobody else.
        assert http_status(admin_port, path, "POST") == 404
    for path in ("/docs", "/openapi.json", "/"):
        assert http_status(port, path) == 404

    sites = [start("site", name) for name in ("a", "b")]
    assert cloud.exit_status(45) == 0, cloud.text
    assert [site.exit_status(15) for site in sites] == [0, 0]
    replies = sorted(line for _, line in cloud.lines if line.startswith("REPLY"))
    # The context's state lives from round to round, and 8 MB arrays arrive whole.
    assert replies == ["REPLY 1 1 2000000"] * 2 + ["REPLY 2 2 4000000"] * 2
    assert "OUTCOME finished:completed" in cloud.text
    assert "ERROR" not in cloud.text
    assert "TRAIN a" in sites[0].text
    assert can_bind(port)
    # No secret outlives the run.
    assert not [*tmp_path.rglob("*.secret"), *tmp_path.rglob("*.token")]


def test_kill_9_of_the_parents_leaves_no_child_and_no_port(start: Callable[..., Party], port: int) -> None:
    cloud, site = start("cloud"), start("site", "a")
    cloud.wait_for("SuperLink ready")
    site.wait_for("connected")
    children = [*cloud.children(), *site.children()]
    assert len(children) == 2
    assert not can_bind(port)
    for party in (cloud, site):
        party.process.kill()
    assert until(lambda: all(map(is_gone, children)), 5)
    assert until(lambda: can_bind(port), 5)


def test_sigint_ends_a_busy_site_and_a_waiting_cloud(start: Callable[..., Party], port: int) -> None:
    cloud, site = start("cloud", "cloud", "--sites", "1"), start("site", "a", "--slow", "120")
    site.wait_for("TRAIN")
    children = [*cloud.children(), *site.children()]
    asked = time.monotonic()
    site.process.send_signal(signal.SIGINT)
    cloud.process.send_signal(signal.SIGINT)
    assert (site.exit_status(15), cloud.exit_status(15)) == (130, 130)
    assert time.monotonic() - asked < 10
    assert "INTERRUPTED" in site.text
    assert "INTERRUPTED" in cloud.text
    assert "Traceback" not in site.text + cloud.text
    assert all(map(is_gone, children))
    assert can_bind(port)


def test_a_killed_site_is_an_error_reply_and_disappears(start: Callable[..., Party]) -> None:
    cloud = start("cloud", "cloud", "--rounds", "1", "--linger", "--nap", "4")
    quick, slow = start("site", "a"), start("site", "b", "--slow", "120")
    slow.wait_for("TRAIN")
    # The quick site leaves after its reply and before the cloud looks for it; the reply counts all the same.
    assert quick.exit_status(30) == 0
    left = time.monotonic()
    slow.process.kill()
    killed = time.monotonic()
    assert cloud.wait_for("ERROR 5 ", 20) - killed < 16
    assert cloud.wait_for("NODES 0", 20) - killed < 16
    assert cloud.wait_for("REPLY 1 1 2000000") > left
    cloud.process.send_signal(signal.SIGTERM)
    assert cloud.exit_status(10) == 130


def test_an_apps_exception_travels_as_a_code_only(start: Callable[..., Party], tmp_path: Path) -> None:
    cloud = start("cloud", "cloud", "--rounds", "1")
    sites = [start("site", "a", "--fail", "named"), start("site", "b", "--fail", "other")]
    assert cloud.exit_status(45) == 0
    assert [site.exit_status(15) for site in sites] == [0, 0]
    errors = sorted(line for _, line in cloud.lines if line.startswith("ERROR"))
    assert errors == ["ERROR 2 error", "ERROR 2 sum_rejected"]
    told = cloud.text + (tmp_path / "cloud" / "superlink.log").read_text()
    assert "4711" not in told
    assert "ValueError" not in told
    # The site itself is told what happened.
    assert "SumCheckError: the secret number is 4711" in sites[0].text
    assert "unexpected ValueError" in sites[1].text


def test_a_dead_superlink_or_supernode_is_a_named_error(start: Callable[..., Party]) -> None:
    cloud, site = start("cloud", "cloud", "--sites", "1"), start("site", "a", "--slow", "4")
    site.wait_for("TRAIN")
    for party in (cloud, site):
        (child,) = party.children()
        os.kill(child, signal.SIGKILL)
    assert (cloud.exit_status(10), site.exit_status(15)) == (1, 1)
    assert "RuntimeStartError: The SuperLink ended unexpectedly (exit status -9)" in cloud.text
    assert "RuntimeStartError: The SuperNode ended unexpectedly (exit status -9)" in site.text
    assert "Traceback" not in cloud.text + site.text


def test_a_site_without_a_cloud_says_so_and_gives_up(start: Callable[..., Party], port: int) -> None:
    site = start("site", "a", "--idle-timeout", "8")
    assert site.exit_status(40) == 1
    assert f"a: 127.0.0.1:{port} does not answer yet" in site.text
    assert "IdleTimeoutError: a heard nothing" in site.text


def test_a_site_serves_a_cloud_that_was_started_again(start: Callable[..., Party]) -> None:
    first, site = start("cloud"), start("site", "a")
    site.wait_for("connected")
    first.process.kill()
    first.process.wait()
    again = start("cloud", "cloud", "--sites", "1", "--rounds", "1")
    assert again.exit_status(50) == 0, again.text + site.text
    assert site.exit_status(15) == 0
    assert "no longer knows this site" in site.text
    assert "REPLY 1 1 2000000" in again.text
