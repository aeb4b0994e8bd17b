"""The classifiers that analysts train, and their parameters as plain arrays.

The project's own network has neither BatchNorm nor an integer buffer; torchvision's have both. Their running
means and variances are averaged as weights are, their counters are not (``model_security.layout``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import silu

from flep_fl.contracts.errors import ConfigError, LayoutError

Arrays = dict[str, NDArray[Any]]
"""Parameter name to array, float32 but for integer buffers, in the order of the model's state."""

ModelFactory = Callable[[int, int], nn.Module]
"""``factory(channels, classes)`` builds a network; its initial weights are overwritten."""


class _Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut (He et al. 2016; Wu and He 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        y = silu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return silu(x + y)


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class GroupNormCnn(nn.Module):
    """Small residual network for images of any size.

    Three halvings (rounded up, so that even 1x1 images pass), then the mean and a soft maximum of every
    map: the mean sees texture, the maximum sees one small defect. Everything is smooth on purpose: with ReLU
    and maxima, an error of 1e-8 in a weight (CKKS's) can switch a unit and change the training by 1e-3.

    Parameters
    ----------
    channels
        Channels of the image, 1 for grey.
    classes
        Number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        halve = nn.AvgPool2d(2, ceil_mode=True)
        self.features = nn.Sequential(
            _stage(channels, 16),
            halve,
            _stage(16, 32),
            halve,
            _stage(32, 64),
            _Residual(64),
            halve,
            _stage(64, 64),
        )
        self.head = nn.Linear(2 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Parameters
        ----------
        x
            float32, shape (N, C, H, W), values about 0..1, any H and W.

        Returns
        -------
        Tensor
            Logits, float32, shape (N, classes).
        """
        maps = self.features(2.0 * x - 1.0)
        pooled = torch.cat((maps.mean(dim=(2, 3)), maps.logsumexp(dim=(2, 3))), dim=1)
        logits: Tensor = self.head(pooled)
        return logits


def _torchvision(name: str, channels: int, classes: int) -> nn.Module:
    """Build one of torchvision's classifiers for any number of channels; nothing is downloaded."""
    from torchvision import models

    network: nn.Module = getattr(models, name)(weights=None, num_classes=classes)
    if channels != 3:
        path = {"resnet18": "conv1", "mobilenet_v3_small": "features.0.0"}[name]
        parent, _, leaf = path.rpartition(".")
        old = network.get_submodule(path)
        if not isinstance(old, nn.Conv2d):  # pragma: no cover - torchvision's first layer is a convolution
            raise ConfigError(f"torchvision's {name} does not begin with a convolution")
        new = nn.Conv2d(
            channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            stride=old.stride,  # type: ignore[arg-type]
            padding=old.padding,  # type: ignore[arg-type]
            bias=old.bias is not None,
        )
        setattr(network.get_submodule(parent), leaf, new)
    return network


MODELS: dict[str, ModelFactory] = {
    "cnn": GroupNormCnn,
    "mobilenet_v3_small": partial(_torchvision, "mobilenet_v3_small"),
    "resnet18": partial(_torchvision, "resnet18"),
}
"""Networks by name; add one by adding an entry."""


def build_model(name: str, *, classes: int, channels: int = 1, seed: int) -> nn.Module:
    """Build a network whose first weights follow from ``seed`` alone.

    Weights are drawn with NumPy (He et al. 2015), not with torch, whose normal sampler may differ between
    processor types: every site must start from the same model.

    Parameters
    ----------
    name
        A key of :data:`MODELS`.
    classes
        Number of classes, >= 2.
    channels
        Channels of the images, 1 for grey.
    seed
        Seed of the first weights, >= 0 (from the kit, never from the cloud).

    Returns
    -------
    nn.Module
        The network on the CPU, in training mode.

    Raises
    ------
    ConfigError
        The name is unknown, or a number is out of range.
    """
    if name not in MODELS:
        raise ConfigError(
            "model is unknown", expected="one of " + ", ".join(sorted(MODELS)), found=name, remedy="Set model"
        )
    if classes < 2:
        raise ConfigError("a classifier needs at least two classes", expected=">= 2", found=classes)
    if channels < 1 or seed < 0:
        raise ConfigError(
            "model has a number out of range",
            expected="channels >= 1, seed >= 0",
            found=f"channels={channels}, seed={seed}",
        )
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation must not disturb the caller
        model = MODELS[name](channels, classes)
    _initialise(model, np.random.default_rng(seed))
    return model.train()


def _initialise(model: nn.Module, rng: np.random.Generator) -> None:
    """Convolutions: normal, variance 2 / fan-in. Heads: normal, 1 / fan-in. Norms: identity."""
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        if weight is not None:
            if weight.dim() < 2:
                nn.init.ones_(weight)
            else:
                gain = 1.0 if isinstance(module, nn.Linear) else 2.0
                fan_in = weight[0].numel()
                values = rng.standard_normal(tuple(weight.shape)) * np.sqrt(gain / fan_in)
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(values.astype(np.float32)))
        if (bias := parameters.get("bias")) is not None:
            nn.init.zeros_(bias)


def get_arrays(model: nn.Module) -> Arrays:
    """Copy the model's state.

    Returns
    -------
    dict of str to array
        Every entry of ``state_dict`` in its order, float32; integer buffers keep their dtype, and a
        zero-dimensional entry its shape ``()``.
    """
    return {
        name: value.detach()
        .to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        .numpy()
        .copy()
        for name, value in model.state_dict().items()
    }


def set_arrays(model: nn.Module, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Replace the model's state.

    Parameters
    ----------
    model
        The network.
    arrays
        Exactly the names and shapes of :func:`get_arrays`, in any order and of any float dtype.

    Raises
    ------
    LayoutError
        A name is missing or unexpected, a shape differs, or a value is not finite; the model is unchanged.
    """
    state = model.state_dict()
    if missing := sorted(state.keys() - arrays.keys()):
        raise LayoutError("the model lacks parameters", expected=", ".join(missing))
    if extra := sorted(arrays.keys() - state.keys()):
        raise LayoutError("the model has no such parameters", found=", ".join(extra))
    for name, value in state.items():
        if tuple(arrays[name].shape) != tuple(value.shape):
            raise LayoutError(
                f"parameter {name} has another shape", expected=tuple(value.shape), found=arrays[name].shape
            )
        if not np.isfinite(arrays[name]).all():
            raise LayoutError(f"parameter {name} holds a value that is not finite")
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(torch.from_numpy(np.array(arrays[name])))


def count_parameters(model: nn.Module) -> int:
    """Return the number of values in the model's state."""
    return sum(value.numel() for value in model.state_dict().values())
