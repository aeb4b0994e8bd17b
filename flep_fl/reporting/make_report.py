"""Make the report of a folder: of one run, of a sweep, or of attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flep_fl.contracts.files import write_atomic
from flep_fl.reporting.attack_blocks import attack_blocks, attacks_page
from flep_fl.reporting.image_view import ImageView
from flep_fl.reporting.inversion_view import InversionView
from flep_fl.reporting.page.blocks import Page
from flep_fl.reporting.page.charts import standalone
from flep_fl.reporting.page.render import write_page
from flep_fl.reporting.results import REPORT, REPORT_DATA
from flep_fl.reporting.run_folders import Found, Run, find_runs, read_json
from flep_fl.reporting.run_page import run_page
from flep_fl.reporting.sweep import merge, to_csv
from flep_fl.reporting.sweep_page import plots, summary_markdown, sweep_page


def make_report(folder: Path, attacks: Sequence[Path] = (), title: str | None = None) -> list[Path]:
    """Read everything first, then write the files of the report; nothing is written where reading fails.

    Parameters
    ----------
    folder
        Output folder of a run or of a sweep.
    attacks
        Folders with attacks that belong to it.
    title
        Heading.

    Returns
    -------
    list of Path
        What was written. For one run ``report.html``; for several also ``runs.csv`` (one line a run),
        ``summary.md`` (one row a setting) and ``plots/*.svg``. The page comes last.

    Raises
    ------
    ResultsError
        By name; see :func:`.run_folders.find_runs`.
    """
    found = find_runs(folder)
    further = [attack for other in attacks for attack in find_runs(other).attacks]
    found = replace(found, attacks=[*found.attacks, *further])
    if not found.runs:
        return [write_page(folder / REPORT, attacks_page(found.attacks, title or "Attacks"))]
    if len(found.runs) == 1:
        return [write_page(folder / REPORT, _single(found.runs[0], found, title))]
    sweep = merge(found.runs)
    page = sweep_page(sweep, found, title=title or "Sweep")
    written = [folder / "runs.csv", folder / "summary.md"]
    write_atomic(written[0], to_csv(sweep))
    write_atomic(written[1], summary_markdown(sweep).encode())
    for name, chart in plots(sweep).items():
        written.append(folder / "plots" / f"{name}.svg")
        write_atomic(written[-1], standalone(chart.svg))
    return [*written, write_page(folder / REPORT, page)]


def _single(run: Run, found: Found, title: str | None) -> Page:
    path = run.folder / REPORT_DATA
    data = read_json(path) if path.is_file() else {}
    images, inversion = data.get("images"), data.get("inversion")
    return run_page(
        run.results,
        run.settings or data.get("settings") or {},
        images=None if images is None else ImageView.from_json(images),
        inversion=None if inversion is None else InversionView.from_json(inversion),
        attacks=attack_blocks(found.attacks),
        title=title or str(data.get("title") or "Federation run"),
    )
