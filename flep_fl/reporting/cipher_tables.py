"""Tables of a cipher's evaluation, beside those that were published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flep_fl.data_security.limits import chi_square_limit, npcr_mean, uaci_mean
from flep_fl.data_security.metrics import LEVELS

_COLUMNS = (
    ("UACI %", "uaci", 4),
    ("NPCR %", "npcr", 4),
    ("enc. quality", "encryption_quality", 3),
    ("entropy", "entropy", 4),
    ("total s", "total_s", 4),
)
_FURTHER = (
    ("chi2", "chi2", 1),
    ("corr h", "corr_h", 4),
    ("corr v", "corr_v", 4),
    ("corr d", "corr_d", 4),
    ("local entropy", "local_entropy", 4),
    ("key NPCR %", "key_npcr", 4),
    ("key UACI %", "key_uaci", 4),
    ("encrypt ms", "encrypt_ms", 2),
    ("decrypt ms", "decrypt_ms", 2),
    ("denoise ms", "denoise_ms", 0),
    ("PSNR dB", "psnr_db", 2),
    ("undenoised", "noisy_psnr_db", 2),
)


@dataclass(frozen=True, slots=True)
class Published:
    """One published column of figures.

    Attributes
    ----------
    source, image
        Who reports it and for which picture.
    uaci, npcr
        Percent.
    encryption_quality
        Mean change of the histogram, pixels a grey level.
    entropy
        Bits.
    total_s
        Encryption and decryption, seconds.
    """

    source: str
    image: str
    uaci: float
    npcr: float
    encryption_quality: float
    entropy: float
    total_s: float


PAPER, REFERENCE = "paper", "its reference"

PUBLISHED = (
    Published(PAPER, "Baboon", 33.4319, 99.5857, 72.197, 7.9973, 1.5228),
    Published(PAPER, "City", 33.5087, 99.5896, 57.458, 7.9971, 1.4936),
    Published(PAPER, "Fan", 33.4815, 99.6295, 42.396, 7.9971, 1.5302),
    Published(REFERENCE, "Baboon", 32.03, 99.58, 61.47, 7.957, 1.05),
    Published(REFERENCE, "City", 35.21, 99.52, 45.38, 7.951, 1.05),
    Published(REFERENCE, "Fan", 31.75, 99.62, 35.80, 7.956, 1.05),
)
"""Table I of arXiv:2107.12806: its own scheme and the one it compares itself with (256 x 256, grey)."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def number(value: float | None, digits: int, none: str = "-") -> str:
    """Format a number, or say that there is none."""
    return none if value is None else f"{value:.{digits}f}"


def table_one(report: Mapping[str, Any]) -> str:
    """Return the paper's Table I with our figures first; the last row is an ideal cipher's mean."""
    return markdown(*rows_one(report))


def rows_one(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of :func:`table_one`."""
    rows = [
        ["ours", name, *(number(_value(entry, key), digits) for _, key, digits in _COLUMNS)]
        for name, entry in report["images"].items()
    ]
    rows += [
        [row.source, row.image, *(number(getattr(row, key), digits) for _, key, digits in _COLUMNS)]
        for row in PUBLISHED
    ]
    sizes = {entry["pixels"]: entry for entry in report["limits"].values()}
    for pixels in sorted(sizes):
        ideal = {"uaci": uaci_mean(), "npcr": npcr_mean(), "entropy": report["ideal_entropy"][str(pixels)]}
        rows.append(["ideal", f"{pixels} pixels", *(number(ideal.get(key), d) for _, key, d in _COLUMNS)])
    return ["source", "image", *(title for title, _, _ in _COLUMNS)], rows


def table_further(report: Mapping[str, Any]) -> str:
    """Return what the paper does not report, per image."""
    return markdown(*rows_further(report))


def rows_further(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of :func:`table_further`."""
    rows = [
        [
            name,
            *(
                number(_value(entry, key), digits, "exact" if key.endswith("psnr_db") else "-")
                for _, key, digits in _FURTHER
            ),
        ]
        for name, entry in report["images"].items()
    ]
    return ["image", *(title for title, _, _ in _FURTHER)], rows


def table_layers(layers: Mapping[str, Any]) -> str:
    """Return the statistics after each layer (alone or cumulative)."""
    return markdown(*rows_layers(layers))


def rows_layers(layers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of :func:`table_layers`."""
    columns = (
        *_COLUMNS[:4],
        *_FURTHER[:4],
        ("encrypt ms", "encrypt_ms", 2),
        ("PSNR dB", "psnr_db", 2),
    )
    rows = [
        [
            layer,
            *(number(entry[key], digits, "exact" if key == "psnr_db" else "-") for _, key, digits in columns),
        ]
        for layer, entry in layers.items()
    ]
    return ["layer", *(title for title, _, _ in columns)], rows


def table_pass_rates(report: Mapping[str, Any]) -> str:
    """Return the share of images and keys that pass each test, pooled and per image."""
    names = list(report["pass_rate"])
    rows = [["all", *(f"{100 * report['pass_rate'][name]:.1f}" for name in names)]]
    rows += [
        [image, *(f"{100 * entry['pass_rate'][name]:.1f}" for name in names)]
        for image, entry in report["images"].items()
    ]
    return markdown(["passed %", *names], rows)


def full_report(report: Mapping[str, Any], *, title: str) -> str:
    """Return the whole evaluation as one Markdown page."""
    level, keys = report["level"], report["keys"]
    expected = 100 * (1 - level)
    sections = [
        f"# {title}",
        "UACI, NPCR and entropy: means over the keys; correlations: the one farthest from zero. "
        f"{keys['count']} random keys.",
        "## Table I",
        table_one(report),
        "## Further statistics",
        f"chi2 passes up to {chi_square_limit(LEVELS - 1, level):.2f}; key NPCR and UACI: one image under "
        "two keys that differ in one bit. PSNR after decryption and denoising, and undenoised.",
        table_further(report),
        f"## Tests at the {100 * level:g} % level",
        f"An ideal cipher passes {expected:g} % of each. Lowest mean entropy of any key: "
        f"{keys['min_mean_entropy']:.4f}.",
        table_pass_rates(report),
    ]
    if report["layers"]:
        sections += [
            "## Each layer alone",
            "Every image has its own layer keys, derived from the image itself: one changed pixel moves and "
            "draws everything anew, so NPCR and UACI are high even where nothing is hidden. Entropy, chi2 "
            "and correlation tell the layers apart. PSNR without denoiser.",
            table_layers(report["layers"]),
            "## Layer upon layer",
            table_layers(report["cumulative"]),
        ]
    return "\n\n".join(sections) + "\n"


def _value(entry: Mapping[str, Any], key: str) -> float | None:
    if key == "total_s":
        return float(entry["total_ms"]) / 1000
    if key.startswith("key_"):
        return float(entry["key_sensitivity"][key.removeprefix("key_")])
    value = entry[key]
    return None if value is None else float(value)
