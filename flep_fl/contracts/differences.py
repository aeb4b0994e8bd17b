"""Name what differs between two nested mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Name every leaf in which two nested mappings differ, as ``(field, ours, theirs)``."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        found: list[tuple[str, Any, Any]] = []
        for key in sorted({*ours, *theirs}):
            name = f"{prefix}.{key}" if prefix else str(key)
            found += differences(ours.get(key), theirs.get(key), name)
        return found
    return [] if ours == theirs else [(prefix, ours, theirs)]
