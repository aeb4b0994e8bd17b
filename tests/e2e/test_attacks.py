"""Who falls and who does not: every attack, at small size, on what a real run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import read_settings
from flep_fl.attacks.threads import limit_threads
from flep_fl.config import CONFIG_DIR, register, to_config
from scripts import attack as _script  # registers the schema

pytestmark = pytest.mark.e2e

assert _script


def attack(folder: Path, case: str, *overrides: str) -> Outcome:
    """Run one case as ``scripts.attack`` does."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config: Any = to_config(compose("attack", overrides=[f"attack={case}", *overrides]))
    limit_threads(config.runtime.threads)
    kind, settings = read_settings(config.attack)
    return kind.load()(config, settings, folder)


@pytest.mark.parametrize(
    ("case", "falls"),
    [
        ("chosen_plaintext_paper", True),
        ("chosen_plaintext_keys_per_image", False),
        ("chosen_plaintext_paper_preset", False),
        ("chosen_plaintext_flep", False),
        ("chosen_plaintext_aead", False),
    ],
)
def test_two_chosen_images_open_the_papers_cipher_alone(tmp_path: Path, case: str, falls: bool) -> None:
    outcome = attack(tmp_path, case, "attack.side=128", "attack.victims=2")
    assert outcome.falls is falls
    assert outcome.configuration["chosen_images"] == 2
    if falls:
        assert outcome.success["blocks_told_apart"] == 1
        assert outcome.success["ssim"] > 0.9
    else:
        assert abs(outcome.success["ssim"] - outcome.baseline["ssim"]) < 0.1


def test_with_noise_repeated_releases_are_averaged(tmp_path: Path) -> None:
    outcome = attack(tmp_path, "chosen_plaintext_noise", "attack.side=64", "attack.victims=2")
    assert outcome.falls
    once = attack(
        tmp_path / "once", "chosen_plaintext_noise", "attack.side=64", "attack.victims=2", "attack.repeats=1"
    )
    assert not once.falls


@pytest.mark.parametrize(
    ("case", "falls"),
    [("known_plaintext_paper", True), ("known_plaintext_flep", False), ("known_plaintext_aead", False)],
)
def test_known_images_open_the_papers_cipher_alone(tmp_path: Path, case: str, falls: bool) -> None:
    outcome = attack(tmp_path, case, "attack.side=64")
    assert outcome.falls is falls
    if not falls:
        assert abs(outcome.success["ssim"] - outcome.baseline["ssim"]) < 0.1


@pytest.mark.parametrize(("mode", "falls"), [("open", True), ("trusted", True), ("untrusted", False)])
def test_the_cloud_inverts_what_it_can_read(tmp_path: Path, mode: str, falls: bool) -> None:
    outcome = attack(tmp_path, f"gradient_inversion_{mode}", "attack.batches=[1]", "attack.iterations=60")
    assert outcome.falls is falls
    if falls:
        assert outcome.success["cosine_distance"] < 0.05
    else:
        assert outcome.success["ssim"] < 0.3
