"""The README's deployment on machines of their own: its commands, its addresses, real ssh between them.

Dealer, cloud, owner, three sites and a stranger are network namespaces that see their own folder only; what
one party has of another's came over the wire.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from machines import Machines, missing

from flep_fl.flower.runtime.tls import load_node_key, node_fingerprint

REASON = missing()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.he,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SECTION = README.partition("### Deploying on three machines")[2].partition("\n### ")[0]
SMALL = "data=digits data.limit=240"
ADDRESSES = {
    "dealer": "10.0.0.2",
    "owner": "10.0.0.3",
    "cloud": "10.0.0.5",  # as in the README
    "a": "10.0.0.11",
    "b": "10.0.0.12",
    "c": "10.0.0.13",
    "d": "10.0.0.14",
}


def printed(beginning: str) -> str:
    """Return the README's command that begins so, without its comment."""
    lines = re.findall(rf"^{re.escape(beginning)}.*$", SECTION, re.MULTILINE)
    lines += re.findall(rf"`({re.escape(beginning)}[^`]*)`", SECTION)
    assert lines, f"the README does not say {beginning!r}"
    return str(lines[0]).partition(" #")[0].rstrip()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Machines(tmp_path, ADDRESSES) as made:
        for name in ADDRESSES:
            made.shell(name, "mkdir flep")
        yield made


def provision(machines: Machines) -> None:
    machines.shell(
        "dealer", f"{printed('python -m scripts.provision')} {SMALL} federation.rounds=2", cwd="flep"
    )


def hand_out(machines: Machines) -> None:
    """Copy every kit to its party, and take the private keys off the dealer's machine."""
    for name in ("cloud", "owner", "a", "b", "c"):
        machines.shell(name, printed("mkdir"))
    for party in ("cloud", "owner", "a"):
        machines.shell("dealer", printed(f"scp -pr kits/{party} "), cwd="flep")
    for party in ("b", "c"):  # "b and c alike"
        like_a = printed("scp -pr kits/a ")
        machines.shell(
            "dealer", like_a.replace("kits/a ", f"kits/{party} ").replace(" a.", f" {party}."), cwd="flep"
        )
    machines.shell("dealer", printed("find kits"), cwd="flep")


def seal(machines: Machines, sites: str, *, again: str = "") -> None:
    """Seal, and hand each site its archive; ``again`` is what the README adds to names the second time."""
    line = printed(f"python -m scripts.seal kits=kits out=archive{again}")
    machines.shell("owner", f"{line} {SMALL}", cwd="flep")
    for site in sites:
        line = printed(f"scp -pr archive{again}/a ")
        line = line.replace("/a ", f"/{site} ").replace(" a.", f" {site}.").replace("/a-2", f"/{site}-2")
        machines.shell("owner", line, cwd="flep")


def start(machines: Machines, parties: str | tuple[str, ...], *, again: str = "") -> None:
    for party in parties:
        if party == "cloud":
            line = printed("python -m server kit=kits/cloud")
        else:
            line = printed("python -m clients kit=kits/a").replace("/a", f"/{party}")
            line = line.replace(f"archive/{party}", f"archive/{party}{again}")
        machines.start(party, party, f"{line} hydra.run.dir=outputs/run runtime.threads=1", cwd="flep")


def results(machines: Machines) -> list[list[str]]:
    document = json.loads((machines.home("cloud") / "flep" / "outputs" / "run" / "results.json").read_text())
    return [sorted(entry["replied"]) for entry in document["rounds"]]


def model(machines: Machines, site: str) -> dict[str, np.ndarray]:
    with np.load(machines.home(site) / f"flep/outputs/run/sites/{site}/model.npz") as file:
        return dict(file)


def private_keys(machines: Machines, name: str) -> set[str]:
    folder = machines.home(name) / "flep"
    return {str(path.relative_to(folder)) for path in folder.rglob("*.key")}


def refused(machines: Machines, supernode: str, key: str, how: str) -> None:
    """Start Flower's own SuperNode at the stranger, with the right authority; the cloud says who it was."""
    machines.start(key, "d", f"env FLWR_TELEMETRY_ENABLED=0 FLWR_HOME=/srv/flwr {supernode}", cwd="flep")
    machines.wait_for("cloud", how)
    machines.started[key].kill()
    machines.started[key].wait()


