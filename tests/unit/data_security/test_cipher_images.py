"""Images as industry has them: 8 and 16 bits, grey and colour, any size; bits and alpha per sub-band."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError, EnvelopeError
from flep_fl.data_security import metrics
from flep_fl.data_security.envelope import HEADER_BYTES, MAX_CHANNELS, TAG_BYTES, parse_header
from flep_fl.data_security.keys import ImageKeyBundle, LayerKeys
from flep_fl.data_security.packing import packed_size
from flep_fl.data_security.pipeline import CHUNK_PIXELS, ThreeLayerCipher, pixel_type, restore
from flep_fl.data_security.planes import PlaneCoder

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 7), (33, 20)]
FULL = ("scramble", "encode", "noise", "mask", "envelope")
LITERAL = ("scramble", "encode", "noise", "envelope")


@pytest.fixture
def sixteen(natural) -> Callable[..., NDArray[np.uint16]]:
    """``sixteen(n, height, width)``: the natural images with eight more bits of grain, full range."""

    def make(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint16]:
        coarse = natural(count, height, width, seed).astype(np.uint16)
        fine = np.random.default_rng(seed).integers(0, 256, coarse.shape)
        return (coarse * 256 + fine).astype(np.uint16)

    return make


def psnr16(reference: NDArray[np.uint16], image: NDArray[np.uint16]) -> float:
    error = reference.astype(np.float64) - image
    return float(10 * np.log10(65535**2 / np.mean(error**2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("noise", [{}, {"std": 25, "mean": 3, "recovery": "keyed"}])
@pytest.mark.parametrize("layers", [FULL, LITERAL])
def test_uint16_on_a_32_bit_wire_is_exact(
    make_cipher, sixteen, shape: tuple[int, int], channels: int | None, noise, layers
) -> None:
    images = sixteen(2 * (channels or 1), *shape)
    if channels:
        images = images.reshape(2, channels, *shape)
    cipher = make_cipher(bits=32, layers=layers, alpha=0.3, noise=noise)
    restored = restore(cipher, cipher.encrypt(images))
    assert all(image.dtype == np.uint16 for image in restored)
    assert np.array_equal(np.stack(restored), images)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("layers", [("envelope",), (), ("mask", "envelope"), ("scramble", "envelope")])
def test_without_transform_and_noise_pixels_keep_their_own_bits(
    make_cipher, natural, sixteen, layers, bits: int
) -> None:
    """Whatever cipher.bits says: nothing is quantised, so nothing may be lost."""
    cipher = make_cipher(bits=bits, layers=layers)
    for images in (natural(2, 7, 10), sixteen(2, 7, 10), sixteen(6, 7, 10).reshape(2, 3, 7, 10)):
        envelopes = cipher.encrypt(images)
        side = cipher._coder(images.dtype.type).pad_side
        pixels = (-(-7 // side) * side) * (-(-10 // side) * side) * images[0].size // 70
        assert len(envelopes[0]) == HEADER_BYTES + pixels * images.itemsize + TAG_BYTES
        assert set(parse_header(envelopes[0]).bits) == {8 * images.itemsize}
        restored = np.stack(restore(cipher, envelopes))
        assert restored.dtype == images.dtype
        assert np.array_equal(restored, images)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colour_on_a_16_bit_wire_is_exact(make_cipher, natural, shape, channels: int) -> None:
    images = natural(2 * channels, *shape).reshape(2, channels, *shape)
    cipher = make_cipher(bits=16)
    restored = restore(cipher, cipher.encrypt(images))
    assert all(image.dtype == np.uint8 for image in restored)
    assert np.array_equal(np.stack(restored), images)


def test_decrypt_gives_uint16_on_the_8_bit_scale(make_cipher, sixteen) -> None:
    images = sixteen(1, 8, 8)
    cipher = make_cipher(bits=32)
    (decrypted,) = cipher.decrypt(cipher.encrypt(images))
    assert decrypted.dtype == np.float32
    np.testing.assert_allclose(decrypted, images[0] / 257, rtol=1e-6, atol=1e-5)


def test_uint16_on_a_16_bit_wire_loses_what_uint8_loses_on_8(make_cipher, sixteen) -> None:
    images = sixteen(4, 64, 64)
    cipher = make_cipher(bits=16)
    restored = np.stack(restore(cipher, cipher.encrypt(images)))
    # Half a step of 2 levels, on a scale with 48.2 dB more room.
    assert psnr16(images, restored) == pytest.approx(52.4 + 20 * np.log10(65535 / 255), abs=0.5)


def test_other_byte_orders_are_the_same_image(make_cipher, sixteen) -> None:
    images = sixteen(1, 6, 8)
    cipher = make_cipher(bits=32)
    other = np.frombuffer(images.astype(">u2").tobytes(), ">u2").reshape(images.shape)
    nonces = [bytes(16)]
    assert np.array_equal(cipher.wire_images(images, nonces=nonces), cipher.wire_images(other, nonces=nonces))
    (restored,) = restore(cipher, cipher.encrypt(other))
    assert np.array_equal(restored, images[0])


def test_the_header_names_shape_dtype_and_bits(make_cipher, sixteen) -> None:
    cipher = make_cipher(bits=(16, 8, 8, 6))
    (envelope,) = cipher.encrypt(sixteen(3, 5, 7).reshape(1, 3, 5, 7))
    header = parse_header(envelope)
    assert (header.shape, header.bits) == ((3, 5, 7), (16, 8, 8, 6))
    assert pixel_type(envelope) is np.uint16
    assert len(envelope) == HEADER_BYTES + 3 * packed_size((6, 8), header.bits) + TAG_BYTES
    assert pixel_type(b"somebody else's") is np.uint8


def test_channels_share_an_envelope_but_no_key(make_cipher) -> None:
    """Three equal channels of a flat image give three unrelated wires, also without the mask."""
    images = np.full((1, 3, 64, 64), 90, np.uint8)
    wires = make_cipher().wire_images(images)[0]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(wires[one] == wires[two]) < 0.02
    ramps = np.arange(3 * 64 * 64).reshape(1, 3, 64, 64).astype(np.uint8)
    places = make_cipher(layers=("scramble",)).wire_images(ramps)[0]
    assert np.mean(places[0] == places[1]) < 0.1


def test_one_changed_pixel_of_one_channel_changes_all(make_cipher, natural) -> None:
    image = natural(3, 32, 32).reshape(1, 3, 32, 32)
    other = image.copy()
    other[0, 2, 5, 5] ^= 1
    cipher = make_cipher()
    one, two = (cipher.wire_images(each, nonces=[bytes(16)])[0] for each in (image, other))
    for channel in range(3):
        assert np.mean(one[channel] == two[channel]) < 0.03


def test_grey_and_one_channel_are_different_images(make_cipher, natural) -> None:
    images = natural(1, 8, 8)
    cipher = make_cipher()
    grey = cipher._encrypt_with(images, [bytes(16)])[0]
    channel = cipher._encrypt_with(images[:, None], [bytes(16)])[0]
    assert parse_header(grey).iv != parse_header(channel).iv
    assert cipher.decrypt([grey, channel])[1].shape == (1, 8, 8)


def test_mixed_kinds_keep_their_order(make_cipher, natural, sixteen) -> None:
    cipher = make_cipher(bits=32)
    images = [natural(1, 4, 6)[0], sixteen(3, 4, 6), natural(3, 9, 5), sixteen(1, 4, 6)[0]] * 2
    envelopes = [cipher.encrypt(image[None])[0] for image in images]
    for image, restored in zip(images, restore(cipher, envelopes), strict=True):
        assert restored.dtype == image.dtype
        assert np.array_equal(image, restored)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_empty_batches(make_cipher, dtype: type) -> None:
    cipher = make_cipher(bits=(8, 6, 6, 5))
    for shape in ((0, 7, 8), (0, 3, 7, 8)):
        empty = np.empty(shape, dtype)
        assert cipher.encrypt(empty) == []
        assert cipher.wire_images(empty).shape == (*shape[:-2], 8, 8)
        assert cipher.wire_bytes(empty).shape[0] == 0


@pytest.mark.parametrize("layers", [FULL, LITERAL])
@pytest.mark.parametrize("noise", [{}, {"std": 25}])
def test_strips_of_a_large_image_change_nothing(
    make_cipher, natural, monkeypatch, layers, noise: dict[str, object]
) -> None:
    """An image that is worked on in strips of rows gives the bytes of one worked on at once."""
    images = natural(1, 50, 36)
    bits = (8, 6, 6, 5)
    whole = make_cipher(seed=7, layers=layers, noise=noise, bits=bits)._encrypt_with(images, [bytes(16)])
    expected = make_cipher(seed=7, layers=layers, noise=noise, bits=bits).decrypt(whole)
    assert images.size < CHUNK_PIXELS
    monkeypatch.setattr("flep_fl.data_security.planes.CHUNK_PIXELS", 300)
    cipher = make_cipher(seed=7, layers=layers, noise=noise, bits=bits)
    strips = list(PlaneCoder(cipher.bundle)._strips((1, 50, 36)))
    assert len(strips) > 3
    assert cipher._encrypt_with(images, [bytes(16)]) == whole
    assert np.array_equal(cipher.decrypt(whole)[0], expected[0])


@pytest.mark.parametrize(
    ("bits", "least"),
    [((8, 7, 7, 7), 52.0), ((8, 6, 6, 6), 47.0), ((8, 6, 6, 5), 44.0), (6, 42.0), (4, 30.0)],
)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.01])
def test_fewer_bits_cost_little(make_cipher, natural, bits, least: float, alpha: float) -> None:
    images = natural(4, 64, 64)
    cipher = make_cipher(bits=bits, alpha=alpha)
    restored = np.stack(restore(cipher, cipher.encrypt(images)))
    assert metrics.psnr(images, restored) > least


def test_companding_never_cuts_off(make_cipher) -> None:
    """A checkerboard has the largest possible diagonal detail."""
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)[None]
    for bits in ((8, 6, 6, 5), (8, 4, 4, 4), (8, 2, 2, 2)):
        cipher = make_cipher(bits=bits)
        assert np.abs(np.stack(cipher.decrypt(cipher.encrypt(board))) - board).max() <= 2


@pytest.mark.parametrize("bits", [(8, 6, 6, 5), (10, 7, 7, 7), 5, (16, 8, 8, 4)])
def test_packed_bytes_are_uniform(make_cipher, natural, bits) -> None:
    """Coefficients of fewer bits fill their bytes: the packed wire passes for random bytes."""
    wires = make_cipher(seed=3, bits=bits).wire_bytes(natural(4, 128, 128))
    counts = np.bincount(wires.reshape(-1), minlength=256)
    expected = counts.sum() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, deviation 22.6.
    assert abs(chi_square - 255) < 4.5 * 22.6
    following = np.corrcoef(wires[:, :-1].reshape(-1), wires[:, 1:].reshape(-1))[0, 1]
    assert abs(following) < 4.5 / np.sqrt(wires.size)


def test_packed_wire_is_what_the_envelope_holds(make_cipher, natural) -> None:
    cipher = make_cipher(bits=(8, 6, 6, 5), layers=("scramble", "encode", "mask"))
    images, nonces = natural(2, 10, 6), [bytes(16), bytes(range(16))]
    for envelope, data in zip(
        cipher._encrypt_with(images, nonces), cipher.wire_bytes(images, nonces=nonces), strict=True
    ):
        assert envelope[HEADER_BYTES:-TAG_BYTES] == data.tobytes()


@pytest.mark.parametrize("layer", ["scramble", "encode", "noise", "mask"])
@pytest.mark.parametrize(
    ("parameters", "colour", "wide"),
    [({"bits": (8, 6, 6, 5)}, False, False), ({"bits": 16}, True, False), ({"bits": 32}, False, True)],
)
def test_each_layers_key_is_needed(
    make_cipher, natural, sixteen, monkeypatch, layer: str, parameters, colour: bool, wide: bool
) -> None:
    """With one bit of one layer's key changed, and the envelope opened all the same, the image is spoilt."""
    images = (sixteen if wide else natural)(3, 64, 64)
    if colour:
        images = images[None]
    cipher = make_cipher(noise={"std": 60, "recovery": "keyed"}, **parameters)
    envelopes = cipher.encrypt(images)
    scaled = images / (257.0 if wide else 1.0)
    good = np.stack(cipher.decrypt(envelopes))
    true_keys = ImageKeyBundle.layer_keys

    def wrong_keys(self: ImageKeyBundle, iv: bytes) -> LayerKeys:
        keys = true_keys(self, iv)
        changed = bytes([getattr(keys, layer)[0] ^ 1]) + getattr(keys, layer)[1:]
        return dataclasses.replace(keys, **{layer: changed})

    monkeypatch.setattr(ImageKeyBundle, "layer_keys", wrong_keys)
    spoilt = np.stack(cipher.decrypt(envelopes))
    assert metrics.psnr(scaled, good) > 42
    assert metrics.psnr(scaled, spoilt) < 20


@pytest.mark.parametrize("field", range(22, 42))
def test_forged_sizes_are_refused_before_anything_is_allocated(make_cipher, natural, field: int) -> None:
    cipher = make_cipher()
    (envelope,) = cipher.encrypt(natural(1, 8, 8))
    with pytest.raises(EnvelopeError):
        cipher.decrypt([envelope[:field] + b"\xff" + envelope[field + 1 :]])


def test_channel_limit(make_cipher) -> None:
    from flep_fl.contracts.errors import ImageFormatError

    wide = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (1, MAX_CHANNELS + 1, 1, 1))
    with pytest.raises(ImageFormatError, match="channels"):
        make_cipher().encrypt(wide)


def test_bits_per_band_need_the_transform(make_cipher) -> None:
    with pytest.raises(CipherParameterError, match=r"cipher\.bits.*encode"):
        make_cipher(layers=("scramble", "mask"), bits=(8, 6, 6, 5))
    assert ThreeLayerCipher(make_cipher(layers=("mask",), bits=6).bundle).encrypt(
        np.zeros((1, 3, 3), np.uint8)
    )
