"""Make and read startup kits.

Whoever makes the kits is a trusted dealer: for a moment it holds every key. Each kit is one folder,

- ``kit.json``: who takes part (public keys), the shared settings and their digest; no secret,
- ``signing.key``: this party's Ed25519 key,
- site: ``decryption.key`` (X25519), ``model.key`` (CKKS) and ``check.key``, which the cloud never has,
- owner: nothing more; its signature is what tells the sites that an archive is the owner's,
- cloud: ``model.context``, CKKS parameters without any key; a trusted cloud also ``model.key``.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.config import shared_digest
from flep_fl.contracts.errors import ConfigError, KitError
from flep_fl.contracts.files import read_bytes, write_atomic, write_secret
from flep_fl.model_security.profiles import get_profile

FORMAT = 1
CLOUD = "cloud"
OWNER = "owner"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class SiteIdentity:
    """A site's public keys, 32 raw bytes each."""

    name: str
    verify_key: bytes
    encryption_key: bytes


@dataclass(frozen=True, slots=True)
class Federation:
    """The public half of every kit.

    Attributes
    ----------
    federation
        Random identifier of the federation, 32 hex digits.
    key_id
        Identifier derived from the analysts' model key.
    cloud_verify_key, owner_verify_key
        The cloud's and the data owner's Ed25519 public keys, 32 bytes.
    sites
        The sites by name.
    shared
        The settings that all parties hold alike.
    address
        HOST:PORT at which sites reach the cloud.
    """

    federation: str
    key_id: str
    address: str
    cloud_verify_key: bytes
    owner_verify_key: bytes
    sites: Mapping[str, SiteIdentity]
    shared: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the shared settings."""
        return shared_digest(self.shared)

    def site_keys(self) -> dict[str, Ed25519PublicKey]:
        """Return the sites' signature keys by name."""
        return {name: Ed25519PublicKey.from_public_bytes(s.verify_key) for name, s in self.sites.items()}

    def cloud_key(self) -> Ed25519PublicKey:
        """Return the cloud's signature key."""
        return Ed25519PublicKey.from_public_bytes(self.cloud_verify_key)


@dataclass(frozen=True, slots=True)
class CloudKit:
    """What the cloud starts from. ``model_key`` is None unless the cloud is trusted."""

    folder: Path
    federation: Federation
    signing_key: Ed25519PrivateKey = field(repr=False)
    context: bytes = field(repr=False)
    model_key: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class OwnerKit:
    """What the data owner starts from; the image keys are its own affair and made when it seals."""

    folder: Path
    federation: Federation
    signing_key: Ed25519PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class SiteKit:
    """What one analyst starts from."""

    folder: Path
    name: str
    federation: Federation
    signing_key: Ed25519PrivateKey = field(repr=False)
    decryption_key: X25519PrivateKey = field(repr=False)
    model_key: bytes = field(repr=False)
    check_key: bytes = field(repr=False)


