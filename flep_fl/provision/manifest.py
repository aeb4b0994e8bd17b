"""``manifest.json``: what a kit consists of, signed by the dealer.

A kit whose files were edited, mixed with another kit's, or copied by halves does not fit its manifest.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.config import canonical_json
from flep_fl.contracts.errors import KitError, KitMismatchError
from flep_fl.contracts.files import read_bytes

FORMAT = 1
NAME = "manifest.json"
AGAIN = (
    "Copy the whole kit again; if provisioning was interrupted, run the same command again. Otherwise ask "
    "whoever provisions for new kits"
)
_DOMAIN = b"flep-fl/v1/kit-manifest\n"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest's content.

    Attributes
    ----------
    federation, role, party, generation, revision
        Whose kit it is, and which one.
    files
        SHA-256 (hex) of every file that the kit must hold, by name.
    optional
        The same for files that its party may delete (keys of earlier generations).
    dealer
        Ed25519 public key of the dealer, 32 bytes.
    """

    federation: str
    role: str
    party: str
    generation: int
    revision: int
    files: Mapping[str, str]
    optional: Mapping[str, str]
    dealer: bytes

    @property
    def age(self) -> tuple[int, int]:
        """Generation and revision: a later kit compares greater."""
        return self.generation, self.revision


def file_digest(data: bytes) -> str:
    """Return the SHA-256 of a file's content, hex."""
    return hashlib.sha256(data).hexdigest()


def sign_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """Serialise and sign; ``manifest.dealer`` must be the public half of ``key``."""
    body = _body(manifest)
    signature = key.sign(_DOMAIN + canonical_json(body)).hex()
    return json.dumps({**body, "signature": signature}, indent=2, sort_keys=True).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and verify a kit's manifest.

    Raises
    ------
    KitError
        It is missing or not a manifest.
    KitMismatchError
        Its signature does not fit.
    """
    raw = read_bytes(folder / NAME, what="The kit's manifest", error=KitError)
    try:
        body = json.loads(raw)
        signature = bytes.fromhex(body.pop("signature"))
        if body["format"] != FORMAT:
            raise KitError(
                f"The kit {folder} has another format",
                expected=FORMAT,
                found=body["format"],
                remedy="Provision again with this release",
            )
        manifest = Manifest(
            federation=str(body["federation"]),
            role=str(body["role"]),
            party=str(body["party"]),
            generation=int(body["generation"]),
            revision=int(body["revision"]),
            files={str(name): str(digest) for name, digest in body["files"].items()},
            optional={str(name): str(digest) for name, digest in body["optional"].items()},
            dealer=bytes.fromhex(body["dealer"]),
        )
        Ed25519PublicKey.from_public_bytes(manifest.dealer).verify(signature, _DOMAIN + canonical_json(body))
    except InvalidSignature as exc:
        raise KitMismatchError(
            f"{folder / NAME} was edited after provisioning: the dealer's signature does not fit",
            remedy=AGAIN,
        ) from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise KitError(f"{folder / NAME} is damaged", found=repr(exc), remedy=AGAIN) from exc
    return manifest


def verified_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read every file that the manifest names, and compare it with what the dealer signed.

    Raises
    ------
    KitError
        A file is missing or cannot be read.
    KitMismatchError
        A file is not the one that the dealer signed for.
    """
    found: dict[str, bytes] = {}
    for name, digest in {**manifest.files, **manifest.optional}.items():
        path = folder / name
        if name in manifest.optional and not path.exists():
            continue
        data = read_bytes(path, what=f"The kit's {name}", error=KitError)
        if not hmac.compare_digest(file_digest(data), digest):
            raise KitMismatchError(
                f"{name} in {folder} is not the file that its manifest names: it was damaged, edited after "
                "provisioning, or belongs to another kit or generation",
                expected=f"SHA-256 {digest[:16]}...",
                found=f"{file_digest(data)[:16]}...",
                remedy=AGAIN,
            )
        found[name] = data
    return found


def _body(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "federation": manifest.federation,
        "role": manifest.role,
        "party": manifest.party,
        "generation": manifest.generation,
        "revision": manifest.revision,
        "files": dict(manifest.files),
        "optional": dict(manifest.optional),
        "dealer": manifest.dealer.hex(),
    }
