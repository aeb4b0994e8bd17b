"""``action=keys`` and ``action=certificate``: make an owner's home, and a new certificate for its gateway."""

from __future__ import annotations

from pathlib import Path

from flep_fl.data_owner.certificates import TlsFiles, issue_certificate
from flep_fl.data_owner.home import create_home, load_home
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.provision.owner_config import OwnerConfig
from flep_fl.reporting.console import say


def run_keys(config: OwnerConfig) -> None:
    """Make the owner's keys, its certificates and an empty database.

    Raises
    ------
    FlepError
        There is a home, or a setting does not fit.
    """
    home = create_home(
        Path(config.home),
        administrators=config.administrators,
        threshold=config.threshold,
        hosts=config.hosts,
    )
    OwnerDatabase.create(config.database or home.database, home.database_key()).close()
    say(f"made the owner's home {home.folder}: {config.threshold} of {len(home.administrators)} approve")
    say(f"owner's key {home.owner_key.hex()} (analysts pin it)")
    say(f"audit key   {home.audit_key.hex()} (note it elsewhere: it verifies the audit log)")
    say(f"Hand out {home.folder}/administrators/*.key and remove them here; guard the rest like images.")


def run_certificate(config: OwnerConfig) -> None:
    """Issue the gateway's certificate anew for ``hosts=``, or with ``device=`` one for that client."""
    home = load_home(Path(config.home))
    if config.device is None:
        issue_certificate(home.root, home.tls, name="FLEP data owner's gateway", hosts=config.hosts)
        say(f"issued {home.tls.certificate} for {', '.join(config.hosts)}")
        return
    folder = Path(config.devices) / config.device
    files = TlsFiles(folder / "client.crt", folder / "client.key")
    issue_certificate(home.root, files, name=config.device, client=True)
    say(f"issued {files.certificate}")
