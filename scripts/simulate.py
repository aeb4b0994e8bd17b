"""A whole federation in one process: ``python -m scripts.simulate data=digits``; ``-m`` sweeps."""

from omegaconf import DictConfig

from flep_fl.entry import hydra_entry


@hydra_entry("simulate")
def main(cfg: DictConfig) -> None:
    """Simulate one federation run."""
    from flep_fl.config import to_config

    config = to_config(cfg)
    from flep_fl.reporting.tracking import require_tracking

    require_tracking(config.tracking.name)
    from flep_fl.attacks.run_view import invert_for_report
    from flep_fl.flower.simulation import run_simulation

    run_simulation(config, invert=invert_for_report)


if __name__ == "__main__":
    main()
