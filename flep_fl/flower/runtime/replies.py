"""What the SuperLink holds of messages, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Message

GetReplies = Callable[[Any, set[str], int], list[Message]]
"""``InMemoryLinkState.get_message_res(state, message_ids, run_id)``."""

DeleteMessages = Callable[[Any, set[str]], None]
"""``InMemoryLinkState.delete_messages(state, message_ins_ids)``."""


def whole_replies(upstream: GetReplies) -> GetReplies:
    """Make a reply count once all of it is here, and from then on whatever becomes of its sender.

    Upstream answers "node unavailable" when a node left after its reply arrived, and hands out replies whose
    parts are still on their way (the ServerApp then blocks for minutes if the sender died).
    """

    def get_message_res(state: Any, message_ids: set[str], run_id: int) -> list[Message]:
        with state.lock:
            replies = state.message_ins_id_to_message_res_id
            whole = {one for one in message_ids if one in replies and _is_whole(state, replies[one])}
            answered = _with_senders_online(state, whole, lambda: upstream(state, set(whole), run_id))
            partial = {one: replies.pop(one) for one in message_ids - whole if one in replies}
            try:
                return answered + upstream(state, message_ids - whole, run_id)
            finally:
                replies.update(partial)

    return get_message_res


def dropped_orders(upstream: DeleteMessages) -> DeleteMessages:
    """Make the SuperLink drop the parts of an instruction together with its entry.

    Upstream drops them when the node confirms their receipt, which a node that died never does: the sum that
    it was sent would stay for ever.
    """

    def delete_messages(state: Any, message_ins_ids: set[str]) -> None:
        upstream(state, message_ins_ids)
        for message_id in message_ins_ids:
            state.object_store.delete(message_id)

    return delete_messages


def forget(state: Any, message_ids: set[str]) -> None:
    """Drop instructions that nobody waits for any more, and what has come of their replies.

    A reply that comes later is refused by upstream: the instruction that it answers is not there.
    """
    with state.lock:
        known = state.message_ins_id_to_message_res_id
        replies = {known[one] for one in message_ids if one in known}
        state.delete_messages(message_ids)
        for reply in replies:
            state.object_store.delete(reply)


def _is_whole(state: Any, message_id: str) -> bool:
    """Whether every object of a message has been uploaded."""
    store = state.object_store
    with store.lock_store:
        waiting = [message_id]
        while waiting:
            entry = store.store.get(waiting.pop())
            if entry is None or not entry.is_available:
                return False
            waiting += entry.child_object_ids
    return True


def _with_senders_online(
    state: Any, message_ids: set[str], call: Callable[[], list[Message]]
) -> list[Message]:
    """Run ``call`` as if the nodes that answered ``message_ids`` were still there; holds the state's lock."""
    if not message_ids:
        return []
    messages = (state.message_ins_store.get(one) for one in message_ids)
    nodes = [state.nodes.get(message.metadata.dst_node_id) for message in messages if message is not None]
    saved = {node.node_id: (node, node.status, node.online_until) for node in nodes if node is not None}
    try:
        for node, _, _ in saved.values():
            node.status, node.online_until = "online", float("inf")
        return call()
    finally:
        for node, status, online_until in saved.values():
            node.status, node.online_until = status, online_until
