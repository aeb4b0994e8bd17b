"""The denoisers that ship, beside BM3D: ``python -m benchmarks.denoisers --images FOLDER``.

``--table levels``: mean PSNR (grey, unclipped Gaussian noise) and time of every network, of BM3D and of doing
nothing, at every level. Times are ratios to the paper's network in plain float32 (not folded, PyTorch's
default memory order) in the same run. BM3D is Mäkinen, Azzari, Foi's (``pip install -e '.[bench]'``; its
licence allows non-commercial use only).
``--table families``: each family of noise as an analyst gets it: not denoised, with the Gaussian network at
the noise's root mean square, and with what the key bundle's parameters choose.
``--table estimate``: the estimate of an unknown level against the true one.
``--table switches``: from which level on the network of the next higher level does better; ``--write`` puts
it down beside the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import DenoiserError, FlepError
from flep_fl.contracts.files import write_atomic
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.denoise.card import deserialise, parse_card
from flep_fl.data_security.denoise.estimate import estimate_std
from flep_fl.data_security.denoise.families import denoiser_for
from flep_fl.data_security.denoise.inference import network_denoiser
from flep_fl.data_security.denoise.zoo import SWITCHES, load_denoiser
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.reporting.cipher_tables import markdown
from flep_fl.reporting.denoiser_evaluation import Task, add_noise, plain_ms_per_megapixel, residual
from flep_fl.reporting.sample_images import named_images

Images = Mapping[str, NDArray[np.uint8]]
LEVELS = (5.0, 10.0, 15.0, 25.0, 35.0, 50.0)
FAMILIES = (
    NoiseParameters("laplacian", std=25.0),
    NoiseParameters("rayleigh", std=25.0),
    NoiseParameters("rician", std=25.0),
    NoiseParameters("poisson_gaussian", std=5.0, gain=1.0),
    NoiseParameters("poisson_gaussian", std=10.0, gain=5.0),
    NoiseParameters("salt_and_pepper", amount=0.05),
    NoiseParameters("salt_and_pepper", amount=0.3),
)


def bm3d_denoiser(std: float) -> Denoise:
    """Return BM3D for noise of ``std``."""
    import bm3d

    def denoise(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([bm3d.bm3d(image / 255.0, std / 255.0) * 255.0 for image in images]).astype(
            np.float32
        )

    return denoise


def quality(images: Images, noise: NoiseParameters, denoise: Denoise) -> tuple[float, float]:
    """Return mean PSNR in dB and ms for a megapixel; image ``i`` gets the noise of seed ``[0, i]``."""
    values, elapsed, pixels = [], 0.0, 0
    for index, image in enumerate(images.values()):
        noisy = add_noise(image, noise, np.random.default_rng([0, index]))
        started = time.perf_counter()
        clean = denoise(noisy[None])[0]
        elapsed += time.perf_counter() - started
        pixels += image.size
        values.append(psnr(image, clean))
    return float(np.mean(values)), 1e9 * elapsed / pixels


def levels(images: Images, stds: Sequence[float], names: Sequence[str], threads: int | None) -> str:
    """Return the table of PSNR by level; the time is that of the last level."""
    makers: dict[str, Callable[[float], Denoise]] = {
        name: (lambda std, name=name: load_denoiser(name, std, threads=threads))  # type: ignore[misc]
        for name in names
        if name != "bm3d"
    }
    if "bm3d" in names:
        makers["bm3d"] = bm3d_denoiser
    plain = plain_ms_per_megapixel(
        Task("dncnn9", NoiseParameters(std=25.0), threads=threads), next(iter(images.values()))
    )
    rows = []
    for name, make in makers.items():
        cells, cost = [], 0.0
        for std in stds:
            try:
                value, cost = quality(images, NoiseParameters(std=std), make(std))
                cells.append(f"{value:.2f}")
            except DenoiserError:
                cells.append("out of reach")
        ratio = "" if name == "none" else f"{plain / cost:.2f}"
        rows.append([name, *cells, f"{cost:.0f}", ratio])
        print(f"{name} is done", file=sys.stderr, flush=True)
    header = [
        "denoiser",
        *(f"{std:g}" for std in stds),
        "ms/megapixel",
        "plain float32 takes x times as long",
    ]
    return f"plain float32 dncnn9: {plain:.0f} ms/megapixel\n\n" + markdown(header, rows)


def families(images: Images, name: str) -> str:
    """Return the table of noise families."""
    rows = []
    for noise in FAMILIES:
        deviation = min(max(noise.deviation, 2.0), 60.0)
        ways: tuple[Denoise, ...] = (
            lambda batch: batch,
            load_denoiser(name, deviation),
            denoiser_for(name, residual(noise)),
        )
        values = [quality(images, noise, way)[0] for way in ways]
        what = {
            "poisson_gaussian": f"gain {noise.gain:g}, std {noise.std:g}",
            "salt_and_pepper": f"amount {noise.amount:g}",
        }.get(noise.family, f"std {noise.std:g}")
        rows.append([noise.family, what, *(f"{value:.2f}" for value in values)])
        print(f"{noise.family} is done", file=sys.stderr, flush=True)
    header = ["noise", "parameters", "not denoised", f"{name} for Gaussian noise", "as chosen"]
    return markdown(header, rows)


def estimates(images: Images, stds: Sequence[float]) -> str:
    """Return the table of estimated levels."""
    rows = []
    for std in (0.0, *stds):
        found = np.array(
            [
                estimate_std(add_noise(image, NoiseParameters(std=std), np.random.default_rng([0, index])))
                for index, image in enumerate(images.values())
            ]
        )
        error = found - std
        rows.append([f"{std:g}", f"{found.mean():.2f}", f"{error.mean():+.2f}", f"{np.abs(error).max():.2f}"])
    return markdown(["sigma", "mean estimate", "mean error", "largest error"], rows)


def switches(images: Images) -> dict[str, float]:
    """Measure, for every two neighbouring networks of dncnn9, the level at which they do equally well."""
    folder = files("flep_fl.data_security.denoise") / "weights"
    cards = {
        entry.name.removesuffix(".json"): parse_card(entry.read_bytes())
        for entry in folder.iterdir()
        if entry.name.startswith("dncnn9_gaussian_") and entry.name.endswith(".json")
    }
    stems = sorted(cards, key=lambda stem: cards[stem].noise_std)
    networks = {
        stem: deserialise((folder / f"{stem}.safetensors").read_bytes(), card) for stem, card in cards.items()
    }
    found = {}
    for lower, upper in pairwise(stems):
        low, high = cards[lower].noise_std, cards[upper].noise_std
        places = low + (high - low) * np.array([0.25, 0.5, 0.75])
        gaps = []
        for std in places:
            one, two = (
                quality(
                    images,
                    NoiseParameters(std=float(std)),
                    network_denoiser(networks[stem], gain=float(cards[stem].noise_std / std)),
                )[0]
                for stem in (lower, upper)
            )
            gaps.append(two - one)
            print(f"{lower} {one:.3f}, {upper} {two:.3f} dB at {std:g}", file=sys.stderr, flush=True)
        # The gap rises with the level: where the straight line through it crosses zero.
        slope, offset = np.polyfit(places, gaps, 1)
        crossing = -offset / slope if slope > 0 else np.sqrt(low * high)
        found[f"{lower}|{upper}"] = round(float(np.clip(crossing, low, high)), 1)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of pictures (default: scikit-image's)")
    parser.add_argument("--table", choices=("levels", "families", "estimate", "switches"), default="levels")
    parser.add_argument("--denoisers", nargs="+", default=["dncnn9", "fast", "blind", "bm3d", "none"])
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--limit", type=int, help="take so many pictures, evenly spread")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--write", action="store_true", help="with --table switches: write the file")
    options = parser.parse_args(arguments)
    try:
        images = named_images(options.images)
        if options.limit is not None:
            names = list(images)[:: max(1, len(images) // options.limit)][: options.limit]
            images = {name: images[name] for name in names}
        if options.table == "levels":
            print(levels(images, options.levels, options.denoisers, options.threads))
        elif options.table == "families":
            print(families(images, options.denoisers[0] if len(options.denoisers) == 1 else "fast"))
        elif options.table == "estimate":
            print(estimates(images, options.levels))
        else:
            text = json.dumps(switches(images), indent=2) + "\n"
            print(text, end="")
            if options.write:
                place = Path(str(files("flep_fl.data_security.denoise") / "weights")) / SWITCHES
                write_atomic(place, text.encode())
    except FlepError as error:
        print(f"error ({type(error).__name__}): {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
