"""Training a DnCNN for one noise level: reproducible from a seed, and resumable after a kill."""

from __future__ import annotations

import copy
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

import torch
from torch import Tensor, nn

from flep_fl.contracts.errors import ConfigError, DenoiserError
from flep_fl.contracts.files import read_bytes, write_atomic
from flep_fl.contracts.memory import keep_freed_memory
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.denoise.capability import select_device, select_dtype
from flep_fl.data_security.denoise.card import ModelCard, checksum, deserialise, parse_card, serialise
from flep_fl.data_security.denoise.images import LumaImage, load_folder
from flep_fl.data_security.denoise.inference import mean_psnr, network_denoiser
from flep_fl.data_security.denoise.network import DnCNN
from flep_fl.data_security.denoise.sampling import Batch, CropSampler
from flep_fl.data_security.denoise.settings import TrainSettings

_log = logging.getLogger(__name__)

_RECALIBRATION_BATCHES = 100

_CHECK_EVERY = 50
"""Steps after which the losses are looked at: a look makes the processor wait for a GPU."""

Inputs = tuple[Tensor, Tensor, Tensor]
"""Noisy crops, their noise, and levels."""


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
    keep_freed_memory()
    pictures = load_folder(settings.images, seed=settings.seed)
    held_out = load_folder(settings.validation) if settings.validation is not None else []
    sampler = CropSampler(pictures, settings, device)
    _log.info(
        "%d pictures (%.1f megapixels), %d held out", len(pictures), sampler.pixels / 1e6, len(held_out)
    )
    with _threads(settings.threads):
        run = _Run(settings, device, sampler.digest)
        _optimise(run, sampler, [_centre(image, settings.validation_side) for image in held_out])
        recalibrate(
            run.average,
            (noisy_inputs(sampler.batch(settings.steps + i)) for i in range(_RECALIBRATION_BATCHES)),
        )
        card = _export(run, len(pictures), held_out)
    run.checkpoint.unlink(missing_ok=True)
    return card


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
            if name in {"noise_std", "depth", "channels", "steps", "batch", "crop", "scales", "candidates"}
            or name in {"lr", "warmup", "ema", "seed", "noise_range", "noise_family", "blind", "unshuffle"}
        }
        self.start = start_checksum(settings)
        if self.start is not None:
            relevant["start"] = self.start
        self.fingerprint = json.dumps({**relevant, "pixels": data_digest}, sort_keys=True)
        if settings.resume and self.checkpoint.exists():
            self._load()

    def update(self, noisy: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Take one Adam step; return the loss, on the device."""
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
        pairs = list(zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True))
        smooth = [pair for pair in pairs if pair[0].dtype.is_floating_point]
        with torch.no_grad():
            torch._foreach_lerp_([mean for mean, _ in smooth], [value for _, value in smooth], 1 - decay)
            for mean, value in pairs:
                if not mean.dtype.is_floating_point:
                    mean.copy_(value)
        return loss.detach()

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


def noisy_inputs(batch: Batch) -> Inputs:
    """Add the noise of a batch to its crops."""
    clean, noise, levels = batch
    return (clean + noise).contiguous(memory_format=torch.channels_last), noise, levels


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
    wanted = (settings.depth, settings.channels, settings.unshuffle)
    found = (card.depth, card.channels, card.unshuffle)
    if found != wanted:
        raise DenoiserError(
            f"start={settings.start} is another network (depth, channels, unshuffle)",
            expected=wanted,
            found=found,
        )
    model = deserialise(read_bytes(settings.start, what="start", error=DenoiserError), card)
    return with_condition(model, conditioned, level=settings.noise_std / 255)


def with_condition(model: DnCNN, conditioned: bool, *, level: float) -> DnCNN:
    """Return a folded ``model`` with or without the map that tells the noise level.

    Without it, the network does at first what it did when it was told ``level`` (0..1 scale), but for one
    pixel (of the unshuffled image) along the border, where the map ended in zeros. A new map has no weight
    at first: the network does what it did.
    """
    if model.conditioned == conditioned:
        return model
    changed = DnCNN(
        model.depth, model.channels, batch_norm=False, unshuffle=model.unshuffle, conditioned=conditioned
    )
    state = model.state_dict()
    first = state["body.0.weight"]
    if conditioned:
        state["body.0.weight"] = torch.cat([first, torch.zeros_like(first[:, :1])], dim=1)
    else:
        state["body.0.weight"] = first[:, :-1].contiguous()
        state["body.0.bias"] = state["body.0.bias"] + level * first[:, -1].sum(dim=(1, 2))
    changed.load_state_dict(state)
    return changed


def recalibrate(model: DnCNN, batches: Iterator[Inputs]) -> None:
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
    losses: list[Tensor] = []
    total, counted = 0.0, 0
    started, first = time.monotonic(), run.step
    while run.step < settings.steps:
        losses.append(run.update(*noisy_inputs(sampler.batch(run.step))))
        last = run.step == settings.steps
        save = run.step % settings.checkpoint_every == 0 or last
        validate = run.step % settings.validate_every == 0 or last
        if not (save or validate or len(losses) == _CHECK_EVERY):
            continue
        recent = torch.stack(losses).double().cpu()
        if not bool(torch.isfinite(recent).all()):
            bad = run.step - len(losses) + 1 + int(torch.isfinite(recent).logical_not().nonzero()[0])
            raise DenoiserError(
                f"The training diverged in step {bad}", remedy="Set a smaller lr=, then resume=false"
            )
        total, counted = total + float(recent.sum()), counted + len(losses)
        losses.clear()
        if save:
            run.save()
        if validate:
            pace = (time.monotonic() - started) / (run.step - first)
            message = (
                f"step {run.step}/{settings.steps}  loss {total / counted * 255**2:.2f}  {pace:.3f} s/step"
            )
            if centres:
                denoise = network_denoiser(run.average, level=settings.noise_std, device=settings.device)
                value = _validation_psnr(denoise, centres[: settings.validation_images], settings)
                message += f"  validation {value:.2f} dB"
            _log.info(message)
            total, counted = 0.0, 0


def _validation_psnr(denoise: Denoise, images: list[LumaImage], settings: TrainSettings) -> float:
    """Mean PSNR in dB with the noise of the training, as the cipher leaves it."""
    return mean_psnr(denoise, list(images), settings.noise_std, family=settings.noise_family)


def _export(run: _Run, pictures: int, held_out: list[LumaImage]) -> ModelCard:
    """Write the averaged weights and their card; the card's PSNR is that of the written float16 weights."""
    settings = run.settings
    weights = serialise(run.average)
    span = settings.noise_range

    def card(value: float | None) -> ModelCard:
        return ModelCard(
            noise_family=settings.noise_family,
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
            start_sha256=run.start,
        )

    result = card(None)
    if held_out:
        network = deserialise(weights, result)
        denoise = network_denoiser(network, level=settings.noise_std, device=settings.device)
        result = card(round(_validation_psnr(denoise, held_out, settings), 3))
    write_atomic(settings.out, weights)
    write_atomic(card_path(settings.out), result.to_json())
    return result


def start_checksum(settings: TrainSettings) -> str | None:
    """Return the SHA-256 of the weights that a training starts from, None for random ones."""
    if settings.start is None:
        return None
    return checksum(read_bytes(settings.start, what="start", error=DenoiserError))


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
