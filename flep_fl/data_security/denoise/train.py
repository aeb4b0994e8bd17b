"""Training a DnCNN for one noise level: reproducible from a seed, and resumable after a kill."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import math
import pickle
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from flep_fl.contracts.errors import ConfigError, DenoiserError, EmptyDatasetError
from flep_fl.contracts.files import read_bytes, write_atomic
from flep_fl.data_security.denoise.capability import select_device, select_dtype
from flep_fl.data_security.denoise.card import ModelCard, checksum, deserialise, parse_card, serialise
from flep_fl.data_security.denoise.images import LumaImage, load_folder
from flep_fl.data_security.denoise.inference import mean_psnr, network_denoiser
from flep_fl.data_security.denoise.network import DnCNN
from flep_fl.data_security.denoise.settings import TrainSettings

_log = logging.getLogger(__name__)

_RECALIBRATION_BATCHES = 100

Batch = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
Tensors = tuple[Tensor, Tensor, Tensor]


def train_denoiser(settings: TrainSettings) -> ModelCard:
    """Train a DnCNN on a folder of pictures, write its weights and its model card.

    Mean squared error of the predicted noise, Adam, linear warm-up then cosine, horizontal and vertical
    flips and transposition, an exponential moving average of the weights. Batch normalisation's statistics
    are measured again for the averaged weights, over fresh batches, before they are folded. Every batch is
    a function of (seed, step) alone, so a resumed run repeats an uninterrupted one (to the bit, on the same
    machine with the same number of threads).

    Returns
    -------
    ModelCard
        As written beside the weights.

    Raises
    ------
    ConfigError
        A setting is out of range, or ``out`` cannot be written.
    EmptyDatasetError, ImageFormatError
        A folder holds nothing to train on (or to validate with).
    DenoiserError
        The checkpoint beside ``out`` is damaged or belongs to other settings, or the training diverged.
    """
    settings.check()
    _check_writable(settings.out)
    device = select_device(settings.device)
    pictures = load_folder(settings.images, seed=settings.seed)
    held_out = load_folder(settings.validation) if settings.validation is not None else []
    sampler = CropSampler(pictures, settings)
    _log.info(
        "%d pictures (%.1f megapixels), %d held out", len(pictures), sampler.pixels / 1e6, len(held_out)
    )
    with _threads(settings.threads):
        run = _Run(settings, device, sampler.digest)
        _optimise(run, sampler, [_centre(image, settings.validation_side) for image in held_out])
        recalibrate(
            run.average,
            (run.to_device(sampler.batch(settings.steps + i)) for i in range(_RECALIBRATION_BATCHES)),
        )
        card = _export(run, len(pictures), held_out)
    run.checkpoint.unlink(missing_ok=True)
    return card


class CropSampler:
    """Random crops of a set of pictures, turned and flipped, with the noise to be removed.

    Parameters
    ----------
    pictures
        ``(H, W)`` uint8 each; those with a side below ``settings.crop`` are left out.
    settings
        ``seed``, ``batch``, ``crop``, ``scales``, ``noise_std`` and ``noise_range`` are used.

    Raises
    ------
    EmptyDatasetError
        Every picture is smaller than a crop.
    """

    def __init__(self, pictures: list[LumaImage], settings: TrainSettings) -> None:
        self._settings = settings
        scaled = [_resize(image, scale) for image in pictures for scale in settings.scales]
        self._pictures = [image for image in scaled if min(image.shape) >= settings.crop]
        if not self._pictures:
            raise EmptyDatasetError(
                "Every picture is smaller than a crop",
                expected=f"sides of at least {settings.crop} pixels",
                found=f"{len(pictures)} pictures, the largest {max(image.shape for image in pictures)}",
                remedy="Set a smaller crop=",
            )
        areas = np.array([image.size for image in self._pictures], dtype=np.float64)
        self._chance = areas / areas.sum()
        self.pixels = int(areas.sum())

    @property
    def digest(self) -> str:
        """SHA-256 over all pixels: a checkpoint belongs to one set of pictures."""
        digest = hashlib.sha256()
        for image in self._pictures:
            digest.update(repr(image.shape).encode())
            digest.update(image.tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """Return clean crops and noise of ``step``, ``(N, 1, S, S)``, and levels, ``(N,)``; 0..1 scale."""
        settings = self._settings
        # A generator per step: nothing to save in a checkpoint, and a resumed run sees the same batches.
        random = np.random.default_rng([settings.seed, step])
        side = settings.crop
        clean = np.empty((settings.batch, 1, side, side), dtype=np.float32)
        for slot, index in enumerate(random.choice(len(self._pictures), settings.batch, p=self._chance)):
            image = self._pictures[index]
            top = int(random.integers(image.shape[0] - side + 1))
            left = int(random.integers(image.shape[1] - side + 1))
            crop = image[top : top + side, left : left + side]
            turn = int(random.integers(8))
            crop = crop[:: 1 - 2 * (turn & 1), :: 1 - (turn & 2)]
            clean[slot, 0] = crop.T if turn & 4 else crop
        noise = random.standard_normal(clean.shape, dtype=np.float32)
        levels = np.full(settings.batch, settings.noise_std / 255, dtype=np.float32)
        span = settings.noise_range
        if span is not None:
            levels = (random.uniform(span[0], span[1], settings.batch) / 255).astype(np.float32)
        return clean / np.float32(255), noise * levels[:, None, None, None], levels


class _Run:
    """The state of a training run, and its checkpoint."""

    def __init__(self, settings: TrainSettings, device: torch.device, data_digest: str) -> None:
        self.settings = settings
        self.device = device
        self.dtype = select_dtype(device)
        self.checkpoint = settings.out.with_suffix(".checkpoint")
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = _first_model(settings)
        self.model: DnCNN = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        relevant = {
            name: value
            for name, value in asdict(settings).items()
            if name in {"noise_std", "depth", "channels", "steps", "batch", "crop", "scales", "lr"}
            or name in {"warmup", "ema", "seed", "noise_range", "blind", "unshuffle"}
        }
        if settings.start is not None:
            relevant["start"] = checksum(read_bytes(settings.start, what="start", error=DenoiserError))
        self.fingerprint = json.dumps({**relevant, "pixels": data_digest}, sort_keys=True)
        if settings.resume and self.checkpoint.exists():
            self._load()

    def to_device(self, batch: Batch) -> Tensors:
        clean, noise, levels = (torch.from_numpy(part).to(self.device) for part in batch)
        return (clean + noise).contiguous(memory_format=torch.channels_last), noise, levels

    def update(self, noisy: Tensor, noise: Tensor, levels: Tensor) -> float:
        """Take one Adam step; return the loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * schedule(self.step, self.settings.steps, self.settings.warmup)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.model.noise(noisy, levels)
        if self.settings.noise_range is None:
            loss = nn.functional.mse_loss(predicted.float(), noise)
        else:
            # What is left of the noise grows about as its level does: without the division the strong
            # levels would be learnt at the expense of the weak ones.
            errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
            loss = (errors / (255 * levels).clamp(min=1.0)).mean() * self.settings.noise_std
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.step += 1
        # Early on, a short memory: the random initial weights must not linger in the average.
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(
                self.average.state_dict().values(), self.model.state_dict().values(), strict=True
            ):
                if mean.dtype.is_floating_point:
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)
        return float(loss.detach())

    def save(self) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "fingerprint": self.fingerprint,
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
            },
            buffer,
        )
        write_atomic(self.checkpoint, buffer.getvalue())

    def _load(self) -> None:
        remedy = "Delete it, or set resume=false to start again"
        data = read_bytes(self.checkpoint, what="the checkpoint", error=DenoiserError)
        try:
            state = torch.load(io.BytesIO(data), map_location=self.device, weights_only=True)
            fingerprint, step = state["fingerprint"], int(state["step"])
        except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError) as exc:
            raise DenoiserError(f"The checkpoint {self.checkpoint} is damaged", remedy=remedy) from exc
        if fingerprint != self.fingerprint:
            raise DenoiserError(
                f"The checkpoint {self.checkpoint} belongs to other settings or other pictures", remedy=remedy
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = step
        _log.info("goes on from step %d", step)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning rate as a share of its peak: a linear rise over ``warmup * steps``, then a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def _first_model(settings: TrainSettings) -> DnCNN:
    """Return random weights, or those of ``start``, folded: they are trained on without normalisation."""
    conditioned = settings.noise_range is not None and not settings.blind
    if settings.start is None:
        return DnCNN(settings.depth, settings.channels, unshuffle=settings.unshuffle, conditioned=conditioned)
    text = read_bytes(card_path(settings.start), what="The model card of start", error=DenoiserError)
    card = parse_card(text)
    wanted = (settings.depth, settings.channels, settings.unshuffle, conditioned)
    found = (card.depth, card.channels, card.unshuffle, card.conditioned)
    if found != wanted:
        raise DenoiserError(
            f"start={settings.start} is another network (depth, channels, unshuffle, conditioned)",
            expected=wanted,
            found=found,
        )
    return deserialise(read_bytes(settings.start, what="start", error=DenoiserError), card)


def recalibrate(model: DnCNN, batches: Iterator[Tensors]) -> None:
    """Measure the statistics of every batch normalisation again, as the plain mean over ``batches``.

    Averaged weights have other activations than any of the weights that were averaged, so the running
    statistics collected on the way do not fit them exactly.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's cumulative average
    model.train()
    with torch.no_grad():
        for noisy, _, levels in batches:
            model.noise(noisy, levels)
    model.eval()
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def _optimise(run: _Run, sampler: CropSampler, centres: list[LumaImage]) -> None:
    settings = run.settings
    losses: list[float] = []
    started, first = time.monotonic(), run.step
    while run.step < settings.steps:
        losses.append(run.update(*run.to_device(sampler.batch(run.step))))
        if not math.isfinite(losses[-1]):
            raise DenoiserError(
                f"The training diverged in step {run.step}", remedy="Set a smaller lr=, then resume=false"
            )
        last = run.step == settings.steps
        if run.step % settings.checkpoint_every == 0 or last:
            run.save()
        if run.step % settings.validate_every == 0 or last:
            pace = (time.monotonic() - started) / (run.step - first)
            message = (
                f"step {run.step}/{settings.steps}  loss {np.mean(losses) * 255**2:.2f}  {pace:.3f} s/step"
            )
            if centres:
                denoise = network_denoiser(run.average, level=settings.noise_std, device=settings.device)
                value = mean_psnr(denoise, list(centres[: settings.validation_images]), settings.noise_std)
                message += f"  validation {value:.2f} dB"
            _log.info(message)
            losses.clear()


def _export(run: _Run, pictures: int, held_out: list[LumaImage]) -> ModelCard:
    """Write the averaged weights and their card; the card's PSNR is that of the written float16 weights."""
    settings = run.settings
    weights = serialise(run.average)
    span = settings.noise_range

    def card(value: float | None) -> ModelCard:
        return ModelCard(
            noise_family="gaussian",
            noise_std=float(settings.noise_std),
            depth=settings.depth,
            channels=settings.channels,
            data=settings.source,
            licence=settings.licence,
            pictures=pictures,
            steps=settings.steps,
            batch=settings.batch,
            crop=settings.crop,
            seed=settings.seed,
            validation=settings.validation_source if held_out else None,
            validation_psnr=value,
            sha256=checksum(weights),
            noise_range=None if span is None else (float(span[0]), float(span[1])),
            unshuffle=settings.unshuffle,
            conditioned=run.model.conditioned,
        )

    result = card(None)
    if held_out:
        network = deserialise(weights, result)
        denoise = network_denoiser(network, level=settings.noise_std, device=settings.device)
        result = card(round(mean_psnr(denoise, list(held_out), settings.noise_std), 3))
    write_atomic(settings.out, weights)
    write_atomic(card_path(settings.out), result.to_json())
    return result


def card_path(weights: Path) -> Path:
    """Where the model card of a weights file lies."""
    return weights.with_suffix(".json")


def _check_writable(out: Path) -> None:
    """Find out before the training, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as exc:
        raise ConfigError(f"out={out} cannot be written ({exc.strerror})") from exc


def _resize(image: LumaImage, scale: float) -> LumaImage:
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _centre(image: LumaImage, side: int) -> LumaImage:
    top, left = (max(0, (length - side) // 2) for length in image.shape)
    return image[top : top + side, left : left + side]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
