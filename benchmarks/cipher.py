"""Speed and memory of the image cipher: ``python -m benchmarks.cipher``.

Grey images of 28 to 4096 pixels square, without the denoiser; beside them, in the same run, AES-256-GCM on
the same bytes (one call an image, associated data empty) and a memory copy. Every figure is the median of
repetitions within a time limit. Peak memory is what Python and NumPy allocate on top of the batch, results
included (tracemalloc, in a run of its own). Set OMP_NUM_THREADS=1 to measure one core.
"""

from __future__ import annotations

import argparse
import gc
import secrets
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from benchmarks.options import bits
from flep_fl.contracts.errors import FlepError
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher
from flep_fl.data_security.presets import get_preset
from flep_fl.reporting.cipher_tables import markdown

SIDES = (28, 64, 256, 1024, 4096)
BATCH_PIXELS = 64 * 256 * 256
MAX_BATCH = 4096
MAX_RUNS = 25


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians for one size.

    Attributes
    ----------
    side, batch
        Pixels a side; images a call.
    encrypt, decrypt, aead, copy
        Seconds a batch.
    encrypt_peak, decrypt_peak
        Peak memory over the bytes of the batch.
    """

    side: int
    batch: int
    encrypt: float
    decrypt: float
    aead: float
    copy: float
    encrypt_peak: float
    decrypt_peak: float

    def nanoseconds(self, seconds: float) -> float:
        """Return ns a pixel."""
        return seconds * 1e9 / (self.batch * self.side**2)

    def row(self) -> list[str]:
        """Return the row of the table."""
        pixels = self.batch * self.side**2
        milliseconds = [1000 * seconds / self.batch for seconds in (self.encrypt, self.decrypt)]
        return [
            str(self.side),
            str(self.batch),
            *(f"{value:.3f}" for value in milliseconds),
            *(f"{pixels / seconds / 1e6:.0f}" for seconds in (self.encrypt, self.decrypt)),
            *(f"{self.nanoseconds(seconds):.1f}" for seconds in (self.encrypt, self.decrypt)),
            *(f"{seconds / self.aead:.1f}" for seconds in (self.encrypt, self.decrypt)),
            *(f"{seconds / self.copy:.0f}" for seconds in (self.encrypt, self.decrypt)),
            f"{self.encrypt_peak:.1f}",
            f"{self.decrypt_peak:.1f}",
        ]


HEADER = (
    "side",
    "batch",
    "enc ms",
    "dec ms",
    "enc MB/s",
    "dec MB/s",
    "enc ns/px",
    "dec ns/px",
    "enc/AES-GCM",
    "dec/AES-GCM",
    "enc/copy",
    "dec/copy",
    "enc peak/batch",
    "dec peak/batch",
)


def natural_images(count: int, side: int) -> NDArray[np.uint8]:
    """Return smooth random images with fine grain, uint8 (count, side, side)."""
    rng = np.random.default_rng(side)
    row, column = (np.cumsum(rng.normal(size=(count, side)), 1) for _ in range(2))
    surface = (row[:, :, None] + column[:, None, :]).astype(np.float32)
    surface *= np.float32(60 / max(1.0, float(surface.std())))
    surface += rng.standard_normal(surface.shape, np.float32) * 4 + 128
    return np.clip(surface, 0, 255).astype(np.uint8)


def median_seconds(function: Callable[[], object], limit: float) -> float:
    """Return the median time of a call after a first that does not count, in about ``limit`` seconds."""
    function()
    times: list[float] = []
    while not times or (sum(times) < limit and len(times) < MAX_RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak of what one call allocates, in bytes."""
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure(cipher: ThreeLayerCipher, side: int, limit: float) -> Speed:
    """Measure one size."""
    batch = min(MAX_BATCH, max(1, BATCH_PIXELS // side**2))
    images = natural_images(batch, side)
    raw = [image.tobytes() for image in images]
    aead = AESGCM(AESGCM.generate_key(256))
    envelopes = cipher.encrypt(images)
    return Speed(
        side,
        batch,
        encrypt=median_seconds(lambda: cipher.encrypt(images), limit),
        decrypt=median_seconds(lambda: cipher.decrypt(envelopes), limit),
        aead=median_seconds(lambda: [aead.encrypt(secrets.token_bytes(12), one, None) for one in raw], limit),
        copy=median_seconds(images.copy, limit),
        encrypt_peak=peak_bytes(lambda: cipher.encrypt(images)) / images.nbytes,
        decrypt_peak=peak_bytes(lambda: cipher.decrypt(envelopes)) / images.nbytes,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cipher", default="flep", help="preset (default flep)")
    parser.add_argument("--noise-std", type=float, default=25.0, help="grey levels (default 25)")
    parser.add_argument("--bits", type=bits, help="wire bits, such as 8 or 8,6,6,6 (default: the preset's)")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="pixels a side")
    parser.add_argument("--seconds", type=float, default=1.0, help="limit per figure (default 1)")
    options = parser.parse_args(arguments)
    if min(options.sides) < 1 or options.seconds <= 0:
        parser.error("--sides and --seconds must be positive")
    try:
        parameters = get_preset(options.cipher).parameters
        if options.bits is not None:
            parameters = replace(parameters, bits=options.bits)
        bundle = ImageKeyBundle.generate(parameters, NoiseParameters(std=options.noise_std))
        cipher = ThreeLayerCipher(bundle, noise_secret=secrets.token_bytes(32))
        speeds = [measure(cipher, side, options.seconds) for side in options.sides]
    except FlepError as error:
        print(f"error ({type(error).__name__}): {error}", file=sys.stderr)
        return 1
    print(markdown(HEADER, [speed.row() for speed in speeds]))
    by_side = {speed.side: speed for speed in speeds}
    if {256, 4096} <= set(by_side):
        small, large = by_side[256], by_side[4096]
        for what in ("encrypt", "decrypt"):
            seconds = [getattr(speed, what) for speed in (small, large)]
            ratio = large.nanoseconds(seconds[1]) / small.nanoseconds(seconds[0])
            print(f"\n{what}: ns per pixel at 4096 over 256: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
