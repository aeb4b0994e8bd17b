"""What a cloud may tell the app that a site wraps: record names and an ordinary configuration.

It travels inside the signed instruction, so the sites know that it is the cloud's and unaltered; whether to
follow it is the app's decision, as with any Flower app.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flep_fl.contracts.errors import MalformedUpdateError

Scalar = int | float | str | bool | bytes
ConfigValue = Scalar | list[int] | list[float] | list[str] | list[bool] | list[bytes]

_BYTES = "hex"
_MAX_VALUES = 1024


@dataclass(frozen=True, slots=True)
class AppSettings:
    """What the wrapped app sees beside the model.

    Attributes
    ----------
    arrays, config
        Names of the records under which the app finds the model and the configuration.
    weight
        Name of the metric with which the app tells its number of examples.
    values
        The configuration of this message.
    """

    arrays: str = "arrays"
    config: str = "config"
    weight: str = "num-examples"
    values: Mapping[str, ConfigValue] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain JSON values; bytes become ``{"hex": ...}``."""
        values = {name: _to_plain(value) for name, value in self.values.items()}
        return {"arrays": self.arrays, "config": self.config, "weight": self.weight, "values": values}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> AppSettings:
        """Read what :meth:`to_fields` made; an empty mapping gives the defaults.

        Raises
        ------
        MalformedUpdateError
            When a field is unknown or of another type.
        """
        try:
            if not set(fields) <= {"arrays", "config", "weight", "values"}:
                raise ValueError("unknown field")
            names = {key: fields[key] for key in ("arrays", "config", "weight") if key in fields}
            if not all(isinstance(name, str) and name for name in names.values()):
                raise ValueError("a record's name is not text")
            if names.get("arrays", cls().arrays) == names.get("config", cls().config):
                raise ValueError("model and configuration share one record name")
            plain = fields.get("values", {})
            if not isinstance(plain, dict) or len(plain) > _MAX_VALUES:
                raise ValueError("the values are not a small mapping")
            return cls(**names, values={str(name): _from_plain(value) for name, value in plain.items()})
        except (ValueError, TypeError) as exc:
            raise MalformedUpdateError(
                "The configuration for the app is not in the format of this release", found=exc
            ) from exc


def _to_plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        items = [_from_plain(item) for item in value]
        if len({type(item) for item in items}) > 1 or any(isinstance(item, list) for item in items):
            raise ValueError("a list mixes types")
        return items
    if isinstance(value, dict):
        if set(value) != {_BYTES}:
            raise ValueError("a value is a mapping")
        return bytes.fromhex(value[_BYTES])
    if not isinstance(value, int | float | str | bool):
        raise ValueError(f"a value is a {type(value).__name__}")
    return value
