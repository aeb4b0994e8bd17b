"""Images out of one model update: what a cloud can do with the bytes that it holds.

Geiping et al. 2020, "Inverting gradients - how easy is it to break privacy in federated learning?": look for
images whose own update points the same way as the observed one (cosine distance), with a total-variation
prior, by Adam on the sign of the gradient. Several local steps are unrolled: the attacker repeats the site's
training on its guess. The project's classifier is smooth (SiLU, average pooling), which helps the attacker.

What the cloud holds decides what it can put into that search:

- ``open``: every site's weights, in the clear.
- ``trusted``: the model key. Its software decrypts the sum alone; the key opens single updates as well.
- ``untrusted``: ciphertext. Here the attack reads the ciphertext's bytes as if they were weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from flep_fl.attacks.blocks import MISSING
from flep_fl.attacks.cloud_view import first_model, interpreted_bytes, opened_sum, opened_update
from flep_fl.attacks.evidence import Evidence, grey_batch, make_federation
from flep_fl.attacks.pictures import Row
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import GradientInversion
from flep_fl.attacks.similarity import batch_scores
from flep_fl.attacks.victims import recognisable
from flep_fl.config import Config, DataConfig, FederationConfig, PartitionConfig, TrainConfig
from flep_fl.contracts.errors import ConfigError

_MOMENTUM, _DECAY = 0.9, 5e-4  # of the sites' own sgd (data_analyst.train.OPTIMIZERS)
_DROPS = (3 / 8, 5 / 8, 7 / 8)


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """What the attacker knows of a site's training from the shared settings.

    Attributes
    ----------
    lr, steps
        Learning rate, and steps of SGD with momentum 0.9 and weight decay 5e-4, each on all images.
    """

    lr: float
    steps: int


@dataclass(frozen=True, slots=True)
class Search:
    """How images are looked for; see :class:`~flep_fl.attacks.settings.GradientInversion`."""

    iterations: int
    step: float
    total_variation: float
    restarts: int
    seed: int


def local_update(model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining) -> Tensor:
    """Repeat a site's training on ``images``; differentiable in them.

    Parameters
    ----------
    model
        At the weights that the site started from.
    images
        (N, C, H, W), 0..1.
    labels
        (N,).
    training
        What the site does.

    Returns
    -------
    Tensor
        The change of all weights, flat, in the order of ``model.named_parameters()``.
    """
    start = {name: value.detach() for name, value in model.named_parameters()}
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    speed: list[Tensor] = []
    for _ in range(training.steps):
        loss = cross_entropy(functional_call(model, weights, (images,)), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        decayed = [g + _DECAY * w for g, w in zip(gradients, weights.values(), strict=True)]
        speed = [_MOMENTUM * s + g for s, g in zip(speed, decayed, strict=True)] if speed else decayed
        weights = {n: w - training.lr * s for (n, w), s in zip(weights.items(), speed, strict=True)}
    return torch.cat([(weights[name] - start[name]).flatten() for name in start])


def invert_update(
    model: nn.Module,
    observed: NDArray[np.float64],
    labels: Sequence[int],
    shape: tuple[int, int, int],
    training: LocalTraining,
    search: Search,
) -> tuple[NDArray[np.float32], float]:
    """Look for the images behind an update.

    Parameters
    ----------
    model
        At the weights that the site started from.
    observed
        The change of all weights, flat, in the order of ``model.named_parameters()``.
    labels
        Of the images, in any order.
    shape
        (C, H, W) of one image.
    training, search
        What the attacker knows, and how it searches.

    Returns
    -------
    images : ndarray
        float32 (N, H, W), 0..255 (mean over channels).
    distance : float
        Cosine distance of the found images' update to the observed one, 0..2.
    """
    target = torch.from_numpy(np.asarray(observed, np.float32))
    target = target / target.norm().clamp_min(1e-30)
    wanted = torch.tensor(list(labels))
    best: tuple[float, Tensor] | None = None
    for restart in range(search.restarts):
        generator = torch.Generator().manual_seed(search.seed + restart)
        images = torch.rand((len(wanted), *shape), generator=generator).requires_grad_()
        optimiser = torch.optim.Adam([images], lr=search.step)
        drops = [int(search.iterations * part) for part in _DROPS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, drops, gamma=0.1)
        distance = math.inf
        for _ in range(search.iterations):
            update = local_update(model, images, wanted, training)
            cosine = 1 - torch.dot(update, target) / update.norm().clamp_min(1e-30)
            (gradient,) = torch.autograd.grad(
                cosine + search.total_variation * _total_variation(images), [images]
            )
            images.grad = gradient.sign()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
            distance = float(cosine.detach())
        if best is None or distance < best[0]:
            best = (distance, images.detach())
    if best is None:
        raise ConfigError("attack.restarts is 0", remedy="Set attack.restarts to 1 or more")
    return grey_batch((best[1] * 255).numpy()), best[0]


def inferred_label(observed: NDArray[np.float64], classes: int) -> int:
    """Read the label of a batch of one off the bias of the last layer (iDLG, Zhao et al. 2020).

    The gradient of the cross-entropy there is ``softmax - one_hot``: negative for the true class alone, so
    its weight alone grows.

    Parameters
    ----------
    observed
        The change of all weights; the last ``classes`` entries are the head's bias.
    classes
        Number of classes.
    """
    return int(np.argmax(observed[-classes:]))


def run(config: Config, settings: GradientInversion, folder: Path) -> Outcome:
    """Run one federation for each batch size, and attack one site's update of each."""
    if settings.labels not in ("known", "inferred"):
        raise ConfigError("attack.labels is unknown", expected="known or inferred", found=settings.labels)
    if settings.labels == "inferred" and set(settings.batches) != {1}:
        raise ConfigError(
            "attack.labels=inferred reads one label from one update",
            remedy="Set attack.batches=[1], or attack.labels=known",
        )
    if settings.local_steps < 1 or min(settings.batches) < 1 or settings.restarts < 1:
        raise ConfigError("attack.batches, attack.local_steps and attack.restarts start at 1")
    success: dict[str, float | None] = {}
    baseline: dict[str, float | None] = {}
    pictures = {}
    decided = []
    for batch in settings.batches:
        evidence = make_federation(_small(config, batch, settings.local_steps), folder / f"batch_{batch}")
        found = _attack(evidence, settings)
        decided.append(recognisable(found.ssim, found.blind_ssim))
        tail = "" if batch == settings.batches[0] else f"_batch_{batch}"
        success |= {f"ssim{tail}": found.ssim, f"psnr_db{tail}": found.psnr_db}
        success |= {f"cosine_distance{tail}": found.distance, f"labels_right{tail}": found.labels_right}
        baseline |= {f"ssim{tail}": found.blind_ssim, f"psnr_db{tail}": found.blind_psnr_db}
        pictures[f"batch_{batch}"] = found.rows
    return Outcome(
        configuration={
            "cloud": config.cloud.trust,
            "model": config.model.name,
            "data": config.data.name,
            "cipher": config.cipher.name,
            "batches": list(settings.batches),
            "local_steps": settings.local_steps,
            "labels": settings.labels,
            "reads": _reads(config, settings),
        },
        success=success,
        baseline=baseline,
        falls=any(fell for fell, _ in decided),
        criterion=f"{decided[0][1]}, for at least one batch size",
        pictures=pictures,
        note="Scored against the images that the site trained on: restored, and so already denoised.",
    )


