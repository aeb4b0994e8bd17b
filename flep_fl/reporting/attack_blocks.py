"""What attacks gave: one table against blind guessing, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flep_fl.reporting.page.blocks import (
    Block,
    Facts,
    Figure,
    Folded,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
)
from flep_fl.reporting.run_folders import AttackRun

FALLS, HOLDS = "falls", "holds"
_UNITS = {"psnr_db": "dB"}


def attack_blocks(attacks: Sequence[AttackRun]) -> list[Block]:
    """Return the table of all attacks, their pictures, and who was supposed to hold what.

    Raises
    ------
    DamagedResultsError
        When a picture cannot be read.
    """
    if not attacks:
        return []
    return [
        attack_table(attacks),
        *_pictures(attacks),
        Folded("Who attacks, and what it holds", _threats(attacks)),
    ]


def attack_table(attacks: Sequence[AttackRun]) -> Table:
    """Return one row an attack: configuration, figures beside those of blind guessing, who falls."""
    rows = []
    for attack in attacks:
        found = attack.results
        rows.append(
            [
                case_of(attack),
                _settings(found["configuration"]),
                _figures(found["success"]),
                _figures(found["baseline"]),
                FALLS if found["falls"] else HOLDS,
                str(found.get("criterion", "")),
            ]
        )
    columns = ["attack", "configuration", "success", "blind guessing", "verdict", "falls if"]
    return Table("Attacks: what they gave, beside blind guessing", columns, rows)


def attacks_page(attacks: Sequence[AttackRun], title: str = "Attacks") -> Page:
    """Return the page of a folder that holds attacks alone."""
    fallen = sum(bool(attack.results["falls"]) for attack in attacks)
    return Page(
        title,
        "Each attack read what a real run had produced, and is held against blind guessing.",
        [
            Figure("attacks", str(len(attacks))),
            Figure("configurations that fall", str(fallen), tone="bad" if fallen else ""),
            Figure("configurations that hold", str(len(attacks) - fallen), tone="good"),
        ],
        [
            Section("table", "Who falls", [attack_table(attacks)]),
            Section(
                "pictures", "What came out", _pictures(attacks) or [Text("These attacks give no pictures.")]
            ),
            Section("threats", "Who attacks, and what it holds", _threats(attacks)),
        ],
    )


def case_of(attack: AttackRun) -> str:
    """Return the name of the case that was run, or of the attack."""
    return str(attack.results.get("case") or attack.results["attack"])


def _pictures(attacks: Sequence[AttackRun]) -> list[Block]:
    pictures = []
    for attack in attacks:
        verdict = FALLS if attack.results["falls"] else HOLDS
        for name, data in attack.pictures():
            caption = f"{verdict}: {_figures(attack.results['success'])}"
            alt = f"Pictures of the attack {case_of(attack)}, file {name}; {caption}"
            pictures.append(Picture(case_of(attack), data, alt, caption, small=False))
    note = "In each picture the original stands above what the attack made of the bytes that it had."
    return [Pictures("What the attacks made of it", pictures, note, wide=True)] if pictures else []


def _threats(attacks: Sequence[AttackRun]) -> list[Block]:
    blocks: list[Block] = []
    for attack in attacks:
        found, threat = attack.results, attack.results["threat_model"]
        facts = [("Attack", case_of(attack))]
        facts += [
            (name.capitalize(), _listed(threat[name]))
            for name in ("who", "holds", "artefacts")
            if name in threat
        ]
        facts += [
            (title, str(found[name]))
            for title, name in (("Note", "note"), ("Command", "command"))
            if found.get(name)
        ]
        blocks.append(Facts(facts))
    return blocks


def _listed(value: Any) -> str:
    return ", ".join(str(entry) for entry in value) or "nothing" if isinstance(value, list) else str(value)


def _settings(configuration: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in configuration.items())


def _figures(figures: Mapping[str, float | None]) -> str:
    words = []
    for name, value in figures.items():
        unit = _UNITS.get(name, "")
        title = name.removesuffix("_db").replace("_", " ")
        words.append(f"{title} -" if value is None else f"{title} {value:.4g}{' ' + unit if unit else ''}")
    return ", ".join(words) or "-"
