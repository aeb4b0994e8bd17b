"""Means over repetitions, with 95 % confidence intervals after Student."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over repetitions.

    Attributes
    ----------
    value
        The mean; None without any value.
    half_width
        Half of its 95 % confidence interval; None with fewer than two values.
    count
        How many values there were.
    """

    value: float | None
    half_width: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval, where there is one."""
        if self.value is None or self.half_width is None:
            return None
        return self.value - self.half_width, self.value + self.half_width


def mean_of(values: Sequence[float | None]) -> Mean:
    """Return the mean of what is known, and its confidence interval.

    Beyond 30 degrees of freedom the quantile is approximated by ``1.96 + 2.4 / degrees`` (within 0.001).
    """
    known = [value for value in values if value is not None]
    if not known:
        return Mean(None, None, 0)
    value = statistics.fmean(known)
    if len(known) == 1:
        return Mean(value, None, 1)
    degrees = len(known) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.4 / degrees
    return Mean(value, quantile * statistics.stdev(known) / math.sqrt(len(known)), len(known))
