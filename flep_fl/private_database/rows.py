"""What the rows of the private database mean once they are opened."""

from __future__ import annotations

from dataclasses import dataclass, field

from flep_fl.contracts.errors import RecordError
from flep_fl.contracts.owner_records import OwnerImage
from flep_fl.private_database.sealing import Tags


@dataclass(frozen=True, slots=True)
class PlainRecord:
    """One record as the owner sees it.

    Attributes
    ----------
    record_id
        32 hex digits, random.
    image
        uint8 or uint16, shape (H, W) or (C, H, W), read-only.
    tags
        Everything else that is known of it.
    """

    record_id: str
    image: OwnerImage = field(repr=False)
    tags: Tags = field(repr=False)

    @property
    def label(self) -> int:
        """Class index.

        Raises
        ------
        RecordError
            The record has no label yet.
        """
        if self.tags.label is None:
            raise RecordError(f"record {self.record_id} has no label yet", remedy="Label it first")
        return self.tags.label

    @property
    def split(self) -> str:
        """Either "train" or "test"."""
        return self.tags.split


@dataclass(frozen=True, slots=True)
class RecordTags:
    """Identifier, class index (None: not known yet) and split of a record, without its pixels."""

    record_id: str
    label: int | None = field(repr=False)
    split: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set's row, opened.

    Attributes
    ----------
    number
        Row number.
    name, classes, test_fraction
        As given when it was added; records that come without a split are held out at ``test_fraction``.
    epoch
        Current key epoch; 0 while it has no key bundle.
    releases
        How many snapshots were made of it.
    noise_secret
        Of the image cipher; no bundle holds it.
    """

    number: int
    name: str
    classes: tuple[str, ...]
    test_fraction: float
    epoch: int
    releases: int
    noise_secret: bytes | None = field(repr=False)
