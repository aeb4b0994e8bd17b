from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flep_fl.contracts.errors import CipherParameterError, DenoiserError, ImageFormatError
from flep_fl.data_security import limits, metrics
from flep_fl.data_security.envelope import parse_header
from flep_fl.data_security.keys import ImageKeyBundle, LayerKeys
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 7), (8, 8), (33, 20)]
HAAR_PSNR = 52.4
"""Step 2 on multiples of 1/2 gives errors -1/2, 0, 1/2, 1 alike often: 10 log10(255^2 / 0.375)."""


@pytest.mark.parametrize("alpha", [1.0, 0.99, 0.8, 0.5, 0.3, 0.1, 0.01, 1e-6, (1.0, 0.5, 0.1, 0.001)])
def test_8_bit_wire_keeps_its_precision_for_every_alpha(make_cipher, natural, alpha) -> None:
    images = natural(4, 128, 128)
    cipher = make_cipher(alpha=alpha)
    restored = np.stack(cipher.decrypt(cipher.encrypt(images)))
    assert abs(metrics.psnr(images, restored) - HAAR_PSNR) < 0.5
    assert np.abs(restored - images).max() <= 2.0


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_flat_images_are_not_shifted(make_cipher, value: int) -> None:
    images = np.full((1, 16, 16), value, np.uint8)
    cipher = make_cipher()
    assert np.abs(cipher.decrypt(cipher.encrypt(images))[0] - value).max() <= 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.07])
@pytest.mark.parametrize("recovery", [None, "keyed"])
def test_16_bit_wire_is_exact(make_cipher, natural, shape: tuple[int, int], alpha: float, recovery) -> None:
    images = natural(2, *shape)
    noise = {"std": 25, "mean": 3, "recovery": recovery} if recovery else {}
    cipher = make_cipher(alpha=alpha, bits=16, noise=noise)
    for image, restored in zip(images, cipher.decrypt(cipher.encrypt(images)), strict=True):
        assert restored.dtype == np.float32
        assert np.array_equal(restored, image)


@pytest.mark.parametrize("wavelet", ["db2", "sym4", "coif1", "db8"])
def test_16_bit_wire_is_exact_after_rounding_for_other_wavelets(make_cipher, natural, wavelet: str) -> None:
    images = natural(2, 30, 20)
    cipher = make_cipher(wavelet=wavelet, bits=16, noise={"std": 25, "recovery": "keyed"})
    assert np.array_equal(np.stack(restore(cipher, cipher.encrypt(images))), images)


@pytest.mark.parametrize(
    "layers",
    [
        (),
        ("scramble",),
        ("encode",),
        ("mask",),
        ("envelope",),
        ("scramble", "encode", "envelope"),
        ("encode", "mask", "envelope"),
        ("scramble", "mask"),
        ("scramble", "noise", "mask", "envelope"),
        ("noise", "envelope"),
        ("encode", "noise"),
    ],
)
@pytest.mark.parametrize("block_side", [1, 2, 3, 8])
def test_any_choice_of_layers_restores(
    make_cipher, natural, layers: tuple[str, ...], block_side: int
) -> None:
    images = natural(2, 13, 10)
    cipher = make_cipher(
        layers=layers, block_side=block_side, bits=16, alpha=0.4, noise={"std": 20, "recovery": "keyed"}
    )
    assert np.array_equal(np.stack(restore(cipher, cipher.encrypt(images))), images)


def test_literal_blending_loses_with_alpha(make_cipher, natural) -> None:
    images = natural(2, 128, 128)
    found = {}
    for alpha in (1.0, 0.5, 0.2):
        cipher = make_cipher(layers=("scramble", "encode", "envelope"), alpha=alpha)
        found[alpha] = metrics.psnr(images, np.stack(cipher.decrypt(cipher.encrypt(images))))
    for alpha in (0.5, 0.2):
        assert found[alpha] == pytest.approx(52.9 + 20 * np.log10(alpha), abs=0.7)


