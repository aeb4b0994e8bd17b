"""``action=measure``: how much of its images an owner's release leaves to the analysts."""

from __future__ import annotations

from pathlib import Path

from flep_fl.config import Config
from flep_fl.data_owner.home import load_home
from flep_fl.provision.owner_config import OwnerConfig
from flep_fl.reporting.console import say


def run_measure(config: OwnerConfig) -> None:
    """Restore a sample of the release of ``dataset=`` as an analyst does, and compare it with what is stored.

    With ``out=FILE`` the figures are written as JSON as well.

    Raises
    ------
    NotReleasedError
        Nothing is released.
    DenoiserError
        ``denoiser=`` has no network for the noise of this data set.
    """
    home = load_home(Path(config.home))
    from flep_fl.data_security.presets import build_cipher
    from flep_fl.data_security.restoring import require_order
    from flep_fl.private_database.releases import ReleaseBook
    from flep_fl.provision.owner import RESTORE_SAMPLE, compared, image_denoiser, restore_order
    from flep_fl.provision.owner_store import open_database
    from flep_fl.reporting.results import write_json

    settings = Config(denoiser=config.denoiser, restore=config.restore)
    order = restore_order(settings)
    with open_database(config, home) as database:
        found = database.dataset(config.dataset)
        book = ReleaseBook(database, home.signing_key(), allow_targets=config.allow_targets)
        sample = book.sample(config.dataset, RESTORE_SAMPLE)
        bundle = database.bundle(found.name, found.epoch)
    cipher = build_cipher(bundle, allow_targets=config.allow_targets)
    require_order(cipher, order)
    pairs = [(record.image, sealed.envelope) for record, sealed in sample]
    quality = compared(pairs, cipher, image_denoiser(settings, bundle, cipher), order)
    figures = {"psnr_db": quality.psnr_db, "noisy_psnr_db": quality.noisy_psnr_db}
    if config.out is not None:
        write_json(Path(config.out), {"dataset": found.name, "records": len(pairs), **figures})
    if quality.psnr_db is None or quality.noisy_psnr_db is None:
        say(f"{found.name}: {len(pairs)} released records restored exactly")
        return
    say(
        f"{found.name}: {len(pairs)} released records restored to {quality.psnr_db:.1f} dB PSNR, "
        f"before denoising {quality.noisy_psnr_db:.1f} dB"
    )
