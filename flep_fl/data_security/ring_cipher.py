"""One image cipher over all epochs of a ring: seals with the newest, opens with the one that fits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.contracts.ports import Denoise, Entropy, ImageBatch, ImageCipher
from flep_fl.data_security.epochs import BundleRing
from flep_fl.data_security.pipeline import RestoreOrder
from flep_fl.data_security.presets import build_cipher
from flep_fl.data_security.restoring import decrypt_images, residual_noise


class RingCipher:
    """An ``ImageCipher`` over a ring; envelopes of several epochs may be mixed.

    It chooses by the header of :mod:`flep_fl.data_security.envelope`. A cipher with a format of its own does
    not write that header; open its images with the bundle that :meth:`BundleRing.get` returns.

    Parameters
    ----------
    ring
        The bundles.
    noise_secret, entropy, allow_targets
        As for :func:`flep_fl.data_security.presets.build_cipher`.

    Raises
    ------
    CipherParameterError, TargetError
        When the newest bundle's cipher cannot be built; those of older epochs are built when first needed.
    """

    def __init__(
        self,
        ring: BundleRing,
        *,
        noise_secret: bytes | None = None,
        entropy: Entropy = secrets.token_bytes,
        allow_targets: Sequence[str] = (),
    ) -> None:
        self._ring = ring
        self._noise_secret, self._entropy, self._allow = noise_secret, entropy, tuple(allow_targets)
        self._ciphers: dict[int, ImageCipher] = {}
        self._cipher(ring.newest.epoch)

    @property
    def ring(self) -> BundleRing:
        """The ring in use."""
        return self._ring

    def __repr__(self) -> str:
        return f"RingCipher({self._ring!r})"

    def encrypt(self, images: ImageBatch) -> list[bytes]:
        """Encrypt with the newest bundle; as its cipher's ``encrypt``."""
        return self._cipher(self._ring.newest.epoch).encrypt(images)

    def decrypt(
        self,
        envelopes: Sequence[bytes],
        *,
        denoise: Denoise | None = None,
        order: RestoreOrder = "restore_first",
    ) -> list[NDArray[np.float32]]:
        """Decrypt each envelope with the bundle that its header names; as its cipher's ``decrypt``.

        Parameters
        ----------
        envelopes
            Of any epochs in the ring, in any order.
        denoise
            One denoiser for all; it fits one noise level.
        order
            As for :func:`flep_fl.data_security.restoring.decrypt_images`.

        Returns
        -------
        list of ndarray
            float32, in the order of ``envelopes``.

        Raises
        ------
        EnvelopeError
            When one is truncated, altered, or of a bundle that the ring lacks; no image is returned then.
        CipherParameterError
            When epochs with different noise are to go through one denoiser.
        """
        members: dict[int, list[int]] = {}
        for index, envelope in enumerate(envelopes):
            members.setdefault(self._ring.for_envelope(envelope).epoch, []).append(index)
        if denoise is not None:
            self._require_one_level(list(members))
        images: dict[int, NDArray[np.float32]] = {}
        for epoch, chosen in members.items():
            opened = decrypt_images(
                self._cipher(epoch), [envelopes[i] for i in chosen], denoise=denoise, order=order
            )
            images.update(zip(chosen, opened, strict=True))
        return [images[index] for index in range(len(envelopes))]

    def _cipher(self, epoch: int) -> ImageCipher:
        if epoch not in self._ciphers:
            (bundle,) = self._ring.only(epoch).bundles
            self._ciphers[epoch] = build_cipher(
                bundle,
                noise_secret=self._noise_secret,
                entropy=self._entropy,
                allow_targets=self._allow,
            )
        return self._ciphers[epoch]

    def _require_one_level(self, epochs: Sequence[int]) -> None:
        # Two entries: the noise of the restored image, and the one that the paper's order goes by.
        levels = {
            bundle.epoch: (residual_noise(self._cipher(bundle.epoch)), bundle.noise.deviation)
            for bundle in self._ring.only(*epochs).bundles
        }
        if len(set(levels.values())) > 1:
            raise CipherParameterError(
                "Images of epochs with different noise cannot share a denoiser",
                expected="one family and one standard deviation",
                found=", ".join(
                    f"{noise.family} {noise.std:g} in epoch {epoch}" for epoch, (noise, _) in levels.items()
                ),
                remedy="Decrypt the epochs one at a time, each with its own denoiser",
            )


def decrypt_any(
    ring: BundleRing, envelopes: Sequence[bytes], *, allow_targets: Sequence[str] = ()
) -> list[NDArray[np.float32]]:
    """Decrypt envelopes of any epochs in a ring, without denoising; see :class:`RingCipher`.

    Raises
    ------
    EnvelopeError
        As :meth:`RingCipher.decrypt`.
    """
    return RingCipher(ring, allow_targets=allow_targets).decrypt(envelopes)
