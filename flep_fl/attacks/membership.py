"""Membership inference by an analyst: whether another site trained on a given record.

The analyst holds the final model, as it is entitled to, and candidate records as their owner would restore
them. ``loss`` (Yeom et al. 2018): members have a small loss. ``lira`` (Carlini et al. 2022, "Membership
inference attacks from first principles"): the attacker trains shadow models on random halves of the
candidates, fits one normal distribution to the confidences of those that saw a record and one to the others,
and takes the ratio of likelihoods.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from flep_fl.attacks.differential_privacy import private_training, promise
from flep_fl.attacks.evidence import Evidence, make_federation
from flep_fl.attacks.poisoning import accuracy_of, held_out
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import MembershipInference
from flep_fl.config import Config
from flep_fl.contracts.errors import ConfigError
from flep_fl.data_analyst.model import build_model, set_arrays
from flep_fl.data_analyst.train import train_local

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Scores = NDArray[np.float64]

_SMALL_FPR = 0.05
_DEVIATIONS = 3.0


def losses(model: torch.nn.Module, images: Images, labels: Labels) -> Scores:
    """Return the cross-entropy of every image in nats, float64 (N,)."""
    model.eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(images).float() / 255.0).double()
        return np.asarray(cross_entropy(logits, torch.from_numpy(labels), reduction="none").numpy())


def confidence(loss: Scores) -> Scores:
    """Return ``log(p / (1 - p))`` of the true class from its loss: about normal over models."""
    loss = np.clip(loss, 1e-9, 50.0)
    return np.asarray(-loss - np.log(-np.expm1(-loss)))


def auc(members: Scores, others: Scores) -> float:
    """Area under the ROC curve: the chance that a member scores above another record (ties count half)."""
    above = (members[:, None] > others[None]).mean()
    equal = (members[:, None] == others[None]).mean()
    return float(above + equal / 2)


def auc_deviation(members: int, others: int) -> float:
    """Return the standard deviation of the AUC of a guess (Mann and Whitney 1947)."""
    return float(np.sqrt((members + others + 1) / (12 * members * others)))


def rate_at(members: Scores, others: Scores, false_positives: float) -> float:
    """Return the share of members found at a given share of false alarms."""
    threshold = float(np.quantile(others, 1 - false_positives))
    return float((members > threshold).mean())


def likelihood_ratio(observed: Scores, shadow: NDArray[np.float64], inside: NDArray[np.bool_]) -> Scores:
    """Return LiRA's score of every record.

    Parameters
    ----------
    observed
        Confidence of the attacked model, (N,).
    shadow
        Confidences of the shadow models, (K, N).
    inside
        Which of them were trained on which record, (K, N); each record in some and not in others.

    Returns
    -------
    ndarray
        float64 (N,): log likelihood as a member less that as a stranger. With few shadows the two
        variances are shared by all records, as the authors advise.
    """
    means, residuals = {}, {}
    for side in (True, False):
        chosen = np.where(inside == side, shadow, np.nan)
        means[side] = np.nanmean(chosen, axis=0)
        residuals[side] = float(np.nanstd(chosen - means[side])) + 1e-6
    return np.asarray(
        -0.5 * ((observed - means[True]) / residuals[True]) ** 2
        - np.log(residuals[True])
        + 0.5 * ((observed - means[False]) / residuals[False]) ** 2
        + np.log(residuals[False])
    )


def run(config: Config, settings: MembershipInference, folder: Path) -> Outcome:
    """Run a federation, and ask its final model about records of the other sites."""
    if settings.method not in ("loss", "lira"):
        raise ConfigError("attack.method is unknown", expected="loss or lira", found=settings.method)
    if settings.method == "lira" and settings.shadows < 4:
        raise ConfigError("attack.shadows is too small", expected="4 or more", found=settings.shadows)
    changes = private_training(settings)
    evidence = make_federation(config, folder, prepare=lambda _site: changes)
    attacker, *others = evidence.sites
    truths = [evidence.truth(site) for site in others]
    members = np.concatenate([truth.train.images for truth in truths])
    member_labels = np.concatenate([truth.train.labels for truth in truths])
    strangers, stranger_labels, majority = held_out(evidence)
    count = min(len(members), len(strangers))
    rng = np.random.default_rng(config.seed)
    chosen = rng.permutation(len(members))[:count], rng.permutation(len(strangers))[:count]
    images = np.concatenate([members[chosen[0]], strangers[chosen[1]]])
    labels = np.concatenate([member_labels[chosen[0]], stranger_labels[chosen[1]]])
    is_member = np.arange(2 * count) < count

    model = final_model(evidence, attacker)
    observed = losses(model, images, labels)
    if settings.method == "loss":
        scores = -observed
    else:
        shadow, inside = _shadows(config, evidence, images, labels, settings.shadows)
        scores = likelihood_ratio(confidence(observed), shadow, inside)
    area = auc(scores[is_member], scores[~is_member])
    guess = rng.random(2 * count)
    bound = 0.5 + _DEVIATIONS * auc_deviation(count, count)
    accuracy = accuracy_of(evidence, attacker, strangers, stranger_labels)
    return Outcome(
        configuration={
            "cloud": config.cloud.trust,
            "method": settings.method,
            "shadows": settings.shadows if settings.method == "lira" else 0,
            "rounds": config.federation.rounds,
            "local_epochs": config.train.local_epochs,
            "records": 2 * count,
            **promise(settings, config.federation.rounds),
        },
        success={
            "auc": area,
            "tpr_at_5_percent_fpr": rate_at(scores[is_member], scores[~is_member], _SMALL_FPR),
            "accuracy": accuracy,
        },
        baseline={
            "auc": auc(guess[is_member], guess[~is_member]),
            "tpr_at_5_percent_fpr": rate_at(guess[is_member], guess[~is_member], _SMALL_FPR),
            "accuracy": majority,
        },
        falls=area > bound,
        criterion=f"AUC above {bound:.3f}: three standard deviations of a guess over {2 * count} records",
        note="Accuracy is the model's own, beside that of always naming the most frequent class: privacy "
        "that costs the whole model is not worth much.",
    )


def final_model(evidence: Evidence, site: str) -> torch.nn.Module:
    """Return the global model as an analyst holds it at the end of a run."""
    config, data = evidence.config, evidence.truth(site)
    model = build_model(
        config.model.name,
        classes=len(data.description.classes),
        channels=data.train.images.shape[1],
        seed=config.seed,
    )
    with np.load(evidence.model_file(site)) as file:
        set_arrays(model, dict(file))
    return model


def _shadows(
    config: Config, evidence: Evidence, images: Images, labels: Labels, count: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Train shadow models, each on half of the records, every record in half of the models."""
    classes = len(evidence.truth(evidence.sites[0]).description.classes)
    rng = np.random.default_rng([config.seed, 1])
    order = np.stack([rng.permutation(count) for _ in range(len(labels))], axis=1)
    inside = order < count // 2
    found = []
    for number, rows in enumerate(inside):
        model = build_model(config.model.name, classes=classes, channels=images.shape[1], seed=config.seed)
        train_local(
            model,
            images[rows],
            labels[rows],
            optimizer=config.train.optimizer,
            lr=config.train.lr,
            batch_size=config.train.batch_size,
            local_epochs=config.train.local_epochs * config.federation.rounds,
            seed=number,
            threads=config.runtime.threads,
        )
        found.append(confidence(losses(model, images, labels)))
    return np.stack(found), inside
