"""The SuperLink's object store with the large objects in files: its memory does not grow with the sites."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

SMALL_OBJECT = 64 * 1024
"""Bytes up to which an object stays in memory; a model travels in chunks of 5 MB."""


class FileObjectStore(InMemoryObjectStore):
    """Upstream's store in memory, except that contents above :data:`SMALL_OBJECT` lie in files.

    A file is written when an object arrives and removed when its message was fetched. Nothing is kept for
    another process: a SuperLink that was killed starts with an empty store.

    Parameters
    ----------
    folder
        Folder of the files (0600, named by the objects' digests); it must exist.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def put(self, object_id: str, object_content: bytes) -> None:
        """Take in an object that was announced."""
        if len(object_content) <= SMALL_OBJECT:
            super().put(object_id, object_content)
            return
        # Upstream's own checks, before anything is written under the object's name.
        if get_object_id(object_content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=object_content)
        part = self._folder / f"{uuid.uuid4().hex}.part"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(object_content)
            with self.lock_store:
                entry = self.store.get(object_id)
                if entry is None:
                    raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
                if not entry.is_available:
                    part.replace(self._path(object_id))
                    entry.is_available = True
        finally:
            part.unlink(missing_ok=True)

    def get(self, object_id: str) -> bytes | None:
        """Return an object; empty while it has not arrived, None when it is not (or no longer) known."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or entry.content or not entry.is_available:
                return None if entry is None else entry.content
        try:
            return self._path(object_id).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, object_id: str) -> None:
        """Delete an object and those of its parts that no other object has."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self._path(object_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything."""
        with self.lock_store:
            known = list(self.store)
            super().clear()
            for object_id in known:
                self._path(object_id).unlink(missing_ok=True)

    def _path(self, object_id: str) -> Path:
        # An id is 64 hexadecimal digits: upstream checks it when the object is announced.
        return self._folder / object_id


def empty_folder(folder: Path) -> None:
    """Make a private folder, or remove the files that a killed SuperLink left in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in folder.iterdir():
        leftover.unlink()


def remove_folder(folder: Path) -> None:
    """Remove the folder and its files."""
    with contextlib.suppress(FileNotFoundError):
        empty_folder(folder)
        folder.rmdir()
