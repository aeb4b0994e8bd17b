"""Local training and exact evaluation at one analyst."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter

from flep_fl.contracts.errors import ConfigError, DataError, EmptyDatasetError, TrainingError

ImageArray = NDArray[np.uint8] | NDArray[np.float32]
"""(N, C, H, W), uint8 or float32 on the 0..255 scale."""

_EPSILON = 1e-6  # torch's 1e-8 blows rounding errors in a vanishing gradient up to whole steps

OptimizerFactory = Callable[[list[Parameter], float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, eps=_EPSILON),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2, eps=_EPSILON),
}
"""Local optimisers by name; fresh state every round, as in FedAvg (McMahan et al. 2017)."""

_EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model scores on a set of images.

    Attributes
    ----------
    correct, total
        Numbers of images.
    loss_mean
        Mean cross-entropy in nats.
    """

    correct: int
    total: int
    loss_mean: float

    @property
    def accuracy(self) -> float:
        """``correct / total``, 0..1."""
        return self.correct / self.total


def train_local(
    model: nn.Module,
    images: ImageArray,
    labels: NDArray[np.int64],
    *,
    optimizer: str = "sgd",
    lr: float,
    batch_size: int,
    local_epochs: int,
    seed: int,
    augment: bool = False,
    proximal_mu: float = 0.0,
    device: str = "cpu",
    threads: int | None = None,
) -> float:
    """Train ``model`` in place; the same arguments give the same weights on the same machine.

    Parameters
    ----------
    model
        The network; it is moved to ``device`` and left there.
    images
        Shape (N, C, H, W), N >= 1, uint8 or float32 on the 0..255 scale.
    labels
        int64, shape (N,), class indices.
    optimizer
        A key of :data:`OPTIMIZERS`.
    lr
        Learning rate, > 0.
    batch_size, local_epochs
        >= 1.
    seed
        Seed of the order, the augmentation and any dropout, >= 0; give each site and round its own.
    augment
        Turn every image into a random one of its mirror images and quarter turns.
    proximal_mu
        Weight of FedProx's proximal term (Li et al. 2020, "Federated optimization in heterogeneous
        networks"): ``mu / 2`` times the squared distance to the weights at the start of the call is part of
        the loss; 0 leaves it out.
    device
        torch device.
    threads
        CPU threads during the call; None keeps torch's setting.

    Returns
    -------
    float
        Mean cross-entropy over the last epoch, in nats, without the proximal term.

    Raises
    ------
    ConfigError
        A setting is unknown or out of range.
    DataError
        Images and labels do not fit each other.
    TrainingError
        The loss stopped being finite.
    """
    _check_settings(optimizer, lr, batch_size, local_epochs, seed, proximal_mu)
    _check_data(images, labels)
    rng = np.random.default_rng(seed)
    pixels, targets = _tensors(images, labels)
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    start_point = [p.detach().clone() for p in parameters] if proximal_mu else []
    stepper = OPTIMIZERS[optimizer](parameters, lr)
    normalises = any(isinstance(module, _BatchNorm) for module in model.modules())
    mean = math.nan
    with _deterministic(seed, device, threads):
        for _ in range(local_epochs):
            order = torch.from_numpy(rng.permutation(len(targets)))
            total = 0.0
            for chosen in _batches(order, batch_size, normalises):
                batch = _to_unit(pixels[chosen], device)
                if augment:
                    batch = _symmetries(batch, rng)
                loss = cross_entropy(model(batch), targets[chosen].to(device))
                if not math.isfinite(value := loss.item()):
                    raise TrainingError(
                        "the training loss is not finite",
                        found=f"loss={value}, optimizer={optimizer}, lr={lr}",
                        remedy="Lower train.lr",
                    )
                stepper.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                _add_proximal_gradient(parameters, start_point, proximal_mu)
                stepper.step()
                total += value * len(chosen)
            mean = total / len(targets)
    return mean


