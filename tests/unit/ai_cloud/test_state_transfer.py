"""FedAvgM and FedAdam at every analyst; a site that missed sums goes on with the same bits as the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from sessions import Sessions, examples_of, make_sessions, step

from flep_fl.ai_cloud import transfers
from flep_fl.contracts.errors import TransferError
from flep_fl.contracts.protocol import FLEP_RECORD, STATEMENTS
from flep_fl.model_security import optimiser
from flep_fl.model_security.ledger import Ledger
from flep_fl.model_security.optimiser_settings import OptimiserSettings

pytestmark = pytest.mark.he

ADAM = OptimiserSettings("fedadam", 0.3)
MOMENTUM = OptimiserSettings("fedavgm", 0.8, 0.5)


def make(folder: Path, settings: OptimiserSettings = ADAM, *, rounds: int = 5, **options: Any) -> Sessions:
    sessions = make_sessions(folder, rounds=rounds, quorum=2, **options)
    sessions.terms = replace(sessions.terms, every_sum=settings.has_memory)
    for analyst in sessions.analysts.values():
        analyst.membership = replace(analyst.membership, optimiser=settings)
    return sessions


def run(sessions: Sessions, after: dict[int, Callable[[], None]] | None = None, **options: Any) -> Any:
    """Run the federation; ``after[n]()`` is called after round n."""

    def on_change(rounds: Any) -> None:
        done = len(rounds)
        if after and done in after:
            after.pop(done)()

    strategy = sessions.strategy(on_change=on_change, **options)
    strategy.start(sessions.grid)
    return strategy


def away(sessions: Sessions, name: str, start: int, end: int, extra: Any = None) -> dict[int, Any]:
    """Kill a site's node after round ``start``, bring it back after round ``end``."""

    def back() -> None:
        if extra is not None:
            extra()
        sessions.grid.revive(sessions.node(name))

    return {start: lambda: sessions.grid.kill(sessions.node(name)), end: back}


def weights(sessions: Sessions) -> dict[str, bytes]:
    """The exact state of every site: weights and moments."""
    return {name: analyst.open()._held.state.to_bytes() for name, analyst in sessions.analysts.items()}


def reference(settings: OptimiserSettings, contributors: dict[int, str], size: int = 50) -> np.ndarray:
    """The optimiser over plain averages in float64, with models rounded to float32 for training."""
    state = optimiser.start(settings, np.linspace(-1, 1, size, dtype=np.float32).astype(np.float64))
    for number, names in sorted(contributors.items()):
        model = state.weights.astype(np.float32)
        total = sum(map(examples_of, names))
        mean = sum(examples_of(n) * step(n, number, model).astype(np.float64) for n in names) / total
        state = optimiser.step(settings, state, mean, number)
    return state.weights


@pytest.mark.parametrize("settings", [ADAM, MOMENTUM], ids=lambda s: s.name)
@pytest.mark.parametrize("fresh", [False, True], ids=["one-process", "process-per-message"])
def test_every_analyst_takes_the_same_step(tmp_path: Path, settings: OptimiserSettings, fresh: bool) -> None:
    sessions = make(tmp_path, settings, rounds=3, new_process_for_every_message=fresh)
    run(sessions)
    states = weights(sessions)
    assert len(set(states.values())) == 1
    expected = reference(settings, dict.fromkeys((1, 2, 3), "abc"))
    for analyst in sessions.analysts.values():
        np.testing.assert_allclose(analyst.open().model["w"], expected, atol=1e-6)
        assert analyst.open()._held.holding.round == 3


@pytest.mark.parametrize("settings", [ADAM, MOMENTUM], ids=lambda s: s.name)
@pytest.mark.parametrize("lost", [False, True], ids=["kept-its-state", "lost-its-state"])
def test_a_site_that_was_away_ends_with_the_same_bits(
    tmp_path: Path, settings: OptimiserSettings, lost: bool
) -> None:
    sessions = make(tmp_path, settings, rounds=6)

    def forget() -> None:
        sessions.restart("c")
        for name in ("optimiser.bin", "sum.bin") if lost else ():
            (tmp_path / "c" / name).unlink()

    strategy = run(sessions, away(sessions, "c", 2, 4, forget))
    replied = {record.round: "".join(sorted(record.replied)) for record in strategy.rounds}
    assert replied == {1: "abc", 2: "abc", 3: "ab", 4: "ab", 5: "abc", 6: "abc"}
    assert len(set(weights(sessions).values())) == 1
    models = [analyst.open().model["w"].tobytes() for analyst in sessions.analysts.values()]
    assert len(set(models)) == 1
    np.testing.assert_allclose(
        sessions.analysts["c"].open().model["w"], reference(settings, replied), atol=1e-6
    )
    assert not strategy.closing_failures


