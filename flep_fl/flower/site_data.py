"""Where a site's images come from: a sealed archive in a folder, or the gateways of data owners."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flep_fl.config import Config
from flep_fl.contracts.archive import ArchiveDescription
from flep_fl.contracts.errors import ConfigError, DataError, EmptyDatasetError
from flep_fl.data_analyst.fetch import Progress, fetch_owner
from flep_fl.data_analyst.keystore import Keystore
from flep_fl.data_analyst.owner_client import AnalystIdentity, parse_address
from flep_fl.data_analyst.restore import RestoredSplit, restore_split
from flep_fl.data_analyst.source import LocalArchive, describe, unlock
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.presets import build_cipher
from flep_fl.data_security.restoring import require_order
from flep_fl.provision.kits import SiteKit
from flep_fl.provision.owner import image_denoiser, restore_order

PASSPHRASE = "FLEP_KEYSTORE_PASSPHRASE"  # noqa: S105  # the name of an environment variable
"""Opens the keystore instead of the key file beside it."""

SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class SiteData:
    """A site's plain images; they exist in memory only."""

    train: RestoredSplit
    test: RestoredSplit
    description: ArchiveDescription


@dataclass(frozen=True, slots=True)
class _Sealed:
    """One sealed source and the key to it."""

    source: LocalArchive
    bundle: ImageKeyBundle
    description: ArchiveDescription


def load_site_data(
    kit: SiteKit,
    config: Config,
    archive: Path | None,
    *,
    on_event: Callable[[str], None] = lambda _line: None,
    on_progress: Progress = lambda what, done, total: None,
) -> SiteData:
    """Fetch or open the sealed records, and restore them in memory.

    Several sources are put together; each is restored with its own bundle and cipher. They must agree on the
    class names, and their images must end at one size and number of channels. One of them may have no record
    of a split: a small part of a small data set may hold nothing out.

    Parameters
    ----------
    kit, config
        This site's kit and configuration.
    archive
        A sealed archive; None where ``data.owners`` names gateways.
    on_event, on_progress
        Get a line now and then, and the state of a download.

    Raises
    ------
    ConfigError
        Neither or both of archive and owners are named.
    FlepError
        By name, as :func:`.fetch_owner`, :class:`.LocalArchive` and :func:`.restore_split`.
    """
    owners = config.data.owners
    if (archive is None) == (not owners):
        raise ConfigError(
            "the site's images come from an archive or from data owners",
            expected="either archive=FOLDER or data.owners=[https://HOST:PORT]",
        )
    sealed = (
        _from_owners(kit, config, on_event, on_progress) if archive is None else [_from_archive(kit, archive)]
    )
    classes = {one.description.classes for one in sealed}
    if len(classes) > 1:
        raise DataError(
            "the data sets that are to be put together have different classes",
            found="; ".join(", ".join(names) for names in sorted(classes)),
            remedy="Name owners of one kind of data in data.owners",
        )
    splits = [_restored(config, one) for one in sealed]
    train, test = (_joined([pair[i] for pair in splits], split) for i, split in enumerate(SPLITS))
    description = sealed[0].description
    if len(sealed) > 1:
        counts = np.bincount(train.labels, minlength=len(description.classes))
        description = replace(description, majority_class=int(counts.argmax()))
    return SiteData(train, test, description)


def keystore_folder(kit: SiteKit, config: Config) -> Path:
    """Return the folder of what a site fetched and of its keystore."""
    return Path(config.data.cache) if config.data.cache else kit.folder / "owners"


def open_keystore(folder: Path) -> Keystore:
    """Open the keystore with the passphrase in the environment, or with the key file beside it."""
    path = folder / "keystore.db"
    passphrase = os.environ.get(PASSPHRASE)
    if passphrase:
        return Keystore(path, passphrase=passphrase)
    return Keystore(path, key_file=folder / "keystore.key")


def _from_archive(kit: SiteKit, archive: Path) -> _Sealed:
    source = LocalArchive(archive, site=kit.name, owner_public_key=kit.federation.owner_verify_key)
    bundle = unlock(source, kit.decryption_key.private_bytes_raw())
    return _Sealed(source, bundle, describe(source, bundle))


def _from_owners(
    kit: SiteKit, config: Config, on_event: Callable[[str], None], on_progress: Progress
) -> list[_Sealed]:
    addresses = [parse_address(text) for text in config.data.owners]
    if len({address.base for address in addresses}) != len(addresses):
        raise ConfigError("data.owners names an owner twice")
    identity = AnalystIdentity(kit.signing_key, kit.decryption_key)
    ca = Path(config.data.owner_ca) if config.data.owner_ca else None
    folder = keystore_folder(kit, config)
    found = []
    with open_keystore(folder) as keystore:
        for address in addresses:
            for fetched in fetch_owner(
                address,
                identity,
                keystore,
                folder / "records",
                ca=ca,
                on_progress=on_progress,
                on_event=on_event,
            ):
                found.append(_Sealed(fetched.archive, fetched.bundle, fetched.description))
    return found


def _restored(config: Config, sealed: _Sealed) -> list[RestoredSplit | None]:
    # The bundle says which cipher sealed the images; what may be imported for it is this site's own say.
    cipher = build_cipher(sealed.bundle, allow_targets=config.allow_targets)
    order = restore_order(config)
    require_order(cipher, order)
    denoise = image_denoiser(config, sealed.bundle, cipher)
    manifest = sealed.source.manifest()
    return [
        restore_split(
            sealed.source,
            cipher=cipher,
            bundle=sealed.bundle,
            denoise=denoise,
            order=order,
            split=split,
            input_size=config.model.input_size,
        )
        if getattr(manifest, split)
        else None
        for split in SPLITS
    ]


def _joined(found: Sequence[RestoredSplit | None], split: str) -> RestoredSplit:
    parts = [part for part in found if part is not None]
    if not parts:
        raise EmptyDatasetError(
            f"the {split} split has no record",
            remedy="Ask the data owner for more images, or for some that are held out",
        )
    if len(parts) == 1:
        return parts[0]
    shapes = {part.images.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise DataError(
            "the owners' images differ in size or channels",
            expected="one shape",
            found=", ".join(str(shape) for shape in sorted(shapes)),
            remedy="Set model.input_size, or ask the owners for one size and colour mode",
        )
    return RestoredSplit(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(name for part in parts for name in part.skipped),
    )
