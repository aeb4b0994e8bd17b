"""IDX files and Fashion-MNIST from a local copy; nothing here is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from flep_fl.contracts.errors import DataError, EmptyDatasetError, ImageFormatError
from flep_fl.data_owner import fashion_mnist
from flep_fl.data_owner.idx import read_idx
from flep_fl.data_owner.sources import load_source


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set of the same form, whose checksums are made the expected ones."""
    rng, sums = np.random.default_rng(0), {}
    for part, count in (("train", 30), ("t10k", 10)):
        for name, values in (
            (f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            (f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8)),
        ):
            sums[name] = hashlib.sha256(idx(values)).hexdigest()
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
    assert sums.keys() == fashion_mnist.SHA256.keys()
    monkeypatch.setattr(fashion_mnist, "SHA256", sums)
    return tmp_path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3), (4, 3, 2)])
def test_an_idx_file_is_read_plain_and_packed(tmp_path, shape, pack):
    values = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    (tmp_path / "file").write_bytes(pack(idx(values)))
    found = read_idx(tmp_path / "file")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        b"\x89PNG\r\n\x1a\n",
        b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"abcd",  # floats
        b"\0\0\x08\0",
        b"\0\0\x08\x03" + struct.pack(">I", 2),
        b"\0\0\x08\x01" + struct.pack(">I", 3) + b"ab",
        b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abcd",
        b"\0\0\x08\x02" + struct.pack(">II", 1 << 20, 1 << 20),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content, pack):
    (tmp_path / "file").write_bytes(pack(content))
    with pytest.raises(ImageFormatError, match="file"):
        read_idx(tmp_path / "file")


def test_a_gzip_file_that_is_cut_or_missing_is_refused(tmp_path):
    packed = gzip.compress(idx(np.arange(200, dtype=np.uint8)))
    (tmp_path / "file").write_bytes(packed[:-12])
    for name in ("file", "missing"):
        with pytest.raises(ImageFormatError, match=name):
            read_idx(tmp_path / name)


def test_no_more_is_unpacked_than_the_header_announces(tmp_path):
    import tracemalloc

    bomb = b"\0\0\x08\x01" + struct.pack(">I", 10) + bytes(50_000_000)
    (tmp_path / "file").write_bytes(gzip.compress(bomb))
    tracemalloc.start()
    with pytest.raises(ImageFormatError, match="10 values"):
        read_idx(tmp_path / "file")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_both_parts_are_put_together(copy):
    source = load_source("fashion_mnist", path=copy, seed=0)
    assert (source.name, len(source.images), len(source.labels)) == ("fashion_mnist", 40, 40)
    assert source.images[0].shape == (28, 28)
    assert source.labels[30:] == list(range(10))
    assert source.classes[9] == "Ankle boot"
    few = load_source("fashion_mnist", path=copy, limit=20, image_size=14, seed=0)
    assert (len(few.images), few.images[3].shape) == (20, (14, 14))


def test_torchvisions_folder_and_plain_files_will_do(copy, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in copy.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert len(load_source("fashion_mnist", path=root, seed=0).images) == 40


def test_other_images_than_the_published_ones_are_refused(copy):
    name = "t10k-images-idx3-ubyte"
    values = read_idx(copy / f"{name}.gz").copy()
    values[3, 4, 5] ^= 1
    (copy / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
    with pytest.raises(DataError, match=name) as caught:
        load_source("fashion_mnist", path=copy, seed=0)
    assert "SHA-256" in str(caught.value)


def test_a_missing_file_is_named(copy):
    (copy / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(EmptyDatasetError, match="t10k-labels-idx1-ubyte") as caught:
        load_source("fashion_mnist", path=copy, seed=0)
    assert "data.path" in str(caught.value)


def test_without_a_network_the_remedy_is_named(tmp_path, monkeypatch):
    import torchvision.datasets.mnist as mnist

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mnist.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: nobody
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_source("fashion_mnist", seed=0)
    assert "data.path" in str(caught.value)


def test_a_download_is_kept_and_used_again(copy, tmp_path_factory, monkeypatch):
    import torchvision.datasets.mnist as mnist

    cache, calls = tmp_path_factory.mktemp("cache"), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def download(self: object, root: str, *, train: bool, download: bool) -> None:
        calls.append(root)
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in copy.glob("*.gz"):
            (raw / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(mnist.FashionMNIST, "__init__", download)
    for _ in range(2):
        assert len(load_source("fashion_mnist", seed=0).images) == 40
    assert calls == [str(cache / "flep-fl")]


def test_synthetic_images_follow_from_their_number():
    first, again = (load_source("synthetic", limit=40, seed=3) for _ in range(2))
    assert sorted(np.bincount(first.labels)) == [10, 10, 10, 10]
    for a, b in zip(first.images, again.images, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.images[0].shape == (28, 28)
    assert first.images[0].dtype == np.uint8
    everything = load_source("synthetic", seed=0)
    assert len(everything.images) == 100_000
    assert not np.array_equal(everything.images[0], everything.images[4])
    np.testing.assert_array_equal(everything.images[2:5][1], everything.images[3])
