"""Period and bias of the chaotic lanes, by checks that bad generators fail.

The invariant density of the logistic map is not flat, and need not be: only the order of the values is used.
So values are put through the map's distribution function F(x) = 2/pi asin(sqrt(x)), which keeps their order,
before they are held against the uniform distribution.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from flep_fl.data_security import chaos
from flep_fl.data_security.limits import chi_square_limit
from flep_fl.data_security.stream import keystream32

LEVEL = 1e-4
IMAGE_BLOCKS = 1 << 14
DISTANCES = (1, 2, 16, 128, 512, 1024, 2048, 4096, 8192)
KEYS = [hashlib.sha256(f"lanes/{index}".encode()).digest() for index in range(8)]


def steps_before_repeat(orbits: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return for each orbit (one per column) the number of steps before a state comes back."""
    steps = len(orbits)
    found = np.full(orbits.shape[1], steps)
    for lane, orbit in enumerate(orbits.T):
        _, first, inverse = np.unique(orbit, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] < np.arange(steps))
        if repeated.size:
            found[lane] = repeated[0]
    return found


def flatten(values: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Put values through the distribution function of the logistic map; uniform in (0, 1)."""
    return 2 / np.pi * np.arcsin(np.sqrt((values + 0.5) / 2.0**32))


def flaws(uniform: NDArray[np.float64]) -> set[str]:
    """Name what is wrong with a sequence that should be independent and uniform in (0, 1)."""
    found = set()
    count = uniform.size
    levels = np.minimum((uniform * 256).astype(int), 255)
    # Level 0 is judged by itself: the keyed change of the low half pushes lanes away from the fixed point 0.
    observed = np.bincount(levels, minlength=256)[1:]
    expected = observed.sum() / 255
    statistic = float(((observed - expected) ** 2).sum() / expected)
    if not chi_square_limit(254, 1 - LEVEL) < statistic < chi_square_limit(254, LEVEL):
        found.add("histogram")
    reach = 4.0 / math.sqrt(count)
    for bit in range(8):
        if abs(2 * np.mean((levels >> bit) & 1) - 1) > reach + 2 / 256:
            found.add("bit bias")
    centred = uniform - uniform.mean()
    for lag in (1, 2, 3, 7, 16, 255, 256, 1024):
        if abs(np.mean(centred[:-lag] * centred[lag:]) * 12) > reach:
            found.add("serial correlation")
    return found


def congruential(count: int) -> NDArray[np.float64]:
    """Low bytes of a linear congruential generator: a period of 256."""
    state, values = 1, []
    for _ in range(256):
        state = (1103515245 * state + 12345) & 0xFF
        values.append((state + 0.5) / 256)
    return np.resize(np.array(values), count)


def float_orbits(steps: int, lanes: int) -> NDArray[np.float32]:
    """float32 logistic orbits, as published ciphers use them."""
    state = np.linspace(0.1, 0.45, lanes).astype(np.float32)
    orbits = np.empty((steps, lanes), np.float32)
    for row in orbits:
        state = np.float32(4) * state * (np.float32(1) - state)
        row[...] = state
    return orbits


@pytest.fixture
def long_lanes() -> NDArray[np.uint32]:
    """64 lanes, each with a perturbation of its own, run on for 32,768 steps: (steps, lanes)."""
    steps, lanes = 1 << 15, 64
    state, perturbation = keystream32(KEYS[0], 2 * lanes).reshape(2, lanes).astype(np.uint64)
    orbits = np.empty((steps, lanes), np.uint32)
    for row in orbits:
        row[...] = chaos._iterate(state, perturbation >> np.uint64(16), 1)
    return orbits


def test_no_lane_comes_near_its_period(long_lanes: NDArray[np.uint32]) -> None:
    periods = steps_before_repeat(long_lanes)
    assert periods.min() > 500 * chaos.STEPS
    assert np.median(periods) > 1 << 13


def test_float_orbits_repeat_within_one_image() -> None:
    """The finding that the fixed-point lanes answer: far fewer steps than an image has sub-blocks."""
    assert np.median(steps_before_repeat(float_orbits(IMAGE_BLOCKS, 32))) < IMAGE_BLOCKS / 2


@pytest.mark.parametrize("key", range(len(KEYS)))
def test_the_sequence_of_an_image_is_unbiased(key: int) -> None:
    sequence = chaos.chaotic_sequence(KEYS[key : key + 1], IMAGE_BLOCKS)[0]
    assert flaws(flatten(sequence)) == set()


def test_the_lowest_values_are_thinned_but_not_missing() -> None:
    values = flatten(chaos.chaotic_sequence(KEYS, IMAGE_BLOCKS))
    assert 0.4 < np.mean(values < 1 / 256) * 256 < 1.05


def test_every_bit_below_the_sixteenth_is_fair() -> None:
    words = chaos.chaotic_sequence(KEYS, IMAGE_BLOCKS).ravel()
    for bit in range(16):
        assert abs(2 * np.mean((words >> np.uint32(bit)) & 1) - 1) < 4 / math.sqrt(words.size)


def test_lanes_of_different_keys_are_uncorrelated() -> None:
    values = flatten(chaos.chaotic_sequence(KEYS, IMAGE_BLOCKS))
    correlation = np.corrcoef(values) - np.eye(len(KEYS))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(IMAGE_BLOCKS)


def test_the_permutation_is_unbiased() -> None:
    """Disjoint neighbours compare like coin tosses, and no place prefers a source."""
    orders = chaos.chaotic_order(KEYS, IMAGE_BLOCKS)
    tosses = (orders[:, 0::2] < orders[:, 1::2]).ravel()
    assert abs(2 * tosses.mean() - 1) < 4 / math.sqrt(tosses.size)
    for order in orders:
        assert flaws((order + 0.5) / IMAGE_BLOCKS) <= {"histogram"}  # a permutation is flat by construction
        fixed = np.count_nonzero(order == np.arange(IMAGE_BLOCKS))
        assert fixed <= 8  # Poisson of mean 1


def ties(sequences: NDArray[np.uint32]) -> set[str]:
    """Name how the places of the sub-blocks of images (N, count) tell of each other.

    Only ranks are used. For each distance within the sequence: do two comparisons of disjoint pairs come out
    alike, and does the map, applied up to eight times to one sub-block's place, point at the other's?
    """
    found = set()
    count = sequences.shape[1]
    ranks = (np.argsort(np.argsort(sequences, axis=-1, kind="stable"), axis=-1) + 0.5) / count
    for distance in DISTANCES:
        pairs = ranks.reshape(len(ranks), -1, 2, distance)
        first, second = pairs[:, :, 0].ravel(), pairs[:, :, 1].ravel()
        reach = 4.5 / math.sqrt(first.size)
        if abs(2 * np.mean(first < second) - 1) > reach:
            found.add("order")
        # In ranks the logistic map is the tent map. The cosine of the error has mean 0 and variance 1/2.
        guess = first
        for _ in range(8):
            guess = 1 - np.abs(2 * guess - 1)
            if abs(np.mean(np.cos(2 * np.pi * (guess - second))) * math.sqrt(2)) > reach:
                found.add("orbit")
    return found


def shared_lanes(keys: list[bytes], values: int, stride: int) -> NDArray[np.uint32]:
    """Take several values from each lane, ``stride`` steps apart."""
    lanes = IMAGE_BLOCKS // values
    sequences = np.empty((len(keys), values, lanes), np.uint32)
    for sequence, key in zip(sequences, keys, strict=True):
        state, perturbation = keystream32(key, 2 * lanes).reshape(2, lanes).astype(np.uint64)
        for row in sequence:
            row[...] = chaos._iterate(state, perturbation >> np.uint64(16), stride)
    return sequences.reshape(len(keys), -1)


def test_sub_blocks_are_not_tied() -> None:
    keys = [hashlib.sha256(f"ties/{index}".encode()).digest() for index in range(32)]
    assert ties(chaos.chaotic_sequence(keys, IMAGE_BLOCKS)) == set()


@pytest.mark.parametrize(
    ("stride", "expected"), [(1, {"order", "orbit"}), (2, {"order", "orbit"}), (6, {"orbit"})]
)
def test_sharing_a_lane_ties_them(stride: int, expected: set[str]) -> None:
    """x < 4x(1 - x) for two thirds of all x; a long stride hides that, but not the orbit itself."""
    assert ties(shared_lanes(KEYS, 16, stride)) == expected


def test_bad_generators_are_found_out() -> None:
    assert flaws(congruential(IMAGE_BLOCKS)) == {"histogram", "serial correlation"}
    x = np.random.default_rng(0).random(IMAGE_BLOCKS)
    assert flaws(x) == set()
    assert "histogram" in flaws(x**1.2)
    assert "bit bias" in flaws(np.where(x < 0.05, x, np.floor(x * 128) / 128 + 0.5 / 256))
    assert "serial correlation" in flaws(np.sort(x))
    # The raw values of the map, not put through its distribution function.
    assert "histogram" in flaws(chaos.chaotic_sequence(KEYS[:1], IMAGE_BLOCKS)[0] / 2.0**32)
