"""What a site puts into the sum, and what everybody takes out of it: weighted averaging, literally."""

from __future__ import annotations

import numpy as np

from flep_fl.contracts.errors import WeightRangeError
from flep_fl.contracts.ports import Float64Vector


def weighted_vector(flat: Float64Vector, examples: int, max_examples: int, bound: float) -> Float64Vector:
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
    vector[:-1] = flat * share
    vector[-1] = share
    if not np.isfinite(vector).all():
        raise WeightRangeError("A weight is not finite", remedy="Lower train.lr or look at the training data")
    largest = float(np.abs(vector[:-1]).max(initial=0.0))
    if largest > bound:
        raise WeightRangeError(
            "A weight times this site's share exceeds ckks.bound",
            expected=f"at most {bound:g}",
            found=f"{largest:g}",
            remedy="Raise ckks.bound in the federation's configuration, or lower train.lr",
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
