"""CKKS profiles: parameters, and the arithmetic of what they can hold.

Nothing here needs TenSEAL, so that a configuration is checked in milliseconds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass

from flep_fl.contracts.errors import ConfigError, ProfileError
from flep_fl.model_security import _canonical

CHECK_SLOTS = 8
"""Number of check values that every encrypted update carries (see ``authenticator``)."""

TAG_RANGE = 1024.0
"""A check value's tag is uniform in [-TAG_RANGE, TAG_RANGE)."""

NOISE_STD = 3.24
"""Standard deviation of a coefficient of a fresh symmetric ciphertext's noise: SEAL's clipped, rounded
Gaussian (sigma 3.2) and the rounding of the encoder."""

MODEL_ERROR_LIMIT = 1e-6
"""The largest error of a model weight that CKKS may cause."""

PLAUSIBLE_EXAMPLES = 100
"""Examples per site that the precision check assumes before any site has counted its own."""

_PEAK = 6.0  # largest of a million Gaussian values, in standard deviations, with a margin


@dataclass(frozen=True, slots=True)
class Profile:
    """One set of CKKS parameters and how vectors are packed into it.

    Attributes
    ----------
    name
        Name in the configuration (``ckks.profile``).
    poly_modulus_degree
        Ring degree N.
    coeff_mod_bit_sizes
        Bits of the primes; the last one is never on the wire.
    scale_bits
        Binary logarithm of the encoding scale.
    complex_packing
        Two values per slot, as real and imaginary part.
    seeded
        An upload carries the seed of its uniform polynomial in place of the polynomial.
    """

    name: str
    poly_modulus_degree: int
    coeff_mod_bit_sizes: tuple[int, ...]
    scale_bits: int
    complex_packing: bool
    seeded: bool

    @property
    def scale(self) -> float:
        """The encoding scale."""
        return float(2.0**self.scale_bits)

    @property
    def slots(self) -> int:
        """Complex slots of one ciphertext, N / 2."""
        return self.poly_modulus_degree // 2

    @property
    def values_per_ciphertext(self) -> int:
        """Real values in one ciphertext: N with complex packing, N / 2 without."""
        return self.poly_modulus_degree if self.complex_packing else self.slots

    @property
    def headroom(self) -> float:
        """Bound on the magnitude of a polynomial's coefficient / scale; beyond it sums wrap silently."""
        return float(2.0 ** (sum(self.coeff_mod_bit_sizes[:-1]) - 1 - self.scale_bits))

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters, 64 hexadecimal digits."""
        return hashlib.sha256(_canonical.dump(asdict(self))).hexdigest()

    def ciphertexts(self, length: int) -> int:
        """Count the ciphertexts that hold ``length`` values."""
        return -(-length // self.values_per_ciphertext)

    def slot_counts(self, length: int) -> list[int]:
        """Slots in use, per ciphertext: the ``sizes`` of TenSEAL's message."""
        total = -(-length // 2) if self.complex_packing else length
        return [min(self.slots, total - start) for start in range(0, total, self.slots)]

    def noise_std(self, contributors: int) -> float:
        """Return the standard deviation of one decrypted value of a sum over ``contributors``."""
        return NOISE_STD * math.sqrt(self.slots) * math.sqrt(contributors) / self.scale

    def tolerance(self, contributors: int) -> float:
        """Largest deviation of a check value that an honest sum may show (8 standard deviations).

        The square root of two is there because both the check slot and the projected payload are noisy.
        """
        return 8.0 * math.sqrt(2.0) * self.noise_std(contributors)

    def expected_error(self, contributors: int) -> float:
        """Maximum error to expect in a decrypted sum of a million values."""
        return _PEAK * self.noise_std(contributors)

    def model_error(self, contributors: int, max_examples: int, total_examples: int) -> float:
        """Maximum error to expect in the averaged model.

        The sum is divided by ``sum(n_k) / max_examples``, and its error with it.
        """
        return self.expected_error(contributors) * max_examples / total_examples


PROFILES: dict[str, Profile] = {
    "default": Profile("default", 4096, (60, 49), 40, complex_packing=True, seeded=True),
    "classic": Profile("classic", 4096, (60, 49), 40, complex_packing=False, seeded=False),
}


def vector_length(parameters: int, *, checked: bool) -> int:
    """Count the values of an update: the weights, the share, and the check values where there are any."""
    return parameters + 1 + (CHECK_SLOTS if checked else 0)


def get_profile(name: str) -> Profile:
    """Look a profile up by name.

    Raises
    ------
    ConfigError
        There is no such profile.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(
            "ckks.profile names no profile", expected=" or ".join(sorted(PROFILES)), found=repr(name)
        ) from None


def check_federation(profile: Profile, *, sites: int, bound: float, max_examples: int) -> None:
    """Refuse a federation whose sum could wrap or whose model would lose precision.

    A coefficient of an encoded polynomial is at most ``4 / pi`` times the largest value when every slot
    carries two of them, and each check value adds at most its magnitude divided by the number of slots. The
    precision check assumes that every site has :data:`PLAUSIBLE_EXAMPLES` examples: the true numbers are
    private and not known when a federation is configured.

    Parameters
    ----------
    profile
        The profile in use.
    sites
        Number of sites, all of which may contribute to one sum.
    bound
        Largest ``|c_k w_k|`` that a site may send (``ckks.bound``).
    max_examples
        The cap that example counts are divided by (``ckks.max_examples``).

    Raises
    ------
    ProfileError
        A number is out of its range, the headroom is exceeded, or the model's error could exceed
        :data:`MODEL_ERROR_LIMIT`.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise ProfileError("ckks.bound must be a positive number", found=bound)
    if sites < 1:
        raise ProfileError("federation.sites must be at least 1", found=sites)
    if max_examples < 1:
        raise ProfileError("ckks.max_examples must be at least 1", found=max_examples)
    reach = max(bound, 1.0)  # c_k itself, at most 1, travels beside the weights
    check_value = TAG_RANGE + 8.0 * reach  # a projection has the rms of the payload as its deviation
    coefficient = sites * (reach * 4.0 / math.pi + CHECK_SLOTS * check_value / profile.slots)
    if coefficient > profile.headroom:
        raise ProfileError(
            "ckks.bound times federation.sites exceeds what a sum can hold; it would wrap silently",
            expected=f"at most {profile.headroom:g} (ckks.profile={profile.name}), check values included",
            found=f"{coefficient:g} for ckks.bound={bound:g} and federation.sites={sites}",
            remedy="Lower ckks.bound or federation.sites",
        )
    error = profile.model_error(sites, max_examples, sites * PLAUSIBLE_EXAMPLES)
    if error > MODEL_ERROR_LIMIT:
        largest = int(max_examples * MODEL_ERROR_LIMIT / error)
        raise ProfileError(
            "ckks.max_examples is so large that the model could lose more than "
            f"{MODEL_ERROR_LIMIT:g} ({PLAUSIBLE_EXAMPLES} examples a site assumed)",
            expected=f"at most {largest} for federation.sites={sites} and ckks.profile={profile.name}",
            found=max_examples,
            remedy="Lower ckks.max_examples to the largest number of examples that a site has",
        )
