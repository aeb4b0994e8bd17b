"""A poisoning analyst: what encryption does not stop, and how far acceptance tests at the analysts go.

The poisoner is an entitled member: its update is signed, well formed and within the bound, and the
verifiable sum holds. The cloud sees ciphertext, the others see sums; nobody can point at it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from numpy.typing import NDArray

from flep_fl.attacks.evidence import Evidence, make_federation
from flep_fl.attacks.report import Outcome
from flep_fl.attacks.settings import Poisoning
from flep_fl.config import Config
from flep_fl.contracts.errors import ConfigError
from flep_fl.data_analyst.model import build_model, set_arrays
from flep_fl.data_analyst.train import evaluate
from flep_fl.flower.compose_site import SiteChanges
from flep_fl.flower.simulation import site_names
from flep_fl.flower.site_data import SiteData
from flep_fl.model_security.mod import ClientAppCallable, Mod

LOST = 0.1
"""From so much accuracy lost on (ten points) the poisoning counts as a success."""


def flipped(data: SiteData) -> SiteData:
    """Call every training image the next class (cyclically)."""
    classes = len(data.description.classes)
    return replace(data, train=replace(data.train, labels=(data.train.labels + 1) % classes))


def scaling(factor: float, from_round: int = 1) -> Mod:
    """Return a mod that sends ``start - factor * (trained - start)`` in the place of the trained model.

    So the update points away from where training went, ``factor`` times as far. Before ``from_round`` the
    site is honest.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if from_round > 1 and _round(message) < from_round:
            return call_next(message, context)
        start = {name: array.numpy() for name, array in _record(message).items()}
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        trained = _record(reply)
        for name, array in list(trained.items()):
            update = array.numpy() - start[name]
            trained[name] = Array((start[name] - factor * update).astype(array.numpy().dtype))
        return reply

    return mod


def run(config: Config, settings: Poisoning, folder: Path) -> Outcome:
    """Run an honest federation, a poisoned one, and a poisoned one whose analysts test what they accept."""
    if not 1 <= settings.from_round <= config.federation.rounds:
        raise ConfigError(
            "attack.from_round is no round of this run",
            expected=f"1 to {config.federation.rounds}",
            found=settings.from_round,
        )
    if settings.kind == "label_flip":
        if settings.from_round != 1:
            raise ConfigError("Labels are flipped from the first round on", remedy="Set attack.from_round=1")
        poison = SiteChanges(data=flipped)
    elif settings.kind == "scaled_update":
        poison = SiteChanges(mods=[scaling(settings.factor, settings.from_round)])
    else:
        raise ConfigError(
            "attack.kind is unknown", expected="label_flip or scaled_update", found=settings.kind
        )
    names = config.sites or site_names(config.federation.sites)
    poisoner = names[-1]

    def prepare(site: str) -> SiteChanges:
        return poison if site == poisoner else SiteChanges()

    testing = replace(config, federation=replace(config.federation, accept_drop=settings.accept_drop))
    honest = make_federation(config, folder / "honest")
    plain = make_federation(config, folder / "poisoned", prepare=prepare)
    tested = make_federation(testing, folder / "tested", prepare=prepare)
    honest_tested = make_federation(testing, folder / "honest_tested")
    victims = [name for name in names if name != poisoner]
    images, labels, majority = held_out(honest)
    score = {
        name: float(np.mean([accuracy_of(run_, site, images, labels) for site in victims]))
        for name, run_ in (
            ("honest", honest),
            ("poisoned", plain),
            ("tested", tested),
            ("honest_tested", honest_tested),
        )
    }
    lost = score["honest"] - score["poisoned"]
    return Outcome(
        configuration={
            "cloud": config.cloud.trust,
            "kind": settings.kind,
            "poisoners": f"1 of {len(names)}",
            "factor": settings.factor if settings.kind == "scaled_update" else None,
            "from_round": settings.from_round if settings.kind == "scaled_update" else None,
            "rounds": config.federation.rounds,
            "accept_drop": settings.accept_drop,
        },
        success={
            "accuracy_lost": lost,
            "accuracy": score["poisoned"],
            "accuracy_with_accept_drop": score["tested"],
            "accuracy_lost_with_accept_drop": score["honest_tested"] - score["tested"],
            "accuracy_honest": score["honest"],
            "accuracy_honest_with_accept_drop": score["honest_tested"],
        },
        baseline={"accuracy_lost": score["honest"] - majority, "accuracy": majority},
        falls=lost >= LOST,
        criterion=f"without acceptance tests the honest analysts' model loses {LOST:g} of accuracy or more",
        note="Mean over the honest analysts, on all held-out images. The baseline is a model that always "
        "names the most frequent class.",
    )


def held_out(evidence: Evidence) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
    """Return the held-out images of all sites, their labels, and the share of the most frequent class."""
    truths = [evidence.truth(site) for site in evidence.sites]
    labels = np.concatenate([truth.test.labels for truth in truths])
    images = np.concatenate([truth.test.images for truth in truths])
    return images, labels, float((labels == truths[0].description.majority_class).mean())


def accuracy_of(
    evidence: Evidence, site: str, images: NDArray[np.float32], labels: NDArray[np.int64]
) -> float:
    """Score the model that an analyst holds at the end of a run."""
    config, data = evidence.config, evidence.truth(site)
    model = build_model(
        config.model.name,
        classes=len(data.description.classes),
        channels=images.shape[1],
        seed=config.seed,
    )
    with np.load(evidence.model_file(site)) as file:
        set_arrays(model, dict(file))
    return evaluate(model, images, labels).accuracy


def _round(message: Message) -> int:
    return cast(int, message.content.config_records["config"]["server-round"])


def _record(message: Message) -> ArrayRecord:
    (record,) = message.content.array_records.values()
    return record
