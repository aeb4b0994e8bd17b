"""Grants, releases and pages: what leaves, to whom, and what stops it."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts import archive, grants
from flep_fl.contracts.errors import (
    DatabaseError,
    GrantError,
    GrantExpiredError,
    GrantRevokedError,
    NotReleasedError,
    RecordError,
    ReleaseChangedError,
    UnknownGrantError,
)
from flep_fl.contracts.grants import GrantDocument
from flep_fl.contracts.owner_records import Analyst, Capture
from flep_fl.data_security.keys import ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import open_blob, open_label
from flep_fl.data_security.presets import build_cipher, get_preset
from flep_fl.data_security.wrapping import unwrap_bundle
from flep_fl.private_database.access import releases
from flep_fl.private_database.grants import create_grant, list_grants, revoke_grant
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.sealing import unseal
from flep_fl.private_database.store import OwnerDatabase

KEY = secrets.token_bytes(32)
SIGNING = Ed25519PrivateKey.generate()
FAR = 4_000_000_000


def new_bundle(name="aead"):
    return ImageKeyBundle.generate(get_preset(name).parameters, NoiseParameters(std=0.0), cipher_name=name)


class Person:
    def __init__(self, name):
        self.signing, self.decryption = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
        self.verify_key = self.signing.public_key().public_bytes_raw()
        self.analyst = Analyst(name, self.verify_key, self.decryption.public_key().public_bytes_raw())


class Owner:
    """A database with a released data set and its way out."""

    def __init__(self, folder, count=20, bundle=None):
        self.database = OwnerDatabase.create(folder / "owner.db", KEY)
        self.database.add_dataset("cells", ("good", "bad"), bundle=bundle or new_bundle())
        self.book = ReleaseBook(self.database, SIGNING)
        self.fill(count)

    def fill(self, count, start=0, split=None):
        rng = np.random.default_rng(start)
        self.database.put_many(
            [
                Capture(
                    "cells",
                    "cam-1",
                    start + i,
                    rng.integers(0, 256, (6, 5), dtype=np.uint8),
                    label=i % 3 // 2,
                    split=split or ("test" if i % 4 == 0 else "train"),
                )
                for i in range(count)
            ]
        )

    def grant(self, person, **settings):
        return create_grant(
            self.database, dataset="cells", analyst=person.analyst, **{"not_after": FAR, **settings}
        )

    def entries(self, grant, person, release_id, limit=7):
        data, cursor = b"", 0
        while cursor is not None:
            page = self.book.index_page(
                grant.grant_id, person.verify_key, release_id=release_id, cursor=cursor, limit=limit
            )
            data, cursor = data + page.entries, page.cursor
        return data

    def pages(self, grant, person, release_id, limit=7):
        found, cursor = [], 0
        while cursor is not None:
            page = self.book.record_page(
                grant.grant_id, person.verify_key, release_id=release_id, cursor=cursor, limit=limit
            )
            found += page.records
            cursor = page.cursor
        return found


@pytest.fixture
def owner(tmp_path):
    made = Owner(tmp_path)
    yield made
    made.database.close()


@pytest.fixture
def ann():
    return Person("ann")


def test_a_granted_analyst_gets_exactly_what_the_manifest_says(owner, ann):
    released = owner.book.release()
    assert (released.records, released.encrypted, released.number) == (20, 20, 1)
    grant = owner.grant(ann)
    assert [g.grant_id for g in owner.book.grants_of(ann.verify_key)] == [grant.grant_id]
    opened = owner.book.open_grant(grant.grant_id, ann.verify_key)
    document = GrantDocument.from_bytes(opened.grant)
    SIGNING.public_key().verify(opened.grant_signature, grants.signed_message(opened.grant))
    assert (document.analyst, document.dataset, document.epoch) == ("ann", "cells", 1)
    assert document.manifest_sha256 == hashlib.sha256(opened.manifest).hexdigest()
    assert document.bundle_sha256 == hashlib.sha256(opened.bundle).hexdigest()
    head = archive.ArchiveHead.from_bytes(opened.manifest)
    index = owner.entries(grant, ann, opened.release_id)
    assert hashlib.sha256(index).hexdigest() == head.index_sha256
    entries = archive.unpack_index(index)
    assert (head.manifest.train, head.manifest.test) == (15, 5) and len(entries) == 20
    records = owner.pages(grant, ann, opened.release_id)
    assert [r.record_id for r in records] == [e.record_id for e in entries]
    assert head.records_bytes == sum(len(r.envelope) + len(r.sealed_label) for r in records)
    bundle = ImageKeyBundle.from_bytes(
        unwrap_bundle(opened.bundle, ann.decryption, context=archive.wrap_context("ann", "cells", 1))
    )
    cipher = build_cipher(bundle)
    for record, entry in zip(records, entries, strict=True):
        assert archive.record_digest(record.envelope, record.sealed_label) == entry.digest
        stored = owner.database.get(record.record_id)
        np.testing.assert_array_equal(cipher.decrypt([record.envelope])[0], stored.image)
        assert open_label(bundle, record.record_id, entry.split, record.sealed_label) == stored.label


def test_records_are_encrypted_once_and_everybody_gets_the_same(owner, ann, monkeypatch):
    owner.book.release()
    bob = Person("bob")
    first, second = owner.grant(ann), owner.grant(bob)
    release_id = owner.book.open_grant(first.grant_id, ann.verify_key).release_id
    assert owner.pages(first, ann, release_id) == owner.pages(second, bob, release_id)
    with monkeypatch.context() as patched:
        patched.setattr(ReleaseBook, "_encrypted", lambda *_given: 1 / 0)
        again = owner.book.release()
    assert (again.encrypted, again.release_id) == (0, release_id)
    owner.fill(5, start=100)
    more = owner.book.release()
    assert (more.encrypted, more.records, more.number) == (5, 25, 2)
    # Whoever is in the middle of the first release goes on with it, unchanged.
    assert len(owner.pages(first, ann, release_id)) == 20
    assert len(owner.pages(first, ann, more.release_id)) == 25


def test_shares_are_disjoint_and_together_the_whole(owner, ann):
    owner.fill(80, start=100)
    owner.book.release()
    people = [Person(f"p{i}") for i in range(3)]
    found = []
    for i, person in enumerate(people):
        grant = owner.grant(person, share=(i, 3))
        opened = owner.book.open_grant(grant.grant_id, person.verify_key)
        records = owner.pages(grant, person, opened.release_id)
        index = owner.entries(grant, person, opened.release_id)
        head = archive.ArchiveHead.from_bytes(opened.manifest)
        assert hashlib.sha256(index).hexdigest() == head.index_sha256
        assert len(records) == head.manifest.train + head.manifest.test > 0
        found += [record.record_id for record in records]
    assert len(found) == len(set(found)) == 100


def test_revocation_stops_records_at_once_and_begins_a_new_epoch(owner, ann):
    owner.book.release()
    bob = Person("bob")
    revoked, standing = owner.grant(ann), owner.grant(bob)
    opened = owner.book.open_grant(revoked.grant_id, ann.verify_key)
    before = owner.pages(standing, bob, opened.release_id)
    revoke_grant(owner.database, revoked.grant_id)
    for call in (owner.pages, owner.entries):
        with pytest.raises(GrantRevokedError):
            call(revoked, ann, opened.release_id)
        with pytest.raises(ReleaseChangedError):  # nor does anybody else get what ann could open
            call(standing, bob, opened.release_id)
    with pytest.raises(GrantRevokedError):
        owner.book.open_grant(revoked.grant_id, ann.verify_key)
    with pytest.raises(NotReleasedError):
        owner.book.open_grant(standing.grant_id, bob.verify_key)
    assert owner.book.grants_of(ann.verify_key) == []
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw:
        assert raw.execute("SELECT DISTINCT epoch, stale FROM snapshots").fetchall() == [(1, 1)]
    released = owner.book.release()
    assert (released.epoch, released.encrypted) == (2, 20)
    fresh = owner.book.open_grant(standing.grant_id, bob.verify_key)
    after = owner.pages(standing, bob, fresh.release_id)
    assert not {r.envelope for r in before} & {r.envelope for r in after}
    old = owner.database.bundle("cells", 1)
    with pytest.raises(Exception, match="another key bundle"):
        build_cipher(old).decrypt([after[0].envelope])
    with sqlite3.connect(owner.database.path) as raw:
        assert raw.execute("SELECT DISTINCT epoch FROM released").fetchall() == [(2,)]
    with pytest.raises(GrantRevokedError):
        revoke_grant(owner.database, revoked.grant_id)
    states = {g.grant_id: g.revoked_at is not None for g in list_grants(owner.database)}
    assert states == {revoked.grant_id: True, standing.grant_id: False}


def test_a_revocation_between_check_and_page_still_counts(owner, ann, monkeypatch):
    """The owner revokes while a page is being put together: the page does not leave."""
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    opened = ReleaseBook._opened

    def revoking(book, row, epoch):
        if not list_grants(owner.database)[0].revoked_at:
            revoke_grant(owner.database, grant.grant_id)
        return opened(book, row, epoch)

    monkeypatch.setattr(ReleaseBook, "_opened", revoking)
    with pytest.raises(ReleaseChangedError):
        owner.pages(grant, ann, release_id)
    assert releases(owner.database) == []


def test_a_grant_ends_and_a_clock_set_back_does_not_bring_it_back(owner, ann):
    wall = [1_000_000_000.0]
    owner.database.clock._wall = lambda: wall[0]
    owner.database.clock.accept()
    owner.book.release()
    grant = owner.grant(ann, not_after=wall[0] + 3600)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    wall[0] += 3601
    with pytest.raises(GrantExpiredError):
        owner.pages(grant, ann, release_id)
    assert owner.book.grants_of(ann.verify_key) == []
    wall[0] -= 86400
    with pytest.raises(GrantExpiredError):
        owner.book.open_grant(grant.grant_id, ann.verify_key)
    owner.database.close()
    with OwnerDatabase(owner.database.path, KEY) as again:  # nor does a restart
        again.clock._wall = lambda: wall[0]
        with pytest.raises(GrantExpiredError):
            ReleaseBook(again, SIGNING).open_grant(grant.grant_id, ann.verify_key)
        again.clock.accept()  # the owner has looked: the clock was wrong before
        assert ReleaseBook(again, SIGNING).open_grant(grant.grant_id, ann.verify_key)


def test_a_grant_is_for_one_key_and_one_data_set(owner, ann):
    owner.book.release()
    owner.database.add_dataset("other", ("a", "b"), bundle=new_bundle())
    image = np.zeros((4, 4), np.uint8)
    owner.database.put(Capture("other", "cam", 1, image, label=0))
    other = owner.book.release("other")
    grant = owner.grant(ann)
    mallory = Person("mallory")
    with pytest.raises(UnknownGrantError):
        owner.book.open_grant(grant.grant_id, mallory.verify_key)
    with pytest.raises(ReleaseChangedError):
        owner.pages(grant, ann, other.release_id)
    with pytest.raises(UnknownGrantError):
        owner.pages(grant, mallory, other.release_id)
    assert owner.book.grants_of(mallory.verify_key) == []
    assert owner.book.grants_of(ann.verify_key) == [grant]


def test_a_release_of_another_epoch_is_not_served(owner, ann):
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    owner.database.set_bundle("cells", owner.database.bundle("cells", 1).rotate())
    for call in (owner.pages, owner.entries):
        with pytest.raises(ReleaseChangedError):
            call(grant, ann, release_id)


@pytest.mark.parametrize(
    "settings",
    [
        {"not_after": 1.0},
        {"not_after": 1e12},
        {"not_after": float("nan")},
        {"share": (2, 2)},
        {"share": (0, 0)},
    ],
)
def test_unusable_grants_are_refused(owner, ann, settings):
    with pytest.raises(GrantError):
        owner.grant(ann, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "name"),
        ({"name": "a" * 300}, "name"),
        ({"verify_key": bytes(31)}, "wrong length"),
        ({"encryption_key": bytes(33)}, "wrong length"),
    ],
)
def test_unusable_analysts_get_no_grant(owner, ann, change, words):
    with pytest.raises(GrantError, match=words):
        create_grant(owner.database, dataset="cells", analyst=replace(ann.analyst, **change), not_after=FAR)
    assert list_grants(owner.database) == []


def test_a_key_of_low_order_gets_no_grant(owner):
    weak = Analyst("weak", secrets.token_bytes(32), bytes(32))
    with pytest.raises(GrantError, match="X25519"):
        create_grant(owner.database, dataset="cells", analyst=weak, not_after=FAR)


def test_deletion_takes_the_cached_ciphertext_along(owner, ann):
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    victim = owner.pages(grant, ann, release_id)[3].record_id
    assert owner.database.delete([victim, "0" * 32]) == 1
    with pytest.raises(ReleaseChangedError):
        owner.pages(grant, ann, release_id)
    fresh = owner.book.release()
    assert (fresh.records, fresh.encrypted) == (19, 0)
    assert victim not in {r.record_id for r in owner.pages(grant, ann, fresh.release_id)}


def stored_order(owner):
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw:
        return [row[0] for row in raw.execute("SELECT record_id FROM records ORDER BY seq")]


def test_positions_do_not_follow_the_order_of_ingestion(owner, ann):
    owner.fill(40, start=100)
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    released = [record.record_id for record in owner.pages(grant, ann, release_id)]
    assert released != stored_order(owner) and sorted(released) == sorted(stored_order(owner))


@pytest.mark.parametrize("moment", ["before it is cached", "before it is frozen"])
def test_an_epoch_that_begins_during_a_release_ends_it(owner, ann, monkeypatch, moment):
    grant = owner.grant(ann)
    encrypted = ReleaseBook._encrypted

    def revoking(*given):
        revoke_grant(owner.database, grant.grant_id)
        return encrypted(*given)

    if moment == "before it is cached":
        # One batch is enough, so the revocation comes once.
        with contextlib.closing(sqlite3.connect(owner.database.path)) as raw, raw:
            raw.execute("PRAGMA foreign_keys=OFF")
            raw.execute("DELETE FROM images WHERE seq > 10")
            raw.execute("DELETE FROM records WHERE seq > 10")
        monkeypatch.setattr(ReleaseBook, "_encrypted", revoking)
        with pytest.raises(NotReleasedError, match="a new key epoch of cells began"):
            owner.book.release()
        cached = 0
    else:
        with pytest.raises(NotReleasedError, match="a new key epoch of cells began"):
            owner.book.release(on_progress=lambda *_state: revoke_grant(owner.database, grant.grant_id))
        cached = 20  # under the key of before; the next release drops it
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw:
        assert raw.execute("SELECT count(*) FROM released").fetchone() == (cached,)
        assert raw.execute("SELECT count(*) FROM snapshots").fetchone() == (0,)
    monkeypatch.undo()
    assert owner.book.release().epoch == 2


def test_a_record_that_is_deleted_during_a_release_is_left_out(owner, ann, monkeypatch):
    victim = stored_order(owner)[0]
    encrypted = ReleaseBook._encrypted

    def deleting(*given):
        pairs = encrypted(*given)
        owner.database.delete([victim])
        return pairs

    monkeypatch.setattr(ReleaseBook, "_encrypted", deleting)
    assert owner.book.release().records == 19
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    assert victim not in {record.record_id for record in owner.pages(grant, ann, release_id)}


def test_two_releases_at_once_hold_every_record_once(owner, ann, monkeypatch):
    encrypted = ReleaseBook._encrypted

    def twice(*given):
        pairs = encrypted(*given)
        monkeypatch.undo()
        assert ReleaseBook(owner.database, SIGNING).release().encrypted == 20
        return pairs

    monkeypatch.setattr(ReleaseBook, "_encrypted", twice)
    released = owner.book.release()
    assert (released.records, released.encrypted, released.number) == (20, 0, 1)
    grant = owner.grant(ann)
    assert len({record.record_id for record in owner.pages(grant, ann, released.release_id)}) == 20


def test_what_is_sealed_in_one_row_does_not_open_in_another(owner, ann):
    """A longer grant, an older key epoch's bundle, another index entry: each is refused by name."""
    owner.book.release()
    short, long = owner.grant(ann, share=(0, 4)), owner.grant(ann)
    release_id = owner.book.open_grant(long.grant_id, ann.verify_key).release_id
    for table, column, target, source, words, call in (
        ("released", "sealed_entry", "position = 1", "position = 2", "sealed entry", owner.entries),
        ("grants", "sealed", "id = 1", "id = 2", "sealed grant", None),
    ):
        with contextlib.closing(sqlite3.connect(owner.database.path)) as raw, raw:
            value = raw.execute(f"SELECT {column} FROM {table} WHERE {source}").fetchone()
            raw.execute(f"UPDATE {table} SET {column} = ? WHERE {target}", value)
        with pytest.raises(DatabaseError, match=words):
            if call is None:
                owner.book.open_grant(short.grant_id, ann.verify_key)
            else:
                call(long, ann, release_id)
    owner.database.set_bundle("cells", owner.database.bundle("cells", 1).rotate())
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw, raw:
        old = raw.execute("SELECT sealed_bundle FROM epochs WHERE epoch = 1").fetchone()
        raw.execute("UPDATE epochs SET sealed_bundle = ? WHERE epoch = 2", old)
    with pytest.raises(DatabaseError, match="sealed bundle"):
        owner.book.release()


