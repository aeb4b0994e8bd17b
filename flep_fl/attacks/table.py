"""The table of ``docs/attacks.md``, from the ``results.json`` files of a multirun."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flep_fl.contracts.errors import DataError
from flep_fl.contracts.files import read_bytes, write_atomic

BEGIN, END = "<!-- attack table: begin -->", "<!-- attack table: end -->"

FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    "gradient_inversion": (("ssim", "SSIM"), ("psnr_db", "dB")),
    "model_inversion": (("classes_recognised", "classes right"), ("accuracy", "model's accuracy")),
    "membership_inference": (
        ("auc", "AUC"),
        ("tpr_at_5_percent_fpr", "TPR"),
        ("accuracy", "accuracy"),
    ),
    "chosen_plaintext": (("ssim", "SSIM"), ("psnr_db", "dB")),
    "known_plaintext": (("ssim", "SSIM"), ("psnr_db", "dB")),
    "image_difference": (("ssim", "SSIM"), ("psnr_db", "dB")),
    "averaging": (("ssim", "SSIM"), ("psnr_db", "dB")),
    "jigsaw": (("neighbours", "neighbours right"), ("ssim", "SSIM")),
    "brute_force": (("found", "key found"),),
    "stolen_bundle": (
        ("opened_of_next_epoch", "next epoch"),
        ("opened_of_its_own_epoch", "own epoch"),
    ),
    "swapped_records": (("accepted", "accepted"),),
    "cheating_cloud": (("accepted", "accepted"),),
    "poisoning": (("accuracy", "accuracy"), ("accuracy_with_accept_drop", "with accept_drop")),
}
"""Which figures of an attack the table shows, and what it calls them; in the table's order of attacks."""

_HIDDEN = (
    "data",
    "model",
    "side",
    "alpha",
    "reads",
    "records",
    "rounds",
    "batches",
    "ways",
    "sites",
    "block_side",
)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read every attack's ``results.json`` below a folder, in the order of the table.

    Raises
    ------
    DataError
        There is none.
    """
    found = []
    for path in sorted(folder.rglob("results.json")):
        results = json.loads(read_bytes(path, what="The results of a run", error=DataError))
        if isinstance(results, dict) and results.get("attack") in FIGURES:
            found.append(results)
    if not found:
        raise DataError(
            f"{folder} holds no results of an attack",
            remedy="Run python -m scripts.attack -m 'attack=glob(*)' and name its folder in multirun/",
        )
    kinds = list(FIGURES)
    return sorted(found, key=lambda one: (kinds.index(one["attack"]), not one["falls"], one["case"]))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table: who, what it was run against, figures, blind guessing, and who falls."""
    lines = [
        "| `attack=` | by | against | success | blind guessing | |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        figures = FIGURES[one["attack"]]
        cells = [
            f"`{one['case']}`",
            one["threat_model"]["who"],
            _against(one["configuration"]),
            _figures(one["success"], figures),
            _figures(one["baseline"], figures),
            "**falls**" if one["falls"] else "holds",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_table(page: Path, text: str) -> None:
    """Put a table between the two markers of a page.

    Raises
    ------
    DataError
        The page does not have them.
    """
    content = read_bytes(page, what="The page", error=DataError).decode()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise DataError(f"{page} has no place for the table", expected=f"{BEGIN} and {END}, once each")
    head, tail = content.split(BEGIN)[0], content.split(END)[1]
    write_atomic(page, f"{head}{BEGIN}\n{text}\n{END}{tail}".encode())


def _figures(values: Mapping[str, float | None], figures: Sequence[tuple[str, str]]) -> str:
    found = [(values[key], name) for key, name in figures if key in values]
    return ", ".join(f"{'-' if value is None else f'{value:.3g}'} {name}" for value, name in found) or "-"


def _against(configuration: Mapping[str, Any]) -> str:
    parts = []
    for key, value in configuration.items():
        if key in _HIDDEN or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        text = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        parts.append(f"{key.replace('_', ' ')} {text}")
    return "; ".join(parts)
