"""Federated optimisers, applied by every analyst to the decrypted average.

The cloud cannot run them: it holds no weight. So each analyst takes the same step from the same state, in
float64 and with operations that IEEE 754 defines to the last bit (no reduction, no library function but the
square root): analysts that decrypt the same average with the same TenSEAL wheel hold the same model, bit for
bit.

FedAvgM: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution" (arXiv:1909.06335).
FedAdam: Reddi et al., "Adaptive federated optimization" (ICLR 2021), with the bias correction of Flower's
``FedAdam`` strategy, whose arithmetic this is.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from flep_fl.contracts.errors import OptimiserStateError, WeightRangeError
from flep_fl.contracts.ports import Float64Vector
from flep_fl.model_security.optimiser_settings import OPTIMISERS, OptimiserSettings

_MAGIC: Final = b"FLEPOS1\n"
_HEAD: Final = struct.Struct(">QQI")  # steps, length of a vector, number of vectors
_FLOAT: Final = np.dtype("<f8")


@dataclass(frozen=True, slots=True)
class OptimiserState:
    """What the next step needs.

    Attributes
    ----------
    steps
        Number of steps taken.
    weights
        The global model, float64, shape ``(P,)``: not rounded to the tensors' dtypes, so that small steps
        add up.
    moments
        FedAvgM: the momentum. FedAdam: first and second moment. Shapes ``(P,)``.
    """

    steps: int
    weights: Float64Vector = field(repr=False)
    moments: tuple[Float64Vector, ...] = field(repr=False, default=())

    def to_bytes(self) -> bytes:
        """Serialise exactly; equal states give equal bytes."""
        vectors = (self.weights, *self.moments)
        head = _HEAD.pack(self.steps, self.weights.size, len(vectors))
        return b"".join((_MAGIC, head, *(v.astype(_FLOAT).tobytes() for v in vectors)))

    @classmethod
    def from_bytes(cls, data: bytes) -> OptimiserState:
        """Read what :meth:`to_bytes` wrote.

        Raises
        ------
        OptimiserStateError
            The bytes are something else, or truncated, or hold a value that is not finite.
        """
        body = len(_MAGIC) + _HEAD.size
        if not data.startswith(_MAGIC) or len(data) < body:
            raise OptimiserStateError("The optimiser's state is not in the format of this release")
        steps, size, count = _HEAD.unpack_from(data, len(_MAGIC))
        largest = 1 + max(OPTIMISERS.values())
        if not 1 <= count <= largest or len(data) != body + count * size * _FLOAT.itemsize:
            raise OptimiserStateError("The optimiser's state is truncated or damaged")
        values = np.frombuffer(data, dtype=_FLOAT, offset=body).astype(np.float64).reshape(count, size)
        if not np.isfinite(values).all():
            raise OptimiserStateError("The optimiser's state holds a value that is not finite")
        return cls(steps, values[0], tuple(values[1:]))


def start(settings: OptimiserSettings, weights: Float64Vector) -> OptimiserState:
    """Return the state before the first step from ``weights``, float64, shape ``(P,)``."""
    zeros = tuple(np.zeros_like(weights) for _ in range(OPTIMISERS[settings.name]))
    return OptimiserState(0, np.array(weights, dtype=np.float64), zeros)


def step(
    settings: OptimiserSettings, state: OptimiserState, average: Float64Vector, number: int
) -> OptimiserState:
    """Take the step of one round.

    Parameters
    ----------
    settings
        The optimiser.
    state
        What :func:`start` or the last step returned; it is not changed.
    average
        The example-weighted mean of the round's models, float64, shape ``(P,)``.
    number
        The round, from 1: FedAdam's bias correction counts rounds, as Flower's does, also those that
        gave no sum.

    Returns
    -------
    OptimiserState
        Its ``weights`` are the new global model.

    Raises
    ------
    OptimiserStateError
        The state belongs to another model or optimiser.
    WeightRangeError
        A new weight is not finite.
    """
    if average.shape != state.weights.shape or len(state.moments) != OPTIMISERS[settings.name]:
        raise OptimiserStateError(
            "The optimiser's state does not fit this model or optimiser",
            expected=f"{OPTIMISERS[settings.name]} moments of shape {average.shape}",
            found=f"{len(state.moments)} of shape {state.weights.shape}",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        new = _STEPS[settings.name](settings, state, average, number)
    if not np.isfinite(new.weights).all():
        raise WeightRangeError(
            f"federation.optimizer={settings.name} made a weight that is not finite",
            remedy="Lower federation.optimizer_lr",
        )
    return replace(new, steps=state.steps + 1)


def _fedavg(
    o: OptimiserSettings, state: OptimiserState, average: Float64Vector, number: int
) -> OptimiserState:
    return replace(state, weights=average)


def _fedavgm(
    o: OptimiserSettings, state: OptimiserState, average: Float64Vector, number: int
) -> OptimiserState:
    """SGD with momentum on the pseudo-gradient ``x - average``."""
    momentum = o.momentum * state.moments[0] + (state.weights - average)
    return replace(state, weights=state.weights - o.lr * momentum, moments=(momentum,))


def _fedadam(
    o: OptimiserSettings, state: OptimiserState, average: Float64Vector, number: int
) -> OptimiserState:
    """Algorithm 2 of Reddi et al. with Adam's bias correction, one round ahead as in Flower."""
    delta = average - state.weights
    first = o.beta_1 * state.moments[0] + (1 - o.beta_1) * delta
    second = o.beta_2 * state.moments[1] + (1 - o.beta_2) * (delta * delta)
    lr = o.lr * math.sqrt(1 - _power(o.beta_2, number + 1)) / (1 - _power(o.beta_1, number + 1))
    weights = state.weights + lr * first / (np.sqrt(second) + o.tau)
    return replace(state, weights=weights, moments=(first, second))


def _power(base: float, exponent: int) -> float:
    """Multiply out: the C library's ``pow`` may differ in the last bit between machines."""
    return math.prod([base] * exponent)


_STEPS: Final = {"fedavg": _fedavg, "fedavgm": _fedavgm, "fedadam": _fedadam}
