"""Send messages and yield the replies one by one, as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from flep_fl.contracts.errors import (
    PUBLIC_CODES,
    MalformedUpdateError,
    ModOrderError,
    RoundTimeoutError,
    SiteLostError,
)
from flep_fl.contracts.protocol import ERROR, FLEP_RECORD, OK

POLL_SECONDS = 0.1
NODE_CHECK_SECONDS = 1.0
_NODE_UNAVAILABLE = 5  # flwr.common.constant.ErrorCode.NODE_UNAVAILABLE
_MOD_FAILED = 6  # flwr.common.constant.ErrorCode.MOD_FAILED_PRECONDITION


def exchange(
    grid: Grid, messages: Mapping[int, Message], *, timeout: float
) -> Iterator[tuple[int, Message | None, str]]:
    """Push one message per node and yield ``(node, reply, reason)`` as each is decided.

    Replies are handed on one at a time, so that the caller can add and drop each; Flower's own
    ``send_and_receive`` keeps them all. A node that left the grid is given up at once instead of after
    Flower's own time-out. What was sent to a node that is given up is dropped, and a reply that it sends
    later is not kept.

    Parameters
    ----------
    grid
        Flower's grid.
    messages
        One message per node id.
    timeout
        Seconds for all of them together.

    Yields
    ------
    tuple of (int, Message or None, str)
        The reply with an empty reason, or None with a reason code.
    """
    deadline = time.monotonic() + timeout
    nodes = list(messages)
    pending = dict(zip(grid.push_messages([messages[node] for node in nodes]), nodes, strict=True))
    next_check = time.monotonic() + NODE_CHECK_SECONDS
    while pending:
        arrived = False
        for reply in grid.pull_messages(list(pending)):
            node = pending.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                arrived = True
                yield (node, None, _reason(reply)) if reply.has_error() else (node, reply, "")
        now = time.monotonic()
        if not arrived and now >= deadline:
            _forget(grid, pending)
            for node in pending.values():
                yield node, None, RoundTimeoutError.code
            return
        if not arrived and now >= next_check:
            next_check = now + NODE_CHECK_SECONDS
            online = set(grid.get_node_ids())
            lost = {message_id: node for message_id, node in pending.items() if node not in online}
            _forget(grid, lost)
            for message_id, node in lost.items():
                del pending[message_id]
                yield node, None, SiteLostError.code
        if not arrived and pending:
            time.sleep(POLL_SECONDS)


def _forget(grid: Grid, message_ids: Iterable[str]) -> None:
    """Tell a grid of ours that nobody waits for these replies any more; Flower's own keep them."""
    forget = getattr(grid, "forget_messages", None)
    if forget is not None:
        forget(list(message_ids))


def reply_status(reply: Message) -> str:
    """Return ``ok`` or the reason code of a reply; free text from a site is never passed on."""
    record = reply.content.get(FLEP_RECORD)
    if not isinstance(record, ConfigRecord):
        return MalformedUpdateError.code
    status = record.get("status")
    if not isinstance(status, str):
        return MalformedUpdateError.code
    return status if status == OK or status in PUBLIC_CODES else ERROR


def _reason(reply: Message) -> str:
    """Translate a Flower error reply; free text from a site is never passed on."""
    reason = reply.error.reason or ""
    if reply.error.code == _NODE_UNAVAILABLE:
        return SiteLostError.code
    if reply.error.code == _MOD_FAILED or ModOrderError.__name__ in reason:
        # A mod of Flower's stands outside of ckks_mod: it looked for plain arrays, or ckks_mod saw it.
        return ModOrderError.code
    return reason if reason in PUBLIC_CODES else ERROR
