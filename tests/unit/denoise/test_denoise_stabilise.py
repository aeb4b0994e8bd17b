"""Variance-stabilising transforms: one level of noise at every signal, and no bias on the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flep_fl.data_security.denoise.stabilise import Stabiliser, anscombe, rician

DRAWS = 100_000


def _poisson_gaussian(signal: float, gain: float, std: float) -> np.ndarray:
    random = np.random.default_rng(int(signal))
    return gain * random.poisson(signal / gain, DRAWS) + std * random.standard_normal(DRAWS)


def _rician(signal: float, std: float) -> np.ndarray:
    real, imaginary = np.random.default_rng(int(signal)).standard_normal((2, DRAWS)) * std
    return np.hypot(signal + real, imaginary)


def _check(stabiliser: Stabiliser, noisy: np.ndarray, signal: float, spread: float, std: float) -> None:
    moved = stabiliser.forward(noisy)
    assert moved.std() == pytest.approx(stabiliser.level, rel=spread)
    # A perfect denoiser returns the mean of what it sees: from it the signal comes back.
    back = stabiliser.inverse(np.array([moved.mean()]))[0]
    error = 6 * std / np.sqrt(DRAWS)
    assert back == pytest.approx(signal, abs=error + 0.05)


@pytest.mark.parametrize("signal", [0.0, 2.0, 10.0, 60.0, 250.0])
@pytest.mark.parametrize(("gain", "std"), [(1.0, 5.0), (10.0, 2.0), (0.1, 3.0)])
def test_poisson_gaussian(signal, gain, std):
    # With few photons and little read noise the transform is known to be less even (Anscombe 1948).
    spread = 0.05 if gain * signal + std**2 > 2 * gain**2 else 0.75
    noise = float(np.sqrt(gain * signal + std**2))
    _check(anscombe(gain, std), _poisson_gaussian(signal, gain, std), signal, spread, noise)


@pytest.mark.parametrize("signal", [30.0, 60.0, 128.0, 250.0])
@pytest.mark.parametrize("std", [5.0, 25.0])
def test_rician(signal, std):
    _check(rician(std), _rician(signal, std), signal, 0.12, std)


def test_rician_near_black():
    """The mean hardly depends on a signal far below the noise: a few grey levels are what comes back."""
    stabiliser = rician(25.0)
    moved = stabiliser.forward(_rician(0.0, 25.0))
    assert moved.std() == pytest.approx(25, rel=0.15)
    assert stabiliser.inverse(np.array([moved.mean()]))[0] < 4
    # The algebraic way back would leave the noise's own mean in a black picture.
    assert _rician(0.0, 25.0).mean() > 30


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 50), st.floats(0, 50), st.integers(0, 255))
def test_the_inverse_rises_and_undoes_the_means(gain, std, signal):
    stabiliser = anscombe(gain, std)
    assert (np.diff(stabiliser.means) > 0).all()
    mean = np.interp(signal, stabiliser.signals, stabiliser.means)
    assert stabiliser.inverse(np.array([mean]))[0] == pytest.approx(signal, abs=1e-6)


def test_a_denoiser_sees_gaussian_noise_of_the_level():
    stabiliser = anscombe(4.0, 6.0)
    clean = np.full((2, 200, 200), 90.0)
    random = np.random.default_rng(0)
    noisy = (4 * random.poisson(clean / 4) + 6 * random.standard_normal(clean.shape)).astype(np.float32)
    seen = []

    def perfect(images: np.ndarray) -> np.ndarray:
        seen.append(images.std())
        return np.full_like(images, images.mean())

    restored = stabiliser.around(perfect)(noisy)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, clean, atol=0.6)
    assert seen == [pytest.approx(stabiliser.level, rel=0.05)] * 2
