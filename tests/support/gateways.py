"""A gateway for tests: its parts in this process, or the real one in a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.contracts.request_signing import sign_request
from flep_fl.data_owner.audit import LOG_NAME, AuditLog
from flep_fl.data_owner.certificates import client_context
from flep_fl.data_owner.devices import (
    CAPTURE_HEADER,
    SIGNATURE_HEADER,
    Description,
    digest_of,
    encode_header,
    sign_capture,
)
from flep_fl.data_owner.enrolment import DeviceRegistry, approve
from flep_fl.data_owner.gateway.admin import Admin, admin_app
from flep_fl.data_owner.gateway.guard import Listener
from flep_fl.data_owner.gateway.ingest import CapturePolicy, Ingest, ingest_app
from flep_fl.data_owner.gateway.limits import Limits
from flep_fl.data_owner.gateway.release import Release, release_app
from flep_fl.data_owner.home import OwnerHome, create_home, load_home
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.store import OwnerDatabase

ROOT = Path(__file__).resolve().parents[2]
DATASET, CLASSES = "plates", ("fine", "scratch")
IMAGE = np.arange(36, dtype=np.uint8).reshape(6, 6)
YEAR = 365 * 86400


@dataclass
class Camera:
    """A device's key and its next number, without a folder."""

    name: str = "cam-1"
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    sequence: int = 0

    @property
    def public(self) -> str:
        return self.key.public_key().public_bytes_raw().hex()

    def headers(self, image: bytes, *, key: Ed25519PrivateKey | None = None, **change: Any) -> dict[str, str]:
        """Sign the next capture; ``change`` replaces fields of its description before signing."""
        if "sequence" not in change:
            self.sequence += 1
        fields: dict[str, Any] = {
            "device": self.name,
            "sequence": self.sequence,
            "time": time.time_ns() // 1000,
            "sha256": digest_of(image),
            "format": "raw-uint8",
            "shape": (6, 6),
            "dataset": DATASET,
            "label": "scratch",
            "split": "train",
        } | change
        description = Description(**fields).to_bytes()
        return {
            CAPTURE_HEADER: encode_header(description),
            SIGNATURE_HEADER: encode_header(sign_capture(key or self.key, description)),
            "content-type": "application/octet-stream",
        }

    def statement(self, home: OwnerHome, action: str = "enrol", **change: Any) -> bytes:
        """Return an administrator's statement about this device."""
        values: dict[str, Any] = {
            "administrator": "admin",
            "action": action,
            "device": self.name,
            "key": self.public,
            "datasets": [DATASET],
            "lifetime": YEAR,
        } | change
        return approve(home.administrator_key(values["administrator"]), **values).to_bytes()


