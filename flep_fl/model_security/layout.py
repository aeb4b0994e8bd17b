"""The model as one flat vector: names, shapes and dtypes in a fixed order.

What becomes of a tensor, by its dtype:

- **float16, float32, float64**: sent, averaged by examples in float64, and rounded to its dtype by every
  analyst. BatchNorm's running mean and variance are such tensors. A variance (torch's name is
  ``running_var``) is never below 0, whatever CKKS's noise did to it.
- **integers and bool** (``num_batches_tracked``, index tables): never sent. The global model has the first
  model's values in every round, and what a site counted meanwhile stays there. They are part of the layout,
  so that two sites with different ones do not have the same model.
- **anything else** is refused by name. bfloat16 does not get here: neither numpy nor Flower's ``Array`` has
  it. Send ``tensor.float()`` and convert back after loading.

Empty tensors and scalars are tensors like others. A tensor that a model has under two names (tied weights)
travels under both; loading writes the last of them, the same at every analyst.
"""

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
"""Dtypes of tensors that are averaged."""

FIXED_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
"""Dtypes of tensors that keep the first model's values."""

MOST_FIXED_VALUES = 1 << 16
"""How many integers a model may have in all: they travel with the layout, as text."""

LONGEST_TEXT = 1 << 19
"""Largest description of a model in bytes: it is part of a site's introduction."""


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
        One of :data:`SUPPORTED_DTYPES` or :data:`FIXED_DTYPES`.
    fixed
        The values of an integer or bool tensor, flat; None for one that is averaged.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fixed: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelLayout:
    """Order, names, shapes and dtypes of a model's tensors, and the values of those that are not averaged."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, arrays: Arrays) -> ModelLayout:
        """Describe ``arrays`` in their own order.

        Raises
        ------
        LayoutError
            The model has nothing to average, or a tensor of an unsupported dtype, or too many integers.
        """
        return cls._checked(tuple(_described(name, array) for name, array in arrays.items()))

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
        if all(tensor.fixed is not None for tensor in tensors):
            raise LayoutError("The model has no parameters")
        for tensor in tensors:
            if tensor.dtype not in (*SUPPORTED_DTYPES, *FIXED_DTYPES):
                raise LayoutError(
                    f"Tensor {tensor.name!r} has dtype {tensor.dtype}, which cannot be averaged",
                    expected=", ".join(SUPPORTED_DTYPES) + ", or an integer or bool tensor",
                    remedy="Convert it, for instance with .float() on its way to the array record and back",
                )
        integers = sum(tensor.size for tensor in tensors if tensor.fixed is not None)
        if integers > MOST_FIXED_VALUES:
            raise LayoutError(
                "The model has too many integers in its state",
                expected=f"at most {MOST_FIXED_VALUES}",
                found=integers,
                remedy="Register index tables as buffers with persistent=False",
            )
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise LayoutError("Two tensors of the model have the same name")
        layout = cls(tensors)
        if len(layout.to_json()) > LONGEST_TEXT:
            raise LayoutError(
                "The description of the model is too long",
                expected=f"at most {LONGEST_TEXT} bytes of JSON",
                found=len(layout.to_json()),
                remedy="Register index tables as buffers with persistent=False",
            )
        return layout

    def to_json(self) -> str:
        """Canonical JSON: a list of ``[name, shape, dtype]``, with a list of values for an integer tensor."""
        entries = [
            [t.name, list(t.shape), t.dtype, *([list(t.fixed)] if t.fixed is not None else [])]
            for t in self.tensors
        ]
        return _canonical.dump(entries).decode("ascii")

    @cached_property
    def size(self) -> int:
        """Number of scalars that are averaged."""
        return sum(tensor.size for tensor in self.tensors if tensor.fixed is None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    def flatten(self, arrays: Arrays) -> NDArray[np.float64]:
        """Concatenate what is averaged in the order of the layout, whatever the arrays' own order is.

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
            if tensor.fixed is not None:
                continue  # what this site counted is its own affair
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
        """Cut a float64 vector of shape ``(size,)`` into tensors; integer ones are the first model's.

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
            if tensor.fixed is not None:
                arrays[tensor.name] = np.array(tensor.fixed, dtype=tensor.dtype).reshape(tensor.shape)
                continue
            with np.errstate(over="ignore"):
                array = vector[start : start + tensor.size].astype(tensor.dtype).reshape(tensor.shape)
            if not np.isfinite(array).all():
                raise WeightRangeError(f"Tensor {tensor.name!r} holds a value beyond {tensor.dtype}")
            if tensor.name.rpartition(".")[2] == _VARIANCE:
                np.maximum(array, 0, out=array)  # its root is taken, and CKKS's noise has two signs
            arrays[tensor.name] = array
            start += tensor.size
        return arrays


_VARIANCE = "running_var"


def _described(name: str, array: NDArray[Any]) -> Tensor:
    dtype = array.dtype.name
    fixed = None
    if dtype in FIXED_DTYPES and array.size <= MOST_FIXED_VALUES:
        fixed = tuple(int(value) for value in array.reshape(-1).tolist())
    elif dtype in FIXED_DTYPES:
        fixed = (0,) * array.size  # too many; refused with the others counted in
    return Tensor(name, tuple(array.shape), dtype, fixed)


def _tensor(entry: object) -> Tensor:
    if not isinstance(entry, list) or len(entry) not in (3, 4):
        raise ValueError("an entry is not [name, shape, dtype] or [name, shape, dtype, values]")
    name, shape, dtype = entry[:3]
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError("an entry is not [name, shape, dtype]")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"tensor {name!r} has an impossible shape")
    if (dtype in FIXED_DTYPES) != (len(entry) == 4):
        raise ValueError(f"tensor {name!r} of dtype {dtype} has values, or has none, against the rule")
    return Tensor(name, tuple(shape), dtype, _fixed(*entry) if len(entry) == 4 else None)


def _fixed(name: str, shape: list[int], dtype: str, values: object) -> tuple[int, ...]:
    low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if not isinstance(values, list) or len(values) != math.prod(shape):
        raise ValueError(f"tensor {name!r} does not have as many values as its shape says")
    if not all(type(value) is int and low <= value <= high for value in values):
        raise ValueError(f"tensor {name!r} has a value that is no {dtype}")
    return tuple(values)
