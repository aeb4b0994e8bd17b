"""Create a federation's kits; add and revoke sites; rotate keys.

Whoever runs these is a trusted dealer: it draws every party's keys.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.config import canonical_json
from flep_fl.contracts.differences import differences
from flep_fl.contracts.errors import ConfigError, KitError, ProvisionInterruptedError
from flep_fl.contracts.files import write_secret
from flep_fl.provision import certificates
from flep_fl.provision.dealer import STATE, Dealer, Ledger, load_dealer
from flep_fl.provision.description import NAME as DESCRIPTION
from flep_fl.provision.description import KitDescriptions
from flep_fl.provision.identities import (
    CLOUD,
    DEALER,
    OWNER,
    Federation,
    GenerationKeys,
)
from flep_fl.provision.issue import (
    PREVIOUS_KEPT,
    earlier_keys_for,
    keys_for,
    new_site,
    sealed_kit,
)
from flep_fl.provision.loading import previous_name
from flep_fl.provision.manifest import NAME as MANIFEST
from flep_fl.provision.settings import (
    Revise,
    Settle,
    Shared,
    check_names,
    check_roles,
    host_names,
    is_loopback,
    settled,
    tls_wanted,
    without_sites,
)
from flep_fl.provision.transaction import (
    CREATING,
    begun,
    commit,
    locked,
    remove,
    resume,
    staged,
    write_folder,
)


@dataclass(frozen=True, slots=True)
class Change:
    """What a command did.

    Attributes
    ----------
    action, sites
        What was asked for.
    federation
        As it is now.
    dealer
        The dealer's public key, 32 bytes.
    files
        Names of the files that each party needs now, by party.
    new
        Sites that have no kit yet.
    resumed
        Whether the same command had been interrupted, and was finished now instead of done a second time.
    finished
        Another command that had been interrupted and was finished before this one; empty if there was none.
        ``files`` are all files then.
    """

    action: str
    sites: tuple[str, ...]
    federation: Federation
    dealer: bytes
    files: Mapping[str, Sequence[str]]
    new: tuple[str, ...] = ()
    resumed: bool = False
    finished: str = ""


def create_kits(
    shared: Shared,
    sites: Sequence[str],
    out: Path,
    *,
    address: str,
    tls: str = "auto",
    hosts: Sequence[str] = (),
    server_days: int = 365,
    authority_days: int = 3650,
) -> list[Path]:
    """Make the kits of a new federation under ``out``, and the dealer's own folder.

    Parameters
    ----------
    shared
        The shared settings (:func:`flep_fl.config.shared_part`).
    sites
        Names of the sites; letters, digits, ``-`` and ``_``.
    out
        Folder for the kits; must not hold kits already.
    address
        HOST:PORT at which sites reach the cloud.
    tls
        ``auto``, ``on`` or ``off`` (on loopback only): TLS and node authentication of that port.
    hosts
        Further names and addresses of the cloud, for its certificate.
    server_days, authority_days
        How long the cloud's certificate and the authority's are valid.

    Returns
    -------
    list of Path
        The folders: the cloud's, the owner's, the sites'.

    Raises
    ------
    ConfigError
        When a name or an address is unusable or ``out`` holds kits.
    """
    check_names(sites)
    check_roles(shared, sites)
    wanted = tls_wanted(tls, address)
    names = host_names(address, hosts)
    with locked(out):
        _make_room(out, (CLOUD, OWNER, *sites))
        # Until this mark is gone, the kits are refused, and the same command starts from the beginning.
        write_secret(out / CREATING, json.dumps([CLOUD, OWNER, *sites]).encode())
        dealer, fresh = _found(
            shared, sites, address=address, tls=wanted, names=names, days=(server_days, authority_days)
        )
        digests: dict[str, Mapping[str, str]] = {}
        for party, files, digest in _kits(dealer, fresh):
            write_folder(out / party, files)
            digests[party] = digest
        dealer = replace(dealer, ledger=replace(dealer.ledger, files=digests))
        prefix = f"{DEALER}/"
        write_folder(out / DEALER, {name.removeprefix(prefix): data for name, data in dealer.files().items()})
        remove(out / CREATING)
    return [out / party for party in digests]


def add_sites(
    out: Path, sites: Sequence[str], *, revise: Revise = lambda shared: shared, **cloud: Any
) -> Change:
    """Make kits for further sites, and refresh what all others know; keys stay as they are.

    Parameters
    ----------
    out
        The folder that :func:`create_kits` filled.
    sites
        Names of the new sites.
    revise
        Changes the shared settings, which have the new number of sites already.
    **cloud
        ``address`` and ``hosts`` of the cloud, where they change.

    Raises
    ------
    ConfigError
        A name is unusable or taken, or the settings do not fit so many sites.
    KitError
        The dealer's folder is missing or damaged.
    """
    check_names(sites)

    def settle(shared: Shared, count: int) -> Shared:
        return settled(shared, count + len(sites), revise)

    def change(dealer: Dealer) -> tuple[Dealer, dict[str, dict[str, bytes]], list[str]]:
        old = dealer.ledger.federation
        taken = [name for name in sites if name in old.sites or (out / name / DESCRIPTION).exists()]
        if taken:
            raise ConfigError(
                f"{', '.join(taken)}: there is such a site, or a kit of that name in {out}",
                remedy="Choose another name; for new keys, revoke the site, remove its old kit and add it",
            )
        _refuse_occupied(out, sites)
        shared = settle(old.shared, len(old.sites))
        check_roles(shared, [*old.sites, *sites])
        new = {name: new_site(name, shared) for name in sites}
        federation = replace(
            old,
            revision=old.revision + 1,
            shared=shared,
            sites={**old.sites, **{name: site.identity for name, site in new.items()}},
        )
        ledger = replace(
            dealer.ledger,
            federation=federation,
            joined={**dealer.ledger.joined, **dict.fromkeys(sites, old.generation)},
        )
        changed, fresh = _with_cloud(replace(dealer, ledger=ledger), renew=False, **cloud)
        federation = changed.ledger.federation
        for name, site in new.items():
            fresh[name] = {
                **site.secrets,
                "ca.crt": dealer.ca,
                **keys_for(name, dealer.keys, federation, dealer.signing_key),
            }
        return changed, fresh, []

    return _apply(out, "add", sites, change, settle, **cloud)


def revoke_sites(
    out: Path, sites: Sequence[str], *, revise: Revise = lambda shared: shared, **cloud: Any
) -> Change:
    """Shut sites out, and rotate both keys, which they know.

    Parameters
    ----------
    out
        The folder that :func:`create_kits` filled.
    sites
        Names of the sites. Their old kits stay where they are, and are of no use any more.
    revise
        Changes the shared settings, which have the new number of sites already.
    **cloud
        ``address`` and ``hosts`` of the cloud, where they change.

    Raises
    ------
    ConfigError
        There is no such site, or the settings do not fit so few.
    KitError
        The dealer's folder is missing or damaged.
    """
    check_names(sites)

    def settle(shared: Shared, count: int) -> Shared:
        return settled(without_sites(shared, sites), count - len(sites), revise)

    def change(dealer: Dealer) -> tuple[Dealer, dict[str, dict[str, bytes]], list[str]]:
        known = dealer.ledger.federation.sites
        unknown = [name for name in sites if name not in known]
        if unknown:
            raise ConfigError(
                f"sites names {', '.join(unknown)}, which the federation does not have",
                expected="some of " + ", ".join(known),
                remedy="Name the sites to revoke",
            )
        return _rotated(dealer, without=sites, settle=settle, **cloud)

    return _apply(out, "revoke", sites, change, settle, **cloud)


def rotate_keys(out: Path, *, revise: Revise = lambda shared: shared, **cloud: Any) -> Change:
    """Give the federation a new model key, a new check key and a new certificate of the cloud.

    Parameters
    ----------
    out
        The folder that :func:`create_kits` filled.
    revise
        Changes the shared settings.
    **cloud
        ``address`` and ``hosts`` of the cloud, where they change.

    Raises
    ------
    KitError
        The dealer's folder is missing or damaged.
    """

    def settle(shared: Shared, count: int) -> Shared:
        return settled(shared, count, revise)

    def change(dealer: Dealer) -> tuple[Dealer, dict[str, dict[str, bytes]], list[str]]:
        return _rotated(dealer, without=(), settle=settle, **cloud)

    return _apply(out, "rotate", (), change, settle, **cloud)


# --- the parts -----------------------------------------------------------------------------------


def _make_room(out: Path, parties: Sequence[str]) -> None:
    """Refuse to overwrite kits or anything else; remove what an interrupted creation left.

    What it left is in folders that were empty when it began, for it would not have begun otherwise.
    """
    mark = out / CREATING
    for rest in out.glob(f".{CREATING}.*"):
        rest.unlink()  # a killed command's half-written mark
    if mark.exists():
        try:
            begun = [str(party) for party in json.loads(mark.read_bytes())]
        except (ValueError, TypeError) as exc:
            raise KitError(f"{mark} is damaged", remedy="Remove it and what lies beside it") from exc
        for party in (*begun, DEALER):
            shutil.rmtree(staged(out / party), ignore_errors=True)
            for path in (out / party).glob("*"):
                if path.is_file():
                    path.unlink()
        return
    taken = [name for name in parties if (out / name / DESCRIPTION).exists()]
    if (out / DEALER / STATE).exists():
        taken.append(DEALER)
    if taken:
        raise ConfigError(
            f"{out} already holds kits ({', '.join(taken)}); new keys would make them useless",
            remedy="Choose another out= or remove the old kits yourself; to change a federation, use "
            "action=add, revoke or rotate",
        )
    _refuse_occupied(out, (*parties, DEALER))


def _refuse_occupied(out: Path, parties: Sequence[str]) -> None:
    """Refuse to write kits into folders that hold anything."""
    for party in parties:
        if (out / party).exists() and any((out / party).iterdir()):
            raise ConfigError(
                f"{out / party} holds other files already; no kit is written among them",
                remedy="Choose another out= or name, or empty that folder yourself",
            )


def _found(
    shared: Shared,
    sites: Sequence[str],
    *,
    address: str,
    tls: bool,
    names: Sequence[str],
    days: tuple[int, int],
) -> tuple[Dealer, dict[str, dict[str, bytes]]]:
    """Draw everybody's keys; return the dealer's part and the new files by party."""
    server_days, authority_days = days
    signing_key, ca_key = Ed25519PrivateKey.generate(), certificates.new_private_key()
    cloud_signing, owner_signing = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    cloud_decryption = X25519PrivateKey.generate() if shared["cloud"]["trust"] == "trusted" else None
    server_key = certificates.new_private_key()
    identifier = secrets.token_hex(16)
    ca = certificates.new_authority(ca_key, federation=identifier, days=authority_days)
    server_public = certificates.public_half(server_key)
    certificate = certificates.new_server_certificate(
        server_public, hosts=names, ca=ca, ca_key=ca_key, days=server_days
    )
    new = {name: new_site(name, shared) for name in sites}
    keys, context = _new_keys(1, shared)
    federation = Federation(
        federation=identifier,
        key_id=keys.key_id,
        address=address,
        cloud_verify_key=cloud_signing.public_key().public_bytes_raw(),
        owner_verify_key=owner_signing.public_key().public_bytes_raw(),
        sites={name: site.identity for name, site in new.items()},
        shared=shared,
        tls=tls,
        ca_fingerprint=certificates.fingerprint_of(ca),
        server_fingerprint=certificates.fingerprint_of(certificate),
        cloud_encryption_key=cloud_decryption.public_key().public_bytes_raw() if cloud_decryption else b"",
    )
    fresh: dict[str, dict[str, bytes]] = {
        CLOUD: {
            "signing.key": cloud_signing.private_bytes_raw(),
            "server.key": server_key,
            "server.crt": certificate,
            "ca.crt": ca,
            "model.context": context,
            **({"decryption.key": cloud_decryption.private_bytes_raw()} if cloud_decryption else {}),
            **keys_for(CLOUD, keys, federation, signing_key),
        },
        OWNER: {"signing.key": owner_signing.private_bytes_raw(), "ca.crt": ca},
    }
    for name, site in new.items():
        fresh[name] = {
            **site.secrets,
            "ca.crt": ca,
            **keys_for(name, keys, federation, signing_key),
        }
    ledger = Ledger(federation, tuple(names), server_days, server_public, {}, dict.fromkeys(sites, 1))
    return Dealer(ledger, signing_key, ca, ca_key, keys), fresh


def _rotated(
    dealer: Dealer,
    *,
    without: Sequence[str],
    settle: Settle,
    address: str | None = None,
    hosts: Sequence[str] | None = None,
) -> tuple[Dealer, dict[str, dict[str, bytes]], list[str]]:
    """Start the next generation, without some sites."""
    old, ledger = dealer.ledger.federation, dealer.ledger
    remaining = {name: site for name, site in old.sites.items() if name not in without}
    shared = settle(old.shared, len(old.sites))
    keys, context = _new_keys(old.generation + 1, shared)
    federation = replace(
        old,
        generation=keys.generation,
        revision=0,
        key_id=keys.key_id,
        sites=remaining,
        shared=shared,
    )
    outdated = previous_name(old.generation - PREVIOUS_KEPT)
    removed = [f"{name}/{outdated}" for name in remaining if outdated in ledger.files[name]]
    changed = replace(
        dealer,
        keys=keys,
        ledger=replace(
            ledger,
            federation=federation,
            files={
                party: {name: digest for name, digest in files.items() if name != outdated}
                for party, files in ledger.files.items()
                if party not in without
            },
            joined={name: ledger.joined[name] for name in remaining},
            revoked={**ledger.revoked, **dict.fromkeys(without, keys.generation)},
        ),
    )
    changed, fresh = _with_cloud(changed, renew=True, address=address, hosts=hosts)
    federation = changed.ledger.federation
    fresh.setdefault(CLOUD, {})["model.context"] = context
    for party in (CLOUD, *remaining):
        fresh.setdefault(party, {}).update(keys_for(party, keys, federation, dealer.signing_key))
        fresh[party].update(earlier_keys_for(party, dealer.keys, federation, dealer.signing_key))
    return changed, fresh, removed


def _with_cloud(
    dealer: Dealer, *, renew: bool, address: str | None = None, hosts: Sequence[str] | None = None
) -> tuple[Dealer, dict[str, dict[str, bytes]]]:
    """Change the cloud's address; make it a new certificate for its old key where needed."""
    ledger, federation = dealer.ledger, dealer.ledger.federation
    address = federation.address if address is None else address
    tls = federation.tls or not is_loopback(address)
    if hosts is None:
        host = address.rpartition(":")[0]
        hosts = ledger.hosts if host in ledger.hosts else (host, *ledger.hosts)
    names = host_names(address, hosts)
    federation = replace(federation, address=address, tls=tls)
    if not renew and set(names) == set(ledger.hosts):
        return replace(dealer, ledger=replace(ledger, federation=federation)), {}
    certificate = certificates.new_server_certificate(
        ledger.server_public_key,
        hosts=names,
        ca=dealer.ca,
        ca_key=dealer.ca_key,
        days=ledger.server_days,
    )
    federation = replace(federation, server_fingerprint=certificates.fingerprint_of(certificate))
    changed = replace(dealer, ledger=replace(ledger, federation=federation, hosts=tuple(names)))
    return changed, {CLOUD: {"server.crt": certificate}}


