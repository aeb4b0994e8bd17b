"""``python -m server`` and ``python -m clients``: one party, one process, its kit, its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from flep_fl.config import Config, adopt_kit, to_config
from flep_fl.contracts.errors import IdleTimeoutError
from flep_fl.entry import output_dir, require
from flep_fl.provision.kits import CLOUD, Federation, load_cloud_kit, load_site_kit
from flep_fl.reporting.console import Progress, print_table
from flep_fl.reporting.results import build_results, write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig


def party_config(cfg: DictConfig, federation: Federation) -> Config:
    """Merge the command line with the kit: shared settings and address come from the kit.

    Raises
    ------
    ConfigMismatchError
        When the command line contradicts the kit.
    """
    overrides = list(HydraConfig.get().overrides.task)
    merged = adopt_kit(cfg, federation.shared, overrides)
    if not any(override.lstrip("+").startswith("runtime.address=") for override in overrides):
        merged.runtime.address = federation.address
    return to_config(merged)


def run_server(cfg: DictConfig) -> None:
    """Serve one federation run: SuperLink, strategy, results.

    Raises
    ------
    FlepError
        By name: kit, configuration, port in use, too few sites.
    """
    require(cfg, "kit", "kits/cloud")
    kit = load_cloud_kit(Path(cfg.kit))
    config = party_config(cfg, kit.federation)
    from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
    from flep_fl.flower.processes import stop_on_signals
    from flep_fl.flower.runtime.cloud import run_cloud

    out = output_dir()
    progress = Progress(CLOUD)
    strategy = cloud_strategy(kit, config, out / CLOUD, on_event=progress)
    _quieten_flower()
    with stop_on_signals() as stop, progress.live():
        try:
            run_cloud(
                cloud_app(strategy),
                address=config.runtime.address,
                home=out / CLOUD / "flower",
                run_config={},
                stop=stop,
                log=progress,
            )
        finally:
            results = build_results(
                cloud=config.cloud.trust,
                sites=sorted(kit.federation.sites),
                parameters=strategy.parameters,
                rounds=strategy.rounds,
                config_digest=kit.federation.digest,
            )
            write_json(out / "results.json", results)
    print_table(strategy.rounds, title=f"cloud={config.cloud.trust}, {strategy.parameters} weights")
    progress(f"results: {out / 'results.json'}")


def run_client(cfg: DictConfig) -> None:
    """Take part in federation runs as one analyst site.

    Raises
    ------
    FlepError
        By name: kit, archive, configuration, a rejected sum, nothing heard.
    """
    require(cfg, "kit", "kits/a")
    require(cfg, "archive", "archive/a")
    kit = load_site_kit(Path(cfg.kit))
    config = party_config(cfg, kit.federation)
    from flep_fl.flower.compose_site import prepare_site
    from flep_fl.flower.processes import interruptible, stop_on_signals
    from flep_fl.flower.runtime.site import run_site

    out = output_dir()
    progress = Progress(kit.name)
    _quieten_flower()
    with stop_on_signals() as stop, progress.live():
        with interruptible():
            site = prepare_site(
                kit, config, Path(config.archive), out / "sites" / kit.name, on_event=progress
            )
        try:
            run_site(
                site.app,
                cloud=config.runtime.address,
                site=kit.name,
                home=out / "sites" / kit.name / "flower",
                done=lambda: site.finished(wait=config.runtime.wait),
                stop=stop,
                idle_timeout=config.runtime.idle_timeout,
                node_config={},
                log=progress,
            )
        except IdleTimeoutError:
            # A site that waits for further runs ends in good order once it has seen one to its end.
            if not (config.runtime.wait and site.session.closed):
                raise
            progress(f"no further run within {config.runtime.idle_timeout:g} s")
    site.session.refuse_if_halted()
    progress(f"the run is over; model: {site.model_file}")


def _quieten_flower() -> None:
    """Keep Flower's own lines off the terminal; flwr sets its level when it is imported, so after that."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
