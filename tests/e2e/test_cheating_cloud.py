"""The test plays the cloud: whatever it does to the sum or to the protocol, the analysts notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federations import Federation, make_federation
from flwr.app import Message

from flep_fl.ai_cloud.exchange import exchange
from flep_fl.contracts.errors import HaltedError, KitError, QuorumError, TooFewContributorsError
from flep_fl.contracts.ports import Adder
from flep_fl.contracts.records import RoundRecord
from flep_fl.flower.compose_site import Site, prepare_site
from flep_fl.model_security.ledger import Ledger
from flep_fl.model_security.seal import open_control
from flep_fl.provision.kits import load_site_kit

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
    federation.strategy.terms = replace(federation.strategy.terms, round_timeout=3.0)
    federation.run()  # the first sum is there, so the run ends; that the sites refused it is what we look at


@pytest.mark.parametrize(
    ("cheat", "variant"),
    [
        (drop_second, ["ckks.profile=default"]),
        (double_second, ["ckks.profile=compact", "ckks.encryption=public"]),
        (first_in_place_of_second, ["ckks.profile=classic"]),
        (drop_second, ["cloud=mixed", "cloud.trusting=[b]"]),
        (double_second, ["cloud=trusted"]),
    ],
)
def test_a_wrong_sum_is_caught_by_every_analyst(
    tmp_path: Path, cheat: Callable[[Adder, int, bytes], None], variant: list[str]
) -> None:
    """The whole federation; every other variant and cheat: ``test_cheating_in_each_variant.py``."""
    federation = make_federation(tmp_path, "federation.rounds=2", *variant)
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
    federation = make_federation(tmp_path, "federation.rounds=2")
    run_with(federation, drop_second)
    federation.sites["a"].session.ledger.close()
    with pytest.raises(HaltedError):
        prepare_site(
            load_site_kit(tmp_path / "kits" / "a"),
            federation.config,
            tmp_path / "archives" / "a",
            tmp_path / "again",
        )


def kind_of(message: Message, federation: Federation) -> str:
    """Say what the cloud's signed instruction in a message asks for."""
    blob = message.content.config_records["flep"]["instruction"]
    assert isinstance(blob, bytes)
    return str(open_control(blob, federation.cloud_kit.federation.cloud_key())["kind"])


