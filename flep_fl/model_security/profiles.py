"""CKKS profiles: parameters, and the arithmetic of what they can hold.

Nothing here needs TenSEAL, so that a configuration is checked in milliseconds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from flep_fl.contracts.errors import ConfigError, ProfileError
from flep_fl.model_security import _canonical

CHECK_SLOTS = 8
"""Number of check values that every encrypted update carries (see ``authenticator``)."""

TAG_RANGE = 1024.0
"""A check value's tag is uniform in [-TAG_RANGE, TAG_RANGE)."""

NOISE_STD = 3.24
"""Standard deviation of a coefficient of a fresh symmetric ciphertext's noise: SEAL's clipped, rounded
Gaussian (sigma 3.2) and the rounding of the encoder."""

ENCRYPTIONS = ("symmetric", "public")
"""How updates are encrypted: under the model key itself, or under the public key that belongs to it."""

LARGEST_MODULUS: Mapping[int, Mapping[int, int]] = MappingProxyType(
    {
        128: {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881},
        192: {1024: 19, 2048: 37, 4096: 75, 8192: 152, 16384: 305, 32768: 611},
        256: {1024: 14, 2048: 29, 4096: 58, 8192: 118, 16384: 237, 32768: 476},
    }
)
"""Bits of all primes together that a ring degree allows at a security level (classical bits, ternary
secret): HomomorphicEncryption.org's security standard of 2018, table 1, as SEAL enforces it."""

PLAUSIBLE_EXAMPLES = 100
"""Examples per site that the precision check assumes before any site has counted its own."""

_PEAK = {"symmetric": 6.0, "public": 12.0}
# Largest of a million errors in standard deviations, with a margin. Under the public key an error is not
# Gaussian over the slots but Laplacian, see `Profile.coefficient_noise`; its tail exp(-sqrt(2) x) is longer.

