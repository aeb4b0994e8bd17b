"""A real Flower deployment for tests: SuperLink and SuperNodes with subprocess isolation, and `flwr run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from parties import descendants, free_address

BIN = Path(sys.executable).parent


@dataclass
class Deployment:
    """Flower's own processes, with nothing of ours started beside them."""

    folder: Path
    address: str = field(default_factory=free_address)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def environment(self, home: str) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
            "FLWR_HOME": str(self.folder / "homes" / home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def _start(self, name: str, *command: str) -> None:
        (self.folder / "homes" / name).mkdir(parents=True)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [str(BIN / command[0]), *command[1:]],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env=self.environment(name),
                    start_new_session=True,
                )
            )

    def start(self, node_configs: Sequence[str]) -> None:
        """Start the SuperLink, then one SuperNode for each node configuration."""
        host, port = self.address.split(":")
        self._start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", host, "--port", port),
            "--disable-runtime-dependency-installation",
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"http://{self.address}/health").is_success:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, self.log("superlink")
            time.sleep(0.1)
        for number, config in enumerate(node_configs):
            node_port = free_address().split(":")[1]
            self._start(
                f"node{number}",
                *("flower-supernode", "--insecure", "--superlink", self.address, "--port", node_port),
                *("--node-config", config),
            )

    def flwr(self, *arguments: str, timeout: float = 60) -> str:
        """Call the ``flwr`` command as a user does; return what it prints."""
        home = self.folder / "homes" / "user"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n'
            f'[superlink.here]\naddress = "{self.address}"\ninsecure = true\n'
        )
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.folder,
            env=self.environment("user"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, app: Path, *arguments: str, timeout: float = 420) -> tuple[str, str]:
        """``flwr run APP``; wait for the run's end; return its status and what the ServerApp printed."""
        answer = json.loads(self.flwr("run", str(app), *arguments, "--format", "json"))
        number = str(answer["run-id"])
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            listed = json.loads(self.flwr("list", "--run-id", number, "--format", "json"))
            status = str(listed["runs"][0]["status"])
            if status.startswith("finished"):
                return status, self.flwr("log", number, "--show")
            time.sleep(2)
        raise AssertionError("the run did not end:\n" + self.logs())

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        """End all processes and what they started."""
        for process in reversed(self.processes):
            children = descendants(process.pid)
            process.kill()
            process.wait()
            for child in children:
                try:
                    os.kill(child, 9)
                except ProcessLookupError:
                    continue
