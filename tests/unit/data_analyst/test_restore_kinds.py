"""Images of 16 bits and with channels, from sealed records to the classifier's input."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from flep_fl.contracts.errors import DataError, DenoiserError
from flep_fl.contracts.records import SealedRecord
from flep_fl.data_analyst.model import build_model
from flep_fl.data_analyst.restore import restore_split
from flep_fl.data_analyst.train import evaluate
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import seal_label
from flep_fl.data_security.pipeline import ThreeLayerCipher


class Listed:
    """A source of given records."""

    def __init__(self, records):
        self._records = records

    def manifest(self):
        raise NotImplementedError

    def records(self, split):
        return iter(self._records)


def restored(batches, *, bits=32, std=0.0, denoise=None, input_size=None, order="restore_first"):
    bundle = ImageKeyBundle.generate(CipherParameters(bits=bits), NoiseParameters(std=std))
    cipher = ThreeLayerCipher(bundle, noise_secret=secrets.token_bytes(32))
    records = []
    for image in (image for batch in batches for image in batch):
        name = f"{len(records):032x}"
        label = seal_label(bundle, name, "train", len(records) % 2)
        records.append(SealedRecord(name, cipher.encrypt(image[None])[0], label))
    return restore_split(
        Listed(records),
        cipher=cipher,
        bundle=bundle,
        denoise=denoise,
        split="train",
        input_size=input_size,
        order=order,
    )


def random_images(*shape, dtype=np.uint8):
    return np.random.default_rng(3).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_sixteen_bits_keep_their_fractions_of_a_grey_level() -> None:
    images = random_images(5, 12, 10, dtype=np.uint16)
    found = restored([images]).images
    assert (found.dtype, found.shape) == (np.float32, (5, 1, 12, 10))
    assert np.array_equal(np.rint(found[:, 0].astype(np.float64) * 257), images)
    assert np.abs(found - np.rint(found)).max() > 0.4  # nothing was rounded to 8 bits
    assert found.max() <= 255


@pytest.mark.parametrize(("dtype", "bits", "unit"), [(np.uint8, 16, 1), (np.uint16, 32, 257)])
def test_colour_reaches_the_classifier(dtype, bits: int, unit: int) -> None:
    images = random_images(6, 3, 16, 16, dtype=dtype)
    split = restored([images], bits=bits)
    assert (split.images.dtype, split.images.shape) == (np.float32, images.shape)
    assert np.array_equal(np.rint(split.images.astype(np.float64) * unit), images)
    model = build_model("cnn", classes=2, channels=split.images.shape[1], seed=0)
    assert 0 <= evaluate(model, split.images, split.labels).accuracy <= 1


def test_every_channel_is_reduced_by_area_averages() -> None:
    images = random_images(3, 3, 16, 24)
    found = restored([images], input_size=8).images
    means = images.reshape(3, 3, 8, 2, 8, 3).mean(axis=(3, 5))
    np.testing.assert_allclose(found, means, atol=0.01)


@pytest.mark.parametrize("order", ["restore_first", "denoise_first"])
def test_the_denoiser_gets_every_channel_as_an_image(order: str) -> None:
    seen = []

    def denoise(batch):
        seen.append(batch.shape)
        return batch

    restored([random_images(4, 3, 8, 10)], bits=8, std=25, denoise=denoise, order=order)
    assert sum(shape[0] for shape in seen) == 12
    assert {shape[1:] for shape in seen} == {(8, 10)}


def test_the_denoiser_works_on_the_8_bit_scale_for_16_bits_too() -> None:
    image = np.full((1, 64, 64), 128 * 257, np.uint16)
    seen = []

    def denoise(batch):
        seen.append(batch.copy())
        return np.clip(batch, 127, 129)

    found = restored([image], bits=16, std=25, denoise=denoise).images
    assert abs(seen[0].mean() - 128) < 3
    assert abs(seen[0].std() - 25) < 3
    assert np.abs(found - 128).max() <= 1


def test_an_unusable_denoiser_is_named() -> None:
    with pytest.raises(DenoiserError):
        restored([random_images(2, 3, 8, 8)], bits=8, std=25, denoise=lambda batch: batch[:1])


def test_one_channel_is_grey_but_colour_is_not() -> None:
    grey, one = random_images(2, 8, 8), random_images(2, 1, 8, 8)
    assert restored([grey, one], bits=16).images.shape == (4, 1, 8, 8)
    with pytest.raises(DataError, match="channels"):
        restored([grey, random_images(2, 3, 8, 8)], bits=16)
