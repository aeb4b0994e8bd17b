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
    iterations: int = 100
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


@dataclass
class ImageDifference:
    """Two images released under one secret image."""

    images: str | None = None
    side: int = 128


@dataclass
class Averaging:
    """``releases`` of one image; ``holder``: an ``analyst`` with the key bundle, or a ``thief`` without."""

    images: str | None = None
    side: int = 128
    releases: int = 32
    holder: str = "thief"


@dataclass
class Jigsaw:
    """``side``: of the image, in pixels; the blocks' side is ``cipher.block_side``.

    ``picture``: which of the images, from 0 in the order of their names (1: scikit-image's camera).
    """

    images: str | None = None
    picture: int = 1
    side: int = 128


@dataclass
class BruteForce:
    """``unknown_bits`` of the 256-bit master key that the attacker lacks; ``tries``: at most so many."""

    images: str | None = None
    side: int = 64
    unknown_bits: int = 256
    tries: int = 4096


@dataclass
class StolenBundle:
    """``victims``: records in each of two epochs."""

    images: str | None = None
    side: int = 64
    victims: int = 4


@dataclass
class SwappedRecords:
    """``records`` in the archive; ``flips``: archives with one flipped bit, for comparison."""

    images: str | None = None
    side: int = 32
    records: int = 6
    flips: int = 20


@dataclass
class CheatingCloud:
    """``cheats``: what the cloud does to the sum, out of drop, double, substitute, negate."""

    cheats: list[str] = field(default_factory=lambda: ["drop", "double", "substitute"])


@dataclass
class Poisoning:
    """One of the analysts poisons: ``kind`` label_flip or scaled_update.

    ``factor``: how far the scaled update goes beyond an honest one; ``from_round``: the first round in which
    it is sent. ``accept_drop`` is the value of ``federation.accept_drop`` that the run with acceptance tests
    takes.
    """

    kind: str = "label_flip"
    factor: float = 10.0
    from_round: int = 1
    accept_drop: float = 0.05


@dataclass
class ModelInversion:
    """A picture of each class out of the final model.

    ``iterations``, ``step``, ``total_variation``, ``jitter`` (noise on the input, 0..1 scale): of the
    optimisation. ``dp_epsilon`` above 0 puts Flower's
    ``LocalDpMod`` round every site's training, with ``dp_delta``, ``dp_clipping`` and ``dp_sensitivity``.
    """

    iterations: int = 200
    step: float = 0.05
    total_variation: float = 0.3
    jitter: float = 0.6
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    dp_clipping: float = 1.0
    dp_sensitivity: float = 1.0


@dataclass
class MembershipInference:
    """Whether a given record was trained on, from the final model.

    ``method``: ``loss`` (a threshold) or ``lira`` (``shadows`` models of the attacker's own). The rest is
    as for :class:`ModelInversion`.
    """

    method: str = "loss"
    shadows: int = 8
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    dp_clipping: float = 1.0
    dp_sensitivity: float = 1.0


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
    "image_difference": Attack(ImageDifference, "flep_fl.attacks.releases", "run_difference"),
    "averaging": Attack(Averaging, "flep_fl.attacks.releases", "run_averaging"),
    "jigsaw": Attack(Jigsaw, "flep_fl.attacks.jigsaw"),
    "brute_force": Attack(BruteForce, "flep_fl.attacks.image_keys", "run_brute_force"),
    "stolen_bundle": Attack(StolenBundle, "flep_fl.attacks.image_keys", "run_stolen_bundle"),
    "swapped_records": Attack(SwappedRecords, "flep_fl.attacks.swapped_records"),
    "cheating_cloud": Attack(CheatingCloud, "flep_fl.attacks.cheating_cloud"),
    "poisoning": Attack(Poisoning, "flep_fl.attacks.poisoning"),
    "model_inversion": Attack(ModelInversion, "flep_fl.attacks.model_inversion"),
    "membership_inference": Attack(MembershipInference, "flep_fl.attacks.membership"),
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
