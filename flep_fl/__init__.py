"""FLEP: federated learning whose images and whose models both stay private.

``ckks_mod`` and ``EncryptedFedAvg`` make any Flower app private; they are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flep_fl.flower.app_mod import ckks_mod
    from flep_fl.flower.app_strategy import EncryptedFedAvg

__all__ = ["EncryptedFedAvg", "ckks_mod"]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives; a cloud never loads what only analysts use."""
    if name == "ckks_mod":
        from flep_fl.flower.app_mod import ckks_mod

        return ckks_mod
    if name == "EncryptedFedAvg":
        from flep_fl.flower.app_strategy import EncryptedFedAvg

        return EncryptedFedAvg
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
