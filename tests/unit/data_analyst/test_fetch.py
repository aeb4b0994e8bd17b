"""From the owner's gateway to a sealed archive: everything that can be done to it on the way."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from owner_server import OwnerServer
from owner_world import FAR, new_identity, pixels
from traces import traces

from flep_fl.contracts import archive
from flep_fl.contracts.errors import (
    ConfigError,
    FetchError,
    FlepError,
    GrantError,
    GrantExpiredError,
    GrantRevokedError,
    KeystoreError,
    NotReleasedError,
    OwnerPinError,
    OwnerUnreachableError,
    ReleaseChangedError,
    TamperedReleaseError,
    UnknownGrantError,
)
from flep_fl.contracts.grants import GrantDocument, signed_message
from flep_fl.contracts.owner_records import IndexPage
from flep_fl.contracts.records import SealedRecord
from flep_fl.data_analyst import keystore as keystores
from flep_fl.data_analyst.keystore import Keystore
from flep_fl.data_analyst.owner_client import parse_address
from flep_fl.data_security.wrapping import wrap_bundle
from flep_fl.private_database.grants import revoke_grant


def test_what_is_fetched_is_what_the_owner_has(world):
    (fetched,) = world.fetch()
    assert fetched.downloaded == 20
    train, test = pixels(fetched)
    assert (len(train), len(test)) == (15, 5)
    assert fetched.description.classes == ("good", "bad")
    stored = {record.image.tobytes(): record.label for record in world.database.records()}
    for split in (train, test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert stored[image[0].astype(np.uint8).tobytes()] == label
    assert world.progress[0] == ("cells", 0, 20) and world.progress[-1] == ("cells", 20, 20)
    assert "is trusted from now on" in world.events[0]
    # Nothing is fetched twice, and nothing lies there in the clear.
    before = len(world.asked("records"))
    (again,) = world.fetch()
    assert again.downloaded == 0 and len(world.asked("records")) == before
    files = [file for file in world.folder.rglob("*") if file.is_file() and "owner/" not in str(file)]
    canaries = [fetched.bundle.master_key, *(image for image in stored)]
    assert traces(files, canaries) == []
    assert len(files) == 8
    for file in (world.folder / "keys").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_interrupted_download_goes_on_where_it_was(world):
    pages = iter(range(100))

    def cut(path, answer):
        if path == "records" and next(pages) >= 2:
            raise ConnectionError
        return answer

    world.server.tamper = cut
    with pytest.raises(OwnerUnreachableError):
        world.fetch()
    world.server.tamper = lambda path, answer: answer
    world.progress.clear()
    (fetched,) = world.fetch()
    assert fetched.downloaded == 8
    assert world.progress[0] == ("cells", 12, 20)
    assert len(pixels(fetched)[0]) == 15


def test_a_line_that_breaks_now_and_then_is_no_matter(world):
    calls = iter(range(1000))

    def flaky(_path, answer):
        if next(calls) % 2:
            raise ConnectionError
        return answer

    world.server.tamper = flaky
    (fetched,) = world.fetch()
    assert len(pixels(fetched)[0]) == 15


def test_new_and_deleted_records_cost_no_second_download(world):
    world.server.page = 5
    world.fetch()
    world.fill(4, start=100)
    world.book.release()
    (more,) = world.fetch()
    assert more.downloaded <= 4 + 5  # the last page comes again
    assert sum(map(len, pixels(more))) == 24
    victim = next(more.archive.records("train")).record_id
    world.database.delete([victim])
    with pytest.raises(NotReleasedError):
        world.fetch()
    world.book.release()
    (less,) = world.fetch()
    assert less.downloaded <= 4
    assert sum(map(len, pixels(less))) == 23
    assert victim not in {record.record_id for record in less.archive.records("train")}


def test_a_release_of_the_same_size_is_not_taken_for_the_same(world):
    world.fetch()
    world.fill(1, start=100)  # number 0 of those is for testing
    (new,) = world.ids
    tested = [record for record in world.database.records() if record.split == "test"]
    victim = next(record for record in tested if record.record_id != new.record_id)  # their order is random
    world.database.delete([victim.record_id])
    world.book.release()
    (fetched,) = world.fetch()
    names = {record.record_id for record in fetched.archive.records("test")}
    assert len(names) == 5 and new.record_id in names and victim.record_id not in names


def test_a_share_that_grows_is_fetched_whole(world):
    world.fill(60, start=20)  # of five held-out records, one half may get none
    world.book.release()
    for index in (0, 1):  # one of the two holds the first record
        world.give(world.me, share=(index, 2), not_after=FAR + 2 * index + 1)
        (part,) = world.fetch()
        assert 0 < sum(map(len, pixels(part))) < 80
        world.give(world.me, not_after=FAR + 2 * index + 2)
        (whole,) = world.fetch()
        assert sum(map(len, pixels(whole))) == 80
        shutil.rmtree(world.folder / "cache")


def test_a_release_that_never_stands_still_is_given_up(world):
    def change(path, answer):
        if path == "records":
            raise ReleaseChangedError("again")
        return answer

    world.server.tamper = change
    with pytest.raises(ReleaseChangedError):
        world.fetch()
    assert len(world.asked("records")) == 3


def test_a_release_that_changes_under_way_is_opened_again(world):
    def change(path, answer):
        if path == "records" and len(world.asked("records")) == 2:
            world.database.delete([world.ids[0].record_id])
            world.book.release()
        return answer

    world.server.tamper = change
    (fetched,) = world.fetch()
    assert sum(map(len, pixels(fetched))) == 19


# --- what somebody may do on the way ---------------------------------------------------------------------


def change_records(number, change):
    """Apply ``change(records)`` to the ``number``-th page."""
    seen = iter(range(1000))

    def tamper(path, page):
        if path == "records" and next(seen) == number:
            return replace(page, records=tuple(change(list(page.records))))
        return page

    return tamper


def made_up(records):
    return [*records[:2], SealedRecord(secrets.token_hex(16), *_parts(records[2])), *records[3:]]


def _parts(record):
    return record.envelope, record.sealed_label


def flipped(records, part):
    envelope, label = _parts(records[1])
    if part == "envelope":
        envelope = envelope[:-1] + bytes([envelope[-1] ^ 1])
    else:
        label = label[:-1] + bytes([label[-1] ^ 1])
    return [records[0], SealedRecord(records[1].record_id, envelope, label), *records[2:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: [*r[:1], *r[2:]], "dropped or swapped"),
        (lambda r: [r[1], r[0], *r[2:]], "dropped or swapped"),
        (lambda r: [r[0], r[0], *r[1:]], "duplicated"),
        (lambda r: [r[0], SealedRecord(r[1].record_id, *_parts(r[2])), *r[2:]], "altered or substituted"),
        (made_up, "made up"),
        (lambda r: flipped(r, "envelope"), "altered or substituted"),
        (lambda r: flipped(r, "label"), "altered or substituted"),
        (lambda r: [], "were dropped"),
    ],
)
def test_every_trick_on_a_record_is_found_and_named(world, change, words):
    honest = world.server.tamper
    world.server.tamper = change_records(1, change)
    with pytest.raises(TamperedReleaseError, match=words) as caught:
        world.fetch()
    assert any(receipt.record_id in str(caught.value) for receipt in world.ids) or "made up" in words
    # What came before is kept; an honest line ends the job.
    world.server.tamper = honest
    (fetched,) = world.fetch()
    assert fetched.downloaded == 14
    assert sum(map(len, pixels(fetched))) == 20


def test_records_after_the_last_one_are_found(world):
    world.server.page = 100
    world.server.tamper = change_records(0, lambda r: [*r, r[3]])
    with pytest.raises(TamperedReleaseError, match="duplicated"):
        world.fetch()
    world.server.tamper = change_records(
        0, lambda r: [*r, SealedRecord(secrets.token_hex(16), *_parts(r[0]))]
    )
    with pytest.raises(TamperedReleaseError, match="added"):
        world.fetch()


def test_a_release_that_ends_early_is_found(world):
    world.server.tamper = lambda path, page: replace(page, cursor=None) if path == "records" else page
    with pytest.raises(TamperedReleaseError, match="14 records of cells were dropped"):
        world.fetch()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[archive.ENTRY_BYTES :],
        lambda data: data + data[: archive.ENTRY_BYTES],
        lambda data: data[archive.ENTRY_BYTES :] + data[: archive.ENTRY_BYTES],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
)
def test_an_altered_index_is_found(world, change):
    world.server.page = 100
    world.server.tamper = lambda path, page: (
        IndexPage(change(page.entries), page.cursor) if path == "index" else page
    )
    with pytest.raises(TamperedReleaseError, match="index"):
        world.fetch()


def resigned(key, **changes):
    """A tamperer that holds a key of its own and signs other grants with it."""

    def tamper(path, opened):
        if path != "open":
            return opened
        document = replace(GrantDocument.from_bytes(opened.grant), **changes).to_bytes()
        return replace(opened, grant=document, grant_signature=key.sign(signed_message(document)))

    return tamper


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "other"}, "names another data set"),
        ({"epoch": 7}, "another manifest's epoch"),
        ({"key_id": "0" * 32}, r"another manifest's key\b(?! bundle)"),
        ({"analyst": "bob"}, "another manifest's analyst"),
        ({"analyst_encryption_key": "1" * 64}, "another analyst's decryption key"),
        ({"analyst_verify_key": "1" * 64}, "another analyst's signing key"),
        ({"owner": "2" * 64}, "names another owner"),
        ({"grant_id": "3" * 32}, "names another grant"),
        ({"release_id": "3" * 32}, "names another release"),
        ({"bundle_sha256": "4" * 64}, "names another key bundle"),
        ({"manifest_sha256": "4" * 64}, r"names another manifest\b(?!')"),
        ({"not_after": 1}, "has ended"),
    ],
)
def test_a_grant_binds_everything(world, changes, words):
    world.server.tamper = resigned(world.signing, **changes)  # even the owner's own key does not help
    with pytest.raises(GrantError, match=words):
        world.fetch()
    assert world.keystore.grants(expired=True) == []


def reissued(world, bundle=None, **changes):
    """An owner that signs a manifest of other content, or wraps another bundle, and a grant that fits it."""

    def tamper(path, opened):
        if path != "open":
            return opened
        head = archive.ArchiveHead.from_bytes(opened.manifest)
        document = GrantDocument.from_bytes(opened.grant)
        wrapped, mine = opened.bundle, dict(changes)
        if bundle is not None:
            context = archive.wrap_context(document.analyst, document.dataset, document.epoch)
            wrapped = wrap_bundle(bundle.to_bytes(), world.me.encryption_key, context=context)
            mine["bundle_sha256"] = hashlib.sha256(wrapped).hexdigest()
            document = replace(document, bundle_sha256=mine["bundle_sha256"])
        own = {name: mine.pop(name) for name in ("bundle_sha256", "sealed_description") if name in mine}
        data = replace(head, manifest=replace(head.manifest, **mine), **own).to_bytes()
        grant = replace(document, manifest_sha256=hashlib.sha256(data).hexdigest()).to_bytes()
        return replace(
            opened,
            grant=grant,
            grant_signature=world.signing.sign(signed_message(grant)),
            manifest=data,
            manifest_signature=world.server.key + world.signing.sign(archive.signed_message(data)),
            bundle=wrapped,
        )

    return tamper


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "bob"}, "another manifest's analyst"),
        ({"dataset": "other"}, "another manifest's data set"),
        ({"epoch": 7}, "another manifest's epoch"),
        ({"key_id": "0" * 32}, r"another manifest's key\b(?! bundle)"),
        ({"bundle_sha256": "4" * 64}, "another manifest's key bundle"),
        ({"sealed_description": bytes(80)}, "description does not belong"),
    ],
)
def test_a_manifest_binds_the_same(world, changes, words):
    world.server.tamper = reissued(world, **changes)
    with pytest.raises(GrantError, match=words):
        world.fetch()
    assert world.keystore.grants(expired=True) == []


def test_a_bundle_that_is_not_the_one_of_the_grant_is_refused(world):
    bundle = world.database.bundle("cells", 1)
    for other in (bundle.rotate(), replace(bundle, epoch=2)):
        world.server.tamper = reissued(world, bundle=other)
        with pytest.raises(GrantError, match="not the one that it names"):
            world.fetch()
    world.server.tamper = lambda path, answer: answer
    (fetched,) = world.fetch()
    with pytest.raises(GrantError, match="not the one that the grant names"):
        world.keystore.store(fetched.document, bundle.rotate())
    assert world.keystore.held(fetched.document.owner, "cells").bundle == bundle


def test_a_grant_of_somebody_else_is_refused(world):
    world.server.tamper = resigned(Ed25519PrivateKey.generate())
    with pytest.raises(GrantError, match="not signed by this data owner"):
        world.fetch()
    stranger = Ed25519PrivateKey.generate()

    def manifest(path, opened):
        if path != "open":
            return opened
        key = stranger.public_key().public_bytes_raw()
        return replace(
            opened, manifest_signature=key + stranger.sign(archive.signed_message(opened.manifest))
        )

    world.server.tamper = manifest
    with pytest.raises(GrantError, match="manifest is signed by somebody else"):
        world.fetch()
    world.server.tamper = lambda path, opened: (
        replace(opened, manifest_signature=world.server.key + bytes(64)) if path == "open" else opened
    )
    with pytest.raises(GrantError, match="manifest is not signed by this data owner"):
        world.fetch()


def test_an_old_answer_is_not_taken_twice(world):
    old = {}

    def remember(path, answer):
        if path == "open":
            old.setdefault("answer", answer)
        return answer

    world.server.tamper = remember
    world.fetch()
    world.fill(2, start=50)
    world.book.release()
    world.fetch()
    world.server.tamper = lambda path, answer: old["answer"] if path == "open" else answer
    with pytest.raises(GrantError, match="older than one that was seen"):
        world.fetch()


# --- grants that end -------------------------------------------------------------------------------------


def test_a_revoked_grant_takes_its_key_along(world):
    (fetched,) = world.fetch()
    owner = fetched.document.owner
    assert world.keystore.held(owner, "cells").bundle == fetched.bundle
    revoke_grant(world.database, world.grant.grant_id)
    with pytest.raises(UnknownGrantError):
        world.fetch()
    with pytest.raises(KeystoreError, match="holds no key"):
        world.keystore.held(owner, "cells")


def test_a_grant_that_is_revoked_under_way_stops_the_download(world):
    def revoke(path, answer):
        if path == "records" and len(world.asked("records")) == 2:
            revoke_grant(world.database, world.grant.grant_id)
        return answer

    world.server.tamper = revoke
    with pytest.raises(GrantRevokedError):
        world.fetch()
    assert world.keystore.grants(expired=True) == []
    assert len(world.asked("records")) == 3


def test_everybody_else_goes_on_in_the_new_epoch(world):
    other = new_identity()
    second = world.give(other)
    (first,) = world.fetch()
    revoke_grant(world.database, second.grant_id)
    world.book.release()
    (fetched,) = world.fetch()
    assert (first.document.epoch, fetched.document.epoch, fetched.downloaded) == (1, 2, 20)
    assert sum(map(len, pixels(fetched))) == 20
    with pytest.raises(UnknownGrantError):
        world.fetch(identity=other)


def test_out_of_reach_the_cache_serves_while_the_grant_runs(world):
    world.fetch()
    url = world.server.url
    world.server.stop()
    (fetched,) = world.fetch(address=url)
    assert fetched.downloaded == 0 and len(pixels(fetched)[0]) == 15
    assert "does not answer" in world.events[-1]
    world.keystore._clock = lambda: FAR + 1.0
    with pytest.raises(OwnerUnreachableError):
        world.fetch(address=url)
    with pytest.raises(GrantExpiredError):
        world.keystore.held(fetched.document.owner, "cells")
    assert world.keystore.forget_expired() == 1
    world.server = OwnerServer(world.book, world.signing)


def test_out_of_reach_the_cache_serves_no_other_key(world):
    world.fetch()
    url, key = world.server.url, world.server.key.hex()
    world.server.stop()
    with pytest.raises(OwnerUnreachableError):
        world.fetch(address=f"{url}#{'0' * 64}")
    (fetched,) = world.fetch(address=f"{url}#{key}")
    assert fetched.downloaded == 0
    world.server = OwnerServer(world.book, world.signing)


def test_an_owner_takes_back_what_is_its_own_alone(world):
    (fetched,) = world.fetch()
    other = replace(fetched.document, owner="5" * 64, dataset="theirs")
    world.keystore.store(other, fetched.bundle)
    world.fetch()
    assert world.keystore.held(other.owner, "theirs").document == other


def test_an_analyst_without_a_grant_gets_nothing(world):
    with pytest.raises(UnknownGrantError, match="grants nothing"):
        world.fetch(identity=new_identity())


# --- owners and addresses --------------------------------------------------------------------------------


def test_an_owner_that_changes_its_key_is_refused(world):
    world.fetch()
    pinned = world.server.key.hex()
    world.fetch(address=f"{world.server.url}#{pinned}")
    with pytest.raises(OwnerPinError, match=r"than data.owners names"):
        world.fetch(address=f"{world.server.url}#{'0' * 64}")
    stranger = Ed25519PrivateKey.generate()
    world.server.key = stranger.public_key().public_bytes_raw()
    with pytest.raises(OwnerPinError, match="another key than before"):
        world.fetch()
    # The user may name the new key; what the old one signed is then nobody's word.
    with pytest.raises(GrantError):
        world.fetch(address=f"{world.server.url}#{world.server.key.hex()}")


def test_clocks_far_apart_are_named(world):
    world.server.time_shift = 3600
    with pytest.raises(FetchError, match="clock"):
        world.fetch()


@pytest.mark.parametrize(
    "text",
    [
        "http://example.org:8442",
        "https://host/path",
        "ftp://host",
        "https://u@host",
        "https://host#zz",
        "x",
        "https://h:99999999",
    ],
)
def test_unusable_addresses_are_refused(text):
    with pytest.raises(ConfigError, match=r"data.owners"):
        parse_address(text)


def test_answers_that_make_no_sense_are_named(world):
    class Odd:
        def to_bytes(self):
            return b"<html>"

    world.server.tamper = lambda path, answer: Odd()
    with pytest.raises(FetchError, match="not of this release's format"):
        world.fetch()


def test_a_folder_that_cannot_be_written_is_named(world, monkeypatch):
    def full(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FlepError, match="No space left"):
        world.fetch()


# --- the keystore ----------------------------------------------------------------------------------------


@pytest.fixture
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(keystores, "SCRYPT_COST", 1 << 4)


def test_a_keystore_opens_with_its_own_key_or_passphrase_only(tmp_path, cheap_scrypt):
    with Keystore(tmp_path / "a.db", key_file=tmp_path / "a.key") as store:
        assert store.pin("https://o:1", b"k" * 32) and not store.pin("https://o:1", b"k" * 32)
    with Keystore(tmp_path / "b.db", passphrase="correct horse") as store:
        store.pin("https://o:1", b"k" * 32)
    with Keystore(tmp_path / "b.db", passphrase="correct horse") as store:
        assert store.owners() == {"https://o:1": b"k" * 32}
    (tmp_path / "other.key").write_bytes(secrets.token_bytes(32))
    (tmp_path / "short.key").write_bytes(b"short")
    for path, settings, words in (
        ("a.db", {"key_file": tmp_path / "other.key"}, "does not open"),
        ("a.db", {"key_file": tmp_path / "none.key"}, "cannot be read"),
        ("a.db", {"key_file": tmp_path / "short.key"}, "wrong length"),
        ("a.db", {"passphrase": "x"}, "opened another way"),
        ("b.db", {"passphrase": "wrong"}, "does not open"),
        ("b.db", {"key_file": tmp_path / "a.key"}, "opened another way"),
        ("b.db", {"passphrase": ""}, "empty"),
        ("a.db", {}, "key file or with a passphrase"),
    ):
        with pytest.raises(KeystoreError, match=words):
            Keystore(tmp_path / path, **settings)


def test_a_keystore_shows_nothing_and_notices_changes(world):
    (fetched,) = world.fetch()
    path = world.folder / "keys" / "keystore.db"
    canaries = [fetched.bundle.master_key, b"cells", fetched.document.owner.encode(), b"127.0.0.1"]
    assert traces([path], canaries) == []
    assert fetched.bundle.master_key.hex() not in repr(world.keystore.grants())
    import sqlite3

    with sqlite3.connect(path) as raw:
        raw.execute(
            "UPDATE entries SET sealed = CAST(substr(sealed, 1, 40) || x'00' || substr(sealed, 42) AS BLOB)"
        )
    raw.close()
    with pytest.raises(KeystoreError, match="altered"):
        world.keystore.grants()


@pytest.mark.parametrize("kind", ["key_file", "passphrase"])
def test_two_keystores_under_one_secret_share_no_key(tmp_path, cheap_scrypt, kind):
    secret = {"key_file": tmp_path / "key"} if kind == "key_file" else {"passphrase": "correct horse"}
    (tmp_path / "key").write_bytes(secrets.token_bytes(32))
    with Keystore(tmp_path / "a.db", **secret) as one, Keystore(tmp_path / "b.db", **secret) as two:
        assert one._name("owner", "https://o:1") != two._name("owner", "https://o:1")
        with pytest.raises(KeystoreError, match="altered"):
            two._unseal(one._seal(b"x", "place"), "place")


def test_what_is_no_keystore_is_named(tmp_path):
    (tmp_path / "x.key").write_bytes(secrets.token_bytes(32))
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(KeystoreError):
        Keystore(tmp_path / "x.db", key_file=tmp_path / "x.key")


def test_what_is_sealed_in_a_keystore_stays_in_its_place(tmp_path):
    import sqlite3

    path, key = tmp_path / "k.db", tmp_path / "k.key"
    with Keystore(path, key_file=key) as store:
        store.pin("https://one", b"1" * 32)
        store.pin("https://two", b"2" * 32)
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        (first, _), (second, sealed) = raw.execute("SELECT name, sealed FROM entries").fetchall()
        assert first != second
        raw.execute("UPDATE entries SET sealed = ? WHERE name = ?", (sealed, first))
    with Keystore(path, key_file=key) as store, pytest.raises(KeystoreError, match="altered"):
        store.pinned("https://one"), store.pinned("https://two")


def test_other_files_and_versions_are_named(tmp_path):
    import sqlite3

    path, key = tmp_path / "k.db", tmp_path / "k.key"
    Keystore(path, key_file=key).close()
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("UPDATE head SET version = 2")
    with pytest.raises(KeystoreError, match="format that this release does not read"):
        Keystore(path, key_file=key)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as raw, raw:
        raw.execute("CREATE TABLE songs (name TEXT)")
    with pytest.raises(KeystoreError, match="this is not a keystore"):
        Keystore(tmp_path / "other.db", key_file=key)


def test_forgotten_keys_leave_the_file(world):
    (fetched,) = world.fetch()
    path = world.folder / "keys" / "keystore.db"
    import sqlite3

    with sqlite3.connect(path) as raw:
        blobs = [row[0] for row in raw.execute("SELECT sealed FROM entries WHERE length(sealed) > 1000")]
    raw.close()
    assert len(blobs) == 1 and traces([path], [blobs[0][:60]])
    world.keystore.forget(fetched.document.owner, "cells")
    assert traces([path], [blobs[0][:60]]) == []