def test_a_sum_below_min_contributors_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "federation.sites=4")
    terms = federation.strategy.terms
    federation.strategy.terms = replace(terms, quorum=2)
    dropped = {2, 3}
    pushed = federation.grid.push_messages

    def push(messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        if batch and kind_of(batch[0], federation) == "round":
            for node in dropped:
                federation.grid.kill(node)
        else:
            for node in dropped:
                federation.grid.revive(node)
        return pushed(batch)

    federation.grid.push_messages = push  # type: ignore[method-assign]
    federation.run()
    assert [len(r.replied) for r in federation.strategy.rounds] == [2]
    failures = federation.strategy.closing_failures
    assert {f.site for f in failures} == {"a", "b", "c", "d"}
    assert {f.reason for f in failures} == {"too_few_contributors"}
    for site in federation.sites.values():
        assert not site.session.accepted
        assert site.finished(wait=False), "the cloud will not speak again: nobody may wait for it"
        assert isinstance(site.session.failure, TooFewContributorsError)


def ask(federation: Federation, number: int) -> dict[int, Message]:
    """Order a round from every site, as the strategy does, and keep the replies."""
    strategy = federation.strategy
    messages = strategy._messages("round", number, strategy.members.present)
    return {
        node: reply for node, reply, _ in exchange(federation.grid, messages, timeout=60) if reply is not None
    }


def statuses(replies: dict[int, Message]) -> set[str]:
    """Return the status or the error code of each reply."""
    return {
        reply.error.reason if reply.has_error() else str(reply.content["flep"]["status"])
        for reply in replies.values()
    }


def gather(federation: Federation) -> None:
    federation.strategy.members.gather(federation.grid, quorum=3, timeout=30)


def payloads(replies: dict[int, Message]) -> dict[int, bytes]:
    return {node: bytes(reply.content["payload"]["sealed"].data) for node, reply in replies.items()}


def test_a_second_order_for_one_round_gets_identical_bytes_and_no_second_training(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    gather(federation)
    first = ask(federation, 1)
    again = ask(federation, 1)
    assert len(first) == 3
    assert payloads(again) == payloads(first), "two uploads under one round would cancel the check values"
    assert all("seconds_train" not in reply.content.get("metrics", {}) for reply in again.values())


def test_a_past_round_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=3")
    gather(federation)
    assert len(ask(federation, 2)) == 3
    assert statuses(ask(federation, 1)) == {"stale"}


@pytest.mark.parametrize(("number", "attempt"), [(0, 1), (4, 1), (99, 1), (1, 0), (1, 1 << 40)])
def test_a_round_that_the_federation_does_not_have_is_refused(
    tmp_path: Path, number: int, attempt: int
) -> None:
    federation = make_federation(tmp_path, "federation.rounds=3")
    gather(federation)
    original = federation.strategy._instruction
    federation.strategy._instruction = lambda *a, **k: replace(original(*a, **k), attempt=attempt)  # type: ignore[method-assign]
    assert ask(federation, number) == {}
    assert all(site.session.ledger.entries.headers == {} for site in federation.sites.values())


def test_a_round_after_the_end_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    federation.run()
    assert ask(federation, 2) == {}


def start_again(federation: Federation, name: str) -> Site:
    """Restart a site as a new process would: same kit, same state on disk, nothing in memory."""
    federation.sites[name].session.ledger.close()
    site = prepare_site(
        load_site_kit(federation.folder / "kits" / name),
        federation.config,
        federation.folder / "archives" / name,
        federation.out / "sites" / name,
    )
    federation.sites[name] = site
    return site


def test_two_processes_cannot_use_one_kit(tmp_path: Path) -> None:
    federation = make_federation(tmp_path)
    with pytest.raises(KitError, match="Another process uses the kit"):
        prepare_site(
            load_site_kit(tmp_path / "kits" / "a"),
            federation.config,
            tmp_path / "archives" / "a",
            tmp_path / "2",
        )


def test_a_crash_between_upload_and_ledger_does_not_sign_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    gather(federation)
    monkeypatch.setattr(Ledger, "_write_header", lambda *_: (_ for _ in ()).throw(OSError("crash")))
    assert statuses(ask(federation, 1)) == {"error"}
    monkeypatch.undo()
    kept = (tmp_path / "kits" / "a" / "state" / "upload.bin").read_bytes()
    federation.grid._apps[2] = start_again(federation, "a").app
    assert payloads(ask(federation, 1))[2] == kept


def test_a_restarted_site_takes_part_again_and_rollback_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=3")
    strategy = federation.strategy
    gather(federation)
    sums = []
    for number in (1, 2):
        strategy._record = RoundRecord(number)
        strategy.rounds.append(strategy._record)
        messages = strategy._messages("round", number, strategy.members.present)
        strategy._aggregate(exchange(federation.grid, messages, timeout=60))
        sums.append(strategy._sum)
    order = strategy._messages("round", 3, strategy.members.present)[2]
    federation.grid._apps[2] = start_again(federation, "a").app
    reply = next(iter(federation.grid.send_and_receive([order])))
    assert statuses({2: reply}) == {"ok"}, "it gets the sum of round 2 with the order and goes on"
    assert federation.sites["a"].session.accepted_round == 2

    federation.grid._apps[2] = start_again(federation, "a").app
    strategy._sum = sums[0]
    strategy.members.present[2].has_sum = ""  # so that the order brings that sum
    old = strategy._messages("round", 3, strategy.members.present)[2]
    assert next(iter(federation.grid.send_and_receive([old]))).has_error()
    assert federation.sites["a"].session.accepted_round == 2


def test_a_site_whose_round_had_no_quorum_accepts_the_older_sum_after_a_restart(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=3", "federation.sites=4", "federation.quorum=4")
    strategy, grid = federation.strategy, federation.grid
    gather(federation)
    orders = []
    for number in (1, 2):
        strategy._record = RoundRecord(number)
        strategy.rounds.append(strategy._record)
        messages = strategy._messages("round", number, strategy.members.present)
        orders.append(messages)
        if number == 2:
            grid.kill(2)
        strategy._aggregate(exchange(grid, messages, timeout=60))
    assert strategy.rounds[1].error == "quorum"
    grid._apps[5] = start_again(federation, "d").app
    strategy.members.present[5].has_sum = ""
    order = strategy._messages("round", 3, strategy.members.present)[5]
    assert statuses({5: next(iter(grid.send_and_receive([order])))}) == {"ok"}
    assert not federation.sites["d"].session.halted


@pytest.mark.parametrize("power", [1, 20, 32, 34, 40])
def test_a_scaled_upload_tells_the_cloud_nothing(tmp_path: Path, power: int) -> None:
    """Whether a sum is merely wrong or absurdly large must look the same, or it is a decryption oracle."""
    federation = make_federation(tmp_path, "federation.rounds=2")

    def scale(adder: Adder, number: int, payload: bytes) -> None:
        adder.add(payload)
        if number == 3:
            keyless = adder._honest if isinstance(adder, CheatingAdder) else adder
            for _ in range(power):
                for ciphertext in keyless._sum:  # type: ignore[attr-defined]
                    keyless._evaluator.add_inplace(ciphertext, ciphertext)  # type: ignore[attr-defined]

    run_with(federation, scale)
    assert all(site.session.halted for site in federation.sites.values())
    codes = {f.reason for r in federation.strategy.rounds for f in r.failed}
    assert codes == {"sum_rejected"}, codes


def test_a_run_that_was_left_cannot_be_announced_again(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    strategy = federation.strategy
    strategy.members.gather(federation.grid, quorum=3, timeout=30)
    old = strategy.run

    def announce(run: str) -> None:
        strategy.run, strategy.members.run = run, run
        strategy.members.present.clear()
        strategy.members.gather(federation.grid, quorum=3, timeout=5)

    announce("ab" * 16)
    with pytest.raises(QuorumError, match="stale"):
        announce(old)
