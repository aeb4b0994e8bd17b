"""``python -m scripts.owner``: what concerns the database's content, who gets it, and how it is kept."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from flep_fl.contracts.errors import ConfigError, KitError, OwnerHomeError
from flep_fl.contracts.files import read_bytes
from flep_fl.contracts.owner_records import Analyst
from flep_fl.data_owner.home import OwnerHome, load_home
from flep_fl.provision.owner_config import OwnerConfig, need
from flep_fl.reporting.console import Progress, say

if TYPE_CHECKING:
    from flep_fl.private_database.store import OwnerDatabase

DAY = 86400.0


def open_database(config: OwnerConfig, home: OwnerHome) -> OwnerDatabase:
    """Open the owner's database with the key in the home; ends a change of the key that was interrupted."""
    from flep_fl.private_database.rotation import open_with_key_file

    return open_with_key_file(config.database or home.database, home.folder / "database.key")


def _note(config: OwnerConfig, home: OwnerHome, event: str, **fields: object) -> None:
    """Put down in the audit log what an administrator did; also while the gateway writes to it."""
    from flep_fl.provision.owner_gateway import audit_log

    log = audit_log(config, home, background=True)
    try:
        log.append(event, durable=True, **fields)
    finally:
        log.close()


def run_release(config: OwnerConfig) -> None:
    """Encrypt what is new in a data set (``dataset=NAME``; all of them without) and release it."""
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        names = [config.dataset] if config.dataset else [found.name for found in database.all_datasets()]
        for name in names:
            _release(config, home, database, name)


def run_grant(config: OwnerConfig) -> None:
    """Grant ``dataset=NAME`` to ``analyst=NAME`` until ``until=DATE``; keys from ``kit=`` or given in hex."""
    from flep_fl.private_database.grants import create_grant

    dataset = need(config, "dataset", "cells")
    analyst = _analyst(config)
    until = _until(need(config, "until", "2027-12-31"))
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        grant = create_grant(
            database,
            dataset=dataset,
            analyst=analyst,
            not_after=until,
            share=(config.share[0], config.share[1]),
        )
    _note(
        config,
        home,
        "grant.created",
        grant=grant.grant_id,
        dataset=dataset,
        analyst=analyst.name,
        key=analyst.verify_key.hex(),
        until=int(grant.not_after),
    )
    say(f"grant {grant.grant_id}: {dataset} to {analyst.name} until {_date(grant.not_after)}")


def run_grants(config: OwnerConfig) -> None:
    """List all grants (of ``dataset=``, where it is set)."""
    from flep_fl.private_database.grants import list_grants

    with open_database(config, load_home(Path(config.home))) as database:
        now = database.clock.now()
        for grant in list_grants(database, dataset=config.dataset):
            state = "ended" if now > grant.not_after else "stands"
            if grant.revoked_at is not None:
                state = f"revoked {_date(grant.revoked_at)}"
            part = "" if grant.share == (0, 1) else f", part {grant.share[0]} of {grant.share[1]}"
            say(
                f"{grant.grant_id}  {grant.dataset}{part} to {grant.analyst.name} until "
                f"{_date(grant.not_after)}: {state}"
            )


def run_revoke(config: OwnerConfig) -> None:
    """Take ``grant=ID`` back, begin a new key epoch, and release the data set under it for the others."""
    from flep_fl.private_database.grants import revoke_grant

    grant_id = need(config, "grant", "ID (action=grants lists them)")
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        grant = revoke_grant(database, grant_id)
        _note(
            config, home, "grant.revoked", grant=grant_id, dataset=grant.dataset, analyst=grant.analyst.name
        )
        say(f"revoked: {grant.dataset} to {grant.analyst.name}; no more records leave to it from now on")
        _release(config, home, database, grant.dataset)


def run_rotate(config: OwnerConfig) -> None:
    """Begin a new key epoch of ``dataset=NAME`` and release it anew."""
    from flep_fl.private_database.grants import begin_epoch

    dataset = need(config, "dataset", "cells")
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        with database.write() as connection:
            begin_epoch(database, connection, dataset)
        _note(config, home, "epoch.begun", dataset=dataset, epoch=database.dataset(dataset).epoch)
        say(f"{dataset}: key epoch {database.dataset(dataset).epoch}")
        _release(config, home, database, dataset)


def run_rekey(config: OwnerConfig) -> None:
    """Change the owner's key to the database; the gateway has to be stopped."""
    from flep_fl.private_database.rotation import rotate_key_file

    home = load_home(Path(config.home))
    with home.exclusive("changes the database's key") as alone:
        if not alone:
            raise OwnerHomeError(
                "the gateway is running", remedy="Stop it first; its key would be the old one"
            )
        broken = rotate_key_file(config.database or home.database, home.folder / "database.key")
    _note(config, home, "database.rekeyed", corrupt=len(broken))
    say("the database has a new key; copies of the file from before still open with the old one")
    for record_id in broken:
        say(f"record {record_id} was corrupt before and is now")


