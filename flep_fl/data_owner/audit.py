"""The audit log: JSON lines in a hash chain, with signed heads that can be taken away.

Each line names its number, the time, what happened, and ``prev``, the SHA-256 of the line before it. A
*head* is a signed statement "the first n lines end in this hash" (Ed25519); heads are kept in a file beside
the log and can be exported. The chain shows a line that was edited, deleted, inserted or moved; heads
show a chain that somebody computed anew, and an exported head shows a log that was cut off, heads and all.

What is on disk when
    A line is written with one ``write`` call before the answer that it is about leaves, so a killed process
    loses none. ``fsync`` is called for lines marked *durable* (approvals, suspensions, starts, stops), and
    otherwise every ``fsync_seconds``: a power failure may take the lines of that long. A head is signed every
    ``head_entries`` lines, every ``head_seconds`` and at the end, always after an ``fsync`` of what it
    covers, so no head ever speaks of a line that a power failure could take.

Several processes may append to one log (the gateway, and commands beside it): each append holds the file's
lock and first reads what others added. Who holds the lock and finds half a line at the end knows that its
writer is dead, moves it to ``audit.torn``, and says so in the log. Lines are ordered by their numbers; a
clock that jumps changes their times and nothing else. Nothing in here is secret; callers never pass pixels,
labels or keys.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts.errors import AuditDiskFullError, AuditError
from flep_fl.contracts.files import sync_path

LOG_NAME = "audit.jsonl"
HEADS_NAME = "audit.heads"
MAX_LINE_BYTES = 8192

_HEAD_LABEL = b"flep audit head, version 1\0"
_BLOCK = 1 << 16
_NEWEST_HEADS_BYTES = 1 << 16
_RESERVED = frozenset(("n", "time", "event", "prev"))


@dataclass(frozen=True, slots=True)
class AuditHead:
    """A signed statement about the first lines of a log.

    Attributes
    ----------
    log
        The log's random name, 32 hex digits.
    entries
        Number of lines.
    size
        Their length in bytes.
    hash
        SHA-256 of the last of them, 64 hex digits.
    time
        Microseconds since 1970 (UTC).
    key
        Public key of the signer, 64 hex digits.
    signature
        128 hex digits over all of the above.
    """

    log: str
    entries: int
    size: int
    hash: str
    time: int
    key: str
    signature: str = ""

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        fields = self._fields()
        del fields["signature"]
        return _HEAD_LABEL + _line(fields)

    def to_bytes(self) -> bytes:
        """Return one line of JSON, without the line's end."""
        return _line(self._fields())

    @classmethod
    def from_bytes(cls, data: bytes, *, key: Ed25519PublicKey) -> AuditHead:
        """Parse and verify a head.

        Parameters
        ----------
        data
            One line.
        key
            The owner's audit key, from wherever the reader trusts it.

        Raises
        ------
        AuditError
            It is damaged, or not signed by ``key``.
        """
        try:
            fields = json.loads(data)
            head = cls(**fields)
            if head.to_bytes() != data.strip() or not all(
                type(value) is int for value in (head.entries, head.size, head.time)
            ):
                raise ValueError
            key.verify(bytes.fromhex(head.signature), head.message())
        except (ValueError, TypeError, RecursionError) as exc:
            raise AuditError("a head of the audit log is damaged") from exc
        except InvalidSignature as exc:
            raise AuditError(
                "a head of the audit log is not signed by the owner's audit key",
                remedy="Check it against the key that was noted when the owner's home was made",
            ) from exc
        return head

    def _fields(self) -> dict[str, Any]:
        return {
            "log": self.log,
            "entries": self.entries,
            "size": self.size,
            "hash": self.hash,
            "time": self.time,
            "key": self.key,
            "signature": self.signature,
        }


