"""``ckks_mod``: gives any Flower ClientApp encrypted, signed and verifiable updates.

The wrapped app stays an ordinary one: it gets the global model in ``message.content["arrays"]`` and
answers with its trained ``arrays`` and a metric ``num-examples``. What leaves the site is decided here.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from flep_fl.contracts.app_settings import AppSettings
from flep_fl.contracts.errors import (
    FlepError,
    LayoutError,
    MalformedUpdateError,
    StaleUpdateError,
    TrainingError,
    public_code,
)
from flep_fl.contracts.protocol import (
    APP_METRICS_RECORD,
    FLEP_RECORD,
    INITIAL_RECORD,
    METRICS_RECORD,
    OK,
    PAYLOAD_RECORD,
    PAYLOAD_STYPE,
    PUBLIC_METRICS,
    STATEMENTS,
    Instruction,
)
from flep_fl.model_security.session import AnalystSession, Arrays

ClientAppCallable = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCallable], Message]
Figures = dict[str, float]

_LOG = logging.getLogger(__name__)


def ckks_mod(
    session: AnalystSession,
    *,
    evaluate: ClientAppCallable | None = None,
    on_model: Callable[[Arrays], object] | None = None,
    on_close: Callable[[Arrays], object] | None = None,
    metrics: Collection[str] = (),
) -> Mod:
    """Make the mod of one site.

    Parameters
    ----------
    session
        The site's state and keys.
    evaluate
        The app's own evaluate function; runs on each received model, before training.
    on_model
        Called with the global model after each accepted sum.
    on_close
        Called with the global model when the cloud has ended the run.
    metrics
        Names of the app's own metrics that may leave this site, beside its times.

    Returns
    -------
    Callable
        A Flower mod. It should be the outermost one, so that what other mods do (clipping, noise)
        happens before encryption.

    Raises
    ------
    FlepError
        From the returned mod: by the site's runtime turned into a reply that holds the code alone.
    """
    return _CkksMod(session, evaluate, on_model, on_close, frozenset(metrics))


@dataclass(frozen=True, slots=True)
class _CkksMod:
    """The mod of one site; see :func:`ckks_mod`."""

    session: AnalystSession
    evaluate: ClientAppCallable | None
    on_model: Callable[[Arrays], object] | None
    on_close: Callable[[Arrays], object] | None
    metrics: frozenset[str]

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer one message of the cloud."""
        session = self.session
        instruction = session.open_instruction(_instruction_bytes(message), _brought(message))
        figures: Figures = {}
        if instruction.kind == "hello":
            identity = session.identity(instruction)
            return _reply(message, {"status": OK, "site": session.membership.site, "identity": identity})
        if instruction.kind == "close":
            self._close(message, context, instruction, figures)
            return _reply(message, {"status": OK}, figures=figures)
        if instruction.kind == "transfer":
            return self._transfer(message, instruction)
        if (instruction.kind == "evaluate") != (message.metadata.message_type == MessageType.EVALUATE):
            raise MalformedUpdateError("The cloud sent an instruction as a message of another type")
        self._receive(message, context, instruction, figures)
        blob: bytes | None = None
        told: Figures = {}
        try:
            if session.membership.contribute_only and instruction.kind == "evaluate":
                pass  # it cannot open the global model, and its own is nobody's business
            elif instruction.kind == "evaluate":
                order = _plain_message(message, session.model, instruction)
                told = self._allowed(_answered(call_next(order, context)))
            else:
                blob, told = self._train(message, context, call_next, instruction, figures)
        except Exception as exc:
            # The evaluation of the received model still counts; of the failure, the code alone leaves.
            if isinstance(exc, FlepError):
                _LOG.warning("%s: %s", type(exc).__name__, exc)
            else:
                _LOG.exception("the app failed")
            return _reply(message, {"status": public_code(exc)}, figures=figures)
        return _reply(message, {"status": OK}, blob=blob, figures=figures, told=told)

    def _allowed(self, reply: Message) -> Figures:
        """Return the metrics of the app's reply that this site lets out."""
        return {
            name: float(value)
            for record in reply.content.metric_records.values()
            for name, value in record.items()
            if name in self.metrics and isinstance(value, (int, float)) and math.isfinite(value)
        }

    def _receive(
        self, message: Message, context: Context, instruction: Instruction, figures: Figures
    ) -> None:
        """Take in the sum that a message carries, if any, and evaluate the model that it gives.

        What was found out about a model is kept and told again with every answer: the cloud may have ended
        before it heard it.
        """
        session = self.session
        found: Figures = {"seconds_decrypt": 0.0}
        if not session.is_current(instruction):
            blob = _payload(message)
            if blob is None:
                raise StaleUpdateError(
                    "The cloud speaks of a sum that it did not send", found=instruction.previous
                )
            started = time.perf_counter()
            session.accept_sum(blob, instruction)
            found["seconds_decrypt"] = time.perf_counter() - started
        elif instruction.sum_round == 0 or session.figures:
            figures.update(session.figures)
            return
        contributes = session.membership.contribute_only  # it has no global model to write or evaluate
        if self.on_model is not None and not contributes:
            self.on_model(session.model)
        if self.evaluate is not None and not contributes:
            order = _plain_message(message, session.model, instruction)
            for record in self.evaluate(order, context).content.metric_records.values():
                found.update({k: float(v) for k, v in record.items() if isinstance(v, (int, float))})
        session.keep_figures(found)
        figures.update(found)

    def _transfer(self, message: Message, instruction: Instruction) -> Message:
        """Say which state this site holds, or take the one that the message brings."""
        statements = message.content.config_records[FLEP_RECORD].get(STATEMENTS)
        if statements is None:
            statement, sealed = self.session.state_statement(instruction)
            return _reply(message, {"status": OK, "statement": statement}, blob=sealed)
        sealed = _payload(message)
        told = statements if isinstance(statements, list) else []
        words = [entry for entry in told if isinstance(entry, bytes)]
        if sealed is None or len(words) != len(told):
            raise MalformedUpdateError("The cloud relays no state, or statements of the wrong type")
        self.session.take_state(words, sealed)
        if self.on_model is not None:
            self.on_model(self.session.model)
        return _reply(message, {"status": OK})

    def _close(self, message: Message, context: Context, instruction: Instruction, figures: Figures) -> None:
        """End the run, whatever the last sum is worth: the cloud will not speak again."""
        try:
            self._receive(message, context, instruction, figures)
        except FlepError as exc:
            self.session.failure = exc
            raise
        finally:
            self.session.closed = True
        contributes = self.session.membership.contribute_only
        if self.on_close is not None and self.session.accepted_round > 0 and not contributes:
            self.on_close(self.session.model)

    def _train(
        self,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
        instruction: Instruction,
        figures: Figures,
    ) -> tuple[bytes, Figures]:
        """Return the round's upload - made before, or by a training now - and what the app says of it."""
        blob = self.session.sealed_again(instruction)
        if blob is not None:
            return blob, {}
        started = time.perf_counter()
        order = _plain_message(message, self.session.model, instruction)
        trained = _answered(call_next(order, context))
        figures["seconds_train"] = time.perf_counter() - started
        arrays, examples = _trained(trained, AppSettings.from_fields(instruction.app).weight)
        started = time.perf_counter()
        blob = self.session.seal(arrays, examples, instruction)
        figures["seconds_encrypt"] = time.perf_counter() - started
        return blob, self._allowed(trained)


