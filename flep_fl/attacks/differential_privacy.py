"""Flower's ``LocalDpMod`` round the sites' training, and what its parameters promise."""

from __future__ import annotations

from typing import Any

from flwr.clientapp.mod import LocalDpMod

from flep_fl.contracts.errors import ConfigError
from flep_fl.flower.compose_site import SiteChanges


def private_training(settings: Any) -> SiteChanges:
    """Return the change that puts ``LocalDpMod`` inside the encryption; none where ``dp_epsilon`` is 0.

    Parameters
    ----------
    settings
        With ``dp_epsilon``, ``dp_delta``, ``dp_clipping`` and ``dp_sensitivity``.

    Raises
    ------
    ConfigError
        A parameter is out of range.
    """
    if settings.dp_epsilon == 0:
        return SiteChanges()
    try:
        mod = LocalDpMod(
            clipping_norm=settings.dp_clipping,
            sensitivity=settings.dp_sensitivity,
            epsilon=settings.dp_epsilon,
            delta=settings.dp_delta,
        )
    except ValueError as exc:
        raise ConfigError("LocalDpMod refuses attack.dp_*", found=exc) from exc
    return SiteChanges(mods=[mod])


def promise(settings: Any, rounds: int) -> dict[str, float | None]:
    """Return what is stated of the privacy of one site's update: epsilon and delta per round and in all.

    Rounds add up (basic composition), which is the loosest bound and needs no assumption.
    """
    if settings.dp_epsilon == 0:
        return {"epsilon_per_round": None, "epsilon_total": None, "delta_total": None}
    return {
        "epsilon_per_round": settings.dp_epsilon,
        "epsilon_total": settings.dp_epsilon * rounds,
        "delta_total": settings.dp_delta * rounds,
    }
