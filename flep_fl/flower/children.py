"""A cast of child processes: each has a name and a log, whoever fails is named, and none is left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType

from flep_fl.contracts.errors import RuntimeStartError
from flep_fl.flower.processes import spawn_child, terminate
from flep_fl.flower.runtime.environment import log_tail
from flep_fl.reporting.console import say

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0
_TAIL_LINES = 8


class Children:
    """Child processes by name; a context manager that ends all of them.

    Parameters
    ----------
    logs
        Folder for ``<name>.log``; what a child writes there is shown on standard output as well, behind its
        name where the line does not begin with one.
    stop
        Set when the user wants everything to end; what waits here then raises KeyboardInterrupt.
    """

    def __init__(self, logs: Path, stop: threading.Event) -> None:
        self._logs, self._stop = logs, stop
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lasting: set[str] = set()
        self._shown: dict[str, int] = {}

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._running.values():
            child.poll()
            if child.returncode is None:
                child.terminate()  # all of them at once, so that their graces run side by side
        for child in self._running.values():
            terminate(child, grace=_GRACE_SECONDS)
        self._relay()

    def start(self, name: str, module: str, *arguments: str, lasting: bool = False) -> int:
        """Start ``python -m MODULE ARGUMENTS`` under a name that nobody running has; return its pid.

        Parameters
        ----------
        lasting
            It serves until :meth:`end`; that it ends by itself is a failure.
        """
        self._shown.setdefault(name, 0)
        child = spawn_child([sys.executable, "-m", module, *arguments], log=self._log(name))
        self._running[name] = child
        if lasting:
            self._lasting.add(name)
        return child.pid

    def wait(self, names: Collection[str], *, check: Callable[[list[str]], None] = lambda left: None) -> None:
        """Wait until these children have ended well; ``check`` gets the names of those that have not.

        Raises
        ------
        RuntimeStartError
            One of all the children has failed; it is named, with the end of its log.
        KeyboardInterrupt
            The user wants to stop.
        """
        while True:
            self.look()
            left = [name for name in names if name in self._running]
            if not left:
                return
            check(left)
            self._stop.wait(_POLL_SECONDS)

    def wait_for_line(self, name: str, text: str, *, seconds: float) -> None:
        """Wait until a child's log says ``text``; errors as :meth:`wait`, and after ``seconds``."""
        deadline = time.monotonic() + seconds
        while text not in self._read(name):
            self.look()
            if time.monotonic() > deadline:
                raise RuntimeStartError(
                    f"{name} is not ready after {seconds:g} s; its last lines: {self._tail(name)}"
                )
            self._stop.wait(_POLL_SECONDS)

    def end(self, names: Collection[str]) -> None:
        """Ask lasting children to end, and wait until they have; errors as :meth:`wait`."""
        for name in names:
            self._lasting.discard(name)
            self._running[name].terminate()
        deadline = time.monotonic() + _GRACE_SECONDS

        def check(left: list[str]) -> None:
            if time.monotonic() > deadline:
                raise RuntimeStartError(f"{', '.join(left)} did not end within {_GRACE_SECONDS:g} s")

        self.wait(names, check=check)

    def look(self) -> None:
        """Show what the children have said, let those that ended well go, and name one that failed."""
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._relay()
        ended = {name: child.returncode for name, child in self._running.items() if child.poll() is not None}
        for name, status in ended.items():
            if status == 0 and name not in self._lasting:
                del self._running[name]
        self._relay()  # what they said last
        for name, status in ended.items():
            if status != 0 or name in self._lasting:
                raise RuntimeStartError(
                    f"{name} ended with status {status}; its last lines: {self._tail(name)}",
                    remedy=f"The whole log is {self._log(name)}",
                )

    def running(self, name: str) -> bool:
        """Say whether a child has not ended yet."""
        return name in self._running and self._running[name].poll() is None

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        return log_tail(self._log(name), _TAIL_LINES)

    def _read(self, name: str) -> str:
        log = self._log(name)
        return log.read_text(errors="replace") if log.exists() else ""

    def _relay(self) -> None:
        for name, position in self._shown.items():
            log = self._log(name)
            if not log.exists():
                continue
            with log.open("rb") as file:
                file.seek(position)
                news = file.read()
            whole = news[: news.rfind(b"\n") + 1]
            for line in whole.decode(errors="replace").splitlines():
                say(line if line.startswith("[") else f"[{name}] {line}")
            self._shown[name] = position + len(whole)


def option(name: str, value: object) -> str:
    """Return ``name=value`` as an override for hydra, whatever characters a text or path holds.

    Parameters
    ----------
    value
        A number, text, path, truth value, None, or a sequence of them.
    """
    return f"{name}={_written(value)}"


def _written(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        # In hydra's grammar a backslash escapes only before a quote, so only there it is doubled.
        escaped = re.sub(r"(\\*)'", r"\1\1\'", str(value))
        escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
        return f"'{escaped}'"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_written, value)) + "]"
    raise TypeError(type(value).__name__)  # pragma: no cover - a setting of another kind is our mistake