def test_cached_ciphertext_goes_with_its_data_key(owner):
    owner.book.release()
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw:
        name, wrapped, parts = raw.execute(
            "SELECT record_id, wrapped_key, sealed_parts FROM released JOIN records USING (seq) LIMIT 1"
        ).fetchone()
    assert unseal(owner.database.data_key(name, wrapped), parts, what="parts", place=f"{name}/1")
    with pytest.raises(DatabaseError, match="corrupt"):
        owner.database.unseal(parts, what="parts", place=f"{name}/1")


def test_records_without_a_label_stay(owner, ann):
    receipt = owner.database.put(Capture("cells", "cam-2", 1, np.zeros((6, 5), np.uint8)))
    released = owner.book.release()
    assert (released.records, released.unlabelled) == (20, 1)
    owner.database.set_labels({receipt.record_id: 1})
    assert owner.book.release().records == 21


def test_a_corrupt_record_is_named_and_the_others_leave(owner, ann):
    with sqlite3.connect(owner.database.path) as raw:
        (name,) = raw.execute("SELECT record_id FROM records WHERE seq = 3").fetchone()
        raw.execute("UPDATE images SET sealed_image = x'0011' WHERE seq = 3")
    released = owner.book.release()
    assert (released.corrupt, released.records) == ((name,), 19)


