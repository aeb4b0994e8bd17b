"""A small real federation, and what each party to an attack gets of it.

The cloud gets replies as they come over the grid and its own kit; a thief gets archive folders; an analyst
gets its kit, its archive and the model files that its site wrote. Attacks read nothing else. What they are
*scored* against, the images that the victims trained on, comes from :meth:`Evidence.truth`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from flep_fl.ai_cloud.strategy import EncryptedFedAvg
from flep_fl.config import Config, shared_part
from flep_fl.contracts.protocol import PAYLOAD_RECORD
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import Site, SiteChanges, prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.simulation import seeded_entropy, site_names
from flep_fl.flower.site_data import SiteData, load_site_data
from flep_fl.model_security.seal import UpdateHeader, parse_header, signed_header
from flep_fl.provision.kits import (
    OWNER,
    CloudKit,
    SiteKit,
    create_kits,
    load_cloud_kit,
    load_owner_kit,
    load_site_kit,
)
from flep_fl.provision.owner import release_data_set

_FIRST_NODE = 2  # Flower's node 1 is the cloud


@dataclass(frozen=True, slots=True)
class CapturedUpdate:
    """One upload as the cloud got it.

    Attributes
    ----------
    header
        The signed header, in the clear in every trust mode.
    payload
        The sealed payload: plain weights with ``cloud=open``, else ciphertext.
    """

    header: UpdateHeader
    payload: bytes = field(repr=False)


class RecordingGrid(LocalGrid):
    """An in-process grid that keeps every upload as the cloud receives it."""

    def __init__(self, apps: Mapping[int, ClientApp], *, log: Callable[[str], None] | None = None) -> None:
        super().__init__(apps, log=log)
        self.uploads: list[CapturedUpdate] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull as usual, and take note of what came."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.has_content() and PAYLOAD_RECORD in reply.content:
                blob = bytes(reply.content.array_records[PAYLOAD_RECORD]["sealed"].data)
                header = parse_header(signed_header(blob))
                self.uploads.append(CapturedUpdate(header, blob[-header.payload_bytes :]))
        return replies


@dataclass(slots=True)
class Evidence:
    """What a run left.

    Attributes
    ----------
    config
        Its configuration; what all parties share is known to every attacker.
    folder
        ``kits/``, ``archives/`` (one folder per site, and ``owner/``) and ``out/`` as a simulation writes it.
    sites
        Names of the sites.
    cloud_kit
        What the cloud holds; a model key in it only with ``cloud=trusted``.
    uploads
        Every upload in the order of its arrival.
    strategy
        The cloud's own state after the run.
    parties
        The sites themselves, for tests.
    """

    config: Config
    folder: Path
    sites: list[str]
    cloud_kit: CloudKit
    uploads: list[CapturedUpdate]
    strategy: EncryptedFedAvg
    parties: dict[str, Site]

    def kit(self, site: str) -> SiteKit:
        """Return what the analyst of ``site`` holds."""
        return load_site_kit(self.folder / "kits" / site)

    def truth(self, site: str) -> SiteData:
        """Return the images that a site trained on, to score an attack with; never an attack's input."""
        return load_site_data(self.kit(site), self.config, self.folder / "archives" / site)

    def model_file(self, site: str) -> Path:
        """Return the file of the global model as that analyst holds it."""
        return self.folder / "out" / "sites" / site / "model.npz"

    def first_upload(self, site: str) -> CapturedUpdate:
        """Return a site's upload of round 1."""
        return next(u for u in self.uploads if u.header.sender == site and u.header.round == 1)


Prepare = Callable[[str], SiteChanges]
"""``prepare(site)`` says how a site departs from an honest one; see :func:`.prepare_site`."""


def make_federation(
    config: Config,
    folder: Path,
    *,
    prepare: Prepare = lambda _site: SiteChanges(),
    strategy_of: Callable[[EncryptedFedAvg], EncryptedFedAvg] = lambda strategy: strategy,
    on_event: Callable[[str], None] = lambda _line: None,
) -> Evidence:
    """Provision, seal and run one federation in this process, and keep all that it leaves in ``folder``.

    Kits, archives, sites and cloud are those of :func:`flep_fl.flower.simulation.simulate`; only the grid
    takes notes.

    Parameters
    ----------
    config
        The whole configuration.
    folder
        An empty folder of the attack's own: it holds private keys.
    prepare
        How each site departs from an honest one (a poisoning analyst, an analyst with ``LocalDpMod``).
    strategy_of
        Turns the honest cloud into the one that is to run.
    on_event
        Gets one line of progress at a time.
    """
    names = config.sites or site_names(config.federation.sites)
    kits, archives, out = folder / "kits", folder / "archives", folder / "out"
    create_kits(shared_part(config), names, kits, address=config.runtime.address)
    release_data_set(
        config, load_owner_kit(kits / OWNER), archives, entropy=seeded_entropy(config.seed), on_event=on_event
    )
    cloud_kit = load_cloud_kit(kits / "cloud")
    sites: dict[str, Site] = {
        name: prepare_site(
            load_site_kit(kits / name),
            config,
            archives / name,
            out / "sites" / name,
            changes=prepare(name),
            on_event=on_event,
        )
        for name in names
    }
    strategy = strategy_of(cloud_strategy(cloud_kit, config, out / "cloud", checkpoint=False))
    grid = RecordingGrid(
        {_FIRST_NODE + number: sites[name].app for number, name in enumerate(names)}, log=on_event
    )
    run_server_app(cloud_app(strategy), grid, {})
    return Evidence(config, folder, list(names), cloud_kit, grid.uploads, strategy, sites)


def grey_batch(images: NDArray[np.float32] | Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return (N, H, W) float32 on the 0..255 scale of restored images (N, C, H, W); colour is averaged."""
    grey: NDArray[np.float32] = np.asarray(images, np.float32).mean(axis=1)
    return grey
