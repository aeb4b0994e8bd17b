"""What the cloud can make of the updates that it holds, in each trust mode."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from flep_fl.attacks.evidence import Evidence
from flep_fl.config import Config, ckks_profile
from flep_fl.contracts.errors import ConfigError, KitError
from flep_fl.data_analyst.model import build_model, get_arrays
from flep_fl.flower.sessions import analyst_cipher
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.packed_format import PackedPayload
from flep_fl.model_security.plain import read_update
from flep_fl.model_security.profiles import vector_length


def first_model(config: Config, *, classes: int, channels: int) -> tuple[nn.Module, NDArray[np.float64]]:
    """Make the model that every run starts from: it follows from the seed, which all parties share.

    Parameters
    ----------
    config
        The run's configuration.
    classes, channels
        As the tensors' shapes tell, which a site's introduction names in the clear.

    Returns
    -------
    model, weights
        The network, and its weights as one float64 vector in the order of ``model.named_parameters()``.
    """
    model = build_model(config.model.name, classes=classes, channels=channels, seed=config.seed)
    names, state = [name for name, _ in model.named_parameters()], list(model.state_dict())
    if names != state:
        raise ConfigError(
            f"the attack does not handle model={config.model.name}: it has buffers", remedy="Use model=cnn"
        )
    weights = get_arrays(model)
    return model, ModelLayout.of(weights).flatten(weights).astype(np.float64)


def opened_update(evidence: Evidence, site: str, size: int) -> NDArray[np.float64]:
    """Open one site's upload of round 1 with what the cloud holds: nothing is needed, or its model key.

    Returns
    -------
    ndarray
        The site's weights, float64 (size,).

    Raises
    ------
    KitError
        The cloud's kit holds no model key.
    """
    upload, config = evidence.first_upload(site), evidence.config
    if config.cloud.trust == "open":
        vector = read_update(upload.payload, size + 1)
    else:
        if evidence.cloud_kit.model_key is None:
            raise KitError("The cloud holds no model key", remedy="Set cloud=trusted or cloud=open")
        cipher = analyst_cipher(evidence.cloud_kit.model_key, config)
        vector = cipher.decrypt(upload.payload, vector_length(size, checked=True))[: size + 1]
    return np.asarray(vector[:-1] / vector[-1], np.float64)


def opened_sum(evidence: Evidence) -> NDArray[np.float64]:
    """Read the global model after round 1 from the file that an open or trusted cloud writes."""
    with np.load(evidence.folder / "out" / "cloud" / "model.npz") as file:
        arrays = dict(file)
    return ModelLayout.of(arrays).flatten(arrays).astype(np.float64)


def interpreted_bytes(payload: bytes, config: Config, size: int) -> NDArray[np.float64]:
    """Read a ciphertext as if it were weights: its coefficients, centred, the first ``size`` of them.

    It is the best that a cloud without a key has: CKKS puts the vector into polynomials and adds one that
    looks uniform to whoever lacks the key. (The coefficients are in NTT form; undoing that takes no key and
    leaves uniform values uniform.) Profiles in TenSEAL's own format are read byte by byte.

    Returns
    -------
    ndarray
        float64 (size,), between -1 and 1.
    """
    profile = ckks_profile(config)
    count = profile.ciphertexts(vector_length(size, checked=True))
    try:
        packed = PackedPayload(payload, profile, count, allow_seeded=True)
        values = np.concatenate([rows[0] for rows in packed.residues()]).astype(np.float64)
    except ValueError:
        values = np.frombuffer(payload, np.uint8).astype(np.float64)
    values -= (values.max() + values.min()) / 2
    return np.resize(values / np.abs(values).max(), size)
