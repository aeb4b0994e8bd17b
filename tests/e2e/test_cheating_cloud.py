"""The test plays the cloud: whatever it does to the sum or to the protocol, the analysts notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from federations import Federation, make_federation
from flwr.app import Message

from flep_fl.ai_cloud.exchange import exchange
from flep_fl.contracts.errors import HaltedError, QuorumError
from flep_fl.contracts.ports import Adder

pytestmark = [pytest.mark.e2e, pytest.mark.he]


class CheatingAdder:
    """An adder whose n-th payload is treated by ``cheat``."""

    def __init__(self, honest: Adder, cheat: Callable[[Adder, int, bytes], None]) -> None:
        self._honest, self._cheat, self._seen = honest, cheat, 0

    @property
    def count(self) -> int:
        return self._honest.count

    def add(self, payload: bytes) -> None:
        self._seen += 1
        self._cheat(self._honest, self._seen, payload)

    def result(self) -> bytes:
        return self._honest.result()


def drop_second(adder: Adder, number: int, payload: bytes) -> None:
    if number != 2:
        adder.add(payload)


def double_second(adder: Adder, number: int, payload: bytes) -> None:
    adder.add(payload)
    if number == 2:
        adder.add(payload)


def first_in_place_of_second(adder: Adder, number: int, payload: bytes) -> None:
    if number == 1:
        adder.add(payload)
    if number != 2:
        adder.add(payload)


def run_with(federation: Federation, cheat: Callable[[Adder, int, bytes], None]) -> None:
    honest = federation.strategy._make_adder
    federation.strategy._make_adder = lambda size: CheatingAdder(honest(size), cheat)
    try:
        federation.run()
    except Exception as exc:
        assert type(exc).__name__ == "QuorumError", exc


@pytest.mark.parametrize("cheat", [drop_second, double_second, first_in_place_of_second])
@pytest.mark.parametrize("profile", ["default", "classic"])
def test_a_wrong_sum_is_caught_by_every_analyst(
    tmp_path: Path, profile: str, cheat: Callable[[Adder, int, bytes], None]
) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2", f"ckks.profile={profile}")
    before = {name: dict(site.session.model) for name, site in federation.sites.items()}
    run_with(federation, cheat)
    for name, site in federation.sites.items():
        assert site.session.halted, f"site {name} accepted the sum"
        assert site.finished(wait=True), "a site that rejected a sum must stop"
        for key, value in site.session.model.items():
            assert np.array_equal(value, before[name][key]), "the rejected sum must not become the model"
        assert not site.model_file.exists()
        with pytest.raises(HaltedError, match=r"rotate|provision"):
            site.session.refuse_if_halted()
    assert federation.strategy.rounds[0].accuracy is None
    reasons = {f.reason for r in federation.strategy.rounds for f in r.failed}
    assert reasons <= {"sum_rejected", "halted"}, "the cloud learns one constant code and no figure"


def test_an_honest_run_is_accepted(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    run_with(federation, lambda adder, _number, payload: adder.add(payload))
    assert all(site.session.closed and not site.session.halted for site in federation.sites.values())
    assert all(site.model_file.exists() for site in federation.sites.values())


def test_a_halted_site_does_not_start_again(tmp_path: Path) -> None:
    from flep_fl.flower.compose_site import prepare_site
    from flep_fl.provision.kits import load_site_kit

    federation = make_federation(tmp_path, "federation.rounds=2")
    run_with(federation, drop_second)
    with pytest.raises(HaltedError):
        prepare_site(
            load_site_kit(tmp_path / "kits" / "a"),
            federation.config,
            tmp_path / "archives" / "a",
            tmp_path / "again",
        )


def test_a_sum_below_min_contributors_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "federation.sites=4")
    terms = federation.strategy.terms
    federation.strategy.terms = type(terms)(
        **{**{f: getattr(terms, f) for f in terms.__slots__}, "quorum": 2}
    )
    dropped = {2, 3}
    pushed = federation.grid.push_messages

    def push(messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        if batch and batch[0].metadata.message_type == "train":
            for node in dropped:
                federation.grid.kill(node)
        else:
            for node in dropped:
                federation.grid.revive(node)
        return pushed(batch)

    federation.grid.push_messages = push  # type: ignore[method-assign]
    federation.run()
    assert [len(r.replied) for r in federation.strategy.rounds] == [2]
    reasons = {f.reason for f in federation.strategy.rounds[0].failed}
    assert "too_few_contributors" in reasons
    assert not any(site.session.accepted for site in federation.sites.values())


def ask(federation: Federation, number: int) -> dict[int, Message]:
    """Order a round from every site, as the strategy does, and keep the replies."""
    strategy = federation.strategy
    messages = strategy._messages("round", number, strategy._members)
    return {
        node: reply for node, reply, _ in exchange(federation.grid, messages, timeout=60) if reply is not None
    }


def payloads(replies: dict[int, Message]) -> dict[int, bytes]:
    return {node: bytes(reply.content["payload"]["sealed"].data) for node, reply in replies.items()}


def test_a_second_order_for_one_round_gets_identical_bytes_and_no_second_training(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    federation.strategy._gather(federation.grid)
    first = ask(federation, 1)
    again = ask(federation, 1)
    assert len(first) == 3
    assert payloads(again) == payloads(first), "two uploads under one round would cancel the check values"
    assert all("seconds_train" not in reply.content.get("metrics", {}) for reply in again.values())


def test_a_past_round_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=3")
    federation.strategy._gather(federation.grid)
    assert len(ask(federation, 2)) == 3
    assert ask(federation, 1) == {}


def test_a_run_that_was_left_cannot_be_announced_again(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    strategy = federation.strategy
    strategy._gather(federation.grid)
    old = strategy.run
    strategy.run, strategy._members = "ab" * 16, {}
    strategy._gather(federation.grid)
    strategy.run, strategy._members = old, {}
    with pytest.raises(QuorumError, match="stale"):
        strategy._gather(federation.grid)
