from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.streaming import load, make_strategy, prepare, simulate

pytestmark = pytest.mark.he


def test_the_benchmark_of_the_clouds_memory_runs_every_site_in_every_round(tmp_path: Path) -> None:
    prepare(tmp_path, 5_000, "default", 3)
    prepared = load(tmp_path, 2)
    found = simulate(prepared, rounds=2)
    assert found["sum_mb"] * 1e6 > (tmp_path / "payload").stat().st_size
    assert found["cloud_mb"] >= found["before_mb"] > 10
    assert make_strategy(prepared, 1).terms.participants == 2
    # No two sites have a chunk of their updates in common.
    assert len({len(name) for name in load(tmp_path, 3).site_keys}) == 3
