"""Bits per pixel against PSNR: ``python -m benchmarks.rate_distortion --images FOLDER --elpv 20``.

Each setting of ``cipher.bits`` is one number, or one for each sub-band (approximation, horizontal, vertical,
diagonal; for example 8,6,6,5). Bits per pixel are those of the whole envelope, header and tag included. PSNR
(mean over the images) is measured after restoration without noise, with noise of the given standard deviation
and no denoiser, and with the shipped denoiser.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.options import bits
from flep_fl.contracts.errors import FlepError
from flep_fl.data_owner.sources import load_source
from flep_fl.data_security.denoise.zoo import load_denoiser
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.parameters import CipherParameters, NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher, restore
from flep_fl.reporting.cipher_tables import markdown
from flep_fl.reporting.sample_images import named_images

GreyImage = NDArray[np.uint8]
SETTINGS = (
    16,
    8,
    (8, 7, 7, 7),
    (8, 6, 6, 6),
    (8, 5, 5, 5),
    (8, 4, 4, 4),
    (7, 6, 6, 6),
    (6, 5, 5, 5),
    (6, 4, 4, 4),
    5,
)


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the curve: bits per pixel, and mean PSNR in dB (infinite: exact)."""

    rate: float
    clean: float
    noisy: float
    denoised: float


def measure(images: Mapping[str, GreyImage], parameters: CipherParameters, std: float) -> Point:
    """Measure one setting on a set of images."""
    quiet, _ = _restored(images, parameters, NoiseParameters())
    noisy, rates = _restored(images, parameters, NoiseParameters(std=std))
    denoised, _ = _restored(images, parameters, NoiseParameters(std=std), denoiser="dncnn9")
    return Point(*(float(np.mean(values)) for values in (rates, quiet, noisy, denoised)))


def _restored(
    images: Mapping[str, GreyImage],
    parameters: CipherParameters,
    noise: NoiseParameters,
    denoiser: str = "none",
) -> tuple[list[float], list[float]]:
    """Return PSNR and bits per pixel of each image."""
    cipher = ThreeLayerCipher(
        ImageKeyBundle.generate(parameters, noise), noise_secret=secrets.token_bytes(32)
    )
    denoise = None if denoiser == "none" else load_denoiser(denoiser, cipher.residual_std, threads=1)
    quality, rates = [], []
    for image in images.values():
        envelopes = cipher.encrypt(image[None])
        rates.append(8 * len(envelopes[0]) / image.size)
        quality.append(psnr(image, restore(cipher, envelopes, denoise)[0]))
    return quality, rates


def elpv_sample(count: int) -> dict[str, GreyImage]:
    """Return a stratified sample of the solar cells, 300 x 300, always the same one."""
    source = load_source("elpv", limit=count, seed=0)
    return {f"elpv {index}": np.asarray(image) for index, image in enumerate(source.images)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every setting on every set of images and print one table a set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--images", type=Path, action="append", default=[], help="folder of images (repeatable)"
    )
    parser.add_argument("--elpv", type=int, default=0, help="number of solar cells of elpv-dataset")
    parser.add_argument("--noise-std", type=float, default=25.0, help="grey levels (default 25)")
    parser.add_argument(
        "--bits", nargs="+", type=bits, default=list(SETTINGS), help="settings, such as 8 8,6,6,6"
    )
    options = parser.parse_args(arguments)
    try:
        sets = {folder.resolve().name: named_images(folder) for folder in options.images}
        if options.elpv > 0:
            sets[f"elpv, {options.elpv} images"] = elpv_sample(options.elpv)
        if not sets:
            sets["scikit-image"] = named_images(None)
        for name, images in sets.items():
            rows = []
            for setting in options.bits:
                parameters = replace(CipherParameters(), bits=setting)
                point = measure(images, parameters, options.noise_std)
                values = (point.clean, point.noisy, point.denoised)
                rows.append(
                    [str(setting).strip("()"), f"{point.rate:.2f}", *(f"{value:.2f}" for value in values)]
                )
            print(f"\n{name}, sigma {options.noise_std:g}\n")
            print(
                markdown(["bits", "bits/pixel", "no noise dB", "noisy dB", "denoised dB"], rows), flush=True
            )
    except FlepError as error:
        print(f"error ({type(error).__name__}): {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
