"""What each attack may be told, and where its code is. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from flep_fl.config import Config
from flep_fl.contracts.errors import ConfigError

if TYPE_CHECKING:
    from flep_fl.attacks.report import Outcome


@dataclass
class GradientInversion:
    """Images out of one site's update (Geiping et al. 2020).

    ``batches``: numbers of images behind one update, one federation each. ``local_steps``: how many steps the
    site takes, each on all its images. ``iterations``, ``step``, ``total_variation``: of the optimisation.
    ``restarts``: starting points; the one that explains the update best counts. ``labels``: ``known``, or
    ``inferred`` from the update, for batches of one (iDLG, Zhao et al. 2020). ``sum_only``: attack the sum
    that a trusted cloud's software opens, not single updates.
    """

    batches: list[int] = field(default_factory=lambda: [1, 4, 8])
    local_steps: int = 1
    iterations: int = 150
    step: float = 0.1
    total_variation: float = 1e-3
    restarts: int = 1
    labels: str = "known"
    sum_only: bool = False


@dataclass
class ChosenPlaintext:
    """``levels``: grey levels told apart per pixel; ``repeats``: releases of every image, averaged."""

    images: str | None = None
    side: int = 256
    victims: int = 3
    levels: int = 12
    repeats: int = 1


@dataclass
class KnownPlaintext:
    """``known``: number of images whose plain and sealed form the attacker has, at least two."""

    images: str | None = None
    side: int = 128
    victims: int = 3
    known: int = 4


@dataclass(frozen=True)
class Attack:
    """One kind of attack: its settings, and the function ``run(config, settings, folder) -> Outcome``."""

    settings: type[Any]
    module: str
    function: str = "run"

    def load(self) -> Callable[[Config, Any, Path], Outcome]:
        """Import the attack's code."""
        run: Callable[[Config, Any, Path], Outcome] = getattr(
            importlib.import_module(self.module), self.function
        )
        return run


ATTACKS: dict[str, Attack] = {
    "gradient_inversion": Attack(GradientInversion, "flep_fl.attacks.gradient_inversion"),
    "chosen_plaintext": Attack(ChosenPlaintext, "flep_fl.attacks.permutation", "run_chosen"),
    "known_plaintext": Attack(KnownPlaintext, "flep_fl.attacks.permutation", "run_known"),
}
"""Attacks by the name that their configuration gives."""


def read_settings(section: Mapping[str, Any]) -> tuple[Attack, Any]:
    """Return the attack that a configuration's section names, and its settings, checked.

    Parameters
    ----------
    section
        ``name`` and the fields of that attack's settings; ``threat_model`` is passed over.

    Raises
    ------
    ConfigError
        The name is unknown, a field is unknown or of the wrong type, or a number is not positive.
    """
    name = section.get("name")
    if name not in ATTACKS:
        raise ConfigError(
            "attack.name is unknown", expected="one of " + ", ".join(sorted(ATTACKS)), found=name
        )
    attack = ATTACKS[name]
    given = {key: value for key, value in section.items() if key not in ("name", "threat_model")}
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(attack.settings), given))
    for key, value in vars(settings).items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool) and number < 0:
                raise ConfigError(
                    f"attack.{key}={value} is negative", remedy=f"Set attack.{key} to 0 or more"
                )
        if isinstance(value, list) and not value:
            raise ConfigError(f"attack.{key} is empty", remedy=f"Give attack.{key} at least one entry")
    return attack, settings
