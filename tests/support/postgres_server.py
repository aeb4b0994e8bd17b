"""A PostgreSQL server of Debian's package, started by a test on a socket of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def require_server() -> Path:
    """Return the folder of the server's programs, or skip the test with the reason."""
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    found = [folder for folder in _FOLDERS if (folder / "initdb").is_file()]
    if not found:
        pytest.skip("no PostgreSQL server here (apt-get install postgresql)")
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and runuser is missing")
    return found[0]


class PostgresServer:
    """A server on a Unix socket in a temporary folder; a context manager."""

    def __init__(self) -> None:
        self.programs = require_server()
        self.folder = Path(tempfile.mkdtemp(prefix="flep-pg-"))  # short: a socket's path is limited
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(self.folder, self.user, self.user)
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-U", "owner", "--no-sync")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def _as_user(self) -> list[str]:
        return ["runuser", "-u", self.user, "--"] if self.user else []

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        command = [*self._as_user(), str(self.programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, cwd=self.folder, check=False)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.returncode

    def start(self) -> None:
        command = [str(self.programs / "postgres"), "-D", str(self.data), "-k", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._as_user(), *command, "-c", "listen_addresses="],
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while self._run("pg_isready", "-h", str(self.folder), "-U", "owner", check=False):
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the server and all its children, as a power cut would."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for victim in (pid, *map(int, children)):
            os.kill(victim, signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def new_database(self, name: str) -> str:
        self._run("createdb", "-h", str(self.folder), "-U", "owner", name)
        return f"postgresql+psycopg://owner@/{name}?host={self.folder}"

    def files(self) -> list[Path]:
        """Return the files of databases that tests made (not the server's templates) and the WAL."""
        newest = sorted(self.data.glob("base/*"), key=lambda folder: int(folder.name))[-1]
        return [path for path in (*newest.iterdir(), *self.data.glob("pg_wal/*")) if path.is_file()]

    def __enter__(self) -> PostgresServer:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self._run("pg_ctl", "-D", str(self.data), "stop", "-m", "immediate", check=False)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
