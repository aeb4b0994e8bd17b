"""The page of a sweep: plots with confidence bands over seeds, one table of groups, one of runs."""

from __future__ import annotations

from collections.abc import Sequence

from flep_fl.reporting.attack_blocks import attack_blocks
from flep_fl.reporting.cipher_tables import markdown
from flep_fl.reporting.page.blocks import (
    Block,
    Cell,
    Chart,
    Figure,
    Folded,
    Page,
    Row,
    Section,
    Table,
    Text,
    number,
)
from flep_fl.reporting.page.charts import SERIES, Bars, Series, bar_chart, line_chart
from flep_fl.reporting.run_folders import Found
from flep_fl.reporting.statistics import Mean
from flep_fl.reporting.sweep import Group, Sweep, as_number, group

NOISE = "noise.std"
SITES = "federation.sites"

_MODE_ROOMS = ("cloud", "ckks", "federation", "model", "cipher")
_STEPS = ("train", "encrypt", "aggregate", "decrypt")


def plots(sweep: Sweep) -> dict[str, Chart]:
    """Return the charts of a sweep by file name: accuracy against what varies, rounds, bytes and seconds.

    A line is a group of runs that agree in everything but the seed and what is on the axis; its band is the
    95 % confidence interval over the seeds (Student).
    """
    found: dict[str, Chart] = {}
    for name in sweep.numeric():
        title = f"Accuracy against {name}"
        found[f"accuracy_vs_{_file(name)}"] = _against(sweep, name, "accuracy", title, percent=True)
        if name == NOISE and any(row.figures["restored_psnr_db"] is not None for row in sweep.rows):
            title = f"Restored images against {name}"
            found[f"psnr_vs_{_file(name)}"] = _against(
                sweep, name, "restored_psnr_db", title, unit="PSNR (dB)"
            )
        if name == SITES:
            for step in ("aggregate", "train"):
                chart = _against(
                    sweep, name, f"{step}_s_per_round", f"Seconds a round: {step}", unit="seconds"
                )
                found[f"{step}_seconds_vs_{_file(name)}"] = chart
    if any(len(row.curve) > 1 for row in sweep.rows):
        found["accuracy_by_round"] = _by_round(sweep)
    modes = _modes(sweep)
    found["bytes_per_mode"] = _bytes(modes)
    found["seconds_per_mode"] = _seconds(modes)
    return found


def sweep_page(sweep: Sweep, found: Found, *, title: str) -> Page:
    """Return the page of a sweep.

    Parameters
    ----------
    sweep
        The merged runs.
    found
        Where they came from: attacks and unfinished jobs beside them.
    title
        Heading.
    """
    charts = list(plots(sweep).values())
    varied = ", ".join(sweep.varied) or "nothing but the seed"
    best = max(
        (one for one in sweep.groups if one.mean("accuracy").value is not None),
        key=lambda one: one.mean("accuracy").value or 0.0,
        default=None,
    )
    figures = [
        Figure("runs", str(len(sweep.rows)), f"{len(sweep.groups)} settings"),
        Figure("seeds", str(len({row.seed for row in sweep.rows}))),
    ]
    if best is not None:
        figures.append(Figure("best accuracy", _percent(best.mean("accuracy")), best.label, "good"))
    if found.unfinished:
        figures.append(Figure("jobs without results", str(len(found.unfinished)), tone="bad"))
    sections = [
        Section("plots", "Plots", [Row(charts[i : i + 2]) for i in range(0, len(charts), 2)]),
        Section(
            "settings",
            "One row a setting",
            [
                Text("Means over the seeds, with 95 % confidence intervals where there are two or more."),
                groups_table(sweep),
            ],
        ),
        Section("runs", "Every run", [runs_table(sweep)]),
    ]
    attacks = attack_blocks(found.attacks)
    if attacks:
        sections.append(Section("attacks", "Attacks", attacks))
    sections += [_failures(found), _common(sweep, found)]
    return Page(title, f"What varies: {varied}.", figures, sections, badge=f"{len(sweep.rows)} runs")


def groups_table(sweep: Sweep) -> Table:
    """Return one row a group of runs that differ in the seed alone."""
    columns = [
        *sweep.varied,
        "runs",
        "accuracy %",
        "majority %",
        "restored dB",
        "MB up / round",
        "MB down / round",
    ]
    columns += [f"{step} s / round" for step in _STEPS]
    rows: list[list[Cell | str]] = []
    for one in sweep.groups:
        row: list[Cell | str] = [_setting(one.settings[name]) for name in sweep.varied]
        row.append(number(len(one.rows), 0))
        row.append(_interval(one.mean("accuracy"), 1, 100))
        row.append(number(one.mean("majority_accuracy").value, 1, scale=100))
        row.append(_interval(one.mean("restored_psnr_db"), 1))
        row += [_interval(one.mean(f"bytes_{way}_per_round"), 3, 1e-6) for way in ("up", "down")]
        row += [_interval(one.mean(f"{step}_s_per_round"), 2) for step in _STEPS]
        rows.append(row)
    return Table("Groups of runs", columns, rows, key_column=bool(sweep.varied))


def runs_table(sweep: Sweep) -> Table:
    """Return one row a run."""
    columns = [
        "run",
        "seed",
        *sweep.varied,
        "accuracy %",
        "loss",
        "restored dB",
        "rounds",
        "failed",
        "MB up",
        "MB down",
    ]
    rows: list[list[Cell | str]] = []
    for row in sweep.rows:
        f = row.figures
        rows.append(
            [
                _setting(row.name),
                _setting(row.seed),
                *(_setting(row.settings[name]) for name in sweep.varied),
                number(f["accuracy"], 1, scale=100),
                number(f["loss"], 4),
                number(f["restored_psnr_db"], 1),
                number(f["rounds_completed"], 0),
                number(f["failed_contributions"], 0),
                number(f["bytes_up_per_round"], 3, scale=1e-6),
                number(f["bytes_down_per_round"], 3, scale=1e-6),
            ]
        )
    return Table("Runs; bytes are those of a round in the mean", columns, rows)