def test_three_machines(machines: Machines) -> None:
    provision(machines)
    hand_out(machines)
    assert private_keys(machines, "dealer") == {"kits/dealer/ca.key", "kits/dealer/dealer.key"}
    assert private_keys(machines, "cloud") == {"kits/cloud/server.key", "kits/cloud/signing.key"}
    own = {f"kits/a/{name}.key" for name in ("decryption", "node", "signing")}
    assert private_keys(machines, "a") == own
    modes = {path.stat().st_mode & 0o777 for path in (machines.home("a") / "flep/kits/a").iterdir()}
    assert modes == {0o600}, "scp -p keeps them"
    # What each party sees is what the dealer saw.
    shown = machines.shell("a", printed("python -m scripts.provision action=show"), cwd="flep")
    assert "site a" in shown and "10.0.0.5:9092" in shown
    seal(machines, "abc")
    assert sorted(path.name for path in (machines.home("a") / "flep" / "archive").iterdir()) == ["a"]
    start(machines, ("cloud", "a", "b"))
    machines.wait_for("cloud", "SuperLink ready on 10.0.0.5:9092")

    # A stranger who has the federation's public files, and a node key that no kit holds - or none.
    machines.shell("d", "ssh-keygen -qt ecdsa -b 384 -N '' -f strange", cwd="flep")
    (machines.home("d") / "flep" / "ca.crt").write_bytes(
        (machines.home("a") / "flep/kits/a/ca.crt").read_bytes()
    )
    program = "from flwr.supernode.cli import flower_supernode as main; main()"
    stock = f"python -c '{program}' --superlink 10.0.0.5:9092 --root-certificates ca.crt --isolation process"
    fingerprint = node_fingerprint(load_node_key(machines.home("d") / "flep" / "strange"))
    named = f"refused a node with the key {fingerprint} that is not in the kit, at 10.0.0.14"
    refused(machines, f"{stock} --auth-supernode-private-key strange", "foreign key", named)
    refused(machines, stock, "no key", "that registers itself, at 10.0.0.14")
    # The control and runtime routes are not on the port that the machines reach.
    assert not reaches(machines, "d", "10.0.0.5", range(9090, 9100), but=9092)

    start(machines, "c")
    assert [machines.wait(name) for name in ("cloud", "a", "b", "c")] == [0] * 4, machines.log("cloud")
    assert results(machines) == [["a", "b", "c"]] * 2
    models = [model(machines, name) for name in "abc"]
    assert all(np.array_equal(other[key], models[0][key]) for other in models[1:] for key in models[0])
    for name in ADDRESSES:
        assert "Traceback" not in machines.log(name)
    assert not list(machines.home("cloud").rglob("*.npz"))


def reaches(machines: Machines, name: str, address: str, ports: range, *, but: int) -> list[int]:
    code = (
        "import json, socket, sys\nfound = []\n"
        "for port in json.loads(sys.argv[2]):\n"
        "    with socket.socket() as sock:\n"
        "        sock.settimeout(2)\n"
        "        found += [port] if sock.connect_ex((sys.argv[1], port)) == 0 else []\n"
        "print(json.dumps(found))"
    )
    done = machines.run(name, sys.executable, "-c", code, address, json.dumps([*ports, 8000]))
    found: list[int] = json.loads(done.stdout)
    assert but in found, done.stderr
    return [port for port in found if port != but]


def update(machines: Machines, party: str) -> None:
    """Copy what a change of the federation left for a party that has a kit already."""
    like = "cloud" if party == "cloud" else "a"
    line = printed(f"scp kits/{like}/*.json")
    machines.shell(
        "dealer", line.replace("kits/a/", f"kits/{party}/").replace(" a.", f" {party}."), cwd="flep"
    )


def test_a_site_comes_and_one_goes_on_machines_of_their_own(machines: Machines) -> None:
    provision(machines)
    hand_out(machines)
    seal(machines, "c")
    machines.shell("dealer", printed("python -m scripts.provision action=add"), cwd="flep")
    machines.shell("d", printed("mkdir"))
    machines.shell("dealer", "scp -pr kits/d d.example.org:flep/kits/", cwd="flep")
    machines.shell("dealer", "rm kits/d/*.key", cwd="flep")
    said = machines.shell("dealer", printed("python -m scripts.provision action=revoke"), cwd="flep")
    assert "kits/d: keys.wrapped kit.json manifest.json" in said
    for party in ("cloud", "a", "b", "d"):
        update(machines, party)
    machines.shell("dealer", printed("scp kits/owner/*.json"), cwd="flep")
    seal(machines, "abd", again="-2")
    # The site that was shut out has its old kit, its old archive, and the same cable.
    start(machines, "c")
    start(machines, ("cloud", "a", "b"), again="-2")
    machines.wait_for("cloud", "that is not in the kit, at 10.0.0.13")
    start(machines, "d", again="-2")
    assert [machines.wait(name) for name in ("cloud", "a", "b", "d")] == [0] * 4, machines.log("cloud")
    assert results(machines) == [["a", "b", "d"]] * 2
    assert machines.wait("c") == 1
