"""Network security groups: one YAML file of rules, enforced by the gateway and compiled for nftables.

The file names hosts' *groups* and, for each, what may come in and go out; whatever no rule allows is denied::

    ports: {ingest: 8441, release: 8442, admin: 8443, database: 5432}
    groups:
      gateway:
        - {direction: in, role: device, cidr: [10.77.1.0/24], port: ingest}
        - {direction: out, role: database, cidr: [10.77.3.2/32], port: database}
      database:
        - {direction: in, role: gateway, cidr: [10.77.2.2/32], port: database}

Inside the gateway the rules of the group ``gateway`` decide, by a peer's address, which role it may have at a
listener; :func:`compile_nftables` turns any group into a ruleset for that host's kernel. Both read the same
:class:`NetworkRules`, so they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from flep_fl.contracts.errors import ConfigError, NetworkRuleError

Network = IPv4Network | IPv6Network

DIRECTIONS = ("in", "out")
LISTENER_ROLES: Mapping[str, frozenset[str]] = {
    "ingest": frozenset(("device",)),
    "release": frozenset(("analyst",)),
    "admin": frozenset(("operator",)),
}
"""Which roles a listener of the gateway serves; a rule that opens it to another role is refused."""

GATEWAY = "gateway"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_PEERS_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is allowed.

    Attributes
    ----------
    direction
        "in" or "out", seen from the host of the group.
    role
        What the other end is.
    networks
        The other end's addresses.
    port
        TCP port: this host's for "in", the other end's for "out".
    """

    direction: str
    role: str
    networks: tuple[Network, ...]
    port: int


@dataclass(frozen=True, slots=True)
class NetworkRules:
    """The content of a rules file.

    Attributes
    ----------
    ports
        Port numbers by name; the gateway's listeners are ``ingest``, ``release`` and ``admin``.
    groups
        What is allowed, by group; a group without a rule is closed.
    """

    ports: Mapping[str, int]
    groups: Mapping[str, tuple[Rule, ...]]

    def group(self, name: str) -> tuple[Rule, ...]:
        """Return a group's rules.

        Raises
        ------
        NetworkRuleError
            There is no such group.
        """
        if name not in self.groups:
            raise NetworkRuleError(
                f"the network rules have no group {name}", expected="one of " + ", ".join(sorted(self.groups))
            )
        return self.groups[name]


class PeerFilter:
    """Which peers may speak to one listener of the gateway: default deny.

    Parameters
    ----------
    rules
        The rules.
    listener
        "ingest", "release" or "admin".
    port
        The port that the listener is bound to; 0 (any) is not compared.

    Raises
    ------
    NetworkRuleError
        The rules give the listener another port, or open it to a role that it does not serve.
    """

    def __init__(self, rules: NetworkRules, listener: str, port: int) -> None:
        named = rules.ports.get(listener)
        if named is None:
            raise NetworkRuleError(f"the network rules name no port for {listener}", remedy="Add it to ports")
        if port not in (0, named):
            raise NetworkRuleError(
                f"the {listener} listener is bound to another port than the network rules say",
                expected=named,
                found=port,
                remedy="Change one of the two: what is enforced must be what is written",
            )
        self._networks: list[Network] = []
        for rule in rules.group(GATEWAY):
            if rule.direction != "in" or rule.port != named:
                continue
            if rule.role not in LISTENER_ROLES[listener]:
                raise NetworkRuleError(
                    f"the network rules open {listener} to the role {rule.role}",
                    expected="only " + ", ".join(sorted(LISTENER_ROLES[listener])),
                )
            self._networks += rule.networks
        self.allows = lru_cache(maxsize=_PEERS_REMEMBERED)(self._allows)

    def _allows(self, address: str) -> bool:
        """Say whether a peer with this address (as the socket names it) may speak."""
        try:
            peer = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(peer, IPv6Address) and peer.ipv4_mapped is not None:
            peer = peer.ipv4_mapped
        return any(peer.version == network.version and peer in network for network in self._networks)


