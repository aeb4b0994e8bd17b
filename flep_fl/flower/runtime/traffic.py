"""How much a message weighs on the network."""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute


def message_bytes(message: Message) -> int:
    """Return the size in bytes of a message as it travels, headers included."""
    with no_object_id_recompute():
        return sum(len(thing.deflate()) for thing in get_all_nested_objects(message).values())
