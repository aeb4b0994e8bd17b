"""Every inverse pair of the image cipher, over shapes, keys and parameters."""

from __future__ import annotations

import itertools
import secrets

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flep_fl.data_security import encode
from flep_fl.data_security.chaos import chaotic_order
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import open_blob, open_label, seal_blob, seal_label
from flep_fl.data_security.mask import add_mask, remove_mask
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.data_security.scramble import scramble, spiral_positions, unscramble
from flep_fl.data_security.wrapping import unwrap_bundle, wrap_bundle

few = settings(max_examples=25, deadline=None)
keys = st.binary(min_size=32, max_size=32)
alphas = st.floats(min_value=1e-12, max_value=1.0, allow_subnormal=False)
wavelets = st.sampled_from(["haar", "db1", "db2", "db5", "sym4", "coif1", "coif2"])
images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)))


def make_bundle(seed: bytes, parameters: CipherParameters, noise: NoiseParameters) -> ImageKeyBundle:
    """Return a small bundle whose secrets come from ``seed`` (32 bytes)."""
    small = np.frombuffer(seed[:24], np.uint8).reshape(4, 6)
    return ImageKeyBundle(seed, 1, parameters, noise, (small, small[:2, :2]))


@few
@given(side=st.integers(1, 32))
def test_spiral_visits_every_position_once_in_steps_of_one(side: int) -> None:
    positions = spiral_positions(side)
    assert sorted(positions) == [(row, column) for row in range(side) for column in range(side)]
    assert all(abs(r1 - r0) + abs(c1 - c0) == 1 for (r0, c0), (r1, c1) in itertools.pairwise(positions))


@few
@given(key=keys, count=st.integers(1, 3000))
def test_chaotic_order_is_a_permutation(key: bytes, count: int) -> None:
    order = chaotic_order([key, key[::-1]], count)
    assert np.array_equal(np.sort(order, axis=-1), np.tile(np.arange(count), (2, 1)))


@few
@given(
    key=keys,
    side=st.integers(1, 5),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]),
)
def test_scramble_has_an_inverse(key: bytes, side: int, blocks: tuple[int, int, int], dtype: type) -> None:
    count, rows, columns = blocks
    plane = np.arange(count * rows * columns * side**2).astype(dtype)
    plane = plane.reshape(count, rows * side, columns * side)
    orders = chaotic_order([key[index:] + key[:index] for index in range(count)], rows * columns)
    moved = scramble(plane, orders, side)
    assert moved.dtype == plane.dtype
    assert np.array_equal(np.sort(moved.reshape(count, -1)), np.sort(plane.reshape(count, -1)))
    assert np.array_equal(unscramble(moved, orders, side), plane)


@few
@given(plane=images, wavelet=wavelets)
def test_wavelet_transform_has_an_inverse(plane: np.ndarray, wavelet: str) -> None:
    plane = plane.repeat(2, axis=1).repeat(2, axis=2)
    restored = encode.inverse(encode.forward(plane, wavelet), wavelet)
    assert restored.dtype == np.float32
    # float32 coefficients of up to 510 * |filter|^2: a few units in the last place.
    np.testing.assert_allclose(restored, plane, atol=1e-3)


@few
@given(key=keys, dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]), data=st.data())
def test_mask_has_an_inverse(key: bytes, dtype: type, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=20))
    wire = data.draw(hnp.arrays(dtype, shape))
    masked = wire.copy()
    add_mask(masked, key)
    remove_mask(masked, key)
    assert np.array_equal(masked, wire)


@few
@given(
    seed=keys,
    plane=images,
    alpha=alphas,
    side=st.integers(1, 5),
    recovery=st.sampled_from(["none", "keyed"]),
    std=st.floats(0.5, 255),
)
def test_16_bit_cipher_is_lossless(
    seed: bytes, plane: np.ndarray, alpha: float, side: int, recovery: str, std: float
) -> None:
    noise = NoiseParameters(std=std, recovery="keyed") if recovery == "keyed" else NoiseParameters()
    cipher = ThreeLayerCipher(
        make_bundle(seed, CipherParameters(alpha=alpha, bits=16, block_side=side), noise)
    )
    assert np.array_equal(np.stack(restore(cipher, cipher.encrypt(plane))), plane)


@few
@given(seed=keys, plane=images, alpha=alphas, wavelet=wavelets, side=st.integers(1, 5))
def test_8_bit_cipher_is_near_lossless(
    seed: bytes, plane: np.ndarray, alpha: float, wavelet: str, side: int
) -> None:
    parameters = CipherParameters(alpha=alpha, wavelet=wavelet, block_side=side)
    cipher = ThreeLayerCipher(make_bundle(seed, parameters, NoiseParameters()))
    step = encode.make_quantiser(wavelet, 8).step
    error = np.stack(cipher.decrypt(cipher.encrypt(plane))) - plane
    # Each coefficient is off by half a step, by a whole one at the very end of a detail band's range.
    padded = (plane.shape[1] + 2 * side) * (plane.shape[2] + 2 * side)
    assert np.sqrt(np.sum(error**2, axis=(1, 2)).max()) <= step * np.sqrt(padded)


@few
@given(seed=keys, alpha=alphas, std=st.floats(0, 255), epoch=st.integers(1, 2**32 - 1))
def test_bundle_serialisation_has_an_inverse(seed: bytes, alpha: float, std: float, epoch: int) -> None:
    bundle = ImageKeyBundle.generate(
        CipherParameters(alpha=alpha),
        NoiseParameters(std=std),
        epoch=epoch,
        entropy=lambda count: (seed * 2)[:count],
        secret_images=[np.frombuffer(seed, np.uint8).reshape(4, 8)],
    )
    again = ImageKeyBundle.from_bytes(bundle.to_bytes())
    assert again == bundle
    assert again.to_bytes() == bundle.to_bytes()


@few
@given(seed=keys, record=st.text(max_size=40), split=st.text(max_size=8), label=st.integers(0, 2**63 - 1))
def test_label_has_an_inverse(seed: bytes, record: str, split: str, label: int) -> None:
    bundle = make_bundle(seed, CipherParameters(), NoiseParameters())
    assert open_label(bundle, record, split, seal_label(bundle, record, split, label)) == label


@few
@given(seed=keys, purpose=st.text(max_size=20), data=st.binary(max_size=200))
def test_blob_has_an_inverse(seed: bytes, purpose: str, data: bytes) -> None:
    bundle = make_bundle(seed, CipherParameters(), NoiseParameters())
    assert open_blob(bundle, purpose, seal_blob(bundle, purpose, data, secrets.token_bytes)) == data


@few
@given(data=st.binary(max_size=300), context=st.binary(max_size=40))
def test_wrapping_has_an_inverse(data: bytes, context: bytes) -> None:
    private = X25519PrivateKey.generate()
    assert (
        unwrap_bundle(wrap_bundle(data, private.public_key(), context=context), private, context=context)
        == data
    )


@few
@given(junk=st.binary(max_size=400))
def test_junk_is_never_an_image_a_bundle_or_a_label(junk: bytes) -> None:
    from flep_fl.contracts.errors import FlepError

    bundle = make_bundle(bytes(32), CipherParameters(), NoiseParameters())
    for read in (
        lambda: ThreeLayerCipher(bundle).decrypt([junk]),
        lambda: ImageKeyBundle.from_bytes(junk),
        lambda: open_label(bundle, "r", "train", junk),
        lambda: unwrap_bundle(junk, bytes([1]) * 32, context=b""),
    ):
        with pytest.raises(FlepError):
            read()
