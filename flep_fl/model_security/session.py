"""One analyst's part in a federation: accepts sums, seals updates, and never does either twice.

The session holds the model and compares every word of the cloud with what this site knows from its kit and
its ledger. A repeated request is answered with identical bytes. Whatever a session must know of its past lies
in its state folder, so that a new process goes on where the last one ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from flep_fl.contracts.differences import differences
from flep_fl.contracts.errors import (
    CiphertextError,
    ConfigMismatchError,
    FlepError,
    ForeignUpdateError,
    HaltedError,
    KitError,
    LayoutError,
    MissedSumError,
    ModelKeyError,
    StaleUpdateError,
    SumCheckError,
    TransferError,
    WeightRangeError,
)
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.contracts.ports import Float64Vector, ModelCipher, SumTerms
from flep_fl.contracts.protocol import Instruction
from flep_fl.model_security import own_weights
from flep_fl.model_security.authenticator import ProjectionContext, authenticate, verify_sum
from flep_fl.model_security.carry_over import CarryOver, start_digest
from flep_fl.model_security.contribution import average, weighted_vector
from flep_fl.model_security.first_model import (
    first_model_digest,
    keep_first_model,
    kept_first_model,
)
from flep_fl.model_security.held_state import HeldState
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.ledger import Ledger
from flep_fl.model_security.optimiser_settings import OptimiserSettings
from flep_fl.model_security.profiles import vector_length
from flep_fl.model_security.seal import (
    Expectation,
    SignedSum,
    UpdateHeader,
    new_nonce,
    open_control,
    open_sum,
    parse_header,
    seal_control,
    seal_update,
    sum_position,
)
from flep_fl.model_security.transfer import Holding, agreed

Arrays = Mapping[str, NDArray[Any]]

_LOG = logging.getLogger(__name__)

_LARGEST_ATTEMPT = 1 << 20


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
    profile, bound, max_examples, rounds, min_contributors
        As configured under ``ckks`` and ``federation``.
    site_keys, cloud_key
        Everybody's signature keys.
    clip
        Whether weights beyond the bound are clipped rather than refused (``ckks.out_of_range``).
    contribute_only
        Whether this site holds the public key only. It takes note of sums, and goes on from its own weights.
    optimiser
        What every analyst makes of the average (``federation.optimizer``).
    """

    site: str
    federation: str
    config: str
    shared: Mapping[str, Any]
    mode: str
    profile: SumTerms
    bound: float
    max_examples: int
    rounds: int
    min_contributors: int
    site_keys: Mapping[str, Ed25519PublicKey]
    cloud_key: Ed25519PublicKey
    clip: bool = False
    contribute_only: bool = False
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)


