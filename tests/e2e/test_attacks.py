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
from flep_fl.contracts.errors import ConfigError
from scripts import attack as _script  # registers the schema

pytestmark = pytest.mark.e2e

assert _script

FEW = ("cloud=open", "data.limit=120", "data.test_fraction=0.5", "train.batch_size=8")
OVERTRAINED = (*FEW, "federation.rounds=3", "train.local_epochs=10")


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


@pytest.mark.he
@pytest.mark.parametrize(
    ("mode", "falls"),
    [("open", True), pytest.param("trusted", True, marks=pytest.mark.slow), ("untrusted", False)],
)
def test_the_cloud_inverts_what_it_can_read(tmp_path: Path, mode: str, falls: bool) -> None:
    outcome = attack(tmp_path, f"gradient_inversion_{mode}", "attack.batches=[1]", "attack.iterations=60")
    assert outcome.falls is falls
    if falls:
        assert outcome.success["cosine_distance"] < 0.05
    else:
        assert outcome.success["ssim"] < 0.3


@pytest.mark.parametrize("kind", ["image_difference", "averaging"])
@pytest.mark.parametrize(("cipher", "falls"), [("paper", True), ("flep", False), ("aead", False)])
def test_what_is_released_twice(tmp_path: Path, kind: str, cipher: str, falls: bool) -> None:
    outcome = attack(tmp_path, f"{kind}_{cipher}", "attack.side=64")
    assert outcome.falls is falls
    if not falls:
        assert outcome.success["ssim"] < outcome.baseline["ssim"] + 0.1


def test_an_analyst_averages_the_noise_away(tmp_path: Path) -> None:
    outcome = attack(tmp_path, "averaging_by_an_analyst", "attack.side=64")
    assert outcome.falls
    # 16 releases: 12 dB, less what saturates.
    assert outcome.success["psnr_db"] - outcome.success["psnr_db_one_release"] > 10


@pytest.mark.parametrize(
    ("case", "falls"), [("jigsaw_block16", True), ("jigsaw_block2", False), ("jigsaw_flep", False)]
)
def test_large_blocks_are_put_together_again(tmp_path: Path, case: str, falls: bool) -> None:
    outcome = attack(tmp_path, case)
    assert outcome.falls is falls
    if case == "jigsaw_flep":
        assert outcome.success["neighbours"] < 0.05


def test_a_short_key_is_found_and_a_whole_one_is_not(tmp_path: Path) -> None:
    short = attack(tmp_path / "short", "brute_force_short_key", "attack.unknown_bits=8", "attack.side=16")
    assert short.falls
    assert short.success["psnr_db"] > 15
    whole = attack(tmp_path / "whole", "brute_force_full_key", "attack.tries=256", "attack.side=16")
    assert not whole.falls
    assert whole.success["log10_years_for_256_bits"] > 50


@pytest.mark.parametrize("cipher", ["paper", "flep", "aead"])
def test_an_old_bundle_opens_its_epoch_alone(tmp_path: Path, cipher: str) -> None:
    outcome = attack(tmp_path, "stolen_bundle", f"cipher={cipher}", "denoiser=none", "attack.side=16")
    assert not outcome.falls
    assert outcome.success["opened_of_its_own_epoch"] == 1
    assert outcome.baseline["opened_of_its_own_epoch"] == 0


def test_swapped_records_are_noticed(tmp_path: Path) -> None:
    outcome = attack(tmp_path, "swapped_records", "attack.flips=3", "attack.records=4")
    assert not outcome.falls
    assert outcome.success == {"accepted": 0.0, "honest_archive_accepted": 1.0}
    assert outcome.baseline == {"accepted": 0.0}


@pytest.mark.he
@pytest.mark.parametrize(("mode", "falls"), [("open", True), ("trusted", False), ("untrusted", False)])
def test_a_cheating_cloud_is_caught_where_sums_are_checked(tmp_path: Path, mode: str, falls: bool) -> None:
    outcome = attack(tmp_path, f"cheating_cloud_{mode}", "data.limit=45", "attack.cheats=[drop]")
    assert outcome.falls is falls
    assert outcome.success["accepted_drop"] == float(falls)
    assert outcome.success["honest_sum_accepted"] == 1