def create_kits(shared: Mapping[str, Any], sites: Sequence[str], out: Path, *, address: str) -> list[Path]:
    """Make the kits of a new federation under ``out``: one folder per site, one each for cloud and owner.

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

    Returns
    -------
    list of Path
        The folders: the cloud's, the owner's, the sites'.

    Raises
    ------
    ConfigError
        When a name is unusable or ``out`` holds kits.
    """
    from flep_fl.model_security.keyring import CheckKey, ModelKey

    _check_names(sites)
    taken = [name for name in (CLOUD, OWNER, *sites) if (out / name / "kit.json").exists()]
    if taken:
        raise ConfigError(
            f"{out} already holds kits ({', '.join(taken)}); new keys would make them useless",
            remedy="Choose another out= or remove the old kits yourself",
        )
    trust = shared["cloud"]["trust"]
    model_key = ModelKey.generate(get_profile(shared["ckks"]["profile"]))
    check_key = CheckKey.generate()
    cloud_signing, owner_signing = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    signing = {name: Ed25519PrivateKey.generate() for name in sites}
    decryption = {name: X25519PrivateKey.generate() for name in sites}
    federation = Federation(
        federation=secrets.token_hex(16),
        key_id=model_key.key_id,
        address=address,
        cloud_verify_key=cloud_signing.public_key().public_bytes_raw(),
        owner_verify_key=owner_signing.public_key().public_bytes_raw(),
        sites={
            name: SiteIdentity(
                name,
                signing[name].public_key().public_bytes_raw(),
                decryption[name].public_key().public_bytes_raw(),
            )
            for name in sites
        },
        shared=shared,
    )
    cloud, owner = out / CLOUD, out / OWNER
    _prepare(cloud)
    write_secret(cloud / "signing.key", cloud_signing.private_bytes_raw())
    write_secret(cloud / "model.context", model_key.public_context())
    if trust == "trusted":
        write_secret(cloud / "model.key", model_key.to_bytes())
    _write_description(cloud, "cloud", CLOUD, federation)
    _prepare(owner)
    write_secret(owner / "signing.key", owner_signing.private_bytes_raw())
    _write_description(owner, "owner", OWNER, federation)
    for name in sites:
        folder = out / name
        _prepare(folder)
        write_secret(folder / "signing.key", signing[name].private_bytes_raw())
        write_secret(folder / "decryption.key", decryption[name].private_bytes_raw())
        write_secret(folder / "model.key", model_key.to_bytes())
        write_secret(folder / "check.key", check_key.to_bytes())
        _write_description(folder, "site", name, federation)
    return [cloud, owner, *(out / name for name in sites)]


def load_cloud_kit(folder: Path) -> CloudKit:
    """Read the cloud's kit.

    Raises
    ------
    KitError
        When it is missing, damaged or a site's; when an untrusted cloud's kit holds a model key, or a
        trusted one's does not.
    """
    _, federation = _read_description(folder, "cloud")
    key = folder / "model.key"
    trust = federation.shared["cloud"]["trust"]
    if key.exists() and trust != "trusted":
        raise KitError(
            f"The kit {folder} is for cloud={trust} and holds a model key",
            remedy="Remove the kit and provision again: this cloud must never hold a key",
        )
    signing_key = _signing_key(folder)
    if signing_key.public_key().public_bytes_raw() != federation.cloud_verify_key:
        raise _mixed(folder, "signing.key")
    return CloudKit(
        folder,
        federation,
        signing_key,
        _secret(folder, "model.context"),
        _secret(folder, "model.key") if trust == "trusted" else None,
    )


def load_site_kit(folder: Path) -> SiteKit:
    """Read a site's kit.

    Raises
    ------
    KitError
        When it is missing, damaged or the cloud's.
    """
    name, federation = _read_description(folder, "site")
    signing_key = _signing_key(folder)
    decryption_key = X25519PrivateKey.from_private_bytes(_secret(folder, "decryption.key", size=32))
    identity = federation.sites.get(name)
    if identity is None or identity != SiteIdentity(
        name, signing_key.public_key().public_bytes_raw(), decryption_key.public_key().public_bytes_raw()
    ):
        raise _mixed(folder, "signing.key or decryption.key")
    return SiteKit(
        folder,
        name,
        federation,
        signing_key,
        decryption_key,
        _secret(folder, "model.key"),
        _secret(folder, "check.key", size=32),
    )


def load_owner_kit(folder: Path) -> OwnerKit:
    """Read the data owner's kit.

    Raises
    ------
    KitError
        When it is missing, damaged or another party's.
    """
    _, federation = _read_description(folder, "owner")
    signing_key = _signing_key(folder)
    if signing_key.public_key().public_bytes_raw() != federation.owner_verify_key:
        raise _mixed(folder, "signing.key")
    return OwnerKit(folder, federation, signing_key)


def _mixed(folder: Path, name: str) -> KitError:
    return KitError(
        f"{name} in {folder} is not the key that its kit.json names",
        remedy="Use the kits as they were provisioned; do not mix them",
    )


