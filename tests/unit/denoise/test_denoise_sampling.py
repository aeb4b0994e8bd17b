"""Training batches: crops, turns and noise, decided by seed and step alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch

from flep_fl.data_security.denoise.sampling import CropSampler, haar_mixed, most_detailed, standard_noise
from flep_fl.data_security.denoise.settings import TrainSettings
from flep_fl.data_security.noise import TABLE_ONE, noise_table

SETTINGS = TrainSettings(images=Path("unused"), batch=8, crop=24, scales=[1.0, 0.6])


def _pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (64, 80), dtype=np.uint8) for _ in range(4)]


def test_batches_depend_on_seed_and_step_alone():
    first, second = (CropSampler(_pictures(), SETTINGS) for _ in range(2))
    second.batch(3)
    torch.manual_seed(7)  # the process's generator plays no part
    for one, two in zip(first.batch(7), second.batch(7), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.batch(7)[0], first.batch(8)[0])
    assert not torch.equal(first.batch(7)[1], first.batch(8)[1])
    other = CropSampler(_pictures(), dataclasses.replace(SETTINGS, seed=1))
    assert not torch.equal(first.batch(7)[0], other.batch(7)[0])
    clean, noise, levels = first.batch(0)
    assert torch.equal(levels, torch.full((8,), 25 / 255))
    assert clean.shape == noise.shape == (8, 1, 24, 24)
    assert clean.dtype == noise.dtype == torch.float32
    assert 0 <= clean.min() < clean.max() <= 1
    assert float(noise.std() * 255) == pytest.approx(25, rel=0.05)


def test_crops_come_in_all_eight_positions():
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8)
    settings = dataclasses.replace(SETTINGS, crop=8, batch=200, scales=[1.0])
    clean = np.rint(CropSampler([picture], settings).batch(0)[0][:, 0].numpy() * 255).astype(np.uint8)
    turned = {np.rot90(base, k).tobytes() for base in (picture, picture.T) for k in range(4)}
    assert {crop.tobytes() for crop in clean} == turned


def test_every_crop_is_a_part_of_one_picture():
    """Also at the edges: the index arithmetic must never step into the next row or the next picture."""
    pictures = [np.full((9, 30), 10 + 40 * i, np.uint8) + np.arange(30, dtype=np.uint8) for i in range(4)]
    settings = dataclasses.replace(SETTINGS, crop=9, batch=300, scales=[1.0])
    clean = np.rint(CropSampler(pictures, settings).batch(1)[0][:, 0].numpy() * 255).astype(int)
    for crop in clean:
        ramp = crop if np.ptp(crop[:, 0]) == 0 else crop.T
        assert (np.abs(np.diff(ramp, axis=1)) == 1).all()
        assert (np.diff(ramp, axis=0) == 0).all()


def test_of_several_candidates_the_one_with_most_detail_is_taken():
    crops = torch.zeros(3, 2, 8, 8)
    crops[0] = torch.arange(8.0)  # a ramp is steep, but has no detail
    crops[1, 0, 4, 4] = 0.1
    crops[2, 1, 2, 6] = 0.1
    chosen = most_detailed(crops)
    assert torch.equal(chosen[0], crops[1, 0]) and torch.equal(chosen[1], crops[2, 1])
    flat, busy = np.full((64, 64), 90, np.uint8), _pictures()[0]
    settings = dataclasses.replace(SETTINGS, batch=400, scales=[1.0])
    shares = []
    for candidates in (1, 2, 4):
        clean = CropSampler([flat, busy], dataclasses.replace(settings, candidates=candidates)).batch(0)[0]
        shares.append(float((clean.std(dim=(1, 2, 3)) > 0).float().mean()))
    chance = busy.size / (busy.size + flat.size)
    assert shares == pytest.approx([1 - (1 - chance) ** count for count in (1, 2, 4)], abs=0.08)


def test_every_crop_draws_its_level():
    settings = dataclasses.replace(SETTINGS, noise_range=[5.0, 50.0], batch=400, crop=16)
    _, noise, levels = CropSampler(_pictures(), settings).batch(0)
    assert 5 / 255 <= levels.min() < 7 / 255
    assert 48 / 255 < levels.max() <= 50 / 255
    ratio = noise.std(dim=(1, 2, 3)) / levels
    assert 0.8 < ratio.min() < ratio.max() < 1.2


@pytest.mark.parametrize("family", ["gaussian", "laplacian", "rayleigh"])
def test_the_noise_is_that_of_the_cipher(family):
    noise = standard_noise(family, torch.Size((2, 1, 512, 512)), torch.Generator().manual_seed(1))
    pixels = np.sort(noise[0].numpy().ravel())
    quantiles = noise_table(family).astype(np.float64) / TABLE_ONE
    expected = np.interp(np.linspace(0, 1, len(pixels)), np.linspace(0, 1, len(quantiles)), quantiles)
    # Kolmogorov-Smirnov, on the quantiles: all but the extreme tails.
    np.testing.assert_allclose(pixels[2000:-2000], expected[2000:-2000], atol=0.04)
    # The second half has that distribution in its Haar coefficients.
    coefficients = np.concatenate(
        [np.ravel(band) for band in pywt.dwt2(noise[1, 0].numpy(), "haar")[1]]
        + [np.ravel(pywt.dwt2(noise[1, 0].numpy(), "haar")[0])]
    )
    np.testing.assert_allclose(np.sort(coefficients)[2000:-2000], expected[2000:-2000], atol=0.04)
    assert float(noise.double().pow(2).mean()) == pytest.approx(1, abs=0.01)


def test_haar_mixing_is_the_inverse_transform():
    coefficients = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    approximation, details = pywt.dwt2(haar_mixed(coefficients)[0, 0].numpy(), "haar")
    np.testing.assert_allclose(approximation, coefficients[0, 0, ::2, ::2].numpy(), atol=1e-12)
    for band, (row, column) in zip(details, ((0, 1), (1, 0), (1, 1)), strict=True):
        np.testing.assert_allclose(band, coefficients[0, 0, row::2, column::2].numpy(), atol=1e-12)