@dataclass
class Parts:
    """All parts of a gateway in this process; requests go straight into its ASGI applications."""

    home: OwnerHome
    database: OwnerDatabase
    registry: DeviceRegistry
    audit: AuditLog
    listeners: dict[str, Listener]
    apps: dict[str, Any]
    book: ReleaseBook
    now: list[float]

    def client(self, listener: str, peer: str = "127.0.0.1") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.apps[listener], client=(peer, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://gateway")

    def events(self) -> list[dict[str, Any]]:
        return events(self.home)

    def signed(self, method: str, target: str, key: Ed25519PrivateKey, body: bytes = b"") -> dict[str, str]:
        return signed(self.home, method, target, key, body, created=int(self.now[0] or time.time()))


def signed(
    home: OwnerHome,
    method: str,
    target: str,
    key: Ed25519PrivateKey,
    body: bytes = b"",
    *,
    created: int | None = None,
    audience: bytes | None = None,
    nonce: str | None = None,
) -> dict[str, str]:
    """Return the headers of a signed request."""
    return sign_request(
        method,
        target,
        body,
        audience=audience or home.owner_key,
        key=key.public_key().public_bytes_raw(),
        sign=key.sign,
        created=int(time.time()) if created is None else created,
        nonce=nonce,
    )


def events(home: OwnerHome) -> list[dict[str, Any]]:
    """Read the audit log."""
    return [json.loads(line) for line in (home.audit / LOG_NAME).read_bytes().splitlines()]


@functools.cache
def _template(administrators: tuple[str, ...], threshold: int) -> Path:
    """Make a home once; tests get copies, as certificates and migrations take a tenth of a second."""
    folder = Path(tempfile.mkdtemp(prefix="flep-home-")) / "owner"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    home = create_home(
        folder, administrators=administrators, threshold=threshold, hosts=["127.0.0.1", "localhost"]
    )
    bundle = ImageKeyBundle.generate(get_preset("aead").parameters, NoiseParameters(std=0))
    with OwnerDatabase.create(home.database, home.database_key()) as database:
        database.add_dataset(DATASET, CLASSES, bundle=bundle)
    return folder


def new_home(folder: Path, *, administrators: Sequence[str] = ("admin",), threshold: int = 1) -> OwnerHome:
    """Make a home with an empty data set."""
    shutil.copytree(_template(tuple(administrators), threshold), folder)
    return load_home(folder)


@contextlib.contextmanager
def gateway_parts(
    folder: Path, *, limits: Limits | None = None, policy: CapturePolicy | None = None, **options: Any
) -> Iterator[Parts]:
    """Build a gateway's parts over a new home; ``now[0]`` sets its clock where it is not 0."""
    home = load_home(folder) if (folder / "home.json").exists() else new_home(folder, **options)
    now = [0.0]

    def clock() -> float:
        return now[0] or time.time()

    with OwnerDatabase(home.database, home.database_key()) as database:
        audit = AuditLog(home.audit, home.audit_signing_key(), background=True)
        registry = DeviceRegistry(home.devices, home.administrators, threshold=home.threshold)
        listeners = {
            name: Listener(name, limits or Limits(), audit) for name in ("ingest", "release", "admin")
        }
        book = ReleaseBook(database, home.signing_key())
        ingest = Ingest(database, registry, listeners["ingest"], policy, clock=clock)
        release = Release(book, listeners["release"], owner_key=home.owner_key, clock=clock)
        admin = Admin(
            database,
            registry,
            listeners["admin"],
            listeners=listeners,
            administrators={key.public_bytes_raw(): name for name, key in home.administrators.items()},
            owner_key=home.owner_key,
            clock=clock,
        )
        apps = {
            "ingest": ingest_app(ingest, listeners["ingest"]),
            "release": release_app(release, listeners["release"]),
            "admin": admin_app(admin, listeners["admin"]),
        }
        try:
            yield Parts(home, database, registry, audit, listeners, apps, book, now)
        finally:
            audit.close()


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class GatewayProcess:
    """``python -m scripts.owner action=serve`` in a process of its own."""

    def __init__(self, home: OwnerHome, folder: Path, **networks: str) -> None:
        self.home, self.folder = home, folder
        self.ports = dict(zip(("ingest", "release", "admin"), free_ports(3), strict=True))
        roles = {"ingest": "device", "release": "analyst", "admin": "operator"}
        rules = [
            {"direction": "in", "role": roles[name], "cidr": networks.get(name, "127.0.0.0/8"), "port": name}
            for name in self.ports
        ]
        self.rules = folder / "network.yaml"
        self.rules.write_text(json.dumps({"ports": self.ports, "groups": {"gateway": rules}}))
        self.process: subprocess.Popen[str] | None = None

    def options(self) -> list[str]:
        addresses = [f"{name}.address=127.0.0.1:{port}" for name, port in self.ports.items()]
        return [f"home={self.home.folder}", f"network={self.rules}", *addresses]

    def start(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.owner", "action=serve", *self.options(), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("ready"):
                return
        raise AssertionError("".join(said))

    def url(self, listener: str) -> str:
        return f"https://127.0.0.1:{self.ports[listener]}"

    def client(self, listener: str, **options: Any) -> httpx.Client:
        context = client_context(self.home.root.certificate)
        return httpx.Client(
            verify=context, base_url=self.url(listener), timeout=60, trust_env=False, **options
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate()

    def stop(self) -> tuple[int, str]:
        """End it with SIGTERM; gives exit code and what it still said."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


@contextlib.contextmanager
def running_gateway(
    home: OwnerHome, folder: Path, *options: str, **networks: str
) -> Iterator[GatewayProcess]:
    """Run a gateway for a block."""
    gateway = GatewayProcess(home, folder, **networks)
    gateway.start(*options)
    try:
        yield gateway
    finally:
        if gateway.process is not None and gateway.process.poll() is None:
            gateway.kill()
