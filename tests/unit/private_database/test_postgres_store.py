"""The private database in PostgreSQL: a real server, started here."""

from __future__ import annotations

import time

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from postgres_server import PostgresServer
from store_load import KEY, capture, check_after_kill, picture, start_writer
from traces import traces

from flep_fl.contracts.errors import ConfigError, DatabaseError, SequenceConflictError
from flep_fl.contracts.owner_records import Capture
from flep_fl.data_security.keys import ImageKeyBundle, NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.private_database import backup as backups
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.rotation import rotate_owner_key
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.private_database.vault import make_tables

SIGNING = Ed25519PrivateKey.generate()
OTHER_KEY = bytes(range(32))


@pytest.fixture(scope="module")
def server():
    with PostgresServer() as started:
        yield started


def new_bundle():
    return ImageKeyBundle.generate(
        get_preset("aead").parameters, NoiseParameters(std=0.0), cipher_name="aead"
    )


def test_the_whole_life_of_a_database(server, tmp_path):
    url = server.new_database("life")
    with OwnerDatabase.create(url, KEY) as database:
        database.add_dataset("cells", ("good", "bad"), bundle=new_bundle())
        receipts = [database.put(capture(i)) for i in range(8)]
        assert database.put(capture(3)).is_new is False
        with pytest.raises(SequenceConflictError):
            database.put(Capture("cells", "cam", 3, picture(4), 0))
        assert ReleaseBook(database, SIGNING).release().encrypted == 8
        assert database.delete([receipts[0].record_id]) == 1
        assert rotate_owner_key(database, OTHER_KEY) == []
        report = backups.backup(database, OTHER_KEY, tmp_path / "pg.backup")
        assert report.records == 7
    with pytest.raises(DatabaseError, match="not empty"):
        OwnerDatabase.create(url, KEY)
    with pytest.raises(DatabaseError, match="another owner key"):
        OwnerDatabase(url, KEY)
    # A backup goes into either kind of database, and rows go on being counted.
    half = server.new_database("half")
    make_tables(half, None)  # where an interrupted restore stops
    for location in (tmp_path / "from-pg.db", server.new_database("again"), half):
        backups.restore(tmp_path / "pg.backup", location, OTHER_KEY)
        with OwnerDatabase(location, OTHER_KEY) as restored:
            assert restored.put(capture(100)).is_new
            assert restored.put(capture(3)).is_new is False
            assert restored.count() == 8
            np.testing.assert_array_equal(restored.get(receipts[5].record_id).image, picture(5))
            assert ReleaseBook(restored, SIGNING).release().encrypted == 1


def test_the_servers_files_hold_no_canary(server):
    canary = np.frombuffer(b"canary-" * 40, np.uint8).reshape(10, 28)
    with OwnerDatabase.create(server.new_database("canary"), KEY) as database:
        database.add_dataset("secret-name-of-a-data-set", ("secret-class", "b"), bundle=new_bundle())
        database.put(Capture("secret-name-of-a-data-set", "secret-device-7", 1, canary, label=0))
    words = [b"canary-canary-", b"secret-name-of", b"secret-class", b"secret-device"]
    files = server.files()
    assert any("pg_wal" in str(file) for file in files)
    assert traces(files, words) == []


def test_a_database_that_is_not_there_is_named(server):
    with pytest.raises(DatabaseError, match="cannot be used"):
        OwnerDatabase(f"postgresql+psycopg://owner@/nothing?host={server.folder}", KEY)
    with pytest.raises(ConfigError, match="unknown kind"):
        OwnerDatabase("mysql://somewhere/x", KEY)


@pytest.mark.slow
def test_kill_9_of_the_server_under_load_loses_nothing_acknowledged():
    with PostgresServer() as server:
        url = server.new_database("load")
        OwnerDatabase.create(url, KEY, dataset="cells", classes=("a",)).close()
        acknowledged = []
        for number in range(10):
            child = start_writer(url, number * 1000)
            for line in child.stdout:
                acknowledged.append(line.split())
                if len(acknowledged) >= (number + 1) * 30:
                    break
            server.kill()
            # What was on its way when the server died is refused; the pipe holds what was acknowledged.
            time.sleep(0.5)
            child.kill()
            acknowledged += [line.split() for line in child.stdout if line.endswith("\n")]
            child.wait()
            server.start()
        with OwnerDatabase(url, KEY) as database:
            assert check_after_kill(database, acknowledged) >= len(acknowledged) >= 300
