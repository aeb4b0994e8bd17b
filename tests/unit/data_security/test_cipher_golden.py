"""Golden vectors: the format may not change unnoticed.

Run this file as a script to write the vectors again after a deliberate change of format.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flep_fl.contracts.files import write_atomic
from flep_fl.data_security import encode
from flep_fl.data_security.chaos import chaotic_order
from flep_fl.data_security.envelope import parse_header
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.data_security.scramble import scramble

GOLDEN = Path(__file__).parents[2] / "golden"
NONCE = bytes(range(16))
NOISE_SECRET = b"golden noise secret of the owner"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flep": ({}, {}),
    "flep_noise": ({"alpha": 0.3}, {"std": 25.0, "mean": 2.0}),
    "keyed16": ({"bits": 16, "block_side": 3}, {"std": 25.0, "recovery": "keyed"}),
    "paper": (
        {"layers": ("scramble", "encode", "noise", "envelope"), "noise_units": "wire"},
        {"std": 5.0},
    ),
    "aead": ({"layers": ("envelope",)}, {}),
}


def make_image() -> np.ndarray:
    """Return a 13 x 10 ramp with a dark square: no random generator whose stream could change."""
    image = np.add.outer(np.arange(13) * 9, np.arange(10) * 14).astype(np.uint8)
    image[4:8, 3:6] = 5
    return image


def digest(array: np.ndarray) -> str:
    """Hash a little-endian array with its dtype and shape."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def describe(name: str) -> dict[str, Any]:
    parameters, noise = CASES[name]
    cipher_parameters = CipherParameters(**parameters)
    secret = np.multiply.outer(np.arange(6) * 37 + 11, np.arange(8) * 5 + 3).astype(np.uint8)
    bundle = ImageKeyBundle(bytes(range(32)), 3, cipher_parameters, NoiseParameters(**noise), (secret,))
    cipher = ThreeLayerCipher(bundle, noise_secret=NOISE_SECRET)
    image = make_image()
    (envelope,) = cipher._encrypt_with(image[None], [NONCE])
    header = parse_header(envelope)
    keys = bundle.layer_keys(header.iv)
    side = cipher_parameters.block_side
    multiple = np.lcm(2, side)
    height, width = (-(-length // multiple) * multiple for length in image.shape)
    padded = np.pad(image, ((0, height - 13), (0, width - 10)), mode="edge")[None]
    orders = chaotic_order([keys.scramble], height * width // side**2)
    scrambled = scramble(padded, orders, side)
    return {
        "bundle": bundle.to_bytes().hex(),
        "key_id": bundle.key_id,
        "nonce": NONCE.hex(),
        "noise_secret": NOISE_SECRET.hex(),
        "image": image.tolist(),
        "iv": header.iv.hex(),
        "keys_sha256": hashlib.sha256(keys.scramble + keys.encode + keys.noise + keys.mask).hexdigest(),
        "order": orders[0].tolist(),
        "scrambled_sha256": digest(scrambled),
        "bands_sha256": digest(encode.forward(scrambled, cipher_parameters.wavelet)),
        "wire": cipher.wire_images(image[None], nonces=[NONCE])[0].tolist(),
        "envelope": envelope.hex(),
        "restored": restore(cipher, [envelope])[0].tolist(),
    }


@pytest.mark.parametrize("name", CASES)
def test_golden_vector(name: str) -> None:
    expected = json.loads((GOLDEN / f"cipher_{name}.json").read_text())
    found = describe(name)
    assert list(found) == list(expected)
    for field, value in expected.items():
        assert found[field] == value, field


@pytest.mark.parametrize("name", CASES)
def test_golden_envelope_opens(name: str) -> None:
    """From the file alone, as a later release will have to."""
    vector = json.loads((GOLDEN / f"cipher_{name}.json").read_text())
    cipher = ThreeLayerCipher(ImageKeyBundle.from_bytes(bytes.fromhex(vector["bundle"])))
    (restored,) = restore(cipher, [bytes.fromhex(vector["envelope"])])
    assert restored.tolist() == vector["restored"]
    if name in ("flep", "keyed16", "aead"):
        assert np.abs(restored.astype(int) - np.array(vector["image"])).max() <= (2 if name == "flep" else 0)


if __name__ == "__main__":
    for case in CASES:
        text = json.dumps(describe(case), indent=1).replace("\n   ", " ")
        write_atomic(GOLDEN / f"cipher_{case}.json", (text + "\n").encode())
