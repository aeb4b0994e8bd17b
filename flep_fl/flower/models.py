"""Model files: ``.npz`` after every round, and what other programs read when a run is over."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import LayoutError
from flep_fl.contracts.files import write_secret

Arrays = Mapping[str, NDArray[Any]]


def write_model(path: Path, arrays: Arrays) -> None:
    """Write a model as ``.npz``, atomically and readable by its owner alone."""
    buffer = io.BytesIO()
    # Not np.savez: it takes the names as keyword arguments, and "file" is one of its own.
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    write_secret(path, buffer.getvalue())


def export_model(folder: Path, arrays: Arrays) -> list[Path]:
    """Write a model for other programs: ``model.safetensors``, and ``model.pt`` with a plain state_dict.

    Both hold tensors and nothing else: ``model.pt`` opens with ``torch.load(path, weights_only=True)``. Each
    is read back and compared before it takes its name, and replaces an older one in one step.

    Parameters
    ----------
    folder
        Where to write.
    arrays
        The model by tensor name; shapes and dtypes are kept.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    LayoutError
        When what was written does not read back as the same tensors.
    """
    import torch
    from safetensors import torch as safetensors

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    encoded = {"model.safetensors": safetensors.save(tensors), "model.pt": buffer.getvalue()}
    read_back = {
        "model.safetensors": safetensors.load(encoded["model.safetensors"]),
        "model.pt": torch.load(io.BytesIO(encoded["model.pt"]), weights_only=True),
    }
    for name, found in read_back.items():
        if found.keys() != tensors.keys() or not all(
            value.dtype == found[key].dtype and torch.equal(value, found[key])
            for key, value in tensors.items()
        ):
            raise LayoutError(f"{name} does not read back as the model that was written")
    for name, data in encoded.items():
        write_secret(folder / name, data)
    return [folder / name for name in encoded]