def _check_names(sites: Sequence[str]) -> None:
    for name in sites:
        if not _NAME.fullmatch(name) or name in (CLOUD, OWNER):
            raise ConfigError(
                f"sites holds the name {name!r}",
                expected=f"letters, digits, - and _, at most 64, neither {CLOUD!r} nor {OWNER!r}",
                remedy="Rename the site",
            )
    if len(set(sites)) != len(sites):
        raise ConfigError(
            "sites names one site twice", found=", ".join(sites), remedy="Give each its own name"
        )


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _write_description(folder: Path, role: str, name: str, federation: Federation) -> None:
    description = {
        "format": FORMAT,
        "role": role,
        "name": name,
        "federation": federation.federation,
        "key_id": federation.key_id,
        "address": federation.address,
        "cloud": {"verify_key": federation.cloud_verify_key.hex()},
        "owner": {"verify_key": federation.owner_verify_key.hex()},
        "sites": {
            s.name: {"verify_key": s.verify_key.hex(), "encryption_key": s.encryption_key.hex()}
            for s in federation.sites.values()
        },
        "shared": federation.shared,
        "shared_digest": federation.digest,
    }
    # Last of all files: a kit without kit.json is not a kit, so an interrupted run leaves none behind.
    write_atomic(folder / "kit.json", json.dumps(description, indent=2, sort_keys=True).encode() + b"\n")


def _read_description(folder: Path, role: str) -> tuple[str, Federation]:
    if not (folder / "kit.json").exists():
        raise KitError(
            f"There is no startup kit in {folder}",
            remedy="Run `python -m scripts.provision 'sites=[a,b,c]' out=kits` first",
        )
    raw = read_bytes(folder / "kit.json", what="The startup kit", error=KitError)
    try:
        text = json.loads(raw)
        if text["format"] != FORMAT:
            raise KitError(
                f"The kit {folder} has another format",
                expected=FORMAT,
                found=text["format"],
                remedy="Provision again with this release",
            )
        federation = Federation(
            federation=text["federation"],
            key_id=text["key_id"],
            address=text["address"],
            cloud_verify_key=_public(text["cloud"]["verify_key"]),
            owner_verify_key=_public(text["owner"]["verify_key"]),
            sites={
                name: SiteIdentity(name, _public(s["verify_key"]), _public(s["encryption_key"]))
                for name, s in text["sites"].items()
            },
            shared=text["shared"],
        )
        found_role, name, digest = str(text["role"]), str(text["name"]), str(text["shared_digest"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise KitError(
            f"{folder / 'kit.json'} is damaged", found=repr(exc), remedy="Provision again"
        ) from exc
    if found_role != role:
        raise KitError(
            f"{folder} is the kit of a {found_role}",
            expected=f"the kit of a {role}",
            remedy="Use KITS/cloud for `python -m server`, KITS/SITE for `python -m clients` and KITS/owner "
            "for `python -m scripts.seal`",
        )
    if digest != federation.digest:
        raise KitError(
            f"The shared settings in {folder / 'kit.json'} were edited after provisioning",
            remedy="Provision again with the settings you want",
        )
    return name, federation


def _public(text: str) -> bytes:
    key = bytes.fromhex(text)
    if len(key) != 32:
        raise ValueError(f"a public key has {len(key)} bytes, not 32")
    return key


def _secret(folder: Path, name: str, *, size: int | None = None) -> bytes:
    data = read_bytes(folder / name, what=f"The kit's {name}", error=KitError)
    if size is not None and len(data) != size:
        raise KitError(
            f"{folder / name} is damaged",
            expected=f"{size} bytes",
            found=f"{len(data)} bytes",
            remedy="Provision again",
        )
    return data


def _signing_key(folder: Path) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(_secret(folder, "signing.key", size=32))
    except (ValueError, UnsupportedAlgorithm) as exc:  # pragma: no cover - any 32 bytes are a key
        raise KitError(f"{folder / 'signing.key'} is damaged", remedy="Provision again") from exc
