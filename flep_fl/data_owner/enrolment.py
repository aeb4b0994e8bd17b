"""Enrolment: k of n administrators let a device in, one of them keeps it out.

An :class:`Approval` is a statement that one administrator signs: *enrol* (or *suspend*) this device with this
key in this generation, for these data sets, until then. A device is enrolled while at least ``threshold``
administrators' unexpired approvals of the same key and generation are on file, and may feed the data sets
that as many of them name. Every suspension starts the next generation, so approvals from before it never
count again, in whatever order statements come.

The registry keeps the signed statements, one a line, and verifies them again whenever it starts: what makes a
device count is signatures, not the file.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts.errors import EnrolmentError, RegistryFullError
from flep_fl.contracts.files import sync_path
from flep_fl.data_owner.devices import is_name

Action = Literal["enrol", "suspend"]
Standing = Literal["enrolled", "pending", "suspended", "expired"]

MAX_DATASETS = 64
MAX_GENERATION = 2**31
MAX_LINE_BYTES = 16384
CLOCK_ALLOWANCE = 120
"""Seconds by which an administrator's clock may be ahead of the gateway's."""

_LABEL = b"flep device approval, version 1\0"
_KEY_HEX, _SIGNATURE_HEX = 64, 128
_MAX_TIME = 2**40


@dataclass(frozen=True, slots=True)
class Approval:
    """What one administrator says about one device.

    Attributes
    ----------
    administrator
        Who says it.
    action
        "enrol" or "suspend".
    device, key
        The device's name and its Ed25519 public key, 64 hex digits.
    generation
        How often the device was suspended before, so 0 for a new one.
    datasets
        The data sets that the device may feed, sorted; empty for a suspension.
    issued, expires
        Seconds since 1970 (UTC). An enrolment lasts until the earliest of its approvals expires; a suspension
        must arrive before ``expires``, and then stays.
    signature
        128 hex digits over all of the above; empty before signing.
    """

    administrator: str
    action: Action
    device: str
    key: str
    generation: int
    datasets: tuple[str, ...]
    issued: int
    expires: int
    signature: str = field(default="", repr=False)

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        fields = self._fields()
        del fields["signature"]
        return _LABEL + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    def to_bytes(self) -> bytes:
        """Return one line of JSON, without the line's end."""
        return json.dumps(self._fields(), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Approval:
        """Parse a statement, whoever wrote it.

        Raises
        ------
        EnrolmentError
            It is not one, or a field is out of range.
        """
        damaged = "an approval is damaged, or not in the format of this release"
        if len(data) > MAX_LINE_BYTES:
            raise EnrolmentError(damaged, found=f"{len(data)} bytes")
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise EnrolmentError(damaged) from exc
        names = {"administrator", "action", "device", "key", "generation", "datasets", "issued", "expires"}
        if not isinstance(fields, dict) or fields.keys() != names | {"signature"}:
            raise EnrolmentError(damaged, expected="the fields " + ", ".join(sorted(names | {"signature"})))
        if problem := _problem(fields):
            raise EnrolmentError(f"an approval has a wrong {problem}")
        return cls(**{**fields, "datasets": tuple(fields["datasets"])})

    def _fields(self) -> dict[str, Any]:
        return {
            "administrator": self.administrator,
            "action": self.action,
            "device": self.device,
            "key": self.key,
            "generation": self.generation,
            "datasets": list(self.datasets),
            "issued": self.issued,
            "expires": self.expires,
            "signature": self.signature,
        }


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the registry knows it at one moment.

    Attributes
    ----------
    name, generation
        Its name, and how often it was suspended.
    standing
        "enrolled" (its captures are taken), "pending" (too few approvals yet), "suspended" or "expired".
    key
        The key of this standing, 64 hex digits; None where approvals do not agree on one.
    datasets
        Data sets that it may feed.
    approved_by
        Administrators whose approvals count.
    expires
        Seconds since 1970 at which the enrolment ends; 0 unless enrolled.
    """

    name: str
    generation: int
    standing: Standing
    key: str | None
    datasets: tuple[str, ...]
    approved_by: tuple[str, ...]
    expires: int


def approve(
    signing_key: Ed25519PrivateKey,
    *,
    administrator: str,
    action: Action,
    device: str,
    key: str,
    generation: int = 0,
    datasets: Sequence[str] = (),
    lifetime: float,
    now: float | None = None,
) -> Approval:
    """Sign a statement.

    Parameters
    ----------
    signing_key
        The administrator's Ed25519 key.
    administrator, action, device, key, generation, datasets
        As in :class:`Approval`.
    lifetime
        Seconds until the approval expires, > 0.
    now
        Seconds since 1970; this machine's clock where None.

    Raises
    ------
    EnrolmentError
        A field is out of range.
    """
    issued = int(time.time() if now is None else now)
    chosen = tuple(sorted(set(datasets))) if action == "enrol" else ()
    bare = Approval(administrator, action, device, key, generation, chosen, issued, issued + int(lifetime))
    signed = replace(bare, signature=signing_key.sign(bare.message()).hex())
    return Approval.from_bytes(signed.to_bytes())


def audited(approval: Approval) -> dict[str, Any]:
    """Return what the audit log's line about a statement says."""
    fields = approval._fields()
    del fields["signature"]
    return fields


class DeviceRegistry:
    """The approvals on file, and what follows from them.

    Parameters
    ----------
    path
        The file of statements; made by the first one.
    administrators
        Ed25519 public keys by name.
    threshold
        How many administrators must approve an enrolment, 1..len(administrators).

    Raises
    ------
    EnrolmentError
        The threshold cannot be reached, or a statement on file is damaged or not signed by an administrator.
    """

    def __init__(
        self, path: Path, administrators: Mapping[str, Ed25519PublicKey], *, threshold: int = 1
    ) -> None:
        if not 1 <= threshold <= len(administrators):
            raise EnrolmentError(
                "the number of approvals that an enrolment needs cannot be reached",
                expected=f"1..{len(administrators)}, the number of administrators",
                found=threshold,
            )
        self._path = path
        self._administrators = dict(administrators)
        self._threshold = threshold
        self._approvals: dict[str, dict[str, Approval]] = {}
        self._generations: dict[str, int] = {}
        self._suspended: dict[str, str] = {}
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._seen: set[bytes] = set()
        self._load()

    @property
    def threshold(self) -> int:
        """How many administrators must approve an enrolment."""
        return self._threshold

    def apply(
        self,
        approval: Approval,
        *,
        now: float | None = None,
        before: Callable[[Approval], None] = lambda _approval: None,
    ) -> tuple[Device, bool]:
        """Take a statement in, on disk before this returns.

        Parameters
        ----------
        approval
            The statement.
        now
            Seconds since 1970; this machine's clock where None.
        before
            Called once the statement is known to count, and before it does: writes its line into the audit
            log. What it raises keeps the statement out, so none ever counts without a line.

        Returns
        -------
        tuple of Device and bool
            The device afterwards, and whether the statement was new (a repeated one changes nothing).

        Raises
        ------
        EnrolmentError
            Unknown administrator, wrong signature, expired, issued in the future, for another generation, or
            for another key while one is enrolled, or a key that another device has.
        RegistryFullError
            It did not get onto the disk, and does not count.
        """
        moment = time.time() if now is None else now
        self._check_signature(approval)
        if approval.to_bytes() in self._seen:
            return self.device(approval.device, now=moment), False
        self._check_in_turn(approval, moment)
        before(approval)
        self._append(approval)
        self._take(approval)
        return self.device(approval.device, now=moment), True

    def names(self) -> list[str]:
        """Return the names of all devices on file, sorted."""
        return sorted(self._generations)

    def device(self, name: str, *, now: float | None = None) -> Device:
        """Return a device's standing.

        Raises
        ------
        EnrolmentError
            No statement about it is on file.
        """
        if name not in self._generations:
            raise EnrolmentError(f"no device of the name {name} is on file", remedy="Enrol it first")
        return self._standing(name, time.time() if now is None else now)

    def find(self, name: str, *, now: float | None = None) -> Device | None:
        """Return a device's standing, or None where nothing is on file about it."""
        if name not in self._generations:
            return None
        return self._standing(name, time.time() if now is None else now)

    def public_key(self, key: str) -> Ed25519PublicKey:
        """Return a device's key as an object, made once."""
        found = self._keys.get(key)
        if found is None:
            found = self._keys[key] = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        return found

    def _standing(self, name: str, now: float) -> Device:
        generation = self._generations[name]
        approvals = list(self._approvals.get(name, {}).values())
        if not approvals:
            return Device(name, generation, "suspended", self._suspended.get(name), (), (), 0)
        living = [approval for approval in approvals if approval.expires > now]
        counted = living or approvals
        keys = [approval.key for approval in counted]
        key = max(keys, key=keys.count)
        best = [approval for approval in counted if approval.key == key]
        votes = Counter(name for approval in best for name in approval.datasets)
        datasets = tuple(sorted(name for name, count in votes.items() if count >= self._threshold))
        who = tuple(sorted(approval.administrator for approval in best))
        if not datasets:
            return Device(name, generation, "pending", key, (), who, 0)
        if not living:
            return Device(name, generation, "expired", key, datasets, who, 0)
        expires = sorted((approval.expires for approval in best), reverse=True)[self._threshold - 1]
        return Device(name, generation, "enrolled", key, datasets, who, expires)

    def _check_signature(self, approval: Approval) -> None:
        key = self._administrators.get(approval.administrator)
        try:
            if key is None:
                raise InvalidSignature
            key.verify(bytes.fromhex(approval.signature), approval.message())
        except InvalidSignature as exc:
            raise EnrolmentError(
                "an approval is not signed by one of the owner's administrators",
                remedy="Sign it with the key of an administrator whom the owner's home names",
            ) from exc

    def _check_in_turn(self, approval: Approval, now: float) -> None:
        name = approval.device
        if approval.expires <= now:
            raise EnrolmentError(f"an approval for {name} has expired", remedy="Sign a new one")
        if approval.issued > now + CLOCK_ALLOWANCE:
            raise EnrolmentError(
                f"an approval for {name} is dated in the future", remedy="Set the administrator's clock"
            )
        generation = self._generations.get(name, 0)
        if approval.generation != generation:
            raise EnrolmentError(
                f"an approval for {name} belongs to another generation (a suspension starts the next one)",
                expected=f"generation={generation}",
                found=approval.generation,
                remedy="Sign it again for the expected generation",
            )
        current = self.find(name, now=now)
        if approval.action == "suspend":
            if current is None:
                raise EnrolmentError(f"no device of the name {name} is on file")
            if approval.key not in self._keys_of(name):
                raise EnrolmentError(f"the suspension of {name} names another key than the one on file")
            return
        if current is not None and current.standing == "enrolled" and current.key != approval.key:
            raise EnrolmentError(
                f"{name} is enrolled with another key", remedy="Suspend it first, then enrol the new key"
            )
        for other in self._generations:
            if other != name and approval.key in self._keys_of(other):
                raise EnrolmentError(
                    f"the key of {name} belongs to another device",
                    remedy="Make a key of its own on the device",
                )

    def _keys_of(self, name: str) -> set[str]:
        """Return every key that living or last statements about a device name."""
        keys = {approval.key for approval in self._approvals.get(name, {}).values()}
        return keys | ({self._suspended[name]} if name in self._suspended else set())

    def _take(self, approval: Approval) -> None:
        name = approval.device
        self._seen.add(approval.to_bytes())
        if approval.action == "suspend":
            self._generations[name] = approval.generation + 1
            self._suspended[name] = approval.key
            self._approvals.pop(name, None)
            return
        self._generations[name] = approval.generation
        # One voice each: an administrator's newer statement takes the place of the older one.
        self._approvals.setdefault(name, {})[approval.administrator] = approval

    def _append(self, approval: Approval) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._path.exists()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(descriptor).st_size
        try:
            line = approval.to_bytes() + b"\n"
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            if new:
                sync_path(self._path.parent)
        except OSError as exc:
            with suppress(OSError):
                os.ftruncate(descriptor, size)  # half a line would spoil the next one
            raise RegistryFullError(
                f"the registry of devices cannot be written: {self._path} ({exc.strerror})",
                remedy="Make space and send the statement again",
            ) from exc
        finally:
            os.close(descriptor)

    def _load(self) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            # A crash in mid-write: the statement was never answered for, so its sender sends it again.
            with self._path.open("r+b") as file:
                file.truncate(len(data) - len(torn))
                os.fsync(file.fileno())
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                approval = Approval.from_bytes(line)
                self._check_signature(approval)
                if approval.generation != self._generations.get(approval.device, 0):
                    raise EnrolmentError("a statement is out of turn")
            except EnrolmentError as exc:
                raise EnrolmentError(
                    f"line {number} of the registry of devices does not count: {self._path} ({exc.problem})",
                    remedy="Restore the file from a backup, or remove the line and enrol the device again",
                ) from exc
            self._take(approval)


def _problem(fields: Mapping[str, Any]) -> str | None:
    datasets = fields["datasets"]
    enrol = fields["action"] == "enrol"
    checks = {
        "administrator": is_name(fields["administrator"]),
        "action": isinstance(fields["action"], str) and fields["action"] in ("enrol", "suspend"),
        "device name": is_name(fields["device"]),
        "key": _is_hex(fields["key"], _KEY_HEX),
        "generation": _is_count(fields["generation"], MAX_GENERATION),
        "list of data sets": isinstance(datasets, list)
        and (1 if enrol else 0) <= len(datasets) <= (MAX_DATASETS if enrol else 0)
        and all(is_name(name) for name in datasets)
        and datasets == sorted(set(datasets)),
        "time of issue": _is_count(fields["issued"], _MAX_TIME),
        "expiry": _is_count(fields["expires"], _MAX_TIME)
        and _is_count(fields["issued"], _MAX_TIME)
        and fields["expires"] > fields["issued"],
        "signature": _is_hex(fields["signature"], _SIGNATURE_HEX),
    }
    return next((name for name, holds in checks.items() if not holds), None)


def _is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _is_hex(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and not set(value) - set("0123456789abcdef")
