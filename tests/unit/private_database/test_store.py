"""The private database: round trips, nothing readable at rest, named errors."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest

from flep_fl.contracts.errors import DatabaseError, DataError, ImageFormatError, RecordError
from flep_fl.private_database.access import log_releases, releases
from flep_fl.private_database.sealing import Unsealable, index_key, seal, unseal, wrapping_key
from flep_fl.private_database.store import OwnerDatabase

KEY = secrets.token_bytes(32)


def images(count, shape=(12, 9)):
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "owner.db"
    with OwnerDatabase.create(path, KEY, dataset="cells", classes=("good", "bad")) as opened:
        yield opened


def test_round_trip_after_reopening(database):
    pictures = [*images(3), *images(2, (5, 20))]
    ids = database.ingest(pictures, [0, 1, 1, 0, 1], ["train", "train", "test", "test", "train"])
    database.close()
    with OwnerDatabase(database.path, KEY) as again:
        assert again.dataset().name == "cells"
        assert again.dataset().classes == ("good", "bad")
        assert (again.count(), again.count("train"), again.count("test")) == (5, 3, 2)
        for picture, record_id, label in zip(pictures, ids, [0, 1, 1, 0, 1], strict=True):
            record = again.get(record_id)
            np.testing.assert_array_equal(record.image, picture)
            assert record.label == label
        assert {r.record_id for r in again.records("test")} == {ids[2], ids[3]}
        assert sorted(t.label for t in again.tags("train")) == [0, 1, 1]


def test_rows_do_not_lie_in_the_order_of_ingestion(database):
    ids = database.ingest(images(40), [0] * 20 + [1] * 20, ["train"] * 40)
    with sqlite3.connect(database.path) as raw:
        stored = [row[0] for row in raw.execute("SELECT record_id FROM records ORDER BY rowid")]
    assert sorted(stored) == sorted(ids)
    assert stored != ids  # equal by chance once in 40! runs


def test_ingest_is_all_or_nothing(database):
    with pytest.raises(ImageFormatError, match="image 1"):
        database.ingest([images(1)[0], np.zeros((2, 2), np.float32)], [0, 0], ["train", "train"])
    assert database.count() == 0


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [([2], ["train"], "label of image 0"), ([0], ["valid"], "split of image 0"), ([], ["train"], "number")],
)
def test_unusable_tags_are_refused(database, labels, splits, message):
    with pytest.raises(DataError, match=message):
        database.ingest(images(1), labels, splits)


def test_stolen_files_hold_no_canary(tmp_path):
    """Pixels, class names, data-set name, site names and keys: no trace, in the database or its WAL."""
    path = tmp_path / "db" / "owner.db"
    pixels = secrets.token_bytes(64)
    names = [secrets.token_hex(12) for _ in range(4)]
    database = OwnerDatabase.create(path, KEY, dataset=names[0], classes=names[1:3])
    picture = np.tile(np.frombuffer(pixels, np.uint8).reshape(8, 8), (4, 4))
    pixels = picture[0].tobytes()
    ids = database.ingest([picture] * 3, [0, 1, 1], ["train", "train", "test"])
    log_releases(database, ids, site=names[3], epoch=7)
    assert path.with_name("owner.db-wal").stat().st_size > 0  # the search below covers the log as well
    assert_no_trace(path.parent, [pixels, KEY, *(name.encode() for name in names)])
    assert_mode(path.parent, 0o600)
    database.close()
    assert_no_trace(path.parent, [pixels, KEY, *(name.encode() for name in names)])


def test_equal_tags_look_unequal_and_have_one_length(database):
    database.ingest(images(6), [0, 0, 0, 1, 1, 1], ["train", "train", "test"] * 2)
    with sqlite3.connect(database.path) as raw:
        tags = [row[0] for row in raw.execute("SELECT sealed_tags FROM records")]
    assert len({len(t) for t in tags}) == 1
    assert len(set(tags)) == 6


def test_wrong_owner_key(database):
    with pytest.raises(DatabaseError, match="another owner key"):
        OwnerDatabase(database.path, secrets.token_bytes(32))
    with pytest.raises(DatabaseError, match="32 bytes"):
        OwnerDatabase(database.path, b"short")


def test_not_a_database(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(DatabaseError, match="does not exist"):
        OwnerDatabase(path, KEY)
    path.write_bytes(b"this is not a database" * 500)
    with pytest.raises(DatabaseError):
        OwnerDatabase(path, KEY)
    with pytest.raises(DatabaseError, match="cannot be created"):
        OwnerDatabase.create(path, KEY, dataset="x", classes=("a",))


@pytest.mark.parametrize(
    ("table", "column"),
    [("records", "wrapped_key"), ("records", "sealed_tags"), ("images", "sealed_image")],
)
def test_a_corrupt_record_is_named_and_costs_no_other(database, table, column):
    ids = database.ingest(images(4), [0, 1, 0, 1], ["train"] * 4)
    with sqlite3.connect(database.path) as raw:
        (seq,) = raw.execute("SELECT seq FROM records WHERE record_id=?", (ids[2],)).fetchone()
        (blob,) = raw.execute(f"SELECT {column} FROM {table} WHERE seq=?", (seq,)).fetchone()
        altered = blob[:20] + bytes([blob[20] ^ 1]) + blob[21:]
        raw.execute(f"UPDATE {table} SET {column}=? WHERE seq=?", (altered, seq))
    with pytest.raises(RecordError, match=ids[2]):
        database.get(ids[2])
    with pytest.raises(RecordError, match=ids[2]):
        list(database.records("train"))
    errors = []
    good = {r.record_id for r in database.records("train", on_corrupt=errors.append)}
    assert good == {ids[0], ids[1], ids[3]}
    assert len(errors) == 1


def test_blobs_cannot_be_moved_between_records(database):
    ids = database.ingest(images(2), [0, 1], ["train"] * 2)
    with sqlite3.connect(database.path) as raw:
        row = raw.execute(
            "SELECT wrapped_key, sealed_tags FROM records WHERE record_id=?", (ids[0],)
        ).fetchone()
        raw.execute("UPDATE records SET wrapped_key=?, sealed_tags=? WHERE record_id=?", (*row, ids[1]))
    with pytest.raises(RecordError, match=ids[1]):
        database.get(ids[1])


def test_a_whole_row_does_not_open_under_another_identifier(database):
    ids = database.ingest(images(2), [0, 1], ["train"] * 2)
    with contextlib.closing(sqlite3.connect(database.path)) as raw, raw:
        raw.execute("UPDATE records SET record_id = 'aside' WHERE record_id = ?", (ids[0],))
        raw.execute("UPDATE records SET record_id = ? WHERE record_id = ?", (ids[0], ids[1]))
    with pytest.raises(RecordError, match=f"{ids[0]} of the private database is corrupt"):
        database.get(ids[0])


def test_a_sealed_blob_opens_in_its_place_and_for_its_purpose_alone():
    sealed = seal(KEY, b"content", what="grant", place="one")
    assert unseal(KEY, sealed, what="grant", place="one") == b"content"
    for what, place in (("grant", "two"), ("bundle", "one"), ("gran", "t\0one"), ("", "grant\0one")):
        with pytest.raises(Unsealable):
            unseal(KEY, sealed, what=what, place=place)


def test_two_databases_under_one_owner_key_share_no_key(tmp_path, database):
    with OwnerDatabase.create(tmp_path / "b.db", KEY, dataset="cells", classes=("good", "bad")) as other:
        assert other.blind_index("dataset", "cells") != database.blind_index("dataset", "cells")
        with pytest.raises(DatabaseError, match="corrupt"):
            other.unseal(database.seal(b"x", what="a", place="b"), what="a", place="b")


def test_keys_are_derived_with_hkdf_under_the_databases_salt():
    def derived(key, salt, label):  # RFC 5869, one block
        return hmac.digest(hmac.digest(salt, key, "sha256"), label + b"\1", "sha256")

    salt = secrets.token_bytes(32)
    wrapping = derived(KEY, salt, b"flep private database, key wrapping, version 1")
    assert wrapping_key(KEY, salt) == wrapping
    assert index_key(wrapping) == derived(
        wrapping, bytes(32), b"flep private database, blind index, version 1"
    )


def test_no_build_of_sqlite_makes_the_database_less_safe(tmp_path, monkeypatch):
    connect = sqlite3.dbapi2.connect

    def careless(*given, **settings):
        made = connect(*given, **settings)
        for pragma in ("secure_delete", "synchronous", "foreign_keys"):
            made.execute(f"PRAGMA {pragma}=OFF")
        return made

    monkeypatch.setattr(sqlite3.dbapi2, "connect", careless)
    with OwnerDatabase.create(tmp_path / "o.db", KEY) as opened, opened.database.read() as connection:
        pragmas = ("secure_delete", "synchronous", "foreign_keys", "journal_mode")
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
        assert found == [1, 2, 1, "wal"]  # 2 is FULL: a commit is on the disk


def test_truncated_blob_is_a_record_error(database):
    (record_id,) = database.ingest(images(1), [0], ["train"])
    with sqlite3.connect(database.path) as raw:
        raw.execute("UPDATE images SET sealed_image = x'00'")
    with pytest.raises(RecordError, match=record_id):
        database.get(record_id)


def test_unknown_record(database):
    with pytest.raises(RecordError, match="no record"):
        database.get("0" * 32)


def test_access_log(database):
    ids = database.ingest(images(3), [0, 1, 1], ["train"] * 3)
    log_releases(database, ids[:2], site="a", epoch=1)
    log_releases(database, ids[2:], site="b", epoch=2)
    assert [(r.record_id, r.site, r.epoch) for r in releases(database)] == [
        (ids[0], "a", 1),
        (ids[1], "a", 1),
        (ids[2], "b", 2),
    ]
    assert [r.record_id for r in releases(database, site="b")] == [ids[2]]


def test_access_log_refuses_foreign_records(database):
    (record_id,) = database.ingest(images(1), [0], ["train"])
    with pytest.raises(DatabaseError):
        log_releases(database, [record_id, "f" * 32], site="a", epoch=1)
    assert releases(database) == []


def test_repr_shows_no_secret(database):
    (record_id,) = database.ingest(images(1), [1], ["train"])
    assert KEY.hex() not in repr(database)
    shown = repr(database.get(record_id))
    assert "label" not in shown
    assert "array" not in shown


def assert_no_trace(folder: Path, canaries: list[bytes]) -> None:
    import base64

    for file in folder.iterdir():
        data = file.read_bytes()
        for canary in canaries:
            assert canary not in data, file.name
            assert canary.hex().encode() not in data.lower(), file.name
            for offset in range(3):  # base64 has three alignments
                core = base64.b64encode(canary[offset:])[:-4]
                assert core not in data, file.name


def assert_mode(folder: Path, mode: int) -> None:
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == mode, file.name
