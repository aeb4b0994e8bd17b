"""The whole way of an image: private database, sealed archive, analyst's memory."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts import archive as form
from flep_fl.contracts.errors import (
    ArchiveError,
    ConfigError,
    DataError,
    EmptyDatasetError,
    RecordError,
    WrongImageKeyError,
)
from flep_fl.contracts.records import SealedRecord
from flep_fl.data_analyst.restore import restore_split
from flep_fl.data_analyst.source import LocalArchive, describe, unlock
from flep_fl.data_owner import release as releasing
from flep_fl.data_owner.release import seal_archive
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher
from flep_fl.private_database.store import OwnerDatabase

SITE, DATASET, CLASSES = "north", "cells", ("functional-c1", "defective-c2")
OWNER = Ed25519PrivateKey.generate()
OWNER_PUBLIC = OWNER.public_key().public_bytes_raw()
SITE_KEY = X25519PrivateKey.generate()
COUNT = 22  # more than one batch


class World:
    """An owner with a database, and one sealed archive."""

    def __init__(self, folder: Path, shapes=((16, 12),), noise: NoiseParameters | None = None) -> None:
        rng = np.random.default_rng(1)
        self.images = [rng.integers(0, 256, shapes[i % len(shapes)], dtype=np.uint8) for i in range(COUNT)]
        self.labels = [int(v) for v in rng.integers(0, 2, COUNT)]
        self.splits = ["test" if i % 4 == 0 else "train" for i in range(COUNT)]
        # 16 bits per coefficient: without noise the restored pixels are exact.
        self.bundle = ImageKeyBundle.generate(
            CipherParameters(bits=16), noise or NoiseParameters(std=0.0), epoch=3
        )
        self.cipher = ThreeLayerCipher(self.bundle, noise_secret=secrets.token_bytes(32))
        self.folder = folder
        self.database = OwnerDatabase.create(
            folder / "owner.db", secrets.token_bytes(32), dataset=DATASET, classes=CLASSES
        )
        self.ids = self.database.ingest(self.images, self.labels, self.splits)
        self.position = {record_id: i for i, record_id in enumerate(self.ids)}

    def seal(self, out: Path | None = None, **changes):
        options = {
            "cipher": self.cipher,
            "bundle": self.bundle,
            "site": SITE,
            "dataset": DATASET,
            "classes": CLASSES,
            "majority_class": 1,
            "recipient_x25519": SITE_KEY.public_key().public_bytes_raw(),
            "signing_key": OWNER.private_bytes_raw(),
            "out": out or self.folder / SITE,
            **changes,
        }
        return seal_archive(self.database, self.ids, **options)

    def open(self, **changes) -> LocalArchive:
        options = {"site": SITE, "owner_public_key": OWNER_PUBLIC, **changes}
        return LocalArchive(self.folder / SITE, **options)

    def restore(self, source=None, split="train", **changes):
        options = {
            "cipher": self.cipher,
            "bundle": self.bundle,
            "denoise": None,
            "input_size": None,
            **changes,
        }
        return restore_split(source or self.open(), split=split, **options)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.manifest = world.seal()
    return world


@pytest.fixture
def world(sealed, tmp_path):
    """A copy of the archive that a test may damage."""
    copy = object.__new__(World)
    copy.__dict__.update(sealed.__dict__)
    copy.folder = tmp_path
    shutil.copytree(sealed.folder / SITE, tmp_path / SITE)
    return copy


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_round_trip_is_exact_without_noise(sealed):
    source = sealed.open()
    assert source.manifest() == sealed.manifest
    assert (sealed.manifest.train, sealed.manifest.test) == (16, 6)
    assert (sealed.manifest.site, sealed.manifest.epoch) == (SITE, 3)
    bundle = unlock(source, SITE_KEY.private_bytes_raw())
    assert bundle == sealed.bundle
    cipher = ThreeLayerCipher(bundle)  # the analyst's: no noise secret
    for split in ("train", "test"):
        records = list(source.records(split))
        assert {r.record_id for r in records} == {
            i for i, s in zip(sealed.ids, sealed.splits, strict=True) if s == split
        }
        result = restore_split(
            source, cipher=cipher, bundle=bundle, denoise=None, split=split, input_size=None
        )
        assert result.images.dtype == np.float32
        assert result.images.shape == (len(records), 1, 16, 12)
        for record, image, label in zip(records, result.images[:, 0], result.labels, strict=True):
            position = sealed.position[record.record_id]
            np.testing.assert_array_equal(np.rint(image), sealed.images[position])
            assert label == sealed.labels[position]


def test_description_is_for_holders_of_the_bundle(sealed):
    source = sealed.open()
    description = describe(source, sealed.bundle)
    assert description.classes == CLASSES
    assert description.majority_class == 1
    other = ImageKeyBundle.generate(CipherParameters(), NoiseParameters(), epoch=3)
    with pytest.raises(WrongImageKeyError):
        describe(source, other)


def test_archive_shows_no_canary(sealed):
    canaries = [
        *(name.encode() for name in CLASSES),
        sealed.bundle.master_key,
        *(image.tobytes()[:24] for image in sealed.images),
    ]
    for file in (sealed.folder / SITE).iterdir():
        data = file.read_bytes()
        for canary in canaries:
            assert canary not in data, file.name
            assert canary.hex().encode() not in data, file.name
    manifest = json.loads((sealed.folder / SITE / form.MANIFEST).read_bytes())
    assert manifest.keys().isdisjoint({"classes", "majority_class", "labels"})


def test_record_order_is_not_that_of_ingestion(sealed):
    entries = form.unpack_index((sealed.folder / SITE / form.INDEX).read_bytes())
    order = [entry.record_id for entry in entries]
    assert sorted(order) == sorted(sealed.ids)
    assert order != sealed.ids
    assert order != sorted(sealed.ids)


def test_images_of_several_sizes_are_reduced_after_restoring(tmp_path):
    world = World(tmp_path, shapes=((16, 16), (32, 48)))
    world.seal()
    result = world.restore(input_size=8)
    assert result.images.shape == (16, 1, 8, 8)
    for record, image in zip(world.open().records("train"), result.images[:, 0], strict=True):
        plain = world.images[world.position[record.record_id]].astype(np.float64)
        rows, columns = plain.shape[0] // 8, plain.shape[1] // 8
        means = plain.reshape(8, rows, 8, columns).mean(axis=(1, 3))
        np.testing.assert_allclose(image, means, atol=0.02)
    with pytest.raises(DataError, match="differ in size"):
        world.restore()


def test_denoiser_sees_restored_images(tmp_path):
    world = World(tmp_path, shapes=((16, 16), (8, 24)), noise=NoiseParameters(std=25.0))
    world.seal()
    seen = []

    def denoise(batch):
        seen.append(batch.copy())
        return np.full_like(batch, 300.0)

    result = world.restore(denoise=denoise, input_size=8)
    assert result.images.min() == result.images.max() == 255.0  # its output was taken, and clipped
    assert sum(len(batch) for batch in seen) == 16
    assert {batch.shape[1:] for batch in seen} == {(16, 16), (8, 24)}
    plain = {i.tobytes(): i for i, s in zip(world.images, world.splits, strict=True) if s == "train"}
    errors = [
        min(np.std(image - p) for p in plain.values() if p.shape == image.shape)
        for batch in seen
        for image in batch
    ]
    assert 20 < np.mean(errors) < 30  # the stated standard deviation, on the plain image


def test_paper_order_goes_through_the_cipher(tmp_path):
    world = World(tmp_path, noise=NoiseParameters(std=25.0))
    world.seal()
    identity = world.restore(denoise=lambda batch: batch, order="denoise_first")
    np.testing.assert_allclose(identity.images, world.restore().images, atol=0.05)


def test_wrong_site_is_named(sealed):
    with pytest.raises(ArchiveError, match=r"another site.*Expected south.*Found north"):
        sealed.open(site="south")


def test_wrong_private_key(sealed):
    with pytest.raises(WrongImageKeyError):
        unlock(sealed.open(), X25519PrivateKey.generate().private_bytes_raw())


def test_wrong_bundle(sealed):
    other = ImageKeyBundle.generate(CipherParameters(bits=16), NoiseParameters(), epoch=3)
    with pytest.raises(WrongImageKeyError):
        sealed.restore(cipher=ThreeLayerCipher(other), bundle=other)


def test_foreign_owner(sealed):
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(ArchiveError, match="another data owner"):
        sealed.open(owner_public_key=other)


@pytest.mark.parametrize("name", [form.MANIFEST, form.SIGNATURE, form.BUNDLE, form.INDEX, form.RECORDS])
def test_incomplete_archive(world, name):
    (world.folder / SITE / name).unlink()
    with pytest.raises(ArchiveError):
        source = world.open()
        unlock(source, SITE_KEY.private_bytes_raw())


def test_missing_archive(tmp_path):
    with pytest.raises(ArchiveError, match="does not exist"):
        LocalArchive(tmp_path / "none", site=SITE)


@pytest.mark.parametrize("name", [form.MANIFEST, form.SIGNATURE, form.INDEX, form.RECORDS, form.BUNDLE])
@pytest.mark.parametrize("cut", [1, 20])
def test_truncated_file(world, name, cut):
    path = world.folder / SITE / name
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ArchiveError):
        unlock(world.open(), SITE_KEY.private_bytes_raw())


@pytest.mark.parametrize("name", [form.MANIFEST, form.SIGNATURE, form.INDEX, form.BUNDLE])
@pytest.mark.parametrize("position", [0, 40, -1])
@pytest.mark.parametrize("pinned", [True, False])
def test_altered_file(world, name, position, pinned):
    flip(world.folder / SITE / name, position)
    with pytest.raises(ArchiveError):
        source = world.open(owner_public_key=OWNER_PUBLIC if pinned else None)
        unlock(source, SITE_KEY.private_bytes_raw())


def test_other_format_version(world):
    path = world.folder / SITE / form.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(ArchiveError, match="version 2"):
        world.open()


def test_resigned_manifest_does_not_match_its_description(world):
    """Without a pinned key a forger can sign, but not seal a description under the bundle."""
    folder = world.folder / SITE
    entries = form.unpack_index((folder / form.INDEX).read_bytes())
    kept = entries[:-1]
    index = b"".join(entry.pack() for entry in kept)
    size = sum(e.envelope_bytes + e.label_bytes for e in kept)
    fields = json.loads((folder / form.MANIFEST).read_bytes())
    fields[entries[-1].split] -= 1
    fields.update(index_sha256=form.hashlib.sha256(index).hexdigest(), records_bytes=size)
    data = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    forger = Ed25519PrivateKey.generate()
    (folder / form.MANIFEST).write_bytes(data)
    (folder / form.INDEX).write_bytes(index)
    (folder / form.RECORDS).write_bytes((folder / form.RECORDS).read_bytes()[:size])
    (folder / form.SIGNATURE).write_bytes(
        forger.public_key().public_bytes_raw() + forger.sign(form.signed_message(data))
    )
    source = world.open(owner_public_key=None)
    with pytest.raises(ArchiveError, match="description"):
        unlock(source, SITE_KEY.private_bytes_raw())


def test_an_owner_that_wraps_another_bundle_than_its_manifest_names_is_found(world, monkeypatch):
    wrap = releasing.wrap_bundle
    for other in (world.bundle.rotate(), replace(world.bundle, epoch=2)):
        data = other.to_bytes()
        monkeypatch.setattr(
            releasing, "wrap_bundle", lambda _own, key, context, data=data: wrap(data, key, context=context)
        )
        world.seal(overwrite=True)
        with pytest.raises(WrongImageKeyError, match="not the one that its manifest names"):
            unlock(world.open(), SITE_KEY.private_bytes_raw())


def test_corrupt_record_is_named_and_costs_no_other(world):
    entries = form.unpack_index((world.folder / SITE / form.INDEX).read_bytes())
    victim = next(i for i, e in enumerate(entries) if i > 2 and e.split == "train")
    start = sum(e.envelope_bytes + e.label_bytes for e in entries[:victim])
    flip(world.folder / SITE / form.RECORDS, start + 100)
    with pytest.raises(RecordError, match=entries[victim].record_id):
        world.restore()
    assert len(world.restore(split="test")) == 6
    errors = []
    rest = world.restore(world.open(on_corrupt=errors.append))
    assert len(rest) == 15
    assert [entries[victim].record_id in str(e) for e in errors] == [True]


class Listed:
    """A source that yields given records: what a gateway without an index would do."""

    def __init__(self, manifest, records):
        self._manifest, self._records = manifest, records

    def manifest(self):
        return self._manifest

    def records(self, split):
        return iter(self._records)


@pytest.mark.parametrize("part", ["envelope", "label", "swapped label"])
def test_record_that_does_not_open_is_named(sealed, part):
    records = list(sealed.open().records("train"))
    bad = records[9]
    envelope, label = bad.envelope, bad.sealed_label
    if part == "envelope":
        envelope = envelope[:-1] + bytes([envelope[-1] ^ 1])
    elif part == "label":
        label = label[:-1] + bytes([label[-1] ^ 1])
    else:
        label = records[3].sealed_label
    records[9] = SealedRecord(bad.record_id, envelope, label)
    source = Listed(sealed.manifest, records)
    with pytest.raises(RecordError, match=bad.record_id):
        sealed.restore(source)
    errors = []
    rest = sealed.restore(source, on_corrupt=errors.append)
    assert (len(rest), rest.skipped, len(errors)) == (15, (bad.record_id,), 1)


def test_split_without_records(sealed):
    with pytest.raises(EmptyDatasetError, match="train"):
        sealed.restore(Listed(sealed.manifest, []))
    with pytest.raises(ArchiveError, match="no such split"):
        list(sealed.open().records("valid"))
    with pytest.raises(ConfigError, match=r"model\.input_size"):
        sealed.restore(input_size=0)


def test_no_half_archive_is_left_behind(sealed, tmp_path):
    class Failing:
        calls = 0

        def encrypt(self, images):
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return sealed.cipher.encrypt(images)

    with pytest.raises(ArchiveError, match="No space left"):
        sealed.seal(tmp_path / "a", cipher=Failing())
    assert list(tmp_path.iterdir()) == []


def test_only_an_archive_is_ever_replaced(world, tmp_path):
    first = world.open().head
    with pytest.raises(ArchiveError, match="exists already"):
        world.seal(world.folder / SITE)
    world.seal(world.folder / SITE, overwrite=True)
    assert world.open().head != first
    assert len(world.restore()) == 16
    other = tmp_path / "precious"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(ArchiveError, match="exists already"):
        world.seal(other, overwrite=True)
    assert (other / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [SITE, "precious"]


def test_corrupt_database_record_while_sealing(sealed, tmp_path):
    class Damaged:
        def get(self, record_id):
            if record_id == sealed.ids[1]:
                raise RecordError(f"record {record_id} is corrupt")
            return sealed.database.get(record_id)

    options = {
        "cipher": sealed.cipher,
        "bundle": sealed.bundle,
        "site": SITE,
        "dataset": DATASET,
        "classes": CLASSES,
        "majority_class": 0,
        "recipient_x25519": SITE_KEY.public_key().public_bytes_raw(),
        "signing_key": OWNER.private_bytes_raw(),
        "out": tmp_path / "a",
    }
    with pytest.raises(RecordError, match=sealed.ids[1]):
        seal_archive(Damaged(), sealed.ids, **options)
    assert list(tmp_path.iterdir()) == []
    errors = []
    manifest = seal_archive(Damaged(), sealed.ids, **options, on_corrupt=errors.append)
    assert (manifest.train + manifest.test, len(errors)) == (COUNT - 1, 1)


def test_sealing_reads_a_batch_at_a_time(sealed, tmp_path):
    waiting, most = [], []

    class Counting:
        def get(self, record_id):
            waiting.append(record_id)
            most.append(len(waiting))
            return sealed.database.get(record_id)

        def encrypt(self, images):
            waiting.clear()
            return sealed.cipher.encrypt(images)

    counting = Counting()
    world = object.__new__(World)
    world.__dict__.update(sealed.__dict__, database=counting)
    world.seal(tmp_path / "a", cipher=counting)
    assert len(most) == COUNT
    assert max(most) == 16


WRITTEN: list[str] = []
_watching = False


def _watch(event, arguments):
    if _watching and event == "open":
        path, mode, flags = arguments
        if (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WRITTEN.append(str(path))


sys.addaudithook(_watch)  # cannot be removed again, so it is switched by _watching


def test_restoring_writes_no_file(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "_watching", True)
    (tmp_path / "control").write_text("the watch works")
    assert [Path(p).name for p in WRITTEN] == ["control"]
    unlock(sealed.open(), SITE_KEY.private_bytes_raw())
    assert len(sealed.restore(input_size=8)) == 16
    assert [Path(p).name for p in WRITTEN] == ["control"]


def test_repr_shows_no_pixel(sealed):
    assert "array" not in repr(sealed.restore())
