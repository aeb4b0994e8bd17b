"""Child processes that never outlive their parent, and signals that end a program in good order.

This file is also run as a script, with nothing but the standard library on the path: it is the short
first life of every child (see :func:`spawn_child`), so it must not import anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
"""``prctl`` option: the signal that a process gets when the thread that made it ends (Linux)."""

_interruptible = False


class Interrupted(KeyboardInterrupt):
    """The user asked this process to stop (Ctrl-C or SIGTERM); not an error.

    Derived from KeyboardInterrupt so that no ``except Exception`` on the way swallows it.
    """


def spawn_child(
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a child that the kernel kills when this process ends, however it ends (kill -9 too).

    The child first runs this file, which sets the parent-death signal and then *becomes* ``args``: no
    Python code runs between fork and exec of this (threaded) process. It gets a session of its own, so a
    Ctrl-C on the terminal reaches the parent alone, which then ends its children in order.

    The kernel ties the signal to the *thread* that started the child: call this from the main thread, or
    from one that lives as long as the child should. Systems other than Linux have no such signal; there a
    child of a killed parent stays.

    Parameters
    ----------
    args
        Program and arguments; the program is looked up in PATH.
    env
        The child's whole environment; this process's own where None.
    log
        File to append stdout and stderr to; inherited from this process where None.
    cwd
        Working directory.
    pass_fds
        File descriptors that the child inherits under the same numbers.

    Returns
    -------
    subprocess.Popen
        The child; its pid is that of ``args`` itself.
    """
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *args]
    output = None
    try:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        return subprocess.Popen(  # noqa: S603 - the callers' own argument lists, no shell
            command,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    finally:
        if output is not None:
            output.close()


def terminate(child: subprocess.Popen[bytes], grace: float = 5.0) -> int:
    """End a child with SIGTERM, and with SIGKILL where it is still there after ``grace`` seconds.

    Returns
    -------
    int
        The child's exit status (negative: the signal that ended it).
    """
    if child.poll() is None:
        child.terminate()
    try:
        return child.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
    except BaseException:
        child.kill()
        raise


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event for as long as the block runs; main thread only.

    The first signal sets the event, and raises :class:`Interrupted` where the main thread is inside
    :func:`interruptible`. A second signal raises it anywhere.

    Yields
    ------
    threading.Event
        Set when the user asked this process to stop.
    """
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        again = stop.is_set()
        stop.set()
        if again or _interruptible:
            raise Interrupted

    previous: dict[int, Any] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Mark long work of the main thread (training) that a stop signal may break off at once."""
    global _interruptible  # noqa: PLW0603 - a signal handler has no other way to know
    outer, _interruptible = _interruptible, True
    try:
        yield
    finally:
        _interruptible = outer


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when ``parent`` ends; end now where it is already gone.

    Parameters
    ----------
    parent
        Process id of the expected parent. A parent that ended before the request took effect shows as
        another parent id, which closes the race.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def _become_child(argv: Sequence[str]) -> None:
    """Tie this process to its parent, then turn into the program in ``argv[1:]``."""
    die_with_parent(int(argv[0]))
    try:
        os.execvp(argv[1], list(argv[1:]))  # noqa: S606 - no shell wanted
    except OSError as exc:
        sys.stderr.write(f"cannot start {argv[1]}: {exc.strerror}\n")
        os._exit(127)


if __name__ == "__main__":
    _become_child(sys.argv[1:])
