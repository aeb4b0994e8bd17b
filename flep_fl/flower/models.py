"""Model files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.files import write_secret


def write_model(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a model as ``.npz``, atomically and readable by its owner alone."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    write_secret(path, buffer.getvalue())
