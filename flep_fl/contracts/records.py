"""Plain records that cross the borders between rooms."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SealedRecord:
    """One image as it leaves the private database.

    Attributes
    ----------
    record_id
        Random identifier (32 hex digits); says nothing about the image.
    envelope
        The three-layer-encrypted image in its authenticated envelope.
    sealed_label
        The label, sealed under the same key bundle and bound to ``record_id``.
    """

    record_id: str
    envelope: bytes = field(repr=False)
    sealed_label: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ArchiveManifest:
    """What an archive says of itself in the clear: sizes and identifiers, nothing of the images.

    Attributes
    ----------
    site
        The analyst it was sealed for.
    dataset
        Name of the data set.
    key_id, epoch
        Which key bundle opens it.
    train, test
        Number of records per split.
    """

    site: str
    dataset: str
    key_id: str
    epoch: int
    train: int
    test: int


@dataclass(frozen=True, slots=True)
class CloudEvaluation:
    """What the global model scores on a trusted cloud's own images: accuracy 0..1, loss in nats, how many."""

    accuracy: float
    loss: float
    images: int


@dataclass(slots=True)
class SiteFailure:
    """A site that contributed nothing to a round, and the reason code."""

    site: str
    reason: str


@dataclass(slots=True)
class RoundRecord:
    """What a cloud may know of one round.

    Attributes
    ----------
    round
        From 1.
    accuracy, loss, majority_accuracy
        Unweighted mean over the sites that evaluated this round's model (accuracies 0..1); None where
        nobody did.
    bytes_up, bytes_down
        Serialised messages of all sites: this round's updates, and the delivery of this round's sum.
    seconds
        ``train``, ``encrypt``, ``decrypt``: sums over sites; ``aggregate``: the cloud's.
    replied, failed
        Sites whose update is in the sum, and the others with their reason codes.
    error
        Why the round produced no sum (a :class:`~flep_fl.contracts.errors.QuorumError`), else empty.
    attempts
        How often the round was opened: more than once where the cloud or its SuperLink ended in it.
    cloud_accuracy, cloud_loss
        The same on a trusted cloud's own images (``cloud.eval_data``); None without them.
    """

    round: int
    accuracy: float | None = None
    loss: float | None = None
    majority_accuracy: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "encrypt": 0.0, "aggregate": 0.0, "decrypt": 0.0}
    )
    replied: list[str] = field(default_factory=list)
    failed: list[SiteFailure] = field(default_factory=list)
    error: str = ""
    cloud_accuracy: float | None = None
    cloud_loss: float | None = None
    attempts: int = 1