def test_a_site_that_comes_late_is_no_different(tmp_path: Path) -> None:
    sessions = make(tmp_path)
    sessions.grid.kill(sessions.node("c"))
    sessions.terms = replace(sessions.terms, round_timeout=1.0)
    run(sessions, {2: lambda: sessions.grid.revive(sessions.node("c"))})
    assert len(set(weights(sessions).values())) == 1


def test_a_site_that_comes_back_for_the_close_gets_the_final_model(tmp_path: Path) -> None:
    sessions = make(tmp_path, rounds=4)
    run(sessions, away(sessions, "c", 1, 4))
    assert len(set(weights(sessions).values())) == 1


def test_sampled_sites_stay_in_step(tmp_path: Path) -> None:
    """Sites that are not asked in a round miss its sum; whoever is asked next is brought up to date first."""
    sessions = make(tmp_path, rounds=6, names="abcd")
    sessions.terms = replace(sessions.terms, participants=2)
    strategy = run(sessions)
    assert [len(record.replied) for record in strategy.rounds] == [2] * 6
    assert len(set(weights(sessions).values())) == 1


def test_fedavg_needs_no_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a state was asked for")

    monkeypatch.setattr(transfers, "_collect", never)
    sessions = make(tmp_path, OptimiserSettings())
    run(sessions, away(sessions, "c", 1, 3))
    models = [analyst.open().model["w"].tobytes() for analyst in sessions.analysts.values()]
    assert len(set(models)) == 1
    assert not list(tmp_path.rglob("optimiser.bin"))


def corrupt_relay(sessions: Sessions, change: Callable[[Message], None]) -> list[str]:
    """Play the cloud: change every message that brings a state; collect what the sites answer."""
    pushed = sessions.grid.push_messages

    def push(messages: Any) -> Any:
        batch = list(messages)
        for message in batch:
            if STATEMENTS in message.content[FLEP_RECORD]:
                change(message)
        return pushed(batch)

    sessions.grid.push_messages = push
    return []


OLD: dict[str, Any] = {}


def flip(message: Message) -> None:
    array = message.content["payload"]["sealed"]
    array.data = array.data[:-20] + bytes([array.data[-20] ^ 1]) + array.data[-19:]


def drop_statements(message: Message) -> None:
    record = message.content[FLEP_RECORD]
    record[STATEMENTS] = record[STATEMENTS][:0]


def repeat_old(message: Message) -> None:
    """Relay the first transfer again in place of every later one."""
    record = message.content[FLEP_RECORD]
    OLD.setdefault("record", (list(record[STATEMENTS]), message.content["payload"]))
    record[STATEMENTS], message.content["payload"] = OLD["record"]


@pytest.mark.parametrize("change", [flip, drop_statements])
def test_a_forged_transfer_is_refused(tmp_path: Path, change: Any) -> None:
    sessions = make(tmp_path)
    corrupt_relay(sessions, change)
    strategy = run(sessions, away(sessions, "c", 1, 3))
    states = weights(sessions)
    assert states["a"] == states["b"] != states["c"]
    assert {f.reason for r in strategy.rounds for f in r.failed if f.site == "c"} == {"missed_sum"}
    assert not sessions.analysts["c"].open().halted, "it is not the sum that was wrong"
    assert [f.reason for f in strategy.closing_failures] == ["missed_sum"]


def test_an_old_transfer_is_refused(tmp_path: Path) -> None:
    sessions = make(tmp_path, rounds=7)
    OLD.clear()
    corrupt_relay(sessions, repeat_old)
    first = away(sessions, "c", 1, 3)
    second = away(sessions, "c", 4, 6)
    strategy = run(sessions, {**first, **second})
    replied = {record.round: "".join(sorted(record.replied)) for record in strategy.rounds}
    assert replied[4] == "abc", "the first transfer was a good one"
    assert replied[7] == "ab", "the second was the first again"
    states = weights(sessions)
    assert states["a"] == states["b"] != states["c"]


def test_a_site_alone_cannot_make_others_take_its_state(tmp_path: Path) -> None:
    """With four sites and min_contributors=3, two others must say the same."""
    sessions = make(tmp_path, names="abcd")
    for analyst in sessions.analysts.values():
        analyst.membership = replace(analyst.membership, min_contributors=3)
    session = sessions.analysts["d"].open()
    session.ledger.enter("r" * 32)
    session._begin("s" * 32)
    other = sessions.analysts["a"].open()
    other._begin("s" * 32)
    challenge = session._held.draw_challenge()
    statement, sealed = other._held.statement("a", challenge, other._signing_key, hand_over=True)
    with pytest.raises(TransferError, match="enough sites"):
        session.take_state([statement], sealed)


