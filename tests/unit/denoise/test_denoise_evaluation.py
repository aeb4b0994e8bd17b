"""Measuring denoisers: the report, and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as samples
from skimage.metrics import structural_similarity

from flep_fl.contracts.errors import ConfigError, ImageFormatError
from flep_fl.data_security.metrics import psnr, ssim
from flep_fl.data_security.noise import NOISE_FAMILIES
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.reporting.denoiser_evaluation import Task, add_noise, evaluate_denoiser, plain_ms_per_megapixel

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return {"camera": samples.camera()[100:196, 180:308], "coins": samples.coins()[20:116, 20:97]}


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.evaluate_denoiser", f"hydra.run.dir={folder}/run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("std", [0.0, 10.0, 60.0])
def test_ssim_is_scikit_images(std):
    image = samples.camera()[:101, :90]
    other = np.clip(image + np.random.default_rng(0).standard_normal(image.shape) * std, 0, 255)
    expected = structural_similarity(
        image.astype(float), other, data_range=255, gaussian_weights=True, use_sample_covariance=False
    )
    assert ssim(image, other) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("one", "two"), [((10, 20), (10, 20)), ((20, 20), (20, 21)), ((2, 20, 20),) * 2])
def test_ssim_of_other_shapes(one, two):
    with pytest.raises(ImageFormatError):
        ssim(np.zeros(one), np.zeros(two))


@pytest.mark.parametrize("family", NOISE_FAMILIES)
def test_noise_has_the_strength_that_the_family_states(family):
    noise = NoiseParameters(family, std=0.0 if family == "salt_and_pepper" else 12.0, amount=0.2)
    image = np.full((256, 256), 128, np.uint8)
    noisy = add_noise(image, noise, np.random.default_rng(0))
    found = np.sqrt(np.mean((noisy.astype(float) - image) ** 2))
    assert found == pytest.approx(NOISE_FAMILIES[family].deviation(noise, 128), rel=0.03)
    assert noisy.dtype == np.float32


def test_the_report(images, tmp_path):
    noise = NoiseParameters(std=25.0)
    lines: list[str] = []
    report = evaluate_denoiser(
        images, Task("fast", noise, threads=1), plot=tmp_path / "x.png", on_event=lines.append
    )
    assert [entry["name"] for entry in report["per_image"]] == ["camera", "coins"]
    assert len(lines) == 2
    for index, (entry, image) in enumerate(zip(report["per_image"], images.values(), strict=True)):
        noisy = add_noise(image, noise, np.random.default_rng([0, index]))
        assert entry["noisy_psnr_db"] == pytest.approx(psnr(image, noisy))
        assert entry["psnr_db"] > entry["noisy_psnr_db"] + 5
        assert entry["noisy_ssim"] < entry["ssim"] < 1
        assert entry["estimated_std"] == pytest.approx(25, rel=0.15)
        assert entry["ms_per_megapixel"] > 0
    for name in ("psnr_db", "ssim", "noisy_psnr_db", "noisy_ssim"):
        assert report[name] == pytest.approx(np.mean([entry[name] for entry in report["per_image"]]))
    assert report["plain_float32"]["ratio"] == pytest.approx(
        report["plain_float32"]["ms_per_megapixel"] / report["ms_per_megapixel"]
    )
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
    again = evaluate_denoiser(images, Task("fast", noise, threads=1))
    assert again["psnr_db"] == report["psnr_db"]


def test_nothing_done_gives_the_noisy_figures(images):
    report = evaluate_denoiser(images, Task("none", NoiseParameters(std=10.0)))
    assert report["psnr_db"] == report["noisy_psnr_db"]
    assert report["plain_float32"] is None


def test_an_estimate_chooses_the_network(images, monkeypatch):
    noise = NoiseParameters(std=30.0)
    told = evaluate_denoiser(images, Task("fast", noise))
    found = evaluate_denoiser(images, Task("fast", noise, estimated=True))
    assert found["psnr_db"] == pytest.approx(told["psnr_db"], abs=0.3)
    monkeypatch.setattr("flep_fl.reporting.denoiser_evaluation.estimate_std", lambda _: 3.0)
    wrong = evaluate_denoiser(images, Task("fast", noise, estimated=True))
    assert wrong["psnr_db"] < told["psnr_db"] - 3
    with pytest.raises(ConfigError, match="needs Gaussian noise"):
        evaluate_denoiser(images, Task("fast", NoiseParameters("rician", std=9.0), estimated=True))


@pytest.mark.parametrize("name", ["dncnn9", "fast"])
def test_the_plain_network_is_timed(images, name):
    assert plain_ms_per_megapixel(Task(name, NoiseParameters(std=25.0)), images["coins"][:33, :35]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=/nowhere/at/all"], "is not a folder"),
        (["noise.std=-3"], "noise.std"),
        (["noise.family=cosmic"], "noise.family"),
        (["denoiser.name=bm3d"], "denoiser"),
        (["noise.units=wire"], "image units"),
        (["seed=-1"], "seed"),
        (["wrong=1"], "wrong"),
    ],
)
def test_mistakes_get_one_line(tmp_path, arguments, message):
    answer = _run(tmp_path, *arguments)
    assert answer.returncode != 0
    assert answer.stderr.startswith("error (")
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_plot_without_matplotlib_names_the_extra_and_the_setting(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "import scripts.evaluate_denoiser as script; script.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"hydra.run.dir={tmp_path}/run", "plot=true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "pip install -e '.[plot]', or set plot=false" in done.stderr


def test_help_does_without_pytorch():
    code = (
        "import sys; sys.argv = ['x', '--help']; import scripts.evaluate_denoiser as script\n"
        "try: script.main()\n"
        "except SystemExit as exc: sys.exit(exc.code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "estimate" in done.stdout


def test_the_command(images, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / "pictures" / f"{name}.png")
    done = _run(
        tmp_path,
        *(f"images={tmp_path}/pictures", "noise=poisson_gaussian", "noise.std=5", "noise.gain=2"),
        *("denoiser=fast", "plot=true", "runtime.threads=1"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"psnr_db", "ssim", "ms_per_megapixel", "per_image"} <= set(results)
    assert results["noise"]["family"] == "poisson_gaussian"
    assert results["psnr_db"] > results["noisy_psnr_db"] + 3
    assert (tmp_path / "run" / "denoised.png").exists()
    assert "ratio" in done.stdout + done.stderr
