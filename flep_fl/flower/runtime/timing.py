"""How often Flower's processes speak, in seconds; shorter than upstream so that a loss shows early."""

from __future__ import annotations

from typing import Any

HEARTBEAT_INTERVAL = 5.0
"""What a SuperNode promises. Flower's patience is 2 intervals: a lost site shows after 10 s (upstream 60)."""

HEARTBEAT_MARGIN = 2.0
"""Beats are sent every (interval - margin) x 0.7..0.9, here 2.1 to 2.7 s: three may fail in a row."""

NODE_POLL = 0.3
"""How often an idle SuperNode asks the SuperLink for a message (upstream 3)."""

REPLY_POLL = 0.1
"""How often a SuperNode looks for the reply of its app (upstream 0.5)."""

RECONNECT_LIMIT = 2
"""Longest wait of a SuperNode between two tries to reach the SuperLink (upstream 20)."""

TASK_POLL = 0.15
"""How often an executor asks for the next task."""

REPLIES_POLL = 0.2
"""How often a waiting ServerApp asks for replies (upstream 3)."""


def shorten_node_heartbeat() -> None:
    """Make this SuperNode process beat at :data:`HEARTBEAT_INTERVAL`."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    _replace(heartbeat, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_INTERVAL)
    _replace(heartbeat, "HEARTBEAT_CALL_TIMEOUT", HEARTBEAT_MARGIN)
    _replace(fleet_http_connection, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_INTERVAL)


def accept_short_heartbeat() -> None:
    """Make this SuperLink process accept node heartbeats shorter than upstream's least (10 s)."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    _replace(fleet_handlers, "HEARTBEAT_MIN_INTERVAL", HEARTBEAT_INTERVAL)


def _replace(module: Any, name: str, value: object) -> None:
    """Set a module's attribute that must exist: another flwr version fails loudly, not silently."""
    if not hasattr(module, name):
        raise RuntimeError(f"{module.__name__} has no {name}: this flwr version is not supported")
    setattr(module, name, value)
