"""Bit for bit: every shape, dtype, wavelet, alpha and key that is promised to lose nothing."""

from __future__ import annotations

import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flep_fl.data_security.encode import make_quantiser
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.packing import pack, packed_size, unpack, word_type
from flep_fl.data_security.parameters import BITS
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.data_security.wavelets import exact_from_alpha

few = settings(max_examples=25, deadline=None)
keys = st.binary(min_size=32, max_size=32)
alphas = st.floats(min_value=1e-9, max_value=1.0, allow_subnormal=False)
per_band = st.one_of(alphas, st.tuples(alphas, alphas, alphas, alphas))
shares = st.floats(min_value=0.0, max_value=1.0)
wavelets = st.sampled_from(
    ["haar", "db2", "db7", "db38", "sym6", "coif1", "coif5", "bior1.3", "bior3.1", "bior4.4", "rbio2.8"]
)
noises = st.one_of(
    st.just(NoiseParameters()),
    st.builds(
        NoiseParameters,
        family=st.sampled_from(["gaussian", "laplacian", "rayleigh"]),
        mean=st.floats(-255, 255),
        std=st.floats(0, 255),
        recovery=st.just("keyed"),
    ),
)
sides = st.integers(1, 20)
shapes = st.one_of(
    st.tuples(st.integers(1, 3), sides, sides),
    st.tuples(st.integers(1, 2), st.integers(1, 4), sides, sides),
)


def build(seed: bytes, noise: NoiseParameters, **parameters: object) -> ThreeLayerCipher:
    """Return a cipher with small secret images drawn from ``seed``."""
    small = np.frombuffer(seed[:24], np.uint8).reshape(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = CipherParameters(**parameters)  # type: ignore[arg-type]
    return ThreeLayerCipher(ImageKeyBundle(seed, 1, chosen, noise, (small, small[:2, :2])))


def assert_exact(cipher: ThreeLayerCipher, images: np.ndarray) -> None:
    restored = restore(cipher, cipher.encrypt(images))
    assert len(restored) == len(images)
    for image, again in zip(images, restored, strict=True):
        assert again.dtype == image.dtype
        assert np.array_equal(again, image)


@few
@given(
    seed=keys,
    data=st.data(),
    shape=shapes,
    wavelet=wavelets,
    alpha=per_band,
    noise=noises,
    side=st.integers(1, 5),
    units=st.sampled_from(["image", "wire"]),
)
def test_uint8_on_a_16_bit_wire(seed, data, shape, wavelet, alpha, noise, side, units) -> None:
    images = data.draw(hnp.arrays(np.uint8, shape))
    cipher = build(seed, noise, bits=16, wavelet=wavelet, alpha=alpha, block_side=side, noise_units=units)
    assert_exact(cipher, images)


@few
@given(
    seed=keys,
    data=st.data(),
    shape=shapes,
    dtype=st.sampled_from([np.uint8, np.uint16]),
    wavelet=wavelets,
    alpha=per_band,
    noise=noises,
    side=st.integers(1, 5),
)
def test_both_dtypes_on_a_32_bit_wire(seed, data, shape, dtype, wavelet, alpha, noise, side) -> None:
    images = data.draw(hnp.arrays(dtype, shape))
    assert_exact(build(seed, noise, bits=32, wavelet=wavelet, alpha=alpha, block_side=side), images)


@few
@given(
    seed=keys,
    data=st.data(),
    shape=shapes,
    wide=st.booleans(),
    wavelet=wavelets,
    share=shares,
    noise=noises,
    layers=st.sampled_from(
        [
            ("scramble", "encode", "noise", "envelope"),
            ("encode",),
            ("encode", "noise"),
            ("scramble", "encode"),
            ("noise", "envelope"),
            (),
        ]
    ),
)
def test_without_the_mask_from_the_least_alpha_on(
    seed, data, shape, wide, wavelet, share, noise, layers
) -> None:
    images = data.draw(hnp.arrays(np.uint16 if wide else np.uint8, shape))
    bits, peak = (32, 65535) if wide else (16, 255)
    step = max(make_quantiser(wavelet, bits, peak=peak).steps)
    least = exact_from_alpha(wavelet, step, peak, modular=False)
    alpha = min(1.0, least * (1 + 1e-9) + share * (1 - least))
    assert_exact(build(seed, noise, bits=bits, wavelet=wavelet, alpha=alpha, layers=layers), images)


@few
@given(
    bits=st.one_of(
        st.tuples(st.sampled_from(BITS)),
        st.tuples(*[st.sampled_from(BITS)] * 4),
    ),
    halves=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_has_an_inverse(bits: tuple[int, ...], halves: tuple[int, int], seed: int) -> None:
    shape = (2 * halves[0], 2 * halves[1])
    plane = np.random.default_rng(seed).integers(0, 1 << min(bits), shape).astype(word_type(bits))
    data = pack(plane, bits)
    assert len(data) == packed_size(shape, bits)
    assert np.array_equal(unpack(data, shape, bits), plane)


@few
@given(
    seed=keys,
    data=st.data(),
    shape=shapes,
    dtype=st.sampled_from([np.uint8, np.uint16]),
    bits=st.tuples(*[st.sampled_from([b for b in BITS if b <= 8])] * 4),
    alpha=per_band,
)
def test_keyed_layers_on_packed_bits_lose_nothing_more(seed, data, shape, dtype, bits, alpha) -> None:
    """Secret, keyed noise and mask are integers modulo 2^bits: the loss is the quantiser's alone."""
    images = data.draw(hnp.arrays(dtype, shape))
    noise = NoiseParameters(std=40.0, mean=7.0, recovery="keyed")
    full = build(seed, noise, bits=bits, alpha=alpha, layers=("encode", "noise", "mask", "envelope"))
    bare = build(seed, NoiseParameters(), bits=bits, alpha=1.0, layers=("encode",))
    for image, other in zip(
        full.decrypt(full.encrypt(images)), bare.decrypt(bare.encrypt(images)), strict=True
    ):
        assert np.array_equal(image, other)
