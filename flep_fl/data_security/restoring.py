"""Restoring with any cipher, whatever it offers beyond the ``ImageCipher`` protocol.

A cipher that leaves noise in its images says so with a property ``residual_std``, and of which kind with a
property ``residual_noise``; one that can denoise *before* it descrambles takes ``denoise`` and ``order`` in
``decrypt``. None is required.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError, DenoiserError
from flep_fl.contracts.ports import Denoise, ImageCipher

if TYPE_CHECKING:
    from flep_fl.data_security.pipeline import RestoreOrder, RestoringCipher


@dataclass(frozen=True, slots=True)
class ResidualNoise:
    """The noise in decrypted images, as far as a denoiser has to know it; 8-bit scale.

    Attributes
    ----------
    family
        ``gaussian``, or another name of :data:`flep_fl.data_security.noise.NOISE_FAMILIES` where the noise
        has that distribution in the restored pixels (additive families: in them or in the Haar coefficients
        of each 2x2 block).
    std
        Standard deviation; of a part of the noise where
        :class:`~flep_fl.data_security.parameters.NoiseParameters` says so.
    gain, amount
        As there.
    """

    family: str = "gaussian"
    std: float = 0.0
    gain: float = 1.0
    amount: float = 0.0


def residual_noise(cipher: ImageCipher) -> ResidualNoise:
    """Return the noise in decrypted images; white and Gaussian where the cipher states no more than a level.

    Raises
    ------
    CipherParameterError
        When the cipher states something that is no such noise.
    """
    std = residual_std(cipher)
    stated = getattr(cipher, "residual_noise", None)
    if stated is None:
        return ResidualNoise(std=std)
    if not isinstance(stated, ResidualNoise):
        raise CipherParameterError(
            f"The cipher {type(cipher).__name__} states an unusable residual_noise",
            expected="a ResidualNoise",
            found=repr(stated),
        )
    return stated


def residual_std(cipher: ImageCipher) -> float:
    """Return the standard deviation of the noise in decrypted images, 8-bit scale; 0 if none is stated.

    Raises
    ------
    CipherParameterError
        When the cipher states something that is no standard deviation.
    """
    stated = getattr(cipher, "residual_std", 0.0)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 <= stated < math.inf:
        raise CipherParameterError(
            f"The cipher {type(cipher).__name__} states an unusable residual_std",
            expected="a number from 0",
            found=repr(stated),
        )
    return float(stated)


def require_order(cipher: ImageCipher, order: RestoreOrder) -> None:
    """Refuse an order of restoring that the cipher cannot follow.

    Raises
    ------
    CipherParameterError
        When ``order`` is ``denoise_first`` and ``cipher.decrypt`` takes no ``denoise`` and ``order``.
    """
    if order != "restore_first" and not _can_denoise(cipher):
        raise CipherParameterError(
            f"restore.order={order} is not possible with the cipher {type(cipher).__name__}",
            expected="a method decrypt(envelopes, *, denoise, order)",
            found=f"decrypt({', '.join(inspect.signature(cipher.decrypt).parameters)})",
            remedy="Set restore.order=restore_first",
        )


def decrypt_images(
    cipher: ImageCipher,
    envelopes: Sequence[bytes],
    *,
    denoise: Denoise | None = None,
    order: RestoreOrder = "restore_first",
) -> list[NDArray[np.float32]]:
    """Decrypt, and denoise before or after as ``order`` says, with any cipher.

    Parameters
    ----------
    cipher
        Any image cipher.
    envelopes
        What it gave, in any number and mix of sizes.
    denoise
        The denoiser; None leaves the images as they come.
    order
        See :func:`require_order`.

    Returns
    -------
    list of ndarray
        float32, 0..255 scale, not clipped, in the order of ``envelopes``.

    Raises
    ------
    CipherParameterError
        When the cipher cannot follow ``order``.
    EnvelopeError, DenoiserError
        As the cipher's ``decrypt`` and the denoiser do.
    """
    require_order(cipher, order)
    if _can_denoise(cipher):
        return cast("RestoringCipher", cipher).decrypt(envelopes, denoise=denoise, order=order)
    images = list(cipher.decrypt(envelopes))
    if denoise is None:
        return images
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    for members in groups.values():
        stack = np.stack([images[index] for index in members])
        # A denoiser knows grey images: every channel of a colour image is one.
        clean = denoised(denoise, stack.reshape(-1, *stack.shape[-2:])).reshape(stack.shape)
        for index, image in zip(members, clean, strict=True):
            images[index] = image
    return images


def denoised(denoise: Denoise, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply a denoiser to a float32 batch and check what it gives back.

    Raises
    ------
    DenoiserError
        When that is not a finite array of the same shape.
    """
    result = denoise(images)
    if not isinstance(result, np.ndarray) or result.shape != images.shape or not np.isfinite(result).all():
        raise DenoiserError(
            "The denoiser returned no usable images",
            expected=f"finite float32 of shape {images.shape}",
            found=f"shape {getattr(result, 'shape', None)}",
        )
    return result.astype(np.float32, copy=False)


def _can_denoise(cipher: ImageCipher) -> bool:
    parameters = inspect.signature(cipher.decrypt).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {"denoise", "order"} <= named or any(p.kind is p.VAR_KEYWORD for p in parameters)
