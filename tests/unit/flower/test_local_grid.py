from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from flep_fl.contracts.errors import HaltedError, KitError
from flep_fl.flower import local_grid
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.processes import Interrupted

NODES = (2, 3, 4)


class Recorder:
    """Makes ClientApps that keep what they were given."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.arrays: list[np.ndarray] = []

    def app(self, error: BaseException | None = None) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            self.calls.append(context.node_id)
            if error is not None:
                raise error
            received = message.content["arrays"]["v"].numpy()
            received = received * context.node_config["factor"]
            self.arrays.append(received)
            count = context.state["count"]["n"] + 1 if "count" in context.state else 1
            context.state["count"] = MetricRecord({"n": count})
            content = RecordDict(
                {"arrays": ArrayRecord({"v": Array(received)}), "metrics": MetricRecord({"calls": count})}
            )
            return Message(content, reply_to=message)

        return app


def make_grid(recorder: Recorder, **errors: BaseException) -> LocalGrid:
    apps = {node: recorder.app(errors.get(f"node{node}")) for node in NODES}
    return LocalGrid(apps, {node: {"factor": node} for node in NODES})


def messages(array: np.ndarray, nodes: tuple[int, ...] = NODES) -> list[Message]:
    content = RecordDict(
        {"arrays": ArrayRecord({"v": Array(array)}), "config": ConfigRecord({"x": b"\x00y"})}
    )
    return [Message(content, node, "train", group_id="1") for node in nodes]


def test_every_node_runs_its_own_app_with_its_own_configuration_and_state() -> None:
    recorder = Recorder()
    grid = make_grid(recorder)
    for expected_calls in (1, 2):
        replies = list(grid.send_and_receive(messages(np.arange(3.0))))
        assert [reply.metadata.src_node_id for reply in replies] == list(NODES)
        for node, reply in zip(NODES, replies, strict=True):
            np.testing.assert_array_equal(reply.content["arrays"]["v"].numpy(), node * np.arange(3.0))
            assert reply.content["metrics"]["calls"] == expected_calls


def test_nothing_runs_on_push_and_one_node_runs_per_pull() -> None:
    recorder = Recorder()
    grid = make_grid(recorder)
    ids = list(grid.push_messages(messages(np.ones(2))))
    assert recorder.calls == []
    assert list(grid.pull_messages([])) == []
    (reply,) = grid.pull_messages(ids[1:])
    assert recorder.calls == [3]
    assert reply.metadata.reply_to_message_id == ids[1]
    assert len({message.metadata.message_id for message in grid.pull_messages(ids)}) == 1
    assert recorder.calls == [3, 2]
    assert len(list(grid.pull_messages(ids))) == 1
    # Every reply is handed out once.
    assert list(grid.pull_messages(ids)) == []


def test_the_two_sides_share_no_array() -> None:
    recorder = Recorder()
    grid = make_grid(recorder)
    array = np.zeros(4)
    sent = messages(array)
    ids = list(grid.push_messages(sent))
    array[:] = 7.0
    sent[0].content["arrays"]["v"] = Array(np.full(4, 9.0))
    (reply,) = grid.pull_messages(ids[:1])
    np.testing.assert_array_equal(reply.content["arrays"]["v"].numpy(), np.zeros(4))
    recorder.arrays[0][:] = 5.0
    np.testing.assert_array_equal(reply.content["arrays"]["v"].numpy(), np.zeros(4))


def test_a_dead_node_is_off_the_list_and_owes_flowers_own_error() -> None:
    recorder = Recorder()
    grid = make_grid(recorder)
    ids = list(grid.push_messages(messages(np.ones(1))))
    grid.kill(3)
    assert list(grid.get_node_ids()) == [2, 4]
    replies = [reply for _ in ids for reply in grid.pull_messages(ids)]
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == ErrorCode.NODE_UNAVAILABLE
    assert replies[1].metadata.src_node_id == 1
    assert replies[1].metadata.reply_to_message_id == ids[1]
    assert recorder.calls == [2, 4]
    grid.revive(3)
    assert list(grid.get_node_ids()) == [2, 3, 4]


def test_a_node_that_dies_while_it_works_sends_nothing() -> None:
    app = ClientApp()
    grid = LocalGrid({2: app})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        grid.kill(2)
        return Message(RecordDict(), reply_to=message)

    (reply,) = grid.send_and_receive(messages(np.ones(1), (2,)))
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HaltedError("the secret number is 4711"), "halted"),
        (KitError("the secret number is 4711"), "error"),
        (ValueError("the secret number is 4711"), "error"),
    ],
)
def test_an_error_travels_as_a_public_code(error: Exception, reason: str) -> None:
    lines: list[str] = []
    grid = LocalGrid({2: Recorder().app(error)}, log=lines.append)
    (reply,) = grid.send_and_receive(messages(np.ones(1), (2,)))
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    assert "4711" not in repr(reply)
    assert type(error).__name__ in lines[0]


def test_an_interruption_is_not_an_apps_error() -> None:
    grid = LocalGrid({2: Recorder().app(Interrupted())})
    with pytest.raises(Interrupted):
        grid.send_and_receive(messages(np.ones(1), (2,)))


def test_an_app_that_returns_no_message_is_an_error() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return None  # type: ignore[return-value]

    (reply,) = LocalGrid({2: app}).send_and_receive(messages(np.ones(1), (2,)))
    assert reply.error.reason == "error"


def test_an_unknown_node_is_refused() -> None:
    with pytest.raises(ValueError, match="no node 9"):
        make_grid(Recorder()).push_messages(messages(np.ones(1), (9,)))


def test_a_server_app_runs_with_its_run_config() -> None:
    grid = make_grid(Recorder())
    app = ServerApp()
    seen: list[object] = []

    @app.main()
    def main(the_grid: Grid, context: Context) -> None:
        seen.append(dict(context.run_config))
        replies = list(the_grid.send_and_receive(messages(np.ones(2))))
        context.state["sum"] = MetricRecord(
            {"v": float(sum(reply.content["arrays"]["v"].numpy().sum() for reply in replies))}
        )

    context = run_server_app(app, grid, {"rounds": 2, "name": "x"})
    assert seen == [{"rounds": 2, "name": "x"}]
    assert context.state["sum"]["v"] == 2.0 * sum(NODES)


def test_what_waiting_messages_have_in_common_is_held_once() -> None:
    grid = make_grid(Recorder())
    ids = list(grid.push_messages(messages(np.arange(100_000.0))))
    held = sum(map(len, grid._objects.values()))
    assert 800_000 < held < 810_000
    list(grid.pull_messages(ids[:1]))
    grid.forget_messages([*ids, "unknown"])
    assert (grid._objects, dict(grid._uses), grid._pending) == ({}, {}, {})


def test_a_large_message_that_was_dealt_with_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_grid, "COLLECT_BYTES", 1_600_000)
    received: list[weakref.ref[Array]] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        # flwr's view of the records is a reference cycle that holds the message.
        received.append(weakref.ref(message.content.array_records["arrays"]["v"]))
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid({2: app})
    gc.disable()
    try:
        for _ in range(3):
            ids = grid.push_messages(messages(np.arange(200_000.0), (2,)))
            list(grid.pull_messages(ids))
        assert [reference() is None for reference in received] == [True] * 3
    finally:
        gc.enable()
