"""Sections of a page that show images; no cloud's page has them."""

from __future__ import annotations

from collections.abc import Sequence

from flep_fl.data_security.limits import chi_square_limit
from flep_fl.data_security.metrics import LEVELS
from flep_fl.reporting.cipher_tables import rows_further, rows_layers, rows_one
from flep_fl.reporting.image_view import ImageView
from flep_fl.reporting.page.blocks import Block, Cell, Folded, Picture, Pictures, Section, Table, Text
from flep_fl.reporting.page.charts import histogram

FRESH_KEYS = "Keys were drawn for this page alone; the run's own keys and archives were not touched."


def life_section(view: ImageView) -> Section:
    """Return the stations of one image, side by side."""
    pictures = [
        Picture(stage.name, stage.png, f"The image {stage.name}: {stage.caption}", stage.caption)
        for stage in view.stages
    ]
    return Section("life", "The life of one image", [Pictures("", pictures, FRESH_KEYS, chain=True)])


def cipher_section(view: ImageView) -> Section:
    """Return Fig. 4 and Table I for this run's cipher."""
    names = [stage.name for stage in view.fourth]
    pictures = [
        Picture(
            stage.name,
            stage.png,
            f"The {stage.name} picture",
            below=histogram(f"Histogram of the {stage.name} picture", counts),
        )
        for stage, counts in zip(view.fourth, view.histograms, strict=True)
    ]
    blocks: list[Block] = [
        Pictures(
            "As in the paper's Fig. 4",
            pictures,
            f"{', '.join(names).capitalize()}, each above its histogram: {view.measured}.",
            wide=True,
        )
    ]
    report = view.evaluation
    if report is None:
        return Section("cipher", "The image cipher", blocks)
    keys, level = report["keys"]["count"], report["level"]
    blocks += [
        Text(
            f"Below, means over {keys} random keys; of correlations the one farthest from zero. The paper's "
            "rows are those of its Table I, for its own pictures. Encryption quality needs one byte a pixel "
            "(cipher.bits=8). These statistics are necessary and never sufficient: where confidentiality "
            "rests is said in SECURITY.md."
        ),
        _table("Table I, beside the paper's", rows_one(report), key_column=False),
        _table(
            f"Further statistics; chi2 passes up to {chi_square_limit(LEVELS - 1, level):.2f}",
            rows_further(report),
        ),
    ]
    if report["layers"]:
        blocks.append(
            Folded(
                "Each layer",
                [
                    _table("Each layer alone", rows_layers(report["layers"])),
                    _table("Layer upon layer", rows_layers(report["cumulative"])),
                ],
            )
        )
    return Section("cipher", "The image cipher", blocks)


def _table(
    caption: str, table: tuple[Sequence[str], Sequence[Sequence[str]]], *, key_column: bool = True
) -> Table:
    header, rows = table
    return Table(caption, header, [[_cell(text) for text in row] for row in rows], key_column)


def _cell(text: str) -> Cell | str:
    try:
        return Cell(text, float(text.replace(",", "")))
    except ValueError:
        return text
