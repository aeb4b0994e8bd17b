"""What happens to a database over its life: theft, a new key, deletion, age, backups, an older release."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import shutil
import sqlite3
import stat
import subprocess
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from traces import traces

from flep_fl.contracts.errors import BackupError, ClockError, DatabaseError
from flep_fl.contracts.owner_records import Analyst, Capture
from flep_fl.data_security.keys import ImageKeyBundle, NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.private_database import backup as backups
from flep_fl.private_database import rotation
from flep_fl.private_database.access import log_releases, releases
from flep_fl.private_database.grants import create_grant, list_grants
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.retention import expire
from flep_fl.private_database.rotation import open_with_key_file, rotate_key_file, rotate_owner_key
from flep_fl.private_database.sealing import seal, wrapping_key
from flep_fl.private_database.store import OwnerDatabase

SIGNING = Ed25519PrivateKey.generate()
ROOT = Path(__file__).resolve().parents[3]


def capture(sequence, device="cam-1", **settings):
    image = np.random.default_rng(sequence).integers(0, 256, (6, 5), dtype=np.uint8)
    return Capture("cells", device, sequence, image, **{"label": sequence % 2, **settings})


def new_bundle(name="none"):
    return ImageKeyBundle.generate(get_preset(name).parameters, NoiseParameters(std=0.0), cipher_name=name)


def add_everything(database, **names):
    """Fill every table; returns a grant's identifier and the analyst's key."""
    database.add_dataset("cells", ("good", "bad"), bundle=new_bundle())
    receipts = [database.put(capture(i)) for i in range(6)]
    book = ReleaseBook(database, SIGNING)
    released = book.release()
    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    analyst = Analyst("ann", key, X25519PrivateKey.generate().public_key().public_bytes_raw())
    grant = create_grant(database, dataset="cells", analyst=analyst, not_after=4e9)
    page = book.record_page(grant.grant_id, key, release_id=released.release_id, cursor=0, limit=10)
    log_releases(database, [receipts[0].record_id], site="archive-site", epoch=1)
    return grant.grant_id, key, page.records


def state(database, grant_id, key):
    """Everything that a database tells its owner."""
    book = ReleaseBook(database, SIGNING)
    release_id = book.open_grant(grant_id, key).release_id
    return (
        {r.record_id: (r.image.tobytes(), r.tags) for r in database.records()},
        database.datasets(),
        list_grants(database),
        database.bundle("cells", 1).to_bytes(),
        database.last_sequence("cam-1"),
        book.record_page(grant_id, key, release_id=release_id, cursor=0, limit=10).records,
        releases(database)[:2],
    )


# --- theft -----------------------------------------------------------------------------------------------


def test_stolen_files_hold_no_canary(tmp_path):
    """Pixels, labels, names, devices, keys and cached envelopes: no trace, WAL and SHM included."""
    key, pixels = secrets.token_bytes(32), secrets.token_bytes(48)
    names = [secrets.token_hex(12) for _ in range(9)]
    folder = tmp_path / "db"
    picture = np.tile(np.frombuffer(pixels, np.uint8), (8, 1))
    deep = np.tile(np.frombuffer(pixels, np.uint16), (3, 8, 1))
    with OwnerDatabase.create(folder / "owner.db", key) as database:
        # The cipher "none" is the worst case: the cached envelope itself is readable.
        database.add_dataset(names[0], names[1:3], bundle=new_bundle("none"))
        for i, image in enumerate((picture, deep)):
            tags = {"idempotency_key": names[4] + str(i), "metadata": {names[5]: names[6]}}
            database.put(Capture(names[0], names[3], i, image, label=i, captured_at=1e9 + i, **tags))
        book = ReleaseBook(database, SIGNING)
        release_id = book.release().release_id
        verify_key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        x25519 = X25519PrivateKey.generate().public_key().public_bytes_raw()
        analyst = Analyst(names[7], verify_key, x25519)
        grant = create_grant(database, dataset=names[0], analyst=analyst, not_after=4e9)
        page = book.record_page(grant.grant_id, verify_key, release_id=release_id, cursor=0, limit=9)
        log_releases(database, [page.records[0].record_id], site=names[8], epoch=7)
        bundle = database.bundle(names[0], 1)
        canaries = [pixels, key, verify_key, x25519, bundle.master_key, bundle.secret_images[0][0].tobytes()]
        canaries += [name.encode() for name in names] + [record.envelope[73:121] for record in page.records]
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == ["owner.db", "owner.db-shm", "owner.db-wal"]
        assert files[2].stat().st_size > 0
        assert traces(files, canaries) == []
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert traces(folder.iterdir(), canaries) == []
    # The search finds what is there, in each of the forms.
    assert page.records[0].envelope.count(pixels) + page.records[1].envelope.count(pixels) > 0
    for form in (bytes, lambda b: b.hex().encode(), base64.b64encode, zlib.compress):
        control = tmp_path / "control"
        control.write_bytes(b"before" + form(b"xy" + pixels + b"z") + b"after")
        assert ("control", pixels) in traces([control], canaries)


# --- a new key -------------------------------------------------------------------------------------------


def test_rotation_keeps_everything_and_touches_no_image(tmp_path):
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, old) as database:
        grant_id, key, _ = add_everything(database)
        database.clock.accept()
        before = state(database, grant_id, key)
        blobs = big_blobs(path)
        small = small_blobs(path)
        assert rotate_owner_key(database, new) == []
        assert state(database, grant_id, key) == before
        assert database.put(capture(3)).is_new is False  # the lookup hashes moved along
        assert database.put(capture(6)).is_new
        assert big_blobs(path) == [*blobs, *big_blobs(path)[len(blobs) :]]
        assert not small & small_blobs(path)
        assert path.with_name("owner.db-wal").stat().st_size < 200_000
    with OwnerDatabase(path, new) as database:
        assert state(database, grant_id, key)[3:5] == (before[3], 6)
    with pytest.raises(DatabaseError, match="another owner key"):
        OwnerDatabase(path, old)
    assert traces([path], small) == []


def test_who_has_the_database_open_under_the_old_key_writes_nothing_more(tmp_path):
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, old, dataset="cells", classes=("a", "b")) as database:
        with OwnerDatabase(path, old) as other:
            receipt = other.put(capture(1))
            rotate_owner_key(database, new)
            for attempt in (lambda: other.put(capture(2)), lambda: other.get(receipt.record_id)):
                with pytest.raises(DatabaseError, match="key to the private database was changed"):
                    attempt()
        assert database.count() == 1


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_an_interrupted_rotation_leaves_a_key_that_fits(tmp_path, monkeypatch, moment):
    path, key_file = tmp_path / "owner.db", tmp_path / "owner.key"
    key_file.write_bytes(secrets.token_bytes(32))
    with OwnerDatabase.create(path, key_file.read_bytes()) as database:
        grant_id, key, _ = add_everything(database)
        before = state(database, grant_id, key)

    class PowerCut(BaseException):
        pass

    def cut(*_arguments):
        if moment == "after":
            original(*_arguments)
        raise PowerCut

    name = {"before": "rotate_owner_key", "within": "_simple", "after": "rotate_owner_key"}[moment]
    original = getattr(rotation, name)
    monkeypatch.setattr(rotation, name, cut)
    with pytest.raises(PowerCut):
        rotate_key_file(path, key_file)
    monkeypatch.undo()
    with open_with_key_file(path, key_file) as database:
        assert state(database, grant_id, key) == before
    assert [file.name for file in tmp_path.glob("*.key*")] == ["owner.key"]
    rotate_key_file(path, key_file)
    with open_with_key_file(path, key_file) as database:
        assert state(database, grant_id, key)[:6] == before[:6]


def test_opening_while_the_key_is_changed_does_not_lose_the_new_key(tmp_path, monkeypatch):
    path, key_file = tmp_path / "owner.db", tmp_path / "owner.key"
    key_file.write_bytes(secrets.token_bytes(32))
    with OwnerDatabase.create(path, key_file.read_bytes()) as database:
        database.add_dataset("cells", ("good", "bad"))
        database.put(capture(1))
    original = rotation.rotate_owner_key
    opened = []

    def between(database, new_key):
        # Another command, once while the old key fits and once when the new one does and has no file yet.
        for step in (lambda: None, lambda: original(database, new_key)):
            step()
            with open_with_key_file(path, key_file) as other:
                opened.append(other.count())
        return []

    monkeypatch.setattr(rotation, "rotate_owner_key", between)
    rotate_key_file(path, key_file)
    monkeypatch.undo()
    with open_with_key_file(path, key_file) as database:
        opened.append(database.count())
    assert opened == [1, 1, 1]
    assert [file.name for file in tmp_path.glob("*.key*")] == ["owner.key"]


def test_a_rotation_goes_on_past_corrupt_records_and_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(rotation, "_CHUNK", 2)  # of each table several pages
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, old) as database:
        grant_id, key, _ = add_everything(database)
        victim = sorted(record.record_id for record in database.records())[2]
        with contextlib.closing(sqlite3.connect(path)) as raw, raw:
            raw.execute("UPDATE records SET wrapped_key = x'00' WHERE record_id = ?", (victim,))
        assert rotate_owner_key(database, new) == [victim]
    with OwnerDatabase(path, new) as database:
        errors = []
        assert len(list(database.records(on_corrupt=errors.append))) == 5 and len(errors) == 1
        assert ReleaseBook(database, SIGNING).open_grant(grant_id, key)
        assert len(releases(database)) == 2


@pytest.mark.parametrize("table", ["datasets", "devices", "grants", "access_log", "epochs", "snapshots"])
def test_a_rotation_that_fails_changes_nothing(tmp_path, table):
    key, path = secrets.token_bytes(32), tmp_path / "owner.db"
    column = "sealed_bundle" if table == "epochs" else "sealed_head" if table == "snapshots" else "sealed"
    with OwnerDatabase.create(path, key) as database:
        add_everything(database)
        with contextlib.closing(sqlite3.connect(path)) as raw, raw:
            raw.execute(f"UPDATE {table} SET {column} = x'00'")
        with contextlib.closing(sqlite3.connect(path)) as raw:
            before = list(raw.iterdump())
        with pytest.raises(DatabaseError, match="corrupt"):
            rotate_owner_key(database, secrets.token_bytes(32))
        with contextlib.closing(sqlite3.connect(path)) as raw:
            assert list(raw.iterdump()) == before
        assert len(list(database.records())) == 6
    OwnerDatabase(path, key).close()


def big_blobs(path):
    with contextlib.closing(sqlite3.connect(path)) as raw:
        images = raw.execute("SELECT sealed_image FROM images ORDER BY seq").fetchall()
        parts = raw.execute("SELECT sealed_parts FROM released ORDER BY position").fetchall()
    return [row[0] for row in parts + images]


def small_blobs(path):
    queries = {
        "records": ("wrapped_key", "origin", "request"),
        "datasets": ("name_index", "sealed"),
        "epochs": ("sealed_bundle",),
        "grants": ("analyst_index", "sealed"),
        "devices": ("device_index", "sealed"),
        "snapshots": ("sealed_head",),
        "access_log": ("sealed",),
        "released": ("sealed_entry",),
        "meta": ("salt", "sealed", "sealed_clock"),
    }
    found = set()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        for table, columns in queries.items():
            for row in raw.execute(f"SELECT {', '.join(columns)} FROM {table}"):
                found |= {value for value in row if value is not None}
    assert len(found) > 30
    return found


# --- deletion and age ------------------------------------------------------------------------------------


def test_a_deleted_record_leaves_no_trace_in_the_files(tmp_path):
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, secrets.token_bytes(32)) as database:
        add_everything(database)
        columns = "record_id, wrapped_key, sealed_tags, sealed_image, sealed_parts, sealed_entry, origin"
        query = f"SELECT {columns} FROM records JOIN images USING (seq) JOIN released USING (seq)"
        with contextlib.closing(sqlite3.connect(path)) as raw:
            rows = raw.execute(query).fetchall()
        victim, other = ([row[0].encode(), *(blob[:40] for blob in row[1:])] for row in rows[:2])
        assert len(traces(tmp_path.iterdir(), victim)) >= len(victim)
        assert database.delete([victim[0].decode()]) == 1
        assert traces(tmp_path.iterdir(), victim) == []
        assert len(traces(tmp_path.iterdir(), other)) >= len(other)
        assert database.count() == 5
        assert database.last_sequence("cam-1") == 5  # it outlives its records


def test_a_reader_that_keeps_the_log_is_reported(tmp_path):
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, secrets.token_bytes(32), dataset="cells", classes=("a", "b")) as database:
        receipt = database.put(capture(1))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM records").fetchall()
            database.database.engine.dispose()
            with pytest.raises(DatabaseError, match="kept the database's log"):
                with database.database.engine.connect() as probe:
                    probe.exec_driver_sql("PRAGMA busy_timeout = 100")
                database.delete([receipt.record_id])
        database.erase_traces()


def test_retention_destroys_by_the_owners_clock_and_not_after_a_jump(tmp_path):
    wall = [1_000_000_000.0]
    with OwnerDatabase.create(tmp_path / "o.db", secrets.token_bytes(32)) as database:
        database.clock._wall = lambda: wall[0]
        database.clock.accept()
        database.add_dataset("cells", ("a", "b"))
        for day in range(5):
            database.put(capture(day, captured_at=4e9))  # the device's clock says nothing
            wall[0] += 86400
        old = expire(database, 2.5 * 86400, dry_run=True)
        assert (old.destroyed, old.kept, database.count()) == (3, 2, 5)
        wall[0] += 30 * 86400
        with pytest.raises(ClockError, match="accept_clock"):
            expire(database, 2.5 * 86400)
        assert database.count() == 5
        wall[0] -= 30 * 86400
        assert expire(database, 2.5 * 86400).destroyed == 3
        assert sorted(r.tags.sequence for r in database.records()) == [3, 4]
        wall[0] -= 86400 * 2
        with pytest.raises(ClockError):
            expire(database, 60.0)


def test_order_does_not_follow_a_jumping_clock(tmp_path):
    wall = [1_000_000_000.0]
    with OwnerDatabase.create(tmp_path / "o.db", secrets.token_bytes(32)) as database:
        database.clock._wall = lambda: wall[0]
        database.clock.accept()
        database.add_dataset("cells", ("a", "b"))
        ids = []
        for jump in (0, 3600, -7200, 86400, -90000):
            wall[0] += jump
            ids.append(database.put(capture(len(ids))).record_id)
        with contextlib.closing(sqlite3.connect(database.path)) as raw:
            assert [row[0] for row in raw.execute("SELECT record_id FROM records ORDER BY seq")] == ids
        stored = [database.get(record_id).tags.stored_at for record_id in ids]
        assert stored == sorted(stored)


# --- backups ---------------------------------------------------------------------------------------------


def test_backup_and_restore(tmp_path):
    key = secrets.token_bytes(32)
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        grant_id, analyst, _ = add_everything(database)
        before = state(database, grant_id, analyst)
        report = backups.backup(database, key, tmp_path / "copy.backup")
        assert (report.records, report.corrupt) == (6, ())
        database.put(capture(7))  # after the backup
        with pytest.raises(BackupError, match="exists already"):
            backups.backup(database, key, tmp_path / "copy.backup")
    assert stat.S_IMODE((tmp_path / "copy.backup").stat().st_mode) == 0o600
    restored = backups.restore(tmp_path / "copy.backup", tmp_path / "again.db", key)
    assert restored == report
    with OwnerDatabase(tmp_path / "again.db", key) as database:
        assert state(database, grant_id, analyst)[:4] == before[:4]
        assert database.put(capture(7)).is_new
    with pytest.raises(DatabaseError, match="cannot be created"):
        backups.restore(tmp_path / "copy.backup", tmp_path / "again.db", key)
    with pytest.raises(DatabaseError, match="another owner key"):
        backups.restore(tmp_path / "copy.backup", tmp_path / "third.db", secrets.token_bytes(32))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.db", "copy.backup", "owner.db"]


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM released WHERE position = 2",
        "DELETE FROM grants",
        "UPDATE images SET sealed_image = (SELECT sealed_image FROM images WHERE seq = 1) WHERE seq = 2",
        "UPDATE snapshots SET stale = 1",
        "DELETE FROM backup_proof",
    ],
)
def test_an_altered_backup_is_refused(tmp_path, damage):
    key = secrets.token_bytes(32)
    copy = tmp_path / "copy.backup"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, copy)
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as raw:
        raw.execute(damage)
    with pytest.raises(BackupError):
        backups.restore(copy, tmp_path / "new.db", key)
    assert not (tmp_path / "new.db").exists()


def test_a_backup_that_is_in_use_is_refused(tmp_path):
    key, copy = secrets.token_bytes(32), tmp_path / "copy.backup"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, copy)
    # Somebody opened it as a database: what lies in its log is not in the file.
    copy.with_name("copy.backup-wal").write_bytes(b"")
    with pytest.raises(BackupError, match="in use as a database"):
        backups.restore(copy, tmp_path / "new.db", key)
    assert not (tmp_path / "new.db").exists()


def test_a_restored_database_that_differs_is_said(tmp_path, monkeypatch):
    key, copy = secrets.token_bytes(32), tmp_path / "copy.backup"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, copy)
    original = backups._restore_file

    def losing(path, target):
        original(path, target)
        with contextlib.closing(sqlite3.connect(target)) as raw, raw:
            raw.execute("DELETE FROM access_log")

    monkeypatch.setattr(backups, "_restore_file", losing)
    with pytest.raises(BackupError, match="differs from the backup"):
        backups.restore(copy, tmp_path / "new.db", key)


def test_a_restore_takes_nobodys_place(tmp_path, monkeypatch):
    key, copy, target = secrets.token_bytes(32), tmp_path / "copy.backup", tmp_path / "new.db"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, copy)
    original, calls = backups._require_free, []

    def late(path):
        original(path)
        calls.append(path)
        if len(calls) == 2:  # another process, after the last look
            target.write_bytes(b"of somebody else")

    monkeypatch.setattr(backups, "_require_free", late)
    with pytest.raises(BackupError, match="cannot be restored"):
        backups.restore(copy, target, key)
    assert target.read_bytes() == b"of somebody else"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.backup", "new.db", "owner.db"]


def test_a_truncated_backup_is_refused(tmp_path):
    key = secrets.token_bytes(32)
    copy = tmp_path / "copy.backup"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, copy)
    copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
    with pytest.raises(DatabaseError):
        backups.restore(copy, tmp_path / "new.db", key)
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("moment", ["copyfile", "sync_path", "unlink"])
def test_an_interrupted_restore_leaves_nothing_or_all_and_is_repeated(tmp_path, monkeypatch, moment):
    key = secrets.token_bytes(32)
    copy, target = tmp_path / "copy.backup", tmp_path / "new.db"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        grant_id, analyst, _ = add_everything(database)
        before = state(database, grant_id, analyst)
        report = backups.backup(database, key, copy)
    # As kill -9 leaves it: nothing is tidied up.
    code = (
        "import os, sys; from pathlib import Path; from flep_fl.private_database import backup\n"
        "place, name = {'copyfile': (backup.shutil, 'copyfile'), 'sync_path': (backup, 'sync_path'),"
        " 'unlink': (Path, 'hardlink_to')}[sys.argv[1]]\n"
        "original = getattr(place, name)\n"
        "def cut(*given):\n"
        "    if name == 'hardlink_to': original(*given)\n"
        "    if name == 'copyfile': given[1].write_bytes(given[0].read_bytes()[:5000])\n"
        "    os._exit(9)\n"
        "setattr(place, name, cut)\n"
        f"backup.restore(Path({str(copy)!r}), Path({str(target)!r}), bytes.fromhex({key.hex()!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, moment], cwd=ROOT).returncode == 9
    if moment == "unlink":
        with pytest.raises(DatabaseError, match="exists"):
            backups.restore(copy, target, key)
    else:
        assert not target.exists()
        assert backups.restore(copy, target, key) == report
    with OwnerDatabase(target, key) as database:
        assert state(database, grant_id, analyst)[:4] == before[:4]


@pytest.mark.parametrize("log", ["-wal", "-shm", "-journal"])
def test_a_log_of_a_former_database_is_not_played_into_a_restored_one(tmp_path, log):
    key = secrets.token_bytes(32)
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, tmp_path / "copy.backup")
    (tmp_path / f"new.db{log}").write_bytes(b"of another file")
    with pytest.raises(DatabaseError, match=rf"new\.db{log} exists"):
        backups.restore(tmp_path / "copy.backup", tmp_path / "new.db", key)
    assert not (tmp_path / "new.db").exists()
    assert (tmp_path / f"new.db{log}").read_bytes() == b"of another file"


def test_a_backup_holds_corrupt_records_as_they_are_and_names_them(tmp_path):
    key = secrets.token_bytes(32)
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        victim = next(iter(database.records())).record_id
        with contextlib.closing(sqlite3.connect(database.path)) as raw, raw:
            raw.execute("UPDATE records SET sealed_tags = x'00' WHERE record_id = ?", (victim,))
        report = backups.backup(database, key, tmp_path / "copy.backup")
    assert report.records == 6 and len(report.corrupt) == 1 and victim in report.corrupt[0]
    assert backups.restore(tmp_path / "copy.backup", tmp_path / "new.db", key) == report


def test_a_backup_is_not_put_beside_the_log_of_another(tmp_path):
    key = secrets.token_bytes(32)
    (tmp_path / "copy.backup-wal").write_bytes(b"of another file")
    with (
        OwnerDatabase.create(tmp_path / "owner.db", key) as database,
        pytest.raises(BackupError, match=r"copy\.backup-wal"),
    ):
        backups.backup(database, key, tmp_path / "copy.backup")
    assert not (tmp_path / "copy.backup").exists()


def test_the_journal_of_a_killed_restore_is_not_played_into_the_next_one(tmp_path):
    key, target = secrets.token_bytes(32), tmp_path / "new.db"
    with OwnerDatabase.create(tmp_path / "owner.db", key) as database:
        add_everything(database)
        backups.backup(database, key, tmp_path / "monday")
        database.delete([record.record_id for record in database.records()][:3])
        report = backups.backup(database, key, tmp_path / "tuesday")
    part = tmp_path / ".new.db.part"
    shutil.copyfile(tmp_path / "monday", part)
    # Killed within its transaction, some of it written already: what SQLite calls a hot journal.
    code = (
        f"import os, sqlite3; raw = sqlite3.connect({str(part)!r}, isolation_level=None)\n"
        "for line in ('PRAGMA cache_size=1', 'BEGIN', 'DELETE FROM images', 'DELETE FROM released',"
        " 'DELETE FROM records', 'DROP TABLE backup_proof'): raw.execute(line)\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert part.read_bytes() != (tmp_path / "monday").read_bytes()
    assert part.with_name(".new.db.part-journal").stat().st_size > 0
    assert backups.restore(tmp_path / "tuesday", target, key) == report
    names = ["monday", "new.db", "owner.db", "tuesday"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


# --- an older release ------------------------------------------------------------------------------------


def make_release_0_1(path, key, *, version=1):
    """Write the database that release 0.1 wrote, byte for byte in its formats."""
    salt, rng = secrets.token_bytes(32), np.random.default_rng(1)
    wrap = wrapping_key(key, salt)
    description = json.dumps({"dataset": "old-cells", "classes": ["good", "bad"]}).encode().ljust(1024)
    pictures = {}
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("PRAGMA journal_mode=WAL")
        raw.executescript(
            "CREATE TABLE meta (id INTEGER NOT NULL, version INTEGER NOT NULL, salt BLOB NOT NULL,"
            " sealed BLOB NOT NULL, PRIMARY KEY (id));"
            "CREATE TABLE records (record_id VARCHAR(32) NOT NULL, wrapped_key BLOB NOT NULL,"
            " sealed_tags BLOB NOT NULL, sealed_image BLOB NOT NULL, PRIMARY KEY (record_id));"
            "CREATE TABLE releases (id INTEGER NOT NULL, record_id VARCHAR(32) NOT NULL,"
            " sealed_grant BLOB NOT NULL, released_at DATETIME NOT NULL, PRIMARY KEY (id),"
            " FOREIGN KEY(record_id) REFERENCES records (record_id));"
            "CREATE INDEX ix_releases_record_id ON releases (record_id);"
        )
        head = seal(wrap, description, what="description", place="meta")
        raw.execute("INSERT INTO meta VALUES (1, ?, ?, ?)", (version, salt, head))
        for i in range(4):
            name, data_key = secrets.token_hex(16), secrets.token_bytes(32)
            image = rng.integers(0, 256, (9, 300), dtype=np.uint8)
            tags = (i % 2).to_bytes(4, "big") + bytes([i // 2])
            packed = (9).to_bytes(4, "big") + (300).to_bytes(4, "big") + image.tobytes()
            row = (
                name,
                seal(wrap, data_key, what="key", place=name),
                seal(data_key, tags, what="tags", place=name),
                seal(data_key, packed, what="image", place=name),
            )
            raw.execute("INSERT INTO records VALUES (?, ?, ?, ?)", row)
            grant = json.dumps({"site": f"site-{i}", "epoch": 1}).encode().ljust(256)
            entry = (i + 1, name, seal(wrap, grant, what="grant", place=name), "2026-01-02 03:04:05.000006")
            raw.execute("INSERT INTO releases VALUES (?, ?, ?, ?)", entry)
            pictures[name] = (image, i % 2, ("train", "test")[i // 2])
    return pictures


def test_a_database_of_release_0_1_is_migrated(tmp_path):
    path, key = tmp_path / "owner.db", secrets.token_bytes(32)
    pictures = make_release_0_1(path, key)
    for _ in range(2):  # the second opening finds nothing to do
        with OwnerDatabase(path, key) as database:
            assert (database.dataset().name, database.dataset().classes) == ("old-cells", ("good", "bad"))
            for name, (image, label, split) in pictures.items():
                record = database.get(name)
                np.testing.assert_array_equal(record.image, image)
                assert (record.label, record.split) == (label, split)
            logged = releases(database)
            assert [entry.record_id for entry in logged] == list(pictures)
            assert (logged[2].site, logged[2].epoch) == ("site-2", 1)
            assert logged[0].released_at == datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    with OwnerDatabase(path, key) as database:
        database.set_bundle("old-cells", new_bundle())
        assert ReleaseBook(database, SIGNING).release().records == 4
        found = expire(database, 1.0)  # of unknown age: kept
        assert (found.destroyed, found.kept, found.undated, database.count()) == (0, 4, 4, 4)


def test_a_migration_that_fails_changes_nothing(tmp_path):
    path, key = tmp_path / "owner.db", secrets.token_bytes(32)
    pictures = make_release_0_1(path, key)
    with pytest.raises(DatabaseError, match="another owner key"):
        OwnerDatabase(path, secrets.token_bytes(32))
    with contextlib.closing(sqlite3.connect(path)) as raw:
        tables = {row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables == {"meta", "records", "releases"}
    with OwnerDatabase(path, key) as database:
        assert database.count() == len(pictures)


def test_other_versions_are_refused_by_name(tmp_path):
    key = secrets.token_bytes(32)
    make_release_0_1(tmp_path / "odd.db", key, version=9)
    with pytest.raises(DatabaseError, match="cannot migrate"):
        OwnerDatabase(tmp_path / "odd.db", key)
    OwnerDatabase.create(tmp_path / "new.db", key).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(DatabaseError, match="newer release"):
        OwnerDatabase(tmp_path / "new.db", key)


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from flep_fl.private_database.schema import metadata

    with (
        OwnerDatabase.create(tmp_path / "o.db", secrets.token_bytes(32)) as database,
        database.database.read() as connection,
    ):
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