@pytest.mark.parametrize("parameters", [{}, {"bits": 16}, {"alpha": 0.1}, {"wavelet": "db2"}])
def test_gaussian_residue_is_white_and_of_the_stated_strength(make_cipher, natural, parameters) -> None:
    images = natural(6, 128, 128)
    cipher = make_cipher(noise={"std": 25}, **parameters)
    residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - images
    count = residue.size
    assert abs(residue.mean()) < 4 * 25 / np.sqrt(count)
    assert abs(residue.std() / 25 - 1) < 0.02
    for direction in ("horizontal", "vertical", "diagonal"):
        mean = np.mean([metrics.adjacent_correlation(image, direction) for image in residue])
        assert abs(mean) < 0.02
    # Normal, not merely of the right variance.
    assert abs(np.mean(np.abs(residue) > 1.96 * 25) - 0.05) < 0.005
    assert abs(np.mean((residue / residue.std()) ** 4) - 3) < 0.1


@pytest.mark.parametrize("value", [0, 255])
def test_noise_does_not_saturate_at_black_and_white(make_cipher, value: int) -> None:
    images = np.full((8, 128, 128), value, np.uint8)
    cipher = make_cipher(noise={"std": 25})
    residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - np.float32(value)
    assert abs(residue.mean()) < 4 * 25 / np.sqrt(residue.size)
    assert abs(residue.std() / 25 - 1) < 0.02


@pytest.mark.parametrize("noise", [{"std": 25, "mean": 12}, {"std": 0, "mean": -30}])
def test_the_known_mean_is_taken_off_again(make_cipher, natural, noise) -> None:
    images = natural(4, 64, 64)
    for parameters in ({}, {"layers": ("scramble", "noise", "mask", "envelope")}):
        cipher = make_cipher(noise=noise, **parameters)
        residue = np.stack(cipher.decrypt(cipher.encrypt(images))) - images
        assert abs(residue.mean()) < 4 * max(25, 1) / np.sqrt(residue.size)


@pytest.mark.parametrize(
    "parameters",
    [
        {"bits": 16},
        {"bits": 16, "layers": ("noise", "envelope")},
        {"noise_units": "wire"},
        {"layers": ("scramble", "encode", "noise", "envelope")},
    ],
)
def test_a_mean_without_noise_is_refused_where_it_would_cost_pixels(make_cipher, natural, parameters) -> None:
    with pytest.raises(CipherParameterError, match=r"noise\.mean=30 without noise"):
        make_cipher(noise={"mean": 30}, **parameters).encrypt(natural(1, 8, 8))
    make_cipher(noise={"mean": 0}, **parameters).encrypt(natural(1, 8, 8))


def test_wire_unit_noise_counts_levels_of_the_wire(make_cipher, natural) -> None:
    layers = ("scramble", "encode", "noise", "envelope")
    images = np.full((1, 128, 128), 128, np.uint8)
    quiet = make_cipher(seed=4, layers=layers, noise_units="wire")
    noisy = make_cipher(seed=4, layers=layers, noise_units="wire", noise={"std": 6})
    # Same secrets, so the blend has the same histogram up to the keyed place of the secret image.
    difference = noisy.wire_images(images).astype(float).std() ** 2 - quiet.wire_images(images).std() ** 2
    assert difference == pytest.approx(36, abs=12)
    # One wire level is two coefficient units, and the image has weight alpha in the blend.
    residue = noisy.decrypt(noisy.encrypt(images))[0] - 128
    assert residue.std() == pytest.approx(6 * 2 / 0.5, rel=0.03)


def test_noise_needs_the_owners_secret(make_cipher, natural) -> None:
    owner = make_cipher(noise={"std": 25})
    analyst = ThreeLayerCipher(owner.bundle)
    images = natural(1, 16, 16)
    with pytest.raises(CipherParameterError, match="noise_secret"):
        analyst.encrypt(images)
    envelopes = owner.encrypt(images)
    assert np.array_equal(analyst.decrypt(envelopes), owner.decrypt(envelopes))
    with pytest.raises(CipherParameterError, match="noise secret"):
        ThreeLayerCipher(owner.bundle, noise_secret=b"short")


