"""The audit log plays evidence: whatever is done to its file shows, and a crash does not."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from flep_fl.contracts.errors import AuditError
from flep_fl.data_owner.audit import (
    HEADS_NAME,
    LOG_NAME,
    AuditHead,
    AuditLog,
    AuditReport,
    read_head,
    verify_log,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key()
ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, count: int = 20, **options: object) -> AuditHead:
    log = AuditLog(folder, KEY, **options)  # type: ignore[arg-type]
    for number in range(count):
        log.append("capture.stored", device=f"cam-{number % 3}", sequence=number)
    head = log.head()
    log.close()
    return head


def lines(folder: Path) -> list[bytes]:
    return (folder / LOG_NAME).read_bytes().splitlines(keepends=True)


def check(folder: Path, *, heads: bool = True, exported: tuple[AuditHead, ...] = ()) -> AuditReport:
    return verify_log(
        folder / LOG_NAME, PUBLIC, heads=folder / HEADS_NAME if heads else None, exported=exported
    )


def test_a_sound_log_is_sound(tmp_path: Path) -> None:
    head = write(tmp_path)
    report = check(tmp_path, exported=(head,))
    assert report.sound and report.entries == report.covered == 21
    assert head.entries == 21 and head.log == report.log
    first = json.loads(lines(tmp_path)[0])
    assert (first["event"], first["prev"], first["n"]) == ("log.opened", "", 1)


def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path, 3)
    head = write(tmp_path, 4)
    assert head.entries == 8 and check(tmp_path, exported=(head,)).sound


def edit(found: list[bytes]) -> None:
    found[9] = found[9].replace(b"cam-", b"cam+")


def delete(found: list[bytes]) -> None:
    del found[9]


def insert(found: list[bytes]) -> None:
    found.insert(9, found[9])


def swap(found: list[bytes]) -> None:
    found[9], found[10] = found[10], found[9]


def rubbish(found: list[bytes]) -> None:
    found[9] = b"\x00\xff rubbish\n"


def edit_last(found: list[bytes]) -> None:
    found[-1] = found[-1].replace(b"cam-", b"cam+")


def tear_last(found: list[bytes]) -> None:
    found[-1] = found[-1][:-20]


def rechain(found: list[bytes]) -> None:
    """Edit a line and compute the chain of all later ones anew, as whoever holds the file can."""
    edit(found)
    for at in range(10, len(found)):
        fields = json.loads(found[at])
        fields["prev"] = hashlib.sha256(found[at - 1].rstrip(b"\n")).hexdigest()
        found[at] = json.dumps(fields, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    ("attack", "finding"),
    [
        (edit, "line 11 does not follow line 10: one of the two was edited"),
        (delete, "line 10 bears the number 11: line 10 deleted or moved"),
        (insert, "line 11 bears the number 10 where 11 was due: inserted or moved"),
        (swap, "line 10 bears the number 11: line 10 deleted or moved"),
        (rubbish, "line 10 is not an audit line: edited"),
        (edit_last, "lines up to 21 are not those that a head signed: rewritten"),
        (tear_last, "line 21 has no end: cut off in the middle"),
        (rechain, "lines up to 21 are not those that a head signed: rewritten"),
    ],
)
def test_what_was_done_to_the_file_is_named(
    tmp_path: Path, attack: Callable[[list[bytes]], None], finding: str
) -> None:
    write(tmp_path)
    found = lines(tmp_path)
    attack(found)
    (tmp_path / LOG_NAME).write_bytes(b"".join(found))
    report = check(tmp_path)
    assert finding in report.findings, report.findings


def test_a_cut_off_log_shows_against_its_heads(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / LOG_NAME).write_bytes(b"".join(lines(tmp_path)[:15]))
    assert check(tmp_path).findings == ("the log ends after line 15 and a head signed 21 lines: cut off",)
    with pytest.raises(AuditError, match="cut off"):
        AuditLog(tmp_path, KEY)


def test_a_log_cut_off_with_its_heads_shows_against_an_exported_head(tmp_path: Path) -> None:
    exported = write(tmp_path)
    (tmp_path / LOG_NAME).write_bytes(b"".join(lines(tmp_path)[:1]))
    heads = (tmp_path / HEADS_NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / HEADS_NAME).write_bytes(heads[0])
    assert check(tmp_path).sound, "nothing inside the folder can show it"
    assert "cut off" in check(tmp_path, exported=(exported,)).findings[0]


def test_a_removed_log_is_not_begun_anew(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / LOG_NAME).unlink()
    with pytest.raises(AuditError, match="there are heads of it"):
        AuditLog(tmp_path, KEY)


@pytest.mark.parametrize("content", [b'{"n":1,"event":"x","key":"00"}\n', b"[]\n", b"text\n"])
def test_another_file_is_not_continued(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOG_NAME).write_bytes(content)
    with pytest.raises(AuditError, match="not an audit log"):
        AuditLog(tmp_path, KEY)
    assert (tmp_path / LOG_NAME).read_bytes() == content


def test_a_rewritten_log_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path)
    found = lines(tmp_path)
    rechain(found)
    (tmp_path / LOG_NAME).write_bytes(b"".join(found))
    with pytest.raises(AuditError, match="does not fit its last head"):
        AuditLog(tmp_path, KEY)


def test_a_line_written_behind_the_last_head_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / LOG_NAME).open("ab") as file:
        file.write(b'{"n":22,"time":1,"event":"x","prev":"00"}\n')
    with pytest.raises(AuditError, match="broken after line 21"):
        AuditLog(tmp_path, KEY)
    assert not check(tmp_path).sound


def test_heads_of_another_key_are_refused(tmp_path: Path) -> None:
    head = write(tmp_path)
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(AuditError, match="not signed by the owner's audit key"):
        AuditHead.from_bytes(head.to_bytes(), key=stranger.public_key())
    with pytest.raises(AuditError, match="another audit key"):
        AuditLog(tmp_path, stranger)


@pytest.mark.parametrize("field", ["log", "entries", "size", "hash", "time", "key", "signature"])
def test_every_field_of_a_head_is_signed(tmp_path: Path, field: str) -> None:
    fields = json.loads(write(tmp_path).to_bytes())
    value = fields[field]
    fields[field] = value + 1 if isinstance(value, int) else ("1" if value[0] == "0" else "0") + value[1:]
    with pytest.raises(AuditError):
        AuditHead.from_bytes(json.dumps(fields, separators=(",", ":")).encode(), key=PUBLIC)


def test_an_exported_head_is_read_back(tmp_path: Path) -> None:
    head = write(tmp_path)
    (tmp_path / "head.json").write_bytes(head.to_bytes() + b"\n")
    assert read_head(tmp_path / "head.json", PUBLIC) == head


def test_heads_come_by_number_by_time_and_at_the_end(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY, head_entries=5, head_seconds=1e9)
    for number in range(11):
        log.append("x", number=number)
    counts = [json.loads(line)["entries"] for line in (tmp_path / HEADS_NAME).read_bytes().splitlines()]
    assert counts == [1, 6, 11]
    log.close()
    assert json.loads((tmp_path / HEADS_NAME).read_bytes().splitlines()[-1])["entries"] == 12
    timed = AuditLog(tmp_path, KEY, head_entries=10**6, head_seconds=0.0, fsync_seconds=0.0)
    timed.append("x")
    timed.tick()
    assert json.loads((tmp_path / HEADS_NAME).read_bytes().splitlines()[-1])["entries"] == 13
    timed.close()


def test_no_head_speaks_of_lines_that_are_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure takes what fsync has not seen; a head over it would then accuse an honest owner."""
    synced: dict[int, int] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        info = os.fstat(descriptor)
        synced[info.st_ino] = info.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    for background in (False, True):
        folder = tmp_path / str(background)
        log = AuditLog(folder, KEY, head_entries=3, fsync_seconds=1e9, background=background)
        for number in range(10):
            log.append("x", number=number)
            log.tick()
            head = json.loads((folder / HEADS_NAME).read_bytes().splitlines()[-1])
            assert head["size"] <= synced[(folder / LOG_NAME).stat().st_ino]
        assert head["entries"] >= 9
        log.close()


