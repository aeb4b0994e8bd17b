"""Noise families: distributions against their formulas, and what they leave in a restored image."""

from __future__ import annotations

import numpy as np
import pytest

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.keys import NoiseParameters
from flep_fl.data_security.noise import (
    NOISE_FAMILIES,
    AdditiveFamily,
    noise_table,
    noise_words,
    register_noise,
)

ADDITIVE = [name for name, family in NOISE_FAMILIES.items() if family.additive]
DEPENDENT = [name for name, family in NOISE_FAMILIES.items() if not family.additive]
OPTIONS = {
    "gaussian": {"std": 25.0},
    "laplacian": {"std": 25.0},
    "rayleigh": {"std": 25.0},
    "rician": {"std": 25.0},
    "poisson_gaussian": {"std": 5.0, "gain": 2.0},
    "salt_and_pepper": {"amount": 0.1, "salt": 0.3},
}


def noisy(name: str, level: float, **options: float) -> np.ndarray:
    """Return 512 x 512 draws of a family at one grey level."""
    noise = NoiseParameters(family=name, **(options or OPTIONS[name]))
    family = NOISE_FAMILIES[name]
    words = noise_words(bytes(range(32)), (family.words, 512, 512))
    return family.apply(np.full((512, 512), level, np.float32), words, noise)


@pytest.mark.parametrize("name", ADDITIVE)
def test_tables_have_mean_zero_and_variance_one(name: str) -> None:
    table = noise_table(name).astype(np.float64) / 4096
    assert np.all(np.diff(table) >= 0)
    assert abs(table.mean()) < 1e-5
    assert abs(table.var() - 1) < 1e-4


def test_laplacian_and_rayleigh_have_their_shapes() -> None:
    laplacian, rayleigh = (noise_table(name).astype(np.float64) / 4096 for name in ("laplacian", "rayleigh"))
    # P(|X| > x) = exp(-sqrt(2) x), and kurtosis 6.
    assert np.mean(np.abs(laplacian) > 1.5) == pytest.approx(np.exp(-np.sqrt(2) * 1.5), abs=1e-3)
    assert np.mean(laplacian**4) == pytest.approx(6, abs=0.1)
    # Rayleigh: skewness 0.6311, lower end at -mean/deviation = -1.9131.
    assert np.mean(rayleigh**3) == pytest.approx(0.6311, abs=5e-3)
    assert rayleigh[0] == pytest.approx(-1.9131, abs=0.01)


@pytest.mark.parametrize("level", [0.0, 30.0, 127.5, 255.0])
@pytest.mark.parametrize("name", NOISE_FAMILIES)
def test_deviation_is_the_root_mean_square(name: str, level: float) -> None:
    noise = NoiseParameters(family=name, **OPTIONS[name])
    found = np.sqrt(np.mean((noisy(name, level) - level) ** 2))
    assert found == pytest.approx(NOISE_FAMILIES[name].deviation(noise, level), rel=0.02)


def test_rician_is_rayleigh_at_black() -> None:
    found = noisy("rician", 0.0)
    assert found.min() >= 0
    assert found.mean() == pytest.approx(25 * np.sqrt(np.pi / 2), rel=0.01)


@pytest.mark.parametrize("level", [1, 20, 200])
@pytest.mark.parametrize("gain", [0.5, 1.0, 4.0])
def test_poisson_counts_photons(level: int, gain: float) -> None:
    photons = noisy("poisson_gaussian", level, std=0.0, gain=gain) / gain
    assert np.allclose(photons, np.rint(photons), atol=1e-3)
    rate = level / gain
    assert photons.mean() == pytest.approx(rate, rel=0.01, abs=4 * np.sqrt(rate) / 512)
    assert photons.var() == pytest.approx(rate, rel=0.02)
    assert np.mean(np.rint(photons) == 0) == pytest.approx(np.exp(-rate), abs=3e-3)


def test_salt_and_pepper_hits_its_share() -> None:
    found = noisy("salt_and_pepper", 100.0)
    assert np.mean(found == 255) == pytest.approx(0.03, abs=2e-3)
    assert np.mean(found == 0) == pytest.approx(0.07, abs=2e-3)
    assert set(np.unique(found)) == {0.0, 100.0, 255.0}


@pytest.mark.parametrize("units", ["image", "wire"])
@pytest.mark.parametrize("layers", [None, ("scramble", "encode", "noise", "envelope"), ("noise", "mask")])
@pytest.mark.parametrize("name", NOISE_FAMILIES)
def test_every_family_leaves_noise_of_the_stated_strength(make_cipher, name: str, units, layers) -> None:
    """At mid grey; in wire units the signal of a band is its wire level, so only the order is stated."""
    images = np.full((2, 128, 128), 128, np.uint8)
    options = {"layers": layers} if layers else {}
    cipher = make_cipher(noise={"family": name, **OPTIONS[name]}, noise_units=units, alpha=0.8, **options)
    residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - 128
    found = np.sqrt(np.mean(residue**2))
    exact = units == "image" or NOISE_FAMILIES[name].additive
    assert found == pytest.approx(cipher.residual_std, rel=0.04 if exact else 0.75)


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("bits", [16, (16, 16, 16, 16), (16, 32, 16, 32)])
@pytest.mark.parametrize("units", ["image", "wire"])
def test_keyed_noise_is_taken_off_exactly(make_cipher, natural, name: str, bits, units) -> None:
    images = natural(2, 31, 18)
    noise = {"family": name, "std": 40.0, "mean": 9.0, "recovery": "keyed"}
    cipher = make_cipher(bits=bits, noise=noise, noise_units=units)
    quiet = make_cipher(bits=bits)
    assert np.array_equal(np.stack(cipher.decrypt(cipher.encrypt(images))), images)
    assert not np.array_equal(
        cipher.wire_images(images, nonces=[bytes(16)] * 2), quiet.wire_images(images, nonces=[bytes(16)] * 2)
    )


