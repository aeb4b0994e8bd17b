"""A real archive of given images, and what somebody without its key reads in it.

Images go the owner's way: private database, cipher, signed archive for one site. A thief of the folder reads
manifest, index and records, all of them in the clear but for what is sealed. It knows the cipher and its
parameters (Kerckhoffs), not the key bundle.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from flep_fl.config import Config
from flep_fl.contracts.archive import SPLITS
from flep_fl.contracts.ports import ImageCipher
from flep_fl.data_analyst.source import LocalArchive
from flep_fl.data_owner.release import seal_archive
from flep_fl.data_security.encode import inverse, make_quantiser
from flep_fl.data_security.envelope import HEADER_BYTES, TAG_BYTES, parse_header
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.packing import unpack
from flep_fl.data_security.parameters import CipherParameters
from flep_fl.data_security.presets import build_cipher
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.provision.owner import cipher_parameters, noise_parameters, secret_images

GreyImage = NDArray[np.uint8]
SITE, DATASET = "site-0", "stolen"


@dataclass(frozen=True, slots=True)
class StolenArchive:
    """An archive folder in a thief's hands.

    Attributes
    ----------
    path
        The folder.
    envelopes
        The sealed images by record id, as they lie in ``records.bin``.
    record_ids
        The ids in the order in which the images went in. The gateway tells a device the id of what it sent,
        so an attacker who feeds images knows its own.
    parameters
        Of the cipher; no secret.
    """

    path: Path
    envelopes: dict[str, bytes] = field(repr=False)
    record_ids: list[str]
    parameters: CipherParameters

    def wires(self) -> list[NDArray[np.float64]]:
        """Return the wire levels of every record in the order of :attr:`record_ids`."""
        return [wire_levels(self.envelopes[one], self.parameters) for one in self.record_ids]


@dataclass(slots=True)
class Owner:
    """A data owner for the length of an attack.

    Attributes
    ----------
    folder
        Its database and archives.
    bundle, cipher
        What it seals with; attacks do not look at either unless their threat model says so.
    recipient
        The site's key, for those attacks in which the attacker *is* the site.
    signing_key
        The owner's.
    """

    config: Config
    folder: Path
    bundle: ImageKeyBundle
    cipher: ImageCipher
    noise_secret: bytes = field(repr=False)
    recipient: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    signing_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def release(
        self, images: Sequence[GreyImage], name: str = "archive", *, classes: int = 2
    ) -> StolenArchive:
        """Take images in and seal all of them for one site, in the folder ``name``; labels count up."""
        labels = [number % classes for number in range(len(images))]
        splits = [SPLITS[0]] * len(images)
        with OwnerDatabase.create(
            self.folder / f"{name}.sqlite",
            secrets.token_bytes(32),
            dataset=DATASET,
            classes=tuple(f"class {number}" for number in range(classes)),
        ) as database:
            ids = database.ingest(images, labels, splits)
            return self.seal(database, ids, name, classes=classes)

    def seal(self, database: OwnerDatabase, ids: list[str], name: str, *, classes: int = 2) -> StolenArchive:
        """Seal records of a database for one site, in the folder ``name``."""
        path = self.folder / name
        seal_archive(
            database,
            ids,
            cipher=self.cipher,
            bundle=self.bundle,
            site=SITE,
            dataset=DATASET,
            classes=[f"class {number}" for number in range(classes)],
            majority_class=0,
            recipient_x25519=self.recipient.public_key().public_bytes_raw(),
            signing_key=self.signing_key.private_bytes_raw(),
            out=path,
        )
        return StolenArchive(path, stolen_envelopes(path), ids, self.bundle.cipher)


def make_owner(config: Config, folder: Path, *, bundle: ImageKeyBundle | None = None) -> Owner:
    """Set an owner up with the cipher and noise of the configuration and fresh random keys.

    Parameters
    ----------
    config
        ``cipher``, ``noise`` and ``allow_targets``.
    folder
        An empty folder of the attack's own.
    bundle
        A given bundle (of a later epoch, say) in the place of a fresh one.
    """
    if bundle is None:
        bundle = ImageKeyBundle.generate(
            cipher_parameters(config),
            noise_parameters(config),
            cipher_name=config.cipher.name,
            secret_images=secret_images(config),
        )
    secret = secrets.token_bytes(32)
    cipher = build_cipher(bundle, noise_secret=secret, allow_targets=config.allow_targets)
    folder.mkdir(parents=True, exist_ok=True)
    return Owner(config, folder, bundle, cipher, secret)


def stolen_envelopes(path: Path) -> dict[str, bytes]:
    """Read the sealed images of an archive folder without any key, by record id."""
    archive = LocalArchive(path, site=SITE)
    return {record.record_id: record.envelope for split in SPLITS for record in archive.records(split)}


def wire_levels(envelope: bytes, parameters: CipherParameters) -> NDArray[np.float64]:
    """Read the bytes of an envelope as wire levels, whether it is sealed or not.

    Without the envelope layer these *are* the wire levels. Of a sealed record they are AES-GCM-SIV's
    ciphertext; an attacker who has nothing else can only try.

    Parameters
    ----------
    envelope
        One record.
    parameters
        Of the cipher.

    Returns
    -------
    ndarray
        float64 (H, W): tiled sub-bands where the cipher has the layer ``encode``, else pixels.
    """
    header = parse_header(envelope)
    bits = header.bits if parameters.has("encode") else header.bits[:1]
    wire = envelope[HEADER_BYTES:-TAG_BYTES]
    return unpack(wire, (header.height, header.width), bits).astype(np.float64)


def image_of(levels: NDArray[np.float64], parameters: CipherParameters) -> NDArray[np.float64]:
    """Turn a *difference* of wire levels into the difference of the (scrambled) images, in grey levels.

    In a difference the quantiser's offset and the secret image's term cancel, and what is left is linear:
    one step per level, divided by alpha.

    Parameters
    ----------
    levels
        (H, W), as :func:`wire_levels` of two records, subtracted.
    parameters
        Of the cipher.
    """
    if not parameters.has("encode"):
        return levels
    quantiser = make_quantiser(parameters.wavelet, parameters.band_bits)
    height, width = levels.shape[0] // 2, levels.shape[1] // 2
    scaled = np.empty_like(levels)
    for band, (step, alpha) in enumerate(zip(quantiser.steps, parameters.band_alphas, strict=True)):
        rows = slice(height * (band // 2), height * (band // 2 + 1))
        columns = slice(width * (band % 2), width * (band % 2 + 1))
        scaled[rows, columns] = levels[rows, columns] * step / alpha
    return np.asarray(inverse(scaled[None], parameters.wavelet)[0], np.float64)
