"""Named choices of layers, the registry that further ciphers join, and ciphers of a user's own.

Any cipher is one class behind :class:`~flep_fl.contracts.ports.ImageCipher`, made by a
:class:`CipherFactory`. It is named by its preset, or by a dotted name that leads to the class or to a
:class:`Preset`; the key bundle carries the name, so both sides build the same cipher.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flep_fl.contracts.errors import CipherParameterError, TargetError
from flep_fl.contracts.ports import Entropy, ImageCipher
from flep_fl.contracts.targets import import_target
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


def get_preset(name: str, *, allow_targets: Sequence[str] = ()) -> Preset:
    """Look a cipher up by its registered name, or import it by its dotted one.

    A class that is imported gets bundles without layers: they are its own affair. A dotted name that leads
    to a :class:`Preset` brings its own parameters.

    Parameters
    ----------
    name
        "flep", a name given to :func:`register_cipher`, or ``package.module.Class``.
    allow_targets
        Prefixes of the dotted names that may be imported, from the caller's own configuration.

    Raises
    ------
    CipherParameterError
        When there is no cipher of that name.
    TargetError
        When a dotted name is not allowed, does not import, or leads to no cipher.
    """
    if name in CIPHERS:
        return CIPHERS[name]
    if "." not in name:
        raise CipherParameterError(
            "cipher is not a known choice",
            expected=f"one of {', '.join(CIPHERS)}, or the dotted name of a class",
            found=repr(name),
        )
    target = import_target(name, allow_targets, field="cipher.name")
    if isinstance(target, Preset):
        return target
    if not callable(target):
        raise TargetError(
            f"cipher.name={name} is no cipher",
            expected="a class or a Preset",
            found=f"an object of type {type(target).__name__}",
        )
    return Preset(CipherParameters(layers=()), f"A cipher of one's own, {name}.", factory=target)


def build_cipher(
    bundle: ImageKeyBundle,
    *,
    noise_secret: bytes | None = None,
    entropy: Entropy = secrets.token_bytes,
    allow_targets: Sequence[str] = (),
) -> ImageCipher:
    """Build the cipher that a key bundle names; the bundle's own parameters choose the layers.

    Parameters
    ----------
    bundle
        The key bundle.
    noise_secret
        The owner's; see :class:`~flep_fl.data_security.pipeline.ThreeLayerCipher`.
    entropy
        Source of nonces; anything but ``secrets.token_bytes`` is for tests and simulation.
    allow_targets
        As for :func:`get_preset`: the bundle's word is not enough to import anything.

    Raises
    ------
    CipherParameterError
        When the name is unknown or the noise secret too short.
    TargetError
        When the name is a dotted one that is not allowed, does not import, or leads to no cipher.
    """
    factory = get_preset(bundle.cipher_name, allow_targets=allow_targets).factory
    try:
        inspect.signature(factory).bind(bundle, noise_secret=noise_secret, entropy=entropy)
    except TypeError as exc:
        raise TargetError(
            f"The cipher {bundle.cipher_name} cannot be made from a key bundle",
            expected="a signature (bundle, *, noise_secret, entropy)",
            found=str(exc),
        ) from exc
    cipher = factory(bundle, noise_secret=noise_secret, entropy=entropy)
    missing = [name for name in ("encrypt", "decrypt") if not callable(getattr(cipher, name, None))]
    if missing:
        raise TargetError(f"The cipher {bundle.cipher_name} has no method {' and no '.join(missing)}")
    return cipher


register_cipher(
    "flep",
    # Six bits a detail cost nothing beside noise, and leave above 50 dB without: docs/cipher.md.
    Preset(CipherParameters(bits=(8, 6, 6, 6)), "All layers: scramble, encode, noise, mask, envelope."),
)
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
