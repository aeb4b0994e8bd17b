"""Splits: disjoint, complete, seeded; equal held-out shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flep_fl.contracts.errors import ConfigError, DataError
from flep_fl.data_owner.partition import held_out_shares, partition, split_test, stratified_subset

LABELS = np.random.default_rng(0).choice(4, size=400, p=[0.5, 0.3, 0.15, 0.05])


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 120),
    sites=st.integers(1, 12),
    name=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([1e-6, 0.05, 0.5, 100.0]),
    seed=st.integers(0, 1000),
)
def test_every_image_goes_to_exactly_one_site(count, sites, name, alpha, seed):
    labels = LABELS[:count]
    if count < sites:
        with pytest.raises(DataError, match="fewer training images"):
            partition(labels, sites, name=name, alpha=alpha, seed=seed)
        return
    parts = partition(labels, sites, name=name, alpha=alpha, seed=seed)
    assert len(parts) == sites
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(count))


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_partition_is_seeded(name):
    first, again, other = (partition(LABELS, 3, name=name, seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in partition(LABELS, 7, name="iid", seed=0)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_sizes_and_class_shares_differ():
    parts = partition(LABELS, 3, name="dirichlet", alpha=0.5, seed=3)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 1.2 * min(sizes)
    shares = [np.mean(LABELS[part] == 0) for part in parts]
    assert max(shares) - min(shares) > 0.1


def test_large_alpha_approaches_iid():
    shares = [np.mean(LABELS[p] == 0) for p in partition(LABELS, 3, name="dirichlet", alpha=1e5, seed=0)]
    assert np.ptp(shares) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "zipf"}, "partition.name"),
        ({"name": "dirichlet", "alpha": 0.0}, "partition.alpha"),
        ({"name": "dirichlet", "alpha": float("nan")}, "partition.alpha"),
        ({"name": "iid", "sites": 0}, "federation.sites"),
    ],
)
def test_bad_partition_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        partition(LABELS, options.pop("sites", 3), seed=0, **options)


def test_held_out_split_is_disjoint_complete_and_stratified():
    train, test = split_test(LABELS, 0.25, seed=5)
    assert sorted([*train, *test]) == list(range(400))
    assert len(test) == 100
    for value in range(4):
        assert abs(np.mean(LABELS[test] == value) - np.mean(value == LABELS)) <= 1 / len(test)
    assert np.array_equal(test, split_test(LABELS, 0.25, seed=5)[1])
    assert not np.array_equal(test, split_test(LABELS, 0.25, seed=6)[1])


def test_held_out_split_of_few_images_keeps_one_on_either_side():
    for fraction in (0.01, 0.99):
        train, test = split_test([0, 1], fraction, seed=0)
        assert len(train) == len(test) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(ConfigError, match="fraction"):
        split_test(LABELS, fraction, seed=0)


def test_equal_shares_make_the_plain_mean_exact():
    test = np.arange(100, 150)
    shares = held_out_shares(test, 4, seed=1)
    assert [len(s) for s in shares] == [12] * 4
    kept = np.concatenate(shares)
    assert len(set(kept)) == 48
    assert set(kept) <= set(test)
    correct = np.random.default_rng(0).integers(0, 2, 150)
    mean = np.mean([correct[s].mean() for s in shares])
    assert mean == pytest.approx(correct[kept].mean(), abs=1e-12)


def test_too_few_held_out_images():
    with pytest.raises(DataError, match="held-out"):
        held_out_shares(np.arange(2), 3, seed=0)


def test_subset_keeps_class_shares():
    chosen = stratified_subset(LABELS, 40, seed=0)
    assert len(set(chosen)) == 40
    for value in range(4):
        assert abs(np.sum(LABELS[chosen] == value) - 40 * np.mean(value == LABELS)) < 1
    with pytest.raises(DataError):
        stratified_subset(LABELS, 401, seed=0)
