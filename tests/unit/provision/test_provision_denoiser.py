"""The bundle's noise parameters choose the denoiser, from the configuration to the restored image."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from federations import make_config
from skimage import data as samples

from flep_fl.contracts.errors import DenoiserError
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.provision.owner import cipher_parameters, image_denoiser, noise_parameters

FAMILIES = {
    "gaussian": (),
    "laplacian": (),
    "rayleigh": (),
    "rician": (),
    "poisson_gaussian": ("noise.gain=5",),
    "salt_and_pepper": ("noise.amount=0.1",),
}


def _cipher(config) -> ThreeLayerCipher:
    bundle = ImageKeyBundle.generate(cipher_parameters(config), noise_parameters(config))
    return ThreeLayerCipher(bundle, noise_secret=secrets.token_bytes(32))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_of_each_family(family: str) -> None:
    config = make_config(f"noise={family}", "denoiser=fast", *FAMILIES[family])
    cipher = _cipher(config)
    denoise = image_denoiser(config, cipher.bundle, cipher)
    assert denoise is not None
    image = samples.camera()[120:184, 200:264]
    envelopes = cipher.encrypt(image[None])
    noisy, clean = (psnr(image, restore(cipher, envelopes, way)[0]) for way in (None, denoise))
    assert clean > noisy + 3


def test_keyed_noise_and_none_need_no_denoiser() -> None:
    for overrides in (("noise.recovery=keyed",), ("denoiser=none",), ("cipher=aead",)):
        config = make_config(*overrides)
        cipher = _cipher(config)
        assert image_denoiser(config, cipher.bundle, cipher) is None


def test_a_level_out_of_reach_says_where_it_comes_from() -> None:
    config = make_config("noise=rician", "noise.std=80", "denoiser=fast")
    cipher = _cipher(config)
    with pytest.raises(DenoiserError, match=r"noise\.family=rician, noise\.std=80.*train_denoiser"):
        image_denoiser(config, cipher.bundle, cipher)


def test_the_paper_order_goes_by_the_bundles_figure() -> None:
    config = make_config("cipher=paper", "denoiser=fast")
    cipher = _cipher(config)
    image = np.full((1, 16, 16), 100, np.float32)
    assert image_denoiser(config, cipher.bundle, cipher)(image).shape == image.shape