_ALARM = {"symmetric": 8.0 * math.sqrt(2.0), "public": 24.0}
# Where a check value's deviation is no longer noise. Symmetric: 8 standard deviations of the difference of
# two noisy values, 1e-15 a value. Public: exp(-sqrt(2) 24), 2e-15.


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
        A symmetric upload carries the seed of its uniform polynomial in place of the polynomial.
    model_error_limit
        The largest error of a model's weight that is acceptable; a federation beyond it is refused.
    default_bound, default_max_examples
        ``ckks.bound`` and ``ckks.max_examples`` where the configuration leaves them open.
    encryption
        ``symmetric`` or ``public``.
    """

    name: str
    poly_modulus_degree: int
    coeff_mod_bit_sizes: tuple[int, ...]
    scale_bits: int
    complex_packing: bool
    seeded: bool
    model_error_limit: float = 1e-6
    default_bound: float = 64.0
    default_max_examples: int = 16384
    encryption: str = "symmetric"

    @property
    def seeded_uploads(self) -> bool:
        """Whether uploads have the half-size form; a seed cannot stand for anything under a public key."""
        return self.seeded and self.encryption == "symmetric"

    @property
    def packed(self) -> bool:
        """Whether payloads travel as packed coefficients rather than as TenSEAL's message."""
        return self.complex_packing

    @property
    def security_bits(self) -> int:
        """The highest of 256, 192 and 128 bits of security that the parameters reach; 0 below that."""
        bits = sum(self.coeff_mod_bit_sizes)
        reached = [
            level
            for level, table in LARGEST_MODULUS.items()
            if bits <= table.get(self.poly_modulus_degree, 0)
        ]
        return max(reached, default=0)

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
        fields = asdict(self)
        for local in ("model_error_limit", "default_bound", "default_max_examples"):
            del fields[local]  # they say what is acceptable, not what is on the wire
        return hashlib.sha256(_canonical.dump(fields)).hexdigest()

    def ciphertexts(self, length: int) -> int:
        """Count the ciphertexts that hold ``length`` values."""
        return -(-length // self.values_per_ciphertext)

    def slot_counts(self, length: int) -> list[int]:
        """Slots in use, per ciphertext: the ``sizes`` of TenSEAL's message."""
        total = -(-length // 2) if self.complex_packing else length
        return [min(self.slots, total - start) for start in range(0, total, self.slots)]

    @property
    def coefficient_noise(self) -> float:
        """Standard deviation of a coefficient of a fresh ciphertext's noise.

        Under the public key SEAL encrypts one prime higher and divides by that prime. Its noise
        ``e u + e1 + e2 s`` all but vanishes in the division, which leaves the rounding errors of both
        polynomials: ``r0 + r1 s``, uniform of variance 1/12, for a ternary secret ``s`` with two thirds of
        its N coefficients not zero. That is 15.1 for N = 4096. In a slot, ``r1 s`` is a Gaussian value times
        ``s`` at that slot, which is fixed by the key and itself like a Gaussian: the noise of some slots is
        three times that of others, for every ciphertext under the key.
        """
        if self.encryption == "symmetric":
            return NOISE_STD
        weight = self.poly_modulus_degree * 2.0 / 3.0
        fresh = 3.2**2 * (2.0 * weight + 1.0) / 4.0 ** self.coeff_mod_bit_sizes[-1]
        return math.sqrt((2.0 + weight) / 12.0 + fresh)

    def noise_std(self, contributors: int) -> float:
        """Return the standard deviation of one decrypted value of a sum over ``contributors``."""
        return self.coefficient_noise * math.sqrt(self.slots) * math.sqrt(contributors) / self.scale

    def tolerance(self, contributors: int) -> float:
        """Largest deviation of a check value that an honest sum may show.

        8 sqrt(2) standard deviations (the square root of two is there because both the check slot and the
        projected payload are noisy), and 24 under the public key, whose noise has a longer tail.
        """
        return _ALARM[self.encryption] * self.noise_std(contributors)

    def expected_error(self, contributors: int) -> float:
        """Maximum error to expect in a decrypted sum of a million values."""
        return _PEAK[self.encryption] * self.noise_std(contributors)

    def model_error(self, contributors: int, max_examples: int, total_examples: int) -> float:
        """Maximum error to expect in the averaged model.

        The sum is divided by ``sum(n_k) / max_examples``, and its error with it.
        """
        return self.expected_error(contributors) * max_examples / total_examples

    def needed(self, sites: int, bound: float) -> float:
        """Bound on a coefficient / scale of the sum over ``sites``, to be held against :attr:`headroom`.

        A coefficient of an encoded polynomial is at most ``4 / pi`` times the largest value where every slot
        carries two of them, and the value itself where it carries one. The share and the check values sit
        in a few slots and count by their part of all slots: the share with at most 1, a projection (its
        deviation is the payload's root mean square) with at most 8 times the bound. Tags are independent of
        everything, so that their sum over the sites grows by its square root: 8 standard deviations.
        """
        values = bound * (4.0 / math.pi if self.complex_packing else 1.0)
        others = (1.0 + CHECK_SLOTS * 8.0 * bound) / self.slots
        aligned = sites * CHECK_SLOTS * TAG_RANGE / self.slots
        # eight values in five slots at most, each a uniform value times a sine or a cosine
        terms = 5.0 if self.complex_packing else float(CHECK_SLOTS)
        spread = 8.0 * TAG_RANGE * math.sqrt(terms / 3.0 * sites) / self.slots
        return sites * (values + others) + min(aligned, spread)


PROFILES: dict[str, Profile] = {
    "default": Profile("default", 4096, (60, 49), 40, complex_packing=True, seeded=True),
    "compact": Profile(
        "compact",
        4096,
        (40, 20),
        32,
        complex_packing=True,
        seeded=True,
        model_error_limit=5e-5,  # a twentieth of one step of Adam at a learning rate of 0.001
        default_bound=8.0,
        default_max_examples=4096,
    ),
    "classic": Profile("classic", 4096, (60, 49), 40, complex_packing=False, seeded=False),
}


def vector_length(parameters: int, *, checked: bool) -> int:
    """Count the values of an update: the weights, the share, and the check values where there are any."""
    return parameters + 1 + (CHECK_SLOTS if checked else 0)


def get_profile(name: str, encryption: str = "symmetric") -> Profile:
    """Look a profile up by name.

    Raises
    ------
    ConfigError
        There is no such profile or encryption.
    """
    if name not in PROFILES:
        raise ConfigError(
            "ckks.profile names no profile", expected=" or ".join(sorted(PROFILES)), found=repr(name)
        )
    if encryption not in ENCRYPTIONS:
        raise ConfigError(
            "ckks.encryption is not known", expected=" or ".join(ENCRYPTIONS), found=repr(encryption)
        )
    return replace(PROFILES[name], encryption=encryption)


def check_security(profile: Profile) -> None:
    """Refuse parameters below 128 bits of security.

    Raises
    ------
    ProfileError
        Naming the ring degree's largest modulus.
    """
    if profile.security_bits < 128:
        allowed = LARGEST_MODULUS[128].get(profile.poly_modulus_degree)
        raise ProfileError(
            f"ckks.profile={profile.name} has less than 128 bits of security",
            expected=f"a ring degree among {', '.join(map(str, LARGEST_MODULUS[128]))}"
            if allowed is None
            else f"at most {allowed} bits of primes at N={profile.poly_modulus_degree}",
            found=f"{sum(profile.coeff_mod_bit_sizes)} bits at N={profile.poly_modulus_degree}",
            remedy="Take a larger ring or smaller primes",
        )


def check_federation(profile: Profile, *, sites: int, bound: float, max_examples: int) -> None:
    """Refuse a federation whose sum could wrap, whose model would lose precision, or that is not secure.

    The precision check assumes that every site has :data:`PLAUSIBLE_EXAMPLES` examples: the true numbers
    are private and not known when a federation is configured.

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
        A number is out of its range, the headroom is exceeded, or the model's error could exceed the
        profile's :attr:`Profile.model_error_limit`.
    """
    check_security(profile)
    if not (math.isfinite(bound) and bound > 0):
        raise ProfileError("ckks.bound must be a positive number", found=bound)
    if sites < 1:
        raise ProfileError("federation.sites must be at least 1", found=sites)
    if max_examples < 1:
        raise ProfileError("ckks.max_examples must be at least 1", found=max_examples)
    needed = profile.needed(sites, bound)
    if needed > profile.headroom:
        raise ProfileError(
            "ckks.bound times federation.sites exceeds what a sum can hold; it would wrap silently",
            expected=f"at most {profile.headroom:g} (ckks.profile={profile.name}), check values included",
            found=f"{needed:g} for ckks.bound={bound:g} and federation.sites={sites}",
            remedy=_more_room(profile, sites),
        )
    error = profile.model_error(sites, max_examples, sites * PLAUSIBLE_EXAMPLES)
    limit = profile.model_error_limit
    if error > limit:
        largest = int(max_examples * limit / error)
        raise ProfileError(
            "ckks.max_examples is so large that the model could lose more than "
            f"{limit:g} ({PLAUSIBLE_EXAMPLES} examples a site assumed)",
            expected=f"at most {largest} for federation.sites={sites} and ckks.profile={profile.name}",
            found=max_examples,
            remedy="Lower ckks.max_examples to the largest number of examples that a site has"
            + _EXACT * (profile.name == "compact"),
        )


_EXACT = ", or set ckks.profile=default, which is 256 times as exact"


def _more_room(profile: Profile, sites: int) -> str:
    """Return what to do about a sum that does not fit: the largest bound of this profile, or another one."""
    fixed = profile.needed(sites, 0.0)
    slope = profile.needed(sites, 1.0) - fixed
    largest = (profile.headroom - fixed) / slope
    if largest <= 0:
        return "Lower federation.sites or set ckks.profile=default"
    hint = f"Lower ckks.bound to {math.floor(largest * 100) / 100:g} at most, or federation.sites"
    return hint + (", or set ckks.profile=default" if profile.name == "compact" else "")


def describe_federation(profile: Profile, *, sites: int, bound: float, max_examples: int) -> str:
    """Say in one line what the parameters give: security, headroom and the model's expected error."""
    bits, degree = sum(profile.coeff_mod_bit_sizes), profile.poly_modulus_degree
    error = profile.model_error(sites, max_examples, sites * PLAUSIBLE_EXAMPLES)
    return (
        f"CKKS profile {profile.name}, {profile.encryption} encryption: {profile.security_bits}-bit security "
        f"(N={degree}, {bits} of {LARGEST_MODULUS[128][degree]} bits); sums up to "
        f"{profile.needed(sites, bound):.3g} of {profile.headroom:g} ({sites} sites, |c w| <= {bound:g}); "
        f"model error up to {error:.1g} at {PLAUSIBLE_EXAMPLES} examples a site "
        f"(limit {profile.model_error_limit:g})"
    )
