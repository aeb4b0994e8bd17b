"""Real parties for tests: provisioned and sealed through the command line, started as processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

SEAL_SMALL = ("data=digits", "data.limit=240")


def free_address() -> str:
    """Return a loopback address that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def run_script(name: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python -m NAME ARGUMENTS`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", name, *arguments], capture_output=True, text=True, timeout=timeout
    )


@dataclass
class Parties:
    """A provisioned and sealed federation, and the processes that were started for it."""

    folder: Path
    names: tuple[str, ...]
    address: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str, program: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start the cloud or a site (or ``program`` in its place); its output goes to ``<name>.log``."""
        module = "server" if name == "cloud" else "clients"
        command = [sys.executable, *(program or ("-m", module)), f"kit={self.folder / 'kits' / name}"]
        if name != "cloud":
            command.append(f"archive={self.folder / 'archive' / name}")
        command += [f"hydra.run.dir={self.folder / 'runs' / name}", "runtime.threads=1", *arguments]
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ}
            )
        self.processes[name] = child
        return child

    def log(self, name: str) -> str:
        """Return what a party has printed so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name: str, pattern: str, timeout: float = 90) -> None:
        """Wait until a party has printed ``pattern``."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if re.search(pattern, self.log(name)):
                return
            if self.processes[name].poll() is not None and not re.search(pattern, self.log(name)):
                raise AssertionError(f"{name} ended before it said {pattern!r}:\n{self.log(name)}")
            time.sleep(0.05)
        raise AssertionError(f"{name} never said {pattern!r}:\n{self.log(name)}")

    def wait(self, name: str, timeout: float = 90) -> int:
        """Wait for a party's end; return its exit status."""
        try:
            return self.processes[name].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end:\n{self.log(name)}") from None

    def stop(self) -> None:
        """Kill whatever is left."""
        for child in self.processes.values():
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()


def make_parties(
    folder: Path, names: tuple[str, ...], *shared: str, seal: tuple[str, ...] = SEAL_SMALL
) -> Parties:
    """Provision and seal through the command line, as a user does."""
    address = free_address()
    kits, archive = folder / "kits", folder / "archive"
    for script, arguments in (
        (
            "scripts.provision",
            [f"sites=[{','.join(names)}]", f"out={kits}", f"runtime.address={address}", *shared],
        ),
        ("scripts.seal", [*seal, f"kits={kits}", f"out={archive}"]),
    ):
        done = run_script(script, *arguments, f"hydra.run.dir={folder / 'runs' / script}")
        assert done.returncode == 0, done.stderr
    return Parties(folder, names, address)


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children and theirs, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def snapshot(pid: int) -> list[bytes]:
    """Copy a process's writable memory; the caller should have stopped it."""
    regions = []
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, access, *_ = line.split()
            if not access.startswith("rw") or "[v" in line:
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            try:
                memory.seek(start)
                regions.append(memory.read(end - start))
            except (OSError, ValueError, OverflowError):
                continue
    assert sum(map(len, regions)) > 10_000_000, "the memory of a Python process could not be read"
    return regions


def found_in(regions: list[bytes], needles: list[bytes]) -> list[bytes]:
    """Return the needles that occur in any of the regions."""
    return [needle for needle in needles if any(needle in region for region in regions)]
