"""NIST SP 800-22 on the chaotic lanes and the permutation: ``python -m benchmarks.randomness``.

Each generator gives a number of sequences of a million bits; a test is passed when the share of sequences
with p >= 0.01 is at least ``0.99 - 3 sqrt(0.99 * 0.01 / sequences)`` (SP 800-22 rev. 1a, section 4.2.1). Of
tests with several p-values the package tells the least, which is held against 0.01 over their number. Keys
are fixed, so every run gives the same figures. Needs the extra ``bench`` (the C code of NIST behind a Python
module; it is compiled at installation). That package lacks the templates of the non-overlapping test.

Three generators are bad on purpose and must fail: the low bits of a linear congruential generator, a float32
logistic orbit (it falls into a cycle shorter than one image), and the fixed-point map without its keyed
perturbation. So must a fourth, two successive values of one lane instead of two lanes: they are a point and
its image under the logistic map, and ``x < 4x(1 - x)`` holds for two thirds of all x.

Exit code 0: every verdict is the expected one; 1: some is not.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import FlepError, MissingExtraError
from flep_fl.data_security.chaos import chaotic_order, chaotic_sequence
from flep_fl.data_security.stream import keystream
from flep_fl.reporting.cipher_tables import markdown

Bits = NDArray[np.uint8]
"""uint8 (n,), 0 or 1."""

SEQUENCE_BITS = 1 << 20
IMAGE_BLOCKS = 1 << 14
"""Sub-blocks of a 256 x 256 image at side 2."""

SIGNIFICANCE = 0.01
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Generator:
    """A source of bits, and whether it ought to pass.

    Attributes
    ----------
    name
        For the table.
    bits
        ``bits(seed, count)`` gives uint8 (count,).
    good
        The expected verdict.
    """

    name: str
    bits: Callable[[int, int], Bits]
    good: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one generator: sequences passed out of those tested, by test."""

    passed: dict[str, tuple[int, int]]

    @property
    def failures(self) -> list[str]:
        """Names of the tests whose share of passing sequences is too low."""
        return [name for name, (good, tested) in self.passed.items() if good < required(tested)]


def required(sequences: int) -> float:
    """Return the least number of passing sequences out of ``sequences``."""
    share = 1 - SIGNIFICANCE
    return sequences * (share - 3 * math.sqrt(share * SIGNIFICANCE / sequences)) if sequences else 0.0


# --- generators -------------------------------------------------------------------------------------


def keys(seed: int, first: int, count: int) -> list[bytes]:
    """Return ``count`` fixed keys of 32 bytes."""
    return [hashlib.sha256(f"randomness/{seed}/{first + i}".encode()).digest() for i in range(count)]