def test_noise_depends_on_the_owners_secret_and_so_does_the_mask(make_cipher, natural) -> None:
    """Otherwise two envelopes of one image and nonce would differ by the difference of the noise."""
    images, nonces = natural(1, 64, 64), [bytes(16)]
    one = make_cipher(seed=3, noise={"std": 25})
    two = ThreeLayerCipher(one.bundle, noise_secret=b"another secret of this owner")
    first, second = one.wire_images(images, nonces=nonces)[0], two.wire_images(images, nonces=nonces)[0]
    assert np.mean(first == second) < 0.02
    assert (
        parse_header(one._encrypt_with(images, nonces)[0]).iv
        != parse_header(two._encrypt_with(images, nonces)[0]).iv
    )


def test_same_entropy_gives_the_same_envelopes(make_cipher, natural) -> None:
    images = natural(3, 9, 12)
    assert make_cipher(seed=9, noise={"std": 25}).encrypt(images) == make_cipher(
        seed=9, noise={"std": 25}
    ).encrypt(images)
    cipher = make_cipher(seed=9)
    assert cipher.encrypt(images) != cipher.encrypt(images)


def test_batches_do_not_matter(make_cipher, natural) -> None:
    """One image at a time or many at once, across the border of a chunk: the same bytes."""
    images, nonces = natural(5, 256, 256), [bytes([index]) * 16 for index in range(5)]
    cipher = make_cipher(noise={"std": 25})
    together = cipher._encrypt_with(images, nonces)
    single = [
        cipher._encrypt_with(image[None], [nonce])[0] for image, nonce in zip(images, nonces, strict=True)
    ]
    assert together == single
    for joint, alone in zip(
        cipher.decrypt(together), [cipher.decrypt([item])[0] for item in single], strict=True
    ):
        assert np.array_equal(joint, alone)


def test_mixed_sizes_keep_their_order(make_cipher, natural) -> None:
    cipher = make_cipher(bits=16)
    images = [natural(1, *shape, seed=index)[0] for index, shape in enumerate(SHAPES * 2)]
    envelopes = [cipher.encrypt(image[None])[0] for image in images]
    for image, restored in zip(images, restore(cipher, envelopes), strict=True):
        assert np.array_equal(image, restored)


def test_empty_batch(make_cipher) -> None:
    cipher = make_cipher(noise={"std": 25})
    assert cipher.encrypt(np.empty((0, 8, 8), np.uint8)) == []
    assert cipher.decrypt([]) == []
    assert restore(cipher, []) == []
    assert cipher.wire_images(np.empty((0, 7, 8), np.uint8)).shape == (0, 8, 8)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((1, 0, 4, 4), np.uint8),
        np.zeros((1, 1, 1, 4, 4), np.uint8),
        np.zeros((1, 4, 4), np.float32),
        np.zeros((1, 4, 4), np.int16),
        np.zeros((1, 4, 4), np.uint32),
        np.zeros((1, 3, 4, 0), np.uint16),
        np.zeros((1, 0, 4), np.uint8),
        [[[1]]],
    ],
)
def test_what_is_no_image_is_named(make_cipher, images) -> None:
    with pytest.raises(ImageFormatError):
        make_cipher().encrypt(images)


def test_the_callers_images_are_not_changed(make_cipher, natural) -> None:
    for layers in ((), ("mask",), ("scramble", "encode", "noise", "mask", "envelope")):
        images = natural(1, 8, 8)
        copy = images.copy()
        images.flags.writeable = False
        cipher = make_cipher(layers=layers, noise={"std": 5})
        cipher.encrypt(images)
        assert np.array_equal(images, copy)


def test_a_view_of_an_array_is_the_same_image(make_cipher, natural) -> None:
    images = natural(2, 24, 18)
    cipher = make_cipher()
    view = images[:, ::-1, ::2]
    nonces = [bytes(16)] * 2
    assert cipher._encrypt_with(view, nonces) == cipher._encrypt_with(np.ascontiguousarray(view), nonces)


