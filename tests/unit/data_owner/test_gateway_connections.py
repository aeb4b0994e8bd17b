"""Deadlines of one connection, with a clock that the test holds; what sockets add is tested end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flep_fl.data_owner.gateway.connections import MAX_HEAD_BYTES, SHUTDOWN_SECONDS, Doorkeeper, GuardedServer
from flep_fl.data_owner.gateway.limits import SLOWEST_READER, Limits

LIMITS = Limits(header_seconds=5, body_seconds=7, idle_seconds=11, connections_per_peer=4, connections=9)


class Timer:
    def __init__(self, due: float, call: Callable[[], Any]) -> None:
        self.due, self.call, self.cancelled = due, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """Time, and what is due."""

    def __init__(self) -> None:
        self.now, self.timers = 0.0, []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], Any]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def call_soon(self, call: Callable[[], Any]) -> Timer:
        return self.call_later(0.0, call)

    def create_task(self, work: Any) -> Any:
        work.close()

        class Done:
            def add_done_callback(self, _call: Any) -> None: ...

        return Done()

    def pass_to(self, moment: float) -> None:
        self.now = moment
        for timer in [one for one in self.timers if not one.cancelled and one.due <= moment]:
            timer.cancelled = True
            timer.call()


class Transport:
    def __init__(self) -> None:
        self.written, self.closing, self.aborted = b"", False, False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Connection:
    """A protocol over a transport and a loop that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def app(_scope: Any, _receive: Any, _send: Any) -> None: ...

        self.refused: list[tuple[str, str]] = []
        keeper = Doorkeeper(lambda _: True, LIMITS, lambda peer, reason: self.refused.append((peer, reason)))
        assert keeper.enter("10.0.0.1")
        self.loop, self.transport = Loop(), Transport()
        monkeypatch.setattr("asyncio.get_event_loop", lambda: self.loop)
        monkeypatch.setattr("uvicorn.protocols.http.httptools_impl.asyncio.Event", lambda: FakeEvent())
        self.protocol = GuardedServer(app, keeper, None).make_protocol("10.0.0.1")
        self.keeper = keeper
        self.protocol.connection_made(self.transport)  # type: ignore[arg-type]

    def request(self, head: bytes = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n") -> None:
        self.protocol.data_received(head)

    def answered(self, *, left: int = 0) -> None:
        """End the answer to the request under way."""
        self.protocol.cycle.response_complete = True
        self.protocol.on_response_complete()


class FakeEvent:
    def set(self) -> None: ...

    def clear(self) -> None: ...


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Connection:
    return Connection(monkeypatch)


def test_a_head_has_so_long_and_not_longer_for_coming_in_pieces(connection: Connection) -> None:
    for second in range(5):
        connection.loop.pass_to(second)
        connection.request(b"GET /x HTTP/1.1\r\n" if not second else b"X: 1\r\n")
        assert not connection.transport.aborted
    connection.loop.pass_to(5.0)
    assert connection.transport.aborted


def test_the_next_heads_time_begins_with_its_first_byte(connection: Connection) -> None:
    connection.request()
    connection.loop.pass_to(4.0)
    connection.answered()
    connection.loop.pass_to(8.0)
    connection.request(b"GET /y")
    connection.loop.pass_to(12.9)
    assert not connection.transport.closing
    connection.loop.pass_to(13.0)
    assert connection.transport.aborted


def test_a_reader_has_one_allowance_for_all_his_pauses(connection: Connection) -> None:
    """Seven seconds, and 32 kB/s for the megabyte that is left: 39 s of waiting in all, in whatever parts."""
    connection.request()
    connection.protocol.cycle.expected_content_length = 2**20
    allowed, waited = LIMITS.body_seconds + 2**20 / SLOWEST_READER, 0.0
    while waited + 6 < allowed:
        connection.protocol.pause_writing()
        connection.loop.pass_to(connection.loop.now + 6)
        waited += 6
        assert not connection.transport.aborted
        connection.protocol.resume_writing()
        connection.loop.pass_to(connection.loop.now + 100)
    connection.protocol.pause_writing()
    connection.loop.pass_to(connection.loop.now + allowed - waited - 0.1)
    assert not connection.transport.aborted
    connection.loop.pass_to(connection.loop.now + 0.1)
    assert connection.transport.aborted


def test_the_next_answer_has_an_allowance_of_its_own(connection: Connection) -> None:
    for _ in range(3):
        connection.request()
        connection.protocol.pause_writing()
        connection.loop.pass_to(connection.loop.now + LIMITS.body_seconds - 1)
        connection.protocol.resume_writing()
        connection.answered()
    assert not connection.transport.closing


def test_an_idle_connection_ends_even_if_its_peer_never_reads(connection: Connection) -> None:
    connection.request()
    connection.answered()
    connection.loop.pass_to(LIMITS.idle_seconds)
    assert connection.transport.closing and not connection.transport.aborted
    connection.loop.pass_to(LIMITS.idle_seconds + SHUTDOWN_SECONDS)
    assert connection.transport.aborted


def test_a_connection_that_ends_with_its_answer_is_not_waited_for_either(connection: Connection) -> None:
    connection.request()
    connection.transport.close()  # as uvicorn does after "connection: close"
    connection.answered()
    connection.loop.pass_to(SHUTDOWN_SECONDS)
    assert connection.transport.aborted


@pytest.mark.parametrize(
    "head",
    [
        b"GET /x HTTP/1.1\r\nX: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /" + b"y" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /x HTTP/1.1\r\n" + b"a:\r\n" * 500 + b"\r\n",
        b"GET /x HTTP/1.1\r\nX: " + b"y" * MAX_HEAD_BYTES,
        b"\r\n" * MAX_HEAD_BYTES,
    ],
    ids=["header", "url", "many", "unfinished", "blank lines"],
)
def test_a_long_head_is_refused_once_and_ends_the_connection(connection: Connection, head: bytes) -> None:
    connection.request(head)
    connection.request(b"GET /health HTTP/1.1\r\n\r\n")
    assert connection.transport.written.count(b"HTTP/1.1") == 1
    assert connection.transport.written.startswith(b"HTTP/1.1 431 ")
    assert connection.transport.closing and connection.protocol.cycle is None
    assert connection.refused == [("10.0.0.1", "head_too_long")]
    connection.loop.pass_to(SHUTDOWN_SECONDS)
    assert connection.transport.aborted


def test_what_is_not_http_is_refused_in_the_usual_form(connection: Connection, caplog: Any) -> None:
    connection.request(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert b'"code": "framing"' in connection.transport.written
    assert not caplog.records, "a stranger does not write on the operator's terminal"


def test_a_lost_connection_leaves_nothing_due(connection: Connection) -> None:
    connection.request()
    connection.protocol.pause_writing()
    connection.answered()
    connection.protocol.timeout_keep_alive_handler()
    connection.protocol.connection_lost(None)
    assert connection.keeper.connections == 0
    assert all(timer.cancelled for timer in connection.loop.timers)


def test_new_connections_have_a_rate_and_addresses_a_share() -> None:
    reasons: list[str] = []
    limits = Limits(connections=6, connections_per_peer=4, connection_rate=0.001)
    keeper = Doorkeeper(lambda _: True, limits, lambda _peer, reason: reasons.append(reason))
    for _ in range(8):
        assert keeper.enter("2001:db8::1")
        keeper.leave("2001:db8::1")
    assert not keeper.enter("2001:db8::2"), "the same /64"
    assert all(keeper.enter("10.0.0.1") for _ in range(4))
    assert not keeper.enter("10.0.0.1")
    assert all(keeper.enter("10.0.0.2") for _ in range(2))
    assert not keeper.enter("10.0.0.3")
    assert reasons == ["too_many_new_connections", "too_many_connections_of_a_peer", "too_many_connections"]