def key_stream_bits(seed: int, count: int) -> Bits:
    """AES-256-CTR: the control."""
    return np.unpackbits(keystream(keys(seed, 0, 1)[0], count // 8))


def lane_bits(seed: int, count: int) -> Bits:
    """One bit a value: x >= 1/2, the classical bit of a logistic orbit; an image's values from each key."""
    return _per_image(
        seed, count, IMAGE_BLOCKS, lambda batch: chaotic_sequence(batch, IMAGE_BLOCKS) >> np.uint32(31)
    )


def lane_low_bits(seed: int, count: int) -> Bits:
    """Low 16 bits of each value, which break ties between the high ones."""

    def low(batch: Sequence[bytes]) -> NDArray[Any]:
        words = chaotic_sequence(batch, IMAGE_BLOCKS).astype("<u2")
        return np.unpackbits(words.view(np.uint8), axis=-1)

    return _per_image(seed, count, 16 * IMAGE_BLOCKS, low)


def neighbour_bits(seed: int, count: int) -> Bits:
    """One bit a pair of neighbouring places: which of the two sub-blocks comes from further down.

    The pairs are disjoint, so a uniformly random permutation gives independent fair bits.
    """
    return _per_image(
        seed, count, IMAGE_BLOCKS // 2, lambda batch: _compare(chaotic_order(batch, IMAGE_BLOCKS), 1)
    )


def distant_bits(seed: int, count: int) -> Bits:
    """One bit a pair of sub-blocks half an image apart: which moves further down."""

    def compare(batch: Sequence[bytes]) -> NDArray[Any]:
        places = np.argsort(chaotic_order(batch, IMAGE_BLOCKS), axis=-1)
        return _compare(places, IMAGE_BLOCKS // 2)

    return _per_image(seed, count, IMAGE_BLOCKS // 2, compare)


def shared_lane_bits(seed: int, count: int) -> Bits:
    """One bit a lane: whether its next value would be larger."""

    def compare(batch: Sequence[bytes]) -> NDArray[Any]:
        values = chaotic_sequence(batch, IMAGE_BLOCKS).astype(np.uint64)
        return values < (values * (np.uint64(0xFFFFFFFF) - values)) >> np.uint64(30)

    return _per_image(seed, count, IMAGE_BLOCKS, compare)


def congruential_bits(seed: int, count: int) -> Bits:
    """Low bytes of ``x -> 1103515245 x + 12345`` modulo 2^31: a period of 256."""
    # The low byte depends on the low byte alone, so one period is enough.
    state, period = seed & 0xFF, []
    for _ in range(256):
        state = (1103515245 * state + 12345) & 0xFF
        period.append(state)
    return np.unpackbits(np.resize(np.array(period, np.uint8), count // 8))


def float_orbit_bits(seed: int, count: int) -> Bits:
    """Bits x >= 1/2 of one float32 logistic orbit, as published image ciphers use it."""
    x, four, one = np.float32(0.1 + 0.01 * seed), np.float32(4), np.float32(1)
    orbit = np.empty(1 << 14, np.float32)
    for step in range(orbit.size):
        x = four * x * (one - x)
        orbit[step] = x
    # By then it is in its cycle; repeating the second half only spares a long loop.
    return np.resize(orbit[orbit.size // 2 :] >= 0.5, count).astype(np.uint8)


def unperturbed_bits(seed: int, count: int) -> Bits:
    """Bits of many fixed-point lanes run on for 1,024 steps without the keyed perturbation."""
    lanes = count // 1024
    state = np.random.default_rng(seed).integers(0, 1 << 32, lanes, dtype=np.uint64)
    bits = np.empty((1024, lanes), np.uint8)
    for row in bits:
        state = (state * (np.uint64(0xFFFFFFFF) - state)) >> np.uint64(30)
        row[...] = state >> np.uint64(31)
    return bits.T.ravel()


def _per_image(
    seed: int, count: int, bits_an_image: int, function: Callable[[Sequence[bytes]], NDArray[Any]]
) -> Bits:
    images = -(-count // bits_an_image)
    parts = [
        function(keys(seed, first, min(_BATCH, images - first))).astype(np.uint8).ravel()
        for first in range(0, images, _BATCH)
    ]
    return np.concatenate(parts)[:count]


def _compare(values: NDArray[np.intp], distance: int) -> NDArray[Any]:
    """Return ``values[i] < values[i + distance]`` over disjoint pairs, (N, count / 2)."""
    pairs = values.reshape(len(values), -1, 2, distance)
    return (pairs[:, :, 0] < pairs[:, :, 1]).reshape(len(values), -1)


GENERATORS = (
    Generator("AES-256-CTR (control)", key_stream_bits, good=True),
    Generator("chaotic lanes, x >= 1/2", lane_bits, good=True),
    Generator("chaotic lanes, low 16 bits", lane_low_bits, good=True),
    Generator("permutation, neighbours", neighbour_bits, good=True),
    Generator("permutation, distant", distant_bits, good=True),
    Generator("bad: LCG, low bytes", congruential_bits, good=False),
    Generator("bad: float32 logistic orbit", float_orbit_bits, good=False),
    Generator("bad: two values of a lane", shared_lane_bits, good=False),
    Generator("bad: lanes, no perturbation", unperturbed_bits, good=False),
)


# --- battery ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Test:
    """One test of the battery.

    Attributes
    ----------
    run
        Takes bytes of 0 and 1; gives a p-value, the least one where there are several.
    values
        How many p-values that is the least of.
    """

    run: Callable[[bytes], float]
    values: int = 1

    def passes(self, bits: bytes) -> bool:
        """Whether the sequence passes, by Bonferroni's correction."""
        return self.run(bits) >= SIGNIFICANCE / self.values


def battery() -> dict[str, Test]:
    """Return the tests by name.

    Raises
    ------
    MissingExtraError
        The package is not installed.
    """
    try:
        suite: Any = importlib.import_module("sp80022suite")
    except ImportError as exc:
        raise MissingExtraError(
            "The battery needs the package sp80022suite", remedy="Run: pip install -e '.[bench]'"
        ) from exc
    return {
        "frequency": Test(suite.frequency),
        "block frequency": Test(lambda bits: float(suite.block_frequency(128, bits))),
        "runs": Test(suite.runs),
        "longest run": Test(suite.longest_run_of_ones),
        "rank": Test(suite.rank),
        "spectral": Test(suite.discrete_fourier_transform),
        "overlapping": Test(lambda bits: float(suite.overlapping_template_matchings(9, bits))),
        "universal": Test(suite.universal),
        "linear complexity": Test(lambda bits: float(suite.linear_complexity(500, bits))),
        "serial": Test(lambda bits: float(suite.serial(16, bits)), values=2),
        "approx. entropy": Test(lambda bits: float(suite.approximate_entropy(10, bits))),
        "cumulative sums": Test(suite.cumulative_sums, values=2),
        "excursions": Test(suite.random_excursions, values=8),
        "exc. variant": Test(suite.random_excursions_variant, values=18),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what C code prints ("igamc: UNDERFLOW" for a p-value of zero) out of the table."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def run_battery(generator: Generator, tests: dict[str, Test], *, sequences: int, bits: int) -> Verdict:
    """Run all tests on ``sequences`` sequences; a test that does not apply to a sequence does not count."""
    passed = dict.fromkeys(tests, (0, 0))
    for seed in range(sequences):
        sequence = generator.bits(seed, bits).tobytes()
        for name, test in tests.items():
            try:
                with quiet():
                    success = test.passes(sequence)
            except ValueError:
                # The excursion tests need 500 zero crossings; three sequences in five have them.
                continue
            good, tested = passed[name]
            passed[name] = (good + success, tested + 1)
    return Verdict(passed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the battery on every generator and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=10, help="sequences per generator (default 10)")
    parser.add_argument("--bits", type=int, default=SEQUENCE_BITS, help="bits per sequence (default 2^20)")
    options = parser.parse_args(arguments)
    if options.sequences < 1 or options.bits < SEQUENCE_BITS or options.bits % (16 * 1024):
        parser.error("--sequences must be 1 or more, --bits a multiple of 16384 from 1048576")
    try:
        tests = battery()
    except FlepError as error:
        print(f"error ({type(error).__name__}): {error}", file=sys.stderr)
        return 1
    rows, surprises = [], []
    for generator in GENERATORS:
        start = time.perf_counter()
        verdict = run_battery(generator, tests, sequences=options.sequences, bits=options.bits)
        failures = verdict.failures
        if generator.good == bool(failures):
            surprises.append(generator.name)
        rows.append(
            [
                generator.name,
                *(f"{good}/{tested}" for good, tested in verdict.passed.values()),
                "fails " + str(len(failures)) if failures else "passes",
            ]
        )
        print(f"{generator.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    print(markdown(["generator", *tests, "verdict"], rows))
    print(f"\nA test needs {required(options.sequences):.2f} of {options.sequences} sequences.")
    for name in surprises:
        print(f"Not as expected: {name}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
