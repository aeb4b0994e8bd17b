"""The cloud's process ends, at every moment that can matter, and the next one goes on with the same run.

The process's end is an exception that nothing catches; ``test_resume_processes.py`` does it with SIGKILL.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from sessions import CONFIG, FEDERATION, MODEL_KEY, Sessions, make_sessions

from flep_fl.ai_cloud import exchange, members, strategy
from flep_fl.ai_cloud.checkpoint import CheckpointFolder, SavedRun, find_checkpoint, load_checkpoint
from flep_fl.ai_cloud.strategy import EncryptedFedAvg
from flep_fl.contracts import files
from flep_fl.contracts.errors import (
    CheckpointError,
    DamagedCheckpointError,
    FinishedCheckpointError,
    ForeignCheckpointError,
    QuorumError,
    StaleCheckpointError,
    SuperLinkLostError,
)
from flep_fl.flower.local_grid import LocalGrid
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.optimiser_settings import OptimiserSettings
from flep_fl.model_security.seal import open_checkpoint, seal_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.he]

EVERYBODY = {1: "abc", 2: "abc", 3: "abc"}
CLOSE = 1e-6  # a float32 step of weights around 1, and far above CKKS's error


@pytest.fixture(autouse=True)
def no_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll often, for the grid of these tests answers at once; a process ends here, not the power."""
    monkeypatch.setattr(files.os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(members, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(strategy, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.01)


class Crash(BaseException):
    """The end of the cloud's process."""


def cloud(federation: Sessions, folder: Path, **options: Any) -> EncryptedFedAvg:
    return federation.strategy(checkpoint=folder / "cloud" / "checkpoint", **options)


def load(sessions: Sessions, folder: Path, **changes: Any) -> SavedRun:
    kit: dict[str, Any] = {
        "federation": FEDERATION,
        "key_id": MODEL_KEY.key_id,
        "config": CONFIG,
        "cloud_key": sessions.cloud_key.public_key(),
    }
    return load_checkpoint(find_checkpoint(folder), **(kit | changes))


def resumed(federation: Sessions, folder: Path, **options: Any) -> EncryptedFedAvg:
    return cloud(federation, folder, resume=load(federation, folder), **options)


def restart_superlink(federation: Sessions) -> None:
    """Give every site a new node, as a new SuperLink does."""
    apps, contexts = federation.grid._apps, federation.grid._contexts
    for node in sorted(apps):
        apps[node + 100], contexts[node + 100] = apps.pop(node), contexts.pop(node)
    federation.grid._pending.clear()


def check_end(federation: Sessions, ended: EncryptedFedAvg) -> None:
    """The run ended in order, and with the model of a run that nothing interrupted."""
    assert [record.round for record in ended.rounds] == [1, 2, 3]
    assert [record.error for record in ended.rounds] == [""] * 3
    assert [sorted(record.replied) for record in ended.rounds] == [list("abc")] * 3
    assert [record.accuracy for record in ended.rounds] == [pytest.approx(0.51)] * 3
    assert ended.closing_failures == []
    expected = federation.expected(EVERYBODY, 3)
    for name, analyst in federation.analysts.items():
        assert analyst.trained == [1, 2, 3], f"site {name} must train each round once"
        session = analyst.open()
        assert session.closed
        assert session.failure is None
        assert np.abs(np.asarray(session.model["w"], dtype=np.float64) - expected).max() < CLOSE
        assert np.array_equal(np.asarray(analyst.models[-1]), session.model["w"]), "the model as written"


@contextlib.contextmanager
def end_at_write(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> Iterator[list[str]]:
    """End the process at the n-th file that it puts in place; count them all with ``number=-1``."""
    original, seen = Path.replace, list[str]()

    def patched(self: Path, target: Path) -> Path:
        if Path(target).parent.name != "checkpoint":
            return original(self, target)
        seen.append(Path(target).name)
        if len(seen) - 1 == number and not after:
            raise Crash
        result = original(self, target)
        if len(seen) - 1 == number:
            raise Crash
        return result

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "replace", patched)
        yield seen


WRITES = (
    13  # new, then for each of three rounds: open, sum, decided; then three goodbyes and the end less one
)


def test_the_writes_of_a_run_are_those_that_the_next_test_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_sessions(tmp_path)
    with end_at_write(monkeypatch, -1, after=False) as seen:
        ended = cloud(federation, tmp_path)
        ended.start(federation.grid)
    rounds = [name for n in (1, 2, 3) for name in ("state.bin", f"sum-{n:06d}.bin", "state.bin")]
    assert seen == ["state.bin", *rounds, "state.bin", "state.bin", "state.bin", "state.bin"]
    assert len(seen) == WRITES + 1
    check_end(federation, ended)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, WRITES))
