"""The image key bundle: what an analyst needs to open the images of one owner and epoch.

The paper's "group keys" are the pair (sequence key, b) of one epoch: here the scramble sub-key, derived from
the master key for every image, and ``CipherParameters.block_side``. Its "regularly changed" group keys are
epochs: :meth:`ImageKeyBundle.rotate` draws the next one, :mod:`flep_fl.data_security.epochs` keeps several.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError, ImageKeyError
from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.parameters import LAYERS, CipherParameters, NoiseParameters
from flep_fl.data_security.stream import KEY_BYTES, derive_key, keystream

__all__ = [
    "LAYERS",
    "CipherParameters",
    "ImageKeyBundle",
    "LayerKeys",
    "NoiseParameters",
    "owner_noise_commitment",
    "owner_noise_key",
]

BUNDLE_VERSION = 1
KEY_ID_BYTES = 16
SECRET_IMAGE_SIDE = 256
SECRET_IMAGES = 2
MAX_SECRET_SIDE = 4096
MIN_NOISE_SECRET = 16
LAST_EPOCH = (1 << 32) - 1
DEFAULT_CIPHER = "flep"

_MAGIC = b"FLEPKEY\x00"
_PREFIX = struct.Struct(">8sBI")
_DIGEST_BYTES = 32
_DOMAIN = b"flep-fl/v1/"
_CIPHER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True, repr=False)
class LayerKeys:
    """Keys of one image, one per layer, 32 bytes each."""

    scramble: bytes
    encode: bytes
    noise: bytes
    mask: bytes


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ImageKeyBundle:
    """Everything that opens the images of one owner and epoch, except the owner's noise secret.

    Attributes
    ----------
    master_key
        32 bytes, uniformly random.
    epoch
        Number of the key epoch, 1 or more.
    cipher, noise
        Parameters of the layers.
    secret_images
        uint8 (h, w) arrays with even sides in 2..4096, read-only.
    cipher_name
        Which cipher the images were sealed with: a preset, or a class of somebody's own by dotted name.
        It is data, never permission: a reader imports nothing that its own settings do not allow.
    version
        Format version of the bundle.
    key_id
        32 hex digits, HKDF of the master key with a digest of every other field but the epoch as context:
        a bundle with another alpha or secret image is another bundle, and opens nothing of this one.

    Raises
    ------
    CipherParameterError
        When a field is outside its valid set.
    """

    master_key: bytes
    epoch: int
    cipher: CipherParameters
    noise: NoiseParameters
    secret_images: tuple[NDArray[np.uint8], ...]
    cipher_name: str = DEFAULT_CIPHER
    version: int = BUNDLE_VERSION
    key_id: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.master_key, bytes) or len(self.master_key) != KEY_BYTES:
            raise CipherParameterError("The master key has the wrong length", expected="32 bytes")
        if type(self.epoch) is not int or not 1 <= self.epoch <= LAST_EPOCH:
            raise CipherParameterError(
                "epoch is out of range", expected=f"an integer in 1..{LAST_EPOCH}", found=repr(self.epoch)
            )
        if not isinstance(self.cipher_name, str) or not _CIPHER_NAME.fullmatch(self.cipher_name):
            raise CipherParameterError(
                "cipher.name is not a name",
                expected="1 to 128 letters, digits, dots, hyphens and underscores",
                found=repr(self.cipher_name),
            )
        if self.version != BUNDLE_VERSION:
            raise CipherParameterError("Unknown bundle version", expected=BUNDLE_VERSION, found=self.version)
        object.__setattr__(self, "secret_images", tuple(_frozen_image(image) for image in self.secret_images))
        if not self.secret_images:
            raise CipherParameterError("secret_images is empty", expected="at least one image")
        context = hashlib.sha256(self._description())
        for image in self.secret_images:
            context.update(image.tobytes())
        identifier = derive_key(self.master_key, _DOMAIN + b"key-id/" + context.digest(), length=KEY_ID_BYTES)
        object.__setattr__(self, "key_id", identifier.hex())

    @classmethod
    def generate(
        cls,
        params: CipherParameters,
        noise: NoiseParameters,
        *,
        epoch: int = 1,
        entropy: Entropy = secrets.token_bytes,
        secret_images: Sequence[NDArray[np.uint8]] | None = None,
        cipher_name: str = DEFAULT_CIPHER,
    ) -> ImageKeyBundle:
        """Make a bundle with a fresh master key.

        Parameters
        ----------
        params, noise
            Parameters of the layers.
        epoch
            Number of the key epoch.
        entropy
            Source of randomness; anything but ``secrets.token_bytes`` is for tests.
        secret_images
            The owner's own secret images; by default two of 256 x 256 uniform pixels, the
            choice that hides most (a photograph has near-empty detail bands).
        cipher_name
            Name of the cipher that seals under this bundle.
        """
        master_key = entropy(KEY_BYTES)
        if secret_images is None:
            side = SECRET_IMAGE_SIDE
            secret_images = [
                keystream(entropy(KEY_BYTES), side * side).reshape(side, side) for _ in range(SECRET_IMAGES)
            ]
        return cls(master_key, epoch, params, noise, tuple(secret_images), cipher_name)

    def rotate(
        self,
        *,
        params: CipherParameters | None = None,
        noise: NoiseParameters | None = None,
        secret_images: Sequence[NDArray[np.uint8]] | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> ImageKeyBundle:
        """Make the bundle of the next epoch: a fresh master key, drawn and not derived from this one.

        So whoever steals the bundle of one epoch opens that epoch, and neither the ones before nor the ones
        after it. This bundle still opens what was sealed under it.

        Parameters
        ----------
        params, noise
            New parameters (the paper changes the block side along with the key); those of this bundle by
            default.
        secret_images
            The owner's own; fresh uniform ones by default, because without the mask a secret image that
            two epochs share helps the holder of one to read the other.
        entropy
            Source of randomness; anything but ``secrets.token_bytes`` is for tests.

        Raises
        ------
        CipherParameterError
            After the last epoch, or when a secret image is unusable.
        """
        return ImageKeyBundle.generate(
            self.cipher if params is None else params,
            self.noise if noise is None else noise,
            epoch=self.epoch + 1,
            entropy=entropy,
            secret_images=secret_images,
            cipher_name=self.cipher_name,
        )

    # --- sub-keys -----------------------------------------------------------------------------------

    def subkey(self, label: str) -> bytes:
        """Return the 32-byte sub-key for a fixed label ("mac", "envelope", "label", ...)."""
        return derive_key(self.master_key, _DOMAIN + b"subkey/" + label.encode())

    def layer_keys(self, iv: bytes) -> LayerKeys:
        """Return the layer keys of the image whose synthetic IV is ``iv``."""
        return LayerKeys(
            *(
                derive_key(self.master_key, _DOMAIN + b"layer/" + layer, salt=iv)
                for layer in (b"scramble", b"encode", b"noise", b"mask")
            )
        )

    # --- serialisation ------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Serialise the bundle, secrets included; the result is as secret as the master key."""
        description = self._description(epoch=self.epoch)
        body = b"".join(
            [
                _PREFIX.pack(_MAGIC, self.version, len(description)),
                description,
                self.master_key,
                *(image.tobytes() for image in self.secret_images),
            ]
        )
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageKeyBundle:
        """Read a bundle; only the exact output of :meth:`to_bytes` is accepted.

        Raises
        ------
        ImageKeyError
            When the data is truncated, altered, of another version or not a bundle.
        CipherParameterError
            When a parameter is outside its valid set.
        """
        if not isinstance(data, bytes):
            raise ImageKeyError(
                "An image key bundle has the wrong type", expected="bytes", found=type(data).__name__
            )
        if len(data) < _PREFIX.size + KEY_BYTES + _DIGEST_BYTES or data[: len(_MAGIC)] != _MAGIC:
            raise ImageKeyError("This is not an image key bundle", remedy="Ask the data owner for it again")
        _, version, length = _PREFIX.unpack_from(data)
        if version != BUNDLE_VERSION:
            raise ImageKeyError(
                "The image key bundle has an unknown version",
                expected=BUNDLE_VERSION,
                found=version,
                remedy="Install the release that wrote it",
            )
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if not hmac.compare_digest(hashlib.sha256(body).digest(), digest):
            raise _damaged("its checksum does not match")
        start = _PREFIX.size + length
        fields = _read_description(body[_PREFIX.size : start])
        master_key, pixels = body[start : start + KEY_BYTES], body[start + KEY_BYTES :]
        shapes = fields["secret_images"]
        if len(master_key) != KEY_BYTES or len(pixels) != sum(height * width for height, width in shapes):
            raise _damaged("its length does not match its description")
        images, offset = [], 0
        for height, width in shapes:
            image = np.frombuffer(pixels, np.uint8, height * width, offset)
            images.append(image.reshape(height, width))
            offset += height * width
        try:
            cipher = CipherParameters(**_without_lists(fields["cipher"]))
            noise = NoiseParameters(**_without_lists(fields["noise"]))
        except TypeError as exc:
            raise _damaged("a parameter is missing, unknown or of the wrong type") from exc
        bundle = cls(master_key, fields["epoch"], cipher, noise, tuple(images), fields["cipher_name"])
        if not hmac.compare_digest(bundle.to_bytes(), data):
            raise _damaged("it is not in canonical form")
        return bundle

    def _description(self, **extra: object) -> bytes:
        """Return the public fields as canonical JSON."""
        fields = {
            "cipher": asdict(self.cipher),
            "cipher_name": self.cipher_name,
            "noise": asdict(self.noise),
            "secret_images": [list(image.shape) for image in self.secret_images],
            **extra,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageKeyBundle):
            return NotImplemented
        return hmac.compare_digest(self.to_bytes(), other.to_bytes())

    def __hash__(self) -> int:
        return hash((self.key_id, self.epoch))

    def __repr__(self) -> str:
        return (
            f"ImageKeyBundle(key_id={self.key_id!r}, epoch={self.epoch}, cipher_name={self.cipher_name!r}, "
            f"cipher={self.cipher!r}, noise={self.noise!r}, master_key=<hidden>, "
            f"secret_images=<{len(self.secret_images)} hidden>)"
        )


