from __future__ import annotations

import pytest

from flep_fl.contracts.errors import ConfigError, ProfileError
from flep_fl.model_security.profiles import PROFILES, check_federation, get_profile


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
    with pytest.raises(ConfigError, match=r"classic or default.*'fast'"):
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


def test_the_tags_count_against_the_headroom():
    # 1e5 sites of tiny weights: the weights alone would fit, 8 tags of up to 1024 a site do not
    sites = 120_000
    assert sites * 1.0 * 4 / 3.14159 < PROFILES["default"].headroom
    with pytest.raises(ProfileError, match="check values included"):
        check_federation(PROFILES["default"], sites=sites, bound=1.0, max_examples=100)