def test_an_end_at_any_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    federation = make_sessions(tmp_path)
    with end_at_write(monkeypatch, number, after=after), pytest.raises(Crash):
        cloud(federation, tmp_path).start(federation.grid)
    restart_superlink(federation)
    ended = resumed(federation, tmp_path)
    ended.start(federation.grid)
    check_end(federation, ended)
    assert not list((tmp_path / "cloud" / "checkpoint").glob(".*")), "nothing half-written stays"


@pytest.mark.parametrize("update", range(1, 10))
def test_an_end_in_any_aggregation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    federation = make_sessions(tmp_path)
    original, count = KeylessAdder.add, 0

    def add(self: KeylessAdder, payload: bytes) -> None:
        nonlocal count
        count += 1
        if count == update:
            raise Crash
        original(self, payload)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(KeylessAdder, "add", add)
        cloud(federation, tmp_path).start(federation.grid)
    restart_superlink(federation)
    ended = resumed(federation, tmp_path)
    ended.start(federation.grid)
    check_end(federation, ended)
    again = (update - 1) // 3
    assert [record.attempts for record in ended.rounds] == [2 if n == again else 1 for n in range(3)]


def test_a_run_may_end_and_go_on_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_sessions(tmp_path)
    with end_at_write(monkeypatch, 1, after=True), pytest.raises(Crash):
        cloud(federation, tmp_path).start(federation.grid)
    for write in (1, 1, 2, 2, 3):  # 1: when the round opens; 2: with the sum; 3: when it is decided
        restart_superlink(federation)
        with end_at_write(monkeypatch, write, after=True), pytest.raises(Crash):
            resumed(federation, tmp_path).start(federation.grid)
    for name in "abc":
        federation.restart(name)  # the sites' processes end as well
    restart_superlink(federation)
    ended = resumed(federation, tmp_path)
    ended.start(federation.grid)
    check_end(federation, ended)
    assert ended.rounds[0].attempts == 6


@pytest.mark.parametrize(
    "optimiser", [("fedavg",), ("fedavgm", 0.8, 0.5), ("fedadam", 0.3)], ids=lambda o: o[0]
)
def test_a_resumed_run_ends_with_the_model_of_one_that_nothing_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: tuple[Any, ...]
) -> None:
    """Two whole runs with the same seeds; an optimiser must not take a step twice, or leave one out."""
    settings = OptimiserSettings(*optimiser)

    def begin(name: str) -> Sessions:
        sessions = make_sessions(tmp_path / name)
        sessions.terms = replace(sessions.terms, every_sum=settings.has_memory)
        for analyst in sessions.analysts.values():
            analyst.membership = replace(analyst.membership, optimiser=settings)
        return sessions

    whole, cut = begin("whole"), begin("cut")
    cloud(whole, tmp_path / "whole").start(whole.grid)
    with end_at_write(monkeypatch, 5, after=True), pytest.raises(Crash):  # with the sum of round 2
        cloud(cut, tmp_path / "cut").start(cut.grid)
    for name in "abc":
        cut.restart(name)
    go_on_to(cut, tmp_path / "cut", 3, monkeypatch)  # when round 2 is decided
    restart_superlink(cut)
    ended = resumed(cut, tmp_path / "cut")
    ended.start(cut.grid)
    assert [record.attempts for record in ended.rounds] == [1, 2, 1]
    models = {
        name: [np.asarray(run.analysts[name].open().model["w"], dtype=np.float64) for run in (whole, cut)]
        for name in "abc"
    }
    for name, (undisturbed, interrupted) in models.items():
        assert np.abs(undisturbed - interrupted).max() < CLOSE, name
        assert np.array_equal(interrupted, models["a"][1]), "all sites end with the same bits"
        assert cut.analysts[name].trained == [1, 2, 3]
    assert np.abs(models["a"][0] - np.linspace(-1, 1, 50)).max() > 0.1, "there was something to lose"


