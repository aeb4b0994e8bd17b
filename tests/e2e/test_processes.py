"""The federation by hand: every party its own operating-system process, as in the README."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from parties import Parties, descendants, found_in, make_parties, run_script, snapshot

from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.model_security import _seal_blob
from flep_fl.model_security.keyring import ModelKey
from flep_fl.provision.kits import load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he]

SITES = ("a", "b", "c")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    # TLS and node authentication, as kits for other machines have them.
    shared = ("federation.rounds=2", "train.local_epochs=1", "runtime.tls=on")
    return make_parties(tmp_path_factory.mktemp("provisioned"), SITES, *shared)


@pytest.fixture
def parties(tmp_path: Path, provisioned: Parties) -> Iterator[Parties]:
    for name in ("kits", "archive"):
        shutil.copytree(provisioned.folder / name, tmp_path / name)
    made = Parties(tmp_path, SITES, provisioned.address)
    yield made
    made.stop()


def windows(secret: bytes, size: int = 24) -> list[bytes]:
    """Cut pieces out of a secret, in all encodings in which it might lie about."""
    starts = range(0, max(1, len(secret) - size), max(size, len(secret) // 3))
    pieces = [secret[start : start + size] for start in starts]
    return [form for piece in pieces for form in (piece, piece.hex().encode(), base64.b64encode(piece))]


def secrets_of(parties: Parties) -> dict[str, list[bytes]]:
    """Return pieces of every key that the cloud must never have, by kind."""
    kits = [parties.folder / "kits" / name for name in parties.names]
    # The key as it lies in the file (compressed), and as a CKKS library holds it (64-bit coefficients).
    site = load_site_kit(kits[0])
    packed = ModelKey.from_bytes(site.model_key or b"").parts.secret_key
    owner = parties.folder / "archive" / "owner"
    bundle = ImageKeyBundle.from_bytes((owner / "bundle.key").read_bytes())
    found = {
        "model key, packed": windows(packed[200:]),
        "model key": windows(_seal_blob._zstd(packed[16:], 1 << 20)[200:]),
        "check key": windows(site.check_key),
        "image master key": windows(bundle.master_key),
        "secret image": windows(bundle.secret_images[0].tobytes()),
        "noise key": windows((owner / "noise.key").read_bytes()),
        "database key": windows((owner / "database.key").read_bytes()),
    }
    for kit in kits:
        for key in ("signing.key", "decryption.key"):
            found[f"{kit.name}/{key}"] = windows((kit / key).read_bytes())
        # The scalar as it is, and as the file's text spells it (beside it stands the public half).
        node = (kit / "node.key").read_bytes()
        scalar = load_ssh_private_key(node, None).private_numbers().private_value.to_bytes(48, "big")
        text = b"".join(node.split(b"\n")[1:-2])
        start = base64.b64decode(text).index(scalar)
        spelt = text[-(-start // 3) * 4 : (start + 48) // 3 * 4]
        found[f"{kit.name}/node.key"] = [*windows(scalar), *windows(spelt)]
    return found


def test_a_cloud_and_three_sites_end_by_themselves(parties: Parties) -> None:
    for name in ("cloud", *SITES):
        parties.start(name)
    secrets = secrets_of(parties)
    every = [piece for pieces in secrets.values() for piece in pieces]
    parties.wait_for("cloud", "round 2/2: training")
    server = [parties.processes["cloud"].pid, *descendants(parties.processes["cloud"].pid)]
    site = parties.processes["a"].pid
    assert len(server) >= 2, "the server's own process and the SuperLink"
    host, _, port = parties.address.rpartition(":")
    authority = parties.folder / "kits" / "a" / "ca.crt"
    assert ssl.get_server_certificate((host, int(port)), ca_certs=str(authority)), "it speaks TLS"
    for pid in (*server, site):
        os.kill(pid, signal.SIGSTOP)  # nobody may end, or clean up, while we copy
    try:
        memory = {pid: snapshot(pid) for pid in (*server, site)}
    finally:
        for pid in (*server, site):
            os.kill(pid, signal.SIGCONT)
    for kind, pieces in secrets.items():
        for pid in server:
            assert found_in(memory[pid], pieces) == [], f"process {pid} of the server holds the {kind}"
    for kind in ("model key", "check key"):  # the image keys are let go once the images are restored
        assert found_in(memory[site], secrets[kind]), f"the search must find the {kind} where it is"
    del memory

    assert [parties.wait(name) for name in ("cloud", *SITES)] == [0, 0, 0, 0], parties.log("cloud")
    result = json.loads((parties.folder / "runs" / "cloud" / "results.json").read_text())
    assert [sorted(entry["replied"]) for entry in result["rounds"]] == [list(SITES)] * 2
    assert result["restore"] == {"psnr_db": None, "noisy_psnr_db": None}
    assert result["final"]["accuracy"] is not None
    models = []
    for name in SITES:
        with np.load(parties.folder / "runs" / name / "sites" / name / "model.npz") as file:
            models.append(dict(file))
    for other in models[1:]:
        assert all(np.array_equal(other[key], models[0][key]) for key in models[0])

    report = (parties.folder / "runs" / "cloud" / "cloud" / "report.html").read_text()
    assert "cloud=untrusted" in report
    assert "data:image/png" not in report
    assert "PSNR" not in report
    for path in (parties.folder / "runs" / "cloud").rglob("*"):
        assert path.suffix not in {".npz", ".pt", ".safetensors"}
        if path.is_file():
            assert not found_in([path.read_bytes()], every), f"{path} holds a piece of a key"
    kit_of_cloud = [p.read_bytes() for p in (parties.folder / "kits" / "cloud").rglob("*") if p.is_file()]
    assert not found_in(kit_of_cloud, every)


@pytest.mark.slow
def test_a_killed_site_does_not_stop_the_round(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    parties = make_parties(
        tmp_path,
        names,
        "federation.rounds=3",
        "train.local_epochs=40",
        seal=("data=digits", "data.limit=900"),
    )
    try:
        for name in ("cloud", *names):
            parties.start(name)
        parties.wait_for("cloud", "round 2/3: training", timeout=150)
        killed = time.monotonic()
        parties.processes["d"].send_signal(signal.SIGKILL)
        parties.wait_for("cloud", "site d failed in round 2: site_lost", timeout=60)
        noticed = time.monotonic() - killed
        assert [parties.wait(name, 150) for name in ("cloud", "a", "b", "c")] == [0, 0, 0, 0], parties.log(
            "cloud"
        )
        rounds = json.loads((tmp_path / "runs" / "cloud" / "results.json").read_text())["rounds"]
        assert [sorted(entry["replied"]) for entry in rounds] == [list(names), list("abc"), list("abc")]
        assert rounds[1]["failed"] == [{"site": "d", "reason": "site_lost"}]
        assert noticed < 60, "Flower itself takes about 75 s"
    finally:
        parties.stop()


@pytest.mark.parametrize("who", ["cloud", "a"])
def test_ctrl_c_ends_a_party_and_its_children(parties: Parties, who: str) -> None:
    child = parties.start(who)
    parties.wait_for(who, "SuperLink ready|restored")
    deadline = time.monotonic() + 30
    while not (children := descendants(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    assert parties.wait(who, 30) == 130
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in parties.log(who)


def test_kill_9_leaves_no_orphan_and_no_port(parties: Parties) -> None:
    child = parties.start("cloud")
    parties.wait_for("cloud", "SuperLink ready")
    children = descendants(child.pid)
    assert children
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while [pid for pid in children if _alive(pid)] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if _alive(pid)]
    host, port = parties.address.split(":")
    while not _can_bind(host, int(port)) and time.monotonic() < deadline:
        time.sleep(0.1)  # the kernel closes a killed process's sockets a moment after it
    assert _can_bind(host, int(port))


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_port_in_use_is_named(parties: Parties) -> None:
    host, port = parties.address.split(":")
    with socket.socket() as sock:
        sock.bind((host, int(port)))
        sock.listen()
        parties.start("cloud")
        assert parties.wait("cloud", 30) == 1
    assert f"PortInUseError): The address {parties.address} is taken" in parties.log("cloud")
    assert "Traceback" not in parties.log("cloud")


@pytest.mark.parametrize(
    ("module", "arguments", "error"),
    [
        ("server", ["kit={kits}/a"], "KitError.*kit of a site.*kits?=KITS/cloud|KitError.*kit of a site"),
        ("server", ["kit={kits}/nowhere"], "KitError.*no startup kit"),
        ("server", [], "ConfigError.*kit is not set.*kits/cloud"),
        ("server", ["kit={kits}/cloud", "cloud=trusted"], "ConfigMismatchError.*cloud.trust"),
        ("server", ["kit={kits}/cloud", "federation.rounds=9"], "ConfigMismatchError.*federation.rounds"),
        ("clients", ["kit={kits}/a"], "ConfigError.*archive is not set"),
        ("clients", ["kit={kits}/a", "archive={archive}/b"], "(ArchiveError|WrongImageKeyError).*"),
        ("clients", ["kit={kits}/a", "archive={archive}/none"], "ArchiveError"),
        ("clients", ["kit={kits}/a", "archive={archive}/a", "train.lr=9"], "ConfigMismatchError.*train.lr"),
        ("scripts.provision", ["sites=[x,x,y]", "out={kits}2"], "ConfigError.*twice"),
        ("scripts.provision", ["sites=[a,b,c]", "out={kits}"], "ConfigError.*already holds"),
        ("scripts.provision", ["sites=[a,b]", "out={kits}3"], "ConfigError.*min_contributors"),
        ("scripts.seal", ["kits={archive}", "out={kits}4", "data=digits"], "KitError.*provision"),
        (
            "scripts.seal",
            ["kits={kits}", "out={kits}5", "data=folder", "data.path={archive}"],
            "EmptyDatasetError|DataError|ImageFormat",
        ),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_named_error(
    parties_once: Parties, module: str, arguments: list[str], error: str
) -> None:
    kits, archive = parties_once.folder / "kits", parties_once.folder / "archive"
    filled = [argument.format(kits=kits, archive=archive) for argument in arguments]
    done = run_script(module, *filled, f"hydra.run.dir={parties_once.folder / 'runs' / 'bad'}")
    assert done.returncode in (1, 2), done.stdout
    assert re.search(error, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def parties_once(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    return make_parties(tmp_path_factory.mktemp("once"), SITES)


def test_a_trusted_configuration_with_an_untrusted_kit_that_was_given_a_key(parties_once: Parties) -> None:
    planted = parties_once.folder / "kits" / "cloud" / "model.key"
    planted.write_bytes(load_site_kit(parties_once.folder / "kits" / "a").model_key or b"")
    try:
        done = run_script("server", f"kit={parties_once.folder / 'kits' / 'cloud'}")
        assert done.returncode == 1
        assert "must never hold a key" in done.stderr
    finally:
        planted.unlink()


def test_nobody_else_can_read_the_kits(parties_once: Parties) -> None:
    for path in (parties_once.folder / "kits").rglob("*.key"):
        assert oct(path.stat().st_mode & 0o777) == "0o600", path
    for path in (parties_once.folder / "archive" / "owner").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (parties_once.folder / "archive" / "owner").stat().st_mode & 0o077 == 0