def _apply(
    out: Path,
    action: str,
    sites: Sequence[str],
    change: Callable[[Dealer], tuple[Dealer, dict[str, dict[str, bytes]], list[str]]],
    settle: Settle,
    *,
    address: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Change:
    """Read the dealer's folder, compute a change, and make it in one step."""
    request: dict[str, Any] = {
        "action": action,
        "sites": sorted(sites),
        "address": address,
        "hosts": None if hosts is None else list(hosts),
    }
    with locked(out):
        if (out / CREATING).exists():
            raise ProvisionInterruptedError(
                f"The creation of the kits in {out} was interrupted",
                remedy="Run the command with action=create again; nobody can have used these kits",
            )
        pending = begun(out)
        resumed = pending is not None and _is_repeated(pending, request, settle)
        resume(out)
        dealer = load_dealer(out)
        kits: Mapping[str, Mapping[str, bytes]] = {}
        if not resumed:
            old = dealer.ledger.federation
            changed, fresh, removed = change(dealer)
            dealer, kits = _sealed(changed, fresh)
            request["settings"] = {
                "before": old.shared,
                "sites": len(old.sites),
                "after": dealer.ledger.federation.shared,
            }
            content = {f"{party}/{name}": data for party, new in kits.items() for name, data in new.items()}
            commit(out, request, {**content, **dealer.files()}, removed)
        if pending is None:
            files = {party: sorted(new) for party, new in kits.items()}
        else:  # what the interrupted command wrote has reached nobody yet
            files = {party: sorted({*names, MANIFEST}) for party, names in dealer.ledger.files.items()}
    added = {*sites} if action == "add" else set()
    finished = ""
    if pending is not None and not resumed:
        finished = _described(pending)
        added |= {*pending["sites"]} if pending["action"] == "add" else set()
    federation = dealer.ledger.federation
    return Change(
        action,
        tuple(sites),
        federation,
        dealer.public_key,
        files,
        new=tuple(name for name in federation.sites if name in added),
        resumed=resumed,
        finished=finished,
    )


def _is_repeated(pending: Mapping[str, Any], request: Mapping[str, Any], settle: Settle) -> bool:
    """Whether the command that was interrupted is given again, and not another one.

    Raises
    ------
    ProvisionInterruptedError
        It is given again with other settings, and could not be done once more with these.
    """
    if any(pending.get(name) != request[name] for name in ("action", "sites")):
        return False
    settings = pending["settings"]
    # What the settings given now would have made of those before the command: an option left out counts too.
    now = json.loads(canonical_json(settle(settings["before"], settings["sites"])))
    found = differences(now, settings["after"])
    for key, name in (("runtime.address", "address"), ("provision.hosts", "hosts")):
        if request[name] != pending[name]:
            found.append((key, request[name], pending[name]))
    if found and request["action"] != "rotate":
        raise ProvisionInterruptedError(
            f"{_described(pending)} was interrupted and is not finished; it was given again with other "
            "settings, and nothing was done",
            expected=", ".join(f"{key}={then!r}" for key, _, then in found),
            found=", ".join(f"{key}={now!r}" for key, now, _ in found),
            remedy="Run it again with the settings of the first time; then change them with action=rotate",
        )
    return not found


def _described(pending: Mapping[str, Any]) -> str:
    """Return the command that was interrupted, as it is given."""
    settings = pending["settings"]
    changed = [
        (key, new)
        for key, new, _ in differences(settings["after"], settings["before"])
        if key != "federation.sites"
    ]
    sites = [f"sites=[{','.join(pending['sites'])}]"] if pending["sites"] else []
    given = [f"{key}={new}" for key, new in changed]
    return " ".join([f"action={pending['action']}", *sites, *given])


def _sealed(
    dealer: Dealer, fresh: Mapping[str, Mapping[str, bytes]]
) -> tuple[Dealer, dict[str, dict[str, bytes]]]:
    """Give every kit its description and manifest; note all digests in the dealer's ledger."""
    kits: dict[str, dict[str, bytes]] = {}
    digests: dict[str, Mapping[str, str]] = {}
    for party, files, digest in _kits(dealer, fresh):
        kits[party], digests[party] = files, digest
    return replace(dealer, ledger=replace(dealer.ledger, files=digests)), kits


def _kits(
    dealer: Dealer, fresh: Mapping[str, Mapping[str, bytes]]
) -> Iterator[tuple[str, dict[str, bytes], dict[str, str]]]:
    """Yield every party, its new files, and the digests of all of its files: one kit in memory at a time."""
    federation = dealer.ledger.federation
    descriptions = KitDescriptions(federation)
    for party in (CLOUD, OWNER, *federation.sites):
        yield (
            party,
            *sealed_kit(
                party,
                federation,
                descriptions,
                fresh.get(party, {}),
                dealer.ledger.files.get(party, {}),
                dealer.signing_key,
            ),
        )


def _new_keys(generation: int, shared: Shared) -> tuple[GenerationKeys, bytes]:
    """Draw a model key and a check key; return them, and the context without any key."""
    from flep_fl.model_security.keyring import CheckKey, ModelKey
    from flep_fl.model_security.profiles import get_profile

    ckks = shared["ckks"]
    profile = get_profile(ckks["profile"], ckks.get("encryption", "symmetric"))
    model_key = ModelKey.generate(profile)
    # Sites with the model key make public keys of their own; one is handed to those that only contribute.
    public = model_key.public_key(profile).to_bytes() if profile.encryption == "public" else None
    keys = GenerationKeys(
        generation, model_key.key_id, model_key.to_bytes(), public, CheckKey.generate().to_bytes()
    )
    return keys, model_key.public_context()