@pytest.mark.he
@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        ("local_steps", ("attack.local_steps=2", "attack.iterations=50")),
        ("inferred_label", ("attack.iterations=50",)),
        pytest.param("local_steps", (), marks=pytest.mark.slow),
        pytest.param("inferred_label", (), marks=pytest.mark.slow),
    ],
)
def test_local_steps_and_unknown_labels_do_not_help(
    tmp_path: Path, case: str, overrides: tuple[str, ...]
) -> None:
    outcome = attack(tmp_path, f"gradient_inversion_{case}", *overrides)
    assert outcome.falls
    assert outcome.success["labels_right"] == 1


@pytest.mark.slow
def test_the_sum_of_three_sites_shows_their_images(tmp_path: Path) -> None:
    assert attack(tmp_path, "gradient_inversion_trusted_sum").falls


def test_a_small_model_tells_who_was_in_it(tmp_path: Path) -> None:
    assert attack(tmp_path / "trained", "membership_loss", *OVERTRAINED).falls
    untrained = ("federation.rounds=1", "train.local_epochs=1", "train.lr=1e-9")
    assert not attack(tmp_path / "untrained", "membership_loss", *FEW, *untrained).falls


@pytest.mark.slow
@pytest.mark.parametrize("case", ["membership_loss", "membership_lira"])
def test_the_final_model_tells_who_was_in_it(tmp_path: Path, case: str) -> None:
    assert attack(tmp_path / "plain", case).falls
    private = attack(tmp_path / "private", f"{case}_dp")
    assert not private.falls
    assert private.configuration["epsilon_total"] == 300


def test_a_small_model_shows_its_classes(tmp_path: Path) -> None:
    small = (
        "cloud=open",
        "data.limit=150",
        "federation.rounds=1",
        "train.local_epochs=8",
        "train.batch_size=8",
    )
    assert attack(tmp_path, "model_inversion", *small, "attack.iterations=50").falls


@pytest.mark.slow
def test_the_final_model_shows_its_classes_unless_noise_ruins_it(tmp_path: Path) -> None:
    assert attack(tmp_path / "plain", "model_inversion").falls
    assert attack(tmp_path / "private", "model_inversion_dp").falls, "epsilon 100 a round does not stop it"
    ruined = attack(tmp_path / "ruined", "model_inversion_dp", "attack.dp_epsilon=30")
    assert not ruined.falls
    assert (ruined.success["accuracy"] or 0) < 0.3


QUICK_POISON = (
    "cloud=open",
    "data.limit=150",
    "federation.rounds=2",
    "train.local_epochs=4",
    "train.batch_size=8",
)


@pytest.mark.parametrize(
    "overrides",
    [(*QUICK_POISON, "attack.from_round=2"), pytest.param((), marks=pytest.mark.slow)],
    ids=["quick", "whole"],
)
def test_acceptance_tests_keep_late_poison_out(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    outcome = attack(tmp_path, "poisoning_scaled_update_late", *overrides)
    assert outcome.falls
    success = {name: value or 0 for name, value in outcome.success.items()}
    assert success["accuracy_with_accept_drop"] > success["accuracy"] + 0.3


@pytest.mark.slow
def test_acceptance_tests_stop_neither_early_nor_gentle_poison(tmp_path: Path) -> None:
    early = attack(tmp_path / "early", "poisoning_scaled_update")
    assert early.falls
    assert early.success["accuracy_with_accept_drop"] == pytest.approx(early.success["accuracy"], abs=0.1)
    gentle = attack(tmp_path / "gentle", "poisoning_label_flip")
    assert not gentle.falls
    assert (gentle.success["accuracy_lost_with_accept_drop"] or 0) > -0.02, "no help"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("attack.from_round=9",), "from_round"),
        (("attack.from_round=0",), "from_round"),
        (("attack.kind=label_flip", "attack.from_round=2"), "from_round=1"),
        (("attack.kind=shout",), "attack.kind"),
    ],
)
def test_poison_that_does_not_exist_is_named(tmp_path: Path, overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        attack(tmp_path, "poisoning_scaled_update", *overrides)
    assert not list(tmp_path.iterdir())
