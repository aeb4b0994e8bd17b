from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.serverapp import ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid

from flep_fl.contracts.errors import ConfigError, PortInUseError, RuntimeStartError
from flep_fl.flower.processes import Interrupted
from flep_fl.flower.runtime.cloud import run_cloud
from flep_fl.flower.runtime.environment import bind, log_tail, new_secret, parse_address, use_environment
from flep_fl.flower.runtime.grid import GuardedGrid
from flep_fl.flower.runtime.ports import MOST_TRANSFERS, AdminPort, FreeingApp, SitesPort
from flep_fl.flower.runtime.replies import dropped_orders, forget, whole_replies
from flep_fl.flower.runtime.store import SMALL_OBJECT, FileObjectStore, empty_folder, remove_folder
from flep_fl.flower.runtime.traffic import message_bytes
from flep_fl.flower.runtime.wire import from_wire, set_task_identity, to_wire


def make_message(array: np.ndarray) -> Message:
    set_task_identity(1)
    return Message(RecordDict({"arrays": ArrayRecord({"v": Array(array)})}), 2, "train")


# --- wire and traffic ------------------------------------------------------------------------------


def test_a_message_survives_the_wire_and_shares_nothing() -> None:
    message = make_message(np.arange(10, dtype=np.float32))
    wire = to_wire(message)
    copy = from_wire(wire)
    np.testing.assert_array_equal(copy.content["arrays"]["v"].numpy(), np.arange(10, dtype=np.float32))
    assert copy.metadata.message_id == wire.message_id == message.metadata.message_id
    assert from_wire(wire).content["arrays"]["v"].data == copy.content["arrays"]["v"].data
    assert copy.content is not message.content


@pytest.mark.parametrize("size", [1_000, 12_000_000])
def test_message_bytes_is_the_payload_and_a_small_header(size: int) -> None:
    # Random bytes: equal 5 MB chunks would be sent once.
    message = make_message(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    weight = message_bytes(message)
    assert size < weight < size + 2_000
    assert weight == to_wire(message).size


# --- addresses, secrets ------------------------------------------------------------------------------


def test_addresses() -> None:
    assert parse_address("localhost:80") == ("localhost", 80)
    assert parse_address("[::1]:0") == ("::1", 0)
    for wrong in ("localhost", ":80", "a:b", "a:70000", "a:-1", ""):
        with pytest.raises(ConfigError, match="host:port"):
            parse_address(wrong)


def test_a_taken_port_is_a_named_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(PortInUseError, match=rf"{address}.*[Cc]hoose another port"):
            run_cloud(
                ServerApp(),
                address=address,
                home=tmp_path / "home",
                run_config={},
                stop=threading.Event(),
                log=lambda _line: None,
            )
    assert list((tmp_path / "home").iterdir()) == []
    bind(address).close()


def test_an_address_of_another_machine_is_a_named_error() -> None:
    with pytest.raises(RuntimeStartError, match=r"192\.0\.2\.1:8000 cannot be used"):
        bind("192.0.2.1:8000")


def test_secrets_are_private_and_new_every_time(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secrets = {new_secret(path) for _ in range(3)}
    assert len(secrets) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(len(secret) == 64 for secret in secrets)


def test_the_environment_is_restored() -> None:
    os.environ.pop("FLEP_TEST", None)
    with use_environment({"FLEP_TEST": "1"}):
        assert os.environ["FLEP_TEST"] == "1"
    assert "FLEP_TEST" not in os.environ


def test_log_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == "(no log)"
    log.write_text("\n".join(map(str, range(50))))
    assert log_tail(log, 2) == "48\n49"


# --- split ports -------------------------------------------------------------------------------------


def ask(port: str, path: str, token: bytes | None = None, kind: str = "http") -> str:
    """Return ``passed`` or what the listener answered."""
    sent: list[dict[str, Any]] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "passed"})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if token is None else [(b"x-flep-admin", token)]
    scope = {"type": kind, "path": path, "headers": headers, "method": "POST"}
    served: Any = AdminPort(app, b"sesame", lambda _ids: None) if port == "admin" else SitesPort(app)
    asyncio.run(served(scope, None, send))
    return str(sent[0].get("status", sent[0]["type"]))


