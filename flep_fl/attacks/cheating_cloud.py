"""A cloud that adds up something else than the updates that were signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flep_fl.ai_cloud.strategy import EncryptedFedAvg
from flep_fl.attacks.evidence import make_federation
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import CheatingCloud
from flep_fl.config import Config
from flep_fl.contracts.errors import ConfigError
from flep_fl.contracts.ports import Adder

_TIMEOUT = 5.0

Treat = Callable[[Adder, int, bytes], None]
"""``treat(adder, number, payload)``: what becomes of the upload that arrives as ``number`` (from 1)."""


def _drop(adder: Adder, number: int, payload: bytes) -> None:
    """Leave the second out."""
    if number != 2:
        adder.add(payload)


def _double(adder: Adder, number: int, payload: bytes) -> None:
    """Count the second twice."""
    adder.add(payload)
    if number == 2:
        adder.add(payload)


def _substitute(adder: Adder, number: int, payload: bytes) -> None:
    """Put the first in the place of the second."""
    for _ in range({1: 2, 2: 0}.get(number, 1)):
        adder.add(payload)


CHEATS: dict[str, Treat] = {"drop": _drop, "double": _double, "substitute": _substitute}
"""Cheats by name; all signed headers stay as they are."""


class _CheatingAdder:
    """An adder whose payloads are treated by a cheat."""

    def __init__(self, honest: Adder, treat: Treat) -> None:
        self._honest, self._treat, self._seen = honest, treat, 0

    @property
    def count(self) -> int:
        return self._honest.count

    def add(self, payload: bytes) -> None:
        self._seen += 1
        self._treat(self._honest, self._seen, payload)

    def result(self) -> bytes:
        return self._honest.result()


def run(config: Config, settings: CheatingCloud, folder: Path) -> Outcome:
    """Run an honest cloud, and one for each cheat; count the analysts who take the sum."""
    if unknown := sorted(set(settings.cheats) - set(CHEATS)):
        raise ConfigError(
            "attack.cheats names an unknown cheat", expected=", ".join(CHEATS), found=", ".join(unknown)
        )
    accepted = {name: _accepted(config, CHEATS[name], folder / name) for name in settings.cheats}
    honest = _accepted(config, lambda adder, _number, payload: adder.add(payload), folder / "honest")
    share = sum(accepted.values()) / len(accepted)
    return Outcome(
        configuration={
            "cloud": config.cloud.trust,
            "ckks_profile": config.ckks.profile,
            "sites": config.federation.sites,
            "cheats": ",".join(settings.cheats),
        },
        success={
            "accepted": share,
            **{f"accepted_{name}": value for name, value in accepted.items()},
            "honest_sum_accepted": honest,
        },
        baseline={"accepted": 1.0 if config.cloud.trust == "open" else 2.0**-40},
        falls=share > 0,
        criterion="an analyst takes a sum that is not that of the signed updates",
        note="Share of analysts who took the sum. Blind guessing: a shift passes with at most 2^-40 "
        "(docs/model-security.md); without encryption there is nothing to guess.",
    )


def _accepted(config: Config, treat: Treat, folder: Path) -> float:
    def cheating(strategy: EncryptedFedAvg) -> EncryptedFedAvg:
        honest = strategy._make_adder
        strategy._make_adder = lambda size: _CheatingAdder(honest(size), treat)
        strategy.terms = replace(strategy.terms, round_timeout=_TIMEOUT)
        return strategy

    evidence = make_federation(config, folder, strategy_of=cheating)
    return sum(evidence.model_file(site).exists() for site in evidence.sites) / len(evidence.sites)
