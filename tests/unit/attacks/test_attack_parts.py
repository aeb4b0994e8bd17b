"""The parts that attacks are made of: measures, pictures, permutations, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flep_fl.attacks.blocks import moved_blocks, original_blocks, put_back
from flep_fl.attacks.permutation import chosen_images, digits_needed, places_from_digits, places_from_known
from flep_fl.attacks.pictures import Row
from flep_fl.attacks.report import Outcome, ThreatModel, write_outcome
from flep_fl.attacks.settings import ATTACKS, read_settings
from flep_fl.attacks.similarity import batch_scores, matched, psnr, ssim
from flep_fl.contracts.errors import ConfigError
from flep_fl.data_security.scramble import scramble

RNG = np.random.default_rng(7)


def test_ssim_is_scikit_images() -> None:
    from skimage.metrics import structural_similarity

    truth = RNG.uniform(0, 255, (24, 31))
    for noise in (0, 5, 60):
        guess = truth + RNG.normal(0, noise, truth.shape)
        assert ssim(truth, guess) == pytest.approx(structural_similarity(truth, guess, data_range=255.0))


def test_psnr_of_a_known_error() -> None:
    truth = np.zeros((8, 8))
    assert psnr(truth, truth + 255) == 0
    assert psnr(truth, truth) == np.inf


def test_a_batch_is_scored_in_its_best_order() -> None:
    truth = [RNG.uniform(0, 255, (8, 8)) for _ in range(5)]
    order = [3, 0, 4, 1, 2]
    guesses = [truth[i] + RNG.normal(0, 3, (8, 8)) for i in order]
    assert [order[i] for i in matched(truth, guesses)] == list(range(5))
    similar, decibels, _ = batch_scores(truth, guesses)
    assert similar > 0.99
    assert 35 < decibels < 42


@pytest.mark.parametrize(("shape", "side"), [((8, 8), 2), ((12, 8), 4), ((9, 15), 3)])
def test_blocks_follow_the_scramble_layer(shape: tuple[int, int], side: int) -> None:
    image = RNG.integers(0, 256, shape).astype(np.uint8)
    count = image.size // side**2
    order = RNG.permutation(count)
    scrambled = scramble(image[None], order[None], side)[0]
    blocks = moved_blocks(scrambled, side)
    assert np.array_equal(blocks, original_blocks(image, side)[order])
    assert np.array_equal(put_back(blocks, order, shape, side), image)


@pytest.mark.parametrize(("side", "levels", "images"), [(256, 12, 2), (64, 2, 4), (64, 32, 2), (512, 12, 3)])
def test_chosen_images_number_every_block(side: int, levels: int, images: int) -> None:
    chosen = chosen_images((side, side), 2, levels)
    assert len(chosen) == images
    count = side * side // 4
    order = RNG.permutation(count)
    moved = [scramble(image[None], order[None], 2)[0].astype(float) for image in chosen]
    assert np.array_equal(places_from_digits([one - moved[0] for one in moved[1:]], 2, levels), order)


def test_digits() -> None:
    assert [digits_needed(n, 2) for n in (1, 2, 3, 1024, 1025)] == [1, 1, 2, 10, 11]


def test_known_blocks_are_found_again() -> None:
    known = RNG.uniform(-255, 255, (300, 8))
    order = RNG.permutation(300)
    assert np.array_equal(
        places_from_known(known, known[order] + RNG.normal(0, 1, (300, 8)), chunk=64), order
    )


def test_results_have_the_documented_format(tmp_path: Path) -> None:
    image = np.full((8, 8), 200.0)
    outcome = Outcome(
        {"cloud": "open"},
        {"ssim": 1.0, "psnr_db": np.inf},
        {"ssim": 0.1},
        True,
        "why",
        {"p": [Row("a", [image])]},
    )
    threat = ThreatModel("cloud", ["kit"], ["uploads"])
    write_outcome(tmp_path, outcome, attack="kind", case="case", command="command", threat_model=threat)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["success"] == {"ssim": 1.0, "psnr_db": None}
    assert found["falls"] is True
    assert found["threat_model"] == {"who": "cloud", "holds": ["kit"], "artefacts": ["uploads"]}
    assert set(found) == {
        "attack", "case", "command", "threat_model", "configuration", "success", "baseline", "falls",
        "criterion", "note", "pictures", "versions",
    }  # fmt: skip
    (name,) = found["pictures"]
    with Image.open(tmp_path / name) as picture:
        assert picture.format == "PNG"
        assert (np.asarray(picture) == 200).sum() >= 96 * 96


def test_settings_are_checked() -> None:
    attack, settings = read_settings({"name": "chosen_plaintext", "threat_model": {}, "side": 64})
    assert attack is ATTACKS["chosen_plaintext"]
    assert (settings.side, settings.repeats) == (64, 1)
    with pytest.raises(ConfigError, match="unknown"):
        read_settings({"name": "nothing"})
    with pytest.raises(ConfigError, match="negative"):
        read_settings({"name": "chosen_plaintext", "side": -1})
    with pytest.raises(ConfigError, match="empty"):
        read_settings({"name": "gradient_inversion", "batches": []})
