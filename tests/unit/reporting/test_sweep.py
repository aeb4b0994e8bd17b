"""Merging runs: groups, means, files, and bad folders by name."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import attack, results, write_attack, write_run, write_sweep

from flep_fl.contracts.errors import DamagedResultsError, MixedResultsError, ResultsError
from flep_fl.reporting.make_report import make_report
from flep_fl.reporting.run_folders import find_runs
from flep_fl.reporting.statistics import mean_of
from flep_fl.reporting.sweep import merge


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_becomes_one_csv_one_table_plots_and_a_page(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    written = make_report(tmp_path)
    assert written[-1] == tmp_path / "report.html"
    rows = table(tmp_path / "runs.csv")
    assert len(rows) == 18
    assert list(rows[0])[:4] == ["run", "seed", "cloud.trust", "noise.std"]
    assert [row["run"] for row in rows] == [str(job) for job in range(18)], "job 10 comes after job 9"
    assert float(rows[4]["accuracy"]) == pytest.approx(0.6 + 0.09 + 0.01 - 25 / 500)
    assert float(rows[0]["bytes_up_per_weight"]) == pytest.approx(3_053_000 / 134_642 / 3)
    summary = (tmp_path / "summary.md").read_text().splitlines()
    assert len(summary) == 2 + 6, "one row a setting, whatever the seeds"
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots >= {"accuracy_vs_noise_std.svg", "psnr_vs_noise_std.svg", "accuracy_by_round.svg",
                     "bytes_per_mode.svg", "seconds_per_mode.svg"}  # fmt: skip
    for path in (tmp_path / "plots").iterdir():
        ET.parse(path)  # our own file
    page = (tmp_path / "report.html").read_text()
    assert "95 % confidence" in page
    assert page == (make_report(tmp_path)[-1]).read_text(), "the same input gives the same page"


def test_the_means_and_their_intervals_are_students(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    groups = merge(find_runs(tmp_path).runs).groups
    assert [one.label for one in groups][:2] == ["open, std=0", "open, std=25"]
    mean = groups[0].mean("accuracy")
    values = [0.69, 0.70, 0.71]
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.half_width == pytest.approx(4.303 * np.std(values, ddof=1) / math.sqrt(3))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60))
def test_a_mean_lies_in_its_interval_and_scales(values: list[float]) -> None:
    mean, double = mean_of(values), mean_of([2 * value for value in values])
    assert mean.value is not None and mean.half_width is not None and double.half_width is not None
    assert mean.value - mean.half_width <= mean.value <= mean.value + mean.half_width
    assert double.half_width == pytest.approx(2 * mean.half_width, rel=1e-6, abs=1e-9)


def test_unknown_values_do_not_count() -> None:
    assert mean_of([None, 3.0]) == mean_of([3.0])
    assert mean_of([None]).value is None


def test_settings_that_change_together_are_named_once(tmp_path: Path) -> None:
    for job, (profile, bound) in enumerate((("default", 100.0), ("compact", 8.0)) * 2):
        write_run(
            tmp_path / str(job), results(), {"ckks": {"profile": profile, "bound": bound}, "seed": job // 2}
        )
    sweep = merge(find_runs(tmp_path).runs)
    assert sweep.varied == ["ckks.profile"]
    assert [len(one.rows) for one in sweep.groups] == [2, 2]


def test_25_and_25_point_0_are_one_setting(tmp_path: Path) -> None:
    write_run(tmp_path / "0", results(), {"noise": {"std": 25}, "seed": 0})
    write_run(tmp_path / "1", results(), {"noise": {"std": 25.0}, "seed": 1})
    assert len(merge(find_runs(tmp_path).runs).groups) == 1


def test_a_spreadsheet_takes_no_text_for_a_formula(tmp_path: Path) -> None:
    for job, name in enumerate(("=cmd|' /C calc'!A0", "@SUM(1)", "-5", "fine")):
        write_run(tmp_path / str(job), results(), {"data": {"name": name}})
    make_report(tmp_path)
    names = [row["data.name"] for row in table(tmp_path / "runs.csv")]
    assert names == ["'=cmd|' /C calc'!A0", "'@SUM(1)", "-5", "fine"]


def test_jobs_without_results_are_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, seeds=1)
    (tmp_path / "2" / "results.json").unlink()
    found = find_runs(tmp_path)
    assert (len(found.runs), list(found.unfinished)) == (5, ["2"])
    make_report(tmp_path)
    assert "the job left no results" in (tmp_path / "report.html").read_text()


def test_one_run_keeps_the_page_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "only", results(), {"seed": 3})
    assert [path.name for path in make_report(tmp_path / "only")] == ["report.html"]
    assert "Every round" in (tmp_path / "only" / "report.html").read_text()


def test_attacks_are_shown_with_a_run_with_a_sweep_and_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", results(), {"seed": 3})
    write_attack(tmp_path / "attacks" / "0", attack())
    write_attack(tmp_path / "attacks" / "1", attack("gradient_inversion_untrusted", falls=False))
    for folder, attacks in ((tmp_path / "run", [tmp_path / "attacks"]), (tmp_path / "attacks", [])):
        page = make_report(folder, attacks)[-1].read_text()
        assert page.count("data:image/png") == 2
        assert all(shown in page for shown in ("gradient_inversion_open", "holds", "falls", "blind guessing"))
    write_sweep(tmp_path / "sweep", seeds=1)
    assert (
        make_report(tmp_path / "sweep", [tmp_path / "attacks"])[-1].read_text().count("data:image/png") == 2
    )


# --- bad input ------------------------------------------------------------------------------------


def refused(folder: Path, error: type[ResultsError], *words: str) -> None:
    before = sorted(folder.rglob("*")) if folder.exists() else []
    with pytest.raises(error) as caught:
        make_report(folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert type(caught.value) is error
    assert (sorted(folder.rglob("*")) if folder.exists() else []) == before, "nothing is written"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "missing", ResultsError, "missing is no folder")


def test_a_folder_without_runs(tmp_path: Path) -> None:
    refused(tmp_path, ResultsError, "holds no federation run", "no results.json at all")


def test_a_folder_of_another_commands_results(tmp_path: Path) -> None:
    write_run(tmp_path / "cipher", {"images": {}, "pass_rate": {}})
    refused(tmp_path, ResultsError, "holds no federation run", "cipher/results.json")


def test_runs_beside_another_commands_results(tmp_path: Path) -> None:
    write_run(tmp_path / "0", results())
    write_run(tmp_path / "cipher", {"images": {}, "pass_rate": {}})
    refused(tmp_path, MixedResultsError, "cipher/results.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", "\x00", "[" * 100_000])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "0", results())
    write_run(tmp_path / "1", results())
    (tmp_path / "1" / "results.json").write_text(text)
    refused(tmp_path, DamagedResultsError, "1/results.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.pop("final"), "final"),
        (lambda r: r.update(sites="abc"), "sites"),
        (lambda r: r.update(parameters=None), "parameters"),
        (lambda r: r["final"].update(accuracy="0.9"), "final.accuracy"),
        (lambda r: r["final"].update(accuracy=float("nan")), "final.accuracy"),
        (lambda r: r["rounds"].append(7), "rounds[3]"),
        (lambda r: r["rounds"][1].pop("bytes_up"), "rounds[1].bytes_up"),
        (lambda r: r["rounds"][1].update(accuracy=True), "rounds[1].accuracy"),
        (lambda r: r["rounds"][1]["seconds"].pop("train"), "rounds[1].seconds"),
        (lambda r: r["rounds"][2].update(failed=[{"site": "a"}]), "rounds[2].failed"),
        (lambda r: r["rounds"][2].update(replied=None), "rounds[2].replied"),
        (lambda r: r.update(restore={"psnr_db": []}), "restore"),
    ],
)
def test_a_damaged_field_is_named(tmp_path: Path, change: Any, named: str) -> None:
    broken = results()
    change(broken)
    write_run(tmp_path / "0", results())
    write_run(tmp_path / "1", broken)
    refused(tmp_path, DamagedResultsError, "1/results.json", named)


def test_settings_that_are_no_yaml(tmp_path: Path) -> None:
    write_run(tmp_path / "0", results(), {})
    (tmp_path / "0" / ".hydra" / "config.yaml").write_text("a: [")
    refused(tmp_path, DamagedResultsError, "config.yaml")


@pytest.mark.parametrize(
    "name", ["../../secret.png", "/etc/passwd.png", "picture.svg", "missing.png", "text.png"]
)
def test_a_picture_must_be_a_png_in_its_folder(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "a" / "b", attack(pictures=[name]))
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (tmp_path / "a" / "b" / "text.png").write_text("no picture")
    (tmp_path / "a" / "b" / "picture.svg").write_text("<svg/>")
    refused(tmp_path / "a", DamagedResultsError, "png" if name != "picture.svg" else "svg")


@pytest.mark.parametrize("field", ["threat_model", "configuration", "success", "baseline", "falls"])
def test_a_damaged_attack_is_named(tmp_path: Path, field: str) -> None:
    broken = attack()
    del broken[field]
    write_attack(tmp_path / "0", broken)
    refused(tmp_path, DamagedResultsError, field)


def test_pictures_of_a_run_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results()))
    (tmp_path / "report_data.json").write_text(json.dumps({"settings": {}, "images": {"stages": [{}]}}))
    refused(tmp_path, DamagedResultsError, "pictures of a run")
