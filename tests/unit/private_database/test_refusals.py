"""What the private database refuses, or leaves alone, one guard at a time."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from flep_fl.contracts.errors import (
    ConfigError,
    DatabaseError,
    DataError,
    ImageFormatError,
    RecordError,
    SequenceConflictError,
    StoreBusyError,
    UnknownDatasetError,
)
from flep_fl.contracts.owner_records import Capture
from flep_fl.private_database import checks, engine
from flep_fl.private_database.access import log_releases, releases
from flep_fl.private_database.retention import expire
from flep_fl.private_database.rotation import rotate_owner_key
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.private_database.writer import GroupWriter

KEY = secrets.token_bytes(32)
DAY = 86400.0


@pytest.fixture
def database(tmp_path: Path):
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, KEY, dataset="cells", classes=("good", "bad")) as opened:
        yield opened


def capture(sequence: int, dataset: str = "cells", **settings) -> Capture:
    image = np.random.default_rng(sequence).integers(0, 256, (6, 5), dtype=np.uint8)
    return Capture(dataset, "cam", sequence, image, **{"label": 0, "split": "train", **settings})


def change(database: OwnerDatabase, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(database.path)) as raw, raw:
        raw.execute(statement)


# --- opening ---------------------------------------------------------------------------------------------


def test_a_database_of_something_else_is_named(tmp_path):
    path = tmp_path / "songs.db"
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("CREATE TABLE songs (name TEXT)")
    with pytest.raises(DatabaseError, match="not a private database of this release"):
        OwnerDatabase(path, KEY)


def test_a_database_without_its_head_is_named(database):
    change(database, "DELETE FROM meta")
    with pytest.raises(DatabaseError, match="has no head"):
        OwnerDatabase(database.path, KEY)


def test_a_file_that_others_could_read_is_closed_to_them(database):
    database.path.chmod(0o644)
    OwnerDatabase(database.path, KEY).close()
    assert stat.S_IMODE(database.path.stat().st_mode) == 0o600


def test_a_new_key_of_another_length_is_refused(database):
    with pytest.raises(DatabaseError, match="32 bytes"):
        rotate_owner_key(database, b"short")
    OwnerDatabase(database.path, KEY).close()


# --- data sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("", {}),
        ("n" * 257, {}),
        ("new", {"classes": ()}),
        ("new", {"test_fraction": 1.5}),
        ("new", {"test_fraction": float("nan")}),
    ],
)
def test_unusable_data_sets_are_refused(database, name, settings):
    with pytest.raises(ConfigError):
        database.add_dataset(name, **{"classes": ("a", "b"), **settings})
    assert [found.name for found in database.all_datasets()] == ["cells"]


def test_data_sets_have_one_name_each_and_are_named_where_there_are_several(database):
    assert database.dataset().name == "cells"
    with pytest.raises(DatabaseError, match="already"):
        database.add_dataset("cells", ("x",))
    database.add_dataset("plates", ("x",))
    with pytest.raises(UnknownDatasetError, match="not exactly one"):
        database.dataset()


# --- what comes in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(30,), (2, 3, 4, 5), (0, 5), (3, 0, 5), (1 << 16, 1, 1), ((1 << 16) + 1, 1)]
)
def test_images_of_unusable_shapes_are_refused(database, shape):
    with pytest.raises(ImageFormatError):
        database.put(Capture("cells", "cam", 1, np.zeros(shape, np.uint8), label=0))


def test_images_that_are_too_large_are_refused(database, monkeypatch):
    monkeypatch.setattr(checks, "MAX_IMAGE_BYTES", 29)
    with pytest.raises(ImageFormatError, match="at most 29 bytes"):
        database.put(capture(1))


def test_labels_are_classes_of_the_data_set(database):
    with pytest.raises(DataError, match="out of range"):
        database.put(capture(1, label=-1))
    first, second = (database.put(capture(i)).record_id for i in (2, 3))
    for labels, error in (({first: 1, second: 2}, DataError), ({first: 1, "0" * 32: 1}, RecordError)):
        with pytest.raises(error):
            database.set_labels(labels)
        assert database.get(first).label == 0  # all of them, or none
    database.set_labels({first: 1})
    assert database.get(first).label == 1


def test_a_deleted_capture_does_not_come_back_by_a_replay(database):
    receipts = [database.put(capture(i)) for i in range(1, 4)]
    database.delete([receipts[1].record_id])
    with pytest.raises(SequenceConflictError, match="more than 3"):
        database.put(capture(2))
    assert database.count() == 2


def test_a_devices_numbers_rise_within_a_group_as_well(database):
    with pytest.raises(SequenceConflictError, match="more than 5"):
        database.put_many([capture(5), capture(4)])
    assert database.count() == 0 and database.last_sequence("cam") is None  # all of them, or none
    assert [receipt.is_new for receipt in database.put_many([capture(5), capture(6)])] == [True, True]


def test_a_capture_under_the_number_of_one_and_the_key_of_another_is_refused(database):
    database.put(capture(1, idempotency_key="k"))
    assert database.put(capture(2)).is_new
    with pytest.raises(SequenceConflictError, match="for another capture"):
        database.put(capture(2, idempotency_key="k"))


def test_a_row_for_a_writer_that_has_ended_is_refused():
    writer = GroupWriter(lambda rows: [1 / 0 for _ in rows])
    with writer.reserved() as slot:
        writer.close()
        with pytest.raises(StoreBusyError, match="being closed"):
            slot.enqueue({})
    assert writer.depth()[0] == 0


def test_a_caller_who_gives_up_costs_the_others_nothing():
    gate, stored = threading.Event(), []

    def commit(rows):
        gate.wait()
        stored.extend(row["number"] for row in rows)
        return [row["number"] for row in rows]

    writer = GroupWriter(commit, max_batch=1)
    futures = []
    for number in range(3):
        with writer.reserved() as slot:
            futures.append(slot.enqueue({"number": number}))
    assert futures[1].cancel()
    gate.set()
    assert (futures[0].result(5), futures[2].result(5)) == (0, 2)
    writer.close()
    assert stored == [0, 2]


# --- the access log, age and time ------------------------------------------------------------------------


def test_entries_of_the_access_log_have_one_length(database):
    record_id = database.put(capture(1)).record_id
    with pytest.raises(DatabaseError, match="too long"):
        log_releases(database, [record_id], site="s" * 257, epoch=1)
    for site in ("a", "s" * 256):
        log_releases(database, [record_id], site=site, epoch=1)
    with contextlib.closing(sqlite3.connect(database.path)) as raw:
        assert len(set(raw.execute("SELECT length(sealed) FROM access_log"))) == 1
    assert [len(entry.site) for entry in releases(database)] == [1, 256]


@pytest.mark.parametrize("age", [0.0, -1.0, float("nan"), float("inf")])
def test_a_retention_that_is_none_destroys_nothing(database, age):
    database.put(capture(1))
    with pytest.raises(ConfigError, match="out of range"):
        expire(database, age)
    assert database.count() == 1


def test_retention_is_for_one_data_set_and_does_not_stop_at_corrupt_records(database):
    wall = [1e9]
    database.clock._wall = lambda: wall[0]
    database.clock.accept()
    database.add_dataset("plates", ("x",))
    ids = [database.put(capture(i)).record_id for i in range(3)]
    other = database.put(capture(9, "plates")).record_id
    change(database, f"UPDATE records SET sealed_tags = x'00' WHERE record_id = '{ids[1]}'")
    wall[0] += 2 * DAY
    found = expire(database, DAY, dataset="cells")
    assert (found.destroyed, found.kept) == (2, 1)
    assert database.get(other).label == 0 and database.count() == 2


def test_the_latest_time_is_that_of_all_processes(database):
    walls = {"mine": 1e9, "other": 1e9 + DAY}
    database.clock._wall = lambda: walls["mine"]
    database.clock.accept()
    with OwnerDatabase(database.path, KEY) as other:
        other.clock._wall = lambda: walls["other"]
        assert other.clock.now() == 1e9 + DAY
    walls["mine"] += 3600
    assert database.clock.now() == 1e9 + 3600  # it writes its time, but not over a later one
    with OwnerDatabase(database.path, KEY) as again:
        again.clock._wall = lambda: 0.0
        assert again.clock.now() == 1e9 + DAY


def test_asking_for_the_time_within_a_transaction_does_not_wait_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_BUSY_SECONDS", 1)
    with OwnerDatabase.create(tmp_path / "o.db", KEY) as database:
        database.clock._wall = lambda: 1e9
        database.clock.accept()
        database.clock._wall = lambda: 1e9 + DAY
        with database.write():
            assert database.clock.now() == 1e9 + DAY
        assert database.clock.now() == 1e9 + DAY
    with OwnerDatabase(tmp_path / "o.db", KEY) as again:
        again.clock._wall = lambda: 0.0
        assert again.clock.now() == 1e9 + DAY
