"""Attacks on image keys: brute force on a shortened key, and a stolen bundle of an old epoch."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from flep_fl.attacks.pictures import Row
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import BruteForce, StolenBundle
from flep_fl.attacks.similarity import ssim
from flep_fl.attacks.stolen_archive import StolenArchive, make_owner
from flep_fl.attacks.victims import cipher_configuration, victim_images
from flep_fl.config import Config
from flep_fl.contracts.errors import ConfigError, FlepError
from flep_fl.data_security.envelope import parse_header
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.presets import build_cipher
from flep_fl.data_security.restoring import decrypt_images

_YEAR = 365.25 * 24 * 3600


def run_brute_force(config: Config, settings: BruteForce, folder: Path) -> Outcome:
    """Try master keys; all but ``unknown_bits`` of the key are given to the attacker.

    A guess is checked against the key id in the record's header, which is derived from the key.
    """
    bits, tries = settings.unknown_bits, settings.tries
    if not 1 <= bits <= 256 or tries < 1:
        raise ConfigError("attack.unknown_bits or attack.tries is out of range", expected="1..256, 1 or more")
    victim = victim_images(settings.images, settings.side, 2)[-1]
    owner = make_owner(config, folder)
    stolen = owner.release([victim])
    envelope = stolen.envelopes[stolen.record_ids[0]]
    wanted = parse_header(envelope).key_id
    known = int.from_bytes(owner.bundle.master_key, "big") >> bits << bits
    total = min(tries, 1 << bits)
    exhaustive = total == 1 << bits
    found: ImageKeyBundle | None = None
    tested, started = 0, time.perf_counter()
    for number in range(total):
        guess = number if exhaustive else secrets.randbelow(1 << bits)
        candidate = replace(owner.bundle, master_key=(known | guess).to_bytes(32, "big"))
        tested += 1
        if candidate.key_id == wanted:
            found = candidate
            break
    seconds = time.perf_counter() - started
    read = np.full(victim.shape, 127.5)
    if found is not None:
        cipher = build_cipher(found, allow_targets=config.allow_targets)
        read = decrypt_images(cipher, [envelope])[0].astype(np.float64).clip(0, 255)
    return Outcome(
        configuration={**cipher_configuration(config), "unknown_bits": bits, "tries": tested},
        success={
            "found": float(found is not None),
            "psnr_db": psnr(victim, read),
            "keys_per_second": tested / seconds,
            "log10_years_for_256_bits": 255 * math.log10(2) - math.log10(tested / seconds * _YEAR),
        },
        baseline={"found": 2.0**-bits, "psnr_db": psnr(victim, np.full(victim.shape, 127.5))},
        falls=found is not None,
        criterion="the key was found; blind guessing is one try",
        pictures={"read": [Row("original", [victim]), Row("what the attacker reads", [read])]},
        note="The master key has 256 bits; the attacker is given all but the unknown ones.",
    )


def run_stolen_bundle(config: Config, settings: StolenBundle, folder: Path) -> Outcome:
    """Try the bundle of an old epoch on archives of that epoch and of the next."""
    images = victim_images(settings.images, settings.side, settings.victims)
    owner = make_owner(config, folder / "old")
    old = owner.release(images)
    later = make_owner(config, folder / "new", bundle=owner.bundle.rotate())
    new = later.release(images)
    bundle = ImageKeyBundle.from_bytes(owner.bundle.to_bytes())  # what the thief holds: a file
    stranger = ImageKeyBundle.generate(
        bundle.cipher, bundle.noise, secret_images=bundle.secret_images, cipher_name=bundle.cipher_name
    )
    opened_old, read_old = _opened(config, bundle, old)
    # The header's key id is in the clear: the thief also writes its own into the new records.
    opened_new, read_new = _opened(config, bundle, new)
    forged = StolenArchive(
        new.path,
        {
            one: replace(parse_header(e), key_id=bundle.key_id, epoch=bundle.epoch).to_bytes()
            + e[len(parse_header(e).to_bytes()) :]
            for one, e in new.envelopes.items()
        },
        new.record_ids,
        new.parameters,
    )
    opened_forged, _ = _opened(config, bundle, forged)
    blind, _ = _opened(config, stranger, new)
    similar = float(np.mean([ssim(a, b) for a, b in zip(images, read_new, strict=True)]))
    return Outcome(
        configuration={**cipher_configuration(config), "records_per_epoch": len(images)},
        success={
            "opened_of_next_epoch": max(opened_new, opened_forged),
            "opened_of_its_own_epoch": opened_old,
            "ssim": similar,
        },
        baseline={
            "opened_of_next_epoch": blind,
            "opened_of_its_own_epoch": _opened(config, stranger, old)[0],
        },
        falls=opened_new > 0 or opened_forged > 0,
        criterion="a record of another epoch than the bundle's own opens",
        pictures={
            "epochs": [
                Row("original", images),
                Row("old epoch, with its own bundle", read_old),
                Row("next epoch, with the old bundle", read_new),
            ]
        },
        note="Its own epoch opens, as it must: a bundle is the key to one epoch.",
    )


def _opened(
    config: Config, bundle: ImageKeyBundle, stolen: StolenArchive
) -> tuple[float, list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]:
    """Try to decrypt every record; the share that opens, and the images (mid grey where not)."""
    cipher = build_cipher(bundle, allow_targets=config.allow_targets)
    images, opened = [], 0
    for one in stolen.record_ids:
        header = parse_header(stolen.envelopes[one])
        try:
            images.append(decrypt_images(cipher, [stolen.envelopes[one]])[0].astype(np.float64).clip(0, 255))
            opened += 1
        except FlepError:
            images.append(np.full(header.shape, 127.5))
    return opened / len(stolen.record_ids), images
