"""The owner's home: one folder with everything that the gateway starts from.

=====================  ==========================================================================
``home.json``          public: administrators' and the owner's public keys, how many must approve
``signing.key``        Ed25519: signs grants; analysts pin its public half
``audit.key``          Ed25519: signs heads of the audit log
``database.key``       32 bytes: wraps the data keys of the private database
``database.sqlite``    the private database, unless it lies elsewhere
``devices.jsonl``      administrators' statements about devices
``audit/``             the audit log and its heads
``tls/``               the owner's root (``ca.crt``, ``ca.key``) and the gateway's certificate and key
``administrators/``    one Ed25519 key for each administrator, to be handed out and removed here
=====================  ==========================================================================

Secrets are 0600 and the folder 0700.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts.errors import ConfigError, OwnerHomeError
from flep_fl.contracts.files import read_bytes, write_atomic, write_secret
from flep_fl.data_owner.certificates import TlsFiles, create_authority, issue_certificate
from flep_fl.data_owner.devices import is_name

FORMAT = 1
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class OwnerHome:
    """An owner's folder and its public half.

    Attributes
    ----------
    folder
        Where it is.
    administrators
        Ed25519 public keys by name.
    threshold
        How many of them must approve an enrolment.
    owner_key, audit_key
        The owner's raw Ed25519 public keys, 32 bytes: for grants, and for heads of the audit log.
    """

    folder: Path
    administrators: dict[str, Ed25519PublicKey]
    threshold: int
    owner_key: bytes
    audit_key: bytes

    @property
    def database(self) -> Path:
        """The embedded database."""
        return self.folder / "database.sqlite"

    @property
    def devices(self) -> Path:
        """The registry of devices."""
        return self.folder / "devices.jsonl"

    @property
    def audit(self) -> Path:
        """The folder of the audit log."""
        return self.folder / "audit"

    @property
    def root(self) -> TlsFiles:
        """The owner's certificate authority."""
        return TlsFiles(self.folder / "tls" / "ca.crt", self.folder / "tls" / "ca.key")

    @property
    def tls(self) -> TlsFiles:
        """The gateway's certificate."""
        return TlsFiles(self.folder / "tls" / "gateway.crt", self.folder / "tls" / "gateway.key")

    def signing_key(self) -> Ed25519PrivateKey:
        """Read the key that signs grants."""
        return _read_key(self.folder / "signing.key", "the owner's signing key")

    def audit_signing_key(self) -> Ed25519PrivateKey:
        """Read the key that signs heads of the audit log."""
        return _read_key(self.folder / "audit.key", "the owner's audit key")

    def database_key(self) -> bytes:
        """Read the database's key."""
        key = read_bytes(self.folder / "database.key", what="the owner's database key", error=OwnerHomeError)
        if len(key) != _KEY_BYTES:
            raise OwnerHomeError(f"the owner's database key is damaged: {self.folder / 'database.key'}")
        return key

    def administrator_key(self, name: str, path: Path | None = None) -> Ed25519PrivateKey:
        """Read an administrator's key, from where it was handed to or from the home.

        Raises
        ------
        OwnerHomeError
            It is not there, or is not this administrator's.
        """
        if name not in self.administrators:
            raise OwnerHomeError(
                f"{name} is no administrator of this owner",
                expected="one of " + ", ".join(sorted(self.administrators)),
            )
        path = path or self.folder / "administrators" / f"{name}.key"
        key = _read_key(path, f"the key of the administrator {name}")
        if key.public_key().public_bytes_raw() != self.administrators[name].public_bytes_raw():
            raise OwnerHomeError(f"the key is not the administrator {name}'s: {path}")
        return key

    @contextmanager
    def exclusive(self, purpose: str) -> Iterator[bool]:
        """Try to be the one process that serves or changes this home; says whether it worked.

        The kernel lets go of the lock when the process ends, however it ends.
        """
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {purpose}\n".encode())
            yield True
        finally:
            os.close(descriptor)


