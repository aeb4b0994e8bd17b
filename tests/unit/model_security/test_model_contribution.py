from __future__ import annotations

import numpy as np
import pytest

from flep_fl.contracts.errors import CiphertextError, WeightRangeError
from flep_fl.model_security.adder import PlainAdder
from flep_fl.model_security.contribution import average, weighted_vector
from flep_fl.model_security.plain import PlainModelCipher


def test_the_average_of_the_sum_is_the_weighted_mean():
    rng = np.random.default_rng(1)
    models, counts = rng.normal(size=(4, 50)), [3, 70, 512, 1000]
    total = sum(weighted_vector(m, n, 1000, 8.0) for m, n in zip(models, counts, strict=True))
    assert np.allclose(average(total), np.average(models, axis=0, weights=counts), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("flat", "examples", "words"),
    [
        ([0.1], 0, "ckks.max_examples"),
        ([0.1], 101, "ckks.max_examples"),
        ([np.nan], 10, "not finite"),
        ([np.inf], 10, "not finite"),
        ([9.0], 100, "ckks.bound"),
        ([-9.0], 100, "ckks.bound"),
    ],
)
def test_contributions_out_of_range_are_refused(flat, examples, words):
    with pytest.raises(WeightRangeError) as caught:
        weighted_vector(np.array(flat), examples, 100, 8.0)
    assert words in str(caught.value)


def test_clipping_is_by_config_and_told(caplog):
    clipped = weighted_vector(np.array([9.0, -20.0, 3.0]), 50, 100, 4.0, clip=True)
    assert clipped.tolist() == [4.0, -4.0, 1.5, 0.5]
    assert "2 weights" in caplog.text and "4.5" not in caplog.text
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(WeightRangeError, match="not finite"):
            weighted_vector(np.array([1.0, bad]), 50, 100, 4.0, clip=True)


def test_the_bound_is_on_what_is_sent():
    assert weighted_vector(np.array([9.0]), 50, 100, 8.0).tolist() == [4.5, 0.5]


@pytest.mark.parametrize("total", [[1.0, 0.0], [1.0, -0.1], [1.0, np.nan], [np.inf, 1.0]])
def test_a_sum_without_share_is_refused(total):
    with pytest.raises(WeightRangeError):
        average(np.array(total))


def test_open_federations_add_in_float64():
    cipher, adder = PlainModelCipher("open"), PlainAdder(3)
    models = [np.array([0.1, -2.0], np.float32) * np.float32(k) for k in (1, 2, 3)]
    shares = [0.1, 0.25, 1 / 3]
    vectors = [np.append(w.astype(np.float64) * c, c) for w, c in zip(models, shares, strict=True)]
    for vector in vectors:
        payload = cipher.encrypt(vector)
        assert len(payload) == 2 * 4 + 8
        adder.add(payload)
    total = cipher.decrypt(adder.result(), 3)
    assert adder.count == 3 and total.dtype == np.float64
    assert np.abs(total - sum(vectors)).max() < 1e-15, "float32 models are averaged exactly"


def test_open_payloads_that_do_not_fit_leave_the_sum_alone():
    cipher, adder = PlainModelCipher("open"), PlainAdder(3)
    good = cipher.encrypt(np.ones(3))
    adder.add(good)
    for bad in (b"", good[:-1], good + b"\0", b"\x00\x00\xc0\x7f" * 4):
        with pytest.raises(CiphertextError):
            adder.add(bad)
    assert adder.count == 1 and cipher.decrypt(adder.result(), 3).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(CiphertextError, match="no payload"):
        PlainAdder(3).result()
    for bad_vector in (np.array([1e39, 1e-3]), np.array([1.0, np.nan]), np.array([1.0, 0.0]), np.array([])):
        with pytest.raises(WeightRangeError):
            cipher.encrypt(bad_vector)