def test_pages_end_before_they_grow_too_large(owner, ann):
    owner.book.release()
    grant = owner.grant(ann)
    small = ReleaseBook(owner.database, SIGNING, page_bytes=400)
    release_id = small.open_grant(grant.grant_id, ann.verify_key).release_id
    page = small.record_page(grant.grant_id, ann.verify_key, release_id=release_id, cursor=0, limit=1000)
    assert 0 < len(page.records) < 4
    owner.book = small
    assert len({r.record_id for r in owner.pages(grant, ann, release_id, limit=1000)}) == 20


def test_every_page_is_logged_before_it_leaves(owner, ann):
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    owner.pages(grant, ann, release_id, limit=8)
    logged = releases(owner.database, site="ann")
    assert [(e.first, e.last, e.count) for e in logged] == [(1, 8, 8), (9, 16, 8), (17, 20, 4)]
    assert {e.release_id for e in logged} == {release_id}


def test_colour_and_16_bit_images_are_released(tmp_path, ann):
    owner = Owner(tmp_path, count=0)
    rng = np.random.default_rng(5)
    pictures = [
        rng.integers(0, 65536, (7, 9), dtype=np.uint16),
        rng.integers(0, 256, (3, 4, 6), dtype=np.uint8),
        rng.integers(0, 65536, (3, 4, 6), dtype=np.uint16),
    ]
    for i, picture in enumerate(pictures):
        owner.database.put(Capture("cells", "cam", i, picture, label=0, split="train"))
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    cipher = build_cipher(owner.database.bundle("cells", 1))
    for record in owner.pages(grant, ann, release_id):
        stored = owner.database.get(record.record_id)
        restored = cipher.decrypt([record.envelope])[0]
        scale = np.iinfo(stored.image.dtype).max / 255
        np.testing.assert_allclose(restored * scale, stored.image, atol=0.01)
        assert stored.image.dtype in (np.uint8, np.uint16)
    stored = {r.tags.sequence: r.image for r in owner.database.records()}
    for i, picture in enumerate(pictures):
        np.testing.assert_array_equal(stored[i], picture)
        assert stored[i].dtype == picture.dtype
    owner.database.close()


