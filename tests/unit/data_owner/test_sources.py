"""Data sets of the owner."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from flep_fl.contracts.errors import ConfigError, EmptyDatasetError, ImageFormatError, MissingExtraError
from flep_fl.data_owner.sources import load_source, resize_area


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("cat", 3), ("dog", 5)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (10, 14), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def test_digits_are_scaled_to_8_bits():
    source = load_source("digits", seed=0)
    assert (len(source.images), len(source.labels)) == (1797, 1797)
    assert source.images[0].shape == (8, 8)
    assert source.images[0].dtype == np.uint8
    assert (min(i.min() for i in source.images), max(i.max() for i in source.images)) == (0, 255)
    assert source.classes == tuple("0123456789")


def test_elpv_labels_and_reduction():
    source = load_source("elpv", image_size=64, limit=200, seed=0)
    assert source.classes == ("functional", "defective")
    assert len(source.images) == 200
    assert source.images[0].shape == (64, 64)
    # 821 of 2,624 cells have a defect probability of at least one half.
    assert sum(source.labels) == round(200 * 821 / 2624)


def test_folder(folder):
    source = load_source("folder", path=folder, seed=0)
    assert source.classes == ("cat", "dog")
    assert source.labels == [0] * 3 + [1] * 5
    with Image.open(folder / "dog" / "4.png") as image:
        np.testing.assert_array_equal(source.images[7], np.asarray(image))


def test_folder_reduces_and_limits(folder):
    source = load_source("folder", path=folder, image_size=5, limit=4, seed=1)
    assert {image.shape for image in source.images} == {(5, 5)}
    assert len(source.labels) == 4
    again = load_source("folder", path=folder, image_size=5, limit=4, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(source.images, again.images, strict=True))
    assert len(load_source("folder", path=folder, limit=99, seed=1).images) == 8


def test_colour_becomes_grey(folder):
    Image.new("RGB", (4, 3), (255, 0, 0)).save(folder / "cat" / "0.png")
    image = load_source("folder", path=folder, seed=0).images[0]
    assert image.shape == (3, 4)
    assert set(image.ravel()) == {76}  # 0.299 * 255, ITU-R 601


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "no class subfolders"),
        (lambda path: (path / "cat").mkdir(parents=True), "holds no image"),
    ],
)
def test_folder_without_images_is_named(tmp_path, make, message):
    path = tmp_path / "empty"
    make(path)
    with pytest.raises(EmptyDatasetError, match=message) as caught:
        load_source("folder", path=path, seed=0)
    assert str(path) in str(caught.value)


def test_empty_class_folder_is_named(folder):
    (folder / "ape").mkdir()
    with pytest.raises(EmptyDatasetError, match="ape"):
        load_source("folder", path=folder, seed=0)


@pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\nbroken"])
def test_undecodable_file_is_named(folder, content):
    (folder / "cat" / "1.png").write_bytes(content)
    with pytest.raises(ImageFormatError, match=r"1\.png"):
        list(load_source("folder", path=folder, seed=0).images)


def test_truncated_file_is_named(folder):
    path = folder / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ImageFormatError, match=r"1\.png"):
        list(load_source("folder", path=folder, seed=0).images)


def test_16_bit_files_are_refused_not_clipped(folder):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(folder / "dog" / "0.png")
    with pytest.raises(ImageFormatError, match="8 bits per channel"):
        list(load_source("folder", path=folder, seed=0).images)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("elpv", "elpv_dataset.utils", "[demo]"), ("digits", "sklearn.datasets", "[digits]")],
)
def test_missing_extra_names_the_command(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        load_source(name, seed=0)
    assert f"pip install -e '.{extra}'" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, "data.name"),
        ({"name": "digits", "image_size": 0}, "data.image_size"),
        ({"name": "digits", "limit": 0}, "data.limit"),
        ({"name": "folder"}, "data.path"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        load_source(**options, seed=0)


def test_area_average_does_not_alias():
    stripes = np.zeros((128, 128), np.uint8)
    stripes[:, ::2] = 200
    assert set(resize_area(stripes, 32).ravel()) == {100}


def test_native_mode_keeps_colour_and_depth(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (9, 7), dtype=np.uint16)
    grey = rng.integers(0, 256, (9, 7), dtype=np.uint8)
    for name, pixels in (("a", colour), ("b", deep), ("c", grey)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    first, second, third = load_source("folder", path=tmp_path, seed=0, mode="native").images
    np.testing.assert_array_equal(first, colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(second, deep)
    np.testing.assert_array_equal(third, grey)
    assert (first.dtype, second.dtype) == (np.uint8, np.uint16)
    small = load_source("folder", path=tmp_path, seed=0, mode="native", image_size=3).images
    assert [image.shape for image in small] == [(3, 3, 3), (3, 3), (3, 3)]
    np.testing.assert_allclose(small[1].mean(), deep[:, :].mean(), rtol=0.05)


def test_colour_of_16_bits_is_refused_rather_than_cut(tmp_path):
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(ImageFormatError, match="more bits"):
        load_source("folder", path=tmp_path, seed=0, mode="native").images[0]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match=r"data.mode"):
        load_source("digits", seed=0, mode="sepia")
