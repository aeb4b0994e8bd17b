"""``python -m scripts.provision``: from hydra's configuration to the operations, and what people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from flep_fl.config import SHARED_SECTIONS, Config, adopt_kit, shared_part, to_config
from flep_fl.contracts.errors import ConfigError, KitError
from flep_fl.entry import require
from flep_fl.provision.dealer import load_dealer
from flep_fl.provision.description import NAME as DESCRIPTION
from flep_fl.provision.description import decode_federation
from flep_fl.provision.fingerprints import fingerprints
from flep_fl.provision.identities import CLOUD, OWNER, Federation
from flep_fl.provision.manifest import read_manifest, verified_files
from flep_fl.provision.operations import (
    Change,
    add_sites,
    create_kits,
    revoke_sites,
    rotate_keys,
)
from flep_fl.provision.settings import Revise
from flep_fl.reporting.console import print_rows, say, warn_few_contributors

if TYPE_CHECKING:
    from omegaconf import DictConfig

ACTIONS = ("create", "add", "revoke", "rotate", "show")
SECRET = {"signing.key", "decryption.key", "node.key", "server.key"}
_CHANGEABLE = ("federation", "train")
_BY_SITE = ("ckks.contribute_only", "cloud.trusting")


def run_provision(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Do what ``action`` says, and print the fingerprints and what to hand to whom.

    Parameters
    ----------
    cfg
        What hydra composed.
    overrides
        The command line's overrides.

    Raises
    ------
    FlepError
        By name; nothing was changed then.
    """
    if cfg.action not in ACTIONS:
        raise ConfigError(
            f"action={cfg.action} is not known", expected="one of " + ", ".join(ACTIONS), remedy="Choose one"
        )
    if cfg.action == "show":
        require(cfg, "kit", "kits/a")
        _show(Path(cfg.kit))
        return
    require(cfg, "out", "kits")
    out = Path(cfg.out)
    given = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in overrides]
    if cfg.action == "create":
        require(cfg, "sites", "'[a,b,c]'")
        _create(cfg, out, counted="federation.sites" in given)
        return
    revise = _reviser(cfg, overrides)
    cloud: dict[str, Any] = {"hosts": cfg.provision.hosts and list(cfg.provision.hosts)}
    if "runtime.address" in given:
        cloud["address"] = str(cfg.runtime.address)
    if cfg.action == "rotate":
        if cfg.sites:
            raise ConfigError(
                "action=rotate is for all sites", remedy="Leave out sites=, or use add or revoke"
            )
        change = rotate_keys(out, revise=revise, **cloud)
    else:
        require(cfg, "sites", "'[d]'")
        operation = add_sites if cfg.action == "add" else revoke_sites
        change = operation(out, list(cfg.sites), revise=revise, **cloud)
    _report(change, out)


def _create(cfg: DictConfig, out: Path, *, counted: bool) -> None:
    if not counted:
        cfg.federation.sites = len(cfg.sites)
    config: Config = to_config(cfg)
    warn_few_contributors(config.federation.min_contributors, say)
    folders = create_kits(
        shared_part(config),
        config.sites,
        out,
        address=config.runtime.address,
        tls=config.runtime.tls,
        hosts=config.provision.hosts or (),
        server_days=config.provision.certificate_days,
        authority_days=config.provision.authority_days,
    )
    dealer = load_dealer(out)
    _print_fingerprints(dealer.ledger.federation, dealer.public_key)
    say(f"made {len(folders)} kits for cloud={config.cloud.trust}:")
    for folder in folders:
        say(f"  {folder}")
    say(
        "Hand each party its own kit over a safe channel, and compare fingerprints by telephone. "
        f"Whoever ran this is a trusted dealer: {out / 'dealer'} holds every model key, so keep it safe and "
        "to yourself, with a backup, and delete the private keys of the kits that you have handed over."
    )


def _reviser(cfg: DictConfig, overrides: Sequence[str]) -> Revise:
    """Return what applies the command line's changes to a federation's shared settings."""

    def revise(shared: Mapping[str, Any]) -> Mapping[str, Any]:
        changed = OmegaConf.create(dict(shared))
        others = []
        for override in overrides:
            key = override.lstrip("+~").partition("=")[0]
            if key in _BY_SITE:
                new = [name for name in OmegaConf.select(cfg, key) or [] if name in cfg.sites]
                old = OmegaConf.select(changed, key) or []
                if cfg.action == "add":
                    OmegaConf.update(changed, key, [*old, *(name for name in new if name not in old)])
            elif key.partition(".")[0] in _CHANGEABLE and "." in key and key != "federation.sites":
                OmegaConf.update(changed, key, OmegaConf.select(cfg, key))
            elif key.partition(".")[0] in SHARED_SECTIONS:
                others.append(override)
        plain = OmegaConf.to_container(changed)
        if not isinstance(plain, dict):  # pragma: no cover - it was made from a mapping
            raise ConfigError("The shared settings are not a mapping")
        settled = {str(section): value for section, value in plain.items()}
        # Whatever else the command line says must be what the federation has.
        adopt_kit(cfg, settled, others)
        return settled

    return revise


def _report(change: Change, out: Path) -> None:
    federation = change.federation
    if change.resumed:
        say("the same command had been interrupted; it is finished now")
    if change.finished:
        say(f"another command had been interrupted and was finished first: {change.finished}")
    _print_fingerprints(federation, change.dealer)
    say(
        f"{change.action}: generation {federation.generation}, revision {federation.revision}, "
        f"{len(federation.sites)} sites; stop all parties, copy these files, then start them again:"
    )
    for party in (CLOUD, OWNER, *federation.sites):
        names = sorted(change.files[party])
        if party in change.new:
            say(f"  {out / party}: the whole kit, over a safe channel")
        else:
            public = [name for name in names if name not in SECRET]
            say(f"  {out / party}: {' '.join(public)}")
    say("Files of sites that had a kit already need no secret channel: keys are encrypted to the site.")
    if change.action == "revoke":
        say(
            f"The kits of {', '.join(change.sites)} are left as they were; they are of no use any more. What "
            "was sent under the old keys stays readable to whoever holds them"
        )


def _show(folder: Path) -> None:
    """Print the fingerprints as the holder of one kit sees them."""
    if not (folder / DESCRIPTION).exists():
        raise KitError(f"There is no startup kit in {folder}", remedy="Give kit= a kit's folder")
    manifest = read_manifest(folder)
    files = verified_files(folder, manifest)
    _print_fingerprints(decode_federation(files[DESCRIPTION], folder / DESCRIPTION), manifest.dealer)


def _print_fingerprints(federation: Federation, dealer: bytes) -> None:
    transport = "TLS and node authentication on" if federation.tls else "no TLS (loopback)"
    print_rows(
        f"federation {federation.federation}, cloud at {federation.address}, {transport}",
        ("who", "fingerprint"),
        fingerprints(federation, dealer),
    )
