"""Merge the runs of a sweep: which settings differ, one row a run, one group a setting, means over seeds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flep_fl.reporting.redaction import flat_settings
from flep_fl.reporting.run_folders import Run
from flep_fl.reporting.statistics import Mean, mean_of

SEED = "seed"

METRICS: tuple[str, ...] = (
    "accuracy",
    "majority_accuracy",
    "cloud_accuracy",
    "loss",
    "rounds_completed",
    "failed_contributions",
    "bytes_up_per_round",
    "bytes_down_per_round",
    "bytes_up_per_weight",
    "bytes_down_per_weight",
    "train_s_per_round",
    "encrypt_s_per_round",
    "aggregate_s_per_round",
    "decrypt_s_per_round",
    "restored_psnr_db",
    "noisy_psnr_db",
    "parameters",
    "sites",
)
"""Columns of the merged table, after the run's name, its seed and the settings that differ."""

_OWN_AFFAIRS = ("report.", "tracking.", "hydra.", "runtime.address", "runtime.threads", "out", "kits", "kit")
_FIRST = ("cloud.trust", "cipher.name", "noise.std", "noise.recovery", "ckks.profile", "ckks.encryption")


@dataclass(frozen=True, slots=True)
class Row:
    """One run: its name, seed, the settings that differ between runs, and its figures."""

    name: str
    seed: str
    settings: Mapping[str, str]
    figures: Mapping[str, float | None]
    curve: Sequence[tuple[int, float | None]]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes
    ----------
    label
        The settings that tell it from the other groups, in words.
    settings
        The same by name.
    rows
        Its runs.
    """

    label: str
    settings: Mapping[str, str]
    rows: Sequence[Row]

    def mean(self, figure: str) -> Mean:
        """Return the mean of a figure over the runs."""
        return mean_of([row.figures[figure] for row in self.rows])

    def curve(self) -> list[tuple[int, Mean]]:
        """Return the mean accuracy after each round."""
        rounds = sorted({number for row in self.rows for number, _ in row.curve})
        maps = [dict(row.curve) for row in self.rows]
        return [(number, mean_of([curve.get(number) for curve in maps])) for number in rounds]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All runs of a sweep.

    Attributes
    ----------
    varied
        Names of the settings that differ, the seed apart; of settings that change together the first.
    common
        The other settings.
    rows, groups
        One row a run; runs that differ in the seed alone in one group.
    """

    varied: Sequence[str]
    common: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    groups: Sequence[Group]

    def numeric(self) -> list[str]:
        """Return those varied settings that are numbers in every run."""
        return [n for n in self.varied if all(as_number(row.settings[n]) is not None for row in self.rows)]


def merge(runs: Sequence[Run]) -> Sweep:
    """Put the runs of a sweep together.

    Parameters
    ----------
    runs
        At least one.
    """
    flat = [_flat(run) for run in runs]
    names = sorted({name for settings in flat for name in settings}, key=lambda n: (_rank(n), n))
    values = {name: [settings.get(name, "-") for settings in flat] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1 and name != SEED]
    varied: list[str] = []
    partitions: set[tuple[int, ...]] = set()
    for name in differing:
        first = {value: index for index, value in reversed(list(enumerate(values[name])))}
        partition = tuple(first[value] for value in values[name])
        if partition not in partitions:
            partitions.add(partition)
            varied.append(name)
    common = [(name, values[name][0]) for name in names if len(set(values[name])) == 1]
    rows = [
        Row(
            run.name,
            settings.get(SEED, "-"),
            {name: settings.get(name, "-") for name in varied},
            figures_of(run.results),
            [(int(entry["round"]), entry["accuracy"]) for entry in run.results["rounds"]],
        )
        for run, settings in zip(runs, flat, strict=True)
    ]
    return Sweep(varied, common, rows, group(rows, varied))


def group(rows: Sequence[Row], by: Sequence[str]) -> list[Group]:
    """Put rows together that agree in the settings ``by``, in the order of these settings' values."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.settings[name] for name in by), []).append(row)
    ordered = sorted(found, key=lambda values: [_sort_key(value) for value in values])
    groups = []
    for values in ordered:
        settings = dict(zip(by, values, strict=True))
        groups.append(Group(label(settings), settings, found[values]))
    return groups


def label(settings: Mapping[str, str]) -> str:
    """Say settings in few words: ``untrusted, std=25``; "all runs" where there are none."""
    words = []
    for name, value in settings.items():
        room, _, leaf = name.rpartition(".")
        if leaf in ("name", "trust"):
            words.append(value if room == "cloud" else f"{room}={value}")
        else:
            words.append(f"{leaf}={value}")
    return ", ".join(words) or "all runs"


def figures_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the :data:`METRICS` of one run; None where one is unknown."""
    rounds = results["rounds"]
    good = [entry for entry in rounds if not entry.get("error")]
    restore, final = results.get("restore") or {}, results["final"]
    updates = results["parameters"] * sum(len(entry["replied"]) for entry in rounds)
    figures: dict[str, float | None] = {
        "accuracy": final.get("accuracy"),
        "majority_accuracy": final.get("majority_accuracy"),
        "cloud_accuracy": final.get("cloud_accuracy"),
        "loss": good[-1]["loss"] if good else None,
        "rounds_completed": len(good),
        "failed_contributions": sum(len(entry["failed"]) for entry in rounds),
        "restored_psnr_db": restore.get("psnr_db"),
        "noisy_psnr_db": restore.get("noisy_psnr_db"),
        "parameters": results["parameters"],
        "sites": len(results["sites"]),
    }
    for way in ("up", "down"):
        total = sum(entry[f"bytes_{way}"] for entry in rounds)
        figures[f"bytes_{way}_per_round"] = total / len(rounds) if rounds else None
        figures[f"bytes_{way}_per_weight"] = total / updates if updates else None
    for step in ("train", "encrypt", "aggregate", "decrypt"):
        spent = sum(entry["seconds"][step] for entry in rounds)
        figures[f"{step}_s_per_round"] = spent / len(rounds) if rounds else None
    return figures


def to_csv(sweep: Sweep) -> bytes:
    """Return the merged table: a header, then one line a run."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", SEED, *sweep.varied, *METRICS])
    for row in sweep.rows:
        texts = [_cell(text) for text in (row.name, row.seed, *row.settings.values())]
        writer.writerow([*texts, *("" if row.figures[m] is None else row.figures[m] for m in METRICS)])
    return buffer.getvalue().encode()


def _cell(text: str) -> str:
    """Keep a spreadsheet from taking a text for a formula."""
    harmless = text == "-" or as_number(text) is not None or text[:1] not in ("=", "+", "-", "@", "\t", "\r")
    return text if harmless else "'" + text


def _flat(run: Run) -> dict[str, str]:
    own = _OWN_AFFAIRS
    flat = {n: _same(v) for n, v in flat_settings(run.settings) if not any(n.startswith(o) for o in own)}
    # What a run says of itself stands in results.json too: sweeps without hydra's files can be told apart.
    return flat or {"cloud.trust": str(run.results["cloud"])}


def _same(text: str) -> str:
    """Write 25 and 25.0 alike."""
    value = as_number(text)
    return text if value is None else f"{value:.12g}"


def _rank(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def as_number(text: str) -> float | None:
    """Return the number that a setting's text stands for, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _sort_key(text: str) -> tuple[int, float, str]:
    value = as_number(text)
    return (1, 0.0, text) if value is None else (0, value, "")
