"""What a site answers to messages that a cloud may have made up: a named refusal, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from sessions import Sessions, make_sessions

from flep_fl.contracts.errors import (
    ConfigMismatchError,
    FlepError,
    ForeignUpdateError,
    LayoutError,
    MalformedUpdateError,
    SignatureError,
    StaleUpdateError,
    TransferError,
)
from flep_fl.contracts.protocol import Instruction
from flep_fl.model_security.mod import ckks_mod
from flep_fl.model_security.optimiser_settings import OptimiserSettings
from flep_fl.model_security.seal import seal_control

pytestmark = pytest.mark.he


class Site:
    """Site a after the handshake, and the cloud that talks to it."""

    def __init__(self, folder: Path, **membership: Any) -> None:
        self.federation: Sessions = make_sessions(folder, size=1)
        analyst = self.federation.analysts["a"]
        analyst.membership = replace(analyst.membership, **membership)
        self.strategy = self.federation.strategy()
        self.strategy.members.gather(self.federation.grid, quorum=3, timeout=10)
        self.session = analyst.open()
        self.trained = 0

    def message(self, kind: Any = "round", number: int = 1, **changes: Any) -> Message:
        node = self.federation.node("a")
        instruction = replace(self.strategy._instruction(kind, number), **changes)
        return self.strategy._message(MessageType.TRAIN, instruction, node)

    def answer(self, message: Message) -> Message:
        def train(order: Message, context: Context) -> Message:
            self.trained += 1
            content = RecordDict(
                {"arrays": order.content["arrays"], "m": MetricRecord({"num-examples": 100})}
            )
            return Message(content, reply_to=order)

        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        message.metadata._message_id = "m"  # as a grid would
        return ckks_mod(self.session)(message, context, train)

    def refuses(self, message: Message, error: type[FlepError], match: str = ".") -> None:
        before = self.session.ledger.entries, self.session.accepted, dict(self.session.model)
        with pytest.raises(error, match=match):
            self.answer(message)
        assert (self.session.ledger.entries, self.session.accepted, dict(self.session.model)) == before
        assert self.trained == 0 and not self.session.halted


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_message_that_the_next_tests_change_is_a_good_one(site: Site) -> None:
    assert site.answer(site.message()).content["flep"]["status"] == "ok"
    assert site.trained == 1


def without_instruction(content: RecordDict) -> None:
    content["flep"] = ConfigRecord({})


def instruction_of_another_type(content: RecordDict) -> None:
    content["flep"] = ConfigRecord({"instruction": "text"})


def no_flep_record(content: RecordDict) -> None:
    del content["flep"]


def metrics_in_its_place(content: RecordDict) -> None:
    content["flep"] = MetricRecord({"instruction": 1})


@pytest.mark.parametrize(
    "change", [without_instruction, instruction_of_another_type, no_flep_record, metrics_in_its_place]
)
def test_a_message_without_an_instruction_is_refused(
    site: Site, change: Callable[[RecordDict], None]
) -> None:
    message = site.message()
    change(message.content)
    site.refuses(message, MalformedUpdateError, "no signed instruction")


@pytest.mark.parametrize(
    "payload",
    [
        ConfigRecord({"sealed": b"x"}),
        ArrayRecord({"other": Array(np.zeros(1))}),
        ArrayRecord({"sealed": Array(np.zeros(1))}),
    ],
    ids=["record", "name", "type"],
)
def test_a_payload_that_is_no_sealed_sum_is_refused(site: Site, payload: Any) -> None:
    message = site.message(previous="5" * 64, sum_round=1, round=2)
    message.content["payload"] = payload
    site.refuses(message, MalformedUpdateError, "something else than a sealed sum")


@pytest.mark.parametrize(
    "first",
    [
        ConfigRecord({"w": 1}),
        ConfigRecord({}),
        ArrayRecord({"w": Array("float32", (4,), "numpy.ndarray", b"no array")}),
        ArrayRecord({"w": Array("float32", (4,), "another.type", b"")}),
    ],
    ids=["record", "empty record", "bytes", "type"],
)
def test_a_first_model_that_cannot_be_read_is_refused(site: Site, first: Any) -> None:
    message = site.message("hello", 0)
    message.content["initial"] = first
    site.refuses(message, MalformedUpdateError, "cannot be read")


def test_an_evaluation_does_not_pass_for_a_training_nor_the_other_way_round(site: Site) -> None:
    site.refuses(site.message("evaluate", 1), MalformedUpdateError, "another type")
    order = site.message()
    wrong = site.strategy._message(MessageType.EVALUATE, site.strategy._instruction("round", 1), 2)
    wrong.content = order.content
    site.refuses(wrong, MalformedUpdateError, "another type")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"federation": "0" * 32}, ForeignUpdateError),
        ({"config": "0" * 64}, ConfigMismatchError),
        ({"run": "0" * 32}, StaleUpdateError),
        ({"first": "0" * 64}, ForeignUpdateError),
        ({"layout": "0" * 64}, LayoutError),
        ({"round": 0}, StaleUpdateError),
        ({"round": 4}, StaleUpdateError),
        ({"round": 4, "rounds": 9}, StaleUpdateError),
        ({"round": 3, "rounds": 2}, StaleUpdateError),
        ({"attempt": 0}, StaleUpdateError),
        ({"attempt": 1 << 40}, StaleUpdateError),
        ({"previous": "5" * 64}, StaleUpdateError),  # a sum that it does not bring
        ({"previous": "5" * 64, "sum_round": 1, "round": 2}, StaleUpdateError),
    ],
)
def test_an_instruction_that_does_not_fit_the_run_is_refused_by_name(
    site: Site, changes: dict[str, Any], error: type[FlepError]
) -> None:
    site.refuses(site.message(**changes), error)


def sealed(site: Site, message: Message, key: Any = None, **changes: Any) -> Message:
    """Sign other fields in place of the instruction."""
    fields = {**site.strategy._instruction("round", 1).to_fields(), **changes}
    blob = seal_control({k: v for k, v in fields.items() if v is not ...}, key or site.federation.cloud_key)
    message.content["flep"] = ConfigRecord({"instruction": blob})
    return message


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"}, {"kind": 1}, {"round": True}, {"round": "1"}, {"attempt": -1}, {"sum_round": -1},
        {"rounds": 1.5}, {"run": 7}, {"previous": None}, {"shared": []}, {"app": ""}, {"extra": 1},
        {"layout": ...}, {"round": ...}, {"challenge": 1}, {"donor": 1}, {"first": 1}, {"config": 1},
    ],
)  # fmt: skip
def test_an_instruction_with_a_field_of_the_wrong_type_is_refused(
    site: Site, changes: dict[str, Any]
) -> None:
    if changes == {"layout": ...}:  # an older form, which names no model: it fits none
        site.refuses(sealed(site, site.message(), **changes), LayoutError)
        return
    site.refuses(sealed(site, site.message(), **changes), MalformedUpdateError)


def test_an_instruction_that_a_site_signed_is_not_the_clouds(site: Site) -> None:
    key = site.federation.analysts["b"].signing_key
    site.refuses(sealed(site, site.message(), key), SignatureError)


def test_nothing_is_opened_after_the_closing_message(site: Site) -> None:
    assert site.answer(site.message("close", 3)).content["flep"]["status"] == "ok"
    site.refuses(site.message(), StaleUpdateError, "after the end of the run")


def test_what_a_transfer_brings_is_checked_before_it_is_read(tmp_path: Path) -> None:
    site = Site(tmp_path, optimiser=OptimiserSettings("fedadam", 0.1))
    instruction = site.strategy._instruction("transfer", 1)

    def transfer(statements: Any, blob: bytes | None) -> Message:
        message = site.strategy._message(MessageType.TRAIN, instruction, 2, blob)
        message.content["flep"]["statements"] = statements
        return message

    for statements, blob in ((["text"], b"state"), ([1], b"state"), ([b"one"], None)):
        site.refuses(transfer(statements, blob), MalformedUpdateError, "no state, or statements")
    site.refuses(transfer([b"FLEPCT1\n"], b"state"), MalformedUpdateError, "malformed")
    for none in ([], b"one", 1):
        site.refuses(transfer(none, b"state"), TransferError, "No state is named")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_of_an_apps_metrics_only_the_allowed_and_finite_ones_leave(site: Site, value: float) -> None:
    def train(order: Message, context: Context) -> Message:
        told = MetricRecord({"num-examples": 7, "auc": 0.5, "f1": value, "secret": 0.25})
        return Message(RecordDict({"arrays": order.content["arrays"], "m": told}), reply_to=order)

    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    message = site.message()
    reply = ckks_mod(site.session, metrics=["auc", "f1"])(message, context, train)
    assert dict(reply.content["app-metrics"]) == {"auc": 0.5}
    assert "num-examples" not in str(reply.content["metrics"])


def test_the_instruction_type_checks_are_of_every_field() -> None:
    good = Instruction("round", "f", "r", 1, 1, 1, "", 0, "c").to_fields()
    assert Instruction.from_fields(good).kind == "round"
    for name in good:
        with pytest.raises(MalformedUpdateError):
            Instruction.from_fields({**good, name: object()})
