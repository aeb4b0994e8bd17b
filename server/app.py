"""The AI cloud's entry point: hydra's configuration in, one federation run out."""

from omegaconf import DictConfig

from flep_fl.entry import hydra_entry


@hydra_entry("server")
def main(cfg: DictConfig) -> None:
    """Serve one federation run and exit."""
    from flep_fl.flower.parties import run_server

    run_server(cfg)
