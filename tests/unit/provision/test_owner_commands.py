"""What an owner does by command leaves its line in the audit log; wrong commands are answered at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from gateways import DATASET, IMAGE, ROOT, Camera, events, new_home
from omegaconf import OmegaConf

from flep_fl.contracts.errors import (
    AuditError,
    ConfigError,
    GatewayError,
    KitError,
    NotReleasedError,
    OwnerHomeError,
)
from flep_fl.data_owner.audit import LOG_NAME
from flep_fl.data_owner.enrolment import Approval
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.provision import owner_audit, owner_devices, owner_gateway, owner_measure, owner_store
from flep_fl.provision.owner_config import OwnerConfig, to_owner_config


def config(home: Path, **values: object) -> OwnerConfig:
    made = OwnerConfig(action="test", home=str(home), **values)  # type: ignore[arg-type]
    for name in owner_gateway.LISTENERS:
        getattr(made, name).address = "127.0.0.1:1"
    return made


def hexadecimal(key: Ed25519PrivateKey | X25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def test_every_command_that_changes_something_is_in_the_audit_log(tmp_path: Path) -> None:
    home = new_home(tmp_path / "owner")
    with OwnerDatabase(home.database, home.database_key()) as database:
        ids = database.ingest([IMAGE] * 3, [0, 1, 1], ["train", "train", "test"])
    keys = {
        "verify_key": hexadecimal(Ed25519PrivateKey.generate()),
        "encryption_key": hexadecimal(X25519PrivateKey.generate()),
    }
    owner_store.run_release(config(home.folder))
    owner_store.run_grant(config(home.folder, dataset=DATASET, analyst="a", until="2099-01-01", **keys))
    grant = events(home)[-1]["grant"]
    owner_store.run_revoke(config(home.folder, grant=grant))
    owner_store.run_rotate(config(home.folder, dataset=DATASET))
    owner_store.run_delete(config(home.folder, records=[ids[0]]))
    owner_store.run_retain(config(home.folder, max_age_days=1.0))
    owner_store.run_retain(config(home.folder, max_age_days=1.0, dry_run=True))
    owner_store.run_backup(config(home.folder, out=str(tmp_path / "backup")))
    owner_store.run_rekey(config(home.folder))
    owner_store.run_accept_clock(config(home.folder))
    assert [line["event"] for line in events(home)[1:]] == [
        "release.made",
        "grant.created",
        "grant.revoked",
        "release.made",
        "epoch.begun",
        "release.made",
        "records.deleted",
        "records.expired",
        "backup.made",
        "database.rekeyed",
        "clock.accepted",
    ]
    owner_audit.run_audit(config(home.folder))


def test_the_databases_key_is_not_changed_under_a_gateway_that_serves(tmp_path: Path) -> None:
    home = new_home(tmp_path / "owner")
    key = home.database_key()
    with home.exclusive("serves") as alone:
        assert alone
        with pytest.raises(OwnerHomeError, match="the gateway is running"):
            owner_store.run_rekey(config(home.folder))
        assert home.database_key() == key
    owner_store.run_rekey(config(home.folder))
    assert home.database_key() != key


def test_while_a_gateway_serves_devices_are_its_business_alone(tmp_path: Path) -> None:
    home = new_home(tmp_path / "owner")
    before = home.devices.read_bytes() if home.devices.exists() else b""
    approval = Approval.from_bytes(Camera().statement(home))
    with home.exclusive("serves"):
        for ask in (
            lambda: owner_devices._hand_in(config(home.folder), home, approval),
            lambda: owner_devices.run_devices(config(home.folder)),
        ):
            with pytest.raises(GatewayError, match="does not answer"):
                ask()
    assert (home.devices.read_bytes() if home.devices.exists() else b"") == before
    owner_devices._hand_in(config(home.folder), home, approval)
    assert home.devices.read_bytes() != before


def test_a_grant_ends_with_the_day_or_at_the_time_that_is_named() -> None:
    assert owner_store._until("2027-12-31") == datetime(2027, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
    for text in ("2027-12-31T10:00:00", "2027-12-31 12:00:00+02:00"):
        assert owner_store._until(text) == datetime(2027, 12, 31, 10, tzinfo=UTC).timestamp()
    with pytest.raises(ConfigError, match="until=soon is not a date"):
        owner_store._until("soon")


@pytest.mark.parametrize("content", ["[]", "{", '{"sites": {}}', '{"sites": {"a": {"verify_key": "zz"}}}'])
def test_a_kit_that_does_not_name_the_analyst_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "kit.json").write_text(content)
    with pytest.raises(KitError, match="names no site a"):
        owner_store._analyst(config(tmp_path, analyst="a", kit=str(tmp_path)))


def test_an_analysts_keys_are_hexadecimal(tmp_path: Path) -> None:
    for keys in ({"verify_key": "zz", "encryption_key": "00"}, {"verify_key": "00", "encryption_key": "0"}):
        with pytest.raises(ConfigError, match="hexadecimal"):
            owner_store._analyst(config(tmp_path, analyst="a", **keys))


def test_a_log_that_was_tampered_with_ends_in_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new_home(tmp_path / "owner")
    owner_store.run_accept_clock(config(home.folder))
    owner_audit.run_audit(config(home.folder, out=str(tmp_path / "head.json")))
    log = home.audit / LOG_NAME
    log.write_bytes(log.read_bytes().replace(b"clock.accepted", b"clock_accepted"))
    with pytest.raises(AuditError, match="not what was written"):
        owner_audit.run_audit(config(home.folder, heads=[str(tmp_path / "head.json")]))
    copied = config(home.folder / "nowhere", log=str(log), audit_key=home.audit_key.hex())
    with pytest.raises(AuditError, match="not what was written"):
        owner_audit.run_audit(copied)
    assert "rewritten" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "values", "message"),
    [
        ("0.0.0.0:8443", {}, "admin.address"),
        ("10.0.0.1:8443", {}, "admin.address"),
    ],
)
def test_administration_stays_on_loopback(
    tmp_path: Path, address: str, values: dict[str, object], message: str
) -> None:
    made = config(tmp_path, **values)
    made.admin.address = address
    with pytest.raises(ConfigError, match=message):
        owner_gateway.check_exposure(made)


def test_plain_http_stays_on_loopback(tmp_path: Path) -> None:
    made = config(tmp_path, tls=False)
    owner_gateway.check_exposure(made)
    made.ingest.address = "0.0.0.0:8441"
    with pytest.raises(ConfigError, match="tls=false"):
        owner_gateway.check_exposure(made)
    made.tls = True
    owner_gateway.check_exposure(made)


@pytest.mark.parametrize(("soft", "hard", "expected"), [(300, 2000, "1256"), (1500, 2000, "1500")])
def test_peers_connections_do_not_take_the_files_of_the_database(soft: int, hard: int, expected: str) -> None:
    assert limit_after(soft, hard) == expected


def test_more_connections_than_the_system_allows_files_are_refused_at_the_start() -> None:
    assert "ConfigError" in limit_after(300, 600) and "ulimit -n" in limit_after(300, 600)


def limit_after(soft: int, hard: int) -> str:
    """Ask for files for 1000 connections, under a process's own limits; gives its limit, or the error."""
    code = (
        "import resource\n"
        "from flep_fl.provision.owner_gateway import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "raise_file_limit(1000)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return (done.stdout or done.stderr).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "action is not set"),
        (["action=sever"], "Did you mean action=serve"),
        (["action=serve", "ingest.in_flight=0"], "ingest.in_flight=0 is not positive"),
        (["action=serve", "ingest.port=1"], "ingest"),
        (["action=serve", "home=/nonexistent/home"], "action=keys"),
    ],
)
def test_a_wrong_command_is_answered_before_anything_heavy_loads(arguments: list[str], message: str) -> None:
    code = (
        "import sys\n"
        "from scripts import owner\n"
        f"sys.argv = ['owner', *{arguments!r}]\n"
        "try:\n    owner.main()\n"
        "except SystemExit as end:\n    sys.stderr.write(f'exit {end.code}\\n')\n"
        "print(sorted({'torch', 'flwr', 'fastapi', 'uvicorn', 'tenseal'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert re.search(r"exit [12]", done.stderr) and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.strip() == "[]"


def test_the_release_is_measured_against_what_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new_home(tmp_path / "owner")
    with OwnerDatabase(home.database, home.database_key()) as database:
        database.ingest([IMAGE] * 3, [0, 1, 1], ["train", "train", "test"])
    with pytest.raises(NotReleasedError, match="Release it first"):
        owner_measure.run_measure(config(home.folder, dataset=DATASET))
    owner_store.run_release(config(home.folder))
    owner_measure.run_measure(config(home.folder, dataset=DATASET, out=str(tmp_path / "measured.json")))
    found = json.loads((tmp_path / "measured.json").read_text())
    assert (found["dataset"], found["records"]) == (DATASET, 3)
    assert "3 released records" in capsys.readouterr().out


@pytest.mark.parametrize("share", [[0], [2, 2], [-1, 2], [0, 0]])
def test_a_share_that_is_none_is_refused(share: list[int]) -> None:
    made = config(Path("owner"), share=share)
    made.action = "play"
    with pytest.raises(ConfigError, match="is not a share"):
        to_owner_config(OmegaConf.structured(made))
    made.share = [0, 1]
    to_owner_config(OmegaConf.structured(made))


def test_cameras_with_shares_play_every_image_once() -> None:
    names = []
    for index in range(3):
        made = OwnerConfig(action="play", share=[index, 3])
        made.data.name, made.data.limit = "digits", 20
        shots, dataset = owner_devices._shots(made)
        names += [shot().name for shot in shots]
    assert dataset == "digits" and sorted(names) == sorted(f"image {n + 1}" for n in range(20))
