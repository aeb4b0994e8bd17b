"""Settings as a page may show them: flat, in order, and without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(set, not shown)"

_SECRET_NAMES = re.compile(
    r"(^|[._-])(secret\w*|pass(word|phrase|wd)?|token|credentials?|private\w*|\w*_?key(s|_file)?|dsn)$",
    re.IGNORECASE,
)
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")


def flat_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return ``(dotted name, value)`` of all settings, sorted; secrets are hidden.

    Hidden are values whose name says that they are secret, where they are set, and user names and passwords
    inside addresses (``https://USER:PASSWORD@HOST``).

    Parameters
    ----------
    settings
        Nested mappings of plain values.
    """
    found: list[tuple[str, str]] = []
    _walk("", settings, found)
    return sorted(found)


def redacted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same nested settings with secrets hidden, for a file that a page is made of."""
    return {name: _redact(str(name), value) for name, value in settings.items()}


def _redact(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redacted(value)
    if _SECRET_NAMES.search(name) and value not in (None, "", [], False):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [_redact("", entry) for entry in value]
    return _USER_IN_ADDRESS.sub("***@", value) if isinstance(value, str) else value


def _walk(prefix: str, value: Any, found: list[tuple[str, str]]) -> None:
    for name, entry in value.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(entry, Mapping):
            _walk(path, entry, found)
        else:
            found.append((path, _shown(_redact(str(name), entry))))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_shown(entry) for entry in value) + "]"
    return str(value)
