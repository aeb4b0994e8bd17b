"""Salt and pepper: what is found, what is filled, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from flep_fl.data_security.denoise.impulses import fill, find_impulses, impulse_denoiser


def _ramp(height: int = 48, width: int = 64) -> np.ndarray:
    return np.add.outer(np.arange(height), np.arange(width)).astype(np.float32) + 60


def _hit(image: np.ndarray, amount: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(seed).random(image.shape)
    noisy = image.copy()
    noisy[drawn < amount] = 0
    noisy[drawn < amount / 2] = 255
    return noisy, drawn < amount


@pytest.mark.parametrize("amount", [0.01, 0.2, 0.6])
def test_hit_pixels_are_found_and_others_are_not_touched(amount):
    noisy, hit = _hit(_ramp(), amount)
    np.testing.assert_array_equal(find_impulses(noisy, amount), hit)
    restored = impulse_denoiser(amount, [])(noisy[None])[0]
    np.testing.assert_array_equal(restored[~hit], noisy[~hit])
    # On a ramp the mean of a window is nearly its middle.
    assert np.abs(restored - _ramp()).max() < (6 if amount < 0.5 else 20)


def test_the_wires_small_errors_do_not_hide_an_impulse():
    noisy, hit = _hit(_ramp(), 0.2)
    noisy += np.random.default_rng(1).uniform(-6, 6, noisy.shape).astype(np.float32)
    np.testing.assert_array_equal(find_impulses(noisy, 0.2), hit)


def test_black_and_white_areas_of_the_picture_are_kept():
    image = _ramp()
    image[:, :20], image[:, 44:] = 0, 255
    noisy, _ = _hit(image, 0.1)
    found = find_impulses(noisy, 0.1)
    assert not found[:, 3:17][noisy[:, 3:17] < 10].any()
    assert found[:, 3:17][noisy[:, 3:17] > 240].all()
    assert not found[4:-4, 48:-4][noisy[4:-4, 48:-4] > 240].any()


def test_a_hole_is_filled_from_its_border_and_no_pixel_at_all_stays_as_it_is():
    image = np.full((40, 40), 100, np.float32)
    hit = np.zeros(image.shape, bool)
    hit[5:35, 5:35] = True
    holed = np.where(hit, np.float32(0), image)
    np.testing.assert_allclose(fill(holed, hit), image, rtol=1e-5)
    np.testing.assert_array_equal(fill(image, np.ones_like(hit)), image)


def test_each_step_sees_what_the_one_before_made_of_the_hit_pixels():
    noisy, hit = _hit(_ramp(), 0.3)
    steps = [lambda images: np.full_like(images, 7), lambda images: images + 1]
    restored = impulse_denoiser(0.3, steps)(noisy[None])[0]
    np.testing.assert_array_equal(restored[hit], 8)
    np.testing.assert_array_equal(restored[~hit], noisy[~hit])


def test_an_untouched_image_goes_through_without_a_network():
    def never(_: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing to fill")

    np.testing.assert_array_equal(impulse_denoiser(0.0, [never])(_ramp()[None])[0], _ramp())
