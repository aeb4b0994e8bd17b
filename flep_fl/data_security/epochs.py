"""The key bundles of one owner over time, one per epoch: the newest seals, each opens what it sealed.

The paper changes its "group keys", the pair (sequence key, b), from time to time. An epoch is the life of one
such pair and of everything else in an :class:`~flep_fl.data_security.keys.ImageKeyBundle`. Master keys are
drawn afresh, so a stolen bundle opens its own epoch alone. The price is that old bundles have to be kept as
long as their records are: that is what a ring is for.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import CipherParameterError, ImageKeyError, WrongImageKeyError
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.envelope import parse_header
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import sealed_under

RING_VERSION = 1
_MAGIC = b"FLEPRING"
_PREFIX = struct.Struct(">8sBI")
_LENGTH = struct.Struct(">I")
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, repr=False)
class BundleRing:
    """Key bundles of several epochs of one owner.

    Attributes
    ----------
    bundles
        At least one, in ascending order of epochs whatever the order given; epochs and keys all differ.

    Raises
    ------
    CipherParameterError
        When there is no bundle, or two share an epoch or a master key.
    """

    bundles: tuple[ImageKeyBundle, ...]

    def __post_init__(self) -> None:
        if not self.bundles:
            raise CipherParameterError("A ring of key bundles is empty", expected="at least one bundle")
        object.__setattr__(self, "bundles", tuple(sorted(self.bundles, key=lambda bundle: bundle.epoch)))
        if len(set(self.epochs)) != len(self.bundles):
            raise CipherParameterError(
                "A ring of key bundles names an epoch twice", found=f"epochs {_listed(self.epochs)}"
            )
        if len({hashlib.sha256(bundle.master_key).digest() for bundle in self.bundles}) != len(self.bundles):
            raise CipherParameterError(
                "Two epochs of a ring share a master key",
                expected="a key of its own for every epoch",
                remedy="Make epochs with rotate()",
            )

    @property
    def newest(self) -> ImageKeyBundle:
        """The bundle of the last epoch: the one to seal with."""
        return self.bundles[-1]

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs in the ring, ascending."""
        return tuple(bundle.epoch for bundle in self.bundles)

    def __len__(self) -> int:
        return len(self.bundles)

    def __repr__(self) -> str:
        held = ", ".join(f"{bundle.epoch}: {bundle.key_id}" for bundle in self.bundles)
        return f"BundleRing({held}, keys=<hidden>)"

    # --- choosing -----------------------------------------------------------------------------------

    def get(self, key_id: str, epoch: int) -> ImageKeyBundle:
        """Return the bundle of this key id and epoch.

        Raises
        ------
        WrongImageKeyError
            When the ring has none that matches both; the message says which of them it lacks.
        """
        for bundle in self.bundles:
            same_key = bundle.key_id == key_id  # both are public
            if same_key and bundle.epoch == epoch:
                return bundle
            if same_key or bundle.epoch == epoch:
                raise WrongImageKeyError(
                    "This was sealed under another key bundle than the one of that epoch",
                    expected=f"key {bundle.key_id} epoch {bundle.epoch}",
                    found=f"key {key_id} epoch {epoch}",
                    remedy="Ask the data owner whose records these are",
                )
        raise WrongImageKeyError(
            "This was sealed in an epoch that is not in the ring",
            expected=f"an epoch out of {_listed(self.epochs)}",
            found=f"key {key_id} epoch {epoch}",
            remedy="Ask the data owner for the bundle of that epoch",
        )

    def for_envelope(self, envelope: bytes) -> ImageKeyBundle:
        """Return the bundle that an image envelope names in its header.

        The header is not authenticated before the envelope is opened: this chooses a key, no more.

        Raises
        ------
        EnvelopeError
            When that is not an image envelope (:class:`WrongImageKeyError` when the ring lacks its bundle,
            :class:`EnvelopeVersionError` for another format version).
        """
        header = parse_header(envelope)
        return self.get(header.key_id, header.epoch)

    def for_label(self, sealed: bytes) -> ImageKeyBundle:
        """Return the bundle that a sealed label or blob names; raises as :meth:`for_envelope`."""
        return self.get(*sealed_under(sealed))

    # --- changing -----------------------------------------------------------------------------------

    def rotate(
        self,
        *,
        params: CipherParameters | None = None,
        noise: NoiseParameters | None = None,
        secret_images: Sequence[NDArray[np.uint8]] | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> BundleRing:
        """Return a ring with one more epoch after the newest; see :meth:`ImageKeyBundle.rotate`."""
        fresh = self.newest.rotate(params=params, noise=noise, secret_images=secret_images, entropy=entropy)
        return BundleRing((*self.bundles, fresh))

    def only(self, *epochs: int) -> BundleRing:
        """Return a ring of these epochs alone: what somebody gets who may read just them.

        Raises
        ------
        ImageKeyError
            When the ring lacks one of them.
        """
        if missing := sorted(set(epochs) - set(self.epochs)):
            raise ImageKeyError(
                "The ring lacks an epoch",
                expected=f"epochs out of {_listed(self.epochs)}",
                found=f"epoch {_listed(missing)}",
            )
        return BundleRing(tuple(bundle for bundle in self.bundles if bundle.epoch in epochs))

    # --- serialisation ------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Serialise the ring, secrets included; for :func:`save_ring`, or to be wrapped for a recipient."""
        parts = [_PREFIX.pack(_MAGIC, RING_VERSION, len(self.bundles))]
        for bundle in self.bundles:
            data = bundle.to_bytes()
            parts += [_LENGTH.pack(len(data)), data]
        body = b"".join(parts)
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> BundleRing:
        """Read a ring; only the exact output of :meth:`to_bytes` is accepted.

        Raises
        ------
        ImageKeyError
            When the data is truncated, altered, of another version or not a ring.
        CipherParameterError
            When a parameter of a bundle is outside its valid set, or bundles do not fit together.
        """
        if (
            not isinstance(data, bytes)
            or len(data) < _PREFIX.size + _DIGEST_BYTES
            or data[: len(_MAGIC)] != _MAGIC
        ):
            raise ImageKeyError("This is not a ring of key bundles", remedy="Check which file this is")
        _, version, count = _PREFIX.unpack_from(data)
        if version != RING_VERSION:
            raise ImageKeyError(
                "The ring of key bundles has an unknown version",
                expected=RING_VERSION,
                found=version,
                remedy="Install the release that wrote it",
            )
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if not hmac.compare_digest(hashlib.sha256(body).digest(), digest):
            raise _damaged("its checksum does not match")
        bundles: list[ImageKeyBundle] = []
        offset = _PREFIX.size
        while offset < len(body):
            if len(body) - offset < _LENGTH.size:
                raise _damaged("its length does not match its description")
            (length,) = _LENGTH.unpack_from(body, offset)
            offset += _LENGTH.size
            bundles.append(ImageKeyBundle.from_bytes(body[offset : offset + length]))
            offset += length
        ring = cls(tuple(bundles))
        if count != len(bundles) or not hmac.compare_digest(ring.to_bytes(), data):
            raise _damaged("it is not in canonical form")
        return ring


def save_ring(path: Path, ring: BundleRing) -> None:
    """Write a ring to a file that its owner alone may read (0600), whole or not at all.

    A ring that is there already is replaced only by one that holds all its bundles: losing a bundle makes
    the records of its epoch unreadable for good, and a rotation that ran twice would give one epoch two keys.

    Raises
    ------
    ImageKeyError
        When the file holds a bundle that ``ring`` lacks, or is not a ring.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two rotations at once must not both find that nothing is lost.
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _refuse_loss(path, ring)
        write_secret(path, ring.to_bytes())
    finally:
        os.close(lock)


def _refuse_loss(path: Path, ring: BundleRing) -> None:
    if not path.exists():
        return
    kept = {(bundle.epoch, bundle.key_id) for bundle in ring.bundles}
    lost = [bundle for bundle in load_ring(path).bundles if (bundle.epoch, bundle.key_id) not in kept]
    if lost:
        raise ImageKeyError(
            f"{path} holds key bundles that would be lost",
            found=", ".join(f"epoch {bundle.epoch} key {bundle.key_id}" for bundle in lost),
            remedy="Load the ring from the file and rotate that one",
        )


def load_ring(path: Path) -> BundleRing:
    """Read a ring that :func:`save_ring` wrote.

    Raises
    ------
    ImageKeyError
        When the file is missing, damaged or something else.
    """
    return BundleRing.from_bytes(read_bytes(path, what="The ring of key bundles", error=ImageKeyError))


def _listed(epochs: Sequence[int]) -> str:
    return ", ".join(str(epoch) for epoch in epochs)


def _damaged(reason: str) -> ImageKeyError:
    return ImageKeyError(
        f"The ring of key bundles is damaged: {reason}", remedy="Restore it from the owner's backup"
    )
