"""The network of the paper, and folding its batch normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flep_fl.data_security.denoise.network import DnCNN, fold_batch_norm


def _settled(depth: int = 9, channels: int = 64) -> DnCNN:
    """A network whose batch normalisations are anything but the identity."""
    generator = torch.Generator().manual_seed(1)
    model = DnCNN(depth, channels)
    with torch.no_grad():
        for layer in model.body:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(torch.randn(channels, generator=generator))
                layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.2)
                layer.weight.copy_(torch.randn(channels, generator=generator))
                layer.bias.copy_(torch.randn(channels, generator=generator))
        last = model.body[-1]
        last.weight.copy_(torch.randn(last.weight.shape, generator=generator) * 0.05)
    return model.eval()


def test_layers_are_those_of_the_paper():
    kinds = [type(layer).__name__ for layer in DnCNN().body]
    assert kinds == ["Conv2d", "ReLU"] + ["Conv2d", "BatchNorm2d", "ReLU"] * 7 + ["Conv2d"]
    convolutions = [layer for layer in DnCNN().body if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(1, 64)] + [(64, 64)] * 7 + [(64, 1)]
    assert {(c.kernel_size, c.padding, c.padding_mode) for c in convolutions} == {((3, 3), (1, 1), "zeros")}


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 17, 30)])
def test_forward_is_the_image_minus_the_predicted_noise(shape):
    model = _settled(4, 8)
    images = torch.rand(shape)
    with torch.no_grad():
        assert torch.equal(model(images), images - model.body(images))
        assert model(images).shape == shape
        # A body that predicts nothing leaves the image alone.
        nn.init.zeros_(model.body[-1].weight)
        nn.init.zeros_(model.body[-1].bias)
        assert torch.equal(model(images), images)


@pytest.mark.parametrize(("depth", "channels"), [(9, 64), (2, 3), (5, 8)])
def test_folding_is_exact(depth, channels):
    model = _settled(depth, channels)
    images = torch.rand(2, 1, 24, 20, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norm(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.body)
    with torch.no_grad():
        expected = model(images)
        assert (expected - images).abs().max() > 1e-3
        scale = expected.abs().max()
        assert (folded(images) - expected).abs().max() <= 1e-5 * scale
        # Folding what is folded already changes nothing.
        assert torch.equal(fold_batch_norm(folded)(images), folded(images))
