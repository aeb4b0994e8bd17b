"""``federation.accept_drop``: an analyst refuses a poisoned model, and all agree on the sums all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import SMALL, make_config
from federations import make_federation as prepared_federation
from flwr.app import Context, Message

from flep_fl.attacks.evidence import Evidence, make_federation
from flep_fl.attacks.poisoning import scaling
from flep_fl.contracts.errors import ConfigError
from flep_fl.data_analyst.acceptance import AcceptanceTest
from flep_fl.data_analyst.model import build_model, get_arrays, set_arrays
from flep_fl.data_analyst.train import evaluate
from flep_fl.flower import compose_site
from flep_fl.flower.compose_site import SiteChanges
from flep_fl.model_security.mod import ClientAppCallable

pytestmark = [pytest.mark.e2e, pytest.mark.he]

POISONER = "site-2"
# Without noise: from noisy digits so little is learnt in one round that poison may pass for no worse.
TWO_ROUNDS = (
    *SMALL, "data.limit=150", "federation.rounds=2", "train.local_epochs=3", "train.batch_size=12",
    "noise.recovery=keyed", "denoiser=none",
)  # fmt: skip


def run(folder: Path, *overrides: str, poisoned: bool = True) -> Evidence:
    backwards = scaling(20.0)

    def from_round_two(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        late = message.content.config_records["config"]["server-round"] == 2
        return backwards(message, context, call_next) if late else call_next(message, context)

    def prepare(site: str) -> SiteChanges:
        return SiteChanges(mods=[from_round_two] if poisoned and site == POISONER else [])

    return make_federation(make_config(*TWO_ROUNDS, *overrides), folder, prepare=prepare)


def held(evidence: Evidence, site: str) -> dict[str, np.ndarray]:
    with np.load(evidence.model_file(site)) as file:
        return dict(file)


def accuracy(evidence: Evidence, model: dict[str, np.ndarray]) -> float:
    data = evidence.truth("site-0")
    network = build_model("cnn", classes=len(data.description.classes), seed=0)
    set_arrays(network, model)
    return evaluate(network, data.test.images, data.test.labels).accuracy


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("cloud", "optimizer"),
    [("open", "fedavg"), pytest.param("untrusted", "fedavgm", marks=pytest.mark.slow)],
)
def test_a_poisoned_model_is_not_taken_over(tmp_path: Path, cloud: str, optimizer: str) -> None:
    # The first model may be beaten by chance; a drop of 0 keeps whatever was better.
    evidence = run(
        tmp_path, f"cloud={cloud}", f"federation.optimizer={optimizer}", "federation.accept_drop=0.0"
    )
    agreed = [dict(party.session.model) for party in evidence.parties.values()]
    assert all(equal(agreed[0], other) for other in agreed[1:]), (
        "the agreed state does not depend on refusals"
    )
    assert all(party.session.accepted_round == 2 for party in evidence.parties.values())
    kept = held(evidence, "site-0")
    assert not equal(kept, agreed[0]), "this site works with another model than the poisoned one"
    assert accuracy(evidence, kept) > accuracy(evidence, agreed[0])


@pytest.mark.slow
def test_without_the_test_the_poisoned_model_is_taken(tmp_path: Path) -> None:
    evidence = run(tmp_path)
    assert equal(held(evidence, "site-0"), dict(evidence.parties["site-0"].session.model))
    assert not list(tmp_path.rglob("acceptance.npz")), "off by default: nothing is kept"


@pytest.mark.slow
def test_an_honest_model_is_taken(tmp_path: Path) -> None:
    evidence = run(tmp_path, "federation.accept_drop=0.5", poisoned=False)
    for site, party in evidence.parties.items():
        assert equal(held(evidence, site), dict(party.session.model)), site


def test_validation_images_are_not_trained_on(tmp_path: Path) -> None:
    seen: list[int] = []

    def note(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        seen.append(int(next(iter(reply.content.metric_records.values()))["num-examples"]))
        return reply

    evidence = make_federation(
        make_config(
            *TWO_ROUNDS,
            "cloud=open",
            "data.limit=60",
            "federation.rounds=1",
            "train.local_epochs=1",
            "federation.accept_drop=0.5",
            "federation.accept_share=0.25",
        ),
        tmp_path,
        prepare=lambda site: SiteChanges(mods=[note] if site == "site-0" else []),
    )
    images = len(evidence.truth("site-0").train)
    assert seen == [images - round(0.25 * images)]


def test_a_site_trains_from_and_hands_out_the_model_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[int, dict[str, np.ndarray]] = {}
    started: list[dict[str, np.ndarray]] = []
    train_local = compose_site.train_local

    def keep_the_first(self: AcceptanceTest, model: dict[str, np.ndarray], _run: str) -> Any:
        return first.setdefault(id(self), dict(model))

    def noted(model: torch.nn.Module, *others: Any, **options: Any) -> Any:
        started.append({name: value.copy() for name, value in get_arrays(model).items()})
        return train_local(model, *others, **options)

    monkeypatch.setattr(AcceptanceTest, "consider", keep_the_first)
    monkeypatch.setattr(compose_site, "train_local", noted)
    small = ("cloud=open", "data.limit=60", "train.local_epochs=1", "federation.accept_drop=0.5")
    evidence = run(tmp_path, *small, poisoned=False)
    initial = next(iter(first.values()))
    assert len(started) == 6
    assert all(equal(start, initial) for start in started)
    assert equal(held(evidence, "site-0"), initial)
    exported = torch.load(evidence.model_file("site-0").with_name("model.pt"), weights_only=True)
    assert equal({name: value.numpy() for name, value in exported.items()}, initial)
    assert not equal(dict(evidence.parties["site-0"].session.model), initial)


def test_a_site_that_opens_no_model_tests_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing: list[tuple[str, float]] = []

    class Noted(AcceptanceTest):
        def __init__(self, drop: float, score: Any, path: Path, **options: Any) -> None:
            testing.append((path.parent.parent.name, drop))
            super().__init__(drop, score, path, **options)

    monkeypatch.setattr(compose_site, "AcceptanceTest", Noted)
    public = ("ckks.encryption=public", "ckks.contribute_only=[c]")
    prepared_federation(tmp_path, "data.limit=60", "federation.accept_drop=0.37", *public)
    assert testing == [("a", 0.37), ("b", 0.37)], "with the drop that is configured"


@pytest.mark.parametrize(
    "override",
    [
        "federation.accept_drop=-0.1",
        "federation.accept_drop=1",
        "federation.accept_share=0",
        "federation.accept_share=1",
    ],
)
def test_values_out_of_range_are_named(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        make_config(*SMALL, override)
