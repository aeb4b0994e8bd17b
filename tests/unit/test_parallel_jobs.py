"""Jobs of a sweep in processes of their own (extra ``joblib``)."""

from __future__ import annotations

from pathlib import Path

import pytest
from parties import run_script

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra joblib is not installed")


def test_a_job_that_fails_in_another_process_fails_the_command(tmp_path: Path) -> None:
    done = run_script(
        "scripts.simulate",
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "data.limit=-1,-2",
        f"hydra.sweep.dir={tmp_path}",
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "-1" in done.stderr and "-2" in done.stderr
    assert "Traceback" not in done.stderr
