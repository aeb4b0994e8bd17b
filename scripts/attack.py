"""Attack what a small real run left: ``python -m scripts.attack attack=gradient_inversion_open``.

Writes ``results.json`` (its format: :mod:`flep_fl.attacks.report`) and pictures into hydra's output
directory. ``-m 'attack=glob(*)'`` runs every attack, each in a folder of its own name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flep_fl.config import Config, to_config
from flep_fl.contracts.errors import ConfigError
from flep_fl.entry import hydra_entry, output_dir


@dataclass
class AttackConfig(Config):
    """What this script may be told; ``attack`` is for :mod:`flep_fl.attacks.settings`."""

    attack: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="attack_schema", node=AttackConfig)


@hydra_entry("attack")
def main(cfg: DictConfig) -> None:
    """Run one attack."""
    from hydra.core.hydra_config import HydraConfig

    from flep_fl.attacks.settings import read_settings

    config = to_config(cfg)
    if not isinstance(config, AttackConfig):
        raise ConfigError("This is not the configuration of an attack")
    attack, settings = read_settings(config.attack)

    import logging
    import tempfile
    from pathlib import Path

    from flep_fl.attacks.report import ThreatModel, print_outcome, write_outcome
    from flep_fl.attacks.threads import limit_threads
    from flep_fl.reporting.console import Progress

    limit_threads(config.runtime.threads)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # importing Flower has undone what hydra had set
    progress = Progress("attack")
    case = str(HydraConfig.get().runtime.choices["attack"])
    own = [text for text in HydraConfig.get().overrides.task if not text.startswith("attack=")]
    with tempfile.TemporaryDirectory(prefix="flep-") as folder, progress.live():
        outcome = attack.load()(config, settings, Path(folder))
    results = write_outcome(
        output_dir(),
        outcome,
        attack=str(config.attack["name"]),
        case=case,
        command=" ".join([f"python -m scripts.attack attack={case}", *own]),
        threat_model=ThreatModel(**config.attack["threat_model"]),
    )
    print_outcome(results)
    progress(f"results: {output_dir() / 'results.json'}")


if __name__ == "__main__":
    main()
