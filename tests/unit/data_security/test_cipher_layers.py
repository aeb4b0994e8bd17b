"""Each layer on its own, against references written differently."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security import encode
from flep_fl.data_security.chaos import STEPS, chaotic_order, chaotic_sequence
from flep_fl.data_security.mask import add_mask, mask_stream
from flep_fl.data_security.noise import (
    Gaussian,
    draw,
    integer_table,
    noise_table,
    real_table,
    register_noise,
)
from flep_fl.data_security.scramble import scramble, spiral_positions, unscramble
from flep_fl.data_security.stream import keystream, keystream16, keystream32

KEY = bytes(range(32))


def test_keystream_is_aes_256_of_counters() -> None:
    ecb = Cipher(algorithms.AES256(KEY), modes.ECB()).encryptor()
    expected = b"".join(ecb.update(counter.to_bytes(16, "big")) for counter in range(3))
    assert keystream(KEY, 40).tobytes() == expected[:40]
    assert keystream16(KEY, 3).tolist() == [
        int.from_bytes(expected[2 * i : 2 * i + 2], "little") for i in range(3)
    ]
    assert keystream32(KEY, 2).tolist() == [
        int.from_bytes(expected[4 * i : 4 * i + 4], "little") for i in range(2)
    ]


@pytest.mark.parametrize("count", [1, 100, 16384, 16390])
def test_chaotic_sequence_matches_integer_arithmetic(count: int) -> None:
    keys = [KEY, KEY[::-1]]
    for key, found in zip(keys, chaotic_sequence(keys, count), strict=True):
        perturbation, *states = keystream32(key, count + 1).tolist()
        for _ in range(STEPS):
            states = [(x * (2**32 - 1 - x) >> 30) ^ (perturbation >> 16) for x in states]
        assert found.tolist() == states


def test_chaotic_sequence_of_nothing() -> None:
    assert chaotic_sequence([], 5).shape == (0, 5)
    assert chaotic_sequence([KEY], 0).shape == (1, 0)


def test_chaotic_order_sorts_the_sequence_with_stable_ties() -> None:
    keys = [KEY, KEY[::-1]]
    sequence = chaotic_sequence(keys, 5000)
    assert np.array_equal(chaotic_order(keys, 5000), np.argsort(sequence, axis=-1, kind="stable"))


def test_lanes_do_not_collapse() -> None:
    """No value of 64 x 4096 drawn in as many lanes is frequent, and none is stuck at zero."""
    keys = [bytes([index]) * 32 for index in range(64)]
    values, counts = np.unique(chaotic_sequence(keys, 4096), return_counts=True)
    assert counts.max() <= 64
    assert len(values) > 0.99 * 64 * 4096


def test_spiral_of_three() -> None:
    assert spiral_positions(3) == (
        (0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (1, 1),
    )  # fmt: skip


def test_scramble_moves_whole_spiral_scanned_blocks() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(1, 4, 6)
    order = np.array([[5, 0, 1, 2, 3, 4]])
    moved = scramble(image, order, 2)
    # The last block [[16, 17], [22, 23]] comes first, read along the spiral 16 17 23 22.
    assert moved[0, :2, :2].tolist() == [[16, 17], [23, 22]]
    assert moved[0, :2, 2:4].tolist() == [[0, 1], [7, 6]]
    assert np.array_equal(unscramble(moved, order, 2), image)


def test_haar_commutes_with_scrambling_of_two_by_two_blocks_in_energy(natural) -> None:
    """With b = 2 the approximation band only permutes: details stay as small as they were."""
    image = natural(1, 32, 32)
    order = chaotic_order([KEY], 256)
    before = encode.forward(image, "haar")[0, :16, :16]
    after = encode.forward(scramble(image, order, 2), "haar")[0, :16, :16]
    assert np.array_equal(np.sort(before, axis=None), np.sort(after, axis=None))


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 8, 10), (2, 64, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_haar_fast_path_equals_pywavelets(shape: tuple[int, int, int], dtype: type) -> None:
    images = np.random.default_rng(3).integers(0, 256, shape).astype(dtype)
    bands = encode.forward(images, "haar")
    approximation, details = pywt.dwt2(images.astype(np.float64), "haar", mode="periodization", axes=(-2, -1))
    # PyWavelets' own rounding is about 1e-13; ours is exact.
    for band, expected in zip(encode.split(bands), (approximation, *details), strict=True):
        np.testing.assert_allclose(band, expected, atol=1e-10)
    assert np.array_equal(encode.inverse(bands, "haar"), images.astype(np.float32))


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "sym8", "coif1", "coif3"])
def test_quantiser_range_holds_every_image(wavelet: str) -> None:
    """Random, extreme and adversarial (sign of a basis function) images never leave the range."""
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (64, 64)), rng.integers(0, 2, (64, 64)) * 255]
    for row, column in [(8, 8), (8, 40), (40, 8), (40, 40)]:
        unit = np.zeros((1, 64, 64), np.float32)
        unit[0, row, column] = 1
        basis = encode.inverse(unit, wavelet)[0]
        images += [(basis > 0) * 255, (basis < 0) * 255]
    plane = np.stack(images).astype(np.uint8)
    quantiser = encode.make_quantiser(wavelet, 8)
    levels = quantiser.scale(encode.forward(plane, wavelet))
    assert levels.min() >= -1e-3
    # Zero has a level of its own in the detail bands; it costs half a level at their upper end.
    assert levels.max() <= 255.5 + 1e-3
    assert quantiser.step == 2 or wavelet != "haar"


def test_detail_zero_is_exact() -> None:
    for bits in (8, 16):
        for guard in (0.0, 75.0):
            quantiser = encode.make_quantiser("haar", bits, guard=guard)
            flat = np.zeros((1, 4, 4), np.float32)
            restored = quantiser.unscale(quantiser.expand(quantiser.round(quantiser.scale(flat))))
            assert np.abs(restored[0, 2:, 2:]).max() < 1e-4


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.3, 1e-6])
def test_modular_planes_are_the_scaled_secret(alpha: float) -> None:
    secret = np.random.default_rng(1).integers(0, 256, (8, 12)).astype(np.uint8)
    quantiser = encode.make_quantiser("haar", 8)
    planes = encode.modular_planes([secret], "haar", (alpha,) * 4, quantiser)[0]
    exact = np.stack(encode.split(encode.forward(secret[None], "haar")[0])).astype(np.float64)
    exact *= (1 - alpha) / (alpha * quantiser.step)
    distance = np.abs((planes - exact + 128) % 256 - 128)
    # Rounded down, with a ratio that is rounded to 2^-16: 1020 * 2^-17 at most.
    assert distance.max() <= 1.01
    assert (planes == 0).all() == (alpha == 1.0)


@pytest.mark.parametrize("plane", [(1, 1), (2, 3), (3, 4), (3, 9), (9, 4), (20, 30)])
@pytest.mark.parametrize("start", [(0, 0), (5, 4), (2, 2), (2**32 - 1, 2**32 - 2)])
def test_window_repeats_the_planes(plane: tuple[int, int], start: tuple[int, int]) -> None:
    planes = np.arange(4 * plane[0] * plane[1]).reshape(4, *plane)
    cut = encode.window(planes, *start, (6, 8))
    rows, columns = ((start[axis] + np.arange(3 + axis)) % plane[axis] for axis in (0, 1))
    for band, repeated in zip(encode.split(cut), planes, strict=True):
        assert np.array_equal(band, repeated[rows[:, None], columns])


def test_gaussian_table_has_the_moments_of_a_normal_distribution() -> None:
    table = noise_table("gaussian").astype(np.float64) / 4096
    assert np.all(np.diff(table) >= 0)
    assert table.mean() == 0
    assert abs(table.var() - 1) < 1e-5
    assert abs((table**4).mean() - 3) < 0.01
    assert abs(np.mean(np.abs(table) > 1.959964) - 0.05) < 1e-3


def test_integer_table_is_the_rounded_real_one_modulo() -> None:
    real = real_table("gaussian", 30.0)
    for bits in (8, 16):
        integers = integer_table("gaussian", 4.0, 30.0, bits)
        wanted = np.rint(real.astype(np.float64) + 4.0)
        assert np.abs((integers - wanted + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)).max() <= 1
        assert np.mean(integers == wanted % 2**bits) > 0.999


def test_noise_draws_follow_the_key() -> None:
    table = real_table("gaussian", 25.0)
    noise = draw(table, KEY, (200, 300))
    assert np.array_equal(noise, draw(table, KEY, (200, 300)))
    assert not np.array_equal(noise, draw(table, KEY[::-1], (200, 300)))
    assert abs(noise.mean()) < 4 * 25 / np.sqrt(60000)
    assert abs(noise.std() / 25 - 1) < 0.015


def test_noise_family_is_registered_once() -> None:
    with pytest.raises(CipherParameterError, match="already registered"):
        register_noise("gaussian", Gaussian())


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16), (32, np.uint32)])
def test_mask_is_addition_modulo(bits: int, dtype: type) -> None:
    wire = np.full((4, 6), 2**bits - 1, dtype)
    add_mask(wire, KEY)
    assert np.array_equal(wire, mask_stream(KEY, (4, 6), bits) - dtype(1))
    assert wire.dtype == dtype
