"""``deploy/compose.yaml`` beside ``deploy/network.yaml``: written by hand, and they must not drift apart."""

from __future__ import annotations

import fnmatch
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from flep_fl.config import CONFIG_DIR
from flep_fl.data_owner.network import LISTENER_ROLES, PeerFilter, load_rules, parse_address
from flep_fl.provision.owner_config import OwnerConfig, register_owner, to_owner_config
from flep_fl.provision.owner_gateway import check_exposure

ROOT = Path(__file__).resolve().parents[3]
RULES = load_rules(ROOT / "deploy" / "network.yaml")
FILE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES, NETWORKS = FILE["services"], FILE["networks"]


def subnet(name: str) -> Any:
    (config,) = NETWORKS[name]["ipam"]["config"]
    return ip_network(config["subnet"])


def address(service: str, network: str) -> Any:
    return ip_address(SERVICES[service]["networks"][network]["ipv4_address"])


@pytest.fixture(scope="module")
def settings() -> OwnerConfig:
    """Read the gateway's command as the command itself does."""
    python, flag, module, *overrides = SERVICES["gateway"]["command"]
    assert (python, flag, module) == ("python", "-m", "scripts.owner")
    register_owner()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_owner_config(
            compose("owner", overrides=[one for one in overrides if not one.startswith("hydra.")])
        )


def test_the_gateway_serves_by_the_rules_that_are_shipped(settings: OwnerConfig) -> None:
    assert settings.action == "serve" and settings.tls
    assert settings.network is not None
    assert settings.network.removeprefix("/app/") == "deploy/network.yaml"
    check_exposure(settings)
    for listener in LISTENER_ROLES:
        PeerFilter(RULES, listener, parse_address(getattr(settings, listener).address)[1])


@pytest.mark.parametrize(("network", "listener"), [("devices", "ingest"), ("analysts", "release")])
def test_a_listeners_peers_are_one_network(network: str, listener: str) -> None:
    """All of a network may reach its listener by the rules, and no other network may."""
    peers = PeerFilter(RULES, listener, RULES.ports[listener])
    inside, outside = subnet(network), [subnet(other) for other in NETWORKS if other != network]
    (rule,) = [r for r in RULES.group("gateway") if r.direction == "in" and r.port == RULES.ports[listener]]
    assert rule.networks == (inside,)
    assert peers.allows(str(inside[2]))
    assert not any(peers.allows(str(other[2])) for other in outside)


def test_only_the_gateway_is_in_more_than_one_network_and_nothing_is_published() -> None:
    assert set(SERVICES["gateway"]["networks"]) == set(NETWORKS) == {"devices", "database", "analysts"}
    for name, service in SERVICES.items():
        assert "ports" not in service and service.get("network_mode") is None
        if name != "gateway":
            assert list(service["networks"]) == ["database"]
        for network in service["networks"]:
            assert address(name, network) in subnet(network)
    assert all(network["internal"] is True for network in NETWORKS.values())
    subnets = [subnet(name) for name in NETWORKS]
    assert not any(a.overlaps(b) for a in subnets for b in subnets if a is not b)


def test_the_database_is_where_the_rules_let_the_gateway_go() -> None:
    (rule,) = [r for r in RULES.group("gateway") if r.direction == "out" and r.role == "database"]
    assert [ip_network(str(address("database", "database")))] == list(rule.networks)
    assert rule.port == RULES.ports["database"] == 5432


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "devices", "pid", "ipc"} & service.keys()


def test_secrets_are_files_that_are_not_in_the_project() -> None:
    for secret in FILE["secrets"].values():
        assert not (ROOT / "deploy" / secret["file"]).exists()
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert "POSTGRES_PASSWORD:" not in text and "environment" not in SERVICES["gateway"]


def test_a_checkouts_secrets_do_not_get_into_the_image() -> None:
    """The build context is an allow-list: a home, kits and data that lie in a checkout stay out."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")]
    assert lines[0] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    for private in ("owner", "kits", "archive", "devices", "outputs", ".git", ".venv", "owner.db"):
        assert not any(fnmatch.fnmatch(private, one) for one in allowed)
    assert all((ROOT / one).exists() for one in allowed)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert packages <= set(allowed), "the image has every package that is installed"
    tracked = subprocess.run(
        ["git", "ls-files", "--", *allowed], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode == 0:
        assert not [name for name in tracked.stdout.split() if name.endswith((".key", ".db", ".log"))]
