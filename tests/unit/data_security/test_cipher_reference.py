"""The wire image, computed a second time in plain integers, pixel by pixel.

Shares nothing with the package but AES: HKDF, HMAC, chaos, scrambling, transform, secret and mask are
written out here as the documentation states them.
"""

from __future__ import annotations

import hmac
import struct
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher

DOMAIN = b"flep-fl/v1/"


def hkdf(secret: bytes, info: bytes, salt: bytes = b"") -> bytes:
    pseudo_random = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(pseudo_random, info + b"\x01", "sha256")


def stream(key: bytes, count: int) -> list[int]:
    ecb = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = b"".join(ecb.update(index.to_bytes(16, "big")) for index in range(-(-count // 16)))
    return list(blocks[:count])


def words(key: bytes, count: int, size: int) -> list[int]:
    data = bytes(stream(key, count * size))
    return [int.from_bytes(data[size * i : size * (i + 1)], "little") for i in range(count)]


def chaos_order(key: bytes, count: int) -> list[int]:
    perturbation, *sequence = words(key, count + 1, 4)
    for _ in range(8):
        sequence = [(x * (2**32 - 1 - x) >> 30) ^ (perturbation >> 16) for x in sequence]
    return sorted(range(count), key=lambda index: sequence[index])


def haar(image: list[list[int]]) -> list[list[Fraction]]:
    height, width = len(image), len(image[0])
    bands = [[Fraction(0)] * width for _ in range(height)]
    for y in range(height // 2):
        for x in range(width // 2):
            a, b = image[2 * y][2 * x : 2 * x + 2]
            c, d = image[2 * y + 1][2 * x : 2 * x + 2]
            bands[y][x] = Fraction(a + b + c + d, 2)
            bands[y][x + width // 2] = Fraction(a + b - c - d, 2)
            bands[y + height // 2][x] = Fraction(a - b + c - d, 2)
            bands[y + height // 2][x + width // 2] = Fraction(a - b - c + d, 2)
    return bands


def reference_wire(bundle: ImageKeyBundle, image: np.ndarray, nonce: bytes) -> list:
    wide, colour = image.dtype == np.uint16, image.ndim == 3
    header = b"FLEI" + struct.pack(">BB", 1, 1) + bytes.fromhex(bundle.key_id)
    channels = image.shape[0] if colour else 0
    header += struct.pack(
        ">IB4BHII", bundle.epoch, 2 if wide else 1, *bundle.cipher.band_bits, channels, *image.shape[-2:]
    )
    header += nonce
    mac_key = hkdf(bundle.master_key, DOMAIN + b"subkey/mac")
    pixels = image.astype("<u2" if wide else np.uint8).tobytes()
    iv = hmac.digest(mac_key, header + pixels, "sha256")[:16]
    if not colour:
        return reference_plane(bundle, image, iv)
    return [
        reference_plane(bundle, plane, iv + struct.pack(">H", number))
        for number, plane in enumerate(image, start=1)
    ]


def reference_plane(bundle: ImageKeyBundle, image: np.ndarray, salt: bytes) -> list[list[int]]:
    bits, alphas = bundle.cipher.bits, [Fraction(alpha) for alpha in bundle.cipher.band_alphas]
    key = {
        layer: hkdf(bundle.master_key, DOMAIN + b"layer/" + layer.encode(), salt)
        for layer in ("scramble", "encode", "mask")
    }
    # Pad to even by repeating the last row and column.
    rows = [[int(v) for v in row] for row in image]
    rows = [row + row[-1:] * (len(row) % 2) for row in rows]
    rows += rows[-1:] * (len(rows) % 2)
    height, width = len(rows), len(rows[0])
    # Scramble: 2 x 2 blocks, scanned 1 2 / 4 3, laid out again row by row.
    corners = [(y, x) for y in range(0, height, 2) for x in range(0, width, 2)]
    scrambled = [[0] * width for _ in range(height)]
    for place, source in zip(corners, chaos_order(key["scramble"], len(corners)), strict=True):
        (y, x), (v, u) = place, corners[source]
        scrambled[y][x : x + 2] = rows[v][u], rows[v][u + 1]
        scrambled[y + 1][x : x + 2] = rows[v + 1][u + 1], rows[v + 1][u]
    bands = haar(scrambled)
    # Secret image, cut at a keyed place of its endless repetition.
    which, top, left = words(key["encode"], 3, 4)
    secret = bundle.secret_images[which % len(bundle.secret_images)]
    secret_bands = haar([[int(v) for v in row] for row in secret])
    secret_height, secret_width = secret.shape[0] // 2, secret.shape[1] // 2
    # The range 2 * 255 (65535) is cut into 255 (65535) steps, each halved for every spare bit.
    wide = image.dtype == np.uint16
    step, unit = Fraction(2, 2 ** (bits - (16 if wide else 8))), 257 if wide else 1
    masks = words(key["mask"], height * width, bits // 8)
    wire = [[0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            low, right = y >= height // 2, x >= width // 2
            alpha = alphas[2 * low + right]
            ratio = round((1 - alpha) * unit / (alpha * step) * 2**16)
            offset = step * 2 ** (bits - 1) if low or right else Fraction(0)
            # Round half to even, saturate.
            level = min(max(round((bands[y][x] + offset) / step), 0), 2**bits - 1)
            v = (top + y - (height // 2) * low) % secret_height + secret_height * low
            u = (left + x - (width // 2) * right) % secret_width + secret_width * right
            term = int(2 * secret_bands[v][u]) * ratio >> 17
            wire[y][x] = (level + term + masks[y * width + x]) % 2**bits
    return wire


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, np.uint8), (16, np.uint8), (32, np.uint8), (16, np.uint16), (32, np.uint16)]
)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.3, 0.001, (0.9, 0.5, 0.3, 0.01)])
@pytest.mark.parametrize("shape", [(1, 1), (6, 10), (7, 5), (24, 22), (3, 5, 4)])
def test_wire_image_matches_plain_integers(bits: int, dtype: type, alpha, shape, entropy) -> None:
    rng = np.random.default_rng(shape[0])
    secrets_ = [rng.integers(0, 256, size).astype(np.uint8) for size in ((4, 6), (16, 2), (8, 8))]
    bundle = ImageKeyBundle.generate(
        CipherParameters(alpha=alpha, bits=bits),
        NoiseParameters(),
        entropy=entropy(bits),
        secret_images=secrets_,
    )
    image = rng.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)
    nonce = bytes(range(16))
    wire = ThreeLayerCipher(bundle).wire_images(image[None], nonces=[nonce])[0]
    assert wire.tolist() == reference_wire(bundle, image, nonce)
