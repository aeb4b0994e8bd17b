"""Canonical JSON: one byte string per value, so that it can be hashed, signed and compared."""

from __future__ import annotations

import json
from typing import Any


def dump(value: object) -> bytes:
    """Serialise to ASCII JSON with sorted keys and no spaces (NaN and infinities are refused)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def load(data: bytes) -> Any:
    """Parse ``data`` and require that it is the canonical form of what it says.

    Raises
    ------
    ValueError
        Not JSON, nested too deeply, or not canonical (spaces, key order, repeated keys).
    """
    try:
        value = json.loads(data)
        canonical = dump(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if canonical != data:
        raise ValueError("not canonical JSON")
    return value
