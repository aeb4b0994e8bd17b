"""Jobs of a sweep in processes of their own (extra ``joblib``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from parties import run_script

INSTALLED = importlib.util.find_spec("joblib") and importlib.util.find_spec("hydra_plugins")
SWEEP = ("-m", "hydra/launcher=joblib", "data.limit=-1,-2")


@pytest.mark.skipif(not INSTALLED, reason="the extra joblib is not installed")
def test_a_job_that_fails_in_another_process_fails_the_command(tmp_path: Path) -> None:
    options = ("hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}")
    done = run_script("scripts.simulate", *SWEEP, *options, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "-1" in done.stderr and "-2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(bool(INSTALLED), reason="the extra joblib is installed")
def test_the_missing_extra_is_named(tmp_path: Path) -> None:
    done = run_script("scripts.simulate", *SWEEP, f"hydra.sweep.dir={tmp_path}", timeout=60)
    assert done.returncode == 2
    assert "pip install -e '.[joblib]'" in done.stderr
    assert "Traceback" not in done.stderr
