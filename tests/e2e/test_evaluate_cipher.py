"""``python -m scripts.evaluate_cipher`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.e2e


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.evaluate_cipher", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        walk = rng.normal(size=(64, 64)).cumsum(0).cumsum(1)
        walk = 255 * (walk - walk.min()) / np.ptp(walk)
        Image.fromarray(walk.astype(np.uint8)).save(images / f"walk{index}.png")
    return images


@pytest.mark.parametrize("cipher", ["flep", pytest.param("paper", marks=pytest.mark.slow)])
def test_a_folder_gives_tables_figures_and_results(folder: Path, tmp_path: Path, cipher: str) -> None:
    out = tmp_path / "out"
    done = run(f"images={folder}", f"cipher={cipher}", "keys=6", "denoiser=none", f"hydra.run.dir={out}")
    assert done.returncode == 0, done.stderr
    assert "## Table I" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert set(results["images"]) == {"walk0", "walk1"}
    for entry in results["images"].values():
        for name in (
            *("uaci", "npcr", "entropy", "encryption_quality", "chi2", "corr_h", "corr_v", "corr_d"),
            *("encrypt_ms", "decrypt_ms", "psnr_db"),
        ):
            assert isinstance(entry[name], float), name
    assert set(results["layers"]) == set(results["cipher"]["layers"])
    assert {"npcr", "uaci", "chi2"} <= set(results["pass_rate"])
    assert results["cipher"]["name"] == cipher
    assert results["cipher"]["restore_order"] == ("denoise_first" if cipher == "paper" else "restore_first")
    assert len(results["keys"]["mean_entropy"]) == 6
    # 64 x 64 pixels: an ideal cipher has 7.955.
    assert (results["keys"]["min_mean_entropy"] > 7.94) == (cipher == "flep")
    assert (results["pass_rate"]["uaci"] > 0.5) == (cipher == "flep")
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {"image_walk0.png", "image_walk1.png", *(f"layer_{n}.png" for n in results["layers"])}
    assert (out / "report.md").read_text() in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["images={tmp}/nowhere"], 2, "nowhere"),
        (["images={tmp}"], 1, "EmptyDatasetError"),
        (["images={tmp}/broken"], 1, "broken.png"),
        (["keys=0"], 2, "keys"),
        (["level=2"], 2, "level"),
        (["kyes=2"], 2, "kyes"),
        (["cipher=rot13"], 2, "rot13"),
        (["cipher.alpha=7"], 2, "cipher.alpha"),
    ],
)
def test_bad_input_is_one_named_line(tmp_path: Path, arguments: list[str], code: int, expected: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").write_bytes(b"no picture")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    done = run(*filled, "figures=false", f"hydra.run.dir={tmp_path}/out")
    assert done.returncode == code
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
