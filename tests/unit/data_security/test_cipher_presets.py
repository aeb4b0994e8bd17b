from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.envelope import HEADER_BYTES
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.pipeline import restore
from flep_fl.data_security.presets import CIPHERS, Preset, build_cipher, get_preset, register_cipher


@pytest.mark.parametrize("name", ["flep", "paper", "aead", "none"])
def test_presets_restore(name: str, entropy, natural) -> None:
    preset = get_preset(name)
    bundle = ImageKeyBundle.generate(
        preset.parameters, NoiseParameters(), entropy=entropy(1), cipher_name=name
    )
    cipher = build_cipher(bundle, entropy=entropy(2))
    images = natural(2, 31, 32)
    restored = restore(cipher, cipher.encrypt(images), lambda batch: batch, preset.restore_order)
    limit = {"flep": 4, "paper": 4, "aead": 0, "none": 0}[name]
    assert np.abs(np.stack(restored).astype(int) - images).max() <= limit


def test_paper_has_no_mask_and_an_envelope() -> None:
    preset = get_preset("paper")
    assert preset.parameters.layers == ("scramble", "encode", "noise", "envelope")
    assert preset.parameters.noise_units == "wire"
    assert preset.restore_order == "denoise_first"
    assert get_preset("flep").parameters == CipherParameters(bits=(8, 6, 6, 6))


def test_only_none_shows_the_image(entropy, natural) -> None:
    images = natural(1, 16, 16)
    for name in CIPHERS:
        bundle = ImageKeyBundle.generate(
            get_preset(name).parameters, NoiseParameters(), entropy=entropy(1), cipher_name=name
        )
        body = build_cipher(bundle).encrypt(images)[0][HEADER_BYTES:]
        assert (images.tobytes() in body) == (name == "none")


def test_unknown_name_is_named(entropy) -> None:
    with pytest.raises(CipherParameterError, match="flep, paper, aead, none"):
        get_preset("rot13")


def test_a_cipher_of_ones_own(monkeypatch, entropy, natural) -> None:
    class Reversed:
        def __init__(self, bundle, *, noise_secret=None, entropy=None) -> None:
            self.bundle = bundle

        def encrypt(self, images):
            return [image[::-1].tobytes() for image in images]

        def decrypt(self, envelopes):
            return [
                np.frombuffer(item, np.uint8).reshape(4, 4)[::-1].astype(np.float32) for item in envelopes
            ]

    monkeypatch.setattr("flep_fl.data_security.presets.CIPHERS", dict(CIPHERS))
    register_cipher("reversed", Preset(CipherParameters(), "upside down", factory=Reversed))
    bundle = ImageKeyBundle.generate(
        CipherParameters(), NoiseParameters(), entropy=entropy(1), cipher_name="reversed"
    )
    cipher = build_cipher(bundle)
    images = natural(1, 4, 4)
    assert np.array_equal(cipher.decrypt(cipher.encrypt(images)), images)
    with pytest.raises(CipherParameterError, match="already registered"):
        register_cipher("flep", get_preset("flep"))


def test_the_cipher_loads_no_torch() -> None:
    script = (
        "import sys, flep_fl.data_security.presets, flep_fl.data_security.wrapping, "
        "flep_fl.data_security.labels, flep_fl.data_security.metrics\n"
        "print([name for name in ('torch', 'flwr', 'tenseal', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
