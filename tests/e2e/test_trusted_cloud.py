"""A trusted cloud follows the optimiser and scores the model on its own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import SMALL, Federation, make_config, make_federation
from PIL import Image

from flep_fl.config import adopt_kit, shared_part
from flep_fl.data_analyst.model import build_model, set_arrays
from flep_fl.data_analyst.train import evaluate
from flep_fl.data_owner.partition import split_test
from flep_fl.data_owner.sources import load_source
from flep_fl.flower.compose_cloud import cloud_strategy
from flep_fl.reporting.results import build_results

pytestmark = [pytest.mark.e2e, pytest.mark.he]


def model_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def results(federation: Federation) -> dict[str, Any]:
    strategy = federation.strategy
    return build_results(
        cloud="trusted", sites=sorted(federation.sites), parameters=strategy.parameters,
        rounds=strategy.rounds, config_digest=federation.cloud_kit.federation.digest,
    )  # fmt: skip


def test_it_scores_every_round_on_its_own_images_and_follows_the_optimiser(tmp_path: Path) -> None:
    federation = make_federation(
        tmp_path, "federation.rounds=2", "cloud=trusted", "cloud.eval_data=digits",
        "federation.optimizer=fedadam", "federation.optimizer_lr=0.003",
    )  # fmt: skip
    federation.run()
    cloud = model_of(federation.out / "cloud" / "model.npz")
    for name in federation.sites:
        site = model_of(federation.out / "sites" / name / "model.npz")
        assert all(np.array_equal(cloud[key], site[key]) for key in site), "the cloud holds another model"
    found = results(federation)
    assert all(0 < entry["cloud_accuracy"] <= 1 for entry in found["rounds"])
    assert all(np.isfinite(entry["cloud_loss"]) for entry in found["rounds"])

    source = load_source("digits", limit=240, seed=0)
    _, held_out = split_test(source.labels, federation.config.data.test_fraction, 0)
    model = build_model("cnn", classes=10, channels=1, seed=0)
    set_arrays(model, cloud)
    images = np.stack([np.asarray(source.images[int(i)], np.float32) for i in held_out])[:, None]
    labels = np.array([source.labels[int(i)] for i in held_out])
    expected = evaluate(model, images, labels)
    assert found["final"]["cloud_accuracy"] == found["rounds"][-1]["cloud_accuracy"] == expected.accuracy
    assert found["rounds"][-1]["accuracy"] is not None, "the sites evaluate all the same"


def test_images_of_other_classes_are_named_and_cost_no_round(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        folder = tmp_path / "own" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0.png")
    federation = make_federation(
        tmp_path, "federation.rounds=1", "cloud=trusted", f"cloud.eval_data={tmp_path / 'own'}"
    )
    said: list[str] = []
    federation.strategy = cloud_strategy(
        federation.cloud_kit, federation.config, federation.out / "cloud", on_event=said.append
    )
    federation.run()
    assert any("ConfigError" in line and "other classes" in line for line in said)
    found = results(federation)
    assert "cloud_accuracy" not in found["rounds"][0]
    assert found["final"]["accuracy"] is not None


def test_its_images_are_its_own_affair() -> None:
    with_images = make_config(*SMALL, "cloud=trusted", "cloud.eval_data=digits")
    without = make_config(*SMALL, "cloud=trusted")
    assert shared_part(with_images) == shared_part(without)
    from hydra import compose, initialize_config_dir

    from flep_fl.config import CONFIG_DIR

    overrides = ["cloud=trusted", "cloud.eval_data=digits"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        composed = compose("server", overrides=overrides)
    merged = adopt_kit(composed, shared_part(without), overrides)
    assert merged.cloud.eval_data == "digits"
