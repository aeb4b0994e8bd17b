"""Networks, local training and evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from flep_fl.contracts.errors import ConfigError, DataError, EmptyDatasetError, LayoutError, TrainingError
from flep_fl.data_analyst.model import build_model, count_parameters, get_arrays, set_arrays
from flep_fl.data_analyst.train import evaluate, train_local

SETTINGS = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 16, "local_epochs": 1, "seed": 3}


def stripes(count=64, side=8):
    """Two classes: horizontal or vertical stripes, with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 2
    base = np.indices((side, side)) % 2 * 160.0
    images = np.stack([base[label] for label in labels]) + rng.normal(0, 20, (count, side, side))
    return np.clip(images, 0, 255).astype(np.float32)[:, None], labels


def test_parameter_count_and_no_buffers():
    model = build_model("cnn", classes=2, seed=0)
    assert 110_000 <= count_parameters(model) <= 250_000
    assert not list(model.buffers())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (7, 19), (28, 28), (65, 64)])
def test_any_image_size(shape):
    model = build_model("cnn", classes=5, seed=0)
    logits = model(torch.rand(2, 1, *shape))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


def test_first_weights_follow_from_the_seed_alone():
    first = get_arrays(build_model("cnn", classes=3, seed=7))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = get_arrays(build_model("cnn", classes=3, seed=7))
    assert torch.equal(before, torch.get_rng_state())
    other = get_arrays(build_model("cnn", classes=3, seed=8))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_arrays_round_trip_and_are_copies():
    model = build_model("cnn", classes=3, seed=1)
    arrays = get_arrays(model)
    other = build_model("cnn", classes=3, seed=2)
    set_arrays(other, {name: value.astype(np.float64) for name, value in reversed(arrays.items())})
    assert all(np.array_equal(value, get_arrays(other)[name]) for name, value in arrays.items())
    arrays["head.bias"][:] = 5
    assert get_arrays(model)["head.bias"].max() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("head.bias"),
        lambda a: a.update(extra=np.zeros(2)),
        lambda a: a.update({"head.bias": np.zeros(9)}),
        lambda a: a.update({"head.bias": np.array([0.0, np.nan, 0.0])}),
    ],
)
def test_foreign_arrays_leave_the_model_unchanged(change):
    model = build_model("cnn", classes=3, seed=1)
    before = get_arrays(model)
    arrays = {name: value + 1 for name, value in before.items()}
    change(arrays)
    with pytest.raises(LayoutError):
        set_arrays(model, arrays)
    assert all(np.array_equal(value, get_arrays(model)[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "options", [{"name": "vit"}, {"classes": 1}, {"seed": -1}, {"channels": 0}], ids=lambda o: next(iter(o))
)
def test_bad_model_settings(options):
    with pytest.raises(ConfigError):
        build_model(**{"name": "cnn", "classes": 2, "seed": 0, **options})


def test_training_learns():
    images, labels = stripes()
    model = build_model("cnn", classes=2, seed=0)
    first = evaluate(model, images, labels)
    loss = train_local(model, images, labels, **{**SETTINGS, "local_epochs": 3})
    after = evaluate(model, images, labels)
    assert after.accuracy > 0.95 > first.accuracy
    assert loss < first.loss_mean


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_is_deterministic(optimizer):
    images, labels = stripes(32)
    runs = []
    for seed in (3, 3, 4):
        model = build_model("cnn", classes=2, seed=0)
        torch.rand(1)  # torch's own state must not matter
        loss = train_local(
            model, images, labels, **{**SETTINGS, "optimizer": optimizer, "seed": seed}, augment=True
        )
        runs.append((loss, get_arrays(model)))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert any(not np.array_equal(runs[0][1][name], runs[2][1][name]) for name in runs[0][1])


def test_augmentation_reaches_the_network():
    images, labels = stripes(16)
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build_model("cnn", classes=2, seed=0)

        def forward(self, x):
            seen.append(x.clone())
            return self.inner(x)

    for augment in (False, True):
        train_local(Recorder(), images, labels, **SETTINGS, augment=augment)
    plain, turned = seen
    originals = {image.tobytes() for image in images / np.float32(255)}
    assert all(image.numpy().tobytes() in originals for image in plain)
    assert any(image.numpy().tobytes() not in originals for image in turned)


def test_training_puts_torch_back():
    images, labels = stripes(8)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_local(build_model("cnn", classes=2, seed=0), images, labels, **SETTINGS, threads=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_uint8_and_float_images_train_alike():
    images, labels = stripes(16)
    results = []
    for pixels in (images.round(), images.round().astype(np.uint8)):
        model = build_model("cnn", classes=2, seed=0)
        results.append(train_local(model, pixels, labels, **SETTINGS))
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(6, 6), (4, 6)])
def test_augmentation_only_permutes_pixels(shape):
    from flep_fl.data_analyst.train import _symmetries

    image = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(1, 1, *shape)
    turned = _symmetries(image.repeat(200, 1, 1, 1), np.random.default_rng(0))
    variants = {tuple(x.ravel().tolist()) for x in turned}
    assert len(variants) == (8 if shape[0] == shape[1] else 4)
    assert {tuple(sorted(v)) for v in variants} == {tuple(sorted(image.ravel().tolist()))}


def test_evaluation_counts_exactly():
    class Brightness(nn.Module):
        def forward(self, x):
            bright = x.mean(dim=(1, 2, 3)) - 0.5
            return torch.stack((-bright, bright), dim=1)

    levels = np.linspace(0, 255, 151).astype(np.float32)
    images = np.tile(levels[:, None, None, None], (1, 1, 3, 3))
    labels = np.array([0, 1] * 75 + [0], dtype=np.int64)
    expected = int(sum((level > 127.5) == bool(label) for level, label in zip(levels, labels, strict=True)))
    result = evaluate(Brightness(), images, labels)
    assert (result.correct, result.total) == (expected, 151)
    assert result.accuracy == expected / 151
    logit = levels.astype(np.float64) / 255 - 0.5
    losses = np.log1p(np.exp(-2 * logit * np.where(labels == 1, 1, -1)))
    assert result.loss_mean == pytest.approx(losses.mean(), abs=1e-6)


def test_evaluation_keeps_mode_and_weights():
    images, labels = stripes(8)
    model = build_model("cnn", classes=2, seed=0)
    before = get_arrays(model)
    evaluate(model, images, labels)
    assert model.training
    assert all(np.array_equal(value, get_arrays(model)[name]) for name, value in before.items())


def test_diverging_training_is_named():
    images, labels = stripes(32)
    model = build_model("cnn", classes=2, seed=0)
    with pytest.raises(TrainingError, match=r"train\.lr"):
        train_local(model, images, labels, **{**SETTINGS, "optimizer": "sgd", "lr": 1e30, "local_epochs": 5})


@pytest.mark.parametrize(
    ("option", "value"),
    [("optimizer", "lion"), ("lr", 0.0), ("lr", float("nan")), ("batch_size", 0), ("local_epochs", 0)],
)
def test_bad_training_settings(option, value):
    images, labels = stripes(4)
    with pytest.raises(ConfigError, match=f"train.{option}"):
        train_local(build_model("cnn", classes=2, seed=0), images, labels, **{**SETTINGS, option: value})


def test_bad_training_data():
    images, labels = stripes(4)
    model = build_model("cnn", classes=2, seed=0)
    with pytest.raises(DataError, match="number"):
        train_local(model, images, labels[:3], **SETTINGS)
    with pytest.raises(DataError, match="shape"):
        evaluate(model, images[:, 0], labels)
    with pytest.raises(EmptyDatasetError):
        evaluate(model, images[:0], labels[:0])


def test_digits_train_across_three_sites():
    """Federated averaging, written out here, over two rounds of the defaults for small images."""
    from flep_fl.data_owner.partition import partition, split_test
    from flep_fl.data_owner.sources import load_source

    source = load_source("digits", seed=0)
    images, labels = np.stack(list(source.images))[:, None], np.array(source.labels)
    train, test = split_test(labels, 0.2, seed=0)
    sites = [train[part] for part in partition(labels[train], 3, name="iid", seed=0)]
    model = build_model("cnn", classes=10, seed=0)
    current = get_arrays(model)
    for number in range(2):
        trained = []
        for k, site in enumerate(sites):
            set_arrays(model, current)
            options = {**SETTINGS, "batch_size": 32, "local_epochs": 3, "seed": 10 * number + k}
            train_local(model, images[site], labels[site], **options)
            trained.append(get_arrays(model))
        sizes = [len(site) / len(train) for site in sites]
        current = {
            name: sum(
                size * arrays[name].astype(np.float64) for size, arrays in zip(sizes, trained, strict=True)
            )
            for name in current
        }
    set_arrays(model, current)
    assert evaluate(model, images[test], labels[test]).accuracy > 0.85


def distance(model, start):
    return sum(float(((p.detach() - q) ** 2).sum()) for p, q in zip(model.parameters(), start, strict=True))


def test_the_proximal_term_is_that_of_fedprox():
    """The same as autograd on loss + mu/2 |w - w0|^2, written out."""
    images, labels = stripes(16)
    mu, steps = 0.7, 4
    ours, theirs = (build_model("cnn", classes=2, seed=5) for _ in range(2))
    train_local(
        ours, images, labels, optimizer="sgd", lr=0.05, batch_size=16, local_epochs=steps, seed=1,
        proximal_mu=mu, threads=1,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    start = [p.detach().clone() for p in theirs.parameters()]
    stepper = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        order = rng.permutation(16)
        logits = theirs(torch.from_numpy(images[order]) / 255)
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels[order]))
        for p, q in zip(theirs.parameters(), start, strict=True):
            loss = loss + mu / 2 * ((p - q) ** 2).sum()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    assert distance(ours, [p.detach() for p in theirs.parameters()]) < 1e-8 < distance(ours, start)


def test_a_larger_proximal_weight_keeps_the_model_nearer():
    images, labels = stripes()
    distances = []
    for mu in (0.0, 1.0, 100.0):
        model = build_model("cnn", classes=2, seed=5)
        start = [p.detach().clone() for p in model.parameters()]
        train_local(model, images, labels, **{**SETTINGS, "optimizer": "sgd"}, proximal_mu=mu)
        distances.append(distance(model, start))
    assert distances[0] > distances[1] > distances[2] > 0


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_proximal_weight_out_of_range_is_refused(mu):
    images, labels = stripes(16)
    with pytest.raises(ConfigError, match="proximal_mu"):
        train_local(build_model("cnn", classes=2, seed=0), images, labels, **SETTINGS, proximal_mu=mu)
