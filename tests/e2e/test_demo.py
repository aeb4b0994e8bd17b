"""The demo, as the README starts it, with fewer images."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parties import descendants, run_script

pytestmark = pytest.mark.e2e

SMALL = ("data.limit=90", "federation.rounds=2", "train.local_epochs=1")


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    done = run_script("scripts.demo", *SMALL, f"hydra.run.dir={tmp_path}", timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["cloud"] == "untrusted"
    assert result["sites"] == ["plant-a", "plant-b", "plant-c"]
    assert result["restore"]["psnr_db"] >= result["restore"]["noisy_psnr_db"] + 5
    assert all(len(entry["replied"]) == 3 for entry in result["rounds"])
    assert "accuracy on held-out images" in done.stdout
    assert not list((tmp_path / "cloud").rglob("*.npz"))
    assert all((tmp_path / "sites" / name / "model.npz").exists() for name in result["sites"])
    assert not re.search(r"Traceback|\[DEBUG\]|\[INFO\]", done.stdout + done.stderr)


def test_ctrl_c_ends_the_demo_and_all_its_parties(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.demo", *SMALL, f"hydra.run.dir={tmp_path}"]
    with (tmp_path / "log").open("wb") as log:
        demo = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "site plant" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        children = descendants(demo.pid)
        assert len(children) >= 5
        started = time.monotonic()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(20) == 130, (tmp_path / "log").read_text()
        assert time.monotonic() - started < 15
        assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]  # noqa: PTH110
    finally:
        if demo.poll() is None:
            demo.kill()


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
