"""The data owner's job: images into the private database, sealed archives out of it, one per site."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.config import Config
from flep_fl.contracts.errors import ArchiveError, DenoiserError, EmptyDatasetError
from flep_fl.contracts.files import write_secret
from flep_fl.contracts.owner_records import OwnerImage, stacked
from flep_fl.contracts.ports import Denoise, Entropy, ImageCipher
from flep_fl.data_owner.partition import held_out_shares, partition, split_test
from flep_fl.data_owner.release import seal_archive
from flep_fl.data_owner.sources import OwnerImages, decode_grey, load_source, resize_area
from flep_fl.data_security.keys import SECRET_IMAGE_SIDE, ImageKeyBundle
from flep_fl.data_security.parameters import CipherParameters, NoiseParameters
from flep_fl.data_security.pipeline import RestoreOrder, restore
from flep_fl.data_security.presets import build_cipher, get_preset
from flep_fl.data_security.restoring import (
    ResidualNoise,
    require_order,
    residual_noise,
    residual_std,
)
from flep_fl.private_database.access import log_releases
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.provision.kits import OWNER, OwnerKit
from flep_fl.reporting.results import RestoreQuality

if TYPE_CHECKING:
    from omegaconf import DictConfig

RESTORE_SAMPLE = 24
_EPOCH = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """A few plain images of a data set, and its number of classes: for a report on the owner's side."""

    images: Sequence[OwnerImage] = field(repr=False)
    classes: int


@dataclass(frozen=True, slots=True)
class Release:
    """What the owner's job gave.

    Attributes
    ----------
    train, test
        Numbers of records released, by site.
    restore
        Quality of a sample after restoration.
    sample
        These images, plain.
    """

    train: dict[str, int]
    test: dict[str, int]
    restore: RestoreQuality
    sample: Sample


def configured_images(config: Config) -> OwnerImages:
    """Return the images that ``data`` and ``seed`` of a configuration name.

    Raises
    ------
    FlepError
        As :func:`flep_fl.data_owner.sources.load_source`.
    """
    data = config.data
    return load_source(
        data.name,
        path=Path(data.path) if data.path else None,
        image_size=data.image_size,
        limit=data.limit,
        seed=config.seed,
        mode=data.mode,
    )


def release_data_set(
    config: Config,
    kit: OwnerKit,
    out: Path,
    *,
    entropy: Entropy = secrets.token_bytes,
    on_event: Callable[[str], None] = lambda _line: None,
) -> Release:
    """Fill the private database and seal one archive for each site of the federation.

    Parameters
    ----------
    config
        ``data``, ``partition``, ``cipher``, ``noise``, ``denoiser``, ``restore``, ``seed``.
    kit
        The owner's kit: names and public keys of the sites, and the owner's signing key.
    out
        Gets ``owner/`` (database and keys, for the owner alone) and one folder per site.
    entropy
        Source of keys, nonces and noise; anything but ``secrets.token_bytes`` is for simulation.
    on_event
        Gets one line of progress at a time.

    Raises
    ------
    DataError, CipherParameterError, ArchiveError, DenoiserError
        Before anything is written, where the images or parameters are at fault.
    """
    data, federation = config.data, kit.federation
    taken = [name for name in (OWNER, *federation.sites) if (out / name).exists()]
    if taken:
        raise ArchiveError(
            f"{out} already holds {', '.join(taken)}", remedy="Choose another out= or remove them yourself"
        )
    source = configured_images(config)
    bundle = ImageKeyBundle.generate(
        cipher_parameters(config),
        noise_parameters(config),
        epoch=_EPOCH,
        entropy=entropy,
        cipher_name=config.cipher.name,
        secret_images=secret_images(config),
    )
    noise_secret = entropy(32)
    cipher = build_cipher(
        bundle, noise_secret=noise_secret, entropy=entropy, allow_targets=config.allow_targets
    )
    require_order(cipher, restore_order(config))
    denoise = image_denoiser(config, bundle, cipher)
    names = sorted(federation.sites)
    train, test = split_test(source.labels, data.test_fraction, config.seed)
    labels = np.asarray(source.labels)
    parts = partition(
        labels[train], len(names), name=config.partition.name, alpha=config.partition.alpha, seed=config.seed
    )
    shares = held_out_shares(test, len(names), config.seed)
    majority = Counter(labels[train].tolist()).most_common(1)[0][0]

    owner = out / OWNER
    owner.mkdir(parents=True)
    owner.chmod(0o700)
    owner_key = secrets.token_bytes(32)
    write_secret(owner / "database.key", owner_key)
    write_secret(owner / "noise.key", noise_secret)
    write_secret(owner / "bundle.key", bundle.to_bytes())
    on_event(f"{len(labels)} images of {source.name}: {len(train)} for training, {len(test)} held out")
    with OwnerDatabase.create(
        owner / "database.sqlite", owner_key, dataset=source.name, classes=source.classes
    ) as database:
        splits = ["train"] * len(labels)
        for index in test:
            splits[index] = "test"
        ids = database.ingest(source.images, source.labels, splits)
        on_event("sealed into the private database")
        for name, part, share in zip(names, parts, shares, strict=True):
            chosen = [ids[i] for i in (*train[part], *share)]
            log_releases(database, chosen, site=name, epoch=_EPOCH)
            seal_archive(
                database,
                chosen,
                cipher=cipher,
                bundle=bundle,
                site=name,
                dataset=source.name,
                classes=source.classes,
                majority_class=majority,
                recipient_x25519=federation.sites[name].encryption_key,
                signing_key=kit.signing_key.private_bytes_raw(),
                out=out / name,
                entropy=entropy,
            )
            on_event(f"archive for {name}: {len(part)} training and {len(share)} held-out images")
    return Release(
        train={name: len(part) for name, part in zip(names, parts, strict=True)},
        test={name: len(share) for name, share in zip(names, shares, strict=True)},
        restore=restore_quality(source, cipher, denoise, restore_order(config)),
        sample=sample_of(source),
    )


