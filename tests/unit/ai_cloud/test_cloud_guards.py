"""Each refusal of the cloud on its own: who is who in a hello, what counts in a round, what is stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from sessions import Sessions, make_sessions

from flep_fl.ai_cloud.exchange import exchange
from flep_fl.ai_cloud.members import Member, Members
from flep_fl.ai_cloud.strategy import _SealedSum
from flep_fl.contracts.errors import (
    FlepError,
    LayoutError,
    MalformedUpdateError,
    SignatureError,
    StaleUpdateError,
)
from flep_fl.contracts.records import RoundRecord
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.seal import open_control, seal_control

pytestmark = pytest.mark.he

CHALLENGE = "c" * 32


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return make_sessions(tmp_path_factory.mktemp("sites"), size=1)


@pytest.fixture
def hello(federation: Sessions) -> dict[str, Any]:
    """The fields of an honest introduction of site a."""
    strategy = federation.strategy()
    session = federation.analysts["a"].open()
    session.ledger.enter(strategy.run)
    blob = session.identity(strategy._instruction("hello", 0, CHALLENGE))
    return open_control(blob, federation.terms.site_keys["a"])


def admit(
    federation: Sessions, record: dict[str, Any], run: str, layout: ModelLayout | None = None
) -> Members:
    unused: Any = lambda *_: None  # noqa: E731
    members = Members(run, federation.terms.site_keys, unused, unused, layout=layout)
    order = Message(RecordDict(), 2, MessageType.TRAIN)
    order.metadata._message_id = "m"
    members._admit(2, Message(RecordDict({"flep": ConfigRecord(record)}), reply_to=order), CHALLENGE)
    return members


def signed(federation: Sessions, fields: dict[str, Any], key: str = "a") -> bytes:
    return seal_control(fields, federation.analysts[key].signing_key)


def test_an_honest_introduction_is_admitted(federation: Sessions, hello: dict[str, Any]) -> None:
    members = admit(federation, {"site": "a", "identity": signed(federation, hello)}, hello["run"])
    assert members.sites() == {"a"}


@pytest.mark.parametrize(
    ("site", "changes", "key", "error"),
    [
        ("zoe", {}, "a", SignatureError),
        (7, {}, "a", SignatureError),
        ("b", {}, "a", SignatureError),
        ("a", {}, "b", SignatureError),
        ("a", {"site": "b"}, "a", StaleUpdateError),
        ("a", {"run": "0" * 32}, "a", StaleUpdateError),
        ("a", {"challenge": "0" * 32}, "a", StaleUpdateError),
        ("a", {"layout": "[]"}, "a", LayoutError),
    ],
)
def test_an_introduction_that_is_not_its_sites_answer_to_this_hello_is_refused(
    federation: Sessions,
    hello: dict[str, Any],
    site: Any,
    changes: dict[str, Any],
    key: str,
    error: type[FlepError],
) -> None:
    record = {"site": site, "identity": signed(federation, {**hello, **changes}, key)}
    with pytest.raises(error):
        admit(federation, record, hello["run"])


@pytest.mark.parametrize("record", [{"site": "a"}, {"site": "a", "identity": "text"}, {}])
def test_an_introduction_without_a_signed_message_is_nobodys(
    federation: Sessions, hello: dict[str, Any], record: dict[str, Any]
) -> None:
    with pytest.raises(SignatureError, match="not in the kit"):
        admit(federation, record, hello["run"])


def test_a_late_site_with_another_model_is_refused(federation: Sessions, hello: dict[str, Any]) -> None:
    other = ModelLayout.of({"w": np.zeros(9, dtype=np.float32)})
    with pytest.raises(LayoutError, match="another model"):
        admit(federation, {"site": "a", "identity": signed(federation, hello)}, hello["run"], other)


def test_whatever_an_introduction_breaks_it_breaks_for_its_sender_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = make_sessions(tmp_path, size=1)
    original = Members._admit

    def breaks(self: Members, node: int, reply: Message, challenge: str) -> None:
        if node == sessions.node("b"):
            raise RuntimeError("nobody thought of this")
        original(self, node, reply, challenge)

    monkeypatch.setattr(Members, "_admit", breaks)
    strategy = sessions.strategy()
    strategy.members.welcome(sessions.grid)
    assert strategy.members.sites() == {"a", "c"}
    assert strategy.members._refused == {sessions.node("b"): MalformedUpdateError.code}


# --- what counts in a round ----------------------------------------------------------------------


def test_one_update_a_site_and_none_of_a_node_that_is_no_member(tmp_path: Path) -> None:
    """Were two of one site in a sum, every analyst would refuse it and stop."""
    sessions = make_sessions(tmp_path, size=1)
    strategy = sessions.strategy()
    strategy.members.gather(sessions.grid, quorum=3, timeout=10)
    strategy._record = RoundRecord(1)
    strategy.rounds.append(strategy._record)
    messages = strategy._messages("round", 1, strategy.members.present)
    replies = list(exchange(sessions.grid, messages, timeout=10))
    node, reply, _ = replies[0]
    strategy._aggregate([*replies, (node, reply, ""), (99, reply, "")])
    site = strategy.members.present[node].site
    assert sorted(strategy._record.replied) == ["a", "b", "c"]
    assert [(f.site, f.reason) for f in strategy._record.failed] == [(site, "stale"), ("node 99", "error")]
    strategy._close(sessions.grid)
    assert strategy.closing_failures == [], "the sum is a good one"


# --- what a resumed cloud compares ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "error"),
    [
        ({"accepted_round": 2, "accepted": "5" * 64, "signed_round": 3}, None),
        ({"accepted_round": 1, "accepted": "4" * 64, "signed_round": 2}, None),
        ({"accepted_round": 3, "accepted": "5" * 64, "signed_round": 3}, StaleUpdateError),
        ({"accepted_round": 2, "accepted": "6" * 64, "signed_round": 3}, StaleUpdateError),
        ({"accepted_round": 2, "accepted": "5" * 64, "signed_round": 4}, StaleUpdateError),
        ({"accepted_round": "2", "accepted": "5" * 64, "signed_round": 3}, MalformedUpdateError),
        ({"accepted_round": 2, "accepted": "5" * 64, "signed_round": None}, MalformedUpdateError),
    ],
)
def test_a_site_that_has_seen_more_or_another_course_is_refused(
    federation: Sessions, identity: dict[str, Any], error: type[FlepError] | None
) -> None:
    strategy = federation.strategy()
    strategy._sum, strategy.round = _SealedSum(b"", "5" * 64, 2), 3
    strategy.members.present[2] = Member("a", ModelLayout(()))
    if error is None:
        strategy._compare("a", identity)
        return
    with pytest.raises(error):
        strategy._compare("a", identity)