def run_backup(config: OwnerConfig) -> None:
    """Write a verified backup to ``out=FILE``; the database may be in use."""
    from flep_fl.private_database.backup import backup

    out = Path(need(config, "out", "owner.backup"))
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        report = backup(database, home.database_key(), out)
    _note(config, home, "backup.made", records=report.records)
    say(f"{out}: {report.records} records, verified; {home.folder / 'database.key'} opens it")
    for problem in report.corrupt:
        say(problem)


def run_restore(config: OwnerConfig) -> None:
    """Verify ``backup=FILE`` and make a database of it, where ``database=`` or the home has none."""
    from flep_fl.private_database.backup import restore

    home = load_home(Path(config.home))
    source = Path(need(config, "backup", "owner.backup"))
    report = restore(source, config.database or home.database, home.database_key())
    _note(config, home, "database.restored", records=report.records)
    say(f"restored {report.records} records from {source}")
    say("Grants, deletions and key epochs are those of the backup's day: look at action=grants, revoke again")
    say("what was taken back since, and run action=rotate until analysts take the releases for newer ones.")


def run_retain(config: OwnerConfig) -> None:
    """Destroy what was stored more than ``max_age_days=`` days ago; ``dry_run=true`` counts only."""
    from flep_fl.private_database.retention import expire

    days = need(config, "max_age_days", "365")
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        found = expire(database, days * DAY, dataset=config.dataset, dry_run=config.dry_run)
    if not config.dry_run:
        _note(config, home, "records.expired", destroyed=found.destroyed, days=days)
    word = "would be destroyed" if config.dry_run else "destroyed; release again to serve the rest"
    say(f"{found.destroyed} records {word}, {found.kept} stay ({found.undated} of unknown age)")


def run_delete(config: OwnerConfig) -> None:
    """Destroy ``records=[ID,...]``."""
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        found = database.delete(need(config, "records", "[ID]"))
    _note(config, home, "records.deleted", records=list(config.records)[:100], destroyed=found)
    say(f"{found} records destroyed; release again to serve the rest")


def run_accept_clock(config: OwnerConfig) -> None:
    """Take the system's time as right, after a clock had jumped."""
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        database.clock.accept()
    _note(config, home, "clock.accepted")
    say(f"the database goes by {_date(int(time.time()))} from now on")


def _release(config: OwnerConfig, home: OwnerHome, database: OwnerDatabase, name: str) -> None:
    from flep_fl.private_database.releases import ReleaseBook

    progress = Progress(home.folder.name)
    book = ReleaseBook(database, home.signing_key(), allow_targets=config.allow_targets)
    with progress.live():
        found = book.release(name, on_progress=lambda done, total: progress.bar(name, done, total))
    _note(
        config,
        home,
        "release.made",
        dataset=name,
        release=found.release_id,
        epoch=found.epoch,
        records=found.records,
    )
    say(
        f"{name}: release {found.number}, epoch {found.epoch}: {found.records} records, {found.encrypted} of "
        f"them encrypted now, {found.unlabelled} left out without a label"
    )
    for record_id in found.corrupt:
        say(f"record {record_id} is corrupt and was left out")


def _analyst(config: OwnerConfig) -> Analyst:
    name = need(config, "analyst", "a")
    if config.kit is not None:
        path = Path(config.kit)
        path = path / "kit.json" if path.is_dir() else path
        try:
            site = json.loads(read_bytes(path, what="the kit", error=KitError))["sites"][name]
            keys = bytes.fromhex(site["verify_key"]), bytes.fromhex(site["encryption_key"])
        except (ValueError, KeyError, TypeError) as exc:
            raise KitError(
                f"{path} names no site {name} with its keys", remedy="Check kit= and analyst="
            ) from exc
        return Analyst(name, *keys)
    try:
        verify = bytes.fromhex(need(config, "verify_key", "HEX (or kit=KIT)"))
        encryption = bytes.fromhex(need(config, "encryption_key", "HEX (or kit=KIT)"))
    except ValueError as exc:
        raise ConfigError("verify_key and encryption_key are hexadecimal") from exc
    return Analyst(name, verify, encryption)


def _until(text: str) -> float:
    """Read a date (its last second, UTC) or a date and time."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ConfigError(
            f"until={text} is not a date", expected="YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS+00:00"
        ) from exc
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    if "T" not in text and " " not in text:
        when += timedelta(days=1, seconds=-1)
    return when.timestamp()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
