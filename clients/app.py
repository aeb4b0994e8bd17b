"""An analyst site's entry point: hydra's configuration in, its part of a federation out."""

from omegaconf import DictConfig

from flep_fl.entry import hydra_entry


@hydra_entry("clients")
def main(cfg: DictConfig) -> None:
    """Take part in a federation run and exit."""
    from flep_fl.flower.parties import run_client

    run_client(cfg)
