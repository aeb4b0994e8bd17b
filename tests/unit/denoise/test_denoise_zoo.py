"""The weights that ship, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from skimage import data as samples
from sklearn.datasets import load_sample_image

from flep_fl.contracts.errors import ConfigError, DenoiserError
from flep_fl.data_security.denoise.card import ModelCard, checksum, deserialise, parse_card, serialise
from flep_fl.data_security.denoise.inference import network_denoiser
from flep_fl.data_security.denoise.network import DnCNN
from flep_fl.data_security.denoise.zoo import choose, find_card, load_denoiser
from flep_fl.data_security.metrics import psnr

STEM = "dncnn9_gaussian_25"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped weights that may be damaged."""
    for ending in (".json", ".safetensors"):
        shutil.copy(str(files("flep_fl.data_security.denoise") / "weights" / f"{STEM}{ending}"), tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return (load_sample_image("china.jpg") @ [0.299, 0.587, 0.114]).astype(np.float32)[None]


def _gain(image: np.ndarray, std: float) -> float:
    noisy = (image + np.random.default_rng(0).standard_normal(image.shape) * std).astype(np.float32)
    restored = load_denoiser("dncnn9", std)(noisy)
    assert restored.shape == noisy.shape
    assert restored.dtype == np.float32
    return psnr(image, restored) - psnr(image, noisy)


def test_shipped_weights_remove_the_noise_of_their_level(photograph):
    assert _gain(photograph, 25) >= 5


@pytest.mark.parametrize(
    ("std", "gain"), [(7, 0.5), (10, 1.2), (15, 3), (20, 3), (30, 5), (35, 6), (42, 6), (50, 7), (90, 9)]
)
def test_levels_and_what_lies_between_them_are_served(photograph, std, gain):
    assert _gain(photograph[:, 100:260, 200:392], std) >= gain  # the roof: hardly a flat spot


LEVELS = (5, 10, 15, 25, 35, 50)
"""Of the networks of dncnn9 that ship."""


@pytest.mark.parametrize("std", LEVELS)
def test_every_level_has_a_network_that_beats_its_neighbours(std):
    assert find_card("dncnn9", std).noise_std == std
    image = samples.camera()[None, 100:356, 100:356].astype(np.float32)
    noisy = (image + np.random.default_rng(1).standard_normal(image.shape) * std).astype(np.float32)
    place = files("flep_fl.data_security.denoise") / "weights"
    reached = {}
    for level in LEVELS:
        card = parse_card((place / f"dncnn9_gaussian_{level}.json").read_bytes())
        network = deserialise((place / f"dncnn9_gaussian_{level}.safetensors").read_bytes(), card)
        if std / 3 <= level <= 3 * std:
            reached[level] = psnr(image, network_denoiser(network, gain=level / std)(noisy))
    assert max(reached, key=lambda level: reached[level]) == std, reached


@pytest.mark.parametrize(("name", "std"), [("none", 25), ("none", 0), ("dncnn9", 0)])
def test_identity(name, std):
    images = np.random.default_rng(0).random((2, 5, 7), dtype=np.float32)
    assert load_denoiser(name, std)(images) is images


def test_identity_needs_no_pytorch():
    code = (
        "import sys; from flep_fl.data_security.denoise.zoo import load_denoiser; load_denoiser('none', 25);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["dncnn", "", "NONE", "../dncnn9"])
def test_unknown_names(name):
    with pytest.raises(ConfigError, match="dncnn9 or fast or blind or none"):
        load_denoiser(name, 25)


@pytest.mark.parametrize("std", [-1, float("nan"), float("inf")])
def test_no_level_at_all(std):
    with pytest.raises(DenoiserError, match="noise level"):
        load_denoiser("dncnn9", std)


@pytest.mark.parametrize("std", [0.5, 9.9, 50.1, 200])
def test_levels_out_of_reach_name_the_range_and_the_way_out(folder, std):
    with pytest.raises(DenoiserError, match=r"10 to 50.*train_denoiser images=FOLDER noise_std="):
        load_denoiser("dncnn9", std, weights=folder)


@pytest.mark.parametrize(
    ("name", "std", "psnr_db"), [("dncnn9", 10, 31), ("dncnn9", 25, 26), ("blind", 25, 24), ("blind", 50, 20)]
)
def test_what_ships_removes_its_level(photograph, name, std, psnr_db):
    noise = np.random.default_rng(0).normal(0, std, photograph.shape)
    restored = load_denoiser(name, std)((photograph + noise).astype(np.float32))
    assert psnr(photograph, restored) > psnr_db > psnr(photograph, photograph + noise)


def test_the_nearest_level_is_taken(folder, photograph):
    """A second network, for sigma 60: it predicts no noise at all, which tells it apart."""
    idle = serialise(DnCNN(3, 4))
    card = parse_card((folder / f"{STEM}.json").read_bytes())
    other = dataclasses.replace(card, noise_std=60.0, depth=3, channels=4, sha256=checksum(idle))
    (folder / "dncnn9_gaussian_60.json").write_bytes(other.to_json())
    (folder / "dncnn9_gaussian_60.safetensors").write_bytes(idle)
    for std, same in ((25, False), (30, False), (55, True), (110, True)):
        restored = load_denoiser("dncnn9", std, weights=folder)(photograph[:, :40, :40])
        assert np.array_equal(restored, photograph[:, :40, :40]) is same
    with pytest.raises(DenoiserError, match=r"10 to 120 \(there are networks for 25, 60\)"):
        load_denoiser("dncnn9", 130, weights=folder)


@pytest.mark.parametrize("position", [0, 9, 5000, -1])
def test_one_flipped_bit_is_found(folder, position):
    path = folder / f"{STEM}.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(DenoiserError, match="SHA-256"):
        load_denoiser("dncnn9", 25, weights=folder)


def test_missing_files(folder):
    (folder / f"{STEM}.safetensors").unlink()
    with pytest.raises(DenoiserError, match=r"dncnn9_gaussian_25.safetensors cannot be read"):
        load_denoiser("dncnn9", 25, weights=folder)
    (folder / f"{STEM}.json").unlink()
    for nowhere in (folder, folder / "not there"):
        with pytest.raises(DenoiserError, match="no weights for the denoiser"):
            load_denoiser("dncnn9", 25, weights=nowhere)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b"null"])
