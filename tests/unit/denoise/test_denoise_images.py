"""Folders of pictures of all sorts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flep_fl.contracts.errors import EmptyDatasetError, ImageFormatError
from flep_fl.data_security.denoise.images import load_folder, read_luma

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def _write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def test_grey_colour_alpha_and_16_bit_become_luma(tmp_path):
    np.testing.assert_array_equal(read_luma(_write(tmp_path / "grey.png", GREY)), GREY)
    colour = np.zeros((3, 4, 3), np.uint8)
    colour[..., 1] = 100
    np.testing.assert_array_equal(read_luma(_write(tmp_path / "green.png", colour)), 59)
    alpha = np.dstack([np.repeat(GREY[..., None], 3, 2), np.full((3, 4), 255, np.uint8)])
    np.testing.assert_array_equal(read_luma(_write(tmp_path / "alpha.png", alpha)), GREY)
    deep = GREY.astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        np.testing.assert_array_equal(read_luma(_write(tmp_path / name, deep)), GREY)


def test_folders_are_read_recursively_in_a_fixed_order(tmp_path):
    for name, value in (("b/2.png", 2), ("a/x/1.PNG", 1), ("c.jpg", 3)):
        _write(tmp_path / name, np.full((9, 9), value, np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    for seed in range(3):
        assert [image[0, 0] for image in load_folder(tmp_path, seed=seed)] == [1, 2, 3]


def test_the_memory_limit_takes_a_random_part(tmp_path, caplog):
    for index in range(6):
        _write(tmp_path / f"{index}.png", np.full((10, 10), index, np.uint8))
    with caplog.at_level(logging.WARNING):
        parts = {tuple(int(i[0, 0]) for i in load_folder(tmp_path, pixels=250, seed=s)) for s in range(5)}
    assert all(len(part) == 2 for part in parts)
    assert len(parts) > 1
    assert "2 of 6 pictures" in caplog.text


def test_damaged_files_are_skipped_by_name(tmp_path, caplog):
    good = _write(tmp_path / "good.png", GREY)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "short.png").write_bytes(good.read_bytes()[:-30])
    (tmp_path / "empty.jpg").write_bytes(b"")
    broken = bytearray(good.read_bytes())
    broken[20] ^= 0xFF
    (tmp_path / "broken.png").write_bytes(broken)
    with caplog.at_level(logging.WARNING):
        assert len(load_folder(tmp_path)) == 1
    for name in ("text.png", "short.png", "empty.jpg", "broken.png"):
        assert name in caplog.text
    assert "good.png" not in caplog.text
    good.unlink()
    with pytest.raises(ImageFormatError, match="None of the pictures decodes"):
        load_folder(tmp_path)


def test_float_pictures_have_no_range(tmp_path):
    with pytest.raises(ImageFormatError, match="no known range"):
        read_luma(_write(tmp_path / "float.tif", GREY.astype(np.float32)))


def test_folders_without_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(EmptyDatasetError, match="holds no pictures"):
        load_folder(tmp_path)
    with pytest.raises(EmptyDatasetError, match="no such folder"):
        load_folder(tmp_path / "nowhere")
