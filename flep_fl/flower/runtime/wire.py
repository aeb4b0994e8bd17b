"""Flower messages as bytes: what travels, how much of it, and the one error reply a site may send."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from flep_fl.contracts.errors import FlepError, MalformedUpdateError, public_code

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WireMessage:
    """A message as Flower stores and sends it.

    Attributes
    ----------
    message_id
        Digest of the whole message.
    objects
        Content of every object in the message's tree (arrays in chunks), by digest.
    """

    message_id: str
    objects: dict[str, bytes] = field(repr=False)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return sum(map(len, self.objects.values()))


def to_wire(message: Message) -> WireMessage:
    """Serialise a message with all its records, and give it its id."""
    with no_object_id_recompute():
        message_id = message.object_id
        message.metadata.__dict__["_message_id"] = message_id
        objects = get_all_nested_objects(message)
        return WireMessage(message_id, {one: thing.deflate() for one, thing in objects.items()})


def from_wire(wire: WireMessage) -> Message:
    """Return the message that a receiver gets; it shares no memory with the sender's."""
    message = cast(Message, inflate_object_from_contents(wire.message_id, dict(wire.objects)))
    message.metadata.__dict__["_message_id"] = wire.message_id
    return message


def describe(exc: BaseException) -> str:
    """Return one line for the local log; what was not raised on purpose also goes to logging in full."""
    if isinstance(exc, FlepError):
        return f"{type(exc).__name__}: {exc}"
    _logger.error("unexpected error in an app", exc_info=exc)
    return f"unexpected {type(exc).__name__} (the traceback is in the log)"


def error_reply(message: Message, exc: BaseException) -> Message:
    """Return the reply to a message that the app failed on: the public code, never the exception's text."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, public_code(exc)), reply_to=message)


def unavailable_reply(message: Message) -> Message:
    """Return the reply that Flower makes up for a node that is gone: code 5, source 1 (the SuperLink)."""
    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "node unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
    return reply


def undecodable_reply(message_id: str, run_id: int) -> Message:
    """Return the error reply that stands for a reply whose bytes are not a message."""
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=message_id,
        created_at=time.time(),
    )
    error = Error(ErrorCode.MESSAGE_UNAVAILABLE, MalformedUpdateError.code)
    return make_message(metadata=metadata, error=error)


def set_task_identity(run_id: int, node_id: int = SUPERLINK_NODE_ID, task_id: int = 1) -> None:
    """Name the run that new messages of this process belong to (a process-wide value in flwr)."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id
