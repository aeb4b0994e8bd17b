"""Real SuperLink and SuperNode processes round trivial apps (``runtime_party.py``)."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtime_parties import Party, Starter, is_gone, until

pytestmark = pytest.mark.e2e


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
    starter = Starter(f"127.0.0.1:{port}", tmp_path)
    yield starter
    starter.stop()


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
    assert [site.exit_status(30) for site in sites] == [0, 0]
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
    site.process.send_signal(signal.SIGINT)
    cloud.process.send_signal(signal.SIGINT)
    assert (site.exit_status(30), cloud.exit_status(30)) == (130, 130)
    assert "INTERRUPTED" in site.text
    assert "INTERRUPTED" in cloud.text
    assert "Traceback" not in site.text + cloud.text
    assert all(map(is_gone, children))
    assert can_bind(port)


@pytest.mark.slow
def test_a_killed_site_is_an_error_reply_and_disappears(start: Callable[..., Party], tmp_path: Path) -> None:
    look = tmp_path / "look"
    cloud = start("cloud", "cloud", "--rounds", "1", "--linger", "--after", str(look))
    quick, slow = start("site", "a"), start("site", "b", "--slow", "120")
    slow.wait_for("TRAIN")
    # The quick site leaves after its reply and before the cloud looks for it; the reply counts all the same.
    assert quick.exit_status(30) == 0
    slow.process.kill()
    killed = time.monotonic()
    look.touch()
    assert cloud.wait_for("ERROR 5 ", 45) - killed < 40  # Flower itself: about 75 s
    assert cloud.wait_for("NODES 0", 45) - killed < 40
    cloud.wait_for("REPLY 1 1 2000000")
    cloud.process.send_signal(signal.SIGTERM)
    assert cloud.exit_status(30) == 130


def test_an_apps_exception_travels_as_a_code_only(start: Callable[..., Party], tmp_path: Path) -> None:
    cloud = start("cloud", "cloud", "--rounds", "1")
    sites = [start("site", "a", "--fail", "named"), start("site", "b", "--fail", "other")]
    assert cloud.exit_status(45) == 0
    assert [site.exit_status(30) for site in sites] == [0, 0]
    errors = sorted(line for _, line in cloud.lines if line.startswith("ERROR"))
    assert errors == ["ERROR 2 error", "ERROR 2 sum_rejected"]
    told = cloud.text + (tmp_path / "cloud" / "superlink.log").read_text()
    assert "4711" not in told
    assert "ValueError" not in told
    # The site itself is told what happened.
    assert "SumCheckError: the secret number is 4711" in sites[0].text
    assert "unexpected ValueError" in sites[1].text


def test_a_dead_supernode_is_a_named_error(start: Callable[..., Party]) -> None:
    start("cloud", "cloud", "--sites", "1")
    site = start("site", "a", "--slow", "2")
    site.wait_for("TRAIN")
    (child,) = site.children()
    os.kill(child, signal.SIGKILL)
    assert site.exit_status(30) == 1
    assert "RuntimeStartError: The SuperNode ended unexpectedly (exit status -9)" in site.text
    assert "Traceback" not in site.text


@pytest.mark.slow
def test_a_killed_superlink_is_replaced_and_the_open_round_opened_again(
    start: Callable[..., Party], port: int, tmp_path: Path
) -> None:
    cloud, sites = start("cloud", "cloud", "--patient"), [start("site", name, "--slow", "2") for name in "ab"]
    for site in sites:
        site.wait_for("TRAIN")
    (superlink,) = cloud.children()
    os.kill(superlink, signal.SIGKILL)
    # Nobody can take the address in between, and the second SuperLink has it.
    assert not can_bind(port)
    assert cloud.exit_status(60) == 0, cloud.text
    assert [site.exit_status(20) for site in sites] == [0, 0]
    assert is_gone(superlink)
    assert cloud.text.count("LOST: The SuperLink ended and was started again") == 1
    assert "OUTCOME finished:completed" in cloud.text
    # Both rounds are complete, with the answers to the second asking; the sites said why they came again.
    rounds = [line.split()[1] for _, line in cloud.lines if line.startswith("REPLY")]
    assert rounds == ["1", "1", "2", "2"]
    assert all("no longer knows this site" in site.text for site in sites)
    assert not [*tmp_path.rglob("*.secret"), *tmp_path.rglob("objects"), *tmp_path.rglob("*.token")]
    assert can_bind(port)


@pytest.mark.slow
def test_a_superlink_that_keeps_ending_ends_the_run_by_name(start: Callable[..., Party]) -> None:
    cloud = start("cloud", "cloud", "--patient", "--restarts", "1")
    for _ in range(2):
        cloud.wait_for("SuperLink ready" if not cloud.lines else "SuperLink ready again")
        (superlink,) = cloud.children()
        os.kill(superlink, signal.SIGKILL)
    assert cloud.exit_status(20) == 1
    assert "RuntimeStartError: The SuperLink ended 2 times in one run" in cloud.text
    assert "Traceback" not in cloud.text


@pytest.mark.slow
def test_a_site_without_a_cloud_says_so_and_gives_up(start: Callable[..., Party], port: int) -> None:
    site = start("site", "a", "--idle-timeout", "8")
    assert site.exit_status(40) == 1
    assert f"a: 127.0.0.1:{port} does not answer yet" in site.text
    assert "IdleTimeoutError: a heard nothing" in site.text


@pytest.mark.slow
def test_a_site_serves_a_cloud_that_was_started_again(start: Callable[..., Party]) -> None:
    first, site = start("cloud"), start("site", "a")
    site.wait_for("connected")
    first.process.kill()
    first.process.wait()
    again = start("cloud", "cloud", "--sites", "1", "--rounds", "1")
    assert again.exit_status(50) == 0, again.text + site.text
    assert site.exit_status(30) == 0
    assert "no longer knows this site" in site.text
    assert "REPLY 1 1 2000000" in again.text