def owner_noise_key(noise_secret: bytes, iv: bytes) -> bytes:
    """Return the noise key of one image, from the owner's secret that no bundle holds."""
    return derive_key(noise_secret, _DOMAIN + b"owner-noise", salt=iv)


def owner_noise_commitment(noise_secret: bytes) -> bytes:
    """Return the value that ties synthetic IVs to the owner's noise secret.

    Without it, one image under two noise secrets and one nonce would get the same mask, and the two
    envelopes would give away the difference of the noise.

    Raises
    ------
    CipherParameterError
        When the secret is shorter than 16 bytes.
    """
    if not isinstance(noise_secret, bytes) or len(noise_secret) < MIN_NOISE_SECRET:
        raise CipherParameterError(
            "The owner's noise secret is too short",
            expected=f"at least {MIN_NOISE_SECRET} random bytes",
            remedy="Draw it with secrets.token_bytes(32)",
        )
    return derive_key(noise_secret, _DOMAIN + b"owner-noise-commitment")


def _frozen_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 2:
        raise CipherParameterError(
            "A secret image has the wrong type", expected="a uint8 array of two dimensions"
        )
    if any(side % 2 or not 2 <= side <= MAX_SECRET_SIDE for side in image.shape):
        raise CipherParameterError(
            "A secret image has the wrong size",
            expected=f"even sides in 2..{MAX_SECRET_SIDE}",
            found=f"{image.shape[0]} x {image.shape[1]}",
        )
    frozen = np.array(image, order="C")
    frozen.flags.writeable = False
    return frozen


def _read_description(text: bytes) -> dict[str, Any]:
    """Parse the JSON part of a bundle and check its types; values are checked by the classes they go to."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _damaged("its description does not parse") from exc
    if not isinstance(fields, dict) or set(fields) != {
        "cipher",
        "cipher_name",
        "noise",
        "secret_images",
        "epoch",
    }:
        raise _damaged("a field is missing or unknown")
    cipher, noise, shapes = fields["cipher"], fields["noise"], fields["secret_images"]
    if not isinstance(cipher, dict) or not isinstance(noise, dict) or not isinstance(shapes, list):
        raise _damaged("a field has the wrong type")
    for shape in shapes:
        if not isinstance(shape, list) or len(shape) != 2 or not all(_is_side(side) for side in shape):
            raise _damaged("a secret image has an impossible size")
    return fields


def _without_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into the tuples that the parameter classes hold."""

    def frozen(value: object) -> object:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in fields.items()}


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= MAX_SECRET_SIDE


def _damaged(reason: str) -> ImageKeyError:
    return ImageKeyError(
        f"The image key bundle is damaged: {reason}", remedy="Ask the data owner for it again"
    )
