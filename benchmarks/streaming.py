"""Does the cloud's memory grow with the sites? ``python -m benchmarks.streaming``.

Runs the real strategy, adder and seals over updates of one size from many sites, and reads the peak resident
memory (``VmHWM``) of the cloud's processes: once on the in-process grid (one process holds the cloud and one
site's message at a time), once over Flower's SuperLink with every site its own process. The sites sign one
prepared CKKS ciphertext each, instead of training and encrypting: what they hold is not what is measured.
Linux only; needs about 0.3 kB of disk per weight and site for the SuperLink.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from flep_fl.ai_cloud.strategy import EncryptedFedAvg, Terms
from flep_fl.contracts.files import write_secret
from flep_fl.contracts.protocol import (
    FLEP_RECORD,
    OK,
    PAYLOAD_RECORD,
    PAYLOAD_STYPE,
    Instruction,
)
from flep_fl.flower.compose_cloud import cloud_app
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.processes import spawn_child, stop_on_signals, terminate
from flep_fl.flower.runtime.traffic import message_bytes
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.layout import ModelLayout, Tensor
from flep_fl.model_security.profiles import get_profile, vector_length
from flep_fl.model_security.seal import (
    UpdateHeader,
    new_nonce,
    open_control,
    seal_control,
    seal_update,
)

FEDERATION = "0123456789abcdef" * 2
CONFIG = "00" * 32
RECEIVE_SECONDS = 1800.0


# --- what all parties know ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """Keys, layout and the one ciphertext, as they lie in a folder."""

    folder: Path
    weights: int
    key_id: str
    profile: str
    cloud_key: Ed25519PrivateKey
    site_keys: Mapping[str, Ed25519PrivateKey]

    @property
    def layout(self) -> ModelLayout:
        """One tensor that holds all weights."""
        return ModelLayout((Tensor("weights", (self.weights,), "float32"),))

    @property
    def payload(self) -> bytes:
        """The ciphertext that every site signs."""
        return (self.folder / "payload").read_bytes()


def prepare(folder: Path, weights: int, profile: str, sites: int) -> None:
    """Make keys and one ciphertext of ``weights`` weights."""
    from flep_fl.model_security.cipher import CkksModelCipher
    from flep_fl.model_security.keyring import ModelKey

    chosen = get_profile(profile)
    key = ModelKey.generate(chosen)
    vector = np.random.default_rng(0).normal(0.0, 0.05, vector_length(weights, checked=True))
    (folder / "payload").write_bytes(CkksModelCipher(key, chosen).encrypt(vector))
    (folder / "context").write_bytes(key.public_context())
    # Names of different lengths shift the ciphertext in its envelope: no two sites have a chunk in common,
    # which the SuperLink would keep once.
    names = [f"site-{number:03d}{'x' * (number % 24)}" for number in range(sites)]
    secrets = {name: Ed25519PrivateKey.generate().private_bytes_raw().hex() for name in ["cloud", *names]}
    document = {"weights": weights, "key_id": key.key_id, "profile": profile, "keys": secrets}
    write_secret(folder / "prepared.json", json.dumps(document).encode())


def load(folder: Path, sites: int) -> Prepared:
    """Read what :func:`prepare` made, for the first ``sites`` sites."""
    document = json.loads((folder / "prepared.json").read_bytes())
    keys = {
        name: Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
        for name, secret in document["keys"].items()
    }
    cloud = keys.pop("cloud")
    return Prepared(
        folder,
        document["weights"],
        document["key_id"],
        document["profile"],
        cloud,
        dict(sorted(keys.items())[:sites]),
    )


def make_strategy(prepared: Prepared, rounds: int) -> EncryptedFedAvg:
    """Return the real strategy with the real adder."""
    profile = get_profile(prepared.profile)
    length = vector_length(prepared.weights, checked=True)
    terms = Terms(
        federation=FEDERATION,
        key_id=prepared.key_id,
        profile=profile.digest,
        mode="ckks",
        shared={},
        digest=CONFIG,
        site_keys={name: key.public_key() for name, key in prepared.site_keys.items()},
        rounds=rounds,
        participants=len(prepared.site_keys),
        quorum=len(prepared.site_keys),
        round_timeout=RECEIVE_SECONDS,
    )
    context = (prepared.folder / "context").read_bytes()
    return EncryptedFedAvg(
        terms,
        prepared.cloud_key,
        lambda _size: KeylessAdder(context, profile, length),
        message_bytes=message_bytes,
    )


def make_site(prepared: Prepared, name: str) -> tuple[ClientApp, threading.Event]:
    """Return a ClientApp that signs the prepared ciphertext in every round, and what it sets at the end."""
    app, closed = ClientApp(), threading.Event()
    key, layout = prepared.site_keys[name], prepared.layout
    profile = get_profile(prepared.profile)

    def opened(message: Message) -> Instruction:
        blob = message.content[FLEP_RECORD]["instruction"]
        return Instruction.from_fields(open_control(bytes(blob), prepared.cloud_key.public_key()))  # type: ignore[arg-type]

    def answer(message: Message, fields: dict[str, Any], blob: bytes | None = None) -> Message:
        content = RecordDict({FLEP_RECORD: ConfigRecord({"status": OK, **fields})})
        if blob is not None:
            array = Array(dtype="uint8", shape=(len(blob),), stype=PAYLOAD_STYPE, data=blob)
            content[PAYLOAD_RECORD] = ArrayRecord({"sealed": array})
        return Message(content, reply_to=message)

    def introduce(asked: Instruction) -> bytes:
        return seal_control(
            {"run": asked.run, "site": name, "challenge": asked.challenge, "layout": layout.to_json()}, key
        )

    def update(asked: Instruction) -> bytes:
        header = UpdateHeader(
            federation=FEDERATION,
            run=asked.run,
            round=asked.round,
            attempt=asked.attempt,
            sender=name,
            nonce=new_nonce(),
            previous=asked.previous,
            key_id=prepared.key_id,
            layout=layout.digest,
            profile=profile.digest,
            config=CONFIG,
            mode="ckks",
        )
        return seal_update(header, prepared.payload, key)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked = opened(message)
        if asked.kind == "hello":
            return answer(message, {"site": name, "identity": introduce(asked)})
        if asked.kind == "round":
            return answer(message, {}, update(asked))
        closed.set()
        return answer(message, {})

    return app, closed


# --- the measured processes ---------------------------------------------------------------------------


def peak_megabytes(pid: int | str = "self") -> float:
    """Return a process's peak resident memory in MB (10^6 bytes); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def simulate(prepared: Prepared, rounds: int) -> dict[str, float]:
    """Run on the in-process grid."""
    apps = {number: make_site(prepared, name)[0] for number, name in enumerate(prepared.site_keys, start=2)}
    before, started = peak_megabytes(), time.perf_counter()
    strategy = make_strategy(prepared, rounds)
    run_server_app(cloud_app(strategy), LocalGrid(apps, log=_complain), {})
    _require_complete(strategy, rounds, len(apps))
    return {
        "before_mb": before,
        "cloud_mb": peak_megabytes(),
        "seconds": time.perf_counter() - started,
        "sum_mb": sum(record.bytes_up for record in strategy.rounds) / len(apps) / rounds / 1e6,
    }


