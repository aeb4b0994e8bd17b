"""The command line of the training script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.train_denoiser", f"hydra.run.dir={folder}/run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "images is not set"),
        (["images=/nowhere/at/all"], "images cannot be used"),
        (["images=.", "noise_std=-1"], "noise_std cannot be used"),
        (["images=.", "steps=many"], "steps"),
        (["images=.", "wrong=1"], "wrong"),
    ],
)
def test_mistakes_get_one_line(tmp_path, arguments, message):
    answer = _run(tmp_path, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error (ConfigError): ")
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_help_and_configuration_do_without_pytorch():
    code = (
        "import sys; sys.argv = ['train_denoiser', '--help']; import scripts.train_denoiser as script\n"
        "try: script.main()\n"
        "except SystemExit as exc: sys.exit(exc.code or ('torch' in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    assert "noise_std" in answer.stdout


def test_a_folder_without_pictures_is_named(tmp_path):
    (tmp_path / "pictures").mkdir()
    answer = _run(tmp_path, f"images={tmp_path}/pictures", f"out={tmp_path}/net.safetensors")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error (EmptyDatasetError): ")


def test_it_trains(tmp_path):
    (tmp_path / "pictures").mkdir()
    image = (np.arange(64 * 64) % 251).astype(np.uint8).reshape(64, 64)
    Image.fromarray(image).save(tmp_path / "pictures" / "one.png")
    answer = _run(
        tmp_path,
        f"images={tmp_path}/pictures",
        f"out={tmp_path}/net.safetensors",
        *("steps=2", "batch=2", "depth=3", "channels=4", "threads=1", "licence='CC0, made here'"),
    )
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "net.safetensors").exists()
    assert '"licence": "CC0, made here"' in (tmp_path / "net.json").read_text()
