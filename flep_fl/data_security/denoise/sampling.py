"""Training batches, drawn where the network is trained: pictures, crops and noise stay on the device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flep_fl.contracts.errors import EmptyDatasetError
from flep_fl.data_security.denoise.images import LumaImage
from flep_fl.data_security.denoise.settings import TrainSettings

Batch = tuple[Tensor, Tensor, Tensor]
"""Clean crops and noise, float32 (N, 1, S, S), and levels, float32 (N,); 0..1 scale."""

_HAAR = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


class CropSampler:
    """Random crops of a set of pictures, turned and flipped, with the noise to be removed.

    A batch is a function of (``settings.seed``, step) alone: nothing has to be saved in a checkpoint, and a
    resumed run sees the same batches. Crops are chosen on the CPU, the same on every machine; the noise is
    drawn by the device's own generator. All pixels lie in one tensor of bytes on the device, and a step sends
    a few numbers a crop there, so a GPU does not wait for the processor.

    Parameters
    ----------
    pictures
        ``(H, W)`` uint8 each; those with a side below ``settings.crop`` are left out.
    settings
        ``seed``, ``batch``, ``crop``, ``scales``, ``noise_family``, ``noise_std`` and ``noise_range`` are
        used.
    device
        Where batches are made.

    Raises
    ------
    EmptyDatasetError
        Every picture is smaller than a crop.
    """

    def __init__(
        self, pictures: list[LumaImage], settings: TrainSettings, device: torch.device | None = None
    ) -> None:
        self._settings = settings
        self._device = device or torch.device("cpu")
        scaled = [_resize(image, scale) for image in pictures for scale in settings.scales]
        kept = [image for image in scaled if min(image.shape) >= settings.crop]
        if not kept:
            raise EmptyDatasetError(
                "Every picture is smaller than a crop",
                expected=f"sides of at least {settings.crop} pixels",
                found=f"{len(pictures)} pictures, the largest {max(image.shape for image in pictures)}",
                remedy="Set a smaller crop=",
            )
        self._shapes = np.array([image.shape for image in kept], dtype=np.int64)
        areas = self._shapes.prod(axis=1)
        self._starts = np.cumsum(areas) - areas
        self._chance = areas / areas.sum()
        self.pixels = int(areas.sum())
        digest = hashlib.sha256()
        for image in kept:
            digest.update(repr(image.shape).encode())
            digest.update(image.tobytes())
        self.digest = digest.hexdigest()
        """SHA-256 over all pixels: a checkpoint belongs to one set of pictures."""
        self._flat = torch.from_numpy(np.concatenate([image.ravel() for image in kept])).to(self._device)

    def batch(self, step: int) -> Batch:
        """Return the clean crops, the noise and the levels of ``step``."""
        settings, device = self._settings, self._device
        random = np.random.default_rng([settings.seed, step])
        drawn = [self._flat[self._crop_indices(random)] for _ in range(settings.candidates)]
        clean = most_detailed(torch.stack(drawn).to(torch.float32).div_(255))[:, None]
        levels = torch.full((settings.batch,), settings.noise_std / 255, dtype=torch.float32)
        if settings.noise_range is not None:
            low, high = settings.noise_range
            levels = torch.from_numpy((random.uniform(low, high, settings.batch) / 255).astype(np.float32))
        generator = torch.Generator(device).manual_seed(int(random.integers(2**62)))
        levels = levels.to(device)
        noise = standard_noise(settings.noise_family, clean.shape, generator) * levels[:, None, None, None]
        return clean, noise, levels

    def _crop_indices(self, random: np.random.Generator) -> Tensor:
        """Return int64 (N, S, S): where in the flat pixels each pixel of each crop lies."""
        count, side = self._settings.batch, self._settings.crop
        chosen = random.choice(len(self._shapes), count, p=self._chance)
        heights, widths = self._shapes[chosen].T
        top = random.integers(heights - side + 1)
        left = random.integers(widths - side + 1)
        turn = random.integers(8, size=count)
        up, mirrored, transposed = turn & 1, turn & 2, turn & 4
        # A crop is walked from one of its corners, rows first or columns first.
        first = np.where(up, top + side - 1, top) * widths + np.where(mirrored, left + side - 1, left)
        down, across = np.where(up, -widths, widths), np.where(mirrored, -1, 1)
        walk = np.stack(
            [
                self._starts[chosen] + first,
                np.where(transposed, across, down),
                np.where(transposed, down, across),
            ]
        )
        start, outer, inner = torch.from_numpy(walk).to(self._device)[:, :, None, None]
        steps = torch.arange(side, device=self._device)
        indices: Tensor = start + outer * steps[:, None] + inner * steps
        return indices


def most_detailed(crops: Tensor) -> Tensor:
    """Return float (N, S, S): of the K candidates (K, N, S, S) for each place of a batch the most detailed.

    Detail is the mean absolute Laplacian. Photographs are mostly sky and blur, on which a network soon has
    nothing left to learn.
    """
    if len(crops) == 1:
        return crops[0]
    inner = crops[..., 1:-1, 1:-1]
    across = crops[..., 1:-1, :-2] + crops[..., 1:-1, 2:]
    down = crops[..., :-2, 1:-1] + crops[..., 2:, 1:-1]
    detail = (4 * inner - across - down).abs().mean(dim=(-2, -1))
    return crops[detail.argmax(dim=0), torch.arange(crops.shape[1], device=crops.device)]


def standard_noise(family: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw noise of mean 0 and variance 1, float32 ``shape`` (N, 1, S, S), on the generator's device.

    Of families other than ``gaussian`` the first half of the batch has independent pixels. In the second half
    the *Haar coefficients* of every 2x2 block are independent: that is what the cipher's transform makes of
    noise that is added to wire coefficients (Gaussian noise is the same either way).
    """
    values = _SAMPLERS[family](shape, generator)
    if family != "gaussian":
        half = shape[0] // 2
        values[half:] = haar_mixed(values[half:])
    return values


def haar_mixed(coefficients: Tensor) -> Tensor:
    """Return the pixels whose Haar coefficients are ``coefficients``, (N, 1, H, W), block by block."""
    blocks = torch.nn.functional.pixel_unshuffle(coefficients, 2)
    matrix = torch.tensor(_HAAR, dtype=coefficients.dtype, device=coefficients.device) / 2
    mixed = torch.einsum("pc,nchw->nphw", matrix, blocks)
    return torch.nn.functional.pixel_shuffle(mixed, 2)


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw from (0, 1): half a step of the generator away from either end."""
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return drawn.clamp_(2.0**-25, 1 - 2.0**-24)


def _laplacian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    centred = _uniform(shape, generator) - 0.5
    return -centred.sign() * torch.log1p(-2 * centred.abs().clamp(max=0.5 - 2.0**-25)) / 2**0.5


def _rayleigh(shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.sqrt(-2 * torch.log(_uniform(shape, generator)))
    return (values - math.sqrt(math.pi / 2)) / math.sqrt(2 - math.pi / 2)


_SAMPLERS: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "gaussian": _normal,
    "laplacian": _laplacian,
    "rayleigh": _rayleigh,
}


def _resize(image: LumaImage, scale: float) -> NDArray[np.uint8]:
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
