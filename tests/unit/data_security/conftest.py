from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher

NOISE_SECRET = b"owner's noise secret, 32 bytes.."


class SeededEntropy:
    """A reproducible stand-in for ``secrets.token_bytes``: SHA-256 in counter mode."""

    def __init__(self, seed: int) -> None:
        self.seed, self.counter = seed, 0

    def __call__(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += hashlib.sha256(f"{self.seed}/{self.counter}".encode()).digest()
            self.counter += 1
        return data[:count]


@pytest.fixture
def entropy() -> Callable[[int], SeededEntropy]:
    return SeededEntropy


@pytest.fixture
def make_cipher() -> Callable[..., ThreeLayerCipher]:
    """``make_cipher(seed=0, noise={...}, **parameters)``: a reproducible cipher."""

    def make(seed: int = 0, noise: dict[str, object] | None = None, **parameters: object) -> ThreeLayerCipher:
        stream = SeededEntropy(seed)
        bundle = ImageKeyBundle.generate(
            CipherParameters(**parameters), NoiseParameters(**(noise or {})), entropy=stream
        )
        return ThreeLayerCipher(bundle, noise_secret=NOISE_SECRET, entropy=stream)

    return make


@pytest.fixture
def natural() -> Callable[..., NDArray[np.uint8]]:
    """``natural(n, height, width, seed=0)``: smooth random images with fine grain, full range."""

    def make(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        walk = rng.normal(size=(count, height + 8, width + 8)).cumsum(1).cumsum(2)[:, 8:, 8:]
        walk -= walk.min((1, 2), keepdims=True)
        walk /= np.maximum(walk.max((1, 2), keepdims=True), 1e-9)
        return np.clip(np.rint(walk * 255 + rng.normal(size=walk.shape) * 3), 0, 255).astype(np.uint8)

    return make
