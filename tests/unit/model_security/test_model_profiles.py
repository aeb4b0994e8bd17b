from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tenseal import sealapi

from flep_fl.contracts.errors import ConfigError, ProfileError
from flep_fl.model_security.profiles import (
    ENCRYPTIONS,
    LARGEST_MODULUS,
    PROFILES,
    TAG_RANGE,
    check_federation,
    check_security,
    describe_federation,
    get_profile,
)


def test_the_figures_of_the_profiles():
    default, classic = get_profile("default"), get_profile("classic")
    assert (default.values_per_ciphertext, classic.values_per_ciphertext) == (4096, 2048)
    assert default.headroom == classic.headroom == 2**19
    assert default.ciphertexts(4096) == 1 and default.ciphertexts(4097) == 2
    assert default.slot_counts(5001) == [2048, 453]
    assert classic.slot_counts(5001) == [2048, 2048, 905]
    assert default.tolerance(10) == pytest.approx(4.8e-9, rel=0.02)
    assert default.expected_error(10) == pytest.approx(2e-9, rel=0.3)
    assert default.model_error(10, 5000, 1000) == pytest.approx(5 * default.expected_error(10))
    assert len({profile.digest for profile in PROFILES.values()}) == len(PROFILES)


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"classic or compact or default.*'fast'"):
        get_profile("fast")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"bound": 200_000.0}, ("ckks.bound", "federation.sites")),
        ({"sites": 40_000}, ("ckks.bound", "federation.sites")),
        ({"max_examples": 1_000_000}, ("ckks.max_examples", "federation.sites")),
        ({"bound": 0.0}, ("ckks.bound",)),
        ({"bound": float("nan")}, ("ckks.bound",)),
        ({"sites": 0}, ("federation.sites",)),
        ({"max_examples": 0}, ("ckks.max_examples",)),
    ],
)
def test_a_federation_beyond_the_profile_names_the_fields(changes, names):
    settings = {"sites": 3, "bound": 64.0, "max_examples": 10_000}
    check_federation(PROFILES["default"], **settings)
    with pytest.raises(ProfileError) as caught:
        check_federation(PROFILES["default"], **(settings | changes))
    assert all(name in str(caught.value) for name in names)


def test_check_values_count_against_the_headroom():
    compact = get_profile("compact")
    assert compact.headroom > 10 * 9.8 * 4 / 3.14159  # the weights alone would fit
    with pytest.raises(ProfileError, match="check values included") as caught:
        check_federation(compact, sites=10, bound=9.8, max_examples=4096)
    bound = float(re.search(r"ckks\.bound to ([0-9.]+)", str(caught.value))[1])
    check_federation(compact, sites=10, bound=bound, max_examples=4096)  # the remedy works
    with pytest.raises(ProfileError):
        check_federation(compact, sites=10, bound=bound + 0.02, max_examples=4096)


def test_tags_of_many_sites_do_not_line_up():
    """Aligned, the tags of 100 sites alone would need 400 of 128."""
    compact = get_profile("compact")
    check_federation(compact, sites=100, bound=0.5, max_examples=4096)
    rng = np.random.default_rng(0)
    # coefficients of the polynomial with 100 sites' summed tags in four slots, for a thousand rounds
    tags = rng.uniform(-TAG_RANGE, TAG_RANGE, (1000, 100, 8)).sum(axis=1)
    slots = np.zeros((1000, 4096), dtype=complex)
    powers = np.array([pow(3, j, 8192) for j in range(4)])
    slots[:, (powers - 1) // 2] = tags[:, ::2] + 1j * tags[:, 1::2]
    coefficients = np.abs(np.fft.fft(slots, axis=1).real) / 2048
    assert 0.4 < coefficients.max() / (compact.needed(100, 0.0) - 100 / 2048) < 1


def test_the_security_bounds_are_those_of_seal():
    levels = {128: "TC128", 192: "TC192", 256: "TC256"}
    for level, table in LARGEST_MODULUS.items():
        seal_level = getattr(sealapi.SEC_LEVEL_TYPE, levels[level])
        for degree, bits in table.items():
            assert sealapi.CoeffModulus.MaxBitCount(degree, seal_level) == bits
    assert {name: profile.security_bits for name, profile in PROFILES.items()} == {
        "default": 128, "compact": 192, "classic": 128,
    }  # fmt: skip


@pytest.mark.parametrize("bits", [(60, 50), (60, 60)])
def test_less_than_128_bits_of_security_are_refused(bits):
    weak = replace(PROFILES["default"], coeff_mod_bit_sizes=bits)
    with pytest.raises(ProfileError, match="at most 109 bits of primes at N=4096"):
        check_federation(weak, sites=3, bound=64.0, max_examples=1000)
    with pytest.raises(ProfileError, match="ring degree among 1024"):
        check_security(replace(weak, poly_modulus_degree=512))


@pytest.mark.parametrize("kind", ENCRYPTIONS)
@pytest.mark.parametrize("name", list(PROFILES))
def test_every_profile_fits_three_sites_as_it_stands_and_says_what_it_gives(name, kind):
    profile = get_profile(name, kind)
    settings = {"sites": 3, "bound": profile.default_bound, "max_examples": profile.default_max_examples}
    check_federation(profile, **settings)
    line = describe_federation(profile, **settings)
    assert f"profile {name}, {kind} encryption: {profile.security_bits}-bit security" in line
    assert f"of {profile.headroom:g}" in line and f"limit {profile.model_error_limit:g}" in line
    assert "\n" not in line


def test_encryption_is_part_of_the_digest_and_limits_are_not():
    assert get_profile("default").digest != get_profile("default", "public").digest
    assert replace(PROFILES["default"], model_error_limit=1.0).digest == PROFILES["default"].digest
    with pytest.raises(ConfigError, match=r"symmetric or public"):
        get_profile("default", "none")