def test_pages_have_at_least_one_entry_and_at_most_so_many(owner, ann, monkeypatch):
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    monkeypatch.setattr("flep_fl.private_database.releases.MAX_INDEX_LIMIT", 3)
    monkeypatch.setattr("flep_fl.private_database.releases.MAX_RECORD_LIMIT", 3)
    for limit, expected in ((0, 1), (-5, 1), (2, 2), (1 << 40, 3)):
        asked = {"release_id": release_id, "cursor": 4, "limit": limit}
        index = owner.book.index_page(grant.grant_id, ann.verify_key, **asked)
        page = owner.book.record_page(grant.grant_id, ann.verify_key, **asked)
        assert len(archive.unpack_index(index.entries)) == len(page.records) == expected
        assert index.cursor == page.cursor == 4 + expected


def test_everything_works_in_small_steps(owner, ann, monkeypatch):
    monkeypatch.setattr("flep_fl.private_database.releases._CHUNK", 3)
    monkeypatch.setattr("flep_fl.private_database.releases._SUMMARIES", 2)
    assert owner.book.release().records == 20
    for index in range(3):
        grant = owner.grant(ann, share=(index, 3))
        opened = owner.book.open_grant(grant.grant_id, ann.verify_key)
        entries = owner.entries(grant, ann, opened.release_id)
        head = archive.ArchiveHead.from_bytes(opened.manifest)
        assert hashlib.sha256(entries).hexdigest() == head.index_sha256
    assert len(owner.book._summaries) == 2
    revoke_grant(owner.database, grant.grant_id)
    assert owner.book.release().encrypted == 20
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw:
        assert raw.execute("SELECT epoch, count(*) FROM released GROUP BY epoch").fetchall() == [(2, 20)]