class AnalystSession:
    """State of one analyst.

    ``closed`` says that the cloud has ended the run, ``failure`` why this site cannot go on (the cloud's
    settings differ, or its closing message was refused).

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
        Returns the first model, made from the seed in the kit; None where the cloud brings it with each run.
    state
        Folder for the ledger, the last upload and the last accepted sum; survives restarts of the site.
    carry
        After a rotation of the keys: the model that the first run under the new ones starts from.
    state_key
        Seals states (:func:`~flep_fl.model_security.keyring.state_key`); ``check_key`` where None,
        which serves only where every holder of it may read the model.
    """

    def __init__(
        self,
        membership: Membership,
        signing_key: Ed25519PrivateKey,
        cipher: ModelCipher,
        check_key: CheckKey | None,
        initial: Callable[[], Arrays] | None,
        state: Path,
        carry: CarryOver | None = None,
        state_key: CheckKey | None = None,
    ) -> None:
        self.membership = membership
        self._signing_key = signing_key
        self._cipher = cipher
        self._check_key = check_key
        self._state_key = state_key or check_key
        self._state = state
        self.refuse_if_halted()
        self.ledger = Ledger(state)
        self._brought = initial is None
        self._after_rotation = carry
        # What the cloud brings goes before what this site would carry over.
        self._carry = None if membership.contribute_only or self._brought else carry
        self.model: Arrays = {}
        self._named = ""  # digest of the first model where the cloud brought it
        self._start = ""  # names the first model; empty where it follows from the kit's seed
        self._model_of = ""  # digest of the sum that ``model`` is the average of; ``_start`` before the first
        first = initial() if initial is not None else kept_first_model(state)
        if first is not None:
            self._begin_with(first)
            if membership.contribute_only:
                self.model = own_weights.load(state, self.layout) or first
        self.figures: Mapping[str, float] = {}
        """What this site has to say of the model of the last sum; empty until :meth:`keep_figures`."""
        self.closed = False
        self.failure: FlepError | None = None
        self._held: HeldState | None = None
        if first is not None:
            self._hold_start()
            self._restore()

    @property
    def key_id(self) -> str:
        """Identifier of the model key."""
        return self._cipher.key_id

    @property
    def accepted(self) -> str:
        """Digest of the last accepted sum; before the first the name of the first model, or empty."""
        return self.ledger.entries.accepted or self._start

    @property
    def accepted_round(self) -> int:
        """Round of the last accepted sum; 0 before the first."""
        return self.ledger.entries.accepted_round

    @property
    def halted(self) -> bool:
        """Whether this site rejected a sum under its current key."""
        marker = self._state / "halted"
        return marker.exists() and marker.read_text().strip() == self.key_id

    def refuse_if_halted(self) -> None:
        """Raise :class:`HaltedError` when this site rejected a sum under its current key."""
        if self.halted:
            raise HaltedError(
                f"Site {self.membership.site} rejected a sum under its current keys and has stopped",
                remedy="Find out why the cloud's sum was wrong, then provision new kits",
            )

    # --- state on disk ---------------------------------------------------------------------------

    def _restore(self) -> None:
        """Open the last accepted sum again, verified as on the day it came.

        Where it is missing or does not open, the site holds the first model and says so in its introduction:
        the cloud sends the sum again, and only the one that the ledger names is accepted.
        """
        if self._held is not None:
            self._restore_held(self._held)
        try:
            blob = self.ledger.kept_sum()
            if blob is not None:
                _, number = sum_position(blob)
                signed = self._open_sum(blob, number)
                model = self._open(signed, number)
                if signed.digest != self.accepted:
                    self.ledger.confirm_sum(blob)
                self._believe(model, signed.digest)
        except FlepError as exc:
            _LOG.warning("the last accepted sum on disk is not used (%s): %s", type(exc).__name__, exc)
        if self._model_of == self._start:
            return
        with contextlib.suppress(KitError, ValueError, TypeError, KeyError, AttributeError):
            kept = json.loads(read_bytes(self._figures_file, what="The last figures", error=KitError))
            if kept["sum"] == self._model_of:
                self.figures = {str(name): float(value) for name, value in kept["figures"].items()}

    def _restore_held(self, held: HeldState) -> None:
        """Go on from the optimiser's state on disk; the last sum may be one step ahead of it, or missing."""
        held.load()
        if held.holding.round > self.accepted_round:
            # It was handed over, and the process ended before the ledger said so.
            self.ledger.adopt(held.holding.accepted, held.holding.round)
        self.model, self._model_of = self.layout.unflatten(held.weights), held.holding.accepted
        if held.holding.round == 0:
            self._start = held.holding.accepted

    def _digest_of_start(self) -> str:
        weights = self.layout.flatten(self._first).astype("<f8").tobytes()
        return start_digest(self._check_key, self.membership.federation, self.layout, weights)

    def _hold_start(self) -> None:
        """Hold the state at the first model, where others may need it or it is needed for the next step."""
        m = self.membership
        if self._carry is not None or (m.optimiser.has_memory and not m.contribute_only):
            start, weights = self._holding(0, self._start), self.layout.flatten(self._first)
            self._held = HeldState(m.optimiser, self._state_key, self._state, start, weights)

    def _holding(self, number: int, digest: str) -> Holding:
        m = self.membership
        run = self.ledger.entries.run
        return Holding(m.federation, run, self.key_id, m.config, self.layout.digest, number, digest)

    def _believe(self, model: Arrays, digest: str) -> None:
        """Make the model of an accepted sum the current one."""
        if self._held is not None:
            self._held.commit()
            if not self.membership.optimiser.has_memory:
                self._held = None  # a sum says it all from here on
        self.model, self._model_of = model, digest
        if self._after_rotation is not None:
            self._after_rotation.done()

    @property
    def _figures_file(self) -> Path:
        return self._state / "figures.json"

    def keep_figures(self, figures: Mapping[str, float]) -> None:
        """Keep what this site found out about the model of the last sum, for a repeated request."""
        text = {"sum": self._model_of, "figures": dict(figures)}
        write_secret(self._figures_file, json.dumps(text).encode())
        self.figures = dict(figures)

    # --- instructions ----------------------------------------------------------------------------

    def open_instruction(self, blob: bytes, brought: Arrays | None = None) -> Instruction:
        """Verify and compare an instruction of the cloud.

        Parameters
        ----------
        blob
            The signed instruction.
        brought
            The first model that came with it, if any.

        Raises
        ------
        SignatureError, ForeignUpdateError, ConfigMismatchError, StaleUpdateError, LayoutError, HaltedError
            When it is not the cloud's, of another federation, of other settings, of another run or round,
            for another model, or when this site has stopped.
        """
        self.refuse_if_halted()
        instruction = Instruction.from_fields(open_control(blob, self.membership.cloud_key))
        m = self.membership
        if instruction.federation != m.federation:
            self.failure = ForeignUpdateError(
                "The cloud's instruction belongs to another federation",
                expected=m.federation,
                found=instruction.federation,
                remedy="Use kits that were provisioned together",
            )
            raise self.failure
        if instruction.config != m.config:
            # The cloud signed this and will not change its mind: there is nothing to wait for.
            found = differences(m.shared, instruction.shared) if instruction.shared else []
            fields = "; ".join(
                f"{name}: {ours!r} here, {theirs!r} in the cloud" for name, ours, theirs in found
            )
            self.failure = ConfigMismatchError(
                "The cloud was started with other shared settings: " + (fields or "their digests differ"),
                remedy="Start all parties from kits that were provisioned together",
            )
            raise self.failure
        if instruction.kind == "hello":
            self._begin(instruction.run, instruction.first, brought)
        else:
            self._compare(instruction)
        return instruction

    def _begin(self, run: str, first: str = "", brought: Arrays | None = None) -> None:
        """Enter the announced run, if it is a new one, with its first model."""
        if self._brought and run != self.ledger.entries.run:
            self._take_first(run, first, brought)
        self._refuse_other_first(first)
        if self.ledger.enter(run):
            self.figures, self.closed = {}, False
            self.model, self._model_of = self._first, self._own_start
            self._start = self._own_start
            own_weights.forget(self._state)
            self._hold_start()

    def _take_first(self, run: str, first: str, brought: Arrays | None) -> None:
        """Keep the first model of a new run, once it is known to be the one that the cloud signed."""
        if brought is None or first_model_digest(brought) != first:
            raise ForeignUpdateError("The first model is not the one that the cloud's instruction names")
        ModelLayout.of(brought).flatten(brought)  # refuses what is not finite
        if run in self.ledger.entries.past:
            raise StaleUpdateError("A past run was announced again", found=run)
        keep_first_model(self._state, brought)
        self._begin_with(brought)

    def _begin_with(self, first: Arrays) -> None:
        """Hold the model that the run starts from: brought, carried over, or the one from the kit's seed."""
        self.layout = ModelLayout.of(first)
        self._first = first
        if self._brought:
            self._named = self._start = first_model_digest(first)
        else:
            carried = self._carry.weights(self.layout) if self._carry is not None else None
            if carried is not None:
                self._first = self.layout.unflatten(carried)
            self._start = self._digest_of_start() if carried is not None else ""
        self._own_start = self._start
        self.model, self._model_of = self._first, self._start

    def _refuse_other_first(self, first: str) -> None:
        if first != self._named:
            raise ForeignUpdateError(
                "The cloud speaks of another first model than this site holds",
                expected=self._named or "one that this site makes itself",
                found=first or "one that this site makes itself",
                remedy="Run this site with the same app, or the same entry point, as the cloud",
            )

    def _compare(self, instruction: Instruction) -> None:
        """Refuse an order that does not fit the run as this site knows it."""
        rounds = self.membership.rounds
        if instruction.run != self.ledger.entries.run:
            raise StaleUpdateError(
                "An instruction belongs to another run",
                expected=self.ledger.entries.run,
                found=instruction.run,
            )
        self._refuse_other_first(instruction.first)
        if instruction.layout != self.layout.digest:
            raise LayoutError(
                "The cloud expects another model", expected=self.layout.digest, found=instruction.layout
            )
        if (
            not 1 <= instruction.round <= instruction.rounds <= rounds
            or not 1 <= instruction.attempt <= _LARGEST_ATTEMPT
        ):
            raise StaleUpdateError(
                "An instruction names a round that this federation does not have",
                expected=f"1 to {rounds}, attempt 1 or more",
                found=f"{instruction.round} of {instruction.rounds}, attempt {instruction.attempt}",
            )
        if self.closed and instruction.kind in ("round", "evaluate"):
            raise StaleUpdateError("A round was opened after the end of the run", found=instruction.round)

    def identity(self, instruction: Instruction) -> bytes:
        """Return the signed introduction that answers a hello."""
        text = {
            "run": self.ledger.entries.run,
            "site": self.membership.site,
            "challenge": instruction.challenge,
            "layout": self.layout.to_json(),
            # The cloud knows these, unless it was resumed from an old state, or this site lost its own.
            "accepted": self.ledger.entries.accepted,
            "accepted_round": self.accepted_round,
            "signed_round": self.ledger.signed_round,
            "holds": self._model_of,
            "state_challenge": self._held.draw_challenge() if self._held is not None else "",
        }
        return seal_control(text, self._signing_key)

    # --- sums ------------------------------------------------------------------------------------

    def is_current(self, instruction: Instruction) -> bool:
        """Whether the model held here is the one that the cloud speaks of."""
        if self.membership.contribute_only and instruction.sum_round == 0 and not self._brought:
            self._take_name_of_first(instruction.previous)
        return instruction.previous == self._model_of == self.accepted

    def _take_name_of_first(self, name: str) -> None:
        """Take the cloud's name for the first model, which this site cannot open, until it has signed one.

        Whether all sites mean the same is seen when their updates are added.
        """
        if self.accepted_round > 0:
            return
        signed = list(self.ledger.entries.headers.values())  # all from the first model: no sum was accepted
        self._start = self._model_of = parse_header(bytes.fromhex(signed[0])).previous if signed else name

    def accept_sum(self, blob: bytes, instruction: Instruction) -> Arrays:
        """Verify a sum, decrypt it, and make its average the current model.

        Raises
        ------
        UpdateError
            When the sum is not that of the signed updates, or comes from elsewhere. After a
            :class:`SumCheckError` the site has stopped for good under these keys.
        """
        number = instruction.sum_round
        last = instruction.round - 1 if instruction.kind == "round" else instruction.round
        if not max(1, self.accepted_round) <= number <= last:
            raise StaleUpdateError(
                "A sum belongs to a past round",
                expected=f"{max(1, self.accepted_round)}..{last}",
                found=number,
            )
        try:
            signed = self._open_sum(blob, number)
            if signed.digest != instruction.previous:
                raise StaleUpdateError("The instruction announces another sum than the message carries")
            if number == self.accepted_round and signed.digest != self.accepted:
                raise SumCheckError(
                    "The cloud shows another sum for a round whose sum this site has accepted"
                )
            model = self._open(signed, number)
        except SumCheckError:
            write_secret(self._state / "halted", self.key_id.encode())
            raise
        self.ledger.record_sum(blob)
        self._believe(model, signed.digest)
        self.figures = {}
        return model

    def _open_sum(self, blob: bytes, number: int) -> SignedSum:
        """Verify the envelope of a round's sum and everything that its contributors signed."""
        m, own = self.membership, self.ledger.entries.headers
        return open_sum(
            blob,
            cloud_key=m.cloud_key,
            site_keys=m.site_keys,
            expected=self._expectation(number),
            min_contributors=m.min_contributors,
            own_sender=m.site,
            own_header=bytes.fromhex(own[number]) if number in own else None,
        )

    def _expectation(self, number: int) -> Expectation:
        """Return what the updates in the sum of a round must carry, as far as this site can know."""
        m, own = self.membership, self.ledger.entries.headers
        previous: str | None = None  # a site that missed rounds cannot know which sum the others had
        if number in own:
            previous = parse_header(bytes.fromhex(own[number])).previous
        elif number == self.accepted_round + 1 and (number > 1 or self._carry is None):
            previous = self.accepted  # a site may not know the model that a run after a rotation starts from
        return Expectation(
            federation=m.federation,
            run=self.ledger.entries.run,
            round=number,
            key_id=self.key_id,
            layout=self.layout.digest,
            profile=m.profile.digest,
            config=m.config,
            mode=m.mode,
            attempt=None,  # others may have been asked more often than this site
            previous=previous,
        )

    def _open(self, signed: SignedSum, number: int) -> Arrays:
        """Decrypt a sum, verify its check values and average.

        Every header named the right key and the payload is what the cloud signed, so whatever fails here is
        the cloud's doing; it must not learn in which way, or it could try values one by one.
        """
        if self.membership.contribute_only:
            return (
                self.model
            )  # signatures and headers are verified; whoever can decrypt verifies the sum itself
        checked = self._check_key is not None
        try:
            values = self._cipher.decrypt(signed.payload, vector_length(self.layout.size, checked=checked))
            vector = values[: self.layout.size + 1]
            if self._check_key is not None:
                verify_sum(
                    self._check_key,
                    self._context(number),
                    [header.tag_input() for header in signed.headers],
                    vector,
                    values[self.layout.size + 1 :],
                    self.membership.profile.tolerance(len(signed.headers)),
                )
            mean = average(vector)
            if self._held is None or not self.membership.optimiser.has_memory:
                return self.layout.unflatten(mean)
        except (ModelKeyError, CiphertextError, WeightRangeError, LayoutError) as exc:
            raise SumCheckError("The sum does not open to a sum of the signed updates") from exc
        return self._step(self._held, mean, signed, number)

    def _step(self, held: HeldState, mean: Float64Vector, signed: SignedSum, number: int) -> Arrays:
        """Take the optimiser's step from the state that the contributors started from."""
        if held.holding.accepted != signed.digest:
            previous = signed.headers[0].previous  # open_sum made sure that all contributors agree
            if held.holding.accepted != previous:
                raise MissedSumError(
                    f"Site {self.membership.site} missed a sum, and federation.optimizer="
                    f"{self.membership.optimiser.name} needs every one",
                    remedy="Nothing: another analyst hands the state over with the next round",
                )
            return self.layout.unflatten(held.prepare(mean, self._holding(number, signed.digest)))
        return self.layout.unflatten(held.weights)

    # --- the state of others ---------------------------------------------------------------------

    def state_statement(self, instruction: Instruction) -> tuple[bytes, bytes | None]:
        """Say which state this site holds; where it is the donor, with the sealed state itself.

        Raises
        ------
        TransferError
            When this federation's optimiser has no state, or this site cannot have it.
        """
        if self._held is None:
            raise TransferError("This site holds no state that could be handed over")
        m = self.membership
        return self._held.statement(
            m.site, instruction.challenge, self._signing_key, hand_over=instruction.donor == m.site
        )

    def take_state(self, statements: Sequence[bytes], sealed: bytes) -> None:
        """Take the state that other analysts hand over, and make its weights the current model.

        Raises
        ------
        TransferError
            When it is forged, old, foreign, or not what enough other sites say that they hold.
        """
        if self._held is None:
            raise TransferError("This site has no use for a state")
        m = self.membership
        statement = agreed(
            statements,
            sealed,
            site_keys=m.site_keys,
            joiner=m.site,
            challenge=self._held.challenge(),
            others=m.min_contributors - 1,
        )
        number, digest = statement.holding.round, statement.holding.accepted
        if number == 0 and (
            self.accepted_round > 0 or self.ledger.signed_round > 0 or self._carry is None or self._brought
        ):
            raise TransferError("A first model is handed over to a site that has started from another")
        if 0 < number == self.accepted_round and digest != self.accepted:
            raise TransferError(
                "The others hold another sum for a round whose sum this site has accepted",
                remedy="Do not use this cloud again before its operator has explained it",
            )
        self._held.take_over(statement, sealed)
        if number > self.accepted_round:
            self.ledger.adopt(digest, number)
        self.model, self._model_of = self.layout.unflatten(self._held.weights), digest
        if number == 0:
            self._start = digest
        self.figures = {}

    # --- updates ---------------------------------------------------------------------------------

    def sealed_again(self, instruction: Instruction) -> bytes | None:
        """Return the bytes of an upload that was made before for this round, or None.

        Raises
        ------
        StaleUpdateError
            When the round lies before one that this site has signed.
        """
        return self.ledger.upload_of(instruction.round)

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
        vector = weighted_vector(self.layout.flatten(arrays), examples, m.max_examples, m.bound, clip=m.clip)
        header = UpdateHeader(
            federation=m.federation,
            run=self.ledger.entries.run,
            round=instruction.round,
            attempt=instruction.attempt,
            sender=m.site,
            nonce=new_nonce(),
            previous=self._model_of,
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
        self.ledger.record_upload(instruction.round, blob)
        if m.contribute_only:
            self.model = {tensor.name: np.array(arrays[tensor.name]) for tensor in self.layout.tensors}
            own_weights.save(self._state, self.model)
        return blob

    def _context(self, number: int) -> ProjectionContext:
        return ProjectionContext(self.key_id, self.membership.federation, self.ledger.entries.run, number)
