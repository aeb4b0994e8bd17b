"""Sites that wait: for the next run, or not for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from parties import make_parties

pytestmark = [pytest.mark.e2e, pytest.mark.he]


@pytest.mark.slow
def test_waiting_sites_serve_a_second_run_and_then_give_up(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    parties = make_parties(tmp_path, names, "federation.rounds=1", "train.local_epochs=1")
    try:
        for name in names:
            parties.start(name, "runtime.wait=true", "runtime.idle_timeout=25")
        for run in (1, 2):
            parties.start("cloud", f"hydra.run.dir={tmp_path / 'runs' / f'cloud-{run}'}")
            assert parties.wait("cloud", 90) == 0, parties.log("cloud")
            assert (tmp_path / "runs" / f"cloud-{run}" / "results.json").exists()
        assert [parties.wait(name, 90) for name in names] == [0, 0, 0], parties.log("a")
        assert "no further run within 25 s" in parties.log("a")
    finally:
        parties.stop()


def test_a_site_without_a_cloud_ends_by_name(tmp_path: Path) -> None:
    parties = make_parties(tmp_path, ("a", "b", "c"))
    try:
        parties.start("a", "runtime.idle_timeout=6")
        assert parties.wait("a", 60) == 1
        assert "IdleTimeoutError" in parties.log("a")
        assert "does not answer yet" in parties.log("a")
        assert "Traceback" not in parties.log("a")
    finally:
        parties.stop()
