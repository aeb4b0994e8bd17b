"""Read startup kits, and refuse whatever is not exactly what the dealer made."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts.errors import (
    KitDealerError,
    KitError,
    KitMismatchError,
    KitOutdatedError,
    KitPermissionError,
    ProvisionInterruptedError,
)
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.provision import description
from flep_fl.provision.fingerprints import fingerprint
from flep_fl.provision.identities import (
    CLOUD,
    OWNER,
    CloudKit,
    Federation,
    GenerationKeys,
    OwnerKit,
    SiteIdentity,
    SiteKit,
)
from flep_fl.provision.manifest import AGAIN, NAME, Manifest, read_manifest, verified_files
from flep_fl.provision.transaction import interrupted
from flep_fl.provision.wrapped_keys import unwrap_keys

SECRET_FILES = ("signing.key", "decryption.key", "node.key", "server.key")
"""Files of a kit that nobody but its party may read; the others are public, or encrypted to it."""

KEYS = "keys.wrapped"
_SITE = "site"
_SEEN = Path("state") / "provision.json"
_FORGOTTEN = Path("state") / "forgotten"
_KEY_BYTES = 32


def previous_name(generation: int) -> str:
    """Return the name of the file with the keys of an earlier generation."""
    return f"previous-{generation}.wrapped"


def load_cloud_kit(folder: Path) -> CloudKit:
    """Read the cloud's kit.

    Raises
    ------
    KitError
        When it is missing, damaged or a site's; when an untrusted cloud's kit holds a model key; as
        :class:`~flep_fl.contracts.errors.KitMismatchError` and its siblings where files do not belong
        together, can be read by others, or are older than what was used before.
    """
    manifest, federation, files = _open(folder, CLOUD)
    trusted = federation.trust == "trusted"
    planted = [name for name in ("model.key", KEYS, "decryption.key") if (folder / name).exists()]
    if planted and not trusted:
        raise KitError(
            f"The kit {folder} is for cloud={federation.trust} and holds {', '.join(planted)}",
            remedy="Remove the kit and provision again: this cloud must never hold a key",
        )
    signing_key = _signing_key(folder, files)
    if signing_key.public_key().public_bytes_raw() != federation.cloud_verify_key:
        raise _mixed(folder, "signing.key")
    model_key = None
    if trusted:
        decryption_key = _decryption_key(folder, files)
        model_key = _unwrap(folder, KEYS, files, manifest, decryption_key).model_key
    return CloudKit(folder, federation, signing_key, _file(folder, files, "model.context"), model_key)


def load_owner_kit(folder: Path) -> OwnerKit:
    """Read the data owner's kit.

    Raises
    ------
    KitError
        As :func:`load_cloud_kit`.
    """
    _, federation, files = _open(folder, OWNER)
    signing_key = _signing_key(folder, files)
    if signing_key.public_key().public_bytes_raw() != federation.owner_verify_key:
        raise _mixed(folder, "signing.key")
    return OwnerKit(folder, federation, signing_key)


def load_site_kit(folder: Path) -> SiteKit:
    """Read a site's kit: its own keys, this generation's, and earlier ones that it has not forgotten.

    Raises
    ------
    KitError
        As :func:`load_cloud_kit`.
    """
    manifest, federation, files = _open(folder, _SITE)
    name = manifest.party
    signing_key = _signing_key(folder, files)
    decryption_key = _decryption_key(folder, files)
    identity = federation.sites.get(name)
    if identity is None or identity != SiteIdentity(
        name,
        signing_key.public_key().public_bytes_raw(),
        decryption_key.public_key().public_bytes_raw(),
        identity.node_key,
        identity.role,
        identity.consents,
    ):
        raise _mixed(folder, "signing.key or decryption.key")
    keys = _unwrap(folder, KEYS, files, manifest, decryption_key)
    if (keys.generation, keys.key_id) != (federation.generation, federation.key_id):
        raise KitMismatchError(
            f"{KEYS} in {folder} holds the keys of another generation",
            expected=f"generation {federation.generation}, key {federation.key_id}",
            found=f"generation {keys.generation}, key {keys.key_id}",
            remedy=AGAIN,
        )
    if len(keys.check_key) != _KEY_BYTES or (keys.model_key is None) != (identity.role != "analyst"):
        raise KitError(f"{KEYS} in {folder} does not hold what a site with the role {identity.role} needs")
    return SiteKit(
        folder,
        name,
        federation,
        signing_key,
        decryption_key,
        keys.model_key,
        keys.check_key,
        keys.public_key,
        _previous(folder, files, manifest, decryption_key),
    )


def forget_previous(kit: SiteKit) -> None:
    """Delete the keys of earlier generations; called once a sum was accepted under the current ones.

    They do not come back when the dealer's files are copied over the kit again. Safe to call at any time
    and more than once. The files are unlinked, not overwritten: on most disks overwriting proves nothing.
    """
    mark = str(kit.federation.generation)
    path = kit.folder / _FORGOTTEN
    # The mark first: what a crash leaves lying about is deleted when the kit is read the next time.
    if kit.previous or (path.exists() and path.read_text() != mark):
        _private_folder(path.parent)
        write_secret(path, mark.encode())
    for file in kit.folder.glob("previous-*.wrapped"):
        file.unlink(missing_ok=True)


def _previous(
    folder: Path, files: dict[str, bytes], manifest: Manifest, key: X25519PrivateKey
) -> tuple[GenerationKeys, ...]:
    """Return the earlier generations that are still wanted; delete the files of the others."""
    oldest = _forgotten(folder)
    wanted: list[GenerationKeys] = []
    for path in folder.glob("previous-*.wrapped"):
        if path.name not in manifest.optional:
            path.unlink(missing_ok=True)
            continue
        keys = _unwrap(folder, path.name, files, manifest, key)
        if keys.generation < oldest:
            path.unlink(missing_ok=True)
        else:
            wanted.append(keys)
    return tuple(sorted(wanted, key=lambda keys: keys.generation, reverse=True))


def _forgotten(folder: Path) -> int:
    """Return the generation before which this site needs no key."""
    path = folder / _FORGOTTEN
    if not path.exists():
        return 0
    try:
        return int(read_bytes(path, what="The record of forgotten keys", error=KitError))
    except ValueError as exc:
        raise KitError(f"{path} is damaged", remedy="Remove it") from exc


def _open(folder: Path, role: str) -> tuple[Manifest, Federation, dict[str, bytes]]:
    """Verify a kit as a whole; return its manifest, its federation and the content of its files."""
    if interrupted(folder.parent):
        raise ProvisionInterruptedError(
            f"Provisioning was interrupted: the kits in {folder.parent} do not all belong together yet",
            remedy="Run the same command again",
        )
    if not (folder / description.NAME).exists():
        raise KitError(
            f"There is no startup kit in {folder}",
            remedy="Run `python -m scripts.provision 'sites=[a,b,c]' out=kits` first",
        )
    if not (folder / NAME).exists():
        raise KitError(
            f"The kit {folder} has no {NAME}: it is incomplete, or of an older release", remedy=AGAIN
        )
    manifest = read_manifest(folder)
    if manifest.role != role:
        raise KitError(
            f"{folder} is the kit of a {manifest.role}",
            expected=f"the kit of a {role}",
            remedy="Use KITS/cloud for `python -m server`, KITS/SITE for `python -m clients` and KITS/owner "
            "for `python -m scripts.seal`",
        )
    _require_private(folder)
    files = verified_files(folder, manifest)
    federation = description.decode_federation(
        _file(folder, files, description.NAME), folder / description.NAME
    )
    told = (federation.federation, federation.generation, federation.revision)
    if told != (manifest.federation, manifest.generation, manifest.revision):
        raise _mixed(folder, description.NAME)
    _remember(folder, manifest)
    return manifest, federation, files


def _require_private(folder: Path) -> None:
    """Refuse secrets that others can read, and a folder in which others can replace files."""
    for path, forbidden, wanted in [
        (folder, 0o022, "700"),
        *((folder / name, 0o077, "600") for name in SECRET_FILES),
    ]:
        if not path.exists():
            continue
        mode = path.stat().st_mode & 0o777
        if mode & forbidden:
            raise KitPermissionError(
                f"Others can {'change' if path == folder else 'read'} {path}",
                expected=f"mode {wanted}",
                found=f"mode {mode:o}",
                remedy=f"Run `chmod {wanted} {path}`, and ask whether somebody has; if so, have the site "
                "revoked and added again",
            )


def _remember(folder: Path, manifest: Manifest) -> None:
    """Pin the dealer that this party first saw, and never go back to an older kit."""
    path = folder / _SEEN
    now = {
        "dealer": manifest.dealer.hex(),
        "federation": manifest.federation,
        "generation": manifest.generation,
        "revision": manifest.revision,
    }
    if path.exists():
        try:
            seen = json.loads(read_bytes(path, what="The record of the last kit", error=KitError))
            dealer, federation = bytes.fromhex(seen["dealer"]), str(seen["federation"])
            age = int(seen["generation"]), int(seen["revision"])
        except (ValueError, KeyError, TypeError) as exc:
            raise KitError(
                f"{path} is damaged; without it nobody could tell whose kits these are",
                remedy="Compare the dealer's fingerprint by telephone, then remove the file",
            ) from exc
        if (dealer, federation) != (manifest.dealer, manifest.federation):
            raise KitDealerError(
                f"The kit {folder} comes from another dealer or federation than the one used here before",
                expected=f"dealer {fingerprint(dealer)}",
                found=f"dealer {fingerprint(manifest.dealer)}",
                remedy="If this is a new federation, put its kit into a new folder; otherwise compare the "
                "dealer's fingerprint by telephone",
            )
        if manifest.age < age:
            raise KitOutdatedError(
                f"The kit {folder} is older than the one used here before",
                expected=f"generation {age[0]}, revision {age[1]} or later",
                found=f"generation {manifest.generation}, revision {manifest.revision}",
                remedy="Copy the newest kit; an old one could bring a revoked site back",
            )
        if age == manifest.age:
            return
    try:
        _private_folder(path.parent)
        write_secret(path, json.dumps(now).encode())
    except PermissionError:
        # A kit on a read-only medium cannot be replaced behind its party's back either.
        return
    except OSError as exc:
        if exc.errno != errno.EROFS:
            raise


def _private_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def _unwrap(
    folder: Path, name: str, files: dict[str, bytes], manifest: Manifest, key: X25519PrivateKey
) -> GenerationKeys:
    return unwrap_keys(
        _file(folder, files, name),
        name=str(folder / name),
        federation=manifest.federation,
        party=manifest.party,
        private_key=key,
        dealer=manifest.dealer,
    )


def _file(folder: Path, files: dict[str, bytes], name: str) -> bytes:
    """Return a file that the manifest must name."""
    if name not in files:
        raise KitError(f"The manifest of {folder} names no {name}", remedy=AGAIN)
    return files[name]


def _raw_key(folder: Path, files: dict[str, bytes], name: str) -> bytes:
    data = _file(folder, files, name)
    if len(data) != _KEY_BYTES:
        raise KitError(
            f"{folder / name} is damaged",
            expected=f"{_KEY_BYTES} bytes",
            found=f"{len(data)} bytes",
            remedy=AGAIN,
        )
    return data


def _signing_key(folder: Path, files: dict[str, bytes]) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_raw_key(folder, files, "signing.key"))


def _decryption_key(folder: Path, files: dict[str, bytes]) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_raw_key(folder, files, "decryption.key"))


def _mixed(folder: Path, name: str) -> KitMismatchError:
    return KitMismatchError(
        f"{name} in {folder} does not fit the rest of the kit",
        remedy="Use the kits as they were provisioned; do not mix them",
    )
