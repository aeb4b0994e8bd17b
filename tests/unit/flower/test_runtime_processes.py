from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flep_fl.flower import processes
from flep_fl.flower.processes import Interrupted, interruptible, spawn_child, stop_on_signals, terminate

SCRIPT = Path(processes.__file__)


def _is_gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_child_gets_its_environment_files_and_log(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        child = spawn_child(
            [
                "/bin/sh",
                "-c",
                f"echo to-the-log $COLOUR; pwd; echo to-the-pipe >/proc/self/fd/{write_end}; exit 3",
            ],
            env={"COLOUR": "green"},
            log=tmp_path / "logs" / "child.log",
            cwd=tmp_path,
            pass_fds=(write_end,),
        )
        assert child.wait(10) == 3
        assert os.read(read_end, 100) == b"to-the-pipe\n"
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (tmp_path / "logs" / "child.log").read_text().split() == ["to-the-log", "green", str(tmp_path)]


def test_a_child_is_out_of_reach_of_the_terminals_ctrl_c() -> None:
    child = spawn_child(["sleep", "30"])
    try:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        assert terminate(child) == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")
def test_children_and_grandchildren_die_with_a_killed_parent() -> None:
    inner = "from flep_fl.flower.processes import spawn_child; import time;"
    inner += "print(spawn_child(['sleep', '60']).pid, flush=True); time.sleep(60)"
    outer = "from flep_fl.flower.processes import spawn_child; import sys, time;"
    outer += f"print(spawn_child([sys.executable, '-c', {inner!r}]).pid, flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    with parent.stdout as lines:
        pids = [int(lines.readline()), int(lines.readline())]
    assert not any(map(_is_gone, pids))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while not all(map(_is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(_is_gone, pids))


def test_a_child_whose_parent_is_already_gone_does_not_start() -> None:
    not_the_parent = os.getppid()
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), str(not_the_parent), "echo", "started"],
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, b"")


def test_a_program_that_does_not_exist_is_status_127(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert spawn_child(["flep-no-such-program"], log=log).wait(10) == 127
    assert "flep-no-such-program" in log.read_text()


def test_terminate_kills_a_child_that_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = spawn_child(["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], log=log)
    while "ready" not in log.read_text():
        time.sleep(0.02)
    assert terminate(child, grace=0.3) == -signal.SIGKILL
    assert terminate(child) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(1)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_interruptible_work_is_broken_off_by_the_first_signal() -> None:
    with stop_on_signals() as stop:
        with pytest.raises(Interrupted), interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert stop.is_set()
    with stop_on_signals() as stop:
        with interruptible():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()


def test_an_interruption_is_not_swallowed_by_except_exception() -> None:
    assert not issubclass(Interrupted, Exception)
    assert issubclass(Interrupted, KeyboardInterrupt)
