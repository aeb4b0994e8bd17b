"""Ciphers of a user's own: made from a bundle by name, restored by the same code."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from flep_fl.contracts.errors import CipherParameterError, DenoiserError, EnvelopeError, TargetError
from flep_fl.contracts.records import SealedRecord
from flep_fl.data_analyst.restore import restore_split
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import seal_label
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.data_security.presets import build_cipher, get_preset
from flep_fl.data_security.restoring import decrypt_images, require_order, residual_std

OWN = "own_ciphers."
CHACHA = "own_ciphers.ChaChaCipher"


def make_bundle(entropy, name: str, noise: NoiseParameters | None = None) -> ImageKeyBundle:
    parameters = get_preset(name, allow_targets=[OWN]).parameters
    return ImageKeyBundle.generate(
        parameters, noise or NoiseParameters(), entropy=entropy(1), cipher_name=name
    )


def test_the_bundle_names_its_cipher(entropy) -> None:
    bundle = make_bundle(entropy, CHACHA)
    assert ImageKeyBundle.from_bytes(bundle.to_bytes()).cipher_name == CHACHA
    renamed = ImageKeyBundle(
        bundle.master_key, bundle.epoch, bundle.cipher, bundle.noise, bundle.secret_images, "aead"
    )
    assert renamed.key_id != bundle.key_id
    assert CHACHA in repr(bundle)


@pytest.mark.parametrize("name", ["", "rm -rf", "a/b", "a" * 129, "naïve", 7, None])
def test_a_name_that_is_none(name: object) -> None:
    with pytest.raises(CipherParameterError, match=r"cipher\.name"):
        ImageKeyBundle.generate(CipherParameters(), NoiseParameters(), cipher_name=name)


def test_both_sides_build_the_cipher_that_the_bundle_names(entropy, natural) -> None:
    bundle = make_bundle(entropy, CHACHA)
    images = natural(3, 7, 8)
    envelopes = build_cipher(bundle, allow_targets=[OWN]).encrypt(images)
    analyst = build_cipher(ImageKeyBundle.from_bytes(bundle.to_bytes()), allow_targets=[OWN])
    assert type(analyst).__name__ == "ChaChaCipher"
    assert np.array_equal(restore(analyst, envelopes), images)
    with pytest.raises(EnvelopeError):
        restore(analyst, [envelopes[0][:-1] + bytes([envelopes[0][-1] ^ 1])])


def test_a_bundle_alone_imports_nothing(entropy, monkeypatch) -> None:
    bundle = make_bundle(entropy, CHACHA)
    monkeypatch.delitem(sys.modules, "own_ciphers")
    for prefixes in ([], ["other."]):
        with pytest.raises(TargetError, match="neither built in nor allowed here"):
            build_cipher(bundle, allow_targets=prefixes)
    assert "own_ciphers" not in sys.modules


def test_a_choice_of_layers_of_ones_own(entropy, natural) -> None:
    bundle = make_bundle(entropy, "own_ciphers.unscrambled")
    cipher = build_cipher(bundle, allow_targets=[OWN])
    assert isinstance(cipher, ThreeLayerCipher)
    assert cipher.bundle.cipher.layers == ("encode", "mask", "envelope")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("own_ciphers.NoMethods", "no method encrypt and no decrypt"),
        ("own_ciphers.OtherArguments", "cannot be made from a key bundle"),
    ],
)
def test_a_class_that_does_not_fit_is_named(name: str, problem: str, entropy) -> None:
    with pytest.raises(TargetError, match=problem):
        build_cipher(make_bundle(entropy, name), allow_targets=[OWN])


def test_a_target_that_is_no_class_is_named() -> None:
    with pytest.raises(TargetError, match="is no cipher"):
        get_preset("own_ciphers.not_a_cipher", allow_targets=[OWN])


def test_the_papers_order_needs_a_cipher_that_can(entropy, natural) -> None:
    own = build_cipher(make_bundle(entropy, CHACHA), allow_targets=[OWN])
    envelopes = own.encrypt(natural(1, 8, 8))
    for attempt in (
        lambda: require_order(own, "denoise_first"),
        lambda: decrypt_images(own, envelopes, order="denoise_first"),
        lambda: restore(own, envelopes, lambda batch: batch, "denoise_first"),
    ):
        with pytest.raises(CipherParameterError, match=r"denoise_first is not possible.*ChaChaCipher"):
            attempt()
    require_order(own, "restore_first")
    require_order(build_cipher(make_bundle(entropy, "paper")), "denoise_first")


def test_any_cipher_can_be_denoised_afterwards(entropy, natural) -> None:
    own = build_cipher(make_bundle(entropy, CHACHA), allow_targets=[OWN])
    small, large = natural(2, 4, 6), natural(1, 8, 8)
    envelopes = [*own.encrypt(small), *own.encrypt(large)]
    mixed = [envelopes[0], envelopes[2], envelopes[1]]
    batches: list[tuple[int, ...]] = []

    def darken(batch):
        batches.append(batch.shape)
        return batch / 2

    images = decrypt_images(own, mixed, denoise=darken)
    assert sorted(batches) == [(1, 8, 8), (2, 4, 6)]
    for image, plain in zip(images, (small[0], large[0], small[1]), strict=True):
        assert np.array_equal(image, plain / np.float32(2))
    for bad in (lambda batch: None, lambda batch: batch[:0], lambda batch: batch * np.nan):
        with pytest.raises(DenoiserError):
            decrypt_images(own, mixed, denoise=bad)


def test_a_colour_image_is_denoised_channel_by_channel() -> None:
    class Plain:
        def encrypt(self, images):
            return [image.tobytes() for image in images]

        def decrypt(self, envelopes):
            return [np.frombuffer(data, np.uint8).reshape(3, 4, 5).astype(np.float32) for data in envelopes]

    images = np.arange(120, dtype=np.uint8).reshape(2, 3, 4, 5)
    seen: list[tuple[int, ...]] = []

    def shifted(batch):
        seen.append(batch.shape)
        return batch + np.float32(1)

    plain = Plain()
    restored = decrypt_images(plain, plain.encrypt(images), denoise=shifted)
    assert seen == [(6, 4, 5)]
    assert np.array_equal(restored, images + np.float32(1))


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 16), (np.uint16, 32)])
def test_the_analyst_gets_whole_levels_where_nothing_is_lost(dtype, bits, entropy, natural) -> None:
    """A transform leaves rounding errors of its own: training would differ in the last digits."""
    levels = int(np.iinfo(dtype).max) // 255
    images = natural(2, 16, 16).astype(dtype) * dtype(levels) - dtype(levels // 3)
    bundle = ImageKeyBundle.generate(
        CipherParameters(wavelet="db2", bits=bits, alpha=0.5),
        NoiseParameters(std=25, recovery="keyed"),
        entropy=entropy(1),
    )
    envelopes = build_cipher(bundle).encrypt(images)

    class Source:
        def manifest(self):
            raise NotImplementedError

        def records(self, split):
            for number, envelope in enumerate(envelopes):
                yield SealedRecord(str(number), envelope, seal_label(bundle, str(number), split, number))

    split = restore_split(
        Source(), cipher=build_cipher(bundle), bundle=bundle, denoise=None, split="train", input_size=None
    )
    assert split.labels.tolist() == [0, 1]
    assert np.array_equal(split.images[:, 0], images.astype(np.float32) / np.float32(levels))


def test_what_a_cipher_leaves(entropy) -> None:
    own = build_cipher(make_bundle(entropy, CHACHA, NoiseParameters(std=25)), allow_targets=[OWN])
    assert residual_std(own) == 0  # it says nothing of noise: it adds none
    assert residual_std(build_cipher(make_bundle(entropy, "aead", NoiseParameters(std=25)))) == 0
    flep = build_cipher(make_bundle(entropy, "flep", NoiseParameters(std=25)))
    assert residual_std(flep) == pytest.approx(25)
    for stated in (-1.0, float("nan"), "much", True):
        own.residual_std = stated
        with pytest.raises(CipherParameterError, match="residual_std"):
            residual_std(own)
