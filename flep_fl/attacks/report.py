"""What an attack run leaves: ``results.json`` and pictures.

``results.json`` of one run, which the HTML report and ``docs/attacks.md`` are made from::

    {
      "attack": "gradient_inversion",       kind of attack
      "case": "gradient_inversion_open",    the option that was run: attack=CASE
      "command": "python -m scripts.attack attack=gradient_inversion_open",
      "threat_model": {"who": "...", "holds": ["..."], "artefacts": ["..."]},
      "configuration": {"cloud": "open", ...},     what decides the result, plain values
      "success": {"ssim": 0.9, "psnr_db": 27.1, ...},   figures of the attack, numbers or null
      "baseline": {"ssim": 0.1, ...},       the same figures for blind guessing, from the same run
      "falls": true,                        whether the attack got what it is after
      "criterion": "ssim >= 0.5 ...",       what decides "falls", in words
      "note": "...",                        what a reader must know to read the figures rightly; may be ""
      "pictures": ["reconstruction.png"],   PNG files beside results.json: original above reconstruction
      "versions": {...}
    }

Infinite figures (a perfect reconstruction has no finite PSNR) are written as null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flep_fl.attacks.pictures import Row, write_picture
from flep_fl.reporting.results import versions, write_json

Figures = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """Who attacks, what it holds beside the artefacts, and which artefacts of a run it reads."""

    who: str
    holds: Sequence[str]
    artefacts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attack achieved.

    Attributes
    ----------
    configuration
        What decides the result, plain values.
    success, baseline
        Figures of the attack, and of blind guessing in the same run; names of the baseline are among those of
        the success.
    falls
        Whether the attack got what it is after.
    criterion
        What decides ``falls``, in words.
    pictures
        Rows of images by file name, without the ending.
    note
        What a reader must know beside the figures.
    """

    configuration: Mapping[str, Any]
    success: Figures
    baseline: Figures
    falls: bool
    criterion: str
    pictures: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    note: str = ""


def write_outcome(
    out: Path, outcome: Outcome, *, attack: str, case: str, command: str, threat_model: ThreatModel
) -> dict[str, Any]:
    """Write ``results.json`` and the pictures of one run; the format is that of this module's docstring.

    Parameters
    ----------
    out
        The run's output directory.
    outcome
        What the attack achieved.
    attack, case, command
        Kind of attack, the option that was run, and the command that runs it again.
    threat_model
        As declared in the attack's configuration.

    Returns
    -------
    dict
        The content of ``results.json``.
    """
    names = []
    for name, rows in outcome.pictures.items():
        write_picture(out / f"{name}.png", rows)
        names.append(f"{name}.png")
    results = {
        "attack": attack,
        "case": case,
        "command": command,
        "threat_model": asdict(threat_model),
        "configuration": dict(outcome.configuration),
        "success": _finite(outcome.success),
        "baseline": _finite(outcome.baseline),
        "falls": bool(outcome.falls),
        "criterion": outcome.criterion,
        "note": outcome.note,
        "pictures": names,
        "versions": versions(),
    }
    write_json(out / "results.json", results)
    return results


def _finite(figures: Figures) -> dict[str, float | None]:
    return {
        name: None if value is None or not math.isfinite(value) else float(value)
        for name, value in figures.items()
    }


def print_outcome(results: Mapping[str, Any]) -> None:
    """Print one run's figures beside those of blind guessing."""
    lines = [f"{results['case']}: {'falls' if results['falls'] else 'holds'} ({results['criterion']})"]
    for name, value in results["success"].items():
        guess = results["baseline"].get(name)
        beside = "" if name not in results["baseline"] else f"   blind guessing {shown(guess)}"
        lines.append(f"  {name:24s} {shown(value)}{beside}")
    print("\n".join(lines))  # noqa: T201


def shown(value: float | None) -> str:
    """Format one figure; null is a perfect PSNR, or a figure that this run does not have."""
    return "-" if value is None else f"{value:.4g}"
