"""``ckks_mod``: gives any Flower ClientApp encrypted, signed and verifiable updates.

The wrapped app stays an ordinary one: it gets the global model in ``message.content["arrays"]`` and
answers with its trained ``arrays`` and a metric ``num-examples``. What leaves the site is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from flep_fl.contracts.errors import LayoutError, MalformedUpdateError, StaleUpdateError
from flep_fl.contracts.protocol import (
    FLEP_RECORD,
    METRICS_RECORD,
    OK,
    PAYLOAD_RECORD,
    PAYLOAD_STYPE,
    PUBLIC_METRICS,
    Instruction,
)
from flep_fl.model_security.session import AnalystSession, Arrays

ClientAppCallable = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCallable], Message]


def ckks_mod(
    session: AnalystSession,
    *,
    evaluate: ClientAppCallable | None = None,
    on_close: Callable[[Arrays], None] | None = None,
) -> Mod:
    """Make the mod of one site.

    Parameters
    ----------
    session
        The site's state and keys.
    evaluate
        The app's own evaluate function; runs on each received model, before training.
    on_close
        Called with the final global model when the cloud ends the run.

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

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        instruction = session.open_instruction(_instruction_bytes(message))
        if instruction.kind == "hello":
            return _reply(message, {"site": session.membership.site, "identity": session.identity()})
        figures: dict[str, float] = {}
        _receive(session, message, context, instruction, evaluate, figures)
        if instruction.kind == "close":
            session.closed = True
            if on_close is not None:
                on_close(session.model)
            return _reply(message, {}, figures=figures)
        blob = session.sealed_again(instruction)
        if blob is None:
            started = time.perf_counter()
            trained = call_next(
                _plain_message(message, session.model, MessageType.TRAIN, instruction), context
            )
            figures["seconds_train"] = time.perf_counter() - started
            arrays, examples = _trained(trained)
            started = time.perf_counter()
            blob = session.seal(arrays, examples, instruction)
            figures["seconds_encrypt"] = time.perf_counter() - started
        return _reply(message, {}, blob=blob, figures=figures)

    return mod


def _receive(
    session: AnalystSession,
    message: Message,
    context: Context,
    instruction: Instruction,
    evaluate: ClientAppCallable | None,
    figures: dict[str, float],
) -> None:
    """Take in the sum that a message carries, if any, and evaluate the model that it gives."""
    blob = _payload(message)
    if blob is None or instruction.previous == session.accepted:
        if instruction.previous != session.accepted:
            raise StaleUpdateError(
                "The cloud speaks of a sum that it did not send", found=instruction.previous
            )
        return
    started = time.perf_counter()
    model = session.accept_sum(blob, instruction)
    figures["seconds_decrypt"] = time.perf_counter() - started
    if evaluate is not None:
        answer = evaluate(_plain_message(message, model, MessageType.EVALUATE, instruction), context)
        for record in answer.content.metric_records.values():
            figures.update({k: float(v) for k, v in record.items() if isinstance(v, (int, float))})


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


def _plain_message(message: Message, model: Arrays, message_type: str, instruction: Instruction) -> Message:
    """Build the ordinary Flower message that the wrapped app expects."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(value) for name, value in model.items()}),
            "config": ConfigRecord({"server-round": instruction.round}),
        }
    )
    plain = Message(content, message.metadata.dst_node_id, message_type, group_id=message.metadata.group_id)
    # The wrapped app replies to this message; Flower wants the run and the id of the one it stands for.
    for name in ("_run_id", "_message_id", "_src_node_id"):
        plain.metadata.__dict__[name] = message.metadata.__dict__[name]
    return plain


def _trained(reply: Message) -> tuple[dict[str, NDArray[Any]], int]:
    """Return the trained arrays and the number of examples of an ordinary reply."""
    arrays = list(reply.content.array_records.values())
    counts = [m["num-examples"] for m in reply.content.metric_records.values() if "num-examples" in m]
    if len(arrays) != 1 or len(counts) != 1 or not isinstance(counts[0], int):
        raise LayoutError(
            "The ClientApp's training reply cannot be averaged",
            expected="one ArrayRecord and one integer metric num-examples",
            found=f"{len(arrays)} ArrayRecords and {len(counts)} metrics num-examples",
        )
    return {name: array.numpy() for name, array in arrays[0].items()}, counts[0]


def _reply(
    message: Message,
    fields: dict[str, Any],
    *,
    blob: bytes | None = None,
    figures: dict[str, float] | None = None,
) -> Message:
    """Build the reply: status, sealed payload, and allowed figures only."""
    content = RecordDict({FLEP_RECORD: ConfigRecord({"status": OK, **fields})})
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
    return Message(content, reply_to=message)
