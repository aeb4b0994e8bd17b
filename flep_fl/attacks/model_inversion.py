"""Model inversion by an analyst: what a class looks like, out of the final model alone.

Fredrikson et al. 2015: climb the probability of a class from a grey image, with a prior for smooth pictures,
and with noise on the input, which keeps the search out of patterns that only the network sees. The result
is an average of a class, not one person's image; where all images of a class show the same thing
that is much the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from flep_fl.attacks.differential_privacy import private_training, promise
from flep_fl.attacks.evidence import grey_batch, make_federation
from flep_fl.attacks.membership import final_model
from flep_fl.attacks.pictures import Row
from flep_fl.attacks.poisoning import accuracy_of, held_out
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import ModelInversion
from flep_fl.config import Config
from flep_fl.data_analyst.model import build_model

Grey = NDArray[np.float32]


def invert_classes(
    model: nn.Module, classes: int, shape: tuple[int, int, int], settings: ModelInversion, *, seed: int
) -> Grey:
    """Return one image per class, float32 (classes, H, W) on the 0..255 scale.

    Parameters
    ----------
    model
        A classifier.
    classes
        Their number.
    shape
        (C, H, W) of its input.
    settings
        Of the optimisation.
    seed
        Of its noise, >= 0.
    """
    model.eval()
    images = torch.full((classes, *shape), 0.5, requires_grad=True)
    optimiser = torch.optim.Adam([images], lr=settings.step)
    wanted = torch.arange(classes)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.iterations):
        # Without noise the search ends in patterns that only the network sees (adversarial examples).
        blurred = images + settings.jitter * torch.randn(images.shape, generator=generator)
        rough = (images[..., 1:] - images[..., :-1]).square().mean() + (
            images[..., 1:, :] - images[..., :-1, :]
        ).square().mean()
        loss = cross_entropy(model(blurred), wanted) + settings.total_variation * classes * rough
        (images.grad,) = torch.autograd.grad(loss, [images])
        optimiser.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return grey_batch((images.detach() * 255).numpy())


def correlations(pictures: Grey, means: Grey) -> NDArray[np.float64]:
    """Return the correlation of every picture with every class mean, (classes, classes).

    The mean of all classes is taken off first: what all classes share says nothing about one.
    """
    a = pictures.reshape(len(pictures), -1).astype(np.float64)
    b = means.reshape(len(means), -1).astype(np.float64)
    a, b = a - a.mean(0), b - b.mean(0)
    a -= a.mean(1, keepdims=True)
    b -= b.mean(1, keepdims=True)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    return np.asarray((a @ b.T) / np.maximum(norms, 1e-12))


def run(config: Config, settings: ModelInversion, folder: Path) -> Outcome:
    """Run a federation and invert its final model; the baseline inverts the model before any training."""
    changes = private_training(settings)
    evidence = make_federation(config, folder, prepare=lambda _site: changes)
    attacker, *others = evidence.sites
    truths = [evidence.truth(site).train for site in others]
    images = np.concatenate([grey_batch(truth.images) for truth in truths])
    labels = np.concatenate([truth.labels for truth in truths])
    classes = len(evidence.truth(attacker).description.classes)
    shape = truths[0].images.shape[1:]
    means = np.stack([images[labels == one].mean(axis=0) for one in range(classes)])
    model = final_model(evidence, attacker)
    untrained = build_model(config.model.name, classes=classes, channels=shape[0], seed=config.seed)
    pictures, blind = (
        invert_classes(one, classes, shape, settings, seed=config.seed) for one in (model, untrained)
    )
    found, guessed = (_figures(correlations(one, means)) for one in (pictures, blind))
    strangers, stranger_labels, majority = held_out(evidence)
    chance = 1 / classes
    bound = chance + 3 * float(np.sqrt(chance * (1 - chance) / classes))
    return Outcome(
        configuration={
            "cloud": config.cloud.trust,
            "data": config.data.name,
            "rounds": config.federation.rounds,
            **promise(settings, config.federation.rounds),
        },
        success={**found, "accuracy": accuracy_of(evidence, attacker, strangers, stranger_labels)},
        baseline={**guessed, "accuracy": majority},
        falls=found["classes_recognised"] > bound,
        criterion=f"more than {bound:.2f} of the classes' pictures are nearest to the mean image of their "
        "own class (chance and three standard deviations)",
        pictures={
            "classes": [
                Row("mean image of each class at the other sites", list(means)),
                Row("from the final model", list(pictures)),
                Row("from the untrained model", list(blind)),
            ]
        },
        note="It recovers what a class has in common, not single records.",
    )


def _figures(table: NDArray[np.float64]) -> dict[str, float]:
    own = np.arange(len(table))
    return {
        "classes_recognised": float((table.argmax(axis=1) == own).mean()),
        "correlation": float(table[own, own].mean()),
    }
