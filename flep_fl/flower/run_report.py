"""What a run leaves for people to read: ``report.html``, and what it can be made from again."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from flep_fl.config import Config
from flep_fl.contracts.errors import FlepError
from flep_fl.contracts.files import write_secret
from flep_fl.contracts.owner_records import OwnerImage
from flep_fl.reporting.redaction import redacted
from flep_fl.reporting.results import REPORT, REPORT_DATA

if TYPE_CHECKING:
    from flep_fl.provision.owner import Sample
    from flep_fl.reporting.inversion_view import InversionView

Say = Callable[[str], None]

Invert = Callable[[Config, "Sample"], "InversionView"]
"""Attacks an update of this run's network; :func:`flep_fl.attacks.run_view.invert_for_report`."""


def write_run_report(
    out: Path,
    config: Config,
    results: dict[str, Any],
    sample: Callable[[], Sample],
    *,
    invert: Invert | None = None,
    title: str = "Federation run",
    on_event: Say = lambda _line: None,
) -> Path | None:
    """Write ``report.html`` for those who hold the images anyway, and ``report_data.json``, both 0600.

    Parameters
    ----------
    out
        The run's folder.
    config
        Its configuration; ``report`` says how much is shown.
    results
        The content of ``results.json``.
    sample
        Returns a few of the owner's images, plain; asked only where they are shown.
    invert
        Makes the picture of what a cloud can read from an update; None: the page has none.
    title
        Heading.
    on_event
        Gets a line where no report can be made: the run itself is over and its results are kept.

    Returns
    -------
    Path or None
        The page, where there is one.
    """
    if config.report.name == "none":
        return None
    from flep_fl.reporting.page.render import write_page
    from flep_fl.reporting.run_page import run_page

    try:
        images = inversion = None
        if config.report.name == "full":
            shown = sample()
            images = _images(config, shown.images)
            inversion = None if invert is None else invert(config, shown)
        settings = redacted(plain_settings(config))
        data = {
            "title": title,
            "settings": settings,
            "images": None if images is None else images.to_json(),
            "inversion": None if inversion is None else inversion.to_json(),
        }
        write_secret(out / REPORT_DATA, json.dumps(data).encode() + b"\n")
        page = run_page(results, settings, images=images, inversion=inversion, title=title)
        return write_page(out / REPORT, page)
    except FlepError as exc:
        on_event(f"no report: {type(exc).__name__}: {exc}")
        return None


def load_sample(config: Config) -> Sample:
    """Return a few of the run's images, plain.

    Raises
    ------
    FlepError
        As :func:`flep_fl.data_owner.sources.load_source`.
    """
    from flep_fl.provision.owner import configured_images, sample_of

    return sample_of(configured_images(config))


def write_cloud_report(out: Path, config: Config, results: dict[str, Any], shared: dict[str, Any]) -> None:
    """Write the cloud's own ``report.html``: what the cloud knows and nothing else."""
    if config.report.name == "none":
        return
    from flep_fl.reporting.page.render import write_page
    from flep_fl.reporting.run_page import cloud_page

    write_page(out / REPORT, cloud_page(results, shared))


def _images(config: Config, sample: Sequence[OwnerImage]) -> Any:
    from flep_fl.data_security.keys import ImageKeyBundle
    from flep_fl.data_security.pipeline import ThreeLayerCipher
    from flep_fl.data_security.presets import build_cipher, get_preset
    from flep_fl.provision.owner import (
        cipher_parameters,
        image_denoiser,
        noise_parameters,
        restore_order,
        secret_images,
    )
    from flep_fl.reporting.cipher_evaluation import subject_of
    from flep_fl.reporting.image_view import view_images

    parameters, noise = cipher_parameters(config), noise_parameters(config)
    bundle = ImageKeyBundle.generate(
        parameters, noise, cipher_name=config.cipher.name, secret_images=secret_images(config)
    )
    cipher = build_cipher(bundle, noise_secret=secrets.token_bytes(32), allow_targets=config.allow_targets)
    preset = get_preset(config.cipher.name, allow_targets=config.allow_targets)
    return view_images(
        sample,
        cipher,
        subject_of(parameters, noise) if preset.factory is ThreeLayerCipher else None,
        denoise=image_denoiser(config, bundle, cipher),
        order=restore_order(config),
        keys=config.report.keys,
        seed=config.seed,
    )


def plain_settings(config: Config) -> dict[str, Any]:
    """Return the whole configuration as nested plain values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    return {str(name): value for name, value in plain.items()} if isinstance(plain, dict) else {}
