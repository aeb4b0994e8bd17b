"""What a cloud needs to go on after its process has ended at any moment.

A folder with two files: ``state.bin``, small and signed by the cloud, and the last sum, sealed as the sites
get it. The sum is written first, under a name of its own; the state names it by digest; only then is an older
sum removed. So the state on disk always names a sum that is whole, and no site has been told of a newer one.
There is nothing in either file that the cloud has not sent or received in the open.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts.errors import (
    CheckpointError,
    DamagedCheckpointError,
    FinishedCheckpointError,
    ForeignCheckpointError,
    LayoutError,
    SignatureError,
    UpdateError,
)
from flep_fl.contracts.files import lock_exclusively, read_bytes, remove_unfinished, write_secret
from flep_fl.contracts.records import RoundRecord, SiteFailure
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.seal import (
    checkpoint_fields,
    open_checkpoint,
    seal_checkpoint,
    sum_position,
    verify_kept_sum,
)

FOLDER = "checkpoint"
"""Name of the folder in the cloud's part of the run directory."""

_STATE = "state.bin"
_FORMAT = 1
NEWER = "Resume from the newest copy of the run's folder, or start a new run without resume="
"""The remedy for a checkpoint that does not serve."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands.

    Attributes
    ----------
    federation, run, key_id, config
        What it is a run of: identifiers and the digest of the shared settings.
    round, attempt
        The first round that is not decided yet (one more than the last round where all are), and how often it
        was opened.
    sum_round, sum_digest
        Round and digest of the last sum; 0 and empty before the first.
    layout
        The model's layout as JSON; empty before the sites have joined.
    members, joined, closed
        Sites that were connected when the round was opened, that ever joined, that have closed in order.
    rounds, closing_failures
        Records of the decided rounds, and the sites that did not close in order.
    evaluations
        What each site said of the model of the last sum.
    finished
        Whether the run is over.
    """

    federation: str
    run: str
    key_id: str
    config: str
    round: int
    attempt: int
    sum_round: int = 0
    sum_digest: str = ""
    layout: str = ""
    members: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    rounds: Sequence[RoundRecord] = ()
    closing_failures: Sequence[SiteFailure] = ()
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A run that can be resumed: its state, its layout, and the last sum (None before the first)."""

    folder: Path
    state: RunState
    layout: ModelLayout | None
    sum: bytes | None = field(repr=False)


class CheckpointFolder:
    """The checkpoint of one run; holds the folder's lock for its own life.

    Parameters
    ----------
    folder
        Where it lives; made when missing.
    signing_key
        The cloud's key.

    Raises
    ------
    CheckpointError
        When another process uses the folder.
    """

    def __init__(self, folder: Path, signing_key: Ed25519PrivateKey) -> None:
        self._folder, self._key = folder, signing_key
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_exclusively(folder / "lock")
        except OSError as exc:
            raise CheckpointError(
                f"Another server uses the run in {folder}", remedy="End that server first"
            ) from exc
        remove_unfinished(folder, _STATE, "sum-*.bin")

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)

    def save(self, state: RunState, sealed_sum: bytes | None) -> None:
        """Store the state and the sum that it names (None where that is stored already, or there is none)."""
        if sealed_sum is not None:
            write_secret(self._folder / _sum_name(state.sum_round), sealed_sum)
        fields = {"format": _FORMAT, **asdict(state)}
        write_secret(self._folder / _STATE, seal_checkpoint(fields, self._key))
        keep = "" if state.finished else _sum_name(state.sum_round)
        for path in self._folder.glob("sum-*.bin"):
            if path.name != keep:
                path.unlink(missing_ok=True)


def find_checkpoint(resume: Path) -> Path:
    """Return the checkpoint's folder below a run's output folder, or below its ``cloud/``.

    Raises
    ------
    CheckpointError
        When there is none.
    """
    resume = resume.resolve()
    for cloud in (resume / "cloud", resume):  # a run's own folder may have that name as well
        if cloud.name == "cloud" and (cloud / FOLDER / _STATE).is_file():
            return cloud / FOLDER
    raise CheckpointError(
        f"There is no checkpoint of a run in {resume}",
        expected=f"cloud/{FOLDER}/{_STATE} in the output folder of an earlier `python -m server`",
        remedy="Check resume=DIR. A server that ended before its sites were asked for leaves none: start it "
        "without resume=",
    )


def load_checkpoint(
    folder: Path, *, federation: str, key_id: str, config: str, cloud_key: Ed25519PublicKey
) -> SavedRun:
    """Read a checkpoint and hold it against the cloud's own kit.

    Parameters
    ----------
    folder
        The checkpoint's folder, from :func:`find_checkpoint`.
    federation, key_id, config
        What the kit says: identifiers and the digest of the shared settings.
    cloud_key
        The cloud's public key.

    Raises
    ------
    ForeignCheckpointError
        It was written with another kit, or before keys or settings were changed.
    DamagedCheckpointError
        A file is missing, cut, altered or not in the format of this release.
    FinishedCheckpointError
        The run is over.
    """
    state = _read_state(folder, federation, cloud_key)
    for name, expected in (("key_id", key_id), ("config", config)):
        found = getattr(state, name)
        if found != expected:
            what = "the model key" if name == "key_id" else "the shared settings"
            raise ForeignCheckpointError(
                f"The run in {folder} was started with other kits: {what} differ",
                expected=expected[:16],
                found=found[:16],
                remedy="Resume with the kit that started the run, or start a new run without resume=",
            )
    if state.finished:
        raise FinishedCheckpointError(
            f"The run in {folder} is over: all {len(state.rounds)} rounds are done",
            remedy="Start a new run without resume=",
        )
    try:
        layout = ModelLayout.from_json(state.layout) if state.layout else None
    except LayoutError as exc:
        raise _damaged(folder / _STATE, "its layout is not one") from exc
    return SavedRun(folder, state, layout, _read_sum(folder, state, cloud_key))


def _read_state(folder: Path, federation: str, cloud_key: Ed25519PublicKey) -> RunState:
    path = folder / _STATE
    blob = read_bytes(path, what="The run's state", error=DamagedCheckpointError)
    try:
        found = checkpoint_fields(blob).get("federation")
        if found != federation:
            raise ForeignCheckpointError(
                f"The run in {folder} belongs to another federation",
                expected=federation,
                found=found,
                remedy="Use the kit that the run was started with",
            )
        fields = open_checkpoint(blob, cloud_key)
    except SignatureError as exc:
        raise _damaged(path, "it was altered, or written by another cloud") from exc
    except UpdateError as exc:
        raise _damaged(path, exc.problem) from exc
    if fields.pop("format", None) != _FORMAT:
        raise _damaged(path, "it is not in the format of this release")
    try:
        return _parse(fields)
    except (TypeError, ValueError, AttributeError, KeyError) as exc:
        raise _damaged(path, "it is not in the format of this release") from exc


def _parse(fields: dict[str, Any]) -> RunState:
    """Rebuild the state from what this cloud has signed."""
    rounds = [
        RoundRecord(**{**entry, "failed": [SiteFailure(**failure) for failure in entry["failed"]]})
        for entry in fields.pop("rounds")
    ]
    failures = [SiteFailure(**failure) for failure in fields.pop("closing_failures")]
    names: dict[str, Any] = {name: tuple(fields.pop(name)) for name in ("members", "joined", "closed")}
    state = RunState(rounds=rounds, closing_failures=failures, **names, **fields)
    least = {"round": 1, "attempt": 0, "sum_round": 0}
    if any(
        type(getattr(state, name)) is not int or getattr(state, name) < low for name, low in least.items()
    ):
        raise ValueError("a number is out of range")
    if [record.round for record in state.rounds] != list(range(1, state.round)):
        raise ValueError("a round is missing")
    return state


def _read_sum(folder: Path, state: RunState, cloud_key: Ed25519PublicKey) -> bytes | None:
    if not state.sum_round:
        return None
    path = folder / _sum_name(state.sum_round)
    if not path.exists():
        raise _damaged(path, "it is missing")
    blob = read_bytes(path, what="The last sum", error=DamagedCheckpointError)
    try:
        digest = verify_kept_sum(blob, cloud_key)
        same = (digest, *sum_position(blob)) == (state.sum_digest, state.run, state.sum_round)
    except UpdateError as exc:
        raise _damaged(path, exc.problem) from exc
    if not same:
        raise _damaged(path, "it is another sum than the state names")
    return blob


def _sum_name(number: int) -> str:
    return f"sum-{number:06d}.bin"


def _damaged(path: Path, problem: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} cannot be resumed from: {problem}", remedy=NEWER)
