"""torchvision's classifiers by name: any number of channels, BatchNorm's buffers, one federated round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federations import make_config

from flep_fl.data_analyst.model import build_model, count_parameters, get_arrays, set_arrays
from flep_fl.data_analyst.train import _batches, evaluate, train_local
from flep_fl.flower.simulation import simulate
from flep_fl.model_security.layout import ModelLayout

NAMES = ("mobilenet_v3_small", "resnet18")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_takes_grey_and_colour_and_starts_alike_everywhere(name: str, channels: int) -> None:
    model = build_model(name, classes=4, channels=channels, seed=1).eval()
    logits = model(torch.rand(2, channels, 64, 64))
    assert logits.shape == (2, 4) and torch.isfinite(logits).all()
    arrays = get_arrays(model)
    torch.rand(7)  # torch's own state must not matter
    again = get_arrays(build_model(name, classes=4, channels=channels, seed=1))
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)
    counters = [key for key in arrays if key.endswith("num_batches_tracked")]
    assert counters and all(arrays[key].dtype == np.int64 for key in counters)
    assert ModelLayout.of(arrays).size == count_parameters(model) - len(counters)


def test_a_state_goes_through_arrays_unchanged() -> None:
    model, other = (build_model("resnet18", classes=2, seed=seed) for seed in (1, 2))
    images = np.random.default_rng(0).uniform(0, 255, (17, 1, 16, 16)).astype(np.float32)
    labels = np.arange(17, dtype=np.int64) % 2
    # 17 = 16 + 1: BatchNorm refuses a batch of one image
    train_local(model, images, labels, optimizer="sgd", lr=0.01, batch_size=16, local_epochs=1, seed=0)
    set_arrays(other, get_arrays(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert evaluate(model, images, labels) == evaluate(other, images, labels)


@pytest.mark.parametrize(
    ("count", "size", "normalises", "expected"),
    [
        (9, 4, True, [4, 5]),
        (9, 4, False, [4, 4, 1]),
        (8, 4, True, [4, 4]),
        (1, 4, True, [1]),
        (3, 1, True, [1] * 3),
    ],
)
def test_a_last_single_image_joins_the_batch_before(
    count: int, size: int, normalises: bool, expected: list[int]
) -> None:
    batches = _batches(torch.arange(count), size, normalises)
    assert [len(batch) for batch in batches] == expected
    assert torch.equal(torch.cat(batches), torch.arange(count))


@pytest.mark.slow
@pytest.mark.he
@pytest.mark.parametrize("name", NAMES)
def test_one_federated_round(name: str, tmp_path: Path) -> None:
    config = make_config(
        "data=digits",
        "data.limit=120",
        f"model={name}",
        "model.input_size=null",
        "federation.rounds=1",
        "train.local_epochs=1",
    )
    results = simulate(config, tmp_path)
    assert results["rounds"][0]["accuracy"] is not None
    model = build_model(name, classes=10, seed=config.seed)
    state = torch.load(tmp_path / "sites" / "site-1" / "model.pt", weights_only=True)
    before = get_arrays(model)
    model.load_state_dict(state)  # strict: every name, every shape
    variances = [key for key in state if key.endswith("running_var")]
    assert variances and all(not np.array_equal(state[key].numpy(), before[key]) for key in variances)
