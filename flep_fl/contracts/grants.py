"""The signed grant: the owner's word, to one analyst, on one data set, epoch, key bundle and release.

HPKE's base mode hides the key bundle but does not say who wrapped it. The grant does: the owner signs it,
and it names the recipient's keys, the data set, the epoch, the expiry, and the hashes of the wrapped bundle
and of the release's manifest. It is canonical JSON; the signature covers a label and the exact bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from flep_fl.contracts.errors import GrantError

FORMAT = "flep-grant"
VERSION = 1
MAX_BYTES = 1 << 16
MAX_PARTS = 4096


@dataclass(frozen=True, slots=True)
class GrantDocument:
    """Content of a signed grant.

    Attributes
    ----------
    grant_id, release_id
        32 hex digits each.
    owner, analyst_verify_key, analyst_encryption_key
        Raw public keys in hex: the owner's and the analyst's Ed25519, the analyst's X25519.
    analyst, dataset
        Names.
    share_index, share_parts
        Which part of the data set; 0 of 1 is all of it.
    issued_at, not_after
        Seconds since 1970 (UTC), by the owner's clock.
    epoch, key_id
        Of the key bundle.
    bundle_sha256, manifest_sha256
        64 hex digits each: of the wrapped bundle and of the manifest.
    release_number
        Counts the releases of this data set; an analyst refuses a lower one than it has seen.
    """

    grant_id: str
    release_id: str
    owner: str
    analyst: str
    analyst_verify_key: str
    analyst_encryption_key: str
    dataset: str
    share_index: int
    share_parts: int
    issued_at: int
    not_after: int
    epoch: int
    key_id: str
    bundle_sha256: str
    manifest_sha256: str
    release_number: int

    def to_bytes(self) -> bytes:
        """Serialise to canonical JSON."""
        content: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {"format": FORMAT, "version": VERSION}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> GrantDocument:
        """Parse a grant; only the exact output of :meth:`to_bytes` is accepted.

        Raises
        ------
        GrantError
            It is not a grant, damaged, or of another format version.
        """
        damaged = GrantError("the grant is damaged or not one of ours", remedy="Ask the data owner")
        if len(data) > MAX_BYTES:
            raise damaged
        try:
            content = json.loads(data)
            found = (content.pop("format"), content.pop("version"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise damaged from exc
        if found != (FORMAT, VERSION):
            raise GrantError(
                "the grant has a format that this release does not read",
                expected=f"{FORMAT} version {VERSION}",
                found=f"{found[0]} version {found[1]}",
            )
        types = {field.name: int if field.type in (int, "int") else str for field in fields(cls)}
        if set(content) != set(types) or any(type(content[name]) is not types[name] for name in types):
            raise damaged
        grant = cls(**content)
        if grant.to_bytes() != data or not 0 <= grant.share_index < grant.share_parts <= MAX_PARTS:
            raise damaged
        return grant


def signed_message(grant: bytes) -> bytes:
    """Return what the owner signs: the grant under a label of its own."""
    return b"flep grant, version 1\0" + grant
