"""Files that are either whole or not there."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from flep_fl.contracts.errors import FlepError


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    Parameters
    ----------
    path
        Destination; its folder is made when missing.
    data
        The whole content.
    mode
        Permission bits of the new file.
    """
    temporary = _write_beside(path, data, mode)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def _write_beside(path: Path, data: bytes, mode: int) -> Path:
    """Write a file of another name into the folder of ``path``, whole and on the disk, or leave none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_path(path: Path) -> None:
    """Call ``fsync`` on a file or folder, so that a power failure does not take what was just made in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_secret(path: Path, data: bytes) -> None:
    """Write a secret atomically, readable by its owner alone (0600)."""
    write_atomic(path, data, mode=0o600)


def create_secret(path: Path, data: bytes) -> bool:
    """Write a secret (0600) where there is no file yet; of several processes one does, all see its file.

    Returns
    -------
    bool
        Whether this call made the file.
    """
    temporary = _write_beside(path, data, 0o600)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)
    return True


def remove_unfinished(folder: Path, *patterns: str) -> None:
    """Remove what :func:`write_atomic` left of files of these names where its process was killed.

    Parameters
    ----------
    folder
        The files' folder; no other process may be writing there.
    patterns
        Names of the finished files, or glob patterns of them.
    """
    for pattern in patterns:
        for path in folder.glob(f".{pattern}.*"):
            path.unlink(missing_ok=True)


def read_bytes(path: Path, *, what: str, error: type[FlepError]) -> bytes:
    """Read a file, or raise ``error`` that says what the file should have been.

    Parameters
    ----------
    path
        The file.
    what
        Its meaning in words, for the message ("the site's signing key").
    error
        Error class to raise.
    """
    try:
        return path.read_bytes()
    except OSError as exc:
        raise error(
            f"{what} cannot be read: {path} ({exc.strerror})",
            remedy="Check the path and its permissions",
        ) from exc


def lock_exclusively(path: Path) -> int:
    """Open ``path`` (0600, made when missing) and lock it for as long as the returned descriptor is open.

    Raises
    ------
    OSError
        When another process holds the lock, or the file cannot be opened.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
