"""Exactness: for which wavelet, number of bits and alpha every pixel comes back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import pywt

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security import wavelets
from flep_fl.data_security.encode import make_quantiser
from flep_fl.data_security.keys import CipherParameters
from flep_fl.data_security.pipeline import restore

ALL = pywt.wavelist(kind="discrete")
LITERAL = ("scramble", "encode", "noise", "envelope")
LEAST_ALPHA = {
    "haar": 0.0163, "db2": 0.0319, "db4": 0.0492, "db8": 0.0865, "db20": 0.2949, "db38": 0.8866,
    "sym4": 0.0475, "sym8": 0.0677, "coif1": 0.0370, "coif3": 0.0660, "coif17": 0.1380,
    "bior2.2": 0.0823, "bior4.4": 0.0693, "rbio3.1": 0.1464,
}  # fmt: skip
"""Smallest alpha for uint8 on a 16-bit wire without the mask; with the mask every alpha is exact."""


def limit(wavelet: str, bits: int, peak: int, *, modular: bool) -> float:
    step = max(make_quantiser(wavelet, bits, peak=peak).steps)
    return wavelets.exact_from_alpha(wavelet, step, peak, modular=modular)


@pytest.mark.parametrize("wavelet", [name for name in ALL if name != "dmey"])
def test_with_the_mask_every_wavelet_but_dmey_is_exact_for_every_alpha(wavelet: str) -> None:
    assert limit(wavelet, 16, 255, modular=True) == 0
    assert limit(wavelet, 32, 65535, modular=True) == 0


@pytest.mark.parametrize("wavelet", LEAST_ALPHA)
def test_least_alpha_without_the_mask(wavelet: str) -> None:
    assert limit(wavelet, 16, 255, modular=False) == pytest.approx(LEAST_ALPHA[wavelet], rel=0.01)
    assert limit(wavelet, 32, 65535, modular=False) == pytest.approx(LEAST_ALPHA[wavelet] / 256, rel=0.01)


def test_dmey_is_never_exact(make_cipher, natural) -> None:
    """PyWavelets' dmey is a truncated filter: forth and back is off by up to three grey levels."""
    assert limit("dmey", 16, 255, modular=True) == np.inf
    with pytest.raises(CipherParameterError, match="dmey does not give back every pixel"):
        make_cipher(wavelet="dmey", bits=16).encrypt(natural(1, 8, 8))
    cipher = make_cipher(wavelet="dmey")
    images = natural(1, 64, 64)
    assert np.abs(np.stack(cipher.decrypt(cipher.encrypt(images))) - images).max() < 12


@pytest.mark.parametrize("wavelet", ["haar", "db8", "coif3"])
def test_below_the_least_alpha_the_error_is_named(make_cipher, natural, wavelet: str) -> None:
    images = natural(2, 32, 24)
    just = make_cipher(layers=LITERAL, bits=16, wavelet=wavelet, alpha=LEAST_ALPHA[wavelet] * 1.02)
    assert np.array_equal(np.stack(restore(just, just.encrypt(images))), images)
    below = make_cipher(layers=LITERAL, bits=16, wavelet=wavelet, alpha=LEAST_ALPHA[wavelet] * 0.98)
    with pytest.raises(CipherParameterError, match=r"cipher\.alpha is too small.*Raise cipher\.alpha"):
        below.encrypt(images)
    # Where a loss is accepted anyway, alpha is free.
    lossy = make_cipher(layers=LITERAL, bits=14, wavelet=wavelet, alpha=LEAST_ALPHA[wavelet] * 0.98)
    assert len(lossy.encrypt(images)) == 2


@pytest.mark.parametrize(
    "wavelet", ["haar", "db2", "db20", "bior3.9", "rbio3.1", "bior4.4", "rbio6.8", "sym9"]
)
def test_bounds_hold_for_the_worst_images(wavelet: str) -> None:
    """Sign patterns of every basis function reach the range; the error gain bounds the restored error."""
    from flep_fl.data_security import encode

    low, high, detail = wavelets.coefficient_bounds(wavelet)
    side = 2 * pywt.Wavelet(wavelet).dec_len + 8
    side += side % 2
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 2, (side, side)) for _ in range(20)]
    bands = encode.forward(np.stack(images), wavelet, np.float64)
    approximation, *details = encode.split(bands)
    assert low - 1e-9 <= approximation.min() and approximation.max() <= high + 1e-9
    assert max(np.abs(band).max() for band in details) <= detail + 1e-9
    errors = rng.choice([-1.0, 1.0], (20, side, side))
    assert np.abs(encode.inverse(errors, wavelet)).max() <= wavelets.error_gain(wavelet) + 1e-9


@pytest.mark.parametrize("wavelet", ALL)
def test_every_discrete_wavelet_of_pywavelets_is_taken(make_cipher, natural, wavelet: str) -> None:
    images = natural(1, 14, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cipher = make_cipher(wavelet=wavelet)
    assert bool(caught) == (not pywt.Wavelet(wavelet).orthogonal)
    step = make_quantiser(wavelet, 8).step
    error = np.abs(np.stack(cipher.decrypt(cipher.encrypt(images))) - images).max()
    assert error <= wavelets.error_gain(wavelet) * step + 255 * wavelets.reconstruction_defect(wavelet) + 0.01


def test_the_warning_names_the_wavelet() -> None:
    with pytest.warns(UserWarning, match=r"cipher\.wavelet=bior2\.2 is not orthogonal"):
        CipherParameters(wavelet="bior2.2")
