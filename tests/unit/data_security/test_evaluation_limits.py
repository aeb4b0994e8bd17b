"""Limits against published values, against SciPy-free closed forms, and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flep_fl.contracts.errors import ImageFormatError
from flep_fl.data_security import limits, metrics

SIDE_256 = 256 * 256


@pytest.mark.parametrize(
    ("level", "npcr", "low", "high"),
    [
        (0.05, 99.5693, 33.2824, 33.6447),
        (0.01, 99.5527, 33.2255, 33.7016),
        (0.001, 99.5341, 33.1594, 33.7677),
    ],
)
def test_published_limits_for_256(level: float, npcr: float, low: float, high: float) -> None:
    """Wu, Noonan, Agaian (2011), table for 256 x 256 grey images."""
    assert limits.npcr_limit(SIDE_256, level) == pytest.approx(npcr, abs=5e-5)
    interval = limits.uaci_limits(SIDE_256, level)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_published_limits_for_512() -> None:
    """The same paper, 512 x 512."""
    assert limits.npcr_limit(512 * 512) == pytest.approx(99.5893, abs=5e-5)
    interval = limits.uaci_limits(512 * 512)
    assert (interval.low, interval.high) == pytest.approx((33.3730, 33.5541), abs=5e-5)


def test_means_are_those_of_all_pairs_of_grey_levels() -> None:
    levels = np.arange(256)
    difference = np.abs(levels[:, None] - levels[None])
    assert limits.npcr_mean() == pytest.approx(100 * np.mean(difference != 0))
    assert limits.uaci_mean() == pytest.approx(100 * np.mean(difference) / 255)


def test_standard_deviations_are_those_of_all_pairs_of_grey_levels() -> None:
    levels = np.arange(256)
    difference = np.abs(levels[:, None] - levels[None])
    assert limits.npcr_std(1) == pytest.approx(100 * np.std(difference != 0))
    assert limits.uaci_std(1) == pytest.approx(100 * np.std(difference) / 255)
    assert limits.uaci_std(400) == pytest.approx(limits.uaci_std(100) / 2)


@pytest.mark.parametrize(
    ("degrees", "level", "expected"),
    [
        (1, 0.05, 3.841459),
        (2, 0.01, 9.210340),
        (10, 0.05, 18.307038),
        (255, 0.05, 293.247835),
        (255, 0.95, 219.0),
    ],
)
def test_chi_square_limit_is_that_of_the_tables(degrees: int, level: float, expected: float) -> None:
    assert limits.chi_square_limit(degrees, level) == pytest.approx(
        expected, abs=1e-5 if level < 0.5 else 0.1
    )


def test_chi_square_limit_of_two_degrees_has_a_closed_form() -> None:
    for level in (0.5, 0.1, 1e-6):
        assert limits.chi_square_limit(2, level) == pytest.approx(-2 * math.log(level), rel=1e-9)


def test_entropy_of_ideal_images() -> None:
    # Wu et al. (2013): the ideal local entropy of blocks of 1936 pixels.
    assert limits.entropy_mean(1936) == pytest.approx(7.902469317, abs=1e-9)
    assert limits.entropy_mean(SIDE_256) == pytest.approx(7.9972, abs=5e-5)
    assert limits.entropy_std(SIDE_256) == pytest.approx(0.00025, abs=5e-6)
    # Two ways to the same value where they meet.
    pixels = 1 << 20
    assert limits.entropy_mean(pixels) == pytest.approx(limits.entropy_mean(pixels + 256), abs=1e-6)
    # One pixel has no entropy; two have one bit unless they agree.
    assert limits.entropy_mean(1) == 0.0
    assert limits.entropy_mean(2) == pytest.approx(255 / 256)


@pytest.mark.parametrize("pixels", [1936, 8192])
def test_entropy_moments_against_simulation(pixels: int) -> None:
    rng = np.random.default_rng(1)
    draws = [
        metrics.entropy(rng.integers(0, 256, (1, pixels), dtype=np.uint8).astype(np.uint8))
        for _ in range(600)
    ]
    spread = float(np.std(draws))
    assert np.mean(draws) == pytest.approx(limits.entropy_mean(pixels), abs=4 * spread / math.sqrt(600))
    assert spread == pytest.approx(limits.entropy_std(pixels), rel=0.15)


def test_ideal_images_pass_at_the_stated_rate() -> None:
    """95 % of uniform random images pass each test, for a size that no table lists."""
    rng = np.random.default_rng(2)
    bounds = limits.limits(60 * 84)
    passed = dict.fromkeys(("npcr", "uaci", "chi2", "entropy", "local", "corr"), 0)
    for _ in range(400):
        first, second = rng.integers(0, 256, (2, 60, 84), dtype=np.uint8)
        passed["npcr"] += metrics.npcr(first, second) in bounds.npcr
        passed["uaci"] += metrics.uaci(first, second) in bounds.uaci
        passed["chi2"] += metrics.chi_square(first) in bounds.chi2
        passed["entropy"] += metrics.entropy(first) in bounds.entropy
        passed["local"] += metrics.local_entropy(first, rng) in bounds.local_entropy
        passed["corr"] += metrics.adjacent_correlation(first, "diagonal") in bounds.correlation
    for name, count in passed.items():
        # Binomial with p = 0.95 and n = 400: 380 +- 4.4; six tests at 4.5 deviations.
        assert 360 <= count <= 399, name


def test_local_entropy_of_no_block_is_never_accepted() -> None:
    bounds = limits.limits(28 * 28)
    assert math.isnan(bounds.local_entropy.low)
    assert 7.9 not in bounds.local_entropy
    assert math.isnan(metrics.local_entropy(np.zeros((28, 28), np.uint8), np.random.default_rng(0)))


def test_local_entropy_by_hand() -> None:
    rng = np.random.default_rng(0)
    # Four runs of four pixels: entropies 0, 1, 2 and 0; the odd pixel at the end plays no part.
    image = np.array([[7, 7, 7, 7, 0, 0, 1, 1, 0, 1, 2, 3, 9, 9, 9, 9, 5]], np.uint8)
    assert metrics.local_entropy(image, rng, blocks=9, block_pixels=4) == 0.75
    # One block at random: each of the four values turns up.
    seen = {metrics.local_entropy(image, rng, blocks=1, block_pixels=4) for _ in range(60)}
    assert seen == {0.0, 1.0, 2.0}


def test_local_entropy_sees_what_the_histogram_does_not() -> None:
    """A ramp has a perfect histogram and no local entropy worth the name (Wu et al. 2013)."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8), 256).reshape(256, 256)
    assert metrics.entropy(ramp) == 8.0
    assert metrics.local_entropy(ramp, np.random.default_rng(0)) < 3.2


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(ImageFormatError, match="256"):
        limits.limits(255)
