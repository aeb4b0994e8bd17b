"""Every metric against a value that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flep_fl.contracts.errors import ImageFormatError
from flep_fl.data_security import metrics

A = np.array([[0, 10], [20, 255]], np.uint8)
B = np.array([[0, 15], [20, 0]], np.uint8)


def test_npcr() -> None:
    assert metrics.npcr(A, B) == 50.0
    assert metrics.npcr(A, A) == 0.0


def test_uaci() -> None:
    assert metrics.uaci(A, B) == pytest.approx(100 * (5 + 255) / 4 / 255)
    assert metrics.uaci(A, B) == metrics.uaci(B, A)


def test_entropy() -> None:
    assert metrics.entropy(np.array([[0, 0], [1, 1]], np.uint8)) == 1.0
    assert metrics.entropy(np.array([[0, 0, 0, 7]], np.uint8)) == pytest.approx(
        0.75 * math.log2(4 / 3) + 0.25 * 2
    )
    assert metrics.entropy(np.arange(256, dtype=np.uint8).reshape(16, 16)) == 8.0
    assert metrics.entropy(np.zeros((3, 3), np.uint8)) == 0.0


def test_encryption_quality() -> None:
    # H(B) - H(A): level 0 +1, 10 -1, 15 +1, 255 -1.
    assert metrics.encryption_quality(A, B) == 4 / 256


def test_chi_square() -> None:
    assert metrics.chi_square(np.arange(256, dtype=np.uint8)[None]) == 0.0
    # 512 pixels of one level: expected 2 a level, (510^2 + 255 * 2^2) / 2.
    assert metrics.chi_square(np.zeros((2, 256), np.uint8)) == (510**2 + 255 * 4) / 2


def test_adjacent_correlation() -> None:
    ramp = np.tile(np.arange(8), (5, 1))
    assert metrics.adjacent_correlation(ramp, "horizontal") == pytest.approx(1.0)
    assert metrics.adjacent_correlation(ramp, "vertical") == pytest.approx(1.0)
    stripes = np.tile(np.arange(8) % 2, (5, 1))
    assert metrics.adjacent_correlation(stripes, "horizontal") < -0.9
    assert metrics.adjacent_correlation(stripes, "vertical") == pytest.approx(1.0)
    checks = np.indices((6, 6)).sum(0) % 2
    assert metrics.adjacent_correlation(checks, "diagonal") == pytest.approx(1.0)
    assert metrics.adjacent_correlation(np.ones((4, 4)), "diagonal") == 0.0
    # Pairs (1, 2), (2, 4), (4, 3): sums of products 1, of squares 14/3 and 2.
    assert metrics.adjacent_correlation(np.array([[1, 2, 4, 3]]), "horizontal") == pytest.approx(
        1 / math.sqrt(14 / 3 * 2)
    )


def test_psnr() -> None:
    assert metrics.psnr(A, A) == math.inf
    assert metrics.psnr(np.zeros((2, 2)), np.full((2, 2), 255.0)) == 0.0
    assert metrics.psnr(np.zeros((2, 2)), np.array([[5.0, 0], [0, 0]])) == pytest.approx(
        10 * math.log10(255**2 / 6.25)
    )
    # uint8 must not wrap.
    assert metrics.psnr(np.array([[0]], np.uint8), np.array([[255]], np.uint8)) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.npcr(A, A[:1]),
        lambda: metrics.uaci(A, B.astype(np.uint16)),
        lambda: metrics.entropy(np.zeros((0, 3), np.uint8)),
        lambda: metrics.psnr(A, A[:1]),
        lambda: metrics.adjacent_correlation(A, "skew"),
        lambda: metrics.adjacent_correlation(np.zeros((1, 4)), "vertical"),
    ],
)
def test_unusable_images_are_named(call) -> None:
    with pytest.raises(ImageFormatError):
        call()
