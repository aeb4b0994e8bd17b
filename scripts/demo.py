"""The main job on real industrial images, each party its own process: ``python -m scripts.demo``."""

from omegaconf import DictConfig

from flep_fl.entry import hydra_entry


@hydra_entry("demo")
def main(cfg: DictConfig) -> None:
    """Provision, seal, then run one cloud and the sites as processes."""
    from flep_fl.config import to_config

    config = to_config(cfg)
    from flep_fl.attacks.run_view import invert_for_report
    from flep_fl.flower.demonstration import run_demo

    run_demo(config, invert=invert_for_report)


if __name__ == "__main__":
    main()
