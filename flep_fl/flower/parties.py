"""``python -m server`` and ``python -m clients``: one party, one process, its kit, its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flep_fl.config import ckks_line
from flep_fl.contracts.errors import IdleTimeoutError
from flep_fl.entry import kit_config, output_dir, require
from flep_fl.provision.kits import CLOUD, CloudKit, load_cloud_kit, load_site_kit
from flep_fl.reporting.console import Progress, print_table, warn_few_contributors
from flep_fl.reporting.results import REPORT, build_results, write_json
from flep_fl.reporting.tracking import require_tracking

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from flep_fl.ai_cloud.checkpoint import SavedRun
    from flep_fl.config import Config


def run_server(cfg: DictConfig) -> None:
    """Serve one federation run: SuperLink, strategy, results.

    Raises
    ------
    FlepError
        By name: kit, configuration, checkpoint, port in use, too few sites.
    """
    require(cfg, "kit", "kits/cloud")
    kit = load_cloud_kit(Path(cfg.kit))
    config = kit_config(cfg, kit.federation.shared, kit.federation.address)
    require_tracking(config.tracking.name)
    saved = _saved_run(Path(cfg.resume), kit, config) if cfg.resume else None
    from flep_fl.flower.transport import cloud_security

    security = cloud_security(kit, config)
    from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
    from flep_fl.flower.processes import stop_on_signals
    from flep_fl.flower.run_report import write_cloud_report
    from flep_fl.flower.run_tracking import tracked
    from flep_fl.flower.runtime.cloud import run_cloud

    # A resumed run goes on in its own folder, so that what it leaves is whole.
    out = output_dir() if saved is None else saved.folder.parent.parent
    progress = Progress(CLOUD)
    warn_few_contributors(config.federation.min_contributors, progress)
    progress(ckks_line(config))

    def results_now() -> dict[str, Any]:
        return build_results(
            cloud=config.cloud.trust,
            sites=sorted(kit.federation.sites),
            parameters=strategy.parameters,
            rounds=strategy.rounds,
            config_digest=kit.federation.digest,
            closing_failures=strategy.closing_failures,
        )

    def write_results() -> None:
        write_json(out / "results.json", results_now())

    def on_rounds() -> None:
        write_results()
        tracker.update(strategy.rounds)

    strategy = cloud_strategy(kit, config, out / CLOUD, on_event=progress, on_rounds=on_rounds, resume=saved)
    if saved is not None:
        progress(f"resuming at round {saved.state.round} of {config.federation.rounds}: {out}")
    _quieten_flower()
    shared = dict(kit.federation.shared)
    with (
        tracked(config, out, shared, progress) as tracker,
        stop_on_signals() as stop,
        progress.live(),
    ):
        try:
            run_cloud(
                cloud_app(strategy),
                address=config.runtime.address,
                home=out / CLOUD / "flower",
                run_config={},
                stop=stop,
                log=progress,
                security=security,
                database="memory" if config.runtime.database == "memory" else "disk",
            )
        finally:
            write_results()
            write_cloud_report(out / CLOUD, config, results_now(), shared)
    print_table(strategy.rounds, title=f"cloud={config.cloud.trust}, {strategy.parameters} weights")
    progress(f"results: {out / 'results.json'}")
    if config.report.name != "none":
        progress(f"report: {out / CLOUD / REPORT}")


def _saved_run(resume: Path, kit: CloudKit, config: Config) -> SavedRun:
    """Read the run that ``resume=`` names, before anything heavy is loaded or started."""
    from flep_fl.ai_cloud.checkpoint import find_checkpoint, load_checkpoint

    federation = kit.federation
    return load_checkpoint(
        find_checkpoint(resume),
        federation=federation.federation,
        key_id="open" if config.cloud.trust == "open" else federation.key_id,
        config=federation.digest,
        cloud_key=federation.cloud_key(),
    )


def run_client(cfg: DictConfig) -> None:
    """Take part in federation runs as one analyst site.

    Raises
    ------
    FlepError
        By name: kit, archive, configuration, a rejected sum, nothing heard.
    """
    require(cfg, "kit", "kits/a")
    if not cfg.data.owners:
        require(cfg, "archive", "archive/a")
    kit = load_site_kit(Path(cfg.kit))
    config = kit_config(cfg, kit.federation.shared, kit.federation.address)
    from flep_fl.flower.transport import site_security

    security = site_security(kit, config)
    from flep_fl.flower.compose_site import prepare_site
    from flep_fl.flower.processes import interruptible, stop_on_signals
    from flep_fl.flower.runtime.site import run_site

    out = output_dir()
    progress = Progress(kit.name)
    warn_few_contributors(config.federation.min_contributors, progress)
    progress(ckks_line(config))
    _quieten_flower()
    with stop_on_signals() as stop, progress.live():
        with interruptible():
            archive = Path(config.archive) if config.archive else None
            site = prepare_site(
                kit,
                config,
                archive,
                out / "sites" / kit.name,
                on_event=progress,
                on_progress=progress.bar,
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
                security=security,
            )
        except IdleTimeoutError:
            # A site that waits for further runs ends in good order once it has seen one to its end.
            if not (config.runtime.wait and site.session.closed):
                raise
            progress(f"no further run within {config.runtime.idle_timeout:g} s")
    site.session.refuse_if_halted()
    if site.session.failure is not None:
        raise site.session.failure
    kept = (
        "the global model is not this site's to see" if kit.contribute_only else f"model: {site.model_file}"
    )
    progress(f"the run is over; {kept}")


def _quieten_flower() -> None:
    """Keep Flower's own lines off the terminal; flwr sets its level when it is imported, so after that."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