def held_app(strategy: EncryptedFedAvg, seconds: float) -> ServerApp:
    """Return a ServerApp that looks for replies ``seconds`` after it has asked: they all wait by then."""
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Context) -> None:
        push, pull, until = grid.push_messages, grid.pull_messages, [0.0]

        def push_messages(messages: list[Message]) -> list[str]:
            ids: list[str] = push(messages)
            if messages and messages[0].metadata.group_id != "0":  # no handshake
                until[0] = time.monotonic() + seconds
            return ids

        def pull_messages(ids: list[str]) -> Any:
            time.sleep(max(0.0, until[0] - time.monotonic()))
            return pull(ids)

        grid.push_messages, grid.pull_messages = push_messages, pull_messages
        strategy.start(grid)

    return app


def serve(
    prepared: Prepared, rounds: int, address: str, home: Path, database: str, hold: float
) -> dict[str, float]:
    """Run the cloud over Flower's SuperLink; watch the child's memory and the database's size."""
    from flep_fl.flower.runtime.cloud import run_cloud

    peaks = {"superlink_mb": 0.0, "disk_mb": 0.0}
    done = threading.Event()
    database_file = home / "flower.db"
    if database == "flower":
        _serve_with_flowers_database(database_file)

    def watch() -> None:
        while not done.wait(0.1):
            for child in Path("/proc/self/task").glob("*/children"):
                try:
                    found = [peak_megabytes(pid) for pid in child.read_text().split()]
                except OSError:  # a thread, or a child, has ended
                    continue
                peaks["superlink_mb"] = max([peaks["superlink_mb"], *found])
            size = 0
            for file in [*(home / "objects").glob("*"), *home.glob("flower.db*")]:
                try:
                    size += file.stat().st_size
                except OSError:
                    continue
            peaks["disk_mb"] = max(peaks["disk_mb"], size / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    strategy = make_strategy(prepared, rounds)
    started = time.perf_counter()
    with stop_on_signals() as stop:
        run_cloud(
            held_app(strategy, hold),
            address=address,
            home=home,
            run_config={},
            stop=stop,
            log=_complain,
            database="disk" if database == "disk" else "memory",
        )
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    _require_complete(strategy, rounds, len(prepared.site_keys))
    return {"cloud_mb": peak_megabytes(), "seconds": seconds, **peaks}


def _serve_with_flowers_database(file: Path) -> None:
    """Let ``run_cloud`` start ``benchmarks.flower_database`` in the place of our SuperLink."""
    from flep_fl.flower.runtime import cloud

    def spawn(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        place = command.index("flep_fl.flower.runtime.superlink")
        changed = [*command[:place], "benchmarks.flower_database", *command[place + 1 :]]
        return spawn_child(changed, env={**env, "FLEP_BENCH_DATABASE": str(file)}, **options)

    cloud.spawn_child = spawn


def take_part(prepared: Prepared, name: str, address: str, home: Path) -> None:
    """Run one site over the SuperLink."""
    from flep_fl.flower.runtime.site import run_site

    app, closed = make_site(prepared, name)
    with stop_on_signals() as stop:
        run_site(
            app,
            cloud=address,
            site=name,
            home=home,
            done=closed.is_set,
            stop=stop,
            idle_timeout=RECEIVE_SECONDS,
            node_config={},
            log=_complain,
        )


def _require_complete(strategy: EncryptedFedAvg, rounds: int, sites: int) -> None:
    counts = [len(record.replied) for record in strategy.rounds]
    if counts != [sites] * rounds:
        raise SystemExit(f"not every update arrived: {counts}")


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the table ----------------------------------------------------------------------------------------


def _measure(*arguments: object) -> dict[str, float]:
    """Run one measurement in a process of its own; its last line is the result."""
    command = [sys.executable, "-m", "benchmarks.streaming", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own module
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _over_superlink(folder: Path, sites: int, rounds: int, database: str, hold: float) -> dict[str, float]:
    from flep_fl.flower.runtime.environment import bind

    with bind("127.0.0.1:0") as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    module = [sys.executable, "-m", "benchmarks.streaming", "--folder", str(folder)]
    children = []
    with tempfile.TemporaryDirectory(dir=folder) as homes:
        try:
            for name in load(folder, sites).site_keys:
                arguments = ["--role", "site", "--name", name, "--address", address]
                home = Path(homes) / name
                children.append(
                    spawn_child([*module, *arguments, "--home", str(home)], log=home / "site.log")
                )
            return _measure(
                *("--folder", folder, "--role", "cloud", "--sites", sites, "--rounds", rounds),
                *("--address", address, "--home", Path(homes) / "cloud"),
                *("--database", database, "--hold", hold),
            )
        finally:
            for child in children:
                terminate(child)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=int, default=11_000_000)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sites", default="2,10,50", help="numbers of simulated sites")
    parser.add_argument("--superlink", default="2,4", help="numbers of sites over the SuperLink")
    parser.add_argument(
        "--databases",
        default="memory,disk",
        help="where messages wait: memory, disk (our files), flower (its --database, SQLite)",
    )
    parser.add_argument(
        "--hold",
        type=float,
        default=0.0,
        help="seconds for which the cloud leaves all replies in the SuperLink",
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=("simulate", "cloud", "site", "prepare"), help=argparse.SUPPRESS)
    for hidden in ("--name", "--address", "--database"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role is not None:
        return _play(options)
    counts = [int(count) for count in options.sites.split(",") if count]
    linked = [int(count) for count in options.superlink.split(",") if count]
    with tempfile.TemporaryDirectory(prefix="flep-streaming-") as name:
        folder = Path(name)
        _measure(
            *("--role", "prepare", "--folder", folder, "--sites", max(counts + linked)),
            *("--weights", options.weights, "--profile", options.profile),
        )
        payload = (folder / "payload").stat().st_size / 1e6
        print(
            f"{options.weights} weights, profile {options.profile}, an update of {payload:.1f} MB; all in MB"
        )
        print("| grid | sites | ServerApp | SuperLink | files | seconds |\n|---|---|---|---|---|---|")
        common = ("--folder", folder, "--rounds", options.rounds)
        for count in counts:
            found = _measure("--role", "simulate", *common, "--sites", count)
            print(
                f"| in-process | {count} | {found['cloud_mb']:.0f} | - | - | {found['seconds']:.0f} |",
                flush=True,
            )
        for database in options.databases.split(","):
            for count in linked:
                found = _over_superlink(folder, count, options.rounds, database, options.hold)
                print(
                    f"| SuperLink, {database} | {count} | {found['cloud_mb']:.0f} "
                    f"| {found['superlink_mb']:.0f} | {found['disk_mb']:.0f} | {found['seconds']:.0f} |",
                    flush=True,
                )
    return 0


def _play(options: argparse.Namespace) -> int:
    sites = int(options.sites) if options.sites.isdigit() else sys.maxsize
    result: dict[str, float] = {}
    if options.role == "prepare":
        prepare(options.folder, options.weights, options.profile, sites)
    elif options.role == "simulate":
        result = simulate(load(options.folder, sites), options.rounds)
    elif options.role == "cloud":
        prepared = load(options.folder, sites)
        result = serve(
            prepared, options.rounds, options.address, options.home, options.database, options.hold
        )
    else:
        take_part(load(options.folder, sites), options.name, options.address, options.home)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
