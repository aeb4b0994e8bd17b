"""DnCNN, the paper's denoising network, its fast variant, and the exact folding of batch normalisation."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class DnCNN(nn.Module):
    """Residual denoiser of Zhang et al., "Beyond a Gaussian Denoiser" (TIP 2017), grey.

    conv+ReLU, ``depth - 2`` times conv+BN+ReLU, conv; 3x3 kernels, zero padding. The body predicts the
    noise, ``forward`` subtracts it. Any height and width; intensities are divided by 255.

    Parameters
    ----------
    depth
        Number of convolutions, at least 2. The receptive field is ``2 * depth + 1`` pixels wide.
    channels
        Feature maps of every hidden layer.
    batch_norm
        False for the folded form, whose hidden convolutions have a bias instead.
    unshuffle
        1 for the paper's network. 2 works on four half-size images of every second pixel, as FFDNet does
        (Zhang et al., TIP 2018): a quarter of the work, twice the receptive field.
    conditioned
        One more input map holds the noise level, so that one network serves a range of levels.
    """

    def __init__(
        self,
        depth: int = 9,
        channels: int = 64,
        *,
        batch_norm: bool = True,
        unshuffle: int = 1,
        conditioned: bool = False,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.channels = channels
        self.unshuffle = unshuffle
        self.conditioned = conditioned
        first = nn.Conv2d(unshuffle**2 + conditioned, channels, 3, padding=1)
        layers: list[nn.Module] = [first, nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
        last = nn.Conv2d(channels, unshuffle**2, 3, padding=1)
        layers.append(last)
        self.body = nn.Sequential(*layers)
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # The first prediction is "no noise": training starts at the noisy image, not far beyond it.
        nn.init.zeros_(last.weight)

    @property
    def reach(self) -> int:
        """Pixels by which the receptive field extends beyond a pixel (a multiple of ``unshuffle``)."""
        return self.depth * self.unshuffle

    def noise(self, images: Tensor, level: Tensor | None = None) -> Tensor:
        """Predict the noise of ``(N, 1, H, W)`` images (0..1 scale, not clipped).

        ``level``: standard deviations, shape ``(N,)``, 0..1 scale, for a conditioned network. Height and
        width are multiples of ``unshuffle``.
        """
        inputs = images if self.unshuffle == 1 else nn.functional.pixel_unshuffle(images, self.unshuffle)
        if self.conditioned:
            if level is None:
                raise ValueError("a conditioned network needs the noise level")
            level_map = level.to(inputs.dtype)[:, None, None, None].expand(-1, 1, *inputs.shape[2:])
            inputs = torch.cat([inputs, level_map], dim=1)
        noise: Tensor = self.body(inputs.contiguous(memory_format=torch.channels_last))
        return noise if self.unshuffle == 1 else nn.functional.pixel_shuffle(noise, self.unshuffle)

    def forward(self, images: Tensor, level: Tensor | None = None) -> Tensor:
        """Denoise ``(N, 1, H, W)`` images (0..1 scale, not clipped); the same shape out."""
        return images - self.noise(images, level)


def fold_batch_norm(model: DnCNN) -> DnCNN:
    """Return the same function as ``model.eval()`` without batch normalisation.

    BN(conv(x)) = g * (W x - mean) / sqrt(var + eps) + b is itself a convolution, with weight
    ``W * g / sqrt(var + eps)`` and bias ``b - mean * g / sqrt(var + eps)``. Computed in float64; the result
    is a new model in evaluation mode on the CPU.
    """
    folded = DnCNN(
        model.depth,
        model.channels,
        batch_norm=False,
        unshuffle=model.unshuffle,
        conditioned=model.conditioned,
    ).eval()
    targets = iter([layer for layer in folded.body if isinstance(layer, nn.Conv2d)])
    with torch.no_grad():
        for layer, following in pairwise([*model.body, nn.Identity()]):
            if not isinstance(layer, nn.Conv2d):
                continue
            target = next(targets)
            weight = layer.weight.double().cpu()
            bias = torch.zeros(weight.shape[0], dtype=torch.float64)
            if layer.bias is not None:
                bias = layer.bias.double().cpu()
            if isinstance(following, nn.BatchNorm2d):
                mean, var = following.running_mean, following.running_var
                if mean is None or var is None:
                    raise ValueError("a batch normalisation without running statistics cannot be folded")
                gain = following.weight.double().cpu() / torch.sqrt(var.double().cpu() + following.eps)
                weight = weight * gain[:, None, None, None]
                bias = (bias - mean.double().cpu()) * gain + following.bias.double().cpu()
            target.weight.copy_(weight)
            if target.bias is not None:
                target.bias.copy_(bias)
    return folded