def test_data_sets_do_not_mix(owner, ann):
    owner.database.add_dataset("other", ("a", "b"), bundle=new_bundle())
    for i in range(30):  # of the class that is the rarer one in the first data set
        owner.database.put(Capture("other", "cam", i, np.full((4, 4), i, np.uint8), label=1, split="train"))
    assert owner.book.release("cells").records == 20
    assert owner.book.release("other").records == 30
    first = owner.grant(ann)
    second = create_grant(owner.database, dataset="other", analyst=ann.analyst, not_after=FAR)
    for grant, majority, count in ((first, 0, 20), (second, 1, 30)):
        opened = owner.book.open_grant(grant.grant_id, ann.verify_key)
        head = archive.ArchiveHead.from_bytes(opened.manifest)
        bundle = owner.database.bundle(grant.dataset, 1)
        described = archive.ArchiveDescription.from_bytes(
            open_blob(bundle, head.purpose(), head.sealed_description)
        )
        assert described.majority_class == majority
        records = owner.pages(grant, ann, opened.release_id)
        assert len(records) == count == head.manifest.train + head.manifest.test
    assert list_grants(owner.database, dataset="other") == [second]
    assert list_grants(owner.database) == [first, second]


def test_a_release_is_new_where_its_description_is(owner, ann):
    owner.book.release()
    grant = owner.grant(ann)
    # The most frequent class is that of the training records: 9 of 15 stay of class 0 here, and 9 of all 20.
    tags = owner.database.tags()
    first = next(one for one in tags if one.split == "train" and one.label == 0)
    owner.database.set_labels({one.record_id: 1 for one in tags if one.split == "test" or one is first})
    assert owner.book.release().number == 1
    owner.database.set_labels({one.record_id: 1 for one in tags})
    changed = owner.book.release()
    assert (changed.number, changed.encrypted) == (2, 0)
    assert owner.book.open_grant(grant.grant_id, ann.verify_key).release_id == changed.release_id


