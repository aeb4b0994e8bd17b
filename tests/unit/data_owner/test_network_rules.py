"""Network rules: default deny, one source for the gateway and for the kernel."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flep_fl.contracts.errors import NetworkRuleError
from flep_fl.data_owner.network import PeerFilter, compile_nftables, load_rules, parse_rules

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = [ROOT / "conf" / "network.yaml", ROOT / "deploy" / "network.yaml"]
RULES = {
    "ports": {"ingest": 8441, "release": 8442, "admin": 8443, "database": 5432},
    "groups": {
        "gateway": [
            {"direction": "in", "role": "device", "cidr": ["10.1.0.0/24", "fd00:1::/64"], "port": "ingest"},
            {"direction": "in", "role": "analyst", "cidr": "10.4.0.0/24", "port": 8442},
            {"direction": "out", "role": "database", "cidr": "10.3.0.2/32", "port": "database"},
        ],
        "database": None,
    },
}


def changed(**change: object) -> dict[str, object]:
    content = copy.deepcopy(RULES)
    content["groups"]["gateway"][0].update(change)  # type: ignore[index]
    return content


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_the_rules_that_ship_are_valid(path: Path) -> None:
    rules = load_rules(path)
    for listener in ("ingest", "release", "admin"):
        PeerFilter(rules, listener, rules.ports[listener])
    for group in rules.groups:
        compile_nftables(rules, group)


@pytest.mark.parametrize(
    ("listener", "peer", "allowed"),
    [
        ("ingest", "10.1.0.9", True),
        ("ingest", "fd00:1::9", True),
        ("ingest", "::ffff:10.1.0.9", True),
        ("ingest", "10.4.0.9", False),
        ("ingest", "10.1.1.9", False),
        ("ingest", "::ffff:10.4.0.9", False),
        ("ingest", "fd00:2::9", False),
        ("ingest", "127.0.0.1", False),
        ("ingest", "", False),
        ("ingest", "x", False),
        ("release", "10.4.0.9", True),
        ("release", "10.1.0.9", False),
        ("admin", "10.1.0.9", False),
        ("admin", "127.0.0.1", False),
    ],
)
def test_the_gateway_denies_by_default(listener: str, peer: str, allowed: bool) -> None:
    assert PeerFilter(parse_rules(RULES), listener, RULES["ports"][listener]).allows(peer) is allowed


def test_an_outgoing_rule_lets_nobody_in() -> None:
    rules = parse_rules(changed(direction="out"))
    assert not PeerFilter(rules, "ingest", 8441).allows("10.1.0.9")


def test_a_listener_elsewhere_than_the_rules_say_is_refused() -> None:
    with pytest.raises(NetworkRuleError, match="8441"):
        PeerFilter(parse_rules(RULES), "ingest", 9000)


def test_a_listener_opened_to_a_foreign_role_is_refused() -> None:
    rules = parse_rules(changed(role="analyst"))
    with pytest.raises(NetworkRuleError, match="only device"):
        PeerFilter(rules, "ingest", 8441)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "rule 1 of group gateway has no direction"),
        ({"role": "Device"}, "role"),
        ({"role": 7}, "role"),
        ({"port": "ftp"}, "port"),
        ({"port": 0}, "port"),
        ({"port": True}, "port"),
        ({"cidr": "10.1.0.9/24"}, "CIDR"),
        ({"cidr": "everywhere"}, "CIDR"),
        ({"cidr": 10}, "CIDR"),
        ({"cidr": []}, "no network"),
        ({"cidr": ["10.1.0.0/16", "10.1.2.0/24"]}, "overlap"),
        ({"allow": True}, "incomplete"),
    ],
)
def test_a_wrong_rule_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(NetworkRuleError, match=message):
        parse_rules(changed(**change))


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"ports": {}},
        {"ports": [], "groups": {}},
        {"ports": {"ingest": "8441"}, "groups": {}},
        {"ports": {"ingest": 1, "release": 1}, "groups": {}},
        {"ports": {}, "groups": {"gateway": {}}},
        {"ports": {}, "groups": {"gateway": ["x"]}},
        {"ports": {}, "groups": {"A B": []}},
    ],
)
def test_wrong_files_are_named(content: object) -> None:
    with pytest.raises(NetworkRuleError):
        parse_rules(content)


@pytest.mark.parametrize("text", ["{", "a: [", "!!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "network.yaml").write_text(text)
    with pytest.raises(NetworkRuleError, match=r"network\.yaml"):
        load_rules(tmp_path / "network.yaml")
    with pytest.raises(NetworkRuleError, match="cannot be read"):
        load_rules(tmp_path / "missing.yaml")


def test_the_ruleset_is_pinned() -> None:
    assert compile_nftables(parse_rules(RULES), "gateway").splitlines()[1:] == [
        "table inet flep",
        "delete table inet flep",
        "table inet flep {",
        "  chain input {",
        "    type filter hook input priority filter; policy drop;",
        "    ct state established,related accept",
        "    ct state invalid drop",
        '    iif "lo" accept',
        "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept",
        '    ip saddr { 10.1.0.0/24 } tcp dport 8441 ct state new accept comment "device"',
        '    ip6 saddr { fd00:1::/64 } tcp dport 8441 ct state new accept comment "device"',
        '    ip saddr { 10.4.0.0/24 } tcp dport 8442 ct state new accept comment "analyst"',
        '    counter comment "denied"',
        "  }",
        "  chain output {",
        "    type filter hook output priority filter; policy drop;",
        "    ct state established,related accept",
        "    ct state invalid drop",
        '    oif "lo" accept',
        "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept",
        '    ip daddr { 10.3.0.2/32 } tcp dport 5432 ct state new accept comment "database"',
        '    counter comment "denied"',
        "  }",
        "  chain forward {",
        "    type filter hook forward priority filter; policy drop;",
        "  }",
        "}",
    ]


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(NetworkRuleError, match="one of database, gateway"):
        compile_nftables(parse_rules(RULES), "cloud")


@pytest.mark.skipif(shutil.which("nft") is None, reason="needs the program nft (Debian: nftables)")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_nft_takes_the_ruleset(path: Path) -> None:
    rules = load_rules(path)
    for group in rules.groups:
        done = subprocess.run(
            ["nft", "--check", "--file", "-"],
            input=compile_nftables(rules, group),
            text=True,
            capture_output=True,
        )
        if "Operation not permitted" in done.stderr:
            pytest.skip("nft needs root")
        assert done.returncode == 0, done.stderr


def test_the_compose_file_has_the_networks_of_the_rules() -> None:
    rules = load_rules(SHIPPED[1])
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    subnets = {name: network["ipam"]["config"][0]["subnet"] for name, network in compose["networks"].items()}
    sources = {
        rule.role: [str(network) for network in rule.networks]
        for rule in rules.group("gateway")
        if rule.direction == "in"
    }
    assert sources["device"] == [subnets["devices"]]
    assert sources["analyst"] == [subnets["analysts"]]
    assert all(network["internal"] for network in compose["networks"].values())
    members = {name: set(service["networks"]) for name, service in compose["services"].items()}
    assert members == {"gateway": {"devices", "database", "analysts"}, "database": {"database"}}
    assert not any("ports" in service for service in compose["services"].values())
