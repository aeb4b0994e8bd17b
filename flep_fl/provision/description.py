"""``kit.json``: the public half of a kit as text."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from flep_fl.contracts.errors import KitError
from flep_fl.provision.identities import ANALYST, CONTRIBUTE_ONLY, Federation, SiteIdentity
from flep_fl.provision.manifest import AGAIN

FORMAT = 2
NAME = "kit.json"


def encode_federation(federation: Federation) -> dict[str, Any]:
    """Return a federation as JSON-ready values."""
    return {
        "format": FORMAT,
        "federation": federation.federation,
        "generation": federation.generation,
        "revision": federation.revision,
        "key_id": federation.key_id,
        "address": federation.address,
        "tls": federation.tls,
        "ca_fingerprint": federation.ca_fingerprint,
        "server_fingerprint": federation.server_fingerprint,
        "cloud": {
            "verify_key": federation.cloud_verify_key.hex(),
            "encryption_key": federation.cloud_encryption_key.hex(),
        },
        "owner": {"verify_key": federation.owner_verify_key.hex()},
        "sites": {
            s.name: {
                "verify_key": s.verify_key.hex(),
                "encryption_key": s.encryption_key.hex(),
                "node_key": s.node_key.decode(),
                "role": s.role,
                "consents": list(s.consents),
            }
            for s in federation.sites.values()
        },
        "shared": federation.shared,
    }


class KitDescriptions:
    """The ``kit.json`` of every party: what all of them have in common is put into words once.

    A description names every site, so that writing it anew for every site takes minutes where there are a
    thousand.
    """

    def __init__(self, federation: Federation) -> None:
        self._parts = {name: _dumped(value) for name, value in encode_federation(federation).items()}

    def of(self, role: str, party: str) -> bytes:
        """Return the content of one party's file: JSON with sorted keys, indented by two."""
        parts = {**self._parts, "role": _dumped(role), "name": _dumped(party)}
        lines = ",\n".join(f"  {_dumped(name)}: {parts[name]}" for name in sorted(parts))
        return f"{{\n{lines}\n}}\n".encode()


def _dumped(value: Any) -> str:
    # No string of JSON holds a line break of its own: every one is before an entry.
    return json.dumps(value, indent=2, sort_keys=True).replace("\n", "\n  ")


def decode_federation(raw: bytes, path: Path) -> Federation:
    """Read what :class:`KitDescriptions` or :func:`encode_federation` gave.

    Raises
    ------
    KitError
        When it is damaged or of another release.
    """
    try:
        text = json.loads(raw)
        if text["format"] != FORMAT:
            raise KitError(
                f"{path} has another format",
                expected=FORMAT,
                found=text["format"],
                remedy="Provision again with this release",
            )
        return Federation(
            federation=str(text["federation"]),
            key_id=str(text["key_id"]),
            address=str(text["address"]),
            cloud_verify_key=_public(text["cloud"]["verify_key"]),
            owner_verify_key=_public(text["owner"]["verify_key"]),
            sites={str(name): _site(str(name), site) for name, site in text["sites"].items()},
            shared=dict(text["shared"]),
            generation=int(text["generation"]),
            revision=int(text["revision"]),
            tls=bool(text["tls"]),
            ca_fingerprint=str(text["ca_fingerprint"]),
            server_fingerprint=str(text["server_fingerprint"]),
            cloud_encryption_key=bytes.fromhex(text["cloud"]["encryption_key"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise KitError(f"{path} is damaged", found=repr(exc), remedy=AGAIN) from exc


def _site(name: str, text: dict[str, Any]) -> SiteIdentity:
    keys = (str(text["verify_key"]), str(text["encryption_key"]), str(text["node_key"]))
    return _identity(name, *keys, str(text["role"]), tuple(map(str, text["consents"])))


@lru_cache(maxsize=4096)
def _identity(
    name: str, verify_key: str, encryption_key: str, node_key: str, role: str, consents: tuple[str, ...]
) -> SiteIdentity:
    # Cached: whoever simulates a thousand sites reads each of them in a thousand kits.
    if role not in (ANALYST, CONTRIBUTE_ONLY):
        raise ValueError(f"site {name} has the role {role!r}")
    return SiteIdentity(name, _public(verify_key), _public(encryption_key), node_key.encode(), role, consents)


def _public(text: str) -> bytes:
    key = bytes.fromhex(text)
    if len(key) != 32:
        raise ValueError(f"a public key has {len(key)} bytes, not 32")
    return key
