"""A site takes over a new model only if it does not lose too much on the site's own validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flep_fl.data_analyst.acceptance import AcceptanceTest


def model(accuracy: float) -> dict[str, np.ndarray]:
    """A model that scores what its one weight says."""
    return {"w": np.array([accuracy])}


class Scorer:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, arrays: dict[str, np.ndarray]) -> float:
        self.calls += 1
        return float(arrays["w"][0])


@pytest.fixture
def score() -> Scorer:
    return Scorer()


def kept(test: AcceptanceTest, accuracy: float, run: str = "run") -> float:
    return float(test.consider(model(accuracy), run)["w"][0])


def test_the_rule(tmp_path: Path, score: Scorer) -> None:
    told: list[str] = []
    test = AcceptanceTest(0.1, score, tmp_path / "a.npz", on_refusal=told.append)
    assert [kept(test, a) for a in (0.2, 0.8, 0.71, 0.69, 0.3, 0.9)] == [0.2, 0.8, 0.71, 0.71, 0.71, 0.9]
    assert len(told) == 2
    assert "0.690" in told[0]
    assert "0.800" in told[0]


def test_small_drops_do_not_add_up(tmp_path: Path, score: Scorer) -> None:
    test = AcceptanceTest(0.1, score, tmp_path / "a.npz")
    assert [kept(test, a) for a in (0.9, 0.85, 0.8, 0.75, 0.7)] == [0.9, 0.85, 0.8, 0.8, 0.8]


def test_a_drop_of_just_so_much_is_accepted(tmp_path: Path, score: Scorer) -> None:
    test = AcceptanceTest(0.25, score, tmp_path / "a.npz")
    assert [kept(test, a) for a in (0.75, 0.5)] == [0.75, 0.5]


def test_each_model_is_judged_once(tmp_path: Path, score: Scorer) -> None:
    test = AcceptanceTest(0.0, score, tmp_path / "a.npz")
    for _ in range(3):
        assert kept(test, 0.8) == 0.8
    assert [kept(test, 0.1) for _ in range(3)] == [0.8] * 3
    assert score.calls == 2


def test_equal_bytes_under_another_name_or_shape_are_another_model(tmp_path: Path) -> None:
    test = AcceptanceTest(0.1, lambda _model: 0.5, tmp_path / "a.npz")
    weights = np.array([1.0, 2.0])
    for model in ({"w": weights}, {"v": weights}, {"v": weights[None]}):
        kept = test.consider(model, "run")
        assert [(name, array.shape) for name, array in kept.items()] == [
            (name, array.shape) for name, array in model.items()
        ]


def test_a_restarted_site_remembers(tmp_path: Path, score: Scorer) -> None:
    test = AcceptanceTest(0.1, score, tmp_path / "a.npz")
    kept(test, 0.8)
    kept(test, 0.1)
    again = AcceptanceTest(0.1, score, tmp_path / "a.npz")
    calls = score.calls
    assert kept(again, 0.1) == 0.8
    assert score.calls == calls, "the verdict is on disk"
    assert kept(again, 0.5) == 0.8
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == 0o600


def test_another_run_begins_anew(tmp_path: Path, score: Scorer) -> None:
    test = AcceptanceTest(0.1, score, tmp_path / "a.npz")
    kept(test, 0.8)
    assert kept(test, 0.1, run="next") == 0.1
    assert kept(test, 0.05, run="next") == 0.05


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rubbish", b"x" * 100])
def test_a_damaged_file_costs_the_memory_alone(tmp_path: Path, score: Scorer, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    test = AcceptanceTest(0.1, score, tmp_path / "a.npz")
    assert kept(test, 0.3) == 0.3
