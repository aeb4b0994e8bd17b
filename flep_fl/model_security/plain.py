"""The baseline without encryption (``cloud=open``): updates travel as float32, sums as float64.

Both are little-endian. float32 is what the models hold, so an update loses at most one rounding of
``c_k w_k`` (relative 6e-8); the sum is kept in float64 so that adding loses nothing more.
"""

from __future__ import annotations

import numpy as np

from flep_fl.contracts.errors import CiphertextError, WeightRangeError
from flep_fl.contracts.ports import Float64Vector

_UPDATE, _SUM = np.dtype("<f4"), np.dtype("<f8")


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
        """Serialise an update as float32.

        Raises
        ------
        WeightRangeError
            The vector is empty or a value does not fit.
        """
        with np.errstate(over="ignore"):
            values = np.asarray(vector).astype(_UPDATE)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise WeightRangeError("Only a non-empty flat vector of finite float32 values can be sent")
        return values.tobytes()

    def decrypt(self, payload: bytes, length: int) -> Float64Vector:
        """Read a sum.

        Raises
        ------
        CiphertextError
            The payload does not hold ``length`` finite float64 values.
        """
        return _read(payload, length, _SUM)


def read_update(payload: bytes, length: int) -> Float64Vector:
    """Read an update of ``length`` float32 values as float64; :class:`CiphertextError` if it is not one."""
    return _read(payload, length, _UPDATE)


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
