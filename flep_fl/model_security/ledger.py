"""What a site remembers across restarts, so that it never signs a round twice or goes back.

Two different uploads under one round would let the cloud cancel the check values; an old sum accepted again
would roll the model back. The ledger is one small file beside the last upload and the last accepted sum; a
lock keeps a second process of the same kit away.

Order of writing: an upload or a sum is on disk before the ledger names it. A process that ends in between
leaves a file that is one step ahead, and the next process takes that step (:meth:`Ledger.upload_of`,
:meth:`Ledger.kept_sum`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flep_fl.contracts.errors import KitError, StaleUpdateError
from flep_fl.contracts.files import lock_exclusively, read_bytes, remove_unfinished, write_secret
from flep_fl.model_security.seal import parse_header, signed_header, sum_digest, sum_position

SUM_FILE = "sum.bin"
"""Name of the last accepted sum in a site's folder."""


@dataclass(frozen=True, slots=True)
class Entries:
    """The ledger's content.

    Attributes
    ----------
    run
        The current run; empty before the first.
    past
        Runs that this site has left; none of them can come back.
    headers
        What this site signed in the current run: header (hexadecimal) by round.
    accepted, accepted_round
        Digest and round of the last accepted sum; empty and 0 before the first.
    """

    run: str = ""
    past: tuple[str, ...] = ()
    headers: dict[int, str] = field(default_factory=dict)
    accepted: str = ""
    accepted_round: int = 0


class Ledger:
    """The ledger of one site; holds the folder's lock for its own life.

    Parameters
    ----------
    folder
        Where it lives; made when missing.

    Raises
    ------
    KitError
        When another process uses the same kit, or the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_exclusively(folder / "lock")
        except OSError as exc:
            raise KitError(
                f"Another process uses the kit with {folder}", remedy="Run one `python -m clients` per kit"
            ) from exc
        remove_unfinished(folder, "ledger.json", "upload.bin", SUM_FILE, "figures.json")
        try:
            self.entries = self._read()
        except KitError:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)

    @property
    def signed_round(self) -> int:
        """The last round that this site signed in the current run; 0 before the first."""
        return max(self.entries.headers, default=0)

    def enter(self, run: str) -> bool:
        """Enter a run; return whether it is a new one.

        Raises
        ------
        StaleUpdateError
            When this site has left that run before (a replay).
        """
        old = self.entries
        if run == old.run:
            return False
        if run in old.past:
            raise StaleUpdateError("A past run was announced again", found=run)
        self._write(Entries(run=run, past=(*old.past, old.run) if old.run else old.past))
        return True

    def upload_of(self, number: int) -> bytes | None:
        """Return the upload that was made for a round of the current run, or None if there is none.

        Raises
        ------
        StaleUpdateError
            When the round lies before the last one that this site signed.
        """
        blob = self._upload()
        if blob is not None:
            header = parse_header(signed_header(blob))
            if (header.run, header.round) == (self.entries.run, number):
                if number not in self.entries.headers:
                    # The process ended between writing the upload and writing the ledger.
                    self._write_header(number, blob)
                return blob
        if number <= self.signed_round:
            raise StaleUpdateError(
                "A past round was opened again", expected=f"after {self.signed_round}", found=number
            )
        return None

    def record_upload(self, number: int, blob: bytes) -> None:
        """Keep an upload before it leaves; the upload first, so that a crash in between loses nothing."""
        write_secret(self._folder / "upload.bin", blob)
        self._write_header(number, blob)

    def record_sum(self, blob: bytes) -> None:
        """Keep a sealed sum that has passed every check, and remember that it was accepted."""
        write_secret(self._folder / SUM_FILE, blob)
        self.confirm_sum(blob)

    def confirm_sum(self, blob: bytes) -> None:
        """Remember that the sum in ``sum.bin`` was accepted."""
        old = self.entries
        _, number = sum_position(blob)
        self._write(Entries(old.run, old.past, old.headers, sum_digest(blob), number))

    def adopt(self, digest: str, number: int) -> None:
        """Remember that the state after a sum was taken over from other analysts; the sum is not here."""
        old = self.entries
        self._write(Entries(old.run, old.past, old.headers, digest, number))

    def kept_sum(self) -> bytes | None:
        """Return the last accepted sum of the current run, sealed as it came; None where it is not here.

        It is what the ledger names, or one step ahead where the process ended between the two writes; the
        caller verifies it either way, and confirms it.

        Raises
        ------
        UpdateError
            When the file is not a sealed sum (any more).
        """
        path = self._folder / SUM_FILE
        if not path.exists():
            return None
        blob = read_bytes(path, what="The last accepted sum", error=KitError)
        run, number = sum_position(blob)
        named = sum_digest(blob) == self.entries.accepted
        ahead = number > self.entries.accepted_round
        return blob if run == self.entries.run and (named or ahead) else None

    def _write_header(self, number: int, blob: bytes) -> None:
        old = self.entries
        headers = {**old.headers, number: signed_header(blob).hex()}
        self._write(Entries(old.run, old.past, headers, old.accepted, old.accepted_round))

    def _upload(self) -> bytes | None:
        path = self._folder / "upload.bin"
        return read_bytes(path, what="The last upload", error=KitError) if path.exists() else None

    def _read(self) -> Entries:
        path = self._folder / "ledger.json"
        if not path.exists():
            return Entries()
        try:
            text = json.loads(read_bytes(path, what="The ledger", error=KitError))
            return Entries(
                run=str(text["run"]),
                past=tuple(map(str, text["past"])),
                headers={int(number): str(header) for number, header in text["headers"].items()},
                accepted=str(text["accepted"]),
                accepted_round=int(text["accepted_round"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise KitError(
                f"{path} is damaged; without it this site could sign one round twice",
                remedy="Provision new kits",
            ) from exc

    def _write(self, entries: Entries) -> None:
        """Write first, then believe: a failed write changes nothing."""
        write_secret(self._folder / "ledger.json", json.dumps(asdict(entries)).encode())
        self.entries = entries
