"""The last local weights of a contribute-only site, kept over restarts.

Such a site cannot open the global model and goes on from what it trained itself. The file is 0600 in the
site's state folder; like its images, its own weights are its own affair.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import KitError
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.model_security.layout import Arrays, ModelLayout

_NAME = "own_weights.npz"


def save(state: Path, model: Arrays) -> None:
    """Write the weights, replacing those of the round before."""
    buffer = io.BytesIO()
    np.savez(buffer, *model.values())
    write_secret(state / _NAME, buffer.getvalue())


def load(state: Path, layout: ModelLayout) -> dict[str, NDArray[Any]] | None:
    """Read the weights; None where there are none, or not of this layout."""
    try:
        data = read_bytes(state / _NAME, what="The last local weights", error=KitError)
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = [stored[f"arr_{index}"] for index in range(len(stored.files))]
    except (KitError, ValueError, OSError, KeyError):
        return None
    model = dict(zip((tensor.name for tensor in layout.tensors), arrays, strict=False))
    found = [(name, tuple(array.shape), array.dtype.name) for name, array in model.items()]
    expected = [(tensor.name, tensor.shape, tensor.dtype) for tensor in layout.tensors]
    return model if found == expected else None


def forget(state: Path) -> None:
    """Remove the weights, at the start of another run."""
    (state / _NAME).unlink(missing_ok=True)
