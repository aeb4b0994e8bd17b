"""The handshake: only sites of the kit become members, and nobody else holds the run up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Federation, make_federation
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flep_fl.ai_cloud import members as module
from flep_fl.contracts.errors import QuorumError
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.local_grid import LocalGrid
from flep_fl.model_security.layout import ModelLayout
from flep_fl.provision.kits import load_site_kit

pytestmark = pytest.mark.he

Hello = Callable[[Message], Message]


def node_that_says(hello: Hello) -> ClientApp:
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        return hello(message)

    return app


def reply(message: Message, **fields: Any) -> Message:
    return Message(RecordDict({"flep": ConfigRecord(fields)}), reply_to=message)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return make_federation(tmp_path_factory.mktemp("federation"), "federation.rounds=1")


@pytest.fixture
def federation(made: Federation) -> Federation:
    made.strategy.members.present.clear()
    made.strategy.members._refused.clear()
    made.strategy.members._ask_again.clear()
    return made


def with_node(federation: Federation, app: ClientApp, node: int = 99) -> LocalGrid:
    apps = {number: federation.sites[name].app for number, name in enumerate("abc", start=2)}
    return LocalGrid({**apps, node: app})


STRANGERS: dict[str, Hello] = {
    "empty": lambda message: Message(RecordDict(), reply_to=message),
    "unsigned": lambda message: reply(message, status="ok", site="a", identity=b"nothing"),
    "unknown": lambda message: reply(message, status="ok", site="mallory", identity=b"x" * 200),
    "typeless": lambda message: reply(message, status="ok", site=7, identity="text"),
    "a list": lambda message: reply(message, status=["ok"], site=["a"]),
    "free text": lambda message: reply(message, status="<script>"),
}


@pytest.mark.parametrize("hello", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_refused_and_costs_nobody_anything(federation: Federation, hello: Hello) -> None:
    grid = with_node(federation, node_that_says(hello))
    federation.strategy.members.gather(grid, quorum=3, timeout=20)
    assert federation.strategy.members.sites() == {"a", "b", "c"}
    assert 99 not in federation.strategy.members.present


def test_a_recorded_introduction_is_refused(federation: Federation) -> None:
    members = federation.strategy.members
    recorded: list[bytes] = []
    original = federation.sites["a"].session.identity

    def record(instruction: Any) -> bytes:
        recorded.append(original(instruction))
        return recorded[-1]

    federation.sites["a"].session.identity = record  # type: ignore[method-assign]
    members.gather(federation.grid, quorum=3, timeout=20)
    thief = node_that_says(lambda message: reply(message, status="ok", site="a", identity=recorded[0]))
    assert members.welcome(with_node(federation, thief)) == 0
    assert members.present[2].site == "a"


def test_a_restarted_site_takes_its_place_again(federation: Federation) -> None:
    members = federation.strategy.members
    members.gather(federation.grid, quorum=3, timeout=20)
    again = prepare_site(
        load_site_kit(federation.folder / "kits" / "a"),
        federation.config,
        federation.folder / "archives" / "a",
        federation.out / "again",
        state=federation.folder / "state-again",
    )
    assert members.welcome(with_node(federation, again.app)) == 1
    assert members.present[99].site == "a"
    assert 2 not in members.present
    assert members.sites() == {"a", "b", "c"}


def test_missing_sites_are_named(federation: Federation) -> None:
    grid = LocalGrid({2: federation.sites["a"].app})
    with pytest.raises(QuorumError, match="missing: b, c"):
        federation.strategy.members.gather(grid, quorum=3, timeout=1.0)


def test_after_a_refusal_the_run_does_not_wait_for_ever(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFUSAL_PATIENCE_SECONDS", 0.5)
    grid = LocalGrid({2: federation.sites["a"].app, 9: node_that_says(STRANGERS["unsigned"])})
    started = time.monotonic()
    federation.strategy.members.gather(grid, quorum=1, timeout=60)
    assert time.monotonic() - started < 30
    with pytest.raises(QuorumError, match="nodes were refused: malformed"):
        federation.strategy.members.gather(grid, quorum=3, timeout=1)


def test_no_single_site_decides_the_model(federation: Federation) -> None:
    session = federation.sites["a"].session
    ours, session.layout = session.layout, ModelLayout.of({"other": np.zeros(5, np.float32)})
    try:
        federation.strategy.members.layout = None
        federation.strategy.members.gather(federation.grid, quorum=2, timeout=2)
    finally:
        session.layout = ours
    assert federation.strategy.members.sites() == {"b", "c"}
    assert federation.strategy.members.layout == ours


def test_a_node_that_never_answers_is_asked_again_later(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def silent(message: Message) -> Message:
        asked.append(time.monotonic())
        raise RuntimeError("gone")

    members = federation.strategy.members
    grid = LocalGrid({9: node_that_says(silent)})
    assert members.welcome(grid) == members.welcome(grid) == 0
    assert len(asked) == 1
    monkeypatch.setitem(members._ask_again, 9, time.monotonic() - 1)
    members.welcome(grid)
    assert len(asked) == 2


def test_a_site_of_another_configuration_is_refused_and_ends(tmp_path: Path, federation: Federation) -> None:
    other = make_federation(tmp_path, "federation.rounds=1", "train.lr=0.5")
    ours = federation.strategy
    site = other.sites["a"]
    object.__setattr__(site.session.membership, "federation", ours.terms.federation)
    object.__setattr__(site.session.membership, "cloud_key", federation.cloud_kit.federation.cloud_key())
    assert ours.members.welcome(LocalGrid({50: site.app})) == 0
    assert ours.members._refused[50] == "config_mismatch"
    assert site.finished(wait=True)
    assert "train.lr: 0.5 here, 0.001 in the cloud" in str(site.session.failure)
