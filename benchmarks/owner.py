"""Rates of the data owner's gateway: ``python -m benchmarks.owner``; with ``--records 100000``, how it pages.

A real gateway (``scripts.owner action=serve``, TLS, SQLite) takes signed captures from many devices at once,
and gives the released records back to several analysts at once. The limit that they are held against is
measured in the same run, alone, on one core: for ingest SHA-256, Ed25519 verification, AES-256-GCM-SIV and an
SQLite commit of the sealed bytes; for release Ed25519, SQLite read, opening of the seal, and a commit (the
access log) for each page. Devices and analysts run on the same machine, so what they take is missing at the
gateway; captures are signed beforehand.

With ``--records N`` a database of N small images (28x28, ``cipher=aead``) is filled, released and paged
through in this process: the CPU time of the last tenth of the pages against the first, and the memory.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import multiprocessing
import os
import secrets
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from flep_fl.contracts.owner_api import MAX_RECORD_LIMIT, unpack_records
from flep_fl.contracts.owner_records import Analyst
from flep_fl.contracts.request_signing import sign_request
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
from flep_fl.data_owner.home import OwnerHome, create_home
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.private_database.grants import create_grant
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.reporting.cipher_tables import markdown

DATASET = "plates"
GROUP = 32
"""Records in one commit of the limit: as many as there are devices, each with one capture under way."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Records per second in repeated measurements."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)


def median_rate(function: Callable[[], int], repeats: int, name: str) -> Rate:
    """Call ``function`` (it returns how many records it did) several times."""
    values = []
    for _ in range(repeats):
        began = time.perf_counter()
        count = function()
        values.append(count / (time.perf_counter() - began))
    return Rate(name, tuple(values))


