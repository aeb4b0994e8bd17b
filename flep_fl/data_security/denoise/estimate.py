"""How strong the noise of an image is, where nobody says it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ImageFormatError

_WAVELET = "db8"
_MAD = 0.6744897501960817
"""Median of the absolute value of a standard normal variable."""


def estimate_std(image: NDArray[np.floating]) -> float:
    """Estimate the standard deviation of white Gaussian noise from one image.

    The median of the absolute diagonal detail coefficients over 0.6745 (Donoho and Johnstone, "Ideal spatial
    adaptation by wavelet shrinkage", Biometrika 81, 1994): images have few details, noise has them
    everywhere. A long wavelet (db8) lets the least of the picture into that band. What texture leaves there
    is counted as noise, so weak noise is over-estimated.

    Parameters
    ----------
    image
        ``(H, W)``, at least 16 pixels a side, any scale.

    Returns
    -------
    float
        On the scale of the image.

    Raises
    ------
    ImageFormatError
        The image has another shape or is too small.
    """
    import pywt

    if image.ndim != 2 or min(image.shape) < 16:
        raise ImageFormatError(
            "The noise cannot be estimated", expected="(H, W), 16 pixels a side or more", found=image.shape
        )
    _, (_, _, diagonal) = pywt.dwt2(image.astype(np.float64), _WAVELET)
    return float(np.median(np.abs(diagonal)) / _MAD)
