"""Named choices of layers, and the registry that further ciphers join."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.contracts.ports import Entropy, ImageCipher
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle
from flep_fl.data_security.pipeline import RestoreOrder, ThreeLayerCipher


class CipherFactory(Protocol):
    """Builds a cipher from a key bundle."""

    def __call__(
        self, bundle: ImageKeyBundle, *, noise_secret: bytes | None = None, entropy: Entropy = ...
    ) -> ImageCipher:
        """Return the cipher."""
        ...


@dataclass(frozen=True, slots=True)
class Preset:
    """A named cipher.

    Attributes
    ----------
    parameters
        Default parameters of its bundles.
    summary
        What it is, in one sentence.
    restore_order
        The order in which it is meant to be restored.
    factory
        What builds it; any class behind the ``ImageCipher`` protocol.
    """

    parameters: CipherParameters
    summary: str
    restore_order: RestoreOrder = "restore_first"
    factory: CipherFactory = field(default=ThreeLayerCipher)


CIPHERS: dict[str, Preset] = {}
"""Ciphers by name; :func:`register_cipher` adds to it."""


def register_cipher(name: str, preset: Preset) -> None:
    """Add a cipher under a new name.

    Raises
    ------
    CipherParameterError
        When the name is taken.
    """
    if name in CIPHERS:
        raise CipherParameterError("cipher is already registered", found=repr(name))
    CIPHERS[name] = preset


def get_preset(name: str) -> Preset:
    """Look a cipher up.

    Raises
    ------
    CipherParameterError
        When there is no cipher of that name.
    """
    if name not in CIPHERS:
        raise CipherParameterError(
            "cipher is not a known choice", expected=f"one of {', '.join(CIPHERS)}", found=repr(name)
        )
    return CIPHERS[name]


def build_cipher(
    bundle: ImageKeyBundle,
    *,
    name: str = "flep",
    noise_secret: bytes | None = None,
    entropy: Entropy = secrets.token_bytes,
) -> ImageCipher:
    """Build the cipher ``name`` for a key bundle; the bundle's own parameters choose the layers.

    Raises
    ------
    CipherParameterError
        When the name is unknown or the noise secret too short.
    """
    return get_preset(name).factory(bundle, noise_secret=noise_secret, entropy=entropy)


register_cipher("flep", Preset(CipherParameters(), "All layers: scramble, encode, noise, mask, envelope."))
register_cipher(
    "paper",
    Preset(
        CipherParameters(layers=("scramble", "encode", "noise", "envelope"), noise_units="wire"),
        "The paper's three steps literally, denoised first. The paper has no envelope: it is kept so that "
        "records stay authenticated, and statistics are taken before it.",
        restore_order="denoise_first",
    ),
)
register_cipher(
    "aead", Preset(CipherParameters(layers=("envelope",)), "AES-256-GCM-SIV alone, the baseline.")
)
register_cipher(
    "none",
    Preset(CipherParameters(layers=()), "No encryption: a readable container with a checksum, for tests."),
)
