"""What the dealer keeps in ``dealer/``: its own key, the authority's, and all generations' model keys.

Whoever has this folder can do everything in the federation. It stays on the machine that provisions.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.contracts.errors import KitError, KitPermissionError
from flep_fl.contracts.files import read_bytes
from flep_fl.provision.description import decode_federation, encode_federation
from flep_fl.provision.identities import DEALER, Federation, GenerationKeys

STATE = "state.json"
_FORMAT = 1
_RESTORE = "Restore the dealer's folder from a backup; without it, provision a new federation"


@dataclass(frozen=True, slots=True)
class Ledger:
    """The dealer's public records.

    Attributes
    ----------
    federation
        As it is now.
    hosts
        Names and addresses in the cloud's certificate, beside that of ``federation.address``.
    server_days
        How long the cloud's certificates are valid.
    server_public_key
        The cloud's TLS public key, PEM.
    files
        SHA-256 (hex) of every file of every kit, by party and name; secret files have left the dealer.
    joined
        The generation in which each site got its kit: it gets no older keys.
    revoked
        Sites that were revoked, and in which generation.
    """

    federation: Federation
    hosts: tuple[str, ...]
    server_days: int
    server_public_key: bytes
    files: Mapping[str, Mapping[str, str]]
    joined: Mapping[str, int]
    revoked: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Serialise."""
        text = {
            "format": _FORMAT,
            "federation": encode_federation(self.federation),
            "hosts": list(self.hosts),
            "server_days": self.server_days,
            "server_public_key": self.server_public_key.decode(),
            "files": {party: dict(files) for party, files in self.files.items()},
            "joined": dict(self.joined),
            "revoked": dict(self.revoked),
        }
        return json.dumps(text, indent=2, sort_keys=True).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Dealer:
    """The dealer's folder, read.

    Attributes
    ----------
    ledger
        What it knows of the kits.
    signing_key
        Signs manifests and wrapped keys.
    ca, ca_key
        The authority's certificate and private key, PEM.
    keys
        The current generation's.
    """

    ledger: Ledger
    signing_key: Ed25519PrivateKey = field(repr=False)
    ca: bytes = field(repr=False)
    ca_key: bytes = field(repr=False)
    keys: GenerationKeys = field(repr=False)

    @property
    def public_key(self) -> bytes:
        """The dealer's public key, 32 bytes."""
        return self.signing_key.public_key().public_bytes_raw()

    def files(self) -> dict[str, bytes]:
        """Return the content of ``dealer/`` by path relative to the kits' folder."""
        return {
            f"{DEALER}/dealer.key": self.signing_key.private_bytes_raw(),
            f"{DEALER}/ca.key": self.ca_key,
            f"{DEALER}/ca.crt": self.ca,
            f"{DEALER}/{keys_name(self.keys.generation)}": encode_keys(self.keys),
            f"{DEALER}/{STATE}": self.ledger.to_json(),
        }


def load_dealer(out: Path) -> Dealer:
    """Read the dealer's folder under ``out``.

    Raises
    ------
    KitError
        It is missing or damaged.
    KitPermissionError
        Others can read its keys.
    """
    folder = out / DEALER
    if not (folder / STATE).exists():
        raise KitError(
            f"There is no dealer's folder in {out}",
            remedy="Give out= the folder in which `python -m scripts.provision` made the kits, on the "
            "machine where it ran",
        )
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_mode & 0o077:
            raise KitPermissionError(
                f"Others can read {path}", remedy=f"Run `chmod 600 {path}`, and ask whether somebody has"
            )
    raw = _read(folder, STATE)
    try:
        text = json.loads(raw)
        if text["format"] != _FORMAT:
            raise KitError(
                f"{folder / STATE} has another format",
                expected=_FORMAT,
                found=text["format"],
                remedy=_RESTORE,
            )
        federation = decode_federation(json.dumps(text["federation"]).encode(), folder / STATE)
        ledger = Ledger(
            federation,
            tuple(map(str, text["hosts"])),
            int(text["server_days"]),
            str(text["server_public_key"]).encode(),
            {str(party): dict(files) for party, files in text["files"].items()},
            {str(name): int(generation) for name, generation in text["joined"].items()},
            {str(name): int(generation) for name, generation in text["revoked"].items()},
        )
        signing_key = Ed25519PrivateKey.from_private_bytes(_read(folder, "dealer.key"))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise KitError(f"{folder} is damaged", found=repr(exc), remedy=_RESTORE) from exc
    return Dealer(
        ledger,
        signing_key,
        _read(folder, "ca.crt"),
        _read(folder, "ca.key"),
        load_generation(out, federation.generation),
    )


def load_generation(out: Path, generation: int) -> GenerationKeys:
    """Read one generation's keys.

    Raises
    ------
    KitError
        They are missing or damaged.
    """
    folder, name = out / DEALER, keys_name(generation)
    try:
        text: dict[str, Any] = json.loads(_read(folder, name))
        return GenerationKeys(
            int(text["generation"]),
            str(text["key_id"]),
            _decode(text["model_key"]),
            _decode(text["public_key"]) or None,
            _decode(text["check_key"]),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise KitError(f"{folder / name} is damaged", remedy=_RESTORE) from exc


def encode_keys(keys: GenerationKeys) -> bytes:
    """Serialise a generation's keys. Secret: 0600 only."""
    text = {
        "generation": keys.generation,
        "key_id": keys.key_id,
        "model_key": _encode(keys.model_key),
        "public_key": _encode(keys.public_key),
        "check_key": _encode(keys.check_key),
    }
    return json.dumps(text).encode()


def keys_name(generation: int) -> str:
    """Return the name of the file that holds a generation's keys."""
    return f"generation-{generation}.keys"


def _read(folder: Path, name: str) -> bytes:
    return read_bytes(folder / name, what=f"The dealer's {name}", error=KitError)


def _encode(value: bytes | None) -> str:
    return base64.b64encode(value or b"").decode()


def _decode(value: str) -> bytes:
    return base64.b64decode(value, validate=True)
