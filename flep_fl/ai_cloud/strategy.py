"""EncryptedFedAvg: federated averaging by a cloud that only adds (ARCHITECTURE of the paper's tier 2).

Every update is verified, added and dropped as it arrives. Dividing by the number of examples is left to
the analysts, who alone can decrypt; the sum travels to each of them once, with the next instruction.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flep_fl.ai_cloud.exchange import exchange
from flep_fl.contracts.errors import (
    PUBLIC_CODES,
    FlepError,
    LayoutError,
    MalformedUpdateError,
    QuorumError,
    SignatureError,
    SiteLostError,
    StaleUpdateError,
)
from flep_fl.contracts.ports import Adder
from flep_fl.contracts.protocol import (
    CLOSE,
    ERROR,
    FLEP_RECORD,
    HELLO,
    METRICS_RECORD,
    OK,
    PAYLOAD_RECORD,
    PAYLOAD_STYPE,
    PUBLIC_METRICS,
    Instruction,
    Kind,
)
from flep_fl.contracts.records import RoundRecord, SiteFailure
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.seal import (
    Expectation,
    SealedUpdate,
    open_control,
    open_update,
    seal_control,
    seal_sum,
    sum_digest,
)

_LOG = logging.getLogger(__name__)

HELLO_SECONDS = 60.0
CLOSE_SECONDS = 120.0
CLOSE_GRACE_SECONDS = 10.0


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
    rounds, fraction, quorum, round_timeout
        As configured under ``federation``.
    """

    federation: str
    key_id: str
    profile: str
    mode: str
    shared: Mapping[str, Any]
    digest: str
    site_keys: Mapping[str, Ed25519PublicKey]
    rounds: int
    fraction: float
    quorum: int
    round_timeout: float