def load_rules(path: Path) -> NetworkRules:
    """Read a rules file.

    Raises
    ------
    NetworkRuleError
        The file cannot be read, is not YAML, or a rule is not valid; the message names group and position.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise NetworkRuleError(f"the network rules cannot be read: {path}", remedy="Check network=") from exc
    except yaml.YAMLError as exc:
        raise NetworkRuleError(
            f"the network rules are not YAML: {path} ({str(exc).splitlines()[0]})"
        ) from exc
    try:
        return parse_rules(content)
    except NetworkRuleError as exc:
        raise NetworkRuleError(
            f"{path}: {exc.problem}", expected=exc.expected, found=exc.found, remedy=exc.remedy
        ) from exc


def parse_rules(content: object) -> NetworkRules:
    """Check the content of a rules file; errors as :func:`load_rules`."""
    if not isinstance(content, dict) or content.keys() != {"ports", "groups"}:
        raise NetworkRuleError("the network rules are incomplete", expected="the keys ports and groups")
    ports, groups = content["ports"], content["groups"]
    if not isinstance(ports, dict) or not all(_is_name(name) for name in ports):
        raise NetworkRuleError("ports is not a mapping of names to numbers")
    for name, port in ports.items():
        if not _is_port(port):
            raise NetworkRuleError(f"the port {name} is out of range", expected="1..65535", found=port)
    if len(set(ports.values())) != len(ports):
        # Two listeners on one port would make a role of one a role of the other.
        raise NetworkRuleError("two names have one port", found=ports)
    if not isinstance(groups, dict) or not all(_is_name(name) for name in groups):
        raise NetworkRuleError("groups is not a mapping of names to lists of rules")
    parsed: dict[str, tuple[Rule, ...]] = {}
    for group, rules in groups.items():
        if rules is not None and not isinstance(rules, list):
            raise NetworkRuleError(f"group {group} is not a list of rules")
        parsed[group] = tuple(
            _parse_rule(rule, ports, f"rule {number} of group {group}")
            for number, rule in enumerate(rules or [], start=1)
        )
    return NetworkRules(ports, parsed)


def parse_address(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` (IPv6 in brackets).

    Raises
    ------
    ConfigError
        It is not such an address.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{text} is no address", expected="HOST:PORT", remedy="Such as 127.0.0.1:8441")
    return host.strip("[]"), int(port)


def compile_nftables(rules: NetworkRules, group: str) -> str:
    """Compile a group into a ruleset for ``nft -f``.

    It replaces the table ``inet flep``, if there is one, in one transaction, and leaves other tables alone.
    Everything is dropped but: replies, the loopback interface, IPv6 neighbour discovery, and what the group
    allows. Nothing is forwarded.

    Raises
    ------
    NetworkRuleError
        There is no such group.
    """
    chosen = rules.group(group)
    return "\n".join(
        [
            "# Generated by `python -m scripts.owner action=rules`; edit the YAML instead.",
            "table inet flep",
            "delete table inet flep",
            "table inet flep {",
            *_chain("input", "iif", [line for rule in chosen for line in _lines(rule, "in")]),
            *_chain("output", "oif", [line for rule in chosen for line in _lines(rule, "out")]),
            "  chain forward {",
            "    type filter hook forward priority filter; policy drop;",
            "  }",
            "}",
            "",
        ]
    )


def _chain(hook: str, interface: str, allowed: Sequence[str]) -> list[str]:
    return [
        f"  chain {hook} {{",
        f"    type filter hook {hook} priority filter; policy drop;",
        "    ct state established,related accept",
        "    ct state invalid drop",
        f'    {interface} "lo" accept',
        "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept",
        *allowed,
        '    counter comment "denied"',
        "  }",
    ]


def _lines(rule: Rule, direction: str) -> list[str]:
    if rule.direction != direction:
        return []
    side = "saddr" if direction == "in" else "daddr"
    found = []
    for version, family in ((4, "ip"), (6, "ip6")):
        networks = [str(network) for network in rule.networks if network.version == version]
        if networks:
            found.append(
                f"    {family} {side} {{ {', '.join(networks)} }} tcp dport {rule.port} ct state new accept "
                f'comment "{rule.role}"'
            )
    return found


def _parse_rule(rule: object, ports: Mapping[str, int], where: str) -> Rule:
    if not isinstance(rule, dict) or rule.keys() != {"direction", "role", "cidr", "port"}:
        raise NetworkRuleError(f"{where} is incomplete", expected="direction, role, cidr and port")
    direction, role, port = rule["direction"], rule["role"], rule["port"]
    if direction not in DIRECTIONS:
        raise NetworkRuleError(f"{where} has no direction", expected="in or out", found=direction)
    if not _is_name(role):
        raise NetworkRuleError(f"{where} has no usable role", expected="a lower-case name", found=role)
    number: Any = ports.get(port) if isinstance(port, str) else port
    if not _is_port(number):
        raise NetworkRuleError(f"{where} names an unknown port", expected="a number or a name", found=port)
    return Rule(direction, role, _networks(rule["cidr"], where), int(number))


def _networks(cidr: Any, where: str) -> tuple[Network, ...]:
    found: list[Network] = []
    for text in cidr if isinstance(cidr, list) else [cidr]:
        try:
            if not isinstance(text, str):
                raise ValueError
            found.append(ip_network(text))
        except ValueError as exc:
            raise NetworkRuleError(
                f"{where} has no usable network", expected="a CIDR such as 10.77.1.0/24", found=text
            ) from exc
    versions = {version: [n for n in found if n.version == version] for version in (4, 6)}
    if not found or any(
        one.overlaps(other)
        for networks in versions.values()
        for at, one in enumerate(networks)
        for other in networks[at + 1 :]
    ):
        raise NetworkRuleError(f"{where} has no network, or two that overlap", found=cidr)
    return tuple(found)


def _is_name(text: object) -> bool:
    return isinstance(text, str) and _NAME.match(text) is not None


def _is_port(value: object) -> bool:
    return type(value) is int and 0 < value < 65536
