"""Whole images, tiles, number formats, threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flep_fl.contracts.errors import ConfigError, ImageFormatError
from flep_fl.data_security.denoise.capability import cpu_has_bfloat16, select_device, select_dtype
from flep_fl.data_security.denoise.inference import _spans, network_denoiser
from flep_fl.data_security.denoise.network import DnCNN
from flep_fl.data_security.metrics import psnr


@pytest.fixture
def model() -> DnCNN:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = DnCNN(5, 8)
        torch.nn.init.normal_(model.body[-1].weight, std=0.1)
    return model.eval()


def _images(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 300 - 20).astype(np.float32)


def test_it_is_the_network_on_the_8_bit_scale(model):
    images = _images(2, 20, 31)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)[:, None] / 255)[:, 0].numpy() * 255
    found = network_denoiser(model, device="cpu", dtype=torch.float32)(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - images).max() > 1


@pytest.mark.parametrize("tile", [7, 16, 40])
def test_tiles_give_the_whole_image(model, tile):
    images = _images(2, 41, 53)
    whole = network_denoiser(model, device="cpu", dtype=torch.float32)(images)
    tiled = network_denoiser(model, device="cpu", dtype=torch.float32, tile=tile)(images)
    np.testing.assert_allclose(tiled, whole, atol=1e-3)


@given(
    length=st.integers(1, 1200),
    tile=st.integers(1, 640),
    overlap=st.integers(0, 20),
    multiple=st.sampled_from([1, 2]),
)
def test_tiles_cover_an_axis_once_and_see_their_surroundings(length, tile, overlap, multiple):
    align = 16 * multiple
    spans = list(_spans(length, tile, overlap * multiple, multiple, align))
    written = [place for span in spans for place in range(length)[span.write]]
    assert written == list(range(length))
    for span in spans:
        assert range(length)[span.read][span.keep] == range(length)[span.write]
        assert span.read.start % multiple == 0
        assert span.read.start <= max(span.write.start - overlap * multiple, 0)
        assert span.read.stop >= min(span.write.stop + overlap * multiple, length)
        width = span.read.stop - span.read.start
        # An odd width is padded before the pixel-unshuffle; a part that sees the whole axis is not aligned.
        assert -(-width // multiple) % 16 == 0 or width == length


def test_small_batches_give_the_same(model):
    images = _images(5, 16, 16)
    at_once = network_denoiser(model, device="cpu", dtype=torch.float32)(images)
    one_by_one = network_denoiser(model, device="cpu", dtype=torch.float32, pixels=1)(images)
    np.testing.assert_allclose(one_by_one, at_once, atol=1e-3)


def test_gain_is_undone(model):
    images = _images(1, 16, 16)
    scaled = network_denoiser(model, device="cpu", dtype=torch.float32, gain=2.5)(images)
    direct = network_denoiser(model, device="cpu", dtype=torch.float32)(images * np.float32(2.5)) / 2.5
    np.testing.assert_allclose(scaled, direct, atol=1e-3)


def test_bfloat16_is_close_to_float32(model):
    images = _images(1, 32, 32)
    exact = network_denoiser(model, device="cpu", dtype=torch.float32)(images)
    coarse = network_denoiser(model, device="cpu", dtype=torch.bfloat16)(images)
    # Only the predicted noise is rounded, not the image from which it is subtracted.
    assert 0 < np.abs(coarse - exact).max() < 0.05 * np.abs(exact - images).max()


def test_bfloat16_needs_the_hardware():
    cpu = torch.device("cpu")
    assert select_dtype(cpu, "flags\t\t: fpu avx2 avx512f avx512_bf16\n") is torch.bfloat16
    assert select_dtype(cpu, "processor: 0\nflags : fpu amx_bf16 amx_tile") is torch.bfloat16
    assert select_dtype(cpu, "Features\t: fp asimd bf16 i8mm") is torch.bfloat16
    assert select_dtype(cpu, "flags : fpu avx2 avx512f") is torch.float32
    assert select_dtype(cpu, "") is torch.float32
    assert not cpu_has_bfloat16("model name : avx512_bf16 in a name\nflags : fpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:4096", "auto:1"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ConfigError):
        select_device(name)


def test_threads_are_set_for_the_call_alone(model, monkeypatch):
    before = torch.get_num_threads()
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    network_denoiser(model, device="cpu")(_images(1, 8, 8))
    assert calls == []
    network_denoiser(model, device="cpu", threads=before + 1)(_images(1, 8, 8))
    assert calls == [before + 1, before]
    with pytest.raises(ConfigError, match="threads"):
        network_denoiser(model, threads=0)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((8, 8), np.float32),
        np.zeros((1, 8, 8), np.uint8),
        np.zeros((1, 8, 8)),
        np.zeros((1, 0, 8), np.float32),
        np.full((1, 8, 8), np.nan, np.float32),
        np.full((1, 8, 8), np.inf, np.float32),
        [[[0.0]]],
    ],
)
def test_other_arrays_are_refused(model, images):
    with pytest.raises(ImageFormatError):
        network_denoiser(model, device="cpu")(images)


def test_no_images_are_no_work(model):
    assert network_denoiser(model, device="cpu")(np.zeros((0, 8, 8), np.float32)).shape == (0, 8, 8)


def test_psnr_against_its_definition():
    clean = np.zeros((4, 4), np.uint8)
    assert psnr(clean, clean) == float("inf")
    assert psnr(clean, np.full((4, 4), 25.5)) == pytest.approx(20.0)
