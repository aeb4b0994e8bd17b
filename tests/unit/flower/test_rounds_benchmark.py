from __future__ import annotations

import threading
import time

import pytest

from benchmarks.rounds import Clock, Turns, seconds


def test_two_federations_take_turns_round_by_round() -> None:
    turns = Turns(("open", "untrusted"))
    clocks = {name: Clock(name, turns) for name in ("open", "untrusted")}
    order: list[str] = []

    def play(name: str, rounds: int) -> None:
        turns.wait(name)
        for number in range(rounds):
            clocks[name].next_round()
            order.append(f"{name} {number}")
        turns.over(name, leave=True)

    threads = [threading.Thread(target=play, args=one) for one in (("open", 2), ("untrusted", 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert order == [f"{name} {number}" for number in (0, 1) for name in ("open", "untrusted")] + [
        "untrusted 2",  # alone, and not stuck
        "untrusted 3",
    ]


def test_time_is_charged_to_whoever_is_at_work() -> None:
    clock = Clock("open", Turns(("open",)))
    clock.next_round()
    for who in (2, 3):
        clock.switch(who)
        until = time.process_time() + 0.02 * who
        while time.process_time() < until:
            pass
        clock.switch(0)
    clock.next_round()
    spent = clock.rounds[1]
    assert spent[2] >= 0.04
    assert spent[3] >= 0.06
    assert seconds([spent], side_by_side=False) == [pytest.approx(sum(spent.values()))]
    assert seconds([spent], side_by_side=True) == [pytest.approx(spent[0] + spent[3])]
