"""The baseline without encryption (``cloud=open``): updates travel as float32, sums as float64.

Both are little-endian. An update is the unweighted model in float32, which is what models hold, and the
site's share in float64; the product is formed in float64 by whoever adds, so that the average is exact and
the encrypted modes can be held against it.
"""

from __future__ import annotations

import numpy as np

from flep_fl.contracts.errors import CiphertextError, WeightRangeError
from flep_fl.contracts.ports import Float64Vector

_WEIGHT, _SUM = np.dtype("<f4"), np.dtype("<f8")


class PlainModelCipher:
    """The ``ModelCipher`` of an open federation: no secrecy at all.

    Parameters
    ----------
    key_id
        Value for the envelopes' ``key_id`` field; the kit's model key identifies the federation here too.
    """

    def __init__(self, key_id: str) -> None:
        self._key_id = key_id

    @property
    def key_id(self) -> str:
        """The identifier given."""
        return self._key_id

    def encrypt(self, vector: Float64Vector) -> bytes:
        """Serialise an update ``[c w..., c]`` as ``w`` in float32 and ``c`` in float64.

        Raises
        ------
        WeightRangeError
            The vector is empty, its share is not positive, or a value does not fit.
        """
        values = np.asarray(vector, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not values[-1] > 0:
            raise WeightRangeError("Only a non-empty flat vector with a positive share can be sent")
        with np.errstate(over="ignore", invalid="ignore"):
            weights = (values[:-1] / values[-1]).astype(_WEIGHT)
        if not np.isfinite(weights).all() or not np.isfinite(values[-1]):
            raise WeightRangeError("Only finite float32 values can be sent")
        return bytes(weights.tobytes() + values[-1:].astype(_SUM).tobytes())

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Read a sum.

        Raises
        ------
        CiphertextError
            The payload does not hold ``length`` finite float64 values.
        """
        return _read(payload, length, _SUM)


def read_update(payload: bytes, length: int) -> Float64Vector:
    """Read an update of ``length`` values as ``[c w..., c]``; :class:`CiphertextError` if it is not one."""
    weights, share = payload[: -_SUM.itemsize], payload[-_SUM.itemsize :]
    vector = np.empty(length, dtype=np.float64)
    vector[-1:] = _read(share, 1, _SUM)
    vector[:-1] = _read(weights, length - 1, _WEIGHT) * vector[-1]
    return vector


def write_sum(vector: Float64Vector) -> bytes:
    """Serialise a sum as float64."""
    return vector.astype(_SUM).tobytes()


def _read(payload: bytes, length: int, dtype: np.dtype[np.float32] | np.dtype[np.float64]) -> Float64Vector:
    if len(payload) != length * dtype.itemsize:
        raise CiphertextError(
            "The plain payload does not fit the model",
            expected=f"{length * dtype.itemsize} bytes",
            found=len(payload),
        )
    values = np.frombuffer(payload, dtype=dtype).astype(np.float64)
    if not np.isfinite(values).all():
        raise CiphertextError("The plain payload holds a value that is not finite")
    return values
