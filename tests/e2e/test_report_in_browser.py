"""The report in headless Chromium: it loads, it is quiet, it asks nobody, it sorts, it fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser, browser
from federations import SMALL, make_config
from report_samples import results

from flep_fl.flower.run_report import write_run_report
from flep_fl.provision.owner import Sample
from flep_fl.reporting.image_view import Stage, png
from flep_fl.reporting.inversion_view import InversionView

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report, images included, with a site whose name is hostile and very long."""
    content = results(sites=("<script>alert(1)</script>", "b" * 90, "c"), rounds=12)
    content["rounds"][4]["failed"] = [{"site": "b" * 90, "reason": "x" * 120}]
    rng = np.random.default_rng(0)
    images = [np.clip(rng.normal(120, 40, (8, 8)), 0, 255).astype(np.uint8) for _ in range(4)]
    config = make_config(*SMALL, "report=full", "report.keys=1")
    inversion = InversionView([Stage(name, "x" * 90, png(images[0])) for name in "abc"], "y" * 400, {})
    path = write_run_report(
        tmp_path_factory.mktemp("report"),
        config,
        content,
        lambda: Sample(images, 2),
        invert=lambda _config, _sample: inversion,
    )
    assert path is not None
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (320, True)])
def test_it_loads_quietly_and_fits(tab: Browser, report: Path, width: int, dark: bool) -> None:
    tab.open(report, width=width, dark=dark)
    assert tab.errors == []
    assert [url for url in tab.requests if not url.startswith(("data:", report.as_uri()))] == []
    assert tab.run("document.images.length") >= 12
    assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("[...document.querySelectorAll('svg.chart')].every(chart => chart.clientHeight > 20)")


def test_the_policy_is_in_force(tab: Browser, report: Path) -> None:
    tab.open(report)
    tab.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    tab.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    assert tab.run("window.ran === undefined")
    assert any("Content Security Policy" in error for error in tab.errors), tab.errors


def test_the_theme_button_switches_both_ways(tab: Browser, report: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    tab.open(report, dark=False)
    light = tab.run(paper)
    tab.run("document.getElementById('theme').click()")
    dark = tab.run(paper)
    assert dark != light
    tab.run("document.getElementById('theme').click()")
    assert tab.run(paper) == light
    tab.open(report, dark=True)
    assert tab.run(paper) == dark


def test_tables_sort_by_number_both_ways(tab: Browser, report: Path) -> None:
    tab.open(report)
    table = "[...document.querySelectorAll('table')].find(t => t.caption.textContent === 'Every round')"
    column = f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent)"
    heading = f"{table}.tHead.rows[0].cells[0]"
    ascending = [str(number) for number in range(1, 13)]
    assert tab.run(column) == ascending
    tab.run(f"{heading}.querySelector('button').click()")
    assert tab.run(column) == ascending, "by number: 10 comes after 9"
    tab.run(f"{heading}.querySelector('button').click()")
    assert tab.run(column) == ascending[::-1]
    assert tab.run(f"{heading}.getAttribute('aria-sort')") == "descending"


def test_every_chart_has_a_title_a_description_and_a_table(tab: Browser, report: Path) -> None:
    tab.open(report)
    charts = tab.run(
        "[...document.querySelectorAll('figure.card')].map(f => [f.querySelector('svg > title').textContent,"
        " f.querySelector('svg > desc').textContent, f.querySelectorAll('details tbody tr').length])"
    )
    assert len(charts) >= 4
    assert all(title and description and rows == 12 for title, description, rows in charts)
