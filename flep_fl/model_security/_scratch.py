"""A private file for SEAL's ``save`` and ``load``, which take paths only."""

from __future__ import annotations

import os
import tempfile
from types import TracebackType


class ScratchFile:
    """An anonymous file in memory on Linux; elsewhere a temporary file that only its owner can read.

    Attributes
    ----------
    path
        Where SEAL finds it; valid in this process and until :meth:`close`.
    """

    def __init__(self) -> None:
        self._on_disk = not hasattr(os, "memfd_create")
        if self._on_disk:
            self._descriptor, self.path = tempfile.mkstemp(prefix="flep-")
        else:
            self._descriptor = os.memfd_create("flep")
            self.path = f"/proc/self/fd/{self._descriptor}"

    def read(self) -> bytes:
        """Return the whole content."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, data: bytes) -> None:
        """Replace the whole content."""
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], written)
        os.ftruncate(self._descriptor, len(data))  # afterwards, so that the pages are not taken anew

    def close(self) -> None:
        """Empty the file and remove it."""
        if self._descriptor < 0:
            return
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1
        if self._on_disk:
            os.unlink(self.path)  # noqa: PTH108

    def __enter__(self) -> ScratchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
