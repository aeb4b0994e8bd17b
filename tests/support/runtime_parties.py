"""The trivial parties of ``e2e/runtime_party.py`` as processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTY = ROOT / "tests" / "e2e" / "runtime_party.py"


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


class Starter:
    """Starts parties that share an address, each with its own folder."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self.folder = folder
        self.parties: list[Party] = []

    def __call__(self, role: str, name: str = "cloud", *args: str) -> Party:
        home = str(self.folder / name)
        party = Party(role, "--address", self.address, "--home", home, "--name", name, *args)
        self.parties.append(party)
        return party

    def stop(self) -> None:
        """Kill whatever is left."""
        for party in self.parties:
            if party.process.poll() is None:
                party.process.kill()
            party.process.wait()
