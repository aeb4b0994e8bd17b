"""Train every network that ships: ``python -m scripts.train_zoo images=FOLDER [validation=FOLDER]``."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flep_fl.contracts.errors import ConfigError
from flep_fl.data_security.denoise.zoo_settings import ZooSettings
from flep_fl.entry import hydra_entry
from flep_fl.reporting.console import say

ConfigStore.instance().store(name="train_zoo_schema", node=ZooSettings)


@hydra_entry("train_zoo")
def main(cfg: DictConfig) -> None:
    """Train what is missing, and print a line for every network."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is not set", remedy=f"Add {missing[0]}=FOLDER to the command")
    settings = OmegaConf.to_object(cfg)
    if not isinstance(settings, ZooSettings):
        raise ConfigError("This is not the configuration of train_zoo")
    for _, run in settings.runs():
        # A network that starts from another finds it when its turn comes.
        run.start = None
        run.check()
    # PyTorch takes seconds to load; help and configuration errors answer without it.
    from flep_fl.data_security.denoise.zoo_training import train_zoo

    try:
        cards = train_zoo(settings)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise
    for stem, card in cards.items():
        measured = card.validation_psnr
        quality = "" if measured is None else f", {measured:.2f} dB at {card.noise_std:g}"
        say(f"{stem}: {card.steps} steps{quality}")


if __name__ == "__main__":
    main()
