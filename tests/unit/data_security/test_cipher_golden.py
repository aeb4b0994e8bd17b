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
from flep_fl.data_security.mask import mask_stream
from flep_fl.data_security.noise import noise_words
from flep_fl.data_security.packing import word_type
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.data_security.scramble import scramble
from flep_fl.data_security.stream import keystream32

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
    "uint16": ({"bits": 32}, {"family": "laplacian", "std": 10.0, "recovery": "keyed"}),
    "uint16_lossy": ({"bits": 16, "block_side": 4}, {}),
    "colour": ({"alpha": (0.5, 0.4, 0.3, 0.2)}, {}),
    "packed": ({"bits": (8, 6, 6, 5)}, {}),
    "preset": ({"bits": (8, 6, 6, 6)}, {"std": 25.0}),
    "db2": ({"bits": 16, "wavelet": "db2"}, {"family": "rayleigh", "std": 10.0, "recovery": "keyed"}),
    "packed_colour16": ({"bits": (14, 10, 10, 7)}, {"std": 25.0, "recovery": "keyed"}),
    "rician": ({"bits": 16}, {"family": "rician", "std": 12.0}),
}
EXACT = ("keyed16", "aead", "uint16")
"""Cases that give back every pixel."""


def make_image(name: str) -> np.ndarray:
    """Return a ramp with a dark square: no random generator whose stream could change."""
    image = np.add.outer(np.arange(13) * 9, np.arange(10) * 14)
    image[4:8, 3:6] = 5
    if "16" in name and name != "keyed16":
        return planes_of(name, image * 181 % 65536).astype(np.uint16)
    return planes_of(name, image % 256).astype(np.uint8)


def planes_of(name: str, image: np.ndarray) -> np.ndarray:
    """Give a colour case three channels, each turned a little further."""
    return np.stack([np.roll(image, shift) for shift in (0, 7, 40)]) if "colour" in name else image


def digest(array: np.ndarray) -> str:
    """Hash a little-endian array with its dtype and shape."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def describe_plane(bundle: ImageKeyBundle, plane: np.ndarray, salt: bytes) -> dict[str, Any]:
    """Return what each layer makes of one plane, from the room's public functions."""
    parameters = bundle.cipher
    keys = bundle.layer_keys(salt)
    side = parameters.block_side
    multiple = np.lcm(2, side)
    height, width = (-(-length // multiple) * multiple for length in plane.shape)
    padded = np.pad(plane, ((0, height - 13), (0, width - 10)), mode="edge")[None]
    orders = chaotic_order([keys.scramble], height * width // side**2)
    scrambled = scramble(padded, orders, side)
    peak = int(np.iinfo(plane.dtype).max)
    quantiser = encode.make_quantiser(parameters.wavelet, parameters.bits, peak=peak)
    secret = encode.modular_planes(
        bundle.secret_images, parameters.wavelet, parameters.band_alphas, quantiser, gain=peak // 255
    )
    _, row, column = (int(word) for word in keystream32(keys.encode, 3))
    word_bits = 8 * np.dtype(word_type(parameters.band_bits)).itemsize
    return {
        "keys_sha256": hashlib.sha256(keys.scramble + keys.encode + keys.noise + keys.mask).hexdigest(),
        "order": orders[0].tolist(),
        "scrambled_sha256": digest(scrambled),
        "bands_sha256": digest(encode.forward(scrambled, parameters.wavelet)),
        "secret_sha256": digest(encode.window(secret[0], row, column, (height, width))),
        "noise_words_sha256": digest(noise_words(keys.noise, (height, width))),
        "mask_sha256": digest(mask_stream(keys.mask, (height, width), word_bits)),
    }


def describe(name: str) -> dict[str, Any]:
    parameters, noise = CASES[name]
    secret = np.multiply.outer(np.arange(6) * 37 + 11, np.arange(8) * 5 + 3).astype(np.uint8)
    bundle = ImageKeyBundle(
        bytes(range(32)), 3, CipherParameters(**parameters), NoiseParameters(**noise), (secret,)
    )
    cipher = ThreeLayerCipher(bundle, noise_secret=NOISE_SECRET)
    image = make_image(name)
    (envelope,) = cipher._encrypt_with(image[None], [NONCE])
    header = parse_header(envelope)
    if image.ndim == 2:
        planes = [describe_plane(bundle, image, header.iv)]
    else:
        planes = [
            describe_plane(bundle, plane, header.iv + (channel + 1).to_bytes(2, "big"))
            for channel, plane in enumerate(image)
        ]
    return {
        "bundle": bundle.to_bytes().hex(),
        "key_id": bundle.key_id,
        "nonce": NONCE.hex(),
        "noise_secret": NOISE_SECRET.hex(),
        "image": image.tolist(),
        "dtype": image.dtype.name,
        "iv": header.iv.hex(),
        "planes": planes,
        "wire": cipher.wire_images(image[None], nonces=[NONCE])[0].tolist(),
        "packed": cipher.wire_bytes(image[None], nonces=[NONCE])[0].tobytes().hex(),
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
    assert restored.dtype.name == vector["dtype"]
    assert restored.tolist() == vector["restored"]
    if name in EXACT:
        assert restored.tolist() == vector["image"]


if __name__ == "__main__":
    for case in CASES:
        text = json.dumps(describe(case), indent=1).replace("\n   ", " ")
        write_atomic(GOLDEN / f"cipher_{case}.json", (text + "\n").encode())
