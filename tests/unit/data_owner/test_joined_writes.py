"""An answer's head and body leave the gateway together."""

from __future__ import annotations

import asyncio

import pytest

from flep_fl.data_owner.gateway.connections import SMALL_WRITE, JoinedWrites


class Sink:
    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> str:
        return name


def played(*steps: object) -> list[bytes]:
    """Write bytes, "close", or let the loop turn (None); gives what reached the transport."""
    sink = Sink()

    async def play() -> None:
        joined = JoinedWrites(sink, asyncio.get_running_loop())  # type: ignore[arg-type]
        assert joined.get_extra_info("peername") == "peername"
        for step in steps:
            if isinstance(step, bytes):
                joined.write(step)
            elif step == "close":
                joined.close()
            elif step == "abort":
                sink.close()
            else:
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(play())
    return sink.writes


LARGE = bytes(SMALL_WRITE + 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([b"head", b"body"], [b"headbody"]),
        ([b"head", LARGE, LARGE], [b"head" + LARGE, LARGE]),
        ([LARGE], [LARGE]),
        ([b"head"], [b"head"]),  # an answer without a body waits for one turn of the loop
        ([b"head", None, b"body"], [b"head", b"body"]),
        ([b"a", b"b", b"c", b"d"], [b"ab", b"cd"]),
        ([b"head", "close"], [b"head"]),
        ([b"head", "abort"], []),
    ],
)
def test_nothing_is_lost_late_or_out_of_order(steps: list[object], expected: list[bytes]) -> None:
    assert played(*steps) == expected
