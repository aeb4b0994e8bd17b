from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from flep_fl.contracts.errors import CipherParameterError, FlepError, ImageKeyError
from flep_fl.data_security.keys import (
    CipherParameters,
    ImageKeyBundle,
    NoiseParameters,
    owner_noise_commitment,
    owner_noise_key,
)
from flep_fl.data_security.stream import derive_key


@pytest.fixture
def bundle(entropy) -> ImageKeyBundle:
    return ImageKeyBundle.generate(
        CipherParameters(alpha=0.3), NoiseParameters(std=25), epoch=7, entropy=entropy(1)
    )


def rebuilt(bundle: ImageKeyBundle, **changes: object) -> ImageKeyBundle:
    fields = {
        "master_key": bundle.master_key,
        "epoch": bundle.epoch,
        "cipher": bundle.cipher,
        "noise": bundle.noise,
        "secret_images": bundle.secret_images,
    }
    return ImageKeyBundle(**(fields | changes))


def test_round_trip(bundle: ImageKeyBundle) -> None:
    again = ImageKeyBundle.from_bytes(bundle.to_bytes())
    assert again == bundle
    assert (again.key_id, again.epoch, again.cipher, again.noise) == (
        bundle.key_id,
        7,
        bundle.cipher,
        bundle.noise,
    )
    assert all(np.array_equal(a, b) for a, b in zip(again.secret_images, bundle.secret_images, strict=True))


def test_generated_bundles_differ() -> None:
    make = lambda: ImageKeyBundle.generate(CipherParameters(), NoiseParameters())  # noqa: E731
    one, two = make(), make()
    assert one != two
    assert one.key_id != two.key_id


def test_key_id_names_everything_but_the_epoch(bundle: ImageKeyBundle) -> None:
    image = bundle.secret_images[0].copy()
    image[0, 0] ^= 1
    others = [
        rebuilt(bundle, master_key=bytes(32)),
        rebuilt(bundle, cipher=CipherParameters(alpha=0.31)),
        rebuilt(bundle, noise=NoiseParameters(std=24)),
        rebuilt(bundle, secret_images=(image, bundle.secret_images[1])),
    ]
    identifiers = {other.key_id for other in others} | {bundle.key_id}
    assert len(identifiers) == 5
    assert all(len(bytes.fromhex(identifier)) == 16 for identifier in identifiers)
    assert rebuilt(bundle, epoch=8).key_id == bundle.key_id
    assert rebuilt(bundle, epoch=8) != bundle


def test_repr_hides_secrets(bundle: ImageKeyBundle) -> None:
    text = repr(bundle)
    assert bundle.key_id in text
    assert bundle.master_key.hex() not in text
    assert repr(bundle.master_key)[2:-1] not in text
    keys = bundle.layer_keys(bytes(16))
    assert keys.mask.hex() not in repr(keys) and repr(keys.mask) not in repr(keys)


def test_sub_keys_are_separate(bundle: ImageKeyBundle) -> None:
    one, two = bundle.layer_keys(bytes(16)), bundle.layer_keys(bytes(15) + b"\x01")
    keys = [bundle.subkey(label) for label in ("mac", "envelope", "label")]
    for layer in (one, two):
        keys += [layer.scramble, layer.encode, layer.noise, layer.mask]
    keys += [owner_noise_key(bundle.master_key, bytes(16)), owner_noise_commitment(bundle.master_key)]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)


def test_hkdf_is_rfc_5869() -> None:
    okm = derive_key(
        b"\x0b" * 22, bytes(range(0xF0, 0xFA)), salt=bytes(range(13)), length=42
    )  # RFC 5869, test case 1
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_every_flipped_byte_is_refused(entropy) -> None:
    image = np.zeros((2, 2), np.uint8)
    small = ImageKeyBundle.generate(
        CipherParameters(), NoiseParameters(), entropy=entropy(2), secret_images=[image]
    )
    data = small.to_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 0x10
        with pytest.raises(ImageKeyError):
            ImageKeyBundle.from_bytes(bytes(altered))
    for length in range(len(data)):
        with pytest.raises(ImageKeyError):
            ImageKeyBundle.from_bytes(data[:length])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"alpha":0.3', b'"alpha":9.0'),
        (b'"alpha":0.3', b'"beta" :0.3'),
        (b'"alpha":0.3', b'"alpha": .3'),
        (b'"epoch":7', b'"epoch":0'),
        (b'"epoch":7', b'"ypoch":7'),
        (b'"epoch":7', b'"epoch": 7'),
        (b"[256,256]", b"[256,254]"),
        (b"[256,256]", b"[256,999999]"),
        (b"[256,256]", b'["a","b"]'),
        (b'"layers":[', b'"Layers":['),
    ],
)
def test_a_forged_description_is_refused(bundle: ImageKeyBundle, old: bytes, new: bytes) -> None:
    """The checksum is no protection: whoever writes the file also writes the checksum."""
    data = bundle.to_bytes()[:-32]
    (length,) = struct.unpack_from(">I", data, 9)
    description = data[13 : 13 + length]
    assert old in description
    description = description.replace(old, new)
    body = data[:9] + struct.pack(">I", len(description)) + description + data[13 + length :]
    with pytest.raises((ImageKeyError, CipherParameterError)):
        ImageKeyBundle.from_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    "changes",
    [
        {"master_key": bytes(31)},
        {"epoch": 0},
        {"epoch": True},
        {"secret_images": ()},
        {"secret_images": (np.zeros((3, 4), np.uint8),)},
        {"secret_images": (np.zeros((4, 4), np.float32),)},
        {"version": 2},
    ],
)
def test_bad_fields_are_named(bundle: ImageKeyBundle, changes: dict[str, object]) -> None:
    with pytest.raises(FlepError):
        rebuilt(bundle, **changes)


def test_secret_images_cannot_be_changed_from_outside(bundle: ImageKeyBundle) -> None:
    with pytest.raises(ValueError, match="read-only"):
        bundle.secret_images[0][0, 0] = 1
