"""The first model of a run where the cloud brings it: in the clear, and the same for every site.

Everybody's first update names the digest of the model that it was trained from, so sites that were shown
different first models refuse to be summed together, exactly as with different sums later on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flep_fl.contracts.errors import KitError
from flep_fl.contracts.files import write_secret
from flep_fl.model_security.layout import Arrays, ModelLayout

_LABEL = b"flep-fl/first-model/v1\0"
_FILE = "first.safetensors"


def first_model_digest(arrays: Arrays) -> str:
    """Return the SHA-256 (64 hex digits) of a model: its layout, then every tensor's bytes in C order.

    Raises
    ------
    LayoutError
        When the model cannot be federated (empty, or a tensor of an unsupported dtype).
    """
    digest = hashlib.sha256(_LABEL + bytes.fromhex(ModelLayout.of(arrays).digest))
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def keep_first_model(folder: Path, arrays: Arrays) -> None:
    """Store a first model in a site's state folder, atomically, for the processes that come after this."""
    order = json.dumps(list(arrays))
    plain = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    write_secret(folder / _FILE, save(plain, metadata={"order": order}))


def kept_first_model(folder: Path) -> Arrays | None:
    """Read what :func:`keep_first_model` wrote; None where there is nothing yet.

    Raises
    ------
    KitError
        When the file is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            order = json.loads((file.metadata() or {})["order"])
            return {str(name): file.get_tensor(name) for name in order}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as exc:
        raise KitError(
            f"{path} is damaged", remedy="Remove it; the cloud sends the first model with the next run"
        ) from exc
