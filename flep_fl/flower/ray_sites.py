"""A simulated site in one of Ray's processes: opened for one message, closed after its answer.

Any process may get any message, so nothing of a site is kept between two of them but its images, in memory,
as a cache. All the rest lies in its folders, as for a site that is started again: kit, archive, ledger, last
sum.
On a cluster they must lie where every machine sees them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flep_fl.config import Config
from flep_fl.contracts.errors import FlepError
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.runtime.ray_engine import PARTITION
from flep_fl.flower.runtime.wire import describe, error_reply
from flep_fl.flower.site_data import SiteData, load_site_data
from flep_fl.provision.kits import load_site_kit

CACHED_SITES = 64
"""Of how many sites a process keeps the restored images."""

_LOG = logging.getLogger(__name__)
_images: OrderedDict[Path, SiteData] = OrderedDict()


@dataclass(frozen=True, slots=True)
class SiteFolders:
    """Where the sites of a simulation are, and what they are configured with.

    Attributes
    ----------
    names
        Names of the sites, in the order of their numbers.
    kits, archives, out
        Folders that hold one folder a site.
    config
        The configuration.
    """

    names: tuple[str, ...]
    kits: Path
    archives: Path
    out: Path
    config: Config


def ray_client(folders: SiteFolders) -> ClientApp:
    """Make the ClientApp that is whichever site its node's number names."""
    app = ClientApp()
    # Flower looks for the message's kind before it calls a mod, so the one function stands for every kind.
    for register in (app.train, app.evaluate, app.query):
        register()(partial(_answer, folders))
    return app


def _answer(folders: SiteFolders, message: Message, context: Context) -> Message:
    """Answer one message; what fails leaves as a public code alone."""
    name = folders.names[int(context.node_config[PARTITION])]
    try:
        kit = load_site_kit(folders.kits / name)
        site = prepare_site(
            kit,
            folders.config,
            folders.archives / name,
            folders.out / name,
            data=_site_data(folders, name),
        )
        try:
            return site.app(message, context)
        finally:
            site.session.ledger.close()
    except Exception as exc:
        if not isinstance(exc, FlepError):
            _LOG.exception("site %s failed", name)
        _LOG.error("site %s: %s", name, describe(exc))
        return error_reply(message, exc)


def _site_data(folders: SiteFolders, name: str) -> SiteData:
    """Return a site's restored images, from the cache where this process has restored them before."""
    archive = folders.archives / name
    data = _images.pop(archive, None)
    if data is None:
        data = load_site_data(load_site_kit(folders.kits / name), folders.config, archive)
    _images[archive] = data
    while len(_images) > CACHED_SITES:
        _images.popitem(last=False)
    return data