def test_a_durable_line_is_on_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, KEY, fsync_seconds=1e9, head_seconds=1e9)
    calls: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(fd), real(fd)))
    log.append("capture.stored")
    assert not calls
    log.append("device.suspended", durable=True)
    assert calls
    log.close()


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 200))
def test_a_torn_line_is_moved_aside_by_name(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    log = AuditLog(folder, KEY, head_entries=10**6, head_seconds=1e9)
    for number in range(5):
        log.append("capture.stored", device="cam-1", sequence=number)
    data = (folder / LOG_NAME).read_bytes()
    torn = lines(folder)[-1][: -min(cut, len(lines(folder)[-1]) - 1)]
    (folder / LOG_NAME).write_bytes(data[: data[:-1].rindex(b"\n") + 1] + torn)
    again = AuditLog(folder, KEY)
    again.append("capture.stored", device="cam-1", sequence=99)
    again.close()
    assert check(folder).sound
    events = [json.loads(line)["event"] for line in lines(folder)]
    assert events == ["log.opened", *["capture.stored"] * 4, "log.recovered", "capture.stored"]
    assert (folder / "audit.torn").read_bytes() == torn + b"\n"


def test_a_torn_head_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path)
    heads = (tmp_path / HEADS_NAME).read_bytes()
    (tmp_path / HEADS_NAME).write_bytes(heads[:-40])
    head = write(tmp_path, 2)
    assert check(tmp_path, exported=(head,)).sound


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY)
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[: len(data) // 2])

    before = (tmp_path / LOG_NAME).read_bytes()
    os.write = full
    try:
        with pytest.raises(AuditError, match="No space left"):
            log.append("capture.stored")
    finally:
        os.write = real
    assert (tmp_path / LOG_NAME).read_bytes() == before
    log.append("capture.stored")
    log.close()
    assert check(tmp_path).sound


def test_half_a_line_of_a_killed_process_does_not_stop_the_others(tmp_path: Path) -> None:
    """The gateway has the log open; a command beside it dies in the middle of its line."""
    gateway = AuditLog(tmp_path, KEY, head_entries=10**6, head_seconds=1e9)
    gateway.append("capture.stored", number=1)
    command = AuditLog(tmp_path, KEY, head_entries=10**6, head_seconds=1e9)
    command.append("device.approved", device="cam-1")
    with (tmp_path / LOG_NAME).open("ab") as file:
        file.write(b'{"n":4,"time":17000')
    gateway.append("capture.stored", number=2)
    command.append("device.approved", device="cam-2")
    gateway.close()
    command.close()
    assert check(tmp_path).sound
    events = [json.loads(line)["event"] for line in lines(tmp_path)]
    first = ["log.opened", "capture.stored", "device.approved"]
    assert events == [*first, "log.recovered", "capture.stored", "device.approved"]
    assert (tmp_path / "audit.torn").read_bytes() == b'{"n":4,"time":17000\n'


def test_a_log_that_is_cut_off_while_in_use_is_not_continued(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY, head_entries=10**6, head_seconds=1e9)
    log.append("x", number=1)
    (tmp_path / LOG_NAME).write_bytes(b"".join(lines(tmp_path)[:1]))
    for _ in range(2):
        with pytest.raises(AuditError, match="became shorter"):
            log.append("x", number=2)
    with pytest.raises(AuditError, match="became shorter"):
        log.tick()
    assert len(lines(tmp_path)) == 1


def test_heads_of_two_processes_may_come_out_of_order(tmp_path: Path) -> None:
    """The last head in the file covers less than the one before; a cut between the two must show."""
    log = AuditLog(tmp_path, KEY, head_entries=10**6, head_seconds=1e9)
    log.append("x", number=1)
    early = log.head()
    log.append("x", number=2)
    late = log.head()
    log.close()
    with (tmp_path / HEADS_NAME).open("ab") as file:
        file.write(early.to_bytes() + b"\n")
    assert late.entries > early.entries
    (tmp_path / LOG_NAME).write_bytes(b"".join(lines(tmp_path)[:2]))
    with pytest.raises(AuditError, match="cut off"):
        AuditLog(tmp_path, KEY)


def test_a_log_with_many_heads_opens_by_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy year signs half a million heads: verifying all of them is for action=audit, not for a start."""
    log = AuditLog(tmp_path, KEY, head_entries=1, head_seconds=1e9, fsync_seconds=1e9)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for number in range(400):
        log.append("x", number=number)
    log.close()
    verified: list[int] = []
    real = AuditHead.from_bytes.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        AuditHead, "from_bytes", classmethod(lambda *a, **k: (verified.append(1), real(*a, **k))[1])
    )
    assert (tmp_path / HEADS_NAME).stat().st_size > 100_000
    again = AuditLog(tmp_path, KEY)
    again.append("x", number=-1)
    again.close()
    assert 0 < len(verified) < 200
    assert check(tmp_path).heads > 400


def test_a_clock_that_jumps_changes_times_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, KEY, head_entries=2)
    day = 86400 * 10**9
    for jump in (0, 400 * day, -900 * day, 0):
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: 1_800_000_000 * 10**9 + jump)
        log.append("x", jump=jump)
    head = log.head()
    log.close()
    report = check(tmp_path, exported=(head,))
    assert report.sound and report.covered == report.entries == 5
    AuditLog(tmp_path, KEY).close()


@pytest.mark.parametrize("background", [False, True])
def test_an_fsync_that_fails_is_an_error_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    log = AuditLog(tmp_path, KEY, fsync_seconds=0.0, background=background)

    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(AuditError, match="did not reach the disk"):
            log.append("x")
            log.tick()
        with pytest.raises(AuditError, match="did not reach the disk"):
            log.append("x", durable=True)
    log.close()


def test_a_disk_that_takes_back_nothing_leaves_a_line_that_the_next_writer_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line was written, and even cutting it off failed."""
    log = AuditLog(tmp_path, KEY)
    real = os.write

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:30]))
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(AuditError, match="cannot be written"):
            log.append("capture.stored")
    assert not (tmp_path / LOG_NAME).read_bytes().endswith(b"\n")
    log.append("capture.stored")
    log.close()
    assert check(tmp_path).sound
    assert [json.loads(line)["event"] for line in lines(tmp_path)][-2:] == ["log.recovered", "capture.stored"]


