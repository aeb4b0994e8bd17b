"""Federations for tests: real kits, real archives, real apps, small numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from flep_fl.ai_cloud.strategy import EncryptedFedAvg
from flep_fl.config import CONFIG_DIR, Config, register, shared_part, to_config
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import Site, prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.simulation import seeded_entropy
from flep_fl.provision.kits import CloudKit, create_kits, load_cloud_kit, load_owner_kit, load_site_kit
from flep_fl.provision.owner import release_data_set

SMALL = ("data=digits", "data.limit=240", "train.local_epochs=1", "report=none")


def make_config(*overrides: str, name: str = "simulate") -> Config:
    """Compose and check a configuration as an entry point does."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_config(compose(name, overrides=list(overrides)))


@dataclass
class Federation:
    """A federation on an in-process grid."""

    config: Config
    cloud_kit: CloudKit
    sites: dict[str, Site]
    strategy: EncryptedFedAvg
    grid: LocalGrid
    out: Path
    folder: Path

    def run(self) -> None:
        """Run the ServerApp to its end."""
        run_server_app(cloud_app(self.strategy), self.grid, {})


def make_federation(
    folder: Path, *overrides: str, grid: type[LocalGrid] = LocalGrid, **options: Any
) -> Federation:
    """Provision, seal and prepare a federation of ``federation.sites`` sites named a, b, c, ..."""
    config = make_config(*SMALL, *overrides)
    names = [chr(ord("a") + number) for number in range(config.federation.sites)]
    kits, archives, out = folder / "kits", folder / "archives", folder / "out"
    create_kits(shared_part(config), names, kits, address=config.runtime.address)
    cloud_kit = load_cloud_kit(kits / "cloud")
    release_data_set(config, load_owner_kit(kits / "owner"), archives, entropy=seeded_entropy(config.seed))
    sites = {
        name: prepare_site(load_site_kit(kits / name), config, archives / name, out / "sites" / name)
        for name in names
    }
    strategy = cloud_strategy(cloud_kit, config, out / "cloud")
    apps = {number: sites[name].app for number, name in enumerate(names, start=2)}
    return Federation(config, cloud_kit, sites, strategy, grid(apps, **options), out, folder)