def test_an_end_before_the_first_round_is_resumed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_sessions(tmp_path)

    def end(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(members.Members, "gather", end)
        cloud(federation, tmp_path).start(federation.grid)
    ended = resumed(federation, tmp_path)
    ended.start(federation.grid)
    check_end(federation, ended)


def test_a_site_that_is_gone_for_good_does_not_hold_up_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_sessions(tmp_path, "abcd", timeout=2.0)
    with end_at_write(monkeypatch, 4, after=True), pytest.raises(Crash):
        cloud(federation, tmp_path).start(federation.grid)
    federation.grid.kill(federation.node("d"))
    monkeypatch.setattr(strategy, "CLOSE_GRACE_SECONDS", 0.5)
    ended = resumed(federation, tmp_path)
    started = time.monotonic()
    ended.start(federation.grid)
    assert time.monotonic() - started < 30
    assert [sorted(record.replied) for record in ended.rounds] == [list("abcd"), list("abc"), list("abc")]
    assert [(f.site, f.reason) for f in ended.closing_failures] == [("d", "site_lost")]
    expected = federation.expected({1: "abcd", 2: "abc", 3: "abc"}, 3)
    model = federation.analysts["a"].open().model["w"]
    assert np.abs(np.asarray(model, dtype=np.float64) - expected).max() < CLOSE


# --- SuperLink alone ---------------------------------------------------------------------------------


class FallibleGrid(LocalGrid):
    """A grid whose SuperLink ends at given calls; the nodes that come back are new ones."""

    lose_at: frozenset[int] = frozenset()
    calls = 0

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self.lose_at:
            for node in sorted(self._apps):
                self._apps[node + 100] = self._apps.pop(node)
                self._contexts[node + 100] = self._contexts.pop(node)
            self._pending.clear()
            raise SuperLinkLostError("The SuperLink ended and was started again")

    def get_node_ids(self) -> Iterable[int]:
        self._call()
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._call()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._call()
        return super().pull_messages(message_ids)


CALLS = 25  # of a run in which nothing is lost: 5 to gather, 5 a round, 5 to close


@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_a_lost_superlink_costs_an_attempt_and_nothing_else(tmp_path: Path, call: int) -> None:
    federation = make_sessions(tmp_path, grid=FallibleGrid)
    assert isinstance(federation.grid, FallibleGrid)
    federation.grid.lose_at = frozenset({call})
    ended = cloud(federation, tmp_path)
    ended.start(federation.grid)
    check_end(federation, ended)
    assert sum(record.attempts for record in ended.rounds) <= 4


def test_the_calls_of_a_run_are_those_that_the_last_test_goes_through(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path, grid=FallibleGrid)
    cloud(federation, tmp_path).start(federation.grid)
    assert isinstance(federation.grid, FallibleGrid)
    assert CALLS - 2 <= federation.grid.calls <= CALLS


def test_a_superlink_that_is_lost_again_and_again(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path, grid=FallibleGrid)
    assert isinstance(federation.grid, FallibleGrid)
    federation.grid.lose_at = frozenset(range(3, 60, 8))
    ended = cloud(federation, tmp_path)
    ended.start(federation.grid)
    check_end(federation, ended)
    assert sum(record.attempts for record in ended.rounds) > 4


class LateGrid(FallibleGrid):
    """A grid on which, after its SuperLink was lost, one site takes longer than the others to come back."""

    late: int = 0
    calls_away = 40

    def get_node_ids(self) -> Iterable[int]:
        nodes = set(super().get_node_ids())
        lost = self.late not in self._apps
        self.calls_away -= lost
        return sorted(nodes - {self.late + 100} if lost and self.calls_away > 0 else nodes)


def test_after_a_lost_superlink_the_round_waits_for_every_site_that_was_in_it(tmp_path: Path) -> None:
    """A quorum is back at once; without the wait the late site would miss the round."""
    federation = make_sessions(tmp_path, quorum=2, grid=LateGrid)
    grid = federation.grid
    assert isinstance(grid, LateGrid)
    grid.late, grid.lose_at = federation.node("c"), frozenset({12})
    ended = cloud(federation, tmp_path)
    ended.start(grid)
    assert grid.calls_away <= 0, "the site was away for a while"
    check_end(federation, ended)


def test_a_resumed_cloud_does_not_wait_for_sites_that_have_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their processes have ended, in order; nobody is to be told that they were lost."""
    federation = make_sessions(tmp_path)
    with end_at_write(monkeypatch, WRITES - 3, after=True), pytest.raises(Crash):
        cloud(federation, tmp_path).start(federation.grid)
    closed = load(federation, tmp_path).state.closed
    assert len(closed) == 1, "one site has heard the last word"
    federation.grid.kill(federation.node(closed[0]))
    monkeypatch.setattr(strategy, "CLOSE_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(strategy, "RECONNECT_SECONDS", 0.5)
    ended = resumed(federation, tmp_path)
    ended.start(federation.grid)
    assert ended.closing_failures == []
    assert all(analyst.open().closed for analyst in federation.analysts.values())


# --- checkpoints that must be refused ----------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    """A run whose cloud ended after round 2 was decided."""
    federation = make_sessions(tmp_path)
    with end_at_write(monkeypatch, 6, after=True), pytest.raises(Crash):
        cloud(federation, tmp_path).start(federation.grid)
    return federation


def test_what_the_checkpoint_holds(stopped: Sessions, tmp_path: Path) -> None:
    saved = load(stopped, tmp_path)
    assert (saved.state.round, saved.state.attempt, saved.state.sum_round) == (3, 0, 2)
    assert saved.state.members == ("a", "b", "c")
    assert saved.layout is not None
    for path in (tmp_path / "cloud" / "checkpoint").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert load(stopped, tmp_path / "cloud") == saved, "resume=DIR may name the run or its cloud/"


def state_of(folder: Path) -> Path:
    return folder / "cloud" / "checkpoint" / "state.bin"


def resign(federation: Sessions, folder: Path, **changes: Any) -> None:
    path = state_of(folder)
    fields = open_checkpoint(path.read_bytes(), federation.cloud_key.public_key())
    path.write_bytes(seal_checkpoint(fields | changes, federation.cloud_key))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"federation": "0" * 32}, "another federation"),
        ({"key_id": "0" * 32}, "the model key differ"),
        ({"config": "0" * 64}, "the shared settings differ"),
    ],
)
def test_a_foreign_checkpoint_is_refused(
    stopped: Sessions, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ForeignCheckpointError, match=match):
        load(stopped, tmp_path, **changes)


def test_another_clouds_checkpoint_is_refused(stopped: Sessions, tmp_path: Path) -> None:
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(DamagedCheckpointError, match="altered, or written by another cloud"):
        load(stopped, tmp_path, cloud_key=stranger.public_key())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("name", ["state.bin", "sum-000002.bin"])
@pytest.mark.parametrize("damage", [cut, flip, empty, grown, Path.unlink])
def test_a_damaged_checkpoint_is_refused(
    stopped: Sessions, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(tmp_path / "cloud" / "checkpoint" / name)
    with pytest.raises(CheckpointError, match=r"[Rr]esum") as caught:
        load(stopped, tmp_path)
    missing = damage is Path.unlink and name == "state.bin"
    assert isinstance(caught.value, DamagedCheckpointError) != missing


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"round": "3"},
        {"rounds": [{}]},
        {"rounds": 7},
        {"rounds": []},
        {"round": 2},
        {"round": 4},
        {"layout": "[]"},
        {"sum_digest": "0" * 64},
        {"sum_round": 1},
        {"run": "0" * 32},
        {"extra": 1},
        {"members": None},
        {"attempt": -1},
    ],
    ids=str,
)
def test_a_signed_state_that_makes_no_sense_is_refused(
    stopped: Sessions, tmp_path: Path, changes: dict[str, Any]
) -> None:
    resign(stopped, tmp_path, **changes)
    with pytest.raises(DamagedCheckpointError):
        load(stopped, tmp_path)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    federation = make_sessions(tmp_path)
    cloud(federation, tmp_path).start(federation.grid)
    with pytest.raises(FinishedCheckpointError, match="all 3 rounds are done"):
        load(federation, tmp_path)
    left = {path.name for path in (tmp_path / "cloud" / "checkpoint").iterdir()}
    assert left == {"state.bin", "lock"}, "the sum of a finished run is of no more use"


def test_a_run_in_a_folder_that_is_called_cloud(stopped: Sessions, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copytree(tmp_path / "cloud", tmp_path / "runs" / "cloud" / "cloud")
    for named in (tmp_path / "runs" / "cloud", tmp_path / "runs" / "cloud" / "cloud"):
        assert find_checkpoint(named) == tmp_path / "runs" / "cloud" / "cloud" / "checkpoint"
    shutil.copytree(tmp_path / "cloud", tmp_path / "copy")
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path / "copy")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of a run in"):
        find_checkpoint(tmp_path / "nowhere")


def test_what_a_killed_process_left_half_written_is_removed(stopped: Sessions, tmp_path: Path) -> None:
    left = [
        tmp_path / "cloud" / "checkpoint" / ".sum-000003.bin.x1y2",
        tmp_path / "cloud" / "checkpoint" / ".state.bin.x1y2",
        tmp_path / "a" / ".upload.bin.x1y2",
        tmp_path / "a" / ".sum.bin.x1y2",
    ]
    for path in left:
        path.write_bytes(b"half")
    stopped.restart("a")
    resumed(stopped, tmp_path).start(stopped.grid)
    assert not [path for path in left if path.exists()]


def test_two_servers_cannot_use_one_checkpoint(stopped: Sessions, tmp_path: Path) -> None:
    first = CheckpointFolder(tmp_path / "cloud" / "checkpoint", stopped.cloud_key)
    with pytest.raises(CheckpointError, match="Another server uses"):
        resumed(stopped, tmp_path).start(stopped.grid)
    first.close()


def go_on_to(federation: Sessions, folder: Path, write: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume, and end again at a write."""
    restart_superlink(federation)
    with end_at_write(monkeypatch, write, after=True), pytest.raises(Crash):
        resumed(federation, folder).start(federation.grid)


def test_a_stale_checkpoint_is_refused_by_name(
    stopped: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was copied after round 2; the run went on, and the sites have accepted round 3."""
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "cloud", old / "cloud")
    resumed(stopped, tmp_path).start(stopped.grid)
    assert {analyst.open().accepted_round for analyst in stopped.analysts.values()} == {3}
    monkeypatch.setattr(members, "REFUSAL_PATIENCE_SECONDS", 0.3)
    restart_superlink(stopped)
    started = time.monotonic()
    with pytest.raises(StaleCheckpointError, match=r"newest copy .*without resume="):
        resumed(stopped, old).start(stopped.grid)
    assert time.monotonic() - started < 4, "nobody waits for federation.round_timeout to hear it"
    assert {analyst.open().accepted_round for analyst in stopped.analysts.values()} == {3}


def test_a_checkpoint_of_a_run_that_the_sites_have_left_is_stale(
    stopped: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud(stopped, tmp_path / "new").start(stopped.grid)
    monkeypatch.setattr(members, "REFUSAL_PATIENCE_SECONDS", 0.3)
    restart_superlink(stopped)
    with pytest.raises(StaleCheckpointError):
        resumed(stopped, tmp_path).start(stopped.grid)


def test_a_site_that_signed_a_later_round_makes_a_checkpoint_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied while round 2 was open, taken back when round 3 was: round 2 cannot be opened again."""
    federation = make_sessions(tmp_path)
    with end_at_write(monkeypatch, 3, after=True), pytest.raises(Crash):
        cloud(federation, tmp_path).start(federation.grid)
    shutil.copytree(tmp_path / "cloud", tmp_path / "old" / "cloud")
    monkeypatch.setattr(strategy.EncryptedFedAvg, "_close", lambda *_: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        resumed(federation, tmp_path).start(federation.grid)
    monkeypatch.undo()
    monkeypatch.setattr(members, "REFUSAL_PATIENCE_SECONDS", 0.3)
    restart_superlink(federation)
    with pytest.raises(StaleCheckpointError):
        resumed(federation, tmp_path / "old").start(federation.grid)


def test_a_round_without_a_sum_that_sites_have_signed_makes_a_checkpoint_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied while round 2 was open, which then had no quorum; the sites have signed round 3 since."""
    federation = make_sessions(tmp_path, "abcd", quorum=4)
    original, rounds = EncryptedFedAvg._aggregate, list[int]()

    def aggregate(self: EncryptedFedAvg, replies: Iterable[Any]) -> None:
        rounds.append(self._record.round)
        if self._record.round == 2:
            shutil.copytree(tmp_path / "cloud", tmp_path / "old" / "cloud")
            replies = [entry for entry in replies if entry[0] != federation.node("d")]
        original(self, replies)
        if self._record.round == 3:
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(EncryptedFedAvg, "_aggregate", aggregate)
        cloud(federation, tmp_path).start(federation.grid)
    assert rounds == [1, 2, 3]
    ledgers = [analyst.open().ledger for analyst in federation.analysts.values()]
    assert {(ledger.entries.accepted_round, ledger.signed_round) for ledger in ledgers} == {(1, 3)}
    monkeypatch.setattr(members, "REFUSAL_PATIENCE_SECONDS", 0.3)
    restart_superlink(federation)
    with pytest.raises(StaleCheckpointError):
        resumed(federation, tmp_path / "old").start(federation.grid)


def test_one_site_that_claims_to_be_further_does_not_stop_the_others(
    stopped: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many that the quorum is out of reach make a checkpoint stale; one liar shuts itself out."""
    monkeypatch.setattr(members, "REFUSAL_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(strategy, "CLOSE_GRACE_SECONDS", 0.3)
    liar = stopped.analysts["c"].open()
    honest = type(liar).accepted_round
    told = property(lambda s: 9 if s is liar else honest.fget(s))  # type: ignore[attr-defined]
    monkeypatch.setattr(type(liar), "accepted_round", told)
    restart_superlink(stopped)
    stopped.terms = replace(stopped.terms, quorum=2)
    ended = resumed(stopped, tmp_path)
    ended.start(stopped.grid)
    assert sorted(ended.rounds[2].replied) == ["a", "b"]


def test_too_few_sites_come_back(stopped: Sessions, tmp_path: Path) -> None:
    stopped.grid.kill(stopped.node("c"))
    stopped.terms = replace(stopped.terms, round_timeout=0.5)
    with pytest.raises(QuorumError, match="missing: c"):
        resumed(stopped, tmp_path).start(stopped.grid)
    stopped.grid.revive(stopped.node("c"))
    ended = resumed(stopped, tmp_path)  # ... and the run can still be resumed
    ended.start(stopped.grid)
    check_end(stopped, ended)