@pytest.mark.parametrize("layer", ["scramble", "encode", "noise", "mask"])
def test_each_layers_key_is_needed(make_cipher, natural, monkeypatch, layer: str) -> None:
    """With one layer's key changed (the envelope opened all the same), the image is spoilt."""
    cipher = make_cipher(noise={"std": 60, "recovery": "keyed"})
    images = natural(1, 64, 64)
    envelopes = cipher.encrypt(images)
    good = cipher.decrypt(envelopes)[0]
    true_keys = ImageKeyBundle.layer_keys

    def wrong_keys(self: ImageKeyBundle, iv: bytes) -> LayerKeys:
        keys = true_keys(self, iv)
        changed = bytes([getattr(keys, layer)[0] ^ 1]) + getattr(keys, layer)[1:]
        return dataclasses.replace(keys, **{layer: changed})

    monkeypatch.setattr(ImageKeyBundle, "layer_keys", wrong_keys)
    assert metrics.psnr(images[0], good) > 50
    assert metrics.psnr(images[0], cipher.decrypt(envelopes)[0]) < 20


def test_statistics_of_the_wire_image(make_cipher, natural) -> None:
    """Means over eight nonces against the theory of Wu, Noonan and Agaian (2011), four deviations wide."""
    image = natural(1, 256, 256)
    other = image.copy()
    other[0, 100, 100] ^= 1
    cipher = make_cipher(seed=2)
    pairs = []
    for index in range(8):
        nonce = [bytes([index]) * 16]
        pairs.append([cipher.wire_images(each, nonces=nonce)[0] for each in (image, other)])
    first = pairs[0][0]
    assert first.dtype == np.uint8
    assert abs(np.mean([metrics.npcr(*pair) for pair in pairs]) - 99.6094) < 4 * 0.0244 / np.sqrt(8)
    low, high = limits.uaci_limits(256 * 256).low, limits.uaci_limits(256 * 256).high
    deviation = (high - low) / (2 * 1.96)
    assert abs(np.mean([metrics.uaci(*pair) for pair in pairs]) - 33.4635) < 4 * deviation / np.sqrt(8)
    assert abs(metrics.entropy(first) - 7.9972) < 4 * 0.00025
    assert abs(np.mean([metrics.chi_square(pair[0]) for pair in pairs]) - 255) < 4 * 22.6 / np.sqrt(8)
    for direction in ("horizontal", "vertical", "diagonal"):
        assert abs(metrics.adjacent_correlation(first, direction)) < 0.015


@pytest.mark.parametrize("value", [0, 255])
def test_constant_images_look_as_random_as_any(make_cipher, value: int) -> None:
    wire = make_cipher(seed=5).wire_images(np.full((1, 256, 256), value, np.uint8))[0]
    assert metrics.entropy(wire) > 7.996
    assert abs(metrics.adjacent_correlation(wire, "horizontal")) < 0.015


def test_without_the_mask_statistics_fall_short(make_cipher, natural) -> None:
    """The reason for the mask: the paper's three steps alone do not reach the paper's figures."""
    image = natural(1, 256, 256)
    wire = make_cipher(layers=("scramble", "encode", "noise"), noise_units="wire", noise={"std": 25})
    assert metrics.entropy(wire.wire_images(image)[0]) < 7.9


def test_nonces_are_checked(make_cipher, natural) -> None:
    with pytest.raises(CipherParameterError, match="nonces"):
        make_cipher().wire_images(natural(2, 8, 8), nonces=[bytes(16)])
    with pytest.raises(CipherParameterError, match="nonces"):
        make_cipher().wire_images(natural(1, 8, 8), nonces=[bytes(12)])


def box_blur(images: np.ndarray) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = images.shape[1:]
    return sum(
        padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)
    ) / np.float32(9)


