"""The fast variant: half-size images, one network told the noise level, and going on from given weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from flep_fl.contracts.errors import ConfigError, DenoiserError
from flep_fl.data_security.denoise.card import ModelCard, checksum, deserialise, parse_card, serialise
from flep_fl.data_security.denoise.inference import network_denoiser
from flep_fl.data_security.denoise.network import DnCNN, fold_batch_norm
from flep_fl.data_security.denoise.settings import TrainSettings
from flep_fl.data_security.denoise.train import train_denoiser, with_condition
from flep_fl.data_security.denoise.zoo import load_denoiser
from flep_fl.data_security.metrics import psnr


def _fast() -> DnCNN:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = DnCNN(4, 8, unshuffle=2, conditioned=True)
        torch.nn.init.normal_(model.body[-1].weight, std=0.1)
    return model.eval()


def _card(weights: bytes, **change: object) -> ModelCard:
    card = ModelCard(
        "gaussian", 25.0, 4, 8, "x", "CC0", 1, 1, 1, 8, 0, None, None, checksum(weights), (5.0, 50.0), 2, True
    )
    return dataclasses.replace(card, **change)  # type: ignore[arg-type]


def _images(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 255).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 8), (1, 9, 16), (1, 16, 9), (3, 33, 35)])
def test_any_size(shape):
    images = _images(*shape)
    found = network_denoiser(_fast(), level=25.0, device="cpu", dtype=torch.float32)(images)
    assert found.shape == images.shape
    assert np.isfinite(found).all()


@pytest.mark.parametrize("tile", [8, 16, 40])
def test_tiles_give_the_whole_image_of_odd_sides(tile):
    images = _images(2, 41, 53)
    whole = network_denoiser(_fast(), level=25.0, device="cpu", dtype=torch.float32)(images)
    tiled = network_denoiser(_fast(), level=25.0, device="cpu", dtype=torch.float32, tile=tile)(images)
    np.testing.assert_allclose(tiled, whole, atol=1e-3)


def test_the_level_matters_and_must_be_told():
    images = _images(1, 16, 16)
    weak, strong = (
        network_denoiser(_fast(), level=level, device="cpu", dtype=torch.float32)(images) for level in (5, 50)
    )
    assert np.abs(weak - strong).max() > 0.1
    with pytest.raises(ValueError, match="needs the noise level"):
        network_denoiser(_fast(), device="cpu")(images)


def test_folding_keeps_the_function():
    model = _fast()
    norms = [layer for layer in model.body if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.running_mean, -1, 1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    images, level = torch.rand(2, 1, 12, 10), torch.tensor([0.1, 0.2])
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norm(model)(images, level), model(images, level))


def test_weights_and_card_come_back():
    weights = serialise(_fast())
    card = parse_card(_card(weights).to_json())
    assert card == _card(weights)
    model = deserialise(weights, card)
    assert (model.unshuffle, model.conditioned) == (2, True)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_range": [5]},
        {"noise_range": [50, 5]},
        {"noise_range": "x"},
        {"unshuffle": 3},
        {"conditioned": 1},
    ],
)
def test_damaged_cards(change):
    text = json.loads(_card(b"").to_json())
    with pytest.raises(DenoiserError, match="damaged"):
        parse_card(json.dumps({**text, **change}).encode())


def test_a_card_of_another_variant_is_refused():
    weights = serialise(_fast())
    with pytest.raises(DenoiserError, match="do not load"):
        deserialise(weights, _card(weights, unshuffle=1))


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    weights = serialise(_fast())
    (tmp_path / "fast_gaussian.safetensors").write_bytes(weights)
    (tmp_path / "fast_gaussian.json").write_bytes(_card(weights).to_json())
    return tmp_path


def test_the_zoo_tells_the_level_of_the_key_bundle(zoo):
    images = _images(1, 16, 16)
    for level in (5.0, 17.3, 50.0):
        expected = network_denoiser(deserialise(serialise(_fast()), _card(serialise(_fast()))), level=level)
        np.testing.assert_array_equal(load_denoiser("fast", level, weights=zoo)(images), expected(images))


@pytest.mark.parametrize(("level", "gain"), [(10, 2.5), (25, 5), (50, 7)])
def test_the_shipped_weights_remove_noise_of_every_level(level, gain):
    photograph = load_sample_image("china.jpg") @ [0.299, 0.587, 0.114]
    clean = photograph[100:260, 200:392].astype(np.float32)[None]
    noisy = (clean + np.random.default_rng(0).standard_normal(clean.shape) * level).astype(np.float32)
    restored = load_denoiser("fast", level)(noisy)
    assert psnr(clean, restored) - psnr(clean, noisy) >= gain


@pytest.mark.parametrize("level", [4.9, 50.1])
def test_levels_out_of_range_are_named(zoo, level):
    with pytest.raises(DenoiserError, match="5 to 50"):
        load_denoiser("fast", level, weights=zoo)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(values).resize((48, 48)).save(folder / f"{number}.png")
    return folder


def _settings(pictures: Path, out: Path, **change: object) -> TrainSettings:
    values: dict[str, object] = {
        "images": pictures, "out": out / "fast.safetensors", "validation": pictures, "depth": 3,
        "channels": 4,
        "unshuffle": 2, "noise_range": [5.0, 50.0], "steps": 6, "batch": 4, "crop": 16, "threads": 1,
        "device": "cpu",
    }  # fmt: skip
    return TrainSettings(**{**values, **change})  # type: ignore[arg-type]


def test_training_a_range_and_going_on_from_it(pictures, tmp_path):
    card = train_denoiser(_settings(pictures, tmp_path))
    assert (card.noise_range, card.unshuffle, card.conditioned) == ((5.0, 50.0), 2, True)
    again = tmp_path / "again"
    start = tmp_path / "fast.safetensors"
    second = train_denoiser(_settings(pictures, again, start=start, lr=1e-9, steps=1))
    assert (card.start_sha256, second.start_sha256) == (None, card.sha256)
    before = deserialise(start.read_bytes(), card).state_dict()
    after = deserialise((again / "fast.safetensors").read_bytes(), second).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=2e-3, atol=1e-6)
    blind = train_denoiser(_settings(pictures, tmp_path / "blind", blind=True))
    assert (blind.noise_range, blind.conditioned) == ((5.0, 50.0), False)


def test_start_of_another_shape_is_refused(pictures, tmp_path):
    train_denoiser(_settings(pictures, tmp_path))
    with pytest.raises(DenoiserError, match="another network"):
        train_denoiser(_settings(pictures, tmp_path / "b", start=tmp_path / "fast.safetensors", channels=8))


def test_the_condition_can_be_dropped_and_added():
    model = fold_batch_norm(_fast())
    images = torch.rand(2, 1, 20, 20)
    blind = with_condition(model, False, level=0.1)
    assert not blind.conditioned
    with torch.no_grad():
        told = model(images, torch.full((2,), 0.1))
        # The map of levels ended in zeros at the border; its effect reaches inwards by the depth.
        inner = (slice(None), slice(None), slice(8, 12), slice(8, 12))
        torch.testing.assert_close(blind(images)[inner], told[inner])
        assert not torch.allclose(blind(images), model(images, torch.full((2,), 0.2)))
        told_again = with_condition(blind, True, level=0.1)
        torch.testing.assert_close(told_again(images, torch.rand(2)), blind(images))
    assert with_condition(model, True, level=0.1) is model


def test_a_blind_network_goes_on_from_one_that_was_told(pictures, tmp_path):
    told = train_denoiser(_settings(pictures, tmp_path))
    blind = train_denoiser(
        _settings(pictures, tmp_path / "b", start=tmp_path / "fast.safetensors", blind=True, steps=1, lr=1e-9)
    )
    assert (told.conditioned, blind.conditioned) == (True, False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"noise_range": [5.0]}, "noise_range"),
        ({"noise_range": [50.0, 5.0]}, "noise_range"),
        ({"noise_range": None, "blind": True}, "blind"),
        ({"unshuffle": 3}, "unshuffle"),
        ({"crop": 17}, "crop"),
        ({"start": Path("nowhere.safetensors")}, "start"),
    ],
)
def test_bad_settings_are_named(pictures, tmp_path, change, name):
    with pytest.raises(ConfigError, match=name):
        _settings(pictures, tmp_path, **change).check()