def image_denoiser(config: Config, bundle: ImageKeyBundle, cipher: ImageCipher) -> Denoise | None:
    """Choose the denoiser by the noise that the cipher leaves; None where nothing is to be removed.

    Family and level come from the noise parameters in the key bundle, through the cipher's
    ``residual_noise``.

    Raises
    ------
    DenoiserError
        When there is none for this noise; the message says where the level comes from. The paper's literal
        layers turn 25 levels of the wire into 100 grey levels of the restored image, for instance.
    """
    from flep_fl.data_security.denoise.families import denoiser_for

    if residual_std(cipher) == 0 or config.denoiser.name == "none":
        return None
    noise = residual_noise(cipher)
    if restore_order(config) == "denoise_first":
        # In the paper's order the network is chosen by the bundle's figure itself, as the paper says.
        noise = ResidualNoise(std=bundle.noise.deviation)
    try:
        return denoiser_for(
            config.denoiser.name, noise, threads=config.runtime.threads, device=config.runtime.device
        )
    except DenoiserError as exc:
        raise DenoiserError(
            f"{exc.problem} (noise.family={bundle.noise.family}, noise.std={bundle.noise.std:g} "
            f"in {bundle.cipher.noise_units} units, "
            f"restore.order={config.restore.order})",
            expected=exc.expected,
            found=exc.found,
            remedy=f"{exc.remedy}. Or choose another noise.std, noise.recovery=keyed or denoiser=none",
        ) from exc


def restore_order(config: Config) -> RestoreOrder:
    """Return ``restore.order``, which :func:`flep_fl.config.check` has checked."""
    return "denoise_first" if config.restore.order == "denoise_first" else "restore_first"


def restore_quality(
    source: OwnerImages,
    cipher: ImageCipher,
    denoise: Denoise | None,
    order: RestoreOrder,
) -> RestoreQuality:
    """Encrypt and restore a sample of the owner's images; mean PSNR with and without the denoiser."""
    pairs = ((plain, cipher.encrypt(stacked([plain]))[0]) for plain in restore_sample(source))
    return compared(pairs, cipher, denoise, order)


def compared(
    pairs: Iterable[tuple[OwnerImage, bytes]],
    cipher: ImageCipher,
    denoise: Denoise | None,
    order: RestoreOrder,
) -> RestoreQuality:
    """Compare images with what an analyst makes of their envelopes; mean PSNR with and without the denoiser.

    Parameters
    ----------
    pairs
        Each plain image, uint8 or uint16, (H, W) or (C, H, W), with its envelope.
    cipher, denoise, order
        As an analyst has them.
    """
    from flep_fl.data_security.metrics import psnr

    restored: list[float] = []
    noisy: list[float] = []
    for plain, envelope in pairs:
        envelopes = [envelope]
        image = plain * np.float32(255 / np.iinfo(plain.dtype).max)  # the scale of what is restored
        noisy.append(psnr(image, restore(cipher, envelopes)[0]))
        best = restore(cipher, envelopes, denoise, order)[0] if denoise else None
        restored.append(noisy[-1] if best is None else psnr(image, best))
    return RestoreQuality(_mean(restored), _mean(noisy))


