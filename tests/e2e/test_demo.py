"""The demo, as the README starts it, with fewer images."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from parties import descendants, run_script

from flep_fl.flower.demonstration import OWNERS

pytestmark = pytest.mark.e2e

SMALL = ("data.limit=90", "federation.rounds=2", "train.local_epochs=1")
TWO = ("federation.sites=2", "federation.min_contributors=2")


def check_story(out: Path, said: str, analysts: list[str], images: int) -> None:
    """What must be true of every run of the demo, whoever takes part."""
    result = json.loads((out / "results.json").read_text())
    assert result["cloud"] == "untrusted"
    assert result["sites"] == analysts
    assert result["restore"]["psnr_db"] >= result["restore"]["noisy_psnr_db"] + 5
    assert all(len(entry["replied"]) == len(analysts) for entry in result["rounds"])
    assert "accuracy on held-out images" in said and "the cloud held no key" in said
    assert not list((out / "cloud").rglob("*.npz"))
    assert all((out / "sites" / name / "model.npz").exists() for name in analysts)
    assert not re.search(r"Traceback|\[DEBUG\]|\[INFO\]", said)
    # Every owner's camera, database and log took part, and every image went to one analyst.
    stored = 0
    for owner in OWNERS:
        with closing(sqlite3.connect(out / "owners" / owner / "database.sqlite")) as database:
            stored += database.execute("SELECT count(*) FROM records").fetchone()[0]
        assert f"[{owner}] sound: " in said
        assert f"[{owner}-gateway] stopped" in said
    assert stored == images
    fetched = re.findall(r"^\[([\w-]+) .*: (\d+) records fetched from https://", said, flags=re.MULTILINE)
    assert sum(int(count) for _, count in fetched) == images
    assert sorted(name for name, _ in fetched) == sorted(analysts * len(OWNERS))


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    done = run_script("scripts.demo", *SMALL, f"hydra.run.dir={tmp_path}", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    check_story(tmp_path, done.stdout + done.stderr, ["lab-1", "lab-2", "lab-3"], 90)
    assert "warning" not in done.stdout
    # It ends with the report, which shows what a cloud can read of an update.
    report = tmp_path / "report.html"
    assert done.stdout.splitlines()[-1] == f"report: {report}"
    page = report.read_text()
    assert "The life of one image" in page and "One image out of one update" in page
    figures = json.loads((tmp_path / "report_data.json").read_text())["inversion"]["figures"]
    assert figures["open"] > 0.5 > 0.3 > figures["untrusted"]
    assert report.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_two_owners_and_two_analysts_run_with_a_warning(tmp_path: Path) -> None:
    done = run_script("scripts.demo", *SMALL, *TWO, f"hydra.run.dir={tmp_path}", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    check_story(tmp_path, done.stdout + done.stderr, ["lab-1", "lab-2"], 90)
    assert "with two contributors" in done.stdout


@contextmanager
def started_demo(out: Path, *arguments: str):
    """Start the demo; yields the process and a function that waits until its log matches a pattern."""
    command = [sys.executable, "-m", "scripts.demo", *SMALL, *arguments, f"hydra.run.dir={out}"]
    log = out / "log"
    with log.open("wb") as file:
        demo = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def wait_for(pattern: str, times: int = 1) -> None:
        deadline = time.monotonic() + 200
        while len(re.findall(pattern, log.read_text())) < times:
            assert demo.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    try:
        yield demo, wait_for
    finally:
        if demo.poll() is None:
            demo.kill()


def gone(pids: list[int]) -> bool:
    return not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]  # noqa: PTH110


@pytest.mark.parametrize(
    ("pattern", "times", "processes"),
    [
        pytest.param("gateway. ready", 2, 2, marks=pytest.mark.slow),
        # Two gateways, the cloud, three analysts, and Flower's own processes.
        pytest.param("held-out images, in memory", 1, 6, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_the_demo_and_all_its_parties(
    tmp_path: Path, pattern: str, times: int, processes: int
) -> None:
    with started_demo(tmp_path) as (demo, wait_for):
        wait_for(pattern, times)
        children = descendants(demo.pid)
        assert len(children) >= processes
        started = time.monotonic()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(20) == 130, (tmp_path / "log").read_text()
        assert time.monotonic() - started < 15
        assert gone(children)


def test_a_party_that_fails_is_named_and_all_others_end(tmp_path: Path) -> None:
    with started_demo(tmp_path) as (demo, wait_for):
        wait_for("gateway. ready", 2)
        children = descendants(demo.pid)
        gateway = next(
            pid
            for pid in children
            if {b"action=serve", f"home='{tmp_path}/owners/{OWNERS[1]}'".encode()}
            <= set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        )
        os.kill(gateway, signal.SIGKILL)
        assert demo.wait(30) == 1
        said = (tmp_path / "log").read_text()
        assert re.search(
            rf"{OWNERS[1]}-gateway ended with status -9; its last lines:.*ready", said, re.DOTALL
        )
        assert "Traceback" not in said
        assert gone(children)


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['elpv_dataset'] = None\n"
        f"sys.argv = ['demo', 'hydra.run.dir={tmp_path}']\n"
        "runpy.run_module('scripts.demo', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "MissingExtraError" in done.stderr
    assert ".[demo]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_elpv_beats_the_majority_class_by_five_points_over_three_seeds(tmp_path: Path) -> None:
    margins = []
    for seed in range(3):
        done = run_script(
            "scripts.simulate",
            "experiment=elpv",
            f"seed={seed}",
            f"hydra.run.dir={tmp_path / str(seed)}",
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        final = json.loads((tmp_path / str(seed) / "results.json").read_text())["final"]
        margins.append(final["accuracy"] - final["majority_accuracy"])
    assert sum(margins) / len(margins) >= 0.05, margins