def test_damaged_cards(folder, content):
    (folder / f"{STEM}.json").write_bytes(content)
    with pytest.raises(DenoiserError, match="model card"):
        load_denoiser("dncnn9", 25, weights=folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", "9"),
        ("depth", 10**9),
        ("channels", 0),
        ("sha256", None),
        ("noise_std", 0),
        ("noise_std", "25"),
        ("noise_std", float("nan")),
        ("noise_std", True),
    ],
)
def test_cards_with_impossible_values(folder, key, value):
    path = folder / f"{STEM}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DenoiserError, match="model card"):
        load_denoiser("dncnn9", 25, weights=folder)


def _foreign() -> list[bytes]:
    state = DnCNN(9, 64, batch_norm=False).state_dict()
    unfit = dict(state)
    unfit["body.0.weight"] = torch.zeros(3, 3)
    spoilt = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    return [b"", b"PK\x03\x04 no safetensors", serialise(DnCNN(3, 4)), save(unfit), save(spoilt)]


@pytest.mark.parametrize("weights", _foreign(), ids=["empty", "zip", "other net", "other shape", "nan"])
def test_files_that_are_no_such_network(folder, weights):
    path = folder / f"{STEM}.json"
    card = dataclasses.replace(parse_card(path.read_bytes()), sha256=checksum(weights))
    path.write_bytes(card.to_json())
    (folder / f"{STEM}.safetensors").write_bytes(weights)
    with pytest.raises(DenoiserError, match="do not load"):
        load_denoiser("dncnn9", 25, weights=folder)


def test_what_ships_is_small_folded_and_names_its_data(folder):
    weights = (folder / f"{STEM}.safetensors").read_bytes()
    card = parse_card((folder / f"{STEM}.json").read_bytes())
    assert (card.noise_family, card.noise_std, card.depth, card.channels) == ("gaussian", 25.0, 9, 64)
    assert {value.dtype for value in load(weights).values()} == {torch.float16}
    assert len(weights) < 600_000
    assert deserialise(weights, card).depth == 9
    assert card.validation_psnr is not None
    assert card.validation_psnr >= 28.5
    assert "CC" in card.licence
    assert "/" not in card.data


def test_all_weights_together_are_small():
    folder = files("flep_fl.data_security.denoise") / "weights"
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 12e6


def _two_levels(folder: Path) -> dict[str, ModelCard]:
    card = parse_card((folder / f"{STEM}.json").read_bytes())
    return {STEM: card, "dncnn9_gaussian_50": dataclasses.replace(card, noise_std=50.0)}


@pytest.mark.parametrize(("std", "level"), [(25, 25), (35, 25), (36, 50), (50, 50), (12, 25), (99, 50)])
def test_between_two_levels_the_geometric_mean_decides(folder, std, level):
    assert choose("dncnn9", std, _two_levels(folder), {})[1].noise_std == level


@pytest.mark.parametrize(("std", "level"), [(41.9, 25), (42, 50)])
def test_what_was_measured_decides_instead(folder, std, level):
    measured = {f"{STEM}|dncnn9_gaussian_50": 42.0, "other|pair": 1.0}
    assert choose("dncnn9", std, _two_levels(folder), measured)[1].noise_std == level


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "x"}', '{"a": null}'])
def test_a_damaged_file_of_switches_is_named(folder, text):
    (folder / "switches.json").write_text(text)
    with pytest.raises(DenoiserError, match=r"switches.json is damaged"):
        load_denoiser("dncnn9", 25, weights=folder)


def test_the_card_is_found_without_the_weights():
    assert find_card("dncnn9", 25.0).noise_std == 25.0
    assert find_card("fast", 17.0).noise_range == (2.0, 60.0)


def test_the_command_of_the_message_fits_the_network(folder):
    with pytest.raises(
        DenoiserError, match=r"unshuffle=2 depth=10 noise_family=gaussian.*noise_range=\[2,61\]"
    ):
        load_denoiser("fast", 61)
