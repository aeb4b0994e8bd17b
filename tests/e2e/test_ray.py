"""runtime=ray: the same results as in one process, named errors, no calls home, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from federations import make_config
from flwr.app import Context, Message, RecordDict

from flep_fl.contracts.errors import ConfigError, MissingExtraError, RuntimeStartError
from flep_fl.flower.ray_sites import SiteFolders, ray_client
from flep_fl.flower.runtime import ray_engine
from flep_fl.flower.runtime.wire import set_task_identity
from flep_fl.flower.simulation import simulate

pytestmark = pytest.mark.e2e

TINY = (
    "data=digits", "data.limit=120", "federation.rounds=2", "train.local_epochs=1", "runtime.threads=1",
    "noise.recovery=keyed", "denoiser=none", "report=none",
)  # fmt: skip


def test_a_missing_extra_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[ray\]'"):
        simulate(make_config(*TINY, "runtime=ray"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_ray_is_imported_for_runtime_ray_alone() -> None:
    code = "import sys, flep_fl.flower.simulation; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.5:6379"])
def test_addresses_of_ray(address: str) -> None:
    assert make_config("runtime=ray", f"runtime.address={address}").runtime.address == address


@pytest.mark.parametrize("overrides", [["runtime.address=local"], ["runtime=ray", "runtime.address=cluster"]])
def test_other_addresses_are_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.address"):
        make_config(*overrides)


def test_a_runtime_of_real_processes_is_no_simulation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runtime=process"):
        simulate(make_config(*TINY, "runtime=process"), tmp_path)


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_every_kind_of_message_reaches_a_site(kind: str, tmp_path: Path) -> None:
    set_task_identity(run_id=1)
    # Flower refuses a kind that no function of the app is registered for, before any mod is asked.
    folders = SiteFolders(("site-0",), tmp_path, tmp_path, tmp_path, make_config("runtime=ray"))
    message = Message(RecordDict(), 7, kind)
    message.metadata.__dict__["_message_id"] = "m"  # as a grid would
    answer = ray_client(folders)(message, Context(1, 7, {"partition-id": 0}, RecordDict(), {}))
    assert answer.has_error() and str(tmp_path) not in answer.error.reason, "the site's own public code"


class OneNode(ray_engine._LiveGrid):
    """Flower's grid with one node."""

    def __init__(self) -> None:
        pass

    def get_node_ids(self) -> list[int]:
        return [7]


def test_a_grid_asks_whether_ray_lives_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_ASK_EVERY", 0.0)
    places = iter([2, 0])
    grid = ray_engine._LiveGrid(OneNode(), threading.Event(), lambda: next(places))
    assert list(grid.get_node_ids()) == [7]
    with pytest.raises(RuntimeStartError, match="Ray was lost during the run"):
        grid.get_node_ids()


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["open", "untrusted"])
def test_ray_gives_what_one_process_gives(
    trust: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    calls: list[object] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **_: calls.append(args))
    for runtime in ("ray", "local"):
        simulate(make_config(*TINY, f"cloud={trust}", f"runtime={runtime}"), tmp_path / runtime)
    assert calls == [], "neither Ray nor Flower calls anybody"
    for site in ("site-0", "site-2"):
        models = []
        for runtime in ("ray", "local"):
            with np.load(tmp_path / runtime / "sites" / site / "model.npz") as file:
                models.append(dict(file))
        ours, theirs = models
        assert ours.keys() == theirs.keys()
        worst = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
        # CKKS draws fresh noise in every run; without it the two must not differ in a single bit.
        assert worst <= (0 if trust == "open" else 1e-4)


@pytest.mark.slow
def test_rays_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with long_run(tmp_path) as process:
        found = descendants(process.pid)
        assert any("raylet" in name for name in found.values()), found
    deadline = time.monotonic() + 240  # Ray's agents ask after their raylet every now and then
    while (left := [pid for pid in found if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, {pid: found[pid] for pid in left}


@pytest.mark.slow
def test_a_ray_that_is_lost_in_mid_run_ends_it_by_name(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with long_run(tmp_path) as process:
        found = descendants(process.pid)
        (raylet,) = (pid for pid, command in found.items() if Path(command.split(" ")[0]).name == "raylet")
        os.kill(raylet, signal.SIGKILL)
        assert process.wait(timeout=180) == 1
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert last.startswith("error (RuntimeStartError): Ray was lost during the run"), last


@contextmanager
def long_run(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Give a simulation of fifty rounds on Ray whose first round is over; SIGKILL ends it after the block."""
    command = [sys.executable, "-m", "scripts.simulate", *TINY, "runtime=ray", "federation.rounds=50"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"hydra.run.dir={folder}/run"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while "round 1" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.wait()


def descendants(root: int) -> dict[int, str]:
    """Return the command of every process below ``root``."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    below: dict[int, str] = {}
    grown = {root}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown}
        below.update({pid: commands[pid] for pid in grown})
    return below


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
