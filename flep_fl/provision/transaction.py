"""Change many files of many kits at once, or none.

The new files are first written into ``dealer/pending.new``; renaming that folder to ``dealer/pending`` is
the moment of change. From then on the files are copied to their places, which any later command finishes
if it is interrupted. While ``pending`` exists, kits in the same folder are refused by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flep_fl.contracts.errors import KitError
from flep_fl.contracts.files import read_bytes, sync_path, write_secret
from flep_fl.provision.identities import DEALER
from flep_fl.provision.manifest import NAME as MANIFEST

CREATING = ".creating"
_PLAN = "plan.json"


def interrupted(out: Path) -> bool:
    """Whether a command that changes the kits in ``out`` has begun to and not ended."""
    return (out / CREATING).exists() or (out / DEALER / "pending").exists()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second command away from ``out`` while the block runs; name what the disk refuses it.

    Raises
    ------
    KitError
        When another one is at work there, or a file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise KitError(
            f"There can be no kits in {out} ({exc.strerror})",
            remedy="Give out= a folder that you may write to",
        ) from exc
    try:
        _lock(descriptor, out)
        yield
    except OSError as exc:
        begun = interrupted(out)
        raise KitError(
            f"A file in {out} cannot be written ({exc.strerror}); "
            + ("the change had begun and is not finished" if begun else "nothing was changed"),
            remedy="Make room, or check the permissions, and run the same command again",
        ) from exc
    finally:
        os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise KitError(
            f"Another `python -m scripts.provision` is at work in {out}", remedy="Wait for its end"
        ) from exc


def remove(path: Path) -> None:
    """Remove a file, where it is there, so that it does not come back after a loss of power."""
    path.unlink(missing_ok=True)
    if path.parent.exists():
        sync_path(path.parent)


def staged(folder: Path) -> Path:
    """Return where a new kit is written before it appears as ``folder``."""
    return folder.with_name(f".{folder.name}.new")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a whole kit: a new folder (0700) appears at once; into an old one the manifest goes last."""
    if folder.exists() and any(folder.iterdir()):
        folder.chmod(0o700)
        for name in sorted(files, key=lambda name: name == MANIFEST):
            write_secret(folder / name, files[name])
        return
    stage = staged(folder)
    _write_plain(stage, files)
    stage.replace(folder)
    sync_path(folder.parent)


def commit(out: Path, request: Mapping[str, Any], files: Mapping[str, bytes], removed: Sequence[str]) -> None:
    """Replace and remove files under ``out``: all of them, or none if it ends early.

    Parameters
    ----------
    out
        The folder of all kits.
    request
        What was asked for; :func:`begun` and :func:`resume` return it.
    files
        New content by path relative to ``out``.
    removed
        Paths to remove, relative to ``out``.
    """
    stage = out / DEALER / "pending.new"
    names = _order(files)
    plan = {"request": dict(request), "files": names, "removed": list(removed)}
    content = {str(number): files[name] for number, name in enumerate(names)}
    _write_plain(stage, {**content, _PLAN: json.dumps(plan).encode()})
    stage.rename(out / DEALER / "pending")
    sync_path(out / DEALER)
    resume(out)


def begun(out: Path) -> dict[str, Any] | None:
    """Return the request of a change that was interrupted after its moment of change; None if there is none.

    Raises
    ------
    KitError
        When the folder ``dealer/pending`` is damaged.
    """
    pending = out / DEALER / "pending"
    return _plan(pending)[0] if pending.exists() else None


def resume(out: Path) -> dict[str, Any] | None:
    """Finish what was interrupted after its moment of change; return its request, None if there was none.

    Raises
    ------
    KitError
        When the folder ``dealer/pending`` is damaged.
    """
    pending, done = out / DEALER / "pending", out / DEALER / "pending.done"
    for rest in (done, out / DEALER / "pending.new"):
        if rest.exists():
            shutil.rmtree(rest)
    if not pending.exists():
        return None
    request, names, removed = _plan(pending)
    for number, name in enumerate(names):
        path = out / name
        if not path.parent.exists():
            path.parent.mkdir(parents=True, mode=0o700)
        for rest in path.parent.glob(f".{path.name}.*"):
            rest.unlink()  # a killed command's half-written file
        write_secret(path, read_bytes(pending / str(number), what="The interrupted change", error=KitError))
    for name in removed:
        remove(out / name)
    pending.rename(done)
    sync_path(out / DEALER)
    shutil.rmtree(done)
    return request


def _plan(pending: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """Read what is to be done: the request, the files in their order, and what is removed."""
    try:
        plan = json.loads(read_bytes(pending / _PLAN, what="The interrupted change", error=KitError))
        return dict(plan["request"]), list(plan["files"]), list(plan["removed"])
    except (ValueError, KeyError, TypeError) as exc:
        raise KitError(f"{pending} is damaged", remedy="Restore the dealer's folder from a backup") from exc


def _order(files: Mapping[str, bytes]) -> list[str]:
    """Sort: kit by kit, each with its manifest last; the dealer's own files after all kits."""

    def rank(name: str) -> tuple[bool, str, bool, str]:
        party, _, file = name.partition("/")
        return party == DEALER, party, file == MANIFEST, file

    return sorted(files, key=rank)


def _write_plain(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a new folder and make them durable; whatever lay there is gone."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, mode=0o700)
    for name, data in files.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync_path(folder)
