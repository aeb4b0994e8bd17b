"""kill -9 of real processes: the server at every kind of moment, SuperLink alone; the run ends in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parties import Parties, descendants, make_parties, run_script

pytestmark = [pytest.mark.e2e, pytest.mark.he]

SITES = ("a", "b", "c")
ENDING_SERVER = Path(__file__).resolve().parents[1] / "support" / "ending_server.py"
LIMIT = 240.0


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Parties]:
    made = make_parties(tmp_path, SITES, "federation.rounds=4", "train.local_epochs=1")
    yield made
    made.stop()


def run_folder(parties: Parties) -> Path:
    return parties.folder / "runs" / "cloud"


def resume(parties: Parties, *, ending: str = "") -> None:
    """Start the server again, in an output folder of its own; it goes on in that of the run."""
    program = (str(ENDING_SERVER), ending) if ending else ()
    parties.start(
        "cloud",
        f"resume={run_folder(parties)}",
        f"hydra.run.dir={parties.folder / 'runs' / 'again'}",
        program=program,
    )


def ends_with_sigkill(parties: Parties) -> None:
    assert parties.wait("cloud", LIMIT) == -signal.SIGKILL, parties.log("cloud")


def round_opened(parties: Parties, number: int) -> None:
    parties.wait_for("cloud", f"round {number}/4: training", LIMIT)


def models(parties: Parties) -> dict[str, dict[str, Any]]:
    found = {}
    for name in parties.names:
        with np.load(parties.folder / "runs" / name / "sites" / name / "model.npz") as file:
            found[name] = dict(file)
    return found


def check_end(parties: Parties) -> list[dict[str, Any]]:
    """All ended with 0, every round has all sites, all sites one model; return the rounds."""
    assert parties.wait("cloud", LIMIT) == 0, "".join(map(parties.log, ("cloud", *SITES)))
    assert [parties.wait(name, LIMIT) for name in SITES] == [0, 0, 0], parties.log("cloud")
    result = json.loads((run_folder(parties) / "results.json").read_text())
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3, 4]
    assert [sorted(entry["replied"]) for entry in result["rounds"]] == [list(SITES)] * 4
    assert all(entry["accuracy"] is not None for entry in result["rounds"])
    assert "closing_failures" not in result
    first, *others = models(parties).values()
    for other in others:
        assert all(np.array_equal(other[key], first[key]) for key in first)
    rounds: list[dict[str, Any]] = result["rounds"]
    return rounds


@pytest.mark.slow
def test_a_server_killed_in_training_goes_on(parties: Parties) -> None:
    for name in ("cloud", *SITES):
        parties.start(name)
    round_opened(parties, 2)
    children = descendants(parties.processes["cloud"].pid)
    parties.processes["cloud"].send_signal(signal.SIGKILL)
    ends_with_sigkill(parties)
    assert not [pid for pid in children if Path(f"/proc/{pid}/exe").exists()], "its children die with it"
    resume(parties)
    rounds = check_end(parties)
    assert [entry.get("attempts", 1) for entry in rounds] == [1, 2, 1, 1]
    done = run_script("server", f"kit={parties.folder / 'kits' / 'cloud'}", f"resume={run_folder(parties)}")
    assert done.returncode == 1
    assert re.search(r"FinishedCheckpointError.*all 4 rounds are done", done.stderr), done.stderr


@pytest.mark.slow
def test_a_server_killed_at_every_kind_of_moment_ends_with_the_same_model(parties: Parties) -> None:
    for name in ("cloud", *SITES):
        parties.start(name)
    round_opened(parties, 1)
    parties.processes["cloud"].send_signal(signal.SIGKILL)
    ends_with_sigkill(parties)
    for ending in (
        "add:2",  # in the aggregation of round 1
        "before:sum-:1",  # in the write of its sum
        "after:sum-:1",  # the sum is there, the state does not name it yet
        "before:state.bin:3",  # (the first is the start, the second opens the round)
        "after:state.bin:3",  # the round is decided, nobody has been told
        "add:4",  # round 2, the second after one whole round
        "before:state.bin:2",  # when a round opens
    ):
        resume(parties, ending=ending)
        ends_with_sigkill(parties)
    resume(parties)
    interrupted = check_end(parties)
    assert sum(entry.get("attempts", 1) for entry in interrupted) >= 9
    model = models(parties)["a"]

    for name in ("cloud", *SITES):  # a new run with the same kits: the same seeds, nothing in its way
        parties.start(name)
    rounds = check_end(parties)
    assert all("attempts" not in entry for entry in rounds)
    for key, value in models(parties)["a"].items():
        # Training amplifies what CKKS adds in the first rounds; two interrupted runs differ as much.
        assert np.abs(value.astype(np.float64) - model[key]).max() < 1e-4, key
    assert [e["accuracy"] for e in rounds] == pytest.approx([e["accuracy"] for e in interrupted], abs=0.03)


@pytest.mark.slow
def test_superlink_killed_alone_costs_an_attempt(parties: Parties) -> None:
    for name in ("cloud", *SITES):
        parties.start(name)
    round_opened(parties, 2)
    (superlink, *_) = descendants(parties.processes["cloud"].pid)
    os.kill(superlink, signal.SIGKILL)
    rounds = check_end(parties)
    assert "SuperLinkLostError" in parties.log("cloud")
    assert [entry.get("attempts", 1) for entry in rounds] == [1, 2, 1, 1]


@pytest.mark.slow
def test_a_frozen_site_holds_a_round_up_for_the_timeout_and_comes_back(tmp_path: Path) -> None:
    names = (*SITES, "d")
    parties = make_parties(
        tmp_path, names, "federation.rounds=3", "train.local_epochs=1", "federation.round_timeout=45"
    )
    frozen: list[int] = []
    try:
        for name in ("cloud", *names):
            parties.start(name)
        parties.wait_for("cloud", "round 2/3: training", LIMIT)
        frozen = [parties.processes["d"].pid, *descendants(parties.processes["d"].pid)]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        parties.wait_for("cloud", "site d failed in round 2: (round_timeout|site_lost)", 120)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        assert parties.wait("cloud", LIMIT) == 0, parties.log("cloud")
        assert [parties.wait(name, LIMIT) for name in SITES] == [0, 0, 0]
        rounds = json.loads((run_folder(parties) / "results.json").read_text())["rounds"]
        assert [sorted(entry["replied"]) for entry in rounds][:2] == [list(names), list(SITES)]
        assert [failure["site"] for failure in rounds[1]["failed"]] == ["d"]
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        parties.stop()


@pytest.mark.slow
def test_a_server_that_cannot_resume_says_why_before_anything_starts(tmp_path: Path) -> None:
    made = make_parties(tmp_path, SITES, "federation.rounds=4")
    kit = f"kit={tmp_path / 'kits' / 'cloud'}"
    done = run_script("server", kit, f"resume={tmp_path}", f"hydra.run.dir={tmp_path / 'x'}")
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr
    assert "no checkpoint of a run in" in done.stderr
    assert "Traceback" not in done.stderr
    made.start("cloud")
    made.wait_for("cloud", "SuperLink ready")
    made.wait_for("cloud", "waiting for 3 sites")
    made.stop()
    # The same folder with other kits: another federation.
    other = make_parties(tmp_path / "other", SITES, "federation.rounds=4")
    kit = f"kit={other.folder / 'kits' / 'cloud'}"
    done = run_script("server", kit, f"resume={run_folder(made)}", f"hydra.run.dir={tmp_path / 'x'}")
    assert done.returncode == 1
    assert "ForeignCheckpointError" in done.stderr