class AuditLog:
    """Appends to a log; one object per process, safe among threads and processes.

    Parameters
    ----------
    folder
        Where ``audit.jsonl`` and ``audit.heads`` lie; made when missing.
    signing_key
        The owner's audit key.
    head_entries, head_seconds
        A head is signed after that many lines, or when that long passed since the last (looked at on append
        and by :meth:`tick`).
    fsync_seconds
        Longest time that an ordinary line waits for ``fsync``; 0 calls it for every line.
    background
        Leave ``fsync`` and heads of ordinary lines to :meth:`tick`, so that no append waits for a disk.

    Raises
    ------
    AuditError
        The file is not such a log, or the last head says that lines are missing or were rewritten. A torn
        last line (a crash in mid-write) is no error: it is moved to ``audit.torn`` and the log says so.
    """

    def __init__(
        self,
        folder: Path,
        signing_key: Ed25519PrivateKey,
        *,
        head_entries: int = 1000,
        head_seconds: float = 60.0,
        fsync_seconds: float = 1.0,
        background: bool = False,
    ) -> None:
        self._folder = folder
        self._key = signing_key
        self._head_entries, self._head_seconds, self._fsync_seconds = (
            head_entries,
            head_seconds,
            fsync_seconds,
        )
        self._background = background
        self._lock = threading.RLock()
        self._ticking = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG_NAME
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._log = ""
        self._entries = self._size = self._headed = 0
        self._hash = ""
        self._synced_at = self._headed_at = time.monotonic()
        self._dirty = False
        self._torn = 0
        try:
            with self._exclusive():
                self._open()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Append one line.

        Parameters
        ----------
        event
            What happened, such as ``capture.stored``.
        durable
            Call ``fsync`` before returning.
        fields
            JSON values; no secret, no pixel.

        Raises
        ------
        AuditDiskFullError
            The line did not get onto the disk; it can be appended again once there is room.
        AuditError
            The line would be too long, a field has a reserved name, or the log is broken.
        """
        self.append_all([(event, fields)], durable=durable)

    def append_all(self, events: Sequence[tuple[str, dict[str, Any]]], *, durable: bool = False) -> None:
        """Append several lines with one ``write``; parameters and errors as :meth:`append`."""
        if not events:
            return
        with self._lock, self._exclusive():
            self._catch_up()
            now = time.time_ns() // 1000
            lines, entries, digest = [], self._entries, self._hash
            for event, fields in events:
                if _RESERVED & fields.keys():
                    raise AuditError("a field of an audit line has a reserved name", found=sorted(fields))
                entries += 1
                line = _line({"n": entries, "time": now, "event": event, "prev": digest, **fields})
                if len(line) > MAX_LINE_BYTES:
                    raise AuditError("an audit line is too long", found=f"{len(line)} bytes, event {event}")
                digest = _sha256(line)
                lines.append(line + b"\n")
            self._write(b"".join(lines))
            self._entries, self._hash = entries, digest
            self._after_write(durable)

    def tick(self) -> None:
        """Call ``fsync``, and sign a head, where one is due; lines may be appended meanwhile."""
        with self._ticking:
            with self._lock, self._exclusive():
                self._catch_up()
                place = (self._entries, self._size, self._hash)
                head_due = self._head_due()
                if not head_due and not self._sync_due():
                    return
                self._dirty = False
                descriptor = os.dup(self._fd)
            try:
                _fsync(descriptor, self._path)  # covers what was written before; appends go on
            finally:
                os.close(descriptor)
            self._synced_at = time.monotonic()
            if head_due:
                with self._lock:
                    self._keep_head(place)

    def head(self) -> AuditHead:
        """Sign a head over all lines so far, keep it, and return it."""
        with self._lock, self._exclusive():
            self._catch_up()
            return self._sign_head()

    def close(self) -> None:
        """Sign the last head and close the file."""
        with self._lock:
            if self._fd >= 0:
                with self._exclusive():
                    self._catch_up()
                    if self._entries != self._headed:
                        self._sign_head()
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> None:
        self._recover_torn_line()
        size = os.fstat(self._fd).st_size
        if size == 0:
            if (self._folder / HEADS_NAME).exists():
                raise AuditError(
                    f"the audit log is empty, and there are heads of it: {self._path}",
                    remedy="Lines were removed. Keep both files as evidence and start a new folder",
                )
            self._log = secrets.token_hex(16)
            self._write_line("log.opened", log=self._log, key=_hex(self._key.public_key()))
            self._sign_head()
            sync_path(self._folder)
            return
        first = _parse(os.pread(self._fd, MAX_LINE_BYTES, 0).partition(b"\n")[0])
        if first is None or first.get("event") != "log.opened":
            raise AuditError(f"the file is not an audit log: {self._path}")
        self._log = str(first.get("log"))
        if first.get("key") != _hex(self._key.public_key()):
            raise AuditError(
                f"the audit log belongs to another audit key: {self._path}",
                remedy="Use the key that it was begun with, or start a new folder",
            )
        self._start_from_last_head(size)
        self._tell_of_torn_line()

    def _write_line(self, event: str, **fields: Any) -> None:
        """Append a line about the log itself; the lock is held and everything before it was read."""
        entry = {"n": self._entries + 1, "time": time.time_ns() // 1000, "event": event, "prev": self._hash}
        line = _line({**entry, **fields})
        self._write(line + b"\n")
        self._entries, self._hash = self._entries + 1, _sha256(line)

    def _tell_of_torn_line(self) -> None:
        if self._torn:
            self._write_line("log.recovered", torn_bytes=self._torn)
            self._torn = 0
            self._sign_head()

    def _recover_torn_line(self) -> None:
        """Move an unfinished last line, which nobody was answered for, out of the log."""
        size = os.fstat(self._fd).st_size
        whole = size
        while whole:
            start = max(0, whole - _BLOCK)
            block = os.pread(self._fd, whole - start, start)
            at = block.rfind(b"\n")
            if at >= 0:
                whole = start + at + 1
                break
            whole = start
        if whole == size:
            return
        torn = os.pread(self._fd, size - whole, whole)
        descriptor = os.open(self._folder / "audit.torn", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            _write_whole(descriptor, torn + b"\n", self._folder / "audit.torn")
            _fsync(descriptor, self._folder / "audit.torn")
        finally:
            os.close(descriptor)
        os.ftruncate(self._fd, whole)
        _fsync(self._fd, self._path)
        self._torn += len(torn)

    def _start_from_last_head(self, size: int) -> None:
        newest = _NEWEST_HEADS_BYTES
        heads = _read_heads(self._folder / HEADS_NAME, self._key.public_key(), last_bytes=newest)
        # The very first head may be missing: a crash between the first line and it.
        if heads:
            # Two processes may have signed at once, and the one with fewer lines have come last.
            head = max(heads, key=lambda one: one.entries)
            if head.log != self._log or head.size > size:
                raise AuditError(
                    f"the audit log was cut off or replaced: {self._path}",
                    expected=f"{head.entries} lines, {head.size} bytes, as the last head says",
                    found=f"{size} bytes",
                    remedy="Keep the folder as evidence; verify it with action=audit, and start a new one",
                )
            tail = os.pread(
                self._fd, min(head.size, MAX_LINE_BYTES + 1), max(0, head.size - MAX_LINE_BYTES - 1)
            )
            last = tail[:-1].rpartition(b"\n")[2] if tail.endswith(b"\n") else b""
            if _sha256(last) != head.hash:
                raise AuditError(
                    f"the audit log does not fit its last head: {self._path}",
                    remedy="Lines were changed. Keep the folder as evidence, verify it with action=audit",
                )
            self._entries, self._size, self._hash = head.entries, head.size, head.hash
            self._headed = head.entries
        self._catch_up()

    def _catch_up(self) -> None:
        """Chain what others appended since this object last looked."""
        size = os.fstat(self._fd).st_size
        if size == self._size:
            return
        if size < self._size:
            raise AuditError(f"the audit log became shorter while it was in use: {self._path}")
        if os.pread(self._fd, 1, size - 1) != b"\n":
            # Another process was killed in the middle of a line: it cannot be writing, the lock is here.
            self._recover_torn_line()
            size = os.fstat(self._fd).st_size
        for line in _lines(self._fd, self._size, size):
            fields = _parse(line)
            if fields is None or fields.get("prev") != self._hash or fields.get("n") != self._entries + 1:
                raise AuditError(
                    f"the audit log is broken after line {self._entries}: {self._path}",
                    remedy="Keep the folder as evidence, verify it with action=audit",
                )
            self._entries += 1
            self._hash = _sha256(line)
            self._size += len(line) + 1
        self._tell_of_torn_line()

    def _write(self, data: bytes) -> None:
        try:
            _write_whole(self._fd, data, self._path)
        except AuditDiskFullError:
            with suppress(OSError):  # else half a line stays, and whoever writes next moves it away
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)
        self._dirty = True

    def _head_due(self) -> bool:
        return self._entries - self._headed >= self._head_entries or (
            self._entries > self._headed and time.monotonic() - self._headed_at >= self._head_seconds
        )

    def _sync_due(self) -> bool:
        return self._dirty and time.monotonic() - self._synced_at >= self._fsync_seconds

    def _after_write(self, durable: bool) -> None:
        if durable:
            self._sync()
        if self._background:
            return
        if self._head_due():
            self._sign_head()
        elif self._sync_due():
            self._sync()

    def _sync(self) -> None:
        _fsync(self._fd, self._path)
        self._dirty = False
        self._synced_at = time.monotonic()

    def _sign_head(self) -> AuditHead:
        self._sync()
        return self._keep_head((self._entries, self._size, self._hash))

    def _keep_head(self, place: tuple[int, int, str]) -> AuditHead:
        """Sign a head over lines that are on disk already, and put it there too."""
        bare = AuditHead(self._log, *place, time.time_ns() // 1000, _hex(self._key.public_key()))
        head = replace(bare, signature=self._key.sign(bare.message()).hex())
        descriptor = os.open(self._folder / HEADS_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # A crash may have torn the last head; its line is ended here so that this one stands alone.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            path = self._folder / HEADS_NAME
            _write_whole(descriptor, (b"\n" if torn else b"") + head.to_bytes() + b"\n", path)
            _fsync(descriptor, path)
        finally:
            os.close(descriptor)
        self._headed, self._headed_at = place[0], time.monotonic()
        return head

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a verification found.

    Attributes
    ----------
    log
        The log's name.
    entries
        Lines that were read.
    covered
        Lines that a head vouches for; later ones are chained only.
    heads
        Heads that were checked.
    findings
        What is wrong, in the order of the file; empty for a sound log.
    """

    log: str
    entries: int
    covered: int
    heads: int
    findings: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def verify_log(
    log: Path, key: Ed25519PublicKey, *, heads: Path | None = None, exported: Sequence[AuditHead] = ()
) -> AuditReport:
    """Check a log from its first line to its last, one line in memory at a time.

    Parameters
    ----------
    log
        ``audit.jsonl``.
    key
        The owner's audit key, from wherever the reader trusts it.
    heads
        ``audit.heads``; where None or missing, only ``exported`` heads count.
    exported
        Heads that were taken away earlier, verified by :meth:`AuditHead.from_bytes`. Only they show that log
        and heads were both cut off.

    Returns
    -------
    AuditReport
        Findings name the line and what happened to it: edited, deleted, inserted, moved, cut off, rewritten.

    Raises
    ------
    AuditError
        A file cannot be read, or a head is damaged or signed by somebody else.
    """
    known = [*(_read_heads(heads, key) if heads is not None else []), *exported]
    walk = _Walk(known)
    try:
        descriptor = os.open(log, os.O_RDONLY)
    except OSError as exc:
        raise AuditError(f"the audit log cannot be read: {log} ({exc.strerror})") from exc
    try:
        end = os.fstat(descriptor).st_size
        for line in _lines(descriptor, 0, end):
            walk.step(line)
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            walk.findings.append(f"line {walk.count} has no end: cut off in the middle")
    finally:
        os.close(descriptor)
    if walk.wanted:
        most = max(walk.wanted)
        walk.findings.append(f"the log ends after line {walk.count} and a head signed {most} lines: cut off")
    return AuditReport(walk.log, walk.count, walk.covered, len(known), tuple(walk.findings))


