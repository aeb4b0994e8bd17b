"""Running a denoising network on whole images, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flep_fl.contracts.errors import ConfigError, ImageFormatError
from flep_fl.contracts.memory import keep_freed_memory
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.denoise.capability import select_device, select_dtype
from flep_fl.data_security.denoise.network import DnCNN, fold_batch_norm
from flep_fl.data_security.metrics import psnr
from flep_fl.data_security.noise import TABLE_SIZE, real_table

FloatImages = NDArray[np.float32]

DEFAULT_TILE = 320
"""Longest side of a tile's feature maps; an image up to this size (twice that with a pixel-unshuffle by 2)
is denoised whole. 64 maps in bfloat16 stay below 15 MB, which the process keeps for the next layer."""

_ALIGNMENT = 16
"""What a tile's width is a multiple of: oneDNN's convolutions on AMX take 2.5 times as long at 259 or 262
columns as at 256 or 272."""

DEFAULT_PIXELS = 1 << 16
"""Pixels that go through the network at once: a layer of 64 maps takes 256 bytes a pixel in float32, and a
batch that leaves the processor's cache takes about twice as long there."""


@dataclass(frozen=True, slots=True)
class _Span:
    """One tile along one axis: what is read, and which part of the answer is kept."""

    read: slice
    keep: slice
    write: slice