def create_home(
    folder: Path, *, administrators: Sequence[str], threshold: int, hosts: Sequence[str]
) -> OwnerHome:
    """Make a new owner's keys and certificates.

    Parameters
    ----------
    folder
        Must not be a home already.
    administrators
        Their names; each gets a key of its own.
    threshold
        How many of them must approve an enrolment, 1..len(administrators).
    hosts
        DNS names and IP addresses at which devices and analysts reach the gateway.

    Raises
    ------
    OwnerHomeError
        There is a home already.
    ConfigError
        A name is unusable or given twice, or the threshold cannot be reached.
    GatewayCertificateError
        A host is unusable.
    """
    if (folder / "home.json").exists():
        raise OwnerHomeError(
            f"there is an owner's home already: {folder}", remedy="Choose another home= or go on with this"
        )
    if len(set(administrators)) != len(administrators) or not all(map(is_name, administrators)):
        raise ConfigError(
            "administrators has an unusable or repeated name",
            expected="letters, digits, _, - and .",
            found=", ".join(administrators),
        )
    if not 1 <= threshold <= len(administrators):
        raise ConfigError(
            f"threshold={threshold} cannot be reached", expected=f"1..{len(administrators)}", found=threshold
        )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    keys = {name: Ed25519PrivateKey.generate() for name in administrators}
    owner, audit = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    home = OwnerHome(
        folder,
        {name: key.public_key() for name, key in keys.items()},
        threshold,
        owner.public_key().public_bytes_raw(),
        audit.public_key().public_bytes_raw(),
    )
    for name, key in keys.items():
        write_secret(folder / "administrators" / f"{name}.key", key.private_bytes_raw())
    write_secret(folder / "signing.key", owner.private_bytes_raw())
    write_secret(folder / "audit.key", audit.private_bytes_raw())
    write_secret(folder / "database.key", secrets.token_bytes(_KEY_BYTES))
    create_authority(home.root.certificate, home.root.private_key, name="FLEP data owner")
    issue_certificate(home.root, home.tls, name="FLEP data owner's gateway", hosts=hosts)
    content = {
        "format": FORMAT,
        "administrators": {name: key.public_bytes_raw().hex() for name, key in home.administrators.items()},
        "threshold": threshold,
        "owner_key": home.owner_key.hex(),
        "audit_key": home.audit_key.hex(),
    }
    write_atomic(folder / "home.json", json.dumps(content, indent=2).encode() + b"\n")
    return home


def load_home(folder: Path) -> OwnerHome:
    """Read a home.

    Raises
    ------
    OwnerHomeError
        It is missing or damaged.
    """
    if not (folder / "home.json").is_file():
        raise OwnerHomeError(
            f"there is no owner's home: {folder}",
            remedy=f"Make one with `python -m scripts.owner action=keys home={folder}`",
        )
    data = read_bytes(folder / "home.json", what="the owner's home", error=OwnerHomeError)
    try:
        content = json.loads(data)
        if content["format"] != FORMAT or type(content["threshold"]) is not int:
            raise ValueError
        administrators = {
            str(name): Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
            for name, key in content["administrators"].items()
        }
        owner, audit = (bytes.fromhex(content[name]) for name in ("owner_key", "audit_key"))
        if len(owner) != _KEY_BYTES or len(audit) != _KEY_BYTES:
            raise ValueError
        if not 1 <= content["threshold"] <= len(administrators):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise OwnerHomeError(
            f"the owner's home is damaged: {folder / 'home.json'}", remedy="Restore it from a backup"
        ) from exc
    return OwnerHome(folder, administrators, content["threshold"], owner, audit)


def _read_key(path: Path, what: str) -> Ed25519PrivateKey:
    data = read_bytes(path, what=what, error=OwnerHomeError)
    try:
        return Ed25519PrivateKey.from_private_bytes(data)
    except ValueError as exc:
        raise OwnerHomeError(f"{what} is damaged: {path}") from exc
