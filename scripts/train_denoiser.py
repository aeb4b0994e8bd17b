"""Train a denoiser: ``python -m scripts.train_denoiser images=FOLDER [validation=FOLDER] [noise_std=25]``."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flep_fl.contracts.errors import ConfigError
from flep_fl.data_security.denoise.settings import TrainSettings
from flep_fl.entry import hydra_entry
from flep_fl.reporting.console import say

ConfigStore.instance().store(name="train_denoiser_schema", node=TrainSettings)


@hydra_entry("train_denoiser")
def main(cfg: DictConfig) -> None:
    """Train, and print the model card."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is not set", remedy=f"Add {missing[0]}=FOLDER to the command")
    settings = OmegaConf.to_object(cfg)
    if not isinstance(settings, TrainSettings):
        raise ConfigError("This is not the configuration of train_denoiser")
    settings.check()
    # PyTorch takes seconds to load; help and configuration errors answer without it.
    from flep_fl.data_security.denoise.train import train_denoiser

    try:
        card = train_denoiser(settings)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise
    say(card.to_json().decode().rstrip())


if __name__ == "__main__":
    main()