def test_the_sites_port_serves_the_fleet_alone() -> None:
    assert ask("sites", "/v1/fleet/pull-messages") == "passed"
    assert ask("sites", "/health") == "passed"
    for path in (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/docs",
        "/flep/forget-messages",
        "/",
        "//v1/fleet/x",
    ):
        assert ask("sites", path) == "404"
        # The admin token opens nothing on the sites' port.
        assert ask("sites", path, b"sesame") == "404"
    assert ask("sites", "/v1/fleet/x", kind="websocket") == "websocket.close"


def test_the_admin_port_wants_the_token() -> None:
    assert ask("admin", "/v1/control/start-run", b"sesame") == "passed"
    assert ask("admin", "/health") == "passed"
    assert ask("admin", "/v1/control/start-run") == "404"
    assert ask("admin", "/v1/control/start-run", b"sesam") == "404"
    assert ask("admin", "/v1/fleet/pull-messages") == "404"
    assert ask("admin", "/flep/forget-messages") == "404"


# --- replies -----------------------------------------------------------------------------------------


class FakeState:
    """The parts of Flower's link state that matter here, with a real object store."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.object_store = InMemoryObjectStore()
        self.message_ins_store = {"ask": SimpleNamespace(metadata=SimpleNamespace(dst_node_id=7))}
        self.message_ins_id_to_message_res_id: dict[str, str] = {}
        self.nodes = {7: SimpleNamespace(node_id=7, status="offline", online_until=0.0)}

    def answer(self, complete: bool) -> None:
        wire = to_wire(message := make_message(np.arange(5)))
        self.object_store.preregister(1, get_object_tree(message))
        for number, (object_id, content) in enumerate(wire.objects.items()):
            if complete or number > 0:
                self.object_store.put(object_id, content)
        self.message_ins_id_to_message_res_id["ask"] = wire.message_id


def upstream(state: Any, message_ids: set[str], _run_id: int) -> list[Any]:
    """Flower's order of checks: a node that is gone first, then the stored reply."""
    answers = []
    for one in sorted(message_ids):
        if state.nodes[7].online_until < 1.0:
            answers.append("node unavailable")
        elif one in state.message_ins_id_to_message_res_id:
            answers.append("reply")
    return answers


def test_a_whole_reply_counts_after_its_sender_left() -> None:
    state = FakeState()
    state.answer(complete=True)
    assert upstream(state, {"ask"}, 1) == ["node unavailable"]
    assert whole_replies(upstream)(state, {"ask"}, 1) == ["reply"]
    assert (state.nodes[7].status, state.nodes[7].online_until) == ("offline", 0.0)


def test_half_a_reply_is_none_and_is_given_up_when_its_sender_left() -> None:
    state = FakeState()
    state.answer(complete=False)
    state.nodes[7].online_until = 2.0
    assert upstream(state, {"ask"}, 1) == ["reply"]
    assert whole_replies(upstream)(state, {"ask"}, 1) == []
    assert "ask" in state.message_ins_id_to_message_res_id
    state.nodes[7].online_until = 0.0
    assert whole_replies(upstream)(state, {"ask"}, 1) == ["node unavailable"]


def test_no_reply_yet() -> None:
    state = FakeState()
    state.nodes[7].online_until = 2.0
    assert whole_replies(upstream)(state, {"ask"}, 1) == []


# --- the guarded grid --------------------------------------------------------------------------------


