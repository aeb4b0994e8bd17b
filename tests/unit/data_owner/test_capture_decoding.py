"""From hostile bytes to pixels."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flep_fl.contracts.errors import ImageFormatError
from flep_fl.data_owner.decoding import decode_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (3, 5, 7), dtype=np.uint8)
LIMIT = 10_000


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def decode(data: bytes, *, max_pixels: int = LIMIT) -> np.ndarray:
    return decode_image(data, format="png", shape=(), max_pixels=max_pixels)


@pytest.mark.parametrize(
    ("image", "name"), [(GREY, "raw-uint8"), (COLOUR, "raw-uint8"), (DEEP, "raw-uint16")]
)
def test_raw_pixels(image: np.ndarray, name: str) -> None:
    data = image.astype(image.dtype.newbyteorder("<")).tobytes()
    found = decode_image(data, format=name, shape=image.shape, max_pixels=LIMIT)
    assert found.dtype == image.dtype and np.array_equal(found, image)


def test_png_pixels() -> None:
    for image, made in (
        (GREY, Image.fromarray(GREY)),
        (DEEP, Image.fromarray(DEEP)),
        (COLOUR, Image.fromarray(COLOUR.transpose(1, 2, 0))),
    ):
        found = decode(png(made))
        assert found.dtype == image.dtype and np.array_equal(found, image)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_other_kinds_of_png_are_refused(mode: str) -> None:
    with pytest.raises(ImageFormatError, match="unsupported"):
        decode(png(Image.fromarray(COLOUR.transpose(1, 2, 0)).convert(mode)))


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "TIFF"])
def test_only_png_is_decoded(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, kind)
    with pytest.raises(ImageFormatError, match="not a PNG"):
        decode(buffer.getvalue())


def test_an_animation_is_refused() -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    with pytest.raises(ImageFormatError, match="animated"):
        decode(png(frames[0], save_all=True, append_images=frames[1:]))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(width: int, height: int, *extra: bytes) -> bytes:
    """Return a small PNG whose pixels are all zero."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 1) * min(height, 20_000)), 9)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_at_its_head() -> None:
    data = bomb(20_000, 20_000)
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ImageFormatError, match="too large"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_decoding_in_many_threads_leaves_the_processs_warnings_alone() -> None:
    """A filter that turns warnings into errors, left behind by a race, would break others' code later."""
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        for shape in pool.map(lambda _: decode(png(Image.fromarray(GREY))).shape, range(400)):
            assert shape == GREY.shape
    assert list(warnings.filters) == before


def test_a_text_bomb_is_refused() -> None:
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))
    with pytest.raises(ImageFormatError, match="cannot be decoded"):
        decode(bomb(7, 5, text))


@pytest.mark.parametrize("side", [0, 65_536])
def test_impossible_sizes_are_refused(side: int) -> None:
    with pytest.raises(ImageFormatError):
        decode(bomb(1, side), max_pixels=1 << 40)
    with pytest.raises(ImageFormatError):
        decode_image(b"", format="raw-uint8", shape=(1, side), max_pixels=1 << 40)


@pytest.mark.parametrize(
    ("name", "shape", "data"),
    [
        ("raw-uint8", (5, 7), GREY.tobytes()[:-1]),
        ("raw-uint8", (5, 7), GREY.tobytes() + b"\0"),
        ("raw-uint16", (5, 7), GREY.tobytes()),
        ("raw-uint8", (35,), GREY.tobytes()),
        ("raw-uint8", (5, 1, 7), GREY.tobytes()),
        ("raw-uint8", (200, 200), bytes(40_000)),
        ("raw-float32", (5, 7), bytes(140)),
    ],
)
def test_raw_bytes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(ImageFormatError):
        decode_image(data, format=name, shape=shape, max_pixels=LIMIT)


@given(st.data())
def test_an_altered_png_decodes_or_is_refused_by_name(data: st.DataObject) -> None:
    made = bytearray(png(Image.fromarray(GREY)))
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(made)))
    for hostile in (bytes(made), bytes(made[:cut])):
        try:
            assert decode(hostile).ndim in (2, 3)
        except ImageFormatError:
            continue


@pytest.mark.parametrize(("side", "colour"), [(200, 0), (5, 2)], ids=["larger", "other-colours"])
def test_a_second_header_does_not_replace_the_checked_one(side: int, colour: int) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    def head(side: int, colour: int) -> bytes:
        return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0))

    rows = zlib.compress(bytes((side * (3 if colour else 1) + 1) * side))
    data = b"\x89PNG\r\n\x1a\n" + head(5, 0) + head(side, colour) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(ImageFormatError, match="two headers"):
        decode(data)
