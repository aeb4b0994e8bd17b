"""One site misbehaves: its update is refused by name, and the sum stays exactly that of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federations import Federation, make_federation
from flwr.app import Message

from flep_fl.contracts.errors import QuorumError, WeightRangeError
from flep_fl.contracts.protocol import Instruction
from flep_fl.flower.runtime.wire import to_wire
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import get_profile
from flep_fl.model_security.session import AnalystSession
from flep_fl.reporting.results import round_entry

pytestmark = [pytest.mark.e2e, pytest.mark.he]

Seal = Callable[[Any, int, Instruction], bytes]
Fault = Callable[[AnalystSession, Seal], Seal]


def truncated(_session: AnalystSession, seal: Seal) -> Seal:
    return lambda arrays, n, i: seal(arrays, n, i)[:-100]


def altered(_session: AnalystSession, seal: Seal) -> Seal:
    def bad(arrays: Any, n: int, i: Instruction) -> bytes:
        blob = bytearray(seal(arrays, n, i))
        blob[-5000] ^= 1
        return bytes(blob)

    return bad


def stranger(session: AnalystSession, seal: Seal) -> Seal:
    def bad(arrays: Any, n: int, i: Instruction) -> bytes:
        session._signing_key = Ed25519PrivateKey.generate()
        return seal(arrays, n, i)

    return bad


def other_key(session: AnalystSession, seal: Seal) -> Seal:
    profile = get_profile("default")
    session._cipher = CkksModelCipher(ModelKey.generate(profile), profile)
    return seal


def other_round(_session: AnalystSession, seal: Seal) -> Seal:
    return lambda arrays, n, i: seal(arrays, n, replace(i, round=i.round + 1))


def other_layout(session: AnalystSession, seal: Seal) -> Seal:
    def bad(arrays: Any, n: int, i: Instruction) -> bytes:
        object.__setattr__(session, "membership", replace(session.membership, config="0" * 64))
        return seal(arrays, n, i)

    return bad


def not_finite(_session: AnalystSession, seal: Seal) -> Seal:
    def bad(arrays: Any, n: int, i: Instruction) -> bytes:
        name = next(iter(arrays))
        return seal({**arrays, name: np.full_like(arrays[name], np.nan)}, n, i)

    return bad


def too_large(_session: AnalystSession, seal: Seal) -> Seal:
    return lambda arrays, n, i: seal({k: v + 1e6 for k, v in arrays.items()}, n, i)


def crash(_session: AnalystSession, _seal: Seal) -> Seal:
    def bad(arrays: Any, n: int, i: Instruction) -> bytes:
        raise RuntimeError("secret detail of this site")

    return bad


FAULTS: list[tuple[Fault, str]] = [
    (truncated, "malformed"),
    (altered, "signature"),
    (stranger, "signature"),
    (other_key, "foreign"),
    (other_round, "stale"),
    (other_layout, "foreign"),
    (not_finite, "weight_range"),
    (too_large, "weight_range"),
    (crash, "error"),
]


def spoil(federation: Federation, name: str, fault: Fault) -> dict[str, tuple[Any, int]]:
    """Make one site faulty; return what every site trained, as it comes."""
    trained: dict[str, tuple[Any, int]] = {}
    for site, entry in federation.sites.items():
        session = entry.session
        seal: Seal = session.seal
        if site == name:
            seal = fault(session, seal)

        def spy(arrays: Any, n: int, i: Instruction, site: str = site, seal: Seal = seal) -> bytes:
            trained[site] = ({k: np.array(v) for k, v in arrays.items()}, n)
            return seal(arrays, n, i)

        session.seal = spy  # type: ignore[method-assign]
    return trained


@pytest.mark.parametrize(("fault", "code"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_a_bad_update_costs_nobody_else_anything(tmp_path: Path, fault: Fault, code: str) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "federation.sites=4")
    trained = spoil(federation, "d", fault)
    federation.run()
    record = federation.strategy.rounds[0]
    assert sorted(record.replied) == ["a", "b", "c"]
    assert [(f.site, f.reason) for f in record.failed][:1] == [("d", code)]
    total = sum(trained[name][1] for name in "abc")
    for name in "abc":
        model = federation.sites[name].session.model
        for key, value in model.items():
            expected = sum(trained[s][0][key].astype(np.float64) * trained[s][1] / total for s in "abc")
            assert np.abs(value - expected).max() <= 1e-6


def test_a_replayed_update_is_stale(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2", "federation.sites=4")
    kept: list[bytes] = []

    def replay(session: AnalystSession, seal: Seal) -> Seal:
        def bad(arrays: Any, n: int, i: Instruction) -> bytes:
            kept.append(seal(arrays, n, i))
            return kept[0]

        return bad

    spoil(federation, "d", replay)
    federation.run()
    first, second = federation.strategy.rounds
    assert sorted(first.replied) == ["a", "b", "c", "d"]
    assert ("d", "stale") in [(f.site, f.reason) for f in second.failed]
    assert sorted(second.replied) == ["a", "b", "c"]


def test_anothers_update_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "federation.sites=4")
    kept: list[bytes] = []

    def keep(_session: AnalystSession, seal: Seal) -> Seal:
        def spy(arrays: Any, n: int, i: Instruction) -> bytes:
            kept.append(seal(arrays, n, i))
            return kept[-1]

        return spy

    spoil(federation, "a", keep)
    federation.sites["d"].session.seal = lambda *_: kept[0]  # type: ignore[method-assign]
    federation.run()
    assert [(f.site, f.reason) for f in federation.strategy.rounds[0].failed] == [("d", "signature")]


def test_too_few_valid_updates_fail_the_round_and_keep_the_model(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2", "federation.sites=3")
    bad_round = {"on": False}

    def sometimes(_session: AnalystSession, seal: Seal) -> Seal:
        def maybe(arrays: Any, n: int, i: Instruction) -> bytes:
            if i.round == 2:
                bad_round["on"] = True
                raise WeightRangeError("test")
            return seal(arrays, n, i)

        return maybe

    spoil(federation, "b", sometimes)
    federation.run()
    lines = (federation.out / "cloud" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [round_entry(r) for r in federation.strategy.rounds]
    first, second = federation.strategy.rounds
    assert bad_round["on"]
    assert (first.error, second.error) == ("", "quorum")
    assert second.accuracy is None
    accepted = {site.session.accepted for site in federation.sites.values()}
    assert len(accepted) == 1
    assert all(site.session.accepted_round == 1 for site in federation.sites.values())
    assert all(site.model_file.exists() for site in federation.sites.values())


def test_no_valid_round_at_all_is_an_error(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "federation.sites=3")
    spoil(federation, "b", crash)
    with pytest.raises(QuorumError, match=r"federation\.quorum=3"):
        federation.run()


def test_nothing_of_a_sites_error_reaches_the_cloud(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "federation.sites=4")
    spoil(federation, "d", crash)
    seen: list[bytes] = []
    pulled = federation.grid.pull_messages

    def tap(ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pulled(ids))
        for reply in replies:
            seen.extend(to_wire(reply).objects.values())
        return replies

    federation.grid.pull_messages = tap  # type: ignore[method-assign]
    federation.run()
    traffic = b"".join(seen)
    assert len(traffic) > 1_000_000
    assert b"secret detail" not in traffic
    assert b"RuntimeError" not in traffic


def test_a_failed_site_still_tells_how_good_the_received_model_is(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2", "federation.sites=4")
    federation.sites["d"].session.seal = fail_in(2, federation.sites["d"].session.seal)  # type: ignore[method-assign]
    federation.run()
    first, second = federation.strategy.rounds
    assert [(f.site, f.reason) for f in second.failed] == [("d", "weight_range")]
    assert set(federation.strategy._evaluations[1]) == set("abcd")
    per_site = first.bytes_down / 4 / federation.strategy.parameters
    assert per_site <= 17.0, "the sum travels to each site once"


def test_an_evaluation_that_comes_late_does_not_replace_the_others(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=2")
    federation.run()
    strategy = federation.strategy
    record, member = strategy.rounds[0], next(iter(strategy.members.present.values()))
    before = record.accuracy
    strategy._note_evaluation(record, member, {"accuracy": 1.0, "loss": 0.0, "majority_accuracy": 0.5})
    strategy._settle_evaluation(record)
    known = strategy._evaluations[1]
    assert len(known) == 3
    assert record.accuracy == pytest.approx(sum(k["accuracy"] for k in known.values()) / 3)
    assert before is not None


def fail_in(number: int, seal: Seal) -> Seal:
    def sometimes(arrays: Any, n: int, i: Instruction) -> bytes:
        if i.round == number:
            raise WeightRangeError("test")
        return seal(arrays, n, i)

    return sometimes


@pytest.mark.parametrize("value", [[1.0, 2.0], -1.0, float("inf"), float("nan"), 1e9])
def test_metrics_that_cannot_be_true_do_no_harm(tmp_path: Path, value: Any) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1")
    pulled = federation.grid.pull_messages

    def forge(ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pulled(ids))
        for reply in replies:
            if reply.has_content() and "metrics" in reply.content:
                reply.content["metrics"]["accuracy"] = value
        return replies

    federation.grid.pull_messages = forge  # type: ignore[method-assign]
    federation.run()
    accuracy = federation.strategy.rounds[0].accuracy
    assert accuracy is None or 0 <= accuracy <= 1


def test_a_fraction_of_the_sites_is_asked_in_each_round(tmp_path: Path) -> None:
    federation = make_federation(
        tmp_path, "federation.rounds=3", "federation.sites=4", "federation.fraction=0.75"
    )
    federation.run()
    assert [len(record.replied) for record in federation.strategy.rounds] == [3, 3, 3]
    assert all(site.session.accepted_round == 3 for site in federation.sites.values())
