"""The page of one federation run.

Two kinds: the cloud's (:func:`cloud_page`), made of what the cloud knows and of nothing else, and the whole
one (:func:`run_page`), for those who hold the images anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flep_fl.reporting.page.blocks import (
    Block,
    Cell,
    Chart,
    Facts,
    Figure,
    Folded,
    Page,
    Row,
    Section,
    Table,
    Text,
    number,
)
from flep_fl.reporting.page.charts import Bars, Series, bar_chart, line_chart
from flep_fl.reporting.redaction import flat_settings

if TYPE_CHECKING:
    from flep_fl.reporting.image_view import ImageView
    from flep_fl.reporting.inversion_view import InversionView

SECONDS = ("train", "encrypt", "aggregate", "decrypt")
LONG_LIST = 12
"""Names shown of a longer list."""

CLOUD_KEYS = ("cloud", "sites", "parameters", "rounds", "config_digest", "closing_failures", "versions")
"""What the cloud's page takes from results; ``restore`` is not among it: only the owner can know it."""

CLOUD_FINAL_KEYS = ("accuracy", "majority_accuracy", "cloud_accuracy")

_LEADS = {
    "untrusted": "The cloud added encrypted updates. It held no key; it saw no image, weight or model.",
    "trusted": "The cloud held the model key by policy: it opened the sums, and stored the global model.",
    "mixed": "Some sites sent the cloud their weights in the clear; the others encrypted theirs.",
    "open": "Nothing was encrypted towards the cloud: it saw every update. The baseline to compare with.",
}

_SEES = {
    "untrusted": (
        "nothing",
        "ciphertexts of every update and of their sum; sizes, times, and who took part",
        "no: it holds a context without any key",
    ),
    "trusted": (
        "nothing",
        "ciphertexts of the updates, the sum in the clear, the global model",
        "yes: by policy the sums only",
    ),
    "mixed": (
        "nothing",
        "the trusting sites' weights in the clear, ciphertexts of the others; roughly the global model",
        "no",
    ),
    "open": ("nothing", "every update and the global model in the clear", "there is nothing to open"),
}


def cloud_page(results: Mapping[str, Any], shared: Mapping[str, Any]) -> Page:
    """Make the cloud's own page.

    Parameters
    ----------
    results
        Content of ``results.json``; only :data:`CLOUD_KEYS` are looked at.
    shared
        The settings that all parties share, as the cloud's kit holds them.

    Returns
    -------
    Page
        Without images, restoration figures, and settings of owner and sites: a cloud does not have them, and
        what should be handed to this function in error is not passed on.
    """
    known = {key: results[key] for key in CLOUD_KEYS if key in results}
    final = results.get("final", {})
    known["final"] = {key: final[key] for key in CLOUD_FINAL_KEYS if key in final}
    sections = [
        *_course(known),
        _cloud_section(known, ()),
        _failures(known),
        _setting(known, shared, "Shared settings"),
    ]
    return Page(
        "Federation run, the cloud's view",
        _LEADS.get(str(known["cloud"]), ""),
        _figures(known),
        sections,
        badge=f"cloud={known['cloud']}",
    )


def run_page(
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    images: ImageView | None = None,
    inversion: InversionView | None = None,
    attacks: Sequence[Block] = (),
    title: str = "Federation run",
) -> Page:
    """Make the whole page: for the owner's and the analysts' side of a run, where the images are.

    Parameters
    ----------
    results
        Content of ``results.json``.
    settings
        The configuration, nested; what looks like a secret is not shown.
    images
        The life of one image, and the figures of the cipher.
    inversion
        What a cloud can read of an image in one update.
    attacks
        What attacks on this run gave; see :mod:`.attack_blocks`.
    title
        Heading.

    Returns
    -------
    Page
        The whole page.
    """
    sections = _course(results)
    if images is not None:
        from flep_fl.reporting.image_blocks import cipher_section, life_section

        sections += [life_section(images), cipher_section(images)]
    seen: list[Block] = []
    if inversion is not None:
        from flep_fl.reporting.inversion_view import inversion_blocks

        seen = inversion_blocks(inversion)
    sections += [
        _cloud_section(results, [*seen, *attacks]),
        _failures(results),
        _setting(results, settings, "Configuration"),
    ]
    restore = results.get("restore") or {}
    return Page(
        title,
        _LEADS.get(str(results["cloud"]), ""),
        [*_figures(results), *_restore_figure(restore)],
        sections,
        badge=f"cloud={results['cloud']}",
    )