def test_a_cached_record_that_is_corrupt_is_named(owner, ann):
    owner.book.release()
    grant = owner.grant(ann)
    release_id = owner.book.open_grant(grant.grant_id, ann.verify_key).release_id
    with contextlib.closing(sqlite3.connect(owner.database.path)) as raw, raw:
        raw.execute("UPDATE released SET sealed_parts = x'00' WHERE position = 3")
        (name,) = raw.execute(
            "SELECT record_id FROM released JOIN records USING (seq) WHERE position = 3"
        ).fetchone()
    with pytest.raises(RecordError, match=name):
        owner.pages(grant, ann, release_id)


def test_a_grant_that_is_not_there_is_not_revoked(owner):
    with pytest.raises(UnknownGrantError, match="no such grant"):
        revoke_grant(owner.database, "0" * 32)
    assert owner.database.dataset().epoch == 1


def test_a_data_set_without_a_bundle_is_not_released(tmp_path):
    with OwnerDatabase.create(tmp_path / "o.db", KEY, dataset="x", classes=("a",)) as database:
        with pytest.raises(DatabaseError, match="no key bundle"):
            ReleaseBook(database, SIGNING).release()
        database.set_bundle("x", new_bundle())
        with pytest.raises(NotReleasedError, match="no labelled record"):
            ReleaseBook(database, SIGNING).release()
        with pytest.raises(DatabaseError, match="cannot begin twice"):
            database.set_bundle("x", new_bundle())
