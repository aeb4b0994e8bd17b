"""The data owner: ``python -m scripts.owner action=keys|dataset|serve|enrol|play|audit|rules|...``."""

from importlib import import_module

from omegaconf import DictConfig

from flep_fl.entry import hydra_entry
from flep_fl.provision.owner_config import ACTIONS, register_owner, to_owner_config

register_owner()


@hydra_entry("owner")
def main(cfg: DictConfig) -> None:
    """Do what ``action=`` says."""
    config = to_owner_config(cfg)
    module, _, function = ACTIONS[config.action].partition(":")
    getattr(import_module(module), function)(config)


if __name__ == "__main__":
    main()
