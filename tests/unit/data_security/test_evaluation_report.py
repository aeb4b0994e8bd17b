"""The evaluation of a cipher: what it measures, how it sums up, what it draws and refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flep_fl.contracts.errors import (
    ConfigError,
    EmptyDatasetError,
    ImageFormatError,
    MissingExtraError,
)
from flep_fl.data_security.parameters import CipherParameters, NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.reporting import cipher_evaluation as evaluation
from flep_fl.reporting.cipher_figures import draw_cipher_figures, draw_layers
from flep_fl.reporting.cipher_tables import PAPER, PUBLISHED, full_report, markdown
from flep_fl.reporting.sample_images import PACKAGED, named_images

NOISE = NoiseParameters(std=25.0)
QUIET = NoiseParameters()


@pytest.fixture
def pictures(natural) -> dict[str, np.ndarray]:
    square, oblong = natural(1, 96, 96, seed=1)[0], natural(1, 63, 81, seed=2)[0]
    return {"square": square, "oblong": oblong}


def report_on(
    name: str, pictures: dict[str, np.ndarray], noise: NoiseParameters = NOISE, keys: int = 3
) -> dict:
    subject = evaluation.subject_of(get_preset(name).parameters, noise)
    return evaluation.evaluate(pictures, subject, keys=keys, rng=np.random.default_rng(0))


def test_statistics_are_those_of_the_arrays_given() -> None:
    plain = np.zeros((16, 16), np.uint8)
    cipher = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = evaluation.measure(plain, cipher, cipher ^ 1, np.random.default_rng(0))
    assert values.npcr == 100.0
    assert values.uaci == pytest.approx(100 / 255)
    assert values.entropy == 8.0
    assert values.chi2 == 0.0
    # 255 pixels leave level 0, one goes to each other level: 510 / 256.
    assert values.encryption_quality == 510 / 256
    assert math.isnan(values.local_entropy)
    assert values.corr_v == pytest.approx(1.0)


def test_one_pixel_differs_by_one_level() -> None:
    image = np.full((20, 30), 255, np.uint8)
    changed = evaluation.with_one_pixel_changed(image, np.random.default_rng(0))
    assert np.count_nonzero(changed != image) == 1
    assert np.abs(changed.astype(int) - image).sum() == 1
    assert (image == 255).all()


def test_summary_takes_means_and_the_worst_correlation() -> None:
    runs = [
        evaluation.Statistics(99.0, 33.0, 7.0, 7.5, 10.0, 200.0, 0.01, -0.03, 0.0),
        evaluation.Statistics(100.0, 34.0, 8.0, 7.7, 20.0, 300.0, -0.02, 0.01, 0.0),
    ]
    summary = evaluation.summarise(runs)
    assert (summary["npcr"], summary["uaci"], summary["chi2"]) == (99.5, 33.5, 250.0)
    assert (summary["corr_h"], summary["corr_v"], summary["min_entropy"]) == (-0.02, -0.03, 7.0)


def test_passes_uses_the_limits_of_the_size() -> None:
    values = evaluation.Statistics(99.5693, 33.4, 7.9972, 7.9, 0.0, 294.0, 0.0, 0.0, 0.02)
    at_256 = evaluation.passes(values, 256 * 256)
    assert at_256["npcr"]
    assert at_256["uaci"]
    assert not at_256["chi2"]
    assert not at_256["corr_d"]
    assert not evaluation.passes(values, 512 * 512)["npcr"]
    assert evaluation.passes(values, 64 * 64)["corr_d"]


def test_the_default_cipher_looks_uniform(pictures) -> None:
    report = report_on("flep", pictures, keys=8)
    for name, image in pictures.items():
        entry = report["images"][name]
        bounds = report["limits"][name]
        assert bounds["pixels"] > 0.8 * image.size  # packed bytes: 6.5 bits a pixel, less than a row lost
        assert entry["entropy"] > bounds["entropy"][0] - 0.001
        assert 99.3 < entry["npcr"] < 99.9
        assert 33.0 < entry["uaci"] < 34.0
        assert entry["key_sensitivity"]["npcr"] > 99.3
        assert entry["key_sensitivity"]["wrong_key_refused"]
        assert entry["encrypt_ms"] > 0 < entry["decrypt_ms"]
        assert 18 < entry["psnr_db"] == entry["noisy_psnr_db"] < 24
        assert report["plain"][name]["corr_h"] > 0.9
    assert set(report["layers"]) == {"scramble", "encode", "noise", "mask", "envelope"}
    assert report["pass_rate"]["npcr"] > 0.7
    assert report["keys"]["count"] == len(report["keys"]["mean_entropy"]) == 8
    assert report["keys"]["min_mean_entropy"] == min(report["keys"]["mean_entropy"])


def test_each_layer_shows_what_it_adds(pictures) -> None:
    layers = report_on("flep", {"square": pictures["square"]})["layers"]
    plain = report_on("none", {"square": pictures["square"]})["images"]["square"]
    assert layers["scramble"]["encryption_quality"] == 0.0  # only places change
    assert abs(layers["scramble"]["corr_d"]) < plain["corr_d"]
    assert layers["noise"]["chi2"] < plain["chi2"]
    assert layers["mask"]["entropy"] > 7.97 > layers["encode"]["entropy"]
    assert layers["envelope"]["entropy"] > 7.97
    assert layers["scramble"]["psnr_db"] is None  # exact
    cumulative = report_on("flep", {"square": pictures["square"]})["cumulative"]
    assert cumulative["noise"]["entropy"] < 7.97 < cumulative["mask"]["entropy"]


def test_the_papers_three_steps_are_told_honestly(pictures) -> None:
    report = report_on("paper", pictures)
    assert report["images"]["square"]["uaci"] < 25
    assert report["pass_rate"]["uaci"] == 0.0
    assert report["pass_rate"]["chi2"] == 0.0


def test_without_a_cipher_nothing_is_hidden(pictures) -> None:
    entry = report_on("none", pictures)["images"]["square"]
    assert entry["npcr"] == pytest.approx(100 / 96**2)
    assert entry["encryption_quality"] == 0.0
    assert entry["psnr_db"] is None


def test_the_envelope_alone_is_measured_on_its_sealed_bytes(pictures) -> None:
    report = report_on("aead", pictures)
    assert report["images"]["square"]["entropy"] > 7.97
    assert report["images"]["square"]["psnr_db"] is None
    assert report["images"]["square"]["key_sensitivity"]["wrong_key_refused"]


def test_a_wider_wire_is_measured_as_bytes(pictures) -> None:
    subject = evaluation.subject_of(CipherParameters(bits=16), QUIET)
    report = evaluation.evaluate({"square": pictures["square"]}, subject, keys=1)
    assert report["limits"]["square"]["pixels"] == 2 * 96 * 96
    assert report["images"]["square"]["encryption_quality"] is None
    assert report["images"]["square"]["psnr_db"] is None


def test_a_report_is_json_and_its_tables_hold_the_published_figures(pictures) -> None:
    report = report_on("flep", pictures)
    report |= {"level": 0.05, "ideal_entropy": {str(e["pixels"]): 8.0 for e in report["limits"].values()}}
    json.dumps(report, allow_nan=False)
    page = full_report(report, title="Image cipher: flep")
    for row in PUBLISHED:
        assert f"{row.uaci:.4f}" in page
        assert f"{row.npcr:.4f}" in page
    assert page.count("| ours") == len(pictures)
    assert {row.source for row in PUBLISHED} == {PAPER, "its reference"}


def test_markdown_aligns_columns() -> None:
    assert markdown(["a", "long"], [["value", "x"]]).splitlines() == [
        "| a     | long |",
        "|-------|------|",
        "| value | x    |",
    ]


def test_packed_sub_bands_are_measured_as_bytes(pictures) -> None:
    subject = evaluation.subject_of(CipherParameters(bits=(8, 6, 5, 5)), QUIET)
    report = evaluation.evaluate({"square": pictures["square"]}, subject, keys=4)
    assert report["limits"]["square"]["pixels"] == 96 * 96 * 24 // 32
    entry = report["images"]["square"]
    assert entry["entropy"] > report["limits"]["square"]["entropy"][0] - 0.002
    assert entry["npcr"] > 99.3
    assert 40 < entry["psnr_db"] < 52
    assert set(report["layers"]) == set(subject.parameters.layers)


@pytest.mark.parametrize("keys", [0, -1, 10**6])
def test_an_impossible_number_of_keys_is_refused(pictures, keys: int) -> None:
    with pytest.raises(ConfigError, match="keys"):
        report_on("flep", pictures, keys=keys)


def test_images_too_small_for_statistics_are_refused() -> None:
    with pytest.raises(ImageFormatError, match="256"):
        report_on("flep", {"tiny": np.zeros((8, 8), np.uint8)})


# --- pictures -----------------------------------------------------------------------------------------


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(tmp_path / "a.bmp")
    Image.fromarray(np.full((20, 30), 8, np.uint8)).save(tmp_path / "b.tif")
    (tmp_path / "README.txt").write_text("not an image")
    images = named_images(tmp_path)
    assert list(images) == ["a", "b.png", "b.tif"]
    assert [int(image[0, 0]) for image in images.values()] == [9, 7, 8]
    assert named_images(tmp_path, side=16)["a"].shape == (16, 16)


def test_scikit_image_brings_pictures() -> None:
    images = named_images(None)
    assert set(images) == set(PACKAGED)
    assert all(image.shape == (256, 256) and image.dtype == np.uint8 for image in images.values())
    assert len({image.tobytes() for image in images.values()}) == len(images)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        named_images(tmp_path / "nowhere")
    with pytest.raises(EmptyDatasetError):
        named_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ImageFormatError, match=r"broken\.png"):
        named_images(tmp_path)
    with pytest.raises(ConfigError, match="image_size"):
        named_images(tmp_path, side=0)


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(MissingExtraError, match="samples"):
        named_images(None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    subject = evaluation.subject_of(get_preset("aead").parameters, QUIET)
    with pytest.raises(MissingExtraError, match="plot"):
        draw_cipher_figures(tmp_path, pictures, subject)


# --- figures ------------------------------------------------------------------------------------------


def test_one_figure_an_image_and_one_a_layer(tmp_path: Path, pictures) -> None:
    subject = evaluation.subject_of(CipherParameters(layers=("scramble", "mask")), QUIET)
    named = {"a/b c": pictures["square"], "plain": pictures["oblong"]}
    files = draw_cipher_figures(tmp_path, named, subject)
    assert sorted(file.name for file in files) == [
        "image_a_b_c.png",
        "image_plain.png",
        "layer_mask.png",
        "layer_scramble.png",
    ]
    for file in files:
        with Image.open(file) as figure:
            assert figure.format == "PNG"
            assert np.asarray(figure.convert("L")).std() > 10


def test_one_picture_of_all_layers(pictures, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    subject = evaluation.subject_of(get_preset("flep").parameters, NOISE)
    path = draw_layers(tmp_path / "layers.png", pictures["square"], subject)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.height > picture.width  # five layers, one below the other
        assert len(set(picture.convert("L").tobytes())) > 100


@pytest.mark.parametrize(
    "parameters",
    [
        CipherParameters(),
        CipherParameters(bits=(8, 6, 6, 6)),
        CipherParameters(layers=("envelope",)),
        CipherParameters(layers=("scramble", "encode", "noise", "envelope"), noise_units="wire"),
    ],
)
def test_one_image_under_one_nonce_has_one_cipher_image(parameters: CipherParameters) -> None:
    """Otherwise NPCR and UACI would measure fresh nonces, not diffusion."""
    subject = evaluation.subject_of(parameters, NoiseParameters())
    image = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32).astype(np.uint8)
    first, second = subject.cipher_images(subject.draw(), np.stack([image, image]), bytes(16))
    assert np.array_equal(first, second)
