"""Group commit: many threads hand over rows, one thread commits what has gathered.

A commit waits for the disk, whether it carries one row or fifty. While one is under way, the next rows
gather; nobody waits on purpose. The queue is bounded: what does not fit is refused at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from flep_fl.contracts.errors import StoreBusyError
from flep_fl.contracts.owner_records import Receipt

MAX_WAITING = 256
MAX_BATCH = 64

Row = dict[str, Any]
Commit = Callable[[Sequence[Row]], "Sequence[Receipt | Exception]"]


class Slot:
    """A place in the queue, taken before a row is sealed, so that sealed rows are bounded as well."""

    def __init__(self, writer: GroupWriter) -> None:
        self._writer = writer
        self.used = False

    def enqueue(self, row: Row) -> Future[Receipt]:
        """Put a row into the place; the future is done once it is committed or refused."""
        self.used = True
        return self._writer._enqueue(row)


class GroupWriter:
    """A thread that commits rows in groups.

    Parameters
    ----------
    commit
        Stores rows in one transaction and returns one outcome a row; raises where none was stored.
    max_waiting, max_batch
        Bounds of the queue and of a group.
    """

    def __init__(self, commit: Commit, *, max_waiting: int = MAX_WAITING, max_batch: int = MAX_BATCH) -> None:
        self._commit, self._max_waiting, self._max_batch = commit, max_waiting, max_batch
        self._rows: deque[tuple[Row, Future[Receipt]]] = deque()
        self._taken = 0
        self._closed = self._ended = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def depth(self) -> tuple[int, int]:
        """Return how many places are taken, and how many there are."""
        with self._condition:
            return self._taken, self._max_waiting

    @contextmanager
    def reserved(self) -> Iterator[Slot]:
        """Take a place; it is given back when no row was put into it.

        Raises
        ------
        StoreBusyError
            All places are taken, or the database is being closed.
        """
        with self._condition:
            if self._closed or self._taken >= self._max_waiting:
                raise StoreBusyError(
                    "the private database is busy",
                    found=f"{self._taken} captures waiting",
                    remedy="Send again in a moment",
                )
            self._taken += 1
        slot = Slot(self)
        try:
            yield slot
        finally:
            if not slot.used:
                with self._condition:
                    self._taken -= 1

    def close(self) -> None:
        """Refuse further rows, commit those that wait, and end."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    def _enqueue(self, row: Row) -> Future[Receipt]:
        future: Future[Receipt] = Future()
        with self._condition:
            if self._ended:
                self._taken -= 1
                raise StoreBusyError("the private database is being closed")
            self._rows.append((row, future))
            self._condition.notify_all()
        return future

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._rows and not self._closed:
                    self._condition.wait()
                if not self._rows:
                    self._ended = True
                    return
                batch = [self._rows.popleft() for _ in range(min(len(self._rows), self._max_batch))]
            self._store(batch)
            with self._condition:
                self._taken -= len(batch)

    def _store(self, batch: Sequence[tuple[Row, Future[Receipt]]]) -> None:
        batch = [(row, future) for row, future in batch if future.set_running_or_notify_cancel()]
        if not batch:
            return
        outcomes: Sequence[Receipt | Exception]
        try:
            outcomes = self._commit([row for row, _ in batch])
        except Exception as exc:  # every waiting caller learns it, whatever it is
            outcomes = [exc] * len(batch)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
