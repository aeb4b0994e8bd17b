from __future__ import annotations

import numpy as np
import pytest

from flep_fl.data_security.packing import pack, packed_size, split, unpack, word_type
from flep_fl.data_security.parameters import BITS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 7), (8, 8)])
def test_packing_is_a_bit_string(bits: int, shape: tuple[int, int]) -> None:
    plane = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(word_type([bits]))
    data = pack(plane, [bits])
    assert len(data) == packed_size(shape, [bits])
    if bits in (8, 16, 32):
        assert data == plane.astype(plane.dtype.newbyteorder("<")).tobytes()
    else:
        text = "".join(format(int(value), f"0{bits}b") for value in plane.reshape(-1))
        text += "0" * (-len(text) % 8)
        assert data == bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    again = unpack(data, shape, [bits])
    assert again.dtype == plane.dtype
    assert np.array_equal(again, plane)


@pytest.mark.parametrize("bits", [(8, 6, 6, 5), (16, 8, 7, 2), (32, 14, 12, 10), (3, 3, 3, 3)])
@pytest.mark.parametrize("shape", [(2, 2), (6, 10), (64, 2)])
def test_bands_follow_one_another(bits: tuple[int, ...], shape: tuple[int, int]) -> None:
    plane = np.empty(shape, word_type(bits))
    rng = np.random.default_rng(1)
    for band, width in zip(split(plane), bits, strict=True):
        band[...] = rng.integers(0, 1 << width, band.shape)
    data = pack(plane, bits)
    assert data == b"".join(
        pack(np.ascontiguousarray(band).astype(word_type([width])), [width])
        for band, width in zip(split(plane), bits, strict=True)
    )
    assert np.array_equal(unpack(data, shape, bits), plane)