def test_a_grid_call_ends_when_the_user_or_the_superlink_does() -> None:
    with socket.socket() as sock:  # bound, not listening: every call is refused
        sock.bind(("127.0.0.1", 0))
        stop, dead = threading.Event(), threading.Event()

        def check() -> None:
            if dead.is_set():
                raise RuntimeStartError("The SuperLink ended unexpectedly")

        address = f"127.0.0.1:{sock.getsockname()[1]}"
        grid = GuardedGrid(address, "token", admin_token=b"x", stop=stop, check=check)
        timer = threading.Timer(0.3, dead.set)
        timer.start()
        with pytest.raises(RuntimeStartError, match="ended unexpectedly"):
            grid.get_node_ids()
        dead.clear()
        timer = threading.Timer(0.3, stop.set)
        timer.start()
        with pytest.raises(Interrupted):
            grid.get_node_ids()
        with pytest.raises(Interrupted):
            grid.push_messages([])


def test_a_refusal_of_the_superlink_is_a_named_error() -> None:
    grid = GuardedGrid("127.0.0.1:9", "token", admin_token=b"x", stop=threading.Event(), check=lambda: None)
    client: Any = grid._runtime_client
    client._client = httpx.Client(transport=httpx.MockTransport(lambda _request: httpx.Response(401)))
    with pytest.raises(RuntimeStartError, match="does not answer"):
        grid.get_node_ids()


def test_a_reply_that_does_not_decode_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_task_identity(1)
    good = Message(RecordDict(), 1, "train")

    def pull(_grid: HttpGrid, message_ids: list[str]) -> list[Message]:
        if message_ids == ["bad"]:
            raise ValueError("crafted bytes")
        return [good]

    monkeypatch.setattr(HttpGrid, "pull_messages", pull)
    grid = GuardedGrid("127.0.0.1:9", "token", admin_token=b"x", stop=threading.Event(), check=lambda: None)
    grid.set_run(Run.create_empty(7))
    first, bad, last = grid.pull_messages(["one", "bad", "two"])
    assert first is good
    assert last is good
    assert bad.has_error()
    assert bad.error.reason == "malformed"
    assert bad.metadata.reply_to_message_id == "bad"


# --- memory ------------------------------------------------------------------------------------------


def test_the_superlink_takes_in_a_bounded_number_of_chunks_at_a_time() -> None:
    inside = most = 0

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1

    async def requests(path: str) -> None:
        port: Any = SitesPort(app)
        scope = {"type": "http", "path": path, "headers": []}
        await asyncio.gather(*(port(scope, None, None) for _ in range(40)))

    asyncio.run(requests("/v1/fleet/push-object"))
    assert most == MOST_TRANSFERS
    # A heartbeat never waits for them.
    asyncio.run(requests("/v1/fleet/send-node-heartbeat"))
    assert most == 40


@pytest.mark.parametrize("path", ["/v1/fleet/push-object", "/v1/runtime/pull-object"])
def test_a_chunk_is_freed_when_it_is_done_with(path: str) -> None:
    class Chunk:
        def __init__(self) -> None:
            self.request = self  # as upstream's requests are: freed by the collector alone

    left: list[weakref.ref[Chunk]] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        left.append(weakref.ref(Chunk()))

    gc.disable()
    try:
        freeing: Any = FreeingApp(app)
        for _ in range(MOST_TRANSFERS):
            asyncio.run(freeing({"type": "http", "path": path}, None, None))
        assert [reference() for reference in left] == [None] * MOST_TRANSFERS
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_place_is_free_when_the_site_has_read_its_chunk() -> None:
    """uvicorn takes what it is given into memory: a slow site must be given little at a time."""
    body = bytes(range(256)) * 20_000
    sent: list[Any] = []
    reading = asyncio.Event()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def slow(message: Any) -> None:
        sent.append(message)
        if len(sent) > 2:
            await reading.wait()

    async def play() -> None:
        port: Any = SitesPort(app)
        call = asyncio.create_task(port({"type": "http", "path": "/v1/fleet/pull-object"}, None, slow))
        await asyncio.sleep(0.05)
        assert port._transfers._value == MOST_TRANSFERS - 1
        assert sum(len(message.get("body", b"")) for message in sent) < len(body) / 2
        reading.set()
        await call
        assert port._transfers._value == MOST_TRANSFERS

    asyncio.run(play())
    bodies = sent[1:]
    assert b"".join(message["body"] for message in bodies) == body
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]