# --- parts ----------------------------------------------------------------------------------------


def _figures(results: Mapping[str, Any]) -> list[Figure]:
    rounds, final = results["rounds"], results["final"]
    good = [entry for entry in rounds if not entry.get("error")]
    accuracy, majority = final.get("accuracy"), final.get("majority_accuracy")
    figures = []
    if accuracy is not None:
        note = f"always the most frequent class: {100 * majority:.1f} %" if majority is not None else ""
        tone = "" if majority is None else "good" if accuracy > majority else "bad"
        figures.append(Figure("accuracy on held-out images", f"{100 * accuracy:.1f} %", note, tone))
    if final.get("cloud_accuracy") is not None:
        figures.append(Figure("accuracy on the cloud's images", f"{100 * final['cloud_accuracy']:.1f} %"))
    failed = sum(len(entry["failed"]) for entry in rounds)
    figures.append(
        Figure(
            "rounds completed",
            f"{len(good)} of {len(rounds)}",
            f"{failed} contributions failed" if failed else "no contribution failed",
            "" if len(good) == len(rounds) else "bad",
        )
    )
    figures.append(Figure("sites", str(len(results["sites"])), f"{results['parameters']:,} weights"))
    up, down = (sum(entry[key] for entry in rounds) for key in ("bytes_up", "bytes_down"))
    figures.append(
        Figure("traffic up / down", f"{up / 1e6:.1f} / {down / 1e6:.1f} MB", _per_weight(results, rounds))
    )
    return figures


