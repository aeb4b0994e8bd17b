"""Measuring a denoiser: PSNR, SSIM and time, image by image."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ConfigError
from flep_fl.contracts.files import write_atomic
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.denoise.estimate import estimate_std
from flep_fl.data_security.denoise.families import denoiser_for
from flep_fl.data_security.denoise.inference import haar_noise
from flep_fl.data_security.denoise.zoo import find_card
from flep_fl.data_security.metrics import psnr, ssim
from flep_fl.data_security.noise import NOISE_FAMILIES, TABLE_SIZE
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.restoring import ResidualNoise

GreyImage = NDArray[np.uint8]
FloatImage = NDArray[np.float32]

_PLOTTED = 4
_WARM_UP = 512
"""Images in the picture."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured.

    Attributes
    ----------
    denoiser
        ``dncnn9``, ``fast``, ``blind`` or ``none``.
    noise
        Family and parameters, in image units; its mean plays no part, because the analyst takes it off.
    seed
        Image ``i`` gets the noise of ``numpy.random.default_rng([seed, i])``.
    estimated
        True: the denoiser is chosen, image by image, by an estimate of the standard deviation.
    threads, device
        Of PyTorch.
    """

    denoiser: str
    noise: NoiseParameters
    seed: int = 0
    estimated: bool = False
    threads: int | None = None
    device: str = "auto"


def add_noise(image: GreyImage, noise: NoiseParameters, random: np.random.Generator) -> FloatImage:
    """Return ``image`` with noise as an analyst gets it: float, not clipped.

    Additive families lie in the Haar coefficients of each 2x2 block, which is what the cipher's transform
    makes of them; the others act on the pixels.
    """
    if noise.family == "gaussian":
        return (image + random.standard_normal(image.shape) * noise.std).astype(np.float32)
    family = NOISE_FAMILIES[noise.family]
    if family.additive:
        return (image + haar_noise(noise.family, image.shape, noise.std, random)).astype(np.float32)
    words = random.integers(TABLE_SIZE, size=(family.words, *image.shape), dtype=np.uint16)
    return family.apply(image.astype(np.float32), words, noise)


def residual(noise: NoiseParameters) -> ResidualNoise:
    """Return what a denoiser has to know of ``noise``."""
    return ResidualNoise(noise.family, noise.std, noise.gain, noise.amount)


def evaluate_denoiser(
    images: Mapping[str, GreyImage],
    task: Task,
    *,
    plot: Path | None = None,
    on_event: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Add noise to every image, remove it, and compare.

    Parameters
    ----------
    images
        uint8 (H, W) by name.
    task
        What is measured.
    plot
        PNG to draw (clean, noisy, denoised; four images at most); None draws nothing.
    on_event
        Receives a line for every image.

    Returns
    -------
    dict
        ``psnr_db``, ``ssim``, ``ms_per_megapixel`` (means over the images; time over all pixels),
        ``noisy_psnr_db``, ``noisy_ssim``, ``plain_float32`` (see :func:`plain_ms_per_megapixel`; None for
        ``none``) and ``per_image``: the same by image, with ``name`` and ``estimated_std``.

    Raises
    ------
    ConfigError
        An estimate is asked for noise that is not Gaussian.
    FlepError
        As :func:`~flep_fl.data_security.denoise.families.denoiser_for`.
    """
    if task.estimated and task.noise.family != "gaussian":
        raise ConfigError(
            "estimate=true needs Gaussian noise",
            expected="noise=gaussian",
            found=task.noise.family,
            remedy="Set estimate=false",
        )
    told = None if task.estimated else _denoiser(task, residual(task.noise))
    entries: list[dict[str, Any]] = []
    panels: list[tuple[GreyImage, FloatImage, FloatImage]] = []
    for index, (name, image) in enumerate(images.items()):
        noisy = add_noise(image, task.noise, np.random.default_rng([task.seed, index]))
        estimate = estimate_std(noisy) if min(image.shape) >= 16 else None
        denoise = told or _denoiser(task, ResidualNoise(std=estimate or 0.0))
        if index == 0:
            # The first call of a process pays for PyTorch's start, the first of a size for its memory.
            denoise(noisy[None, :_WARM_UP, :_WARM_UP])
        started = time.perf_counter()
        clean = denoise(noisy[None])[0]
        elapsed = time.perf_counter() - started
        entry = {
            "name": name,
            "psnr_db": psnr(image, clean),
            "ssim": ssim(image, clean),
            "ms_per_megapixel": 1e9 * elapsed / image.size,
            "noisy_psnr_db": psnr(image, noisy),
            "noisy_ssim": ssim(image, noisy),
            "estimated_std": estimate,
        }
        entries.append(entry)
        if len(panels) < _PLOTTED:
            panels.append((image, noisy, clean))
        on_event(f"{name}: {entry['noisy_psnr_db']:.2f} -> {entry['psnr_db']:.2f} dB")
    pixels = np.array([image.size for image in images.values()], dtype=np.float64)
    figures = ("psnr_db", "ssim", "noisy_psnr_db", "noisy_ssim")
    report = {name: float(np.mean([entry[name] for entry in entries])) for name in figures}
    times = np.array([entry["ms_per_megapixel"] for entry in entries])
    report["ms_per_megapixel"] = float((times * pixels).sum() / pixels.sum())
    plain = None
    if task.denoiser != "none":
        plain = plain_ms_per_megapixel(task, next(iter(images.values())))
    if plot is not None:
        draw(panels, plot)
    return {
        **report,
        "plain_float32": None
        if plain is None
        else {"ms_per_megapixel": plain, "ratio": plain / report["ms_per_megapixel"]},
        "per_image": entries,
    }


def plain_ms_per_megapixel(task: Task, image: GreyImage) -> float:
    """Time the Gaussian network of ``task.denoiser`` as one would write it down, in ms for a megapixel.

    float32, batch normalisation not folded, PyTorch's default memory order, the whole image at once; best of
    three.
    """
    import torch

    from flep_fl.data_security.denoise.capability import select_device
    from flep_fl.data_security.denoise.network import DnCNN

    card = find_card(task.denoiser, 25.0)
    device = select_device(task.device)
    network = DnCNN(card.depth, card.channels, unshuffle=card.unshuffle, conditioned=card.conditioned)
    body = network.body.to(device).eval()
    even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
    inputs = torch.from_numpy(even.astype(np.float32) / 255)[None, None].to(device)
    inputs = torch.nn.functional.pixel_unshuffle(inputs, card.unshuffle)
    if card.conditioned:
        inputs = torch.cat([inputs, torch.full_like(inputs[:, :1], 25 / 255)], dim=1)
    before = torch.get_num_threads()
    times = []
    try:
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        with torch.inference_mode():
            for _ in range(3):
                started = time.perf_counter()
                float(body(inputs).sum())  # reading a number waits for a GPU
                times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 1e9 * min(times) / even.size


def draw(panels: list[tuple[GreyImage, FloatImage, FloatImage]], path: Path) -> None:
    """Draw rows of clean, noisy and denoised images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 3, squeeze=False)
    for row, (clean, noisy, denoised) in zip(axes, panels, strict=True):
        titles = (
            "clean",
            f"noisy, {psnr(clean, noisy):.2f} dB",
            f"denoised, {psnr(clean, denoised):.2f} dB",
        )
        for place, title, image in zip(row, titles, (clean, noisy, denoised), strict=True):
            place.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            place.set_title(title)
            place.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())


def _denoiser(task: Task, noise: ResidualNoise) -> Denoise:
    return denoiser_for(task.denoiser, noise, threads=task.threads, device=task.device)
