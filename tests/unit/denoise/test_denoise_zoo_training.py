"""Training the whole zoo with one command, at toy size."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flep_fl.contracts.errors import ConfigError
from flep_fl.data_security.denoise import zoo_training
from flep_fl.data_security.denoise.zoo_settings import ZooSettings
from flep_fl.data_security.denoise.zoo_training import train_zoo

ROOT = Path(__file__).resolve().parents[3]
TINY = {"depth": 3, "channels": 4, "batch": 2, "crop": 16, "steps": 2}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (6, 6), dtype=np.uint8)
    Image.fromarray(values).resize((48, 48)).save(folder / "one.png")
    return folder


def _settings(pictures: Path, out: Path) -> ZooSettings:
    networks = {
        "dncnn9_gaussian_10": {**TINY, "noise_std": 10.0, "start": "dncnn9_gaussian_25"},
        "dncnn9_gaussian_25": {**TINY, "noise_std": 25.0},
        "blind_gaussian": {**TINY, "noise_range": [2.0, 60.0], "unshuffle": 2, "blind": True},
    }
    return ZooSettings(pictures, out=out, networks=networks, device="cpu", threads=1)


def test_what_is_there_is_not_trained_again(pictures, tmp_path, monkeypatch):
    trained: list[str] = []
    train = zoo_training.train_denoiser

    def spy(settings):
        trained.append(settings.out.stem)
        return train(settings)

    monkeypatch.setattr(zoo_training, "train_denoiser", spy)
    settings = _settings(pictures, tmp_path / "zoo")
    first = train_zoo(settings)
    # A network is trained after the one that it starts from.
    assert trained == ["dncnn9_gaussian_25", "dncnn9_gaussian_10", "blind_gaussian"]
    assert train_zoo(settings) == first
    assert len(trained) == 3
    (tmp_path / "zoo" / "blind_gaussian.safetensors").write_bytes(b"half")
    assert train_zoo(settings) == first
    assert trained[3:] == ["blind_gaussian"]
    train_zoo(dataclasses.replace(settings, scale=2.0, only=["dncnn9_gaussian_25"]))
    assert trained[4:] == ["dncnn9_gaussian_25"]
    # What started from weights that are gone starts again from the new ones.
    longer = {**settings.networks["dncnn9_gaussian_25"], "steps": 2 * TINY["steps"]}
    train_zoo(dataclasses.replace(settings, networks={**settings.networks, "dncnn9_gaussian_25": longer}))
    assert trained[5:] == ["dncnn9_gaussian_10"]


def test_only_brings_what_it_starts_from(pictures, tmp_path):
    settings = dataclasses.replace(_settings(pictures, tmp_path), only=["dncnn9_gaussian_10"], scale=0.5)
    runs = settings.runs()
    assert [stem for stem, _ in runs] == ["dncnn9_gaussian_25", "dncnn9_gaussian_10"]
    assert runs[1][1].start == tmp_path / "dncnn9_gaussian_25.safetensors"
    assert runs[1][1].steps == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ["x"]}, "no such network"),
        ({"networks": {"a": {"start": "b"}, "b": {"start": "a"}}}, "circle"),
        ({"networks": {"a": {"step": 3}}}, "networks.a.step"),
        ({"networks": {"a": {"seed": 3}}}, "networks.a.seed"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_bad_settings_are_named(pictures, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(_settings(pictures, tmp_path), **change).runs()


def test_the_command_trains_all_that_ships(pictures, tmp_path):
    """The networks of conf/train_zoo.yaml, one step each and small."""
    stems = [
        *(f"dncnn9_gaussian_{level}" for level in (5, 10, 15, 25, 35, 50)),
        *("fast_gaussian", "blind_gaussian", "fast_laplacian", "fast_rayleigh"),
    ]
    changes = ("+networks.{}.channels=2", "networks.{}.batch=2", "networks.{}.crop=16")
    small = [change.format(stem) for stem in stems for change in changes]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.train_zoo", f"images={pictures}", f"out={tmp_path}/zoo"),
            *("scale=0.00001", "threads=1", f"hydra.run.dir={tmp_path}/run", *small),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (tmp_path / "zoo").glob("*.safetensors")} == set(stems)
    assert {path.stem for path in (tmp_path / "zoo").glob("*.json")} == set(stems)


def test_the_command_names_a_mistake(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.train_zoo", "images=/nowhere", f"hydra.run.dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error (ConfigError): images cannot be used")
