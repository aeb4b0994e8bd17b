"""From a device to an analyst's images, and no further after a revocation: real processes, TLS.

The gateway is a process of its own, and so is every analyst who fetches. The owner's commands run beside the
gateway, on the database that it serves.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import make_config
from gateways import DATASET, ROOT, Camera, GatewayProcess, events, new_home, running_gateway
from hydra import compose, initialize_config_dir

from flep_fl.config import CONFIG_DIR, shared_part
from flep_fl.data_owner.audit import HEADS_NAME, LOG_NAME, verify_log
from flep_fl.data_owner.simulator import Device, Shot, play
from flep_fl.provision.kits import create_kits
from flep_fl.provision.owner_config import OwnerConfig, register_owner, to_owner_config
from flep_fl.provision.owner_store import run_grant, run_release, run_revoke

pytestmark = pytest.mark.e2e
COUNT, SIDE = 20, 8
RNG = np.random.default_rng(7)
IMAGES = [RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8) for _ in range(COUNT)]

ANALYST = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from federations import make_config
from flep_fl.contracts.errors import FlepError
from flep_fl.flower.site_data import load_site_data
from flep_fl.provision.kits import load_site_kit

kit, owner, ca = sys.argv[1:]
config = make_config("data=digits", f"data.owners=[{owner}]", f"data.owner_ca={ca}", "noise.std=0")
try:
    data = load_site_data(load_site_kit(Path(kit)), config, None)
except FlepError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
    sys.exit(1)
plain = [np.rint(image[0]).astype(np.uint8) for part in (data.train, data.test) for image in part.images]
labels = [int(label) for part in (data.train, data.test) for label in part.labels]
print(json.dumps({"images": [[hashlib.sha256(p.tobytes()).hexdigest(), n] for p, n in zip(plain, labels)]}))
"""


def fetch(kit: Path, gateway: GatewayProcess, ca: Path) -> tuple[int, dict[str, Any]]:
    """Fetch and restore in a process of its own; gives its exit code and what it found."""
    places = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"
    done = subprocess.run(
        [sys.executable, "-c", ANALYST, str(kit), gateway.url("release"), str(ca)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def owner(gateway: GatewayProcess, action: str, *options: str) -> OwnerConfig:
    """Return the settings of an owner's command."""
    register_owner()
    overrides = [f"action={action}", f"home={gateway.home.folder}", *options]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_owner_config(compose("owner", overrides=overrides))


def shot(number: int) -> Shot:
    label = ("fine", "scratch")[number % 2]
    return Shot(f"shot {number}", IMAGES[number].tobytes(), "raw-uint8", (SIDE, SIDE), label)


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_the_shutter_to_the_analyst_and_no_further_after_a_revocation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], others: bool
) -> None:
    """With ``others``, a second analyst keeps his grant, and a third never had one."""
    home, ca = new_home(tmp_path / "owner"), tmp_path / "ca.crt"
    ca.write_bytes(home.root.certificate.read_bytes())
    config = make_config("data=digits")
    create_kits(shared_part(config), ["a", "b", "c"], tmp_path / "kits", address=config.runtime.address)
    kits = {name: tmp_path / "kits" / name for name in "abc"}
    with running_gateway(home, tmp_path) as gateway:
        # Devices' side: enrol at the admin listener, play at ingest.
        device = Device.create(
            tmp_path / "cam", name="cam-1", gateway=gateway.url("ingest"), ca=ca.read_bytes()
        )
        with gateway.client("admin") as client:
            statement = Camera("cam-1", device._key).statement(home)
            assert client.post("/v1/approvals", content=statement).status_code == 200
        shots = [lambda number=number: shot(number) for number in range(COUNT)]
        assert play(device, shots, dataset=DATASET, rate=1e6).stored == COUNT

        # The owner releases and grants; each analyst restores every image exactly, with its class.
        run_release(owner(gateway, "release"))
        for name in "ab":
            run_grant(
                owner(
                    gateway,
                    "grant",
                    f"dataset={DATASET}",
                    f"analyst={name}",
                    f"kit={kits[name]}",
                    "until=2099-12-31",
                )
            )
        said = [line.split() for line in capsys.readouterr().out.splitlines()]
        grants = {words[4]: words[1].rstrip(":") for words in said if words[0] == "grant"}
        expected = sorted(
            [hashlib.sha256(image.tobytes()).hexdigest(), number % 2] for number, image in enumerate(IMAGES)
        )
        for name in "ab" if others else "a":
            code, found = fetch(kits[name], gateway, ca)
            assert code == 0, found
            assert sorted(found["images"]) == expected
        if others:
            code, found = fetch(kits["c"], gateway, ca)
            assert code == 1 and found["error"] == "UnknownGrantError", "c has no grant"

        # Revoked: a is refused at once, b goes on, under a new epoch.
        run_revoke(owner(gateway, "revoke", f"grant={grants['a']}"))
        code, found = fetch(kits["a"], gateway, ca)
        assert code == 1 and found["error"] in ("GrantRevokedError", "UnknownGrantError"), found
        if others:
            code, found = fetch(kits["b"], gateway, ca)
            assert code == 0 and sorted(found["images"]) == expected, found
        assert gateway.stop()[0] == 0
    log = events(home)
    names = [line["event"] for line in log]
    assert names.count("capture.stored") == COUNT
    assert names.index("device.approved") < names.index("capture.stored") < names.index("grant.created")
    keys = {line["analyst"]: line["key"] for line in log if line["event"] == "grant.created"}
    revoked = names.index("grant.revoked")
    released = [(n, line["analyst"]) for n, line in enumerate(log) if line["event"] == "records.released"]
    assert {who for n, who in released if n < revoked} == {keys[name] for name in ("ab" if others else "a")}
    assert {who for n, who in released if n > revoked} == ({keys["b"]} if others else set())
    report = verify_log(
        home.audit / LOG_NAME, home.audit_signing_key().public_key(), heads=home.audit / HEADS_NAME
    )
    assert report.sound, report.findings