def stored(store: InMemoryObjectStore, message: Message) -> str:
    """Announce and store a message with all its objects."""
    wire = to_wire(message)
    store.preregister(1, get_object_tree(message))
    for object_id, content in wire.objects.items():
        store.put(object_id, content)
    return wire.message_id


def test_large_objects_lie_in_private_files_until_their_last_message_is_gone(tmp_path: Path) -> None:
    store = FileObjectStore(tmp_path)
    payload = np.random.default_rng(0).integers(0, 256, 6_000_000, dtype=np.uint8)
    first, second = make_message(payload), make_message(payload)
    second.content["config"] = ConfigRecord({"n": 2})
    ids = [stored(store, first), stored(store, second)]
    files = sorted(tmp_path.iterdir())
    # 6 MB are two chunks; both messages have the same two.
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) == pytest.approx(6_000_000, rel=1e-3)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert sum(len(entry.content) for entry in store.store.values()) < 5_000
    contents = {one: store.get(one) for one in to_wire(first).objects}
    assert contents == to_wire(first).objects
    store.delete(ids[0])
    assert sorted(tmp_path.iterdir()) == files
    store.delete(ids[1])
    assert list(tmp_path.iterdir()) == []
    assert len(store) == 0
    assert store.get(files[0].name) is None


def test_an_object_that_was_not_announced_or_is_not_what_it_says_leaves_no_file(tmp_path: Path) -> None:
    store = FileObjectStore(tmp_path)
    wire = to_wire(make_message(np.arange(100_000)))
    chunk = next(one for one, content in wire.objects.items() if len(content) > SMALL_OBJECT)
    with pytest.raises(NoObjectInStoreError):
        store.put(chunk, wire.objects[chunk])
    with pytest.raises(ValueError, match="does not match"):
        store.put(chunk, wire.objects[chunk] + b"x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "left-by-a-killed-one").touch()
    empty_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_folder(tmp_path)
    remove_folder(tmp_path)
    assert not tmp_path.exists()


def link_state() -> Any:
    """Return Flower's own link state, patched as in the SuperLink, with a run and one node that is there."""
    state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
    node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key", 30.0)
    state.activate_node(node, 30.0)
    run = state.create_run("f", "1", "h", {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    return state, node, run


def test_what_nobody_waits_for_is_dropped_and_a_late_reply_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        InMemoryLinkState, "delete_messages", dropped_orders(InMemoryLinkState.delete_messages)
    )
    state, node, run = link_state()
    set_task_identity(run)

    def order(number: int) -> Message:
        content = RecordDict({"config": ConfigRecord({"n": number})})
        message = Message(content, node, "train")
        stored(state.object_store, message)
        assert state.store_message_ins(message) == message.metadata.message_id
        return message

    def reply(message: Message) -> Message:
        answer = Message(RecordDict({"config": ConfigRecord({"x": 1})}), reply_to=message)
        answer.metadata.__dict__["_src_node_id"] = node
        stored(state.object_store, answer)
        return answer

    answered, silent = order(1), order(2)
    assert state.store_message_res(reply(answered)) is not None
    assert len(state.object_store) > 0
    forget(state, {answered.metadata.message_id, silent.metadata.message_id, "unknown"})
    assert (state.num_message_ins(), state.num_message_res(), len(state.object_store)) == (0, 0, 0)
    assert state.get_message_ins(node, 1) == []
    assert state.store_message_res(reply(silent)) is None