class _Walk:
    """The state of a verification, line after line."""

    def __init__(self, heads: Sequence[AuditHead]) -> None:
        self.wanted: dict[int, list[AuditHead]] = {}
        for head in heads:
            self.wanted.setdefault(head.entries, []).append(head)
        self.findings: list[str] = []
        self.log = ""
        self.count = self.covered = 0
        self._size, self._previous, self._due = 0, "", 1

    def step(self, line: bytes) -> None:
        self.count += 1
        self._size += len(line) + 1
        fields = _parse(line)
        number = None if fields is None else fields.get("n")
        if fields is None:
            self.findings.append(f"line {self.count} is not an audit line: edited")
        elif number != self._due:
            self.findings.append(_displaced(self.count, number, self._due))
        elif fields.get("prev") != self._previous:
            self.findings.append(
                f"line {self.count} does not follow line {self.count - 1}: one of the two was edited"
            )
        if self.count == 1 and fields is not None:
            self.log = str(fields.get("log", ""))
        self._due = (number if type(number) is int else self._due) + 1
        self._previous = _sha256(line)
        for head in self.wanted.pop(self.count, []):
            if (head.log, head.hash, head.size) == (self.log, self._previous, self._size):
                self.covered = self.count
            else:
                self.findings.append(f"lines up to {self.count} are not those that a head signed: rewritten")