@pytest.mark.parametrize("damage", ["delete the heads", "empty the heads", "spoil a head"])
def test_heads_that_were_tampered_with(tmp_path: Path, damage: str) -> None:
    """Heads that are gone take nothing from the chain; what only they showed, an exported one shows."""
    exported = write(tmp_path)
    heads = tmp_path / HEADS_NAME
    if damage == "delete the heads":
        heads.unlink()
    elif damage == "empty the heads":
        heads.write_bytes(b"")
    else:
        first, second = heads.read_bytes().splitlines(keepends=True)[:2]
        heads.write_bytes(first + second.replace(b'"entries":21', b'"entries":20'))
        with pytest.raises(AuditError, match="not signed"):
            check(tmp_path)
        with pytest.raises(AuditError, match="not signed"):
            AuditLog(tmp_path, KEY)
        return
    assert check(tmp_path).sound and check(tmp_path).covered == 0
    found = lines(tmp_path)
    rechain(found)
    (tmp_path / LOG_NAME).write_bytes(b"".join(found))
    assert not check(tmp_path, exported=(exported,)).sound


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_of_what_a_head_covers_shows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One byte changed, a slice removed, doubled or moved, anywhere: never sound, never a crash."""
    folder = tmp_path_factory.mktemp("tampered")
    exported = write(folder, 6)
    good = (folder / LOG_NAME).read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(start + 1, len(good)))
    piece, rest = good[start:end], good[:start] + good[end:]
    place = data.draw(st.integers(0, len(rest)))
    kind = data.draw(st.sampled_from(("flip", "remove", "double", "move")))
    bad = {
        "flip": good[:start] + bytes([good[start] ^ data.draw(st.integers(1, 255))]) + good[start + 1 :],
        "remove": rest,
        "double": good[:end] + piece + good[end:],
        "move": rest[:place] + piece + rest[place:],
    }[kind]
    if bad == good:
        return
    (folder / LOG_NAME).write_bytes(bad)
    for options in ({"heads": True}, {"heads": False, "exported": (exported,)}):
        try:
            report = check(folder, **options)
        except AuditError:
            continue
        if report.sound:
            # What stands behind the last head is chained only: an honest process may have written it.
            assert kind == "double" and bad.startswith(good)


def append_many(folder: str, name: str) -> None:
    log = AuditLog(Path(folder), KEY, head_entries=7)
    for number in range(40):
        log.append("x", who=name, number=number)
    log.close()


def test_threads_and_processes_share_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = AuditLog(tmp_path, KEY, head_entries=11)
    others = [context.Process(target=append_many, args=(str(tmp_path), f"p{n}")) for n in range(2)]
    for other in others:
        other.start()
    threads = [
        threading.Thread(target=lambda: [log.append("x", number=n) for n in range(40)]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for worker in (*threads, *others):
        worker.join()
    assert [other.exitcode for other in others] == [0, 0]
    head = log.head()
    log.close()
    assert head.entries == 1 + 5 * 40
    assert check(tmp_path, exported=(head,)).sound


def test_who_appends_waits_for_the_other_process(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY)
    other = os.open(tmp_path / LOG_NAME, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    appending = threading.Thread(target=lambda: log.append("x"))
    appending.start()
    appending.join(0.2)
    assert appending.is_alive() and len(lines(tmp_path)) == 1
    os.close(other)
    appending.join()
    log.close()
    assert check(tmp_path).sound and len(lines(tmp_path)) == 2


def test_threads_take_turns_however_slow_the_disk_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, KEY)
    real = os.write

    def slow(descriptor: int, data: bytes) -> int:
        time.sleep(0.005)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    threads = [
        threading.Thread(target=lambda: [log.append("x", number=n) for n in range(8)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert check(tmp_path).sound and len(lines(tmp_path)) == 1 + 4 * 8


KILLED = """
import sys, signal, os
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flep_fl.data_owner.audit import AuditLog
log = AuditLog(Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(bytes(32)), background=True)
number = 0
while True:
    log.append("capture.stored", number=number)
    os.write(1, b"%d\\n" % number)
    number += 1
    if number % 60 == 0:
        log.tick()
"""


def test_a_killed_process_loses_no_line_that_it_answered_for(tmp_path: Path) -> None:
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            told = [int(process.stdout.readline()) for _ in range(150)]
            process.kill()
            told += [int(line) for line in process.stdout.read().splitlines(keepends=True) if b"\n" in line]
        written = [json.loads(line).get("number") for line in lines(tmp_path)]
        assert max(told) in written
    AuditLog(tmp_path, KEY).close()
    assert check(tmp_path).sound


def test_reserved_names_and_endless_lines_are_refused(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY)
    with pytest.raises(AuditError, match="reserved"):
        log.append("x", prev="00")
    with pytest.raises(AuditError, match="too long"):
        log.append("x", text="y" * 9000)
    log.close()
    assert check(tmp_path).entries == 1
