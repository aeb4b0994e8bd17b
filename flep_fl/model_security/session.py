"""One analyst's part in a federation: accepts sums, seals updates, and never does either twice.

The session owns what must survive between rounds: the model, the digest of the last accepted sum, and a
ledger on disk of the last upload. A repeated request is answered with identical bytes: two different
uploads under one round would let the cloud cancel the check values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from flep_fl.contracts.errors import (
    ConfigMismatchError,
    ForeignUpdateError,
    HaltedError,
    KitError,
    LayoutError,
    StaleUpdateError,
    SumCheckError,
)
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.contracts.ports import ModelCipher
from flep_fl.contracts.protocol import Instruction
from flep_fl.model_security.authenticator import ProjectionContext, authenticate, verify_sum
from flep_fl.model_security.contribution import average, weighted_vector
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.profiles import Profile, vector_length
from flep_fl.model_security.seal import (
    Expectation,
    UpdateHeader,
    new_nonce,
    open_control,
    open_sum,
    seal_control,
    seal_update,
    signed_header,
)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Membership:
    """What a site takes from its own kit and configuration; the cloud's word is compared with it.

    Attributes
    ----------
    site, federation, config
        This site's name, the federation's identifier, the digest of the shared settings.
    shared
        The shared settings, to name a difference.
    mode
        ``ckks`` or ``open``.
    profile, bound, max_examples, min_contributors
        As configured under ``ckks`` and ``federation``.
    site_keys, cloud_key
        Everybody's signature keys.
    """

    site: str
    federation: str
    config: str
    shared: Mapping[str, Any]
    mode: str
    profile: Profile
    bound: float
    max_examples: int
    min_contributors: int
    site_keys: Mapping[str, Ed25519PublicKey]
    cloud_key: Ed25519PublicKey


@dataclass(slots=True)
class _Ledger:
    """What this site has signed: the current run, its last round, and the runs before it."""

    run: str = ""
    round: int = 0
    attempt: int = 0
    header: str = ""
    past: list[str] = field(default_factory=list)


class AnalystSession:
    """State of one analyst.

    Parameters
    ----------
    membership
        What this site takes from its kit.
    signing_key
        This site's Ed25519 key.
    cipher
        Encrypts updates and decrypts sums.
    check_key
        Key of the verifiable sum; None where ``membership.mode`` is ``open``, which verifies nothing.
    initial
        Returns the first model, made from the seed in the kit.
    state
        Folder for the ledger; survives restarts of the site.
    """

    def __init__(
        self,
        membership: Membership,
        signing_key: Ed25519PrivateKey,
        cipher: ModelCipher,
        check_key: CheckKey | None,
        initial: Callable[[], Arrays],
        state: Path,
    ) -> None:
        self.membership = membership
        self._signing_key = signing_key
        self._cipher = cipher
        self._check_key = check_key
        self._initial = initial
        self._state = state
        self._ledger = self._read_ledger()
        self._first = initial()
        self.layout = ModelLayout.of(self._first)
        self.model: Arrays = self._first
        self.accepted = ""
        self.accepted_round = 0
        self.closed = False
        self.refuse_if_halted()

    @property
    def key_id(self) -> str:
        """Identifier of the model key."""
        return self._cipher.key_id

    @property
    def halted(self) -> bool:
        """Whether this site rejected a sum under its current key."""
        marker = self._state / "halted"
        return marker.exists() and marker.read_text().strip() == self.key_id

    # --- instructions ----------------------------------------------------------------------------

    def open_instruction(self, blob: bytes) -> Instruction:
        """Verify and compare an instruction of the cloud.

        Raises
        ------
        SignatureError, ForeignUpdateError, ConfigMismatchError, StaleUpdateError, HaltedError
            When it is not the cloud's, of another federation, of other settings, of a past run or
            round, or when this site has stopped.
        """
        self.refuse_if_halted()
        instruction = Instruction.from_fields(open_control(blob, self.membership.cloud_key))
        if instruction.federation != self.membership.federation:
            raise ForeignUpdateError(
                "An instruction belongs to another federation",
                expected=self.membership.federation,
                found=instruction.federation,
                remedy="Use kits that were provisioned together",
            )
        if instruction.config != self.membership.config:
            self._name_difference(instruction)
        if instruction.kind == "hello":
            self._begin(instruction.run)
        elif instruction.run != self._ledger.run:
            raise StaleUpdateError(
                "An instruction belongs to another run", expected=self._ledger.run, found=instruction.run
            )
        elif instruction.layout != self.layout.digest:
            raise LayoutError(
                "The cloud expects another model", expected=self.layout.digest, found=instruction.layout
            )
        return instruction

    def _name_difference(self, instruction: Instruction) -> None:
        ours, theirs = self.membership.shared, instruction.shared
        fields = [
            f"{section}.{name}: {ours[section][name]!r} here, {theirs[section][name]!r} in the cloud"
            for section in ours
            if isinstance(ours[section], Mapping) and isinstance(theirs.get(section), Mapping)
            for name in ours[section]
            if theirs[section].get(name) != ours[section][name]
        ]
        raise ConfigMismatchError(
            "The cloud was started with other shared settings: " + ("; ".join(fields) or "digest differs"),
            remedy="Start all parties from kits that were provisioned together",
        )

    def _begin(self, run: str) -> None:
        """Enter a run; a run that this site has left before is refused (a replay)."""
        if run == self._ledger.run:
            return
        if run in self._ledger.past:
            raise StaleUpdateError("A past run was announced again", found=run)
        past = [*self._ledger.past, *([self._ledger.run] if self._ledger.run else [])]
        self._ledger = _Ledger(run=run, past=past)
        self._write_ledger()
        self.model, self.accepted, self.accepted_round, self.closed = self._first, "", 0, False

    def identity(self) -> bytes:
        """Return the signed introduction that answers a hello."""
        text = {"run": self._ledger.run, "site": self.membership.site, "layout": self.layout.to_json()}
        return seal_control(text, self._signing_key)

    # --- sums ------------------------------------------------------------------------------------

    def accept_sum(self, blob: bytes, instruction: Instruction) -> Arrays:
        """Verify a sum, decrypt it, and make its average the current model.

        Raises
        ------
        UpdateError
            When the sum is not that of the signed updates, or comes from elsewhere. After a
            :class:`SumCheckError` the site has stopped for good under these keys.
        """
        number = instruction.sum_round
        last = instruction.round if instruction.kind == "close" else instruction.round - 1
        if not self.accepted_round < number <= last:
            raise StaleUpdateError(
                "A sum belongs to a past round", expected=f"{self.accepted_round + 1}..{last}", found=number
            )
        took_part = self._ledger.round == number
        try:
            signed = open_sum(
                blob,
                cloud_key=self.membership.cloud_key,
                site_keys=self.membership.site_keys,
                # A site that missed rounds cannot know which sum the others had before this one.
                expected=self._expectation(
                    number, previous=self.accepted if took_part or number == self.accepted_round + 1 else None
                ),
                min_contributors=self.membership.min_contributors,
                own_sender=self.membership.site,
                own_header=bytes.fromhex(self._ledger.header) if took_part else None,
            )
            if signed.digest != instruction.previous:
                raise StaleUpdateError("The instruction announces another sum than the message carries")
            vector = self._decrypt(signed.payload, [h.tag_input() for h in signed.headers], number)
        except SumCheckError:
            write_secret(self._state / "halted", self.key_id.encode())
            raise
        self.model = self.layout.unflatten(average(vector))
        self.accepted, self.accepted_round = signed.digest, number
        return self.model

    def _expectation(self, number: int, *, previous: str | None) -> Expectation:
        m = self.membership
        return Expectation(
            federation=m.federation,
            run=self._ledger.run,
            round=number,
            key_id=self.key_id,
            layout=self.layout.digest,
            profile=m.profile.digest,
            config=m.config,
            mode=m.mode,
            previous=previous,
        )

    def _decrypt(self, payload: bytes, tag_inputs: list[bytes], number: int) -> NDArray[np.float64]:
        """Decrypt a sum and verify its check values; return the vector without them."""
        values = self._cipher.decrypt(
            payload, vector_length(self.layout.size, checked=self._check_key is not None)
        )
        if self._check_key is None:
            return values
        vector, check_values = values[: self.layout.size + 1], values[self.layout.size + 1 :]
        tolerance = self.membership.profile.tolerance(len(tag_inputs))
        verify_sum(self._check_key, self._context(number), tag_inputs, vector, check_values, tolerance)
        return vector

    # --- updates ---------------------------------------------------------------------------------

    def sealed_again(self, instruction: Instruction) -> bytes | None:
        """Return the bytes of an upload that was made before for this round and attempt.

        Raises
        ------
        StaleUpdateError
            When the round lies before one that this site has signed.
        """
        asked = (instruction.round, instruction.attempt)
        signed = (self._ledger.round, self._ledger.attempt)
        if asked < signed:
            raise StaleUpdateError("A past round was opened again", expected=f"after {signed}", found=asked)
        if asked > signed:
            return None
        return read_bytes(self._state / "upload.bin", what="The last upload", error=KitError)

    def seal(self, arrays: Arrays, examples: int, instruction: Instruction) -> bytes:
        """Encrypt and sign a trained model.

        Parameters
        ----------
        arrays
            The model by tensor name.
        examples
            Number of training examples, 1..``ckks.max_examples``; travels inside the ciphertext only.
        instruction
            The round's instruction.

        Returns
        -------
        bytes
            The sealed update, also kept on disk for a repeated request.

        Raises
        ------
        LayoutError, WeightRangeError
            When the model does not fit the layout or the bound.
        """
        m = self.membership
        vector = weighted_vector(self.layout.flatten(arrays), examples, m.max_examples, m.bound)
        header = UpdateHeader(
            federation=m.federation,
            run=self._ledger.run,
            round=instruction.round,
            attempt=instruction.attempt,
            sender=m.site,
            nonce=new_nonce(),
            previous=self.accepted,
            key_id=self.key_id,
            layout=self.layout.digest,
            profile=m.profile.digest,
            config=m.config,
            mode=m.mode,
        )
        if self._check_key is not None:
            context = self._context(instruction.round)
            check_values = authenticate(self._check_key, context, header.tag_input(), vector)
            vector = np.concatenate([vector, check_values])
        blob = seal_update(header, self._cipher.encrypt(vector), self._signing_key)
        write_secret(self._state / "upload.bin", blob)
        self._ledger.round, self._ledger.attempt = instruction.round, instruction.attempt
        self._ledger.header = signed_header(blob).hex()
        self._write_ledger()
        return blob

    def _context(self, number: int) -> ProjectionContext:
        return ProjectionContext(self.key_id, self.membership.federation, self._ledger.run, number)

    # --- state on disk -----------------------------------------------------------------------------

    def refuse_if_halted(self) -> None:
        """Raise :class:`HaltedError` when this site rejected a sum under its current key."""
        if self.halted:
            raise HaltedError(
                f"Site {self.membership.site} rejected a sum under its current keys and has stopped",
                remedy="Find out why the cloud's sum was wrong, then provision new kits",
            )

    def _read_ledger(self) -> _Ledger:
        path = self._state / "ledger.json"
        if not path.exists():
            return _Ledger()
        try:
            return _Ledger(**json.loads(read_bytes(path, what="The ledger", error=KitError)))
        except (ValueError, TypeError) as exc:
            raise KitError(
                f"{path} is damaged; without it this site could sign one round twice",
                remedy="Provision new kits",
            ) from exc

    def _write_ledger(self) -> None:
        fields = {name: getattr(self._ledger, name) for name in ("run", "round", "attempt", "header", "past")}
        write_secret(self._state / "ledger.json", json.dumps(fields).encode())
