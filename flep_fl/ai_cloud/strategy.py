"""EncryptedFedAvg: federated averaging by a cloud that only adds (ARCHITECTURE of the paper's tier 2).

Every update is verified, added and dropped as it arrives. Dividing by the number of examples is left to
the analysts, who alone can decrypt; the sum travels to each of them once, with the next instruction.

A run survives the end of its process: which round is open, and at which attempt, is on disk before anybody is
asked, and a sum is on disk before anybody is told of it (:mod:`flep_fl.ai_cloud.checkpoint`).
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flep_fl.ai_cloud.checkpoint import CheckpointFolder, RunState, SavedRun
from flep_fl.ai_cloud.exchange import exchange, reply_status
from flep_fl.ai_cloud.members import Member, Members
from flep_fl.ai_cloud.transfers import Relay, bring_up_to_date
from flep_fl.contracts.errors import (
    FlepError,
    MalformedUpdateError,
    MissedSumError,
    QuorumError,
    SignatureError,
    SiteLostError,
    StaleUpdateError,
    SuperLinkLostError,
)
from flep_fl.contracts.ports import Adder
from flep_fl.contracts.protocol import (
    CLOSE,
    ERROR,
    FLEP_RECORD,
    HELLO,
    INITIAL_RECORD,
    METRICS_RECORD,
    OK,
    PAYLOAD_RECORD,
    PAYLOAD_STYPE,
    PUBLIC_METRICS,
    Instruction,
    Kind,
)
from flep_fl.contracts.records import CloudEvaluation, RoundRecord, SiteFailure
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.seal import (
    Expectation,
    SealedUpdate,
    open_update,
    seal_control,
    seal_sum,
    sum_digest,
    sum_previous,
)

_LOG = logging.getLogger(__name__)

CLOSE_GRACE_SECONDS = 10.0
"""How long the closing message waits for a site that is away for a moment."""

RECONNECT_SECONDS = 60.0
"""How long it waits after the cloud or its SuperLink was started again: every site has to connect first."""

_POLL_SECONDS = 0.2

_CLOSING_SAVES = 64
"""How often the closing of a run is saved at most: each writes down every site."""

_OWN_LOOP = "EncryptedFedAvg adds replies one by one and sends each sum once: use start()"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the cloud knows of its federation.

    Attributes
    ----------
    federation, key_id, profile
        Identifiers that every update must carry; ``profile`` is the CKKS profile's digest.
    mode
        ``ckks`` or ``open``.
    shared, digest
        The shared settings and their digest.
    site_keys
        The sites' signature keys by name.
    rounds, quorum, round_timeout
        As configured under ``federation``.
    participants
        How many sites are asked in a round.
    every_sum
        Whether the analysts' optimiser needs every sum, so that a site which missed one needs its state.
    """

    federation: str
    key_id: str
    profile: str
    mode: str
    shared: Mapping[str, Any]
    digest: str
    site_keys: Mapping[str, Ed25519PublicKey]
    rounds: int
    participants: int
    quorum: int
    round_timeout: float
    every_sum: bool = False


@dataclass(frozen=True, slots=True)
class FirstModel:
    """A first model that the cloud brings: the record as it travels, in the clear, and its digest."""

    arrays: ArrayRecord = field(repr=False)
    digest: str


@dataclass(frozen=True, slots=True)
class _SealedSum:
    """The last accepted sum, ready for delivery."""

    blob: bytes = field(repr=False)
    digest: str
    round: int