@dataclass(frozen=True, slots=True)
class _Found:
    ssim: float
    psnr_db: float
    distance: float
    labels_right: float
    blind_ssim: float
    blind_psnr_db: float
    rows: list[Row]


def _attack(evidence: Evidence, settings: GradientInversion) -> _Found:
    config, victim = evidence.config, evidence.sites[0]
    victims = evidence.sites if settings.sum_only else [victim]
    truth = [evidence.truth(site).train for site in victims]
    shape = truth[0].images.shape[1:]
    classes = len(evidence.truth(victim).description.classes)
    model, start = first_model(config, classes=classes, channels=shape[0])
    training = LocalTraining(config.train.lr, settings.local_steps)
    search = Search(
        settings.iterations, settings.step, settings.total_variation, settings.restarts, config.seed
    )
    observed = _observed(evidence, victim, start, settings)
    labels = [int(label) for part in truth for label in part.labels]
    used = [inferred_label(observed, classes)] if settings.labels == "inferred" else labels
    found, distance = invert_update(model, observed, used, shape, training, search)
    # Blind guessing: the same search for an update that says nothing, or plain grey where that is better.
    noise = np.random.default_rng(config.seed).standard_normal(len(start))
    blind, _ = invert_update(model, noise, labels, shape, training, replace(search, restarts=1))
    images = [image for part in truth for image in grey_batch(part.images)]
    similar, decibels, order = batch_scores(images, list(found))
    blind = max((blind, np.full_like(blind, MISSING)), key=lambda guess: batch_scores(images, list(guess))[0])
    guessed, guessed_decibels, blind_order = batch_scores(images, list(blind))
    rows = [
        Row("original (as the site trained on it)", images),
        Row(f"from the cloud's bytes, cloud={config.cloud.trust}", [found[i] for i in order]),
        Row("blind guess", [blind[i] for i in blind_order]),
    ]
    right = float(np.mean([a == b for a, b in zip(sorted(used), sorted(labels), strict=True)]))
    return _Found(similar, decibels, distance, right, guessed, guessed_decibels, rows)


def _observed(
    evidence: Evidence, victim: str, start: NDArray[np.float64], settings: GradientInversion
) -> NDArray[np.float64]:
    """Return the change of weights as far as this cloud can tell."""
    if evidence.config.cloud.trust in ("untrusted", "mixed"):
        return interpreted_bytes(evidence.first_upload(victim).payload, evidence.config, len(start))
    if settings.sum_only:
        return opened_sum(evidence) - start
    return opened_update(evidence, victim, len(start)) - start


def _reads(config: Config, settings: GradientInversion) -> str:
    if config.cloud.trust == "untrusted":
        return "the ciphertext's coefficients, taken for weights"
    return "the sum" if settings.sum_only else "one site's update"


def _small(config: Config, batch: int, steps: int) -> Config:
    """Return the configuration of a federation whose sites hold ``batch`` images each and take ``steps``."""
    sites = config.federation.sites
    changed: dict[str, Any] = {
        "data": _with(config.data, limit=sites * (batch + 1), test_fraction=1 / (batch + 1)),
        "partition": PartitionConfig(name="iid"),
        "train": _with(
            config.train,
            optimizer="sgd",
            batch_size=batch,
            local_epochs=steps,
            augment=False,
            proximal_mu=0.0,
        ),
        "federation": _with(config.federation, rounds=1),
    }
    return replace(config, **changed)


def _with(section: DataConfig | TrainConfig | FederationConfig, **values: Any) -> Any:
    return replace(section, **values)


def _total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return across + down