def parts_of_ingest(folder: Path, image: bytes, count: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the parts of ingest, each alone, and all of them one after the other."""
    key = Ed25519PrivateKey.generate()
    public, message = key.public_key(), secrets.token_bytes(320)
    signature, aead = key.sign(message), AESGCMSIV(secrets.token_bytes(32))
    database = open_plain_database(folder / "limit.sqlite")

    def sha() -> None:
        hashlib.sha256(image).digest()

    def verify() -> None:
        public.verify(signature, message)

    def seal() -> bytes:
        return aead.encrypt(secrets.token_bytes(12), image, b"place")

    def commit(rows: list[tuple[str, bytes]]) -> None:
        with database:
            database.executemany("INSERT INTO records (id, sealed) VALUES (?, ?)", rows)

    def each(step: Callable[[], Any]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(count):
                step()
            return count

        return run

    def commits() -> int:
        for _ in range(count // GROUP):
            commit([(secrets.token_hex(16), image) for _ in range(GROUP)])
        return count // GROUP * GROUP

    def everything() -> int:
        for _ in range(count // GROUP):
            rows = []
            for _ in range(GROUP):
                sha()
                verify()
                rows.append((secrets.token_hex(16), seal()))
            commit(rows)
        return count // GROUP * GROUP

    yield "SHA-256", each(sha)
    yield "Ed25519 verification", each(verify)
    yield "AES-256-GCM-SIV", each(seal)
    yield f"SQLite, {GROUP} in a commit", commits
    yield "all of these: the limit of ingest", everything


def parts_of_release(folder: Path, record: bytes, count: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the parts of a release of stored records, a page of ``GROUP`` at a time."""
    key = Ed25519PrivateKey.generate()
    public, message = key.public_key(), secrets.token_bytes(320)
    signature, aead = key.sign(message), AESGCMSIV(secrets.token_bytes(32))
    sealed = b"\0" * 12 + aead.encrypt(b"\0" * 12, record, b"place")
    database = open_plain_database(folder / "limit-release.sqlite")
    with database:
        rows = [(f"{number:032x}", sealed) for number in range(count)]
        database.executemany("INSERT INTO records (id, sealed) VALUES (?, ?)", rows)

    def everything() -> int:
        done, last = 0, ""
        while True:
            public.verify(signature, message)
            query = "SELECT id, sealed FROM records WHERE id > ? ORDER BY id LIMIT ?"
            found = database.execute(query, (last, GROUP)).fetchall()
            if not found:
                return done
            b"".join(aead.decrypt(blob[:12], blob[12:], b"place") for _, blob in found)
            with database:
                database.execute("INSERT INTO log (entry) VALUES (?)", (message,))
            done, last = done + len(found), found[-1][0]

    yield "Ed25519, read, opening, commit: the limit of release", everything


def open_plain_database(path: Path) -> sqlite3.Connection:
    """Open SQLite as the private database does: WAL, synchronous FULL."""
    database = sqlite3.connect(path)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=8192"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("CREATE TABLE records (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, sealed BLOB)")
    database.execute("CREATE TABLE log (entry BLOB)")
    return database


@contextmanager
def gateway(home: OwnerHome, folder: Path) -> Iterator[tuple[dict[str, int], int]]:
    """Run a gateway on free ports of loopback; gives the ports and the process's number."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = dict(zip(("ingest", "release", "admin"), (s.getsockname()[1] for s in sockets), strict=True))
    for one in sockets:
        one.close()
    roles = {"ingest": "device", "release": "analyst", "admin": "operator"}
    rules = [{"direction": "in", "role": roles[name], "cidr": "127.0.0.0/8", "port": name} for name in ports]
    (folder / "network.yaml").write_text(json.dumps({"ports": ports, "groups": {"gateway": rules}}))
    options = [f"home={home.folder}", f"network={folder / 'network.yaml'}"]
    for name, port in ports.items():
        options += [f"{name}.address=127.0.0.1:{port}"]
        options += [f"{name}.{limit}=1000000" for limit in ("rate", "burst")]
    process = subprocess.Popen(  # noqa: S603 - this interpreter, our own arguments
        [sys.executable, "-m", "scripts.owner", "action=serve", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    lines = process.stdout or ()
    try:
        if not any(line.startswith("ready") for line in lines):
            raise RuntimeError("the gateway did not start")
        yield ports, process.pid
    finally:
        process.terminate()
        process.wait()


class Device:
    """A device on one kept connection, with all its requests made beforehand."""

    def __init__(self, name: str, image: bytes, side: int, count: int) -> None:
        self.name, self.key = name, Ed25519PrivateKey.generate()
        self.requests = []
        for number in range(1, count + 1):
            description = Description(
                name,
                number,
                time.time_ns() // 1000,
                digest_of(image),
                "raw-uint8",
                (side, side),
                DATASET,
                "a",
                "train",
            ).to_bytes()
            head = (
                f"POST /v1/captures HTTP/1.1\r\nHost: g\r\nContent-Length: {len(image)}\r\n"
                f"{CAPTURE_HEADER}: {encode_header(description)}\r\n"
                f"{SIGNATURE_HEADER}: {encode_header(sign_capture(self.key, description))}\r\n\r\n"
            )
            self.requests.append(head.encode())

    def connect(self, context: ssl.SSLContext, port: int) -> None:
        """Open the connection."""
        plain = socket.create_connection(("127.0.0.1", port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = context.wrap_socket(plain, server_hostname="127.0.0.1")

    def send_all(self, image: bytes) -> None:
        """Send every capture, one after the answer to the other."""
        for request in self.requests:
            self.socket.sendall(request + image)
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come apart; the body is one JSON object
                chunk = self.socket.recv(4096)
                if not chunk:
                    raise RuntimeError("the gateway ended the connection")
                answer += chunk
            if not answer.startswith(b"HTTP/1.1 201"):
                raise RuntimeError(answer.decode(errors="replace"))


def at_once(works: Sequence[Callable[[], int]]) -> tuple[int, float]:
    """Run functions in threads at once; gives the sum of what they return, and the seconds."""
    with ThreadPoolExecutor(len(works)) as pool:
        barrier = threading.Barrier(len(works) + 1)

        def run(work: Callable[[], int]) -> int:
            barrier.wait()
            return work()

        running = [pool.submit(run, work) for work in works]
        barrier.wait()
        began = time.perf_counter()
        count = sum(one.result() for one in running)
        return count, time.perf_counter() - began


def in_a_process(works: Sequence[Callable[[], int]]) -> float:
    """Run functions at once in a process of their own; gives the sum of what they return, per second."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def body() -> None:
        try:
            results.put(at_once(works))
        except BaseException as error:  # told to the parent, which raises it
            results.put(repr(error))

    client = context.Process(target=body)
    client.start()
    found = results.get()
    client.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return float(found[0] / found[1])


def measure_ingest(home: OwnerHome, ports: dict[str, int], devices: list[Device], image: bytes) -> float:
    """Return captures per second, all devices at once."""
    context = client_context(home.root.certificate)

    def work(device: Device) -> Callable[[], int]:
        def send() -> int:
            device.send_all(image)
            return len(device.requests)

        return send

    for device in devices:
        device.connect(context, ports["ingest"])
    return in_a_process([work(device) for device in devices])


def fetch_all(home: OwnerHome, port: int, key: Ed25519PrivateKey, grant: str) -> int:
    """Fetch every record of a grant, page after page; gives the number of records."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=client_context(home.root.certificate))

    def ask(method: str, target: str) -> tuple[bytes, str]:
        headers = sign_request(
            method,
            target,
            b"",
            audience=home.owner_key,
            key=key.public_key().public_bytes_raw(),
            sign=key.sign,
            created=int(time.time()),
        )
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(body.decode())
        return body, answer.headers.get("flep-cursor", "")

    release = json.loads(ask("POST", f"/v1/grants/{grant}/open")[0])["release_id"]
    cursor, count = "0", 0
    while cursor:
        body, cursor = ask("GET", f"/v1/grants/{grant}/releases/{release}/records?cursor={cursor}")
        count += sum(1 for _ in unpack_records(body))
    return count


def prepare(folder: Path, devices: Sequence[Device]) -> OwnerHome:
    """Make a home with a data set, and enrol the devices."""
    home = create_home(folder / "owner", administrators=["admin"], threshold=1, hosts=["127.0.0.1"])
    bundle = ImageKeyBundle.generate(get_preset("flep").parameters, NoiseParameters(std=25.0))
    with OwnerDatabase.create(home.database, home.database_key()) as database:
        database.add_dataset(DATASET, ("a", "b"), bundle=bundle)
    registry = DeviceRegistry(home.devices, home.administrators)
    for device in devices:
        statement = approve(
            home.administrator_key("admin"),
            administrator="admin",
            action="enrol",
            device=device.name,
            key=device.key.public_key().public_bytes_raw().hex(),
            datasets=[DATASET],
            lifetime=86400,
        )
        registry.apply(statement)
    return home


def measure_paging(folder: Path, records: int) -> None:
    """Fill a database, release it, page through it, and print what each step took."""
    key, batch = Ed25519PrivateKey.generate(), 1000
    bundle = ImageKeyBundle.generate(get_preset("aead").parameters, NoiseParameters(std=0.0))
    rng = np.random.default_rng(0)
    rows = []

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def step(name: str, function: Callable[[], Any]) -> Any:
        before, began, cpu = resident(), time.perf_counter(), time.process_time()
        found = function()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        rows.append([name, f"{records / seconds:,.0f}", f"{cpu:.1f}", f"{before:.0f} -> {resident():.0f}"])
        return found

    def fill() -> None:
        for _ in range(records // batch):
            images = [rng.integers(0, 256, (28, 28), dtype=np.uint8) for _ in range(batch)]
            database.ingest(images, [0, 1] * (batch // 2), ["train"] * batch)

    def page() -> list[float]:
        book, public = ReleaseBook(database, signing), key.public_key().public_bytes_raw()
        release, cursor, times = book.open_grant(grant.grant_id, public).release_id, 0, []
        while cursor is not None:
            began = time.process_time()
            found = book.record_page(
                grant.grant_id, public, release_id=release, cursor=cursor, limit=MAX_RECORD_LIMIT
            )
            times.append(time.process_time() - began)
            cursor = found.cursor
        return times

    signing = Ed25519PrivateKey.generate()
    with OwnerDatabase.create(folder / "small.sqlite", secrets.token_bytes(32)) as database:
        database.add_dataset(DATASET, ("a", "b"), bundle=bundle)
        step("stored", fill)
        step("released", lambda: ReleaseBook(database, signing).release(DATASET))
        encryption = X25519PrivateKey.generate().public_key().public_bytes_raw()
        analyst = Analyst("site-a", key.public_key().public_bytes_raw(), encryption)
        grant = create_grant(database, dataset=DATASET, analyst=analyst, not_after=time.time() + 86400)
        rounds = [step("paged", page) for _ in range(3)]
    print(markdown((f"{records:,} records", "records/s", "CPU s", "resident MB"), rows))
    ratios = []
    for times in rounds:
        tenth = max(1, len(times[:-1]) // 10)  # the very last page is not full
        ratios.append(sum(times[-1 - tenth : -1]) / sum(times[:tenth]))
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"\npages of {MAX_RECORD_LIMIT}: the last tenth takes {shown} times the processor time of the first"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=32, help="devices at once (default 32)")
    parser.add_argument("--captures", type=int, default=60, help="captures of each device (default 60)")
    parser.add_argument("--analysts", type=int, default=4, help="analysts at once (default 4)")
    parser.add_argument("--side", type=int, default=300, help="pixels a side (default 300)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure (default 3)")
    parser.add_argument("--records", type=int, help="page through so many small records, and do nothing else")
    options = parser.parse_args(arguments)
    if options.records:
        with tempfile.TemporaryDirectory(prefix="flep-bench-") as name:
            measure_paging(Path(name), options.records)
        return 0
    image = np.random.default_rng(0).integers(0, 256, (options.side,) * 2, dtype=np.uint8).tobytes()
    count = options.devices * options.captures
    with tempfile.TemporaryDirectory(prefix="flep-bench-") as name:
        folder = Path(name)
        *parts, (_, limit) = parts_of_ingest(folder, image, count)
        for part, function in parts:
            print(f"{part}: {median_rate(function, 1, part).median:,.0f} records/s alone", flush=True)
        rounds, place, home = [], folder, None
        for repeat in range(options.repeats):
            devices = [
                Device(f"cam-{n}", image, options.side, options.captures) for n in range(options.devices)
            ]
            place = folder / str(repeat)
            place.mkdir()
            home = prepare(place, devices)
            with gateway(home, place) as (ports, process):
                rounds.append(
                    one_round(
                        "ingest", limit, count, process,
                        lambda home=home, ports=ports, devices=devices: measure_ingest(  # type: ignore[misc]
                            home, ports, devices, image
                        ),
                    )
                )  # fmt: skip
        print_rounds(f"ingest, {options.devices} devices", rounds)
        assert home is not None  # noqa: S101 - there is at least one round
        key = Ed25519PrivateKey.generate()
        with OwnerDatabase(home.database, home.database_key()) as database:
            ReleaseBook(database, home.signing_key()).release(DATASET)
            analyst = Analyst(
                "site-a",
                key.public_key().public_bytes_raw(),
                X25519PrivateKey.generate().public_key().public_bytes_raw(),
            )
            grant = create_grant(database, dataset=DATASET, analyst=analyst, not_after=time.time() + 86400)
        record = secrets.token_bytes(options.side**2 * 13 // 16)  # 6.5 bits a pixel: cipher=flep
        ((_, limit),) = parts_of_release(folder, record, count)
        with gateway(home, place) as (ports, process):
            works = [lambda: fetch_all(home, ports["release"], key, grant.grant_id)] * options.analysts
            total = count * options.analysts
            rounds = [
                one_round("release", limit, total, process, lambda: in_a_process(works))
                for _ in range(options.repeats)
            ]
        print_rounds(f"release, {options.analysts} analysts", rounds)
    return 0


def one_round(
    what: str, limit: Callable[[], int], records: int, process: int, measure: Callable[[], float]
) -> tuple[float, float, float, float]:
    """Measure the limit and the gateway, one right after the other, so that both meet the same machine.

    Returns
    -------
    tuple of four floats
        Records per second of the parts alone and of the gateway; CPU milliseconds per record of both.
    """
    began, cpu = time.perf_counter(), time.process_time()
    count = limit()
    parts, parts_cpu = count / (time.perf_counter() - began), (time.process_time() - cpu) / count * 1e3
    before = cpu_seconds(process)
    rate = measure()
    found = (parts, rate, parts_cpu, (cpu_seconds(process) - before) / records * 1e3)
    print(f"{what}: parts {parts:,.0f}/s, gateway {rate:,.0f}/s", flush=True)
    return found


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def print_rounds(what: str, rounds: Sequence[tuple[float, float, float, float]]) -> None:
    """Print every round, and the share of the limit that the gateway reaches in each."""
    rows = [
        [f"{parts:,.0f}", f"{rate:,.0f}", f"{rate / parts:.0%}", f"{parts_cpu:.2f}", f"{cpu:.2f}"]
        for parts, rate, parts_cpu, cpu in rounds
    ]
    heads = ("parts, records/s", "gateway, records/s", "share", "parts, CPU ms", "gateway, CPU ms")
    shares = sorted(rate / parts for parts, rate, _, _ in rounds)
    print(f"\n{markdown(heads, rows)}")
    print(f"\n{what}: {statistics.median(shares):.0%} of the limit of its parts ", end="")
    print(f"({shares[0]:.0%} - {shares[-1]:.0%})\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