def test_restore_first_denoises_the_image(make_cipher, natural) -> None:
    images = natural(3, 64, 64)
    cipher = make_cipher(noise={"std": 25})
    envelopes = cipher.encrypt(images)
    seen: list[tuple[int, ...]] = []

    def denoise(batch: np.ndarray) -> np.ndarray:
        seen.append(batch.shape)
        assert batch.dtype == np.float32
        return box_blur(batch)

    noisy = metrics.psnr(images, np.stack(restore(cipher, envelopes)))
    better = metrics.psnr(images, np.stack(restore(cipher, envelopes, denoise)))
    assert better > noisy + 5
    assert sum(shape[0] for shape in seen) == 3
    assert {shape[1:] for shape in seen} == {(64, 64)}


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"bits": 16},
        {"layers": ("scramble", "encode", "noise", "envelope"), "noise_units": "wire"},
        {"layers": ("noise", "envelope")},
        {"noise": {"std": 10, "mean": 4}},
        {"noise": {"std": 10, "recovery": "keyed"}},
    ],
)
def test_both_orders_agree_for_a_denoiser_that_does_nothing(make_cipher, natural, parameters) -> None:
    cipher = make_cipher(**({"noise": {"std": 10}} | parameters))
    envelopes = cipher.encrypt(natural(2, 15, 16))
    for first, last in zip(
        cipher.decrypt(envelopes, denoise=lambda batch: batch, order="denoise_first"),
        cipher.decrypt(envelopes),
        strict=True,
    ):
        np.testing.assert_allclose(first, last, atol=0.02)


def test_denoise_first_sees_the_wire_image_and_is_worse(make_cipher, natural) -> None:
    images = natural(2, 64, 64)
    cipher = make_cipher(layers=("scramble", "encode", "noise", "envelope"), noise={"std": 10}, alpha=0.8)
    envelopes = cipher.encrypt(images)
    seen = []

    def denoise(batch: np.ndarray) -> np.ndarray:
        seen.append(batch.copy())
        return box_blur(batch)

    first = metrics.psnr(images, np.stack(restore(cipher, envelopes, denoise, "denoise_first")))
    last = metrics.psnr(images, np.stack(restore(cipher, envelopes, denoise, "restore_first")))
    assert last > first + 3
    assert seen[0].min() >= 0 and seen[0].max() <= 255
    assert metrics.adjacent_correlation(seen[0][0], "horizontal") < 0.9 * metrics.adjacent_correlation(
        images[0], "horizontal"
    )


@pytest.mark.parametrize(
    "denoise",
    [lambda batch: batch[:, :-1], lambda batch: batch * np.float32(np.nan), lambda batch: None],
)
@pytest.mark.parametrize("order", ["restore_first", "denoise_first"])
def test_a_broken_denoiser_is_named(make_cipher, natural, denoise, order) -> None:
    cipher = make_cipher()
    with pytest.raises(DenoiserError):
        cipher.decrypt(cipher.encrypt(natural(1, 8, 8)), denoise=denoise, order=order)


def test_unknown_order_is_named(make_cipher) -> None:
    with pytest.raises(CipherParameterError, match=r"restore\.order"):
        make_cipher().decrypt([], order="both")


def test_restore_clips_and_rounds(make_cipher, natural) -> None:
    images = np.zeros((1, 32, 32), np.uint8)
    cipher = make_cipher(noise={"std": 25})
    envelopes = cipher.encrypt(images)
    raw, image = cipher.decrypt(envelopes)[0], restore(cipher, envelopes)[0]
    assert raw.min() < 0
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.clip(np.rint(raw), 0, 255))


def test_repr_names_the_key_only(make_cipher) -> None:
    cipher = make_cipher()
    assert cipher.bundle.key_id in repr(cipher)
    assert cipher.bundle.master_key.hex() not in repr(cipher)


@pytest.mark.parametrize("noise_units", ["image", "wire"])
@pytest.mark.parametrize("recovery", ["denoise", "keyed"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "layers",
    [
        ("scramble", "encode", "noise", "mask", "envelope"),
        ("scramble", "encode", "noise", "envelope"),
        ("noise", "envelope"),
        ("encode", "mask"),
    ],
)
def test_residual_std_is_what_is_left(make_cipher, noise_units, recovery, bits, layers) -> None:
    images = np.full((2, 128, 128), 128, np.uint8)
    cipher = make_cipher(
        layers=layers,
        noise_units=noise_units,
        bits=bits,
        alpha=0.8,
        noise={"std": 12, "recovery": recovery},
    )
    found = (np.stack(cipher.decrypt(cipher.encrypt(images))) - 128).std()
    assert found == pytest.approx(cipher.residual_std, rel=0.02, abs=0.9)
    assert (cipher.residual_std > 0) == (recovery == "denoise" and "noise" in layers)
