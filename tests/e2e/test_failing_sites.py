"""Slow, dead, late, all but one gone: the sum is exactly that of the valid updates; each failure is named."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from sessions import Sessions, make_sessions, step

from flep_fl.ai_cloud import exchange, members, strategy
from flep_fl.ai_cloud.strategy import EncryptedFedAvg
from flep_fl.contracts.records import RoundRecord
from flep_fl.flower.local_grid import LocalGrid
from flep_fl.model_security.adder import KeylessAdder

pytestmark = [pytest.mark.e2e, pytest.mark.he]

CLOSE = 1e-6  # a float32 step of weights around 1, and far above CKKS's error


@pytest.fixture(autouse=True)
def no_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(strategy, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(strategy, "CLOSE_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "NODE_CHECK_SECONDS", 0.05)


class FallibleGrid(LocalGrid):
    """A grid whose sites fail in chosen rounds: ``faults[round][node]`` is ``slow``, ``late`` or ``dead``.

    A slow site does not get to its order before the cloud gives up; a late one carries it out after that,
    and its reply is there when the cloud has gone on; a dead one disappears in the middle of it.
    """

    faults: dict[int, dict[int, str]] = {}  # noqa: RUF012 - set per instance

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        orders = [m for m in batch if m.metadata.message_type == "train"]
        if orders:
            self._finish_late_work()
        ids = list(super().push_messages(batch))
        self._held: dict[str, tuple[int, str]] = getattr(self, "_held", {})
        for message, message_id in zip(batch, ids, strict=True):
            faults = self.faults.get(int(message.metadata.group_id or 0), {})
            fault = faults.get(message.metadata.dst_node_id)
            if message in orders and fault == "dead":
                self.kill(message.metadata.dst_node_id)
            elif message in orders and fault:
                self._held[message_id] = (message.metadata.dst_node_id, fault)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([one for one in message_ids if one not in getattr(self, "_held", {})])

    def forget_messages(self, message_ids: Iterable[str]) -> None:
        super().forget_messages([one for one in message_ids if one not in getattr(self, "_held", {})])

    def _finish_late_work(self) -> None:
        for message_id, (_node, fault) in getattr(self, "_held", {}).items():
            if fault == "late":
                replies = list(super().pull_messages([message_id]))
                assert len(replies) == 1, "the late site does its work after all"
        self._held = {}


def make(folder: Path, names: str, faults: dict[int, dict[str, str]], **options: Any) -> Sessions:
    federation = make_sessions(folder, names, grid=FallibleGrid, timeout=0.6, **options)
    assert isinstance(federation.grid, FallibleGrid)
    federation.grid.faults = {
        number: {federation.node(name): fault for name, fault in by_name.items()}
        for number, by_name in faults.items()
    }
    return federation


def failures(record: RoundRecord) -> dict[str, str]:
    return {failure.site: failure.reason for failure in record.failed}


def model(federation: Sessions, name: str) -> NDArray[np.float64]:
    return np.asarray(federation.analysts[name].open().model["w"], dtype=np.float64)


def run(federation: Sessions) -> EncryptedFedAvg:
    def come_back(_rounds: list[RoundRecord]) -> None:
        for node in list(federation.grid._dead):
            federation.grid.revive(node)

    made = federation.strategy(on_change=come_back)
    made.start(federation.grid)
    return made


@pytest.mark.parametrize(
    ("fault", "reason"), [("slow", "round_timeout"), ("late", "round_timeout"), ("dead", "site_lost")]
)
def test_the_sum_is_that_of_the_others(tmp_path: Path, fault: str, reason: str) -> None:
    federation = make(tmp_path, "abcd", {2: {"d": fault}})
    started = time.monotonic()
    ended = run(federation)
    assert time.monotonic() - started < 20
    assert [failures(record) for record in ended.rounds] == [{}, {"d": reason}, {}]
    assert [sorted(r.replied) for r in ended.rounds] == [list("abcd"), list("abc"), list("abcd")]
    expected = federation.expected({1: "abcd", 2: "abc", 3: "abcd"}, 3)
    for name in "abcd":
        assert np.abs(model(federation, name) - expected).max() < CLOSE
    assert (2 in federation.analysts["d"].trained) == (fault == "late"), "its work was done, and was too late"
    wrong = federation.expected({1: "abcd", 2: "abcd", 3: "abcd"}, 3)
    assert np.abs(expected - wrong).max() > 0.01, "the difference would be seen"


def test_a_dead_site_is_noticed_long_before_the_timeout(tmp_path: Path) -> None:
    federation = make(tmp_path, "abcd", {1: {"d": "dead"}}, rounds=1)
    federation.terms = replace(federation.terms, round_timeout=60.0)
    started = time.monotonic()
    ended = run(federation)
    assert time.monotonic() - started < 10
    assert failures(ended.rounds[0]) == {"d": "site_lost"}


def test_all_but_one_gone_keeps_the_last_model_and_the_run_goes_on(tmp_path: Path) -> None:
    gone = dict.fromkeys("bcd", "dead")
    federation = make(tmp_path, "abcd", {2: gone})
    ended = run(federation)
    first, second, third = ended.rounds
    assert (first.error, second.error, third.error) == ("", "quorum", "")
    assert second.replied == ["a"]
    assert failures(second) == dict.fromkeys("bcd", "site_lost")
    # Round 3 starts from the model of round 1; the one update of round 2 is in no sum.
    weights = federation.expected({1: "abcd"}, 1).astype(np.float32)
    trained = {name: step(name, 3, weights).astype(np.float64) for name in "abcd"}
    counts = {name: 100 + 10 * number for number, name in enumerate("abcd")}
    expected = sum(counts[n] * trained[n] for n in "abcd") / sum(counts.values())
    for name in "abcd":
        assert np.abs(model(federation, name) - expected).max() < CLOSE


def broken(site: str, number: int, weights: NDArray[Any]) -> NDArray[Any]:
    """Train; but d's loss is no number any more in round 1, e's weights leave the bound, f's code fails."""
    result = step(site, number, weights)
    if number == 1 and site == "d":
        result[7] = np.nan
    if number == 1 and site == "e":
        result[7] = 1e9
    if number == 1 and site == "f":
        raise RuntimeError("secret detail")
    return result


