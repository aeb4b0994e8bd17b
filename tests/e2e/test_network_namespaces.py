"""The compiled rules in five real network stacks: who reaches whom, port by port.

Five hosts - device, gateway, database, analyst, cloud - are network namespaces, each in a subnet of its own
behind a router that forwards everything: what is refused is refused by the rules. All traffic stays inside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from flep_fl.data_owner.network import compile_nftables, load_rules

ROOT = Path(__file__).resolve().parents[2]
RULES = load_rules(ROOT / "deploy" / "network.yaml")
HOSTS = ("device", "gateway", "database", "analyst", "cloud")
ADDRESS = {name: f"10.77.{number}.2" for number, name in enumerate(HOSTS, start=1)}
PORTS = (*sorted(RULES.ports.values()), 22)
INGEST, RELEASE, DATABASE, FEDERATION = 8441, 8442, 5432, 9092

Edge = tuple[str, str, int]
ALLOWED: set[Edge] = {
    ("device", "gateway", INGEST),
    ("analyst", "gateway", RELEASE),
    ("gateway", "database", DATABASE),
    ("analyst", "cloud", FEDERATION),
}
EVERYTHING: set[Edge] = {(a, b, port) for a in HOSTS for b in HOSTS if a != b for port in PORTS}

LISTEN = """
import json, selectors, socket, sys
selector = selectors.DefaultSelector()
for port in json.loads(sys.argv[1]):
    one = socket.create_server(("0.0.0.0", port), backlog=64)
    selector.register(one, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in selector.select():
        connection, _ = key.fileobj.accept()
        connection.sendall(b"hello")
        connection.close()
"""
CONNECT = """
import asyncio, json, sys

async def reach(name, address, port):
    try:
        async with asyncio.timeout(1.5):
            reader, writer = await asyncio.open_connection(address, port)
            answer = await reader.read(5)
            writer.close()
            return [name, port] if answer == b"hello" else None
    except (OSError, TimeoutError):
        return None

async def main():
    wanted = json.loads(sys.argv[1])
    print(json.dumps([found for found in await asyncio.gather(*(reach(*one) for one in wanted)) if found]))

asyncio.run(main())
"""


def missing() -> str | None:
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    for program, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"needs the program {program} (Debian: {package})"
    probe = f"flep{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "needs the right to make network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


REASON = missing()
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def namespace(host: str) -> str:
    return f"flep{os.getpid()}{host}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Build five hosts and a router, with a TCP listener for every port on every host."""
    with ExitStack() as stack:
        for name in ("router", *HOSTS):
            ip("netns", "add", namespace(name))
            stack.callback(ip, "netns", "del", namespace(name))
            ip("-n", namespace(name), "link", "set", "lo", "up")
        router = namespace("router")
        for number, name in enumerate(HOSTS, start=1):
            inside = namespace(name)
            ip("-n", router, "link", "add", f"v{number}", "type", "veth", "peer", "eth0", "netns", inside)
            for where, link, address in (
                (router, f"v{number}", f"10.77.{number}.1/24"),
                (inside, "eth0", f"{ADDRESS[name]}/24"),
            ):
                ip("-n", where, "address", "add", address, "dev", link)
                ip("-n", where, "link", "set", link, "up")
            ip("-n", inside, "route", "add", "default", "via", f"10.77.{number}.1")
        run("router", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for name in HOSTS:
            listener = subprocess.Popen(
                [*inside_of(name), sys.executable, "-c", LISTEN, json.dumps(PORTS)], stdout=subprocess.PIPE
            )
            stack.callback(listener.wait)
            stack.callback(listener.kill)
            assert listener.stdout is not None
            stack.callback(listener.stdout.close)
            assert listener.stdout.readline() == b"ready\n"
        yield


def inside_of(host: str) -> list[str]:
    return ["ip", "netns", "exec", namespace(host)]


def run(host: str, *command: str, text: str | None = None) -> str:
    done = subprocess.run([*inside_of(host), *command], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def loaded(groups: Sequence[str]) -> Iterator[None]:
    """Load the compiled rules of some hosts, each in its own stack."""
    for group in groups:
        run(group, "nft", "-f", "-", text=compile_nftables(RULES, group))
    try:
        yield
    finally:
        for group in groups:
            run(group, "nft", "delete", "table", "inet", "flep")


def reached() -> set[Edge]:
    """Try every port of every host from every other host."""
    clients = {}
    for source in HOSTS:
        wanted = [(name, ADDRESS[name], port) for name in HOSTS if name != source for port in PORTS]
        clients[source] = subprocess.Popen(
            [*inside_of(source), sys.executable, "-c", CONNECT, json.dumps(wanted)], stdout=subprocess.PIPE
        )
    found: set[Edge] = set()
    for source, client in clients.items():
        output, _ = client.communicate(timeout=60)
        found |= {(source, name, port) for name, port in json.loads(output)}
    return found


@pytest.mark.usefixtures("hosts")
def test_without_rules_everybody_reaches_everybody() -> None:
    assert reached() == EVERYTHING


@pytest.mark.usefixtures("hosts")
def test_with_rules_only_what_they_allow_is_reached() -> None:
    with loaded(HOSTS):
        assert reached() == ALLOWED


@pytest.mark.usefixtures("hosts")
def test_the_owners_two_hosts_defend_themselves() -> None:
    """Devices, analysts and the cloud are other people's machines and may have no rules at all."""
    with loaded(("gateway", "database")):
        found = reached()
    owners = {"gateway", "database"}
    assert {edge for edge in found if owners & set(edge[:2])} == {
        edge for edge in ALLOWED if owners & set(edge[:2])
    }
    assert not {edge for edge in found if edge[0] == "database"}, "the database reaches nothing"
    assert {edge for edge in found if edge[1] == "database"} == {("gateway", "database", DATABASE)}
    assert not {edge for edge in found if edge[0] == "cloud" and edge[1] in owners}


@pytest.mark.usefixtures("hosts")
def test_loading_the_rules_twice_changes_nothing() -> None:
    with loaded(("gateway",)):
        first = run("gateway", "nft", "list", "ruleset")
        run("gateway", "nft", "-f", "-", text=compile_nftables(RULES, "gateway"))
        assert run("gateway", "nft", "list", "ruleset") == first
