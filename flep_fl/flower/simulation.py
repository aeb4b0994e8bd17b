"""A whole federation in one process: the same owner, cloud and site code on an in-process grid."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import ServerApp

from flep_fl.config import Config, ckks_line, shared_part
from flep_fl.contracts.errors import ConfigError
from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.stream import derive_key, keystream
from flep_fl.entry import output_dir
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.ray_sites import SiteFolders, ray_client
from flep_fl.flower.run_report import Invert, plain_settings, write_run_report
from flep_fl.flower.run_tracking import tracked
from flep_fl.flower.runtime.ray_engine import LOCAL, require_ray, run_on_ray
from flep_fl.provision.kits import (
    OWNER,
    Federation,
    SiteKit,
    create_kits,
    load_cloud_kit,
    load_owner_kit,
    load_site_kit,
)
from flep_fl.provision.owner import release_data_set
from flep_fl.reporting.console import Progress, print_table, warn_few_contributors
from flep_fl.reporting.results import build_results, write_json

_FIRST_NODE = 2  # Flower's node 1 is the cloud
_NO_ADDRESS = "127.0.0.1:9092"  # kits name one; nobody listens there


def site_names(count: int) -> list[str]:
    """Name simulated sites ``site-0``, ``site-1``, ... so that they sort in order."""
    width = len(str(count - 1))
    return [f"site-{number:0{width}d}" for number in range(count)]


def run_simulation(config: Config, *, invert: Invert | None = None) -> dict[str, Any]:
    """Simulate one run in hydra's output directory; see :func:`simulate`."""
    return simulate(config, output_dir(), invert=invert)


def simulate(config: Config, out: Path, *, invert: Invert | None = None) -> dict[str, Any]:
    """Provision, seal and run a federation; all keys and archives are gone afterwards.

    Model keys, check keys and signing keys are random as ever. The *image* keys, nonces and noise come
    from ``config.seed``, so that two runs at one seed train on the same images; that is safe here alone,
    where the archives never leave a temporary folder.

    Parameters
    ----------
    config
        The whole configuration.
    out
        Run directory: ``results.json``, ``report.html``, ``cloud/``, ``sites/<name>/``.
    invert
        As :func:`.write_run_report` takes it.

    Returns
    -------
    dict
        The content of ``results.json``.
    """
    on_ray = _checked_runtime(config)
    progress = Progress("simulation")
    warn_few_contributors(config.federation.min_contributors, progress)
    progress(ckks_line(config))
    names = config.sites or site_names(config.federation.sites)
    # The machines of a cluster have no folder in common but the run's.
    where = out if on_ray and config.runtime.address != LOCAL else None
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
    with (
        tracked(config, out, plain_settings(config), progress) as tracker,
        tempfile.TemporaryDirectory(prefix="flep-", dir=where) as folder,
        progress.live(),
    ):
        kits, archives = Path(folder) / "kits", Path(folder) / "archives"
        create_kits(shared_part(config), names, kits, address=_NO_ADDRESS)
        cloud_kit = load_cloud_kit(kits / "cloud")
        release = release_data_set(
            config,
            load_owner_kit(kits / OWNER),
            archives,
            entropy=seeded_entropy(config.seed),
            on_event=progress,
        )
        # The keys of a simulation are gone when it ends: there would be nothing to resume it with.
        strategy = cloud_strategy(
            cloud_kit,
            config,
            out / "cloud",
            on_event=progress,
            on_rounds=lambda: tracker.update(strategy.rounds),
            checkpoint=False,
        )
        folders = SiteFolders(tuple(names), kits, archives, out / "sites", config)
        play = _on_ray if on_ray else _in_process
        try:
            play(cloud_app(strategy), folders, cloud_kit.federation, progress)
        finally:
            results = build_results(
                cloud=config.cloud.trust,
                sites=names,
                parameters=strategy.parameters,
                rounds=strategy.rounds,
                config_digest=cloud_kit.federation.digest,
                closing_failures=strategy.closing_failures,
                restore=release.restore,
            )
            write_json(out / "results.json", results)
    report = write_run_report(
        out,
        config,
        results,
        lambda: release.sample,
        invert=invert,
        title="Simulated run",
        on_event=progress,
    )
    print_table(strategy.rounds, title=f"cloud={config.cloud.trust}, {strategy.parameters} weights")
    progress(f"results: {out / 'results.json'}")
    if report is not None:
        progress(f"report: {report}")
    return results


def _checked_runtime(config: Config) -> bool:
    """Return whether Ray runs the sites; refuse what a simulation does not do."""
    if config.runtime.name not in ("local", "ray"):
        raise ConfigError(
            f"runtime={config.runtime.name} is no simulation",
            expected="runtime=local (one process) or runtime=ray",
            remedy="Leave runtime out, or start `python -m server` and `python -m clients`",
        )
    if config.runtime.name == "ray":
        require_ray()
    return config.runtime.name == "ray"


def _in_process(server: ServerApp, folders: SiteFolders, federation: Federation, progress: Progress) -> None:
    sites = [
        prepare_site(
            shared_kit(load_site_kit(folders.kits / name), federation),
            folders.config,
            folders.archives / name,
            folders.out / name,
            on_event=progress,
        )
        for name in folders.names
    ]
    apps = {_FIRST_NODE + number: site.app for number, site in enumerate(sites)}
    run_server_app(server, LocalGrid(apps, log=progress), {})


def _on_ray(server: ServerApp, folders: SiteFolders, federation: Federation, progress: Progress) -> None:
    run_on_ray(
        server,
        ray_client(folders),
        nodes=len(folders.names),
        address=folders.config.runtime.address,
        cpus=folders.config.runtime.threads or 1,
        log=progress,
    )


def shared_kit(kit: SiteKit, federation: Federation) -> SiteKit:
    """Let a kit hold the one record of the federation that all parties of a simulation have in common.

    Every kit names every site: a thousand kits with records of their own would hold a million entries.
    """
    return replace(kit, federation=federation) if kit.federation == federation else kit


def seeded_entropy(seed: int) -> Entropy:
    """Return a reproducible stand-in for ``secrets.token_bytes``. For simulation only."""
    key = derive_key(str(seed).encode(), b"flep-fl/simulation-entropy")
    calls = 0

    def entropy(count: int) -> bytes:
        nonlocal calls
        calls += 1
        return keystream(derive_key(key, calls.to_bytes(8, "big")), count).tobytes()

    return entropy