def summary_markdown(sweep: Sweep) -> str:
    """Return :func:`groups_table` as Markdown."""
    table = groups_table(sweep)
    return markdown(table.columns, [[cell.text for cell in row] for row in table.cells()]) + "\n"


# --- charts ---------------------------------------------------------------------------------------


def _against(
    sweep: Sweep, axis: str, figure: str, title: str, *, percent: bool = False, unit: str = ""
) -> Chart:
    others = [name for name in sweep.varied if name != axis]
    lines = group(sweep.rows, others)
    series = []
    for line in lines[:SERIES]:
        points = [
            (as_number(one.settings[axis]) or 0.0, one.mean(figure)) for one in group(line.rows, [axis])
        ]
        series.append(_series(line.label, sorted(points, key=lambda point: point[0])))
    if figure == "accuracy":
        reference = [
            (as_number(one.settings[axis]) or 0.0, one.mean("majority_accuracy").value)
            for one in group(sweep.rows, [axis])
        ]
        series.append(Series("most frequent class", sorted(reference), plain=True))
    y = "accuracy" if percent else unit
    return line_chart(
        title, series, x=axis, y=y, digits=1 if percent else 2, percent=percent, note=_note(lines)
    )


def _by_round(sweep: Sweep) -> Chart:
    series = [
        _series(one.label, [(float(n), mean) for n, mean in one.curve()]) for one in sweep.groups[:SERIES]
    ]
    note = _note(sweep.groups)
    title = "Accuracy by round"
    return line_chart(title, series, x="round", y="accuracy", digits=1, percent=True, whole=True, note=note)


def _series(name: str, points: Sequence[tuple[float, Mean]]) -> Series:
    return Series(name, [(x, mean.value) for x, mean in points], [mean.interval for _, mean in points])


def _note(groups: Sequence[Group]) -> str:
    repeated = any(one.mean("accuracy").half_width is not None for one in groups)
    words = ["Bands: 95 % confidence over the seeds."] if repeated else []
    if len(groups) > SERIES:
        words.append(f"The first {SERIES} of {len(groups)}; all of them stand in the table.")
    return " ".join(words)


def _modes(sweep: Sweep) -> list[Group]:
    """Group by what decides bytes and seconds: the settings of cloud, encryption, federation and model."""
    names = [name for name in sweep.varied if name.split(".")[0] in _MODE_ROOMS]
    return group(sweep.rows, names)


def _bytes(modes: Sequence[Group]) -> Chart:
    bars = [
        _bars(name, modes, f"bytes_{way}_per_round", 1e-6) for name, way in (("up", "up"), ("down", "down"))
    ]
    return bar_chart(
        "Bytes a round", [one.label for one in modes], bars, x="mode", y="MB, all sites together"
    )


def _seconds(modes: Sequence[Group]) -> Chart:
    bars = [_bars(step, modes, f"{step}_s_per_round", 1.0) for step in _STEPS]
    note = "Training, encryption and decryption are summed over the sites."
    return bar_chart(
        "Seconds a round", [one.label for one in modes], bars, x="mode", y="seconds", digits=2, note=note
    )


def _bars(name: str, modes: Sequence[Group], figure: str, scale: float) -> Bars:
    means = [one.mean(figure) for one in modes]
    values = [(mean.value or 0.0) * scale for mean in means]
    return Bars(name, values, [None if m.half_width is None else m.half_width * scale for m in means])


# --- parts ----------------------------------------------------------------------------------------


def _failures(found: Found) -> Section:
    rows: list[list[Cell | str]] = [[name, "-", "-", "the job left no results"] for name in found.unfinished]
    for run in found.runs:
        for entry in run.results["rounds"]:
            what = number(entry["round"], 0)
            rows += [[run.name, what, f["site"], f["reason"]] for f in entry["failed"]]
            if entry.get("error"):
                rows.append([run.name, what, "-", str(entry["error"])])
        rows += [[run.name, "end", f["site"], f["reason"]] for f in run.results.get("closing_failures", ())]
    if not rows:
        return Section(
            "failures", "Failures", [Text("None: every job ended, and every contribution was valid.")]
        )
    return Section("failures", "Failures", [Table("Failures", ["run", "round", "site", "reason"], rows)])


def _common(sweep: Sweep, found: Found) -> Section:
    versions = sorted({(str(k), str(v)) for run in found.runs for k, v in run.results["versions"].items()})
    settings = Table("Settings of all runs", ["setting", "value"], [list(pair) for pair in sweep.common])
    blocks: list[Block] = [
        Folded("Settings that all runs share", [settings]),
        Folded("Versions", [Table("Versions", ["package", "version"], [list(pair) for pair in versions])]),
    ]
    return Section("common", "What ran", blocks)


def _setting(text: str) -> Cell | str:
    value = as_number(text)
    return text if value is None else Cell(text, value)


def _interval(mean: Mean, digits: int, scale: float = 1.0) -> Cell:
    shown = number(mean.value, digits, scale=scale)
    if mean.half_width is None:
        return shown
    return Cell(f"{shown.text} ± {mean.half_width * scale:,.{digits}f}", shown.order)


def _percent(mean: Mean) -> str:
    return _interval(mean, 1, 100).text + " %"


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
