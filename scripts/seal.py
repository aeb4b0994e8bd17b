"""The data owner's side: ``python -m scripts.seal data=elpv kits=kits out=archive``."""

from omegaconf import DictConfig

from flep_fl.entry import hydra_entry


@hydra_entry("seal")
def main(cfg: DictConfig) -> None:
    """Fill the private database and seal one archive a site."""
    from flep_fl.provision.owner import run_seal

    run_seal(cfg)


if __name__ == "__main__":
    main()
