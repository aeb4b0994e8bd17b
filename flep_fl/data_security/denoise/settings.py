"""Settings of a training run; plain data, so that a bad value is named before PyTorch is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from flep_fl.contracts.errors import ConfigError

TRAINED_FAMILIES = ("gaussian", "laplacian", "rayleigh")
"""Noise for which networks are trained."""


@dataclass
class TrainSettings:
    """How a denoiser is trained.

    Attributes
    ----------
    images
        Folder of pictures, read recursively, as luma.
    out
        Weights to write (``.safetensors``); the model card lies beside it (``.json``).
    validation
        Folder of held-out pictures; none when None.
    noise_family
        ``gaussian``, ``laplacian`` or ``rayleigh``; the others need no network of their own. Half of the
        crops have independent pixels, half independent Haar coefficients, as the cipher leaves them.
    noise_std
        Standard deviation of the noise, 8-bit scale, above 0. With a range: where the
        validation is done.
    noise_range
        Lowest and highest standard deviation; every crop draws its own. None: ``noise_std`` alone.
    blind
        With a range: the network is not told the level.
    unshuffle
        1: the paper's network; 2: the fast variant on half-size images.
    depth, channels
        Shape of the DnCNN.
    start
        Weights to go on from (``.safetensors`` with its card beside it, of the same depth, channels and
        unshuffle), folded as they are; None starts from random ones. From a network that is told the level
        to a blind one and back the map is dropped or added.
    steps, batch, crop
        Adam steps, crops a step, side of a crop in pixels.
    scales
        Sizes at which each picture is seen, as factors in (0, 1].
    candidates
        Crops drawn for each place of a batch, of which the one with most detail is taken.
    lr, warmup, ema
        Peak learning rate, share of the steps in which it rises (then a cosine to 0), decay of the averaged
        weights.
    validate_every, validation_images, validation_side
        During training: every so many steps, on the centre of this many pictures. The whole set comes last.
    checkpoint_every
        Steps between checkpoints; a stopped run goes on from the last one.
    resume
        False starts again although there is a checkpoint.
    seed
        Of the initial weights, crops and noise.
    threads, device
        PyTorch's threads (None: its default) and ``auto``, ``cpu`` or ``cuda``.
    source, licence, validation_source
        For the model card: the pictures in words, and their licences.
    """

    images: Path
    out: Path = Path("dncnn9_gaussian_25.safetensors")
    validation: Path | None = None
    noise_family: str = "gaussian"
    noise_std: float = 25.0
    noise_range: list[float] | None = None
    blind: bool = False
    unshuffle: int = 1
    depth: int = 9
    channels: int = 64
    start: Path | None = None
    steps: int = 6000
    batch: int = 32
    crop: int = 48
    scales: list[float] = field(default_factory=lambda: [1.0, 0.8, 0.6])
    candidates: int = 2
    lr: float = 2e-3
    warmup: float = 0.05
    ema: float = 0.999
    validate_every: int = 500
    validation_images: int = 6
    validation_side: int = 256
    checkpoint_every: int = 250
    resume: bool = True
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    source: str = "not stated"
    licence: str = "not stated"
    validation_source: str = "not stated"

    def check(self) -> TrainSettings:
        """Return the settings, or raise ``ConfigError`` that names the first bad value."""
        family = self.noise_family
        fits = family == "gaussian" or (family in TRAINED_FAMILIES and self.unshuffle == 2)
        expected = f"gaussian, or with unshuffle=2 one of {', '.join(TRAINED_FAMILIES[1:])}"
        _within("noise_family", family, fits, expected)
        _within("noise_std", self.noise_std, self.noise_std > 0, "a number above 0")
        span = self.noise_range
        fits = span is None or (len(span) == 2 and 0 <= span[0] < span[1] < math.inf)
        _within("noise_range", span, fits, "two standard deviations [low,high], 0 <= low < high, or null")
        _within("blind", self.blind, not self.blind or span is not None, "false without a noise_range")
        _within("unshuffle", self.unshuffle, self.unshuffle in (1, 2), "1 or 2")
        _within("crop", self.crop, self.crop % self.unshuffle == 0, "a multiple of unshuffle")
        _within("start", self.start, self.start is None or self.start.is_file(), "a .safetensors file")
        _within("depth", self.depth, 2 <= self.depth <= 64, "2 to 64")
        _within("channels", self.channels, 1 <= self.channels <= 1024, "1 to 1024")
        for name in (
            "steps",
            "batch",
            "candidates",
            "validate_every",
            "validation_images",
            "checkpoint_every",
        ):
            _within(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _within("crop", self.crop, self.crop >= 8, "at least 8 pixels")
        _within("validation_side", self.validation_side, self.validation_side >= 8, "at least 8 pixels")
        fits = bool(self.scales) and all(0 < scale <= 1 for scale in self.scales)
        _within("scales", self.scales, fits, "factors above 0, at most 1")
        _within("lr", self.lr, 0 < self.lr < 1, "above 0, below 1")
        _within("warmup", self.warmup, 0 <= self.warmup < 1, "0 to below 1")
        _within("ema", self.ema, 0 <= self.ema < 1, "0 to below 1")
        _within("seed", self.seed, self.seed >= 0, "at least 0")
        _within("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        _within("out", self.out, self.out.suffix == ".safetensors", "a file name that ends in .safetensors")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _within("device", self.device, known, "auto, cpu, cuda or cuda:N")
        for name in ("images", "validation"):
            folder = getattr(self, name)
            _within(name, folder, folder is None or folder.is_dir(), "a folder of pictures")
        return self


def _within(name: str, value: object, good: bool, expected: str) -> None:
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (good and finite):
        raise ConfigError(f"{name} cannot be used", expected=expected, found=value)