@dataclass(slots=True)
class _Member:
    """A site that said hello, and the digest of the sum that it has."""

    site: str
    has_sum: str = ""


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
        open it there.
    on_round
        Called with each :class:`~flep_fl.contracts.records.RoundRecord` once it is complete.
    on_event
        Called with one line of progress at a time.
    message_bytes
        Measures a message as serialised.
    """

    def __init__(
        self,
        terms: Terms,
        signing_key: Ed25519PrivateKey,
        make_adder: Callable[[int], Adder],
        *,
        message_bytes: Callable[[Message], int],
        on_sum: Callable[[int, bytes, ModelLayout], None] | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self.terms = terms
        self.run = secrets.token_hex(16)
        self.rounds: list[RoundRecord] = []
        self.parameters = 0
        self._signing_key = signing_key
        self._make_adder = make_adder
        self._message_bytes = message_bytes
        self._on_sum = on_sum
        self._on_round = on_round or (lambda _: None)
        self._say = on_event or _LOG.info
        self._members: dict[int, _Member] = {}
        self._refused: dict[int, str] = {}
        self._joined: set[str] = set()
        self._layout: ModelLayout | None = None
        self._sum: _SealedSum | None = None
        self._record = RoundRecord(0)

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
        """Return the round's training messages; ``arrays`` and ``config`` are not used."""
        return self._messages("round", server_round, self._sample(grid)).values()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the updates in ``replies`` and return the sealed sum, or None below the quorum."""
        self._aggregate((reply.metadata.src_node_id, reply, "") for reply in replies)
        if self._sum is None or self._sum.round != server_round:
            return None, None
        return _payload_record(self._sum.blob), MetricRecord()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: analysts evaluate what they receive with the next instruction."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing, as nothing was asked."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: object = None,
    ) -> Result:
        """Run the federation: handshake, rounds, closing message.

        Overrides Flower's loop to add replies one by one and to deliver every sum exactly once. The
        first model comes from the sites' kits, so ``initial_arrays`` is not used, nor are the other
        optional arguments: the terms hold them.

        Raises
        ------
        QuorumError
            When too few sites say hello, or no round reaches the quorum.
        """
        self.summary()
        self._gather(grid)
        for number in range(1, self.terms.rounds + 1):
            self._welcome(grid)
            self._record = RoundRecord(number)
            self.rounds.append(self._record)
            self._say(f"round {number}/{self.terms.rounds}: training")
            messages = self._messages("round", number, self._sample(grid))
            self._account_down(messages)
            self._aggregate(exchange(grid, messages, timeout=self.terms.round_timeout))
            if number > 1:
                self._on_round(self.rounds[number - 2])
        self._close(grid)
        self._on_round(self.rounds[-1])
        if self._sum is None:
            raise QuorumError(
                "No round reached the quorum",
                expected=f"federation.quorum={self.terms.quorum} valid updates",
                found="; ".join(f"round {r.round}: {len(r.replied)}" for r in self.rounds),
                remedy="Look at the reasons under `failed` and at the sites' logs",
            )
        return Result()

    # --- members ---------------------------------------------------------------------------------

    def _gather(self, grid: Grid) -> None:
        """Wait until every site of the kit said hello, or for ``round_timeout`` seconds."""
        deadline = time.monotonic() + self.terms.round_timeout
        wanted = set(self.terms.site_keys)
        self._say(f"waiting for {len(wanted)} sites")
        while time.monotonic() < deadline and not self._all_decided(wanted):
            if not self._welcome(grid):
                time.sleep(0.2)
        present = {member.site for member in self._members.values()}
        if len(present) < self.terms.quorum:
            missing = ", ".join(sorted(wanted - present)) or "none"
            refused = ", ".join(sorted(set(self._refused.values())))
            raise QuorumError(
                f"Too few sites joined (missing: {missing}" + (f"; refused: {refused})" if refused else ")"),
                expected=f"at least federation.quorum={self.terms.quorum}",
                found=len(present),
                remedy="Start the missing sites with `python -m clients`, or raise federation.round_timeout",
            )

    def _all_decided(self, wanted: set[str]) -> bool:
        present = {member.site for member in self._members.values()}
        # A refused node said what it was refused for, and does not come back as somebody else.
        return len(present) + len(self._refused) >= len(wanted)

    def _welcome(self, grid: Grid) -> int:
        """Shake hands with every node that is new; return how many joined."""
        online = set(grid.get_node_ids())
        for gone in set(self._members) - online:
            self._say(f"site {self._members[gone].site} left")
            del self._members[gone]
        for gone in set(self._refused) - online:
            del self._refused[gone]
        new = sorted(online - set(self._members) - set(self._refused))
        if not new:
            return 0
        instruction = self._instruction("hello", 0)
        messages = {node: self._message(HELLO, instruction, node) for node in new}
        joined = 0
        for node, reply, reason in exchange(grid, messages, timeout=HELLO_SECONDS):
            try:
                joined += self._admit(node, reply, reason)
            except FlepError as exc:
                self._refused[node] = exc.code
                self._say(f"a node was refused: {exc}")
        return joined

    def _admit(self, node: int, reply: Message | None, reason: str) -> bool:
        if reply is not None:
            status = _status(reply)
            if status != OK:
                reason = status
        if reply is None or reason:
            self._refused[node] = reason
            self._say(f"a node was refused: reason {reason}")
            return False
        site, layout = self._identify(reply)
        if any(member.site == site for member in self._members.values()):
            raise SignatureError(
                f"Site {site} is connected twice", remedy="Run `python -m clients` once per kit"
            )
        if self._layout is None:
            self._layout = layout
            self.parameters = layout.size
        elif layout.digest != self._layout.digest:
            raise LayoutError(
                f"Site {site} has another model than the sites before it",
                expected=f"layout {self._layout.digest[:12]} with {self._layout.size} weights",
                found=f"layout {layout.digest[:12]} with {layout.size} weights",
                remedy="Seal all archives from one data set, and use one release on every site",
            )
        self._members[node] = _Member(site)
        self._joined.add(site)
        self._say(f"site {site} joined ({len(self._members)}/{len(self.terms.site_keys)})")
        return True

    def _identify(self, reply: Message) -> tuple[str, ModelLayout]:
        """Verify the signed introduction in a hello reply."""
        blob = reply.content[FLEP_RECORD].get("identity")
        claimed = reply.content[FLEP_RECORD].get("site")
        key = self.terms.site_keys.get(claimed) if isinstance(claimed, str) else None
        if key is None or not isinstance(claimed, str) or not isinstance(blob, bytes):
            raise SignatureError("A node introduced itself as a site that is not in the kit")
        identity = open_control(blob, key)
        if identity.get("run") != self.run or identity.get("site") != claimed:
            raise StaleUpdateError(f"Site {claimed} sent the introduction of another run")
        return claimed, ModelLayout.from_json(str(identity.get("layout")))

    def _sample(self, grid: Grid) -> dict[int, _Member]:
        """Choose ``ceil(fraction * sites)`` of the members at random."""
        members = sorted(self._members.items(), key=lambda item: item[1].site)
        wanted = -int(-(self.terms.fraction * len(self.terms.site_keys) - 1e-9) // 1)
        if wanted >= len(members):
            return dict(members)
        return dict(secrets.SystemRandom().sample(members, wanted))

    # --- messages --------------------------------------------------------------------------------

    def _instruction(self, kind: Kind, number: int) -> Instruction:
        return Instruction(
            kind=kind,
            federation=self.terms.federation,
            run=self.run,
            round=number,
            rounds=self.terms.rounds,
            attempt=1,
            previous=self._sum.digest if self._sum else "",
            sum_round=self._sum.round if self._sum else 0,
            config=self.terms.digest,
            layout=self._layout.digest if self._layout else "",
            shared=self.terms.shared if kind == "hello" else {},
        )

    def _message(
        self, message_type: str, instruction: Instruction, node: int, blob: bytes | None = None
    ) -> Message:
        sealed = seal_control(instruction.to_fields(), self._signing_key)
        content = RecordDict({FLEP_RECORD: ConfigRecord({"instruction": sealed})})
        if blob is not None:
            content[PAYLOAD_RECORD] = _payload_record(blob)
        return Message(content, node, message_type, group_id=str(instruction.round))

    def _messages(self, kind: Kind, number: int, members: Mapping[int, _Member]) -> dict[int, Message]:
        """Make the members' messages; the last sum goes only to those who do not have it."""
        instruction = self._instruction(kind, number)
        message_type = CLOSE if kind == "close" else MessageType.TRAIN
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
        """Return the record of the round whose model the sites hold now."""
        return self.rounds[(self._sum.round if self._sum else 1) - 1]

    # --- aggregation -----------------------------------------------------------------------------

    def _aggregate(self, replies: Iterable[tuple[int, Message | None, str]]) -> None:
        """Verify, add and drop each reply; seal the sum when the quorum is reached."""
        record, evaluated = self._record, self._evaluated_round()
        delivered = self._sum.digest if self._sum else ""
        if self._layout is None:
            raise QuorumError("No site said hello", remedy="Start the sites with `python -m clients`")
        adder = self._make_adder(self._layout.size)
        contributions: list[SealedUpdate] = []
        metrics: list[Mapping[str, float]] = []
        for node, reply, reason in replies:
            member = self._members.get(node)
            site = member.site if member else f"node {node}"
            try:
                if reply is None or member is None:
                    raise _Refused(reason or ERROR)
                record.bytes_up += self._message_bytes(reply)
                measured = _metrics(reply)
                if measured:
                    metrics.append(measured)
                    member.has_sum = delivered
                status = _status(reply)
                if status != OK:
                    raise _Refused(status)
                started = time.perf_counter()
                update = self._verify(reply, site, [c.header.sender for c in contributions])
                adder.add(update.payload)
                record.seconds["aggregate"] += time.perf_counter() - started
            except _Refused as exc:
                record.failed.append(SiteFailure(site, exc.reason))
                self._say(f"site {site} failed in round {record.round}: {exc.reason}")
            except FlepError as exc:
                record.failed.append(SiteFailure(site, exc.code))
                self._say(f"the update of site {site} was refused ({type(exc).__name__}): {exc}")
            else:
                record.replied.append(site)
                contributions.append(update.without_payload())
        _average_metrics(evaluated, record, metrics)
        self._finish(record, adder, contributions)

    def _verify(self, reply: Message, site: str, seen: list[str]) -> SealedUpdate:
        """Open an update and hold it against what this round expects of this site."""
        if self._layout is None:  # pragma: no cover - checked by the caller
            raise LayoutError("No layout is known")
        expected = Expectation(
            federation=self.terms.federation,
            run=self.run,
            key_id=self.terms.key_id,
            round=self._record.round,
            attempt=1,
            previous=self._sum.digest if self._sum else "",
            layout=self._layout.digest,
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

    def _finish(self, record: RoundRecord, adder: Adder, contributions: list[SealedUpdate]) -> None:
        if len(contributions) < self.terms.quorum:
            error = QuorumError(
                f"Round {record.round} has too few valid updates; the last good model is kept",
                expected=f"at least federation.quorum={self.terms.quorum}",
                found=len(contributions),
            )
            record.error = error.code
            self._say(f"QuorumError: {error}")
            return
        started = time.perf_counter()
        payload = adder.result()
        blob = seal_sum(contributions, payload, self._signing_key)
        record.seconds["aggregate"] += time.perf_counter() - started
        self._sum = _SealedSum(blob, sum_digest(blob), record.round)
        if self._on_sum is not None and self._layout is not None:
            self._on_sum(record.round, payload, self._layout)

    def _close(self, grid: Grid) -> None:
        """Send the closing message with the last sum to every site that ever joined; collect what they say.

        A site that is away for a moment is waited for: without this message it would wait for ever.
        """
        evaluated = self._evaluated_round()
        metrics: list[Mapping[str, float]] = []
        closed: set[str] = set()
        deadline = time.monotonic() + CLOSE_GRACE_SECONDS
        while True:
            self._welcome(grid)
            waiting = {node: member for node, member in self._members.items() if member.site not in closed}
            messages = self._messages("close", self.terms.rounds, waiting)
            evaluated.bytes_down += sum(self._message_bytes(message) for message in messages.values())
            for node, reply, reason in exchange(grid, messages, timeout=CLOSE_SECONDS):
                site = self._members[node].site
                status = reason if reply is None else _status(reply)
                if reply is not None and (measured := _metrics(reply)):
                    metrics.append(measured)
                if status != SiteLostError.code:
                    closed.add(site)
                if status != OK:
                    self._say(f"site {site} did not close in order: {status}")
                    self._record.failed.append(SiteFailure(site, status))
            if self._joined <= closed or time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        _average_metrics(evaluated, None, metrics)


class _Refused(Exception):  # noqa: N818 - a signal inside this module, never seen outside
    """A reply that is a refusal, with its reason code."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _status(reply: Message) -> str:
    """Return the status of a reply; free text from a site is never passed on."""
    if FLEP_RECORD not in reply.content:
        return MalformedUpdateError.code
    status = reply.content[FLEP_RECORD].get("status")
    return str(status) if status == OK or status in PUBLIC_CODES else ERROR


def _metrics(reply: Message) -> dict[str, float]:
    """Return the allowed metrics of a reply."""
    if METRICS_RECORD not in reply.content:
        return {}
    record = reply.content[METRICS_RECORD]
    values = {name: record[name] for name in PUBLIC_METRICS if name in record}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _average_metrics(
    evaluated: RoundRecord, trained: RoundRecord | None, metrics: Iterable[Mapping[str, float]]
) -> None:
    """Fold the sites' figures into the rounds they belong to; unweighted, as counts are private."""
    values = list(metrics)

    def mean(name: str) -> float | None:
        found = [m[name] for m in values if name in m]
        return sum(found) / len(found) if found else None

    def total(name: str) -> float:
        return sum(m.get(name, 0.0) for m in values)

    if any("accuracy" in m for m in values):
        evaluated.accuracy, evaluated.loss = mean("accuracy"), mean("loss")
        evaluated.majority_accuracy = mean("majority_accuracy")
    evaluated.seconds["decrypt"] += total("seconds_decrypt")
    if trained is not None:
        trained.seconds["train"] += total("seconds_train")
        trained.seconds["encrypt"] += total("seconds_encrypt")


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
