"""Make and change startup kits: ``python -m scripts.provision 'sites=[a,b,c]' out=kits``.

``action=create`` (default), ``add``, ``revoke``, ``rotate``; ``action=show kit=kits/a`` prints fingerprints.
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flep_fl.entry import hydra_entry


@hydra_entry("provision")
def main(cfg: DictConfig) -> None:
    """Make the kits of a new federation, or change those of one."""
    from flep_fl.provision.command import run_provision

    run_provision(cfg, list(HydraConfig.get().overrides.task))


if __name__ == "__main__":
    main()
