"""The model as one flat vector: names, shapes and dtypes in a fixed order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import LayoutError, WeightRangeError
from flep_fl.model_security import _canonical

Arrays = Mapping[str, NDArray[Any]]

SUPPORTED_DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a layout.

    Attributes
    ----------
    name
        Name of the parameter.
    shape
        Its shape; ``()`` for a scalar.
    dtype
        One of ``float16``, ``float32``, ``float64``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelLayout:
    """Order, names, shapes and dtypes of a model's parameters.

    Integer tensors (counters of BatchNorm, for instance) are refused: averaging them has no meaning, and
    which site's value should win is not settled yet.
    """

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, arrays: Arrays) -> ModelLayout:
        """Describe ``arrays`` in their own order.

        Raises
        ------
        LayoutError
            The model is empty, or a tensor is not of a supported floating-point dtype.
        """
        return cls._checked(tuple(Tensor(name, tuple(a.shape), a.dtype.name) for name, a in arrays.items()))

    @classmethod
    def from_json(cls, text: str) -> ModelLayout:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        LayoutError
            The description is damaged or holds an unsupported tensor.
        """
        try:
            tensors = tuple(_tensor(entry) for entry in _canonical.load(text.encode("utf-8")))
        except (ValueError, TypeError) as exc:
            raise LayoutError(
                f"The model layout is damaged ({exc})", remedy="Provision the kits again"
            ) from None
        return cls._checked(tensors)

    @classmethod
    def _checked(cls, tensors: tuple[Tensor, ...]) -> ModelLayout:
        if not tensors:
            raise LayoutError("The model has no parameters")
        for tensor in tensors:
            if tensor.dtype not in SUPPORTED_DTYPES:
                raise LayoutError(
                    f"Tensor {tensor.name!r} has dtype {tensor.dtype}, which is not supported yet",
                    expected=", ".join(SUPPORTED_DTYPES),
                    remedy="Use a model without integer buffers, for instance GroupNorm for BatchNorm",
                )
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise LayoutError("Two tensors of the model have the same name")
        return cls(tensors)

    def to_json(self) -> str:
        """Canonical JSON: a list of ``[name, shape, dtype]``."""
        return _canonical.dump([[t.name, list(t.shape), t.dtype] for t in self.tensors]).decode("ascii")

    @cached_property
    def size(self) -> int:
        """Number of scalars of the whole model."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    def flatten(self, arrays: Arrays) -> NDArray[np.float64]:
        """Concatenate ``arrays`` in the order of the layout, whatever their own order is.

        Returns
        -------
        float64, shape ``(size,)``
            Exact: every supported dtype fits into float64.

        Raises
        ------
        LayoutError
            A tensor is missing, unknown, or of another shape or dtype.
        WeightRangeError
            A value is NaN or infinite.
        """
        known = {tensor.name for tensor in self.tensors}
        for name in arrays:
            if name not in known:
                raise LayoutError(f"Tensor {name!r} is not part of the federation's model")
        flat = np.empty(self.size, dtype=np.float64)
        start = 0
        for tensor in self.tensors:
            if tensor.name not in arrays:
                raise LayoutError(f"Tensor {tensor.name!r} is missing from the model")
            array = arrays[tensor.name]
            found = (tuple(array.shape), array.dtype.name)
            if found != (tensor.shape, tensor.dtype):
                raise LayoutError(
                    f"Tensor {tensor.name!r} does not fit the federation's model",
                    expected=f"{tensor.dtype} of shape {tensor.shape}",
                    found=f"{found[1]} of shape {found[0]}",
                    remedy="Use the same model settings as the other sites",
                )
            values = np.ascontiguousarray(array).reshape(-1)
            if not np.isfinite(values).all():
                raise WeightRangeError(
                    f"Tensor {tensor.name!r} holds a value that is not finite",
                    remedy="Lower train.lr or look at the training data",
                )
            flat[start : start + tensor.size] = values
            start += tensor.size
        return flat

    def unflatten(self, vector: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        """Cut a float64 vector of shape ``(size,)`` into tensors of the original shapes and dtypes.

        Raises
        ------
        LayoutError
            The vector has another length.
        WeightRangeError
            A value is not finite, or too large for its tensor's dtype.
        """
        if vector.shape != (self.size,):
            raise LayoutError(
                "The vector does not fit the federation's model",
                expected=f"shape {(self.size,)}",
                found=f"shape {vector.shape}",
            )
        arrays: dict[str, NDArray[Any]] = {}
        start = 0
        for tensor in self.tensors:
            with np.errstate(over="ignore"):
                array = vector[start : start + tensor.size].astype(tensor.dtype).reshape(tensor.shape)
            if not np.isfinite(array).all():
                raise WeightRangeError(f"Tensor {tensor.name!r} holds a value beyond {tensor.dtype}")
            arrays[tensor.name] = array
            start += tensor.size
        return arrays


def _tensor(entry: object) -> Tensor:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError("an entry is not [name, shape, dtype]")
    name, shape, dtype = entry
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError("an entry is not [name, shape, dtype]")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"tensor {name!r} has an impossible shape")
    return Tensor(name, tuple(shape), dtype)
