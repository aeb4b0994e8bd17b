"""A headless Chromium through its DevTools protocol, for tests of pages."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
_START_SECONDS = 60.0


class Browser:
    """One tab. Collects what the page logs, fails at, and asks the network for."""

    def __init__(self, connection: ClientConnection, session: str) -> None:
        self._connection, self._session = connection, session
        self._numbers = itertools.count(1000)
        self._loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result."""
        number = next(self._numbers)
        message = {"id": number, "sessionId": self._session, "method": method, "params": parameters}
        self._connection.send(json.dumps(message))
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _receive(self, timeout: float = 60) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._connection.recv(timeout=timeout))
        method, found = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(str([entry.get("value") for entry in found["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.errors.append(found["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file at a window size and colour scheme, and wait until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.errors, self.requests = [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 60
        while not self._loaded:
            assert time.monotonic() < deadline, "the page did not load"
            self._receive()
        self.run("1")  # what the page has logged by now stands before this answer

    def run(self, script: str) -> Any:
        """Evaluate JavaScript and return its value."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save what the page looks like, PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile in ``folder``; all its processes are gone afterwards."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    profile.mkdir()
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        with connect(_endpoint(profile, process), max_size=None) as connection:
            yield Browser(connection, _first_tab(connection))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _endpoint(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait for the port that Chromium chose; return the address of its DevTools."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, (profile.parent / "chromium.log").read_text(errors="replace")[-2000:]
        try:
            port, path = (profile / "DevToolsActivePort").read_text().split("\n")[:2]
        except (OSError, ValueError):
            time.sleep(0.05)
            continue
        return f"ws://127.0.0.1:{port}{path}"
    raise AssertionError("Chromium did not open its DevTools port")


def _first_tab(connection: ClientConnection) -> str:
    def call(number: int, method: str, **parameters: Any) -> dict[str, Any]:
        connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer: dict[str, Any] = json.loads(connection.recv(timeout=_START_SECONDS))
            if answer.get("id") == number:
                return answer["result"]

    targets = call(1, "Target.getTargets")["targetInfos"]
    tab = next(target for target in targets if target["type"] == "page")
    session: str = call(2, "Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
    return session
