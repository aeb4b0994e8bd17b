"""``python -m server`` that kills itself (SIGKILL) at a chosen moment: ``ending_server.py MOMENT ARGUMENTS``.

``add:N``: when it is about to add the N-th update. ``before:NAME:N``, ``after:NAME:N``: round the N-th time
that a file whose name starts with NAME is put in its place in the checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from flep_fl.model_security.adder import KeylessAdder


def end() -> None:
    """End this process as a power cut does: no handler runs, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def end_at_addition(number: int) -> None:
    """End when the n-th update is about to be added."""
    original, seen = KeylessAdder.add, 0

    def add(self: KeylessAdder, payload: bytes) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            end()
        original(self, payload)

    KeylessAdder.add = add  # type: ignore[method-assign]


def end_at_write(name: str, number: int, *, after: bool) -> None:
    """End just before, or just after, a file of the checkpoint gets its name for the n-th time."""
    original, seen = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal seen
        target = Path(target)
        ours = target.parent.name == "checkpoint" and target.name.startswith(name)
        seen += ours
        if ours and seen == number and not after:
            end()
        result = original(self, target)
        if ours and seen == number:
            end()
        return result

    Path.replace = replace  # type: ignore[assignment,method-assign]


def main() -> None:
    """Prepare the end, then be the server."""
    kind, *details = sys.argv.pop(1).split(":")
    if kind == "add":
        end_at_addition(int(details[0]))
    else:
        end_at_write(details[0], int(details[1]), after=kind == "after")
    from server.app import main as server

    server()


if __name__ == "__main__":
    main()