def _per_weight(results: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    updates = results["parameters"] * sum(len(entry["replied"]) for entry in rounds)
    if not updates:
        return ""
    up, down = (sum(entry[key] for entry in rounds) / updates for key in ("bytes_up", "bytes_down"))
    return f"{up:.1f} / {down:.1f} bytes a weight and update"


def _restore_figure(restore: Mapping[str, Any]) -> list[Figure]:
    restored, noisy = restore.get("psnr_db"), restore.get("noisy_psnr_db")
    if restored is None:
        return []
    note = f"before denoising {noisy:.1f} dB" if noisy is not None else ""
    return [Figure("restored images (PSNR)", f"{restored:.1f} dB", note)]


def _course(results: Mapping[str, Any]) -> list[Section]:
    rounds = results["rounds"]
    if not rounds:
        return [Section("accuracy", "Accuracy", [Text("No round took place.", "warning")])]
    return [
        Section("accuracy", "Accuracy", [Row([_accuracy_chart(results), _loss_chart(results)])]),
        Section(
            "cost",
            "Bytes and seconds",
            [
                Row([_bytes_chart(rounds), _seconds_chart(rounds)]),
                Text(
                    "Training, encryption and decryption are summed over the sites, which work at the same "
                    "time; adding is the cloud's. Bytes are those of whole messages, of all sites together."
                ),
                where_time_went(rounds),
                rounds_table(rounds),
            ],
        ),
    ]


def _accuracy_chart(results: Mapping[str, Any]) -> Chart:
    rounds, majority = results["rounds"], results["final"].get("majority_accuracy")
    series = [Series("held-out images", [(float(e["round"]), e["accuracy"]) for e in rounds])]
    if any(entry.get("cloud_accuracy") is not None for entry in rounds):
        series.append(
            Series("cloud's own images", [(float(e["round"]), e.get("cloud_accuracy")) for e in rounds])
        )
    if majority is not None:
        series.append(
            Series("most frequent class", [(float(e["round"]), majority) for e in rounds], plain=True)
        )
    return line_chart("Accuracy", series, x="round", y="accuracy", digits=1, percent=True, whole=True)


def _loss_chart(results: Mapping[str, Any]) -> Chart:
    rounds = results["rounds"]
    series = [Series("held-out images", [(float(e["round"]), e["loss"]) for e in rounds])]
    if any(entry.get("cloud_loss") is not None for entry in rounds):
        series.append(
            Series("cloud's own images", [(float(e["round"]), e.get("cloud_loss")) for e in rounds])
        )
    return line_chart("Loss", series, x="round", y="cross-entropy (nats)", digits=4, whole=True)


def _bytes_chart(rounds: Sequence[Mapping[str, Any]]) -> Chart:
    bars = [
        Bars(name, [entry[key] / 1e6 for entry in rounds])
        for name, key in (("up: updates", "bytes_up"), ("down: the sum, to every site", "bytes_down"))
    ]
    return bar_chart("Traffic", [str(e["round"]) for e in rounds], bars, x="round", y="MB")


def _seconds_chart(rounds: Sequence[Mapping[str, Any]]) -> Chart:
    bars = [Bars(name, [entry["seconds"][name] for entry in rounds]) for name in SECONDS]
    labels = [str(e["round"]) for e in rounds]
    return bar_chart("Time", labels, bars, x="round", y="seconds", digits=2, stacked=True)


def where_time_went(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Return the seconds of all rounds by what they were spent on."""
    totals = {name: sum(entry["seconds"][name] for entry in rounds) for name in SECONDS}
    everything = sum(totals.values())
    who = {"train": "sites", "encrypt": "sites", "aggregate": "cloud", "decrypt": "sites"}
    rows: list[list[Cell | str]] = [
        [
            name,
            who[name],
            number(seconds, 2),
            number(seconds / everything if everything else None, 1, scale=100),
        ]
        for name, seconds in totals.items()
    ]
    return Table("Where the time went", ["step", "done by", "seconds", "%"], rows)


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Return all rounds, a row each."""
    return Table(
        "Every round",
        [
            "round",
            "accuracy %",
            "loss",
            "MB up",
            "MB down",
            *(f"{name} s" for name in SECONDS),
            "sites",
            "failed",
        ],
        [
            [
                number(entry["round"], 0),
                number(entry["accuracy"], 1, scale=100),
                number(entry["loss"], 4),
                number(entry["bytes_up"], 3, scale=1e-6),
                number(entry["bytes_down"], 3, scale=1e-6),
                *(number(entry["seconds"][name], 2) for name in SECONDS),
                number(len(entry["replied"]), 0),
                number(len(entry["failed"]), 0),
            ]
            for entry in rounds
        ],
    )


def _cloud_section(results: Mapping[str, Any], attacks: Sequence[Block]) -> Section:
    images, model, opens = _SEES.get(str(results["cloud"]), ("?", "?", "?"))
    blocks: list[Block] = [
        Facts([("Of the images", images), ("Of the model", model), ("Can it open an update?", opens)]),
        *attacks,
    ]
    return Section("cloud", "What the cloud saw", blocks)


def _failures(results: Mapping[str, Any]) -> Section:
    rows: list[list[Cell | str]] = [
        [number(entry["round"], 0), failure["site"], failure["reason"]]
        for entry in results["rounds"]
        for failure in entry["failed"]
    ]
    rows += [["end of run", f["site"], f["reason"]] for f in results.get("closing_failures", ())]
    errors: list[list[Cell | str]] = [
        [number(e["round"], 0), "-", e["error"]] for e in results["rounds"] if e.get("error")
    ]
    again: list[list[Cell | str]] = [
        [number(e["round"], 0), "-", f"opened {e['attempts']} times: the cloud or its SuperLink had ended"]
        for e in results["rounds"]
        if e.get("attempts", 1) != 1
    ]
    if not (rows or errors or again):
        return Section(
            "failures", "Failures", [Text("None: every site that was asked contributed to every round.")]
        )
    table = Table(
        "Contributions that failed, and rounds without a sum",
        ["round", "site", "reason"],
        [*rows, *errors, *again],
        key_column=False,
    )
    return Section("failures", "Failures", [table])


def _setting(results: Mapping[str, Any], settings: Mapping[str, Any], title: str) -> Section:
    sites = [str(name) for name in results["sites"]]
    more = len(sites) - LONG_LIST
    shown = ", ".join(sites[:LONG_LIST]) + (f" and {more} more" if more > 0 else "")
    facts = [("Sites", shown), ("Digest of the shared settings", str(results["config_digest"]))]
    blocks: list[Block] = [
        Facts(facts),
        Folded(title, [Table(title, ["setting", "value"], [list(pair) for pair in flat_settings(settings)])]),
        Folded(
            "Versions",
            [
                Table(
                    "Versions", ["package", "version"], [[k, str(v)] for k, v in results["versions"].items()]
                )
            ],
        ),
    ]
    return Section("setting", "What ran", blocks)
