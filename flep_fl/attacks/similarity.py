"""How close a reconstruction is to the truth: SSIM, PSNR, and who is who in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from flep_fl.data_security.metrics import psnr

PEAK = 255.0
_K1, _K2 = 0.01, 0.03
_WINDOW = 7

Grey = NDArray[np.floating] | NDArray[np.uint8]


def ssim(truth: Grey, guess: Grey) -> float:
    """Mean structural similarity (Wang et al. 2004), uniform 7 x 7 windows, sample covariance.

    Parameters
    ----------
    truth, guess
        (H, W) on the 0..255 scale, H and W at least 7.

    Returns
    -------
    float
        -1..1; 1 where both are equal.
    """
    a, b = (
        sliding_window_view(np.asarray(image, np.float64), (_WINDOW, _WINDOW)) for image in (truth, guess)
    )
    mean_a, mean_b = a.mean(axis=(-2, -1)), b.mean(axis=(-2, -1))
    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    var_a = (np.square(a).mean(axis=(-2, -1)) - mean_a**2) * unbiased
    var_b = (np.square(b).mean(axis=(-2, -1)) - mean_b**2) * unbiased
    both = ((a * b).mean(axis=(-2, -1)) - mean_a * mean_b) * unbiased
    c1, c2 = (_K1 * PEAK) ** 2, (_K2 * PEAK) ** 2
    score = ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return float(score.mean())


def matched(truth: Sequence[Grey], guesses: Sequence[Grey]) -> list[int]:
    """Pair each true image with a reconstruction of its own so that the sum of SSIM is largest.

    A batch's gradient does not say in which order its images came.

    Parameters
    ----------
    truth, guesses
        Equally many images, at most 16.

    Returns
    -------
    list of int
        For each true image the position of its reconstruction.
    """
    count = len(truth)
    if len(guesses) != count or not 0 < count <= 16:
        raise ValueError("matched() takes 1 to 16 images and as many guesses")
    scores = np.array([[ssim(image, guess) for guess in guesses] for image in truth])
    # Best total for the first k images with each set of guesses used up: 2^n sets, n <= 16.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for image in range(count):
        following: dict[int, tuple[float, list[int]]] = {}
        for used, (total, chosen) in best.items():
            for guess in range(count):
                if used >> guess & 1:
                    continue
                key, value = used | 1 << guess, total + float(scores[image, guess])
                if key not in following or value > following[key][0]:
                    following[key] = (value, [*chosen, guess])
        best = following
    return best[(1 << count) - 1][1]


def batch_scores(truth: Sequence[Grey], guesses: Sequence[Grey]) -> tuple[float, float, list[int]]:
    """Return mean SSIM and mean PSNR (dB; of the finite ones) of the best pairing, and the pairing."""
    order = matched(truth, guesses)
    pairs = [(image, guesses[index]) for image, index in zip(truth, order, strict=True)]
    similar = float(np.mean([ssim(a, b) for a, b in pairs]))
    decibels = [value for value in (psnr(a, b) for a, b in pairs) if math.isfinite(value)]
    return similar, float(np.mean(decibels)) if decibels else math.inf, order
