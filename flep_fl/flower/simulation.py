"""A whole federation in one process: the same owner, cloud and site code on an in-process grid."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from flep_fl.config import Config, ckks_line, shared_part
from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.stream import derive_key, keystream
from flep_fl.entry import output_dir
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.run_report import plain_settings, write_run_report
from flep_fl.flower.run_tracking import tracked
from flep_fl.provision.kits import OWNER, create_kits, load_cloud_kit, load_owner_kit, load_site_kit
from flep_fl.provision.owner import release_data_set
from flep_fl.reporting.console import Progress, print_table, warn_few_contributors
from flep_fl.reporting.results import build_results, write_json

_FIRST_NODE = 2  # Flower's node 1 is the cloud


def site_names(count: int) -> list[str]:
    """Name simulated sites ``site-0``, ``site-1``, ... so that they sort in order."""
    width = len(str(count - 1))
    return [f"site-{number:0{width}d}" for number in range(count)]


def run_simulation(config: Config) -> dict[str, Any]:
    """Simulate one run in hydra's output directory; see :func:`simulate`."""
    return simulate(config, output_dir())


def simulate(config: Config, out: Path) -> dict[str, Any]:
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

    Returns
    -------
    dict
        The content of ``results.json``.
    """
    progress = Progress("simulation")
    warn_few_contributors(config.federation.min_contributors, progress)
    progress(ckks_line(config))
    names = config.sites or site_names(config.federation.sites)
    with (
        tracked(config, out, plain_settings(config), progress) as tracker,
        tempfile.TemporaryDirectory(prefix="flep-") as folder,
        progress.live(),
    ):
        kits, archives = Path(folder) / "kits", Path(folder) / "archives"
        create_kits(shared_part(config), names, kits, address=config.runtime.address)
        cloud_kit = load_cloud_kit(kits / "cloud")
        release = release_data_set(
            config,
            load_owner_kit(kits / OWNER),
            archives,
            entropy=seeded_entropy(config.seed),
            on_event=progress,
        )
        sites = {
            name: prepare_site(
                load_site_kit(kits / name), config, archives / name, out / "sites" / name, on_event=progress
            )
            for name in names
        }
        # The keys of a simulation are gone when it ends: there would be nothing to resume it with.
        strategy = cloud_strategy(
            cloud_kit,
            config,
            out / "cloud",
            on_event=progress,
            on_rounds=lambda: tracker.update(strategy.rounds),
            checkpoint=False,
        )
        apps = {_FIRST_NODE + number: sites[name].app for number, name in enumerate(names)}
        try:
            run_server_app(cloud_app(strategy), LocalGrid(apps, log=progress), {})
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
        out, config, results, lambda: release.sample, title="Simulated run", on_event=progress
    )
    print_table(strategy.rounds, title=f"cloud={config.cloud.trust}, {strategy.parameters} weights")
    progress(f"results: {out / 'results.json'}")
    if report is not None:
        progress(f"report: {report}")
    return results


def seeded_entropy(seed: int) -> Entropy:
    """Return a reproducible stand-in for ``secrets.token_bytes``. For simulation only."""
    key = derive_key(str(seed).encode(), b"flep-fl/simulation-entropy")
    calls = 0

    def entropy(count: int) -> bytes:
        nonlocal calls
        calls += 1
        return keystream(derive_key(key, calls.to_bytes(8, "big")), count).tobytes()

    return entropy
