"""Two attacks on what is released more than once: the difference of two images, the mean of many releases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.attacks.pictures import Row
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import Averaging, ImageDifference
from flep_fl.attacks.similarity import ssim
from flep_fl.attacks.stolen_archive import SITE, image_of, make_owner, wire_levels
from flep_fl.attacks.victims import cipher_configuration, recognisable, victim_images
from flep_fl.config import Config
from flep_fl.contracts.archive import SPLITS
from flep_fl.contracts.errors import ConfigError
from flep_fl.data_analyst.source import LocalArchive, unlock
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.presets import build_cipher
from flep_fl.data_security.restoring import decrypt_images
from flep_fl.provision.owner import image_denoiser

_MIDDLE = 127.5


def run_difference(config: Config, settings: ImageDifference, folder: Path) -> Outcome:
    """Subtract the wires of two images: a secret image that both were blended with cancels."""
    first, second = victim_images(settings.images, settings.side, 2)
    stolen = make_owner(config, folder).release([first, second])
    one, other = stolen.wires()
    found = _shown(image_of(one - other, stolen.parameters))
    truth = _shown(first.astype(np.float64) - second)
    rng = np.random.default_rng(config.seed)
    blind = _shown(rng.permutation(found.ravel()).reshape(found.shape) * 2 - 2 * _MIDDLE)
    similar, guessed = ssim(truth, found), ssim(truth, blind)
    falls, criterion = recognisable(similar, guessed)
    return Outcome(
        configuration={**cipher_configuration(config), "side": settings.side},
        success={"ssim": similar, "psnr_db": psnr(truth, found)},
        baseline={"ssim": guessed, "psnr_db": psnr(truth, blind)},
        falls=falls,
        criterion=criterion,
        pictures={
            "difference": [
                Row("the two images", [first, second]),
                Row("their difference", [truth]),
                Row("difference of the stolen bytes", [found]),
                Row("blind guess: the same values anywhere", [blind]),
            ]
        },
    )


def run_averaging(config: Config, settings: Averaging, folder: Path) -> Outcome:
    """Average repeated releases of one image: independent noise goes, as one over the square root.

    An ``analyst`` holds the key bundle and decrypts every release. A ``thief`` does not; it averages the
    bytes, less those of an image that it knows.
    """
    if settings.holder not in ("analyst", "thief"):
        raise ConfigError("attack.holder is unknown", expected="analyst or thief", found=settings.holder)
    if settings.releases < 1:
        raise ConfigError("attack.releases starts at 1", found=settings.releases)
    known, victim = victim_images(settings.images, settings.side, 2)
    owner = make_owner(config, folder)
    count = settings.releases
    if settings.holder == "thief":
        stolen = owner.release([victim] * count + [known] * count)
        wires = [wire_levels(stolen.envelopes[one], stolen.parameters) for one in stolen.record_ids]
        singles = [
            image_of(a - b, stolen.parameters) + known for a, b in zip(wires, wires[count:], strict=False)
        ]
        note = "The thief has the second image in the clear, and the same number of its releases."
    else:
        archive = LocalArchive(owner.release([victim] * count).path, site=SITE)
        bundle = unlock(archive, owner.recipient.private_bytes_raw())
        cipher = build_cipher(bundle, allow_targets=config.allow_targets)
        envelopes = [record.envelope for record in archive.records(SPLITS[0])]
        singles = [image.astype(np.float64) for image in decrypt_images(cipher, envelopes)]
        note = (
            "The analyst may read these images. Noise is what their owner puts between it and the exact "
            "pixels, and it bounds nothing once an image is released again and again."
        )
    mean = np.mean(singles, axis=0).clip(0, 255)
    single = singles[0].clip(0, 255)
    success = {
        "ssim": ssim(victim, mean),
        "psnr_db": psnr(victim, mean),
        "psnr_db_one_release": psnr(victim, single),
    }
    if settings.holder == "analyst" and (denoise := image_denoiser(config, owner.bundle, owner.cipher)):
        denoised = denoise(single[None].astype(np.float32))[0].clip(0, 255)
        success["psnr_db_one_release_denoised"] = psnr(victim, denoised)
    noise = np.random.default_rng(config.seed).normal(victim.mean(), victim.std(), victim.shape).clip(0, 255)
    guessed = max(ssim(victim, noise), ssim(victim, np.full(victim.shape, _MIDDLE)))
    falls, criterion = recognisable(success["ssim"], guessed)
    if settings.holder == "analyst":
        falls = falls and success["psnr_db"] > success["psnr_db_one_release"] + 3
        criterion += ", and at least 3 dB better than one release"
    return Outcome(
        configuration={
            **cipher_configuration(config),
            "side": settings.side,
            "holder": settings.holder,
            "releases": count,
        },
        success=success,
        baseline={"ssim": guessed, "psnr_db": psnr(victim, noise)},
        falls=falls,
        criterion=criterion,
        pictures={
            "average": [
                Row("original", [victim]),
                Row("one release", [single]),
                Row(f"mean of {count} releases", [mean]),
            ]
        },
        note=note,
    )


def _shown(difference: NDArray[np.floating]) -> NDArray[np.float64]:
    """Put a difference of -255..255 on the scale 0..255."""
    return np.asarray(difference / 2 + _MIDDLE, np.float64).clip(0, 255)