def restore_sample(source: OwnerImages) -> list[OwnerImage]:
    """Return images spread over the data set, :data:`RESTORE_SAMPLE` at most."""
    step = max(1, len(source.images) // RESTORE_SAMPLE)
    return [source.images[index] for index in range(0, len(source.images), step)[:RESTORE_SAMPLE]]


def sample_of(source: OwnerImages) -> Sample:
    """Return the images that :func:`restore_sample` chooses, for a report."""
    return Sample(restore_sample(source), len(source.classes))


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if len(finite) == len(values) else None


def noise_parameters(config: Config) -> NoiseParameters:
    """Return the noise parameters of the configuration."""
    noise = config.noise
    return NoiseParameters(
        family=noise.family,
        mean=noise.mean,
        std=noise.std,
        recovery=noise.recovery,
        gain=noise.gain,
        amount=noise.amount,
        salt=noise.salt,
    )


def _per_band(value: Any) -> Any:
    """Return a list of four as a tuple, one number as it is; :class:`CipherParameters` checks both."""
    return tuple(value) if isinstance(value, list) else value


def cipher_parameters(config: Config) -> CipherParameters:
    """Return the preset's parameters with the configuration's values in place of its own."""
    cipher = config.cipher
    preset = get_preset(cipher.name, allow_targets=config.allow_targets).parameters
    layers = preset.layers if cipher.layers is None else tuple(cipher.layers)
    bits = _per_band(cipher.bits)
    if bits is None:
        # Without the transform there is one band, as precise as the preset's best.
        bits = preset.bits if "encode" in layers else max(preset.band_bits)
    return replace(
        preset,
        layers=layers,
        block_side=cipher.block_side,
        wavelet=cipher.wavelet,
        alpha=_per_band(cipher.alpha),
        bits=bits,
        noise_units=preset.noise_units if config.noise.units is None else config.noise.units,
    )


def secret_images(config: Config) -> list[NDArray[np.uint8]] | None:
    """Read the owner's secret pictures, grey, reduced to 256 x 256; None lets the bundle draw its own.

    Random pixels hide most: a photograph's detail bands are nearly empty.

    Raises
    ------
    EmptyDatasetError, ImageFormatError
        When the folder holds no picture, or one that does not decode.
    """
    if config.cipher.secret_images is None:
        return None
    folder = Path(config.cipher.secret_images)
    if not folder.is_dir():
        raise EmptyDatasetError(
            f"cipher.secret_images={folder} is no folder", remedy="Name one with pictures"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise EmptyDatasetError(
            f"cipher.secret_images={folder} holds no picture", remedy="Name a folder with one picture or more"
        )
    return [resize_area(decode_grey(path), SECRET_IMAGE_SIDE) for path in files]


def run_seal(cfg: DictConfig) -> None:
    """Run ``python -m scripts.seal``: check, release, report.

    Raises
    ------
    FlepError
        As :func:`release_data_set`, or when the configuration or the kits are at fault.
    """
    from flep_fl.entry import kit_config, output_dir, require
    from flep_fl.provision.kits import load_owner_kit
    from flep_fl.reporting.console import Progress
    from flep_fl.reporting.results import versions, write_json

    require(cfg, "out", "archive")
    kit = load_owner_kit(Path(cfg.kits) / OWNER)
    config = kit_config(cfg, kit.federation.shared, kit.federation.address)
    progress = Progress(OWNER)
    with progress.live():
        release = release_data_set(config, kit, Path(config.out), on_event=progress)
    quality = release.restore
    if quality.psnr_db is not None and quality.noisy_psnr_db is not None:
        progress(f"restore: {quality.psnr_db:.2f} dB, noisy {quality.noisy_psnr_db:.2f} dB")
    write_json(
        output_dir() / "results.json",
        {
            "sites": {
                name: {"train": release.train[name], "test": release.test[name]} for name in release.train
            },
            "restore": {"psnr_db": quality.psnr_db, "noisy_psnr_db": quality.noisy_psnr_db},
            "versions": versions(),
        },
    )
