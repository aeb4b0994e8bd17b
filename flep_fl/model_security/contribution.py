"""What a site puts into the sum, and what everybody takes out of it: weighted averaging, literally."""

from __future__ import annotations

import logging
import math

import numpy as np

from flep_fl.contracts.errors import WeightRangeError
from flep_fl.contracts.ports import Float64Vector

_LOG = logging.getLogger(__name__)


def weighted_vector(
    flat: Float64Vector, examples: int, max_examples: int, bound: float, *, clip: bool = False
) -> Float64Vector:
    """Form ``[c w..., c]`` with ``c = examples / max_examples``.

    Parameters
    ----------
    flat
        The model's weights, float64, shape ``(P,)``.
    examples
        Number of training examples behind them, 1 to ``max_examples``.
    max_examples
        The federation's cap (``ckks.max_examples``).
    bound
        Largest magnitude of ``c w`` that may be sent (``ckks.bound``).
    clip
        Whether values beyond the bound are clipped to it rather than refused (``ckks.out_of_range``). What is
        not finite is refused all the same: it has no nearest value.

    Returns
    -------
    float64, shape ``(P + 1,)``

    Raises
    ------
    WeightRangeError
        A weight is not finite or too large, or the number of examples is out of range.
    """
    if not 1 <= examples <= max_examples:
        raise WeightRangeError(
            "The number of training examples does not fit ckks.max_examples",
            expected=f"1 to {max_examples}",
            found=examples,
            remedy="Raise ckks.max_examples in the federation's configuration",
        )
    share = examples / max_examples
    vector = np.empty(flat.size + 1, dtype=np.float64)
    weights = np.multiply(flat, share, out=vector[:-1])
    vector[-1] = share
    largest = max(
        float(weights.max(initial=0.0)), -float(weights.min(initial=0.0))
    )  # NaN, where there is one
    if not math.isfinite(largest):
        raise WeightRangeError("A weight is not finite", remedy="Lower train.lr or look at the training data")
    if largest > bound and clip:
        count = np.count_nonzero(np.abs(weights) > bound)  # of the weights themselves, nothing is logged
        _LOG.warning("%d weights times this site's share exceeded ckks.bound and were clipped", count)
        np.clip(weights, -bound, bound, out=weights)
    elif largest > bound:
        raise WeightRangeError(
            "A weight times this site's share exceeds ckks.bound",
            expected=f"at most {bound:g}",
            found=f"{largest:g}",
            remedy="Raise ckks.bound in the federation's configuration, lower train.lr, or set "
            "ckks.out_of_range=clip",
        )
    return vector


def average(total: Float64Vector) -> Float64Vector:
    """Turn ``[sum c_k w_k..., sum c_k]`` into the example-weighted mean, float64, shape ``(P,)``.

    Raises
    ------
    WeightRangeError
        The sum is not finite, or its share is not positive.
    """
    if not np.isfinite(total).all() or not total[-1] > 0.0:
        raise WeightRangeError("The sum is not an average of models: its total share is not positive")
    return np.asarray(total[:-1] / total[-1], dtype=np.float64)