def test_every_kind_of_failure_at_once(tmp_path: Path) -> None:
    federation = make(tmp_path, "abcdefgh", {1: {"g": "slow", "h": "dead"}}, rounds=2, train=broken)
    ended = run(federation)
    first, second = ended.rounds
    assert sorted(first.replied) == ["a", "b", "c"]
    assert failures(first) == {
        "d": "weight_range",
        "e": "weight_range",
        "f": "error",
        "g": "round_timeout",
        "h": "site_lost",
    }
    assert sorted(second.replied) == list("abcdefgh")
    expected = federation.expected({1: "abc", 2: "abcdefgh"}, 2)
    for name in "abcdefgh":
        assert np.abs(model(federation, name) - expected).max() < CLOSE


def test_a_site_refuses_its_own_bad_weights_before_anything_is_signed(tmp_path: Path) -> None:
    federation = make(tmp_path, "abcde", {}, rounds=1, train=broken)
    run(federation)
    for name in "de":
        session = federation.analysts[name].open()
        assert session.ledger.entries.headers == {}
        assert not (tmp_path / name / "upload.bin").exists()


# --- one by one --------------------------------------------------------------------------------------


def test_updates_are_added_one_by_one_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make(tmp_path, "abcdef", {}, rounds=1)
    events: list[str] = []
    pull, add = federation.grid.pull_messages, KeylessAdder.add

    def pulled(message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(message_ids))
        events.extend("pull" for reply in replies if reply.has_content() and "payload" in reply.content)
        return replies

    def added(self: KeylessAdder, payload: bytes) -> None:
        events.append("add")
        add(self, payload)

    monkeypatch.setattr(federation.grid, "pull_messages", pulled)
    monkeypatch.setattr(KeylessAdder, "add", added)
    run(federation)
    assert events == ["pull", "add"] * 6


def peak_of_aggregation(folder: Path, names: str) -> tuple[int, int]:
    """Return the peak of Python's memory while a cloud aggregates, and the size of one update."""
    federation = make_sessions(folder, names, rounds=1, size=150_000, timeout=60.0)
    cloud = federation.strategy()
    cloud.members.gather(federation.grid, quorum=3, timeout=30)
    cloud._record = RoundRecord(1)
    cloud.rounds.append(cloud._record)
    messages = cloud._messages("round", 1, cloud.members.present)
    kept = folder / "replies"
    kept.mkdir()
    for node, reply, _ in exchange.exchange(federation.grid, messages, timeout=60):
        assert reply is not None
        (kept / str(node)).write_bytes(bytes(reply.content["payload"]["sealed"].data))
    size = max(path.stat().st_size for path in kept.iterdir())

    def replies() -> Iterator[tuple[int, Message, str]]:
        for node in sorted(messages):
            sealed = strategy._payload_record((kept / str(node)).read_bytes())
            content = RecordDict({"flep": ConfigRecord({"status": "ok"}), "payload": sealed})
            yield node, Message(content, 1, "train"), ""

    tracemalloc.start()
    try:
        cloud._aggregate(replies())
        return tracemalloc.get_traced_memory()[1], size
    finally:
        tracemalloc.stop()
        assert sorted(cloud._record.replied) == sorted(names)


def test_the_clouds_memory_does_not_grow_with_the_sites(tmp_path: Path) -> None:
    few, size = peak_of_aggregation(tmp_path / "few", "abc")
    many, _ = peak_of_aggregation(tmp_path / "many", "abcdefghijkl")
    assert size > 1_000_000
    assert many - few < size / 2, f"{few} bytes with 3 sites, {many} with 12; one update has {size}"
