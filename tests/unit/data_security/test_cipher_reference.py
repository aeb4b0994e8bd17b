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
    lanes = -(-count // 16)
    seeds = words(key, 2 * lanes, 4)
    state = seeds[:lanes]
    sequence: list[int] = []
    for step in range(4 + 16):
        state = [(x * (2**32 - 1 - x) >> 30) ^ (seeds[lanes + i] >> 16) for i, x in enumerate(state)]
        sequence += state if step >= 4 else []
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


def reference_wire(bundle: ImageKeyBundle, image: np.ndarray, nonce: bytes) -> list[list[int]]:
    bits, alpha = bundle.cipher.bits, Fraction(bundle.cipher.alpha)
    domain = b"flep-fl/v1/"
    header = b"FLEI" + struct.pack(">BB", 1, 1) + bytes.fromhex(bundle.key_id)
    header += struct.pack(">IBBBII", bundle.epoch, 1, bits, 2, *image.shape) + nonce
    mac_key = hkdf(bundle.master_key, domain + b"subkey/mac")
    iv = hmac.digest(mac_key, header + image.tobytes(), "sha256")[:16]
    key = {
        layer: hkdf(bundle.master_key, domain + b"layer/" + layer.encode(), iv)
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
    step = Fraction(2) if bits == 8 else Fraction(1, 128)
    ratio = round((1 - alpha) / (alpha * step) * 2**16)
    masks = words(key["mask"], height * width, bits // 8)
    wire = [[0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            low, right = y >= height // 2, x >= width // 2
            offset = step * 2 ** (bits - 1) if low or right else Fraction(0)
            # Round half to even, saturate.
            level = min(max(round((bands[y][x] + offset) / step), 0), 2**bits - 1)
            v = (top + y - (height // 2) * low) % secret_height + secret_height * low
            u = (left + x - (width // 2) * right) % secret_width + secret_width * right
            term = int(2 * secret_bands[v][u]) * ratio >> 17
            wire[y][x] = (level + term + masks[y * width + x]) % 2**bits
    return wire


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.3, 0.001])
@pytest.mark.parametrize("shape", [(1, 1), (6, 10), (7, 5), (24, 22)])
def test_wire_image_matches_plain_integers(bits: int, alpha: float, shape: tuple[int, int], entropy) -> None:
    rng = np.random.default_rng(shape[0])
    secrets_ = [rng.integers(0, 256, size).astype(np.uint8) for size in ((4, 6), (16, 2), (8, 8))]
    bundle = ImageKeyBundle.generate(
        CipherParameters(alpha=alpha, bits=bits),
        NoiseParameters(),
        entropy=entropy(bits),
        secret_images=secrets_,
    )
    image = rng.integers(0, 256, shape).astype(np.uint8)
    nonce = bytes(range(16))
    wire = ThreeLayerCipher(bundle).wire_images(image[None], nonces=[nonce])[0]
    assert wire.tolist() == reference_wire(bundle, image, nonce)