class EncryptedFedAvg(Strategy):
    """Federated averaging over sealed updates.

    Parameters
    ----------
    terms
        What the cloud knows of its federation.
    signing_key
        The cloud's Ed25519 key.
    make_adder
        Returns a fresh adder for sums over a model of the given number of weights.
    on_sum
        Called with ``(round, sum payload, layout)`` after each accepted sum; a trusted cloud is wired to
        open it there, and may say what the model scores on its own images.
    on_change
        Called with all rounds so far after each of them; a later one completes the evaluation of an earlier.
    on_event
        Called with one line of progress at a time.
    message_bytes
        Measures a message as serialised.
    checkpoint
        Folder in which the run is kept so that it can be resumed; None keeps nothing.
    resume
        The run to go on with, from :func:`~flep_fl.ai_cloud.checkpoint.load_checkpoint`; None: a new one.
    """

    def __init__(
        self,
        terms: Terms,
        signing_key: Ed25519PrivateKey,
        make_adder: Callable[[int], Adder],
        *,
        message_bytes: Callable[[Message], int],
        on_sum: Callable[[int, bytes, ModelLayout], CloudEvaluation | None] | None = None,
        on_change: Callable[[list[RoundRecord]], None] | None = None,
        on_event: Callable[[str], None] | None = None,
        checkpoint: Path | None = None,
        resume: SavedRun | None = None,
    ) -> None:
        self.terms = terms
        self.run = secrets.token_hex(16)
        self.rounds: list[RoundRecord] = []
        self.round, self.attempt = 1, 0  # the first round that is not decided, and how often it was opened
        self.checkpoint = checkpoint
        self._saved: CheckpointFolder | None = None
        self._stored_sum = ""  # digest of the sum that the checkpoint holds
        self._awaited: Set[str] = frozenset()  # sites that are expected back
        self._closed: set[str] = set()
        self._resumed = resume is not None
        self.first: FirstModel | None = None
        """The first model where this cloud brings it; the sites make it from their kits otherwise."""
        self._signing_key = signing_key
        self._make_adder = make_adder
        self._message_bytes = message_bytes
        self._on_sum = on_sum
        self._on_change = on_change or (lambda _: None)
        self._say = on_event or _LOG.info
        self.closing_failures: list[SiteFailure] = []
        self._evaluations: dict[int, dict[str, Mapping[str, float]]] = {}
        self.members = Members(self.run, terms.site_keys, self._hello, self._say, self._compare)
        self._sum: _SealedSum | None = None
        self._start = ""  # name of the first model that the sites carried over from earlier keys
        self._record = RoundRecord(0)
        if resume is not None:
            self._go_on_with(resume)

    @property
    def parameters(self) -> int:
        """Number of weights of the model; 0 before the first site has joined."""
        return self.members.layout.size if self.members.layout else 0

    # --- Flower's strategy interface -----------------------------------------------------------

    def summary(self) -> None:
        """Log the terms, no secret among them."""
        self._say(
            f"federation of {len(self.terms.site_keys)} sites, {self.terms.rounds} rounds, "
            f"mode {self.terms.mode}, quorum {self.terms.quorum}"
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: :meth:`start` has its own loop."""
        raise NotImplementedError(_OWN_LOOP)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used: :meth:`start` has its own loop."""
        raise NotImplementedError(_OWN_LOOP)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: analysts evaluate what they receive with the next instruction."""
        raise NotImplementedError(_OWN_LOOP)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not used: analysts evaluate what they receive with the next instruction."""
        raise NotImplementedError(_OWN_LOOP)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Run the federation: handshake, rounds, closing message.

        Overrides Flower's loop to add replies one by one and to deliver every sum exactly once. The
        first model comes from the sites' kits, so ``initial_arrays`` is not used, nor are the other
        optional arguments: the terms hold them.

        Raises
        ------
        QuorumError
            When too few sites say hello, or no round reaches the quorum.
        StaleCheckpointError
            When the sites have gone on from what this cloud resumes.
        CheckpointError
            When another process uses the checkpoint's folder.
        """
        self.summary()
        if self.checkpoint is not None:
            self._saved = CheckpointFolder(self.checkpoint, self._signing_key)
        try:
            self._save()
            self._gather(grid)
            while self.round <= self.terms.rounds:
                self._play(grid)
            self._close(grid)
            self._on_change(self.rounds)  # whoever listens has it all before the run counts as over
            self._save(finished=True)
        finally:
            if self._saved is not None:
                self._saved.close()
        if self._sum is None:
            raise QuorumError(
                "No round reached the quorum",
                expected=f"federation.quorum={self.terms.quorum} valid updates",
                found="; ".join(f"round {r.round}: {len(r.replied)}" for r in self.rounds),
                remedy="Look at the reasons under `failed` and at the sites' logs",
            )
        return Result()

    def _gather(self, grid: Grid) -> None:
        """Wait for the sites of the kit, or in a resumed run for those that were in it when it stopped."""
        if self.round > self.terms.rounds:
            return  # what is left is the closing message, which knows whom it waits for
        timeout = self.terms.round_timeout
        while True:
            try:
                self.members.gather(
                    grid,
                    quorum=self.terms.quorum,
                    timeout=timeout,
                    wanted=self._awaited if self._resumed else None,
                    resumed=self._resumed,
                )
                self._awaited = frozenset()
                return
            except SuperLinkLostError as exc:
                self._lose(exc)

    def _play(self, grid: Grid) -> None:
        """Play one round to its decision; open it again whenever the SuperLink was lost in it."""
        number = self.round
        while True:
            self.attempt += 1
            self._record = RoundRecord(number, attempts=self.attempt)
            self.rounds[number - 1 :] = [self._record]
            try:
                if self._enough_sites(grid):
                    self._save()  # nobody may be asked twice under one attempt
                    again = f" (attempt {self.attempt})" if self.attempt > 1 else ""
                    self._say(f"round {number}/{self.terms.rounds}: training{again}")
                    messages = self._messages("round", number, self._able(grid, self._sample()))
                    self._account_down(messages)
                    self._aggregate(exchange(grid, messages, timeout=self.terms.round_timeout))
                break
            except SuperLinkLostError as exc:
                self._lose(exc)
        self.round, self.attempt = number + 1, 0
        self._save()  # nobody may be told of a sum that could be forgotten
        try:
            self._after_round(grid)
        except SuperLinkLostError as exc:
            self._lose(exc)
        self._on_change(self.rounds)

    def _lose(self, error: SuperLinkLostError) -> None:
        """Forget the nodes of a SuperLink that is gone; their sites are expected back."""
        self._say(f"{type(error).__name__}: {error}")
        self._awaited = self._awaited | self.members.sites()
        self.members.forget()

    def _after_round(self, grid: Grid) -> None:
        """Do what a subclass wants between two rounds; analysts evaluate with the next instruction."""

    def _app_fields(self, kind: Kind, number: int) -> dict[str, Any]:
        """Return what an instruction says to the wrapped app; our own takes its settings from its kit."""
        return {}

    def _enough_sites(self, grid: Grid) -> bool:
        """Wait until a quorum of sites is here; a round that cannot succeed is not opened."""
        quorum, timeout = self.terms.quorum, self.terms.round_timeout
        enough = self.members.wait_for(grid, quorum=quorum, timeout=timeout, wanted=self._awaited)
        self._awaited = frozenset()
        if enough:
            return True
        self._fail(
            QuorumError(
                f"Round {self._record.round} was not opened: too few sites are connected",
                expected=f"at least federation.quorum={self.terms.quorum}",
                found=len(self.members.present),
            )
        )
        return False

    def _fail(self, error: FlepError) -> None:
        """Record that the current round gave no sum; the last good one stays."""
        self._record.error = error.code
        self._say(f"{type(error).__name__}: {error}")

    def _sample(self) -> dict[int, Member]:
        """Choose this round's participants among the members at random."""
        members = sorted(self.members.present.items(), key=lambda item: item[1].site)
        if self.terms.participants >= len(members):
            return dict(members)
        return dict(secrets.SystemRandom().sample(members, self.terms.participants))

    # --- the run on disk ---------------------------------------------------------------------------

    def _save(self, *, finished: bool = False) -> None:
        """Store where the run stands; the sum only where it is not stored yet."""
        if self._saved is None:
            return
        last = self._sum
        state = RunState(
            federation=self.terms.federation,
            run=self.run,
            key_id=self.terms.key_id,
            config=self.terms.digest,
            round=self.round,
            attempt=self.attempt,
            sum_round=last.round if last else 0,
            sum_digest=last.digest if last else "",
            layout=self.members.layout.to_json() if self.members.layout else "",
            members=tuple(sorted(self.members.sites() | self._awaited)),
            joined=tuple(sorted(self.members.joined)),
            closed=tuple(sorted(self._closed)),
            rounds=self.rounds[: self.round - 1],
            closing_failures=self.closing_failures,
            evaluations=self._evaluations.get(last.round, {}) if last else {},
            finished=finished,
        )
        new = last is not None and last.digest != self._stored_sum
        self._saved.save(state, last.blob if last is not None and new else None)
        self._stored_sum = state.sum_digest

    def _go_on_with(self, saved: SavedRun) -> None:
        """Take over a run from where its last checkpoint left it."""
        state = saved.state
        self.run = self.members.run = state.run
        self.round, self.attempt, self.rounds = state.round, state.attempt, list(state.rounds)
        self.members.layout = saved.layout
        self.members.joined = set(state.joined)
        self.closing_failures = list(state.closing_failures)
        self._awaited, self._closed = frozenset(state.members), set(state.closed)
        if saved.sum is not None:
            self._sum = _SealedSum(saved.sum, state.sum_digest, state.sum_round)
            self._stored_sum = state.sum_digest
            self._evaluations[state.sum_round] = dict(state.evaluations)

    def _compare(self, site: str, identity: Mapping[str, Any]) -> None:
        """Refuse a site that has seen more of this run than this cloud has: it would refuse us."""
        sum_round, digest = (self._sum.round, self._sum.digest) if self._sum else (0, "")
        accepted, signed = identity.get("accepted_round", 0), identity.get("signed_round", 0)
        if not isinstance(accepted, int) or not isinstance(signed, int):
            raise MalformedUpdateError(f"Site {site} does not say what it has seen of the run")
        other = accepted == sum_round and identity.get("accepted", digest) != digest
        if accepted > sum_round or signed > self.round or other:
            raise StaleUpdateError(
                f"Site {site} has seen another course of this run than the cloud",
                expected=f"the sum of round {sum_round}, and no update after round {self.round}",
                found=f"the sum of round {accepted}, and an update for round {signed}",
            )

    # --- messages --------------------------------------------------------------------------------

    def _hello(self, node: int, challenge: str) -> Message:
        message = self._message(HELLO, self._instruction("hello", 0, challenge), node)
        if self.first is not None:
            message.content[INITIAL_RECORD] = self.first.arrays
        return message

    def _able(self, grid: Grid, members: dict[int, Member]) -> dict[int, Member]:
        """Return ``members``, after those that missed a sum got the state that the last one follows."""
        if self._sum is None and self.first is None:
            self._start = self._start or _common_start(self.members.present.values())
        if self.terms.every_sum if self._sum is not None else self._start:
            fit = (sum_previous(self._sum.blob) if self._sum else self._start, self._held)
            relay = Relay(
                ask=self._ask_for_state,
                give=self._give_state,
                payload=_payload,
                timeout=self.terms.round_timeout,
                say=self._say,
            )
            bring_up_to_date(grid, self.members.present, members, fit, relay)
        return members

    @property
    def _held(self) -> str:
        """Digest of what up-to-date sites hold: the last sum, or a first model, brought or carried over."""
        if self._sum is not None:
            return self._sum.digest
        return self.first.digest if self.first is not None else self._start

    def _ask_for_state(self, node: int, challenge: str, donor: str) -> Message:
        instruction = self._instruction("transfer", min(self.round, self.terms.rounds), challenge)
        return self._message(MessageType.TRAIN, replace(instruction, donor=donor), node)

    def _give_state(self, node: int, sealed: bytes) -> Message:
        instruction = self._instruction("transfer", min(self.round, self.terms.rounds))
        return self._message(MessageType.TRAIN, instruction, node, sealed)

    def _instruction(self, kind: Kind, number: int, challenge: str = "") -> Instruction:
        return Instruction(
            kind=kind,
            federation=self.terms.federation,
            run=self.run,
            round=number,
            rounds=self.terms.rounds,
            attempt=max(self.attempt, 1),
            previous=self._held,
            sum_round=self._sum.round if self._sum else 0,
            config=self.terms.digest,
            layout=self.members.layout.digest if self.members.layout else "",
            shared=self.terms.shared if kind == "hello" else {},
            challenge=challenge,
            first=self.first.digest if self.first is not None else "",
            app=self._app_fields(kind, number),
        )

    def _message(
        self, message_type: str, instruction: Instruction, node: int, blob: bytes | None = None
    ) -> Message:
        sealed = seal_control(instruction.to_fields(), self._signing_key)
        content = RecordDict({FLEP_RECORD: ConfigRecord({"instruction": sealed})})
        if blob is not None:
            content[PAYLOAD_RECORD] = _payload_record(blob)
        return Message(content, node, message_type, group_id=str(instruction.round))

    def _messages(self, kind: Kind, number: int, members: Mapping[int, Member]) -> dict[int, Message]:
        """Make the members' messages; the last sum goes only to those who do not have it."""
        instruction = self._instruction(kind, number)
        message_type = {"close": CLOSE, "evaluate": MessageType.EVALUATE}.get(kind, MessageType.TRAIN)
        messages = {}
        for node, member in members.items():
            lacks = self._sum is not None and member.has_sum != self._sum.digest
            blob = self._sum.blob if lacks and self._sum is not None else None
            messages[node] = self._message(message_type, instruction, node, blob)
        return messages

    def _account_down(self, messages: Mapping[int, Message]) -> None:
        """Count a delivery to the round whose sum it carries (the first round's order to the first)."""
        record = self._evaluated_round()
        record.bytes_down += sum(self._message_bytes(message) for message in messages.values())

    def _evaluated_round(self) -> RoundRecord:
        """Return the record of the round whose model the sites hold; the current one before the first sum."""
        return self.rounds[self._sum.round - 1] if self._sum else self._record

    # --- aggregation -----------------------------------------------------------------------------

    def _aggregate(self, replies: Iterable[tuple[int, Message | None, str]]) -> None:
        """Verify, add and drop each reply; seal the sum when the quorum is reached."""
        record, evaluated, layout = self._record, self._evaluated_round(), self.members.layout
        if layout is None:  # pragma: no cover - no round is opened before a site has joined
            raise QuorumError("No site said hello", remedy="Start the sites with `python -m clients`")
        adder = self._make_adder(layout.size)
        contributions: dict[str, SealedUpdate] = {}
        for node, reply, reason in replies:
            member = self.members.present.get(node)
            site = member.site if member else f"node {node}"
            try:
                if reply is None or member is None:
                    raise _Refused(reason or ERROR)
                self._note(evaluated, member, reply)
                status = reply_status(reply)
                if status != OK:
                    raise _Refused(status)
                started = time.perf_counter()
                update = self._verify(reply, site, layout, contributions)
                adder.add(update.payload)
                record.seconds["aggregate"] += time.perf_counter() - started
            except _Refused as exc:
                if exc.reason in (StaleUpdateError.code, MissedSumError.code) and member is not None:
                    member.has_sum = ""  # it may have lost its state: send it the sum again
                self._note_failure(site, exc.reason)
            except FlepError as exc:
                self._note_failure(site, exc.code, f" ({type(exc).__name__}): {exc}")
            except Exception as exc:
                # Whatever a reply was made to break, it breaks for its sender alone.
                self._note_failure(site, MalformedUpdateError.code, f" ({type(exc).__name__})")
            else:
                record.replied.append(site)
                contributions[update.header.sender] = update.without_payload()
        self._settle_evaluation(evaluated)
        self._finish(adder, list(contributions.values()), layout)

    def _note(self, evaluated: RoundRecord, member: Member, reply: Message) -> None:
        """Account for a reply: its size, its times, and what its site says of the model it received."""
        record = self._record
        record.bytes_up += self._message_bytes(reply)
        self._note_app_metrics("round", reply)
        figures = _metrics(reply)
        if not figures:
            return
        record.seconds["train"] += figures.get("seconds_train", 0.0)
        record.seconds["encrypt"] += figures.get("seconds_encrypt", 0.0)
        self._note_evaluation(evaluated, member, figures)

    def _note_evaluation(self, evaluated: RoundRecord, member: Member, figures: Mapping[str, float]) -> None:
        """Fold one site's evaluation into the round that it is of; unweighted, as counts are private."""
        known = self._evaluations.setdefault(evaluated.round, {})
        if "seconds_decrypt" in figures:
            member.has_sum = self._sum.digest if self._sum else ""
            if member.site not in known:  # a site tells its figures again with every reply
                evaluated.seconds["decrypt"] += figures["seconds_decrypt"]
        if not {"accuracy", "loss", "majority_accuracy"} <= set(figures):
            return
        known[member.site] = figures

    def _settle_evaluation(self, evaluated: RoundRecord) -> None:
        """Average what the sites said of a round's model; once for all replies, not with every one."""
        known = self._evaluations.get(evaluated.round)
        if not known:
            return
        evaluated.accuracy = _mean(f["accuracy"] for f in known.values())
        evaluated.loss = _mean(f["loss"] for f in known.values())
        evaluated.majority_accuracy = _mean(f["majority_accuracy"] for f in known.values())

    def evaluate_now(self, grid: Grid, members: Mapping[int, Member]) -> None:
        """Deliver the last sum to ``members``, whose apps evaluate its model with their own functions.

        An evaluation that fails is told, and costs the round nothing.
        """
        evaluated = self._evaluated_round()
        messages = self._messages("evaluate", self._record.round, members)
        self._account_down(messages)
        for node, reply, reason in exchange(grid, messages, timeout=self.terms.round_timeout):
            status = reason if reply is None else reply_status(reply)
            if reply is not None:
                self._note_evaluation(evaluated, members[node], _metrics(reply))
                self._note_app_metrics("evaluate", reply)
            if status != OK:
                self._say(f"site {members[node].site} did not evaluate round {evaluated.round}: {status}")
        self._settle_evaluation(evaluated)

    def _note_app_metrics(self, kind: Kind, reply: Message) -> None:
        """Take in what a wrapped app says of itself; our own says nothing."""

    def _note_failure(self, site: str, reason: str, details: str = "") -> None:
        self._record.failed.append(SiteFailure(site, reason))
        self._say(f"site {site} failed in round {self._record.round}: {reason}{details}")

    def _verify(self, reply: Message, site: str, layout: ModelLayout, seen: Container[str]) -> SealedUpdate:
        """Open an update and hold it against what this round expects of this site."""
        expected = Expectation(
            federation=self.terms.federation,
            run=self.run,
            key_id=self.terms.key_id,
            round=self._record.round,
            attempt=max(self.attempt, 1),
            previous=self._held,
            layout=layout.digest,
            profile=self.terms.profile,
            config=self.terms.digest,
            mode=self.terms.mode,
        )
        update = open_update(_payload(reply), expected=expected, public_keys=self.terms.site_keys)
        if update.header.sender != site:
            raise SignatureError(f"Site {site} sent an update signed by {update.header.sender}")
        if site in seen:
            raise StaleUpdateError(f"Site {site} sent two updates in one round")
        return update

    def _finish(self, adder: Adder, contributions: list[SealedUpdate], layout: ModelLayout) -> None:
        """Seal the sum, or fail the round by name and keep the last good one."""
        record = self._record
        if len(contributions) < self.terms.quorum:
            self._fail(
                QuorumError(
                    f"Round {record.round} has too few valid updates; the last good model is kept",
                    expected=f"at least federation.quorum={self.terms.quorum}",
                    found=len(contributions),
                )
            )
            return
        started = time.perf_counter()
        payload = adder.result()
        blob = seal_sum(contributions, payload, self._signing_key)
        try:
            if self._on_sum is not None:
                found = self._on_sum(record.round, payload, layout)
                if found is not None:
                    record.cloud_accuracy, record.cloud_loss = found.accuracy, found.loss
        except FlepError as exc:
            self._fail(exc)
            return
        record.seconds["aggregate"] += time.perf_counter() - started
        self._sum = _SealedSum(blob, sum_digest(blob), record.round)

    def _close(self, grid: Grid) -> None:
        """Send the closing message with the last sum to every site that ever joined; collect what they say.

        A site that is away for a moment is waited for: without this message it would wait for ever.
        """
        grace = RECONNECT_SECONDS if self._awaited else CLOSE_GRACE_SECONDS
        deadline = time.monotonic() + grace
        while True:
            try:
                self.members.welcome(grid)
                self._close_present(grid)
            except SuperLinkLostError as exc:
                self._lose(exc)
                deadline = max(deadline, time.monotonic() + RECONNECT_SECONDS)
            if self.members.joined <= self._closed or time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        for site in sorted(self.members.joined - self._closed):
            self._note_closing(site, SiteLostError.code)

    def _close_present(self, grid: Grid) -> None:
        """Send the closing message to those who are here and have not had it."""
        evaluated = self._evaluated_round()
        waiting = {n: member for n, member in self.members.present.items() if member.site not in self._closed}
        messages = self._messages("close", self.terms.rounds, self._able(grid, waiting))
        self._account_down(messages)
        step, unsaved = math.ceil(len(waiting) / _CLOSING_SAVES), 0
        try:
            for node, reply, reason in exchange(grid, messages, timeout=self.terms.round_timeout):
                member = waiting[node]
                status = reason if reply is None else reply_status(reply)
                if reply is not None:
                    self._note_evaluation(evaluated, member, _metrics(reply))
                if status != SiteLostError.code:
                    self._closed.add(member.site)
                    if status != OK:
                        self._note_closing(member.site, status)
                    unsaved += 1
                if unsaved >= step:
                    self._settle_evaluation(evaluated)
                    self._save()  # who has heard the last word will not come back for it
                    unsaved = 0
        finally:
            self._settle_evaluation(evaluated)
            if unsaved:
                self._save()

    def _note_closing(self, site: str, status: str) -> None:
        self.closing_failures.append(SiteFailure(site, status))
        self._say(f"site {site} did not close in order: {status}")


class _Refused(Exception):  # noqa: N818 - a signal inside this module, never seen outside
    """A reply that is a refusal, with its reason code."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _metrics(reply: Message) -> dict[str, float]:
    """Return the allowed metrics of a reply, as far as they can be true."""
    record = reply.content.get(METRICS_RECORD)
    if not isinstance(record, MetricRecord):
        return {}
    found = {}
    for name in PUBLIC_METRICS:
        value = record.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
            found[name] = min(float(value), 1.0) if "accuracy" in name else float(value)
    return found


def _common_start(members: Iterable[Member]) -> str:
    """Return the name of the carried-over first model that most sites hold; empty where none does."""
    held = Counter(member.has_sum for member in members if member.has_sum)
    return held.most_common(1)[0][0] if held else ""


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _payload_record(blob: bytes) -> ArrayRecord:
    return ArrayRecord({"sealed": Array(dtype="uint8", shape=(len(blob),), stype=PAYLOAD_STYPE, data=blob)})


def _payload(reply: Message) -> bytes:
    record = reply.content.get(PAYLOAD_RECORD)
    if (
        not isinstance(record, ArrayRecord)
        or "sealed" not in record
        or record["sealed"].stype != PAYLOAD_STYPE
    ):
        raise MalformedUpdateError("A reply holds no sealed update")
    return bytes(record["sealed"].data)