def evaluate(
    model: nn.Module, images: ImageArray, labels: NDArray[np.int64], *, device: str = "cpu"
) -> Evaluation:
    """Count the correctly classified images; the model's mode is restored afterwards.

    Parameters
    ----------
    model
        The network; it is moved to ``device`` and left there.
    images
        Shape (N, C, H, W), N >= 1, uint8 or float32 on the 0..255 scale.
    labels
        int64, shape (N,).
    device
        torch device.

    Returns
    -------
    Evaluation
        Exact counts and the mean loss.

    Raises
    ------
    DataError
        Images and labels do not fit each other.
    """
    _check_data(images, labels)
    pixels, targets = _tensors(images, labels)
    training = model.training
    model.to(device).eval()
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for start in range(0, len(targets), _EVALUATION_BATCH):
            batch = pixels[start : start + _EVALUATION_BATCH]
            wanted = targets[start : start + _EVALUATION_BATCH]
            logits = model(_to_unit(batch, device)).cpu()
            correct += int((logits.argmax(dim=1) == wanted).sum())
            loss += float(cross_entropy(logits.double(), wanted, reduction="sum"))
    model.train(training)
    return Evaluation(correct=correct, total=len(targets), loss_mean=loss / len(targets))


def _add_proximal_gradient(parameters: list[Parameter], start: list[Tensor], mu: float) -> None:
    """Add ``mu (w - w0)``, the gradient of ``mu / 2 |w - w0|^2``; ``start`` is empty where mu is 0."""
    for parameter, origin in zip(parameters, start, strict=False):
        difference = parameter.detach() - origin
        if parameter.grad is None:
            parameter.grad = mu * difference
        else:
            parameter.grad.add_(difference, alpha=mu)


def _batches(order: Tensor, batch_size: int, normalises: bool) -> list[Tensor]:
    """Cut an order into batches; a last single image, from which BatchNorm cannot learn, joins the others.

    Where all batches are of one image there is nothing to join, and torch says what it needs.
    """
    batches = list(torch.split(order, batch_size))
    if normalises and len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _to_unit(pixels: Tensor, device: str) -> Tensor:
    return pixels.to(device, torch.float32).div(255.0)


def _symmetries(batch: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply one random symmetry of the square (of the rectangle, where H != W) to each image."""
    square = batch.shape[-1] == batch.shape[-2]
    turns = rng.integers(4, size=len(batch)) if square else 2 * rng.integers(2, size=len(batch))
    mirrored = rng.integers(2, size=len(batch)).astype(bool)
    result = batch.clone()
    for turn in range(4):
        for mirror in (False, True):
            chosen = torch.from_numpy(np.flatnonzero((turns == turn) & (mirrored == mirror)))
            if len(chosen):
                part = torch.rot90(batch[chosen], turn, dims=(2, 3))
                result[chosen] = part.flip(3) if mirror else part
    return result


@contextmanager
def _deterministic(seed: int, device: str, threads: int | None) -> Iterator[None]:
    """Seed torch for dropout and pin what else decides the result; everything is put back."""
    before = torch.get_num_threads()
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _tensors(images: ImageArray, labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return pixels, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))


def _check_settings(
    optimizer: str, lr: float, batch_size: int, local_epochs: int, seed: int, proximal_mu: float
) -> None:
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            "train.optimizer is unknown", expected="one of " + ", ".join(sorted(OPTIMIZERS)), found=optimizer
        )
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError("train.lr is out of range", expected="> 0", found=lr)
    for name, value in (("batch_size", batch_size), ("local_epochs", local_epochs)):
        if value < 1:
            raise ConfigError(f"train.{name} is out of range", expected=">= 1", found=value)
    if not (math.isfinite(proximal_mu) and proximal_mu >= 0):
        raise ConfigError("train.proximal_mu is out of range", expected="0 or more", found=proximal_mu)
    if seed < 0:
        raise ConfigError("the training seed is out of range", expected=">= 0", found=seed)


def _check_data(images: ImageArray, labels: NDArray[np.int64]) -> None:
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise DataError(
            "images do not have a supported shape and dtype",
            expected="(N, C, H, W), uint8 or float32",
            found=f"{images.shape}, {images.dtype}",
        )
    if labels.shape != images.shape[:1]:
        raise DataError("images and labels differ in number", expected=images.shape[:1], found=labels.shape)
    if len(images) == 0:
        raise EmptyDatasetError("there is no image to train or to evaluate on", expected=">= 1", found=0)
