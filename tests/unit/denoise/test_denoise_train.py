"""A tiny training: it learns, repeats itself, and goes on after a stop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flep_fl.contracts.errors import ConfigError, DenoiserError, EmptyDatasetError
from flep_fl.data_security.denoise import train as training
from flep_fl.data_security.denoise.card import deserialise, parse_card
from flep_fl.data_security.denoise.images import load_folder
from flep_fl.data_security.denoise.inference import mean_psnr, network_denoiser
from flep_fl.data_security.denoise.network import DnCNN
from flep_fl.data_security.denoise.sampling import CropSampler
from flep_fl.data_security.denoise.settings import TrainSettings
from flep_fl.data_security.denoise.train import recalibrate, schedule, train_denoiser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth patterns: easy to tell from noise, even for a small network."""
    folder = tmp_path_factory.mktemp("pictures")
    down, across = np.mgrid[0:64, 0:80] / 10.0
    for index in range(4):
        image = 128 + 60 * np.sin(down * (1 + index / 4)) + 50 * np.cos(across + index)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def _settings(pictures: Path, folder: Path, **changes: object) -> TrainSettings:
    base = TrainSettings(
        images=pictures,
        out=folder / "net.safetensors",
        validation=pictures,
        depth=3,
        channels=8,
        steps=60,
        batch=8,
        crop=24,
        scales=[1.0, 0.6],
        lr=5e-3,
        ema=0.9,
        validate_every=20,
        checkpoint_every=20,
        threads=1,
        device="cpu",
        source="patterns",
        licence="made here",
        validation_source="the same patterns",
    )
    return dataclasses.replace(base, **changes)


def test_it_learns_and_says_so(pictures, tmp_path, caplog):
    settings = _settings(pictures, tmp_path)
    with caplog.at_level(logging.INFO):
        card = train_denoiser(settings)
    progress = re.findall(r"step (\d+)/60  loss ([\d.]+) .* validation ([\d.]+) dB", caplog.text)
    assert [int(step) for step, _, _ in progress] == [20, 40, 60]
    losses = [float(loss) for _, loss, _ in progress]
    assert losses[-1] < 0.5 * 25**2  # the variance of the noise is the loss of doing nothing
    assert losses[-1] < losses[0]
    # The card tells the truth about the files that were written.
    weights = settings.out.read_bytes()
    assert card == parse_card(settings.out.with_suffix(".json").read_bytes())
    assert card.sha256 == hashlib.sha256(weights).hexdigest()
    assert (card.data, card.licence, card.validation) == ("patterns", "made here", "the same patterns")
    assert (card.noise_std, card.depth, card.channels, card.steps, card.pictures) == (25.0, 3, 8, 60, 4)
    denoise = network_denoiser(deserialise(weights, card), device="cpu")
    assert mean_psnr(denoise, load_folder(pictures), 25) == pytest.approx(card.validation_psnr, abs=2e-3)
    assert card.validation_psnr > mean_psnr(lambda images: images, load_folder(pictures), 25) + 3
    assert str(tmp_path) not in settings.out.with_suffix(".json").read_text()
    assert not settings.out.with_suffix(".checkpoint").exists()


def test_the_seed_decides(pictures, tmp_path):
    first = train_denoiser(_settings(pictures, tmp_path / "a", steps=5))
    torch.manual_seed(99)
    again = train_denoiser(_settings(pictures, tmp_path / "b", steps=5))
    other = train_denoiser(_settings(pictures, tmp_path / "c", steps=5, seed=1))
    assert first.sha256 == again.sha256 != other.sha256


class _StopError(Exception):
    pass


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(pictures, tmp_path, monkeypatch, caplog):
    whole = train_denoiser(_settings(pictures, tmp_path / "whole", steps=12, checkpoint_every=5))
    settings = _settings(pictures, tmp_path / "parts", steps=12, checkpoint_every=5)
    batch = CropSampler.batch

    def stop(sampler: CropSampler, step: int) -> object:
        if step == 8:
            raise _StopError
        return batch(sampler, step)

    with monkeypatch.context() as patch, pytest.raises(_StopError):
        patch.setattr(CropSampler, "batch", stop)
        train_denoiser(settings)
    assert not settings.out.exists()
    with caplog.at_level(logging.INFO):
        resumed = train_denoiser(settings)
    assert "goes on from step 5" in caplog.text
    assert resumed.sha256 == whole.sha256


