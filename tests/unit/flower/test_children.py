"""The demo's cast of processes: shown, named when one fails, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from flep_fl.contracts.errors import RuntimeStartError
from flep_fl.flower.children import Children, option

SUPPORT = Path(__file__).resolve().parents[2] / "support"


@pytest.fixture
def children(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    with Children(tmp_path / "logs", threading.Event()) as cast:
        yield cast


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_children_say_is_shown_behind_their_names(children, capsys) -> None:
    children.start("a", "actor", "say:hello", "say:[a  0.1 s] at work")
    children.start("b", "actor", "say:good bye")
    children.wait(["a", "b"])
    assert sorted(capsys.readouterr().out.splitlines()) == ["[a  0.1 s] at work", "[a] hello", "[b] good bye"]


def test_one_that_fails_is_named_with_its_last_words_and_the_others_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    pids = []
    cast = Children(tmp_path, threading.Event())
    with pytest.raises(RuntimeStartError, match="b ended with status 3") as caught, cast:
        pids.append(cast.start("a", "actor", "sleep:60"))
        cast.start("b", "actor", "say:the disk is full", "exit:3")
        cast.wait(["a"])
    assert "the disk is full" in str(caught.value) and str(tmp_path / "b.log") in str(caught.value)
    assert not alive(pids[0])


def test_a_server_that_ends_by_itself_has_failed_though_its_status_is_0(children) -> None:
    children.start("gateway", "actor", "say:stopped", lasting=True)
    children.start("a", "actor", "sleep:60")
    with pytest.raises(RuntimeStartError, match="gateway ended with status 0"):
        children.wait(["a"])


def test_a_server_that_is_asked_to_end_may(children) -> None:
    pid = children.start("gateway", "actor", "say:ready", "sleep:60", lasting=True)
    children.wait_for_line("gateway", "ready", seconds=20)
    with pytest.raises(RuntimeStartError, match="status -15"):
        children.end(["gateway"])  # an actor does not handle SIGTERM; a gateway does, and exits 0
    assert not alive(pid)


def test_waiting_for_a_line_ends(children) -> None:
    children.start("gateway", "actor", "sleep:60", lasting=True)
    with pytest.raises(RuntimeStartError, match="not ready after"):
        children.wait_for_line("gateway", "ready", seconds=0.2)


def test_a_stop_ends_all_children(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    stop = threading.Event()
    pids = []
    with pytest.raises(KeyboardInterrupt), Children(tmp_path, stop) as cast:
        pids += [cast.start(name, "actor", "sleep:60") for name in "abc"]
        threading.Timer(0.3, stop.set).start()
        cast.wait("abc")
    assert not any(map(alive, pids))


def test_children_end_when_the_one_that_started_them_is_killed(tmp_path) -> None:
    code = (
        "import sys, threading; from pathlib import Path; from flep_fl.flower.children import Children\n"
        f"cast = Children(Path({str(tmp_path)!r}), threading.Event())\n"
        "print(cast.start('a', 'actor', 'sleep:60'), flush=True); cast.wait(['a'])\n"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{root}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r$"), max_size=20)


@given(st.one_of(st.none(), st.booleans(), st.integers(), TEXTS, st.lists(TEXTS, max_size=3)))
def test_an_option_reaches_the_child_as_it_is(value: object) -> None:
    parsed = OverridesParser.create().parse_override(option("a.b", value))
    assert parsed.value() == value
