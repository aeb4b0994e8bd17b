"""The parts that attacks are made of: measures, pictures, permutations, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from omegaconf import OmegaConf
from PIL import Image

from flep_fl.attacks.blocks import moved_blocks, original_blocks, put_back
from flep_fl.attacks.differential_privacy import private_training, promise
from flep_fl.attacks.jigsaw import assemble, joined_rightly
from flep_fl.attacks.membership import auc, auc_deviation, confidence, likelihood_ratio, rate_at
from flep_fl.attacks.model_inversion import correlations
from flep_fl.attacks.permutation import chosen_images, digits_needed, places_from_digits, places_from_known
from flep_fl.attacks.pictures import Row
from flep_fl.attacks.poisoning import scaling
from flep_fl.attacks.report import Outcome, ThreatModel, write_outcome
from flep_fl.attacks.settings import ATTACKS, MembershipInference, read_settings
from flep_fl.attacks.similarity import batch_scores, matched, ssim
from flep_fl.attacks.table import BEGIN, END, FIGURES, read_results, replace_table, table
from flep_fl.config import CONFIG_DIR
from flep_fl.contracts.errors import ConfigError, DataError
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.scramble import scramble
from flep_fl.flower.runtime.wire import set_task_identity

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


def test_the_table_is_put_between_its_markers(tmp_path: Path) -> None:
    threat = ThreatModel("the AI cloud", ["kit"], ["uploads"])
    for case, falls in (("b", False), ("a", True)):
        outcome = Outcome({"cloud": "open", "side": 3}, {"ssim": 0.98749}, {"ssim": 0.1}, falls, "why")
        write_outcome(
            tmp_path / case, outcome, attack="gradient_inversion", case=case, command="c", threat_model=threat
        )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    replace_table(page, table(read_results(tmp_path)))
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", BEGIN]
    assert lines[-2:] == [END, "after"]
    assert "old" not in lines
    assert lines[4] == "| `a` | the AI cloud | cloud open | 0.987 SSIM | 0.1 SSIM | **falls** |"
    assert lines[5].endswith("| holds |")
    page.write_text("nothing")
    with pytest.raises(DataError, match="no place"):
        replace_table(page, "x")
    with pytest.raises(DataError, match="no results"):
        read_results(tmp_path / "nowhere")


def test_every_attack_has_a_case_that_declares_its_threat_model() -> None:
    cases = {path.stem: OmegaConf.load(path) for path in (CONFIG_DIR / "attack").glob("*.yaml")}
    declared = {case: config.attack for case, config in cases.items() if "name" in config.get("attack", {})}
    assert {attack.name for attack in declared.values()} == set(ATTACKS) == set(FIGURES)
    for case, attack in declared.items():
        assert set(attack.threat_model) == {"who", "holds", "artefacts"}, case
        read_settings(OmegaConf.to_container(attack))


@pytest.mark.parametrize(
    ("members", "others", "expected"), [([3, 2], [1, 0], 1), ([0], [1], 0), ([1], [1], 0.5)]
)
def test_auc(members: list[float], others: list[float], expected: float) -> None:
    assert auc(np.array(members), np.array(others)) == expected


def test_auc_of_guessing_scatters_as_stated() -> None:
    areas = [auc(RNG.random(40), RNG.random(60)) for _ in range(400)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.02)
    assert np.std(areas) == pytest.approx(auc_deviation(40, 60), rel=0.15)


def test_rate_at_a_share_of_false_alarms() -> None:
    others = np.arange(100.0)
    assert rate_at(np.array([99.5, 98.0, 10.0, 2.0]), others, 0.05) == 0.5


def test_the_likelihood_ratio_tells_members() -> None:
    inside = RNG.random((16, 200)) < 0.5
    shadow = RNG.normal(np.where(inside, 2.0, 0.0), 1.0)
    is_member = np.arange(200) < 100
    observed = RNG.normal(np.where(is_member, 2.0, 0.0), 1.0)
    scores = likelihood_ratio(observed, shadow, inside)
    assert auc(scores[is_member], scores[~is_member]) > 0.85


def test_confidence_is_the_log_odds() -> None:
    p = np.array([0.1, 0.5, 0.99])
    assert confidence(-np.log(p)) == pytest.approx(np.log(p / (1 - p)))


def test_correlation_finds_the_own_class() -> None:
    means = RNG.uniform(0, 255, (5, 8, 8))
    table_ = correlations(means + RNG.normal(0, 5, means.shape), means)
    assert (table_.argmax(axis=1) == np.arange(5)).all()


@pytest.mark.parametrize("side", [1, 2, 8])
def test_a_smooth_picture_is_assembled(side: int) -> None:
    y, x = np.mgrid[0:32, 0:32] / 32
    image = 120 + 60 * np.sin(3 * x + y) + 50 * np.cos(4 * y * x + 1)
    count = 32 // side
    truth = np.ascontiguousarray(image.reshape(count, side, count, side).transpose(0, 2, 1, 3))
    blocks = truth.reshape(-1, side, side)[RNG.permutation(count * count)]
    grid = assemble(blocks, count, count)
    assert sorted(grid.ravel()) == list(range(count * count))
    if side == 8:
        assert joined_rightly(truth, blocks, grid) == 1


def test_without_dp_nothing_is_promised() -> None:
    settings = MembershipInference()
    assert promise(settings, 3) == {"epsilon_per_round": None, "epsilon_total": None, "delta_total": None}
    settings.dp_epsilon = 2.0
    assert promise(settings, 3)["epsilon_total"] == 6
    assert len(private_training(settings).mods) == 1
    settings.dp_clipping = 0.0
    with pytest.raises(ConfigError, match="LocalDpMod"):
        private_training(settings)


def test_a_scaled_update_points_backwards() -> None:
    set_task_identity(1)
    start = {"w": np.array([1.0, 2.0], np.float32)}
    order = Message(RecordDict({"arrays": ArrayRecord({"w": Array(start["w"])})}), 2, "train")

    def train(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"w": Array(np.array([1.5, 2.0], np.float32))})
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    reply = scaling(10.0)(order, Context(1, 2, {}, RecordDict(), {}), train)
    assert reply.content["arrays"]["w"].numpy().tolist() == [-4.0, 2.0]