@pytest.mark.parametrize("name", ADDITIVE)
def test_keyed_noise_is_there_without_the_key(make_cipher, natural, name: str) -> None:
    """The wire really carries it: removing everything but the noise leaves its deviation."""
    images = np.full((1, 64, 64), 128, np.uint8)
    noise = {"family": name, "std": 20.0, "recovery": "keyed"}
    cipher = make_cipher(bits=16, noise=noise, layers=("noise",))
    wire = cipher.wire_images(images)[0].astype(np.int64)
    assert (wire - 128 * 256).std() == pytest.approx(20 * 256, rel=0.05)


@pytest.mark.parametrize("name", DEPENDENT)
def test_signal_dependent_noise_has_no_key(name: str) -> None:
    with pytest.raises(CipherParameterError, match=r"keyed cannot be supported .* because .* gaussian"):
        NoiseParameters(family=name, recovery="keyed")
    with pytest.raises(CipherParameterError, match="depends on the signal"):
        noise_table(name)


def test_a_family_of_ones_own(monkeypatch, make_cipher, natural) -> None:
    class Uniform(AdditiveFamily):
        def quantiles(self) -> np.ndarray:
            return np.rint(np.linspace(-1, 1, 65536) * np.sqrt(3) * 4096).astype(np.int16)

    monkeypatch.setattr("flep_fl.data_security.noise.NOISE_FAMILIES", dict(NOISE_FAMILIES))
    for module in ("parameters", "planes"):
        monkeypatch.setattr(
            f"flep_fl.data_security.{module}.NOISE_FAMILIES",
            __import__("flep_fl.data_security.noise", fromlist=["x"]).NOISE_FAMILIES,
        )
    register_noise("uniform", Uniform())
    images = natural(2, 64, 64)
    cipher = make_cipher(noise={"family": "uniform", "std": 10.0})
    residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - images
    assert residue.std() == pytest.approx(10, rel=0.05)


PARAMETERS = [
    {},
    {"alpha": 0.05},
    {"alpha": (0.9, 0.5, 0.3, 0.1)},
    {"bits": 16},
    {"bits": (8, 7, 7, 7)},
    {"bits": (8, 6, 6, 6)},
    {"wavelet": "sym4"},
    {"wavelet": "dmey"},
    {"block_side": 5},
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_gaussian_residue_is_white_zero_mean_and_of_the_stated_sigma(
    make_cipher, natural, parameters
) -> None:
    """Away from black and white, before rounding. Seeded; each statistic within 4 of its own deviations.

    Quantisation adds its own white error to the noise: step^2 / 12 in a uniform band.
    """
    images = np.clip(natural(8, 120, 120), 80, 175)
    cipher = make_cipher(noise={"std": 25.0}, **parameters)
    residue = (np.stack(cipher.decrypt(cipher.encrypt(images))) - images.astype(np.float64)) / 25
    count = residue.size
    assert abs(residue.mean()) < 4 / np.sqrt(count)
    # Chi-square of count degrees of freedom: sum of squares has mean count and variance 2 count. Quantisation
    # and the orthogonality that dmey lacks may add half a percent.
    assert -4 * np.sqrt(2 / count) < np.mean(residue**2) - 1 < 4 * np.sqrt(2 / count) + 0.01
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 2), (0, 7), (7, 0), (30, 60)):
        one = residue[:, rows:, columns:]
        two = residue[:, : 120 - rows, : 120 - columns]
        assert abs(np.mean(one * two)) < 4 / np.sqrt(one.size) + (0.003 if parameters.get("wavelet") else 0)
    # Normal: share beyond 1.96 deviations, and kurtosis.
    assert abs(np.mean(np.abs(residue) > 1.96) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / count) + 0.001
    assert abs(np.mean(residue**4) / np.mean(residue**2) ** 2 - 3) < 4 * np.sqrt(24 / count) + 0.02


def test_biorthogonal_noise_is_of_the_stated_sigma_but_not_white(make_cipher) -> None:
    images = np.full((6, 128, 128), 128, np.uint8)
    with pytest.warns(UserWarning, match="not be white"):
        cipher = make_cipher(wavelet="bior3.1", noise={"std": 20.0})
    residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - 128
    assert residue.std() == pytest.approx(20, rel=0.03)
    assert cipher.residual_std == pytest.approx(20)
    neighbours = np.mean(residue[:, :, 1:] * residue[:, :, :-1]) / residue.var()
    assert abs(neighbours) > 0.05


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("name", ["laplacian", "rayleigh", "poisson_gaussian"])
def test_guard_bands_hold_most_of_every_family(make_cipher, name: str, value: int) -> None:
    images = np.full((4, 64, 64), value, np.uint8)
    cipher = make_cipher(noise={"family": name, **OPTIONS[name]})
    residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - np.float32(value)
    expected = NOISE_FAMILIES[name].deviation(cipher.bundle.noise, value)
    # 8-bit steps alone leave a deviation of about half a level.
    assert np.sqrt(np.mean(residue**2)) == pytest.approx(expected, rel=0.05, abs=1.0)