def _spans(length: int, tile: int, overlap: int, multiple: int, align: int = 1) -> Iterator[_Span]:
    """Cut an axis in equal parts (a narrow last one would be mostly border).

    Starts are multiples of ``multiple``; a part reads beyond its border where that makes what it reads a
    multiple of ``align`` pixels.
    """
    parts = -(-length // tile)
    size = -(-length // (parts * multiple)) * multiple
    for start in range(0, length, size):
        stop = min(start + size, length)
        low, high = max(start - overlap, 0), min(stop + overlap, length)
        missing = -(high - low) % align
        low = max(low - missing // multiple * multiple, 0)
        high = min(high + -(high - low) % align, length)
        yield _Span(slice(low, high), slice(start - low, stop - low), slice(start, stop))


def network_denoiser(
    model: DnCNN,
    *,
    gain: float = 1.0,
    level: float | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    tile: int | None = None,
    pixels: int = DEFAULT_PIXELS,
) -> Denoise:
    """Wrap a network as a :data:`~flep_fl.contracts.ports.Denoise` function.

    Parameters
    ----------
    model
        The network; batch normalisation is folded here. It is copied, not kept.
    gain
        Factor on the intensities before the network, undone after it (noise levels near the trained one).
    level
        Standard deviation that a conditioned network is told, 8-bit scale, before ``gain``.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    dtype
        Arithmetic of the convolutions; bfloat16 where the hardware has it when None. The noise is
        subtracted in float32 in any case.
    threads
        Threads of PyTorch during a call, set back after it; None leaves the process's setting alone.
    tile
        Larger images are cut in equal parts of at most this side, each read with a border of the receptive
        field's reach: the result is that of the whole image. None: :data:`DEFAULT_TILE` times ``unshuffle``.
    pixels
        Upper limit of pixels in one pass through the network (at least one image or tile).

    From then on the process keeps some freed memory
    (:func:`~flep_fl.contracts.memory.keep_freed_memory`).

    Returns
    -------
    Denoise
        ``(N, H, W)`` float32, 0..255 scale, to the same, not clipped. Raises ``ImageFormatError`` for
        other shapes or dtypes and for values that are not finite.
    """
    if threads is not None and threads < 1:
        raise ConfigError("The denoiser needs a thread", expected="threads >= 1", found=threads)
    keep_freed_memory()
    place = select_device(device)
    kind = select_dtype(place) if dtype is None else dtype
    reach, multiple = model.reach, model.unshuffle
    side = DEFAULT_TILE * multiple if tile is None else tile
    network = fold_batch_norm(model).to(device=place, dtype=kind, memory_format=torch.channels_last)  # type: ignore[call-overload]
    predict: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = network.noise
    factor = gain / 255.0
    told = None if level is None else torch.tensor([level * factor], dtype=kind, device=place)

    def denoise_tile(images: FloatImages) -> FloatImages:
        source = torch.from_numpy(np.ascontiguousarray(images))[:, None].to(place)
        inputs = (_padded(source, model.unshuffle) * factor).to(dtype=kind)
        levels = None if told is None else told.expand(len(images))
        noise = predict(inputs.contiguous(memory_format=torch.channels_last), levels)
        noise = noise[:, :, : source.shape[2], : source.shape[3]].to(torch.float32) / factor
        result: FloatImages = (source - noise)[:, 0].cpu().numpy()
        return result

    def denoise(images: FloatImages) -> FloatImages:
        check_images(images)
        result = np.empty(images.shape, dtype=np.float32)
        for rows in _spans(images.shape[1], side, reach, multiple):
            for columns in _spans(images.shape[2], side, reach, multiple, _ALIGNMENT * multiple):
                area = (rows.read.stop - rows.read.start) * (columns.read.stop - columns.read.start)
                step = max(1, pixels // area)
                for start in range(0, images.shape[0], step):
                    batch = slice(start, start + step)
                    clean = denoise_tile(images[batch, rows.read, columns.read])
                    result[batch, rows.write, columns.write] = clean[:, rows.keep, columns.keep]
        return result

    def call(images: FloatImages) -> FloatImages:
        before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                return denoise(images)
        finally:
            if threads is not None:
                torch.set_num_threads(before)

    return call


def _padded(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeat the last row and column until both sides are multiples of ``multiple``."""
    below, right = (-side % multiple for side in images.shape[2:])
    if not below and not right:
        return images
    return torch.nn.functional.pad(images, (0, right, 0, below), mode="replicate")


def check_images(images: FloatImages) -> None:
    """Raise ``ImageFormatError`` unless ``images`` is a finite, non-empty ``(N, H, W)`` float32 array."""
    if not isinstance(images, np.ndarray) or images.ndim != 3 or images.dtype != np.float32:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ImageFormatError(
            "The denoiser cannot take this array", expected="float32 (N, H, W)", found=found
        )
    if 0 in images.shape[1:]:
        raise ImageFormatError("The denoiser got an image without pixels", found=str(images.shape))
    if not np.isfinite(images).all():
        raise ImageFormatError("The denoiser got values that are not finite", expected="finite values")


def mean_psnr(
    denoise: Denoise,
    images: list[NDArray[np.uint8]],
    std: float,
    *,
    seed: int = 0,
    family: str = "gaussian",
) -> float:
    """Mean PSNR in dB over ``images`` with noise of ``std`` (float, not clipped) removed.

    Image ``i`` gets the noise of ``numpy.random.default_rng([seed, i])``: white Gaussian, or an additive
    family as the cipher leaves it, in the Haar coefficients of every 2x2 block.
    """
    values = []
    for index, image in enumerate(images):
        random = np.random.default_rng([seed, index])
        noise: NDArray[np.floating] = random.standard_normal(image.shape) * std
        if family != "gaussian":
            noise = haar_noise(family, image.shape, std, random)
        values.append(psnr(image, denoise((image + noise).astype(np.float32)[None])[0]))
    return float(np.mean(values))


def haar_noise(
    family: str, shape: tuple[int, ...], std: float, random: np.random.Generator
) -> NDArray[np.float32]:
    """Return noise of an additive family as the cipher's transform leaves it in the pixels, ``(H, W)``."""
    even = tuple(side + side % 2 for side in shape)
    drawn = real_table(family, std)[random.integers(TABLE_SIZE, size=even)]
    a, b, c, d = drawn[::2, ::2], drawn[::2, 1::2], drawn[1::2, ::2], drawn[1::2, 1::2]
    noise = np.empty(even, dtype=np.float32)
    noise[::2, ::2] = (a + b + c + d) / 2
    noise[::2, 1::2] = (a + b - c - d) / 2
    noise[1::2, ::2] = (a - b + c - d) / 2
    noise[1::2, 1::2] = (a - b - c + d) / 2
    return noise[: shape[0], : shape[1]]
