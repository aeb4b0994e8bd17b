"""The picture of a gradient inversion in a run's report: an open cloud's bytes against an untrusted one's.

Not an update of the run itself is attacked, which takes long, but the easiest one that its network can send:
one image of the run, one step of training from the run's own first weights. Whatever an untrusted cloud gets
is ciphertext like this one. Keys are drawn for the page alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from flep_fl.attacks.blocks import MISSING
from flep_fl.attacks.cloud_view import first_model, interpreted_bytes
from flep_fl.attacks.gradient_inversion import LocalTraining, Search, invert_update, local_update
from flep_fl.attacks.similarity import ssim
from flep_fl.config import Config, ckks_profile
from flep_fl.contracts.errors import ConfigError
from flep_fl.contracts.ports import ModelCipher
from flep_fl.data_analyst.restore import reduce_area
from flep_fl.flower.sessions import analyst_cipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.plain import PlainModelCipher, read_update
from flep_fl.model_security.profiles import vector_length
from flep_fl.provision.owner import Sample
from flep_fl.reporting.image_view import Stage, as_grey, png
from flep_fl.reporting.inversion_view import InversionView

SIDE = 32
"""Pixels: larger images are reduced to it, and the search takes seconds."""

LARGEST_NETWORK = 1_000_000
"""Weights; beyond it the search would take minutes."""

ITERATIONS = 100
"""Of the search."""

_SMALLEST = 7  # an SSIM window
_STEP, _TOTAL_VARIATION = 0.1, 1e-3
_TRAINING = LocalTraining(lr=0.05, steps=1)
_LABEL = 0  # any does: the attack is told


def invert_for_report(config: Config, sample: Sample) -> InversionView:
    """Send one image's update as an open and as an untrusted cloud would get it, and attack both.

    Parameters
    ----------
    config
        The run's configuration: network, seed and CKKS profile are taken from it.
    sample
        Images of the run; the one with the most contrast is taken.

    Returns
    -------
    InversionView
        Without pictures, and with the reason, where the network or the images do not lend themselves to it.
    """
    image = max((as_grey(one) for one in sample.images), key=lambda one: float(one.std()))
    small = np.array(reduce_area(image.astype(np.float32), SIDE))
    channels = 3 if sample.images[0].ndim == 3 else 1
    if min(small.shape) < _SMALLEST:
        return InversionView([], "No inversion is shown: the images are too small for a similarity.", {})
    try:
        model, start = first_model(config, classes=sample.classes, channels=channels)
    except ConfigError as exc:
        return InversionView([], f"No inversion is shown: {exc}.", {})
    if len(start) > LARGEST_NETWORK:
        return InversionView([], f"No inversion is shown: {len(start):,} weights would take minutes.", {})

    pixels = torch.from_numpy(small / 255).expand(1, channels, *small.shape)
    change = local_update(model, pixels, torch.tensor([_LABEL]), _TRAINING).detach().numpy()
    vector = np.append(start + change, 1.0)  # the share of one image is 1
    opened = read_update(PlainModelCipher("report").encrypt(vector), len(vector))[:-1] - start
    length = vector_length(len(start), checked=True)
    sealed = _fresh_cipher(config).encrypt(np.pad(vector, (0, length - len(vector))))
    search = Search(ITERATIONS, _STEP, _TOTAL_VARIATION, restarts=1, seed=config.seed)
    shape = (channels, small.shape[0], small.shape[1])

    def attacked(observed: NDArray[np.float64]) -> NDArray[np.float32]:
        found, _ = invert_update(model, observed, [_LABEL], shape, _TRAINING, search)
        return np.asarray(found[0])

    found = {"open": attacked(opened), "untrusted": attacked(interpreted_bytes(sealed, config, len(start)))}
    figures = {name: ssim(small, guess) for name, guess in found.items()}
    figures["grey"] = ssim(small, np.full_like(small, MISSING))
    stages = [
        Stage("trained on", f"{small.shape[1]} x {small.shape[0]}", _shown(small)),
        Stage(
            "cloud=open", f"from the weights it receives: SSIM {figures['open']:.2f}", _shown(found["open"])
        ),
        Stage(
            "cloud=untrusted",
            f"from the ciphertext it receives, {len(sealed):,} bytes: SSIM {figures['untrusted']:.2f}",
            _shown(found["untrusted"]),
        ),
    ]
    return InversionView(
        stages,
        f"Gradient inversion (Geiping et al. 2020, {ITERATIONS} iterations) of an update made for this "
        f"page: one image of this run, reduced to {SIDE} pixels at most, one step from the first weights of "
        f"this run's network ({len(start):,} weights), its label known. That is the easiest update to "
        "attack; the run's own come from many images and steps. For cloud=untrusted the search gets the "
        "ciphertext's coefficients, which is all that the cloud has. "
        f"A plain grey guess: SSIM {figures['grey']:.2f}.",
        figures,
    )


def _fresh_cipher(config: Config) -> ModelCipher:
    return analyst_cipher(ModelKey.generate(ckks_profile(config)).to_bytes(), config)


def _shown(image: NDArray[np.float32]) -> bytes:
    return png(np.clip(np.rint(image), 0, 255).astype(np.uint8))