def _instruction_bytes(message: Message) -> bytes:
    record = message.content.get(FLEP_RECORD)
    blob = record.get("instruction") if isinstance(record, ConfigRecord) else None
    if not isinstance(blob, bytes):
        raise MalformedUpdateError("A message of the cloud holds no signed instruction")
    return blob


def _payload(message: Message) -> bytes | None:
    record = message.content.get(PAYLOAD_RECORD)
    if record is None:
        return None
    if (
        not isinstance(record, ArrayRecord)
        or "sealed" not in record
        or record["sealed"].stype != PAYLOAD_STYPE
    ):
        raise MalformedUpdateError("A message of the cloud holds something else than a sealed sum")
    return bytes(record["sealed"].data)


def _brought(message: Message) -> Arrays | None:
    """Return the first model that a hello carries in the clear, if it does."""
    record = message.content.get(INITIAL_RECORD)
    if record is None:
        return None
    try:
        if not isinstance(record, ArrayRecord):
            raise TypeError("it is not an ArrayRecord")
        return {name: array.numpy() for name, array in record.items()}
    except Exception as exc:  # whatever NumPy says of bytes that somebody else chose
        raise MalformedUpdateError("The first model that the cloud sent cannot be read", found=exc) from exc


def _plain_message(message: Message, model: Arrays, instruction: Instruction) -> Message:
    """Build the ordinary Flower message that the wrapped app expects."""
    settings = AppSettings.from_fields(instruction.app)
    values = {**settings.values, "server-round": instruction.round}
    content = RecordDict(
        {
            settings.arrays: ArrayRecord({name: Array(value) for name, value in model.items()}),
            settings.config: ConfigRecord(values),
        }
    )
    # The wrapped app replies to this message, so it keeps the metadata of the one that it stands for.
    plain = copy.copy(message)
    plain.content = content
    return plain


def _answered(reply: Message) -> Message:
    """Refuse a reply in which the app, or a mod around it, says that it failed."""
    if reply.has_error():
        raise TrainingError("The app answered with an error", found=reply.error.reason)
    return reply


def _trained(reply: Message, weight: str) -> tuple[dict[str, NDArray[Any]], int]:
    """Return the trained arrays and the number of examples of an ordinary reply."""
    arrays = list(reply.content.array_records.values())
    counts = [m[weight] for m in reply.content.metric_records.values() if weight in m]
    if len(arrays) != 1 or len(counts) != 1 or not isinstance(counts[0], int):
        raise LayoutError(
            "The ClientApp's training reply cannot be averaged",
            expected=f"one ArrayRecord and one integer metric {weight}",
            found=f"{len(arrays)} ArrayRecords and {len(counts)} metrics {weight}",
        )
    return {name: array.numpy() for name, array in arrays[0].items()}, counts[0]


def _reply(
    message: Message,
    fields: dict[str, Any],
    *,
    blob: bytes | None = None,
    figures: Figures | None = None,
    told: Figures | None = None,
) -> Message:
    """Build the reply: status, sealed payload, and allowed figures only."""
    content = RecordDict({FLEP_RECORD: ConfigRecord(fields)})
    if blob is not None:
        content[PAYLOAD_RECORD] = ArrayRecord(
            {"sealed": Array(dtype="uint8", shape=(len(blob),), stype=PAYLOAD_STYPE, data=blob)}
        )
    metrics = MetricRecord()
    for name in PUBLIC_METRICS:
        if figures and name in figures:
            metrics[name] = figures[name]
    if metrics:
        content[METRICS_RECORD] = metrics
    if told:
        content[APP_METRICS_RECORD] = MetricRecord(dict(told))
    return Message(content, reply_to=message)