def _stopped(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a checkpoint behind."""

    def stop(*_: object) -> None:
        raise _StopError

    with monkeypatch.context() as patch, pytest.raises(_StopError):
        patch.setattr(training, "recalibrate", stop)
        train_denoiser(settings)


def test_a_checkpoint_belongs_to_its_settings_and_pictures(pictures, tmp_path, monkeypatch):
    settings = _settings(pictures, tmp_path, steps=3)
    _stopped(settings, monkeypatch)
    for change in ({"noise_std": 30.0}, {"seed": 5}, {"steps": 4}, {"channels": 4}, {"candidates": 1}):
        with pytest.raises(DenoiserError, match="other settings"):
            train_denoiser(dataclasses.replace(settings, **change))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "0.png").write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(DenoiserError, match="other pictures"):
        train_denoiser(dataclasses.replace(settings, images=fewer))
    assert train_denoiser(dataclasses.replace(settings, steps=4, resume=False)).steps == 4


@pytest.mark.parametrize("damage", ["short", "empty", "text", "foreign"])
def test_damaged_checkpoints(pictures, tmp_path, monkeypatch, damage):
    settings = _settings(pictures, tmp_path, steps=2)
    _stopped(settings, monkeypatch)
    path = settings.out.with_suffix(".checkpoint")
    if damage == "foreign":
        torch.save({"step": 1}, path)
    else:
        data = path.read_bytes()
        path.write_bytes({"short": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(DenoiserError, match=r"checkpoint .* is damaged"):
        train_denoiser(settings)


def test_without_bfloat16(pictures, tmp_path, monkeypatch):
    """As on a processor that lacks it; the other tests run with whatever this one has."""
    monkeypatch.setattr("flep_fl.data_security.denoise.capability.read_cpuinfo", lambda: "flags : fpu avx2")
    used: list[torch.dtype] = []
    predict = nn.functional.mse_loss

    def spy(predicted: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        used.append(predicted.dtype)
        return predict(predicted, noise)

    plain = training._Run(_settings(pictures, tmp_path), torch.device("cpu"), "digest")
    assert plain.dtype is torch.float32
    monkeypatch.setattr(nn.functional, "mse_loss", spy)
    card = train_denoiser(_settings(pictures, tmp_path, steps=5))
    assert used == [torch.float32] * 5
    assert card.validation_psnr is not None


def test_pictures_smaller_than_a_crop(pictures, tmp_path):
    with pytest.raises(EmptyDatasetError, match="smaller than a crop"):
        train_denoiser(_settings(pictures, tmp_path, crop=65))


def test_schedule_rises_then_falls_to_zero():
    values = [schedule(step, 100, 0.1) for step in range(101)]
    assert 0 < values[0] < 0.2
    assert np.argmax(values) == 10
    assert values[10] == 1
    assert all(a > b for a, b in pairwise(values[10:]))
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert schedule(0, 1, 0.0) == 1


def test_recalibration_measures_the_plain_mean():
    model = DnCNN(3, 4)
    norm = next(layer for layer in model.body if isinstance(layer, nn.BatchNorm2d))
    batches = [torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    recalibrate(model, ((batch, batch, torch.zeros(2)) for batch in batches))
    with torch.no_grad():
        maps = [model.body[2](model.body[1](model.body[0](batch))) for batch in batches]
    expected = torch.stack([part.mean(dim=(0, 2, 3)) for part in maps]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.momentum == pytest.approx(0.1)
    assert not model.training


def test_divergence_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(training._Run, "update", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(DenoiserError, match="diverged in step"):
        train_denoiser(_settings(pictures, tmp_path))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"noise_std": 0.0}, "noise_std"),
        ({"noise_std": -25.0}, "noise_std"),
        ({"noise_std": float("nan")}, "noise_std"),
        ({"noise_std": float("inf")}, "noise_std"),
        ({"depth": 1}, "depth"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"candidates": 0}, "candidates"),
        ({"crop": 7}, "crop"),
        ({"scales": []}, "scales"),
        ({"scales": [1.0, 1.1]}, "scales"),
        ({"lr": 0.0}, "lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"ema": 1.0}, "ema"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads"),
        ({"device": "gpu"}, "device"),
        ({"out": Path("weights.bin")}, "out"),
        ({"images": Path("/nowhere/at/all")}, "images"),
        ({"validation": Path("/nowhere/at/all")}, "validation"),
    ],
)
def test_bad_settings_are_named(pictures, tmp_path, change, name):
    with pytest.raises(ConfigError, match=f"^{name} cannot be used"):
        train_denoiser(_settings(pictures, tmp_path, **change))


def test_an_unwritable_place_is_found_before_the_training(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train_denoiser(_settings(pictures, tmp_path, out=tmp_path / "file" / "net.safetensors"))


def test_the_card_is_readable_json(pictures, tmp_path):
    settings = _settings(pictures, tmp_path, steps=1, validation=None)
    card = train_denoiser(settings)
    assert card.validation is None
    assert card.validation_psnr is None
    assert json.loads(settings.out.with_suffix(".json").read_text())["sha256"] == card.sha256