def read_head(path: Path, key: Ed25519PublicKey) -> AuditHead:
    """Read one exported head.

    Raises
    ------
    AuditError
        The file cannot be read, or the head is damaged or signed by somebody else.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise AuditError(f"the head cannot be read: {path} ({exc.strerror})") from exc
    return AuditHead.from_bytes(data.strip(), key=key)


def _displaced(count: int, number: object, expected: int) -> str:
    if isinstance(number, int) and number > expected:
        missing = f"line {expected}" if number == expected + 1 else f"lines {expected} to {number - 1}"
        return f"line {count} bears the number {number}: {missing} deleted or moved"
    return f"line {count} bears the number {number} where {expected} was due: inserted or moved"


def _read_heads(path: Path, key: Ed25519PublicKey, *, last_bytes: int | None = None) -> list[AuditHead]:
    """Read heads, or those in the last bytes of the file: to go on with a log, the newest are enough."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - last_bytes) if last_bytes is not None else 0
        file.seek(start)
        data = file.read()
    if start:
        data = data.partition(b"\n")[2]
    whole, _, torn = data.rpartition(b"\n")
    lines = [line for line in whole.split(b"\n") if line]
    heads = []
    for position, line in enumerate(lines):
        if _parse(line) is None and (position + 1 < len(lines) or torn):
            continue  # a head that a crash tore; the next one vouches for the same lines and more
        heads.append(AuditHead.from_bytes(line, key=key))
    return heads


def _lines(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """Yield lines without their ends between two offsets, in bounded memory."""
    rest = b""
    while start < end:
        block = os.pread(descriptor, min(_BLOCK, end - start), start)
        if not block:
            break
        start += len(block)
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
        if len(rest) > 4 * MAX_LINE_BYTES:
            raise AuditError("the audit log has a line that is too long")
    if rest:
        yield rest


def _write_whole(descriptor: int, data: bytes, path: Path) -> None:
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as exc:
        raise AuditDiskFullError(
            f"the audit log cannot be written: {path} ({exc.strerror})",
            remedy="Make space; nothing is taken or given without its line in the log",
        ) from exc


def _fsync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # What the kernel could not write it may have thrown away: a second try would prove nothing.
        raise AuditError(
            f"the audit log did not reach the disk: {path} ({exc.strerror})",
            remedy="Check the disk, verify the log with action=audit, and start again",
        ) from exc


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()


def _hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes_raw().hex()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
