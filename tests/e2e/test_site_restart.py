"""A site whose process ends, at any moment, goes on from its state folder: same model, same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from sessions import Sessions, make_sessions

from flep_fl.ai_cloud.exchange import exchange
from flep_fl.ai_cloud.strategy import EncryptedFedAvg
from flep_fl.contracts import files
from flep_fl.contracts.records import RoundRecord

pytestmark = [pytest.mark.e2e, pytest.mark.he]

EVERYBODY = {1: "abc", 2: "abc", 3: "abc"}


def begin(federation: Sessions, rounds: int) -> EncryptedFedAvg:
    """Gather, and run some rounds, as the strategy does."""
    strategy = federation.strategy()
    strategy.members.gather(federation.grid, quorum=3, timeout=10)
    for number in range(1, rounds + 1):
        play(federation, strategy, number)
    return strategy


def play(federation: Sessions, strategy: EncryptedFedAvg, number: int) -> None:
    strategy.round, strategy._record = number, RoundRecord(number)
    strategy.rounds.append(strategy._record)
    messages = strategy._messages("round", number, strategy.members.present)
    strategy._aggregate(exchange(federation.grid, messages, timeout=20))


def tell(federation: Sessions, strategy: EncryptedFedAvg, number: int, name: str, **changes: Any) -> Message:
    """Give one site the order of a round; return its reply."""
    original = strategy._instruction
    strategy._instruction = lambda *a, **k: replace(original(*a, **k), **changes)  # type: ignore[method-assign]
    node = federation.node(name)
    messages = strategy._messages("round", number, {node: strategy.members.present[node]})
    strategy._instruction = original  # type: ignore[method-assign]
    return next(iter(federation.grid.send_and_receive([messages[node]])))


def code(reply: Message) -> str:
    return reply.error.reason if reply.has_error() else str(reply.content["flep"]["status"])


def payload(reply: Message) -> bytes:
    return bytes(reply.content["payload"]["sealed"].data)


def model(federation: Sessions, name: str) -> np.ndarray:
    return np.asarray(federation.analysts[name].open().model["w"], dtype=np.float64)


def test_a_new_process_for_every_message_ends_with_the_same_model(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path, new_process_for_every_message=True)
    strategy = federation.strategy()
    strategy.start(federation.grid)
    assert [record.error for record in strategy.rounds] == [""] * 3
    for name in "abc":
        assert np.abs(model(federation, name) - federation.expected(EVERYBODY, 3)).max() < 1e-6
        assert federation.analysts[name].trained == [1, 2, 3]
        assert federation.analysts[name].evaluated == 3, "each model is evaluated once"
    assert [record.accuracy for record in strategy.rounds] == [pytest.approx(0.51)] * 3


def test_a_restarted_site_holds_the_model_and_needs_no_second_delivery(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path)
    strategy = begin(federation, 2)
    assert code(tell(federation, strategy, 3, "a")) == "ok"
    before = model(federation, "a")
    federation.restart("a")
    assert np.array_equal(model(federation, "a"), before)
    assert (tmp_path / "a" / "sum.bin").stat().st_mode & 0o777 == 0o600

    again = federation.strategy()  # the same run, as the sites know it, with nobody welcomed yet
    again.run = again.members.run = strategy.run
    again._sum, again.round, again.members.layout = strategy._sum, 3, strategy.members.layout
    again.members.gather(federation.grid, quorum=3, timeout=10)
    held = {member.site: member.has_sum for member in again.members.present.values()}
    assert strategy._sum is not None
    assert held["a"] == strategy._sum.digest
    assert held["b"] != held["a"], "b has not got that sum yet"


class Crash(BaseException):
    """The end of a process."""


@contextmanager
def crash_at(monkeypatch: pytest.MonkeyPatch, name: str, *, after: bool) -> Iterator[None]:
    """End the process just before (or after) a file of that name is put in its place."""
    original = Path.replace

    def patched(self: Path, target: Path) -> Path:
        hit = Path(target).name == name
        if hit and not after:
            raise Crash
        result = original(self, target)
        if hit:
            raise Crash
        return result

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "replace", patched)
        yield


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["sum.bin", "ledger.json", "figures.json", "upload.bin"])
def test_a_crash_at_any_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    federation = make_sessions(tmp_path)
    strategy = begin(federation, 2)
    analyst = federation.analysts["a"]
    with crash_at(monkeypatch, name, after=after), pytest.raises(Crash):
        tell(federation, strategy, 3, "a")
    federation.restart("a")
    first = tell(federation, strategy, 3, "a", attempt=2)
    assert code(first) == "ok"
    assert {"accuracy", "loss"} <= set(first.content["metrics"]), "what it found out is told all the same"
    assert np.abs(model(federation, "a") - federation.expected(EVERYBODY, 2)).max() < 1e-6
    assert analyst.open().accepted_round == 2
    assert np.array_equal(np.asarray(analyst.models[-1]), analyst.open().model["w"])
    federation.restart("a")
    again = tell(federation, strategy, 3, "a", attempt=3)
    assert payload(again) == payload(first), "one upload per round, whatever happens"
    # ... and that upload, whichever attempt it carries, goes into a sum that all accept.
    strategy.attempt = 3
    play(federation, strategy, 3)
    assert sorted(strategy.rounds[-1].replied) == ["a", "b", "c"]
    strategy._close(federation.grid)
    assert strategy.closing_failures == []
    assert np.abs(model(federation, "a") - federation.expected(EVERYBODY, 3)).max() < 1e-6


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "another run's", "older", "empty"])
def test_a_damaged_sum_on_disk_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    federation = make_sessions(tmp_path)
    strategy = begin(federation, 2)
    path = tmp_path / "a" / "sum.bin"
    older = path.read_bytes()
    tell(federation, strategy, 3, "a")
    federation.restart("a")
    blob = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(blob[:-1])
    elif damage == "flipped":
        blob[len(blob) // 2] ^= 1
        path.write_bytes(blob)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "older":
        assert older != blob
        path.write_bytes(older)
    else:
        other = make_sessions(tmp_path / "other")
        tell(other, begin(other, 2), 3, "a")
        path.write_bytes((tmp_path / "other" / "a" / "sum.bin").read_bytes())
    strategy.members.present[federation.node("a")].has_sum = strategy._sum.digest  # type: ignore[union-attr]
    session = federation.analysts["a"].open()
    assert session.accepted_round == 2, "the ledger still knows what was accepted"
    assert not session.halted
    assert code(tell(federation, strategy, 3, "a")) == "stale", "it cannot train on a model that it lacks"
    play(federation, strategy, 3)  # the cloud thinks that a has the sum; a says otherwise, once
    assert [(f.site, f.reason) for f in strategy.rounds[-1].failed] == [("a", "stale")]
    assert code(tell(federation, strategy, 3, "a", attempt=2)) == "ok", "now the sum comes with the order"


def test_a_restarted_site_cannot_be_taken_back_to_the_first_model(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path)
    strategy = begin(federation, 2)
    tell(federation, strategy, 3, "a")
    (tmp_path / "a" / "sum.bin").unlink()
    (tmp_path / "a" / "upload.bin").unlink()
    federation.restart("a")
    strategy._sum = None  # a cloud that claims that nothing has been summed yet
    assert code(tell(federation, strategy, 3, "a")) == "stale"
    assert federation.analysts["a"].trained == [1, 2, 3]


def test_a_site_that_lost_its_last_sum_does_not_train_on_the_first_model(tmp_path: Path) -> None:
    """In a round that it has never signed, nothing but the ledger speaks against the first model."""
    federation = make_sessions(tmp_path, rounds=4)
    strategy = begin(federation, 2)
    tell(federation, strategy, 3, "a")
    (tmp_path / "a" / "sum.bin").unlink()
    federation.restart("a")
    strategy._sum = None
    assert code(tell(federation, strategy, 4, "a")) == "stale"
    assert federation.analysts["a"].trained == [1, 2, 3]
    assert max(federation.analysts["a"].open().ledger.entries.headers) == 3


def test_a_round_that_is_opened_again_gets_the_bytes_of_the_first_attempt(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path)
    strategy = begin(federation, 1)
    first = tell(federation, strategy, 2, "a")
    for attempt in (2, 3, 1):
        assert payload(tell(federation, strategy, 2, "a", attempt=attempt)) == payload(first)
    assert federation.analysts["a"].trained == [1, 2]
    # A site that is asked for the first time now signs the attempt at which it was asked.
    assert code(tell(federation, strategy, 2, "b", attempt=4)) == "ok"
    header = federation.analysts["b"].open().ledger.entries.headers[2]
    assert b'"attempt":4' in bytes.fromhex(header)


def test_a_new_run_starts_from_the_first_model_again(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path)
    federation.strategy().start(federation.grid)
    last = model(federation, "a")
    federation.restart("a")
    assert np.array_equal(model(federation, "a"), last)
    strategy = federation.strategy()
    strategy.members.gather(federation.grid, quorum=3, timeout=10)
    assert np.array_equal(model(federation, "a"), np.linspace(-1, 1, 50, dtype=np.float32))
    federation.restart("a")
    assert federation.analysts["a"].open().accepted == "", "the sum of a past run is not this run's"
    assert code(tell(federation, strategy, 3, "a")) == "ok"
    assert federation.analysts["a"].trained == [1, 2, 3, 3], "nor is the upload of a past run"
    headers = federation.analysts["a"].open().ledger.entries.headers
    assert strategy.run.encode() in bytes.fromhex(headers[3])
    assert np.array_equal(model(federation, "a"), np.linspace(-1, 1, 50, dtype=np.float32))