def handed(
    sessions: Sessions, run: str, number: int, joiner: Any, digest: str = ""
) -> tuple[list[bytes], bytes]:
    """What sites a and b say and hand over, holding the state of a round of a run."""
    digest = digest or f"{number}" * 64
    statements, sealed = [], b""
    for name in "ab":
        session = sessions.analysts[name].open()
        session._begin(run)
        held = session._held
        held.prepare(np.ones(50), session._holding(number, digest))
        held.commit()
        told, blob = held.statement(name, joiner.challenge(), session._signing_key, hand_over=name == "a")
        statements.append(told)
        sealed = blob or sealed
    return statements, sealed


def test_a_state_of_another_run_or_older_than_ones_own_is_refused(tmp_path: Path) -> None:
    sessions = make(tmp_path)
    session = sessions.analysts["c"].open()
    session._begin("1" * 32)
    session._held.draw_challenge()
    with pytest.raises(TransferError, match="another run"):
        session.take_state(*handed(sessions, "2" * 32, 2, session._held))
    assert session.accepted_round == 0
    statements, sealed = handed(sessions, "1" * 32, 2, session._held)
    newer = handed(sessions, "1" * 32, 3, session._held)
    session.take_state(*newer)
    assert (session.accepted_round, session._held.holding.round) == (3, 3)
    with pytest.raises(TransferError, match="older"):
        session.take_state(statements, sealed)
    assert session._held.holding.round == 3


def test_sites_that_hold_another_sum_of_the_same_round_are_refused(tmp_path: Path) -> None:
    """The cloud has shown two sums: whoever holds one of them does not go over to the other."""
    sessions = make(tmp_path)
    session = sessions.analysts["c"].open()
    session._begin("1" * 32)
    session._held.draw_challenge()
    session.take_state(*handed(sessions, "1" * 32, 3, session._held))
    with pytest.raises(TransferError, match="another sum"):
        session.take_state(*handed(sessions, "1" * 32, 3, session._held, "f" * 64))
    assert (session.accepted, session._held.holding.accepted) == ("3" * 64, "3" * 64)


def test_a_site_that_starts_from_its_kit_takes_no_other_first_model(tmp_path: Path) -> None:
    sessions = make(tmp_path)
    session = sessions.analysts["c"].open()
    session._begin("1" * 32)
    session._held.draw_challenge()
    with pytest.raises(TransferError, match="first model"):
        session.take_state(*handed(sessions, "1" * 32, 0, session._held))


def test_a_crash_after_a_transfer_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = make(tmp_path)
    session = sessions.analysts["c"].open()
    session._begin("1" * 32)
    session._held.draw_challenge()
    transfer = handed(sessions, "1" * 32, 2, session._held)

    def crash(*_: Any) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "adopt", crash)
        with pytest.raises(CrashError):
            session.take_state(*transfer)
    sessions.restart("c")
    again = sessions.analysts["c"].open()
    assert (again.accepted_round, again.accepted, again._model_of) == (2, "2" * 64, "2" * 64)
    assert again._held.state.to_bytes() == sessions.analysts["a"].open()._held.state.to_bytes()


class CrashError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("when", ["before the ledger", "after the ledger"])
def test_a_crash_around_an_accepted_sum_repeats_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    sessions = make(tmp_path, rounds=4)
    real, crashed = Ledger.confirm_sum, []

    def confirm(ledger: Ledger, blob: bytes) -> None:
        if ledger._folder.name == "c" and ledger.entries.accepted_round == 1 and not crashed:
            crashed.append(True)
            if when == "after the ledger":
                real(ledger, blob)
            raise CrashError
        real(ledger, blob)

    monkeypatch.setattr(Ledger, "confirm_sum", confirm)

    def push(messages: Any, pushed: Any = sessions.grid.push_messages) -> Any:
        if crashed == [True]:
            crashed.append(False)
            sessions.restart("c")
        return pushed(messages)

    sessions.grid.push_messages = push
    run(sessions)
    assert crashed
    assert len(set(weights(sessions).values())) == 1


def test_the_state_on_disk_is_sealed(tmp_path: Path) -> None:
    sessions = make(tmp_path, rounds=1)
    run(sessions)
    path = tmp_path / "a" / "optimiser.bin"
    assert path.stat().st_mode & 0o777 == 0o600
    state = sessions.analysts["a"].open()._held.state
    blob = path.read_bytes()
    assert not any(value.tobytes() in blob for value in state.weights)
