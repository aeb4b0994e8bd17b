"""Make startup kits: ``python -m scripts.provision 'sites=[a,b,c]' out=kits``."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flep_fl.entry import hydra_entry, require


@hydra_entry("provision")
def main(cfg: DictConfig) -> None:
    """Make the kits of a new federation."""
    from flep_fl.config import shared_part, to_config
    from flep_fl.provision.kits import create_kits
    from flep_fl.reporting.console import say, warn_few_contributors

    require(cfg, "out", "kits")
    require(cfg, "sites", "'[a,b,c]'")
    counted = any(o.startswith("federation.sites=") for o in HydraConfig.get().overrides.task)
    if not counted:
        cfg.federation.sites = len(cfg.sites)
    config = to_config(cfg)
    warn_few_contributors(config.federation.min_contributors, say)
    folders = create_kits(shared_part(config), config.sites, Path(config.out), address=config.runtime.address)
    say(f"made {len(folders)} kits for cloud={config.cloud.trust}:")
    for folder in folders:
        say(f"  {folder}")
    say("Hand each party its own kit over a safe channel; whoever ran this has seen every key.")


if __name__ == "__main__":
    main()
