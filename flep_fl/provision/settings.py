"""Settings that provisioning decides on: names, TLS, and shared settings that change with the sites."""

from __future__ import annotations

import copy
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flep_fl.config import Config, to_config
from flep_fl.contracts.errors import ConfigError
from flep_fl.provision.certificates import general_name
from flep_fl.provision.identities import CLOUD, DEALER, OWNER

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
Shared = Mapping[str, Any]
Revise = Callable[[Shared], Shared]
Settle = Callable[[Shared, int], Shared]
"""``settle(shared, count)``: what a command makes of the settings of so many sites."""


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine alone."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_wanted(setting: str, *addresses: str, agreed: bool = False) -> bool:
    """Return whether the sites' port uses TLS and node authentication.

    Parameters
    ----------
    setting
        ``runtime.tls``: ``auto``, ``on`` or ``off``.
    *addresses
        HOST:PORT, as the kit names it and as the command line does.
    agreed
        Whether the kits were made for TLS, whatever their address.

    Raises
    ------
    ConfigError
        ``off`` where others could reach the port, or where the kits were made for TLS.
    """
    open_to_others = [address for address in addresses if not is_loopback(address)]
    if setting == "off" and (open_to_others or agreed):
        where = (
            f"the address {open_to_others[0]}"
            if open_to_others
            else "kits that were made with runtime.tls=on"
        )
        raise ConfigError(
            f"runtime.tls=off is not accepted for {where}",
            remedy="Leave runtime.tls=auto; the kits hold the certificates",
        )
    return setting == "on" or agreed or bool(open_to_others)


def validate_shared(shared: Mapping[str, Any], *, own: Sequence[str] = ()) -> None:
    """Check shared settings as if they had been given on a command line.

    ``own`` are dotted names of the user's own classes that the federation was made with; nothing is imported
    here, so naming them needs no further permission.

    Raises
    ------
    ConfigError
        As :func:`flep_fl.config.check`.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(shared)))
    if not isinstance(merged, DictConfig):  # pragma: no cover - merging mappings gives a mapping
        raise ConfigError("The shared settings are not a mapping")
    merged.allow_targets = list(own)
    to_config(merged)


def _own_classes(shared: Mapping[str, Any]) -> list[str]:
    """Return the dotted names among the settings that may name a class."""
    sections = [section for section in shared.values() if isinstance(section, Mapping)]
    values = [section.get(name) for section in sections for name in ("name", "scheme")]
    return [value for value in values if isinstance(value, str) and "." in value]


def settled(shared: Shared, sites: int, revise: Revise) -> Shared:
    """Set the number of sites, apply the caller's changes, and check that all of it fits together."""
    counted = copy.deepcopy(dict(shared))
    counted["federation"]["sites"] = sites
    own = _own_classes(counted)
    settled = revise(counted)
    validate_shared(settled, own=own)
    return settled


def without_sites(shared: Shared, sites: Sequence[str]) -> Shared:
    """Take sites out of the settings that name them."""
    changed = copy.deepcopy(dict(shared))
    for section, name in (("ckks", "contribute_only"), ("cloud", "trusting")):
        if isinstance(listed := changed[section].get(name), list):
            changed[section][name] = [site for site in listed if site not in sites]
    return changed


def check_names(sites: Sequence[str]) -> None:
    """Refuse names that are no usable folder names, reserved, or given twice.

    Raises
    ------
    ConfigError
        Naming the first one.
    """
    reserved = (CLOUD, OWNER, DEALER)
    for name in sites:
        if not _NAME.fullmatch(name) or name in reserved:
            raise ConfigError(
                f"sites holds the name {name!r}",
                expected="letters, digits, - and _, at most 64, none of " + ", ".join(map(repr, reserved)),
                remedy="Rename the site",
            )
    if len(set(sites)) != len(sites):
        raise ConfigError(
            "sites names one site twice", found=", ".join(sites), remedy="Give each its own name"
        )


def check_roles(shared: Shared, sites: Sequence[str]) -> None:
    """Refuse settings that name sites which the federation does not have.

    Raises
    ------
    ConfigError
        Naming them.
    """
    unknown = sorted(set(shared["ckks"].get("contribute_only") or ()) - set(sites))
    if unknown:
        raise ConfigError(
            f"ckks.contribute_only names {', '.join(unknown)}",
            expected="some of " + ", ".join(sites),
            remedy="Name sites of the federation",
        )


def host_names(address: str, hosts: Sequence[str]) -> list[str]:
    """Return the cloud's names for its certificate, that of its address first.

    Raises
    ------
    ConfigError
        One is unusable.
    """
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    names = list(dict.fromkeys((host, *hosts)))
    for name in names:
        general_name(name)
    return names
