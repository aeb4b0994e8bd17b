"""The picture of an inversion in a run's report: an open cloud's bytes show the image, ciphertext not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import SMALL, make_config
from report_samples import results
from sklearn.datasets import load_digits

from flep_fl.attacks import run_view
from flep_fl.attacks.gradient_inversion import local_update
from flep_fl.attacks.run_view import invert_for_report
from flep_fl.config import Config
from flep_fl.contracts.errors import DamagedResultsError
from flep_fl.flower.run_report import write_run_report
from flep_fl.provision.owner import Sample
from flep_fl.reporting.inversion_view import TITLE, InversionView, inversion_blocks
from flep_fl.reporting.make_report import make_report
from flep_fl.reporting.page.blocks import Text


def digits() -> Sample:
    return Sample([np.asarray(image * 15.9, np.uint8) for image in load_digits().images[:3]], 10)


@pytest.mark.he
def test_the_open_clouds_bytes_show_the_image_and_ciphertext_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_view, "ITERATIONS", 40)
    view = invert_for_report(make_config(*SMALL), digits())
    assert view.figures["open"] > 0.5
    assert view.figures["untrusted"] < 0.35
    assert [stage.name for stage in view.stages] == ["trained on", "cloud=open", "cloud=untrusted"]
    for stage, name in zip(view.stages[1:], ("open", "untrusted"), strict=True):
        assert f"SSIM {view.figures[name]:.2f}" in stage.caption
    assert InversionView.from_json(json.loads(json.dumps(view.to_json()))) == view


def test_the_open_cloud_attacks_what_training_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[np.ndarray] = []
    observed: list[np.ndarray] = []

    def update(*arguments: Any) -> Any:
        changes.append(local_update(*arguments).detach().numpy())
        return local_update(*arguments)

    def invert(_model: Any, seen: np.ndarray, _labels: Any, shape: tuple[int, ...], *_: Any) -> Any:
        observed.append(seen)
        return np.zeros(shape, np.float32), 0.0

    monkeypatch.setattr(run_view, "local_update", update)
    monkeypatch.setattr(run_view, "invert_update", invert)
    invert_for_report(make_config(*SMALL), digits())
    assert np.abs(changes[0]).max() > 0
    np.testing.assert_allclose(observed[0], changes[0], atol=1e-6)


@pytest.mark.parametrize(
    ("sample", "overrides", "reason"),
    [
        (digits(), ("model=resnet18",), "resnet18"),
        (Sample([np.eye(5, dtype=np.uint8)], 2), (), "too small"),
    ],
)
def test_where_none_is_shown_the_page_says_why(
    sample: Sample, overrides: tuple[str, ...], reason: str
) -> None:
    view = invert_for_report(make_config(*SMALL, *overrides), sample)
    assert not view.stages
    (block,) = inversion_blocks(view)
    assert isinstance(block, Text) and reason in block.text


def test_a_large_network_is_not_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_view, "LARGEST_NETWORK", 1000)
    view = invert_for_report(make_config(*SMALL), digits())
    assert not view.stages and "minutes" in view.what


def test_a_brief_report_makes_none_and_a_full_one_keeps_it(tmp_path: Path) -> None:
    asked: list[int] = []

    def invert(_config: Config, sample: Sample) -> InversionView:
        asked.append(len(sample.images))
        return InversionView([], "No inversion, for a test.", {})

    for name in ("brief", "full"):
        config = make_config(*SMALL[:-1], f"report={name}", "report.keys=0")
        (tmp_path / name).mkdir()
        page = write_run_report(tmp_path / name, config, results(), digits, invert=invert)
        assert page is not None
        assert ("No inversion, for a test." in page.read_text()) == (name == "full")
    assert asked == [3]
    kept = json.loads((tmp_path / "full" / "report_data.json").read_text())
    assert InversionView.from_json(kept["inversion"]).what == "No inversion, for a test."
    # The page can be made again.
    (tmp_path / "full" / "results.json").write_text(json.dumps(results()))
    (again,) = make_report(tmp_path / "full")
    assert "No inversion, for a test." in again.read_text()


@pytest.mark.parametrize(
    "value", [[], {"stages": [], "what": ""}, {"stages": [{}], "what": "", "figures": {}}]
)
def test_a_damaged_picture_is_named(value: object) -> None:
    with pytest.raises(DamagedResultsError):
        InversionView.from_json(value)


def test_the_title_stands_above_the_pictures() -> None:
    stage = {"name": "cloud=open", "caption": "c", "png": ""}
    (block,) = inversion_blocks(InversionView.from_json({"stages": [stage], "what": "w", "figures": {}}))
    assert block.title == TITLE
